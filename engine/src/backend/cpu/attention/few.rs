//! The walk over the slots in decode: a few rows, so that reading K and V is most of the work.
//!
//! Nothing is packed: the numbers of a tile go through the registers once on their way to f32, in the order in
//! which they lie in the page, and every row takes its dot products, and then its weighted sum, from there.
//! Rows go in blocks that share what is loaded; a row's bits do not depend on its block.

use std::ops::Range;

use super::super::pages::Row;
use super::super::simd::{MAX_LANES, Simd};
use super::flash::{Attention, Mask, Meets, Parts, View, exp2_each, weigh};
use super::work::Task;
use super::{Fma, TILE};
use crate::cache::Side;

/// Rows of a block.
const BLOCK: usize = 4;

impl Attention<'_> {
    /// One task of decode.
    ///
    /// # Safety
    /// As the kernel.
    #[inline(always)]
    pub(super) unsafe fn few_rows<S: Simd>(
        &self,
        task: &Task,
        parts: Parts,
        n_rows: usize,
        d: usize,
    ) {
        let (seq, group) = (&self.batch.seqs[task.seq], self.shape.group_size());
        let positions = &self.batch.positions[task.tokens.clone()];
        // SAFETY: parts has room for the rows, a tile of K and of V, and a block of scores.
        unsafe {
            for step in self.steps(task) {
                if step.loads_queries {
                    self.scale_queries(task, step.meets, parts, n_rows, d);
                }
                let (slots, view) =
                    (step.slots, self.view(seq, step.meets, step.bounds, positions));
                if view == View::Nothing {
                    continue;
                }
                let mut scales = [[1.0_f32; TILE]; 2];
                self.read_tile::<S>(task, slots.clone(), parts, &mut scales, d);
                let [k_scales, v_scales] = &scales;
                let is_full = view == View::All && slots.len() == TILE;
                let mask = Mask { slots: &seq.slot_positions[slots.clone()], is_full };
                for first in (0..n_rows).step_by(BLOCK) {
                    let rows = first..n_rows.min(first + BLOCK);
                    let q = parts.q.add(first * d);
                    match rows.len() {
                        1 => dots::<S, 1>(q, parts.k, slots.len(), d, parts.scores),
                        2 => dots::<S, 2>(q, parts.k, slots.len(), d, parts.scores),
                        3 => dots::<S, 3>(q, parts.k, slots.len(), d, parts.scores),
                        _ => dots::<S, BLOCK>(q, parts.k, slots.len(), d, parts.scores),
                    }
                    let mut scale = [0.0; MAX_LANES];
                    let mut sums = [0.0; BLOCK];
                    for (i, row) in rows.clone().enumerate() {
                        let (scores, max) =
                            (parts.scores.add(i * TILE), &mut *parts.row_max.add(row));
                        multiply::<S>(scores, k_scales);
                        let seen = self.seen(seq, step.meets, positions[row / group]);
                        (scale[i], sums[i]) = weigh::<S, Fma>(scores, mask, seen, max);
                        multiply::<S>(scores, v_scales);
                    }
                    exp2_each::<S>(&mut scale);
                    for (i, row) in rows.clone().enumerate() {
                        let sum = parts.row_sum.add(row);
                        *sum = *sum * scale[i] + sums[i];
                    }
                    let (out, scale) = (parts.out.add(first * d), &scale);
                    let (n, scores) = (slots.len(), parts.scores);
                    match rows.len() {
                        1 => add_values::<S, 1>(scores, parts.v, n, d, scale, out),
                        2 => add_values::<S, 2>(scores, parts.v, n, d, scale, out),
                        3 => add_values::<S, 3>(scores, parts.v, n, d, scale, out),
                        _ => add_values::<S, BLOCK>(scores, parts.v, n, d, scale, out),
                    }
                }
            }
        }
    }

    /// K and V of a tile, page by page, and what each is still to be multiplied with.
    #[inline(always)]
    unsafe fn read_tile<S: Simd>(
        &self,
        task: &Task,
        slots: Range<usize>,
        parts: Parts,
        scales: &mut [[f32; TILE]; 2],
        d: usize,
    ) {
        let (seq, head_dim) = (&self.batch.seqs[task.seq], self.shape.head_dim);
        let layout = self.pages.layout.with_sealed(seq.n_sealed);
        let (mut page_idx, mut first) = layout.place(slots.start);
        let mut done = 0;
        while done < slots.len() {
            let page = self.pages.page(seq.page(page_idx, self.layer)).as_ptr();
            let form = self.pages.form(layout.part(page_idx));
            let n = (form.len - first).min(slots.len() - done);
            let [k_scales, v_scales] = scales.each_mut();
            for (side, to, scales) in [(Side::K, parts.k, k_scales), (Side::V, parts.v, v_scales)] {
                // SAFETY: n slots of the page, and their places in the tile.
                unsafe {
                    let (to, scales) = (to.add(done * d), scales.as_mut_ptr().add(done));
                    Row::new(form, page, first, side, task.kv_head).read_run::<S>(
                        n,
                        head_dim,
                        (to, scales),
                        d,
                    );
                    if d > head_dim {
                        (0..n).for_each(|i| to.add(i * d + head_dim).write_bytes(0, d - head_dim));
                    }
                }
            }
            (done, page_idx, first) = (done + n, page_idx + 1, 0);
        }
    }

    /// The task's queries, `[row][d]`, scaled so that scores are exponents of 2.
    #[inline(always)]
    unsafe fn scale_queries(
        &self,
        task: &Task,
        meets: Meets,
        parts: Parts,
        n_rows: usize,
        d: usize,
    ) {
        let head_dim = self.shape.head_dim;
        for r in 0..n_rows {
            // SAFETY: the task's rows.
            unsafe {
                let to = parts.q.add(r * d);
                self.query(task, meets, r, to);
                std::ptr::write_bytes(to.add(head_dim), 0, d - head_dim);
            }
        }
    }
}

