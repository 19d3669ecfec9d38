//! The CUDA backend: the ops of a pass as launches of `loris-kernels`.
//!
//! Weights are bf16 on the device: f16 and f32 checkpoints are rounded when they are uploaded. The residual
//! stream and the logits are f32, the operands of products bf16, accumulation f32. Nothing waits for the
//! device but what copies to the host.
//!
//! | file | what |
//! |---|---|
//! | `batch` | a batch as the arrays that kernels read |
//! | `limits` | what the kernels can take |
//! | `weights` | from tensors of a checkpoint to device memory |
//! | `passes` | decode passes that are recorded once and replayed |
//! | `probe` | which devices there are |
//! | `rows` | activations, and how rows move |
//! | `sample` | tokens drawn where the logits are |
//! | `mass` | how much slots are looked at |
//!
//! In prefill each norm is a kernel of its own, because every tile of the product behind it reads all of
//! the normalised rows; in decode it is part of the product.

mod batch;
mod limits;
mod mass;
mod passes;
mod probe;
mod rows;
mod sample;
mod weights;

use std::ops::Range;
use std::path::PathBuf;

use loris_kernels::ops::attention::{self, Partial};
use loris_kernels::ops::batch::DeviceBatch;
use loris_kernels::ops::qkv::{self, QkvWeights};
use loris_kernels::ops::{
    embed, fill_random, key_norm, linear, linear_decode, lm_head, mlp_gate, mlp_gate_decode,
    page_copy, page_seal, qkv_decode, rmsnorm, slot_move,
};
use loris_kernels::{Buffer, Device, DeviceOptions, KvPages, Matrix, PageTable, Rows, Staging};
use loris_loader::TensorView;

use self::batch::Arrays;
use self::limits::{check_pages, unsupported};
use self::mass::Mass;
use self::passes::{Form, Recorder};
use self::rows::{Data, Gathered, missing};
use self::sample::Chooser;
use super::{Backend, Batch, Draw, LayerWeights, MassRows, Phase, RowUse, Table};
use crate::error::Error;
use crate::store::{AttentionShape, Coding, PageId, PageLayout, Seal, Sides};

pub use self::limits::{CudaBytes, check};
pub use self::passes::Passes;
pub use self::probe::CudaDevice;
pub(crate) use self::probe::{list, probe};
pub use self::rows::CudaRows;

/// How a CUDA backend is made.
#[derive(Clone, Debug, Default)]
pub struct CudaOptions {
    /// Index of the device.
    pub index: u32,
    /// The driver's library; `None`: `libcuda.so.1`.
    pub driver: Option<PathBuf>,
    /// How the passes of decode are run.
    pub passes: Passes,
}

/// A CUDA device.
#[derive(Debug)]
pub struct CudaBackend {
    device: Device,
    recorder: Recorder,
    /// Pinned memory for weights; gone once the first pass begins.
    staging: Option<Staging>,
    arrays: Arrays,
    shape: Option<AttentionShape>,
    /// What the pages hold.
    kv: Sides,
    batch: Option<DeviceBatch>,
    /// The most rows of activations that were asked for.
    max_rows: usize,
    /// Normalised rows in prefill.
    normed: Option<Rows<u16>>,
    /// Projections of decode that wait for a norm of q and k.
    raw: Option<Rows<f32>>,
    /// Splits of decode attention.
    partial: Option<Partial>,
    gathered: Gathered,
    mass: Mass,
    chooser: Chooser,
}

/// A window as launchers take it: one of 2^32 - 1 positions and more is none.
fn kernel_window(window: Option<usize>) -> Option<u32> {
    window.and_then(|window| u32::try_from(window).ok())
}

