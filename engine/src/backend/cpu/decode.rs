//! The linear ops of decode: chunks of weight rows against a few rows of activations, and what becomes
//! of the results. The kernel is [`super::gemv`].

use super::gemv::{CHUNK, Chunk, padded, prepare};
use super::heads::Heads;
use super::matrix::{CpuMatrix, Format};
use super::mem::Shared;
use super::norm::Norm;
use super::prefill::silu_mul;
use super::simd::{Dot, Kernel, Simd};
use super::team::Tasks;

/// Rows of activations on their way into a product.
#[derive(Clone, Copy)]
pub(super) struct Input<'a> {
    /// Rows of `k`.
    pub(super) x: &'a [f32],
    pub(super) k: usize,
    pub(super) n_rows: usize,
    /// Which rows, where not the first `n_rows`.
    pub(super) pick: Option<&'a [usize]>,
    pub(super) norm: Option<Norm<'a>>,
    /// Of the weights that they meet.
    pub(super) format: Format,
}

impl Input<'_> {
    /// Prepares row `i`.
    ///
    /// # Safety
    /// As [`Simd`]; room for `padded(k)` numbers at `to`.
    #[inline(always)]
    unsafe fn prepare<S: Simd>(&self, i: usize, to: *mut f32) {
        let row = self.pick.map_or(i, |pick| pick[i]);
        // SAFETY: the row is one of x's.
        unsafe {
            prepare::<S>(self.norm, self.format, self.x.as_ptr().add(row * self.k), self.k, to);
        };
    }
}

/// Prepares all rows, for all threads. A task is a row.
pub(super) struct PrepareRows<'a> {
    pub(super) input: Input<'a>,
    /// `[row][padded(k)]`
    pub(super) to: Shared<'a, f32>,
    pub(super) tasks: &'a Tasks,
    pub(super) thread_idx: usize,
}

impl Kernel for PrepareRows<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd, D: Dot>(self) {
        while let Some(i) = self.tasks.next(self.thread_idx) {
            // SAFETY: row i is this task's.
            unsafe {
                self.input.prepare::<S>(i, self.to.get().add(i * padded(self.input.k)));
            }
        }
    }
}

/// What a linear op does with its chunks.
pub(super) trait Sink: Sync {
    /// Chunks of weight rows.
    fn n_chunks(&self) -> usize;
    /// Multiplies chunk `chunk` with the prepared rows and takes the results.
    ///
    /// # Safety
    /// As [`Simd`]; `scratch` has room for two chunks of results of every row, and no other thread has
    /// this chunk.
    unsafe fn take<S: Simd, D: Dot>(
        &self,
        chunk: usize,
        x: *const f32,
        n_rows: usize,
        scratch: *mut f32,
    );
}

/// Numbers of scratch a thread needs for a linear op.
pub(super) fn scratch_len(input: &Input<'_>) -> usize {
    2 * CHUNK * input.n_rows + padded(input.k)
}

/// A linear op.
pub(super) struct Linear<'a, E> {
    pub(super) input: Input<'a>,
    /// All rows prepared; without, there is one row and each thread prepares it for itself, which
    /// costs less than a region.
    pub(super) prepared: Option<&'a [f32]>,
    pub(super) sink: &'a E,
    pub(super) tasks: &'a Tasks,
    pub(super) thread_idx: usize,
    /// [`scratch_len`] numbers.
    pub(super) scratch: *mut f32,
}

impl<E: Sink> Kernel for Linear<'_, E> {
    #[inline(always)]
    unsafe fn run<S: Simd, D: Dot>(self) {
        // SAFETY: scratch_len is the sum of the parts; chunks are tasks, one thread each.
        unsafe {
            let mut x = self.prepared.map(<[f32]>::as_ptr);
            while let Some(chunk) = self.tasks.next(self.thread_idx) {
                let x = *x.get_or_insert_with(|| {
                    let x = self.scratch.add(2 * CHUNK * self.input.n_rows);
                    self.input.prepare::<S>(0, x);
                    x
                });
                self.sink.take::<S, D>(chunk, x, self.input.n_rows, self.scratch);
            }
        }
    }
}

/// Weight rows of a chunk.
#[inline(always)]
fn rows_of(chunk: usize, n: usize) -> std::ops::Range<usize> {
    chunk * CHUNK..n.min((chunk + 1) * CHUNK)
}

