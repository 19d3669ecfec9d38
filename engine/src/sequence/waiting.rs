//! Hidden states of tokens between two segments of the layers, and how deep each token is.
//!
//! A token that has gone through some segments and not through all has one hidden state, in one of two
//! stores of the device. Tokens that a call is moving through the layers are in [`Store::Transit`], in f32 like
//! the residual stream, so that cutting the layers into segments changes no bit. Those that stay behind at a prune point are
//! waiting in [`Store::Waiting`], in the precision of the KV cache, until they are wanted; between calls
//! a session has nothing in transit.

use std::collections::BTreeMap;

use crate::error::Error;
use crate::memory;
use crate::pool::{AuxPool, AuxRow, Rows, Store};
use crate::store::PageId;

/// Memory that the place of a hidden state takes at most, in trees whose nodes may be half empty and in a page
/// that no other row is in.
const ROW_BYTES: usize = 256;

/// The tokens of a sequence that are between two segments.
#[derive(Debug, Default)]
pub(crate) struct Waiting {
    /// Segments that the token at each position has gone through; nothing where there is only one.
    pub(crate) depths: Vec<u8>,
    /// Where the hidden state of the token at each position is.
    row_of: BTreeMap<u32, AuxRow>,
    transit: Rows,
    waiting: Rows,
}

impl Waiting {
    /// Segments that a token has gone through.
    pub(crate) fn depth(&self, position: u32) -> usize {
        self.depths.get(position as usize).map_or(0, |&depth| depth.into())
    }

    /// Tokens between two segments.
    pub(crate) fn len(&self) -> usize {
        self.row_of.len()
    }

    /// Pages held of a store.
    pub(crate) fn n_pages(&self, store: Store) -> usize {
        match store {
            Store::Transit => self.transit.n_pages(),
            Store::Waiting => self.waiting.n_pages(),
        }
    }

    /// Tokens between two segments, ascending, and where they are.
    pub(crate) fn rows(&self) -> impl Iterator<Item = (u32, AuxRow)> + '_ {
        self.row_of.iter().map(|(&position, &row)| (position, row))
    }

    fn of(&mut self, store: Store) -> &mut Rows {
        match store {
            Store::Transit => &mut self.transit,
            Store::Waiting => &mut self.waiting,
        }
    }

    /// Takes `n` rows of a store, all or none.
    pub(crate) fn take(
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
    pub(crate) fn give(&mut self, rows: &[AuxRow], pool: &mut AuxPool) {
        let page_len = pool.page_len;
        for &AuxRow { store, row } in rows {
            self.of(store).give(row, page_len, pool.of(store));
        }
    }

    /// The pages in transit that hold the tokens from 0 on, a page for each `page_len` of them in order; ends where
    /// that is not so.
    pub(crate) fn whole_pages(&self, n_tokens: usize, page_len: usize) -> Vec<PageId> {
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
    pub(crate) fn adopt(&mut self, pages: &[PageId], first: u32, page_len: usize) {
        for (position, &page) in (first..).step_by(page_len).zip(pages) {
            for i in 0..small(page_len) {
                let row = page * small(page_len) + i;
                self.row_of.insert(position + i, AuxRow { store: Store::Transit, row });
            }
            self.transit.adopt(page, page_len);
        }
    }

    /// From here on the token's hidden state is in `row`, which was taken; gives the row it was in before.
    pub(crate) fn put(&mut self, position: u32, row: AuxRow) -> Option<AuxRow> {
        self.row_of.insert(position, row)
    }

    /// The token is not between segments any more; gives its row, which is still taken.
    pub(crate) fn remove(&mut self, position: u32) -> Option<AuxRow> {
        self.row_of.remove(&position)
    }

    /// Cuts off positions from `len` on.
    pub(crate) fn truncate(&mut self, len: usize, pool: &mut AuxPool) {
        self.depths.truncate(len);
        while let Some((position, row)) = self.row_of.pop_last() {
            if (position as usize) < len {
                self.row_of.insert(position, row);
                return;
            }
            self.give(&[row], pool);
        }
    }

    /// Memory for [`fork`](Self::fork), and what it copies first.
    pub(crate) fn room_for_fork(&self) -> Result<Vec<u8>, Error> {
        memory::room_for(self.row_of.len() * ROW_BYTES, "a fork's hidden states")?;
        memory::copy(&self.depths, "a fork's tokens")
    }

    /// A second sequence with the same hidden states, and with `depths`, which [`room_for_fork`](Self::room_for_fork) gave.
    pub(crate) fn fork(&self, depths: Vec<u8>, pool: &mut AuxPool) -> Self {
        Self {
            depths,
            row_of: self.row_of.clone(),
            transit: self.transit.fork(&mut pool.transit),
            waiting: self.waiting.fork(&mut pool.waiting),
        }
    }

    /// Gives everything back.
    pub(crate) fn clear(&mut self, pool: &mut AuxPool) {
        self.row_of.clear();
        self.transit.clear(&mut pool.transit);
        self.waiting.clear(&mut pool.waiting);
    }
}

#[allow(clippy::cast_possible_truncation)] // page lengths are at most 256
fn small(page_len: usize) -> u32 {
    page_len as u32
}
