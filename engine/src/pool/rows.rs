//! Rows of hidden states, in pages as KV has them.
//!
//! A page fills up from its first free row, pages in order; it goes back when its last row is free, and a page that a fork
//! holds too is not written to.

use std::collections::BTreeMap;

use super::PagePool;
use crate::error::Error;
use crate::store::PageId;

/// Where a hidden state is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Store {
    /// On its way through the layers: f32.
    Transit,
    /// Waiting at a prune point: the KV cache's format.
    Waiting,
}

/// A row of one of the device's stores of hidden states.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AuxRow {
    /// Which store.
    pub store: Store,
    /// Index of the row.
    pub row: u32,
}

/// Pages of hidden states of all sessions of a model.
#[derive(Debug)]
pub struct AuxPool {
    /// Free list and holders of the rows in transit.
    pub transit: PagePool,
    /// The same of those that wait.
    pub waiting: PagePool,
    /// Rows a page holds, in both.
    pub page_len: usize,
}

impl AuxPool {
    /// Free pages of `page_len` rows each.
    pub fn new(n_transit: usize, n_waiting: usize, page_len: usize) -> Result<Self, Error> {
        let (transit, waiting) = (PagePool::new(n_transit)?, PagePool::new(n_waiting)?);
        Ok(Self { transit, waiting, page_len })
    }

    /// The pool of a store.
    pub fn of(&mut self, store: Store) -> &mut PagePool {
        match store {
            Store::Transit => &mut self.transit,
            Store::Waiting => &mut self.waiting,
        }
    }

    /// Pages of both that somebody holds.
    pub fn n_used(&self) -> usize {
        self.transit.n_used() + self.waiting.n_used()
    }
}

/// A session's pages of one store, and which rows of each are taken.
#[derive(Clone, Debug, Default)]
pub struct Rows(BTreeMap<PageId, Taken>);

/// A bit for each row of a page: pages hold at most 256.
#[derive(Clone, Copy, Debug, Default)]
struct Taken([u64; 4]);

impl Taken {
    fn len(&self) -> usize {
        self.0.iter().map(|word| word.count_ones() as usize).sum()
    }

    fn first_free(&self) -> usize {
        let word = self.0.iter().position(|&word| word != u64::MAX).unwrap_or(self.0.len() - 1);
        64 * word + self.0[word].trailing_ones() as usize
    }

    fn set(&mut self, row: usize, is_taken: bool) {
        let bit = 1 << (row % 64);
        match is_taken {
            true => self.0[row / 64] |= bit,
            false => self.0[row / 64] &= !bit,
        }
    }
}

#[allow(clippy::cast_possible_truncation)] // the plan sees to it that rows are counted in u32
impl Rows {
    /// Pages held.
    pub fn n_pages(&self) -> usize {
        self.0.len()
    }

    /// Takes `n` rows, all or none.
    pub fn take(
        &mut self,
        n: usize,
        page_len: usize,
        pool: &mut PagePool,
    ) -> Result<Vec<u32>, Error> {
        // What a fork may read must not change.
        let is_open = |page: PageId, taken: &Taken, pool: &PagePool| {
            taken.len() < page_len && !pool.is_shared(page)
        };
        let open = self.0.iter().filter(|&(&page, taken)| is_open(page, taken, pool));
        let n_free: usize = open.map(|(_, taken)| page_len - taken.len()).sum();
        let fresh =
            pool.take(n.saturating_sub(n_free).div_ceil(page_len)).map_err(|e| match e {
                Error::KvFull { needed, free } => Error::AuxFull { needed, free },
                e => e,
            })?;
        self.0.extend(fresh.into_iter().map(|page| (page, Taken::default())));
        let mut rows = Vec::with_capacity(n);
        for (&page, taken) in &mut self.0 {
            if rows.len() < n && is_open(page, taken, pool) {
                for _ in taken.len()..page_len.min(taken.len() + n - rows.len()) {
                    let row = taken.first_free();
                    taken.set(row, true);
                    rows.push(page * page_len as u32 + row as u32);
                }
            }
        }
        Ok(rows)
    }

    /// Takes over a page that is held for the session already, all its rows.
    pub fn adopt(&mut self, page: PageId, page_len: usize) {
        let mut taken = Taken::default();
        (0..page_len).for_each(|row| taken.set(row, true));
        self.0.insert(page, taken);
    }

    /// Gives back a row that was taken; its page with the last.
    pub fn give(&mut self, row: u32, page_len: usize, pool: &mut PagePool) {
        let page = row / page_len as u32;
        let Some(taken) = self.0.get_mut(&page) else { return };
        taken.set(row as usize % page_len, false);
        if taken.len() == 0 {
            self.0.remove(&page);
            pool.release(&[page]);
        }
    }

    /// The same rows once more: a holder more for each page.
    pub fn fork(&self, pool: &mut PagePool) -> Self {
        for &page in self.0.keys() {
            pool.share(&[page]);
        }
        self.clone()
    }

    /// Gives everything back.
    pub fn clear(&mut self, pool: &mut PagePool) {
        for page in std::mem::take(&mut self.0).into_keys() {
            pool.release(&[page]);
        }
    }
}
