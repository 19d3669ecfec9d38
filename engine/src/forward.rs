//! The forward pass: a batch of rows through the layers, on any backend.
//!
//! One pass has one phase, so the kernels that run depend on nothing else. Rows never mix except through
//! the cache: a row reads the pages of its own sequence.

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use loris_loader::ModelConfig;

use crate::backend::{Backend, Batch, Draw, MassRows, Phase, RowUse, Stop, Table};
use crate::error::Error;
use crate::memory;
use crate::model::{self, ModelWeights, Progress, Source};
use crate::plan::Plan;
use crate::pool::{AuxRow, Store};
use crate::store::{PageId, Seal};

/// A model on a device: weights, pages and room for one pass.
pub(crate) struct Executor<B: Backend> {
    backend: B,
    weights: ModelWeights<B::Matrix, B::Vector>,
    pages: B::Pages,
    norm_eps: f32,
    windows: Vec<Option<usize>>,
    plan: Plan,
    /// Residual stream, `[rows][hidden_dim]`.
    x: B::Rows,
    /// Queries, `[rows][n_q_heads * head_dim]`.
    q: B::Rows,
    /// Attention output, `[rows][n_q_heads * head_dim]`.
    att: B::Rows,
    /// Gated MLP activations, `[rows][ffn_dim]`.
    h: B::Rows,
    /// Hidden states between segments; none in a model that was opened without room for them.
    aux: Option<AuxRows<B::Rows>>,
    /// `[batch][vocab_size]`.
    logits: B::Rows,
    /// Logits of the last run on the host, once somebody has asked for a row of them.
    host_logits: Vec<f32>,
    /// Rows of logits that the last run gave, and whether they are on the host.
    n_logits: usize,
    is_read: bool,
    n_runs: u64,
}

/// The stores of hidden states between segments of the layers.
struct AuxRows<R> {
    /// `[transit pages * page_len][hidden_dim]`, f32.
    transit: R,
    /// `[aux pages * page_len][hidden_dim]`, in the KV cache's format.
    waiting: R,
}

impl<R> AuxRows<R> {
    fn of(&self, store: Store) -> &R {
        match store {
            Store::Transit => &self.transit,
            Store::Waiting => &self.waiting,
        }
    }
}

/// Rows on their way through some layers.
#[derive(Debug)]
pub(crate) struct Pass<'a> {
    pub(crate) batch: Batch<'a>,
    /// Pages to copy first.
    pub(crate) copies: Vec<(PageId, PageId)>,
    /// Pages to code then.
    pub(crate) seals: Vec<Seal>,
    /// Hidden states to move first, from the store in transit to the one that waits.
    pub(crate) waits: Vec<(AuxRow, AuxRow)>,
    pub(crate) layers: Range<usize>,
    /// Hidden states that the batch's rows come from; none: their tokens are embedded.
    pub(crate) from: Vec<AuxRow>,
    /// Where they go, in transit; none: logits follow.
    pub(crate) to: Vec<AuxRow>,
    /// Rows whose mass is wanted in the last of the layers.
    pub(crate) mass: Vec<MassRows>,
    /// Rows whose attention is wanted in every layer.
    pub(crate) observed: Vec<Observed<'a>>,
}

/// Rows of one sequence whose attention to each slot is added up.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Observed<'a> {
    pub(crate) rows: MassRows,
    /// What earlier rows paid, `[layer][slot]`; nothing: none.
    pub(crate) so_far: &'a [Vec<f32>],
}

/// What a pass gave, besides logits.
#[derive(Debug, Default)]
pub(crate) struct Done {
    /// The device replayed a recorded pass.
    pub(crate) replayed: bool,
    /// For each of [`Pass::mass`].
    pub(crate) mass: Vec<Vec<f32>>,
    /// For each of [`Pass::observed`], `[layer][slot]`: the sum over all rows.
    pub(crate) observed: Vec<Vec<Vec<f32>>>,
}

