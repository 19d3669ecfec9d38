//! What a way of coding heads can do.

use super::super::simd::Simd;
use super::numbers::Numbers;
use crate::store::{Coding, PageForm, Side};

/// A way of coding heads.
pub(in super::super) trait Family: Copy {
    /// What decode multiplies with.
    type Numbers: Numbers;
    /// What is [read](Self::read) has yet to be multiplied with the scale of its slot, in this unit; none: with nothing.
    const UNIT: Option<f32> = None;

    /// Codes a head of a slot. Numbers that are not finite make its scale so, and what is decoded NaN.
    fn encode(values: &[f32], codes: &mut [u8], params: &mut [u8]);

    /// Codes a head of all slots of a page, `[slot][n]`.
    #[inline(always)]
    fn encode_page(values: &[f32], n: usize, codes: &mut [u8], params: &mut [u8]) {
        encode_slots::<Self>(values, n, codes, params);
    }

    /// `n_rows` heads of `n` numbers as f32, `stride` apart.
    ///
    /// # Safety
    /// As [`Simd`]; the page has the slots, and `to` room for the numbers.
    unsafe fn read<S: Simd>(row: Row, n_rows: usize, n: usize, to: *mut f32, stride: usize);

    /// `n_rows` heads of `d` numbers, a multiple of [`CHUNK`](super::CHUNK), to be walked over.
    ///
    /// # Safety
    /// As [`Simd`]; the page has the slots, and `scratch` room for `n_rows` times `d` numbers: a slot's params are fewer
    /// than its numbers, those of channels are two of each.
    unsafe fn numbers<S: Simd>(
        row: Row,
        n_rows: usize,
        d: usize,
        scratch: *mut f32,
    ) -> Self::Numbers;
}

/// Codes a head of some slots, one by one.
#[inline(always)]
pub(super) fn encode_slots<F: Family>(
    values: &[f32],
    n: usize,
    codes: &mut [u8],
    params: &mut [u8],
) {
    let n_slots = values.len() / n;
    let (code_bytes, param_bytes) = (codes.len() / n_slots, params.len() / n_slots);
    for (slot, values) in values.chunks_exact(n).enumerate() {
        let codes = &mut codes[slot * code_bytes..][..code_bytes];
        F::encode(values, codes, &mut params[slot * param_bytes..][..param_bytes]);
    }
}

/// A head of a slot in a page and of the slots behind it, to read.
#[derive(Clone, Copy, Debug)]
pub(in super::super) struct Row {
    pub(in super::super) coding: Coding,
    pub(in super::super) codes: *const u8,
    pub(super) params: *const u8,
}

impl Row {
    /// None.
    pub(in super::super) const NONE: Self =
        Self { coding: Coding::F32, codes: std::ptr::null(), params: std::ptr::null() };

    /// `slot` of `page`.
    #[inline(always)]
    pub(in super::super) fn new(
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
    pub(in super::super) fn decoded(self, numbers: *const f32) -> Self {
        Self { coding: Coding::F32, codes: numbers.cast(), ..self }
    }
}

/// `n` numbers of f16 as f32, times `unit`.
///
/// # Safety
/// As [`Simd`]: as many numbers, and room for them.
#[inline(always)]
pub(super) unsafe fn params<S: Simd>(from: *const u8, n: usize, unit: f32, to: *mut f32) {
    let from = from.cast::<u16>();
    let whole = n - n % S::LANES;
    // SAFETY: inside the n numbers.
    unsafe {
        for i in (0..whole).step_by(S::LANES) {
            S::store(to.add(i), S::mul(S::load_f16(from.add(i)), S::splat(unit)));
        }
        for i in whole..n {
            to.add(i).write(S::f16(from.add(i).read_unaligned()) * unit);
        }
    }
}
