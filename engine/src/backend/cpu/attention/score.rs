//! Token scores: how much some rows of a sequence look at each of its slots.
//!
//! Three regions: the exponent of every (row, head, slot), one task a key head and run of slots, so that K is
//! read once; the maximum and sum of every (row, head); the mean over both for every slot. Every number is
//! made by one task in a fixed order.

use super::super::mem::Shared;
use super::super::pages::{CpuPages, Row};
use super::super::simd::{Dot, Kernel, MAX_LANES, Simd};
use super::super::team::Tasks;
use super::flash::exp2_each;
use crate::backend::{AttentionShape, Batch, Score};
use crate::cache::Side;

/// Slots of a task.
pub(in super::super) const RUN: usize = 512;

/// Which part of the work a region does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) enum Part {
    /// `exponents`, by key head and run of slots.
    Exponents,
    /// `sums`, by row and head.
    Sums,
    /// The scores, by run of slots.
    Means,
}

/// Scores of the slots of one sequence.
#[derive(Clone, Copy)]
pub(in super::super) struct TokenScore<'a> {
    pub(in super::super) part: Part,
    pub(in super::super) batch: &'a Batch<'a>,
    pub(in super::super) score: Score,
    pub(in super::super) shape: AttentionShape,
    pub(in super::super) layer: usize,
    pub(in super::super) window: Option<usize>,
    pub(in super::super) q: Shared<f32>,
    pub(in super::super) pages: &'a CpuPages,
    /// `[score row][query head][slot]`, exponents of 2; minus infinity where the row does not see the slot.
    pub(in super::super) exponents: Shared<f32>,
    /// `[score row][query head]`: maximum, then 1 / (sum * rows * heads).
    pub(in super::super) sums: Shared<[f32; 2]>,
    /// `[slot]`
    pub(in super::super) scores: Shared<f32>,
    pub(in super::super) tasks: &'a Tasks,
    pub(in super::super) thread_idx: usize,
}

impl TokenScore<'_> {
    fn kv_len(&self) -> usize {
        self.batch.seqs[self.score.seq_idx].kv_len()
    }

    /// (row, head) pairs.
    fn n_heads(&self) -> usize {
        self.score.n_rows * self.shape.n_q_heads
    }

    /// Tasks of a part.
    pub(in super::super) fn n_tasks(
        part: Part,
        shape: AttentionShape,
        n_rows: usize,
        kv_len: usize,
    ) -> usize {
        match part {
            Part::Exponents => shape.n_kv_heads * kv_len.div_ceil(RUN),
            Part::Sums => n_rows * shape.n_q_heads,
            Part::Means => kv_len.div_ceil(RUN),
        }
    }
}

impl Kernel for TokenScore<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd, D: Dot>(self) {
        while let Some(task) = self.tasks.next(self.thread_idx) {
            // SAFETY: tasks write disjoint parts; buffers were sized for the batch.
            unsafe {
                match self.part {
                    Part::Exponents => self.exponents_of::<S>(task),
                    Part::Sums => self.sum_of::<S>(task),
                    Part::Means => self.means_of::<S>(task),
                }
            }
        }
    }
}

