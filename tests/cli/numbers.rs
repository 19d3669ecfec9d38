//! Numbers that options do not take: every one is a usage error that names the option and what it takes.

use std::process::Command;

use super::support::{Folder, done, loris};

const U64_MAX: &str = "18446744073709551615";
/// More than any integer can be.
const MORE: &str = "18446744073709551616";

/// Values that no option for a count of tokens takes.
const NO_TOKENS: &[&str] = &["-1", "0", "99999999", U64_MAX, MORE, "1.5", "many"];
/// Values that no option takes which takes all numbers from 0 on.
const NO_NUMBER: &[&str] = &["-1", MORE, "1.5", "many"];

/// An option, values that it does not take, and what is said besides of it.
type Row = (&'static [&'static str], &'static [&'static str], &'static str);

const STREAM: [Row; 2] = [
    (&["--window"], NO_TOKENS, "expected 1 to "),
    (&["--window", "9", "--sink"], &["-1", "65", U64_MAX, MORE], "expected 0 to 64"),
];
const CTX: [Row; 1] = [(&["-c"], NO_TOKENS, "--ctx")];
const SIZES: [Row; 2] = [
    (&["--chunk"], &["-1", "0", "65537", U64_MAX, MORE], "expected 1 to 65536"),
    (&["--page-len"], &["-1", "0", "8", "48", "257", U64_MAX, MORE], "expected "),
];
const ENGINE: [Row; 2] = [
    (&["--threads"], &["-1", "0", "1025", U64_MAX, MORE], "expected 1 to 1024"),
    (&["--device"], &["cuda:-1", "cuda:18446744073709551616"], "cuda:N"),
];
const POLICIES: [Row; 2] = [
    (
        &["--lazy"],
        &[
            "1:0.5,window=0",
            "1:0.5,window=65",
            "1:0.5,pool=-1",
            "1:0.5,sinks=18446744073709551616",
            "1:0",
            "1:-1",
            "99999999:0.5",
        ],
        "expected ",
    ),
    (
        &["--evict"],
        &["snapkv:0", "snapkv:-1", "snapkv:18446744073709551616", "snapkv:0%", "snapkv:101%"],
        "expected ",
    ),
];
const ANSWER: [Row; 10] = [
    (&["-n"], &["-2", MORE, "1.5", "many"], "--max-tokens"),
    (&["--min-tokens"], NO_NUMBER, "expected 0 to "),
    (&["--stop-id"], NO_NUMBER, "--stop-id"),
    (&["--top-k"], NO_NUMBER, "expected 0 to "),
    (&["--seed"], &["-2", MORE, "1.5", "many"], "expected 0 to "),
    (&["--temp"], &["-1", "101", "nan", "inf", "1e39"], "expected 0 to 100"),
    (&["--top-p"], &["-1", "0", "0%", "1.1", "110%", "3/2"], "expected above 0, at most 1"),
    (&["--min-p"], &["-0.1", "1.1"], "expected 0 to 1"),
    (&["--min-p"], &["nan", "inf", "1/0", "50%%", "half"], "expected a share, as 25%, 0.25 or 1/4"),
    (&["--repeat-penalty"], &["-1", "0", "101", "nan", "inf"], "expected above 0, at most 100"),
];
const BENCH: [Row; 6] = [
    (&["--prompt-lens"], NO_TOKENS, "expected 1 to "),
    (&["--prompt-lens", "16", "--decode"], &["-1", "99999999", U64_MAX, MORE], "expected "),
    (&["--prompt-lens", "16", "--decode-ctx"], NO_TOKENS, "expected 1 to "),
    (&["--rounds"], &["-1", "0", U64_MAX, MORE], "expected 1 to "),
    (&["--policy", "kv=int8", "--prompt-lens", "16", "--decode"], &["0", "4081"], "expected "),
    (&["--policy"], &["kv=int3", "evict=snapkv:0", "lazy=1:0"], "expected "),
];
const PERPLEXITY: [Row; 5] = [
    (&["--ctx"], &["-1", "0", "1", "99999999", U64_MAX, MORE], "expected "),
    (&["--windows"], &["-1", "0", MORE], "expected 1 to "),
    (&["--ctx", "60", "--stride"], &["-1", "0", "61", U64_MAX, MORE], "expected 1 to "),
    (&["--skip"], NO_NUMBER, "expected 0 to "),
    (&["--spans"], &["-1", "0", U64_MAX, MORE], "expected 1 to "),
];
const EVAL: [Row; 6] = [
    (&["--lens"], &["-1", "0", "63", U64_MAX, MORE], "expected 64 to "),
    (&["--lens"], &["3000000"], "context is 4096"),
    (&["-n"], &["-1", "0", "100001", U64_MAX, MORE], "--samples-per-task"),
    (&["--prose-windows"], &["-1", "0", "100001", U64_MAX, MORE], "expected 1 to "),
    (&["--seed"], NO_NUMBER, "expected 0 to "),
    (&["--max-tokens"], &["-1", "0", "4097", U64_MAX, MORE], "expected 1 to 4096"),
];

