//! Sealing: tokens that waited in 16 bits are coded into one page.

use super::super::simd::{Dot, Kernel, Simd};
use super::super::team::Tasks;
use super::family::{Family, Row, encode_slots};
use super::pages::{CpuPages, Writer};
use super::with_family;
use crate::store::{Coding, PageForm, Part, Seal, Side, When};

/// Codes pages: a task for each of them and key head.
#[derive(Clone, Copy)]
pub(in super::super) struct SealPages<'a> {
    pub(in super::super) pages: Writer<'a>,
    pub(in super::super) seals: &'a [Seal],
    pub(in super::super) tasks: &'a Tasks,
    pub(in super::super) thread_idx: usize,
}

/// Tasks for some pages; panics on a page outside the pool, and where there are too few for a whole one.
pub(in super::super) fn n_seal_tasks(seals: &[Seal], pages: &CpuPages) -> usize {
    let n_pages = pages.bytes.len() / pages.layout.bytes().max(1);
    for Seal { from, to } in seals {
        let is_inside = from.iter().chain([to]).all(|&page| (page as usize) < n_pages);
        let n_slots = from.len() * pages.layout.tail_len();
        assert!(is_inside && n_slots == pages.layout.page_len, "{from:?} cannot become {to}");
    }
    seals.len() * pages.layout.n_kv_heads
}

impl Kernel for SealPages<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd, D: Dot>(self) {
        let [tail, body] = [Part::Tail, Part::Body].map(|part| *self.pages.form(part));
        let d = body.head_dim;
        let mut values = vec![0.0_f32; body.len * d];
        while let Some(task) = self.tasks.next(self.thread_idx) {
            let (seal, head) = (&self.seals[task / body.n_kv_heads], task % body.n_kv_heads);
            for side in [Side::K, Side::V] {
                // SAFETY: pages of the pool; this head of this side of the new page is the task's.
                unsafe {
                    for (&page, values) in
                        seal.from.iter().zip(values.chunks_exact_mut(tail.len * d))
                    {
                        let row = Row::new(&tail, self.pages.page(page), 0, side, head);
                        row.read::<S>(tail.len, d, values.as_mut_ptr());
                    }
                    encode(&body, self.pages.page(seal.to), (side, head), &values);
                }
            }
        }
    }
}

/// Stores a head of all slots of a page.
///
/// # Safety
/// The page has the form, and no other thread touches this head.
#[inline(always)]
unsafe fn encode(form: &PageForm, page: *mut u8, (side, head): (Side, usize), values: &[f32]) {
    let (held, d) = (form.kv.of(side), form.head_dim);
    let coding = held.coding;
    let [codes, params, end] =
        [form.codes(side, head, 0), form.params(side, head, 0), form.params(side, head, form.len)];
    // SAFETY: the head's run, codes and then params.
    let (codes, params) = unsafe {
        (
            std::slice::from_raw_parts_mut(page.add(codes), params - codes),
            std::slice::from_raw_parts_mut(page.add(params), end - params),
        )
    };
    with_family!(coding, F => match held.when {
        When::Sealed => F::encode_page(values, d, codes, params),
        When::Append => encode_slots::<F>(values, d, codes, params),
    });
}
