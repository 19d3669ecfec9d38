//! A session that evicts: what it remembers of the attention that was paid, and how tokens leave its cache.
//!
//! Attention comes with the passes; what is left to a call's end, when nothing of it can fail any more, is to
//! choose for each layer and to move the slots that stay to the front.

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use crate::backend::Table;
use crate::error::Error;
use crate::forward::Execute;
use crate::memory;
use crate::policy::Evict;
use crate::policy::evict::Rank;
use crate::session::{Pending, Session};
use crate::step::Work;
use crate::store::PageId;

/// The policy of a session, and what it goes by.
#[derive(Debug)]
pub(crate) struct Evicting {
    pub(crate) policy: Evict,
    /// Attention that each slot has got so far, `[layer][slot]`; `h2o` only.
    sums: Vec<Vec<f32>>,
    /// What it was before what is pending.
    before: Vec<Vec<f32>>,
    /// Tokens that the session had when some left it last: those in front of here cannot be told apart any more.
    pub(crate) since: usize,
}

impl Evicting {
    pub(crate) fn new(policy: Evict, n_layers: usize) -> Self {
        let sums = match policy.rank {
            Rank::H2o => vec![Vec::new(); n_layers],
            _ => Vec::new(),
        };
        Self { policy, before: Vec::new(), sums, since: 0 }
    }

    /// The same for a second session, between calls.
    pub(crate) fn copy(&self) -> Result<Self, Error> {
        let copy = |sums: &Vec<f32>| memory::copy(sums, "the attention of slots");
        let sums = self.sums.iter().map(copy).collect::<Result<_, _>>()?;
        Ok(Self { policy: self.policy, before: Vec::new(), sums, since: self.since })
    }

    /// True if every row's attention counts.
    pub(crate) fn counts_all(&self) -> bool {
        self.policy.rank == Rank::H2o
    }

    /// The same, to be restored.
    pub(crate) fn sums_mut(&mut self) -> &mut [Vec<f32>] {
        &mut self.sums
    }

    /// A call begins. One that adds a token adds its attention only when nothing can fail any more.
    pub(crate) fn begin(&mut self, is_prompt: bool) {
        self.before = if is_prompt { self.sums.clone() } else { Vec::new() };
    }

    /// What is pending is taken back.
    pub(crate) fn roll_back(&mut self) {
        if !self.before.is_empty() {
            self.sums.clone_from(&self.before);
        }
    }

    /// Only the first `n_slots` are left.
    pub(crate) fn truncate(&mut self, n_slots: usize) {
        self.sums.iter_mut().for_each(|sums| sums.truncate(n_slots));
        if n_slots == 0 {
            self.since = 0;
        }
    }

    /// Attention that each slot has got so far, `[layer][slot]`; nothing where only the last rows' counts.
    pub(crate) fn sums(&self) -> &[Vec<f32>] {
        &self.sums
    }
}

impl Session {
    /// How many slots of a layer are to stay once `work` is done; `None`: all.
    pub(crate) fn n_keep(&self, work: &Work) -> Option<usize> {
        let evicting = self.evicting.as_ref().filter(|_| work.is_last)?;
        let n_new = match &self.pending {
            Pending::Prompt { tokens, .. } => Some(tokens.len()),
            _ => None,
        };
        let n_held = self.cache.segments[0].len();
        evicting.policy.n_keep(n_held, n_new, self.model.plan().layout.page_len)
    }

    /// Of the `n` rows of `work`, those whose attention the policy goes by.
    pub(crate) fn observed(&self, work: &Work) -> Option<Range<usize>> {
        let evicting = self.evicting.as_ref()?;
        let n = work.tokens.len();
        let n_rows = match evicting.counts_all() {
            true => n,
            false => self.n_keep(work).map_or(0, |_| self.n_mass_rows().min(n)),
        };
        (n_rows > 0).then_some(n - n_rows..n)
    }

