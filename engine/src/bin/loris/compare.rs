//! `loris bench --policy`: what a policy saves, beside dense.
//!
//! Every round runs each policy on the same tokens, one right after the other and in changing order, so that a
//! machine whose speed drifts favours none; ratios are medians over rounds of the pairs. Tokens are
//! pseudo-random, which says nothing of quality: `loris eval` does. `ceiling` is how much less arithmetic a
//! prompt takes under a policy, which its time to the first token cannot beat on a machine that is bound by it.
//! `time_ratio_max` is the worst ratio of the whole time over answers of 1, 2, 4, ... tokens.

use std::fmt::Write as _;
use std::time::Instant;

use loris::compute::Lazy;
use loris::{Model, Receipt, SessionOptions};
use serde_json::{Value, json};

use crate::args::BenchArgs;
use crate::exit::{Failure, USAGE};
use crate::files;
use crate::interrupt::Guard;
use crate::measure::{Ids, load_average, median, model_name, open_model, warm_up};
use crate::open;
use crate::report::{Report, quantile, rounded};
use crate::variant::{DENSE, Variant, same_models, variants};

/// One policy on one prompt in one round.
struct Timed {
    ttft: f64,
    /// Seconds of each token after the first.
    steps: Vec<f64>,
    /// After the prompt.
    receipt: Receipt,
    n_revived: usize,
}

/// All rounds of one policy and prompt length; the first policy is dense.
struct Line {
    prompt: usize,
    policy: String,
    /// Multiplications and additions of the prompt.
    flops: f64,
    rounds: Vec<Timed>,
}

pub(crate) fn compare(args: &BenchArgs, report: &Report) -> Result<(), Failure> {
    if args.decode == 0 {
        return Err(Failure::new(USAGE, "--decode 0: expected 1 or more with --policy"));
    }
    if let Some(path) = &args.csv {
        files::create(path)?; // and dropped: it can be written to
    }
    // What is decoded follows the prompt here.
    let longest = args.prompt_lens.iter().max().map_or(0, |len| len.saturating_add(args.decode));
    let base = args.size.model_options(Some(longest));
    let mut variants = variants(&args.policies, &base, &SessionOptions::default())?;
    let models = open_models(args, &mut variants, longest, report)?;
    let mut ids = Ids::new(&models[0]);
    for model in &models {
        warm_up(args, model, &mut ids)?;
    }
    let mut lines: Vec<Line> = Vec::new();
    for &prompt in &args.prompt_lens {
        let first = lines.len();
        lines.extend(variants.iter().map(|variant| Line {
            prompt,
            policy: variant.name.clone(),
            flops: flops(&models[0], variant.session.lazy.as_ref(), prompt),
            rounds: vec![],
        }));
        for round in 0..args.rounds {
            let tokens = ids.take(prompt + args.decode);
            for turn in 0..variants.len() {
                let idx = (round + turn) % variants.len();
                let timed = time(&models[idx], &variants[idx].session, &tokens, prompt)?;
                lines[first + idx].rounds.push(timed);
            }
        }
        report.note(format!("prompt {prompt}: done"));
    }
    let rows: Vec<Value> = lines
        .iter()
        .map(|line| {
            let is_dense = |l: &&Line| l.prompt == line.prompt && l.policy == DENSE;
            row(args, &models[0], line, lines.iter().find(is_dense).unwrap_or(line))
        })
        .collect();
    if let Some(path) = &args.csv {
        files::write(files::create(path)?, &csv(&rows))?;
    }
    match report.is_json() {
        true => report.print(&format!("{}\n", Value::Array(rows))),
        false => report.print(&table(&rows)),
    }
}

/// A model for each variant; those whose options are the same share one.
fn open_models(
    args: &BenchArgs,
    variants: &mut [Variant],
    longest: usize,
    report: &Report,
) -> Result<Vec<Model>, Failure> {
    let prunes = variants.iter().any(|variant| variant.lazy.is_some());
    for variant in &mut *variants {
        variant.model.aux_tokens = if prunes { longest } else { 0 };
    }
    let mut models: Vec<Model> = Vec::new();
    for (idx, same) in same_models(variants).into_iter().enumerate() {
        let model = match same < idx {
            true => models[same].clone(),
            false => open_model(args, variants[idx].model.clone(), report)?,
        };
        variants[idx].fit(model.plan().n_layers)?;
        models.push(model);
    }
    Ok(models)
}

/// What a prompt of `n` tokens takes: products with the weights of each layer, and attention over half of the
/// square, for the tokens that get there; the vocabulary once.
fn flops(model: &Model, lazy: Option<&Lazy>, n: usize) -> f64 {
    let config = model.config();
    let (hidden, d) = (config.hidden_dim, config.head_dim);
    let (q_dim, kv_dim) = (config.n_q_heads * d, config.n_kv_heads * d);
    let weights = hidden * (2 * q_dim + 2 * kv_dim + 3 * config.ffn_dim);
    let (mut rows, mut sum) = (n as f64, 2.0 * (hidden * config.vocab_size) as f64);
    for layer in 0..config.n_layers {
        let point = lazy.and_then(|lazy| lazy.points.iter().find(|point| point.layer == layer));
        if let (Some(point), true) = (point, lazy.is_some_and(|lazy| lazy.prunes(n))) {
            rows = (rows * point.keep_rate).ceil();
        }
        sum += rows * 2.0 * weights as f64 + 2.0 * rows * rows * q_dim as f64;
    }
    sum
}

