//! Attention mass: how much some rows of a sequence look at each of its slots.
//!
//! Three regions: the exponent of every (row, head, slot), one task a key head and run of slots, so that K is
//! read once; the maximum and sum of every (row, head); for every slot the sum over both, in the order of rows. Every
//! number is made by one task in a fixed order, whichever rows come together.

use std::ops::Range;

use super::super::kv::{CpuPages, Row};
use super::super::mem::Shared;
use super::super::simd::{Dot, Kernel, MAX_LANES, Simd, exp2_each};
use super::super::team::Tasks;
use crate::backend::{Batch, MassRows, Table};
use crate::store::{AttentionShape, Run, Side};

/// Pairs of a row and a query head that a loaded key meets at once.
const PAIRS: usize = 8;
/// Slots of a task.
pub(in super::super) const RUN: usize = 512;

/// Rows whose mass is taken together at most: `exponents` has room for each with each slot.
const MAX_ROWS: usize = 64;

/// The same rows, as many at a time as may.
pub(in super::super) fn runs(of: MassRows) -> impl Iterator<Item = MassRows> {
    (0..of.n_rows).step_by(MAX_ROWS).map(move |start| MassRows {
        first_row: of.first_row + start,
        n_rows: MAX_ROWS.min(of.n_rows - start),
        ..of
    })
}

/// Which part of the work a region does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) enum Part {
    /// `exponents`, by key head and run of slots.
    Exponents,
    /// `sums`, by row and head.
    Sums,
    /// The mass, by run of slots.
    Totals,
}

/// Mass of the slots of one sequence.
#[derive(Clone, Copy)]
pub(in super::super) struct AttentionMass<'a> {
    pub(in super::super) part: Part,
    pub(in super::super) batch: &'a Batch<'a>,
    pub(in super::super) of: MassRows,
    pub(in super::super) shape: AttentionShape,
    pub(in super::super) layer: usize,
    pub(in super::super) window: Option<usize>,
    pub(in super::super) q: &'a [f32],
    pub(in super::super) pages: &'a CpuPages,
    /// `[row][query head][slot]`, exponents of 2; minus infinity where the row does not see the slot.
    pub(in super::super) exponents: Shared<'a, f32>,
    /// `[row][query head]`: maximum, then 1 / (sum * heads).
    pub(in super::super) sums: Shared<'a, [f32; 2]>,
    /// `[slot]`, added to.
    pub(in super::super) mass: Shared<'a, f32>,
    pub(in super::super) tasks: &'a Tasks,
    pub(in super::super) thread_idx: usize,
}

impl AttentionMass<'_> {
    fn kv_len(&self) -> usize {
        self.batch.seqs[self.of.seq_idx].kv_len()
    }

    /// (row, head) pairs.
    fn n_heads(&self) -> usize {
        self.of.n_rows * self.shape.n_q_heads
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
            Part::Totals => kv_len.div_ceil(RUN),
        }
    }
}

impl Kernel for AttentionMass<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd, D: Dot>(self) {
        while let Some(task) = self.tasks.next(self.thread_idx) {
            // SAFETY: tasks write disjoint parts; buffers were sized for the batch.
            unsafe {
                match self.part {
                    Part::Exponents => self.exponents_of::<S>(task),
                    Part::Sums => self.sum_of::<S>(task),
                    Part::Totals => self.totals_of::<S>(task),
                }
            }
        }
    }
}

