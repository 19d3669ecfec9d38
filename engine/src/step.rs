//! One call, many sessions: prefill chunks and decode steps side by side.
//!
//! A step runs the decode rows of all sessions as one pass and their prompt chunks as another, because a
//! pass has one phase. Pages are taken before a pass and kept only if it succeeds, so a session that
//! gets none is told so and stays as it was, and the others go on.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::backend::{Batch, Phase, Seq};
use crate::cache::Growth;
use crate::engine::Model;
use crate::error::Error;
use crate::session::{Drawn, Pending, Session};

/// What a step did for one session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Nothing was queued.
    Idle,
    /// Queued tokens are still to be computed; step again.
    Pending {
        /// Queued tokens that are in the cache.
        done: usize,
        /// Tokens that were queued.
        total: usize,
    },
    /// All queued tokens are in the cache and the logits of the last are ready.
    Ready,
}

/// Rows of one session in one pass.
#[derive(Debug)]
pub(crate) struct Work {
    tokens: Vec<u32>,
    /// The last row's logits are wanted.
    is_last: bool,
    growth: Option<Growth>,
}

impl Work {
    pub(crate) fn new(tokens: Vec<u32>, is_last: bool) -> Self {
        Self { tokens, is_last, growth: None }
    }
}

/// A session that takes part in a pass, and its place in the caller's list.
struct Job<'s, 'r> {
    session: &'r mut &'s mut Session,
    result: &'r mut Result<Progress, Error>,
    work: Work,
}

impl Model {
    /// Advances every session that has tokens queued: one token where a generated one is queued, the next
    /// chunk where a prompt is. Results are in the order of `sessions`; an error concerns its session
    /// alone, which is unchanged and keeps what was queued, so that the step can be tried again.
    pub fn step(&self, sessions: &mut [&mut Session]) -> Vec<Result<Progress, Error>> {
        let mut results: Vec<_> = sessions.iter().map(|_| Ok(Progress::Idle)).collect();
        for phase in [Phase::Decode, Phase::Prefill] {
            let max_rows = match phase {
                Phase::Decode => self.plan().batch,
                Phase::Prefill => self.plan().chunk,
            };
            let mut waiting = sessions.iter_mut().zip(&mut results).peekable();
            // Prompts share the rows of one chunk; decode rows go on until every session has had its own.
            while waiting.peek().is_some() {
                let mut jobs = Vec::new();
                let mut n_free = max_rows;
                while let Some((session, result)) =
                    waiting.next_if(|_| n_free > 0 && jobs.len() < self.plan().batch)
                {
                    if let Some(job) = self.admit(session, result, phase, n_free) {
                        n_free -= job.work.tokens.len();
                        jobs.push(job);
                    }
                }
                self.pass(phase, jobs);
                if phase == Phase::Prefill {
                    break;
                }
            }
            for (session, result) in waiting {
                *result = Ok(session.progress());
            }
        }
        results
    }

    /// [`step`](Self::step) for one session.
    pub(crate) fn step_one(&self, session: &mut Session) -> Result<Progress, Error> {
        self.step(&mut [session]).pop().unwrap_or(Ok(Progress::Idle))
    }

    /// Takes the pages for a session's next rows, or says in `result` why not.
    fn admit<'s, 'r>(
        &self,
        session: &'r mut &'s mut Session,
        result: &'r mut Result<Progress, Error>,
        phase: Phase,
        max_rows: usize,
    ) -> Option<Job<'s, 'r>> {
        if !std::sync::Arc::ptr_eq(&self.shared, &session.model.shared) {
            let reason = "the session belongs to another model".into();
            *result = Err(Error::State { call: "step", reason });
            return None;
        }
        if phase == Phase::Prefill {
            session.share_prefix();
        }
        let mut work = session.work(phase, max_rows)?;
        if session.cancel.swap(false, Ordering::Relaxed) {
            *result = Err(Error::Cancelled);
            return None;
        }
        match session.grow(work.tokens.len()) {
            Ok(growth) => work.growth = Some(growth),
            Err(e) => {
                *result = Err(e);
                return None;
            }
        }
        Some(Job { session, result, work })
    }

