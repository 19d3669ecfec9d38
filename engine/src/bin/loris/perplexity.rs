//! `loris perplexity`: how well a model predicts a text.
//!
//! The text's tokens are cut into windows of `--ctx`, and each window is scored alone: tokens 1 to N-1
//! from their predecessors, token 0 not at all, nothing added in front. Log-softmax is taken in f64.
//! With `--window` each is a stream, which may be longer than the model's context.

use std::time::Instant;

use loris::loader::Special;
use loris::{Model, ModelOptions, SessionOptions, StreamOptions};
use serde_json::json;

use crate::args::PerplexityArgs;
use crate::exit::{Failure, RUN_TIME, USAGE};
use crate::interrupt::Guard;
use crate::open;
use crate::prompt::read_file;
use crate::report::{Report, Unit, peak_bytes, rounded};

/// Rows of logits that a pass gives.
const BATCH: usize = 64;

pub(crate) fn perplexity(args: &PerplexityArgs, report: &Report) -> Result<(), Failure> {
    if args.ctx < 2 {
        let message =
            format!("--ctx {}: expected at least 2, a token and its predecessor", args.ctx);
        return Err(Failure::new(USAGE, message));
    }
    let text = read_file(&args.file)?;
    let options = ModelOptions { batch: BATCH, ..args.model_options() };
    let model = open::open(&args.dir, &args.engine, options, report)?.model;
    let tokens = open::tokenizer(&model, &args.dir)?.encode(&text, Special::Plain)?;
    let n_windows = (tokens.len() / args.ctx).min(args.windows.unwrap_or(usize::MAX));
    if n_windows == 0 {
        let message = format!(
            "{}: has {} tokens, fewer than one window of --ctx {}; lower --ctx or give a longer text",
            args.file.display(),
            tokens.len(),
            args.ctx
        );
        return Err(Failure::new(RUN_TIME, message));
    }

    let started = Instant::now();
    let bar = report.bar("scoring", Unit::Tokens, n_windows * args.ctx);
    let mut nlls = Vec::new();
    for window in tokens.chunks_exact(args.ctx).take(n_windows) {
        nlls.push(score(&model, args.stream.options(), window, &mut || bar.inc(1))?);
    }
    bar.finish_and_clear();
    let seconds = started.elapsed().as_secs_f64();
    #[allow(clippy::cast_precision_loss)] // a count of windows
    let mean = nlls.iter().sum::<f64>() / nlls.len() as f64; // windows are of one length

    let n_left_out = tokens.len() - n_windows * args.ctx;
    if report.is_json() {
        let windows: Vec<_> =
            nlls.iter().map(|nll| json!({ "tokens": args.ctx, "mean_nll": nll })).collect();
        let result = json!({
            "model": args.dir.display().to_string(), "file": args.file.display().to_string(),
            "ctx": args.ctx, "kv_format": model.plan().layout.kv.to_string(),
            "windows": windows, "mean_nll": mean, "perplexity": mean.exp(),
            "tokens": tokens.len(), "left_out_tokens": n_left_out,
            "seconds": rounded(seconds), "peak_bytes": peak_bytes(),
        });
        return report.print(&format!("{result}\n"));
    }
    let mut out = String::new();
    for (idx, nll) in nlls.iter().enumerate() {
        out += &format!("window {:<4} mean nll {nll:.6}  perplexity {:.4}\n", idx + 1, nll.exp());
    }
    out += &format!("all         mean nll {mean:.6}  perplexity {:.4}\n", mean.exp());
    report.print(&out)?;
    report.note(format!(
        "{n_windows} windows of {} tokens in {seconds:.1} s; {n_left_out} tokens left out",
        args.ctx
    ));
    Ok(())
}

/// Mean negative log likelihood of a window's tokens after the first.
fn score(
    model: &Model,
    stream: Option<StreamOptions>,
    window: &[u32],
    progress: &mut dyn FnMut(),
) -> Result<f64, Failure> {
    let mut session = model.session(&SessionOptions {
        ctx_len: stream.is_none().then_some(window.len()),
        stream,
        ..SessionOptions::default()
    })?;
    let _guard = Guard::new(&session);
    let mut total = 0.0;
    session.score(window, &mut |idx, logits| {
        if let Some(&next) = window.get(idx + 1) {
            total += nll(logits, next);
        }
        progress();
    })?;
    #[allow(clippy::cast_precision_loss)] // a count of tokens
    Ok(total / (window.len() - 1) as f64)
}

fn nll(logits: &[f32], token: u32) -> f64 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&l| f64::from(l - max).exp()).sum();
    sum.ln() + f64::from(max) - f64::from(logits[token as usize])
}
