//! A pass from the parts of sequences.

use std::ops::Range;

use super::change::{Change, Job};
use crate::backend::{Batch, MassRows, Phase, Seq};
use crate::forward::{Observed, Pass};

/// The pass of some jobs, which go through the same layers.
pub(super) fn pass<'a>(
    phase: Phase,
    jobs: impl Iterator<Item = &'a Job<'a>>,
    all_logits: bool,
) -> Pass<'a> {
    let batch = Batch {
        phase,
        tokens: Vec::new(),
        positions: Vec::new(),
        seqs: Vec::new(),
        logit_rows: Vec::new(),
    };
    let (copies, seals, waits, from, to, mass, observed) = Default::default();
    let mut pass = Pass { batch, copies, seals, waits, layers: 0..0, from, to, mass, observed };
    for job in jobs {
        let Job { change: Change { member, .. }, work, places, .. } = job;
        let layout = &member.shared.plan.layout;
        let segment = &member.seq.segments[work.segment];
        let batch = &mut pass.batch;
        let rows = batch.tokens.len()..batch.tokens.len() + work.tokens.len();
        batch.tokens.extend_from_slice(&work.tokens);
        batch.positions.extend_from_slice(&work.positions);
        match (all_logits, work.is_last) {
            (true, _) => batch.logit_rows.extend(rows.clone()),
            (false, true) => batch.logit_rows.push(rows.end - 1),
            (false, false) => {}
        }
        let added = &places.added;
        let rows_of = |of: Range<usize>| MassRows {
            seq_idx: batch.seqs.len() + added.parts.len() - 1,
            first_row: rows.start + of.start,
            n_rows: of.len(),
        };
        pass.mass.extend(member.seq.n_choosing(work).map(|n| rows_of(rows.len() - n..rows.len())));
        let so_far = member.seq.measured.sums();
        let observed =
            member.seq.observed(work, layout).map(|of| Observed { rows: rows_of(of), so_far });
        pass.observed.extend(observed);
        let (mut row, mut slot) = (rows.start, segment.len() - rows.len());
        for &part in &added.parts {
            let (first_row, kv_start) = (row, slot);
            (row, slot) = (row + part.n_slots, slot + part.n_slots);
            batch.seqs.push(Seq {
                rows: first_row..row,
                kv_start,
                slots: &segment.slots,
                table: segment.table_of(part, added, layout),
                n_sealed: part.n_sealed,
                inv_freq: &member.rope.inv_freq,
                rope_scale: member.rope.scale,
                rule: member.seq.recipe.rule,
            });
        }
        pass.layers = segment.layers();
        pass.copies.extend_from_slice(&added.copies);
        pass.seals.extend_from_slice(&added.seals);
        pass.waits.extend_from_slice(&places.waits);
        pass.from.extend_from_slice(&places.from);
        pass.to.extend_from_slice(&places.to);
    }
    pass
}
