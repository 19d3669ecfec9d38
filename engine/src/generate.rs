//! The generation loop: sample, show, decode, until something says stop.

use std::ops::{ControlFlow, Range};

use loris_loader::{Special, TextStream, Tokenizer};

use crate::error::Error;
use crate::sampler::Sampler;
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
}

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
    let mut last_id = 0;
    let mut shown = sampler.state();
    let finish = loop_tokens(session, sampler, options, &ends, &mut text, &mut |token, state| {
        (last_id, shown) = (token.id, state);
        on_token(token)
    });
    sampler.allow();
    sampler.go_back(shown); // a token that was chosen and not shown is chosen again
    // The answer is complete without them, and who wants them can ask again.
    let _ = session.recall_logits();
    // Tokens that were shown are part of the answer, whatever ended it: so is their text.
    let rest = text.finish(matches!(finish, Ok(Finish::Eos | Finish::Stop)))?;
    if !rest.is_empty() && !matches!(finish, Ok(Finish::Cancelled)) {
        let _ = on_token(Token { id: last_id, is_rest: true, text: &rest });
    }
    finish
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
    if options.min_tokens > 0 {
        sampler.forbid(&[ends.eos, ends.ids].concat(), logits.len())?;
    }
    let mut id = sampler.sample(logits, session.history());
    for n in 1.. {
        if let Some(finish) = ends.of(id) {
            return Ok(finish);
        }
        if n >= options.min_tokens {
            sampler.allow();
        }
        let (state, is_last) = (sampler.state(), n == options.max_tokens);
        let next = match is_last {
            true => session.decode(id).map(|()| id), // its successor is not asked for
            false => session.decode_and_draw(id, sampler),
        };
        let next = match next {
            Ok(next) => next,
            Err(Error::CtxFull { .. }) => return Ok(Finish::CtxFull),
            Err(Error::Cancelled) => return Ok(Finish::Cancelled),
            Err(e) => return Err(e),
        };
        let pushed = text.push(id, n > options.min_tokens); // what has no text is held all the same, so it is shown
        let shown = pushed.as_deref().unwrap_or_default();
        if show(Token { id, is_rest: false, text: shown }, state).is_break() {
            return Ok(Finish::Cancelled);
        }
        pushed?;
        if text.stopped {
            return Ok(Finish::Stop);
        }
        if is_last {
            return Ok(Finish::Length);
        }
        id = next;
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
