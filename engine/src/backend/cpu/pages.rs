//! KV pages of the CPU backend: one lazily committed run of memory.

use super::mem::{Buf, Shared};
use super::simd::bf16_bits;
use crate::backend::Batch;
use crate::cache::{KvFormat, PageId, PageLayout, Side};
use crate::error::Error;

/// Storage of a pool of pages.
#[derive(Debug)]
pub struct CpuPages {
    pub(super) layout: PageLayout,
    bytes: Buf<u8>,
}

impl CpuPages {
    pub(super) fn new(layout: PageLayout, n_pages: usize) -> Result<Self, Error> {
        let n_bytes = layout.bytes().saturating_mul(n_pages);
        Ok(Self { layout, bytes: Buf::zeroed(n_bytes, "the KV page pool")? })
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
    pub(super) fn writer(&mut self) -> Writer {
        Writer { base: Shared(self.bytes.as_mut_ptr()), layout: self.layout }
    }

    /// First byte of slot 0 of a head.
    #[inline(always)]
    pub(super) fn head(&self, page: PageId, side: Side, kv_head: usize) -> *const u8 {
        let at = self.layout.head(side, kv_head) * self.layout.format.bytes();
        self.page(page)[at..].as_ptr()
    }
}

/// Where a new row goes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    page: PageId,
    slot: usize,
}

/// The place of every row of a batch in a layer; panics on a page outside the pool.
pub(super) fn places(batch: &Batch<'_>, layer: usize, pages: &CpuPages, out: &mut Vec<Place>) {
    let layout = pages.layout;
    let n_pages = pages.bytes.len() / layout.bytes().max(1);
    out.clear();
    for seq in &batch.seqs {
        for slot in seq.kv_start..seq.kv_len() {
            let page = seq.page(slot / layout.page_len, layer);
            assert!((page as usize) < n_pages, "page {page} is out of range");
            out.push(Place { page, slot: slot % layout.page_len });
        }
    }
}

/// Writes rows into pages from several threads; each (place, side, head) belongs to one.
#[derive(Clone, Copy, Debug)]
pub(super) struct Writer {
    base: Shared<u8>,
    layout: PageLayout,
}

impl Writer {
    /// Stores one head of one row.
    ///
    /// # Safety
    /// The place is inside the pool, `values` has `head_dim` elements, and no other thread touches
    /// this head of this slot.
    #[inline(always)]
    pub(super) unsafe fn write(
        &self,
        place: Place,
        side: Side,
        kv_head: usize,
        values: *const f32,
    ) {
        let PageLayout { head_dim, format, .. } = self.layout;
        let element = place.page as usize * self.layout.elements()
            + self.layout.head(side, kv_head)
            + place.slot * head_dim;
        // SAFETY: the element lies in the page; pages are aligned for f32.
        unsafe {
            match format {
                KvFormat::Bf16 => {
                    let to = self.base.get().cast::<u16>().add(element);
                    for i in 0..head_dim {
                        to.add(i).write(bf16_bits(*values.add(i)));
                    }
                }
                KvFormat::F32 => {
                    let to = self.base.get().cast::<f32>().add(element);
                    std::ptr::copy_nonoverlapping(values, to, head_dim);
                }
            }
        }
    }
}
