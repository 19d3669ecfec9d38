//! Heads of keys and values as the formats of the KV cache hold them.
//!
//! Coding is plain arithmetic in a fixed order, the same on every device: where the numbers are equal the codes are.

use half::f16;

use super::simd::{Simd, bf16_value, e4m3_value, f16_value};
use crate::store::{Code, Coding};

/// Codes a head. Numbers that are not finite make its scale so, and what is decoded NaN.
#[inline(always)]
pub(super) fn encode(coding: Coding, values: &[f32], codes: &mut [u8], params: &mut [u8]) {
    match coding.code {
        Code::Bf16 | Code::F32 => unreachable!("not coded"),
        Code::I8 => {
            let inverse = put_scale(largest(values) / 127.0, params);
            for (code, x) in codes.iter_mut().zip(values) {
                *code = (x * inverse).round_ties_even().clamp(-127.0, 127.0) as i8 as u8;
            }
        }
        Code::E4m3 => {
            let inverse = put_scale(largest(values) / 448.0, params);
            for (code, x) in codes.iter_mut().zip(values) {
                *code = e4m3(x * inverse);
            }
        }
        Code::U4 | Code::U2 => {
            let (bits, group) = (coding.bits(), coding.group(values.len()));
            let codes = codes.chunks_exact_mut(group * bits / 8);
            for ((values, codes), params) in
                values.chunks_exact(group).zip(codes).zip(params.chunks_exact_mut(4))
            {
                let steps = Steps::whole(bits, values);
                steps.store(params);
                pack(bits, codes, |i| steps.code(values[i]));
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

/// What codes that share a scale and a zero stand for: `zero + scale * code`.
#[derive(Clone, Copy, Debug)]
struct Steps {
    scale: f16,
    zero: f16,
    /// The zero that is stored, and the inverse of the scale that is: 0 where there is none.
    from: f32,
    inverse: f32,
    most: f32,
}

impl Steps {
    /// From `min` to `max`, both rounded.
    #[inline(always)]
    fn new(bits: usize, min: f32, max: f32) -> Self {
        let most = ((1 << bits) - 1) as f32;
        let (scale, zero) = (f16::from_f32((max - min) / most), f16::from_f32(min));
        let stored = f16_value(scale.to_bits());
        let inverse = if stored > 0.0 { 1.0 / stored } else { 0.0 };
        Self { scale, zero, from: f16_value(zero.to_bits()), inverse, most }
    }

    /// From the least of some numbers to the largest; NaN where one is not finite.
    #[inline(always)]
    fn whole(bits: usize, values: &[f32]) -> Self {
        let (mut min, mut max, mut poison) = (f32::INFINITY, f32::NEG_INFINITY, 0.0);
        for x in values {
            (min, max, poison) = (min.min(*x), max.max(*x), poison + x * 0.0);
        }
        Self::new(bits, min, max + poison)
    }

    /// Where they are kept: the scale, then the zero.
    #[inline(always)]
    fn store(self, params: &mut [u8]) {
        params[..2].copy_from_slice(&self.scale.to_le_bytes());
        params[2..].copy_from_slice(&self.zero.to_le_bytes());
    }

    #[inline(always)]
    fn code(self, x: f32) -> u8 {
        ((x - self.from) * self.inverse).round_ties_even().clamp(0.0, self.most) as u8
    }
}

/// Packs codes so that vectors of 8 and of 16 lanes find neighbours side by side: 16 bytes hold 16 codes in their lowest
/// bits, the next 16 in the bits above these, and so on.
#[inline(always)]
fn pack(bits: usize, codes: &mut [u8], code: impl Fn(usize) -> u8) {
    let n_parts = 8 / bits;
    for (block, codes) in codes.chunks_exact_mut(16).enumerate() {
        for (j, byte) in codes.iter_mut().enumerate() {
            let of = |part: usize| code((block * n_parts + part) * 16 + j) << (part * bits);
            *byte = (0..n_parts).map(of).fold(0, |byte, code| byte | code);
        }
    }
}

/// Columns that are fitted side by side.
const COLUMNS: usize = 16;

/// Ranges that are tried, as shares of the whole one about its middle: with four codes, numbers far out are better cut
/// off than all others told apart more coarsely.
#[inline(always)]
fn shares(bits: usize) -> &'static [f32] {
    if bits == 2 { &[1.0, 0.9, 0.8, 0.7] } else { &[1.0] }
}

/// For each column of rows of `n` numbers, a multiple of 16, the steps that lose least of it, in the sum of squares; the
/// widest of those that lose alike.
#[inline(always)]
fn fit(bits: usize, values: &[f32], n: usize) -> Vec<Steps> {
    (0..n).step_by(COLUMNS).flat_map(|first| fit_columns(bits, values, n, first)).collect()
}

/// [`fit`] for the columns from `first` on.
#[inline(always)]
fn fit_columns(bits: usize, values: &[f32], n: usize, first: usize) -> [Steps; COLUMNS] {
    let rows = || values.chunks_exact(n).map(|row| &row[first..first + COLUMNS]);
    let (mut min, mut max) = ([f32::INFINITY; COLUMNS], [f32::NEG_INFINITY; COLUMNS]);
    let mut poison = [0.0; COLUMNS];
    for row in rows() {
        for c in 0..COLUMNS {
            (min[c], max[c]) = (min[c].min(row[c]), max[c].max(row[c]));
            poison[c] += row[c] * 0.0;
        }
    }
    let most = ((1 << bits) - 1) as f32;
    let mut best = [(f32::INFINITY, 0.0, f32::NAN); COLUMNS];
    for &share in shares(bits) {
        let (mut low, mut scale, mut inverse) = ([0.0; COLUMNS], [0.0; COLUMNS], [0.0; COLUMNS]);
        for c in 0..COLUMNS {
            let half = (max[c] - min[c]) * (0.5 * share);
            low[c] = (max[c] + min[c]) * 0.5 - half;
            scale[c] = 2.0 * half / most;
            inverse[c] = if scale[c] > 0.0 { 1.0 / scale[c] } else { 0.0 };
        }
        let mut losses = [0.0; COLUMNS];
        for row in rows() {
            for c in 0..COLUMNS {
                let code = ((row[c] - low[c]) * inverse[c]).round_ties_even().clamp(0.0, most);
                let loss = row[c] - (low[c] + scale[c] * code);
                losses[c] += loss * loss;
            }
        }
        for c in 0..COLUMNS {
            if losses[c] < best[c].0 {
                best[c] = (losses[c], low[c], low[c] + scale[c] * most);
            }
        }
    }
    std::array::from_fn(|c| Steps::new(bits, best[c].1, best[c].2 + poison[c]))
}

/// Codes a head of all slots of a page, `[slot][n]`: channel by channel, or group by group of each slot.
#[inline(always)]
pub(super) fn encode_page(
    coding: Coding,
    values: &[f32],
    n: usize,
    codes: &mut [u8],
    params: &mut [u8],
) {
    let (bits, group, code_bytes) = (coding.bits(), coding.group(n), coding.code_bytes(n));
    let rows = || values.chunks_exact(n);
    if coding.is_by_channel() {
        let steps = fit(bits, values, n);
        let (scales, zeros) = params.split_at_mut(2 * n);
        let params = scales.chunks_exact_mut(2).zip(zeros.chunks_exact_mut(2));
        for (steps, (scale, zero)) in steps.iter().zip(params) {
            scale.copy_from_slice(&steps.scale.to_le_bytes());
            zero.copy_from_slice(&steps.zero.to_le_bytes());
        }
        for (row, codes) in rows().zip(codes.chunks_exact_mut(code_bytes)) {
            pack(bits, codes, |i| steps[i].code(row[i]));
        }
        return;
    }
    // A slot's group as a column.
    let n_slots = values.len() / n;
    let mut turned = vec![0.0; group * n_slots];
    for (idx, first) in (0..n).step_by(group).enumerate() {
        for (slot, row) in rows().enumerate() {
            for (i, x) in row[first..first + group].iter().enumerate() {
                turned[i * n_slots + slot] = *x;
            }
        }
        let steps = fit(bits, &turned, n_slots);
        for (slot, (row, steps)) in rows().zip(&steps).enumerate() {
            let codes = &mut codes[slot * code_bytes + first * bits / 8..][..group * bits / 8];
            pack(bits, codes, |i| steps.code(row[first + i]));
            steps.store(&mut params[slot * coding.param_bytes(n) + 4 * idx..][..4]);
        }
    }
}

/// The codes of part `part` of some of the 16 bytes of [`pack`].
///
/// # Safety
/// As [`Simd`]: `LANES` bytes at `p`.
#[inline(always)]
pub(super) unsafe fn unpack<S: Simd, const BITS: usize>(p: *const u8, part: usize) -> S::V {
    // SAFETY: the caller's.
    unsafe {
        match (BITS, part) {
            (4, 0) => S::load_codes::<0, 15>(p),
            (4, _) => S::load_codes::<4, 15>(p),
            (_, 0) => S::load_codes::<0, 3>(p),
            (_, 1) => S::load_codes::<2, 3>(p),
            (_, 2) => S::load_codes::<4, 3>(p),
            _ => S::load_codes::<6, 3>(p),
        }
    }
}

/// Heads of slots that follow one another in a page, whose channels have their params in common.
///
/// # Safety
/// As [`decode`].
#[inline(always)]
pub(super) unsafe fn decode_channels<S: Simd>(
    coding: Coding,
    from: (*const u8, *const u8),
    n_rows: usize,
    n: usize,
    to: *mut f32,
    stride: usize,
) {
    // SAFETY: the caller's.
    unsafe {
        match coding.bits() {
            2 => channels::<S, 2>(from, n_rows, n, to, stride),
            _ => channels::<S, 4>(from, n_rows, n, to, stride),
        }
    }
}

/// [`decode_channels`] of a width.
///
/// # Safety
/// As [`decode`].
#[inline(always)]
unsafe fn channels<S: Simd, const BITS: usize>(
    (codes, params): (*const u8, *const u8),
    n_rows: usize,
    n: usize,
    to: *mut f32,
    stride: usize,
) {
    let (n_parts, code_bytes) = (8 / BITS, n * BITS / 8);
    // SAFETY: blocks of 16 bytes make up the codes of n numbers; params are 2 n of 16 bits.
    unsafe {
        let (scales, zeros) = (params.cast::<u16>(), params.cast::<u16>().add(n));
        for block in (0..code_bytes).step_by(16) {
            for part in 0..n_parts {
                for j in (0..16).step_by(S::LANES) {
                    let channel = block * n_parts + part * 16 + j;
                    let scale = S::load_f16(scales.add(channel));
                    let zero = S::load_f16(zeros.add(channel));
                    for row in 0..n_rows {
                        let codes =
                            unpack::<S, BITS>(codes.add(row * code_bytes + block + j), part);
                        S::store(to.add(row * stride + channel), S::fma(codes, scale, zero));
                    }
                }
            }
        }
    }
}

/// Heads whose groups have their own params.
///
/// # Safety
/// As [`decode`].
#[inline(always)]
unsafe fn groups<S: Simd, const BITS: usize>(
    (codes, params): (*const u8, *const u8),
    (n_rows, group): (usize, usize),
    n: usize,
    to: *mut f32,
    stride: usize,
) {
    let (n_parts, code_bytes) = (8 / BITS, n * BITS / 8);
    // SAFETY: blocks of 16 bytes make up the codes of a group; every group has a scale and a zero.
    unsafe {
        for row in 0..n_rows {
            let params = params.add(row * (n / group * 4)).cast::<u16>();
            for first in (0..n).step_by(group) {
                let param =
                    |idx| S::splat(S::f16(params.add(first / group * 2 + idx).read_unaligned()));
                let (scale, zero) = (param(0), param(1));
                for i in (first..first + group).step_by(16 * n_parts) {
                    for j in (0..16).step_by(S::LANES) {
                        let codes = codes.add(row * code_bytes + i * BITS / 8 + j);
                        let to = to.add(row * stride + i + j);
                        for part in 0..n_parts {
                            let codes = unpack::<S, BITS>(codes, part);
                            S::store(to.add(16 * part), S::fma(codes, scale, zero));
                        }
                    }
                }
            }
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
pub(super) unsafe fn decode_codes<S: Simd>(
    coding: Coding,
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
            if coding.code == Code::I8 {
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

/// Heads of slots that follow one another in a page, as f32, coded or not: `n` numbers each, `stride` apart.
///
/// # Safety
/// As [`Simd`]: the codes and params of `n_rows` heads of `n` numbers, and room for them at `to`.
#[inline(always)]
pub(super) unsafe fn decode<S: Simd>(
    coding: Coding,
    (codes, params): (*const u8, *const u8),
    n_rows: usize,
    n: usize,
    to: *mut f32,
    stride: usize,
) {
    let whole = n - n % S::LANES;
    let (code_bytes, param_bytes) = (coding.code_bytes(n), coding.param_bytes(n));
    // SAFETY: vectors lie inside the n numbers of a row; a group is a multiple of 32 of them.
    unsafe {
        let codes = |row: usize| codes.add(row * code_bytes);
        let param = |row: usize, idx: usize| {
            let params = params.add(row * param_bytes).cast::<u16>();
            S::f16(params.add(idx).read_unaligned())
        };
        match coding.code {
            Code::Bf16 => {
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
            Code::F32 => {
                for row in 0..n_rows {
                    std::ptr::copy_nonoverlapping(codes(row).cast(), to.add(row * stride), n);
                }
            }
            Code::I8 | Code::E4m3 => {
                let unit = if coding.code == Code::E4m3 { E4M3_UNIT } else { 1.0 };
                decode_codes::<S>(coding, codes(0), n_rows, n, to, stride);
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
            Code::U4 => {
                groups::<S, 4>((codes(0), params), (n_rows, coding.group(n)), n, to, stride);
            }
            Code::U2 => {
                groups::<S, 2>((codes(0), params), (n_rows, coding.group(n)), n, to, stride);
            }
        }
    }
}

/// What e4m3 numbers are decoded in units of.
pub(super) const E4M3_UNIT: f32 = 256.0;

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

    struct Decode<'a>(Coding, &'a [u8], &'a [u8], &'a mut [f32]);

    impl Kernel for Decode<'_> {
        #[inline(always)]
        unsafe fn run<S: Simd, D: Dot>(self) {
            let Self(coding, codes, params, out) = self;
            // SAFETY: slices of the format's lengths.
            unsafe {
                let from = (codes.as_ptr(), params.as_ptr());
                decode::<S>(coding, from, 1, out.len(), out.as_mut_ptr(), out.len());
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
