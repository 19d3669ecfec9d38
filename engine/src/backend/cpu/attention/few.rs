//! The walk over the slots in decode: a few rows, so that reading K and V is most of the work.
//!
//! Nothing is packed, and where all rows fit into one block nothing is even decoded to memory: every row takes its
//! dot products, and then its weighted sum, from numbers that go from the page through the registers
//! ([`kv`]). More rows take them from a tile that is decoded once. Both give the same bits: a
//! row's do not depend on its block, nor on who else is in the batch.

use std::ops::Range;

use super::super::kv::{self, CHUNK, Numbers, Row, Walk};
use super::super::simd::{Dot, Kernel, MAX_LANES, Simd, exp2_each};
use super::flash::{Attention, Mask, Meets, Parts, View, weigh};
use super::work::Task;
use super::{Fma, TILE};
use crate::store::{Run, Runs, Side};

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
        let is_decoded = n_rows > BLOCK || d > self.shape.head_dim;
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
                let tile = Tile { attention: self, task, slots: slots.clone(), is_decoded };
                let mut scales = [[1.0_f32; TILE]; 2];
                tile.read::<S>(parts, &mut scales, d);
                let [k_scales, v_scales] = &scales;
                let is_full = view == View::All && slots.len() == TILE;
                let mask = Mask { slots: &seq.positions()[slots], is_full };
                for first in (0..n_rows).step_by(BLOCK) {
                    let rows = first..n_rows.min(first + BLOCK);
                    let (q, out) = (parts.q.add(first * d), parts.out.add(first * d));
                    let (n_rows, scores) = (rows.len(), parts.scores);
                    tile.walk::<S>(Side::K, parts.k, d, Dots { q, n_rows, d, scores });
                    let mut scale = [0.0; MAX_LANES];
                    let mut sums = [0.0; BLOCK];
                    for (i, row) in rows.clone().enumerate() {
                        let (scores, max) = (scores.add(i * TILE), &mut *parts.row_max.add(row));
                        multiply::<S>(scores, k_scales);
                        let seen = self.seen(seq, step.meets, positions[row / group]);
                        (scale[i], sums[i]) = weigh::<S, Fma>(scores, mask, seen, max);
                        multiply::<S>(scores, v_scales);
                    }
                    exp2_each::<S>(&mut scale);
                    for (i, row) in rows.enumerate() {
                        let sum = parts.row_sum.add(row);
                        *sum = *sum * scale[i] + sums[i];
                        for c in (0..d).step_by(S::LANES) {
                            let out = out.add(i * d + c);
                            S::store(out, S::mul(S::load(out), S::splat(scale[i])));
                        }
                    }
                    tile.walk::<S>(
                        Side::V,
                        parts.v,
                        d,
                        AddValues { weights: scores, n_rows, d, out },
                    );
                }
            }
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

/// Slots that are weighed together, page by page.
struct Tile<'a> {
    attention: &'a Attention<'a>,
    task: &'a Task,
    slots: Range<usize>,
    /// Their numbers are decoded to memory first.
    is_decoded: bool,
}

