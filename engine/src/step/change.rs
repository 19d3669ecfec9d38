//! A sequence's part in a pass: what it changes stands only if the pass succeeds.

use super::member::{Member, Progress};
use crate::backend::{Draw, Phase};
use crate::error::Error;
use crate::forward::Execute;
use crate::sequence::{Drawn, Pending, Stage, Taken, Work};

/// A member's part in a pass, and the pages taken for it. Unless the part is committed, they go back when
/// it is dropped, be it by an error, a cancel or a panic, and the sequence is what it was.
pub(crate) struct Job<'s> {
    pub(crate) member: Member<'s>,
    pub(crate) work: Work,
    /// The choice that the device is to make afterwards.
    draw: Option<Draw>,
    pub(crate) taken: Option<Taken>,
    /// Tokens that the sequence has just taken over from another one's prompt: they go back too.
    n_adopted: usize,
}

impl<'s> Job<'s> {
    /// Takes the pages for `work`, and the rotation of the length that all queued tokens lead to.
    pub(crate) fn new(mut member: Member<'s>, work: Work, n_adopted: usize) -> Result<Self, Error> {
        let Member { shared, seq, rope, .. } = &mut member;
        let layout = &shared.plan.layout;
        rope.fit(&shared.config, seq.len() + seq.pending.len());
        seq.roll(seq.len(), layout, &mut shared.pool());
        let positions = work.positions.clone();
        let taken = seq.take(work.segment, positions, layout, &mut shared.pool());
        let taken = match taken {
            Ok(taken) => taken,
            Err(e) => {
                member.unshare(n_adopted);
                member.undo_token();
                return Err(e);
            }
        };
        // Behind an eviction the last token cannot be computed once more, should its logits be overwritten.
        let draw = match work.is_last && seq.n_keep(&work, layout).is_none() {
            true => seq.draw.take(),
            false => None,
        };
        Ok(Self { member, work, draw, taken: Some(taken), n_adopted })
    }

    /// What was taken goes back, unless the rows were committed, and so does what the sequence would not keep
    /// without them.
    pub(crate) fn give_back(&mut self) {
        if let Some(taken) = self.taken.take() {
            self.member.seq.give_back(taken, &mut self.member.shared.pool());
            self.member.unshare(self.n_adopted);
            self.member.undo_token();
        }
    }

    /// The pass succeeded. Its rows become part of the sequence if the last one's logits, `idx` of the
    /// device's, are sound or the device could draw from them.
    pub(crate) fn complete(
        &mut self,
        device: &mut dyn Execute,
        phase: Phase,
        idx: Option<usize>,
        replayed: bool,
        attention: Option<Vec<Vec<f32>>>,
    ) -> Result<Progress, Error> {
        let parts = self.taken.iter().flat_map(|taken| &taken.growth.parts);
        let pages = parts.last().map_or(&[][..], |part| &part.page_table);
        let shown = self.member.shown(device, &self.work, pages, attention)?;
        let mut drawn = None;
        if let Some(idx) = idx {
            if let Some(draw) = &self.draw {
                let run = device.n_runs();
                drawn = device.sample(idx, draw)?.map(|token| Drawn { token, run, idx });
            }
            if drawn.is_none() {
                let pos = self.member.seq.len() + self.work.tokens.len() - 1;
                let logits = &mut self.member.logits;
                device.read_logits(idx, logits).map_err(|e| e.at_position(pos))?;
            }
        }
        let leaving = self.member.observe(&self.work, shown);
        let progress = self.commit(phase, idx.is_some() && drawn.is_none());
        if let Some(leaving) = leaving {
            self.member.evict(device, leaving)?;
        }
        let seq = &mut *self.member.seq;
        seq.receipt.n_drawn += usize::from(drawn.is_some());
        seq.receipt.n_replayed += usize::from(replayed);
        seq.drawn = drawn;
        Ok(progress)
    }

    /// The rows and pages are the sequence's from here on.
    pub(crate) fn commit(&mut self, phase: Phase, logits_ready: bool) -> Progress {
        let Self { member, work, taken, .. } = self;
        let layout = &member.shared.plan.layout;
        let mut pool = member.shared.pool();
        if let Some(taken) = taken.take() {
            member.seq.keep(taken, layout, &mut pool);
        }
        let n = work.tokens.len();
        let seq = &mut *member.seq;
        seq.receipt.token_layers += n * seq.segments[work.segment].n_layers;
        if work.segment == 0 {
            let n_before = seq.n_shareable;
            seq.take_in(phase, &work.tokens);
            member.offer_prefix(n_before, &mut pool);
        } else {
            seq.stage.done += n;
            let n_held = seq.tokens.len() - seq.n_new();
            let is_old = |&&p: &&u32| (p as usize) < n_held;
            seq.receipt.n_revived += work.positions.iter().filter(is_old).count();
        }
        let seq = &mut *member.seq;
        (seq.logits_ready, seq.drawn) = (logits_ready, None);
        if !(work.ends_stage && work.segment + 1 == seq.segments.len()) {
            return member.progress();
        }
        seq.pending = Pending::Nothing;
        seq.stage = Stage::default();
        seq.settle(layout, &mut pool);
        Progress::Ready
    }
}

impl Drop for Job<'_> {
    fn drop(&mut self) {
        self.give_back();
    }
}