impl TokenScore<'_> {
    #[inline(always)]
    unsafe fn exponents_of<S: Simd>(&self, task: usize) {
        let (shape, kv_len) = (self.shape, self.kv_len());
        let (group, d) = (shape.group_size(), shape.head_dim);
        let kv_head = task % shape.n_kv_heads;
        let first = task / shape.n_kv_heads * RUN;
        let seq = &self.batch.seqs[self.score.seq_idx];
        let mut key = vec![0.0; d];
        let scale = std::f32::consts::LOG2_E / (d as f32).sqrt();
        let window = self.window.map_or(u64::MAX, |window| window as u64);
        for slot in first..kv_len.min(first + RUN) {
            let position = seq.slot_positions[slot];
            let (page_idx, place) = self.pages.layout.place(slot);
            let (form, page) = (self.pages.form(page_idx), seq.page(page_idx, self.layer));
            let row = Row::new(form, self.pages.page(page).as_ptr(), place, Side::K, kv_head);
            // SAFETY: a slot in use; room for its d numbers.
            unsafe { row.read::<S>(d, key.as_mut_ptr()) };
            for row in 0..self.score.n_rows {
                let batch_row = self.score.first_row + row;
                let at = self.batch.positions[batch_row];
                let sees = (position <= at) & (u64::from(at.wrapping_sub(position)) < window);
                for head in kv_head * group..(kv_head + 1) * group {
                    let exponent = match sees {
                        // SAFETY: the row's query head and the slot's key head, d numbers each.
                        true => unsafe {
                            let q = self.q.get().add((batch_row * shape.n_q_heads + head) * d);
                            dot::<S>(key.as_ptr(), q, d) * scale
                        },
                        false => f32::NEG_INFINITY,
                    };
                    let idx = (row * shape.n_q_heads + head) * kv_len + slot;
                    // SAFETY: inside the exponents.
                    unsafe { self.exponents.get().add(idx).write(exponent) };
                }
            }
        }
    }

    /// The maximum of a row and head, and the factor that makes its weights shares of the mean.
    #[inline(always)]
    unsafe fn sum_of<S: Simd>(&self, pair: usize) {
        let kv_len = self.kv_len();
        // SAFETY: a row of the exponents.
        let row =
            unsafe { std::slice::from_raw_parts(self.exponents.get().add(pair * kv_len), kv_len) };
        let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let base = if max == f32::NEG_INFINITY { 0.0 } else { max };
        let mut sum = 0.0_f64;
        for run in row.chunks(MAX_LANES) {
            let mut weights = [f32::NEG_INFINITY; MAX_LANES];
            for (weight, exponent) in weights.iter_mut().zip(run) {
                *weight = exponent - base;
            }
            // SAFETY: arithmetic.
            unsafe { exp2_each::<S>(&mut weights) };
            sum += f64::from(weights.iter().sum::<f32>());
        }
        let factor = if sum == 0.0 { 0.0 } else { (1.0 / (sum * self.n_heads() as f64)) as f32 };
        // SAFETY: inside the sums.
        unsafe { self.sums.get().add(pair).write([base, factor]) };
    }

    #[inline(always)]
    unsafe fn means_of<S: Simd>(&self, task: usize) {
        let kv_len = self.kv_len();
        let first = task * RUN;
        for start in (first..kv_len.min(first + RUN)).step_by(MAX_LANES) {
            let n = MAX_LANES.min(kv_len - start);
            let mut mean = [0.0_f32; MAX_LANES];
            for pair in 0..self.n_heads() {
                // SAFETY: the pair's sums and exponents, n of them from start on.
                let ([base, factor], row) = unsafe {
                    let row = self.exponents.get().add(pair * kv_len + start);
                    (*self.sums.get().add(pair), std::slice::from_raw_parts(row, n))
                };
                let mut weights = [f32::NEG_INFINITY; MAX_LANES];
                for (weight, exponent) in weights.iter_mut().zip(row) {
                    *weight = exponent - base;
                }
                // SAFETY: arithmetic.
                unsafe { exp2_each::<S>(&mut weights) };
                for (mean, weight) in mean.iter_mut().zip(&weights) {
                    *mean += weight * factor;
                }
            }
            for (i, mean) in mean[..n].iter().enumerate() {
                // SAFETY: inside the scores.
                unsafe { self.scores.get().add(start + i).write(*mean) };
            }
        }
    }
}

/// `k . q`, `n` numbers each.
#[inline(always)]
unsafe fn dot<S: Simd>(k: *const f32, q: *const f32, n: usize) -> f32 {
    // SAFETY: n numbers behind each pointer.
    unsafe {
        let whole = n - n % S::LANES;
        let mut sum = S::splat(0.0);
        for i in (0..whole).step_by(S::LANES) {
            sum = S::fma(S::load(k.add(i)), S::load(q.add(i)), sum);
        }
        let rest = (whole..n).map(|i| *k.add(i) * *q.add(i));
        S::sum(sum) + rest.sum::<f32>()
    }
}
