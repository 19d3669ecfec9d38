//! The subcommand on a tiny model with random weights, whose tokens are characters.

use std::collections::{HashMap, HashSet};
use std::io::{BufRead, BufReader};
use std::process::Stdio;

use serde_json::Value;

use crate::support::{Done, Folder, done, loris, named};

const COLUMNS: &str = "policy,task,turn,length,n,score,score_lo,score_hi,interval,diff,diff_lo,diff_hi,\
diff_interval,prompt_tokens,share_prompt,share_all,ttft_ms,ttft_lo_ms,ttft_hi_ms,ttft_ratio,decode_ms,kv_bytes,aux_bytes,mass_kept,n_revived";

fn folder() -> Folder {
    Folder::with_ctx(4_096)
}

fn eval(folder: &Folder, args: &[&str]) -> Done {
    let mut command = loris(&["eval", "--threads", "1"]);
    done(command.arg(folder.0.path()).args(args))
}

#[test]
fn every_task_runs_and_every_form_of_output_is_written() {
    let folder = folder();
    let (csv, samples, svg) = (folder.arg("a.csv"), folder.arg("a.jsonl"), folder.arg("plots"));
    let args = ["--lens", "1000,1400", "-n", "2", "--max-tokens", "4", "--policy", "kv=f32"];
    let files = ["--json", "--csv", &csv, "--samples", &samples, "--svg", &svg];
    let run = eval(&folder, &[&args[..], &files].concat());
    assert_eq!(run.ok().err, "");
    let events = run.events();
    let kinds: Vec<_> = events.iter().map(|e| e["event"].as_str().unwrap()).collect();
    assert_eq!((kinds[0], kinds[kinds.len() - 1]), ("load", "done"));
    assert_eq!(events[0]["policies"], serde_json::json!(["dense", "kv=f32"]));

    // Ten tasks, one of two turns and one of three; two lengths, two samples, two policies.
    let answers = named(&events, "sample");
    assert_eq!(answers.len(), 13 * 2 * 2 * 2);
    let mut prompts: HashMap<String, HashSet<String>> = HashMap::new();
    for answer in &answers {
        let n = answer["prompt_tokens"].as_u64().unwrap();
        let len = answer["length"].as_u64().unwrap();
        assert!(n <= len && (answer["turn"] != 1 || n + 240 > len), "{answer}");
        assert_eq!((&answer["share_prompt"], &answer["share_all"]), (&1.0.into(), &1.0.into()));
        assert!(answer["ttft_ms"].as_f64().unwrap() > 0.0);
        assert_eq!(answer["receipt"]["n_shared"], 0, "samples share nothing");
        let key = format!("{} {} {} {}", answer["task"], answer["turn"], len, answer["sample"]);
        prompts.entry(key).or_default().insert(format!("{} {n}", answer["expected"]));
    }
    assert_eq!(prompts.len(), 13 * 2 * 2);
    assert!(prompts.values().all(|seen| seen.len() == 1), "policies had different samples");

    let text = std::fs::read_to_string(&samples).unwrap();
    assert_eq!(text.lines().count(), answers.len());
    let line: Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
    assert!(line["expected"].is_array() && line["answer"].is_string(), "{line}");

    let rows = named(&events, "row");
    let table = std::fs::read_to_string(&csv).unwrap();
    let mut lines = table.lines();
    assert_eq!(lines.next(), Some(COLUMNS));
    let cells: Vec<Vec<_>> = lines.map(|line| line.split(',').collect()).collect();
    assert_eq!((rows.len(), cells.len()), (13 * 2 * 2, 13 * 2 * 2));
    assert!(cells.iter().all(|row| row.len() == 25));
    for (row, cells) in rows.iter().zip(&cells) {
        assert_eq!((cells[0], cells[4]), (row["policy"].as_str().unwrap(), "2"));
        assert_eq!(row["diff"].is_null(), row["policy"] == "dense");
        assert!(row["score_lo"].as_f64() <= row["score"].as_f64());
    }
    for name in ["quality-share.svg", "ttft-length.svg"] {
        let plot = std::fs::read_to_string(folder.path("plots").join(name)).unwrap();
        assert!(plot.starts_with("<svg") && plot.contains("kv=f32") | plot.contains("1400 tokens"));
    }
}

