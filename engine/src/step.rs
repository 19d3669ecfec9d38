//! One call, many sessions: prefill chunks and decode steps side by side.
//!
//! A step runs the decode rows of all sessions as one pass and their prompt chunks as another, because a
//! pass has one phase. Pages are taken before a pass and kept only if it succeeds, so a session that
//! gets none is told so and stays as it was, and the others go on. A pass waits for its turn on the device;
//! a session that is cancelled in the meantime ends it there.

use crate::backend::{Batch, Draw, Phase, Seq, Stop};
use crate::cache::Growth;
use crate::engine::Model;
use crate::error::Error;
use crate::forward::Execute;
use crate::session::{Drawn, Pending, Session};
use crate::sync::Arc;
use crate::sync::atomic::Ordering::Relaxed;

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
    pub(crate) tokens: Vec<u32>,
    /// The last row's logits are wanted.
    pub(crate) is_last: bool,
}

/// A session's part in a pass, and the pages taken for it. Unless the part is committed, they go back when
/// it is dropped, be it by an error, a cancel or a panic, and the session is what it was.
struct Job<'s> {
    session: &'s mut Session,
    work: Work,
    /// The choice that the device is to make afterwards.
    draw: Option<Draw>,
    growth: Option<Growth>,
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
                    match self.admit(session, phase, n_free) {
                        Ok(Some(job)) => {
                            n_free -= job.work.tokens.len();
                            jobs.push((job, result));
                        }
                        Ok(None) => {}
                        Err(e) => *result = Err(e),
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

    /// Takes the pages for a session's next rows; `None` if there are none to compute.
    fn admit<'s>(
        &self,
        session: &'s mut Session,
        phase: Phase,
        max_rows: usize,
    ) -> Result<Option<Job<'s>>, Error> {
        if !Arc::ptr_eq(&self.shared, &session.model.shared) {
            let reason = "the session belongs to another model".into();
            return Err(Error::State { call: "step", reason });
        }
        if phase == Phase::Prefill {
            session.share_prefix();
        }
        let Some(work) = session.work(phase, max_rows) else { return Ok(None) };
        if session.cancel.swap(false, Relaxed) {
            return Err(Error::Cancelled);
        }
        Job::new(session, work).map(Some)
    }

    /// Runs the jobs of one phase and writes their results.
    fn pass(&self, phase: Phase, mut jobs: Vec<(Job<'_>, &mut Result<Progress, Error>)>) {
        if jobs.is_empty() {
            return;
        }
        if let Err(e) = self.run_jobs(phase, &mut jobs) {
            for (job, result) in jobs {
                let stopped = job.session.cancel.swap(false, Relaxed);
                *result = job.session.outcome_of_failed_pass(&e, stopped);
            }
        }
    }

    fn run_jobs(
        &self,
        phase: Phase,
        jobs: &mut [(Job<'_>, &mut Result<Progress, Error>)],
    ) -> Result<(), Error> {
        let stop = Stop::new(jobs.iter().map(|(job, _)| job.session.cancel.clone()));
        let mut device = self.shared.device_unless(&stop).ok_or(Error::Cancelled)?;
        let replayed = {
            let (batch, copies) = batch(phase, jobs.iter().map(|(job, _)| job), false);
            device.run(&batch, &copies, &stop)?
        };
        let mut n_logits = 0;
        for (job, result) in jobs {
            let idx = job.work.is_last.then_some(n_logits);
            n_logits += usize::from(job.work.is_last);
            **result = job.complete(&mut *device, phase, idx, replayed);
        }
        Ok(())
    }

    /// [`Session::score`]: passes of as many rows as there is room for logits.
    pub(crate) fn score_one(
        &self,
        session: &mut Session,
        visit: &mut dyn FnMut(usize, &[f32]),
    ) -> Result<(), Error> {
        let vocab_size = session.logits.len();
        let mut idx = 0;
        while let Some(work) = session.work(Phase::Prefill, self.plan().batch) {
            let mut job = Job::new(session, work)?;
            let rows = self.logits_of_all_rows(&job)?;
            for logits in rows.chunks_exact(vocab_size) {
                visit(idx, logits); // it may run other sessions, and it may panic
                idx += 1;
            }
            if job.work.is_last {
                job.session.logits.copy_from_slice(&rows[rows.len() - vocab_size..]);
            }
            let is_last = job.work.is_last;
            job.commit(Phase::Prefill, is_last);
        }
        Ok(())
    }

    fn logits_of_all_rows(&self, job: &Job<'_>) -> Result<Vec<f32>, Error> {
        let stop = Stop::new(std::iter::once(job.session.cancel.clone()));
        let outcome = self.shared.device_unless(&stop).ok_or(Error::Cancelled).and_then(|mut d| {
            let (batch, copies) = batch(Phase::Prefill, std::iter::once(job), true);
            d.run(&batch, &copies, &stop).map(|_| d)
        });
        let mut device = outcome.inspect_err(|_| job.session.cancel.store(false, Relaxed))?;
        let (start, vocab_size) = (job.session.len(), job.session.logits.len());
        let mut rows = vec![0.0; job.work.tokens.len() * vocab_size];
        for (row, out) in rows.chunks_exact_mut(vocab_size).enumerate() {
            device.read_logits(row, out).map_err(|e| e.at_position(start + row))?;
        }
        Ok(rows)
    }
}

/// The batch of a pass, and the pages to copy first.
fn batch<'a>(
    phase: Phase,
    jobs: impl Iterator<Item = &'a Job<'a>>,
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
    for Job { session, work, growth, .. } in jobs {
        let Some(growth) = growth else { continue };
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

impl<'s> Job<'s> {
    /// Takes the pages for `work`, and the rotation of the length that all queued tokens lead to.
    fn new(session: &'s mut Session, work: Work) -> Result<Self, Error> {
        session.rope.fit(&session.model, session.len() + session.pending.len());
        let shared = &*session.model.shared;
        let (len, n) = (session.tokens.len(), work.tokens.len());
        #[allow(clippy::cast_possible_truncation)] // both are bounded by the context length
        let positions = len as u32..(len + n) as u32;
        let page_len = shared.plan.layout.page_len;
        let growth = session.segment.grow(positions, page_len, &mut shared.pool())?;
        let draw = session.draw.take();
        Ok(Self { session, work, draw, growth: Some(growth) })
    }

    /// The pass succeeded. Its rows become part of the session if the last one's logits, `idx` of the
    /// device's, are sound or the device could draw from them.
    fn complete(
        &mut self,
        device: &mut dyn Execute,
        phase: Phase,
        idx: Option<usize>,
        replayed: bool,
    ) -> Result<Progress, Error> {
        let mut drawn = None;
        if let Some(idx) = idx {
            if let Some(draw) = &self.draw {
                let run = device.n_runs();
                drawn = device.sample(idx, draw)?.map(|token| Drawn { token, run, idx });
            }
            if drawn.is_none() {
                let pos = self.session.len() + self.work.tokens.len() - 1;
                let logits = &mut self.session.logits;
                device.read_logits(idx, logits).map_err(|e| e.at_position(pos))?;
            }
        }
        let progress = self.commit(phase, idx.is_some() && drawn.is_none());
        self.session.receipt.n_drawn += usize::from(drawn.is_some());
        self.session.receipt.n_replayed += usize::from(replayed);
        self.session.drawn = drawn;
        Ok(progress)
    }

    /// The rows and pages are the session's from here on.
    fn commit(&mut self, phase: Phase, logits_ready: bool) -> Progress {
        let Self { session, work, growth, .. } = self;
        let session = &mut **session;
        let shared = &*session.model.shared;
        let mut pool = shared.pool();
        if let Some(growth) = growth.take() {
            growth.commit(&mut session.segment, &mut pool);
        }
        let n = work.tokens.len();
        if phase == Phase::Prefill && session.n_shareable == session.tokens.len() {
            session.n_shareable += n;
        }
        session.tokens.append(&mut work.tokens);
        session.receipt.token_layers += n * shared.plan.n_layers;
        session.logits_ready = logits_ready;
        match &mut session.pending {
            Pending::Prompt { tokens, done } => {
                session.receipt.n_prefilled += n;
                *done += n;
                if *done < tokens.len() {
                    return Progress::Pending { done: *done, total: tokens.len() };
                }
            }
            Pending::Nothing | Pending::Token(_) => session.receipt.n_decoded += n,
        }
        session.pending = Pending::Nothing;
        let (page_len, n_layers) = (shared.plan.layout.page_len, session.segment.n_layers);
        let shareable = &session.tokens[..session.n_shareable];
        pool.prefixes.enter(shareable, page_len, &session.segment.page_table, n_layers);
        Progress::Ready
    }
}

impl Drop for Job<'_> {
    fn drop(&mut self) {
        if let Some(growth) = self.growth.take() {
            let Session { segment, model, .. } = &mut *self.session;
            growth.undo(segment, self.work.tokens.len(), &mut model.shared.pool());
        }
    }
}

impl Session {
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
