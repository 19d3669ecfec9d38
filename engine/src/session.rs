//! One sequence: its tokens, its share of the KV cache, and the logits of its last token.
//!
//! A session is driven either alone ([`Session::prefill`], [`Session::decode`]) or together with others
//! through [`Model::step`](crate::Model::step). A call that fails leaves it as it was.

use std::ops::ControlFlow;

use loris_loader::RopeScaling;

use crate::backend::Draw;
use crate::engine::Model;
use crate::error::Error;
use crate::evict::Evicting;
use crate::gate::Gate;
use crate::logprobs::LogSoftmax;
use crate::memory;
use crate::policy::{Lazy, Policies, Stream};
use crate::pool::{Filled, Pool, ROOT, Store};
use crate::receipt::Receipt;
use crate::recipe::SessionOptions;
use crate::sampler::{History, Sampler};
use crate::sequence::{LayeredCache, Segment};
use crate::stage::Stage;
use crate::step::{Progress, Turn};
use crate::sync::Arc;
use crate::sync::atomic::{AtomicBool, Ordering};

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
/// Of an entry of a page table: tables of three parts, and of the step before and after.
const ENTRY_BYTES: usize = 40;

/// One sequence in a model's page pool.
#[derive(Debug)]
pub struct Session {
    pub(crate) model: Model,
    pub(crate) ctx_len: usize,
    /// Its tokens, but for those that a stream has left behind.
    pub(crate) tokens: Vec<u32>,
    pub(crate) stream: Option<Stream>,
    /// Tokens behind those of the first page that a stream has left behind.
    n_gone: usize,
    pub(crate) cache: LayeredCache,
    pub(crate) lazy: Option<Lazy>,
    pub(crate) evicting: Option<Evicting>,
    pub(crate) pending: Pending,
    /// How far what is pending has come through the segments.
    pub(crate) stage: Stage,
    pub(crate) turn: Turn,
    /// Logits after the last token, if `logits_ready`.
    pub(crate) logits: Vec<f32>,
    pub(crate) logits_ready: bool,
    /// The choice that the device is to make after the token that is queued.
    pub(crate) draw: Option<Draw>,
    /// The choice that it made: the logits are still there, and `logits_ready` is false.
    pub(crate) drawn: Option<Drawn>,
    /// Leading tokens that prefill wrote from the very first on: their full pages can be shared. 0 where a blob is at
    /// the bottom: what is computed behind KV from elsewhere depends on it.
    pub(crate) n_shareable: usize,
    /// The length behind the last prompt, where an answer begins.
    answer_start: usize,
    /// Of the step at hand.
    pub(crate) rope: Rope,
    pub(crate) cancel: Arc<AtomicBool>,
    pub(crate) receipt: Receipt,
    before: Before,
}

/// What a session was before what is pending, besides its cache.
#[derive(Clone, Copy, Debug, Default)]
struct Before {
    receipt: Receipt,
    answer_start: usize,
    logits_ready: bool, // logits change only where nothing can fail any more
    drawn: Option<Drawn>,
}

/// What the sessions of a pass note of it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Lists {
    /// Rows of the pass that none of them has.
    pub(crate) n_rows: usize,
    /// Of their lists.
    bytes: usize,
    /// Pages that may be entered into the index of prefixes.
    n_pages: usize,
}

impl Lists {
    /// Of a pass of so many rows.
    pub(crate) fn new(n_rows: usize) -> Self {
        Self { n_rows, bytes: 0, n_pages: 0 }
    }
}

/// Tokens that were given to a session and are not in its cache yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Pending {
    Nothing,
    /// A prompt, of which the first `done` tokens are in the cache.
    Prompt {
        tokens: Vec<u32>,
        done: usize,
    },
    /// One generated token.
    Token(u32),
}

impl Pending {
    /// Tokens that are still to be computed.
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Nothing => 0,
            Self::Prompt { tokens, done } => tokens.len() - done,
            Self::Token(_) => 1,
        }
    }
}

/// A token that the device drew after run `run` from row `idx` of its logits.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Drawn {
    pub(crate) token: u32,
    pub(crate) run: u64,
    pub(crate) idx: usize,
}

