//! The tasks: which kinds of samples there are.
//!
//! They follow RULER (Hsieh et al. 2024): synthetic contexts of any length whose answers are known. Each
//! generator takes a number of *units* (words of prose, pairs, documents, list entries) and randomness, and
//! `fit` finds the number of units that fills a prompt. Expected answers are strings that the context
//! holds and the questions do not.

use std::ops::RangeInclusive;

use super::filler::Filler;
use super::rng::Rng;
use super::sample::{MAX_DISTINCT, Sample};
use super::{lists, needles};

/// Lengths of prompts that can be asked for.
pub(crate) const LENS: RangeInclusive<usize> = 64..=4_000_000;
/// Samples of a task and length, and windows of prose.
pub(crate) const SAMPLES: RangeInclusive<usize> = 1..=100_000;
/// Tokens that an answer may have.
pub(crate) const ANSWERS: RangeInclusive<usize> = 1..=4_096;

/// A kind of sample.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Task {
    NiahSingle,
    NiahMultikey2,
    NiahMultikey3,
    VariableTracking,
    CommonWords,
    FrequentWords,
    KeyValue,
    MultiDoc,
    TwoTurn,
    ThreeTurn,
    /// Not made of samples: how a policy predicts a long text, beside dense.
    Prose,
}

/// Every task with its name; the order is part of the seeds of samples, so new ones go to the end.
pub(crate) const TASKS: [(Task, &str); 11] = [
    (Task::NiahSingle, "niah-single"),
    (Task::NiahMultikey2, "niah-multikey-2"),
    (Task::NiahMultikey3, "niah-multikey-3"),
    (Task::VariableTracking, "vt"),
    (Task::CommonWords, "cwe"),
    (Task::FrequentWords, "fwe"),
    (Task::KeyValue, "kv"),
    (Task::MultiDoc, "multi-doc"),
    (Task::TwoTurn, "two-turn"),
    (Task::ThreeTurn, "three-turn"),
    (Task::Prose, "prose"),
];

impl Task {
    pub(crate) fn parse(name: &str) -> Result<Self, String> {
        let found = TASKS.iter().find(|(_, n)| *n == name);
        found.map(|&(task, _)| task).ok_or_else(|| {
            let names: Vec<_> = TASKS.iter().map(|&(_, name)| name).collect();
            format!("expected one of {}", names.join(", "))
        })
    }

    fn idx(self) -> usize {
        TASKS.iter().position(|&(task, _)| task == self).unwrap_or_default()
    }

    pub(crate) fn name(self) -> &'static str {
        TASKS[self.idx()].1
    }

    /// Questions that one sample asks.
    pub(crate) fn n_turns(self) -> usize {
        match self {
            Self::TwoTurn => 2,
            Self::ThreeTurn => 3,
            _ => 1,
        }
    }

    /// Tokens that an answer may take unless the user says otherwise: what is asked for, and some more.
    pub(crate) fn max_tokens(self) -> usize {
        match self {
            Self::VariableTracking | Self::CommonWords | Self::FrequentWords => 40,
            _ => 16,
        }
    }

    /// Units that a sample has at least and at most.
    pub(crate) fn units(self) -> (usize, usize) {
        match self {
            Self::NiahSingle | Self::VariableTracking | Self::TwoTurn | Self::ThreeTurn => {
                (30, 4_000_000)
            }
            Self::NiahMultikey2 | Self::NiahMultikey3 | Self::KeyValue => (3, MAX_DISTINCT),
            Self::MultiDoc => (3, MAX_DISTINCT),
            Self::CommonWords => (lists::MIN_LISTED, 4_000_000),
            Self::FrequentWords => (lists::MIN_CODED, 1_000_000),
            Self::Prose => (0, 0),
        }
    }

    /// The sample of a seed. The same arguments give the same sample, `len` and `idx` give different ones.
    pub(crate) fn sample(self, seed: Seed, n_units: usize, filler: &Filler) -> Sample {
        let Seed { seed, len, idx } = seed;
        let mut rng = Rng::new(seed, &[self.idx() as u64, len as u64, idx as u64]);
        let rng = &mut rng;
        match self {
            Self::NiahSingle => needles::in_prose(rng, n_units, filler, 1),
            Self::TwoTurn => needles::in_prose(rng, n_units, filler, 2),
            Self::ThreeTurn => needles::in_prose(rng, n_units, filler, 3),
            Self::NiahMultikey2 => needles::among_numbers(rng, n_units),
            Self::NiahMultikey3 => needles::among_codes(rng, n_units),
            Self::KeyValue => needles::key_value(rng, n_units),
            Self::VariableTracking => needles::variables(rng, n_units, filler),
            Self::CommonWords => lists::common(rng, n_units),
            Self::FrequentWords => lists::frequent(rng, n_units),
            Self::MultiDoc => lists::documents(rng, n_units),
            Self::Prose => Sample { context: String::new(), turns: Vec::new() },
        }
    }
}

/// What a sample is made from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Seed {
    pub(crate) seed: u64,
    /// Tokens that the prompt should have.
    pub(crate) len: usize,
    pub(crate) idx: usize,
}
