//! How tokens leave the cache of a sequence that evicts.
//!
//! Attention comes with the passes; what is left to a call's end, when nothing of it can fail any more, is to
//! choose for each layer and to move the slots that stay to the front.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use super::member::Member;
use crate::error::Error;
use crate::evidence::{Mass, Needs, Shown};
use crate::forward::Execute;
use crate::sequence::Work;

impl Member<'_> {
    /// What the choice of those that stay once `work` is done goes by, `[layer][slot]`: the attention that its pass gave,
    /// or how long the keys are. Nothing of that stands yet, should the device fail.
    pub(crate) fn shown(
        &self,
        device: &mut dyn Execute,
        work: &Work,
        attention: Option<Vec<Vec<f32>>>,
    ) -> Result<Vec<Vec<f32>>, Error> {
        let is_by_keys = self.seq.recipe.evict.is_some_and(|evict| evict.needs().norms);
        if !is_by_keys || self.seq.n_keep(work, &self.shared.plan.layout).is_none() {
            return Ok(attention.unwrap_or_default());
        }
        let segment = &self.seq.segments[0];
        let lengths = |layer| {
            let mut norms = vec![0.0; segment.len()];
            device.key_norms(segment.table(), layer, &mut norms)?;
            Ok(norms)
        };
        (0..segment.n_layers).map(lengths).collect()
    }

    /// The pass of `work` is about to be committed: takes in the attention of its rows, and gives what the choice
    /// of those that stay needs.
    pub(crate) fn observe(&mut self, work: &Work, mut shown: Vec<Vec<f32>>) -> Option<Leaving> {
        let n_keep = self.seq.n_keep(work, &self.shared.plan.layout);
        if self.seq.recipe.evict?.counts_all() {
            self.seq.measure(std::mem::take(&mut shown));
        }
        n_keep.map(|n_keep| Leaving { n_keep, shown })
    }

    /// Evicts in each layer all but the slots that rank highest there, and frees their pages. Where pages that are
    /// shared would have to be copied and there are none for that, all stay for now. Should the device fail while slots
    /// move, the sequence is empty.
    pub(crate) fn evict(
        &mut self,
        device: &mut dyn Execute,
        leaving: Leaving,
    ) -> Result<(), Error> {
        let Some(evict) = self.seq.recipe.evict else { return Ok(()) };
        let layout = &self.shared.plan.layout;
        let segment = &mut self.seq.segments[0];
        let (n_held, n_layers) = (segment.len(), segment.n_layers);
        let mut keep = Vec::with_capacity(n_layers);
        for layer in 0..n_layers {
            let call = leaving.shown.get(layer).map_or(&[][..], Vec::as_slice);
            let (mass, norms) = match evict.needs() {
                Needs { norms: true, .. } => (&[][..], call),
                Needs { mass: Mass::All, .. } => (&self.seq.measured.sums()[layer][..], &[][..]),
                Needs { .. } => (call, &[][..]),
            };
            let ranks = evict.ranks(&Shown { layer, n_slots: n_held, mass, norms });
            keep.push(evict.select(&ranks, leaving.n_keep));
        }
        let is_moved = |&(to, &from): &(usize, &u32)| to != from as usize;
        let first = keep.iter().filter_map(|keep| keep.iter().enumerate().find(is_moved));
        let first = first.map(|(to, _)| to).min().unwrap_or(leaving.n_keep);
        let Ok(copies) = segment.own(first..leaving.n_keep, layout, &mut self.shared.pool()) else {
            return Ok(());
        };
        let moved =
            catch_unwind(AssertUnwindSafe(|| device.keep_slots(&copies, segment.table(), &keep)));
        if !matches!(moved, Ok(Ok(()))) {
            // Some slots hold other tokens than others do: nothing of it may be read again.
            self.seq.cut(0, layout, &mut self.shared.pool());
            return moved.unwrap_or_else(|payload| resume_unwind(payload));
        }
        segment.renumber(leaving.n_keep, layout, &mut self.shared.pool());
        for (sums, keep) in self.seq.measured.sums_mut().iter_mut().zip(&keep) {
            *sums = keep.iter().map(|&slot| sums[slot as usize]).collect();
        }
        self.seq.receipt.n_evicted += n_held - leaving.n_keep;
        (self.seq.measured.since, self.seq.n_shareable) = (self.seq.tokens.len(), 0);
        Ok(())
    }
}

/// What a choice goes by.
#[derive(Debug)]
pub(crate) struct Leaving {
    n_keep: usize,
    /// `[layer][slot]`: attention of the call's last rows, or how long keys are.
    shown: Vec<Vec<f32>>,
}