    /// What the choice of those that stay once `work` is done goes by, `[layer][slot]`: the attention that its pass gave,
    /// or how short the keys are in `pages`, the table with its rows. Nothing has changed yet, should the device fail.
    pub(crate) fn ranks(
        &self,
        device: &mut dyn Execute,
        work: &Work,
        pages: &[PageId],
        attention: Option<Vec<Vec<f32>>>,
    ) -> Result<Vec<Vec<f32>>, Error> {
        let is_by_keys = self.evicting.as_ref().is_some_and(|e| e.policy.rank == Rank::KNorm);
        if !is_by_keys || self.n_keep(work).is_none() {
            return Ok(attention.unwrap_or_default());
        }
        let segment = &self.cache.segments[0];
        let table = Table { pages, n_layers: segment.n_layers };
        let shortness = |layer| {
            let mut norms = vec![0.0; segment.len()];
            device.key_norms(table, layer, &mut norms)?;
            Ok(norms.iter().map(|norm| -norm).collect())
        };
        (0..segment.n_layers).map(shortness).collect()
    }

    /// The pass of `work` is about to be committed: takes in the attention of its rows, and gives what the choice
    /// of those that stay needs.
    pub(crate) fn observe(&mut self, work: &Work, mut ranks: Vec<Vec<f32>>) -> Option<Leaving> {
        let n_keep = self.n_keep(work);
        let evicting = self.evicting.as_mut()?;
        if evicting.counts_all() {
            evicting.sums = std::mem::take(&mut ranks);
        }
        n_keep.map(|n_keep| Leaving { n_keep, ranks })
    }

    /// Forgets in each layer all but the slots that rank highest there, and frees their pages. Where pages that are
    /// shared would have to be copied and there are none for that, all stay for now. Should the device fail while slots
    /// move, the session forgets everything.
    pub(crate) fn evict(
        &mut self,
        device: &mut dyn Execute,
        leaving: Leaving,
    ) -> Result<(), Error> {
        let Some(evicting) = &mut self.evicting else { return Ok(()) };
        let shared = self.model.shared.clone();
        let layout = &shared.plan.layout;
        let segment = &mut self.cache.segments[0];
        let (n_held, n_layers) = (segment.len(), segment.n_layers);
        let mut keep = Vec::with_capacity(n_layers);
        for layer in 0..n_layers {
            let ranks = match evicting.policy.rank {
                Rank::Window => vec![0.0; n_held],
                Rank::Random => Evict::by_chance(layer, n_held),
                Rank::H2o => evicting.sums[layer].clone(),
                Rank::SnapKv | Rank::Tova | Rank::KNorm => leaving.ranks[layer].clone(),
            };
            keep.push(evicting.policy.select(&ranks, leaving.n_keep));
        }
        let is_moved = |&(to, &from): &(usize, &u32)| to != from as usize;
        let first = keep.iter().filter_map(|keep| keep.iter().enumerate().find(is_moved));
        let first = first.map(|(to, _)| to).min().unwrap_or(leaving.n_keep);
        let Ok(copies) = segment.own(first..leaving.n_keep, layout, &mut shared.pool()) else {
            return Ok(());
        };
        let table = Table { pages: &segment.page_table, n_layers };
        let moved = catch_unwind(AssertUnwindSafe(|| device.keep_slots(&copies, table, &keep)));
        if !matches!(moved, Ok(Ok(()))) {
            // Some slots hold other tokens than others do: nothing of it may be read again.
            self.cut(0);
            return moved.unwrap_or_else(|payload| resume_unwind(payload));
        }
        segment.renumber(leaving.n_keep, layout, &mut shared.pool());
        for (sums, keep) in evicting.sums.iter_mut().zip(&keep) {
            *sums = keep.iter().map(|&slot| sums[slot as usize]).collect();
        }
        self.receipt.n_evicted += n_held - leaving.n_keep;
        (evicting.since, self.n_shareable) = (self.tokens.len(), 0);
        Ok(())
    }
}

/// What a choice goes by.
#[derive(Debug)]
pub(crate) struct Leaving {
    n_keep: usize,
    /// `[layer][slot]`: attention of the call's last rows, or how short keys are.
    ranks: Vec<Vec<f32>>,
}