/// Rotation frequencies for a sequence length.
#[derive(Clone, Debug)]
pub(crate) struct Rope {
    pub(crate) inv_freq: Vec<f64>,
    pub(crate) scale: f64,
    seq_len: usize,
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

/// A call that queues tokens and computes them. Dropped before it is done, it takes back what it did.
struct Attempt<'s> {
    session: &'s mut Session,
    is_done: bool,
}

impl Drop for Attempt<'_> {
    fn drop(&mut self) {
        if !self.is_done {
            self.session.roll_back();
            self.session.clear_pending();
            self.session.draw = None;
        }
    }
}

impl Model {
    /// Opens an empty session.
    pub fn session(&self, options: &SessionOptions) -> Result<Session, Error> {
        let (policies, ctx_len) = options.check(self.plan(), self.config())?;
        Session::new(self.clone(), policies, ctx_len)
    }
}

impl Session {
    /// An empty session that computes and keeps what `policies` say, of `ctx_len` tokens at most.
    pub(crate) fn new(model: Model, policies: Policies, ctx_len: usize) -> Result<Self, Error> {
        let Policies { lazy, stream, evict } = policies;
        let plan = model.plan();
        let points = lazy.iter().flat_map(|lazy| &lazy.points).map(|point| point.layer);
        Ok(Self {
            ctx_len,
            tokens: Vec::new(),
            stream,
            n_gone: 0,
            cache: LayeredCache::new(plan.n_layers, points),
            evicting: evict.map(|policy| Evicting::new(policy, plan.n_layers)),
            lazy,
            pending: Pending::Nothing,
            stage: Stage::default(),
            turn: Turn::default(),
            logits: memory::zeros(model.config().vocab_size, "a session's logits")?,
            logits_ready: false,
            draw: None,
            drawn: None,
            n_shareable: 0,
            answer_start: 0,
            rope: Rope::new(&model, 0),
            cancel: Arc::default(),
            receipt: Receipt::default(),
            before: Before::default(),
            model,
        })
    }

    /// The model that the session runs on.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// Tokens of the session, whatever layers still hold of them. A stream has left some behind: behind those of the first
    /// page, [`n_gone`](Self::n_gone) are missing.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// The tokens that were generated since the last prompt, as far as they are there without a gap.
    pub fn answer(&self) -> &[u32] {
        let n = self.len().saturating_sub(self.answer_start);
        let n_held = match self.n_gone {
            0 => self.tokens.len(),
            _ => self.tokens.len() - self.model.plan().layout.n_slots(1),
        };
        &self.tokens[self.tokens.len() - n.min(n_held)..]
    }

    /// An answer of so many tokens, or what is left of it, has begun.
    pub(crate) fn set_answer(&mut self, n_tokens: usize) {
        self.answer_start = self.len() - n_tokens;
    }

