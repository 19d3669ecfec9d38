//! A batch as the arrays that kernels read.

use loris_kernels::abi::{LORIS_DENSE, LorisQTile, LorisSeq};
use loris_kernels::ops::attention::{self, AttentionShape};
use loris_kernels::ops::batch::HostBatch;

use crate::backend::{Batch, Phase};

/// Arrays of the batch at hand; see `LorisBatch` in `abi.h`.
#[derive(Debug, Default)]
pub(super) struct Arrays {
    seqs: Vec<LorisSeq>,
    row_seq: Vec<u32>,
    positions: Vec<u32>,
    slot_positions: Vec<u32>,
    page_tables: Vec<u32>,
    n_layers: usize,
    tokens: Vec<u32>,
    cos_sin: Vec<f32>,
    tiles: Vec<LorisQTile>,
    logit_rows: Vec<u32>,
    /// Slots in use of the longest sequence.
    pub(super) max_kv_len: usize,
}

impl Arrays {
    /// Takes in a batch. Counts fit 32 bits: rows, slots and pages are bounded by the plan.
    #[allow(clippy::cast_possible_truncation)]
    pub(super) fn fill(&mut self, batch: &Batch<'_>, shape: AttentionShape) {
        self.clear();
        self.positions.extend(&batch.positions);
        self.tokens.extend(&batch.tokens);
        self.logit_rows.extend(batch.logit_rows.iter().map(|&row| row as u32));
        for (seq_idx, seq) in batch.seqs.iter().enumerate() {
            let slots = &seq.slot_positions[..seq.kv_len()];
            let is_dense = slots.iter().zip(0..).all(|(&position, slot)| position == slot);
            self.seqs.push(LorisSeq {
                row_start: seq.rows.start as u32,
                n_rows: seq.rows.len() as u32,
                kv_start: seq.kv_start as u32,
                page_table_start: self.page_tables.len() as u32,
                positions_start: match is_dense {
                    true => LORIS_DENSE,
                    false => self.slot_positions.len() as u32,
                },
                n_sealed: seq.n_sealed as u32,
            });
            if !is_dense {
                self.slot_positions.extend(slots);
            }
            self.page_tables.extend(seq.page_table);
            self.n_layers = seq.n_layers;
            self.max_kv_len = self.max_kv_len.max(seq.kv_len());
            for row in seq.rows.clone() {
                self.row_seq.push(seq_idx as u32);
                // In f64: a position of millions is as exact as position 4.
                let position = f64::from(batch.positions[row]);
                for &freq in seq.inv_freq {
                    let (sin, cos) = (position * freq).sin_cos();
                    self.cos_sin.push((cos * seq.rope_scale) as f32);
                    self.cos_sin.push((sin * seq.rope_scale) as f32);
                }
            }
        }
        if batch.phase == Phase::Prefill {
            self.tiles = attention::q_tiles(shape, &self.seqs);
        }
    }

    fn clear(&mut self) {
        self.seqs.clear();
        self.row_seq.clear();
        self.positions.clear();
        self.slot_positions.clear();
        self.page_tables.clear();
        self.tokens.clear();
        self.cos_sin.clear();
        self.tiles.clear();
        self.logit_rows.clear();
        self.max_kv_len = 0;
    }

    /// As it is uploaded.
    pub(super) fn host(&self) -> HostBatch<'_> {
        HostBatch {
            seqs: &self.seqs,
            row_seq: &self.row_seq,
            positions: &self.positions,
            slot_positions: &self.slot_positions,
            page_tables: &self.page_tables,
            n_layers: self.n_layers,
            tokens: &self.tokens,
            cos_sin: &self.cos_sin,
            tiles: &self.tiles,
            logit_rows: &self.logit_rows,
        }
    }
}
