//! One prompt through a session: reuse what is there, prefill the rest, stream the answer, count.

use std::ops::ControlFlow;
use std::time::Instant;

use loris::loader::GenerationDefaults;
use loris::{
    Error, Finish, GenerateOptions, KvFormats, LogSoftmax, Logprob, Logprobs, Model, Receipt,
    Sampler, SamplerParams, Session,
};
use serde_json::{Value, json};

use crate::args::GenerateArgs;
use crate::exit::{Failure, RUN_TIME};
use crate::grammar::Grammar;
use crate::interrupt::Guard;
use crate::report::{Report, Unit, bytes, peak_bytes, quantile, rounded};

/// What stays the same from answer to answer.
#[derive(Debug)]
pub(crate) struct Answerer<'a> {
    pub(crate) report: &'a Report,
    pub(crate) sampler: Sampler,
    pub(crate) params: SamplerParams,
    pub(crate) options: GenerateOptions,
    pub(crate) load_s: f64,
    pub(crate) grammar: Option<Grammar>,
    /// The tokens of prompts are told with so many of the likeliest in their place.
    pub(crate) prompt_logprobs: Option<usize>,
    /// What the session has taken in through this; a restored one has more.
    history: Vec<u32>,
}

/// An answer that was given.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) text: String,
    pub(crate) statistics: Statistics,
    /// Why it could not be shown to its end.
    pub(crate) failure: Option<Failure>,
}

/// What an answer took.
#[derive(Clone, Debug)]
pub(crate) struct Statistics {
    pub(crate) load_s: f64,
    pub(crate) prompt_tokens: usize,
    /// Prompt tokens that were in the session or in another one's pages.
    pub(crate) reused_tokens: usize,
    pub(crate) prefill_s: f64,
    pub(crate) ttft_s: f64,
    pub(crate) generated_tokens: usize,
    /// Seconds between tokens, sorted.
    pub(crate) gaps_s: Vec<f64>,
    pub(crate) kv_bytes: usize,
    pub(crate) kv_format: KvFormats,
    pub(crate) context_tokens: usize,
    pub(crate) ctx_len: usize,
    pub(crate) peak_bytes: Option<u64>,
    pub(crate) finish: Finish,
    /// Of the random sequence; `None`: the likeliest tokens were taken.
    pub(crate) seed: Option<u64>,
    pub(crate) receipt: Receipt,
}

/// The settings that the flags and the model's advice lead to.
pub(crate) fn sampling(args: &GenerateArgs, advice: &GenerationDefaults) -> SamplerParams {
    let advised = SamplerParams::advised(advice);
    let wants_samples = args.top_k.is_some()
        || [args.top_p, args.min_p, args.typical_p].iter().any(Option::is_some);
    let temperature = match advice.do_sample != Some(true) && wants_samples {
        true => 1.0,
        false => advised.temperature,
    };
    SamplerParams {
        temperature: args.temp.unwrap_or(temperature),
        top_k: args.top_k.unwrap_or(advised.top_k),
        top_p: args.top_p.unwrap_or(advised.top_p),
        min_p: args.min_p.unwrap_or(advised.min_p),
        typical_p: args.typical_p.unwrap_or(advised.typical_p),
        repetition_penalty: args.repeat_penalty.unwrap_or(advised.repetition_penalty),
        presence_penalty: args.presence_penalty,
        frequency_penalty: args.frequency_penalty,
        logit_bias: args.logit_bias.clone(),
        seed: args.seed.flatten(),
    }
}

impl<'a> Answerer<'a> {
    pub(crate) fn new(
        args: &GenerateArgs,
        model: &Model,
        grammar: Option<Grammar>,
        load_s: f64,
        report: &'a Report,
    ) -> Result<Self, Failure> {
        let params = sampling(args, &model.config().generation);
        let options = GenerateOptions {
            max_tokens: args.max_tokens,
            min_tokens: args.min_tokens,
            stop: args.stop.clone(),
            keep_stop: args.keep_stop,
            stop_ids: args.stop_id.clone(),
            ignore_eos: args.ignore_eos,
            logprobs: args.logprobs,
        };
        let sampler = model.sampler(params.clone())?;
        let (prompt_logprobs, history) = (None, Vec::new());
        Ok(Self { report, sampler, params, options, load_s, grammar, prompt_logprobs, history })
    }

