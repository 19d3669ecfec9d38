//! How a sequence grows by what passes compute, and how that is undone.
//!
//! A pass takes room for its rows ([`Sequence::take`]), and they are kept or not ([`Sequence::keep`],
//! [`Sequence::give_back`]). All that the passes of a call have kept is undone by [`Sequence::roll_back`] or made final by
//! [`Sequence::settle`]; until then what earlier calls left is held.

use std::collections::BTreeMap;
use std::ops::Range;

use super::journal::{Before, Checkpoint, Extent};
use super::segment::{Growth, Segment, Unsealed};
use super::{Pending, Sequence, Stage, Turn};
use crate::backend::Phase;
use crate::error::Error;
use crate::pool::{AuxRow, Found, Pool, Store};
use crate::store::PageLayout;

/// Pages and rows taken for tokens that are about to go through a segment.
#[derive(Debug)]
pub(crate) struct Taken {
    /// The segment.
    pub(crate) segment: usize,
    /// KV pages.
    pub(crate) growth: Growth,
    /// Rows that the tokens' hidden states are in; none in front of the first segment.
    pub(crate) from: Vec<AuxRow>,
    /// Rows for what comes out; none behind the last segment.
    pub(crate) to: Vec<AuxRow>,
    /// Hidden states that are parked on the way, from where they are in transit to where they wait.
    pub(crate) parks: Vec<(AuxRow, AuxRow)>,
    positions: Vec<u32>,
    parked: Vec<u32>,
}

impl Sequence {
    /// Takes what the tokens at `positions` need to go through a segment, and those that are parked to wait in
    /// front of it: all or nothing.
    pub(crate) fn take(
        &mut self,
        segment: usize,
        positions: Vec<u32>,
        layout: &PageLayout,
        pool: &mut Pool,
    ) -> Result<Taken, Error> {
        let parked = self.stage.parked.clone();
        let is_last = segment + 1 == self.segments.len();
        let n_rows = if is_last { 0 } else { positions.len() };
        let from = positions.iter().filter_map(|&p| self.waiting.row_of(p)).collect();
        let mut rows = self.waiting.take(Store::Waiting, parked.len(), &mut pool.aux)?;
        let mut to = self.waiting.take(Store::Transit, n_rows, &mut pool.aux);
        if to.is_err() && pool.give_up_hidden() {
            to = self.waiting.take(Store::Transit, n_rows, &mut pool.aux);
        }
        let grown = to.and_then(|to| {
            rows.extend(to);
            self.segments[segment].grow(&positions, layout, pool)
        });
        match grown {
            Ok(growth) => {
                let to = rows.split_off(parked.len());
                let in_transit = parked.iter().filter_map(|&p| self.waiting.row_of(p));
                let parks = in_transit.zip(rows).collect();
                Ok(Taken { segment, growth, from, to, parks, positions, parked })
            }
            Err(e) => {
                self.waiting.give(&rows, &mut pool.aux);
                Err(e)
            }
        }
    }

    /// The tokens have gone through.
    pub(crate) fn keep(&mut self, taken: Taken, layout: &PageLayout, pool: &mut Pool) {
        let Taken { segment, growth, to, parks, positions, parked, .. } = taken;
        let first = self.segments[segment].layout(layout).n_before_tail();
        match &mut self.since {
            Some(Checkpoint { segments, .. }) => {
                let Extent { n_slots, unsealed, .. } = &mut segments[segment];
                let n_kept = n_slots.saturating_sub(first).div_ceil(layout.tail_len());
                unsealed.extend(growth.commit(&mut self.segments[segment], n_kept, pool));
            }
            None => {
                growth.commit(&mut self.segments[segment], 0, pool);
            }
        }
        for (position, (from, to)) in parked.into_iter().zip(parks) {
            self.waiting.put(position, to);
            self.waiting.give(&[from], &mut pool.aux); // in transit: no earlier call's
        }
        for (i, position) in positions.into_iter().enumerate() {
            let was = match to.get(i) {
                Some(&row) => self.waiting.put(position, row),
                None => self.waiting.remove(position),
            };
            let depth = self.waiting.depths.get(position as usize).copied().unwrap_or_default();
            if let Some(row) = was {
                match &mut self.since {
                    Some(since)
                        if (position as usize) < since.len
                            && !since.moved.contains_key(&position) =>
                    {
                        since.moved.insert(position, (depth, row));
                    }
                    _ => self.waiting.give(&[row], &mut pool.aux),
                }
            }
            if self.segments.len() == 1 {
                continue;
            }
            debug_assert_eq!(usize::from(depth), segment, "token {position} skips a segment");
            #[allow(clippy::cast_possible_truncation)] // schedules have at most 16 points
            match self.waiting.depths.get_mut(position as usize) {
                Some(depth) => *depth = segment as u8 + 1,
                None => self.waiting.depths.push(segment as u8 + 1),
            }
        }
        self.stage.parked.clear();
    }

