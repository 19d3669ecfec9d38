//! Heads of keys and values as the formats of the KV cache hold them.
//!
//! Coding is plain arithmetic in a fixed order, the same on every device: where the numbers are equal the codes are.

use half::f16;

use super::simd::{Simd, bf16_value, f16_value};
use crate::cache::KvFormat;

/// Codes a head. Numbers that are not finite make its scale so, and what is decoded NaN.
pub(super) fn encode(format: KvFormat, values: &[f32], codes: &mut [u8], params: &mut [u8]) {
    match format {
        KvFormat::Bf16 | KvFormat::F32 => unreachable!("not coded"),
        KvFormat::Int8 => {
            let inverse = put_scale(largest(values) / 127.0, params);
            for (code, x) in codes.iter_mut().zip(values) {
                *code = (x * inverse).round_ties_even().clamp(-127.0, 127.0) as i8 as u8;
            }
        }
        KvFormat::Fp8 => {
            let inverse = put_scale(largest(values) / 448.0, params);
            for (code, x) in codes.iter_mut().zip(values) {
                *code = e4m3(x * inverse);
            }
        }
        KvFormat::Int4 | KvFormat::Int4Plain => {
            let group = format.group(values.len());
            let codes = codes.chunks_exact_mut(group / 2);
            for ((values, codes), params) in
                values.chunks_exact(group).zip(codes).zip(params.chunks_exact_mut(4))
            {
                encode_int4(values, codes, params);
            }
        }
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

/// One group. In a run of 32 numbers byte `i` has number `i` in its low half and number `16 + i` in the other:
/// vectors of 8 and of 16 lanes find their neighbours side by side.
#[inline(always)]
fn encode_int4(values: &[f32], codes: &mut [u8], params: &mut [u8]) {
    let (mut min, mut max, mut poison) = (f32::INFINITY, f32::NEG_INFINITY, 0.0);
    for x in values {
        (min, max, poison) = (min.min(*x), max.max(*x), poison + x * 0.0);
    }
    let inverse = put_scale((max - min) / 15.0 + poison, params);
    let zero = f16::from_f32(min);
    params[2..].copy_from_slice(&zero.to_le_bytes());
    let zero = f16_value(zero.to_bits());
    let code = |x: f32| ((x - zero) * inverse).round_ties_even().clamp(0.0, 15.0) as u8;
    for (values, codes) in values.chunks_exact(32).zip(codes.chunks_exact_mut(16)) {
        let (low, high) = values.split_at(16);
        for ((low, high), byte) in low.iter().zip(high).zip(codes) {
            *byte = code(*low) | code(*high) << 4;
        }
    }
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

/// Of a format whose heads have one scale: what has to be multiplied with it.
///
/// # Safety
/// As [`decode`].
#[inline(always)]
unsafe fn decode_codes<S: Simd>(
    format: KvFormat,
    codes: *const u8,
    n_rows: usize,
    n: usize,
    to: *mut f32,
    stride: usize,
) {
    let whole = n - n % S::LANES;
    // SAFETY: vectors lie inside the n numbers of a row.
    unsafe {
        for row in 0..n_rows {
            let (codes, to) = (codes.add(row * n), to.add(row * stride));
            if format == KvFormat::Int8 {
                for i in (0..whole).step_by(S::LANES) {
                    S::store(to.add(i), S::load_i8(codes.add(i)));
                }
                for i in whole..n {
                    *to.add(i) = f32::from(*codes.add(i) as i8);
                }
            } else {
                for i in (0..whole).step_by(S::LANES) {
                    S::store(to.add(i), S::load_e4m3(codes.add(i)));
                }
                for i in whole..n {
                    *to.add(i) = e4m3_value(*codes.add(i));
                }
            }
        }
    }
}

/// As [`decode`], but what is the same for a whole head goes to `scales`, to be multiplied with the few
/// products of the head instead of with its numbers.
///
/// # Safety
/// As [`decode`], with room for `n_rows` scales.
#[inline(always)]
pub(super) unsafe fn decode_scaled<S: Simd>(
    format: KvFormat,
    (codes, params): (*const u8, *const u8),
    n_rows: usize,
    n: usize,
    (to, scales): (*mut f32, *mut f32),
    stride: usize,
) {
    // SAFETY: the caller's.
    unsafe {
        let unit = match format {
            KvFormat::Int8 => 1.0,
            KvFormat::Fp8 => E4M3_UNIT,
            _ => {
                (0..n_rows).for_each(|row| scales.add(row).write(1.0));
                return decode::<S>(format, (codes, params), n_rows, n, to, stride);
            }
        };
        for row in 0..n_rows {
            let scale = S::f16(params.cast::<u16>().add(row).read_unaligned());
            scales.add(row).write(scale * unit);
        }
        decode_codes::<S>(format, codes, n_rows, n, to, stride);
    }
}

/// Heads of slots that follow one another in a page, as f32, coded or not: `n` numbers each, `stride` apart.
///
/// # Safety
/// As [`Simd`]: the codes and params of `n_rows` heads of `n` numbers, and room for them at `to`.
#[inline(always)]
pub(super) unsafe fn decode<S: Simd>(
    format: KvFormat,
    (codes, params): (*const u8, *const u8),
    n_rows: usize,
    n: usize,
    to: *mut f32,
    stride: usize,
) {
    let whole = n - n % S::LANES;
    let (code_bytes, param_bytes) = (format.code_bytes(n), format.param_bytes(n));
    // SAFETY: vectors lie inside the n numbers of a row; a group is a multiple of 32 of them.
    unsafe {
        let codes = |row: usize| codes.add(row * code_bytes);
        let param = |row: usize, idx: usize| {
            let params = params.add(row * param_bytes).cast::<u16>();
            S::f16(params.add(idx).read_unaligned())
        };
        match format {
            KvFormat::Bf16 => {
                for row in 0..n_rows {
                    let (codes, to) = (codes(row).cast::<u16>(), to.add(row * stride));
                    for i in (0..whole).step_by(S::LANES) {
                        S::store(to.add(i), S::load_bf16(codes.add(i)));
                    }
                    for i in whole..n {
                        *to.add(i) = bf16_value(codes.add(i).read_unaligned());
                    }
                }
            }
            KvFormat::F32 => {
                for row in 0..n_rows {
                    std::ptr::copy_nonoverlapping(codes(row).cast(), to.add(row * stride), n);
                }
            }
            KvFormat::Int8 | KvFormat::Fp8 => {
                let unit = if format == KvFormat::Fp8 { E4M3_UNIT } else { 1.0 };
                decode_codes::<S>(format, codes(0), n_rows, n, to, stride);
                for row in 0..n_rows {
                    let (to, scale) = (to.add(row * stride), param(row, 0) * unit);
                    for i in (0..whole).step_by(S::LANES) {
                        S::store(to.add(i), S::mul(S::load(to.add(i)), S::splat(scale)));
                    }
                    for i in whole..n {
                        *to.add(i) *= scale;
                    }
                }
            }
            KvFormat::Int4 | KvFormat::Int4Plain => {
                let group = format.group(n);
                for row in 0..n_rows {
                    for first in (0..n).step_by(group) {
                        let at = first / group * 2;
                        let scale = S::splat(param(row, at));
                        let zero = S::splat(param(row, at + 1));
                        for i in (first..first + group).step_by(32) {
                            for j in (0..16).step_by(S::LANES) {
                                let codes = codes(row).add(i / 2 + j);
                                let to = to.add(row * stride + i + j);
                                S::store(to, S::fma(S::load_low_u4(codes), scale, zero));
                                S::store(to.add(16), S::fma(S::load_high_u4(codes), scale, zero));
                            }
                        }
                    }
                }
            }
        }
    }
}

/// What e4m3 numbers are decoded in units of.
const E4M3_UNIT: f32 = 256.0;

/// An e4m3 number, divided by 256: its bits are those of an f16 with a smaller exponent.
#[inline(always)]
pub(super) fn e4m3_value(code: u8) -> f32 {
    let code = u16::from(code);
    f16_value((code & 0x80) << 8 | (code & 0x7f) << 7)
}

/// Multiplies by the Hadamard matrix over the square root of its size, which is its own inverse and changes no
/// product of two vectors. The matrix is as large as the largest power of two that divides the length; a
/// longer head is rotated part by part.
#[inline(always)]
pub(super) fn rotate(values: &mut [f32]) {
    let size = 1 << values.len().trailing_zeros();
    let factor = 1.0 / (size as f32).sqrt();
    for part in values.chunks_exact_mut(size) {
        let mut half = 1;
        while half < size {
            for pair in part.chunks_exact_mut(2 * half) {
                let (a, b) = pair.split_at_mut(half);
                for (a, b) in a.iter_mut().zip(b) {
                    (*a, *b) = (*a + *b, *a - *b);
                }
            }
            half *= 2;
        }
        part.iter_mut().for_each(|x| *x *= factor);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::super::simd::{Dot, Isa, Kernel};
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

    struct Decode<'a>(KvFormat, &'a [u8], &'a [u8], &'a mut [f32]);

    impl Kernel for Decode<'_> {
        #[inline(always)]
        unsafe fn run<S: Simd, D: Dot>(self) {
            let Self(format, codes, params, out) = self;
            // SAFETY: slices of the format's lengths.
            unsafe {
                let from = (codes.as_ptr(), params.as_ptr());
                decode::<S>(format, from, 1, out.len(), out.as_mut_ptr(), out.len());
            }
        }
    }

    /// What is decoded is within half a step of what was coded, on every instruction set.
    #[test]
    fn codes_are_the_nearest() {
        for format in KvFormat::ALL.into_iter().filter(|format| format.is_coded()) {
            for n in [32, 64, 96, 128, 6, 80] {
                if n % 32 != 0 && format.code_bytes(2) == 1 {
                    continue;
                }
                let values: Vec<f32> =
                    (0..n).map(|i| ((i * i * 37 + i) as f32).sin() * 3.0 + 0.7).collect();
                let mut codes = vec![0xff; format.code_bytes(n)];
                let mut params = vec![0xff; format.param_bytes(n)];
                encode(format, &values, &mut codes, &mut params);
                let mut first = None;
                for isa in Isa::available() {
                    let mut back = vec![f32::NAN; n];
                    // SAFETY: available; slices of the format's lengths.
                    unsafe { isa.run(Decode(format, &codes, &params, &mut back)) };
                    for (x, y) in values.iter().zip(&back) {
                        let scale = f16::from_le_bytes([params[0], params[1]]).to_f32();
                        let step = match format {
                            KvFormat::Int8 => scale,
                            KvFormat::Fp8 => (x.abs() / 8.0).max(scale / 512.0),
                            _ => 7.0 / 15.0, // no group spans more than 6
                        };
                        // The scale is rounded too: 2^-11 of the largest.
                        assert!((x - y).abs() <= step / 2.0 + 2e-3, "{format} {n}: {x} {y}");
                    }
                    // Without a fused multiply-add a number is rounded once more.
                    let first = first.get_or_insert(back.clone());
                    let is_close = |(x, y): (&f32, &f32)| (x - y).abs() <= 4.0 * f32::EPSILON;
                    assert!(back.iter().zip(&*first).all(is_close), "{format} on {isa:?}");
                }
            }
        }
    }

    /// Heads without a range, and heads that are not finite.
    #[test]
    fn edges() {
        for format in KvFormat::ALL.into_iter().filter(|format| format.is_coded()) {
            let code = |values: [f32; 32]| {
                let mut codes = vec![0; format.code_bytes(32)];
                let mut params = vec![0; format.param_bytes(32)];
                encode(format, &values, &mut codes, &mut params);
                let mut back = vec![7.0; 32];
                // SAFETY: slices of the format's lengths.
                unsafe { Isa::Portable.run(Decode(format, &codes, &params, &mut back)) };
                back
            };
            assert_eq!(code([0.0; 32]), [0.0; 32], "{format}");
            let same = code([1.5; 32]);
            assert!(same.iter().all(|x| (x - 1.5).abs() < 2e-3), "{format}: {same:?}");
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut values = [1.0; 32];
                values[9] = bad;
                assert!(code(values).iter().all(|x| x.is_nan()), "{format}: {bad}");
            }
        }
    }

    #[test]
    fn rotation_is_its_own_inverse() {
        for n in [1, 6, 64, 80, 128] {
            let values: Vec<f32> = (0..n).map(|i| ((i * 7) as f32).cos()).collect();
            let mut rotated = values.clone();
            rotate(&mut rotated);
            let square = |v: &[f32]| v.iter().map(|x| f64::from(x * x)).sum::<f64>();
            assert!((square(&values) - square(&rotated)).abs() < 1e-5 * square(&values));
            rotate(&mut rotated);
            assert!(values.iter().zip(&rotated).all(|(x, y)| (x - y).abs() < 1e-6), "{n}");
        }
        let mut unit = [1.0, 0.0, 0.0, 0.0];
        rotate(&mut unit);
        assert_eq!(unit, [0.5; 4]);
    }
}
