//! `loris bench`: prompt and decode speed.
//!
//! As in llama-bench, decoding is fed random tokens: it measures the model, not the sampler. `compare` is the part that
//! sets policies beside dense.

use serde_json::{Value, json};

use crate::answer::rate;
use crate::args::BenchArgs;
use crate::compare::compare;
use crate::exit::Failure;
use crate::measure::{Ids, decode, load_average, median, model_name, open_model, prefill, warm_up};
use crate::open;
use crate::report::{Report, bytes, peak_bytes, quantile, rounded};

/// What was measured.
struct Results {
    /// Prompt length and the seconds of each round.
    prefill: Vec<(usize, Vec<f64>)>,
    /// Seconds of decoding of each round.
    decode: Vec<f64>,
    /// Seconds of each token of all rounds, sorted.
    steps: Vec<f64>,
}

pub(crate) fn bench(args: &BenchArgs, report: &Report) -> Result<(), Failure> {
    if !args.policies.is_empty() {
        return compare(args, report);
    }
    let decoded = args.decode_ctx.saturating_add(args.decode).max(8);
    let longest = args.prompt_lens.iter().copied().chain([decoded]).max().unwrap_or(decoded);
    let model = open_model(args, args.size.model_options(Some(longest)), report)?;
    let mut ids = Ids::new(&model);
    warm_up(args, &model, &mut ids)?;

    let mut results = Results {
        prefill: args.prompt_lens.iter().map(|&len| (len, Vec::new())).collect(),
        decode: Vec::new(),
        steps: Vec::new(),
    };
    for _ in 0..args.rounds {
        for (len, seconds) in &mut results.prefill {
            seconds.push(prefill(&model, &ids.take(*len))?);
        }
        if args.decode > 0 {
            let steps = decode(&model, &mut ids, args.decode_ctx, args.decode)?;
            results.decode.push(steps.iter().sum());
            results.steps.extend(steps);
        }
    }
    results.steps.sort_by(f64::total_cmp);
    match report.is_json() {
        true => report.print(&format!("{}\n", json(args, &results))),
        false => report.print(&table(args, &results)),
    }
}

fn json(args: &BenchArgs, results: &Results) -> Value {
    let prefill: Vec<_> = results
        .prefill
        .iter()
        .map(|(len, seconds)| {
            let s = median(seconds);
            json!({ "tokens": len, "tok_s": rate(*len, s).map(rounded), "ttft_ms": rounded(s * 1e3) })
        })
        .collect();
    let ms = |p| quantile(&results.steps, p).map(|s| rounded(s * 1e3));
    json!({
        "model": model_name(args),
        "threads": open::n_threads(&args.engine),
        "rounds": args.rounds,
        "kv_format": args.size.kv.to_string(),
        "prefill": prefill,
        "decode": {
            "tokens": args.decode, "ctx": args.decode_ctx,
            "tok_s": rate(args.decode, median(&results.decode)).map(rounded),
            "p50_ms": ms(0.5), "p95_ms": ms(0.95),
        },
        "peak_bytes": peak_bytes(),
        "loadavg": load_average(),
    })
}

fn table(args: &BenchArgs, results: &Results) -> String {
    let mut lines = vec![
        format!(
            "{}, {} threads, median of {}",
            model_name(args),
            open::n_threads(&args.engine),
            args.rounds
        ),
        format!("{:<16} {:>10} {:>12}", "", "tok/s", "ms"),
    ];
    let tok_s = |n, s| rate(n, s).unwrap_or(0.0);
    for (len, seconds) in &results.prefill {
        let s = median(seconds);
        lines.push(format!(
            "{:<16} {:>10.1} {:>12.1}",
            format!("prompt {len}"),
            tok_s(*len, s),
            s * 1e3
        ));
    }
    if let (Some(p50), Some(p95)) = (quantile(&results.steps, 0.5), quantile(&results.steps, 0.95))
    {
        let s = median(&results.decode);
        let name = format!("decode {}", args.decode);
        lines.push(format!(
            "{name:<16} {:>10.1} {:>12.1} (a token: p50 {:.2}, p95 {:.2})",
            tok_s(args.decode, s),
            s * 1e3,
            p50 * 1e3,
            p95 * 1e3
        ));
    }
    lines.extend(peak_bytes().map(|n| format!("peak memory {}", bytes(n))));
    lines.join("\n") + "\n"
}
