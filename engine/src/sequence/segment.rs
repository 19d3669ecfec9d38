//! The slots of some layers: which token is in which, and the pages that hold them.

use std::ops::Range;

use crate::backend::{Slots, Table};
use crate::error::Error;
use crate::memory;
use crate::pool::Pool;
use crate::store::{self, PageId, PageLayout, Seal};

/// The tokens that a run of layers holds, and the pages that hold them.
#[derive(Debug)]
pub(crate) struct Segment {
    /// The first of its layers.
    pub(crate) first_layer: usize,
    /// Layers in the segment.
    pub(crate) n_layers: usize,
    /// Its slots; at [`EMPTY`] is one whose token was cut off. Those behind the first page are given back: [`Segment::roll`].
    pub(crate) slots: Slots,
    /// Page ids, `[page_idx][layer]`: a column of `n_layers` pages for the slots that [`PageLayout::place`] says. Where pages
    /// are sealed, the first page and those.
    pub(crate) body: Vec<PageId>,
    /// The same of pages that wait to be sealed.
    pub(crate) tail: Vec<PageId>,
}

/// How far a segment goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Ends {
    pub(crate) n_slots: usize,
    pub(crate) n_gone: usize,
    n_body: usize,
    n_tail: usize,
}

/// Position of a slot that holds no token any more: later than any row, so that nobody sees it.
pub(crate) const EMPTY: u32 = u32::MAX;

/// What a segment has grown by for the rows of a pass.
#[derive(Debug)]
pub(crate) struct Added {
    /// The new slots, in order: all of them, unless some see more pages sealed than others.
    pub(crate) parts: Vec<Part>,
    /// Pages to copy before the pass, `(from, to)`: the shared last column that it would write.
    pub(crate) copies: Vec<(PageId, PageId)>,
    /// Pages to seal before the pass.
    pub(crate) seals: Vec<Seal>,
    /// Sealed pages of the table before. Those at the front of the tail that are sealed for the pass stay there until it is done.
    n_sealed: usize,
}

/// Slots that a pass is about to write, alike in what they see sealed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Part {
    /// How many.
    pub(crate) n_slots: usize,
    /// Sealed pages of the table that they see.
    pub(crate) n_sealed: usize,
}

impl Segment {
    /// An empty segment of some layers.
    pub(crate) fn new(layers: Range<usize>, layout: &PageLayout) -> Self {
        let slots = Slots::new(layout, 0, Vec::new());
        let (body, tail) = Default::default();
        Self { first_layer: layers.start, n_layers: layers.len(), slots, body, tail }
    }

    /// The same lists once more.
    pub(crate) fn copy(&self) -> Result<Self, Error> {
        let slots = self.slots.copy()?;
        let body = memory::copy(&self.body, "a fork's page table")?;
        let tail = memory::copy(&self.tail, "a fork's page table")?;
        Ok(Self { slots, body, tail, ..*self })
    }

    /// Its layers.
    pub(crate) fn layers(&self) -> Range<usize> {
        self.first_layer..self.first_layer + self.n_layers
    }

