//! What goes with what: every pair of rows of all tables either runs, the same in passes of other sizes and behind a save,
//! or is refused with the reason that the table of rules gives.
#![allow(clippy::unwrap_used)]

mod support;

use loris::backend::cpu::Isa;
use loris::compute::Lazy;
use loris::compute::lazy::PRESETS;
use loris::keep::{self, Evict};
use loris::loader::Dtype;
use loris::recipe::rules::{Is, Pair, TABLE, Verdict};
use loris::{Error, KvFormat, Model, ModelOptions, SessionOptions, StreamOptions};
use support::{bits, deep, open_on, options, rounded};

const PROMPT: usize = 70;
const ANSWER: usize = 6;

/// A choice: what it asks a session for, and what that is by the rules.
#[derive(Clone, Debug)]
struct Choice {
    name: String,
    set: fn(&mut SessionOptions, &str),
    is: Vec<Is>,
}

impl Choice {
    fn new(name: impl Into<String>, set: fn(&mut SessionOptions, &str), is: &[Is]) -> Self {
        Self { name: name.into(), set, is: is.to_vec() }
    }
}

/// Every row of the tables of sessions.
fn choices(n_wide: usize) -> Vec<Choice> {
    let mut choices = vec![
        Choice::new("dense", |_, _| {}, &[]),
        Choice::new(
            "stream",
            |o, _| o.stream = Some(StreamOptions { sink: 4, window: 20 }),
            &[Is::Stream],
        ),
        Choice::new("ctx", |o, _| o.ctx_len = Some(200), &[Is::Ctx]),
    ];
    choices.extend(PRESETS.iter().map(|preset| {
        let spec = format!("{},min-len=1", preset.name);
        Choice::new(spec, |o, spec| o.lazy = Some(Lazy::parse(spec, LAYERS).unwrap()), &[Is::Lazy])
    }));
    choices.extend(keep::TABLE.iter().map(|policy| {
        let spec = format!("{}:36,sinks={}", policy.name, n_wide.max(4));
        let counts_all = Evict::parse(&spec).unwrap().counts_all();
        let is: &[Is] = if counts_all { &[Is::Evict, Is::AllMass] } else { &[Is::Evict] };
        Choice::new(spec, |o, spec| o.evict = Some(Evict::parse(spec).unwrap()), is)
    }));
    choices
}

const LAYERS: usize = 4;

fn tokens(n: usize) -> Vec<u32> {
    (0..n).map(|i| u32::try_from((i * 31 + i * i * 4) % 120).unwrap()).collect()
}

/// Logits behind the prompt and behind each token of an answer; from the middle of which it is saved and restored.
fn run(model: &Model, session: &SessionOptions, restores: bool) -> Vec<Vec<u32>> {
    let mut session = model.session(session).unwrap();
    session.prefill(&tokens(PROMPT)).unwrap();
    let mut rows = vec![bits(session.logits().unwrap())];
    for (i, token) in tokens(ANSWER).into_iter().enumerate() {
        if restores && i == ANSWER / 2 {
            let mut saved = Vec::new();
            session.save(&mut saved).unwrap();
            assert_eq!(session.saved_bytes().unwrap(), saved.len());
            session = model.restore(&mut &saved[..], &SessionOptions::default()).unwrap();
        }
        session.decode(token).unwrap();
        rows.push(bits(session.logits().unwrap()));
    }
    rows
}

/// Rows of the table that refuse `choices` together on a model that is `model`.
fn refusals(choices: &[&Choice], model: &[Is]) -> Vec<usize> {
    let all: Vec<Is> = choices.iter().flat_map(|choice| &choice.is).chain(model).copied().collect();
    let refuses = |&row: &usize| {
        let Pair { what, with, verdict, .. } = TABLE[row];
        matches!(verdict, Verdict::Refused) && all.contains(&what) && all.contains(&with)
    };
    (0..TABLE.len()).filter(refuses).collect()
}

fn model(name: &str, kv: KvFormat, chunk: usize) -> Model {
    let sizes =
        ModelOptions { kv: kv.into(), aux_tokens: 512, page_len: 16, chunk, ..options(1_024) };
    let mut checkpoint = deep(rounded(name, Dtype::BF16), LAYERS);
    checkpoint.config.ctx_len = 512;
    open_on(Isa::Portable, checkpoint, &sizes)
}

