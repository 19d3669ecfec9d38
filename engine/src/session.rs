//! One sequence: its tokens, its share of the KV cache, and the logits of its last token.
//!
//! A session is driven either alone ([`Session::prefill`], [`Session::decode`]) or together with others
//! through [`Model::step`](crate::Model::step). A call that fails leaves it as it was.

use std::ops::ControlFlow;

use crate::engine::Model;
use crate::error::Error;
use crate::gate::Gate;
use crate::logprobs::LogSoftmax;
use crate::memory;
use crate::receipt::Receipt;
use crate::recipe::Recipe;
use crate::recipe::SessionOptions;
use crate::sampler::{History, Sampler};
use crate::sequence::{Drawn, Pending, Sequence};
use crate::step::{Change, Member, Progress, Rope};
use crate::sync::Arc;
use crate::sync::atomic::{AtomicBool, Ordering};

/// One sequence in a model's page pool.
#[derive(Debug)]
pub struct Session {
    pub(crate) model: Model,
    /// Tokens that it may hold.
    pub(crate) ctx_len: usize,
    pub(crate) seq: Sequence,
    /// Logits after the last token, if the sequence says so.
    pub(crate) logits: Vec<f32>,
    /// Of the step at hand.
    rope: Rope,
    pub(crate) cancel: Arc<AtomicBool>,
}

/// Stops a session's running call from any thread. It keeps neither the session nor the model alive.
#[derive(Clone, Debug)]
pub struct Canceller {
    flag: Arc<AtomicBool>,
    gate: Arc<Gate>,
}

impl Canceller {
    /// The running call, or the next one if none runs, ends with [`Error::Cancelled`]: within an op if its
    /// pass runs, and at once if it waits for the pass of another thread. (It takes a lock for a moment,
    /// so it is not for signal handlers.)
    pub fn cancel(&self) {
        self.flag.store(true, Ordering::Relaxed);
        self.gate.wake();
    }

    /// Takes back a cancel that no call has met.
    pub fn withdraw(&self) {
        self.flag.store(false, Ordering::Relaxed);
    }
}

impl Model {
    /// Opens an empty session.
    pub fn session(&self, options: &SessionOptions) -> Result<Session, Error> {
        let (recipe, ctx_len) = options.check(&self.plan().facts(self.config()))?;
        Session::new(self.clone(), recipe, ctx_len)
    }

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
        let mut asked = Vec::with_capacity(sessions.len());
        for (session, result) in sessions.iter_mut().zip(&mut results) {
            if Arc::ptr_eq(&self.shared, &session.model.shared) {
                asked.push((session.member(), result));
            } else {
                let reason = "the session belongs to another model".into();
                *result = Err(Error::State { call: "step", reason });
            }
        }
        self.shared.step(&mut asked);
        drop(asked);
        results
    }
}

impl Session {
    /// An empty session of a recipe, of `ctx_len` tokens at most.
    pub(crate) fn new(model: Model, recipe: Recipe, ctx_len: usize) -> Result<Self, Error> {
        Ok(Self {
            ctx_len,
            seq: Sequence::new(recipe, model.plan().n_layers, &model.plan().layout),
            logits: memory::zeros(model.config().vocab_size, "a session's logits")?,
            rope: Rope::new(model.config(), 0),
            cancel: Arc::default(),
            model,
        })
    }

