//! The CPU backend.
//!
//! Weights are read in place from the mapped file; activations are f32; accumulation is f32. The
//! instruction set is chosen at run time ([`Isa`]), the threads are the backend's own.
//!
//! | file | what |
//! |---|---|
//! | `simd/` | vectors of each instruction set, and the seam that kernels are written against |
//! | `team`, `run` | threads, regions and tasks; running kernels on them |
//! | `micro`, `pack`, `gemm`, `prefill` | matrix products of many rows, and what follows each |
//! | `gemv`, `decode` | matrix products of few rows, and what follows each |
//! | `attention/` | attention over pages, for both phases |
//! | `norm`, `heads` | row-wise arithmetic |
//! | `matrix`, `mem` | weights, big buffers |
//! | `kv/` | pages, and ways of coding heads, a file each |
//!
//! `unsafe` is at home here: kernels work on raw pointers, and threads write disjoint parts of shared
//! buffers. This file makes the pointers from checked sizes; nothing above it is unsafe.

mod attention;
mod decode;
mod gemm;
mod gemv;
mod heads;
mod kv;
mod matrix;
mod mem;
mod micro;
mod norm;
mod pack;
mod prefill;
mod run;
mod simd;
mod team;

use half::bf16;
use half::slice::HalfFloatSliceExt;
use loris_loader::TensorView;

use self::attention::{Attention, AttentionMass, KeyNorms, Merge, Part, Work, runs};
use self::decode::{AddTo, FinishHeads, GatedTo, Input, Store};

use self::heads::Heads;
use self::kv::{Place, SealPages, n_seal_tasks, places};
use self::matrix::Format;
use self::mem::{Buf, Shared};
use self::norm::{Norm, Rotation};
use self::prefill::{GateUp, Qkv, Residual};
use self::run::{Runner, Source};
use super::{Backend, Batch, LayerWeights, MassRows, Phase, RowUse, Stop, Table, random};
use crate::error::Error;
use crate::memory;
use crate::store::{AttentionShape, Coding, PageId, PageLayout, Seal};

pub use self::kv::CpuPages;
pub use self::matrix::{CpuMatrix, CpuVector};
pub use self::simd::Isa;

/// Up to this many rows, finishing heads and merging splits take less time than a region costs.
const FEW_ROWS: usize = 4;

/// How a CPU backend is made.
#[derive(Clone, Copy, Debug, Default)]
pub struct CpuOptions {
    /// Threads, the caller's included; 0: as many as there are cores.
    pub threads: usize,
    /// Instruction set; `None`: the fastest that the machine has.
    pub isa: Option<Isa>,
}

/// Activations: f32 rows of one width, which ops work on; or bf16 rows, which are copied from and to.
#[derive(Debug)]
pub struct CpuRows {
    /// Empty where the rows are bf16.
    data: Buf<f32>,
    narrow: Buf<bf16>,
    width: usize,
}

impl CpuRows {
    /// For kernels that write.
    fn writer(&mut self) -> Shared<'_, f32> {
        Shared::new(&mut self.data)
    }

    /// Panics unless the rows are `width` wide and at least `n_rows`: what kernels rely on.
    #[track_caller]
    fn check(&self, n_rows: usize, width: usize) {
        assert!(
            self.width == width && self.data.len() >= n_rows * width,
            "rows of {} x {}, not {n_rows} x {width}",
            self.data.len() / self.width.max(1),
            self.width,
        );
    }
}

/// The CPU as a device.
#[derive(Debug)]
pub struct CpuBackend {
    isa: Isa,
    runner: Runner,
    /// What `begin` was told: the shape, the angles and the attention work of the batch.
    shape: Option<AttentionShape>,
    rotation: Rotation,
    /// Of the queries that meet the sinks of a sequence that rolls.
    sink_rotation: Rotation,
    work: Work,
    /// Where the rows go in the layer at hand.
    places: Vec<Place>,
    /// Q, K and V of decode before they are finished.
    qkv: Buf<f32>,
    /// Partial results of attention.
    partial: Buf<f32>,
    /// Of attention mass.
    exponents: Buf<f32>,
}