/// A row of scores, element by element.
#[inline(always)]
unsafe fn multiply<S: Simd>(scores: *mut f32, scales: &[f32; TILE]) {
    for i in (0..TILE).step_by(S::LANES) {
        // SAFETY: both have TILE elements.
        unsafe {
            let scores = scores.add(i);
            S::store(scores, S::mul(S::load(scores), S::load(scales.as_ptr().add(i))));
        }
    }
}

/// `scores[r][i] = q[r] . keys[i]`
#[inline(always)]
unsafe fn dots<S: Simd, const R: usize>(
    q: *const f32,
    keys: *const f32,
    n: usize,
    d: usize,
    scores: *mut f32,
) {
    // SAFETY: R rows and n keys of d numbers, whole vectors; rows of TILE scores.
    unsafe {
        // Queries of the usual widths stay in registers.
        match d / S::LANES {
            2 => short_dots::<S, R, 2>(q, keys, n, scores),
            4 => short_dots::<S, R, 4>(q, keys, n, scores),
            _ => {
                for i in 0..n {
                    let key = keys.add(i * d);
                    let mut sums = [S::splat(0.0); R];
                    for c in (0..d).step_by(S::LANES) {
                        let k = S::load(key.add(c));
                        for (r, sum) in sums.iter_mut().enumerate() {
                            *sum = S::fma(S::load(q.add(r * d + c)), k, *sum);
                        }
                    }
                    for (r, &sum) in sums.iter().enumerate() {
                        scores.add(r * TILE + i).write(S::sum(sum));
                    }
                }
            }
        }
    }
}

/// [`dots`] of `C` vectors.
#[inline(always)]
unsafe fn short_dots<S: Simd, const R: usize, const C: usize>(
    q: *const f32,
    keys: *const f32,
    n: usize,
    scores: *mut f32,
) {
    let d = C * S::LANES;
    // SAFETY: R rows and n keys of d numbers; rows of TILE scores.
    unsafe {
        let mut rows = [[S::splat(0.0); C]; R];
        for (r, row) in rows.iter_mut().enumerate() {
            for (c, v) in row.iter_mut().enumerate() {
                *v = S::load(q.add(r * d + c * S::LANES));
            }
        }
        for i in 0..n {
            let mut sums = [S::splat(0.0); R];
            for c in 0..C {
                let k = S::load(keys.add(i * d + c * S::LANES));
                for (row, sum) in rows.iter().zip(&mut sums) {
                    *sum = S::fma(row[c], k, *sum);
                }
            }
            for (r, &sum) in sums.iter().enumerate() {
                scores.add(r * TILE + i).write(S::sum(sum));
            }
        }
    }
}

/// `out[r] = out[r] * scale[r] + sum over i of weights[r][i] * values[i]`
#[inline(always)]
unsafe fn add_values<S: Simd, const R: usize>(
    weights: *const f32,
    values: *const f32,
    n: usize,
    d: usize,
    scale: &[f32; MAX_LANES],
    out: *mut f32,
) {
    // SAFETY: the columns are d, a multiple of two vectors.
    unsafe {
        let mut c = 0;
        while c < d {
            // As many sums as there are registers for.
            if S::LANES == MAX_LANES && c + 4 * S::LANES <= d {
                columns::<S, R, 4>(weights, values.add(c), n, d, scale, out.add(c));
                c += 4 * S::LANES;
            } else {
                columns::<S, R, 2>(weights, values.add(c), n, d, scale, out.add(c));
                c += 2 * S::LANES;
            }
        }
    }
}

/// [`add_values`] in `C` vectors of columns.
#[inline(always)]
unsafe fn columns<S: Simd, const R: usize, const C: usize>(
    weights: *const f32,
    values: *const f32,
    n: usize,
    d: usize,
    scale: &[f32; MAX_LANES],
    out: *mut f32,
) {
    // SAFETY: rows of d numbers, of which these columns are the task's.
    unsafe {
        let mut sums = [[S::splat(0.0); C]; R];
        for (r, sums) in sums.iter_mut().enumerate() {
            for (c, sum) in sums.iter_mut().enumerate() {
                *sum = S::mul(S::load(out.add(r * d + c * S::LANES)), S::splat(scale[r]));
            }
        }
        for i in 0..n {
            let mut v = [S::splat(0.0); C];
            for (c, v) in v.iter_mut().enumerate() {
                *v = S::load(values.add(i * d + c * S::LANES));
            }
            for (r, sums) in sums.iter_mut().enumerate() {
                let weight = S::splat(*weights.add(r * TILE + i));
                for (sum, &v) in sums.iter_mut().zip(&v) {
                    *sum = S::fma(weight, v, *sum);
                }
            }
        }
        for (r, sums) in sums.iter().enumerate() {
            for (c, &sum) in sums.iter().enumerate() {
                S::store(out.add(r * d + c * S::LANES), sum);
            }
        }
    }
}