/// [`Executor`] without its backend's type: what the sessions of a model share.
pub(crate) trait Execute: Send {
    /// Runs a pass, which `stop` ends within an op.
    fn run(&mut self, pass: &Pass<'_>, stop: &Stop) -> Result<Done, Error>;
    /// The runs so far: logits are those of the last one.
    fn n_runs(&self) -> u64;
    /// A token drawn from the logits of `batch.logit_rows[idx]` on the device; `None`: read them instead.
    fn sample(&mut self, idx: usize, draw: &Draw) -> Result<Option<u32>, Error>;
    /// Logits of `batch.logit_rows[idx]` of the last run; on an error `out` is as it was.
    fn read_logits(&mut self, idx: usize, out: &mut [f32]) -> Result<(), Error>;
    fn read_page(&mut self, page: PageId, out: &mut [u8]) -> Result<(), Error>;
    fn write_page(&mut self, page: PageId, bytes: &[u8]) -> Result<(), Error>;
    /// A hidden state, `[hidden_dim]`.
    fn read_aux(&mut self, row: AuxRow, out: &mut [f32]) -> Result<(), Error>;
    fn write_aux(&mut self, row: AuxRow, from: &[f32]) -> Result<(), Error>;
    /// [`Backend::key_norms`].
    fn key_norms(&mut self, table: Table<'_>, layer: usize, out: &mut [f32]) -> Result<(), Error>;
    /// Copies pages, `(from, to)` each; then [`Backend::keep_slots`] in every layer, `keep[layer]`.
    fn keep_slots(
        &mut self,
        copies: &[(PageId, PageId)],
        table: Table<'_>,
        keep: &[Vec<u32>],
    ) -> Result<(), Error>;
}

impl<B: Backend> Executor<B> {
    pub(crate) fn new(
        mut backend: B,
        config: &ModelConfig,
        source: Source<'_>,
        plan: &Plan,
        progress: &mut Progress<'_>,
    ) -> Result<Self, Error> {
        let weights = model::weights(config, source, &mut backend, progress)?;
        let q_dim = plan.shape.n_q_heads * plan.shape.head_dim;
        Ok(Self {
            pages: backend.pages(plan.layout, plan.n_pages)?,
            x: backend.rows(plan.max_rows, config.hidden_dim, RowUse::Residual)?,
            q: backend.rows(plan.max_rows, q_dim, RowUse::Operand)?,
            att: backend.rows(plan.max_rows, q_dim, RowUse::Operand)?,
            h: backend.rows(plan.max_rows, config.ffn_dim, RowUse::Operand)?,
            aux: match plan.layout.page_len {
                _ if plan.n_aux_pages == 0 => None,
                page_len => Some(AuxRows {
                    transit: backend.rows(
                        plan.n_transit_pages * page_len,
                        config.hidden_dim,
                        RowUse::Transit,
                    )?,
                    waiting: backend.rows(
                        plan.n_aux_pages * page_len,
                        config.hidden_dim,
                        RowUse::Waiting(plan.layout.kv.wide()),
                    )?,
                }),
            },
            logits: backend.rows(plan.batch, config.vocab_size, RowUse::Logits)?,
            host_logits: memory::zeros(plan.batch * config.vocab_size, "the logits of a pass")?,
            n_logits: 0,
            is_read: false,
            n_runs: 0,
            norm_eps: config.norm_eps,
            windows: config.windows.clone(),
            plan: plan.clone(),
            weights,
            backend,
        })
    }

    /// Moves hidden states to where they wait, as many at a time as a pass has rows: there may be most of a
    /// prompt's, and a cancel does not wait for them.
    fn wait(&mut self, waits: &[(AuxRow, AuxRow)], stop: &Stop) -> Result<(), Error> {
        for waits in waits.chunks(self.plan.max_rows) {
            check(stop)?;
            let AuxRows { transit, waiting } = self.aux.as_mut().ok_or_else(no_aux)?;
            let pairs: Vec<_> = waits.iter().map(|(from, to)| (from.row, to.row)).collect();
            self.backend.copy_rows(transit, waiting, &pairs)?;
        }
        Ok(())
    }

    fn forward(&mut self, pass: &Pass<'_>, stop: &Stop) -> Result<Done, Error> {
        check(stop)?;
        self.backend.watch(stop);
        self.backend.begin(&pass.batch, self.plan.shape)?;
        // What differs between passes of one form is around what a device records.
        self.take_up(pass, stop)?;
        let replayed = pass.observed.is_empty() && self.backend.replay(&pass.layers)?;
        let mut observed = vec![Vec::new(); pass.observed.len()];
        if !replayed {
            // The device is told of a panic too: it must not go on recording.
            match catch_unwind(AssertUnwindSafe(|| self.layers(pass, &mut observed, stop))) {
                Ok(outcome) => self.backend.end(outcome)?,
                Err(payload) => {
                    let _ = self.backend.end(Err(Error::Cancelled));
                    resume_unwind(payload)
                }
            }
        }
        let mass = self.leave(pass, stop)?;
        Ok(Done { replayed, mass, observed })
    }

    /// Rows that come from an earlier segment join the pass.
    fn take_up(&mut self, pass: &Pass<'_>, stop: &Stop) -> Result<(), Error> {
        if pass.from.is_empty() {
            return Ok(());
        }
        let Self { backend, x, aux, .. } = self;
        let aux = aux.as_ref().ok_or_else(no_aux)?;
        for store in [Store::Transit, Store::Waiting] {
            let from = pass.from.iter().zip(0..).filter(|(from, _)| from.store == store);
            let pairs: Vec<_> = from.map(|(from, row)| (from.row, row)).collect();
            if !pairs.is_empty() {
                backend.copy_rows(aux.of(store), x, &pairs)?;
                check(stop)?;
            }
        }
        Ok(())
    }

    /// Rows that go to a later segment leave the pass; gives the mass there.
    fn leave(&mut self, pass: &Pass<'_>, stop: &Stop) -> Result<Vec<Vec<f32>>, Error> {
        let mut mass = Vec::new();
        if pass.to.is_empty() {
            return Ok(mass);
        }
        let Self { backend, x, q, pages, aux, .. } = self;
        let (last, window) = (pass.layers.len() - 1, self.windows[pass.layers.end - 1]);
        for &rows in &pass.mass {
            let mut of_slots = Vec::new();
            backend.attention_mass(&pass.batch, rows, last, window, q, pages, &mut of_slots)?;
            check(stop)?;
            #[allow(clippy::cast_precision_loss)] // a few rows
            of_slots.iter_mut().for_each(|sum| *sum /= rows.n_rows as f32);
            mass.push(of_slots);
        }
        let pairs: Vec<_> = (0..).zip(pass.to.iter().map(|to| to.row)).collect();
        let aux = aux.as_mut().ok_or_else(no_aux)?;
        backend.copy_rows(x, &mut aux.transit, &pairs)?;
        check(stop)?;
        Ok(mass)
    }

    fn layers(
        &mut self,
        pass: &Pass<'_>,
        observed: &mut [Vec<Vec<f32>>],
        stop: &Stop,
    ) -> Result<(), Error> {
        let Self { backend, weights, pages, x, q, att, h, .. } = self;
        let eps = self.norm_eps;
        let shape = self.plan.shape;
        // An op that was stopped is half done: nothing may follow it.
        let whole = |op: Result<(), Error>| op.and_then(|()| check(stop));
        if pass.from.is_empty() {
            whole(backend.embed(&weights.embed, &pass.batch, x))?;
        }
        let wanted = pass.batch.of_logit_rows();
        let mut batch = &pass.batch;
        for l in pass.layers.clone() {
            let layer = &weights.layers[l];
            let in_segment = l - pass.layers.start;
            whole(backend.norm_qkv_rope_append(layer, eps, batch, in_segment, x, q, pages))?;
            // All that later tokens need of rows without logits is in the cache now, unless their attention counts. In
            // decode these are few and go along, so that what is recorded has one batch.
            let is_last = l + 1 == weights.layers.len();
            let is_observed = !pass.observed.is_empty();
            let is_done = is_last && wanted.n_rows() == 0;
            if is_done && !is_observed {
                return Ok(());
            }
            let is_cut = batch.phase == Phase::Prefill && wanted.n_rows() < batch.n_rows();
            if is_last && is_cut && !is_observed {
                backend.gather_rows(x, &batch.logit_rows)?;
                backend.gather_rows(q, &batch.logit_rows)?;
                backend.begin(&wanted, shape)?;
                batch = &wanted;
            }
            let window = self.windows[l];
            whole(backend.attention(batch, in_segment, window, q, pages, att))?;
            for (&Observed { rows, so_far }, layers) in pass.observed.iter().zip(&mut *observed) {
                let mut sums = so_far.get(l).cloned().unwrap_or_default();
                whole(
                    backend.attention_mass(batch, rows, in_segment, window, q, pages, &mut sums),
                )?;
                layers.push(sums);
            }
            if is_done {
                return Ok(());
            }
            whole(backend.linear_residual(&layer.o, batch, att, x))?;
            whole(backend.norm_gate_up_silu(layer, eps, batch, x, h))?;
            whole(backend.linear_residual(&layer.down, batch, h, x))?;
        }
        if !pass.to.is_empty() {
            return Ok(());
        }
        let head = weights.head.as_ref().unwrap_or(&weights.embed);
        whole(backend.norm_lm_head(&weights.final_norm, eps, head, batch, x, &mut self.logits))
    }
}

/// What sessions that prune are refused with before it comes to this.
fn no_aux() -> Error {
    Error::State { call: "pass", reason: "the model was opened without aux tokens".into() }
}

fn check(stop: &Stop) -> Result<(), Error> {
    match stop.is_set() {
        true => Err(Error::Cancelled),
        false => Ok(()),
    }
}

impl<B: Backend> Execute for Executor<B> {
    fn run(&mut self, pass: &Pass<'_>, stop: &Stop) -> Result<Done, Error> {
        (self.n_logits, self.is_read) = (pass.batch.logit_rows.len(), false);
        self.n_runs += 1;
        if !pass.copies.is_empty() {
            self.backend.copy_pages(&mut self.pages, &pass.copies)?;
        }
        if !pass.seals.is_empty() {
            self.backend.seal_pages(&mut self.pages, &pass.seals)?;
        }
        self.wait(&pass.waits, stop)?;
        self.forward(pass, stop)
    }

    fn n_runs(&self) -> u64 {
        self.n_runs
    }

    fn sample(&mut self, idx: usize, draw: &Draw) -> Result<Option<u32>, Error> {
        self.backend.sample(&self.logits, idx, draw)
    }

    fn read_logits(&mut self, idx: usize, out: &mut [f32]) -> Result<(), Error> {
        if !self.is_read {
            let all = &mut self.host_logits[..self.n_logits * out.len()];
            self.backend.read_rows(&self.logits, 0, all)?;
            self.is_read = true;
        }
        let row = &self.host_logits[idx * out.len()..][..out.len()];
        if let Some(token_id) = row.iter().position(|l| !l.is_finite()) {
            return Err(Error::NonFinite { pos: idx, token_id });
        }
        out.copy_from_slice(row);
        Ok(())
    }

    fn read_page(&mut self, page: PageId, out: &mut [u8]) -> Result<(), Error> {
        self.backend.read_page(&self.pages, page, out)
    }

    fn write_page(&mut self, page: PageId, bytes: &[u8]) -> Result<(), Error> {
        self.backend.write_page(&mut self.pages, page, bytes)
    }

    fn read_aux(&mut self, row: AuxRow, out: &mut [f32]) -> Result<(), Error> {
        let rows = self.aux.as_ref().ok_or_else(no_aux)?.of(row.store);
        self.backend.read_rows(rows, row.row as usize, out)
    }

    fn write_aux(&mut self, row: AuxRow, from: &[f32]) -> Result<(), Error> {
        let AuxRows { transit, waiting } = self.aux.as_mut().ok_or_else(no_aux)?;
        let rows = match row.store {
            Store::Transit => transit,
            Store::Waiting => waiting,
        };
        self.backend.write_rows(rows, row.row as usize, from)
    }

    fn key_norms(&mut self, table: Table<'_>, layer: usize, out: &mut [f32]) -> Result<(), Error> {
        self.backend.key_norms(&self.pages, table, layer, out)
    }

    fn keep_slots(
        &mut self,
        copies: &[(PageId, PageId)],
        table: Table<'_>,
        keep: &[Vec<u32>],
    ) -> Result<(), Error> {
        let Self { backend, pages, .. } = self;
        if !copies.is_empty() {
            backend.copy_pages(pages, copies)?;
        }
        backend.keep_slots(pages, table, keep)
    }
}