    /// Answers a prompt that holds the whole sequence so far; the session keeps what it shares with it.
    /// An empty prompt goes on where the session ended. `started` is when the user began to wait.
    pub(crate) fn answer(
        &mut self,
        session: &mut Session,
        prompt: &[u32],
        started: Instant,
    ) -> Result<Answer, Failure> {
        let guard = Guard::new(session);
        check_length(prompt.len(), session.ctx_len())?;
        let before = session.receipt().n_shared;
        let kept = match prompt {
            [] => session.len(),
            _ => keep_common(session, &self.history, prompt)?,
        };
        self.history.truncate(kept);
        let prefill_started = Instant::now();
        if kept < prompt.len() {
            match self.prompt_logprobs {
                None => self.prefill(session, &prompt[kept..], &guard)?,
                Some(n_top) => self.logprobs_of(session, &prompt[kept..], n_top)?,
            }
            self.history.extend_from_slice(&prompt[kept..]);
        }
        let prefill_s = prefill_started.elapsed().as_secs_f64();
        let shared = session.receipt().n_shared - before;

        let mut shown = Shown::default();
        let model = session.model().clone();
        let mut on_token = |token: loris::Token<'_>| shown.take(self.report, &model, token);
        let (sampler, options) = (&mut self.sampler, &self.options);
        let generated = match &mut self.grammar {
            None => loris::generate(session, sampler, options, &mut on_token),
            Some(grammar) => {
                let mut mask = |answer: &[u32], allowed: &mut [u32]| grammar.mask(answer, allowed);
                loris::generate_masked(session, sampler, options, &mut mask, &mut on_token)
            }
        };
        self.history.extend(&shown.ids);
        let finish = generated?;
        let mut gaps_s: Vec<f64> =
            shown.times.windows(2).map(|pair| (pair[1] - pair[0]).as_secs_f64()).collect();
        gaps_s.sort_by(f64::total_cmp);
        let first = shown.times.first().copied().unwrap_or_else(Instant::now);
        let receipt = session.receipt();
        let statistics = Statistics {
            load_s: self.load_s,
            prompt_tokens: prompt.len(),
            reused_tokens: if prompt.is_empty() { 0 } else { kept + shared },
            prefill_s,
            ttft_s: (first - started).as_secs_f64(),
            generated_tokens: shown.times.len(),
            gaps_s,
            kv_bytes: receipt.kv_bytes,
            kv_format: session.model().plan().kv,
            context_tokens: session.len(),
            ctx_len: session.ctx_len(),
            peak_bytes: peak_bytes(),
            finish,
            seed: (self.params.temperature > 0.0).then(|| self.sampler.seed()),
            receipt,
        };
        Ok(Answer { text: shown.text, statistics, failure: shown.failure })
    }

    fn prefill(&self, session: &mut Session, tokens: &[u32], guard: &Guard) -> Result<(), Failure> {
        let started = Instant::now();
        let bar = self.report.bar("prompt", Unit::Tokens, tokens.len());
        let mut failure = None;
        let mut progress = |done: usize, total: usize| {
            bar.set_position(done as u64);
            match self.prefill_event(done, total, started) {
                Ok(()) => ControlFlow::Continue(()),
                Err(e) => {
                    failure = Some(e);
                    ControlFlow::Break(())
                }
            }
        };
        let mut outcome = session.prefill_with(tokens, &mut progress);
        if matches!(outcome, Err(Error::Cancelled)) && !guard.interrupted() && failure.is_none() {
            // A Ctrl-C that came just after the last answer's end was meant for that one.
            outcome = session.prefill_with(tokens, &mut |_, _| ControlFlow::Continue(()));
        }
        bar.finish_and_clear();
        if let Some(failure) = failure {
            return Err(failure);
        }
        outcome?;
        self.prefill_event(tokens.len(), tokens.len(), started)
    }

    /// Takes in a prompt as [`prefill`](Self::prefill) does, and tells how likely each of its tokens was.
    fn logprobs_of(
        &self,
        session: &mut Session,
        tokens: &[u32],
        n_top: usize,
    ) -> Result<(), Failure> {
        let started = Instant::now();
        let model = session.model().clone();
        let tell = |id: u32, before: Option<&[f32]>| {
            let of_token = before.map(|logits| LogSoftmax::new(logits).logprobs(id, n_top));
            let mut event = json!({ "id": id, "text": token_text(&model, id) });
            add_logprobs(&mut event, &model, of_token.transpose()?.as_ref());
            self.report.event("prompt", event)
        };
        tell(tokens[0], session.logits())?;
        let mut told = Ok(());
        session.logits_of(tokens, &mut |idx, logits| {
            if let Some(&next) = tokens.get(idx + 1)
                && told.is_ok()
            {
                told = tell(next, Some(logits));
            }
        })?;
        told?;
        self.prefill_event(tokens.len(), tokens.len(), started)
    }

