//! `loris eval`: its samples, grades and intervals, and the subcommand as a shell sees it.
#![allow(clippy::unwrap_used)]

#[path = "../engine/src/bin/loris/eval"]
#[allow(dead_code)] // the binary uses more of them
mod eval {
    pub(crate) mod filler;
    pub(crate) mod fit;
    pub(crate) mod grade;
    pub(crate) mod lists;
    pub(crate) mod needles;
    pub(crate) mod rng;
    pub(crate) mod sample;
    pub(crate) mod stats;
    pub(crate) mod tasks;
    pub(crate) mod words;
}
#[path = "eval/command.rs"]
mod command;
#[path = "cli/support.rs"]
mod support;

use std::collections::{HashMap, HashSet};
use std::convert::Infallible;

use eval::filler::{Filler, with_inserts};
use eval::fit::{Fitted, Misfit, fit};
use eval::grade::grade;
use eval::rng::Rng;
use eval::sample::Sample;
use eval::stats::{grades, paired, student, t_point};
use eval::tasks::{Seed, TASKS, Task};
use eval::words;

/// The tasks that are made of samples.
fn sampled() -> impl Iterator<Item = Task> {
    TASKS.into_iter().map(|(task, _)| task).filter(|&task| task != Task::Prose)
}

/// A sample of this many characters: a token each.
fn fitted(task: Task, len: usize, idx: usize, filler: &Filler) -> Fitted {
    let seed = Seed { seed: 7, len, idx };
    fit::<Infallible>(task, seed, filler, &mut |sample| Ok(chars(sample))).unwrap()
}

fn chars(sample: &Sample) -> Vec<u32> {
    let turn = &sample.turns[0];
    let texts = [&sample.context, &turn.question, &turn.lead];
    texts.into_iter().flat_map(|text| text.chars().map(u32::from)).collect()
}

#[test]
fn samples_are_the_same_for_a_seed_and_different_for_another() {
    for task in sampled() {
        let make = |seed, len, idx| task.sample(Seed { seed, len, idx }, 100, &Filler::Synthetic);
        let sample = make(1, 512, 0);
        assert_eq!(sample, make(1, 512, 0), "{}", task.name());
        for other in [make(2, 512, 0), make(1, 513, 0), make(1, 512, 1)] {
            assert_ne!(sample.turns, other.turns, "{}", task.name());
            assert_ne!(sample.context, other.context, "{}", task.name());
        }
    }
}

#[test]
fn prompts_have_the_length_that_was_asked_for() {
    // Characters of a unit: a word of prose, a pair, a document, a list entry.
    let unit = |task| match task {
        Task::MultiDoc => 240,
        Task::NiahMultikey2 | Task::NiahMultikey3 | Task::KeyValue => 60,
        _ => 16,
    };
    for task in sampled() {
        for len in [1_200, 3_000, 20_000] {
            for idx in 0..3 {
                let n = fitted(task, len, idx, &Filler::Synthetic).prompt.len();
                let slack = unit(task).max(len / 50);
                assert!(n <= len && n + slack >= len, "{} {len}: {n}", task.name());
            }
        }
    }
}

#[test]
fn a_length_that_holds_no_sample_is_refused() {
    for task in sampled() {
        let seed = Seed { seed: 1, len: 64, idx: 0 };
        match fit::<Infallible>(task, seed, &Filler::Synthetic, &mut |s| Ok(chars(s))) {
            Err(Misfit::TooShort { least }) => assert!(least > 64),
            other => panic!("{}: {other:?}", task.name()),
        }
    }
}

#[test]
fn a_fact_stands_in_the_context_once_and_in_no_question() {
    use Task::{KeyValue, MultiDoc, NiahMultikey2, NiahMultikey3, NiahSingle, ThreeTurn, TwoTurn};
    let tasks = [NiahSingle, NiahMultikey2, NiahMultikey3, KeyValue, MultiDoc, TwoTurn, ThreeTurn];
    for (task, idx) in tasks.into_iter().flat_map(|task| (0..20).map(move |idx| (task, idx))) {
        let sample = fitted(task, 3_000, idx, &Filler::Synthetic).sample;
        assert_eq!(sample.turns.len(), task.n_turns());
        let asked: HashSet<_> = sample.turns.iter().map(|turn| &turn.question).collect();
        let expected: HashSet<_> = sample.turns.iter().map(|turn| &turn.expected).collect();
        assert_eq!((asked.len(), expected.len()), (task.n_turns(), task.n_turns()));
        for turn in &sample.turns {
            let [answer] = turn.expected.as_slice() else { panic!("{turn:?}") };
            assert_eq!(sample.context.matches(answer).count(), 1, "{} {answer}", task.name());
            assert!(!turn.question.contains(answer) && !turn.lead.contains(answer));
        }
    }
}

