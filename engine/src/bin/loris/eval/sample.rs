//! What a sample is.

use std::collections::HashSet;

use super::rng::Rng;

/// One context and the questions about it, asked one after another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Sample {
    /// Instructions and the long text.
    pub(crate) context: String,
    pub(crate) turns: Vec<Turn>,
}

/// A question and what a right answer holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Turn {
    pub(crate) question: String,
    /// The beginning of the answer, which is given: a small model then answers instead of commenting.
    pub(crate) lead: String,
    /// The grade is the share of these that the answer holds.
    pub(crate) expected: Vec<String>,
}

/// Names that a sample can tell apart at most: half of what the word lists can make.
pub(crate) const MAX_DISTINCT: usize = 20_000;

/// `n` strings that differ; `make` must be able to give many more.
pub(crate) fn distinct(
    rng: &mut Rng,
    n: usize,
    make: &mut dyn FnMut(&mut Rng) -> String,
) -> Vec<String> {
    let mut seen = HashSet::with_capacity(n);
    let mut all = Vec::with_capacity(n);
    while all.len() < n {
        let text = make(rng);
        if seen.insert(text.clone()) {
            all.push(text);
        }
    }
    all
}
