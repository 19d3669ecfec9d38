//! From outcomes to rows: one for each policy, task, turn and length; as text, CSV and JSON.

use std::fmt::Write;

use serde_json::{Value, json};

use super::prose::Measures;
use super::run::Outcome;
use super::stats::{Estimate, grades, paired, student};
use super::tasks::Task;
use crate::variant::Variant;

/// What a run gave, complete or not.
#[derive(Debug, Default)]
pub(crate) struct Results {
    pub(crate) outcomes: Vec<Outcome>,
    /// A length, and the measures of every variant in one window of it.
    pub(crate) windows: Vec<(usize, Vec<Measures>)>,
}

/// One line of the table.
#[derive(Debug)]
pub(crate) struct Row {
    pub(crate) variant: usize,
    pub(crate) task: String,
    /// Counted from 1.
    pub(crate) turn: usize,
    pub(crate) len: usize,
    pub(crate) grade: Estimate,
    /// What the variant has more than dense, in pairs of the same sample; `None` for dense itself and for
    /// what is relative to dense already.
    pub(crate) diff: Option<Estimate>,
    /// Absent for prose.
    pub(crate) costs: Option<Costs>,
}

/// Means over samples.
#[derive(Debug)]
pub(crate) struct Costs {
    pub(crate) prompt_tokens: f64,
    pub(crate) share_prompt: f64,
    pub(crate) share_all: f64,
    pub(crate) ttft_ms: Estimate,
    /// Mean time of dense over that of the variant.
    pub(crate) ttft_ratio: f64,
    pub(crate) decode_ms: Option<f64>,
    pub(crate) kv_bytes: f64,
    pub(crate) aux_bytes: f64,
    pub(crate) mass_kept: f64,
    pub(crate) n_revived: f64,
}

/// Rows in the order of tasks, turns, lengths, variants.
pub(crate) fn rows(
    results: &Results,
    tasks: &[Task],
    lens: &[usize],
    n_variants: usize,
) -> Vec<Row> {
    let mut rows = Vec::new();
    for &task in tasks {
        for turn in 0..task.n_turns() {
            for &len in lens {
                match task {
                    Task::Prose => rows.extend(prose_rows(&results.windows, len, n_variants)),
                    _ => rows.extend(
                        (0..n_variants)
                            .filter_map(|v| sample_row(&results.outcomes, task, turn, len, v)),
                    ),
                }
            }
        }
    }
    rows
}

fn sample_row(
    outcomes: &[Outcome],
    task: Task,
    turn: usize,
    len: usize,
    variant: usize,
) -> Option<Row> {
    let of = |v: usize| {
        move |o: &&Outcome| (o.variant, o.task, o.turn, o.seed.len) == (v, task, turn, len)
    };
    let all: Vec<&Outcome> = outcomes.iter().filter(of(variant)).collect();
    // A run that was interrupted may lack the last sample's partner.
    let pairs: Vec<(&Outcome, &Outcome)> = outcomes
        .iter()
        .filter(of(0))
        .filter_map(|dense| Some((*all.iter().find(|o| o.seed.idx == dense.seed.idx)?, dense)))
        .collect();
    let (values, baseline): (Vec<f64>, Vec<f64>) =
        pairs.iter().map(|(o, dense)| (o.grade, dense.grade)).unzip();
    let each = |value: fn(&Outcome) -> f64| all.iter().map(|o| value(o)).collect::<Vec<f64>>();
    let mean = |value| student(&each(value)).map(|e| e.mean);
    let decode: Vec<f64> = all.iter().filter_map(|o| o.decode_s).collect();
    let ttft = |side: fn(&(&Outcome, &Outcome)) -> f64| pairs.iter().map(side).sum::<f64>();
    #[allow(clippy::cast_precision_loss)] // counts and bytes, for a mean
    let costs = Costs {
        prompt_tokens: mean(|o| o.prompt_tokens as f64)?,
        share_prompt: mean(|o| o.share_prompt)?,
        share_all: mean(|o| o.share_all)?,
        ttft_ms: student(&each(|o| o.ttft_s * 1e3))?,
        ttft_ratio: ttft(|(_, dense)| dense.ttft_s) / ttft(|(o, _)| o.ttft_s),
        decode_ms: student(&decode).map(|e| e.mean * 1e3),
        kv_bytes: mean(|o| o.receipt.kv_bytes as f64)?,
        aux_bytes: mean(|o| o.receipt.aux_bytes as f64)?,
        mass_kept: mean(|o| o.receipt.mass_kept)?,
        n_revived: mean(|o| o.receipt.n_revived as f64)?,
    };
    Some(Row {
        variant,
        task: task.name().into(),
        turn: turn + 1,
        len,
        grade: grades(&each(|o| o.grade))?,
        diff: (variant > 0).then(|| paired(&values, &baseline)).flatten(),
        costs: Some(costs),
    })
}

