//! Page accounting: which pages are free, and how many holders each of the others has.
//!
//! The pool hands out page ids; the bytes live with the backend. A page with more than one holder is
//! shared and must be copied before it is written (copy on write).

use crate::error::Error;
use crate::memory;
use crate::store::PageId;

/// Free list and reference counts of a fixed number of pages.
#[derive(Debug)]
pub struct PagePool {
    /// Holders of each page; 0 = free.
    holders: Vec<u32>,
    /// Pages never handed out start here, so that memory is touched in order.
    fresh: PageId,
    /// Pages handed out before and free again.
    freed: Vec<PageId>,
    n_used: usize,
    peak: usize,
}

impl PagePool {
    /// A pool of `n_pages` free pages.
    pub fn new(n_pages: usize) -> Result<Self, Error> {
        let holders = memory::zeros(n_pages, "the KV page table")?;
        let freed = memory::empty(n_pages, "the KV page table")?; // giving back must not need memory
        Ok(Self { holders, fresh: 0, freed, n_used: 0, peak: 0 })
    }

    /// Pages in the pool.
    pub fn n_pages(&self) -> usize {
        self.holders.len()
    }

    /// Pages nobody holds.
    pub fn n_free(&self) -> usize {
        self.holders.len() - self.n_used
    }

    /// Pages somebody holds.
    pub fn n_used(&self) -> usize {
        self.n_used
    }

    /// The most pages that were in use at once.
    pub fn peak(&self) -> usize {
        self.peak
    }

    /// Takes `n` pages with one holder each: all of them, or none and an error.
    pub fn take(&mut self, n: usize) -> Result<Vec<PageId>, Error> {
        if n > self.n_free() {
            return Err(Error::KvFull { needed: n, free: self.n_free() });
        }
        let mut pages = Vec::with_capacity(n);
        for _ in 0..n {
            let page = self.freed.pop().unwrap_or_else(|| {
                self.fresh += 1;
                self.fresh - 1
            });
            self.holders[page as usize] = 1;
            pages.push(page);
        }
        self.n_used += n;
        self.peak = self.peak.max(self.n_used);
        Ok(pages)
    }

    /// Adds a holder to each page.
    pub fn share(&mut self, pages: &[PageId]) {
        for &page in pages {
            debug_assert!(self.holders[page as usize] > 0, "page {page} is free");
            self.holders[page as usize] += 1;
        }
    }

    /// True if more than one holder has the page.
    pub fn is_shared(&self, page: PageId) -> bool {
        self.holders[page as usize] > 1
    }

    /// Takes a holder off each page; returns how many became free.
    pub fn release(&mut self, pages: &[PageId]) -> usize {
        let mut n_freed = 0;
        for &page in pages {
            let holders = &mut self.holders[page as usize];
            debug_assert!(*holders > 0, "page {page} is released twice");
            *holders -= 1;
            if *holders == 0 {
                self.freed.push(page);
                n_freed += 1;
            }
        }
        self.n_used -= n_freed;
        n_freed
    }
}