impl CudaBackend {
    /// Opens a device and loads the kernels.
    pub fn new(options: &CudaOptions) -> Result<Self, Error> {
        let CudaOptions { index, ref driver, passes } = *options;
        let open = DeviceOptions { index, driver: driver.clone() };
        let device = Device::open(&open).map_err(|e| probe::no_device(index, &e))?;
        Ok(Self {
            recorder: Recorder::new(passes, &device),
            device,
            staging: None,
            arrays: Arrays::default(),
            shape: None,
            kv: Sides::default(),
            batch: None,
            max_rows: 0,
            normed: None,
            raw: None,
            partial: None,
            gathered: Gathered::default(),
            mass: Mass::default(),
            chooser: Chooser::default(),
        })
    }

    /// Room for what a decode pass needs beside its rows. Recordings know the addresses, so they go first.
    fn reserve_decode(&mut self, form: &Form, shape: AttentionShape) -> Result<(), Error> {
        let n_rows = form.n_rows.next_power_of_two();
        let width = (shape.n_q_heads + 2 * shape.n_kv_heads) * shape.head_dim;
        let is_small = |rows: &Rows<f32>| rows.n_rows < form.n_rows || rows.width != width;
        if self.raw.as_ref().is_none_or(is_small) {
            self.recorder.forget();
            self.raw = None;
            self.raw = Some(Rows::new(&self.device, n_rows, width, "projections of decode")?);
        }
        let n_parts = form.n_rows * shape.n_q_heads * form.n_splits;
        let is_small =
            |p: &Partial| p.out.len() < n_parts * shape.head_dim || p.ml.len() < n_parts * 2;
        if self.partial.as_ref().is_none_or(is_small) {
            self.recorder.forget();
            self.partial = None;
            self.partial = Some(Partial::new(&self.device, shape, n_rows, form.n_splits)?);
        }
        Ok(())
    }
}

impl Backend for CudaBackend {
    type Matrix = Matrix;
    type Vector = Buffer<f32>;
    type Rows = CudaRows;
    type Pages = KvPages;

    fn matrix(&mut self, tensor: &TensorView) -> Result<Matrix, Error> {
        weights::matrix(&self.device, &mut self.staging, tensor)
    }

    fn random_matrix(
        &mut self,
        n: usize,
        k: usize,
        seed: u64,
        scale: f32,
    ) -> Result<Matrix, Error> {
        let mut matrix = Matrix::new(&self.device, n, k, "weights")?;
        fill_random::fill_random(&self.device, &mut matrix, seed, scale)?;
        Ok(matrix)
    }

    fn vector(&mut self, parts: &[TensorView]) -> Result<Buffer<f32>, Error> {
        weights::vector(&self.device, parts)
    }

    fn rows(&mut self, n_rows: usize, width: usize, holds: RowUse) -> Result<CudaRows, Error> {
        let d = &self.device;
        if holds != RowUse::Logits && !width.is_multiple_of(8) {
            return Err(unsupported("width of rows", width, "a multiple of 8"));
        }
        Ok(CudaRows(match holds {
            RowUse::Residual => {
                self.max_rows = self.max_rows.max(n_rows);
                self.normed = None;
                self.normed = Some(Rows::new(d, self.max_rows, width, "normalised rows")?);
                Data::F32(Rows::new(d, n_rows, width, "the residual stream")?)
            }
            RowUse::Logits => Data::F32(Rows::new(d, n_rows, width, "logits")?),
            RowUse::Transit | RowUse::Waiting(Coding::F32) => {
                Data::F32(Rows::new(d, n_rows, width, "the aux cache")?)
            }
            RowUse::Waiting(_) => Data::Bf16(Rows::new(d, n_rows, width, "the aux cache")?),
            RowUse::Operand => Data::Bf16(Rows::new(d, n_rows, width, "activations")?),
        }))
    }

    fn pages(&mut self, layout: PageLayout, n_pages: usize) -> Result<KvPages, Error> {
        let PageLayout { n_kv_heads, page_len, head_dim, kv, .. } = layout;
        check_pages(head_dim, kv, format!("{kv:?}"))?;
        if !page_len.is_power_of_two() || !(16..=256).contains(&page_len) {
            return Err(unsupported("--page-len", page_len, "a power of two from 16 to 256"));
        }
        let n_bytes = n_pages.saturating_mul(layout.bytes());
        let data = Buffer::new(&self.device, n_bytes, "the KV page pool")?;
        self.kv = kv;
        Ok(KvPages { data, n_pages, n_kv_heads, page_len, head_dim, kv })
    }