#[test]
fn distractors_are_of_the_needles_kind_and_differ_from_them() {
    for task in [Task::NiahMultikey2, Task::NiahMultikey3, Task::KeyValue] {
        let sample = fitted(task, 4_000, 1, &Filler::Synthetic).sample;
        let hay = sample.context.split_once("\n\n").unwrap().1;
        let lines: Vec<_> = hay.lines().collect();
        assert!(lines.len() > 40, "{}", task.name());
        let pairs: Vec<(String, String)> = lines
            .iter()
            .map(|line| {
                let line = line.trim_matches(['{', '}', ' ', ',', '.']);
                let (key, value) = line.split_once(" is ").or(line.split_once(": ")).unwrap();
                (key.to_owned(), value.to_owned())
            })
            .collect();
        let keys: HashSet<_> = pairs.iter().map(|(key, _)| key).collect();
        let values: HashSet<_> = pairs.iter().map(|(_, value)| value).collect();
        assert_eq!((keys.len(), values.len()), (lines.len(), lines.len()));
        let lead = sample.turns[0].lead.trim_end_matches([':', ' ', '"']);
        let lead = lead.trim_start_matches('"').trim_end_matches(" is");
        let asked = pairs.iter().filter(|(key, _)| key.trim_matches('"') == lead);
        let answers: Vec<_> = asked.map(|(_, value)| value.trim_matches('"')).collect();
        assert_eq!(answers, [sample.turns[0].expected[0].as_str()]);
    }
    // Turns of a dialogue ask about different parts.
    for idx in 0..20 {
        let Sample { context, turns } =
            fitted(Task::ThreeTurn, 6_000, idx, &Filler::Synthetic).sample;
        let mut parts: Vec<_> =
            turns.iter().map(|turn| context.find(&turn.expected[0]).unwrap()).collect();
        parts.sort_unstable();
        assert!(parts[0] < 2_300 && parts[2] > 3_700, "{parts:?}");
    }
}

#[test]
fn variables_form_one_chain() {
    for idx in 0..10 {
        let Sample { context, turns } =
            fitted(Task::VariableTracking, 3_000, idx, &Filler::Synthetic).sample;
        let names = &turns[0].expected;
        assert_eq!(names.len(), eval::needles::N_VARIABLES);
        for (at, name) in names.iter().enumerate() {
            let n = if at + 1 == names.len() { 1 } else { 2 };
            assert_eq!(context.matches(name.as_str()).count(), n);
        }
        let places: Vec<_> =
            names.iter().map(|name| context.find(name.as_str()).unwrap()).collect();
        assert!(places.is_sorted(), "{places:?}");
        for pair in names.windows(2) {
            assert!(context.contains(&format!("VAR {} = VAR {}.", pair[1], pair[0])));
        }
    }
}

#[test]
fn common_and_frequent_words_are_so() {
    for (task, len, factor) in [
        (Task::CommonWords, 1_000, 3),
        (Task::CommonWords, 20_000, 5),
        (Task::FrequentWords, 1_000, 1),
        (Task::FrequentWords, 20_000, 1),
    ] {
        for idx in 0..5 {
            let sample = fitted(task, len, idx, &Filler::Synthetic).sample;
            let list = sample.context.split_once("\n\n").unwrap().1;
            let mut counts: HashMap<&str, usize> = HashMap::new();
            for word in list.split(' ') {
                *counts.entry(word).or_default() += 1;
            }
            let expected = &sample.turns[0].expected;
            let least = expected.iter().map(|word| counts[word.as_str()]).min().unwrap();
            let others = counts.iter().filter(|(word, _)| !expected.contains(&(**word).to_owned()));
            let most = others.map(|(_, &n)| n).max().unwrap();
            assert!(least >= factor * most && least > most, "{} {least} {most}", task.name());
        }
    }
}

#[test]
fn words_are_many_and_none_is_part_of_another() {
    let lists: [&[&str]; 6] = [
        &words::ADJECTIVES,
        &words::NOUNS,
        &words::LISTED,
        &words::FIRST_NAMES,
        &words::LAST_NAMES,
        &words::JOBS,
    ];
    for list in lists {
        for (idx, word) in list.iter().enumerate() {
            let inside = list.iter().enumerate().find(|&(i, w)| i != idx && w.contains(word));
            assert_eq!(inside, None, "{word}");
        }
    }
    let both = words::NOUNS.iter().filter(|noun| words::LISTED.contains(noun));
    assert_eq!(both.count(), 0);
    let towns: HashSet<_> = words::TOWN_HEADS
        .iter()
        .flat_map(|head| words::TOWN_TAILS.iter().map(move |tail| format!("{head}{tail}")))
        .collect();
    assert_eq!(towns.len(), 400);
}