/// Four rows a variant: likelihood, perplexity (its exponential), divergence, agreement.
fn prose_rows(windows: &[(usize, Vec<Measures>)], len: usize, n_variants: usize) -> Vec<Row> {
    let each = |variant: usize, value: fn(&Measures) -> f64| -> Vec<f64> {
        let of_len = windows.iter().filter(|(l, _)| *l == len);
        of_len.filter_map(|(_, measures)| measures.get(variant)).map(value).collect()
    };
    let mut rows = Vec::new();
    for variant in 0..n_variants {
        let row = |name: &str, grade: Option<Estimate>, diff: Option<Estimate>| {
            let diff = diff.filter(|_| variant > 0);
            Some(Row { variant, task: name.into(), turn: 1, len, grade: grade?, diff, costs: None })
        };
        let nlls = each(variant, |m| m.nll);
        let nll = student(&nlls);
        let ppl = nll.map(|e| Estimate { mean: e.mean.exp(), lo: e.lo.exp(), hi: e.hi.exp(), ..e });
        rows.extend(row("prose-nll", nll, paired(&nlls, &each(0, |m| m.nll))));
        rows.extend(row("prose-ppl", ppl, None));
        let kl = student(&each(variant, |m| m.kl));
        rows.extend(row("prose-kl", kl.map(|e| Estimate { lo: e.lo.max(0.0), ..e }), None));
        let top1 = student(&each(variant, |m| m.top1));
        rows.extend(row("prose-top1", top1.map(|e| Estimate { hi: e.hi.min(1.0), ..e }), None));
    }
    rows
}

/// The columns of `--csv`, and the fields of `row` events.
pub(crate) const COLUMNS: [&str; 25] = [
    "policy",
    "task",
    "turn",
    "length",
    "n",
    "score",
    "score_lo",
    "score_hi",
    "interval",
    "diff",
    "diff_lo",
    "diff_hi",
    "diff_interval",
    "prompt_tokens",
    "share_prompt",
    "share_all",
    "ttft_ms",
    "ttft_lo_ms",
    "ttft_hi_ms",
    "ttft_ratio",
    "decode_ms",
    "kv_bytes",
    "aux_bytes",
    "mass_kept",
    "n_revived",
];

/// A row's fields in the order of [`COLUMNS`]; null where there is nothing to say.
fn fields(row: &Row, variants: &[Variant]) -> [Value; 25] {
    let number = |x: f64, scale: f64| match x.is_finite() {
        true => json!((x * scale).round() / scale),
        false => Value::Null,
    };
    let fine = |x: f64| number(x, 1e6);
    let of = |costs: fn(&Costs) -> f64, scale: f64| {
        row.costs.as_ref().map_or(Value::Null, |c| number(costs(c), scale))
    };
    let diff =
        |value: fn(&Estimate) -> f64| row.diff.as_ref().map_or(Value::Null, |d| fine(value(d)));
    [
        json!(variants[row.variant].name),
        json!(row.task),
        json!(row.turn),
        json!(row.len),
        json!(row.grade.n),
        fine(row.grade.mean),
        fine(row.grade.lo),
        fine(row.grade.hi),
        json!(row.grade.method),
        diff(|d| d.mean),
        diff(|d| d.lo),
        diff(|d| d.hi),
        row.diff.as_ref().map_or(Value::Null, |d| json!(d.method)),
        of(|c| c.prompt_tokens, 10.0),
        of(|c| c.share_prompt, 1e4),
        of(|c| c.share_all, 1e4),
        of(|c| c.ttft_ms.mean, 1e3),
        of(|c| c.ttft_ms.lo, 1e3),
        of(|c| c.ttft_ms.hi, 1e3),
        of(|c| c.ttft_ratio, 1e4),
        of(|c| c.decode_ms.unwrap_or(f64::NAN), 1e3),
        of(|c| c.kv_bytes, 1.0),
        of(|c| c.aux_bytes, 1.0),
        of(|c| c.mass_kept, 1e4),
        of(|c| c.n_revived, 10.0),
    ]
}

