//! Runs kernels on the team: sizes the scratch, shares out the tasks.

use super::decode::{self, Input, Linear, PrepareRows, Sink};
use super::gemm::{Epilogue, Gemm, Grid, PackRows, Packed, steps_of};
use super::gemv::padded;
use super::mem::{Buf, Shared};
use super::norm::Norm;
use super::pack::Tiles;
use super::simd::{Isa, Kernel};
use super::team::{Tasks, Team};
use crate::backend::Stop;
use crate::error::Error;

/// The threads, and the buffer in which operands of a product are laid out for them.
#[derive(Debug)]
pub(super) struct Runner {
    pub(super) team: Team,
    /// Ends regions early.
    pub(super) stop: Stop,
    operand: Buf<f32>,
}

/// Rows that go into a product of prefill.
#[derive(Clone, Copy)]
pub(super) struct Source<'a> {
    /// Rows of `k`.
    pub(super) x: &'a [f32],
    pub(super) k: usize,
    pub(super) n_rows: usize,
    pub(super) norm: Option<Norm<'a>>,
}

impl Runner {
    pub(super) fn new(n_threads: usize) -> Result<Self, Error> {
        Ok(Self { team: Team::new(n_threads)?, stop: Stop::default(), operand: Buf::empty() })
    }

    /// Tasks for a region, as neighbours.
    pub(super) fn tasks(&self, n_tasks: usize) -> Tasks {
        Tasks::new(n_tasks, self.team.n_threads(), &self.stop)
    }

    /// Tasks for a region, in their order.
    pub(super) fn unordered(&self, n_tasks: usize) -> Tasks {
        Tasks::new(n_tasks, 1, &self.stop)
    }

    /// Runs one region: `make` gives each thread its kernel, from its index and its scratch.
    pub(super) fn region<K: Kernel>(
        &mut self,
        isa: Isa,
        make: impl Fn(usize, *mut f32) -> K + Sync,
    ) {
        region(&mut self.team, isa, make);
    }

    /// Runs a kernel on the caller alone.
    pub(super) fn alone<K: Kernel>(&mut self, isa: Isa, make: impl Fn(usize, *mut f32) -> K) {
        // SAFETY: as for `region`; thread 0 takes the tasks of all.
        unsafe { isa.run(make(0, std::ptr::null_mut())) }
    }

    /// How to cut a product of `n_rows` rows and `n` columns.
    pub(super) fn grid(&self, isa: Isa, n_rows: usize, n: usize, unit: Option<usize>) -> Grid {
        Grid::new(isa, Tiles::new(n_rows, isa.tile_rows()), n, unit, self.team.n_threads())
    }

    /// A product of prefill: the rows are packed, after a norm if there is one, then multiplied.
    pub(super) fn gemm<E: Epilogue>(
        &mut self,
        isa: Isa,
        source: Source<'_>,
        grid: Grid,
        epilogue: &E,
    ) -> Result<(), Error> {
        let Source { x, k, n_rows, norm } = source;
        let (steps, tiles) = (steps_of(isa, k), Tiles::new(n_rows, isa.tile_rows()));
        let Self { team, stop, operand } = self;
        operand.reserve(n_rows * steps, "packed activations")?;
        let scratch = grid.scratch_len(isa, tiles, steps, E::MATRICES);
        team.reserve_scratch(scratch.max(isa.tile_rows() * k))?;
        let a = Packed { data: Shared::new(operand), tiles, steps };
        let tasks = &Tasks::new(tiles.n, team.n_threads(), stop);
        region(team, isa, |thread_idx, scratch| PackRows {
            x,
            k,
            norm,
            to: a,
            tasks,
            thread_idx,
            scratch,
        });
        let tasks = &Tasks::new(grid.n_tasks(), 1, stop);
        region(team, isa, |thread_idx, scratch| Gemm {
            a,
            grid,
            epilogue,
            tasks,
            thread_idx,
            scratch,
        });
        Ok(())
    }

    /// A linear op of decode: rows are prepared - by each thread for itself if there is one - and go
    /// through the chunks of weights.
    pub(super) fn linear<E: Sink>(
        &mut self,
        isa: Isa,
        input: Input<'_>,
        sink: &E,
    ) -> Result<(), Error> {
        let Self { team, stop, operand } = self;
        team.reserve_scratch(decode::scratch_len(&input))?;
        let mut prepared = None;
        if input.n_rows > 1 {
            operand.reserve(input.n_rows * padded(input.k), "prepared activations")?;
            let (to, n_threads) = (Shared::new(operand), team.n_threads());
            let tasks = &Tasks::new(input.n_rows, n_threads, stop);
            region(team, isa, |thread_idx, _| PrepareRows { input, to, tasks, thread_idx });
            prepared = Some(&operand[..]);
        }
        let tasks = &Tasks::new(sink.n_chunks(), team.n_threads(), stop);
        region(team, isa, |thread_idx, scratch| Linear {
            input,
            prepared,
            sink,
            tasks,
            thread_idx,
            scratch,
        });
        Ok(())
    }
}

fn region<K: Kernel>(team: &mut Team, isa: Isa, make: impl Fn(usize, *mut f32) -> K + Sync) {
    team.run(&|thread_idx, scratch| {
        // SAFETY: the backend refuses an instruction set that the machine lacks; what the kernels
        // point to is borrowed by them, and was sized for the batch.
        unsafe { isa.run(make(thread_idx, scratch.as_mut_ptr())) }
    });
}