impl CpuBackend {
    /// A backend with its threads; fails where the machine lacks the instruction set asked for.
    pub fn new(options: CpuOptions) -> Result<Self, Error> {
        let isa = options.isa.unwrap_or_else(Isa::detect);
        if !isa.is_available() {
            let names: Vec<String> = Isa::available().iter().map(Isa::to_string).collect();
            let reason = format!("this machine has no {isa}; it has {}", names.join(", "));
            return Err(Error::NoDevice { device: "cpu".into(), reason });
        }
        let n_threads = match options.threads {
            0 => std::thread::available_parallelism().map_or(1, usize::from),
            n => n,
        };
        Ok(Self {
            isa,
            runner: Runner::new(n_threads)?,
            shape: None,
            rotation: Rotation::default(),
            sink_rotation: Rotation::default(),
            work: Work::default(),
            places: Vec::new(),
            qkv: Buf::empty(),
            partial: Buf::empty(),
            exponents: Buf::empty(),
        })
    }

    /// The instruction set in use.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Threads, the caller's included.
    pub fn n_threads(&self) -> usize {
        self.runner.team.n_threads()
    }

    /// Runs a region without work: what the dispatch of an op costs.
    pub fn empty_region(&mut self) {
        self.runner.team.run(&|_, _| ());
    }

    fn shape(&self) -> Result<AttentionShape, Error> {
        let reason = "begin was not called";
        self.shape.ok_or_else(|| Error::State { call: "layer op", reason: reason.into() })
    }

    /// The instruction set for a product with these matrices, which must be of one format.
    fn isa_for(&self, matrices: &[&CpuMatrix]) -> Result<Isa, Error> {
        let format = matrices[0].format;
        if matrices.iter().any(|m| m.format != format) {
            let reason = "matrices that are multiplied together differ in dtype".into();
            return Err(Error::State { call: "layer op", reason });
        }
        Ok(if format == Format::Bf16 { self.isa } else { self.isa.f32() })
    }
}

impl Backend for CpuBackend {
    type Matrix = CpuMatrix;
    type Vector = CpuVector;
    type Rows = CpuRows;
    type Pages = CpuPages;

    fn matrix(&mut self, tensor: &TensorView) -> Result<CpuMatrix, Error> {
        CpuMatrix::new(tensor)
    }

    fn random_matrix(
        &mut self,
        n: usize,
        k: usize,
        seed: u64,
        scale: f32,
    ) -> Result<CpuMatrix, Error> {
        CpuMatrix::new(&random::matrix(n, k, seed, scale)?)
    }

    fn vector(&mut self, parts: &[TensorView]) -> Result<CpuVector, Error> {
        CpuVector::new(parts)
    }

    fn rows(&mut self, n_rows: usize, width: usize, holds: RowUse) -> Result<CpuRows, Error> {
        let len = n_rows.saturating_mul(width);
        Ok(match holds {
            RowUse::Waiting(Coding::BF16) => {
                let narrow = Buf::zeroed(len, "the aux cache")?;
                CpuRows { data: Buf::empty(), narrow, width }
            }
            _ => CpuRows { data: Buf::zeroed(len, "activations")?, narrow: Buf::empty(), width },
        })
    }

    fn pages(&mut self, layout: PageLayout, n_pages: usize) -> Result<CpuPages, Error> {
        CpuPages::new(layout, n_pages)
    }

    fn watch(&mut self, stop: &Stop) {
        self.runner.stop = stop.clone();
    }

    fn begin(&mut self, batch: &Batch<'_>, shape: AttentionShape) -> Result<(), Error> {
        self.shape = Some(shape);
        self.rotation.fill(batch, shape.head_dim);
        self.sink_rotation.fill_for_sinks(batch, shape.head_dim);
        self.work.fill(batch, shape);
        let partial = self.work.partial_rows * attention::partial_len(shape.head_dim);
        self.partial.reserve(partial, "partial results of attention")
    }

    fn embed(
        &mut self,
        table: &CpuMatrix,
        batch: &Batch<'_>,
        x: &mut CpuRows,
    ) -> Result<(), Error> {
        x.check(batch.n_rows(), table.k);
        let rows = x.data.chunks_exact_mut(table.k);
        for (&id, row) in batch.tokens.iter().zip(rows) {
            if id as usize >= table.n {
                return Err(Error::TokenOutOfRange { id, vocab_size: table.n });
            }
            table.read_row(id as usize, row);
        }
        Ok(())
    }

