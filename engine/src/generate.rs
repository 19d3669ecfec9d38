//! The generation loop: sample, show, decode, until something says stop.

use std::ops::{ControlFlow, Range};

use loris_loader::{Special, TextStream, Tokenizer};

use crate::error::Error;
use crate::logprobs::{LogSoftmax, Logprobs};
use crate::memory;
use crate::sampler::{self, Sampler};
use crate::session::Session;
use crate::sync::atomic::Ordering::Relaxed;

/// When to stop, besides the end-of-sequence tokens of the model.
#[derive(Clone, Debug)]
pub struct GenerateOptions {
    /// Tokens at most.
    pub max_tokens: usize,
    /// Tokens at least: before, no token that would end the answer is chosen, and no stop text looked for.
    pub min_tokens: usize,
    /// Texts that end the answer; they are not part of it. The text of a special token counts, which is not shown otherwise.
    pub stop: Vec<String>,
    /// The stop text that ended the answer is part of it all the same.
    pub keep_stop: bool,
    /// Tokens that end the answer as an end-of-sequence token does.
    pub stop_ids: Vec<u32>,
    /// Go on after an end-of-sequence token.
    pub ignore_eos: bool,
    /// [`Token::logprobs`] are wanted, with so many of the likeliest tokens. Then logits come from the device for each token, and
    /// the host draws.
    pub logprobs: Option<usize>,
}

impl Default for GenerateOptions {
    fn default() -> Self {
        Self {
            max_tokens: 256,
            min_tokens: 0,
            stop: Vec::new(),
            keep_stop: false,
            stop_ids: Vec::new(),
            ignore_eos: false,
            logprobs: None,
        }
    }
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// The model ended it.
    Eos,
    /// A stop text or a stop token was reached.
    Stop,
    /// `max_tokens` were generated.
    Length,
    /// The session's context is full.
    CtxFull,
    /// The callback or a [`Canceller`](crate::Canceller) stopped it.
    Cancelled,
    /// No token may come next: the mask allows none but such as are never chosen, or not yet, because of `min_tokens`.
    DeadEnd,
}

/// A generated token and the text that it completes.
#[derive(Clone, Copy, Debug)]
pub struct Token<'a> {
    /// Its id.
    pub id: u32,
    /// The token was shown already, and this is text of its that had been held back.
    pub is_rest: bool,
    /// Text that is certain now: whole characters, and nothing that could still become a stop text.
    pub text: &'a str,
    /// How likely the model held it, where that is [wanted](GenerateOptions::logprobs) and the token is not shown already.
    pub logprobs: Option<&'a Logprobs>,
}

/// Says which tokens may come next: it is given the answer so far and a bit set of zeros, bit `id % 32` of word `id / 32`, in
/// which it sets those that may. The end-of-sequence tokens are among the ids; an answer can end where they are allowed.
///
/// The answer is all that was generated since the last prompt, in this call of [`generate_masked`] and before, as far as the
/// session still [holds](Session::answer) what came before. The last token is about to be taken in: what the mask allows is
/// asked for before the pass, so that a device can choose at its end. It is asked once a token; a token that was
/// chosen and never shown is not part of a later answer, so it is the list that counts and not the calls.
pub type TokenMask<'m> = dyn FnMut(&[u32], &mut [u32]) -> Result<(), String> + 'm;

