//! The generation loop: sample, show, decode, until something says stop.

use std::ops::ControlFlow;

use loris_loader::{Special, TextStream};

use crate::error::Error;
use crate::sampler::Sampler;
use crate::session::Session;
use crate::sync::atomic::Ordering::Relaxed;

/// When to stop, besides the end-of-sequence tokens of the model.
#[derive(Clone, Debug)]
pub struct GenerateOptions {
    /// Tokens at most.
    pub max_tokens: usize,
    /// Texts that end the answer; they are not part of it.
    pub stop: Vec<String>,
    /// Go on after an end-of-sequence token.
    pub ignore_eos: bool,
}

impl Default for GenerateOptions {
    fn default() -> Self {
        Self { max_tokens: 256, stop: Vec::new(), ignore_eos: false }
    }
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// The model ended it.
    Eos,
    /// A stop text was reached.
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
/// still held back at the end. An end-of-sequence token is neither shown nor held.
pub fn generate(
    session: &mut Session,
    sampler: &mut Sampler,
    options: &GenerateOptions,
    on_token: &mut dyn FnMut(Token<'_>) -> ControlFlow<()>,
) -> Result<Finish, Error> {
    let model = session.model().clone();
    let mut text =
        StopText::new(model.tokenizer().map(|t| TextStream::new(t, Special::Parse)), &options.stop);
    let mut last_id = 0;
    let mut shown = sampler.state();
    let finish = loop_tokens(session, sampler, options, &mut text, &mut |token, state| {
        (last_id, shown) = (token.id, state);
        on_token(token)
    });
    sampler.go_back(shown); // a token that was chosen and not shown is chosen again
    // The answer is complete without them, and who wants them can ask again.
    let _ = session.recall_logits();
    // Tokens that were shown are part of the answer, whatever ended it: so is their text.
    let rest = text.finish()?;
    if !rest.is_empty() && !matches!(finish, Ok(Finish::Cancelled)) {
        let _ = on_token(Token { id: last_id, is_rest: true, text: &rest });
    }
    finish
}

/// `show` is told each token, and what the sampler was when it had chosen it.
fn loop_tokens(
    session: &mut Session,
    sampler: &mut Sampler,
    options: &GenerateOptions,
    text: &mut StopText<'_>,
    show: &mut dyn FnMut(Token<'_>, u64) -> ControlFlow<()>,
) -> Result<Finish, Error> {
    let model = session.model().clone();
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
    let mut id = sampler.sample(logits, session.tokens());
    for n in 1.. {
        if !options.ignore_eos && model.config().eos_ids.contains(&id) {
            return Ok(Finish::Eos);
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
        let pushed = text.push(id); // what has no text is held all the same, so it is shown
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
    stream: Option<TextStream>,
    stop: &'a [String],
    held: String,
    stopped: bool,
}

impl<'a> StopText<'a> {
    fn new(stream: Option<TextStream>, stop: &'a [String]) -> Self {
        Self { stream, stop, held: String::new(), stopped: false }
    }

    /// The text that a token makes certain.
    fn push(&mut self, id: u32) -> Result<String, Error> {
        if let Some(stream) = &mut self.stream {
            self.held.push_str(&stream.push(id)?);
        }
        Ok(self.release())
    }

    /// What was held back when the answer ended.
    fn finish(&mut self) -> Result<String, Error> {
        if self.stopped {
            return Ok(String::new());
        }
        if let Some(stream) = self.stream.take() {
            self.held.push_str(&stream.finish()?);
        }
        let shown = self.release();
        Ok(if self.stopped { shown } else { shown + &std::mem::take(&mut self.held) })
    }

    fn release(&mut self) -> String {
        let found =
            self.stop.iter().filter(|s| !s.is_empty()).filter_map(|s| self.held.find(s.as_str()));
        if let Some(at) = found.min() {
            self.stopped = true;
            self.held.truncate(at);
            return std::mem::take(&mut self.held);
        }
        let n_held = self.stop.iter().map(|s| overlap(&self.held, s)).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - n_held);
        std::mem::replace(&mut self.held, rest)
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
