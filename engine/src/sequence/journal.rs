//! What a session holds in all segments of the layers: KV where a token has gone through, its hidden state
//! where it waits.
//!
//! A token goes through the segments in order, each at most once, so one number says all about it: how many
//! it has gone through. Its hidden state is kept behind the last of them, unless that was the end: in transit
//! until the next tokens are chosen, and parked by the pass that follows if it is not among them.
//! Everything that a call changes is undone by [`LayeredCache::rollback`] or made final by
//! [`LayeredCache::settle`]; until then the hidden states that earlier calls left are kept.

use std::collections::BTreeMap;
use std::ops::Range;

use super::segment::{Gone, Growth, Segment, Unsealed};
use super::waiting::Aux;
use crate::error::Error;
use crate::memory;
use crate::pool::{AuxRow, Found, Pool, Store};
use crate::store::PageLayout;

/// Memory that the place of a hidden state takes at most, in trees whose nodes may be half empty and in a page
/// that no other row is in.
const ROW_BYTES: usize = 256;

/// Segments and hidden states of one session.
#[derive(Debug)]
pub(crate) struct LayeredCache {
    /// First to last layer; one segment where nothing is pruned.
    pub(crate) segments: Vec<Segment>,
    /// Hidden states of the tokens that are between two segments.
    pub(crate) aux: Aux,
    /// Tokens that have gone through the first segment.
    len: usize,
    /// Segments that the token at each position has gone through; nothing where there is only one.
    depth: Vec<u8>,
    since: Option<Checkpoint>,
}

/// What to go back to.
#[derive(Debug)]
struct Checkpoint {
    len: usize,
    segments: Vec<Extent>,
    /// Slots that the first segment had given back, and the pages that it has since then.
    n_gone: usize,
    gone: Vec<Gone>,
    /// Earlier tokens that have moved on since: how deep they were, and where they waited.
    moved: BTreeMap<u32, (u8, AuxRow)>,
}

/// How far a segment went, and columns of its tail that have been sealed since.
#[derive(Debug)]
struct Extent {
    n_slots: usize,
    n_sealed: usize,
    unsealed: Unsealed,
}

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

impl LayeredCache {
    /// Empty segments between `points`, which rise and lie inside `0..n_layers`.
    pub(crate) fn new(n_layers: usize, points: impl Iterator<Item = usize>) -> Self {
        let mut bounds = vec![0];
        bounds.extend(points.chain([n_layers]));
        let segments = bounds.windows(2).map(|pair| Segment::new(pair[0]..pair[1])).collect();
        Self { segments, aux: Aux::default(), len: 0, depth: Vec::new(), since: None }
    }

    /// Segments that a token has gone through.
    pub(crate) fn depth(&self, position: u32) -> usize {
        self.depth.get(position as usize).map_or(0, |&depth| depth.into())
    }

    /// KV pages held.
    pub(crate) fn n_pages(&self) -> usize {
        let gone = self.since.iter().flat_map(|since| &since.gone);
        let n_gone: usize = gone.map(|page| page.column().len()).sum();
        let unsealed = self.since.iter().flat_map(|since| &since.segments);
        let n_unsealed: usize = unsealed.map(|extent| extent.unsealed.columns().len()).sum();
        n_gone
            + n_unsealed
            + self.segments.iter().map(|segment| segment.page_table.len()).sum::<usize>()
    }

    /// A call begins that can be undone.
    pub(crate) fn begin(&mut self) {
        let extent = |segment: &Segment| Extent {
            n_slots: segment.len(),
            n_sealed: segment.n_sealed,
            unsealed: Unsealed::default(),
        };
        let segments = self.segments.iter().map(extent).collect();
        let (len, n_gone) = (self.len, self.segments[0].n_gone);
        let (moved, gone) = (BTreeMap::new(), Vec::new());
        self.since = Some(Checkpoint { len, segments, n_gone, gone, moved });
    }

