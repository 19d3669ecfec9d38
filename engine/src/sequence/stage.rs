//! Which rows of a sequence go through which layers next.
//!
//! The layers of a sequence that prunes are cut into segments, and what is pending goes through them one by
//! one. This is the bookkeeping between two passes: what is left of a stage, and who goes on from its end.

use std::cmp::Ordering;
use std::ops::Range;

use super::{EMPTY, Pending, Segment, Sequence, Stage, Work};
use crate::backend::Phase;
use crate::plan::Plan;
use crate::pool::Store;
use crate::store::PageLayout;

impl Sequence {
    /// True if a pass of `phase` could compute something.
    pub(crate) fn has_work(&self, phase: Phase) -> bool {
        match &self.pending {
            Pending::Nothing => false,
            Pending::Prompt { .. } => phase == Phase::Prefill,
            Pending::Token(_) => phase == Phase::Decode,
        }
    }

    /// What a pass of `phase` would compute, at most `max_rows`.
    pub(crate) fn work(&self, phase: Phase, max_rows: usize, layout: &PageLayout) -> Option<Work> {
        let Stage { segment, chosen, done, .. } = &self.stage;
        let new: &[u32] = match (&self.pending, phase) {
            (Pending::Prompt { tokens, done }, Phase::Prefill) => &tokens[*done..],
            (Pending::Token(token), Phase::Decode) => std::slice::from_ref(token),
            _ => return None,
        };
        let n_left = self.n_left();
        let n = self.n_rows(n_left, max_rows.min(self.n_together(layout)))?;
        #[allow(clippy::cast_possible_truncation)] // bounded by the context length
        let len = self.len() as u32;
        let (tokens, positions) = match segment {
            0 => (new[..n].to_vec(), (len..).take(n).collect()),
            _ => {
                let positions = chosen[*done..done + n].to_vec();
                (positions.iter().map(|&p| self.tokens[p as usize]).collect(), positions)
            }
        };
        let ends_stage = n == n_left;
        let is_last = ends_stage && segment + 1 == self.segments.len();
        Some(Work { segment: *segment, tokens, positions, ends_stage, is_last })
    }

    /// Rows that are left of the stage.
    pub(crate) fn n_left(&self) -> usize {
        match &self.stage {
            Stage { segment: 0, .. } => self.pending.len(),
            Stage { chosen, done, .. } => chosen.len() - done,
        }
    }

    /// Rows that a pass can take.
    pub(crate) fn n_together(&self, layout: &PageLayout) -> usize {
        layout.n_together(self.segments[self.stage.segment].len())
    }

    /// Of the sequence's tokens, how many are what is pending.
    pub(crate) fn n_new(&self) -> usize {
        match &self.pending {
            Pending::Prompt { done, .. } => *done,
            _ => 1,
        }
    }

    /// Pages that what is left of a prompt takes, at most: of KV, and of hidden states in transit, which all its tokens are
    /// until they are through the first segment.
    pub(crate) fn pages_to_come(&self, plan: &Plan) -> [usize; 2] {
        let held_at_most = self.recipe.held_at_most(plan.chunk, plan.layout.page_len);
        let of = |(idx, segment): (usize, &Segment)| {
            let n_new = match (idx.cmp(&self.stage.segment), self.stage.segment) {
                (Ordering::Less, _) => return 0,
                (Ordering::Equal, _) => self.n_left(),
                (Ordering::Greater, 0) => self.n_new() + self.pending.len(),
                (Ordering::Greater, _) => self.stage.chosen.len(),
            };
            let n_slots = (segment.len() + n_new).min(held_at_most);
            let n_pages = plan.layout.n_pages_at_most(n_slots) * segment.n_layers;
            n_pages.saturating_sub(segment.n_pages())
        };
        let n_in_transit = match (self.segments.len(), self.stage.segment) {
            (2.., 0) => (self.n_new() + self.pending.len()).div_ceil(plan.layout.page_len),
            _ => 0,
        };
        let n_held = self.waiting.n_pages(Store::Transit);
        [self.segments.iter().enumerate().map(of).sum(), n_in_transit.saturating_sub(n_held)]
    }

    /// What has been computed of a prompt of which `n` tokens are through the first segment, as the number of
    /// tokens that would take as long through all layers.
    pub(crate) fn tokens_worth(&self, n: usize) -> usize {
        let n_layers = self.segments.last().map_or(1, |last| last.layers().end);
        let Stage { segment, chosen, done, .. } = &self.stage;
        if *segment == 0 {
            return n * self.segments[0].n_layers / n_layers;
        }
        let layers = self.layers();
        let through = layers.start + layers.len() * done / chosen.len().max(1);
        n * through / n_layers
    }

    /// Of `n_left` rows of a stage, how many go together: at most `max_rows`, and never so many that the last
    /// ones would be fewer than the rows that score.
    fn n_rows(&self, n_left: usize, max_rows: usize) -> Option<usize> {
        let n = n_left.min(max_rows);
        let n_score = self.n_mass_rows().min(n_left);
        let n = match n_left - n {
            0 if n < n_score => 0,
            0 => n,
            rest if rest < n_score => n_left - n_score,
            _ => n,
        };
        (n > 0).then_some(n)
    }

