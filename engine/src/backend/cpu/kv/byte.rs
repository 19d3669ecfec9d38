//! Codes of 8 bits with a scale for each slot and head: integers and floats.

use half::f16;

use super::super::simd::{Simd, f16_value};
use super::family::{Family, Row};
use super::numbers::{E4m3, Element, Int8, Plain};

/// Codes of a byte.
#[derive(Clone, Copy)]
pub(super) struct Byte<E>(E);

/// Which.
pub(super) trait ByteElement: Element {
    /// The code of the largest number stands for it.
    const MOST: f32;
    /// What is [loaded](Element::load) is in units of it.
    const UNIT: f32;
    /// The nearest code.
    fn code(x: f32) -> u8;
}

impl ByteElement for Int8 {
    const MOST: f32 = 127.0;
    const UNIT: f32 = 1.0;

    #[inline(always)]
    fn code(x: f32) -> u8 {
        x.round_ties_even().clamp(-127.0, 127.0) as i8 as u8
    }
}

impl ByteElement for E4m3 {
    const MOST: f32 = 448.0;
    const UNIT: f32 = 256.0;

    #[inline(always)]
    fn code(x: f32) -> u8 {
        e4m3(x)
    }
}

impl<E: ByteElement> Family for Byte<E> {
    type Numbers = Plain<E>;
    const UNIT: Option<f32> = Some(E::UNIT);

    #[inline(always)]
    fn encode(values: &[f32], codes: &mut [u8], params: &mut [u8]) {
        let inverse = put_scale(largest(values) / E::MOST, params);
        for (code, x) in codes.iter_mut().zip(values) {
            *code = E::code(x * inverse);
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

/// Stores a scale as f16, and gives the inverse of what it was rounded to: 0 where there is none.
#[inline(always)]
fn put_scale(scale: f32, to: &mut [u8]) -> f32 {
    let scale = f16::from_f32(scale);
    to[..2].copy_from_slice(&scale.to_le_bytes());
    let scale = f16_value(scale.to_bits());
    if scale > 0.0 { 1.0 / scale } else { 0.0 }
}

/// The largest magnitude; NaN if one is not finite.
#[inline(always)]
fn largest(values: &[f32]) -> f32 {
    let max = values.iter().fold(0.0_f32, |max, x| max.max(x.abs()));
    max + values.iter().fold(0.0_f32, |sum, x| sum + x * 0.0)
}

/// The nearest e4m3 number, ties to even, at most 448 in magnitude: 1 sign bit, 4 of exponent with bias 7, 3 of
/// mantissa (OCP 8-bit floating point, section 5). NaN gives 448, whose scale is NaN.
#[inline(always)]
fn e4m3(x: f32) -> u8 {
    const LEAST_NORMAL: f32 = 1.0 / 64.0;
    let (sign, x) = ((x.to_bits() >> 24) as u8 & 0x80, x.abs().min(448.0));
    let code = if x < LEAST_NORMAL {
        (x * 512.0).round_ties_even() as u32
    } else {
        let bits = x.to_bits();
        let rounded = bits + 0x7_ffff + ((bits >> 20) & 1);
        (rounded >> 20) - ((127 - 7) << 3)
    };
    sign | code as u8
}

#[cfg(test)]
mod tests {
    use super::super::super::simd::e4m3_value;
    use super::*;

    /// Every e4m3 number, in order.
    fn numbers() -> Vec<f64> {
        let value = |code: i32| match (code >> 3, f64::from(code & 7)) {
            (0, mantissa) => mantissa / 8.0 * 2_f64.powi(-6),
            (exponent, mantissa) => (1.0 + mantissa / 8.0) * 2_f64.powi(exponent - 7),
        };
        (0..0x7f).map(value).collect()
    }

    #[test]
    fn e4m3_rounds_to_nearest_even() {
        let numbers = numbers();
        for (code, &x) in numbers.iter().enumerate() {
            assert_eq!(f64::from(e4m3_value(code as u8)) * 256.0, x);
            assert_eq!(f64::from(e4m3_value(code as u8 | 0x80)) * 256.0, -x);
            assert_eq!(usize::from(e4m3(x as f32)), code, "{x} is itself");
            assert_eq!(usize::from(e4m3(-x as f32)), code | 0x80);
            let Some(&next) = numbers.get(code + 1) else { continue };
            let middle = ((x + next) / 2.0) as f32;
            assert_eq!(usize::from(e4m3(middle)), code + code % 2, "half way from {x}");
            assert_eq!(usize::from(e4m3(middle.next_down())), code, "below {middle}");
            assert_eq!(usize::from(e4m3(middle.next_up())), code + 1, "above {middle}");
        }
        assert_eq!([e4m3(1e9), e4m3(f32::INFINITY), e4m3(-449.0)], [0x7e, 0x7e, 0xfe]);
    }
}
