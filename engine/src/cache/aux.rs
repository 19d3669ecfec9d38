//! The aux cache: hidden states of tokens that wait at a prune point.
//!
//! A token that has gone through some segments of the layers and not through all waits with one hidden
//! state, whichever point it waits at. So a session has one table for all points: token to row of the
//! device's store. Rows come in pages of the pool, as KV does; a page goes back when its last row is
//! free, and a page that a fork holds too is not written to.

use std::collections::BTreeMap;

use super::pages::{PageId, PagePool};
use crate::error::Error;

/// A row of the device's store of hidden states.
pub type AuxRow = u32;

/// Pages of hidden states of all sessions of a model.
#[derive(Debug)]
pub struct AuxPool {
    /// Free list and holders.
    pub pages: PagePool,
    /// Rows a page holds.
    pub page_len: usize,
}

/// A session's part of the aux cache.
#[derive(Debug, Default)]
pub struct Aux {
    /// Where the token of each position waits.
    row_of: BTreeMap<u32, AuxRow>,
    /// The session's pages, with the rows of each that are taken.
    n_taken: BTreeMap<PageId, usize>,
    /// Rows of those pages that are free.
    free: Vec<AuxRow>,
}

impl Aux {
    /// Tokens that wait.
    pub fn len(&self) -> usize {
        self.row_of.len()
    }

    /// True if no token waits.
    pub fn is_empty(&self) -> bool {
        self.row_of.is_empty()
    }

    /// Pages held.
    pub fn n_pages(&self) -> usize {
        self.n_taken.len()
    }

    /// The row in which a token waits.
    pub fn row_of(&self, position: u32) -> Option<AuxRow> {
        self.row_of.get(&position).copied()
    }

    /// Takes `n` rows, all or none.
    pub fn take(&mut self, n: usize, pool: &mut AuxPool) -> Result<Vec<AuxRow>, Error> {
        let page_len = pool.page_len;
        let page_of = |row: AuxRow| row / small(page_len);
        // What a fork may read must not change; such rows are given up until their page goes.
        self.free.retain(|&row| !pool.pages.is_shared(page_of(row)));
        let n_missing = n.saturating_sub(self.free.len());
        let fresh = pool.pages.take(n_missing.div_ceil(page_len)).map_err(|e| match e {
            Error::KvFull { needed, free } => Error::AuxFull { needed, free },
            e => e,
        })?;
        for page in fresh {
            self.n_taken.insert(page, 0);
            let first = page * small(page_len);
            self.free.extend((first..first + small(page_len)).rev());
        }
        let rows = self.free.split_off(self.free.len() - n);
        for &row in &rows {
            *self.n_taken.entry(page_of(row)).or_default() += 1;
        }
        Ok(rows)
    }

    /// Gives back rows that were taken.
    pub fn give(&mut self, rows: &[AuxRow], pool: &mut AuxPool) {
        for &row in rows {
            let page = row / small(pool.page_len);
            let Some(n_taken) = self.n_taken.get_mut(&page) else { continue };
            *n_taken -= 1;
            self.free.push(row);
            if *n_taken == 0 {
                self.n_taken.remove(&page);
                self.free.retain(|row| row / small(pool.page_len) != page);
                pool.pages.release(&[page]);
            }
        }
    }

    /// From here on the token waits in `row`, which was taken; gives the row it waited in before.
    pub fn put(&mut self, position: u32, row: AuxRow) -> Option<AuxRow> {
        self.row_of.insert(position, row)
    }

    /// The token does not wait any more; gives its row, which is still taken.
    pub fn remove(&mut self, position: u32) -> Option<AuxRow> {
        self.row_of.remove(&position)
    }

    /// Positions from `len` on do not wait any more.
    pub fn truncate(&mut self, len: usize, pool: &mut AuxPool) {
        let cut = self.row_of.split_off(&u32::try_from(len).unwrap_or(u32::MAX));
        let rows: Vec<AuxRow> = cut.into_values().collect();
        self.give(&rows, pool);
    }

    /// A second session with the same hidden states.
    pub fn fork(&self, pool: &mut AuxPool) -> Self {
        let pages: Vec<PageId> = self.n_taken.keys().copied().collect();
        pool.pages.share(&pages);
        Self { row_of: self.row_of.clone(), n_taken: self.n_taken.clone(), free: Vec::new() }
    }

    /// Gives everything back.
    pub fn clear(&mut self, pool: &mut AuxPool) {
        let pages: Vec<PageId> = std::mem::take(&mut self.n_taken).into_keys().collect();
        pool.pages.release(&pages);
        (self.row_of, self.free) = Default::default();
    }
}

#[allow(clippy::cast_possible_truncation)] // page lengths are at most 256
fn small(page_len: usize) -> u32 {
    page_len as u32
}