    fn norm_qkv_rope_append(
        &mut self,
        weights: &LayerWeights<CpuMatrix, CpuVector>,
        eps: f32,
        batch: &Batch<'_>,
        layer: usize,
        x: &CpuRows,
        q: &mut CpuRows,
        pages: &mut CpuPages,
    ) -> Result<(), Error> {
        let shape = self.shape()?;
        let (n_rows, k) = (batch.n_rows(), weights.q.k);
        let matrices = [&weights.q, &weights.k, &weights.v];
        let isa = self.isa_for(&matrices)?;
        x.check(n_rows, k);
        q.check(n_rows, shape.n_q_heads * shape.head_dim);
        places(batch, layer, pages, &mut self.places);
        let norm = Norm { weight: &weights.attn_norm.0, eps };
        let heads = Heads {
            shape,
            bias: weights.qkv_bias.as_ref().map(|bias| &*bias.0),
            norm: weights
                .qk_norm
                .as_ref()
                .map(|norm| norm.each_ref().map(|n| Norm { weight: &n.0, eps })),
            rotation: &self.rotation,
            q: q.writer(),
            places: &self.places,
            pages: pages.writer(),
        };
        let runner = &mut self.runner;
        if batch.phase == Phase::Prefill {
            let n = Heads::count(shape) * shape.head_dim;
            let grid = runner.grid(isa, n_rows, n, Some(shape.head_dim));
            let source = Source { x: &x.data, k, n_rows, norm: Some(norm) };
            return runner.gemm(isa, source, grid, &Qkv { weights: matrices, heads });
        }
        let isa = isa.f32();
        let format = weights.q.format;
        let input = Input { x: &x.data, k, n_rows, pick: None, norm: Some(norm), format };
        let n = Heads::count(shape) * shape.head_dim;
        self.qkv.reserve(n_rows * n, "queries, keys and values")?;
        let qkv = Shared::new(&mut self.qkv);
        runner.linear(isa, input, &Store { weights: &matrices, y: qkv })?;
        let tasks = &runner.tasks(n_rows);
        let heads = &heads;
        let finish = |thread_idx, _| FinishHeads { heads, qkv, tasks, thread_idx };
        if n_rows <= FEW_ROWS {
            runner.alone(isa, finish);
        } else {
            runner.region(isa, finish);
        }
        Ok(())
    }

    fn attention(
        &mut self,
        batch: &Batch<'_>,
        layer: usize,
        window: Option<usize>,
        q: &CpuRows,
        pages: &CpuPages,
        out: &mut CpuRows,
    ) -> Result<(), Error> {
        let shape = self.shape()?;
        let width = shape.n_q_heads * shape.head_dim;
        q.check(batch.n_rows(), width);
        out.check(batch.n_rows(), width);
        // Queries and weights are rounded to bf16 where keys and values are, and only in prefill:
        // decode is memory bound.
        let is_bf16 = batch.phase == Phase::Prefill && pages.layout.kv.wide() == Coding::BF16;
        let isa = if is_bf16 { self.isa } else { self.isa.f32() };
        let (work, runner, sink_rotation) = (&self.work, &mut self.runner, &self.sink_rotation);
        runner.team.reserve_scratch(attention::scratch_len(work.max_rows, shape.head_dim))?;
        let (q, out, partial) = (&q.data[..], out.writer(), Shared::new(&mut self.partial));
        let tasks = &runner.unordered(work.tasks.len());
        runner.region(isa, |thread_idx, scratch| Attention {
            batch,
            work,
            shape,
            layer,
            window,
            sink_rotation,
            q,
            pages,
            out,
            partial,
            tasks,
            thread_idx,
            scratch,
        });
        let (tasks, partial) = (&runner.unordered(work.merges.len()), &self.partial[..]);
        let is_rotated = pages.layout.kv.v.rotated;
        let merge =
            |thread_idx, _| Merge { work, shape, is_rotated, partial, out, tasks, thread_idx };
        match work.merges.len() {
            0 => {}
            n if n <= FEW_ROWS => runner.alone(isa, merge),
            _ => runner.region(isa, merge),
        }
        Ok(())
    }

