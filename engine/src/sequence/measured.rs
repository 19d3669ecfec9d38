//! What a policy has seen of the attention that a sequence paid.

use crate::error::Error;
use crate::memory;

/// Attention that slots have got, where a policy goes by all of it, and where it chose last.
#[derive(Debug, Default)]
pub(crate) struct Measured {
    /// `[layer][slot]`; no layers where only the last rows' attention counts.
    sums: Vec<Vec<f32>>,
    /// Tokens that the sequence had when some left it last: those in front of here cannot be told apart any more.
    pub(crate) since: usize,
}

impl Measured {
    /// Of no slots yet; `n_layers` is 0 where nothing is added up.
    pub(crate) fn new(n_layers: usize) -> Self {
        Self { sums: vec![Vec::new(); n_layers], ..Self::default() }
    }

    /// The same for a second sequence, between calls.
    pub(crate) fn copy(&self) -> Result<Self, Error> {
        let copy = |sums: &Vec<f32>| memory::copy(sums, "the attention of slots");
        let sums = self.sums.iter().map(copy).collect::<Result<_, _>>()?;
        Ok(Self { sums, since: self.since })
    }

    /// Attention that each slot has got so far, `[layer][slot]`; nothing where only the last rows' counts.
    pub(crate) fn sums(&self) -> &[Vec<f32>] {
        &self.sums
    }

    /// The same, to be set.
    pub(crate) fn sums_mut(&mut self) -> &mut Vec<Vec<f32>> {
        &mut self.sums
    }

    /// Only the first `n_slots` are left.
    pub(crate) fn truncate(&mut self, n_slots: usize) {
        self.sums.iter_mut().for_each(|sums| sums.truncate(n_slots));
        if n_slots == 0 {
            self.since = 0;
        }
    }
}