    /// The tokens have not gone through.
    pub(crate) fn give_back(&mut self, taken: Taken, pool: &mut Pool) {
        let Taken { segment, growth, to, parks, positions, .. } = taken;
        growth.undo(&mut self.segments[segment], positions.len(), pool);
        self.waiting.give(&to, &mut pool.aux);
        let waiting: Vec<AuxRow> = parks.into_iter().map(|(_, to)| to).collect();
        self.waiting.give(&waiting, &mut pool.aux);
    }

    /// New tokens have gone through the first segment.
    pub(crate) fn take_in(&mut self, phase: Phase, new: &[u32]) {
        if phase == Phase::Prefill && self.n_shareable == self.len() {
            self.n_shareable = (self.n_shareable + new.len()).min(self.policies.capacity());
        }
        self.tokens.extend_from_slice(new);
        match &mut self.pending {
            Pending::Prompt { done, .. } => {
                *done += new.len();
                self.receipt.n_prefilled += new.len();
            }
            Pending::Nothing | Pending::Token(_) => self.receipt.n_decoded += new.len(),
        }
    }

    /// Takes over pages that hold the next tokens in the first segment, and their hidden states if
    /// there is another.
    pub(crate) fn adopt(&mut self, found: Found, tokens: Range<usize>, page_len: usize) {
        #[allow(clippy::cast_possible_truncation)] // bounded by the context length
        let positions = tokens.start as u32..tokens.end as u32;
        self.waiting.adopt(&found.hidden, positions.start, page_len);
        let segment = &mut self.segments[0];
        segment.page_table.extend(found.columns);
        segment.positions.extend(positions);
        if self.segments.len() > 1 {
            self.waiting.depths.resize(tokens.end, 1);
        }
    }

    /// Takes what a saved session held, all of it waiting between calls: its tokens, how many segments each has
    /// gone through, where there is more than one, and the positions of each segment's slots, whose sealed pages it knows.
    /// What was taken before an error is released with the rest.
    pub(crate) fn restore(
        &mut self,
        tokens: Vec<u32>,
        depths: Vec<u8>,
        slots: &[Vec<u32>],
        layout: &PageLayout,
        pool: &mut Pool,
    ) -> Result<(), Error> {
        self.tokens = tokens;
        for (segment, positions) in self.segments.iter_mut().zip(slots) {
            segment.grow(positions, layout, pool)?.commit(segment, 0, pool);
        }
        let waits = |&(_, &depth): &(u32, &u8)| usize::from(depth) < self.segments.len();
        let waiting: Vec<u32> =
            (0..).zip(&depths).filter(waits).map(|(position, _)| position).collect();
        let rows = self.waiting.take(Store::Waiting, waiting.len(), &mut pool.aux)?;
        for (position, row) in waiting.into_iter().zip(rows) {
            self.waiting.put(position, row);
        }
        self.waiting.depths = depths;
        Ok(())
    }

    /// KV pages held.
    pub(super) fn n_pages(&self) -> usize {
        let gone = self.since.iter().flat_map(|since| &since.gone);
        let n_gone: usize = gone.map(|page| page.column().len()).sum();
        let unsealed = self.since.iter().flat_map(|since| &since.segments);
        let n_unsealed: usize = unsealed.map(|extent| extent.unsealed.columns().len()).sum();
        n_gone
            + n_unsealed
            + self.segments.iter().map(|segment| segment.page_table.len()).sum::<usize>()
    }

    /// A call begins that can be undone: something is queued.
    pub(crate) fn begin(&mut self, pending: Pending) {
        self.pending = pending;
        let Self { receipt, answer_start, logits_ready, drawn, .. } = *self;
        self.before = Before { receipt, answer_start, logits_ready, drawn };
        self.set_checkpoint();
        self.turn = Turn::default();
        let is_prompt = matches!(self.pending, Pending::Prompt { .. });
        if is_prompt {
            self.answer_start = self.len() + self.pending.len();
        }
        self.measured.begin(is_prompt);
    }

    fn set_checkpoint(&mut self) {
        let extent = |segment: &Segment| Extent {
            n_slots: segment.len(),
            n_sealed: segment.n_sealed,
            unsealed: Unsealed::default(),
        };
        let segments = self.segments.iter().map(extent).collect();
        let (len, n_gone) = (self.len(), self.segments[0].n_gone);
        let (moved, gone) = (BTreeMap::new(), Vec::new());
        self.since = Some(Checkpoint { len, segments, n_gone, gone, moved });
    }