    /// Runs the jobs of one phase and writes their results.
    fn pass(&self, phase: Phase, mut jobs: Vec<Job<'_, '_>>) {
        if jobs.is_empty() {
            return;
        }
        let mut exec = self.shared.exec();
        let outcome = {
            let flags: Vec<&AtomicBool> = jobs.iter().map(|job| &*job.session.cancel).collect();
            let parts: Vec<_> = jobs.iter().map(|job| (&**job.session, &job.work)).collect();
            let (batch, copies) = batch(phase, &parts, false);
            exec.run(&batch, &copies, &flags)
        };
        let mut logit_idx = 0;
        for job in &mut jobs {
            let Job { session, result, work } = job;
            **result = match &outcome {
                Ok(replayed) => {
                    let idx = work.is_last.then_some(logit_idx);
                    logit_idx += usize::from(work.is_last);
                    let draw = session.draw.take();
                    let mut drawn = None;
                    let progress = session.finish(work, phase, |logits| {
                        let Some(idx) = idx else { return Ok(false) };
                        if let Some(draw) = &draw
                            && let Some(token) = exec.sample(idx, draw)?
                        {
                            drawn = Some(Drawn { token, run: exec.n_runs(), idx });
                            return Ok(false);
                        }
                        exec.read_logits(idx, logits).map(|()| true)
                    });
                    if progress.is_ok() {
                        session.receipt.n_drawn += usize::from(drawn.is_some());
                        session.drawn = drawn;
                    }
                    session.receipt.n_replayed += usize::from(*replayed && progress.is_ok());
                    progress
                }
                Err(e) => {
                    session.undo(work);
                    let stopped = session.cancel.swap(false, Ordering::Relaxed);
                    session.outcome_of_failed_pass(e, stopped)
                }
            };
        }
    }

    /// [`Session::score`]: passes of as many rows as there is room for logits.
    pub(crate) fn score_one(
        &self,
        session: &mut Session,
        visit: &mut dyn FnMut(usize, &[f32]),
    ) -> Result<(), Error> {
        let mut idx = 0;
        while let Some(mut work) = session.work(Phase::Prefill, self.plan().batch) {
            work.growth = Some(session.grow(work.tokens.len())?);
            let mut exec = self.shared.exec();
            let outcome = {
                let (batch, copies) = batch(Phase::Prefill, &[(session, &work)], true);
                exec.run(&batch, &copies, &[&session.cancel])
            };
            if let Err(e) = outcome {
                session.undo(&mut work);
                session.cancel.store(false, Ordering::Relaxed);
                return Err(e);
            }
            let (start, n) = (session.len(), work.tokens.len());
            let mut rows = vec![0.0; n * session.logits.len()];
            for (row, out) in rows.chunks_exact_mut(session.logits.len()).enumerate() {
                let read = exec.read_logits(row, out).map_err(|e| e.at_position(start + row));
                if let Err(e) = read {
                    session.undo(&mut work);
                    return Err(e);
                }
            }
            drop(exec); // the visitor may run other sessions
            let is_last = work.is_last;
            session.finish(&mut work, Phase::Prefill, |last| {
                if is_last {
                    last.copy_from_slice(&rows[rows.len() - last.len()..]);
                }
                Ok(is_last)
            })?;
            for logits in rows.chunks_exact(session.logits.len()) {
                visit(idx, logits);
                idx += 1;
            }
        }
        Ok(())
    }
}

/// The batch of a pass, and the pages to copy first.
fn batch<'a>(
    phase: Phase,
    parts: &[(&'a Session, &'a Work)],
    all_logits: bool,
) -> (Batch<'a>, Vec<(u32, u32)>) {
    let mut copies = Vec::new();
    let mut batch = Batch {
        phase,
        tokens: Vec::new(),
        positions: Vec::new(),
        seqs: Vec::new(),
        logit_rows: Vec::new(),
    };
    for &(session, work) in parts {
        let Some(growth) = &work.growth else { continue };
        let rows = batch.tokens.len()..batch.tokens.len() + work.tokens.len();
        let kv_start = session.len();
        batch.tokens.extend_from_slice(&work.tokens);
        batch.positions.extend_from_slice(&session.segment.positions[kv_start..]);
        match (all_logits, work.is_last) {
            (true, _) => batch.logit_rows.extend(rows.clone()),
            (false, true) => batch.logit_rows.push(rows.end - 1),
            (false, false) => {}
        }
        batch.seqs.push(Seq {
            rows,
            kv_start,
            slot_positions: &session.segment.positions,
            page_table: &growth.page_table,
            n_layers: session.segment.n_layers,
            inv_freq: &session.rope.inv_freq,
            rope_scale: session.rope.scale,
        });
        copies.extend_from_slice(&growth.copies);
    }
    (batch, copies)
}

