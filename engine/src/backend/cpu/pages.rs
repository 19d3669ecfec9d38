//! KV pages of the CPU backend: one lazily committed run of memory.

use super::codec;
use super::mem::{Buf, Shared};
use super::simd::{Simd, bf16_bits};
use crate::backend::Batch;
use crate::error::Error;
use crate::store::{Coding, PageForm, PageId, PageLayout, Part, Run, Side, Sides};

/// What the pages of each [`Part`] of a table look like.
type Forms = [PageForm; 3];

/// Storage of a pool of pages.
#[derive(Debug)]
pub struct CpuPages {
    pub(super) layout: PageLayout,
    forms: Forms,
    pub(super) bytes: Buf<u8>,
}

impl CpuPages {
    pub(super) fn new(layout: PageLayout, n_pages: usize) -> Result<Self, Error> {
        let n_bytes = layout.bytes().saturating_mul(n_pages);
        let forms = [Part::First, Part::Body, Part::Tail].map(|part| layout.form_of(part));
        Ok(Self { layout, forms, bytes: Buf::zeroed(n_bytes, "the KV page pool")? })
    }

    /// The bytes of a page.
    pub(super) fn page(&self, page: PageId) -> &[u8] {
        let size = self.layout.bytes();
        &self.bytes[page as usize * size..][..size]
    }

    /// The bytes of a page, to write.
    pub(super) fn page_mut(&mut self, page: PageId) -> &mut [u8] {
        let size = self.layout.bytes();
        &mut self.bytes[page as usize * size..][..size]
    }

    pub(super) fn copy(&mut self, from: PageId, to: PageId) {
        let size = self.layout.bytes();
        let from = from as usize * size;
        assert!(to as usize * size + size <= self.bytes.len(), "page {to} is out of range");
        self.bytes.copy_within(from..from + size, to as usize * size);
    }

    /// For kernels that write.
    pub(super) fn writer(&mut self) -> Writer<'_> {
        let PageLayout { kv, .. } = self.layout;
        let (forms, page_bytes) = (self.forms, self.layout.bytes());
        Writer { base: Shared::new(&mut self.bytes), kv, forms, page_bytes }
    }

    /// What the pages of a part look like.
    #[inline(always)]
    pub(super) fn form(&self, part: Part) -> &PageForm {
        &self.forms[part as usize]
    }
}

/// A head of a token in a page, to read.
#[derive(Clone, Copy, Debug)]
pub(super) struct Row {
    pub(super) coding: Coding,
    pub(super) codes: *const u8,
    pub(super) params: *const u8,
}

impl Row {
    /// `slot` of `page`.
    #[inline(always)]
    pub(super) fn new(
        form: &PageForm,
        page: *const u8,
        slot: usize,
        side: Side,
        head: usize,
    ) -> Self {
        Self {
            coding: form.coding(side),
            codes: page.wrapping_add(form.codes(side, head, slot)),
            params: page.wrapping_add(form.params(side, head, slot)),
        }
    }

    /// Its numbers, once they have been [read](Self::read).
    #[inline(always)]
    pub(super) fn decoded(self, numbers: *const f32) -> Self {
        Self { coding: Coding::F32, codes: numbers.cast(), ..self }
    }

    /// What the numbers of it and of the slots behind it are to be multiplied with, once [`read_run`](Self::read_run)
    /// has them: 1 where there is nothing to do.
    ///
    /// # Safety
    /// As [`Simd`]; the page has the slots, and `to` room for `n_rows` scales.
    #[inline(always)]
    pub(super) unsafe fn scales<S: Simd>(self, n_rows: usize, to: *mut f32) {
        // SAFETY: the caller's.
        unsafe {
            match self.coding {
                Coding::INT8 => codec::params::<S>(self.params, n_rows, 1.0, to),
                Coding::FP8 => codec::params::<S>(self.params, n_rows, codec::E4M3_UNIT, to),
                _ => (0..n_rows).for_each(|row| to.add(row).write(1.0)),
            }
        }
    }