/// The fields of a `row` event.
pub(crate) fn json(row: &Row, variants: &[Variant]) -> Value {
    let names = COLUMNS.iter().map(|&name| name.to_owned());
    Value::Object(names.zip(fields(row, variants)).collect())
}

pub(crate) fn csv(rows: &[Row], variants: &[Variant]) -> String {
    let mut out = COLUMNS.join(",") + "\n";
    for row in rows {
        let cells = fields(row, variants).map(|value| match value {
            Value::Null => String::new(),
            Value::String(text) if text.contains([',', '"']) => {
                format!("\"{}\"", text.replace('"', "\"\""))
            }
            Value::String(text) => text,
            other => other.to_string(),
        });
        out += &(cells.join(",") + "\n");
    }
    out
}

/// For people.
pub(crate) fn table(rows: &[Row], variants: &[Variant]) -> String {
    let mut out = format!(
        "{:<17} {:>6}  {:<12} {:>4}  {:<24} {:<25} {:>6} {:>9} {:>7}\n",
        "task",
        "length",
        "policy",
        "n",
        "score [95 %]",
        "against dense [95 %]",
        "share",
        "first ms",
        "a token"
    );
    for row in rows {
        let name = match rows.iter().any(|r| r.task == row.task && r.turn > 1) {
            true => format!("{} {}", row.task, row.turn),
            false => row.task.clone(),
        };
        let estimate =
            |e: &Estimate| format!("{} [{}, {}]", short(e.mean), short(e.lo), short(e.hi));
        let signed = |e: &Estimate| format!("{:+.3} [{:+.3}, {:+.3}]", e.mean, e.lo, e.hi);
        let diff = row.diff.as_ref().map_or("-".into(), signed);
        let costs = row.costs.as_ref().map_or(String::new(), |c| {
            let decode = c.decode_ms.map_or("-".into(), |ms| format!("{ms:.1}"));
            format!("{:>6.3} {:>9.1} {decode:>7}", c.share_prompt, c.ttft_ms.mean)
        });
        let line = format!(
            "{name:<17} {:>6}  {:<12} {:>4}  {:<24} {diff:<25} {costs}",
            row.len,
            variants[row.variant].name,
            row.grade.n,
            estimate(&row.grade)
        );
        let _ = writeln!(out, "{}", line.trim_end()); // a String takes everything
    }
    out
}

/// Three decimals, and where that would show nothing the power of ten.
fn short(x: f64) -> String {
    match x.abs() {
        small if small > 0.0 && small < 0.001 => format!("{x:.1e}"),
        _ => format!("{x:.3}"),
    }
}

/// Mean score over all samples of a variant and length, and the share of its prompts that was computed.
pub(crate) fn quality(results: &Results, variant: usize, len: usize) -> Option<(f64, Estimate)> {
    let of = |o: &&Outcome| o.variant == variant && o.seed.len == len;
    let all: Vec<&Outcome> = results.outcomes.iter().filter(of).collect();
    let share = student(&all.iter().map(|o| o.share_prompt).collect::<Vec<_>>())?.mean;
    Some((share, grades(&all.iter().map(|o| o.grade).collect::<Vec<_>>())?))
}

/// Mean time to the first token of a variant and length, in milliseconds.
pub(crate) fn first_token(results: &Results, variant: usize, len: usize) -> Option<Estimate> {
    let of = |o: &&Outcome| o.variant == variant && o.seed.len == len && o.turn == 0;
    let ms = results.outcomes.iter().filter(of).map(|o| o.ttft_s * 1e3);
    student(&ms.collect::<Vec<_>>())
}
