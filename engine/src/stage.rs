//! Which rows of a session go through which layers next.
//!
//! The layers of a session that prunes are cut into segments, and what is pending goes through them one by
//! one. This is the bookkeeping between two passes: what is left of a stage, and who goes on from its end.

use std::cmp::Ordering;

use crate::backend::Phase;
use crate::pool::Store;
use crate::sequence::{GIVEN_UP, Segment};
use crate::session::{Pending, Session};
use crate::share::Wish;
use crate::step::Work;

/// The segment that tokens are going through: the new ones through the first, then those that were chosen at
/// each prune point through the next.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Stage {
    pub(crate) segment: usize,
    /// Positions that are to go through a segment behind the first, ascending.
    pub(crate) chosen: Vec<u32>,
    /// How many of them have.
    pub(crate) done: usize,
    /// Positions that have come through the segment before and were not chosen, ascending: the next pass parks
    /// their hidden states. There is one, because the new tokens at the end always go on.
    pub(crate) parked: Vec<u32>,
}

impl Session {
    /// What a pass of `phase` would compute of this session, at most `max_rows`.
    pub(crate) fn work(&self, phase: Phase, max_rows: usize) -> Option<Work> {
        let Stage { segment, chosen, done, .. } = &self.stage;
        let new: &[u32] = match (&self.pending, phase) {
            (Pending::Prompt { tokens, done }, Phase::Prefill) => &tokens[*done..],
            (Pending::Token(token), Phase::Decode) => std::slice::from_ref(token),
            _ => return None,
        };
        let n_left = self.n_left();
        let n = self.n_rows(n_left, max_rows.min(self.n_together()))?;
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
        let is_last = ends_stage && segment + 1 == self.cache.segments.len();
        Some(Work { segment: *segment, tokens, positions, ends_stage, is_last })
    }

    /// Rows that are left of the stage.
    fn n_left(&self) -> usize {
        match &self.stage {
            Stage { segment: 0, .. } => self.pending.len(),
            Stage { chosen, done, .. } => chosen.len() - done,
        }
    }

    /// Rows that a pass can take.
    fn n_together(&self) -> usize {
        let n_slots = self.cache.segments[self.stage.segment].len();
        self.model.plan().layout.n_together(n_slots)
    }

    /// What a prompt asks of a chunk.
    pub(crate) fn wish(&self) -> Wish {
        let plan = self.model.plan();
        let n_left = self.n_left();
        let most = n_left.min(self.n_together()).min(plan.chunk);
        // Hidden states are shared by the page.
        let is_kept = self.lazy.is_some() && plan.keep_prefixes && self.stage.segment == 0;
        let unit = if is_kept { plan.layout.page_len.min(plan.chunk) } else { 1 };
        let least = if n_left == self.n_mass_rows().min(n_left) { most } else { unit.min(most) };
        Wish { least, unit, most, waited: self.turn.waited }
    }

    /// Pages that what is left of a prompt takes, at most: of KV, and of hidden states in transit, which all its tokens are
    /// until they are through the first segment.
    pub(crate) fn pages_to_come(&self) -> [usize; 2] {
        let plan = self.model.plan();
        let held_at_most = self.stream.map_or(usize::MAX, |stream| {
            stream.capacity() as usize + plan.chunk + 2 * plan.layout.page_len
        });
        let of = |(idx, segment): (usize, &Segment)| {
            let n_new = match (idx.cmp(&self.stage.segment), self.stage.segment) {
                (Ordering::Less, _) => return 0,
                (Ordering::Equal, _) => self.n_left(),
                (Ordering::Greater, 0) => self.n_new() + self.pending.len(),
                (Ordering::Greater, _) => self.stage.chosen.len(),
            };
            let n_slots = (segment.len() + n_new).min(held_at_most);
            let n_pages = plan.layout.n_pages_at_most(n_slots) * segment.n_layers;
            n_pages.saturating_sub(segment.page_table.len())
        };
        let n_in_transit = match (self.cache.segments.len(), self.stage.segment) {
            (2.., 0) => (self.n_new() + self.pending.len()).div_ceil(plan.layout.page_len),
            _ => 0,
        };
        let n_held = self.cache.aux.n_pages(Store::Transit);
        [self.cache.segments.iter().enumerate().map(of).sum(), n_in_transit.saturating_sub(n_held)]
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
        let pruning = self.lazy.as_ref().map(|lazy| lazy.window);
        let evicting = self.evicting.as_ref().map(|evicting| evicting.policy.n_mass_rows());
        pruning.or(evicting).unwrap_or(1).clamp(1, n_new)
    }

    /// The tokens that go through the next segment, once the last of this one has: those in front of it that
    /// are chosen. Those that have just come there and are not are parked.
    pub(crate) fn choose(&mut self, scores: Option<&[f32]>) {
        let Stage { segment, .. } = self.stage;
        let slots = &self.cache.segments[segment].positions;
        let positions: Vec<Option<u32>> =
            slots.iter().map(|&position| (position != GIVEN_UP).then_some(position)).collect();
        let lazy = self.lazy.as_ref();
        let selected = match (lazy.filter(|lazy| lazy.prunes(self.len())), scores) {
            (Some(lazy), Some(scores)) => lazy.select(segment, &positions, scores, self.len()),
            _ => {
                let mut all: Vec<u32> = positions.iter().flatten().copied().collect();
                all.sort_unstable(); // tokens that were taken up again are in later slots
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
        let is_in_front = |position: &u32| self.cache.depth(*position) == segment + 1;
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
        let mut parked = match segment {
            0 => ((self.len() - self.n_new()) as u32..self.len() as u32).collect(),
            _ => std::mem::take(&mut self.stage.chosen),
        };
        parked.retain(|position| chosen.binary_search(position).is_err());
        self.stage = Stage { segment: segment + 1, chosen, done: 0, parked };
    }
}
