//! One call, many sessions: prefill chunks and decode steps side by side.
//!
//! A step runs the decode rows of all sessions as one pass and their prompt chunks as another, because a
//! pass has one phase, and a pass goes through one run of layers, so that sessions that prune elsewhere take passes of
//! their own. Pages are taken before a pass and kept only if it succeeds, so a session that
//! gets none is told so and stays as it was, and the others go on. A pass waits for its turn on the device;
//! a session that is cancelled in the meantime ends it there.
//!
//! Every token that is queued gets its row in every step. Prompts share the rows of one chunk ([`crate::share`]), so what
//! a token waits for does not grow with them. Where the prompts of a step begin alike, the one that is ahead computes, and
//! the others take over its pages as they fill.
//!
//! A session that prunes goes through its segments of layers one by one: a prompt by a chunk a step, all
//! chunks through one segment before the next begins, so that its last rows look at the same tokens whatever the
//! chunk; a generated token through all of them in one step.

use std::cmp::Reverse;
use std::ops::Range;

use crate::backend::{Batch, Draw, MassRows, Phase, Rolling, Seq, Stop};
use crate::engine::Model;
use crate::error::Error;
use crate::evict::Evicting;
use crate::forward::{Execute, Observed, Pass};
use crate::memory;
use crate::pool::Store;
use crate::sequence::Taken;
use crate::session::{Drawn, Lists, Pending, Session};
use crate::share::{Wish, share_out};
use crate::stage::Stage;
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
    /// The layers: a segment of the session's.
    pub(crate) segment: usize,
    pub(crate) tokens: Vec<u32>,
    /// Ascending.
    pub(crate) positions: Vec<u32>,
    /// No row is left for this segment afterwards.
    pub(crate) ends_stage: bool,
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
    taken: Option<Taken>,
    /// Tokens that the session has just taken over from another one's prompt: they go back too.
    n_adopted: usize,
}

/// A session's prompt in a step.
struct Prompt<'s> {
    session: &'s mut Session,
    result: &'s mut Result<Progress, Error>,
    /// Tokens that it has taken over in this step.
    n_adopted: usize,
    /// Before the step.
    turn: Turn,
    /// It has had what it gets of this step.
    is_served: bool,
}

/// How a prompt fared in the steps before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Turn {
    /// Steps in a row that it got no rows, others did, and nobody computed any for it.
    pub(crate) waited: usize,
    /// The last step was an error: nobody waits for this prompt.
    pub(crate) is_stuck: bool,
}