    fn begin(&mut self, batch: &Batch<'_>, shape: AttentionShape) -> Result<(), Error> {
        self.staging = None;
        self.shape = Some(shape);
        self.arrays.fill(batch, shape);
        let form = Form::new(batch, &self.arrays, self.kv);
        if batch.phase == Phase::Decode {
            self.reserve_decode(&form, shape)?;
        }
        let n_rows = self.max_rows.max(batch.n_rows());
        if self.mass.reserve(&self.device, n_rows, shape.n_q_heads)? {
            self.recorder.forget();
        }
        let on_device = match &mut self.batch {
            Some(on_device) => on_device,
            none => none.insert(DeviceBatch::new(&self.device, n_rows, shape.head_dim)?),
        };
        on_device.upload(&self.device, &self.arrays.host())?;
        self.recorder.begin(batch.phase, form, on_device);
        Ok(())
    }

    fn replay(&mut self, layers: &Range<usize>) -> Result<bool, Error> {
        self.recorder.replay_or_record(&self.device, layers)
    }

    fn end(&mut self, outcome: Result<(), Error>) -> Result<(), Error> {
        self.recorder.end(&self.device, outcome)
    }

    fn embed(&mut self, table: &Matrix, batch: &Batch<'_>, x: &mut CudaRows) -> Result<(), Error> {
        if let Some(&id) = batch.tokens.iter().find(|&&id| id as usize >= table.n) {
            return Err(Error::TokenOutOfRange { id, vocab_size: table.n });
        }
        let on_device = self.batch.as_ref().ok_or_else(|| missing("batch"))?;
        Ok(embed::embed(&self.device, table, on_device, x.f32_mut()?)?)
    }

    fn norm_qkv_rope_append(
        &mut self,
        weights: &LayerWeights<Matrix, Buffer<f32>>,
        eps: f32,
        batch: &Batch<'_>,
        layer: usize,
        x: &CudaRows,
        q: &mut CudaRows,
        pages: &mut KvPages,
    ) -> Result<(), Error> {
        let Self { device: d, batch: on_device, normed, raw, shape, .. } = self;
        let on_device = on_device.as_ref().ok_or_else(|| missing("batch"))?;
        let shape = shape.ok_or_else(|| missing("shape"))?;
        let (x, q, norm) = (x.f32()?, q.bf16_mut()?, &weights.attn_norm);
        let qkv = QkvWeights {
            q: &weights.q,
            k: &weights.k,
            v: &weights.v,
            bias: weights.qkv_bias.as_ref(),
            qk_norm: weights.qk_norm.as_ref().map(|norm| norm.each_ref()),
            n_q_heads: shape.n_q_heads,
            n_kv_heads: shape.n_kv_heads,
            head_dim: shape.head_dim,
            eps,
        };
        match batch.phase {
            Phase::Prefill => {
                let a = normed.as_mut().ok_or_else(|| missing("normalised rows"))?;
                rmsnorm::rmsnorm(d, x, norm, eps, batch.n_rows(), a)?;
                qkv::qkv_prefill(d, &qkv, a, on_device, layer, q, pages)?;
            }
            Phase::Decode => {
                let raw = raw.as_mut().ok_or_else(|| missing("projections"))?;
                qkv_decode::qkv_decode(d, &qkv, norm, x, on_device, layer, raw, q, pages)?;
            }
        }
        Ok(())
    }

