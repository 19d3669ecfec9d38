//! Matrix products of decode (and of the language-model head): few rows, memory bound.
//!
//! Weights are read once, in place: a thread streams one range of addresses, four weight rows at a time,
//! lanes along k. With few lanes the four lie a page apart, if a chunk has the rows ([`apart`]). bf16 weights are split into even and odd
//! elements, a shift and a mask for two vectors, so the activations are kept in that order as well.
//! More rows of activations go four at a time over a chunk of weights that stays in L1 or L2.
//!
//! Each dot product is one chain of multiply-adds over k in each lane and a fixed tree over the lanes,
//! whatever the number of rows, chunks or threads.

use std::ops::Range;

use super::matrix::{CpuMatrix, Format};
use super::norm::{Norm, rms_norm};
use super::simd::{Dot, Kernel, MAX_LANES, Simd};

/// Weight rows of a chunk: the task unit.
pub(super) const CHUNK: usize = 16;

/// Weight rows in flight.
const ROWS: usize = 4;

/// Rows from one row in flight to the next: at least 4 KiB, if a chunk has as many. A CPU's prefetcher
/// follows a stream for each page; four short rows in one page are one stream that jumps, which it loses (Zen 3). CPUs with
/// 16 lanes follow it, and are faster with rows side by side (Zen 5).
fn apart<S: Simd>(row_bytes: usize, n_rows: usize) -> usize {
    if S::LANES == MAX_LANES {
        return 1;
    }
    4096_usize.div_ceil(row_bytes.max(1)).min(n_rows.div_ceil(ROWS)).max(1)
}

/// Length of prepared activations of width `k`: whole double vectors of any instruction set.
pub(super) fn padded(k: usize) -> usize {
    k.next_multiple_of(2 * MAX_LANES)
}

/// Prepares a row of activations: norm, order of the weight format, zeros behind.
///
/// # Safety
/// As [`Simd`]; `k` numbers at `x`, room for `padded(k)` at `to`.
#[inline(always)]
pub(super) unsafe fn prepare<S: Simd>(
    norm: Option<Norm<'_>>,
    format: Format,
    x: *const f32,
    k: usize,
    to: *mut f32,
) {
    // SAFETY: all indices are below padded(k).
    unsafe {
        match norm {
            Some(norm) => rms_norm::<S>(norm, x, to),
            None => std::ptr::copy_nonoverlapping(x, to, k),
        }
        for i in k..padded(k) {
            to.add(i).write(0.0);
        }
        if format == Format::Bf16 {
            for start in (0..padded(k)).step_by(2 * S::LANES) {
                let to = to.add(start);
                let mut block = [0.0_f32; 2 * MAX_LANES];
                std::ptr::copy_nonoverlapping(to, block.as_mut_ptr(), 2 * S::LANES);
                for i in 0..S::LANES {
                    to.add(i).write(block[2 * i]);
                    to.add(S::LANES + i).write(block[2 * i + 1]);
                }
            }
        }
    }
}

/// `y[r][i] = x[r] . w[n.start + i]` for a chunk of weight rows.
pub(super) struct Chunk<'a> {
    pub(super) w: &'a CpuMatrix,
    pub(super) n: Range<usize>,
    /// Prepared rows, `padded(k)` apart.
    pub(super) x: *const f32,
    pub(super) n_rows: usize,
    pub(super) y: *mut f32,
    /// Row stride of `y`.
    pub(super) ldy: usize,
}

impl Kernel for Chunk<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd, D: Dot>(self) {
        let stride = padded(self.w.k);
        for r in (0..self.n_rows).step_by(4) {
            // SAFETY: the rows and results of this group.
            unsafe {
                let group = Group {
                    w: self.w.as_ptr(),
                    row_bytes: self.w.row_bytes(),
                    k: self.w.k,
                    n: self.n.clone(),
                    x: self.x.add(r * stride),
                    y: self.y.add(r * self.ldy),
                    ldy: self.ldy,
                };
                match self.w.format {
                    Format::Bf16 => group.enter::<S, D, Bf16Pairs>(self.n_rows - r),
                    Format::F16 => group.enter::<S, D, Halves>(self.n_rows - r),
                    Format::F32 => group.enter::<S, D, Singles>(self.n_rows - r),
                }
            }
        }
    }
}

/// A group of up to four rows of activations against a chunk.
#[derive(Clone)]
struct Group {
    w: *const u8,
    row_bytes: usize,
    k: usize,
    n: Range<usize>,
    x: *const f32,
    y: *mut f32,
    ldy: usize,
}

impl Group {
    #[inline(always)]
    unsafe fn enter<S: Simd, D: Dot, L: Load>(self, n_rows: usize) {
        // SAFETY: passed on.
        unsafe {
            match n_rows {
                1 => S::enter::<D, _>(Rows::<L, 1>(self, L::default())),
                2 => S::enter::<D, _>(Rows::<L, 2>(self, L::default())),
                3 => S::enter::<D, _>(Rows::<L, 3>(self, L::default())),
                _ => S::enter::<D, _>(Rows::<L, 4>(self, L::default())),
            }
        }
    }
}