/// True if another prompt of the step is ahead, and about to fill the page that this one needs next.
fn follows(prompts: &[Prompt<'_>], lacks_room: &[bool], idx: usize) -> bool {
    let rank = |idx: usize| (prompts[idx].session.len(), Reverse(idx));
    let Some(wanted) = prompts[idx].session.next_page() else { return false };
    let leads = |other: usize| {
        let Prompt { session, turn, .. } = &prompts[other];
        rank(other) > rank(idx)
            && !(turn.is_stuck || lacks_room[other])
            && session.prefix_root() == prompts[idx].session.prefix_root()
            && session.is_filling(wanted)
    };
    (0..prompts.len()).any(leads)
}

impl Model {
    /// Advances every session that has tokens queued: one token where a generated one is queued, the next
    /// rows where a prompt is. Results are in the order of `sessions`; an error concerns its session
    /// alone, which is unchanged and keeps what was queued, so that the step can be tried again.
    ///
    /// Prompts share the rows of one [`chunk`](crate::ModelOptions::chunk): each gets what it has left or an equal share,
    /// and what short ones leave goes to the long ones. One that gets no row, because there are more prompts than rows or
    /// than a [`batch`](crate::ModelOptions::batch), comes first in the next step, so the order of `sessions` decides
    /// nothing. A prompt that begins like another one of the step waits while that one computes what they have in common,
    /// and takes it over; and one for which the page pool may have no room beside those that have begun waits for these.
    ///
    /// So a session whose next token is queued as soon as it is known gets it within one step, whatever
    /// prompts come: a decode pass for each `batch` of tokens, and prefill passes of one chunk's rows in all. (Sessions
    /// that prune take a pass for each run of layers instead of one; the rows are no more.)
    pub fn step(&self, sessions: &mut [&mut Session]) -> Vec<Result<Progress, Error>> {
        let mut results: Vec<_> = sessions.iter().map(|_| Ok(Progress::Idle)).collect();
        self.step_tokens(sessions, &mut results);
        self.step_prompts(sessions, &mut results);
        results
    }

    /// Passes of generated tokens until each that is queued is through.
    fn step_tokens(&self, sessions: &mut [&mut Session], results: &mut [Result<Progress, Error>]) {
        let mut is_served = vec![false; sessions.len()];
        loop {
            let mut layers = None;
            let mut jobs = Vec::new();
            let mut n_free = self.plan().max_rows; // beside the new tokens, those that sessions take up again
            let mut lists = Lists::new(n_free);
            let parts = sessions.iter_mut().zip(&mut *results).zip(&mut is_served);
            for ((session, result), is_served) in parts {
                if *is_served || n_free == 0 || jobs.len() == self.plan().batch {
                    continue;
                }
                // One pass, one run of layers: where sessions differ, the others wait for the next.
                if layers.as_ref().is_some_and(|layers| *layers != session.layers()) {
                    continue;
                }
                let job = match self.admit(session, Phase::Decode, &mut lists) {
                    Ok(()) => session
                        .work(Phase::Decode, n_free)
                        .map(|work| Job::new(session, work, 0))
                        .transpose(),
                    Err(e) => Err(e),
                };
                match job {
                    Ok(Some(job)) => {
                        layers = Some(job.session.layers());
                        n_free -= job.work.tokens.len();
                        jobs.push((job, result, is_served));
                    }
                    Ok(None) => *is_served = true,
                    Err(e) => (*result, *is_served) = (Err(e), true),
                }
            }
            if jobs.is_empty() {
                return;
            }
            self.pass(Phase::Decode, jobs);
        }
    }

    /// Passes of prompts, which share the rows of one chunk.
    fn step_prompts(&self, sessions: &mut [&mut Session], results: &mut [Result<Progress, Error>]) {
        let mut prompts = Vec::new();
        let mut lists = Lists::new(self.plan().chunk);
        for (session, result) in sessions.iter_mut().zip(results) {
            if !session.has_work(Phase::Prefill) {
                continue;
            }
            match self.admit(session, Phase::Prefill, &mut lists) {
                Ok(()) => {
                    let n_adopted = session.share_prefix();
                    *result = Ok(session.progress());
                    let turn = session.turn;
                    prompts.push(Prompt { session, result, n_adopted, turn, is_served: false });
                }
                Err(e) => (*result, session.turn.is_stuck) = (Err(e), true),
            }
        }
        if prompts.is_empty() {
            return;
        }
        let lacks_room = self.lack_room(&prompts);
        let follows: Vec<bool> =
            (0..prompts.len()).map(|idx| follows(&prompts, &lacks_room, idx)).collect();
        let mut n_free = self.plan().chunk;
        // Sessions of a pass are limited: where they leave rows, others come.
        while n_free > 0 {
            let mut asking = Vec::new();
            for ((prompt, follows), lacks_room) in prompts.iter_mut().zip(&follows).zip(&lacks_room)
            {
                if !(prompt.is_served || *follows || *lacks_room) {
                    asking.push(prompt);
                }
            }
            let wishes: Vec<Wish> = asking.iter().map(|prompt| prompt.session.wish()).collect();
            let shares = share_out(&wishes, n_free, self.plan().batch);
            let mut jobs = Vec::new();
            for (prompt, share) in asking.into_iter().zip(shares).filter(|&(_, share)| share > 0) {
                let Prompt { session, result, n_adopted, is_served, .. } = prompt;
                *is_served = true;
                let Some(work) = session.work(Phase::Prefill, share) else { continue };
                match Job::new(session, work, *n_adopted) {
                    Ok(job) => {
                        n_free -= job.work.tokens.len();
                        jobs.push((job, &mut **result, is_served));
                    }
                    Err(e) => **result = Err(e),
                }
            }
            if jobs.is_empty() {
                break;
            }
            while let Some((first, ..)) = jobs.first() {
                let layers = first.session.layers();
                let is_alike = |(job, ..): &Admitted<'_, '_>| job.session.layers() == layers;
                let (now, later) = jobs.into_iter().partition(is_alike);
                self.pass(Phase::Prefill, now);
                jobs = later;
            }
        }
        for (prompt, follows) in prompts.into_iter().zip(follows) {
            let waited = if prompt.is_served || follows { 0 } else { prompt.turn.waited + 1 };
            prompt.session.turn = Turn { waited, is_stuck: prompt.result.is_err() };
        }
    }

    /// Of the prompts that have not begun, those for which there may be no room beside the others: all of them would
    /// fill the pool together and none would come to its end. They wait in line.
    fn lack_room(&self, prompts: &[Prompt<'_>]) -> Vec<bool> {
        let n_free = {
            let pool = self.shared.pool();
            [pool.pages.n_free(), pool.aux.transit.n_free()]
        };
        let begun = |prompt: &&Prompt<'_>| prompt.session.has_begun() && !prompt.turn.is_stuck;
        let to_come = |prompt: &Prompt<'_>| prompt.session.pages_to_come();
        let add = |sum: [usize; 2], prompt| {
            let more = to_come(prompt);
            [sum[0] + more[0], sum[1] + more[1]]
        };
        let mut n_needed = prompts.iter().filter(begun).fold([0; 2], add);
        let mut is_first = !prompts.iter().any(|prompt| begun(&prompt));
        let mut line: Vec<usize> = (0..prompts.len()).collect();
        line.retain(|&i| !prompts[i].session.has_begun());
        line.sort_by_key(|&i| Reverse(prompts[i].turn.waited));
        let mut lack = vec![false; prompts.len()];
        let mut n_served = 0;
        for &i in &line {
            n_needed = add(n_needed, &prompts[i]);
            if n_needed.iter().zip(n_free).any(|(&needed, free)| needed > free) && !is_first {
                break;
            }
            (is_first, n_served) = (false, n_served + 1);
        }
        line[n_served..].iter().for_each(|&i| lack[i] = true);
        lack
    }

    /// [`step`](Self::step) for one session.
    pub(crate) fn step_one(&self, session: &mut Session) -> Result<Progress, Error> {
        self.step(&mut [session]).pop().unwrap_or(Ok(Progress::Idle))
    }

    /// Refuses a session of another model, one that was cancelled before it came to a pass, and one for whose lists in a pass
    /// there is no memory beside those of the sessions that were admitted before.
    fn admit(&self, session: &mut Session, phase: Phase, lists: &mut Lists) -> Result<(), Error> {
        if !Arc::ptr_eq(&self.shared, &session.model.shared) {
            let reason = "the session belongs to another model".into();
            return Err(Error::State { call: "step", reason });
        }
        if session.has_work(phase) && session.cancel.swap(false, Relaxed) {
            session.undo_token();
            return Err(Error::Cancelled);
        }
        if !session.has_work(phase) {
            return Ok(());
        }
        session.room_for_pass(lists).inspect_err(|_| session.undo_token())
    }

    /// Runs the jobs of one phase and writes their results.
    fn pass(&self, phase: Phase, mut jobs: Vec<Admitted<'_, '_>>) {
        if let Err(e) = self.run_jobs(phase, &mut jobs) {
            for (mut job, result, is_served) in jobs {
                job.give_back();
                let stopped = job.session.cancel.swap(false, Relaxed);
                *result = job.session.outcome_of_failed_pass(&e, stopped);
                *is_served = true;
            }
        }
    }

    fn run_jobs(&self, phase: Phase, jobs: &mut [Admitted<'_, '_>]) -> Result<(), Error> {
        let stop = Stop::new(jobs.iter().map(|(job, ..)| job.session.cancel.clone()));
        let mut device = self.shared.device_unless(&stop).ok_or(Error::Cancelled)?;
        let done = device.run(&pass(phase, jobs.iter().map(|(job, ..)| job), false), &stop)?;
        let (mut mass, mut observed) = (done.mass.into_iter(), done.observed.into_iter());
        let mut n_logits = 0;
        for (job, result, is_served) in jobs {
            let idx = job.work.is_last.then_some(n_logits);
            n_logits += usize::from(job.work.is_last);
            let mass = job.n_mass_rows().and_then(|_| mass.next());
            let attention = job.session.observed(&job.work).and_then(|_| observed.next());
            **result = job.complete(&mut *device, phase, idx, done.replayed, attention);
            match result {
                Ok(_) if job.work.ends_stage && !job.work.is_last => {
                    job.session.choose(mass.as_deref());
                }
                Ok(Progress::Ready) => **is_served = true,
                Ok(_) => {}
                Err(_) => {
                    **is_served = true;
                    job.give_back();
                }
            }
        }
        Ok(())
    }

    /// [`Session::logits_of`]: passes of as many rows as there is room for logits.
    pub(crate) fn logits_of_one(
        &self,
        session: &mut Session,
        visit: &mut dyn FnMut(usize, &[f32]),
    ) -> Result<(), Error> {
        let vocab_size = session.logits.len();
        let mut idx = 0;
        while session.has_work(Phase::Prefill) {
            session.room_for_pass(&mut Lists::new(self.plan().batch))?;
            let Some(work) = session.work(Phase::Prefill, self.plan().batch) else { break };
            let mut job = Job::new(session, work, 0)?;
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
            d.run(&pass(Phase::Prefill, std::iter::once(job), true), &stop).map(|_| d)
        });
        let mut device = outcome.inspect_err(|_| job.session.cancel.store(false, Relaxed))?;
        let (start, vocab_size) = (job.session.len(), job.session.logits.len());
        let mut rows: Vec<f32> = memory::zeros(job.work.tokens.len() * vocab_size, "logits")?;
        for (row, out) in rows.chunks_exact_mut(vocab_size).enumerate() {
            device.read_logits(row, out).map_err(|e| e.at_position(start + row))?;
        }
        Ok(rows)
    }
}

/// The pass of some jobs, which go through the same layers.
fn pass<'a>(phase: Phase, jobs: impl Iterator<Item = &'a Job<'a>>, all_logits: bool) -> Pass<'a> {
    let batch = Batch {
        phase,
        tokens: Vec::new(),
        positions: Vec::new(),
        seqs: Vec::new(),
        logit_rows: Vec::new(),
    };
    let (copies, seals, parks, from, to, mass, observed) = Default::default();
    let mut pass = Pass { batch, copies, seals, parks, layers: 0..0, from, to, mass, observed };
    for job in jobs {
        let Job { session, work, taken: Some(taken), .. } = job else { continue };
        let segment = &session.cache.segments[work.segment];
        let batch = &mut pass.batch;
        let rows = batch.tokens.len()..batch.tokens.len() + work.tokens.len();
        batch.tokens.extend_from_slice(&work.tokens);
        batch.positions.extend_from_slice(&work.positions);
        match (all_logits, work.is_last) {
            (true, _) => batch.logit_rows.extend(rows.clone()),
            (false, true) => batch.logit_rows.push(rows.end - 1),
            (false, false) => {}
        }
        let parts = &taken.growth.parts;
        let rows_of = |of: Range<usize>| MassRows {
            seq_idx: batch.seqs.len() + parts.len() - 1,
            first_row: rows.start + of.start,
            n_rows: of.len(),
        };
        pass.mass.extend(job.n_mass_rows().map(|n| rows_of(rows.len() - n..rows.len())));
        let so_far = session.evicting.as_ref().map_or(&[][..], Evicting::sums);
        let observed = session.observed(work).map(|of| Observed { rows: rows_of(of), so_far });
        pass.observed.extend(observed);
        let (mut row, mut slot) = (rows.start, segment.len() - rows.len());
        for part in parts {
            let (first_row, kv_start) = (row, slot);
            (row, slot) = (row + part.n_slots, slot + part.n_slots);
            batch.seqs.push(Seq {
                rows: first_row..row,
                kv_start,
                slot_positions: &segment.positions[..slot],
                page_table: &part.page_table,
                n_layers: segment.n_layers,
                n_sealed: part.n_sealed,
                inv_freq: &session.rope.inv_freq,
                rope_scale: session.rope.scale,
                rolling: session.stream.map(|stream| Rolling {
                    stream,
                    n_pinned: session.model.plan().layout.n_slots(1),
                    n_gone: segment.n_gone,
                }),
            });
        }
        pass.layers = segment.layers();
        pass.copies.extend_from_slice(&taken.growth.copies);
        pass.seals.extend_from_slice(&taken.growth.seals);
        pass.parks.extend_from_slice(&taken.parks);
        pass.from.extend_from_slice(&taken.from);
        pass.to.extend_from_slice(&taken.to);
    }
    pass
}

impl<'s> Job<'s> {
    /// Takes the pages for `work`, and the rotation of the length that all queued tokens lead to.
    fn new(session: &'s mut Session, work: Work, n_adopted: usize) -> Result<Self, Error> {
        session.rope.fit(&session.model, session.len() + session.pending.len());
        let shared = session.model.shared.clone();
        let (positions, parked) = (work.positions.clone(), session.stage.parked.clone());
        session.roll(session.len(), &mut shared.pool());
        let taken = session.cache.take(
            work.segment,
            positions,
            parked,
            &shared.plan.layout,
            &mut shared.pool(),
        );
        let taken = match taken {
            Ok(taken) => taken,
            Err(e) => {
                session.unshare(n_adopted);
                session.undo_token();
                return Err(e);
            }
        };
        // Behind an eviction the last token cannot be computed once more, should its logits be overwritten.
        let draw = match work.is_last && session.n_keep(&work).is_none() {
            true => session.draw.take(),
            false => None,
        };
        Ok(Self { session, work, draw, taken: Some(taken), n_adopted })
    }

    /// Of how many of the last rows mass is wanted, if of any.
    fn n_mass_rows(&self) -> Option<usize> {
        let Self { session, work, .. } = self;
        let lazy = session.lazy.as_ref()?;
        let len = session.len() + if work.segment == 0 { work.tokens.len() } else { 0 };
        // A generated token goes on in any case: its query only chooses among those that wait, of which it may take up a
        // few even where the session has been cut back to a length that is not pruned.
        let is_choice = match session.pending {
            Pending::Prompt { .. } => lazy.prunes(len),
            _ => session.cache.aux.n_pages(Store::Waiting) > 0,
        };
        let is_wanted = work.ends_stage && !work.is_last && is_choice;
        is_wanted.then(|| session.n_mass_rows().min(work.tokens.len()))
    }

    /// What was taken goes back, unless the rows were committed, and so does what the session would not keep
    /// without them.
    fn give_back(&mut self) {
        if let Some(taken) = self.taken.take() {
            let Session { cache, model, .. } = &mut *self.session;
            cache.undo(taken, &mut model.shared.pool());
            self.session.unshare(self.n_adopted);
            self.session.undo_token();
        }
    }

    /// The pass succeeded. Its rows become part of the session if the last one's logits, `idx` of the
    /// device's, are sound or the device could draw from them.
    fn complete(
        &mut self,
        device: &mut dyn Execute,
        phase: Phase,
        idx: Option<usize>,
        replayed: bool,
        attention: Option<Vec<Vec<f32>>>,
    ) -> Result<Progress, Error> {
        let parts = self.taken.iter().flat_map(|taken| &taken.growth.parts);
        let pages = parts.last().map_or(&[][..], |part| &part.page_table);
        let ranks = self.session.ranks(device, &self.work, pages, attention)?;
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
        let leaving = self.session.observe(&self.work, ranks);
        let progress = self.commit(phase, idx.is_some() && drawn.is_none());
        if let Some(leaving) = leaving {
            self.session.evict(device, leaving)?;
        }
        self.session.receipt.n_drawn += usize::from(drawn.is_some());
        self.session.receipt.n_replayed += usize::from(replayed);
        self.session.drawn = drawn;
        Ok(progress)
    }

    /// The rows and pages are the session's from here on.
    fn commit(&mut self, phase: Phase, logits_ready: bool) -> Progress {
        let Self { session, work, taken, .. } = self;
        let session = &mut **session;
        let model = session.model.clone();
        let shared = &*model.shared;
        let mut pool = shared.pool();
        if let Some(taken) = taken.take() {
            session.cache.commit(taken, &shared.plan.layout, &mut pool);
            session.stage.parked.clear();
        }
        let n = work.tokens.len();
        session.receipt.token_layers += n * session.cache.layers(work.segment).len();
        if work.segment == 0 {
            let n_before = session.n_shareable;
            session.take_in(phase, &work.tokens);
            session.offer_prefix(n_before, &mut pool);
        } else {
            session.stage.done += n;
            let n_new = session.n_new();
            let is_old = |&&p: &&u32| (p as usize) < session.tokens.len() - n_new;
            session.receipt.n_revived += work.positions.iter().filter(is_old).count();
        }
        (session.logits_ready, session.drawn) = (logits_ready, None);
        if !(work.ends_stage && work.segment + 1 == session.cache.segments.len()) {
            return session.progress();
        }
        session.pending = Pending::Nothing;
        session.stage = Stage::default();
        session.settle(&mut pool);
        Progress::Ready
    }
}

/// A part in a pass, where its outcome goes, and whether the session has had what it gets of this step.
type Admitted<'s, 'r> = (Job<'s>, &'r mut Result<Progress, Error>, &'r mut bool);

impl Drop for Job<'_> {
    fn drop(&mut self) {
        self.give_back();
    }
}

impl Session {
    /// New tokens have gone through the first segment.
    fn take_in(&mut self, phase: Phase, new: &[u32]) {
        if phase == Phase::Prefill && self.n_shareable == self.len() {
            let capacity = self.stream.map_or(usize::MAX, |stream| stream.capacity() as usize);
            self.n_shareable = (self.n_shareable + new.len()).min(capacity);
        }
        self.tokens.extend_from_slice(new);
        match &mut self.pending {
            Pending::Prompt { done, .. } => {
                *done += new.len();
                self.receipt.n_prefilled += new.len();
            }
            Pending::Nothing | Pending::Token(_) => self.receipt.n_decoded += new.len(),
        }
    }

    /// Of the session's tokens, how many are what is pending.
    pub(crate) fn n_new(&self) -> usize {
        match &self.pending {
            Pending::Prompt { done, .. } => *done,
            _ => 1,
        }
    }

    /// The layers that come next.
    fn layers(&self) -> Range<usize> {
        self.cache.layers(self.stage.segment)
    }

    fn has_work(&self, phase: Phase) -> bool {
        match &self.pending {
            Pending::Nothing => false,
            Pending::Prompt { .. } => phase == Phase::Prefill,
            Pending::Token(_) => phase == Phase::Decode,
        }
    }

    /// A generated token goes through all segments or through none.
    fn undo_token(&mut self) {
        if matches!(self.pending, Pending::Token(_)) && self.stage != Stage::default() {
            self.roll_back();
        }
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
                Progress::Pending { done: self.tokens_worth(*done), total: tokens.len() }
            }
            Pending::Token(_) => Progress::Pending { done: 0, total: 1 },
        }
    }

    /// What has been computed of a prompt of which `n` tokens are through the first segment, as the number of
    /// tokens that would take as long through all layers.
    fn tokens_worth(&self, n: usize) -> usize {
        let Stage { segment, chosen, done, .. } = &self.stage;
        if *segment == 0 {
            return n * self.cache.layers(0).len() / self.model.plan().n_layers;
        }
        let layers = self.cache.layers(*segment);
        let through = layers.start + layers.len() * done / chosen.len().max(1);
        n * through / self.model.plan().n_layers
    }
}
