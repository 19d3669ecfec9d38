//! Operands of the matrix products, rearranged for the micro-kernel.
//!
//! The micro-kernel ([`super::micro`]) walks *steps* of k. A step's unit is 32 bits wide: one f32, or a
//! pair of bf16 where [`Dot::PAIRS`]. A panel of B holds, for each step, the units of `2 * LANES`
//! neighbouring rows of a weight matrix (or slots of a page); a tile of A holds, for each step, the units
//! of its up to `TILE_ROWS` rows. Both are made by transposing `LANES x LANES` blocks in registers.
//! bf16 weights that feed f32 products are transposed as pairs and split afterwards: half the shuffles.

use std::ops::Range;

use super::matrix::Format;
use super::simd::{Dot, Fma, Kernel, MAX_LANES, Simd, bf16_bits};

/// Rows of one operand, by pointer: lane `i` reads row `i`.
pub(super) type RowPtrs = [*const u8; MAX_LANES];

/// Steps that `k` elements take.
pub(super) fn steps<D: Dot>(k: usize) -> usize {
    if D::PAIRS { k.div_ceil(2) } else { k }
}

/// Where a packed panel goes: unit of lane `i` at step `s` to `to + s * stride + i`.
#[derive(Clone, Copy)]
pub(super) struct Dest {
    pub(super) to: *mut f32,
    pub(super) stride: usize,
    /// Lanes stored.
    pub(super) n: usize,
}

/// Packs some steps of `LANES` rows of `k` elements each.
///
/// A kernel of its own, so that it is compiled once for an instruction set and not into every product.
pub(super) struct Pack<'a> {
    /// `LANES` of them, to `k` elements each.
    pub(super) rows: &'a RowPtrs,
    pub(super) format: Format,
    pub(super) k: usize,
    pub(super) steps: Range<usize>,
    pub(super) dest: Dest,
}

impl Kernel for Pack<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd, D: Dot>(self) {
        let Self { rows, format, k, steps, dest } = self;
        let (mut step, first) = (steps.start, steps.start);
        let split = format == Format::Bf16 && !D::PAIRS;
        // A transposed vector gives one step, or two where pairs are split.
        let block = if split { 2 * S::LANES } else { S::LANES };
        // Blocks must not read past k. Only bf16 rows hold pairs; others are rounded one by one.
        let whole = match (D::PAIRS, format) {
            (false, _) => steps.end,
            (true, Format::Bf16) => steps.end.min(k / 2),
            (true, _) => 0,
        };
        // A few hundred bytes of a row are too short a stream for the CPU to run ahead of: what the next call packs of
        // these rows is asked for here, a product earlier.
        let step_bytes = if D::PAIRS { 2 } else { 1 } * format.bytes();
        let ahead =
            if steps.end * step_bytes < k * format.bytes() { steps.len() * step_bytes } else { 0 };
        // SAFETY: blocks lie inside the rows' k elements and inside the panel.
        unsafe {
            while step + block <= whole {
                let at = Dest { to: dest.to.add((step - first) * dest.stride), ..dest };
                for row in rows.iter().take(S::LANES).filter(|_| ahead > 0) {
                    S::prefetch(row.wrapping_add(step * step_bytes + ahead));
                }
                if split {
                    pack_split::<S>(rows, step, at);
                } else if format == Format::F16 {
                    pack_block::<S>(rows, |p| S::load_f16(p.add(2 * step).cast()), at);
                } else {
                    // Units as they are: f32, or pairs of bf16.
                    pack_block::<S>(rows, |p| S::load(p.add(4 * step).cast()), at);
                }
                step += block;
            }
            while step < steps.end {
                let to = dest.to.add((step - first) * dest.stride);
                for (lane, row) in rows.iter().enumerate().take(dest.n) {
                    to.add(lane).write(unit::<D>(*row, format, k, step));
                }
                step += 1;
            }
        }
    }
}

/// One unit, for the edges.
///
/// # Safety
/// `row` has `k` elements and `step` is inside.
#[inline(always)]
unsafe fn unit<D: Dot>(row: *const u8, format: Format, k: usize, step: usize) -> f32 {
    // SAFETY: element indices stay below k.
    unsafe {
        if !D::PAIRS {
            return format.read(row.add(step * format.bytes()));
        }
        let element =
            |i: usize| if i < k { bf16_bits(format.read(row.add(i * format.bytes()))) } else { 0 };
        pair(element(2 * step), element(2 * step + 1))
    }
}

