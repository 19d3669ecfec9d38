//! Numbers that are not coded: bf16 and f32.

use super::super::simd::{Simd, bf16_bits};
use super::family::{Family, Row};
use super::numbers::{Bf16, Element, F32, Plain};

/// Numbers as they are.
#[derive(Clone, Copy)]
pub(super) struct Wide<E>(E);

/// Which.
pub(super) trait WideElement: Element {
    /// # Safety
    /// Room for a number at `to`.
    unsafe fn write(x: f32, to: *mut u8);
}

impl WideElement for Bf16 {
    #[inline(always)]
    unsafe fn write(x: f32, to: *mut u8) {
        // SAFETY: the caller's.
        unsafe { to.cast::<u16>().write_unaligned(bf16_bits(x)) }
    }
}

impl WideElement for F32 {
    #[inline(always)]
    unsafe fn write(x: f32, to: *mut u8) {
        // SAFETY: the caller's.
        unsafe { to.cast::<f32>().write_unaligned(x) }
    }
}

impl<E: WideElement> Family for Wide<E> {
    type Numbers = Plain<E>;

    #[inline(always)]
    fn encode(values: &[f32], codes: &mut [u8], _params: &mut [u8]) {
        assert_eq!(codes.len(), values.len() * E::BYTES, "a head");
        let to = codes.as_mut_ptr();
        for (i, &x) in values.iter().enumerate() {
            // SAFETY: inside the codes.
            unsafe { E::write(x, to.add(i * E::BYTES)) };
        }
    }

    #[inline(always)]
    unsafe fn read<S: Simd>(row: Row, n_rows: usize, n: usize, to: *mut f32, stride: usize) {
        // SAFETY: the caller's.
        unsafe { Plain::<E>::read::<S>(row.codes, n_rows, n, to, stride) }
    }

    #[inline(always)]
    unsafe fn numbers<S: Simd>(row: Row, _n: usize, d: usize, _scratch: *mut f32) -> Plain<E> {
        Plain::new(row.codes, d)
    }
}
