//! RMS norm and rotation: the row-wise arithmetic around the projections.

use super::simd::Simd;
use crate::backend::{Batch, Seq};

/// A norm's weight and epsilon.
#[derive(Clone, Copy, Debug)]
pub(super) struct Norm<'a> {
    pub(super) weight: &'a [f32],
    pub(super) eps: f32,
}

/// `out = x / sqrt(mean(x^2) + eps) * weight`; `out` may be `x`.
///
/// # Safety
/// As [`Simd`]; both pointers have as many elements as the weight.
#[inline(always)]
pub(super) unsafe fn rms_norm<S: Simd>(norm: Norm<'_>, x: *const f32, out: *mut f32) {
    let k = norm.weight.len();
    // SAFETY: indices stay below k.
    unsafe {
        // Two chains; lanes are added by a fixed tree, the tail comes last.
        let mut sums = [S::splat(0.0); 2];
        let mut i = 0;
        while i + S::LANES <= k {
            let v = S::load(x.add(i));
            let sum = &mut sums[i / S::LANES % 2];
            *sum = S::fma(v, v, *sum);
            i += S::LANES;
        }
        let mut sum = S::sum(S::add(sums[0], sums[1]));
        while i < k {
            sum += *x.add(i) * *x.add(i);
            i += 1;
        }
        let scale = 1.0 / (sum / k as f32 + norm.eps).sqrt();
        for i in 0..k {
            out.add(i).write(*x.add(i) * scale * norm.weight[i]);
        }
    }
}

/// Cosines and sines of a batch, `[row][head_dim / 2]` each.
#[derive(Debug, Default)]
pub(super) struct Rotation {
    half: usize,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl Rotation {
    /// Computes the angles of every row, in f64: a position of millions is as exact as position 4.
    pub(super) fn fill(&mut self, batch: &Batch<'_>, head_dim: usize) {
        self.fill_by(batch, head_dim, |seq, position| (f64::from(position), seq.rope_scale));
    }

    /// What takes queries from their positions to where they meet the sinks; nothing without sequences that roll.
    pub(super) fn fill_for_sinks(&mut self, batch: &Batch<'_>, head_dim: usize) {
        self.cos.clear();
        self.sin.clear();
        if batch.seqs.iter().any(|seq| seq.rule.sinks > 0) {
            self.fill_by(batch, head_dim, |seq, position| {
                let place = seq.rule.place(position);
                (f64::from(place) - f64::from(position), 1.0)
            });
        }
    }

    /// `by` gives the position and the factor of a row.
    fn fill_by(
        &mut self,
        batch: &Batch<'_>,
        head_dim: usize,
        by: impl Fn(&Seq<'_>, u32) -> (f64, f64),
    ) {
        self.half = head_dim / 2;
        self.cos.clear();
        self.sin.clear();
        for seq in &batch.seqs {
            debug_assert_eq!(seq.inv_freq.len(), self.half, "one frequency for each pair");
            for &position in &batch.positions[seq.rows.clone()] {
                let (position, scale) = by(seq, position);
                for &freq in seq.inv_freq {
                    let (sin, cos) = (position * freq).sin_cos();
                    self.cos.push((cos * scale) as f32);
                    self.sin.push((sin * scale) as f32);
                }
            }
        }
    }

    /// Rotates the pairs `(i, i + head_dim / 2)` of a head.
    ///
    /// # Safety
    /// `head` has `head_dim` elements.
    #[inline(always)]
    pub(super) unsafe fn rotate(&self, row: usize, head: *mut f32) {
        let half = self.half;
        let (cos, sin) = (&self.cos[row * half..][..half], &self.sin[row * half..][..half]);
        // SAFETY: the two halves do not overlap and make up the head.
        let (first, second) = unsafe {
            let (first, second) = (head, head.add(half));
            (
                std::slice::from_raw_parts_mut(first, half),
                std::slice::from_raw_parts_mut(second, half),
            )
        };
        for i in 0..half {
            let (a, b) = (first[i], second[i]);
            first[i] = a * cos[i] - b * sin[i];
            second[i] = b * cos[i] + a * sin[i];
        }
    }
}