struct Rows<L, const X: usize>(Group, L);

impl<L: Load, const X: usize> Kernel for Rows<L, X> {
    #[inline(always)]
    unsafe fn run<S: Simd, D: Dot>(self) {
        let g = self.0;
        let stride = padded(g.k);
        let apart = apart::<S>(g.row_bytes, g.n.len());
        let ahead = ROWS * apart * g.row_bytes;
        for group in g.n.clone().step_by(ROWS * apart) {
            for first in group..g.n.end.min(group + apart) {
                let rows: [_; ROWS] = std::array::from_fn(|i| first + i * apart);
                // SAFETY: rows beyond the last repeat it and are not stored.
                unsafe {
                    let w = rows.map(|row| g.w.wrapping_add(row.min(g.n.end - 1) * g.row_bytes));
                    // Else each step of the product would begin with these minima and products again.
                    let w = std::hint::black_box(w);
                    let sums = dots::<S, L, X>(w, ahead, g.k, g.x, stride);
                    for (row, sums) in rows.into_iter().zip(sums).filter(|(row, _)| *row < g.n.end)
                    {
                        for (r, sum) in sums.into_iter().enumerate() {
                            g.y.add(r * g.ldy + row - g.n.start).write(sum);
                        }
                    }
                }
            }
        }
    }
}

/// The dot products of `ROWS` weight rows with `X` rows of activations.
#[inline(always)]
unsafe fn dots<S: Simd, L: Load, const X: usize>(
    w: [*const u8; ROWS],
    ahead: usize,
    k: usize,
    x: *const f32,
    stride: usize,
) -> [[f32; X]; ROWS] {
    let step = 2 * S::LANES;
    // SAFETY: whole steps lie inside the rows; the tail goes through a padded copy.
    unsafe {
        let mut acc = [[S::splat(0.0); X]; ROWS];
        let mut i = 0;
        while i + step <= k {
            for (w, acc) in w.iter().zip(&mut acc) {
                let p = w.add(i * L::BYTES);
                S::prefetch(p.wrapping_add(ahead));
                let (w0, w1) = L::load::<S>(p);
                add_step::<S, X>(w0, w1, x.add(i), stride, acc);
            }
            i += step;
        }
        if i < k {
            for (w, acc) in w.iter().zip(&mut acc) {
                let mut tail = [0_u8; 2 * MAX_LANES * 4];
                let from = w.add(i * L::BYTES);
                std::ptr::copy_nonoverlapping(from, tail.as_mut_ptr(), (k - i) * L::BYTES);
                let (w0, w1) = L::load::<S>(tail.as_ptr());
                add_step::<S, X>(w0, w1, x.add(i), stride, acc);
            }
        }
        let mut sums = [[0.0; X]; ROWS];
        for (sums, acc) in sums.iter_mut().zip(acc) {
            for (sum, acc) in sums.iter_mut().zip(acc) {
                *sum = S::sum(acc);
            }
        }
        sums
    }
}

#[inline(always)]
unsafe fn add_step<S: Simd, const X: usize>(
    w0: S::V,
    w1: S::V,
    x: *const f32,
    stride: usize,
    acc: &mut [S::V; X],
) {
    for (r, acc) in acc.iter_mut().enumerate() {
        // SAFETY: prepared rows are padded to whole steps.
        unsafe {
            let x = x.add(r * stride);
            *acc = S::fma(w0, S::load(x), *acc);
            *acc = S::fma(w1, S::load(x.add(S::LANES)), *acc);
        }
    }
}

/// Loads `2 * LANES` weights in the order in which activations of that format are prepared.
trait Load: Default {
    const BYTES: usize;
    unsafe fn load<S: Simd>(p: *const u8) -> (S::V, S::V);
}

#[derive(Default)]
struct Bf16Pairs;

impl Load for Bf16Pairs {
    const BYTES: usize = 2;

    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const u8) -> (S::V, S::V) {
        // SAFETY: LANES pairs.
        unsafe {
            let pairs = S::load(p.cast());
            (S::even_bf16(pairs), S::odd_bf16(pairs))
        }
    }
}

#[derive(Default)]
struct Halves;

impl Load for Halves {
    const BYTES: usize = 2;

    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const u8) -> (S::V, S::V) {
        // SAFETY: 2 * LANES elements.
        unsafe { (S::load_f16(p.cast()), S::load_f16(p.cast::<u16>().add(S::LANES))) }
    }
}

#[derive(Default)]
struct Singles;

impl Load for Singles {
    const BYTES: usize = 4;

    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const u8) -> (S::V, S::V) {
        // SAFETY: 2 * LANES elements.
        unsafe { (S::load(p.cast()), S::load(p.cast::<f32>().add(S::LANES))) }
    }
}
