//! What prefill's matrix products end in: the epilogues of [`super::gemm`].

use std::ops::Range;

use super::gemm::{Block, Epilogue, Operands};
use super::heads::{Head, Heads};
use super::matrix::CpuMatrix;
use super::mem::Shared;
use super::simd::{MAX_LANES, Simd, exp2};

/// `x += a W^T`. A unit is some columns of W.
pub(super) struct Residual<'a> {
    pub(super) w: &'a CpuMatrix,
    pub(super) unit_columns: usize,
    /// `[row][w.n]`
    pub(super) x: Shared<'a, f32>,
}

/// Columns of a unit: `unit_columns` of them, fewer at the end.
#[inline(always)]
fn columns(unit: usize, unit_columns: usize, n: usize) -> (usize, usize) {
    (unit * unit_columns, n.min((unit + 1) * unit_columns))
}

impl Epilogue for Residual<'_> {
    const MATRICES: usize = 1;

    fn operands(&self, unit: usize) -> Operands<'_> {
        Operands { matrices: [self.w; 2], columns: columns(unit, self.unit_columns, self.w.n) }
    }

    #[inline(always)]
    unsafe fn finish<S: Simd>(&self, unit: usize, rows: Range<usize>, block: Block) {
        let (first, end) = columns(unit, self.unit_columns, self.w.n);
        for (i, row) in rows.enumerate() {
            // SAFETY: these columns of these rows are this task's.
            unsafe {
                let x = self.x.get().add(row * self.w.n + first);
                let c = block.c.add(i * block.ldc);
                for j in 0..end - first {
                    *x.add(j) += *c.add(j);
                }
            }
        }
    }
}

/// `h = silu(g) * u`. A unit is the same columns of gate and of up.
pub(super) struct GateUp<'a> {
    pub(super) gate: &'a CpuMatrix,
    pub(super) up: &'a CpuMatrix,
    pub(super) unit_columns: usize,
    /// `[row][gate.n]`
    pub(super) h: Shared<'a, f32>,
}

impl Epilogue for GateUp<'_> {
    const MATRICES: usize = 2;

    fn operands(&self, unit: usize) -> Operands<'_> {
        Operands {
            matrices: [self.gate, self.up],
            columns: columns(unit, self.unit_columns, self.gate.n),
        }
    }

    #[inline(always)]
    unsafe fn finish<S: Simd>(&self, unit: usize, rows: Range<usize>, block: Block) {
        let (first, end) = columns(unit, self.unit_columns, self.gate.n);
        for (i, row) in rows.enumerate() {
            // SAFETY: these columns of these rows are this task's.
            unsafe {
                let h = self.h.get().add(row * self.gate.n + first);
                let g = block.c.add(i * block.ldc);
                silu_mul::<S>(g, g.add(block.second), h, end - first);
            }
        }
    }
}

/// `h = g / (1 + exp(-g)) * u`, element by element.
///
/// # Safety
/// As [`Simd`]; `n` elements behind each pointer.
#[inline(always)]
pub(super) unsafe fn silu_mul<S: Simd>(g: *const f32, u: *const f32, h: *mut f32, n: usize) {
    /// One vector.
    #[inline(always)]
    unsafe fn vector<S: Simd>(g: S::V, u: S::V) -> S::V {
        // SAFETY: arithmetic only.
        unsafe {
            let e = exp2::<S>(S::mul(g, S::splat(-std::f32::consts::LOG2_E)));
            S::mul(S::div(g, S::add(S::splat(1.0), e)), u)
        }
    }
    // SAFETY: whole vectors below n; the rest by way of one padded vector each.
    unsafe {
        let mut i = 0;
        while i + S::LANES <= n {
            S::store(h.add(i), vector::<S>(S::load(g.add(i)), S::load(u.add(i))));
            i += S::LANES;
        }
        if i < n {
            let (mut g_tail, mut u_tail) = ([0.0_f32; MAX_LANES], [0.0_f32; MAX_LANES]);
            std::ptr::copy_nonoverlapping(g.add(i), g_tail.as_mut_ptr(), n - i);
            std::ptr::copy_nonoverlapping(u.add(i), u_tail.as_mut_ptr(), n - i);
            let v = vector::<S>(S::load(g_tail.as_ptr()), S::load(u_tail.as_ptr()));
            S::store_first(h.add(i), v, n - i);
        }
    }
}

/// Q, K and V with all that follows them. A unit is a head.
pub(super) struct Qkv<'a> {
    pub(super) weights: [&'a CpuMatrix; 3],
    pub(super) heads: Heads<'a>,
}

impl Epilogue for Qkv<'_> {
    const MATRICES: usize = 1;

    fn operands(&self, unit: usize) -> Operands<'_> {
        let (matrix, idx) = match Heads::head(self.heads.shape, unit) {
            Head::Q(idx) => (self.weights[0], idx),
            Head::K(idx) => (self.weights[1], idx),
            Head::V(idx) => (self.weights[2], idx),
        };
        let d = self.heads.shape.head_dim;
        Operands { matrices: [matrix; 2], columns: (idx * d, (idx + 1) * d) }
    }

    #[inline(always)]
    unsafe fn finish<S: Simd>(&self, unit: usize, rows: Range<usize>, block: Block) {
        let head = Heads::head(self.heads.shape, unit);
        for (i, row) in rows.enumerate() {
            // SAFETY: this head of these rows is this task's.
            unsafe { self.heads.finish::<S>(head, row, block.c.add(i * block.ldc)) };
        }
    }
}