    /// True if rows of the prompt that is pending have been computed.
    pub(crate) fn has_begun(&self) -> bool {
        self.receipt.n_prefilled > self.before.receipt.n_prefilled
    }

    /// What was pending is done with: nothing can be undone any more.
    pub(crate) fn settle(&mut self, layout: &PageLayout, pool: &mut Pool) {
        self.give_up_checkpoint(pool);
        // The last token may be computed once more.
        self.roll(self.len().saturating_sub(1), layout, pool);
        let n_gone = self.segments[0].n_gone;
        let first = layout.n_slots(1);
        if n_gone > self.n_gone {
            self.tokens.drain(first..first + n_gone - self.n_gone);
            self.n_gone = n_gone;
        }
    }

    pub(super) fn give_up_checkpoint(&mut self, pool: &mut Pool) {
        let Some(since) = self.since.take() else { return };
        for (_, row) in since.moved.into_values() {
            self.waiting.give(&[row], &mut pool.aux);
        }
        for page in since.gone {
            pool.release(page.column(), self.segments[0].n_layers);
        }
        for (segment, extent) in self.segments.iter().zip(since.segments) {
            pool.release(extent.unsealed.columns(), segment.n_layers);
        }
    }

    /// Gives back what no token from `position` on sees; pages that were there when the call began stay until it is
    /// settled.
    pub(crate) fn roll(&mut self, position: usize, layout: &PageLayout, pool: &mut Pool) {
        let (Some(stream), Ok(position)) = (self.policies.stream, u32::try_from(position)) else {
            return;
        };
        let segment = &mut self.segments[0];
        for page in segment.roll(stream.first_seen(position), layout) {
            match &mut self.since {
                Some(since) if layout.n_slots(1 + since.gone.len()) < since.segments[0].n_slots => {
                    since.gone.push(page);
                }
                _ => pool.release(page.column(), segment.n_layers),
            }
        }
    }

    /// Takes back what has been computed of what is pending, which stays pending.
    pub(crate) fn roll_back(&mut self, layout: &PageLayout, pool: &mut Pool) {
        let n_new = match &mut self.pending {
            Pending::Prompt { done, .. } => std::mem::take(done),
            Pending::Token(_) => usize::from(self.stage.segment > 0),
            Pending::Nothing => return,
        };
        self.roll_back_slots(layout, pool);
        self.tokens.truncate(self.tokens.len() - n_new);
        self.set_checkpoint();
        self.n_shareable = self.n_shareable.min(self.len());
        self.stage = Stage::default();
        self.measured.roll_back();
        let Before { receipt, answer_start, logits_ready, drawn } = self.before;
        (self.receipt, self.answer_start) = (receipt, answer_start);
        (self.logits_ready, self.drawn) = (logits_ready, drawn);
    }

    /// Slots and hidden states are those that there were when the call began.
    fn roll_back_slots(&mut self, layout: &PageLayout, pool: &mut Pool) {
        let Some(since) = self.since.take() else { return };
        for (position, (depth, row)) in since.moved {
            if let Some(now) = self.waiting.put(position, row) {
                self.waiting.give(&[now], &mut pool.aux);
            }
            self.waiting.depths[position as usize] = depth;
        }
        let first = &mut self.segments[0];
        if first.n_gone > since.n_gone {
            // What is between the pages that come back and those that are there has gone for good, and is new.
            let n_back = since.gone.len() * layout.page_len;
            if first.n_gone - since.n_gone > n_back {
                first.truncate(layout.n_slots(1), layout, pool);
                first.n_gone = since.n_gone + n_back;
            }
            first.roll_back(since.gone, layout);
        }
        for (segment, extent) in self.segments.iter_mut().zip(since.segments) {
            segment.unseal(extent.n_sealed, extent.unsealed, layout, pool);
            segment.truncate(extent.n_slots, layout, pool);
        }
        self.forget(since.len, layout, pool);
    }

    /// A generated token goes through all segments or through none.
    pub(crate) fn undo_token(&mut self, layout: &PageLayout, pool: &mut Pool) {
        if matches!(self.pending, Pending::Token(_)) && self.stage != Stage::default() {
            self.roll_back(layout, pool);
        }
    }

    /// [`Session::clear_pending`](crate::Session::clear_pending).
    pub(crate) fn clear_pending(&mut self, layout: &PageLayout, pool: &mut Pool) -> usize {
        if self.policies.lazy.is_some() {
            self.roll_back(layout, pool);
        }
        let n = self.pending.len();
        self.pending = Pending::Nothing;
        self.stage = Stage::default();
        self.settle(layout, pool);
        n
    }
}
