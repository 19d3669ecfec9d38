//! A session's share of the cache: the token list of a segment and its page table.
//!
//! Growing is done in two halves, so that a step that fails leaves nothing changed:
//! [`Segment::grow`] takes pages and says what the table would be, and [`Growth::commit`] or
//! [`Growth::undo`] makes it so or gives the pages back.

use std::ops::Range;

use crate::error::Error;
use crate::memory;
use crate::pool::Pool;
use crate::store::{PageId, PageLayout, Part, Seal};

/// The tokens that a run of layers holds, and the pages that hold them.
#[derive(Debug, Default)]
pub(crate) struct Segment {
    /// The first of its layers.
    pub(crate) first_layer: usize,
    /// Layers in the segment.
    pub(crate) n_layers: usize,
    /// Absolute position of each slot; [`GIVEN_UP`] for one whose token was forgotten.
    pub(crate) positions: Vec<u32>,
    /// Slots behind the first page that were given back: [`Segment::roll`].
    pub(crate) n_gone: usize,
    /// Sealed pages of its table, in a cache that has such.
    pub(crate) n_sealed: usize,
    /// Page ids, `[page_idx][layer]`: a column of `n_layers` pages for the slots that [`PageLayout::place`] says.
    pub(crate) page_table: Vec<PageId>,
}

/// Position of a slot that holds no token any more: later than any row, so that nobody sees it.
pub(crate) const GIVEN_UP: u32 = u32::MAX;

/// A full page of every layer that a segment has left behind.
#[derive(Debug)]
pub(crate) struct Gone {
    positions: Vec<u32>,
    column: Vec<PageId>,
}

/// Columns of the tail of a table whose slots are in sealed pages now.
#[derive(Debug, Default)]
pub(crate) struct Unsealed(Vec<PageId>);

/// Pages taken for slots that a step is about to write.
#[derive(Debug)]
pub(crate) struct Growth {
    /// The new slots, in order: all of them, unless some see more pages sealed than others.
    pub(crate) parts: Vec<Grown>,
    /// Pages to copy before the step, `(from, to)`: the shared tail that the step would write.
    pub(crate) copies: Vec<(PageId, PageId)>,
    /// Pages to seal before the step.
    pub(crate) seals: Vec<Seal>,
    taken: Vec<PageId>,
    /// Columns whose slots are sealed for the last part.
    unsealed: Vec<PageId>,
}

/// Slots that a step is about to write, and the table that they see.
#[derive(Debug)]
pub(crate) struct Grown {
    /// How many.
    pub(crate) n_slots: usize,
    /// The page table with room for all new slots.
    pub(crate) page_table: Vec<PageId>,
    /// The sealed pages of that table.
    pub(crate) n_sealed: usize,
}

impl Segment {
    /// An empty segment of some layers.
    pub(crate) fn new(layers: Range<usize>) -> Self {
        Self { first_layer: layers.start, n_layers: layers.len(), ..Self::default() }
    }

    /// The same lists once more.
    pub(crate) fn copy(&self) -> Result<Self, Error> {
        let positions = memory::copy(&self.positions, "a fork's slots")?;
        let page_table = memory::copy(&self.page_table, "a fork's page table")?;
        Ok(Self { positions, page_table, ..*self })
    }

    /// Its layers.
    pub(crate) fn layers(&self) -> Range<usize> {
        self.first_layer..self.first_layer + self.n_layers
    }

    /// Slots in use.
    pub(crate) fn len(&self) -> usize {
        self.positions.len()
    }

    /// The layout of its table.
    pub(crate) fn layout(&self, layout: &PageLayout) -> PageLayout {
        layout.with_sealed(self.n_sealed)
    }

    /// The new slots by how many pages are to be sealed for them: their number, and that of pages besides those that are.
    fn parts(&self, n_new: usize, layout: &PageLayout) -> Vec<(usize, usize)> {
        if !layout.kv.are_sealed() {
            return vec![(n_new, 0)];
        }
        let (mut slot, end) = (self.len(), self.len() + n_new);
        let mut parts = Vec::new();
        while slot < end {
            let n = layout.n_alike(slot).min(end - slot);
            parts.push((n, layout.n_due(slot).saturating_sub(self.n_sealed)));
            slot += n;
        }
        parts
    }