    fn linear_residual(
        &mut self,
        w: &CpuMatrix,
        batch: &Batch<'_>,
        a: &CpuRows,
        x: &mut CpuRows,
    ) -> Result<(), Error> {
        let (n_rows, k) = (batch.n_rows(), w.k);
        let isa = self.isa_for(&[w])?;
        a.check(n_rows, k);
        x.check(n_rows, w.n);
        let (a, x) = (&a.data[..], x.writer());
        if batch.phase == Phase::Prefill {
            let grid = self.runner.grid(isa, n_rows, w.n, None);
            let epilogue = Residual { w, unit_columns: grid.unit_columns, x };
            let source = Source { x: a, k, n_rows, norm: None };
            return self.runner.gemm(isa, source, grid, &epilogue);
        }
        let input = Input { x: a, k, n_rows, pick: None, norm: None, format: w.format };
        self.runner.linear(isa.f32(), input, &AddTo { w, x })
    }

    fn norm_gate_up_silu(
        &mut self,
        weights: &LayerWeights<CpuMatrix, CpuVector>,
        eps: f32,
        batch: &Batch<'_>,
        x: &CpuRows,
        h: &mut CpuRows,
    ) -> Result<(), Error> {
        let (gate, up) = (&weights.gate, &weights.up);
        let (n_rows, k) = (batch.n_rows(), gate.k);
        let isa = self.isa_for(&[gate, up])?;
        x.check(n_rows, k);
        h.check(n_rows, gate.n);
        let norm = Some(Norm { weight: &weights.mlp_norm.0, eps });
        let (x, h) = (&x.data[..], h.writer());
        if batch.phase == Phase::Prefill {
            let grid = self.runner.grid(isa, n_rows, gate.n, None);
            let epilogue = GateUp { gate, up, unit_columns: grid.unit_columns, h };
            return self.runner.gemm(isa, Source { x, k, n_rows, norm }, grid, &epilogue);
        }
        let input = Input { x, k, n_rows, pick: None, norm, format: gate.format };
        self.runner.linear(isa.f32(), input, &GatedTo { gate, up, h })
    }

    fn norm_lm_head(
        &mut self,
        norm: &CpuVector,
        eps: f32,
        head: &CpuMatrix,
        batch: &Batch<'_>,
        x: &CpuRows,
        logits: &mut CpuRows,
    ) -> Result<(), Error> {
        x.check(batch.n_rows(), head.k);
        logits.check(batch.logit_rows.len(), head.n);
        let input = Input {
            x: &x.data,
            k: head.k,
            n_rows: batch.logit_rows.len(),
            pick: Some(&batch.logit_rows),
            norm: Some(Norm { weight: &norm.0, eps }),
            format: head.format,
        };
        let sink = Store { weights: &[head], y: logits.writer() };
        self.runner.linear(self.isa.f32(), input, &sink)
    }

    fn attention_mass(
        &mut self,
        batch: &Batch<'_>,
        of: MassRows,
        layer: usize,
        window: Option<usize>,
        q: &CpuRows,
        pages: &CpuPages,
        mass: &mut Vec<f32>,
    ) -> Result<(), Error> {
        let shape = self.shape()?;
        let kv_len = batch.seqs[of.seq_idx].kv_len();
        let rows = &batch.seqs[of.seq_idx].rows;
        let last = of.first_row + of.n_rows;
        assert!(rows.start <= of.first_row && last <= rows.end, "rows of the sequence");
        q.check(batch.n_rows(), shape.n_q_heads * shape.head_dim);
        mass.resize(kv_len, 0.0);
        let (q, mass) = (&q.data[..], Shared::new(mass));
        for of in runs(of) {
            let n_pairs = of.n_rows * shape.n_q_heads;
            let mut sums: Vec<[f32; 2]> = memory::zeros(n_pairs, "the mass of slots")?;
            self.exponents.reserve(n_pairs.saturating_mul(kv_len), "the mass of slots")?;
            let (exponents, sums) = (Shared::new(&mut self.exponents), Shared::new(&mut sums));
            for part in [Part::Exponents, Part::Sums, Part::Totals] {
                let n_tasks = AttentionMass::n_tasks(part, shape, of.n_rows, kv_len);
                let tasks = &self.runner.unordered(n_tasks);
                self.runner.region(self.isa.f32(), |thread_idx, _| AttentionMass {
                    part,
                    batch,
                    of,
                    shape,
                    layer,
                    window,
                    q,
                    pages,
                    exponents,
                    sums,
                    mass,
                    tasks,
                    thread_idx,
                });
            }
        }
        Ok(())
    }

