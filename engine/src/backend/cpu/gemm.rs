//! Matrix products of prefill: `y[m][n] = sum_k x[m][k] w[n][k]`, many rows, compute bound.
//!
//! The rows are packed once into tiles ([`PackRows`], which also applies the norm). A *task* is a run of
//! tiles times a few panels of weight rows. It walks k in blocks: it packs the weight panels of a block
//! into its thread's scratch (they stay in L2), then keeps one tile of A in L1 while it sweeps the panels.
//! Blocks of C are added up in scratch, and when k is done an [`Epilogue`] takes C where it belongs.
//!
//! An element of C is a sum over blocks, in order, of one chain of multiply-adds each. The block size
//! depends on k alone, so how tasks are cut - by rows, threads, cost - never shows in a result.

use std::ops::Range;

use super::matrix::CpuMatrix;
use super::mem::Shared;
use super::micro::{Out, Product};
use super::norm::{Norm, rms_norm};
use super::pack::{Dest, Pack, RowPtrs, Tiles, pack_tile, steps, to_pairs};
use super::simd::{Dot, Isa, Kernel, MAX_LANES, Simd};
use super::team::Tasks;

/// The most steps of a block of k: a tile of A (14 rows) is then 18 KiB, half of L1.
const MAX_BLOCK_STEPS: usize = 320;

/// The most rows of a task, which bounds the scratch for C.
const MAX_TASK_ROWS: usize = 512;

/// Steps in a block of k: as even as they come, in multiples of what packs without a tail.
fn block_steps(steps: usize) -> usize {
    let n_blocks = steps.div_ceil(MAX_BLOCK_STEPS).max(1);
    steps.div_ceil(n_blocks).next_multiple_of(2 * MAX_LANES)
}

/// Packed rows: tile `i` is `[step][rows(i)]` from unit `start(i) * steps` on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Packed<'a> {
    pub(super) data: Shared<'a, f32>,
    pub(super) tiles: Tiles,
    pub(super) steps: usize,
}

impl Packed<'_> {
    #[inline(always)]
    fn tile(&self, i: usize) -> *mut f32 {
        self.data.get().wrapping_add(self.tiles.start(i) * self.steps)
    }
}

/// Packs rows of `k` elements, after a norm if there is one. A task is a tile.
pub(super) struct PackRows<'a> {
    pub(super) x: &'a [f32],
    pub(super) k: usize,
    pub(super) norm: Option<Norm<'a>>,
    pub(super) to: Packed<'a>,
    pub(super) tasks: &'a Tasks,
    pub(super) thread_idx: usize,
    /// `[TILE_ROWS][k]`
    pub(super) scratch: *mut f32,
}

impl Kernel for PackRows<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd, D: Dot>(self) {
        let Self { k, to, scratch, .. } = self;
        // SAFETY: tasks are tiles, one thread each; x has the rows, the scratch a tile of them.
        unsafe {
            while let Some(i) = self.tasks.next(self.thread_idx) {
                let n_rows = to.tiles.rows(i);
                let x = self.x.as_ptr().add(to.tiles.start(i) * k);
                let in_place = self.norm.is_none() && !D::PAIRS;
                for r in (0..n_rows).take_while(|_| !in_place) {
                    let (mut x, row) = (x.add(r * k), scratch.add(r * k));
                    if let Some(norm) = self.norm {
                        rms_norm::<S>(norm, x, row);
                        x = row;
                    }
                    if D::PAIRS {
                        to_pairs(x, row, k);
                    }
                }
                let from = if in_place { x } else { scratch.cast_const() };
                pack_tile::<S>(from, k, n_rows, to.steps, to.tile(i));
            }
        }
    }
}

/// What a task multiplies: the same columns of up to two matrices.
#[derive(Clone, Copy)]
pub(super) struct Operands<'a> {
    pub(super) matrices: [&'a CpuMatrix; 2],
    pub(super) columns: (usize, usize),
}

