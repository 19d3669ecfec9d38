//! One sample on one variant: a fresh session, its turns, and what they cost.

use std::ops::ControlFlow;
use std::time::Instant;

use loris::{
    Finish, GenerateOptions, Model, Receipt, SamplerParams, Session, SessionOptions, generate,
};
use serde_json::{Value, json};

use super::fit::Fitted;
use super::grade::grade;
use super::prompt::Prompter;
use super::tasks::{Seed, Task};
use crate::exit::Failure;
use crate::interrupt::Guard;
use crate::report::rounded;
use crate::variant::Variant;

/// What came of one question.
#[derive(Clone, Debug)]
pub(crate) struct Outcome {
    pub(crate) variant: usize,
    pub(crate) task: Task,
    /// Counted from 0.
    pub(crate) turn: usize,
    pub(crate) seed: Seed,
    /// Tokens that the turn added: the first has the whole context.
    pub(crate) prompt_tokens: usize,
    pub(crate) expected: Vec<String>,
    pub(crate) answer: String,
    pub(crate) grade: f64,
    /// From the turn's first prompt token to its first answer token.
    pub(crate) ttft_s: f64,
    /// Of a token after the first; `None` where there was no second.
    pub(crate) decode_s: Option<f64>,
    pub(crate) answer_tokens: usize,
    /// Of the (token, layer) pairs of all prompts so far, those that were computed.
    pub(crate) share_prompt: f64,
    /// At the end of the turn, as everything below.
    pub(crate) share_all: f64,
    pub(crate) receipt: Receipt,
}

/// Where a sample runs.
#[derive(Debug)]
pub(crate) struct Place<'a> {
    pub(crate) variant: usize,
    pub(crate) model: &'a Model,
    pub(crate) session: &'a SessionOptions,
    pub(crate) guard: &'a Guard,
    pub(crate) prompter: &'a Prompter<'a>,
    pub(crate) max_tokens: usize,
}

/// Runs every turn of a sample. The session is new, so no page of an earlier sample is left to share.
pub(crate) fn run(
    place: &Place<'_>,
    task: Task,
    seed: Seed,
    fitted: &Fitted,
) -> Result<Vec<Outcome>, Failure> {
    let mut session = place.model.session(place.session)?;
    place.guard.turn_to(&session);
    let mut outcomes = Vec::new();
    for (idx, turn) in fitted.sample.turns.iter().enumerate() {
        let prompt = match idx {
            0 => fitted.prompt.clone(),
            _ => place.prompter.next(turn)?,
        };
        let answer = answer(place, &mut session, &prompt)?;
        outcomes.push(Outcome {
            variant: place.variant,
            task,
            turn: idx,
            seed,
            prompt_tokens: prompt.len(),
            expected: turn.expected.clone(),
            grade: grade(&answer.text, &turn.expected),
            answer: answer.text,
            ttft_s: answer.ttft_s,
            decode_s: answer.decode_s,
            answer_tokens: answer.n_tokens,
            share_prompt: answer.share_prompt,
            share_all: share(&session),
            receipt: session.receipt(),
        });
    }
    Ok(outcomes)
}

struct Answer {
    text: String,
    ttft_s: f64,
    decode_s: Option<f64>,
    n_tokens: usize,
    share_prompt: f64,
}

/// One greedy answer.
fn answer(place: &Place<'_>, session: &mut Session, prompt: &[u32]) -> Result<Answer, Failure> {
    let mut sampler = place.model.sampler(SamplerParams::default())?;
    let options = GenerateOptions { max_tokens: place.max_tokens, ..GenerateOptions::default() };
    let started = Instant::now();
    session.prefill(prompt)?;
    let prefill_s = started.elapsed().as_secs_f64();
    let share_prompt = share(session);
    let (mut text, mut times) = (String::new(), Vec::new());
    let finish = generate(session, &mut sampler, &options, &mut |token| {
        text.push_str(token.text);
        if !token.is_rest {
            times.push(started.elapsed().as_secs_f64());
        }
        ControlFlow::Continue(())
    })?;
    if finish == Finish::Cancelled {
        return Err(Failure::interrupted());
    }
    let ttft_s = times.first().copied().unwrap_or(prefill_s);
    #[allow(clippy::cast_precision_loss)] // a count of tokens
    let decode_s =
        (times.len() > 1).then(|| (times[times.len() - 1] - ttft_s) / (times.len() - 1) as f64);
    Ok(Answer { text, ttft_s, decode_s, n_tokens: times.len(), share_prompt })
}