    /// Its pages, column by column.
    pub(crate) fn pages(&self) -> impl Iterator<Item = PageId> + '_ {
        self.body.iter().chain(&self.tail).copied()
    }

    /// How many they are.
    pub(crate) fn n_pages(&self) -> usize {
        self.body.len() + self.tail.len()
    }

    /// Its table.
    pub(crate) fn table(&self) -> Table<'_> {
        Table { body: &self.body, tail: &self.tail, n_layers: self.n_layers }
    }

    /// The table that slots of a pass see.
    pub(crate) fn table_of(&self, part: Part, added: &Added, layout: &PageLayout) -> Table<'_> {
        let n_columns = (part.n_sealed - added.n_sealed) * layout.n_to_seal();
        let body = match layout.kv.are_sealed() {
            true => &self.body[..(1 + part.n_sealed) * self.n_layers],
            false => &self.body[..],
        };
        Table { body, tail: &self.tail[n_columns * self.n_layers..], n_layers: self.n_layers }
    }

    /// Sealed pages of the table, in a cache that has such.
    pub(crate) fn n_sealed(&self, layout: &PageLayout) -> usize {
        match layout.kv.are_sealed() {
            true => (self.body.len() / self.n_layers).saturating_sub(1),
            false => 0,
        }
    }

    /// How far it goes.
    pub(crate) fn ends(&self) -> Ends {
        let (n_body, n_tail) = (self.body.len(), self.tail.len());
        Ends { n_slots: self.len(), n_gone: self.slots.n_gone(), n_body, n_tail }
    }

    /// Slots in use.
    pub(crate) fn len(&self) -> usize {
        self.slots.positions().len()
    }

    /// The layout of its table.
    pub(crate) fn layout(&self, layout: &PageLayout) -> PageLayout {
        layout.with_sealed(self.n_sealed(layout))
    }

    /// The new slots by how many pages are sealed for them.
    fn parts(&self, n_new: usize, layout: &PageLayout) -> Vec<Part> {
        if !layout.kv.are_sealed() {
            return vec![Part { n_slots: n_new, n_sealed: 0 }];
        }
        let (mut slot, end) = (self.len(), self.len() + n_new);
        let mut parts = Vec::new();
        while slot < end {
            let n_slots = layout.n_alike(slot).min(end - slot);
            parts.push(Part { n_slots, n_sealed: layout.n_due(slot).max(self.n_sealed(layout)) });
            slot += n_slots;
        }
        parts
    }

    /// Takes the pages that slots for `positions` need, all or none, and adds the positions: the copy of a shared last column,
    /// and what pages of the tail are sealed into, counted. Also gives that column, which is not the segment's any more.
    pub(crate) fn grow(
        &mut self,
        positions: &[u32],
        layout: &PageLayout,
        pool: &mut Pool,
    ) -> Result<(Added, Option<Vec<PageId>>), Error> {
        let (n_layers, n_sealed, ends) = (self.n_layers, self.n_sealed(layout), self.ends());
        let parts = self.parts(positions.len(), layout);
        let n_to_seal = parts.last().map_or(0, |part| part.n_sealed - n_sealed);
        let of_segment = self.layout(layout);
        let n_columns = of_segment.n_pages(self.len() + positions.len());
        let n_fresh = n_columns.saturating_sub(self.n_pages() / n_layers);
        let is_partial = of_segment.n_slots(of_segment.n_pages(self.len())) > self.len();
        let is_written = is_partial && !positions.is_empty();
        let is_shared = is_written && pool.pages.is_shared(self.last_column(ends)[0]);
        let n_needed = n_fresh + usize::from(is_shared) + n_to_seal;
        let taken = pool.pages.take(n_needed * n_layers)?;
        let (sealed, mut fresh) = taken.split_at(n_to_seal * n_layers);
        let (mut copies, mut swapped) = (Vec::new(), None);
        if is_shared {
            let (copy, rest) = fresh.split_at(n_layers);
            let last = self.last_column(ends);
            copies = last.iter().copied().zip(copy.iter().copied()).collect();
            swapped = Some(last.to_vec());
            last.copy_from_slice(copy);
            fresh = rest;
        } else if is_written {
            // Its slots past the end are about to change, whatever was known of them.
            pool.forget_prefix(self.last_column(ends)[0]);
        }
        // A table with a tail grows there, but for its first page.
        let n_body = match layout.kv.are_sealed() {
            true if self.body.is_empty() => fresh.len().min(n_layers),
            true => 0,
            false => fresh.len(),
        };
        self.body.extend_from_slice(&fresh[..n_body]);
        self.tail.extend_from_slice(&fresh[n_body..]);
        let from = &self.tail[..n_to_seal * layout.n_to_seal() * n_layers];
        let seals = self.seals(from, sealed, layout);
        self.body.extend_from_slice(sealed);
        self.slots.edit(self.len(), |all, _| all.extend_from_slice(positions));
        Ok((Added { parts, copies, seals, n_sealed }, swapped))
    }

    /// The last column of a table that goes so far.
    pub(crate) fn last_column(&mut self, ends: Ends) -> &mut [PageId] {
        match ends.n_tail {
            0 => &mut self.body[ends.n_body - self.n_layers..ends.n_body],
            n_tail => &mut self.tail[n_tail - self.n_layers..n_tail],
        }
    }

    /// The pass is done: takes out the columns at the front of the tail that were sealed for it.
    pub(crate) fn leave_tail(&mut self, added: &Added, layout: &PageLayout) -> Vec<PageId> {
        let n_sealed = added.parts.last().map_or(0, |part| part.n_sealed - added.n_sealed);
        self.tail.drain(..n_sealed * layout.n_to_seal() * self.n_layers).collect()
    }

    /// Columns that it had when it went to `ends` and that are at the front of the tail before `added`.
    pub(crate) fn n_older(&self, ends: Ends, added: &Added, layout: &PageLayout) -> usize {
        let first = layout.with_sealed(added.n_sealed).n_before_tail();
        ends.n_slots.saturating_sub(first).div_ceil(layout.tail_len())
    }

    /// Takes the pages of slots at `positions`, of which those of `n_sealed` pages are sealed.
    pub(crate) fn restore(
        &mut self,
        positions: &[u32],
        n_sealed: usize,
        layout: &PageLayout,
        pool: &mut Pool,
    ) -> Result<(), Error> {
        let of_segment = layout.with_sealed(n_sealed);
        let n_columns = of_segment.n_pages(positions.len());
        self.body = pool.pages.take(n_columns * self.n_layers)?;
        if layout.kv.are_sealed() {
            self.tail = self.body.split_off((1 + n_sealed).min(n_columns) * self.n_layers);
        }
        self.slots.edit(0, |all, _| all.extend_from_slice(positions));
        Ok(())
    }

    /// Cuts it back to what it was, once what was taken out since then is back.
    pub(crate) fn cut(&mut self, ends: Ends, pool: &mut Pool) {
        self.slots.edit(ends.n_slots, |positions, n_gone| {
            positions.truncate(ends.n_slots);
            *n_gone = ends.n_gone;
        });
        for (list, n) in [(&mut self.body, ends.n_body), (&mut self.tail, ends.n_tail)] {
            pool.release(&list[n.min(list.len())..], self.n_layers);
            list.truncate(n);
        }
    }

    /// What becomes what when the columns `from` are sealed into the columns `to`.
    fn seals(&self, from: &[PageId], to: &[PageId], layout: &PageLayout) -> Vec<Seal> {
        let n = self.n_layers;
        let columns = from.chunks(n * layout.n_to_seal()).zip(to.chunks(n));
        let of_layers = columns.flat_map(|(from, to)| {
            let seal = move |(layer, &to)| {
                let from = from.iter().skip(layer).step_by(n).copied().collect();
                Seal { from, to }
            };
            to.iter().enumerate().map(seal)
        });
        of_layers.collect()
    }

    /// Cuts off the tokens at positions from `len` on and gives back the pages behind the last that stays. A
    /// slot between others stays where it is, without a token, and so do those behind it in a sealed page.
    pub(crate) fn cut_back(&mut self, len: usize, layout: &PageLayout, pool: &mut Pool) {
        self.slots.edit(0, |positions, _| {
            let late = positions.iter_mut().filter(|position| **position as usize >= len);
            late.for_each(|position| *position = EMPTY);
        });
        let positions = self.slots.positions();
        let Some(last) = positions.iter().rposition(|&position| position != EMPTY) else {
            return self.truncate(0, layout, pool);
        };
        let of_segment = self.layout(layout);
        let (page_idx, _) = of_segment.place(last);
        let n_slots = match layout.kv.are_sealed() && of_segment.part(page_idx) == store::Part::Body
        {
            true => of_segment.n_slots(page_idx + 1),
            false => last + 1,
        };
        self.truncate(n_slots, layout, pool);
    }

    /// Takes out the page behind the first and its slots, if it holds no position from `first_seen` on.
    pub(crate) fn roll(
        &mut self,
        first_seen: u32,
        layout: &PageLayout,
    ) -> Option<(Vec<u32>, Vec<PageId>)> {
        let second = layout.n_slots(1)..layout.n_slots(2);
        let page = self.slots.positions().get(second.clone())?;
        if page.iter().any(|&position| position >= first_seen) {
            return None;
        }
        let column = self.body.drain(self.n_layers..2 * self.n_layers).collect();
        let rolled = self.slots.edit(second.start, |positions, n_gone| {
            *n_gone += second.len();
            positions.drain(second).collect()
        });
        Some((rolled, column))
    }

    /// Puts back what [`roll`](Self::roll) took out last.
    pub(crate) fn unroll(&mut self, positions: Vec<u32>, column: Vec<PageId>, layout: &PageLayout) {
        let first = layout.n_slots(1);
        self.slots.edit(first, |all, n_gone| {
            *n_gone -= positions.len();
            all.splice(first..first, positions);
        });
        self.body.splice(self.n_layers..self.n_layers, column);
    }

    /// Makes the pages of some slots the segment's alone, as they are about to be written: copies of those that are
    /// shared, `(from, to)`, or an error and nothing. Nobody else will share them.
    pub(crate) fn own(
        &mut self,
        slots: Range<usize>,
        layout: &PageLayout,
        pool: &mut Pool,
    ) -> Result<Vec<(PageId, PageId)>, Error> {
        if slots.is_empty() {
            return Ok(Vec::new());
        }
        let columns = layout.place(slots.start).0..layout.n_pages(slots.end);
        let entries = columns.start * self.n_layers..columns.end * self.n_layers;
        let n_shared = |column: &&[PageId]| usize::from(pool.pages.is_shared(column[0]));
        let table = &mut self.body[entries];
        let n_shared: usize = table.chunks(self.n_layers).map(|column| n_shared(&column)).sum();
        let mut fresh = pool.pages.take(n_shared * self.n_layers)?.into_iter();
        let mut copies = Vec::new();
        for column in table.chunks_mut(self.n_layers) {
            if !pool.pages.is_shared(column[0]) {
                pool.forget_prefix(column[0]);
                continue;
            }
            for (page, copy) in column.iter_mut().zip(&mut fresh) {
                copies.push((*page, copy));
                pool.pages.release(&[*page]); // its other holders keep it
                *page = copy;
            }
        }
        Ok(copies)
    }

    /// Only the first `n_slots` are left, which other tokens' numbers have moved to: they count as the first positions, whatever
    /// they were, because all that matters is that each later row sees them.
    pub(crate) fn renumber(&mut self, n_slots: usize, layout: &PageLayout, pool: &mut Pool) {
        self.truncate(n_slots, layout, pool);
        self.slots.edit(0, |positions, _| {
            positions.iter_mut().zip(0..).for_each(|(position, slot)| *position = slot);
        });
    }

    /// Gives back the slots from `n_slots` on, all those of a sealed page or none, and the pages that only they needed.
    pub(crate) fn truncate(&mut self, n_slots: usize, layout: &PageLayout, pool: &mut Pool) {
        if n_slots >= self.len() {
            return;
        }
        let n_pages = self.layout(layout).n_pages(n_slots) * self.n_layers;
        let n_body = self.body.len().min(n_pages);
        let n_tail = n_pages - n_body;
        let n_gone = if n_slots == 0 { 0 } else { self.slots.n_gone() };
        self.cut(Ends { n_slots, n_gone, n_body, n_tail }, pool);
    }
}