    fn prefill_event(&self, done: usize, total: usize, started: Instant) -> Result<(), Failure> {
        let tok_s = rate(done, started.elapsed().as_secs_f64()).map(rounded);
        self.report.event("prefill", json!({ "done": done, "total": total, "tok_s": tok_s }))
    }

    /// The effective settings, for events.
    pub(crate) fn settings(&self) -> Value {
        let p = &self.params;
        let max_tokens = Some(self.options.max_tokens).filter(|&n| n < usize::MAX);
        json!({
            "temperature": exact(p.temperature), "top_k": p.top_k, "top_p": exact(p.top_p),
            "min_p": exact(p.min_p), "typical_p": exact(p.typical_p), "repeat_penalty": exact(p.repetition_penalty),
            "presence_penalty": exact(p.presence_penalty), "frequency_penalty": exact(p.frequency_penalty),
            "logit_bias": p.logit_bias.iter().map(|&(id, x)| json!([id, exact(x)])).collect::<Vec<_>>(),
            "seed": self.sampler.seed(),
            "max_tokens": max_tokens, "min_tokens": self.options.min_tokens, "stop": self.options.stop,
            "keep_stop": self.options.keep_stop, "stop_ids": self.options.stop_ids,
            "ignore_eos": self.options.ignore_eos,
        })
    }
}

/// A number as short as it can be said.
fn exact(x: f32) -> Value {
    json!(x.to_string().parse::<f64>().unwrap_or_default())
}

/// Says in an event how likely its token was and which were likeliest; `null` where nobody knows.
fn add_logprobs(event: &mut Value, model: &Model, of_token: Option<&Logprobs>) {
    let likely = |next: &Logprob| json!({ "id": next.id, "text": token_text(model, next.id), "logprob": exact(next.logprob) });
    event["logprob"] = of_token.map(|of_token| exact(of_token.logprob)).into();
    event["top"] =
        of_token.map(|of_token| of_token.top.iter().map(likely).collect::<Vec<_>>()).into();
}

/// What a token adds to a text, as far as these are characters.
fn token_text(model: &Model, id: u32) -> Option<String> {
    let tokenizer = model.tokenizer()?;
    match tokenizer.token_bytes(id) {
        Ok(bytes) => Some(String::from_utf8_lossy(&bytes).into_owned()),
        Err(_) => tokenizer.id_to_token(id),
    }
}

/// What was shown of an answer so far.
#[derive(Default)]
struct Shown {
    text: String,
    ids: Vec<u32>,
    times: Vec<Instant>,
    failure: Option<Failure>,
}

impl Shown {
    fn take(&mut self, report: &Report, model: &Model, token: loris::Token<'_>) -> ControlFlow<()> {
        if !token.is_rest {
            self.times.push(Instant::now());
            self.ids.push(token.id);
        }
        self.text.push_str(token.text);
        let id = (!token.is_rest).then_some(token.id);
        let printed = match report.is_json() {
            true => {
                let mut event = json!({ "id": id, "text": token.text });
                if token.logprobs.is_some() {
                    add_logprobs(&mut event, model, token.logprobs);
                }
                report.event("token", event)
            }
            false if token.text.is_empty() => Ok(()),
            false => report.print(token.text),
        };
        match printed {
            Ok(()) => ControlFlow::Continue(()),
            Err(failure) => {
                self.failure = Some(failure);
                ControlFlow::Break(())
            }
        }
    }
}

/// Refuses a prompt that leaves no room, before anything runs.
fn check_length(n_tokens: usize, ctx_len: usize) -> Result<(), Failure> {
    if n_tokens <= ctx_len {
        return Ok(());
    }
    let message = format!(
        "the prompt has {n_tokens} tokens and the context holds {ctx_len}; shorten the prompt, raise -c/--ctx if the model allows it, or let it stream through with --window"
    );
    Err(Failure::new(RUN_TIME, message))
}

/// Cuts the session to what it shares with a prompt, so that the rest of the prompt can follow; returns
/// how much that is: nothing, where it cannot go back so far. The last token is computed again if its logits are gone.
/// `history` is what the session has taken in, which a stream holds the ends of only.
fn keep_common(session: &mut Session, history: &[u32], prompt: &[u32]) -> Result<usize, Error> {
    let past = if session.n_gone() == 0 { session.tokens() } else { history };
    let common = past.iter().zip(prompt).take_while(|(a, b)| a == b).count();
    let has_logits = common == session.len() && session.logits().is_some();
    let kept = match common == prompt.len() && !has_logits {
        true => common.saturating_sub(1),
        false => common,
    };
    let kept = if kept < session.least_len() { 0 } else { kept };
    session.truncate(kept)?;
    Ok(kept)
}