fn time(
    model: &Model,
    options: &SessionOptions,
    tokens: &[u32],
    prompt: usize,
) -> Result<Timed, Failure> {
    let options = SessionOptions { ctx_len: Some(tokens.len()), ..options.clone() };
    let mut session = model.session(&options)?;
    let _guard = Guard::new(&session);
    let mut started = Instant::now();
    session.prefill(&tokens[..prompt])?;
    let ttft = started.elapsed().as_secs_f64();
    let receipt = session.receipt();
    let mut steps = Vec::new();
    for &token in &tokens[prompt..] {
        started = Instant::now();
        session.decode(token)?;
        steps.push(started.elapsed().as_secs_f64());
    }
    Ok(Timed { ttft, steps, receipt, n_revived: session.receipt().n_revived })
}

/// Columns of `--csv`, and fields of `--json`.
const COLUMNS: [&str; 22] = [
    "model",
    "threads",
    "load",
    "prompt",
    "policy",
    "rounds",
    "share",
    "ttft_ms",
    "ttft_ratio",
    "ceiling",
    "answer",
    "p50_ms",
    "p99_ms",
    "p50_ratio",
    "p99_ratio",
    "time_ratio_1",
    "time_ratio_answer",
    "time_ratio_max",
    "kv_bytes",
    "aux_bytes",
    "bytes_ratio",
    "n_revived",
];

/// `_ratio` of a time to the first token is dense over policy, more is better; the others are policy over dense.
fn row(args: &BenchArgs, model: &Model, line: &Line, dense: &Line) -> Value {
    let of = |l: &Line, value: &dyn Fn(&Timed) -> f64| -> Vec<f64> {
        l.rounds.iter().map(value).collect()
    };
    let ratio = |value: &dyn Fn(&Timed) -> f64| -> f64 {
        let pairs = of(line, value).into_iter().zip(of(dense, value));
        median(&pairs.map(|(policy, dense)| policy / dense).collect::<Vec<_>>())
    };
    let step = |p: f64| {
        move |timed: &Timed| {
            let mut sorted = timed.steps.clone();
            sorted.sort_by(f64::total_cmp);
            quantile(&sorted, p).unwrap_or(f64::NAN)
        }
    };
    // The prompt and the first `n` tokens of the answer; the first comes with the prompt.
    let whole =
        |n: usize| move |timed: &Timed| timed.ttft + timed.steps[..n - 1].iter().sum::<f64>();
    let answers = (0..).map(|doubling| 1 << doubling).take_while(|&n| n < args.decode);
    let worst = answers.chain([args.decode]).map(|n| ratio(&whole(n))).fold(0.0, f64::max);
    let receipt = line.rounds.last().map_or_else(Receipt::default, |timed| timed.receipt);
    let bytes = |timed: &Timed| (timed.receipt.kv_bytes + timed.receipt.aux_bytes) as f64;
    let n_pairs = (line.prompt * model.plan().n_layers) as f64;
    let number = |x: f64| if x.is_finite() { json!((x * 1e4).round() / 1e4) } else { Value::Null };
    json!({
        "model": model_name(args), "threads": open::n_threads(&args.engine),
        "load": load_average().and_then(|load| load.first().copied()),
        "prompt": line.prompt, "policy": line.policy, "rounds": line.rounds.len(),
        "share": number(receipt.token_layers as f64 / n_pairs),
        "ttft_ms": rounded(median(&of(line, &|timed| timed.ttft)) * 1e3),
        "ttft_ratio": number(1.0 / ratio(&|timed| timed.ttft)),
        "ceiling": number(dense.flops / line.flops),
        "answer": args.decode,
        "p50_ms": number(median(&of(line, &step(0.5))) * 1e3),
        "p99_ms": number(median(&of(line, &step(0.99))) * 1e3),
        "p50_ratio": number(ratio(&step(0.5))), "p99_ratio": number(ratio(&step(0.99))),
        "time_ratio_1": number(ratio(&|timed| timed.ttft)),
        "time_ratio_answer": number(ratio(&whole(args.decode))), "time_ratio_max": number(worst),
        "kv_bytes": receipt.kv_bytes, "aux_bytes": receipt.aux_bytes,
        "bytes_ratio": number(ratio(&bytes)),
        "n_revived": line.rounds.last().map_or(0, |timed| timed.n_revived),
    })
}

fn csv(rows: &[Value]) -> String {
    let mut out = COLUMNS.join(",") + "\n";
    for row in rows {
        let cells = COLUMNS.map(|column| match &row[column] {
            Value::Null => String::new(),
            Value::String(text) if text.contains(',') => format!("\"{text}\""),
            Value::String(text) => text.clone(),
            other => other.to_string(),
        });
        out += &(cells.join(",") + "\n");
    }
    out
}

fn table(rows: &[Value]) -> String {
    let mut out = format!(
        "{:>7}  {:<34} {:>6} {:>10} {:>6} {:>7}  {:>16} {:>6}  {:>6} {:>6}\n",
        "prompt",
        "policy",
        "share",
        "first ms",
        "faster",
        "ceiling",
        "a token p50, p99",
        "p99 x",
        "time x",
        "bytes x"
    );
    for row in rows {
        let n = |column: &str| row[column].as_f64().unwrap_or(f64::NAN);
        let _ = writeln!(
            out,
            "{:>7}  {:<34} {:>6.3} {:>10.1} {:>5.2}x {:>6.2}x  {:>8.2}{:>8.2} {:>6.3}  {:>6.3} {:>6.3}",
            n("prompt"),
            row["policy"].as_str().unwrap_or_default(),
            n("share"),
            n("ttft_ms"),
            n("ttft_ratio"),
            n("ceiling"),
            n("p50_ms"),
            n("p99_ms"),
            n("p99_ratio"),
            n("time_ratio_answer"),
            n("bytes_ratio"),
        ); // a String takes everything
    }
    out
}
