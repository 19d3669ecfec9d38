//! The ops of the forward pass, with one meaning each and one implementation per device.
//!
//! A [`Backend`] owns a device: it holds weights, rows of activations and KV pages, and it runs the
//! handful of fused ops that `forward` strings together. Everything above it - page
//! accounting, policies, sessions, sampling - is written once and knows no device. An op that one
//! backend lacks is a compile error, and every op is checked against the same naive f64 reference.
//!
//! Ops are called in the order of a pass, which [`Backend::begin`] opens. They need not have run when they
//! return: only what copies to the host waits. Each op treats each row alone, with a fixed order of reduction, fixed tiles and a fixed split size.
//! Which kernel runs depends on the [`Phase`], never on how many rows a batch has or who else is in it,
//! so the bits of a row do not depend on batch composition, chunk size, thread count or page length.

pub mod cpu;
pub mod cuda;
pub(crate) mod random;
mod slots;

use std::ops::Range;

use loris_loader::{Dtype, TensorView};

use crate::error::Error;
use crate::read::Rule;
use crate::store::{AttentionShape, Coding, PageId, PageLayout, Seal};
use crate::sync::Arc;
use crate::sync::atomic::{AtomicBool, Ordering::Relaxed};

pub use self::slots::{Slots, TILE};

/// What a batch is doing; the only thing that chooses between kernels of one op.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Prompt tokens: many rows a sequence, compute bound.
    Prefill,
    /// One new token a sequence, memory bound.
    Decode,
}

/// The rows that go through the layers together, all in one phase.
#[derive(Debug)]
pub struct Batch<'a> {
    /// Which kernels run.
    pub phase: Phase,
    /// Token id of each row.
    pub tokens: Vec<u32>,
    /// Absolute position of each row.
    pub positions: Vec<u32>,
    /// The sequences that the rows belong to, in row order, without gaps. One whose rows see different pages sealed is here
    /// several times, part by part.
    pub seqs: Vec<Seq<'a>>,
    /// Rows whose logits are wanted, ascending.
    pub logit_rows: Vec<usize>,
}

impl<'a> Batch<'a> {
    /// Rows in the batch.
    pub fn n_rows(&self) -> usize {
        self.tokens.len()
    }

    /// The batch of the rows whose logits are wanted, for the part of the last layer that only they need.
    /// Their keys and values are in the cache like everybody's, so each sees what it would have seen.
    pub fn of_logit_rows(&self) -> Batch<'a> {
        let keep = &self.logit_rows;
        let mut seqs = Vec::new();
        let mut start = 0;
        for seq in &self.seqs {
            let n = keep.iter().filter(|row| seq.rows.contains(row)).count();
            if n > 0 {
                let rows = start..start + n;
                seqs.push(Seq { rows, kv_start: seq.kv_len() - n, ..seq.clone() });
                start += n;
            }
        }
        Batch {
            phase: self.phase,
            tokens: keep.iter().map(|&row| self.tokens[row]).collect(),
            positions: keep.iter().map(|&row| self.positions[row]).collect(),
            seqs,
            logit_rows: (0..keep.len()).collect(),
        }
    }
}

/// One sequence of a batch: its rows, and its cache in the layers of one segment.
#[derive(Clone, Debug)]
pub struct Seq<'a> {
    /// Rows of the batch.
    pub rows: Range<usize>,
    /// Slots that held keys before this batch; row `rows.start + i` is appended to slot `kv_start + i`.
    pub kv_start: usize,
    /// All slots, the new ones included, and maybe some behind them. A row sees those whose position is at most its own
    /// and inside the layer's window.
    pub slots: &'a Slots,
    /// Its pages.
    pub table: Table<'a>,
    /// Sealed pages of the table, in a cache that has such.
    pub n_sealed: usize,
    /// Rotation frequencies, `[head_dim / 2]`, radians a position.
    pub inv_freq: &'a [f64],
    /// Factor on cosine and sine (YaRN's attention factor; 1 elsewhere).
    pub rope_scale: f64,
    /// What a row sees: the sinks, as if they stood right in front of its window, and the window.
    pub rule: Rule,
}

impl Seq<'_> {
    /// Slots in use once this batch has been appended.
    pub fn kv_len(&self) -> usize {
        self.kv_start + self.rows.len()
    }

    /// The position of each.
    pub fn positions(&self) -> &[u32] {
        &self.slots.positions()[..self.kv_len()]
    }

    /// The page that holds slots `page_idx * page_len ..` of layer `layer` of the segment.
    pub fn page(&self, page_idx: usize, layer: usize) -> PageId {
        self.table.page(page_idx, layer)
    }
}

