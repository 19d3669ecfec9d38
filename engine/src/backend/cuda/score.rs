//! Token scores: what attention leaves for them, and the way to the host.

use loris_kernels::ops::attention::AttentionShape;
use loris_kernels::ops::batch::DeviceBatch;
use loris_kernels::ops::token_score;
use loris_kernels::{Buffer, Device, KvPages, Rows};

use super::missing;
use crate::backend::{Score, Seq};
use crate::error::Error;
use crate::memory;

/// What scores are made from. Attention leaves its part in every pass, wanted or not: a number for each row and head,
/// next to the head that it gives, and so a recording serves both.
#[derive(Debug, Default)]
pub(super) struct Scorer {
    /// `[rows][n_q_heads]` of the layer that ran last: the natural log of a row's sum of `exp(score)`.
    pub(super) lse: Option<Buffer<f32>>,
    /// Of one sequence; grows with the longest.
    scores: Option<Buffer<f32>>,
}

impl Scorer {
    /// Room for what attention leaves of `n_rows` rows; true if its address has changed.
    pub(super) fn reserve(
        &mut self,
        d: &Device,
        n_rows: usize,
        n_q_heads: usize,
    ) -> Result<bool, Error> {
        let len = n_rows.saturating_mul(n_q_heads);
        if self.lse.as_ref().is_some_and(|lse| lse.len() >= len) {
            return Ok(false);
        }
        self.lse = None;
        self.lse = Some(Buffer::new(d, len, "log sums of attention")?);
        Ok(true)
    }

    /// Adds to the scores of the slots of `seq`, which is `score.seq_idx` of the batch, and waits for them.
    #[allow(clippy::too_many_arguments)] // those of the launcher
    pub(super) fn score(
        &mut self,
        d: &Device,
        shape: AttentionShape,
        batch: &DeviceBatch,
        seq: &Seq<'_>,
        score: Score,
        layer: usize,
        window: Option<u32>,
        q: &Rows<u16>,
        pages: &KvPages,
        scores: &mut Vec<f32>,
    ) -> Result<(), Error> {
        let len = batch.max_kv_len();
        if self.scores.as_ref().is_none_or(|scores| scores.len() < len) {
            self.scores = None;
            self.scores = Some(Buffer::new(d, len.next_power_of_two(), "token scores")?);
        }
        let (Some(lse), Some(on_device)) = (&self.lse, &mut self.scores) else {
            return Err(missing("log sums of attention"));
        };
        let Score { seq_idx, first_row, n_rows } = score;
        let (rows, n_so_far) = (first_row..first_row + n_rows, scores.len());
        if n_so_far > 0 {
            on_device.upload(d, 0, scores)?;
        }
        token_score::token_score(
            d, shape, batch, seq_idx, rows, layer, window, q, lse, pages, n_so_far, on_device,
        )?;
        let mut sums = memory::zeros(seq.kv_len(), "token scores")?;
        on_device.download(d, 0, &mut sums)?;
        *scores = sums;
        Ok(())
    }
}