/// Of the (token, layer) pairs that dense would have computed, those that were.
fn share(session: &Session) -> f64 {
    let all = session.len() * session.model().plan().n_layers;
    #[allow(clippy::cast_precision_loss)] // counts
    match all {
        0 => 0.0,
        all => session.receipt().token_layers as f64 / all as f64,
    }
}

impl Outcome {
    /// One line of `--samples`, and the `sample` event.
    pub(crate) fn json(&self, policy: &str) -> Value {
        let Receipt { kv_bytes, aux_bytes, n_prefilled, n_shared, n_decoded, .. } = self.receipt;
        let Receipt { token_layers, n_waiting, n_revived, mass_kept, .. } = self.receipt;
        json!({
            "policy": policy, "task": self.task.name(), "turn": self.turn + 1,
            "length": self.seed.len, "sample": self.seed.idx, "seed": self.seed.seed,
            "prompt_tokens": self.prompt_tokens, "expected": self.expected,
            "answer": self.answer, "score": rounded(self.grade),
            "ttft_ms": rounded(self.ttft_s * 1e3),
            "decode_ms": self.decode_s.map(|s| rounded(s * 1e3)),
            "answer_tokens": self.answer_tokens,
            "share_prompt": rounded(self.share_prompt), "share_all": rounded(self.share_all),
            "receipt": {
                "kv_bytes": kv_bytes, "n_prefilled": n_prefilled, "n_shared": n_shared,
                "n_decoded": n_decoded, "token_layers": token_layers,
                "aux_bytes": aux_bytes, "n_waiting": n_waiting, "n_revived": n_revived,
                "mass_kept": rounded(mass_kept),
            },
        })
    }

    /// What [`json`](Self::json) wrote, as far as rows need it; `None` if it is of another policy or task, or no such
    /// line.
    pub(crate) fn from_json(line: &Value, variants: &[Variant]) -> Option<Self> {
        let policy = line["policy"].as_str()?;
        let whole = |value: &Value| usize::try_from(value.as_u64()?).ok();
        let receipt = &line["receipt"];
        let expected = line["expected"].as_array()?.iter();
        Some(Self {
            variant: variants.iter().position(|variant| variant.name == policy)?,
            task: Task::parse(line["task"].as_str()?).ok()?,
            turn: whole(&line["turn"])?.checked_sub(1)?,
            seed: Seed {
                seed: line["seed"].as_u64()?,
                len: whole(&line["length"])?,
                idx: whole(&line["sample"])?,
            },
            prompt_tokens: whole(&line["prompt_tokens"])?,
            expected: expected.map(|e| Some(e.as_str()?.to_owned())).collect::<Option<_>>()?,
            answer: line["answer"].as_str()?.to_owned(),
            grade: line["score"].as_f64()?,
            ttft_s: line["ttft_ms"].as_f64()? / 1e3,
            decode_s: line["decode_ms"].as_f64().map(|ms| ms / 1e3),
            answer_tokens: whole(&line["answer_tokens"])?,
            share_prompt: line["share_prompt"].as_f64()?,
            share_all: line["share_all"].as_f64()?,
            receipt: Receipt {
                kv_bytes: whole(&receipt["kv_bytes"])?,
                aux_bytes: whole(&receipt["aux_bytes"])?,
                n_revived: whole(&receipt["n_revived"])?,
                mass_kept: receipt["mass_kept"].as_f64()?,
                ..Receipt::default()
            },
        })
    }
}