    fn attention(
        &mut self,
        batch: &Batch<'_>,
        layer: usize,
        window: Option<usize>,
        q: &CudaRows,
        pages: &KvPages,
        out: &mut CudaRows,
    ) -> Result<(), Error> {
        let Self { device: d, batch: on_device, partial, shape, mass, .. } = self;
        let on_device = on_device.as_ref().ok_or_else(|| missing("batch"))?;
        let shape = shape.ok_or_else(|| missing("shape"))?;
        let (window, lse) = (kernel_window(window), mass.lse.as_mut());
        let (q, out) = (q.bf16()?, out.bf16_mut()?);
        match batch.phase {
            Phase::Prefill => {
                attention::attention_prefill(
                    d, shape, on_device, layer, window, q, pages, out, lse,
                )?;
            }
            Phase::Decode => {
                let partial = partial.as_mut().ok_or_else(|| missing("splits"))?;
                attention::attention_decode(
                    d, shape, on_device, layer, window, q, pages, partial, out, lse,
                )?;
            }
        }
        Ok(())
    }

    fn linear_residual(
        &mut self,
        w: &Matrix,
        batch: &Batch<'_>,
        a: &CudaRows,
        x: &mut CudaRows,
    ) -> Result<(), Error> {
        let (d, a, x) = (&self.device, a.bf16()?, x.f32_mut()?);
        match batch.phase {
            Phase::Prefill => linear::linear_prefill(d, w, a, batch.n_rows(), x)?,
            Phase::Decode => linear_decode::linear_decode(d, w, a, batch.n_rows(), x)?,
        }
        Ok(())
    }

    fn norm_gate_up_silu(
        &mut self,
        weights: &LayerWeights<Matrix, Buffer<f32>>,
        eps: f32,
        batch: &Batch<'_>,
        x: &CudaRows,
        h: &mut CudaRows,
    ) -> Result<(), Error> {
        let LayerWeights { gate, up, mlp_norm: norm, .. } = weights;
        let (d, x, h, n_rows) = (&self.device, x.f32()?, h.bf16_mut()?, batch.n_rows());
        match batch.phase {
            Phase::Prefill => {
                let a = self.normed.as_mut().ok_or_else(|| missing("normalised rows"))?;
                rmsnorm::rmsnorm(d, x, norm, eps, n_rows, a)?;
                mlp_gate::gate_up_prefill(d, gate, up, a, n_rows, h)?;
            }
            Phase::Decode => mlp_gate_decode::gate_up_decode(d, gate, up, norm, eps, x, n_rows, h)?,
        }
        Ok(())
    }

    fn norm_lm_head(
        &mut self,
        norm: &Buffer<f32>,
        eps: f32,
        head: &Matrix,
        _batch: &Batch<'_>,
        x: &CudaRows,
        logits: &mut CudaRows,
    ) -> Result<(), Error> {
        let on_device = self.batch.as_ref().ok_or_else(|| missing("batch"))?;
        Ok(lm_head::lm_head(&self.device, head, norm, eps, x.f32()?, on_device, logits.f32_mut()?)?)
    }

    fn sample(&mut self, logits: &CudaRows, row: usize, draw: &Draw) -> Result<Option<u32>, Error> {
        self.chooser.choose(&self.device, logits.f32()?, row, draw)
    }

    fn attention_mass(
        &mut self,
        batch: &Batch<'_>,
        of: MassRows,
        layer: usize,
        window: Option<usize>,
        q: &CudaRows,
        pages: &KvPages,
        mass: &mut Vec<f32>,
    ) -> Result<(), Error> {
        let on_device = self.batch.as_ref().ok_or_else(|| missing("batch"))?;
        let shape = self.shape.ok_or_else(|| missing("shape"))?;
        let (d, seq, window) = (&self.device, &batch.seqs[of.seq_idx], kernel_window(window));
        let q = q.bf16()?;
        self.mass.add(d, shape, on_device, seq, of, layer, window, q, pages, mass)
    }

    fn copy_rows(
        &mut self,
        from: &CudaRows,
        to: &mut CudaRows,
        pairs: &[(u32, u32)],
    ) -> Result<(), Error> {
        to.copy_from(&self.device, from, pairs)
    }

    fn gather_rows(&mut self, rows: &mut CudaRows, keep: &[usize]) -> Result<(), Error> {
        self.gathered.gather(&self.device, rows, keep)
    }