/// The pages of a sequence in the layers of one segment: those of the body, and behind them those of the tail.
#[derive(Clone, Copy, Debug)]
pub struct Table<'a> {
    /// Page ids `[page_idx][layer of the segment]`.
    pub body: &'a [PageId],
    /// The same; none where no page is sealed.
    pub tail: &'a [PageId],
    /// Layers in the segment: the stride.
    pub n_layers: usize,
}

impl Table<'_> {
    /// All of them in one list.
    pub fn pages(&self) -> Vec<PageId> {
        [self.body, self.tail].concat()
    }

    /// The page with this index of a layer.
    pub fn page(&self, page_idx: usize, layer: usize) -> PageId {
        let at = page_idx * self.n_layers + layer;
        self.body.get(at).copied().unwrap_or_else(|| self.tail[at - self.body.len()])
    }
}

/// Weights of one layer. Matrices are `[out][in]` as in the checkpoint.
#[derive(Debug)]
pub struct LayerWeights<M, V> {
    /// RMS norm before attention, `[hidden_dim]`.
    pub attn_norm: V,
    /// `[n_q_heads * head_dim][hidden_dim]`.
    pub q: M,
    /// `[n_kv_heads * head_dim][hidden_dim]`.
    pub k: M,
    /// `[n_kv_heads * head_dim][hidden_dim]`.
    pub v: M,
    /// Bias of q, then k, then v (Qwen2).
    pub qkv_bias: Option<V>,
    /// RMS norm over each head of q and of k, before rotation (Qwen3), `[head_dim]`.
    pub qk_norm: Option<[V; 2]>,
    /// `[hidden_dim][n_q_heads * head_dim]`.
    pub o: M,
    /// RMS norm before the MLP, `[hidden_dim]`.
    pub mlp_norm: V,
    /// `[ffn_dim][hidden_dim]`.
    pub gate: M,
    /// `[ffn_dim][hidden_dim]`.
    pub up: M,
    /// `[hidden_dim][ffn_dim]`.
    pub down: M,
}

/// What rows of activations hold. The CPU keeps all but [`Waiting`](Self::Waiting) in f32; CUDA rounds operands to bf16.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowUse {
    /// The residual stream, which is added to layer by layer.
    Residual,
    /// What a product or attention reads next.
    Operand,
    /// Logits, f32 on every device.
    Logits,
    /// Rows of the residual stream between two segments of the layers: f32, as in the stream.
    Transit,
    /// Rows of the residual stream that wait at a prune point, rounded to this.
    Waiting(Coding),
}

/// How a token is drawn from logits; see [`SamplerParams`](crate::SamplerParams).
#[derive(Clone, Debug, PartialEq)]
pub struct Draw {
    /// Divides the logits; 0: the first of the largest.
    pub temperature: f32,
    /// 0: all.
    pub top_k: u32,
    /// 1: all.
    pub top_p: f32,
    /// 0: all.
    pub min_p: f32,
    /// The draw, in [0, 1).
    pub uniform: f64,
    /// Bit set of the ids that are never drawn.
    pub masked: Option<Arc<[u32]>>,
    /// What happens to logits before; no id twice.
    pub changes: Vec<LogitChange>,
}

/// How a logit changes before a token is drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LogitChange {
    /// Whose it is.
    pub id: u32,
    /// Added first.
    pub bias: f32,
    /// Then divides what is positive and multiplies what is not; 1: neither.
    pub factor: f32,
    /// Then taken off.
    pub minus: f32,
}

/// The flags of the sessions in a pass: any one of them ends it.
#[derive(Clone, Debug, Default)]
pub struct Stop(Arc<[Arc<AtomicBool>]>);

impl Stop {
    pub(crate) fn new(flags: impl Iterator<Item = Arc<AtomicBool>>) -> Self {
        Self(flags.collect())
    }

    /// True once a flag is set.
    #[inline]
    pub fn is_set(&self) -> bool {
        self.0.iter().any(|flag| flag.load(Relaxed))
    }
}

/// Rows of a sequence whose attention to its slots is added up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MassRows {
    /// The sequence.
    pub seq_idx: usize,
    /// The first of them, a row of the batch.
    pub first_row: usize,
    /// How many.
    pub n_rows: usize,
}

