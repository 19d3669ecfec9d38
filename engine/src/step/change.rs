//! A change of a sequence that stands only once it is done: of a call, or of its part in a pass.

use super::member::{Member, Progress};
use crate::backend::{Draw, Phase};
use crate::error::Error;
use crate::forward::Execute;
use crate::sequence::{Drawn, Mark, Pending, Places, Stage, Work};

/// Dropped before it is done, be it by an error, a cancel or a panic, it undoes: the sequence is what it was.
pub(crate) struct Change<'s> {
    pub(crate) member: Member<'s>,
    /// Where the pass began; `None`: the change is the whole call, and what was queued goes too.
    to: Option<Mark>,
    is_done: bool,
}

impl<'s> Change<'s> {
    /// A call that has begun.
    pub(crate) fn of_call(member: Member<'s>) -> Self {
        Self { member, to: None, is_done: false }
    }

    fn of_pass(member: Member<'s>, to: Mark) -> Self {
        Self { member, to: Some(to), is_done: false }
    }

    /// It stands.
    pub(crate) fn done(&mut self) {
        self.is_done = true;
    }

    /// It does not, unless it is done.
    pub(crate) fn undo(&mut self) {
        if std::mem::replace(&mut self.is_done, true) {
            return;
        }
        let Member { shared, seq, .. } = &mut self.member;
        let (layout, mut pool) = (&shared.plan.layout, shared.pool());
        match &self.to {
            Some(to) => {
                seq.undo(to, layout, &mut pool);
                seq.undo_token(layout, &mut pool);
            }
            None => {
                seq.roll_back(layout, &mut pool);
                seq.clear_pending(layout, &mut pool);
                seq.draw = None;
            }
        }
    }
}

impl Drop for Change<'_> {
    fn drop(&mut self) {
        self.undo();
    }
}

/// A sequence's part in a pass.
pub(crate) struct Job<'s> {
    pub(crate) change: Change<'s>,
    pub(crate) work: Work,
    /// The choice that the device is to make afterwards.
    draw: Option<Draw>,
    pub(crate) places: Places,
}

impl<'s> Job<'s> {
    /// Takes the pages for `work`, and the rotation of the length that all queued tokens lead to. If the pass fails, the
    /// sequence goes back to `to`, where it took over another one's pages; `None`: to here.
    pub(crate) fn new(member: Member<'s>, work: Work, to: Option<Mark>) -> Result<Self, Error> {
        let shared = member.shared;
        let layout = &shared.plan.layout;
        let len = member.seq.len();
        member.rope.fit(&shared.config, len + member.seq.pending.len());
        member.seq.roll(len, layout, &mut shared.pool());
        let to = to.unwrap_or_else(|| member.seq.mark());
        let change = Change::of_pass(member, to);
        let seq = &mut *change.member.seq;
        let places = seq.take(work.segment, &work.positions, layout, &mut shared.pool())?;
        // Behind an eviction the last token cannot be computed once more, should its logits be overwritten.
        let draw = match work.is_last && seq.n_keep(&work, layout).is_none() {
            true => seq.draw.take(),
            false => None,
        };
        Ok(Self { change, work, draw, places })
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
        let Self { change: Change { member, .. }, work, .. } = self;
        let shown = member.shown(device, work, attention)?;
        let mut drawn = None;
        if let Some(idx) = idx {
            if let Some(draw) = &self.draw {
                let run = device.n_runs();
                drawn = device.sample(idx, draw)?.map(|token| Drawn { token, run, idx });
            }
            if drawn.is_none() {
                let pos = member.seq.len() + work.tokens.len() - 1;
                device.read_logits(idx, member.logits).map_err(|e| e.at_position(pos))?;
            }
        }
        let leaving = member.observe(work, shown);
        let progress = self.commit(phase, idx.is_some() && drawn.is_none());
        let member = &mut self.change.member;
        if let Some(leaving) = leaving {
            member.evict(device, leaving)?;
        }
        member.seq.receipt.n_drawn += usize::from(drawn.is_some());
        member.seq.receipt.n_replayed += usize::from(replayed);
        member.seq.drawn = drawn;
        Ok(progress)
    }

    /// The rows and pages are the sequence's from here on.
    pub(crate) fn commit(&mut self, phase: Phase, logits_ready: bool) -> Progress {
        let Self { change, work, places, .. } = self;
        change.done();
        let Change { member, to, .. } = change;
        let layout = &member.shared.plan.layout;
        let mut pool = member.shared.pool();
        if let Some(to) = to {
            member.seq.pass_done(places, to, layout, &mut pool);
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