/// Two bf16 numbers as a unit.
#[inline(always)]
pub(super) fn pair(even: u16, odd: u16) -> f32 {
    f32::from_bits(u32::from(even) | u32::from(odd) << 16)
}

#[inline(always)]
unsafe fn pack_block<S: Simd>(rows: &RowPtrs, load: impl Fn(*const u8) -> S::V, dest: Dest) {
    // SAFETY: as `Pack`.
    unsafe {
        let mut block = [S::splat(0.0); MAX_LANES];
        for lane in 0..S::LANES {
            block[lane] = load(rows[lane]);
        }
        S::transpose(&mut block);
        for (step, v) in block.into_iter().enumerate().take(S::LANES) {
            store::<S>(dest.to.add(step * dest.stride), v, dest.n);
        }
    }
}

/// `2 * LANES` steps of bf16 rows as f32.
#[inline(always)]
unsafe fn pack_split<S: Simd>(rows: &RowPtrs, step: usize, dest: Dest) {
    // SAFETY: as `Pack`.
    unsafe {
        let mut block = [S::splat(0.0); MAX_LANES];
        for lane in 0..S::LANES {
            block[lane] = S::load(rows[lane].add(2 * step).cast());
        }
        S::transpose(&mut block);
        for (i, v) in block.into_iter().enumerate().take(S::LANES) {
            store::<S>(dest.to.add(2 * i * dest.stride), S::even_bf16(v), dest.n);
            store::<S>(dest.to.add((2 * i + 1) * dest.stride), S::odd_bf16(v), dest.n);
        }
    }
}

#[inline(always)]
unsafe fn store<S: Simd>(to: *mut f32, v: S::V, n: usize) {
    // SAFETY: as `Pack`.
    unsafe { if n == S::LANES { S::store(to, v) } else { S::store_first(to, v, n) } }
}

/// Rounds `k` f32 numbers to pairs: `steps(k)` units, the odd one out paired with zero.
///
/// # Safety
/// `k` numbers at `from`, room for the units at `to`; they may be the same address.
#[inline(always)]
pub(super) unsafe fn to_pairs(from: *const f32, to: *mut f32, k: usize) {
    // SAFETY: unit i is written after numbers 2 i and 2 i + 1 were read.
    unsafe {
        for i in 0..k / 2 {
            to.add(i).write(pair(bf16_bits(*from.add(2 * i)), bf16_bits(*from.add(2 * i + 1))));
        }
        if k % 2 == 1 {
            to.add(k / 2).write(pair(bf16_bits(*from.add(k - 1)), 0));
        }
    }
}

/// How rows fall into tiles, as even as can be: the first ones may have a row more than the others.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tiles {
    pub(super) n: usize,
    /// Rows of a tile, and how many tiles have one more.
    rows: usize,
    extra: usize,
}

impl Tiles {
    /// As few tiles of at most `max` rows as do for `n_rows`.
    pub(super) fn new(n_rows: usize, max: usize) -> Self {
        let n = n_rows.div_ceil(max);
        Self { n, rows: n_rows / n.max(1), extra: n_rows % n.max(1) }
    }

    /// First row of tile `i`; `start(n)` is the number of rows.
    #[inline(always)]
    pub(super) fn start(&self, i: usize) -> usize {
        i * self.rows + i.min(self.extra)
    }

    /// Rows of tile `i`.
    #[inline(always)]
    pub(super) fn rows(&self, i: usize) -> usize {
        self.rows + usize::from(i < self.extra)
    }
}

/// Packs a tile of A from rows of units: `[step][n_rows]` at `to`.
///
/// # Safety
/// As [`Simd`]; `n_rows <= TILE_ROWS` rows of `steps` units, `stride` apart.
#[inline(always)]
pub(super) unsafe fn pack_tile<S: Simd>(
    from: *const f32,
    stride: usize,
    n_rows: usize,
    steps: usize,
    to: *mut f32,
) {
    let mut rows: RowPtrs = [from.cast(); MAX_LANES];
    // SAFETY: units are moved as f32 bits; row pointers beyond n_rows repeat row 0 and are not stored.
    unsafe {
        for (i, row) in rows.iter_mut().enumerate().take(n_rows) {
            *row = from.add(i * stride).cast();
        }
        let dest = Dest { to, stride: n_rows, n: n_rows };
        let pack = Pack { rows: &rows, format: Format::F32, k: steps, steps: 0..steps, dest };
        S::enter::<Fma, _>(pack);
    }
}