/// A device and the ops that run on it.
///
/// Sizes are checked by the `Plan` before a batch is built; an implementation may
/// assert them. `layer` arguments count inside the segment whose page tables the batch holds.
pub trait Backend: Send + 'static {
    /// A weight matrix on the device.
    type Matrix: Send + Sync;
    /// A weight vector on the device, f32.
    type Vector: Send + Sync;
    /// Activations on the device: rows of one width, room for a fixed number.
    type Rows: Send;
    /// Storage of a pool of KV pages.
    type Pages: Send;

    /// Puts a matrix `[n][k]` on the device (the CPU keeps the mapped bytes).
    fn matrix(&mut self, tensor: &TensorView) -> Result<Self::Matrix, Error>;
    /// A bf16 matrix `[n][k]` uniform in `-scale .. scale`, from a counter that begins at `seed`: the same on
    /// every device.
    fn random_matrix(
        &mut self,
        n: usize,
        k: usize,
        seed: u64,
        scale: f32,
    ) -> Result<Self::Matrix, Error>;
    /// Puts a vector on the device: the parts one after another.
    fn vector(&mut self, parts: &[TensorView]) -> Result<Self::Vector, Error>;
    /// Room for `n_rows` rows of `width`.
    fn rows(&mut self, n_rows: usize, width: usize, holds: RowUse) -> Result<Self::Rows, Error>;
    /// Room for `n_pages` pages; the CPU commits memory as pages are written.
    fn pages(&mut self, layout: PageLayout, n_pages: usize) -> Result<Self::Pages, Error>;

    /// What may end the passes from now on. A device can look at it in the midst of an op and leave the
    /// rest undone: whoever runs the pass looks after every op, and forgets a pass that was stopped.
    fn watch(&mut self, _stop: &Stop) {}

    /// Takes in a batch before its layers run: rotation angles, page tables, positions.
    fn begin(&mut self, batch: &Batch<'_>, shape: AttentionShape) -> Result<(), Error>;

    /// Runs the pass that `begin` opened through `layers` of the model, if the device has recorded one of the same
    /// form over the same layers, weights, rows and pages: from [`embed`](Self::embed), if it begins with the first layer,
    /// to [`norm_lm_head`](Self::norm_lm_head), if it ends with the last. Where it answers `false` these ops are called,
    /// and then [`end`](Self::end): the device may be recording them. Rows that come and go and mass are no part of it:
    /// a pass whose mass is wanted between its layers goes without.
    fn replay(&mut self, _layers: &Range<usize>) -> Result<bool, Error> {
        Ok(false)
    }

    /// Ends a pass that was not replayed. A device that only recorded its ops runs them now, or forgets
    /// them if the pass failed.
    fn end(&mut self, outcome: Result<(), Error>) -> Result<(), Error> {
        outcome
    }

    /// `x[r] = table[tokens[r]]`.
    fn embed(
        &mut self,
        table: &Self::Matrix,
        batch: &Batch<'_>,
        x: &mut Self::Rows,
    ) -> Result<(), Error>;

    /// Norm, Q/K/V projection, bias, q/k norm, rotation; K and V go to their pages, Q to `q`.
    #[allow(clippy::too_many_arguments)]
    fn norm_qkv_rope_append(
        &mut self,
        weights: &LayerWeights<Self::Matrix, Self::Vector>,
        eps: f32,
        batch: &Batch<'_>,
        layer: usize,
        x: &Self::Rows,
        q: &mut Self::Rows,
        pages: &mut Self::Pages,
    ) -> Result<(), Error>;

    /// `out[r][h] = softmax(q[r][h] . K^T / sqrt(head_dim)) V` over the slots that row `r` sees:
    /// `position(slot) <= position(r)`, and `position(slot) > position(r) - window` if there is one. A row with
    /// more behind it than its [`Rule`] shows sees the sinks besides, with its query rotated to `rule.place(position)`.
    fn attention(
        &mut self,
        batch: &Batch<'_>,
        layer: usize,
        window: Option<usize>,
        q: &Self::Rows,
        pages: &Self::Pages,
        out: &mut Self::Rows,
    ) -> Result<(), Error>;

    /// `x += a W^T`.
    fn linear_residual(
        &mut self,
        w: &Self::Matrix,
        batch: &Batch<'_>,
        a: &Self::Rows,
        x: &mut Self::Rows,
    ) -> Result<(), Error>;

    /// `h = silu(norm(x) Wg^T) * (norm(x) Wu^T)`.
    fn norm_gate_up_silu(
        &mut self,
        weights: &LayerWeights<Self::Matrix, Self::Vector>,
        eps: f32,
        batch: &Batch<'_>,
        x: &Self::Rows,
        h: &mut Self::Rows,
    ) -> Result<(), Error>;

    /// `logits[i] = norm(x[logit_rows[i]]) head^T`; one kernel in both phases.
    fn norm_lm_head(
        &mut self,
        norm: &Self::Vector,
        eps: f32,
        head: &Self::Matrix,
        batch: &Batch<'_>,
        x: &Self::Rows,
        logits: &mut Self::Rows,
    ) -> Result<(), Error>;

    /// Draws a token from a row of logits. `None`: the device does not, or a logit is not finite; whoever
    /// asked reads the row then.
    fn sample(
        &mut self,
        _logits: &Self::Rows,
        _row: usize,
        _draw: &Draw,
    ) -> Result<Option<u32>, Error> {
        Ok(None)
    }

    /// Adds to `mass`, on the host, what each slot of a sequence, the new ones included, gets from some of its rows: the
    /// attention probability, the mean over all query heads and the sum over the rows, one after another. `mass`
    /// grows to all slots. It comes behind [`attention`](Self::attention) of the batch in this layer, with the same `q`,
    /// and not in a pass that is recorded. No sequence rolls.
    #[allow(clippy::too_many_arguments)]
    fn attention_mass(
        &mut self,
        batch: &Batch<'_>,
        of: MassRows,
        layer: usize,
        window: Option<usize>,
        q: &Self::Rows,
        pages: &Self::Pages,
        mass: &mut Vec<f32>,
    ) -> Result<(), Error>;

    /// `to[pair.1] = from[pair.0]` for every pair of rows, rounded to nearest even where `to` is narrower. No row of
    /// `to` is in two pairs.
    fn copy_rows(
        &mut self,
        from: &Self::Rows,
        to: &mut Self::Rows,
        pairs: &[(u32, u32)],
    ) -> Result<(), Error>;

    /// Moves rows `keep`, ascending, to the front; what stands behind them has no meaning.
    fn gather_rows(&mut self, rows: &mut Self::Rows, keep: &[usize]) -> Result<(), Error>;
    /// Copies rows `first ..` to the host as f32, as many as `out` has room for.
    fn read_rows(&mut self, rows: &Self::Rows, first: usize, out: &mut [f32]) -> Result<(), Error>;
    /// Fills rows `first ..` from the host, rounded as by [`copy_rows`](Self::copy_rows).
    fn write_rows(
        &mut self,
        rows: &mut Self::Rows,
        first: usize,
        from: &[f32],
    ) -> Result<(), Error>;
    /// Copies pages, `(from, to)` each (a fork's first append, copy on write).
    fn copy_pages(
        &mut self,
        pages: &mut Self::Pages,
        pairs: &[(PageId, PageId)],
    ) -> Result<(), Error>;
    /// Codes pages: each of `seals` holds afterwards what those it is made from hold in 16 bits.
    fn seal_pages(&mut self, pages: &mut Self::Pages, seals: &[Seal]) -> Result<(), Error>;
    /// The length of each slot's key in a layer, the mean over the key heads, for the first slots of a page table: as many
    /// as `out` has room for.
    fn key_norms(
        &mut self,
        pages: &Self::Pages,
        table: Table<'_>,
        layer: usize,
        out: &mut [f32],
    ) -> Result<(), Error>;
    /// In the first layers of a table, moves what slot `keep[layer][i]` holds to slot `i`, for all `i`. The lists rise and
    /// are as long as each other; what stands behind them has no meaning. Where the other pages are coded the slots of the
    /// first stay.
    fn keep_slots(
        &mut self,
        pages: &mut Self::Pages,
        table: Table<'_>,
        keep: &[Vec<u32>],
    ) -> Result<(), Error>;
    /// Copies a whole page to the host, in the layout of [`PageLayout`].
    fn read_page(&mut self, pages: &Self::Pages, page: PageId, out: &mut [u8])
    -> Result<(), Error>;
    /// Fills a whole page from the host.
    fn write_page(
        &mut self,
        pages: &mut Self::Pages,
        page: PageId,
        bytes: &[u8],
    ) -> Result<(), Error>;
}

/// Fails unless the bytes are those of a tensor of `rank` in a type that weights come in.
fn check_weight(tensor: &TensorView, rank: usize) -> Result<(), Error> {
    let refuse = |reason: String| {
        let reason = format!("tensor {} {reason}", tensor.name);
        Err(Error::State { call: "load a weight", reason })
    };
    let element = match tensor.dtype {
        Dtype::BF16 | Dtype::F16 => 2,
        Dtype::F32 => 4,
        other => return refuse(format!("is {other}; expected BF16, F16 or F32")),
    };
    let (shape, len) = (&tensor.shape, tensor.bytes.len());
    let bytes = shape.iter().try_fold(element, |n: usize, &dim| n.checked_mul(dim));
    match shape.len() == rank && bytes == Some(len) {
        true => Ok(()),
        false => refuse(format!("has shape {shape:?} and {len} bytes; rank {rank}")),
    }
}
