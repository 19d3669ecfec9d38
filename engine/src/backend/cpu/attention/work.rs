//! Which tasks a batch makes, and the merging of partial results.

use std::ops::Range;

use super::super::kv;
use super::super::mem::Shared;
use super::super::simd::{Dot, Kernel, MAX_LANES, Simd, exp2_each};
use super::super::team::Tasks;
use super::partial_len;
use crate::backend::{Batch, Phase, Seq};
use crate::store::AttentionShape;

/// Slots of a split.
const SPLIT: usize = 512;

/// Rows (tokens x heads of a group) that a task of prefill aims at: packing K and V is then some 2 % of
/// its work, and queries and output of 64-wide heads stay in L2.
const TASK_ROWS: usize = 192;

/// A unit of work.
#[derive(Clone, Debug)]
pub(in super::super) struct Task {
    pub(super) seq: usize,
    pub(super) kv_head: usize,
    /// Rows of the batch.
    pub(super) tokens: Range<usize>,
    /// Slots of the sequence, from the first of a tile on.
    pub(super) slots: Range<usize>,
    /// It begins with the sinks of a sequence that rolls.
    pub(super) has_sinks: bool,
    /// Where the partial result goes in decode, counted in rows; `None`: straight to the output.
    pub(super) partial: Option<usize>,
}

/// A result to be merged from partial ones.
#[derive(Clone, Debug)]
pub(in super::super) struct MergeTask {
    kv_head: usize,
    tokens: Range<usize>,
    n_splits: usize,
    /// First row of the first partial result; each has as many rows as there are tokens x heads.
    partial: usize,
}

/// The work of one batch, the same for all layers.
#[derive(Debug, Default)]
pub(in super::super) struct Work {
    pub(in super::super) tasks: Vec<Task>,
    pub(in super::super) merges: Vec<MergeTask>,
    /// Rows of partial results.
    pub(in super::super) partial_rows: usize,
    /// The most rows (tokens x heads) of a task.
    pub(in super::super) max_rows: usize,
}

impl Work {
    /// Lays out the tasks of a batch.
    pub(in super::super) fn fill(&mut self, batch: &Batch<'_>, shape: AttentionShape) {
        let group = shape.group_size();
        let step = (TASK_ROWS / group).max(1);
        self.tasks.clear();
        self.merges.clear();
        self.partial_rows = 0;
        self.max_rows = 0;
        for (seq_idx, seq) in batch.seqs.iter().enumerate() {
            // Late tokens see the most: they come first, so that no long task is left for the end.
            for first in seq.rows.clone().step_by(step).rev() {
                let tokens = first..seq.rows.end.min(first + step);
                self.max_rows = self.max_rows.max(tokens.len() * group);
                for kv_head in 0..shape.n_kv_heads {
                    self.push(batch.phase, seq_idx, seq, kv_head, tokens.clone(), group);
                }
            }
        }
    }

    fn push(
        &mut self,
        phase: Phase,
        seq_idx: usize,
        seq: &Seq<'_>,
        kv_head: usize,
        tokens: Range<usize>,
        group: usize,
    ) {
        let task = Task {
            seq: seq_idx,
            kv_head,
            tokens: tokens.clone(),
            slots: 0..seq.kv_len(),
            has_sinks: seq.rule.sinks > 0,
            partial: None,
        };
        let splits = || seq.slots.lots(0..seq.kv_len(), SPLIT);
        let n_splits = if phase == Phase::Decode { splits().count() } else { 1 };
        if n_splits <= 1 {
            self.tasks.push(task);
            return;
        }
        let n_rows = tokens.len() * group;
        self.merges.push(MergeTask { kv_head, tokens, n_splits, partial: self.partial_rows });
        for slots in splits() {
            let partial = Some(self.partial_rows);
            let has_sinks = task.has_sinks && slots.start == 0;
            self.tasks.push(Task { slots, partial, has_sinks, ..task.clone() });
            self.partial_rows += n_rows;
        }
    }
}

/// Merges the partial results of splits, in their order.
pub(in super::super) struct Merge<'a> {
    pub(in super::super) work: &'a Work,
    pub(in super::super) shape: AttentionShape,
    /// Values are rotated in the cache: the results are rotated back.
    pub(in super::super) is_rotated: bool,
    /// `[partial row][partial_len]`
    pub(in super::super) partial: &'a [f32],
    pub(in super::super) out: Shared<'a, f32>,
    pub(in super::super) tasks: &'a Tasks,
    pub(in super::super) thread_idx: usize,
}

impl Kernel for Merge<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd, D: Dot>(self) {
        while let Some(i) = self.tasks.next(self.thread_idx) {
            let task = &self.work.merges[i];
            let group = self.shape.group_size();
            for r in 0..task.tokens.len() * group {
                // SAFETY: this row of the output is this task's.
                unsafe { self.row::<S>(task, r, group) };
            }
        }
    }
}

impl Merge<'_> {
    #[inline(always)]
    unsafe fn row<S: Simd>(&self, task: &MergeTask, r: usize, group: usize) {
        let d = self.shape.head_dim;
        let n_rows = task.tokens.len() * group;
        let (token, head) = (task.tokens.start + r / group, task.kv_head * group + r % group);
        let part = |split: usize| {
            self.partial.as_ptr().wrapping_add((task.partial + split * n_rows + r) * partial_len(d))
        };
        // SAFETY: every split has a partial row; the output has the row.
        unsafe {
            let out = self.out.get().add((token * self.shape.n_q_heads + head) * d);
            let max = (0..task.n_splits).fold(f32::NEG_INFINITY, |m, i| m.max(*part(i).add(d)));
            let base = if max == f32::NEG_INFINITY { 0.0 } else { max };
            std::ptr::write_bytes(out, 0, d);
            let mut sum = 0.0;
            for split in 0..task.n_splits {
                let part = part(split);
                let mut weight = [*part.add(d) - base; MAX_LANES];
                exp2_each::<S>(&mut weight);
                sum += *part.add(d + 1) * weight[0];
                for i in 0..d {
                    *out.add(i) += *part.add(i) * weight[0];
                }
            }
            let factor = if sum == 0.0 { 0.0 } else { 1.0 / sum };
            for i in 0..d {
                *out.add(i) *= factor;
            }
            if self.is_rotated {
                kv::rotate(std::slice::from_raw_parts_mut(out, d));
            }
        }
    }
}
