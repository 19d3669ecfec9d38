//! One call, many sessions: prefill chunks and decode steps side by side.
//!
//! A step runs the decode rows of all sessions as one pass and their prompt chunks as another, because a
//! pass has one phase, and a pass goes through one run of layers, so that sessions that prune elsewhere take passes of
//! their own. Pages are taken before a pass and kept only if it succeeds, so a session that
//! gets none is told so and stays as it was, and the others go on. A pass waits for its turn on the device;
//! a session that is cancelled in the meantime ends it there.
//!
//! Every token that is queued gets its row in every step. Prompts share the rows of one chunk ([`rows`]), so what
//! a token waits for does not grow with them. Where the prompts of a step begin alike, the one that is ahead computes, and
//! the others take over its pages as they fill.
//!
//! A session that prunes goes through its segments of layers one by one: a prompt by a chunk a step, all
//! chunks through one segment before the next begins, so that its last rows look at the same tokens whatever the
//! chunk; a generated token through all of them in one step.

mod change;
mod leave;
mod member;
mod pass;
mod prefix;
mod rows;

pub(crate) use change::Change;
pub use member::Progress;
pub(crate) use member::{Member, Rope};

use std::cmp::Reverse;

use crate::backend::{Phase, Stop};
use crate::engine::Shared;
use crate::error::Error;
use crate::memory;
use crate::sequence::{Lists, Mark, Sequence, Turn};
use crate::sync::atomic::Ordering::Relaxed;
use change::Job;
use pass::pass;
use rows::{Wish, share_out};

/// A session in a step, and where its outcome goes.
pub(crate) type Asked<'s, 'r> = (Member<'s>, &'r mut Result<Progress, Error>);

/// A session's prompt in a step.
struct Prompt<'s> {
    member: Member<'s>,
    result: &'s mut Result<Progress, Error>,
    /// What it was before it took over pages in this step, if it did.
    to: Option<Mark>,
    /// Before the step.
    turn: Turn,
    /// It has had what it gets of this step.
    is_served: bool,
}

