//! Ranges of codes of 4 and 2 bits: a scale and a zero, of some numbers or of the best fit to them.

use half::f16;

use super::super::simd::f16_value;

/// What codes that share a scale and a zero stand for: `zero + scale * code`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Steps {
    pub(super) scale: f16,
    pub(super) zero: f16,
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
    pub(super) fn whole(bits: usize, values: &[f32]) -> Self {
        let (mut min, mut max, mut poison) = (f32::INFINITY, f32::NEG_INFINITY, 0.0);
        for x in values {
            (min, max, poison) = (min.min(*x), max.max(*x), poison + x * 0.0);
        }
        Self::new(bits, min, max + poison)
    }

    /// Where they are kept: the scale, then the zero.
    #[inline(always)]
    pub(super) fn store(self, params: &mut [u8]) {
        params[..2].copy_from_slice(&self.scale.to_le_bytes());
        params[2..].copy_from_slice(&self.zero.to_le_bytes());
    }

    #[inline(always)]
    pub(super) fn code(self, x: f32) -> u8 {
        ((x - self.from) * self.inverse).round_ties_even().clamp(0.0, self.most) as u8
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
pub(super) fn fit(bits: usize, values: &[f32], n: usize) -> Vec<Steps> {
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