    /// Pages that `n_new` more slots need: the copy of a shared tail counted, and those that others are sealed into,
    /// which are there until the step is done.
    pub(crate) fn pages_needed(&self, n_new: usize, layout: &PageLayout, pool: &Pool) -> usize {
        let layout = self.layout(layout);
        let n_columns = layout.n_pages(self.len() + n_new);
        let fresh = n_columns.saturating_sub(self.page_table.len() / self.n_layers);
        let copied = usize::from(n_new > 0 && self.tail_is_shared(&layout, pool));
        let n_to_seal = self.parts(n_new, &layout).last().map_or(0, |&(_, n)| n);
        (fresh + copied + n_to_seal) * self.n_layers
    }

    /// Takes the pages that slots for `positions` need, all or none, and adds the positions.
    pub(crate) fn grow(
        &mut self,
        positions: &[u32],
        layout: &PageLayout,
        pool: &mut Pool,
    ) -> Result<Growth, Error> {
        let n_needed = self.pages_needed(positions.len(), layout, pool);
        let parts = self.parts(positions.len(), layout);
        let n_to_seal = parts.last().map_or(0, |&(_, n)| n);
        let taken = pool.pages.take(n_needed)?;
        let layout = self.layout(layout);
        let mut page_table = self.page_table.clone();
        let mut copies = Vec::new();
        let (sealed, mut fresh) = taken.split_at(n_to_seal * self.n_layers);
        if let Some(tail) = self.tail(&layout).filter(|_| !positions.is_empty()) {
            if self.tail_is_shared(&layout, pool) {
                let (copy, rest) = fresh.split_at(self.n_layers);
                copies =
                    page_table[tail.clone()].iter().copied().zip(copy.iter().copied()).collect();
                page_table[tail].copy_from_slice(copy);
                fresh = rest;
            } else {
                // Its slots past the end are about to change, whatever was known of them.
                pool.forget_prefix(page_table[tail.start]);
            }
        }
        page_table.extend_from_slice(fresh);
        // The first pages of the tail make room for what they are sealed into.
        let first = (1 + self.n_sealed) * self.n_layers;
        let column_of = |n: usize| n * self.n_layers * layout.n_to_seal();
        let unsealed = match n_to_seal {
            0 => Vec::new(),
            n => page_table[first..first + column_of(n)].to_vec(),
        };
        let seals = self.seals(&unsealed, sealed, &layout);
        let grown = |(n_slots, n): (usize, usize)| {
            let mut page_table = page_table.clone();
            if n > 0 {
                let sealed = sealed[..n * self.n_layers].iter().copied();
                page_table.splice(first..first + column_of(n), sealed);
            }
            Grown { n_slots, page_table, n_sealed: self.n_sealed + n }
        };
        let parts = parts.into_iter().map(grown).collect();
        self.positions.extend_from_slice(positions);
        Ok(Growth { parts, copies, seals, taken, unsealed })
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

    /// Puts back what was sealed since the table had `n_sealed` such pages, out of the columns that it had then; slots
    /// that these lack have come since and go.
    pub(crate) fn unseal(
        &mut self,
        n_sealed: usize,
        Unsealed(columns): Unsealed,
        layout: &PageLayout,
        pool: &mut Pool,
    ) {
        let n_back = self.n_sealed.saturating_sub(n_sealed);
        if n_back == 0 {
            return;
        }
        let sealed = (1 + n_sealed) * self.n_layers..(1 + self.n_sealed) * self.n_layers;
        let n_columns = columns.len() / self.n_layers;
        self.n_sealed = n_sealed;
        let released: Vec<PageId> = self.page_table.splice(sealed, columns).collect();
        pool.release(&released, self.n_layers);
        if n_columns < n_back * layout.n_to_seal() {
            // What is behind them does not follow.
            let n_kept = (1 + n_sealed + n_columns) * self.n_layers;
            pool.release(&self.page_table[n_kept..], self.n_layers);
            self.page_table.truncate(n_kept);
            let n_slots = self.layout(layout).n_slots(1 + n_sealed + n_columns);
            self.positions.truncate(n_slots);
        }
    }

    /// Forgets the tokens at positions from `len` on and gives back the pages behind the last that stays. A
    /// slot between others stays where it is, without a token, and so do those behind it in a sealed page.
    pub(crate) fn forget(&mut self, len: usize, layout: &PageLayout, pool: &mut Pool) {
        for position in &mut self.positions {
            if *position as usize >= len {
                *position = GIVEN_UP;
            }
        }
        let Some(last) = self.positions.iter().rposition(|&position| position != GIVEN_UP) else {
            return self.truncate(0, layout, pool);
        };
        let of_segment = self.layout(layout);
        let (page_idx, _) = of_segment.place(last);
        let n_slots = match layout.kv.are_sealed() && of_segment.part(page_idx) == Part::Body {
            true => of_segment.n_slots(page_idx + 1),
            false => last + 1,
        };
        self.truncate(n_slots, layout, pool);
    }

    /// Takes out the pages, from the second on, that hold no position from `first_seen` on.
    pub(crate) fn roll(&mut self, first_seen: u32, layout: &PageLayout) -> Vec<Gone> {
        let second = layout.n_slots(1)..layout.n_slots(2);
        let mut gone = Vec::new();
        while self
            .positions
            .get(second.clone())
            .is_some_and(|page| page.iter().all(|&p| p < first_seen))
        {
            self.n_gone += second.len();
            let column = self.page_table.drain(self.n_layers..2 * self.n_layers).collect();
            gone.push(Gone { positions: self.positions.drain(second.clone()).collect(), column });
        }
        gone
    }

    /// Puts back what [`roll`](Self::roll) took out, in its order.
    pub(crate) fn roll_back(&mut self, gone: Vec<Gone>, layout: &PageLayout) {
        for page in gone.into_iter().rev() {
            let first = layout.n_slots(1);
            self.n_gone -= page.positions.len();
            self.positions.splice(first..first, page.positions);
            self.page_table.splice(self.n_layers..self.n_layers, page.column);
        }
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
        let table = &mut self.page_table[entries];
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
        #[allow(clippy::cast_possible_truncation)] // bounded by the context length
        self.positions.iter_mut().zip(0..).for_each(|(position, slot)| *position = slot);
    }

    /// Gives up the slots from `n_slots` on, all those of a sealed page or none, and the pages that only they needed.
    pub(crate) fn truncate(&mut self, n_slots: usize, layout: &PageLayout, pool: &mut Pool) {
        if n_slots >= self.len() {
            return;
        }
        self.positions.truncate(n_slots);
        let n_columns = self.layout(layout).n_pages(n_slots);
        let n_kept = n_columns * self.n_layers;
        pool.release(&self.page_table[n_kept..], self.n_layers);
        self.page_table.truncate(n_kept);
        self.n_sealed = self.n_sealed.min(n_columns.saturating_sub(1));
    }

    /// Entries of the partly filled last column, if there is one.
    fn tail(&self, layout: &PageLayout) -> Option<Range<usize>> {
        let end = self.page_table.len();
        let is_partial = layout.n_slots(layout.n_pages(self.len())) > self.len();
        is_partial.then(|| end - self.n_layers..end)
    }

    fn tail_is_shared(&self, layout: &PageLayout, pool: &Pool) -> bool {
        self.tail(layout).is_some_and(|tail| pool.pages.is_shared(self.page_table[tail.start]))
    }
}

impl Unsealed {
    /// Its pages, to be released.
    pub(crate) fn columns(&self) -> &[PageId] {
        &self.0
    }

