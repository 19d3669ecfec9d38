//! The micro-kernel of all matrix products: a tile of up to `TILE_ROWS` rows by two vectors.
//!
//! Every element of the tile is one chain of multiply-adds over the steps, whatever the other rows are,
//! so how rows are cut into tiles does not show in the result. A is read one broadcast unit at a time,
//! from packed tiles (`[step][row]`) or from short rows with a fixed stride (scores in attention): both
//! strides are constants, so that all addresses of a step hang off one register.

use super::simd::{Dot, Kernel, Simd};

/// Row stride of scores and probabilities, in units; see [`Product::run`].
pub(super) const ROW_STRIDE: usize = 64;

/// What becomes of the tile of C.
#[derive(Clone, Copy, Debug)]
pub(super) enum Out {
    /// `c = ab`
    Set,
    /// `c = c + ab`
    Add,
    /// `c = c * scale[row] + ab`
    Scale(*const f32),
}

/// `C[m][2 * LANES]` from A of `m` rows and a panel of B.
#[derive(Clone, Copy)]
pub(super) struct Product {
    pub(super) a: *const f32,
    /// `[step][2 * LANES]`
    pub(super) b: *const f32,
    pub(super) steps: usize,
    pub(super) c: *mut f32,
    /// Row stride of C.
    pub(super) ldc: usize,
    pub(super) out: Out,
}

impl Product {
    /// Runs it for `m <= TILE_ROWS` rows.
    ///
    /// # Safety
    /// As [`Simd`]; the operands are there, in the layouts said.
    #[inline(always)]
    pub(super) unsafe fn run<S: Simd, D: Dot, const PACKED: bool>(self, m: usize) {
        macro_rules! rows {
            ($($m:literal)*) => {
                match m {
                    $($m => S::enter::<D, _>(Tile::<$m, PACKED>(self)),)*
                    _ => debug_assert!(m == 0, "a tile has at most {} rows, not {m}", S::TILE_ROWS),
                }
            };
        }
        // SAFETY: passed on.
        unsafe { rows!(1 2 3 4 5 6 7 8 9 10 11 12 13 14) }
    }
}

struct Tile<const M: usize, const PACKED: bool>(Product);

impl<const M: usize, const PACKED: bool> Kernel for Tile<M, PACKED> {
    #[inline(always)]
    unsafe fn run<S: Simd, D: Dot>(self) {
        if M > S::TILE_ROWS {
            // No tile of this type is that tall: nothing to compile.
            return debug_assert!(false, "a tile has at most {} rows, not {M}", S::TILE_ROWS);
        }
        let Product { mut a, mut b, steps, c, ldc, out } = self.0;
        let (row, step) = if PACKED { (1, M) } else { (ROW_STRIDE, 1) };
        // SAFETY: the caller's operands.
        unsafe {
            let mut acc = [[S::splat(0.0); 2]; M];
            for _ in 0..steps {
                let (b0, b1) = (S::load(b), S::load(b.add(S::LANES)));
                for (i, acc) in acc.iter_mut().enumerate() {
                    let a = S::splat(*a.add(i * row));
                    acc[0] = D::madd::<S>(a, b0, acc[0]);
                    acc[1] = D::madd::<S>(a, b1, acc[1]);
                }
                (a, b) = (a.add(step), b.add(2 * S::LANES));
            }
            for (i, acc) in acc.into_iter().enumerate() {
                for (j, acc) in acc.into_iter().enumerate() {
                    let c = c.add(i * ldc + j * S::LANES);
                    let v = match out {
                        Out::Set => acc,
                        Out::Add => S::add(S::load(c), acc),
                        Out::Scale(s) => S::fma(S::load(c), S::splat(*s.add(i)), acc),
                    };
                    S::store(c, v);
                }
            }
        }
    }
}