#[test]
fn every_pair_runs_or_says_why_not() {
    let (mut n_run, mut met) = (0, vec![false; TABLE.len()]);
    for (name, of_model) in [
        ("llama-tied", &[][..]),
        ("mistral-window", &[Is::Windows]),
        ("llama-dynamic", &[Is::DynamicRope]),
    ] {
        for kv in KvFormat::ALL {
            let [this, other] = [48, 32].map(|chunk| model(name, kv, chunk));
            let layout = this.plan().layout;
            let mut is = of_model.to_vec();
            is.extend((layout.skew() > 0).then_some(Is::Coded));
            is.extend(layout.kv.are_sealed().then_some(Is::Sealed));
            let choices = choices(if layout.skew() > 0 { layout.first_len() } else { 0 });
            for (i, a) in choices.iter().enumerate() {
                // Two of one kind are one choice.
                for b in choices[i..].iter().filter(|b| b.name == a.name || b.is != a.is) {
                    let mut session = SessionOptions::default();
                    (a.set)(&mut session, &a.name);
                    (b.set)(&mut session, &b.name);
                    let what = format!("{name} {kv} {} {}", a.name, b.name);
                    let refusals = refusals(&[a, b], &is);
                    if refusals.is_empty() {
                        let rows = run(&this, &session, false);
                        // Keys of a prompt that comes in parts are turned for the part's length.
                        if !of_model.contains(&Is::DynamicRope) {
                            assert_eq!(rows, run(&other, &session, true), "{what}");
                        }
                        n_run += 1;
                        continue;
                    };
                    let Err(Error::Option { expected, .. }) = this.session(&session) else {
                        panic!("{what} is not refused");
                    };
                    let said: Vec<_> =
                        refusals.into_iter().filter(|&row| TABLE[row].why == expected).collect();
                    assert!(!said.is_empty(), "{what}: {expected}");
                    said.into_iter().for_each(|row| met[row] = true);
                }
            }
        }
    }
    assert!(n_run > 100, "{n_run} pairs ran");
    let sessions = [Is::Ctx, Is::Lazy, Is::Stream, Is::Evict];
    for (pair, met) in TABLE.iter().zip(met) {
        let is_refused = matches!(pair.verdict, Verdict::Refused) && sessions.contains(&pair.what);
        assert!(!is_refused || met, "{:?} with {:?} was never refused", pair.what, pair.with);
    }
}

/// Numbers that do not agree: each row of that kind has one here.
#[test]
fn numbers_have_to_agree() {
    let refused = |model: &Model, session: SessionOptions| match model.session(&session) {
        Err(Error::Option { name, .. }) => name,
        other => panic!("{other:?}"),
    };
    let stream = |window| SessionOptions {
        stream: Some(StreamOptions { sink: 0, window }),
        ..SessionOptions::default()
    };
    let windows = model("mistral-window", KvFormat::BF16, 48);
    let least = *windows.config().windows.iter().flatten().min().unwrap();
    assert_eq!(refused(&windows, stream(least + 1)), "window");
    let evict = SessionOptions {
        evict: Some(Evict::parse("h2o:48,sinks=0").unwrap()),
        ..SessionOptions::default()
    };
    assert_eq!(refused(&model("llama-tied", KvFormat::INT8, 48), evict), "evict");
    let lazy = Lazy::parse("gentle,window=2", LAYERS).unwrap();
    let lazy = SessionOptions { lazy: Some(lazy), ..SessionOptions::default() };
    assert_eq!(refused(&model("llama-tied", KvFormat::INT2, 48), lazy), "lazy window");
}

/// What is not asked for by a session: logits of all rows, prefixes.
#[test]
fn what_comes_of_itself_is_left_out() {
    let mut n_rows = 0;
    for (choice, kv) in choices(16).iter().flat_map(|choice| KvFormat::ALL.map(|kv| (choice, kv))) {
        let model = model("llama-tied", kv, 48);
        let mut options = SessionOptions::default();
        (choice.set)(&mut options, &choice.name);
        let Ok(mut session) = model.session(&options) else { continue };
        let outcome = session.logits_of(&tokens(20), &mut |_, _| n_rows += 1);
        let why =
            TABLE.iter().find(|pair| pair.what == Is::AllLogits && choice.is.contains(&pair.with));
        match (outcome, why) {
            (Ok(()), None) => {}
            (Err(Error::State { reason, .. }), Some(pair)) => assert_eq!(reason, pair.why),
            (outcome, _) => panic!("{choice:?} {kv}: {outcome:?}"),
        }
    }
    assert!(n_rows > 0);
}
