//! The slots of a table by their positions, and the bounds of its tiles.

use std::ops::Range;

use crate::error::Error;
use crate::memory;
use crate::store::PageLayout;

/// Slots of a tile.
pub const TILE: usize = 64;

/// Slots of some layers. They have numbers, by which attention counts its tiles and splits: from
/// [`Sides::skew`](crate::store::Sides::skew) on, so that those of a strip are in one page; those that were given back count as
/// if they were still there, so that the bits do not depend on when they went.
#[derive(Clone, Debug)]
pub struct Slots {
    positions: Vec<u32>,
    /// Least and greatest position in each tile that has slots.
    bounds: Vec<[u32; 2]>,
    /// So many at the front hold the position that is their number from 0 on.
    n_dense: usize,
    /// The number of the first.
    skew: usize,
    n_pinned: usize,
    n_gone: usize,
}

impl Slots {
    /// Slots for these positions, `n_gone` of them given back.
    pub fn new(layout: &PageLayout, n_gone: usize, positions: Vec<u32>) -> Self {
        let (skew, n_pinned) = (layout.kv.skew(), layout.first_len());
        let mut slots = Self { positions, bounds: Vec::new(), n_dense: 0, skew, n_pinned, n_gone };
        slots.edit(0, |_, _| ());
        slots
    }

    /// The same once more.
    pub(crate) fn copy(&self) -> Result<Self, Error> {
        let positions = memory::copy(&self.positions, "a fork's slots")?;
        let bounds = memory::copy(&self.bounds, "a fork's slots")?;
        Ok(Self { positions, bounds, ..*self })
    }

    /// Position of each.
    pub fn positions(&self) -> &[u32] {
        &self.positions
    }

    /// Slots of the first page, which stay.
    pub fn n_pinned(&self) -> usize {
        self.n_pinned
    }

    /// Slots behind them that were given back.
    pub fn n_gone(&self) -> usize {
        self.n_gone
    }

    /// True if the first `n` hold the positions that are their numbers, counted from 0.
    pub fn are_dense(&self, n: usize) -> bool {
        n <= self.n_dense
    }

    /// Least and greatest position in the tile of a slot.
    #[inline]
    pub fn bounds(&self, slot: usize) -> [u32; 2] {
        self.bounds[self.tile(slot)]
    }

    /// Slots whose numbers divided by `len` are the same, one lot after another: its tiles, for example.
    #[inline]
    pub fn lots(&self, slots: Range<usize>, len: usize) -> impl Iterator<Item = Range<usize>> + '_ {
        let Range { mut start, end } = slots;
        std::iter::from_fn(move || {
            let lot = start..self.at((self.number(start) / len + 1) * len).min(end);
            start = lot.end;
            (!lot.is_empty()).then_some(lot)
        })
    }

    /// Changes positions of slots from `first` on, and how many were given back.
    pub(crate) fn edit<T>(
        &mut self,
        first: usize,
        edit: impl FnOnce(&mut Vec<u32>, &mut usize) -> T,
    ) -> T {
        let n_gone = self.n_gone;
        let edited = edit(&mut self.positions, &mut self.n_gone);
        // Pinned slots may have had others in their last tile.
        let last_pinned = self.n_pinned - 1;
        let first = if n_gone == self.n_gone { first } else { first.min(last_pinned) };
        self.bounds.truncate(self.tile(first));
        let slots = self.at(self.number(first) / TILE * TILE)..self.positions.len();
        let bounds_of = |tile: Range<usize>| {
            let positions = self.positions[tile].iter();
            positions.fold([u32::MAX, 0], |[min, max], &p| [min.min(p), max.max(p)])
        };
        let bounds: Vec<[u32; 2]> = self.lots(slots, TILE).map(bounds_of).collect();
        self.bounds.extend(bounds);
        self.n_dense = self.n_dense.min(first);
        let rest = self.positions.iter().enumerate().skip(self.n_dense);
        self.n_dense +=
            rest.take_while(|&(slot, &p)| p as usize + self.skew == self.number(slot)).count();
        edited
    }

    /// The number of a slot.
    #[inline]
    fn number(&self, slot: usize) -> usize {
        self.skew + if slot < self.n_pinned { slot } else { slot + self.n_gone }
    }

    /// The slot with a number, or the next behind those that were given back.
    #[inline]
    fn at(&self, number: usize) -> usize {
        let idx = number.saturating_sub(self.skew);
        match idx < self.n_pinned {
            true => idx,
            false => self.n_pinned.max(idx.saturating_sub(self.n_gone)),
        }
    }

    /// Which of the tiles that have slots a slot is in.
    #[inline]
    fn tile(&self, slot: usize) -> usize {
        let tile_of = |slot| self.number(slot) / TILE;
        match slot < self.n_pinned {
            true => tile_of(slot),
            false => {
                let n_empty = tile_of(self.n_pinned).saturating_sub(tile_of(self.n_pinned - 1) + 1);
                tile_of(slot) - n_empty
            }
        }
    }
}
