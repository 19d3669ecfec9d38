//! What eviction asks of pages: the length of keys, and slots that move together.

use super::mem::Shared;
use super::pages::{CpuPages, Row};
use super::simd::{Dot, Kernel, Simd};
use crate::backend::Table;
use crate::store::{PageId, Run, Side};

/// Lengths of the keys of a layer, the mean over the key heads. Rotations, which there are two of, keep a length.
#[derive(Clone, Copy)]
pub(super) struct KeyNorms<'a> {
    pub(super) pages: &'a CpuPages,
    pub(super) table: Table<'a>,
    pub(super) layer: usize,
    pub(super) n_slots: usize,
    /// `[slot]`
    pub(super) out: Shared<'a, f32>,
}

impl Kernel for KeyNorms<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd, D: Dot>(self) {
        let layout = self.pages.layout;
        let (n_heads, d) = (layout.n_kv_heads, layout.head_dim);
        let mut key = vec![0.0_f32; d];
        for Run { page_idx, part, first, slots } in layout.runs(0..self.n_slots) {
            let page = self.pages.page(self.table.page(page_idx, self.layer)).as_ptr();
            for (place, slot) in (first..).zip(slots) {
                let mut sum = 0.0;
                for head in 0..n_heads {
                    let row = Row::new(self.pages.form(part), page, place, Side::K, head);
                    // SAFETY: a slot in use; room for its d numbers.
                    unsafe { row.read::<S>(1, d, key.as_mut_ptr()) };
                    sum += key.iter().map(|x| x * x).sum::<f32>().sqrt();
                }
                // SAFETY: room for n_slots.
                unsafe { self.out.get().add(slot).write(sum / n_heads as f32) };
            }
        }
    }
}

impl CpuPages {
    /// Moves what slot `keep[i]` of a layer holds to slot `i`; `keep` rises, so that no slot is read after it was
    /// written.
    pub(super) fn keep_slots(&mut self, table: Table<'_>, layer: usize, keep: &[u32]) {
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