    /// Tokens that a repetition penalty counts: all of them, of a stream those that the last token saw. (What a stream holds
    /// besides depends on the length of its pages; and of all that ever went through, most of a vocabulary would be
    /// penalised in the end.)
    pub fn history(&self) -> History<'_> {
        let all = self.tokens.as_slice();
        let tokens = match self.stream {
            Some(stream) if self.len() > stream.capacity() as usize => {
                let window = all.len() - stream.window as usize;
                [&all[..stream.sink as usize], &all[window..]]
            }
            _ => [all, &[]],
        };
        let n = self.answer().len();
        let window = self.stream.map_or(usize::MAX, |stream| stream.window as usize);
        History { tokens, answer: &all[all.len() - n.min(window)..] }
    }

    /// Number of tokens that the session has taken in and not forgotten since; a stream has left some behind.
    pub fn len(&self) -> usize {
        self.tokens.len() + self.n_gone
    }

    /// Tokens that a stream has left behind.
    pub fn n_gone(&self) -> usize {
        self.n_gone
    }

    /// An empty stream that is about to hold what a saved one held.
    pub(crate) fn set_gone(&mut self, n_gone: usize) {
        self.n_gone = n_gone;
        self.cache.segments[0].n_gone = n_gone;
    }

    /// True if the cache holds no token.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// Tokens the session may hold.
    pub fn ctx_len(&self) -> usize {
        self.ctx_len
    }

    /// Logits after the last token: `None` before the first token, after a truncation, and where they could not be
    /// [recalled](Self::recall_logits) from the device.
    pub fn logits(&self) -> Option<&[f32]> {
        self.logits_ready.then_some(&self.logits)
    }

    /// The same as logarithms of probabilities.
    pub fn log_softmax(&self) -> Option<LogSoftmax<'_>> {
        self.logits().map(LogSoftmax::new)
    }

    /// What the session has cost so far.
    pub fn receipt(&self) -> Receipt {
        let plan = self.model.plan();
        Receipt {
            kv_bytes: self.cache.n_pages() * plan.layout.bytes(),
            aux_bytes: self.cache.aux.n_pages(Store::Waiting) * plan.aux_page_bytes
                + self.cache.aux.n_pages(Store::Transit) * plan.transit_page_bytes,
            n_waiting: self.cache.aux.len(),
            ..self.receipt
        }
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
        self.room_for_lists(tokens.len())?;
        self.pending = Pending::Prompt { tokens: memory::copy(tokens, "a prompt")?, done: 0 };
        self.begin();
        Ok(())
    }

    /// Queues one generated token for [`Model::step`](crate::Model::step).
    pub fn push(&mut self, token: u32) -> Result<(), Error> {
        self.check_input("push", &[token])?;
        if self.is_empty() {
            let reason = "the first tokens of a session are a prompt; use feed or prefill".into();
            return Err(Error::State { call: "push", reason });
        }
        self.pending = Pending::Token(token);
        self.begin();
        Ok(())
    }

    /// Adds the session's lists in a pass to what those of the sessions before it take, and fails unless there is memory
    /// for all.
    pub(crate) fn room_for_pass(&self, lists: &mut Lists) -> Result<(), Error> {
        let n_new = self.pending.len();
        let n_rows = n_new.max(self.stage.chosen.len()).min(lists.n_rows);
        lists.n_rows -= n_rows;
        lists.bytes = lists.bytes.saturating_add(self.list_bytes(n_new, n_rows));
        if matches!(self.pending, Pending::Prompt { .. }) {
            lists.n_pages += n_new / self.model.plan().layout.page_len + 1;
            self.model.shared.pool().prefixes.reserve(lists.n_pages)?;
        }
        memory::room_for(lists.bytes, "the lists of a pass")
    }

    /// Fails unless there is memory for the lists of the session's tokens and `n_new` more.
    pub(crate) fn room_for_lists(&self, n_new: usize) -> Result<(), Error> {
        memory::room_for(self.list_bytes(n_new, 0), "the lists of a session's tokens")
    }

    /// The most that is noted of the session's tokens, `n_new` more and as many of these as `n_rows` in a pass, until the
    /// pass is committed and what follows from it is chosen, in bytes: copies of page tables, the rows of a batch, the
    /// lists that a policy sorts. As it is asked for before, nothing of that has to fail half-way.
    fn list_bytes(&self, n_new: usize, n_rows: usize) -> usize {
        let plan = self.model.plan();
        let n_held = self.cache.segments.iter().map(Segment::len).max().unwrap_or(0);
        let n_slots = n_held.max(self.tokens.len()).saturating_add(n_new);
        let n_pages = n_slots / plan.layout.page_len + N_SHORT_PAGES;
        // The attention of slots: before the call, before the pass, after it, and as it is sorted.
        let of_layers = if self.evicting.is_some() { plan.n_layers * ATTENTION_BYTES } else { 0 };
        let of_slot = SLOT_BYTES + plan.shape.n_kv_heads + of_layers;
        let of_row = ROW_BYTES * plan.shape.n_kv_heads + ANGLE_BYTES * plan.shape.head_dim;
        let of_page = PAGE_BYTES + plan.n_layers * ENTRY_BYTES;
        [(n_slots, of_slot), (n_rows, of_row), (n_pages, of_page)]
            .into_iter()
            .fold(0, |sum: usize, (n, bytes)| sum.saturating_add(n.saturating_mul(bytes)))
    }

    fn begin(&mut self) {
        let Self { receipt, answer_start, logits_ready, drawn, .. } = *self;
        self.before = Before { receipt, answer_start, logits_ready, drawn };
        self.cache.begin();
        self.turn = Turn::default();
        let is_prompt = matches!(self.pending, Pending::Prompt { .. });
        if is_prompt {
            self.answer_start = self.len() + self.pending.len();
        }
        if let Some(evicting) = &mut self.evicting {
            evicting.begin(is_prompt);
        }
    }

    /// True if rows of the prompt that is pending have been computed.
    pub(crate) fn has_begun(&self) -> bool {
        self.receipt.n_prefilled > self.before.receipt.n_prefilled
    }

    /// Drops tokens that were queued and not computed; returns how many. In a session that prunes, what was
    /// queued goes as a whole: a prompt that has come through some of the layers is taken back.
    pub fn clear_pending(&mut self) -> usize {
        if self.lazy.is_some() {
            self.roll_back();
        }
        let n = self.pending.len();
        self.pending = Pending::Nothing;
        self.stage = Stage::default();
        let model = self.model.clone();
        self.settle(&mut model.shared.pool());
        n
    }

    /// Takes back what has been computed of what is pending, which stays pending.
    pub(crate) fn roll_back(&mut self) {
        let n_new = match &mut self.pending {
            Pending::Prompt { done, .. } => std::mem::take(done),
            Pending::Token(_) => usize::from(self.stage.segment > 0),
            Pending::Nothing => return,
        };
        let shared = &*self.model.shared;
        self.cache.rollback(&shared.plan.layout, &mut shared.pool());
        self.tokens.truncate(self.tokens.len() - n_new);
        self.n_shareable = self.n_shareable.min(self.len());
        self.stage = Stage::default();
        if let Some(evicting) = &mut self.evicting {
            evicting.roll_back();
        }
        let Before { receipt, answer_start, logits_ready, drawn } = self.before;
        (self.receipt, self.answer_start) = (receipt, answer_start);
        (self.logits_ready, self.drawn) = (logits_ready, drawn);
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
        self.attempt(|session| session.run_prompt(progress))
    }

    /// Computes what was queued. After an error or a panic the session is what it was before, and what was
    /// queued is gone.
    fn attempt(&mut self, call: impl FnOnce(&mut Self) -> Result<(), Error>) -> Result<(), Error> {
        let mut attempt = Attempt { session: self, is_done: false };
        call(attempt.session)?;
        attempt.is_done = true;
        Ok(())
    }

    fn run_prompt(
        &mut self,
        progress: &mut dyn FnMut(usize, usize) -> ControlFlow<()>,
    ) -> Result<(), Error> {
        loop {
            let model = self.model.clone();
            match model.step_one(self)? {
                Progress::Ready | Progress::Idle => return Ok(()),
                Progress::Pending { done, total } => {
                    if progress(done, total).is_break() {
                        return Err(Error::Cancelled);
                    }
                }
            }
        }
    }

    /// Adds one generated token; its logits are ready afterwards.
    pub fn decode(&mut self, token: u32) -> Result<(), Error> {
        self.push(token)?;
        let model = self.model.clone();
        self.attempt(|session| model.step_one(session).map(drop))
    }

    /// Adds one generated token and chooses the next: on the device where that is possible, and then the
    /// logits stay there until they are [recalled](Self::recall_logits).
    pub(crate) fn decode_and_draw(
        &mut self,
        token: u32,
        sampler: &mut Sampler,
    ) -> Result<u32, Error> {
        // Once a stream is as long as its window, the next history lacks a token of this one.
        let grows = self.stream.is_none_or(|stream| self.len() < stream.window as usize);
        let history = grows.then(|| self.history());
        self.draw = sampler.draw_on_device(history.as_ref(), token, self.logits.len());
        let outcome = self.decode(token);
        self.draw = None;
        outcome?;
        match &self.drawn {
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
        let Some(Drawn { run, idx, .. }) = self.drawn else { return Ok(()) };
        let model = self.model.clone();
        let mut device = model.shared.device();
        if device.n_runs() == run {
            device.read_logits(idx, &mut self.logits)?;
            (self.drawn, self.logits_ready) = (None, true);
            return Ok(());
        }
        drop(device);
        let Some(&last) = self.tokens.last() else { return Ok(()) };
        // In a fork: whatever happens to it, this session keeps its tokens.
        let mut again = self.fork()?;
        again.cancel = self.cancel.clone();
        again.truncate(self.len() - 1)?;
        if let Some(lazy) = &mut again.lazy {
            lazy.revives = false; // those that it took up are there
        }
        again.decode(last)?;
        std::mem::swap(&mut self.logits, &mut again.logits);
        (self.drawn, self.logits_ready) = (None, true);
        Ok(())
    }

    /// Runs `tokens` and shows `visit` the logits after each of them (index into `tokens`, logits); `visit`
    /// may run other sessions. After any error the session is as it was before the call.
    pub fn logits_of(
        &mut self,
        tokens: &[u32],
        visit: &mut dyn FnMut(usize, &[f32]),
    ) -> Result<(), Error> {
        if self.lazy.is_some() || self.evicting.is_some() {
            let reason = "a session that prunes or evicts has no logits of all rows; open one without lazy and evict";
            return Err(Error::State { call: "logits of all rows", reason: reason.into() });
        }
        self.feed(tokens)?;
        let model = self.model.clone();
        self.attempt(|session| model.logits_of_one(session, visit))
    }

    /// A second session with the same tokens and logits. Pages are shared until one of the two writes to them.
    pub fn fork(&self) -> Result<Session, Error> {
        if self.pending != Pending::Nothing {
            let reason = "tokens are queued; step or clear them first".into();
            return Err(Error::State { call: "fork", reason });
        }
        let tokens = memory::copy(&self.tokens, "a fork's tokens")?;
        let logits = memory::copy(&self.logits, "a session's logits")?;
        let evicting = self.evicting.as_ref().map(Evicting::copy).transpose()?;
        // The last that can fail: the pages have one more holder from here on, who gives them back.
        let cache = self.cache.fork(&mut self.model.shared.pool())?;
        Ok(Session {
            model: self.model.clone(),
            ctx_len: self.ctx_len,
            tokens,
            stream: self.stream,
            n_gone: self.n_gone,
            cache,
            lazy: self.lazy.clone(),
            evicting,
            pending: Pending::Nothing,
            stage: Stage::default(),
            turn: Turn::default(),
            logits,
            logits_ready: self.logits_ready,
            draw: None,
            drawn: self.drawn,
            n_shareable: self.n_shareable,
            answer_start: self.answer_start,
            rope: self.rope.clone(),
            cancel: Arc::default(),
            receipt: self.receipt,
            before: Before::default(),
        })
    }

    /// Forgets the tokens from `len` on; the pages that only they needed are free at once. Queued tokens
    /// are dropped too. Logits are gone unless nothing was forgotten.
    ///
    /// What follows is as if the session had never gone further, but for three things that stay. In a session that prunes,
    /// where those that are forgotten chose whom to leave behind and whom to take up again, that stands, and no number
    /// depends on them otherwise, because a token sees none behind it (a slot between others stays, without a token, until
    /// those behind it go). What a cache of sealed pages has coded stays so, although a session that never went further
    /// would still hold it in 16 bits. And `h2o` has counted the attention that forgotten tokens paid.
    ///
    /// A stream has left behind what tokens from some length on do not see, and a session that evicts cannot go back to in
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
            self.cut(len);
        }
        Ok(())
    }

    /// The least length, besides 0, that the session can be [cut back](Self::truncate) to; 0: any. It is never more than
    /// the session's length, and less for a stream.
    pub fn least_len(&self) -> usize {
        let since = self.evicting.as_ref().map_or(0, |evicting| evicting.since);
        let of_stream = self.stream.map_or(0, |stream| {
            let layout = &self.model.plan().layout;
            let (first, last) = (layout.n_slots(1), self.len().saturating_sub(1));
            let first_seen = u32::try_from(last).map_or(0, |last| stream.first_seen(last)) as usize;
            // Where something is queued: also what will be gone when it is dropped.
            let n_going = first_seen.saturating_sub(first) / layout.page_len * layout.page_len;
            match self.cache.segments[0].n_gone.max(n_going) {
                0 => 0,
                n_gone => first + n_gone + stream.window as usize - 1, // it sees nothing in front of what is there
            }
        });
        since.max(of_stream)
    }

    /// [`truncate`](Self::truncate) to a length that is possible, with nothing queued.
    pub(crate) fn cut(&mut self, len: usize) {
        let shared = &*self.model.shared;
        self.cache.forget(len, &shared.plan.layout, &mut shared.pool());
        if let Some(evicting) = &mut self.evicting {
            evicting.truncate(self.cache.segments[0].len());
        }
        if len == 0 {
            self.n_gone = 0;
        }
        self.tokens.truncate(len - self.n_gone);
        self.n_shareable = self.n_shareable.min(len);
        self.answer_start = self.answer_start.min(len);
        (self.logits_ready, self.drawn) = (false, None);
    }

    /// What was pending is done with: nothing can be undone any more.
    pub(crate) fn settle(&mut self, pool: &mut Pool) {
        self.cache.settle(pool);
        // The last token may be computed once more.
        self.roll(self.len().saturating_sub(1), pool);
        let n_gone = self.cache.segments[0].n_gone;
        let first = self.model.plan().layout.n_slots(1);
        if n_gone > self.n_gone {
            self.tokens.drain(first..first + n_gone - self.n_gone);
            self.n_gone = n_gone;
        }
    }

    /// Gives back what no token from `position` on sees.
    pub(crate) fn roll(&mut self, position: usize, pool: &mut Pool) {
        if let (Some(stream), Ok(position)) = (self.stream, u32::try_from(position)) {
            self.cache.roll(stream.first_seen(position), &self.model.plan().layout, pool);
        }
    }

    fn check_input(&self, call: &'static str, tokens: &[u32]) -> Result<(), Error> {
        if self.pending != Pending::Nothing {
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

    /// Rows of a prompt are through the first segment: lets other sessions share the pages that they filled there, where
    /// `n_before` tokens could be shared before. What a full page holds is final: it leaves the index before
    /// anything is written to it again. One that prunes needs the hidden states behind it too, which are there if
    /// the model was opened to keep them.
    pub(crate) fn offer_prefix(&self, n_before: usize, pool: &mut Pool) {
        let layout = &self.model.plan().layout;
        let n_full = |n_tokens: usize| layout.place(n_tokens).0;
        let is_prompt = matches!(self.pending, Pending::Prompt { .. });
        if !is_prompt || !self.offers() || n_full(self.n_shareable) == n_full(n_before) {
            return;
        }
        let segment = &self.cache.segments[0];
        let prunes = self.lazy.is_some();
        let hidden = prunes.then(|| self.cache.aux.whole_pages(self.n_shareable, layout.page_len));
        let filled = Filled {
            page_table: &segment.page_table,
            n_layers: segment.n_layers,
            hidden: hidden.as_deref(),
        };
        let tokens = &self.tokens[..self.n_shareable];
        let held = pool.prefixes.enter(self.prefix_root(), tokens, layout, filled);
        pool.aux.transit.share(&held);
    }

    /// True if other sessions may share its pages.
    fn offers(&self) -> bool {
        let plan = self.model.plan();
        let has_rolled = self.cache.segments[0].n_gone > 0;
        // A stream whose prompt is longer than what it sees leaves its pages behind before the prompt is through.
        let end = u32::try_from(self.len() + self.pending.len()).unwrap_or(u32::MAX);
        let first_gone = plan.layout.n_slots(2);
        let will_roll = self.stream.is_some_and(|s| s.first_seen(end) as usize >= first_gone);
        let keeps = self.lazy.is_none() || plan.keep_prefixes;
        keeps && !has_rolled && !will_roll && !plan.layout.kv.are_sealed()
    }

    /// Where the chains of pages begin that the session may share.
    pub(crate) fn prefix_root(&self) -> u64 {
        if self.lazy.is_some() { self.cache.layers(0).len() as u64 } else { ROOT }
    }

    /// The prompt and how much of it is done, if it is all that the session has and not through the first segment.
    fn whole_prompt(&self) -> Option<(&[u32], usize)> {
        match &self.pending {
            Pending::Prompt { tokens, done } if self.len() == *done && self.stage.segment == 0 => {
                Some((tokens, *done))
            }
            _ => None,
        }
    }

    /// The leading tokens of a prompt whose pages may be another session's, and how many of them are done: full pages.
    fn wanted(&self) -> Option<(&[u32], usize)> {
        let (tokens, done) = self.whole_prompt()?;
        let shared = &*self.model.shared;
        let layout = &shared.plan.layout;
        // Dynamic scaling rotates a key by the length of the prompt it came with.
        let dynamic = matches!(shared.config.rope.scaling, RopeScaling::Dynamic { .. });
        // What a row sees of a table with sealed pages depends on where it stands.
        let seals = layout.kv.are_sealed();
        // Pages do not say what attention their tokens got.
        let counts_all = self.evicting.as_ref().is_some_and(Evicting::counts_all);
        if dynamic || seals || counts_all || layout.n_slots(layout.n_pages(done)) != done {
            return None;
        }
        // The last token is always computed, as its logits are wanted, and so are all rows that score together. Up to its
        // capacity a stream is as any other.
        let capacity = self.stream.map_or(usize::MAX, |stream| stream.capacity() as usize);
        Some((&tokens[..(tokens.len() - self.n_mass_rows()).min(capacity)], done))
    }

    /// The tokens of a prompt up to the end of the page that it could take over next.
    pub(crate) fn next_page(&self) -> Option<&[u32]> {
        let (wanted, done) = self.wanted()?;
        let layout = &self.model.plan().layout;
        wanted.get(..layout.n_slots(layout.n_pages(done) + 1))
    }

    /// True if the session computes a prompt that begins with these tokens, and others may share its pages as soon as it
    /// has come to their end.
    pub(crate) fn is_filling(&self, wanted: &[u32]) -> bool {
        let capacity = self.stream.map_or(usize::MAX, |stream| stream.capacity() as usize);
        let is_ahead = |(tokens, done): (&[u32], usize)| {
            // From the end: prompts that begin alike differ there.
            let begins_so = |begin: &[u32]| begin.iter().rev().eq(wanted.iter().rev());
            done < wanted.len() && tokens.get(..wanted.len()).is_some_and(begins_so)
        };
        self.offers() && wanted.len() <= capacity && self.whole_prompt().is_some_and(is_ahead)
    }

    /// Takes over the next full pages that another session's prompt has filled already; gives how many tokens they hold.
    pub(crate) fn share_prefix(&mut self) -> usize {
        let root = self.prefix_root();
        let Some((wanted, n_done)) = self.wanted() else { return 0 };
        let shared = self.model.shared.clone();
        let layout = &shared.plan.layout;
        let mut pool = shared.pool();
        let mut found = pool.prefixes.find(root, wanted, layout);
        let n_layers = self.cache.layers(0).len();
        let end = layout.n_slots(found.columns.len() / n_layers);
        if end <= n_done {
            return 0;
        }
        found.skip(layout.n_pages(n_done), n_layers);
        pool.pages.share(&found.columns);
        pool.aux.transit.share(&found.hidden);
        self.cache.adopt(found, n_done..end, layout.page_len);
        if let Pending::Prompt { tokens, done } = &mut self.pending {
            self.tokens.extend_from_slice(&tokens[n_done..end]);
            *done = end;
        }
        self.n_shareable = end;
        self.receipt.n_shared += end - n_done;
        end - n_done
    }

    /// Takes back the last `n` tokens, which were taken over.
    pub(crate) fn unshare(&mut self, n: usize) {
        if n == 0 {
            return;
        }
        let shared = self.model.shared.clone();
        let len = self.tokens.len() - n;
        self.cache.forget(len, &shared.plan.layout, &mut shared.pool());
        self.tokens.truncate(len);
        if let Pending::Prompt { done, .. } = &mut self.pending {
            *done -= n;
        }
        self.n_shareable = len;
        self.receipt.n_shared -= n;
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.cache.release(&mut self.model.shared.pool());
    }
}

impl Rope {
    pub(crate) fn new(model: &Model, seq_len: usize) -> Self {
        let config = model.config();
        let (inv_freq, scale) = config.rope.inv_freq(config.head_dim, seq_len);
        Self { inv_freq, scale, seq_len }
    }

    /// Dynamic scaling depends on how long the sequence will be with all that is queued; no other does.
    pub(crate) fn fit(&mut self, model: &Model, seq_len: usize) {
        let dynamic = matches!(model.config().rope.scaling, RopeScaling::Dynamic { .. });
        if dynamic && seq_len != self.seq_len {
            *self = Self::new(model, seq_len);
        }
    }
}