/// Generates from a session whose logits are ready, until something says stop.
///
/// A token is shown once the session holds it. So after any end, errors included, the session holds the tokens that were
/// shown and no other, the random sequence has advanced by as many, and the next call goes on from there. (Its logits are
/// those after the last token. They may have been left on the device by a call that could not read them:
/// [`Session::recall_logits`].)
///
/// `on_token` is called once a token, in order, and once more with the last token's id if text was
/// still held back at the end. A token that ends the answer is neither shown nor held.
///
/// The text is that of the [answer](Session::answer) as a whole, also where a call goes on with it: a character whose bytes
/// are in the tokens of two calls is shown by the second one.
pub fn generate(
    session: &mut Session,
    sampler: &mut Sampler,
    options: &GenerateOptions,
    on_token: &mut dyn FnMut(Token<'_>) -> ControlFlow<()>,
) -> Result<Finish, Error> {
    generate_by(session, sampler, options, None, on_token)
}

/// As [`generate`], but each token is one that `mask` allows. Where it fails ([`Error::TokenMask`]) or allows none
/// ([`Finish::DeadEnd`]), the answer ends before that token.
pub fn generate_masked(
    session: &mut Session,
    sampler: &mut Sampler,
    options: &GenerateOptions,
    mask: &mut TokenMask<'_>,
    on_token: &mut dyn FnMut(Token<'_>) -> ControlFlow<()>,
) -> Result<Finish, Error> {
    generate_by(session, sampler, options, Some(mask), on_token)
}

fn generate_by(
    session: &mut Session,
    sampler: &mut Sampler,
    options: &GenerateOptions,
    mask: Option<&mut TokenMask<'_>>,
    on_token: &mut dyn FnMut(Token<'_>) -> ControlFlow<()>,
) -> Result<Finish, Error> {
    let model = session.model().clone();
    if options.min_tokens > options.max_tokens {
        let expected = format!("at most max-tokens, {}", options.max_tokens);
        return Err(Error::option("min-tokens", options.min_tokens, expected));
    }
    let mut ends = Ends { eos: &[], ids: &options.stop_ids };
    if !options.ignore_eos {
        ends.eos = &model.config().eos_ids;
    }
    let mut text = StopText::new(model.tokenizer(), session.answer(), options)?;
    let mut choices = Choices::new(session, &ends, options, mask)?;
    let mut last_id = 0;
    let mut shown = sampler.state();
    let finish = loop_tokens(
        session,
        sampler,
        options,
        &ends,
        &mut choices,
        &mut text,
        &mut |token, state| {
            (last_id, shown) = (token.id, state);
            on_token(token)
        },
    );
    sampler.allow();
    sampler.go_back(shown); // a token that was chosen and not shown is chosen again
    // The answer is complete without them, and who wants them can ask again.
    let _ = session.recall_logits();
    // Tokens that were shown are part of the answer, whatever ended it: so is their text.
    let has_ended = matches!(finish, Ok(Finish::Eos | Finish::Stop | Finish::DeadEnd));
    let rest = text.finish(has_ended)?;
    if !rest.is_empty() && !matches!(finish, Ok(Finish::Cancelled)) {
        let _ = on_token(Token { id: last_id, is_rest: true, text: &rest, logprobs: None });
    }
    finish
}

/// What may be chosen, token by token.
struct Choices<'a, 'm> {
    /// Those that would end the answer, as one list; they wait for `min_tokens`.
    ends: Vec<u32>,
    min_tokens: usize,
    mask: Option<&'a mut TokenMask<'m>>,
    /// For the mask: the answer so far, and room for what it allows.
    answer: Vec<u32>,
    allowed: Vec<u32>,
    vocab_size: usize,
}

impl<'a, 'm> Choices<'a, 'm> {
    fn new(
        session: &Session,
        ends: &Ends<'_>,
        options: &GenerateOptions,
        mask: Option<&'a mut TokenMask<'m>>,
    ) -> Result<Self, Error> {
        let vocab_size = session.model().config().vocab_size;
        let (mut answer, mut allowed) = Default::default();
        if mask.is_some() {
            answer = memory::copy(session.answer(), "an answer")?;
            allowed = memory::zeros(sampler::n_words(vocab_size), "a token mask")?;
        }
        let ends = [ends.eos, ends.ids].concat();
        Ok(Self { ends, min_tokens: options.min_tokens, mask, answer, allowed, vocab_size })
    }

    /// Tells the sampler what may come behind `last` and `n` tokens of this call. False: nothing.
    fn tell(&mut self, sampler: &mut Sampler, last: Option<u32>, n: usize) -> Result<bool, Error> {
        let waiting = if n < self.min_tokens { &self.ends[..] } else { &[] };
        let Some(mask) = &mut self.mask else {
            // It changes where a new part of the answer begins.
            if n != 0 && n != self.min_tokens {
                return Ok(true);
            }
            if !sampler.restrict(None, waiting, self.vocab_size)? {
                let expected = "0, as every token of the model ends an answer";
                return Err(Error::option("min-tokens", self.min_tokens, expected));
            }
            return Ok(true);
        };
        if let Some(last) = last {
            memory::push(&mut self.answer, last, "an answer")?;
        }
        self.allowed.fill(0);
        mask(&self.answer, &mut self.allowed).map_err(|reason| Error::TokenMask { reason })?;
        sampler.restrict(Some(&self.allowed), waiting, self.vocab_size)
    }
}

/// Tokens that end an answer.
struct Ends<'a> {
    eos: &'a [u32],
    ids: &'a [u32],
}

impl Ends<'_> {
    fn of(&self, id: u32) -> Option<Finish> {
        if self.eos.contains(&id) {
            return Some(Finish::Eos);
        }
        self.ids.contains(&id).then_some(Finish::Stop)
    }
}

/// `show` is told each token, and what the sampler was when it had chosen it.
fn loop_tokens(
    session: &mut Session,
    sampler: &mut Sampler,
    options: &GenerateOptions,
    ends: &Ends<'_>,
    choices: &mut Choices<'_, '_>,
    text: &mut StopText<'_>,
    show: &mut dyn FnMut(Token<'_>, u64) -> ControlFlow<()>,
) -> Result<Finish, Error> {
    if options.max_tokens == 0 {
        return Ok(Finish::Length);
    }
    session.recall_logits()?;
    let Some(logits) = session.logits() else {
        let reason = "the session has no logits; prefill a prompt first".into();
        return Err(Error::State { call: "generate", reason });
    };
    if session.cancel.swap(false, Relaxed) {
        return Ok(Finish::Cancelled); // an answer that ends at once needs no pass that would see it
    }
    let logprobs_of = |logits: Option<&[f32]>, id| match (logits, options.logprobs) {
        (Some(logits), Some(n_top)) => LogSoftmax::new(logits).logprobs(id, n_top).map(Some),
        _ => Ok(None),
    };
    if !choices.tell(sampler, None, 0)? {
        return Ok(Finish::DeadEnd);
    }
    let mut id = sampler.sample(logits, session.history());
    let mut logprobs = logprobs_of(Some(logits), id)?;
    for n in 1.. {
        if let Some(finish) = ends.of(id) {
            return Ok(finish);
        }
        let (state, is_last) = (sampler.state(), n == options.max_tokens);
        // What comes next, if anything does. This token stands either way.
        let goes_on = if is_last { Ok(false) } else { choices.tell(sampler, Some(id), n) };
        let next = match (&goes_on, options.logprobs) {
            (Ok(true), None) => session.decode_and_draw(id, sampler),
            (Ok(true), Some(_)) => session.decode_and_sample(id, sampler),
            _ => session.decode(id).map(|()| id),
        };
        let next = match next {
            Ok(next) => next,
            Err(Error::CtxFull { .. }) => return Ok(Finish::CtxFull),
            Err(Error::Cancelled) => return Ok(Finish::Cancelled),
            Err(e) => return Err(e),
        };
        let pushed = text.push(id, n > options.min_tokens); // what has no text is held all the same, so it is shown
        let shown = pushed.as_deref().unwrap_or_default();
        let token = Token { id, is_rest: false, text: shown, logprobs: logprobs.as_ref() };
        if show(token, state).is_break() {
            return Ok(Finish::Cancelled);
        }
        pushed?;
        if text.stopped {
            return Ok(Finish::Stop);
        }
        if is_last {
            return Ok(Finish::Length);
        }
        if !goes_on? {
            return Ok(Finish::DeadEnd);
        }
        (id, logprobs) = (next, logprobs_of(session.logits(), next)?);
    }
    Ok(Finish::Length)
}

/// Detokenised text with whatever might become a stop text held back.
struct StopText<'a> {
    tokenizer: Option<&'a Tokenizer>,
    stream: Option<TextStream>,
    options: &'a GenerateOptions,
    held: String,
    /// Parts of it that are not shown, first to last: the texts of special tokens, which stop texts may hold.
    silent: Vec<Range<usize>>,
    stopped: bool,
}

impl<'a> StopText<'a> {
    /// The text behind the tokens `before` of the same answer.
    fn new(
        tokenizer: Option<&'a Tokenizer>,
        before: &[u32],
        options: &'a GenerateOptions,
    ) -> Result<Self, Error> {
        let stream =
            tokenizer.map(|tokenizer| TextStream::after(tokenizer, Special::Parse, before));
        let (held, silent) = Default::default();
        Ok(Self { tokenizer, stream: stream.transpose()?, options, held, silent, stopped: false })
    }

    /// The text that a token makes certain; with `looks`, up to a stop text.
    fn push(&mut self, id: u32, looks: bool) -> Result<String, Error> {
        if let Some(stream) = &mut self.stream {
            self.held.push_str(&stream.push(id)?);
        }
        if let Some(text) =
            self.tokenizer.filter(|t| t.is_special(id)).and_then(|t| t.id_to_token(id))
        {
            let start = self.held.len();
            self.held.push_str(&text);
            self.silent.push(start..self.held.len());
        }
        Ok(if looks { self.release() } else { self.take(self.held.len()) })
    }

    /// What was held back when the answer ended. Where it may go on, an incomplete character waits for that.
    fn finish(&mut self, has_ended: bool) -> Result<String, Error> {
        if self.stopped {
            return Ok(String::new());
        }
        if let Some(stream) = self.stream.take().filter(|_| has_ended) {
            self.held.push_str(&stream.finish()?);
        }
        let shown = self.release();
        Ok(if self.stopped { shown } else { shown + &self.take(self.held.len()) })
    }

    fn release(&mut self) -> String {
        let stop = || self.options.stop.iter().filter(|stop| !stop.is_empty());
        // Of two that begin at one place, the one that is there first.
        let found = stop().filter_map(|s| Some((self.held.find(s.as_str())?, s.len()))).min();
        if let Some((at, len)) = found {
            self.stopped = true;
            return self.take(if self.options.keep_stop { at + len } else { at });
        }
        let n_held = stop().map(|s| overlap(&self.held, s)).max().unwrap_or(0);
        self.take(self.held.len() - n_held)
    }

    /// Takes what is shown of the first `end` bytes.
    fn take(&mut self, end: usize) -> String {
        let mut shown = String::with_capacity(end);
        let mut at = 0;
        for silent in &mut self.silent {
            let hidden = silent.start.min(end)..silent.end.min(end);
            shown.push_str(&self.held[at..hidden.start]);
            at = hidden.end;
            *silent = silent.start.saturating_sub(end)..silent.end.saturating_sub(end);
        }
        shown.push_str(&self.held[at..end]);
        self.silent.retain(|silent| !silent.is_empty());
        self.held.drain(..end);
        shown
    }
}

/// Bytes of the longest end of `text` that is a beginning of `stop`.
fn overlap(text: &str, stop: &str) -> usize {
    let longest = stop.len().saturating_sub(1).min(text.len());
    (1..=longest)
        .rev()
        .find(|&n| {
            text.is_char_boundary(text.len() - n)
                && stop.as_bytes().starts_with(&text.as_bytes()[text.len() - n..])
        })
        .unwrap_or(0)
}