impl Session {
    /// Takes the pages for `n` more tokens, and the rotation of the length that all queued ones lead to.
    fn grow(&mut self, n: usize) -> Result<Growth, Error> {
        self.rope.fit(&self.model, self.len() + self.pending.len());
        let shared = &*self.model.shared;
        #[allow(clippy::cast_possible_truncation)] // both are bounded by the context length
        let positions = self.tokens.len() as u32..(self.tokens.len() + n) as u32;
        self.segment.grow(positions, shared.plan.layout.page_len, &mut shared.pool())
    }

    /// Gives back what [`grow`](Self::grow) took.
    fn undo(&mut self, work: &mut Work) {
        if let Some(growth) = work.growth.take() {
            let mut pool = self.model.shared.pool();
            growth.undo(&mut self.segment, work.tokens.len(), &mut pool);
        }
    }

    /// The pass succeeded: its rows are part of the session, if the logits are sound.
    fn finish(
        &mut self,
        work: &mut Work,
        phase: Phase,
        read_logits: impl FnOnce(&mut [f32]) -> Result<bool, Error>,
    ) -> Result<Progress, Error> {
        let model = self.model.clone();
        let shared = &*model.shared;
        let n = work.tokens.len();
        let read = read_logits(&mut self.logits).map_err(|e| {
            self.undo(work);
            e.at_position(self.len() + n - 1)
        })?;
        let mut pool = shared.pool();
        if let Some(growth) = work.growth.take() {
            growth.commit(&mut self.segment, &mut pool);
        }
        if phase == Phase::Prefill && self.n_shareable == self.tokens.len() {
            self.n_shareable += n;
        }
        self.tokens.append(&mut work.tokens);
        self.receipt.token_layers += n * shared.plan.n_layers;
        self.logits_ready = read;
        match &mut self.pending {
            Pending::Prompt { tokens, done } => {
                self.receipt.n_prefilled += n;
                *done += n;
                if *done < tokens.len() {
                    return Ok(Progress::Pending { done: *done, total: tokens.len() });
                }
            }
            Pending::Nothing | Pending::Token(_) => self.receipt.n_decoded += n,
        }
        self.pending = Pending::Nothing;
        let (page_len, n_layers) = (shared.plan.layout.page_len, self.segment.n_layers);
        let shareable = &self.tokens[..self.n_shareable];
        pool.prefixes.enter(shareable, page_len, &self.segment.page_table, n_layers);
        Ok(Progress::Ready)
    }

    /// A pass with this session in it failed: why, and whether it was this one that was cancelled.
    fn outcome_of_failed_pass(&self, e: &Error, stopped: bool) -> Result<Progress, Error> {
        match (e, stopped) {
            (Error::Cancelled, true) => Err(Error::Cancelled),
            (Error::Cancelled, false) => Ok(self.progress()),
            (&Error::OutOfMemory { what, bytes }, _) => Err(Error::OutOfMemory { what, bytes }),
            (&Error::OutOfDeviceMemory { what, bytes, free, total }, _) => {
                Err(Error::OutOfDeviceMemory { what, bytes, free, total })
            }
            (Error::Device { reason }, _) => Err(Error::Device { reason: reason.clone() }),
            (e, _) => Err(Error::Device { reason: e.to_string() }),
        }
    }

    fn progress(&self) -> Progress {
        match &self.pending {
            Pending::Nothing => Progress::Idle,
            Pending::Prompt { tokens, done } => {
                Progress::Pending { done: *done, total: tokens.len() }
            }
            Pending::Token(_) => Progress::Pending { done: 0, total: 1 },
        }
    }
}
