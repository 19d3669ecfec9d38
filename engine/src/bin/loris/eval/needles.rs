//! Facts to find: in prose, among others of their kind, or at the end of a chain.

use super::filler::{Filler, with_inserts};
use super::lists;
use super::rng::Rng;
use super::sample::{Sample, Turn, distinct};
use super::words::{ADJECTIVES, FIRST_NAMES, LAST_NAMES, LISTED, NOUNS};

/// Digits of a number to find.
const N_DIGITS: usize = 5;

/// Names of things: "anchor", and with one or two adjectives where more are needed.
fn names(rng: &mut Rng, n: usize) -> Vec<String> {
    let n_words = match n {
        n if n <= (NOUNS.len() + LISTED.len()) / 2 => 1,
        n if n <= ADJECTIVES.len() * NOUNS.len() / 2 => 2,
        _ => 3,
    };
    distinct(rng, n, &mut |rng| {
        let noun = match rng.below(4) {
            0 => rng.choose(&NOUNS),
            _ => rng.choose(&LISTED),
        };
        let adjectives = (1..n_words).map(|_| format!("{} ", rng.choose(&ADJECTIVES)));
        adjectives.collect::<String>() + noun
    })
}

fn numbers(rng: &mut Rng, n: usize) -> Vec<String> {
    distinct(rng, n, &mut |rng| rng.digits(N_DIGITS))
}

/// Eight hexadecimal digits, with a hyphen: a short stand-in for a UUID.
fn codes(rng: &mut Rng, n: usize) -> Vec<String> {
    distinct(rng, n, &mut |rng| {
        let bits = rng.next();
        format!("{:04x}-{:04x}", bits & 0xffff, bits >> 16 & 0xffff)
    })
}

fn secret(name: &str) -> Turn {
    Turn {
        question: format!("What is the secret number of the {name} mentioned in the text?"),
        lead: format!("The secret number of the {name} is"),
        expected: Vec::new(),
    }
}

/// What is hidden in prose: a sentence, and the turn that asks for it.
fn facts(rng: &mut Rng, n: usize) -> Vec<(String, Turn)> {
    let (names, values) = (names(rng, 1), numbers(rng, 1));
    let towns = distinct(rng, 2, &mut lists::a_town);
    let people = distinct(rng, 2, &mut |rng| {
        format!("{} {}", rng.choose(&FIRST_NAMES), rng.choose(&LAST_NAMES))
    });
    let [(name, value), (born, birth), (mayor, town)] =
        [(&names[0], &values[0]), (&people[0], &towns[0]), (&people[1], &towns[1])];
    let turn = |question: String, lead: String, expected: &String| Turn {
        question,
        lead,
        expected: vec![expected.clone()],
    };
    // No two are of a kind: a question about one does not point at another.
    let mut facts = vec![
        (
            format!("The secret number of the {name} is {value}."),
            Turn { expected: vec![value.clone()], ..secret(name) },
        ),
        (
            format!("{born} was born in {birth}."),
            turn(format!("In which town was {born} born?"), format!("{born} was born in"), birth),
        ),
        (
            format!("The mayor of {town} is {mayor}."),
            turn(format!("Who is the mayor of {town}?"), format!("The mayor of {town} is"), mayor),
        ),
    ];
    facts.truncate(n);
    facts
}

/// `n_needles` facts in prose of `n_words`, each in a part of its own, and a turn for each; both in random order.
pub(crate) fn in_prose(rng: &mut Rng, n_words: usize, filler: &Filler, n_needles: usize) -> Sample {
    let mut facts = facts(rng, n_needles);
    rng.shuffle(&mut facts);
    let mut inserts = Vec::new();
    let mut turns = Vec::new();
    for (idx, (sentence, turn)) in facts.into_iter().enumerate() {
        #[allow(clippy::cast_precision_loss)] // a few needles
        let depth = (idx as f64 + rng.unit()) / n_needles as f64;
        inserts.push((depth, sentence));
        turns.push(turn);
    }
    rng.shuffle(&mut turns);
    let prose = with_inserts(&filler.words(rng, n_words), &inserts);
    let what = if n_needles == 1 { "A secret number is" } else { "Some facts are" };
    let context =
        format!("{what} hidden in the text below. You will be asked about it.\n\n{prose}");
    Sample { context, turns }
}