impl AttentionMass<'_> {
    #[inline(always)]
    unsafe fn exponents_of<S: Simd>(&self, task: usize) {
        let kv_len = self.kv_len();
        let kv_head = task % self.shape.n_kv_heads;
        let first = task / self.shape.n_kv_heads * RUN;
        let width = self.shape.head_dim.next_multiple_of(S::LANES);
        let mut keys = vec![0.0; S::LANES * width];
        let mut turned = vec![0.0; width * S::LANES];
        for start in (first..kv_len.min(first + RUN)).step_by(S::LANES) {
            let slots = start..kv_len.min(start + S::LANES);
            // SAFETY: slots in use; the buffers have room for LANES keys of `width` numbers.
            unsafe {
                self.read_keys::<S>(kv_head, slots.clone(), &mut keys);
                turn::<S>(&keys, &mut turned);
                self.products::<S>(kv_head, slots, &turned);
            }
        }
    }

    /// `[slot][width]`, the rest of each row as it is: zeros.
    #[inline(always)]
    unsafe fn read_keys<S: Simd>(&self, kv_head: usize, slots: Range<usize>, keys: &mut [f32]) {
        let seq = &self.batch.seqs[self.of.seq_idx];
        let (width, d) = (keys.len() / S::LANES, self.shape.head_dim);
        let layout = self.pages.layout.with_sealed(seq.n_sealed);
        let mut keys = keys.chunks_exact_mut(width);
        for Run { page_idx, part, first, slots } in layout.runs(slots) {
            let page = self.pages.page(seq.page(page_idx, self.layer)).as_ptr();
            for (slot, key) in (first..first + slots.len()).zip(&mut keys) {
                let row = Row::new(self.pages.form(part), page, slot, Side::K, kv_head);
                // SAFETY: a slot in use; room for its d numbers.
                unsafe { row.read::<S>(1, d, key.as_mut_ptr()) };
            }
        }
    }

    /// Exponents of some slots, whose keys are `[d][slot]`, for every row and query head of a key head.
    #[inline(always)]
    unsafe fn products<S: Simd>(&self, kv_head: usize, slots: Range<usize>, keys: &[f32]) {
        let (group, n_heads, d) =
            (self.shape.group_size(), self.shape.n_q_heads, self.shape.head_dim);
        let kv_len = self.kv_len();
        let scale = std::f32::consts::LOG2_E / (d as f32).sqrt();
        let window = self.window.map_or(u64::MAX, |window| window as u64);
        let positions = &self.batch.seqs[self.of.seq_idx].positions()[slots.clone()];
        let n_pairs = self.of.n_rows * group;
        for start in (0..n_pairs).step_by(PAIRS) {
            // The last ones once more where fewer are left.
            let pairs: [(usize, usize); PAIRS] = std::array::from_fn(|i| {
                let pair = (start + i).min(n_pairs - 1);
                (pair / group, kv_head * group + pair % group)
            });
            let q = pairs.map(|(row, head)| {
                let row = self.of.first_row + row;
                self.q.as_ptr().wrapping_add((row * n_heads + head) * d)
            });
            // SAFETY: d numbers of each query head, LANES of each of the d rows of keys.
            let products = unsafe {
                let mut sums = [S::splat(0.0); PAIRS];
                for i in 0..d {
                    let key = S::load(keys.as_ptr().add(i * S::LANES));
                    for (sum, q) in sums.iter_mut().zip(q) {
                        *sum = S::fma(key, S::splat(*q.add(i)), *sum);
                    }
                }
                sums
            };
            for (product, (row, head)) in products.into_iter().zip(pairs) {
                let mut exponents = [0.0_f32; MAX_LANES];
                // SAFETY: room for a vector.
                unsafe { S::store(exponents.as_mut_ptr(), S::mul(product, S::splat(scale))) };
                let at = self.batch.positions[self.of.first_row + row];
                for (exponent, &position) in exponents.iter_mut().zip(positions) {
                    let sees = (position <= at) & (u64::from(at.wrapping_sub(position)) < window);
                    *exponent = if sees { *exponent } else { f32::NEG_INFINITY };
                }
                let idx = (row * n_heads + head) * kv_len + slots.start;
                // SAFETY: inside the exponents, which only this task writes here.
                unsafe {
                    let to = self.exponents.get().add(idx);
                    std::ptr::copy_nonoverlapping(exponents.as_ptr(), to, slots.len());
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
        let mut sums = [0.0_f64; MAX_LANES];
        for run in row.chunks(MAX_LANES) {
            let mut weights = [f32::NEG_INFINITY; MAX_LANES];
            for (weight, exponent) in weights.iter_mut().zip(run) {
                *weight = exponent - base;
            }
            // SAFETY: arithmetic.
            unsafe { exp2_each::<S>(&mut weights) };
            sums.iter_mut().zip(weights).for_each(|(sum, weight)| *sum += f64::from(weight));
        }
        let sum: f64 = sums.iter().sum();
        let n_heads = self.shape.n_q_heads as f64;
        let factor = if sum == 0.0 { 0.0 } else { (1.0 / (sum * n_heads)) as f32 };
        // SAFETY: inside the sums.
        unsafe { self.sums.get().add(pair).write([base, factor]) };
    }

    #[inline(always)]
    unsafe fn totals_of<S: Simd>(&self, task: usize) {
        let kv_len = self.kv_len();
        let first = task * RUN;
        for start in (first..kv_len.min(first + RUN)).step_by(MAX_LANES) {
            let n = MAX_LANES.min(kv_len - start);
            let mut totals = [0.0_f32; MAX_LANES];
            // SAFETY: inside the mass, of which only this task touches these.
            unsafe {
                let from = self.mass.get().add(start);
                std::ptr::copy_nonoverlapping(from, totals.as_mut_ptr(), n);
            }
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
                for (total, weight) in totals.iter_mut().zip(&weights) {
                    *total += weight * factor;
                }
            }
            // SAFETY: as above.
            unsafe {
                let to = self.mass.get().add(start);
                std::ptr::copy_nonoverlapping(totals.as_ptr(), to, n);
            }
        }
    }
}

/// Lengths of the keys of a layer, the mean over the key heads. Rotations, which there are two of, keep a length.
#[derive(Clone, Copy)]
pub(in super::super) struct KeyNorms<'a> {
    pub(in super::super) pages: &'a CpuPages,
    pub(in super::super) table: Table<'a>,
    pub(in super::super) layer: usize,
    pub(in super::super) n_slots: usize,
    /// `[slot]`
    pub(in super::super) out: Shared<'a, f32>,
}

