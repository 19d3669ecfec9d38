//! How likely tokens are: the log-softmax of a row of logits.
//!
//! They are those of the model itself, before a sampler's temperature, penalties, biases, filters and masks.

use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;

use crate::error::Error;
use crate::memory;
use crate::sampler::exp::exp64;

/// A token and the natural logarithm of its probability.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Logprob {
    /// Its id.
    pub id: u32,
    /// 0 or less.
    pub logprob: f32,
}

/// A token of an answer beside what the model held likely in its place.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Logprobs {
    /// The natural logarithm of the token's probability.
    pub logprob: f32,
    /// The likeliest tokens, likeliest first; of equal ones the lower id comes first.
    pub top: Vec<Logprob>,
}

/// A row of logits as logarithms of probabilities, of which only those that are asked for are computed. Sums are in f64.
#[derive(Clone, Copy, Debug)]
pub struct LogSoftmax<'a> {
    logits: &'a [f32],
    /// The logarithm of the sum of all `exp(logit)`.
    log_sum: f64,
}

impl<'a> LogSoftmax<'a> {
    /// Of finite logits, `[vocab_size]`.
    pub fn new(logits: &'a [f32]) -> Self {
        let max = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        const LANES: usize = 8;
        let mut sums = [0.0; LANES];
        let mut add = |lane: usize, logit: f32| sums[lane] += exp64(f64::from(logit) - max);
        let (lanes, rest) = logits.as_chunks::<LANES>();
        lanes.iter().for_each(|logits| (0..LANES).for_each(|i| add(i, logits[i])));
        rest.iter().for_each(|&logit| add(0, logit));
        Self { logits, log_sum: max + sums.iter().sum::<f64>().ln() }
    }

    /// Of one token; minus infinity where there is no such id.
    pub fn of(&self, id: u32) -> f32 {
        let logit = self.logits.get(id as usize).copied().unwrap_or(f32::NEG_INFINITY);
        #[allow(clippy::cast_possible_truncation)] // to the precision that logits have
        let logprob = (f64::from(logit) - self.log_sum) as f32;
        logprob
    }

    /// The `n` likeliest tokens, or all if there are fewer, likeliest first; of equal logits the lower id comes first.
    pub fn top(&self, n: usize) -> Result<Vec<Logprob>, Error> {
        let n = n.min(self.logits.len());
        let mut best = BinaryHeap::from(memory::empty(n, "the likeliest tokens")?);
        for (id, &logit) in (0..).zip(self.logits) {
            let next = Reverse(Ranked { logit: logit + 0.0, id }); // of two zeros none is likelier
            if best.len() < n {
                best.push(next);
            } else if let Some(mut least) = best.peek_mut().filter(|least| next < **least) {
                *least = next;
            }
        }
        // As they are reversed, the likeliest is the least.
        let likeliest = best.into_sorted_vec().into_iter();
        Ok(likeliest
            .map(|Reverse(Ranked { id, .. })| Logprob { id, logprob: self.of(id) })
            .collect())
    }

    /// A token and the `n_top` likeliest in its place.
    pub fn logprobs(&self, id: u32, n_top: usize) -> Result<Logprobs, Error> {
        Ok(Logprobs { logprob: self.of(id), top: self.top(n_top)? })
    }
}

/// More is likelier.
#[derive(Clone, Copy)]
struct Ranked {
    logit: f32,
    id: u32,
}

impl Ord for Ranked {
    fn cmp(&self, other: &Self) -> Ordering {
        self.logit.total_cmp(&other.logit).then(other.id.cmp(&self.id))
    }
}

impl PartialOrd for Ranked {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Ranked {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Ranked {}
