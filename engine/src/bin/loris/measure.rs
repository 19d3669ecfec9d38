//! What `bench` and `compare` measure with.
//!
//! Tokens are pseudo-random, from a fixed seed, and no two prompts are alike, so nothing is shared between
//! rounds. A short run before the first round brings weights and buffers into memory.

use std::time::Instant;

use loris::loader::ModelConfig;
use loris::model::synthetic;
use loris::{Model, ModelOptions, SessionOptions};

use crate::args::BenchArgs;
use crate::exit::{Failure, USAGE};
use crate::interrupt::Guard;
use crate::open;
use crate::report::Report;

pub(crate) fn open_model(
    args: &BenchArgs,
    options: ModelOptions,
    report: &Report,
) -> Result<Model, Failure> {
    let check = |config: &ModelConfig| check_lens(args, config);
    if let Some(dir) = &args.model.dir {
        return Ok(open::open(dir, &args.engine, options, &check, report)?.model);
    }
    let name = args.model.synthetic.as_deref().unwrap_or_default();
    check(&synthetic::config(name)?)?;
    let options = ModelOptions { load: args.engine.load.into(), ..options };
    let engine = open::engine(&args.engine)?;
    report.note(format!("making {name} with random weights"));
    Ok(engine.open_synthetic(name, &options)?)
}

/// Refuses prompts and answers that the model has no room for.
fn check_lens(args: &BenchArgs, config: &ModelConfig) -> Result<(), Failure> {
    for &len in &args.prompt_lens {
        open::check_ctx("--prompt-lens", len, config)?;
    }
    // With --policy what is decoded follows each prompt.
    let longest = args.prompt_lens.iter().max();
    let (before, option) = match (args.policies.is_empty(), longest) {
        (false, Some(&longest)) => (longest, "--prompt-lens"),
        _ => (args.decode_ctx, "--decode-ctx"),
    };
    open::check_ctx(option, before, config)?;
    let n_tokens = before.saturating_add(args.decode);
    if open::has_room(config, n_tokens) {
        return Ok(());
    }
    let message = format!(
        "--decode {}: expected at most {}, the model's context without {option}",
        args.decode,
        config.ctx_len.saturating_sub(before)
    );
    Err(Failure::new(USAGE, message))
}

/// Brings weights and buffers into memory.
pub(crate) fn warm_up(args: &BenchArgs, model: &Model, ids: &mut Ids) -> Result<(), Failure> {
    let len = args.prompt_lens.iter().copied().max().unwrap_or(1).min(model.plan().chunk);
    prefill(model, &ids.take(len))?;
    decode(model, ids, 1, 2).map(drop)
}

/// Seconds from a prompt to the logits of its last token.
pub(crate) fn prefill(model: &Model, tokens: &[u32]) -> Result<f64, Failure> {
    let mut session = model
        .session(&SessionOptions { ctx_len: Some(tokens.len()), ..SessionOptions::default() })?;
    let _guard = Guard::new(&session);
    let started = Instant::now();
    session.prefill(tokens)?;
    Ok(started.elapsed().as_secs_f64())
}

/// Seconds of each of `n` tokens after a prompt.
pub(crate) fn decode(
    model: &Model,
    ids: &mut Ids,
    ctx: usize,
    n: usize,
) -> Result<Vec<f64>, Failure> {
    let mut session =
        model.session(&SessionOptions { ctx_len: Some(ctx + n), ..SessionOptions::default() })?;
    let _guard = Guard::new(&session);
    session.prefill(&ids.take(ctx))?;
    let mut steps = Vec::with_capacity(n);
    for id in ids.take(n) {
        let started = Instant::now();
        session.decode(id)?;
        steps.push(started.elapsed().as_secs_f64());
    }
    Ok(steps)
}

/// Token ids from a linear congruential generator (Knuth's constants).
pub(crate) struct Ids {
    state: u64,
    vocab_size: usize,
}

impl Ids {
    pub(crate) fn new(model: &Model) -> Self {
        Self { state: 1, vocab_size: model.config().vocab_size }
    }

    pub(crate) fn take(&mut self, n: usize) -> Vec<u32> {
        let mut next = || {
            self.state = self
                .state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            ((self.state >> 33) % self.vocab_size as u64) as u32
        };
        (0..n).map(|_| next()).collect()
    }
}

pub(crate) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let upper = sorted.get(sorted.len() / 2).copied().unwrap_or(0.0);
    match sorted.len() % 2 {
        0 if !sorted.is_empty() => (sorted[sorted.len() / 2 - 1] + upper) / 2.0,
        _ => upper,
    }
}

pub(crate) fn model_name(args: &BenchArgs) -> String {
    match &args.model.dir {
        Some(dir) => dir.display().to_string(),
        None => args.model.synthetic.clone().unwrap_or_default(),
    }
}

pub(crate) fn load_average() -> Option<Vec<f64>> {
    let text = std::fs::read_to_string("/proc/loadavg").ok()?;
    text.split_whitespace().take(3).map(|field| field.parse().ok()).collect()
}