impl Kernel for KeyNorms<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd, D: Dot>(self) {
        let layout = self.pages.layout;
        let (n_heads, d) = (layout.n_kv_heads, layout.head_dim);
        let mut key = vec![0.0_f32; d];
        for Run { page_idx, part, first, slots } in layout.runs(0..self.n_slots) {
            let page = self.pages.page(self.table.page(page_idx, self.layer)).as_ptr();
            for (place, slot) in (first..).zip(slots) {
                let mut sum = 0.0;
                for head in 0..n_heads {
                    let row = Row::new(self.pages.form(part), page, place, Side::K, head);
                    // SAFETY: a slot in use; room for its d numbers.
                    unsafe { row.read::<S>(1, d, key.as_mut_ptr()) };
                    sum += key.iter().map(|x| x * x).sum::<f32>().sqrt();
                }
                // SAFETY: room for n_slots.
                unsafe { self.out.get().add(slot).write(sum / n_heads as f32) };
            }
        }
    }
}

/// Keys `[slot][width]` to `[width][slot]`.
#[inline(always)]
unsafe fn turn<S: Simd>(keys: &[f32], turned: &mut [f32]) {
    let width = keys.len() / S::LANES;
    for column in (0..width).step_by(S::LANES) {
        // SAFETY: a block of LANES rows and columns of either.
        unsafe {
            let mut block = [S::splat(0.0); MAX_LANES];
            for (slot, row) in block[..S::LANES].iter_mut().enumerate() {
                *row = S::load(keys.as_ptr().add(slot * width + column));
            }
            S::transpose(&mut block);
            for (i, row) in block[..S::LANES].iter().enumerate() {
                S::store(turned.as_mut_ptr().add((column + i) * S::LANES), *row);
            }
        }
    }
}