impl Tile<'_> {
    /// Its slots page by page.
    #[inline(always)]
    fn runs(&self) -> Runs {
        let n_sealed = self.attention.batch.seqs[self.task.seq].n_sealed;
        self.attention.pages.layout.with_sealed(n_sealed).runs(self.slots.clone())
    }

    /// The first slot of a run, the place of that in the tile, and how many slots there are.
    #[inline(always)]
    fn row(&self, run: &Run, side: Side) -> (Row, usize, usize) {
        let Attention { batch, pages, layer, .. } = *self.attention;
        let page = pages.page(batch.seqs[self.task.seq].page(run.page_idx, layer)).as_ptr();
        let row = Row::new(pages.form(run.part), page, run.first, side, self.task.kv_head);
        (row, run.slots.start - self.slots.start, run.slots.len())
    }

    /// What each slot's K and V have yet to be multiplied with; and if they are to be decoded, K and V.
    ///
    /// # Safety
    /// As [`Simd`]; `parts` has room for a tile.
    #[inline(always)]
    unsafe fn read<S: Simd>(&self, parts: Parts, scales: &mut [[f32; TILE]; 2], d: usize) {
        let head_dim = self.attention.shape.head_dim;
        let [k_scales, v_scales] = scales.each_mut();
        for (side, to, scales) in [(Side::K, parts.k, k_scales), (Side::V, parts.v, v_scales)] {
            for run in self.runs() {
                let (row, at, n) = self.row(&run, side);
                // SAFETY: n slots of the page, and their places in the tile.
                unsafe {
                    row.scales::<S>(n, scales.as_mut_ptr().add(at));
                    if self.is_decoded {
                        let to = to.add(at * d);
                        row.read_unscaled::<S>(n, head_dim, to, d);
                        (0..n).for_each(|i| to.add(i * d + head_dim).write_bytes(0, d - head_dim));
                    }
                }
            }
        }
    }

    /// Walks over keys or values, which are in `numbers` if they were decoded; else it is scratch.
    ///
    /// # Safety
    /// As [`Simd`]; room for a tile.
    #[inline(always)]
    unsafe fn walk<S: Simd>(&self, side: Side, numbers: *mut f32, d: usize, job: impl Walk) {
        // SAFETY: the slots of a run, and their places in the tile.
        unsafe {
            if self.is_decoded {
                return job.walk::<S>(kv::decoded(numbers, d), 0, self.slots.len());
            }
            for run in self.runs() {
                let (row, at, n) = self.row(&run, side);
                row.walk::<S>(at, n, d, numbers, job);
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
#[derive(Clone, Copy)]
struct Dots {
    /// `[row][d]`
    q: *const f32,
    n_rows: usize,
    d: usize,
    /// `[row][TILE]`
    scores: *mut f32,
}

impl Walk for Dots {
    #[inline(always)]
    unsafe fn walk<S: Simd>(self, keys: impl Numbers, first: usize, n: usize) {
        // SAFETY: the caller's.
        unsafe {
            match self.n_rows {
                1 => S::enter::<Fma, _>(Keys::<_, 1> { dots: self, keys, first, n }),
                2 => S::enter::<Fma, _>(Keys::<_, 2> { dots: self, keys, first, n }),
                3 => S::enter::<Fma, _>(Keys::<_, 3> { dots: self, keys, first, n }),
                _ => S::enter::<Fma, _>(Keys::<_, BLOCK> { dots: self, keys, first, n }),
            }
        }
    }
}

/// [`Dots`] of `R` rows with `n` keys, whose scores are those from `first` on: a function of its own for each kind of
/// numbers.
struct Keys<N, const R: usize> {
    dots: Dots,
    keys: N,
    first: usize,
    n: usize,
}

impl<N: Numbers, const R: usize> Kernel for Keys<N, R> {
    #[inline(always)]
    unsafe fn run<S: Simd, D: Dot>(self) {
        // As many keys side by side as there are registers for: a query is loaded once for all of them.
        let together = match R {
            _ if S::LANES == MAX_LANES => 4,
            1 | 2 => 4,
            3 if !N::HAS_PARAMS => 3,
            _ => 2,
        };
        let whole = self.n - self.n % together;
        // SAFETY: R rows and n keys of d numbers; rows of TILE scores.
        unsafe {
            for i in (0..whole).step_by(together) {
                match together {
                    4 => self.keys::<S, 4>(i),
                    3 => self.keys::<S, 3>(i),
                    _ => self.keys::<S, 2>(i),
                }
            }
            for i in whole..self.n {
                self.keys::<S, 1>(i);
            }
        }
    }
}

impl<N: Numbers, const R: usize> Keys<N, R> {
    /// `T` keys from `slot` on. (Loops, not closures: these would not be compiled for the vectors.)
    #[inline(always)]
    unsafe fn keys<S: Simd, const T: usize>(&self, slot: usize) {
        let Dots { q, d, scores, .. } = self.dots;
        // SAFETY: the caller's.
        unsafe {
            let mut sums = [[S::splat(0.0); T]; R];
            for idx in 0..d / CHUNK {
                let mut chunks = [self.keys.chunk::<S>(slot, idx); T];
                for (t, chunk) in chunks.iter_mut().enumerate().skip(1) {
                    *chunk = self.keys.chunk::<S>(slot + t, idx);
                }
                for v in 0..CHUNK / S::LANES {
                    let mut numbers = [S::splat(0.0); T];
                    for (number, &chunk) in numbers.iter_mut().zip(&chunks) {
                        *number = N::load::<S>(chunk, v);
                    }
                    for (r, sums) in sums.iter_mut().enumerate() {
                        let q = S::load(q.add(r * d + idx * CHUNK + v * S::LANES));
                        for (sum, &k) in sums.iter_mut().zip(&numbers) {
                            *sum = S::fma(q, k, *sum);
                        }
                    }
                }
            }
            for (r, sums) in sums.iter().enumerate() {
                for (t, &sum) in sums.iter().enumerate() {
                    scores.add(r * TILE + self.first + slot + t).write(S::sum(sum));
                }
            }
        }
    }
}

/// `out[r] += sum over i of weights[r][i] * values[i]`
#[derive(Clone, Copy)]
struct AddValues {
    /// `[row][TILE]`
    weights: *const f32,
    n_rows: usize,
    d: usize,
    /// `[row][d]`
    out: *mut f32,
}

impl Walk for AddValues {
    #[inline(always)]
    unsafe fn walk<S: Simd>(self, values: impl Numbers, first: usize, n: usize) {
        // SAFETY: the caller's.
        unsafe {
            match self.n_rows {
                1 => S::enter::<Fma, _>(Values::<_, 1> { add: self, values, first, n }),
                2 => S::enter::<Fma, _>(Values::<_, 2> { add: self, values, first, n }),
                3 => S::enter::<Fma, _>(Values::<_, 3> { add: self, values, first, n }),
                _ => S::enter::<Fma, _>(Values::<_, BLOCK> { add: self, values, first, n }),
            }
        }
    }
}

/// [`AddValues`] of `R` rows and `n` values, whose weights are those from `first` on.
struct Values<N, const R: usize> {
    add: AddValues,
    values: N,
    first: usize,
    n: usize,
}

impl<N: Numbers, const R: usize> Kernel for Values<N, R> {
    #[inline(always)]
    unsafe fn run<S: Simd, D: Dot>(self) {
        // SAFETY: columns of d.
        unsafe {
            for idx in 0..self.add.d / CHUNK {
                // As many sums as there are registers for.
                if S::LANES == MAX_LANES {
                    self.columns::<S, 2>(idx, 0);
                } else if R <= 2 {
                    self.columns::<S, 4>(idx, 0);
                } else {
                    self.columns::<S, 2>(idx, 0);
                    self.columns::<S, 2>(idx, 2);
                }
            }
        }
    }
}

impl<N: Numbers, const R: usize> Values<N, R> {
    /// `C` vectors of a chunk, from `v` on.
    #[inline(always)]
    unsafe fn columns<S: Simd, const C: usize>(&self, idx: usize, v: usize) {
        let AddValues { weights, d, out, .. } = self.add;
        // SAFETY: rows of d numbers, of which these columns are the task's.
        unsafe {
            let out = out.add(idx * CHUNK + v * S::LANES);
            let mut sums = [[S::splat(0.0); C]; R];
            for (r, sums) in sums.iter_mut().enumerate() {
                for (c, sum) in sums.iter_mut().enumerate() {
                    *sum = S::load(out.add(r * d + c * S::LANES));
                }
            }
            for i in 0..self.n {
                let chunk = self.values.chunk::<S>(i, idx);
                let mut of_slot = [S::splat(0.0); R];
                for (r, weight) in of_slot.iter_mut().enumerate() {
                    *weight = S::splat(*weights.add(r * TILE + self.first + i));
                }
                for c in 0..C {
                    let numbers = N::load::<S>(chunk, v + c);
                    for (sums, &weight) in sums.iter_mut().zip(&of_slot) {
                        sums[c] = S::fma(weight, numbers, sums[c]);
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
}
