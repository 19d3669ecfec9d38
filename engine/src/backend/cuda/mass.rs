//! Attention mass: what attention leaves for it, and the way to the host.

use loris_kernels::ops::attention_mass;
use loris_kernels::ops::batch::DeviceBatch;
use loris_kernels::{Buffer, Device, KvPages, Rows};

use super::rows::missing;
use crate::backend::{MassRows, Seq};
use crate::error::Error;
use crate::memory;
use crate::store::AttentionShape;

/// What mass is made from. Attention leaves its part in every pass, wanted or not: a number for each row and head,
/// next to the head that it gives, and so a recording serves both.
#[derive(Debug, Default)]
pub(super) struct Mass {
    /// `[rows][n_q_heads]` of the layer that ran last: the natural log of a row's sum of `exp(score)`.
    pub(super) lse: Option<Buffer<f32>>,
    /// Of one sequence; grows with the longest.
    sums: Option<Buffer<f32>>,
}

impl Mass {
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

    /// Adds to the scores of the slots of `seq`, which is `of.seq_idx` of the batch, and waits for them.
    #[allow(clippy::too_many_arguments)] // those of the launcher
    pub(super) fn add(
        &mut self,
        d: &Device,
        shape: AttentionShape,
        batch: &DeviceBatch,
        seq: &Seq<'_>,
        of: MassRows,
        layer: usize,
        window: Option<u32>,
        q: &Rows<u16>,
        pages: &KvPages,
        mass: &mut Vec<f32>,
    ) -> Result<(), Error> {
        let len = batch.max_kv_len();
        if self.sums.as_ref().is_none_or(|sums| sums.len() < len) {
            self.sums = None;
            self.sums = Some(Buffer::new(d, len.next_power_of_two(), "the mass of slots")?);
        }
        let (Some(lse), Some(on_device)) = (&self.lse, &mut self.sums) else {
            return Err(missing("log sums of attention"));
        };
        let MassRows { seq_idx, first_row, n_rows } = of;
        let (rows, n_so_far) = (first_row..first_row + n_rows, mass.len());
        if n_so_far > 0 {
            on_device.upload(d, 0, mass)?;
        }
        attention_mass::attention_mass(
            d, shape, batch, seq_idx, rows, layer, window, q, lse, pages, n_so_far, on_device,
        )?;
        let mut sums = memory::zeros(seq.kv_len(), "the mass of slots")?;
        on_device.download(d, 0, &mut sums)?;
        *mass = sums;
        Ok(())
    }
}