#[test]
fn prose_varies_and_a_users_text_is_used_as_it_is() {
    let prose = Filler::Synthetic.words(&mut Rng::new(1, &[]), 3_000).join(" ");
    let sentences: Vec<_> = prose.split_inclusive('.').collect();
    let different: HashSet<_> = sentences.iter().collect();
    assert!(sentences.len() > 150 && different.len() == sentences.len());

    let text = Filler::from_text("One two three.\n Four five six!  Seven eight nine.").unwrap();
    let got = text.words(&mut Rng::new(3, &[]), 12).join(" ");
    let starts = ["One two three.", "Four five six!", "Seven eight nine."];
    assert!(starts.iter().any(|start| got.starts_with(start)), "{got}");
    assert_eq!(got.split(' ').count(), 12);
    assert!(Filler::from_text(" \n").is_none());

    let words: Vec<String> = "a b. c d. e f.".split(' ').map(str::to_owned).collect();
    let inserts = [(0.9, "LAST".to_owned()), (0.0, "FIRST".to_owned())];
    assert_eq!(with_inserts(&words, &inserts), "a b. FIRST c d. e f. LAST");
}

#[test]
fn answers_are_scored_by_what_they_hold() {
    let rows: [(&str, &[&str], f64); 9] = [
        ("It is 12345.", &["12345"], 1.0),
        ("It is 1234.", &["12345"], 0.0),
        ("", &["12345"], 0.0),
        ("AbCd", &["aBcD"], 1.0),
        ("one, two", &["one", "two", "three", "four"], 0.5),
        ("two two two", &["one", "two"], 0.5),
        ("three\ntwo\none", &["one", "two", "three"], 1.0),
        ("\u{c4}pfel", &["\u{e4}pfel"], 1.0),
        ("anything", &[], 0.0),
    ];
    for (answer, expected, want) in rows {
        let expected: Vec<_> = expected.iter().map(|&text| text.to_owned()).collect();
        assert_eq!(grade(answer, &expected), want, "{answer}");
    }
}

fn binary(n_ones: usize, n: usize) -> Vec<f64> {
    (0..n).map(|i| f64::from(u8::from(i < n_ones))).collect()
}

fn close(found: f64, want: f64) {
    assert!((found - want).abs() < 1e-4, "{found} for {want}");
}

#[test]
fn intervals_have_their_known_values() {
    // Wilson, as in Brown, Cai and DasGupta's formula.
    for (k, n, lo, hi) in [(8, 10, 0.4902, 0.9433), (0, 30, 0.0, 0.1135), (30, 30, 0.8865, 1.0)] {
        let e = grades(&binary(k, n)).unwrap();
        close(e.lo, lo);
        close(e.hi, hi);
        assert_eq!((e.method, e.n), ("wilson", n));
    }
    for (df, t) in [(1, 12.7062), (4, 2.7764), (10, 2.2281), (11, 2.2010), (20, 2.0860)] {
        close(t_point(df), t);
    }
    close(t_point(120), 1.9799);
    let e = student(&[1.0, 2.0, 3.0, 4.0, 5.0]).unwrap();
    close(e.mean, 3.0);
    close(e.hi - e.mean, 1.9633);
    assert_eq!(e.method, "t");
    assert!(student(&[1.0]).unwrap().lo.is_nan());
    let shares = grades(&[0.0, 0.2, 1.0]).unwrap();
    assert_eq!((shares.method, shares.lo, shares.hi), ("t", 0.0, 1.0));
    assert!(grades(&[]).is_none() && paired(&[], &[]).is_none());
}

#[test]
fn differences_are_of_pairs() {
    let same = paired(&binary(12, 30), &binary(12, 30)).unwrap();
    assert_eq!((same.mean, same.method), (0.0, "bonett-price"));
    close(same.hi, 0.0866);
    close(same.lo, -0.0866);
    // Five pairs gained and one lost.
    let mut gained = binary(15, 30);
    gained[0] = 0.0;
    let e = paired(&gained, &binary(10, 30)).unwrap();
    close(e.mean, 4.0 / 30.0);
    close(e.lo, -0.0427);
    close(e.hi, 0.2927);
    let e = paired(&[0.5, 0.7, 0.9], &[0.4, 0.6, 0.8]).unwrap();
    assert_eq!(e.method, "t");
    close(e.lo, 0.1);
    close(e.hi, 0.1);
}
