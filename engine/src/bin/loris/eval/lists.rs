//! Tasks that look at a whole context: which words are common in it, and what one of its documents says.

use super::rng::Rng;
use super::sample::{MAX_DISTINCT, Sample, Turn, distinct};
use super::words::{ANIMALS, FIRST_NAMES, JOBS, LAST_NAMES, LISTED, TOWN_HEADS, TOWN_TAILS};

/// Common words that are asked for.
pub(crate) const N_COMMON: usize = 5;
/// Entries of the shortest list.
pub(crate) const MIN_LISTED: usize = 60;

/// A list of which five words make up half, and 115 others the rest: each of the five is several times as
/// common as any other.
pub(crate) fn common(rng: &mut Rng, n: usize) -> Sample {
    let mut words = LISTED.to_vec();
    rng.shuffle(&mut words);
    let (common, others) = words.split_at(N_COMMON);
    let mut list: Vec<&str> =
        common.iter().flat_map(|&word| vec![word; n / 2 / N_COMMON]).collect();
    let n_others = n - list.len();
    list.extend(others.iter().cycle().take(n_others));
    rng.shuffle(&mut list);
    let turn = Turn {
        question: format!("What are the {N_COMMON} most common words in the list above?"),
        lead: format!("The {N_COMMON} most common words in the list are"),
        expected: common.iter().map(|&word| word.to_owned()).collect(),
    };
    let context = format!(
        "Below is a list of words. Some of them appear much more often than the others. \
         Remember those that appear most often.\n\n{}",
        list.join(" ")
    );
    Sample { context, turns: vec![turn] }
}

/// Frequent words that are asked for.
pub(crate) const N_FREQUENT: usize = 3;
/// Words of the shortest coded text.
pub(crate) const MIN_CODED: usize = 60;

/// A text of made-up words; the word of rank r occurs in proportion to 1 / r^2, and the first three are
/// asked for.
pub(crate) fn frequent(rng: &mut Rng, n: usize) -> Sample {
    const ZETA_2: f64 = std::f64::consts::PI * std::f64::consts::PI / 6.0;
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss)]
    let count_of = |rank: usize| (n as f64 / ZETA_2 / (rank * rank) as f64).round() as usize;
    let mut counts: Vec<usize> = (1..).map(count_of).take_while(|&count| count > 0).collect();
    // What rounding left over goes to words that occur once, and what it took too much is cut there.
    while counts.iter().sum::<usize>() > n {
        counts.pop();
    }
    counts.resize(counts.len() + n - counts.iter().sum::<usize>(), 1);
    let words = distinct(rng, counts.len(), &mut coded);
    let mut text: Vec<&str> =
        words.iter().zip(&counts).flat_map(|(word, &count)| vec![word.as_str(); count]).collect();
    rng.shuffle(&mut text);
    let turn = Turn {
        question: "What are the three most frequent words in the coded text above?".into(),
        lead: "The three most frequent words in the coded text are".into(),
        expected: words[..N_FREQUENT].to_vec(),
    };
    let context = format!(
        "Below is a text in a secret code. Keep track of how often each of its words appears.\n\n{}",
        text.join(" ")
    );
    Sample { context, turns: vec![turn] }
}

/// Three syllables: 343,000 words of one length.
fn coded(rng: &mut Rng) -> String {
    let mut syllable = || [*rng.choose(b"bdfgklmnprstvz"), *rng.choose(b"aeiou")];
    let letters = [syllable(), syllable(), syllable()];
    letters.as_flattened().iter().copied().map(char::from).collect()
}

/// Short documents about invented people, and a question about one of them. Nobody else has the asked
/// town or year; names differ as a whole, while parts of them are shared.
pub(crate) fn documents(rng: &mut Rng, n: usize) -> Sample {
    let is_long = n > FIRST_NAMES.len() * LAST_NAMES.len() / 2;
    debug_assert!(n <= MAX_DISTINCT);
    let names = distinct(rng, n, &mut |rng| {
        let (first, last) = (rng.choose(&FIRST_NAMES), rng.choose(&LAST_NAMES));
        match is_long {
            true => format!("{first} {}. {last}", char::from(b'A' + rng.below(26) as u8)),
            false => format!("{first} {last}"),
        }
    });
    let asked = rng.below(n);
    let (town, year) = (a_town(rng), a_year(rng));
    let mut documents = Vec::new();
    for (idx, name) in names.iter().enumerate() {
        let (birth, since) = match idx == asked {
            true => (town.clone(), year.clone()),
            false => (other_than(rng, &town, a_town), other_than(rng, &year, a_year)),
        };
        let (job, animal) = (rng.choose(&JOBS), rng.choose(&ANIMALS));
        documents.push(format!(
            "Document {}: {name}\n{name} was born in {birth} and works there as a {job}. \
             {name} joined the town council in {since} and lives with a {animal}.",
            idx + 1
        ));
    }
    let name = &names[asked];
    let turn = match rng.below(2) {
        0 => Turn {
            question: format!("In which town was {name} born?"),
            lead: format!("{name} was born in"),
            expected: vec![town],
        },
        _ => Turn {
            question: format!("In which year did {name} join the town council?"),
            lead: format!("{name} joined the town council in"),
            expected: vec![year],
        },
    };
    let context = format!(
        "Read the documents below. You will be asked a question about one of them.\n\n{}",
        documents.join("\n\n")
    );
    Sample { context, turns: vec![turn] }
}

pub(crate) fn a_town(rng: &mut Rng) -> String {
    format!("{}{}", rng.choose(&TOWN_HEADS), rng.choose(&TOWN_TAILS))
}

fn a_year(rng: &mut Rng) -> String {
    (1700 + rng.below(300)).to_string()
}

fn other_than(rng: &mut Rng, taken: &str, make: fn(&mut Rng) -> String) -> String {
    loop {
        let text = make(rng);
        if text != taken {
            return text;
        }
    }
}