    /// The call is done: nothing can be undone any more.
    pub(crate) fn settle(&mut self, pool: &mut Pool) {
        if let Some(since) = self.since.take() {
            for (_, row) in since.moved.into_values() {
                self.aux.give(&[row], &mut pool.aux);
            }
            for page in since.gone {
                pool.release(page.column(), self.segments[0].n_layers);
            }
            for (segment, extent) in self.segments.iter().zip(since.segments) {
                pool.release(extent.unsealed.columns(), segment.n_layers);
            }
        }
    }

    /// Gives back the pages of a sequence that rolls whose positions are in front of `first_seen`; those that were
    /// there when the call began stay until it is settled.
    pub(crate) fn roll(&mut self, first_seen: u32, layout: &PageLayout, pool: &mut Pool) {
        let segment = &mut self.segments[0];
        for page in segment.roll(first_seen, layout) {
            match &mut self.since {
                Some(since) if layout.n_slots(1 + since.gone.len()) < since.segments[0].n_slots => {
                    since.gone.push(page);
                }
                _ => pool.release(page.column(), segment.n_layers),
            }
        }
    }

    /// Makes undone what was committed since [`begin`](Self::begin), which can then be tried again.
    pub(crate) fn rollback(&mut self, layout: &PageLayout, pool: &mut Pool) {
        let Some(since) = self.since.take() else { return };
        for (position, (depth, row)) in since.moved {
            if let Some(now) = self.aux.put(position, row) {
                self.aux.give(&[now], &mut pool.aux);
            }
            self.depth[position as usize] = depth;
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
        self.begin();
    }

    /// Takes what the tokens at `positions` need to go through a segment, and those at `parked` to wait in
    /// front of it: all or nothing.
    pub(crate) fn take(
        &mut self,
        segment: usize,
        positions: Vec<u32>,
        parked: Vec<u32>,
        layout: &PageLayout,
        pool: &mut Pool,
    ) -> Result<Taken, Error> {
        let is_last = segment + 1 == self.segments.len();
        let n_rows = if is_last { 0 } else { positions.len() };
        let from = positions.iter().filter_map(|&p| self.aux.row_of(p)).collect();
        let mut rows = self.aux.take(Store::Waiting, parked.len(), &mut pool.aux)?;
        let mut to = self.aux.take(Store::Transit, n_rows, &mut pool.aux);
        if to.is_err() && pool.give_up_hidden() {
            to = self.aux.take(Store::Transit, n_rows, &mut pool.aux);
        }
        let grown = to.and_then(|to| {
            rows.extend(to);
            self.segments[segment].grow(&positions, layout, pool)
        });
        match grown {
            Ok(growth) => {
                let to = rows.split_off(parked.len());
                let in_transit = parked.iter().filter_map(|&p| self.aux.row_of(p));
                let parks = in_transit.zip(rows).collect();
                Ok(Taken { segment, growth, from, to, parks, positions, parked })
            }
            Err(e) => {
                self.aux.give(&rows, &mut pool.aux);
                Err(e)
            }
        }
    }

    /// The tokens have gone through.
    pub(crate) fn commit(&mut self, taken: Taken, layout: &PageLayout, pool: &mut Pool) {
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
            self.aux.put(position, to);
            self.aux.give(&[from], &mut pool.aux); // in transit: no earlier call's
        }
        for (i, position) in positions.into_iter().enumerate() {
            let was = match to.get(i) {
                Some(&row) => self.aux.put(position, row),
                None => self.aux.remove(position),
            };
            let depth = self.depth.get(position as usize).copied().unwrap_or_default();
            if let Some(row) = was {
                match &mut self.since {
                    Some(since)
                        if (position as usize) < since.len
                            && !since.moved.contains_key(&position) =>
                    {
                        since.moved.insert(position, (depth, row));
                    }
                    _ => self.aux.give(&[row], &mut pool.aux),
                }
            }
            if segment == 0 {
                self.len += 1;
            }
            if self.segments.len() == 1 {
                continue;
            }
            debug_assert_eq!(usize::from(depth), segment, "token {position} skips a segment");
            #[allow(clippy::cast_possible_truncation)] // schedules have at most 16 points
            match self.depth.get_mut(position as usize) {
                Some(depth) => *depth = segment as u8 + 1,
                None => self.depth.push(segment as u8 + 1),
            }
        }
    }