    fn copy_rows(
        &mut self,
        from: &CpuRows,
        to: &mut CpuRows,
        pairs: &[(u32, u32)],
    ) -> Result<(), Error> {
        let width = from.width;
        assert!(to.width == width, "rows of {} and of {width}", to.width);
        for &(from_row, to_row) in pairs {
            let row = |idx: u32| idx as usize * width..(idx as usize + 1) * width;
            let (source, target) = (row(from_row), row(to_row));
            match (from.narrow.is_empty(), to.narrow.is_empty()) {
                (true, true) => to.data[target].copy_from_slice(&from.data[source]),
                (false, false) => to.narrow[target].copy_from_slice(&from.narrow[source]),
                (true, false) => {
                    to.narrow[target].convert_from_f32_slice(&from.data[source]);
                }
                (false, true) => from.narrow[source].convert_to_f32_slice(&mut to.data[target]),
            }
        }
        Ok(())
    }

    fn gather_rows(&mut self, rows: &mut CpuRows, keep: &[usize]) -> Result<(), Error> {
        let width = rows.width;
        for (to, &from) in keep.iter().enumerate() {
            rows.data.copy_within(from * width..(from + 1) * width, to * width);
        }
        Ok(())
    }

    fn read_rows(&mut self, rows: &CpuRows, first: usize, out: &mut [f32]) -> Result<(), Error> {
        let first = first * rows.width;
        match rows.narrow.is_empty() {
            true => out.copy_from_slice(&rows.data[first..][..out.len()]),
            false => rows.narrow[first..][..out.len()].convert_to_f32_slice(out),
        }
        Ok(())
    }

    fn write_rows(&mut self, rows: &mut CpuRows, first: usize, from: &[f32]) -> Result<(), Error> {
        let first = first * rows.width;
        match rows.narrow.is_empty() {
            true => rows.data[first..][..from.len()].copy_from_slice(from),
            false => rows.narrow[first..][..from.len()].convert_from_f32_slice(from),
        }
        Ok(())
    }

    fn copy_pages(
        &mut self,
        pages: &mut CpuPages,
        pairs: &[(PageId, PageId)],
    ) -> Result<(), Error> {
        pairs.iter().for_each(|&(from, to)| pages.copy(from, to));
        Ok(())
    }

    fn seal_pages(&mut self, pages: &mut CpuPages, seals: &[Seal]) -> Result<(), Error> {
        let tasks = &self.runner.unordered(n_seal_tasks(seals, pages));
        let pages = pages.writer();
        let seal = |thread_idx, _| SealPages { pages, seals, tasks, thread_idx };
        self.runner.region(self.isa.f32(), seal);
        Ok(())
    }

    fn key_norms(
        &mut self,
        pages: &CpuPages,
        table: Table<'_>,
        layer: usize,
        out: &mut [f32],
    ) -> Result<(), Error> {
        let (n_slots, out) = (out.len(), Shared::new(out));
        let kernel = KeyNorms { pages, table, layer, n_slots, out };
        self.runner.alone(self.isa.f32(), |_, _| kernel);
        Ok(())
    }

    fn keep_slots(
        &mut self,
        pages: &mut CpuPages,
        table: Table<'_>,
        keep: &[Vec<u32>],
    ) -> Result<(), Error> {
        for (layer, keep) in keep.iter().enumerate() {
            pages.keep_slots(table, layer, keep);
        }
        Ok(())
    }

    fn read_page(&mut self, pages: &CpuPages, page: PageId, out: &mut [u8]) -> Result<(), Error> {
        out.copy_from_slice(pages.page(page));
        Ok(())
    }

    fn write_page(
        &mut self,
        pages: &mut CpuPages,
        page: PageId,
        bytes: &[u8],
    ) -> Result<(), Error> {
        pages.page_mut(page).copy_from_slice(bytes);
        Ok(())
    }
}