    fn read_rows(&mut self, rows: &CudaRows, first: usize, out: &mut [f32]) -> Result<(), Error> {
        match &rows.0 {
            Data::F32(rows) => rows.data.download(&self.device, first * rows.width, out)?,
            Data::Bf16(rows) => {
                let mut bits = vec![0; out.len()];
                rows.data.download(&self.device, first * rows.width, &mut bits)?;
                for (x, bits) in out.iter_mut().zip(bits) {
                    *x = half::bf16::from_bits(bits).to_f32();
                }
            }
        }
        Ok(())
    }

    fn write_rows(&mut self, rows: &mut CudaRows, first: usize, from: &[f32]) -> Result<(), Error> {
        match &mut rows.0 {
            Data::F32(rows) => rows.data.upload(&self.device, first * rows.width, from)?,
            Data::Bf16(rows) => {
                let bits: Vec<u16> =
                    from.iter().map(|&x| half::bf16::from_f32(x).to_bits()).collect();
                rows.data.upload(&self.device, first * rows.width, &bits)?;
            }
        }
        Ok(())
    }

    fn copy_pages(&mut self, pages: &mut KvPages, pairs: &[(PageId, PageId)]) -> Result<(), Error> {
        let flat: Vec<u32> = pairs.iter().flat_map(|&(from, to)| [from, to]).collect();
        let on_device = Buffer::from_slice(&self.device, &flat, "pages to copy")?;
        Ok(page_copy::page_copy(&self.device, pages, &on_device, pairs.len())?)
    }

    fn seal_pages(&mut self, pages: &mut KvPages, seals: &[Seal]) -> Result<(), Error> {
        let ids = |seal: &Seal| seal.from.iter().copied().chain([seal.to]).collect::<Vec<u32>>();
        let flat: Vec<u32> = seals.iter().flat_map(ids).collect();
        let on_device = Buffer::from_slice(&self.device, &flat, "pages to seal")?;
        Ok(page_seal::page_seal(&self.device, pages, &on_device, seals.len())?)
    }

    fn key_norms(
        &mut self,
        pages: &KvPages,
        table: Table<'_>,
        layer: usize,
        out: &mut [f32],
    ) -> Result<(), Error> {
        let d = &self.device;
        let table = PageTable::new(d, &table.pages(), table.n_layers)?;
        let mut norms = Buffer::new(d, out.len(), "lengths of keys")?;
        key_norm::key_norm(d, pages, &table, layer, out.len(), &mut norms)?;
        Ok(norms.download(d, 0, out)?)
    }

    fn keep_slots(
        &mut self,
        pages: &mut KvPages,
        table: Table<'_>,
        keep: &[Vec<u32>],
    ) -> Result<(), Error> {
        let (d, n_keep) = (&self.device, keep.first().map_or(0, Vec::len));
        let table = PageTable::new(d, &table.pages(), table.n_layers)?;
        let keep = Buffer::from_slice(d, &keep.concat(), "slots that stay")?;
        Ok(slot_move::slot_move(d, pages, &table, &keep, n_keep)?)
    }

    fn read_page(&mut self, pages: &KvPages, page: PageId, out: &mut [u8]) -> Result<(), Error> {
        Ok(pages.data.download(&self.device, page as usize * pages.page_bytes(), out)?)
    }

    fn write_page(&mut self, pages: &mut KvPages, page: PageId, bytes: &[u8]) -> Result<(), Error> {
        let first = page as usize * pages.page_bytes();
        Ok(pages.data.upload(&self.device, first, bytes)?)
    }
}

impl From<loris_kernels::Error> for Error {
    fn from(e: loris_kernels::Error) -> Self {
        use loris_kernels::Error as E;
        match e {
            E::OutOfMemory { what, bytes, free, total } => {
                Self::OutOfDeviceMemory { what, bytes, free, total }
            }
            E::Unsupported { what, found, expected } => {
                Self::Unsupported { device: "cuda", what, found, expected }
            }
            e => Self::Device { reason: e.to_string() },
        }
    }
}
