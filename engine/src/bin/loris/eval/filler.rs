//! The prose between needles: a text of the user's, or sentences made here.
//!
//! Either is a row of words that the samples cut to length, so that a prompt misses its length by a word
//! and not by a sentence. What is made here has 590,000 sentences.

use super::rng::Rng;
use super::words::{DEEDS, ENDINGS, PEOPLE, THINGS};

/// Where prose comes from.
#[derive(Debug)]
pub(crate) enum Filler {
    /// The words of a text, in order.
    Text(Vec<String>),
    Synthetic,
}

impl Filler {
    /// A user's text; `None` if there is not one word in it.
    pub(crate) fn from_text(text: &str) -> Option<Self> {
        let words: Vec<_> = text.split_whitespace().map(str::to_owned).collect();
        (!words.is_empty()).then_some(Self::Text(words))
    }

    /// `n` words. The same state of `rng` gives the same words for every `n`, only more of them. A user's
    /// text begins anywhere, and again at its start where it ends.
    pub(crate) fn words(&self, rng: &mut Rng, n: usize) -> Vec<String> {
        let mut rng = Rng::new(rng.next(), &[]); // one draw, however long the prose
        match self {
            Self::Text(words) => {
                let start = sentence_start(words, rng.below(words.len()));
                words.iter().cycle().skip(start).take(n).cloned().collect()
            }
            Self::Synthetic => {
                let mut words = Vec::with_capacity(n + 24);
                while words.len() < n {
                    words.extend(sentence(&mut rng).split(' ').map(str::to_owned));
                }
                words.truncate(n);
                words
            }
        }
    }
}

fn sentence(rng: &mut Rng) -> String {
    let (who, did) = (rng.choose(&PEOPLE), rng.choose(&DEEDS));
    let (what, end) = (rng.choose(&THINGS), rng.choose(&ENDINGS));
    format!("{who} {did} {what}, {end}.")
}

/// The first word after the end of a sentence, at or after `from`; `from` where none ends.
fn sentence_start(words: &[String], from: usize) -> usize {
    let ends = words[from..].iter().position(|word| is_end(word));
    ends.map_or(from, |at| (from + at + 1) % words.len())
}

fn is_end(word: &str) -> bool {
    word.ends_with(['.', '!', '?'])
}

/// Prose with texts between its sentences, each at a share of its length: at the end of the sentence
/// there, or between two words if that is far.
pub(crate) fn with_inserts(words: &[String], inserts: &[(f64, String)]) -> String {
    const FAR: usize = 60;
    let mut places: Vec<(usize, &str)> = inserts
        .iter()
        .map(|(depth, text)| {
            #[allow(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                clippy::cast_precision_loss
            )]
            let from = (depth * words.len() as f64) as usize;
            let end = words[from..].iter().take(FAR).position(|word| is_end(word));
            (end.map_or(from, |at| from + at + 1), text.as_str())
        })
        .collect();
    places.sort_by_key(|&(at, _)| at); // stable: texts of one place keep their order
    let mut parts: Vec<&str> = Vec::with_capacity(words.len() + inserts.len());
    let mut done = 0;
    for (at, text) in places {
        parts.extend(words[done..at].iter().map(String::as_str));
        parts.push(text);
        done = at;
    }
    parts.extend(words[done..].iter().map(String::as_str));
    parts.join(" ")
}