#[test]
fn an_interrupted_run_goes_on_where_it_was() {
    let folder = folder();
    let (samples, csv) = (folder.arg("a.jsonl"), folder.arg("a.csv"));
    let args = ["--lens", "700", "--max-tokens", "3", "--tasks", "niah-single,two-turn"];
    let policy = ["--policy", "lazy=1:0.5,min-len=0,revive=1", "--json", "--samples", &samples];
    let all = eval(&folder, &[&args[..], &policy, &["-n", "3"]].concat());
    let events = all.ok().events();
    let whole = named(&events, "sample");
    let text = std::fs::read_to_string(&samples).unwrap();
    // Cut inside the line of a second turn: the first is asked for again too.
    let lines: Vec<&str> = text.lines().collect();
    let cut = lines.iter().rposition(|line| line.contains("\"turn\":2")).unwrap();
    let half = &lines[cut][..lines[cut].len() / 2];
    std::fs::write(&samples, format!("{}\n{half}", lines[..cut].join("\n"))).unwrap();
    let rest = ["-n", "4", "--resume", "--csv", &csv];
    let again = eval(&folder, &[&args[..], &policy, &rest].concat());
    let events = again.ok().events();
    let asked = named(&events, "sample");
    // Two variants, three answers a sample; the one more sample, and what was cut off.
    assert_eq!(asked.len(), 6 + 2 + lines.len() - cut - 1);
    assert_eq!(events[events.len() - 1]["samples"], 4 * 6);
    for answer in &asked {
        let same = |a: &&&Value| {
            ["policy", "task", "turn", "sample"].iter().all(|key| a[key] == answer[key])
        };
        if let Some(first) = whole.iter().find(same) {
            assert_eq!(
                (&first["answer"], &first["share_all"]),
                (&answer["answer"], &answer["share_all"])
            );
        }
    }
    let table = std::fs::read_to_string(&csv).unwrap();
    assert_eq!(table.lines().filter(|line| line.contains(",700,4,")).count(), 6, "{table}");
}

#[test]
fn a_policy_that_prunes_computes_less_and_its_prose_is_that_of_decode() {
    let folder = folder();
    let text: String = (0..900).map(|i| format!("{} and then {} came. ", i * 7, i % 13)).collect();
    let file = folder.write("prose.txt", &text);
    let policies =
        ["--policy", "lazy=1:0.5,min-len=0,no-revival", "--policy", "lazy=1:1,min-len=0"];
    let args = ["--lens", "600", "-n", "1", "--max-tokens", "2", "--tasks", "kv,prose", "--json"];
    let file = ["--text", file.to_str().unwrap(), "--prose-windows", "2"];
    let run = eval(&folder, &[&args[..], &policies, &file].concat());
    let events = run.ok().events();
    let rows = named(&events, "row");
    let of = |task: &str, policy: &str| {
        let found = rows.iter().find(|row| row["task"] == task && row["policy"] == policy);
        (*found.unwrap()).clone()
    };
    let (half, all) = ("lazy=1:0.5,min-len=0,no-revival", "lazy=1:1,min-len=0");
    assert!((of("kv", half)["share_prompt"].as_f64().unwrap() - 0.75).abs() < 0.01);
    assert!(of("kv", half)["aux_bytes"].as_f64().unwrap() > 0.0);
    assert!(of("kv", half)["mass_kept"].as_f64().unwrap() < 1.0);
    assert_eq!(of("kv", all)["share_prompt"], 1.0);
    // Nothing pruned is dense, bit for bit.
    assert_eq!(
        (&of("prose-kl", all)["score"], &of("prose-top1", all)["score"]),
        (&0.0.into(), &1.0.into())
    );
    assert!(of("prose-kl", half)["score"].as_f64().unwrap() > 0.0);
    assert_eq!(of("prose-nll", "dense")["score"], of("prose-nll", all)["score"]);
}

#[test]
fn prose_measures_the_distance_to_dense() {
    let folder = folder();
    let text: String = (0..900).map(|i| format!("{} and then {} came. ", i * 7, i % 13)).collect();
    let file = folder.write("prose.txt", &text);
    let file = file.to_str().unwrap();
    let base = ["--tasks", "prose", "--lens", "300", "--prose-windows", "5", "--text", file];
    let more = ["--policy", "kv=bf16", "--policy", "kv=f32", "--json"];
    let run = eval(&folder, &[&base[..], &more].concat());
    let events = run.ok().events();
    let value = |policy: &str, task: &str| {
        let rows = named(&events, "row");
        let row = rows.iter().find(|row| row["policy"] == policy && row["task"] == task).unwrap();
        assert_eq!((&row["n"], &row["length"]), (&5.into(), &300.into()));
        row["score"].as_f64().unwrap()
    };
    for same in ["dense", "kv=bf16"] {
        assert_eq!((value(same, "prose-kl"), value(same, "prose-top1")), (0.0, 1.0));
    }
    assert_eq!(value("dense", "prose-nll"), value("kv=bf16", "prose-nll"));
    assert!((value("dense", "prose-nll").exp() / value("dense", "prose-ppl") - 1.0).abs() < 1e-4);
    let kl = value("kv=f32", "prose-kl");
    assert!(kl > 0.0 && kl < 0.1, "{kl}");
    assert!(value("kv=f32", "prose-top1") > 0.9);

    // The subcommand that measures perplexity alone agrees.
    let dir = folder.0.path().to_str().unwrap();
    let first = ["perplexity", dir, "-f", file, "--ctx", "300", "--windows", "1", "--json"];
    let alone = done(&mut loris(&first)).object();
    let one =
        ["--tasks", "prose", "--lens", "300", "--prose-windows", "1", "--text", file, "--json"];
    let events = eval(&folder, &one).ok().events();
    let row = named(&events, "row")[0];
    let gap = row["score"].as_f64().unwrap() - alone["mean_nll"].as_f64().unwrap();
    assert!(gap.abs() < 1e-5, "{gap}");
}

