//! What is asked of rows, by the family of their coding.

use super::super::simd::Simd;
use super::family::{Family, Row, params};
use super::numbers::Walk;
use super::with_family;
use crate::store::Coding;

impl Row {
    /// What the numbers of its slots are to be multiplied with, once [`read_unscaled`](Self::read_unscaled) has
    /// them: 1 where there is nothing to do.
    ///
    /// # Safety
    /// As [`Simd`]; the page has the slots, and `to` room for `n_rows` scales.
    #[inline(always)]
    pub(in super::super) unsafe fn scales<S: Simd>(self, n_rows: usize, to: *mut f32) {
        // SAFETY: the caller's.
        unsafe {
            match with_family!(self.coding, F => F::UNIT) {
                Some(unit) => params::<S>(self.params, n_rows, unit, to),
                None => (0..n_rows).for_each(|row| to.add(row).write(1.0)),
            }
        }
    }

    /// `n_rows` heads of `n` numbers, `stride` apart, each to be multiplied with its [scale](Self::scales).
    ///
    /// # Safety
    /// As [`Family::read`].
    #[inline(always)]
    pub(in super::super) unsafe fn read_unscaled<S: Simd>(
        self,
        n_rows: usize,
        n: usize,
        to: *mut f32,
        stride: usize,
    ) {
        // SAFETY: the caller's.
        unsafe { with_family!(self.coding, F => F::read::<S>(self, n_rows, n, to, stride)) }
    }

    /// `n_rows` heads of `n` numbers, one after another.
    ///
    /// # Safety
    /// As [`Family::read`].
    #[inline(always)]
    pub(in super::super) unsafe fn read<S: Simd>(self, n_rows: usize, n: usize, to: *mut f32) {
        let whole = n - n % S::LANES;
        // SAFETY: the caller's; vectors lie inside the n numbers of a row.
        unsafe {
            self.read_unscaled::<S>(n_rows, n, to, n);
            let Some(unit) = with_family!(self.coding, F => F::UNIT) else { return };
            for row in 0..n_rows {
                let scale = S::f16(self.params.cast::<u16>().add(row).read_unaligned()) * unit;
                let to = to.add(row * n);
                for i in (0..whole).step_by(S::LANES) {
                    S::store(to.add(i), S::mul(S::load(to.add(i)), S::splat(scale)));
                }
                for i in whole..n {
                    *to.add(i) *= scale;
                }
            }
        }
    }

    /// Walks over the heads of `n` slots, of `d` numbers each; the first is number `first` of its tile, and `scratch` has
    /// room for `n` times `d` numbers. What [`scales`](Self::scales) says is left to do.
    ///
    /// # Safety
    /// As [`Family::numbers`].
    #[inline(always)]
    pub(in super::super) unsafe fn walk<S: Simd>(
        self,
        first: usize,
        n: usize,
        d: usize,
        scratch: *mut f32,
        job: impl Walk,
    ) {
        // SAFETY: the caller's.
        unsafe {
            with_family!(self.coding, F => {
                job.walk::<S>(F::numbers::<S>(self, n, d, scratch), first, n);
            });
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use half::f16;

    use super::super::super::simd::{Dot, Isa, Kernel};
    use super::*;

    fn encode(coding: Coding, values: &[f32], codes: &mut [u8], params: &mut [u8]) {
        with_family!(coding, F => F::encode(values, codes, params));
    }

    struct Decode<'a>(Coding, &'a [u8], &'a [u8], &'a mut [f32]);

    impl Kernel for Decode<'_> {
        #[inline(always)]
        unsafe fn run<S: Simd, D: Dot>(self) {
            let Self(coding, codes, params, out) = self;
            // SAFETY: slices of the format's lengths.
            unsafe {
                let row = Row { coding, codes: codes.as_ptr(), params: params.as_ptr() };
                row.read::<S>(1, out.len(), out.as_mut_ptr());
            }
        }
    }

    /// What is decoded is within half a step of what was coded, on every instruction set.
    #[test]
    fn codes_are_the_nearest() {
        for coding in [Coding::FP8, Coding::INT8, Coding::INT4, Coding::INT2] {
            for n in [32, 64, 96, 128, 6, 80] {
                if n % coding.unit() != 0 {
                    continue;
                }
                let values: Vec<f32> =
                    (0..n).map(|i| ((i * i * 37 + i) as f32).sin() * 3.0 + 0.7).collect();
                let mut codes = vec![0xff; coding.code_bytes(n)];
                let mut params = vec![0xff; coding.param_bytes(n)];
                encode(coding, &values, &mut codes, &mut params);
                let mut first = None;
                for isa in Isa::available() {
                    let mut back = vec![f32::NAN; n];
                    // SAFETY: available; slices of the format's lengths.
                    unsafe { isa.run(Decode(coding, &codes, &params, &mut back)) };
                    for (x, y) in values.iter().zip(&back) {
                        let scale = f16::from_le_bytes([params[0], params[1]]).to_f32();
                        let step = match coding {
                            Coding::INT8 => scale,
                            Coding::FP8 => (x.abs() / 8.0).max(scale / 512.0),
                            Coding::INT2 => 7.0 / 3.0,
                            _ => 7.0 / 15.0, // no group spans more than 6
                        };
                        // The scale is rounded too: 2^-11 of the largest.
                        assert!((x - y).abs() <= step / 2.0 + 2e-3, "{coding} {n}: {x} {y}");
                    }
                    // Without a fused multiply-add a number is rounded once more.
                    let first = first.get_or_insert(back.clone());
                    let is_close = |(x, y): (&f32, &f32)| (x - y).abs() <= 4.0 * f32::EPSILON;
                    assert!(back.iter().zip(&*first).all(is_close), "{coding} on {isa:?}");
                }
            }
        }
    }

    /// Heads without a range, and heads that are not finite.
    #[test]
    fn edges() {
        for coding in [Coding::FP8, Coding::INT8, Coding::INT4, Coding::INT2] {
            let code = |values: [f32; 64]| {
                let mut codes = vec![0; coding.code_bytes(64)];
                let mut params = vec![0; coding.param_bytes(64)];
                encode(coding, &values, &mut codes, &mut params);
                let mut back = vec![7.0; 64];
                // SAFETY: slices of the format's lengths.
                unsafe { Isa::Portable.run(Decode(coding, &codes, &params, &mut back)) };
                back
            };
            assert_eq!(code([0.0; 64]), [0.0; 64], "{coding}");
            let same = code([1.5; 64]);
            assert!(same.iter().all(|x| (x - 1.5).abs() < 2e-3), "{coding}: {same:?}");
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut values = [1.0; 64];
                values[9] = bad;
                assert!(code(values).iter().all(|x| x.is_nan()), "{coding}: {bad}");
            }
        }
    }
}