#[test]
fn a_number_that_an_option_does_not_take_is_refused_with_what_it_takes() {
    let folder = Folder::with_ctx(4_096);
    let dir = folder.arg("");
    let text = folder.write("text.txt", &"It was the best of times. ".repeat(20));
    let text = text.to_str().unwrap();
    let commands: [(&[&str], &[&[Row]]); 7] = [
        (
            &["run", "-p", "a", "-n", "1", "-m", &dir],
            &[&CTX, &STREAM, &SIZES, &ENGINE, &POLICIES, &ANSWER[1..]],
        ),
        (&["run", "-p", "a", "-m", &dir], &[&ANSWER[..1]]),
        (&["chat", "-m", &dir], &[&CTX, &STREAM, &SIZES, &ENGINE, &POLICIES, &ANSWER]),
        (&["inspect", &dir], &[&CTX, &STREAM, &SIZES]),
        (&["bench", &dir], &[&BENCH, &SIZES, &ENGINE]),
        (&["perplexity", &dir, "-f", text], &[&PERPLEXITY, &STREAM, &SIZES, &ENGINE]),
        (&["eval", &dir], &[&EVAL, &SIZES, &ENGINE]),
    ];
    for (command, tables) in commands {
        for (option, values, says) in tables.iter().flat_map(|table| table.iter()) {
            for value in *values {
                refused(loris(command).args(*option).arg(value), option[option.len() - 1], says);
            }
        }
    }
    // A published shape, before its weights are made.
    let bench = ["bench", "--synthetic", "llama-3.1-8b", "--prompt-lens", "131073"];
    refused(&mut loris(&bench), "--prompt-lens", "expected 1 to 131072");
}

/// Exit code 2, and an error whose first line names the option, short or long, and says what it takes.
fn refused(command: &mut Command, option: &str, says: &str) {
    let run = done(command);
    let shown = format!("{command:?}: {:?}\n{}{}", run.code, run.out, run.err);
    let first = run.err.lines().next().unwrap_or_default();
    assert!(run.code == Some(2) && run.out.is_empty(), "{shown}");
    assert!(first.starts_with("error: ") && first.contains(says), "{shown}");
    assert!(option.len() == 2 || first.contains(option), "{shown}");
}

#[test]
fn numbers_at_the_ends_of_ranges_are_taken() {
    let folder = Folder::new();
    for args in [
        &["-n", "2", "-c", "256"][..],
        &["-n", "2", "-c", "1", "--raw"],
        &["-n", "0"],
        &["-n", U64_MAX, "-c", "40"],
        &["-n", "2", "--top-k", U64_MAX, "--temp", "100", "--seed", U64_MAX],
        &["-n", "2", "--window", "256", "--sink", "0"],
        &["-n", "2", "--window", "192", "--sink", "64"],
        &["-n", "2", "--chunk", "65536", "--page-len", "256"],
        &["-n", "2", "--chunk", "1", "--page-len", "16"],
    ] {
        folder.run(&[args, &["-p", "a"]].concat()).ok();
    }
}