/// C of a task, in scratch: for each matrix a run of columns.
#[derive(Clone, Copy)]
pub(super) struct Block {
    pub(super) c: *mut f32,
    pub(super) ldc: usize,
    /// Where the second matrix's columns start in a row.
    pub(super) second: usize,
}

/// The parts of a product and what becomes of its results.
pub(super) trait Epilogue: Sync {
    /// Matrices that a unit multiplies.
    const MATRICES: usize;
    /// The operands of a unit of columns.
    fn operands(&self, unit: usize) -> Operands<'_>;
    /// Takes the results of `rows` x the unit's columns.
    ///
    /// # Safety
    /// As [`Simd`]; `block` holds them, and no other thread has this unit of these rows.
    unsafe fn finish<S: Simd>(&self, unit: usize, rows: Range<usize>, block: Block);
}

/// How a product is cut into tasks; see [`Grid::new`].
#[derive(Clone, Copy, Debug)]
pub(super) struct Grid {
    /// Units of columns.
    pub(super) n_units: usize,
    /// Columns of a unit (of each matrix).
    pub(super) unit_columns: usize,
    /// Runs of tiles.
    n_runs: usize,
}

impl Grid {
    /// The cut that should take the least time: units of columns are fixed if `unit` says so (a head),
    /// or else some panels wide.
    ///
    /// A task costs its multiply-adds, packing its weights (as much as 14 rows) and reading its rows
    /// (as much as 4 columns); the last round of tasks leaves threads idle.
    pub(super) fn new(
        isa: Isa,
        tiles: Tiles,
        n: usize,
        unit: Option<usize>,
        n_threads: usize,
    ) -> Self {
        let panel = 2 * isa.lanes();
        let n_rows = tiles.start(tiles.n);
        let candidates = [1, 2, 3, 4, 6, 8].map(|panels| unit.unwrap_or(panels * panel));
        let min_runs = n_rows.div_ceil(MAX_TASK_ROWS).max(1);
        let runs = (min_runs..=min_runs + 7).filter(|&runs| runs <= tiles.n.max(1));
        let cost = |grid: &Self| {
            let rows = n_rows.div_ceil(grid.n_runs);
            let columns = grid.unit_columns.next_multiple_of(panel);
            let rounds = (grid.n_units * grid.n_runs).div_ceil(n_threads);
            rounds * ((rows + 14) * columns + 4 * rows)
        };
        runs.flat_map(|n_runs| {
            let grid = move |c: usize| Self { n_units: n.div_ceil(c), unit_columns: c, n_runs };
            candidates.map(grid)
        })
        .min_by_key(cost)
        .unwrap_or(Self { n_units: n.div_ceil(panel), unit_columns: panel, n_runs: 1 })
    }

    pub(super) fn n_tasks(&self) -> usize {
        self.n_units * self.n_runs
    }

    /// Numbers of scratch a thread needs for this product.
    pub(super) fn scratch_len(
        &self,
        isa: Isa,
        tiles: Tiles,
        steps: usize,
        matrices: usize,
    ) -> usize {
        let columns = matrices * self.unit_columns.next_multiple_of(2 * isa.lanes());
        let rows = (tiles.n.div_ceil(self.n_runs)) * isa.tile_rows();
        columns * (block_steps(steps) + rows)
    }

    /// Unit and run of tiles of a task: tasks of one unit are neighbours.
    fn task(&self, tiles: Tiles, task: usize) -> (usize, Range<usize>) {
        let (unit, run) = (task / self.n_runs, task % self.n_runs);
        (unit, tiles.n * run / self.n_runs..tiles.n * (run + 1) / self.n_runs)
    }
}

/// A product.
pub(super) struct Gemm<'a, E> {
    pub(super) a: Packed<'a>,
    pub(super) grid: Grid,
    pub(super) epilogue: &'a E,
    pub(super) tasks: &'a Tasks,
    pub(super) thread_idx: usize,
    /// [`Grid::scratch_len`] numbers.
    pub(super) scratch: *mut f32,
}

