//! What all sessions of a model draw from: pages and their holders, and which of them others may share.

mod pages;
mod prefix;
mod rows;

pub use pages::PagePool;
pub use prefix::{ChainKey, Filled, Found, PrefixIndex, ROOT};
pub use rows::{AuxPool, AuxRow, Rows, Store};

use crate::error::Error;
use crate::store::PageId;

/// The pages of all sessions of a model, and the prefixes that can be shared.
#[derive(Debug)]
pub struct Pool {
    /// Free list and holders.
    pub pages: PagePool,
    /// Full pages by the tokens that lead to them.
    pub prefixes: PrefixIndex,
    /// Hidden states between segments.
    pub aux: AuxPool,
}

impl Pool {
    /// `n_pages` free pages, and those of hidden states.
    pub fn new(n_pages: usize, aux: AuxPool) -> Result<Self, Error> {
        Ok(Self { pages: PagePool::new(n_pages)?, prefixes: PrefixIndex::default(), aux })
    }

    /// Takes a holder off each page of a table of `n_layers` pages a column.
    pub fn release(&mut self, table: &[PageId], n_layers: usize) {
        for column in table.chunks(n_layers) {
            if self.pages.release(column) > 0 {
                self.forget_prefix(column[0]);
            }
        }
    }

    /// The column that starts with `page` is not to be shared any more.
    pub fn forget_prefix(&mut self, page: PageId) {
        if let Some(hidden) = self.prefixes.forget(page) {
            self.aux.transit.release(&[hidden]);
        }
    }

    /// Frees hidden states that are kept for sessions to come; true if that freed a page.
    pub fn free_hidden(&mut self) -> bool {
        let pages = self.prefixes.forget_hidden();
        self.aux.transit.release(&pages) > 0
    }
}