#[test]
fn people_get_a_table() {
    let folder = folder();
    std::fs::remove_file(folder.path("chat_template.jinja")).unwrap();
    let args = ["--lens", "900", "-n", "2", "--tasks", "niah-single,two-turn", "--max-tokens", "3"];
    let run = eval(&folder, &args);
    assert!(run.ok().err.contains("no chat template"), "{}", run.err);
    for word in ["against dense", "niah-single", "two-turn 2", "900"] {
        assert!(run.out.contains(word), "{word}: {}", run.out);
    }
    let raw = eval(&folder, &[&args[..], &["--raw", "-q"]].concat());
    assert_eq!((raw.ok().err.as_str(), raw.out.lines().count()), ("", 4));
}

#[test]
fn what_makes_no_sense_is_refused() {
    let folder = folder();
    let short = folder.write("short.txt", "too short");
    let short = short.to_str().unwrap();
    let missing = folder.arg("missing/dir/a.csv");
    let rows: [(&[&str], i32, &str); 19] = [
        (&["--policy", "lazy"], 2, "--policy lazy: expected one of dense, kv=FORMAT, lazy=SPEC"),
        (&["--policy", "lazy_keep=0.5"], 2, "expected one of dense"),
        (&["--policy", "kv=int3"], 2, "--policy kv=int3: int3: expected one of bf16"),
        (&["--policy", "kv"], 2, "kv=FORMAT"),
        (&["--policy", "dense=1"], 2, "expected one of dense"),
        (&["--policy", "kv=f32", "--policy", "kv=f32"], 2, "given twice"),
        (&["--tasks", "nothing"], 2, "niah-single"),
        (&["--tasks", "kv,kv"], 2, "given twice"),
        (&["--tasks", "prose"], 2, "--text"),
        (&["--tasks", "prose", "--text", short, "--lens", "300"], 2, "fewer than one window"),
        (&["--lens", "63"], 2, "expected 64 to"),
        (&["--lens", "100", "--tasks", "cwe"], 2, "the shortest prompt of cwe"),
        (&["--lens", "4096"], 2, "context is 4096"),
        (&["--lens", "900,900"], 2, "given twice"),
        (&["-n", "0"], 2, "--samples-per-task <N>': expected 1 to"),
        (&["--prose-windows", "0"], 2, "--prose-windows <N>': expected 1 to"),
        (&["--max-tokens", "4097"], 2, "--max-tokens <N>': expected 1 to 4096"),
        (&["--text", "nowhere.txt"], 1, "nowhere.txt"),
        (&["--csv", &missing], 1, "cannot write"),
    ];
    for (args, code, what) in rows {
        let run = eval(&folder, args);
        assert_eq!(run.code, Some(code), "{args:?}: {}", run.err);
        assert!(run.err.contains(what), "{what}: {}", run.err);
        assert_eq!(run.out, "");
    }
    assert_eq!(done(&mut loris(&["eval", &missing])).code, Some(3));
    assert_eq!(
        eval(&Folder::bare(), &["--lens", "64", "--tasks", "kv"]).code,
        Some(3),
        "no tokenizer"
    );
}

#[cfg(unix)]
#[test]
fn an_interrupted_run_shows_what_it_has() {
    let folder = folder();
    let csv = folder.arg("a.csv");
    let mut command = loris(&["eval", "--threads", "1", "--json", "-n", "5000", "--lens", "1200"]);
    command.arg(folder.0.path()).args(["--tasks", "niah-single,kv", "--csv", &csv]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut kinds = Vec::new();
    let kind = |line: String| {
        let event: Value = serde_json::from_str(&line).unwrap();
        event["event"].as_str().unwrap().to_owned()
    };
    while kinds.len() < 4 {
        kinds.push(kind(lines.next().unwrap().unwrap()));
    }
    // SAFETY: a signal to a child that has not been waited for.
    unsafe { libc::kill(libc::pid_t::try_from(child.id()).unwrap(), libc::SIGINT) };
    kinds.extend(lines.map(|line| kind(line.unwrap())));
    assert_eq!(child.wait().unwrap().code(), Some(130));
    let n = |name: &str| kinds.iter().filter(|kind| *kind == name).count();
    assert!(n("sample") >= 3 && n("sample") < 5_000, "{}", n("sample"));
    assert_eq!((n("row"), n("done"), n("error")), (2, 1, 1));
    assert_eq!(std::fs::read_to_string(&csv).unwrap().lines().count(), 3);
}
