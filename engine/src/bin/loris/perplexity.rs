//! `loris perplexity`: how well a model predicts a text.
//!
//! The text's tokens are cut into windows of `--ctx`, and each window is scored alone: tokens 1 to N-1
//! from their predecessors, token 0 not at all, nothing added in front. Log-softmax is taken in f64.
//! With `--stride` windows overlap, and only what is new in each counts. With `--window` each is a stream, which may
//! be longer than the model's context.

use std::time::Instant;

use loris::loader::Special;
use loris::{Model, ModelOptions, SessionOptions, StreamOptions};
use serde_json::{Value, json};

use crate::args::PerplexityArgs;
use crate::exit::{Failure, RUN_TIME, USAGE};
use crate::interrupt::Guard;
use crate::open;
use crate::prompt::read_file;
use crate::report::{Report, Unit, peak_bytes, resident_bytes, rounded};

/// Rows of logits that a pass gives.
const BATCH: usize = 64;

/// Negative log likelihoods of a window's tokens.
struct Scored {
    total: f64,
    n: usize,
    spans: Vec<Value>,
}

pub(crate) fn perplexity(args: &PerplexityArgs, report: &Report) -> Result<(), Failure> {
    let ctx = args.ctx;
    let stride = args.stride.unwrap_or(ctx);
    if stride > ctx {
        return Err(Failure::new(USAGE, format!("--stride {stride}: expected 1 to --ctx, {ctx}")));
    }
    let text = read_file(&args.file)?;
    let options = ModelOptions { batch: BATCH, ..args.model_options() };
    let check = |config: &_| match args.stream.options() {
        Some(stream) => open::check_stream(stream, config),
        None => open::check_ctx("-c/--ctx", ctx, config),
    };
    let model = open::open(&args.dir, &args.engine, options, &check, report)?.model;
    let tokens = open::tokenizer(&model, &args.dir)?.encode(&text, Special::Plain)?;
    let tokens = tokens.get(args.skip..).unwrap_or_default();
    let n_there = (tokens.len() + stride).saturating_sub(ctx) / stride;
    let n_windows = n_there.min(args.windows.unwrap_or(usize::MAX));
    if n_windows == 0 {
        let message = format!(
            "{}: has {} tokens, fewer than one window of --ctx {ctx}; lower --ctx or give a longer text",
            args.file.display(),
            tokens.len(),
        );
        return Err(Failure::new(RUN_TIME, message));
    }

    let started = Instant::now();
    let bar = report.bar("scoring", Unit::Tokens, n_windows * ctx);
    let mut scored = Vec::new();
    let first = if stride < ctx { ctx - stride } else { 1 };
    for window in tokens.windows(ctx).step_by(stride).take(n_windows) {
        let spans = args.spans.unwrap_or(ctx);
        scored
            .push(score(&model, args.stream.options(), window, first, spans, &mut || bar.inc(1))?);
    }
    bar.finish_and_clear();
    let seconds = started.elapsed().as_secs_f64();
    #[allow(clippy::cast_precision_loss)] // a count of windows, which are of one length
    let mean = scored.iter().map(Scored::mean).sum::<f64>() / scored.len() as f64;

    let n_left_out = tokens.len() - (n_windows - 1) * stride - ctx;
    if report.is_json() {
        let window = |scored: &Scored| {
            let mut window = json!({ "tokens": ctx, "mean_nll": scored.mean() });
            if args.spans.is_some() {
                window["spans"] = scored.spans.clone().into();
            }
            window
        };
        let windows: Vec<_> = scored.iter().map(window).collect();
        let result = json!({
            "model": args.dir.display().to_string(), "file": args.file.display().to_string(),
            "ctx": ctx, "stride": stride, "skip": args.skip,
            "kv_format": model.plan().kv.to_string(),
            "windows": windows, "mean_nll": mean, "perplexity": mean.exp(),
            "tokens": tokens.len(), "left_out_tokens": n_left_out,
            "seconds": rounded(seconds), "peak_bytes": peak_bytes(),
        });
        return report.print(&format!("{result}\n"));
    }
    let mut out = String::new();
    for (idx, nll) in scored.iter().map(Scored::mean).enumerate() {
        out += &format!("window {:<4} mean nll {nll:.6}  perplexity {:.4}\n", idx + 1, nll.exp());
    }
    out += &format!("all         mean nll {mean:.6}  perplexity {:.4}\n", mean.exp());
    report.print(&out)?;
    report.note(format!(
        "{n_windows} windows of {ctx} tokens in {seconds:.1} s; {n_left_out} tokens left out"
    ));
    Ok(())
}

impl Scored {
    fn mean(&self) -> f64 {
        #[allow(clippy::cast_precision_loss)] // a count of tokens
        let mean = self.total / self.n as f64;
        mean
    }
}

/// Scores a window's tokens from index `first` on, and every `span` of them apart.
fn score(
    model: &Model,
    stream: Option<StreamOptions>,
    window: &[u32],
    first: usize,
    span: usize,
    progress: &mut dyn FnMut(),
) -> Result<Scored, Failure> {
    let mut session = model.session(&SessionOptions {
        ctx_len: stream.is_none().then_some(window.len()),
        stream,
        ..SessionOptions::default()
    })?;
    let _guard = Guard::new(&session);
    let mut all = Scored { total: 0.0, n: 0, spans: Vec::new() };
    let (mut in_span, mut since) = (Scored { total: 0.0, n: 0, spans: Vec::new() }, Instant::now());
    // What is not scored needs no logits.
    let n_before = first - 1;
    if n_before > 0 {
        session.prefill(&window[..n_before])?;
        (0..n_before).for_each(|_| progress());
    }
    session.logits_of(&window[n_before..], &mut |idx, logits| {
        let idx = n_before + idx;
        if let Some(&next) = window.get(idx + 1) {
            let nll = nll(logits, next);
            all.total += nll;
            all.n += 1;
            in_span.total += nll;
            in_span.n += 1;
        }
        let to = idx + 1;
        if (to.is_multiple_of(span) || to == window.len()) && in_span.n > 0 {
            all.spans.push(json!({
                "to": to, "mean_nll": in_span.mean(), "seconds": rounded(since.elapsed().as_secs_f64()),
                "resident_bytes": resident_bytes(),
            }));
            (in_span.total, in_span.n, since) = (0.0, 0, Instant::now());
        }
        progress();
    })?;
    Ok(all)
}

fn nll(logits: &[f32], token: u32) -> f64 {
    let max = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let sum: f64 = logits.iter().map(|&l| (f64::from(l) - max).exp()).sum();
    sum.ln() + max - f64::from(logits[token as usize])
}