impl<E: Epilogue> Kernel for Gemm<'_, E> {
    #[inline(always)]
    unsafe fn run<S: Simd, D: Dot>(self) {
        let panel = 2 * S::LANES;
        while let Some(task) = self.tasks.next(self.thread_idx) {
            let (unit, tiles) = self.grid.task(self.a.tiles, task);
            let operands = self.epilogue.operands(unit);
            let (first, end) = operands.columns;
            let second = (end - first).next_multiple_of(panel);
            let ldc = second * E::MATRICES;
            // SAFETY: scratch_len is the sum of the two parts.
            unsafe {
                let b = self.scratch;
                let block = Block { c: b.add(ldc * block_steps(self.a.steps)), ldc, second };
                self.multiply::<S, D>(operands, tiles.clone(), b, block);
                let rows = self.a.tiles.start(tiles.start)..self.a.tiles.start(tiles.end);
                self.epilogue.finish::<S>(unit, rows, block);
            }
        }
    }
}

impl<E: Epilogue> Gemm<'_, E> {
    /// C of one task.
    #[inline(always)]
    unsafe fn multiply<S: Simd, D: Dot>(
        &self,
        operands: Operands<'_>,
        tiles: Range<usize>,
        b: *mut f32,
        block: Block,
    ) {
        let panel = 2 * S::LANES;
        let n_steps = self.a.steps;
        let size = block_steps(n_steps);
        // SAFETY: the panels fill `b`, the tiles lie in the packed rows, and C has a row for each.
        unsafe {
            for start in (0..n_steps).step_by(size) {
                let range = start..n_steps.min(start + size);
                for (i, matrix) in operands.matrices.into_iter().enumerate().take(E::MATRICES) {
                    let to = b.add(i * block.second * size);
                    pack_panels::<S, D>(matrix, operands.columns, range.clone(), size, to);
                }
                let first_row = self.a.tiles.start(tiles.start);
                for tile in tiles.clone() {
                    let n_rows = self.a.tiles.rows(tile);
                    let a = self.a.tile(tile).add(start * n_rows);
                    let c = block.c.add((self.a.tiles.start(tile) - first_row) * block.ldc);
                    let out = if start == 0 { Out::Set } else { Out::Add };
                    for column in (0..block.ldc).step_by(panel) {
                        let (b, c) = (b.add(column * size), c.add(column));
                        let product = Product { a, b, steps: range.len(), c, ldc: block.ldc, out };
                        product.run::<S, D, true>(n_rows);
                    }
                }
            }
        }
    }
}

/// Packs columns of a matrix (its rows `columns.0 .. columns.1`) for some steps: panel after panel,
/// `[size][2 * LANES]` each. Lanes beyond the last column repeat it; nothing reads their results.
#[inline(always)]
unsafe fn pack_panels<S: Simd, D: Dot>(
    matrix: &CpuMatrix,
    columns: (usize, usize),
    range: Range<usize>,
    size: usize,
    to: *mut f32,
) {
    let panel = 2 * S::LANES;
    for (i, column) in (columns.0..columns.1).step_by(S::LANES).enumerate() {
        let rows: RowPtrs = std::array::from_fn(|lane| {
            let row = (column + lane).min(columns.1 - 1);
            matrix.as_ptr().wrapping_add(row * matrix.row_bytes())
        });
        // SAFETY: the rows are in the matrix; half panel i starts at the panel's half.
        unsafe {
            let to = to.add((i / 2) * panel * size + (i % 2) * S::LANES);
            let dest = Dest { to, stride: panel, n: S::LANES };
            let (format, k, steps) = (matrix.format, matrix.k, range.clone());
            S::enter::<D, _>(Pack { rows: &rows, format, k, steps, dest });
        }
    }
}

/// Steps of `k` elements for an instruction set.
pub(super) fn steps_of(isa: Isa, k: usize) -> usize {
    if isa.pairs() { steps::<super::simd::Bf16Emulated>(k) } else { k }
}
