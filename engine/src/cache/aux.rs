//! The aux cache: hidden states of tokens between two segments of the layers.
//!
//! A token that has gone through some segments and not through all has one hidden state, in one of two
//! stores of the device. Tokens that a call is moving through the layers are in [`Store::Transit`], in f32 like
//! the residual stream, so that cutting the layers into segments changes no bit. Those that stay behind at a prune point are
//! parked in [`Store::Waiting`], in the precision of the KV cache, until they are wanted; between calls
//! a session has nothing in transit.
//!
//! Rows come in pages of a pool, as KV does. A page fills up from its first free row, pages in order; it
//! goes back when its last row is free, and a page that a fork holds too is not written to.

use std::collections::BTreeMap;

use super::pages::{PageId, PagePool};
use crate::error::Error;

/// Where a hidden state is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Store {
    /// On its way through the layers: f32.
    Transit,
    /// Left behind at a prune point: the KV cache's format.
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
    fn of(&mut self, store: Store) -> &mut PagePool {
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

/// A session's part of the aux cache.
#[derive(Debug, Default)]
pub struct Aux {
    /// Where the hidden state of the token at each position is.
    row_of: BTreeMap<u32, AuxRow>,
    transit: Rows,
    waiting: Rows,
}

impl Aux {
    /// Tokens between two segments.
    pub fn len(&self) -> usize {
        self.row_of.len()
    }

    /// True if there are none.
    pub fn is_empty(&self) -> bool {
        self.row_of.is_empty()
    }

    /// Pages held of a store.
    pub fn n_pages(&self, store: Store) -> usize {
        match store {
            Store::Transit => self.transit.0.len(),
            Store::Waiting => self.waiting.0.len(),
        }
    }

    /// Where a token's hidden state is.
    pub fn row_of(&self, position: u32) -> Option<AuxRow> {
        self.row_of.get(&position).copied()
    }

    /// Tokens between two segments, ascending, and where they are.
    pub fn rows(&self) -> impl Iterator<Item = (u32, AuxRow)> + '_ {
        self.row_of.iter().map(|(&position, &row)| (position, row))
    }

    fn of(&mut self, store: Store) -> &mut Rows {
        match store {
            Store::Transit => &mut self.transit,
            Store::Waiting => &mut self.waiting,
        }
    }

    /// Takes `n` rows of a store, all or none.
    pub fn take(
        &mut self,
        store: Store,
        n: usize,
        pool: &mut AuxPool,
    ) -> Result<Vec<AuxRow>, Error> {
        let page_len = pool.page_len;
        let rows = self.of(store).take(n, page_len, pool.of(store))?;
        Ok(rows.into_iter().map(|row| AuxRow { store, row }).collect())
    }

    /// Gives back rows that were taken.
    pub fn give(&mut self, rows: &[AuxRow], pool: &mut AuxPool) {
        let page_len = pool.page_len;
        for &AuxRow { store, row } in rows {
            self.of(store).give(row, page_len, pool.of(store));
        }
    }

    /// The pages in transit that hold the tokens from 0 on, a page for each `page_len` of them in order; ends where
    /// that is not so.
    pub fn whole_pages(&self, n_tokens: usize, page_len: usize) -> Vec<PageId> {
        let page_of = |first: u32| {
            let page = self.row_of.get(&first)?.row / small(page_len);
            let in_order = (0..small(page_len)).all(|i| {
                let row = page * small(page_len) + i;
                self.row_of.get(&(first + i)) == Some(&AuxRow { store: Store::Transit, row })
            });
            in_order.then_some(page)
        };
        (0..n_tokens / page_len).map_while(|idx| page_of((idx * page_len) as u32)).collect()
    }

    /// Takes over pages in transit that hold the tokens from `first` on.
    pub fn adopt(&mut self, pages: &[PageId], first: u32, page_len: usize) {
        for (position, &page) in (first..).step_by(page_len).zip(pages) {
            let mut taken = Taken::default();
            for i in 0..small(page_len) {
                taken.set(i as usize, true);
                let row = page * small(page_len) + i;
                self.row_of.insert(position + i, AuxRow { store: Store::Transit, row });
            }
            self.transit.0.insert(page, taken);
        }
    }

    /// From here on the token's hidden state is in `row`, which was taken; gives the row it was in before.
    pub fn put(&mut self, position: u32, row: AuxRow) -> Option<AuxRow> {
        self.row_of.insert(position, row)
    }

    /// The token is not between segments any more; gives its row, which is still taken.
    pub fn remove(&mut self, position: u32) -> Option<AuxRow> {
        self.row_of.remove(&position)
    }

    /// Forgets positions from `len` on.
    pub fn truncate(&mut self, len: usize, pool: &mut AuxPool) {
        while let Some((position, row)) = self.row_of.pop_last() {
            if (position as usize) < len {
                self.row_of.insert(position, row);
                return;
            }
            self.give(&[row], pool);
        }
    }

    /// A second session with the same hidden states. The caller has asked for the room.
    pub fn fork(&self, pool: &mut AuxPool) -> Self {
        Self {
            row_of: self.row_of.clone(),
            transit: self.transit.fork(&mut pool.transit),
            waiting: self.waiting.fork(&mut pool.waiting),
        }
    }

    /// Gives everything back.
    pub fn clear(&mut self, pool: &mut AuxPool) {
        self.row_of.clear();
        self.transit.clear(&mut pool.transit);
        self.waiting.clear(&mut pool.waiting);
    }
}

#[allow(clippy::cast_possible_truncation)] // page lengths are at most 256
fn small(page_len: usize) -> u32 {
    page_len as u32
}

/// A session's pages of one store, and which rows of each are taken.
#[derive(Clone, Debug, Default)]
struct Rows(BTreeMap<PageId, Taken>);

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
    fn take(&mut self, n: usize, page_len: usize, pool: &mut PagePool) -> Result<Vec<u32>, Error> {
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

    fn give(&mut self, row: u32, page_len: usize, pool: &mut PagePool) {
        let page = row / page_len as u32;
        let Some(taken) = self.0.get_mut(&page) else { return };
        taken.set(row as usize % page_len, false);
        if taken.len() == 0 {
            self.0.remove(&page);
            pool.release(&[page]);
        }
    }

    fn fork(&self, pool: &mut PagePool) -> Self {
        for &page in self.0.keys() {
            pool.share(&[page]);
        }
        self.clone()
    }

    fn clear(&mut self, pool: &mut PagePool) {
        for page in std::mem::take(&mut self.0).into_keys() {
            pool.release(&[page]);
        }
    }
}