    /// It and the slots behind it in the page: `n_rows` heads of `n` numbers, `stride` apart, each to be multiplied
    /// with its [scale](Self::scales).
    ///
    /// # Safety
    /// As [`Simd`]; the page has the slots, and `to` room for the numbers.
    #[inline(always)]
    pub(super) unsafe fn read_run<S: Simd>(
        self,
        n_rows: usize,
        n: usize,
        to: *mut f32,
        stride: usize,
    ) {
        let from = (self.codes, self.params);
        // SAFETY: the caller's.
        unsafe {
            match self.coding {
                _ if self.coding.is_by_channel() => {
                    codec::decode_channels::<S>(self.coding, from, n_rows, n, to, stride);
                }
                Coding::INT8 | Coding::FP8 => {
                    codec::decode_codes::<S>(self.coding, self.codes, n_rows, n, to, stride);
                }
                _ => codec::decode::<S>(self.coding, from, n_rows, n, to, stride),
            }
        }
    }

    /// It and the slots behind it in the page as f32: `n_rows` heads of `n` numbers, one after another.
    ///
    /// # Safety
    /// As [`Simd`]; the page has the slots, and `to` room for the numbers.
    #[inline(always)]
    pub(super) unsafe fn read<S: Simd>(self, n_rows: usize, n: usize, to: *mut f32) {
        let from = (self.codes, self.params);
        // SAFETY: the caller's.
        unsafe {
            match self.coding.is_by_channel() {
                true => codec::decode_channels::<S>(self.coding, from, n_rows, n, to, n),
                false => codec::decode::<S>(self.coding, from, n_rows, n, to, n),
            }
        }
    }
}

/// Where a new row goes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    page: PageId,
    part: Part,
    slot: usize,
}

/// The place of every row of a batch in a layer; panics on a page outside the pool.
pub(super) fn places(batch: &Batch<'_>, layer: usize, pages: &CpuPages, out: &mut Vec<Place>) {
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
pub(super) struct Writer<'a> {
    base: Shared<'a, u8>,
    pub(super) kv: Sides,
    forms: Forms,
    page_bytes: usize,
}

impl Writer<'_> {
    /// What the pages of a part look like.
    #[inline(always)]
    pub(super) fn form(&self, part: Part) -> &PageForm {
        &self.forms[part as usize]
    }

    /// A page of the pool.
    #[inline(always)]
    pub(super) fn page(&self, page: PageId) -> *mut u8 {
        self.base.get().wrapping_add(page as usize * self.page_bytes)
    }

    /// Stores one head of one row.
    ///
    /// # Safety
    /// The place is inside the pool, `values` has `head_dim` elements, and no other thread touches
    /// this head of this slot.
    #[inline(always)]
    pub(super) unsafe fn write(&self, at: Place, side: Side, kv_head: usize, values: *const f32) {
        let form = self.form(at.part);
        let (coding, d) = (form.coding(side), form.head_dim);
        // SAFETY: codes and params lie in the page and are this thread's; bf16 and f32 are aligned there.
        unsafe {
            let page = self.page(at.page);
            let codes = page.add(form.codes(side, kv_head, at.slot));
            match coding {
                Coding::BF16 => {
                    let to = codes.cast::<u16>();
                    for i in 0..d {
                        to.add(i).write_unaligned(bf16_bits(*values.add(i)));
                    }
                }
                Coding::F32 => std::ptr::copy_nonoverlapping(values.cast::<u8>(), codes, 4 * d),
                _ => {
                    let params = page.add(form.params(side, kv_head, at.slot));
                    codec::encode(
                        coding,
                        std::slice::from_raw_parts(values, d),
                        std::slice::from_raw_parts_mut(codes, coding.code_bytes(d)),
                        std::slice::from_raw_parts_mut(params, coding.param_bytes(d)),
                    );
                }
            }
        }
    }
}