    /// What a step has of it.
    fn member(&mut self) -> Member<'_> {
        let Self { model, seq, rope, logits, cancel, .. } = self;
        Member { shared: &model.shared, seq, rope, logits, cancel }
    }

    /// The model that the session runs on.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// Tokens of the session, whatever layers still hold of them. A stream has left some behind: behind those of the first
    /// page, [`n_gone`](Self::n_gone) are missing.
    pub fn tokens(&self) -> &[u32] {
        &self.seq.tokens
    }

    /// The tokens that were generated since the last prompt, as far as they are there without a gap.
    pub fn answer(&self) -> &[u32] {
        self.seq.answer(&self.model.plan().layout)
    }

    /// Tokens that a repetition penalty counts: all of them, of a stream those that the last token saw. (What a stream holds
    /// besides depends on the length of its pages; and of all that ever went through, most of a vocabulary would be
    /// penalised in the end.)
    pub fn history(&self) -> History<'_> {
        self.seq.history(&self.model.plan().layout)
    }

    /// Number of tokens that the session has taken in and not cut off since; a stream has rolled some off.
    pub fn len(&self) -> usize {
        self.seq.len()
    }

    /// Tokens that a stream has rolled off.
    pub fn n_gone(&self) -> usize {
        self.seq.n_gone
    }

    /// True if the cache holds no token.
    pub fn is_empty(&self) -> bool {
        self.seq.tokens.is_empty()
    }

    /// Tokens the session may hold.
    pub fn ctx_len(&self) -> usize {
        self.ctx_len
    }

    /// Logits after the last token: `None` before the first token, after a truncation, and where they could not be
    /// [recalled](Self::recall_logits) from the device.
    pub fn logits(&self) -> Option<&[f32]> {
        self.seq.logits_ready.then_some(&self.logits)
    }

    /// The same as logarithms of probabilities.
    pub fn log_softmax(&self) -> Option<LogSoftmax<'_>> {
        self.logits().map(LogSoftmax::new)
    }

    /// What the session has cost so far.
    pub fn receipt(&self) -> Receipt {
        self.seq.receipt(self.model.plan())
    }

    /// A handle that stops this session's calls from any thread.
    pub fn canceller(&self) -> Canceller {
        Canceller { flag: self.cancel.clone(), gate: self.model.shared.gate.clone() }
    }

    /// Queues a prompt (or the next turn's tokens) for [`Model::step`](crate::Model::step). Here, once a prompt, weight
    /// files that are mapped are looked at: one that was written to since it was opened is an error
    /// ([`FileChanged`](loris_loader::Error::FileChanged)), in every call that takes a prompt.
    pub fn feed(&mut self, tokens: &[u32]) -> Result<(), Error> {
        self.check_input("feed", tokens)?;
        if tokens.is_empty() {
            return Err(Error::State { call: "feed", reason: "there are no tokens".into() });
        }
        self.model.shared.check_weights()?;
        self.seq.room_for_lists(self.model.plan(), tokens.len())?;
        self.seq.begin(Pending::Prompt { tokens: memory::copy(tokens, "a prompt")?, done: 0 });
        Ok(())
    }

    /// Queues one generated token for [`Model::step`](crate::Model::step).
    pub fn push(&mut self, token: u32) -> Result<(), Error> {
        self.check_input("push", &[token])?;
        if self.is_empty() {
            let reason = "the first tokens of a session are a prompt; use feed or prefill".into();
            return Err(Error::State { call: "push", reason });
        }
        self.seq.begin(Pending::Token(token));
        Ok(())
    }

    /// Drops tokens that were queued and not computed; returns how many. In a session that prunes, what was
    /// queued goes as a whole: a prompt that has come through some of the layers is taken back.
    pub fn clear_pending(&mut self) -> usize {
        let Self { model, seq, .. } = self;
        seq.clear_pending(&model.plan().layout, &mut model.shared.pool())
    }

    /// Runs a prompt through the model; the logits of its last token are ready afterwards.
    pub fn prefill(&mut self, tokens: &[u32]) -> Result<(), Error> {
        self.prefill_with(tokens, &mut |_, _| ControlFlow::Continue(()))
    }

    /// As [`prefill`](Self::prefill); `progress` is told tokens done and in all after each chunk, and may
    /// stop the call. After any error the session is as it was before the call.
    pub fn prefill_with(
        &mut self,
        tokens: &[u32],
        progress: &mut dyn FnMut(usize, usize) -> ControlFlow<()>,
    ) -> Result<(), Error> {
        self.feed(tokens)?;
        self.attempt(|member| {
            loop {
                match member.shared.step_one(member.again())? {
                    Progress::Ready | Progress::Idle => return Ok(()),
                    Progress::Pending { done, total } => {
                        if progress(done, total).is_break() {
                            return Err(Error::Cancelled);
                        }
                    }
                }
            }
        })
    }

    /// Computes what was queued. After an error or a panic the session is what it was before, and what was
    /// queued is gone.
    fn attempt(
        &mut self,
        call: impl FnOnce(&mut Member<'_>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let mut change = Change::of_call(self.member());
        call(&mut change.member)?;
        change.done();
        Ok(())
    }

    /// Adds one generated token; its logits are ready afterwards.
    pub fn decode(&mut self, token: u32) -> Result<(), Error> {
        self.push(token)?;
        self.attempt(|member| member.shared.step_one(member.again()).map(drop))
    }

    /// Adds one generated token and chooses the next: on the device where that is possible, and then the
    /// logits stay there until they are [recalled](Self::recall_logits).
    pub(crate) fn decode_and_draw(
        &mut self,
        token: u32,
        sampler: &mut Sampler,
    ) -> Result<u32, Error> {
        // Once a stream is as long as its window, the next history lacks a token of this one.
        let grows = self.len() < self.seq.recipe.rule.window as usize;
        let history = grows.then(|| self.history());
        self.seq.draw = sampler.draw_on_device(history.as_ref(), token, self.logits.len());
        let outcome = self.decode(token);
        self.seq.draw = None;
        outcome?;
        match &self.seq.drawn {
            Some(drawn) => {
                sampler.advance();
                Ok(drawn.token)
            }
            None => Ok(sampler.sample(&self.logits, self.history())),
        }
    }

    /// Adds one generated token and chooses the next on the host, where its logits are ready then.
    pub(crate) fn decode_and_sample(
        &mut self,
        token: u32,
        sampler: &mut Sampler,
    ) -> Result<u32, Error> {
        self.decode(token)?;
        Ok(sampler.sample(&self.logits, self.history()))
    }

    /// Brings logits that were left on the device to the host; does nothing where there are none. If another pass has
    /// overwritten them, the last token is decoded once more, which gives the same bits.
    ///
    /// [`generate`](crate::generate()) does so at its end. Where the device failed then, or there was no page for it,
    /// [`logits`](Self::logits) are `None` and this tries again. After an error the session is as it was.
    pub fn recall_logits(&mut self) -> Result<(), Error> {
        let Some(Drawn { run, idx, .. }) = self.seq.drawn else { return Ok(()) };
        let model = self.model.clone();
        let mut device = model.shared.device();
        if device.n_runs() == run {
            device.read_logits(idx, &mut self.logits)?;
            (self.seq.drawn, self.seq.logits_ready) = (None, true);
            return Ok(());
        }
        drop(device);
        let Some(&last) = self.seq.tokens.last() else { return Ok(()) };
        // In a fork: whatever happens to it, this session keeps its tokens.
        let mut again = self.fork()?;
        again.cancel = self.cancel.clone();
        again.truncate(self.len() - 1)?;
        if let Some(lazy) = &mut again.seq.recipe.lazy {
            lazy.revives = false; // those that it took up are there
        }
        again.decode(last)?;
        std::mem::swap(&mut self.logits, &mut again.logits);
        (self.seq.drawn, self.seq.logits_ready) = (None, true);
        Ok(())
    }

    /// Runs `tokens` and shows `visit` the logits after each of them (index into `tokens`, logits); `visit`
    /// may run other sessions. After any error the session is as it was before the call.
    pub fn logits_of(
        &mut self,
        tokens: &[u32],
        visit: &mut dyn FnMut(usize, &[f32]),
    ) -> Result<(), Error> {
        if let Some(reason) = self.seq.recipe.no_logits {
            return Err(Error::State { call: "logits of all rows", reason: reason.into() });
        }
        self.feed(tokens)?;
        self.attempt(|member| member.shared.logits_of_one(member, visit))
    }

    /// A second session with the same tokens and logits. Pages are shared until one of the two writes to them.
    pub fn fork(&self) -> Result<Session, Error> {
        if self.seq.pending != Pending::Nothing {
            let reason = "tokens are queued; step or clear them first".into();
            return Err(Error::State { call: "fork", reason });
        }
        let logits = memory::copy(&self.logits, "a session's logits")?;
        Ok(Session {
            model: self.model.clone(),
            ctx_len: self.ctx_len,
            seq: self.seq.fork(&mut self.model.shared.pool())?,
            logits,
            rope: self.rope.clone(),
            cancel: Arc::default(),
        })
    }

    /// Cuts off the tokens from `len` on; the pages that only they needed are free at once. Queued tokens
    /// are dropped too. Logits are gone unless nothing was cut off.
    ///
    /// What follows is as if the session had never gone further, but for three things that stay. In a session that prunes,
    /// where those that are cut off chose whom to prune and whom to revive, that stands, and no number
    /// depends on them otherwise, because a token sees none behind it (a slot between others stays, without a token, until
    /// those behind it go). What a cache of sealed pages has coded stays so, although a session that never went further
    /// would still hold it in 16 bits. And `h2o` has counted the attention that they paid.
    ///
    /// A stream has rolled off what tokens from some length on do not see, and a session that evicts cannot go back to in
    /// front of its last eviction: less than [`least_len`](Self::least_len) is [`Error::State`], and nothing changes. 0 is
    /// always possible.
    pub fn truncate(&mut self, len: usize) -> Result<(), Error> {
        let least = self.least_len();
        if len > 0 && len < least {
            let reason = format!(
                "what tokens from {len} on would see is gone; {least} tokens is the least that can be kept, or 0"
            );
            return Err(Error::State { call: "truncate", reason });
        }
        self.clear_pending();
        if len < self.len() {
            let Self { model, seq, .. } = self;
            seq.cut(len, &model.plan().layout, &mut model.shared.pool());
        }
        Ok(())
    }

    /// The least length, besides 0, that the session can be [cut back](Self::truncate) to; 0: any. It is never more than
    /// the session's length, and less for a stream.
    pub fn least_len(&self) -> usize {
        self.seq.least_len(&self.model.plan().layout)
    }

    fn check_input(&self, call: &'static str, tokens: &[u32]) -> Result<(), Error> {
        if self.seq.pending != Pending::Nothing {
            let reason = "earlier tokens are still queued; step or clear them first".into();
            return Err(Error::State { call, reason });
        }
        let vocab_size = self.model.config().vocab_size;
        if let Some(&id) = tokens.iter().find(|&&id| id as usize >= vocab_size) {
            return Err(Error::TokenOutOfRange { id, vocab_size });
        }
        let needed = self.len().saturating_add(tokens.len());
        if needed > self.ctx_len {
            return Err(Error::CtxFull { needed, ctx_len: self.ctx_len });
        }
        Ok(())
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.seq.release(&mut self.model.shared.pool());
    }
}