/// `y[row] = x W^T`, of up to three matrices side by side.
pub(super) struct Store<'a> {
    pub(super) weights: &'a [&'a CpuMatrix],
    /// `[row][sum of n]`
    pub(super) y: Shared<'a, f32>,
}

impl Store<'_> {
    /// Columns of `y`.
    pub(super) fn width(&self) -> usize {
        self.weights.iter().map(|w| w.n).sum()
    }
}

impl Sink for Store<'_> {
    fn n_chunks(&self) -> usize {
        self.weights.iter().map(|w| w.n.div_ceil(CHUNK)).sum()
    }

    #[inline(always)]
    unsafe fn take<S: Simd, D: Dot>(
        &self,
        chunk: usize,
        x: *const f32,
        n_rows: usize,
        _: *mut f32,
    ) {
        let (mut chunk, mut column) = (chunk, 0);
        for w in self.weights {
            if chunk < w.n.div_ceil(CHUNK) {
                let n = rows_of(chunk, w.n);
                // SAFETY: these columns are this task's.
                unsafe {
                    let y = self.y.get().add(column + n.start);
                    return Chunk { w, n, x, n_rows, y, ldy: self.width() }.run::<S, D>();
                }
            }
            chunk -= w.n.div_ceil(CHUNK);
            column += w.n;
        }
    }
}

/// `x += a W^T`.
pub(super) struct AddTo<'a> {
    pub(super) w: &'a CpuMatrix,
    /// `[row][w.n]`
    pub(super) x: Shared<'a, f32>,
}

impl Sink for AddTo<'_> {
    fn n_chunks(&self) -> usize {
        self.w.n.div_ceil(CHUNK)
    }

    #[inline(always)]
    unsafe fn take<S: Simd, D: Dot>(
        &self,
        chunk: usize,
        x: *const f32,
        n_rows: usize,
        scratch: *mut f32,
    ) {
        let n = rows_of(chunk, self.w.n);
        // SAFETY: these columns of x are this task's.
        unsafe {
            Chunk { w: self.w, n: n.clone(), x, n_rows, y: scratch, ldy: CHUNK }.run::<S, D>();
            for r in 0..n_rows {
                let (x, y) = (self.x.get().add(r * self.w.n + n.start), scratch.add(r * CHUNK));
                for i in 0..n.len() {
                    *x.add(i) += *y.add(i);
                }
            }
        }
    }
}

/// `h = silu(x G^T) * (x U^T)`.
pub(super) struct GatedTo<'a> {
    pub(super) gate: &'a CpuMatrix,
    pub(super) up: &'a CpuMatrix,
    /// `[row][gate.n]`
    pub(super) h: Shared<'a, f32>,
}

impl Sink for GatedTo<'_> {
    fn n_chunks(&self) -> usize {
        self.gate.n.div_ceil(CHUNK)
    }

    #[inline(always)]
    unsafe fn take<S: Simd, D: Dot>(
        &self,
        chunk: usize,
        x: *const f32,
        n_rows: usize,
        scratch: *mut f32,
    ) {
        let n = rows_of(chunk, self.gate.n);
        // SAFETY: these columns of h are this task's.
        unsafe {
            let (g, u) = (scratch, scratch.add(CHUNK));
            for (w, y) in [(self.gate, g), (self.up, u)] {
                Chunk { w, n: n.clone(), x, n_rows, y, ldy: 2 * CHUNK }.run::<S, D>();
            }
            for r in 0..n_rows {
                let h = self.h.get().add(r * self.gate.n + n.start);
                silu_mul::<S>(g.add(r * 2 * CHUNK), u.add(r * 2 * CHUNK), h, n.len());
            }
        }
    }
}

/// Finishes Q, K and V of decode. A task is a row.
pub(super) struct FinishHeads<'a> {
    pub(super) heads: &'a Heads<'a>,
    /// `[row][Q, K, V]`
    pub(super) qkv: Shared<'a, f32>,
    pub(super) tasks: &'a Tasks,
    pub(super) thread_idx: usize,
}

impl Kernel for FinishHeads<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd, D: Dot>(self) {
        let shape = self.heads.shape;
        let n_heads = Heads::count(shape);
        while let Some(row) = self.tasks.next(self.thread_idx) {
            for i in 0..n_heads {
                // SAFETY: all heads of this row are this task's.
                unsafe {
                    let values = self.qkv.get().add((row * n_heads + i) * shape.head_dim);
                    self.heads.finish::<S>(Heads::head(shape, i), row, values);
                }
            }
        }
    }
}
