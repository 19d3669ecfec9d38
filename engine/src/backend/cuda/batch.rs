//! A batch as the arrays that kernels read.

use std::iter::repeat_n;

use loris_kernels::abi::{LORIS_DENSE, LorisQTile, LorisSeq};
use loris_kernels::ops::attention;
use loris_kernels::ops::batch::{self, HostBatch};

use crate::backend::{Batch, Phase, Seq};
use crate::store::AttentionShape;

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
    sink_cos_sin: Vec<f32>,
    tiles: Vec<LorisQTile>,
    logit_rows: Vec<u32>,
    /// The largest [`batch::kv_len`].
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
        let has_sinks = batch.seqs.iter().any(|seq| seq.rule.sinks > 0);
        for (seq_idx, seq) in batch.seqs.iter().enumerate() {
            let (is_dense, n_gone) = (seq.slots.are_dense(seq.kv_len()), seq.slots.n_gone());
            let this = LorisSeq {
                row_start: seq.rows.start as u32,
                n_rows: seq.rows.len() as u32,
                kv_start: seq.kv_start as u32,
                page_table_start: self.page_tables.len() as u32,
                positions_start: match is_dense {
                    true => LORIS_DENSE,
                    false => self.slot_positions.len() as u32,
                },
                n_sealed: seq.n_sealed as u32,
                n_gone: n_gone as u32,
                sink: seq.rule.sinks,
                window: if seq.rule.rolls() { seq.rule.window } else { 0 },
            };
            self.max_kv_len = self.max_kv_len.max(batch::kv_len(&this));
            self.seqs.push(this);
            if !is_dense {
                let n_pinned = seq.slots.n_pinned().min(seq.kv_len());
                let (pinned, rest) = seq.positions().split_at(n_pinned);
                self.slot_positions.extend(pinned);
                self.slot_positions.extend(repeat_n(u32::MAX, n_gone));
                self.slot_positions.extend(rest);
            }
            self.page_tables.extend(seq.table.body);
            self.page_tables.extend(seq.table.tail);
            self.n_layers = seq.table.n_layers;
            for row in seq.rows.clone() {
                self.row_seq.push(seq_idx as u32);
                let position = batch.positions[row];
                push_angles(&mut self.cos_sin, seq, f64::from(position), seq.rope_scale);
                if has_sinks {
                    let place = seq.rule.place(position);
                    let by = f64::from(place) - f64::from(position);
                    push_angles(&mut self.sink_cos_sin, seq, by, 1.0);
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
        self.sink_cos_sin.clear();
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
            sink_cos_sin: &self.sink_cos_sin,
            tiles: &self.tiles,
            logit_rows: &self.logit_rows,
        }
    }
}

/// Cosines and sines of a rotation by so many positions, in f64: by millions it is as exact as by 4.
#[allow(clippy::cast_possible_truncation)]
fn push_angles(to: &mut Vec<f32>, seq: &Seq<'_>, positions: f64, scale: f64) {
    for &freq in seq.inv_freq {
        let (sin, cos) = (positions * freq).sin_cos();
        to.push((cos * scale) as f32);
        to.push((sin * scale) as f32);
    }
}