/// True if another prompt of the step is ahead, and about to fill the page that this one needs next.
fn follows(prompts: &[Prompt<'_>], lacks_room: &[bool], idx: usize) -> bool {
    let rank = |idx: usize| (prompts[idx].member.seq.len(), Reverse(idx));
    let Some(wanted) = prompts[idx].member.next_page() else { return false };
    let leads = |other: usize| {
        let Prompt { member, turn, .. } = &prompts[other];
        rank(other) > rank(idx)
            && !(turn.is_stuck || lacks_room[other])
            && member.prefix_root() == prompts[idx].member.prefix_root()
            && member.is_filling(wanted)
    };
    (0..prompts.len()).any(leads)
}

impl Shared {
    /// [`Model::step`](crate::Model::step).
    pub(crate) fn step(&self, asked: &mut [Asked<'_, '_>]) {
        self.step_tokens(asked);
        self.step_prompts(asked);
    }

    /// [`step`](Self::step) for one session.
    pub(crate) fn step_one(&self, member: Member<'_>) -> Result<Progress, Error> {
        let mut result = Ok(Progress::Idle);
        self.step(&mut [(member, &mut result)]);
        result
    }

    /// Passes of generated tokens until each that is queued is through.
    fn step_tokens(&self, asked: &mut [Asked<'_, '_>]) {
        let mut is_served = vec![false; asked.len()];
        loop {
            let mut layers = None;
            let mut jobs = Vec::new();
            let mut n_free = self.plan.max_rows; // beside the new tokens, those that sessions revive
            let mut lists = Lists::new(n_free);
            for ((member, result), is_served) in asked.iter_mut().zip(&mut is_served) {
                if *is_served || n_free == 0 || jobs.len() == self.plan.batch {
                    continue;
                }
                // One pass, one run of layers: where sessions differ, the others wait for the next.
                if layers.as_ref().is_some_and(|layers| *layers != member.seq.layers()) {
                    continue;
                }
                let job = match self.admit(member, Phase::Decode, &mut lists) {
                    Ok(()) => {
                        let work = member.seq.work(Phase::Decode, n_free, &self.plan.layout);
                        work.map(|work| Job::new(member.again(), work, None)).transpose()
                    }
                    Err(e) => Err(e),
                };
                match job {
                    Ok(Some(job)) => {
                        layers = Some(job.change.member.seq.layers());
                        n_free -= job.work.tokens.len();
                        jobs.push((job, &mut **result, is_served));
                    }
                    Ok(None) => *is_served = true,
                    Err(e) => (**result, *is_served) = (Err(e), true),
                }
            }
            if jobs.is_empty() {
                return;
            }
            self.pass(Phase::Decode, jobs);
        }
    }

    /// Passes of prompts, which share the rows of one chunk.
    fn step_prompts(&self, asked: &mut [Asked<'_, '_>]) {
        let mut prompts = Vec::new();
        let mut lists = Lists::new(self.plan.chunk);
        for (member, result) in asked {
            if !member.seq.has_work(Phase::Prefill) {
                continue;
            }
            match self.admit(member, Phase::Prefill, &mut lists) {
                Ok(()) => {
                    let to = member.share_prefix();
                    **result = Ok(member.progress());
                    let (turn, member) = (member.seq.turn, member.again());
                    prompts.push(Prompt { member, result, to, turn, is_served: false });
                }
                Err(e) => (**result, member.seq.turn.is_stuck) = (Err(e), true),
            }
        }
        if prompts.is_empty() {
            return;
        }
        let lacks_room = self.lack_room(&prompts);
        let follows: Vec<bool> =
            (0..prompts.len()).map(|idx| follows(&prompts, &lacks_room, idx)).collect();
        let mut n_free = self.plan.chunk;
        // Sessions of a pass are limited: where they leave rows, others come.
        while n_free > 0 {
            let mut asking = Vec::new();
            for ((prompt, follows), lacks_room) in prompts.iter_mut().zip(&follows).zip(&lacks_room)
            {
                if !(prompt.is_served || *follows || *lacks_room) {
                    asking.push(prompt);
                }
            }
            let wishes: Vec<Wish> =
                asking.iter().map(|prompt| Wish::of(prompt.member.seq, &self.plan)).collect();
            let shares = share_out(&wishes, n_free, self.plan.batch);
            let mut jobs = Vec::new();
            for (prompt, share) in asking.into_iter().zip(shares).filter(|&(_, share)| share > 0) {
                let Prompt { member, result, to, is_served, .. } = prompt;
                *is_served = true;
                let work = member.seq.work(Phase::Prefill, share, &self.plan.layout);
                let Some(work) = work else { continue };
                match Job::new(member.again(), work, to.take()) {
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
                let layers = first.change.member.seq.layers();
                let is_alike =
                    |(job, ..): &Admitted<'_, '_>| job.change.member.seq.layers() == layers;
                let (now, later) = jobs.into_iter().partition(is_alike);
                self.pass(Phase::Prefill, now);
                jobs = later;
            }
        }
        for (prompt, follows) in prompts.into_iter().zip(follows) {
            let waited = if prompt.is_served || follows { 0 } else { prompt.turn.waited + 1 };
            prompt.member.seq.turn = Turn { waited, is_stuck: prompt.result.is_err() };
        }
    }

    /// Of the prompts that have not begun, those for which there may be no room beside the others: all of them would
    /// fill the pool together and none would come to its end. They wait in line.
    fn lack_room(&self, prompts: &[Prompt<'_>]) -> Vec<bool> {
        let n_free = {
            let pool = self.pool();
            [pool.pages.n_free(), pool.aux.transit.n_free()]
        };
        let begun = |prompt: &&Prompt<'_>| prompt.member.seq.has_begun() && !prompt.turn.is_stuck;
        let to_come = |prompt: &Prompt<'_>| prompt.member.seq.pages_to_come(&self.plan);
        let add = |sum: [usize; 2], prompt| {
            let more = to_come(prompt);
            [sum[0] + more[0], sum[1] + more[1]]
        };
        let mut n_needed = prompts.iter().filter(begun).fold([0; 2], add);
        let mut is_first = !prompts.iter().any(|prompt| begun(&prompt));
        let mut line: Vec<usize> = (0..prompts.len()).collect();
        line.retain(|&i| !prompts[i].member.seq.has_begun());
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

    /// Refuses a session that was cancelled before it came to a pass, and one for whose lists in a pass
    /// there is no memory beside those of the sessions that were admitted before.
    fn admit(&self, member: &mut Member<'_>, phase: Phase, lists: &mut Lists) -> Result<(), Error> {
        if !member.seq.has_work(phase) {
            return Ok(());
        }
        if member.cancel.swap(false, Relaxed) {
            member.undo_token();
            return Err(Error::Cancelled);
        }
        self.room_for_pass(member.seq, lists).inspect_err(|_| member.undo_token())
    }

    /// Adds the lists of a sequence to those of the others of a pass; fails unless there is memory for all.
    fn room_for_pass(&self, seq: &Sequence, lists: &mut Lists) -> Result<(), Error> {
        lists.add(seq, &self.plan);
        if seq.has_work(Phase::Prefill) {
            self.pool().prefixes.reserve(lists.n_pages)?;
        }
        lists.check()
    }

    /// Runs the jobs of one phase and writes their results.
    fn pass(&self, phase: Phase, mut jobs: Vec<Admitted<'_, '_>>) {
        if let Err(e) = self.run_jobs(phase, &mut jobs) {
            for (mut job, result, is_served) in jobs {
                job.change.undo();
                let stopped = job.change.member.cancel.swap(false, Relaxed);
                *result = job.change.member.outcome_of_failed_pass(&e, stopped);
                *is_served = true;
            }
        }
    }

    fn run_jobs(&self, phase: Phase, jobs: &mut [Admitted<'_, '_>]) -> Result<(), Error> {
        let stop = Stop::new(jobs.iter().map(|(job, ..)| job.change.member.cancel.clone()));
        let mut device = self.device_unless(&stop).ok_or(Error::Cancelled)?;
        let done = device.run(&pass(phase, jobs.iter().map(|(job, ..)| job), false), &stop)?;
        let (mut mass, mut observed) = (done.mass.into_iter(), done.observed.into_iter());
        let mut n_logits = 0;
        for (job, result, is_served) in jobs {
            let idx = job.work.is_last.then_some(n_logits);
            n_logits += usize::from(job.work.is_last);
            let mass = job.change.member.seq.n_choosing(&job.work).and_then(|_| mass.next());
            let attention = job
                .change
                .member
                .seq
                .observed(&job.work, &self.plan.layout)
                .and_then(|_| observed.next());
            **result = job.complete(&mut *device, phase, idx, done.replayed, attention);
            match result {
                Ok(_) if job.work.ends_stage && !job.work.is_last => {
                    job.change.member.seq.choose(mass.as_deref());
                }
                Ok(Progress::Ready) => **is_served = true,
                Ok(_) => {}
                Err(_) => {
                    **is_served = true;
                    job.change.undo();
                }
            }
        }
        Ok(())
    }

    /// [`Session::logits_of`](crate::Session::logits_of): passes of as many rows as there is room for logits.
    pub(crate) fn logits_of_one(
        &self,
        member: &mut Member<'_>,
        visit: &mut dyn FnMut(usize, &[f32]),
    ) -> Result<(), Error> {
        let vocab_size = member.logits.len();
        let mut idx = 0;
        while member.seq.has_work(Phase::Prefill) {
            self.room_for_pass(member.seq, &mut Lists::new(self.plan.batch))?;
            let work = member.seq.work(Phase::Prefill, self.plan.batch, &self.plan.layout);
            let Some(work) = work else { break };
            let mut job = Job::new(member.again(), work, None)?;
            let rows = self.logits_of_all_rows(&job)?;
            for logits in rows.chunks_exact(vocab_size) {
                visit(idx, logits); // it may run other sessions, and it may panic
                idx += 1;
            }
            if job.work.is_last {
                job.change.member.logits.copy_from_slice(&rows[rows.len() - vocab_size..]);
            }
            let is_last = job.work.is_last;
            job.commit(Phase::Prefill, is_last);
        }
        Ok(())
    }

    fn logits_of_all_rows(&self, job: &Job<'_>) -> Result<Vec<f32>, Error> {
        let stop = Stop::new(std::iter::once(job.change.member.cancel.clone()));
        let outcome = self.device_unless(&stop).ok_or(Error::Cancelled).and_then(|mut d| {
            d.run(&pass(Phase::Prefill, std::iter::once(job), true), &stop).map(|_| d)
        });
        let mut device = outcome.inspect_err(|_| job.change.member.cancel.store(false, Relaxed))?;
        let (start, vocab_size) = (job.change.member.seq.len(), job.change.member.logits.len());
        let mut rows: Vec<f32> = memory::zeros(job.work.tokens.len() * vocab_size, "logits")?;
        for (row, out) in rows.chunks_exact_mut(vocab_size).enumerate() {
            device.read_logits(row, out).map_err(|e| e.at_position(start + row))?;
        }
        Ok(rows)
    }
}

/// A part in a pass, where its outcome goes, and whether the session has had what it gets of this step.
type Admitted<'s, 'r> = (Job<'s>, &'r mut Result<Progress, Error>, &'r mut bool);

impl Member<'_> {
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
}
