//! KV pages of the CPU backend: one lazily committed run of memory.

use super::super::mem::{Buf, Shared};
use super::family::Family;
use super::with_family;
use crate::backend::{Batch, Table};
use crate::error::Error;
use crate::store::{Coding, PageForm, PageId, PageLayout, Part, Run, Side, Sides};

/// What the pages of each [`Part`] of a table look like.
type Forms = [PageForm; 3];

/// Storage of a pool of pages.
#[derive(Debug)]
pub struct CpuPages {
    pub(in super::super) layout: PageLayout,
    forms: Forms,
    pub(in super::super) bytes: Buf<u8>,
}

impl CpuPages {
    pub(in super::super) fn new(layout: PageLayout, n_pages: usize) -> Result<Self, Error> {
        let n_bytes = layout.bytes().saturating_mul(n_pages);
        let forms = [Part::First, Part::Body, Part::Tail].map(|part| layout.form_of(part));
        Ok(Self { layout, forms, bytes: Buf::zeroed(n_bytes, "the KV page pool")? })
    }

    /// The bytes of a page.
    pub(in super::super) fn page(&self, page: PageId) -> &[u8] {
        let size = self.layout.bytes();
        &self.bytes[page as usize * size..][..size]
    }

    /// The bytes of a page, to write.
    pub(in super::super) fn page_mut(&mut self, page: PageId) -> &mut [u8] {
        let size = self.layout.bytes();
        &mut self.bytes[page as usize * size..][..size]
    }

    pub(in super::super) fn copy(&mut self, from: PageId, to: PageId) {
        let size = self.layout.bytes();
        let from = from as usize * size;
        assert!(to as usize * size + size <= self.bytes.len(), "page {to} is out of range");
        self.bytes.copy_within(from..from + size, to as usize * size);
    }

    /// For kernels that write.
    pub(in super::super) fn writer(&mut self) -> Writer<'_> {
        let PageLayout { kv, .. } = self.layout;
        let (forms, page_bytes) = (self.forms, self.layout.bytes());
        Writer { base: Shared::new(&mut self.bytes), kv, forms, page_bytes }
    }

    /// What the pages of a part look like.
    #[inline(always)]
    pub(in super::super) fn form(&self, part: Part) -> &PageForm {
        &self.forms[part as usize]
    }
}

impl CpuPages {
    /// Moves what slot `keep[i]` of a layer holds to slot `i`; `keep` rises, so that no slot is read after it was
    /// written.
    pub(in super::super) fn keep_slots(&mut self, table: Table<'_>, layer: usize, keep: &[u32]) {
        for (to, &from) in keep.iter().enumerate().filter(|&(to, &from)| to != from as usize) {
            let (from, to) = (self.layout.place(from as usize), self.layout.place(to));
            let form = *self.form(self.layout.part(from.0));
            assert!(form == self.layout.form(to.0), "slots of pages that look alike");
            let pages = (table.page(from.0, layer), table.page(to.0, layer));
            for (side, head) in [Side::K, Side::V]
                .into_iter()
                .flat_map(|s| (0..form.n_kv_heads).map(move |h| (s, h)))
            {
                let coding = form.coding(side);
                let (codes, params) =
                    (coding.code_bytes(form.head_dim), coding.param_bytes(form.head_dim));
                let at = |slot| (form.codes(side, head, slot), form.params(side, head, slot));
                let (from, to) = (at(from.1), at(to.1));
                self.move_bytes(pages, (from.0, to.0), codes);
                self.move_bytes(pages, (from.1, to.1), params);
            }
        }
    }

    /// Copies `n` bytes from one page to another, or inside one.
    fn move_bytes(&mut self, pages: (PageId, PageId), at: (usize, usize), n: usize) {
        let size = self.layout.bytes();
        let first = |page: PageId, at: usize| page as usize * size + at;
        let (from, to) = (first(pages.0, at.0), first(pages.1, at.1));
        self.bytes.copy_within(from..from + n, to);
    }
}

/// Where a new row goes.
#[derive(Clone, Copy, Debug)]
pub(in super::super) struct Place {
    page: PageId,
    part: Part,
    slot: usize,
}

/// The place of every row of a batch in a layer; panics on a page outside the pool.
pub(in super::super) fn places(
    batch: &Batch<'_>,
    layer: usize,
    pages: &CpuPages,
    out: &mut Vec<Place>,
) {
    let n_pages = pages.bytes.len() / pages.layout.bytes().max(1);
    out.clear();
    for seq in &batch.seqs {
        let layout = pages.layout.with_sealed(seq.n_sealed);
        for Run { page_idx, part, first, slots } in layout.runs(seq.kv_start..seq.kv_len()) {
            let page = seq.page(page_idx, layer);
            assert!((page as usize) < n_pages, "page {page} is out of range");
            out.extend((first..first + slots.len()).map(|slot| Place { page, part, slot }));
        }
    }
}

/// Writes rows into pages from several threads; each (place, side, head) belongs to one.
#[derive(Clone, Copy, Debug)]
pub(in super::super) struct Writer<'a> {
    base: Shared<'a, u8>,
    pub(in super::super) kv: Sides,
    forms: Forms,
    page_bytes: usize,
}

impl Writer<'_> {
    /// What the pages of a part look like.
    #[inline(always)]
    pub(in super::super) fn form(&self, part: Part) -> &PageForm {
        &self.forms[part as usize]
    }

    /// A page of the pool.
    #[inline(always)]
    pub(in super::super) fn page(&self, page: PageId) -> *mut u8 {
        self.base.get().wrapping_add(page as usize * self.page_bytes)
    }

    /// Stores one head of one row.
    ///
    /// # Safety
    /// The place is inside the pool, `values` has `head_dim` elements, and no other thread touches
    /// this head of this slot.
    #[inline(always)]
    pub(in super::super) unsafe fn write(
        &self,
        at: Place,
        side: Side,
        kv_head: usize,
        values: *const f32,
    ) {
        let form = self.form(at.part);
        let (coding, d) = (form.coding(side), form.head_dim);
        // SAFETY: codes and params lie in the page and are this thread's.
        unsafe {
            let page = self.page(at.page);
            let bytes = |at: usize, n: usize| std::slice::from_raw_parts_mut(page.add(at), n);
            let codes = bytes(form.codes(side, kv_head, at.slot), coding.code_bytes(d));
            let params = bytes(form.params(side, kv_head, at.slot), coding.param_bytes(d));
            let values = std::slice::from_raw_parts(values, d);
            with_family!(coding, F => F::encode(values, codes, params));
        }
    }
}