    /// Those that were sealed later join it.
    pub(crate) fn extend(&mut self, later: Self) {
        self.0.extend(later.0);
    }
}

impl Gone {
    /// Its pages, to be released.
    pub(crate) fn column(&self) -> &[PageId] {
        &self.column
    }
}

impl Growth {
    /// The step was done: the segment takes the new table, and copied pages lose a holder. What was sealed does too, but for
    /// the first `n_kept` columns.
    pub(crate) fn commit(self, segment: &mut Segment, n_kept: usize, pool: &mut Pool) -> Unsealed {
        if let Some(last) = self.parts.into_iter().next_back() {
            (segment.page_table, segment.n_sealed) = (last.page_table, last.n_sealed);
        }
        let copied: Vec<PageId> = self.copies.iter().map(|&(from, _)| from).collect();
        pool.release(&copied, segment.n_layers);
        let mut kept = self.unsealed;
        let released = kept.split_off(kept.len().min(n_kept * segment.n_layers));
        pool.release(&released, segment.n_layers);
        Unsealed(kept)
    }

    /// The step failed: the segment is as it was before [`Segment::grow`].
    pub(crate) fn undo(self, segment: &mut Segment, n_new: usize, pool: &mut Pool) {
        segment.positions.truncate(segment.len() - n_new);
        pool.release(&self.taken, segment.n_layers);
    }
}