    /// The tokens have not gone through.
    pub(crate) fn undo(&mut self, taken: Taken, pool: &mut Pool) {
        let Taken { segment, growth, to, parks, positions, .. } = taken;
        growth.undo(&mut self.segments[segment], positions.len(), pool);
        self.aux.give(&to, &mut pool.aux);
        let waiting: Vec<AuxRow> = parks.into_iter().map(|(_, to)| to).collect();
        self.aux.give(&waiting, &mut pool.aux);
    }

    /// Takes over pages that hold the next tokens of a sequence in the first segment, and their hidden states if
    /// there is another.
    pub(crate) fn adopt(&mut self, found: Found, tokens: Range<usize>, page_len: usize) {
        #[allow(clippy::cast_possible_truncation)] // bounded by the context length
        let positions = tokens.start as u32..tokens.end as u32;
        self.aux.adopt(&found.hidden, positions.start, page_len);
        let segment = &mut self.segments[0];
        segment.page_table.extend(found.columns);
        segment.positions.extend(positions);
        self.len = tokens.end;
        if self.segments.len() > 1 {
            self.depth.resize(tokens.end, 1);
        }
    }

    /// Takes what a saved session of `len` tokens held, all of it waiting between calls: how many segments each token has
    /// gone through, where there is more than one, and the positions of each segment's slots, whose sealed pages it knows.
    /// What was taken before an error is released with the rest.
    pub(crate) fn restore(
        &mut self,
        len: usize,
        depth: Vec<u8>,
        slots: &[Vec<u32>],
        layout: &PageLayout,
        pool: &mut Pool,
    ) -> Result<(), Error> {
        for (segment, positions) in self.segments.iter_mut().zip(slots) {
            segment.grow(positions, layout, pool)?.commit(segment, 0, pool);
        }
        let waits = |&(_, &depth): &(u32, &u8)| usize::from(depth) < self.segments.len();
        let waiting: Vec<u32> =
            (0..).zip(&depth).filter(waits).map(|(position, _)| position).collect();
        let rows = self.aux.take(Store::Waiting, waiting.len(), &mut pool.aux)?;
        for (position, row) in waiting.into_iter().zip(rows) {
            self.aux.put(position, row);
        }
        (self.len, self.depth) = (len, depth);
        Ok(())
    }

    /// Segments that each token has gone through.
    pub(crate) fn depths(&self) -> &[u8] {
        &self.depth
    }

    /// Forgets the tokens from position `len` on.
    pub(crate) fn forget(&mut self, len: usize, layout: &PageLayout, pool: &mut Pool) {
        for segment in &mut self.segments {
            segment.forget(len, layout, pool);
        }
        self.len = self.len.min(len);
        self.depth.truncate(len);
        if len == 0 {
            self.segments[0].n_gone = 0;
        }
        self.aux.truncate(len, &mut pool.aux);
    }

    /// The same for a second session: pages have one more holder.
    pub(crate) fn fork(&self, pool: &mut Pool) -> Result<Self, Error> {
        memory::room_for(self.aux.len() * ROW_BYTES, "a fork's hidden states")?;
        let depth = memory::copy(&self.depth, "a fork's tokens")?;
        let segments: Result<_, Error> = self.segments.iter().map(Segment::copy).collect();
        let segments: Vec<Segment> = segments?;
        for segment in &segments {
            pool.pages.share(&segment.page_table);
        }
        Ok(Self { segments, aux: self.aux.fork(&mut pool.aux), len: self.len, depth, since: None })
    }

    /// Gives everything back.
    pub(crate) fn release(&mut self, pool: &mut Pool) {
        self.settle(pool);
        for segment in &mut self.segments {
            pool.release(&segment.page_table, segment.n_layers);
            segment.page_table.clear();
        }
        self.aux.clear(&mut pool.aux);
    }

    /// Layers of a segment.
    pub(crate) fn layers(&self, segment: usize) -> Range<usize> {
        self.segments[segment].layers()
    }
}