/// What is said of [`Finish::DeadEnd`].
pub(crate) const DEAD_END: &str = "the answer came to a dead end: no token of the model goes on as the grammar asks; change the grammar, or use another model";

/// Why an answer ended, as events spell it.
pub(crate) fn finish_name(finish: Finish) -> &'static str {
    match finish {
        Finish::Eos => "eos",
        Finish::Stop => "stop",
        Finish::Length => "length",
        Finish::CtxFull => "ctx_full",
        Finish::Cancelled => "cancelled",
        Finish::DeadEnd => "dead_end",
    }
}

/// Things a second; `None` where nothing was done or no time passed.
pub(crate) fn rate(n: usize, seconds: f64) -> Option<f64> {
    #[allow(clippy::cast_precision_loss)] // counts of tokens
    (n > 0 && seconds > 0.0).then(|| n as f64 / seconds)
}

impl Statistics {
    fn prefill_tok_s(&self) -> Option<f64> {
        rate(self.prompt_tokens - self.reused_tokens.min(self.prompt_tokens), self.prefill_s)
    }

    fn decode_tok_s(&self) -> Option<f64> {
        rate(self.gaps_s.len(), self.gaps_s.iter().sum())
    }

    /// The fields of a `done` event; `null` is what cannot be said.
    pub(crate) fn event(&self) -> Value {
        let ms = |p| quantile(&self.gaps_s, p).map(|s| rounded(s * 1e3));
        let r = &self.receipt;
        json!({
            "finish": finish_name(self.finish),
            "seed": self.seed,
            "load_s": rounded(self.load_s),
            "prompt_tokens": self.prompt_tokens,
            "reused_tokens": self.reused_tokens,
            "prefill_s": rounded(self.prefill_s),
            "prefill_tok_s": self.prefill_tok_s().map(rounded),
            "ttft_ms": rounded(self.ttft_s * 1e3),
            "generated_tokens": self.generated_tokens,
            "decode_tok_s": self.decode_tok_s().map(rounded),
            "decode_p50_ms": ms(0.5),
            "decode_p95_ms": ms(0.95),
            "context_tokens": self.context_tokens,
            "ctx_len": self.ctx_len,
            "kv_bytes": self.kv_bytes,
            "kv_format": self.kv_format.to_string(),
            "peak_bytes": self.peak_bytes,
            "receipt": {
                "kv_bytes": r.kv_bytes, "n_prefilled": r.n_prefilled, "n_shared": r.n_shared,
                "n_decoded": r.n_decoded, "n_replayed": r.n_replayed, "n_drawn": r.n_drawn, "token_layers": r.token_layers,
                "n_waiting": r.n_waiting, "n_revived": r.n_revived, "aux_bytes": r.aux_bytes, "n_evicted": r.n_evicted,
            },
        })
    }

    /// The same for people.
    pub(crate) fn lines(&self) -> String {
        let tok_s = |rate: Option<f64>| rate.map_or(String::new(), |r| format!(", {r:.1} tok/s"));
        let reused = match self.reused_tokens {
            0 => String::new(),
            n => format!(" ({n} of them reused)"),
        };
        let ms = |p| quantile(&self.gaps_s, p).map(|s| s * 1e3);
        let gaps = match (ms(0.5), ms(0.95)) {
            (Some(p50), Some(p95)) => format!(", between tokens p50 {p50:.1} ms, p95 {p95:.1} ms"),
            _ => String::new(),
        };
        let end = match self.finish {
            Finish::Eos => "ended by the model",
            Finish::Stop => "ended by --stop or --stop-id",
            Finish::Length => "ended by -n/--max-tokens",
            Finish::CtxFull => "ended because the context is full",
            Finish::Cancelled => "interrupted",
            Finish::DeadEnd => "ended because the grammar allows no token",
        };
        let seed = self.seed.map_or(String::new(), |seed| format!(", seed {seed}"));
        let peak = self.peak_bytes.map_or(String::new(), |n| format!("peak {}, ", bytes(n)));
        format!(
            "load    {:.2} s\n\
             prompt  {} tokens{reused}{}, first token after {:.0} ms\n\
             answer  {} tokens{}{gaps}, {end}{seed}\n\
             memory  {peak}KV {} in {}, context {} of {} tokens",
            self.load_s,
            self.prompt_tokens,
            tok_s(self.prefill_tok_s()),
            self.ttft_s * 1e3,
            self.generated_tokens,
            tok_s(self.decode_tok_s()),
            bytes(self.kv_bytes as u64),
            self.kv_format,
            self.context_tokens,
            self.ctx_len,
        )
    }
}