    /// The last rows of a stage, which score.
    pub(crate) fn n_mass_rows(&self) -> usize {
        let n_new = match &self.pending {
            Pending::Prompt { tokens, .. } => tokens.len(),
            _ => 1,
        };
        let pruning = self.recipe.lazy.as_ref().map(|lazy| lazy.window);
        let evicting = self.recipe.evict.map(|evict| evict.n_mass_rows());
        pruning.or(evicting).unwrap_or(1).clamp(1, n_new)
    }

    /// How many slots of a layer are to stay once `work` is done; `None`: all.
    pub(crate) fn n_keep(&self, work: &Work, layout: &PageLayout) -> Option<usize> {
        let evict = self.recipe.evict.filter(|_| work.is_last)?;
        let n_new = match &self.pending {
            Pending::Prompt { tokens, .. } => Some(tokens.len()),
            _ => None,
        };
        evict.n_keep(self.segments[0].len(), n_new, layout.page_len)
    }

    /// Of the `n` rows of `work`, those whose attention the policy goes by.
    pub(crate) fn observed(&self, work: &Work, layout: &PageLayout) -> Option<Range<usize>> {
        let evict = self.recipe.evict?;
        let n = work.tokens.len();
        let n_rows = match evict.counts_all() {
            true => n,
            false => self.n_keep(work, layout).map_or(0, |_| self.n_mass_rows().min(n)),
        };
        (n_rows > 0).then_some(n - n_rows..n)
    }

    /// Of how many of the last rows of `work` mass is wanted, if of any.
    pub(crate) fn n_choosing(&self, work: &Work) -> Option<usize> {
        let lazy = self.recipe.lazy.as_ref()?;
        let len = self.len() + if work.segment == 0 { work.tokens.len() } else { 0 };
        // A generated token goes on in any case: its query only chooses among those that wait, of which it may revive a
        // few even where the sequence has been cut back to a length that is not pruned.
        let is_choice = match self.pending {
            Pending::Prompt { .. } => lazy.prunes(len),
            _ => self.waiting.n_pages(Store::Waiting) > 0,
        };
        let is_wanted = work.ends_stage && !work.is_last && is_choice;
        is_wanted.then(|| self.n_mass_rows().min(work.tokens.len()))
    }

    /// The tokens that go through the next segment, once the last of this one has: those in front of it that
    /// are chosen. Those that have just come there and are not chosen are pruned.
    pub(crate) fn choose(&mut self, scores: Option<&[f32]>) {
        let Stage { segment, .. } = self.stage;
        let slots = self.segments[segment].slots.positions();
        let positions: Vec<Option<u32>> =
            slots.iter().map(|&position| (position != EMPTY).then_some(position)).collect();
        let lazy = self.recipe.lazy.as_ref();
        let selected = match (lazy.filter(|lazy| lazy.prunes(self.len())), scores) {
            (Some(lazy), Some(scores)) => lazy.select(segment, &positions, scores, self.len()),
            _ => {
                let mut all: Vec<u32> = positions.iter().flatten().copied().collect();
                all.sort_unstable(); // revived tokens are in later slots
                all
            }
        };
        if let (Some(scores), Pending::Prompt { .. }) = (scores, &self.pending) {
            let of = |(position, score): (&Option<u32>, &f32)| {
                let goes_on = position.is_some_and(|p| selected.binary_search(&p).is_ok());
                if goes_on { f64::from(*score) } else { 0.0 }
            };
            let mass: f64 = positions.iter().zip(scores).map(of).sum();
            self.receipt.mass_kept = self.receipt.mass_kept.min(mass);
        }
        let is_in_front = |position: &u32| self.waiting.depth(*position) == segment + 1;
        let mut chosen: Vec<u32> = selected.into_iter().filter(is_in_front).collect();
        if let Some(lazy) = lazy {
            let is_old = |&position: &u32| (position as usize) < self.len() - self.n_new();
            let (old, new): (Vec<u32>, Vec<u32>) = chosen.into_iter().partition(is_old);
            let revived = match (&self.pending, scores) {
                _ if !lazy.revives => Vec::new(),
                (Pending::Token(_), Some(scores)) => lazy.revive(&old, &positions, scores),
                (Pending::Token(_), None) => Vec::new(), // nothing waits
                _ => old,
            };
            chosen = revived.into_iter().chain(new).collect();
        }
        chosen.sort_unstable();
        #[allow(clippy::cast_possible_truncation)] // bounded by the context length
        let mut pruned = match segment {
            0 => ((self.len() - self.n_new()) as u32..self.len() as u32).collect(),
            _ => std::mem::take(&mut self.stage.chosen),
        };
        pruned.retain(|position| chosen.binary_search(position).is_err());
        self.stage = Stage { segment: segment + 1, chosen, done: 0, pruned };
    }
}
