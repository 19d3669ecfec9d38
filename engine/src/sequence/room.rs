//! Memory for what is noted of sequences in a pass: asked for before, so that nothing of it has to fail half-way.

use super::{Pending, Segment, Sequence};
use crate::error::Error;
use crate::memory;
use crate::plan::Plan;

/// What is noted of a slot in a pass, in bytes at most: its token, its position and how deep it is, in lists that double as
/// they grow, and ten numbers where a policy chooses.
const SLOT_BYTES: usize = 192;
/// Of a slot of a layer where attention counts.
const ATTENTION_BYTES: usize = 40;
/// Of a row, for each key head: its token and position, where its hidden state is and was, its tasks of attention.
const ROW_BYTES: usize = 768;
/// Of a row, for each number of a head: sine and cosine of two rotations, in lists that double.
const ANGLE_BYTES: usize = 24;
/// Of a page of tokens, besides an entry of the table for each layer: who may share it, where hidden states are.
const PAGE_BYTES: usize = 512;
/// Pages of a table that hold less than others at most.
const N_SHORT_PAGES: usize = 32;
/// Of an entry of a page table, in a list that doubles, in what a call keeps to be undone, and in what is sealed.
const ENTRY_BYTES: usize = 24;

/// What the sequences of a pass note of it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Lists {
    /// Rows of the pass that none of them has.
    pub(crate) n_rows: usize,
    /// Of their lists.
    bytes: usize,
    /// Pages that may be entered into the index of prefixes.
    pub(crate) n_pages: usize,
}

impl Lists {
    /// Of a pass of so many rows.
    pub(crate) fn new(n_rows: usize) -> Self {
        Self { n_rows, bytes: 0, n_pages: 0 }
    }

    /// Adds the lists of a sequence.
    pub(crate) fn add(&mut self, seq: &Sequence, plan: &Plan) {
        let n_new = seq.pending.len();
        let n_rows = n_new.max(seq.stage.chosen.len()).min(self.n_rows);
        self.n_rows -= n_rows;
        self.bytes = self.bytes.saturating_add(seq.list_bytes(plan, n_new, n_rows));
        if matches!(seq.pending, Pending::Prompt { .. }) {
            self.n_pages += n_new / plan.layout.page_len + 1;
        }
    }

    /// Fails unless there is memory for all.
    pub(crate) fn check(&self) -> Result<(), Error> {
        memory::room_for(self.bytes, "the lists of a pass")
    }
}

impl Sequence {
    /// Fails unless there is memory for the lists of the sequence's tokens and `n_new` more.
    pub(crate) fn room_for_lists(&self, plan: &Plan, n_new: usize) -> Result<(), Error> {
        memory::room_for(self.list_bytes(plan, n_new, 0), "the lists of a session's tokens")
    }

    /// The most that is noted of the sequence's tokens, `n_new` more and as many of these as `n_rows` in a pass, until the
    /// pass is committed and what follows from it is chosen, in bytes: page tables, the rows of a batch, the
    /// lists that a policy sorts.
    fn list_bytes(&self, plan: &Plan, n_new: usize, n_rows: usize) -> usize {
        let n_held = self.segments.iter().map(Segment::len).max().unwrap_or(0);
        let n_slots = n_held.max(self.tokens.len()).saturating_add(n_new);
        let n_pages = n_slots / plan.layout.page_len + N_SHORT_PAGES;
        // The attention of slots: before the call, before the pass, after it, and as it is sorted.
        let evicts = self.recipe.evict.is_some();
        let of_layers = if evicts { plan.n_layers * ATTENTION_BYTES } else { 0 };
        let of_slot = SLOT_BYTES + plan.shape.n_kv_heads + of_layers;
        let of_row = ROW_BYTES * plan.shape.n_kv_heads + ANGLE_BYTES * plan.shape.head_dim;
        let of_page = PAGE_BYTES + plan.n_layers * ENTRY_BYTES;
        [(n_slots, of_slot), (n_rows, of_row), (n_pages, of_page)]
            .into_iter()
            .fold(0, |sum: usize, (n, bytes)| sum.saturating_add(n.saturating_mul(bytes)))
    }
}