/// The same sentence with other names and numbers, and one of them asked for: all hay is needles.
pub(crate) fn among_numbers(rng: &mut Rng, n: usize) -> Sample {
    let (names, values) = (names(rng, n), numbers(rng, n));
    let lines: Vec<_> = names
        .iter()
        .zip(&values)
        .map(|(name, value)| format!("The secret number of the {name} is {value}."))
        .collect();
    let asked = rng.below(n);
    let turn = Turn { expected: vec![values[asked].clone()], ..secret(&names[asked]) };
    let context = format!(
        "The text below lists secret numbers. You will be asked for one.\n\n{}",
        lines.join("\n")
    );
    Sample { context, turns: vec![turn] }
}

/// As [`among_numbers`], of codes for codes.
pub(crate) fn among_codes(rng: &mut Rng, n: usize) -> Sample {
    let all = codes(rng, 2 * n);
    let (keys, values) = all.split_at(n);
    let lines: Vec<_> = keys
        .iter()
        .zip(values)
        .map(|(key, value)| format!("The secret code of {key} is {value}."))
        .collect();
    let asked = rng.below(n);
    let key = &keys[asked];
    let turn = Turn {
        question: format!("What is the secret code of {key} mentioned in the text?"),
        lead: format!("The secret code of {key} is"),
        expected: vec![values[asked].clone()],
    };
    let context = format!(
        "The text below lists secret codes. You will be asked for one.\n\n{}",
        lines.join("\n")
    );
    Sample { context, turns: vec![turn] }
}

/// One JSON object, and one of its values asked for.
pub(crate) fn key_value(rng: &mut Rng, n: usize) -> Sample {
    let (names, values) = (names(rng, n), numbers(rng, n));
    let pairs: Vec<_> =
        names.iter().zip(&values).map(|(name, value)| format!("\"{name}\": \"{value}\"")).collect();
    let asked = rng.below(n);
    let name = &names[asked];
    let turn = Turn {
        question: format!("What is the value of the key \"{name}\" in the JSON object above?"),
        lead: format!("\"{name}\": \""),
        expected: vec![values[asked].clone()],
    };
    let context =
        format!("The JSON object below holds keys and values.\n\n{{{}}}", pairs.join(",\n "));
    Sample { context, turns: vec![turn] }
}

/// Variables of a chain: the first and four hops.
pub(crate) const N_VARIABLES: usize = 5;

/// A chain of assignments in prose, and all its variables asked for. They come in order, and their names
/// are consonants, which no word consists of.
pub(crate) fn variables(rng: &mut Rng, n_words: usize, filler: &Filler) -> Sample {
    const CONSONANTS: &[u8] = b"BCDFGHJKLMNPQRSTVWXZ";
    let names = distinct(rng, N_VARIABLES, &mut |rng| {
        (0..4).map(|_| char::from(*rng.choose(CONSONANTS))).collect()
    });
    let value = rng.digits(N_DIGITS);
    let mut depths: Vec<f64> = names.iter().map(|_| rng.unit()).collect();
    depths.sort_by(f64::total_cmp);
    let mut inserts = Vec::new();
    for (idx, (depth, name)) in depths.into_iter().zip(&names).enumerate() {
        let assigned = match idx {
            0 => value.clone(),
            _ => format!("VAR {}", names[idx - 1]),
        };
        inserts.push((depth, format!("VAR {name} = {assigned}.")));
    }
    let prose = with_inserts(&filler.words(rng, n_words), &inserts);
    let turn = Turn {
        question: format!(
            "Which variables have the value {value}, directly or through other variables? There are {N_VARIABLES}."
        ),
        lead: format!("The {N_VARIABLES} variables that have the value {value} are VAR"),
        expected: names.clone(),
    };
    let context =
        format!("Variables are assigned in the text below. Keep track of their values.\n\n{prose}");
    Sample { context, turns: vec![turn] }
}
