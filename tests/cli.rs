//! The `loris` binary as a shell sees it: what is on stdout, what is on stderr, and the exit code.
#![allow(clippy::unwrap_used)]

#[path = "cli/chat.rs"]
mod chat;
#[path = "cli/grammar.rs"]
mod grammar;
#[path = "cli/numbers.rs"]
mod numbers;
#[path = "cli/support.rs"]
mod support;
#[path = "cli/templates.rs"]
mod templates;

use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};

use loris::loader::Special;
use loris::{DeviceChoice, Engine, EngineOptions, ModelOptions, SessionOptions};
use serde_json::Value;
use support::{Done, Folder, done, done_with_stdin, loris, named, text};

/// A run whose answer has a known length.
const FIXED: [&str; 5] = ["--ignore-eos", "-n", "12", "-p", "Once upon a time"];

fn fixed<'a>(more: &[&'a str]) -> Vec<&'a str> {
    FIXED.iter().copied().chain(more.iter().copied()).collect()
}

#[test]
fn stdout_holds_the_answer_and_nothing_else() {
    let folder = Folder::new();
    let run = folder.run(&fixed(&[]));
    let events = folder.run(&fixed(&["--json"])).ok().events();
    assert_eq!(run.ok().out, text(&events) + "\n");
    for word in ["load", "prompt", "first token after", "answer", "memory"] {
        assert!(run.err.contains(word), "{word}: {}", run.err);
    }
    assert!(!run.err.contains('\x1b'), "{:?}", run.err);

    let quiet = folder.run(&fixed(&["--quiet"]));
    assert_eq!((quiet.out.as_str(), quiet.err.as_str()), (run.out.as_str(), ""));
    let read = folder.run(&fixed(&["--load", "read", "--chunk", "3", "--page-len", "16", "-q"]));
    assert_eq!(read.out, run.out);
}

#[test]
fn events_have_every_field() {
    let folder = Folder::new();
    let run = folder.run(&fixed(&["--json", "--chunk", "16"]));
    assert_eq!(run.ok().err, "");
    let events = run.events();
    let order: Vec<_> = events.iter().map(|event| event["event"].as_str().unwrap()).collect();
    assert_eq!((order[0], order[order.len() - 1]), ("load", "done"));
    let mut kinds = order;
    kinds.dedup();
    assert_eq!(kinds, ["load", "prefill", "token", "done"]);

    let load = &events[0];
    for name in ["load_s", "weight_bytes", "threads", "page_len", "chunk"] {
        assert!(load[name].is_number(), "{name}: {load}");
    }
    assert_eq!((&load["architecture"], &load["device"]), (&"llama".into(), &"cpu".into()));
    assert_eq!(load["settings"]["temperature"], 0.0);

    let prefills = named(&events, "prefill");
    assert!(prefills.len() > 1, "one a chunk");
    let last = prefills[prefills.len() - 1];
    assert_eq!(last["done"], last["total"]);
    let done = named(&events, "done")[0];
    assert_eq!(last["total"], done["prompt_tokens"]);

    let tokens = named(&events, "token");
    assert!(tokens.iter().all(|token| token["id"].is_u64() && token["text"].is_string()));
    assert_eq!(tokens.len(), 12);
    for name in [
        "load_s",
        "prefill_s",
        "prefill_tok_s",
        "ttft_ms",
        "generated_tokens",
        "decode_tok_s",
        "decode_p50_ms",
        "decode_p95_ms",
        "context_tokens",
        "ctx_len",
        "kv_bytes",
        "reused_tokens",
    ] {
        assert!(done[name].is_number(), "{name}: {done}");
    }
    assert_eq!(done["peak_bytes"].is_u64(), cfg!(target_os = "linux"));
    for name in ["kv_bytes", "n_prefilled", "n_shared", "n_decoded", "token_layers"] {
        assert!(done["receipt"][name].is_u64(), "{name}: {done}");
    }
    assert_eq!((&done["finish"], &done["generated_tokens"]), (&"length".into(), &12.into()));
    assert_eq!(done["settings"]["max_tokens"], 12);
}

#[test]
fn a_prompt_comes_from_an_argument_a_file_or_stdin() {
    let folder = Folder::new();
    let want = folder.run(&["-p", "a b", "-n", "6", "-q"]).ok().out.clone();
    let file = folder.write("prompt.txt", "a b\n");
    assert_eq!(folder.run(&["-f", file.to_str().unwrap(), "-n", "6", "-q"]).out, want);
    for flags in
        [&["-n", "6", "-q"][..], &["-n", "6", "-q", "-p", "-"], &["-n", "6", "-q", "-f", "-"]]
    {
        let run = done_with_stdin(&mut folder.command("run", flags), "a b\n");
        assert_eq!(run.ok().out, want, "{flags:?}");
    }
    let both = folder.run(&["-p", "a", "-f", "b"]);
    assert_eq!(both.code, Some(2));
}

#[test]
fn special_tokens_that_a_user_types_are_text() {
    let folder = Folder::new();
    let n_tokens = |args: &[&str]| {
        let run = folder.run(&[args, &["-n", "1", "--json"]].concat());
        named(&run.ok().events(), "done")[0]["prompt_tokens"].as_u64().unwrap()
    };
    let plain = "a<|im_end|>b"; // 12 characters: 12 tokens of this tokenizer, 3 if it were parsed
    assert_eq!(n_tokens(&["-p", plain]), n_tokens(&["-p", "a"]) + 11);
    assert_eq!(n_tokens(&["--raw", "-p", plain]), 3);
    // Two turns of <|im_start|>role\ncontent<|im_end|>\n, and <|im_start|>assistant\n.
    assert_eq!(n_tokens(&["-p", "hi", "--system", "sys"]), (10 + 3) + (8 + 2) + 11);
}

#[test]
fn a_folder_without_a_template_takes_the_prompt_as_it_is() {
    let folder = Folder::without_template();
    let run = folder.run(&["-p", "ab", "-n", "2"]);
    assert!(run.ok().err.contains("no chat template"), "{}", run.err);
    assert!(run.err.contains("prompt  2 tokens"), "{}", run.err);
    let run = folder.run(&["-p", "ab", "--system", "s"]);
    assert_eq!(run.code, Some(2));
    assert_failed(&done(&mut folder.command("chat", &[])), 3, "chat template");
}

/// One line that says `error: ...what...`, nothing on stdout, and the code.
fn assert_failed(run: &Done, code: i32, what: &str) {
    assert_eq!(run.code, Some(code), "{}", run.err);
    assert!(run.err.starts_with("error: "), "{}", run.err);
    assert_eq!(run.err.lines().count(), 1, "{}", run.err);
    assert!(run.err.contains(what), "{what}: {}", run.err);
    assert_eq!(run.out, "");
}

#[test]
fn each_class_of_error_has_its_code() {
    let folder = Folder::new();
    let long = "x".repeat(300);
    let missing = folder.arg("missing");
    let broken = Folder::new();
    broken.write("config.json", "{");
    let damaged = folder.write("damaged", "no session").to_str().unwrap().to_owned();
    let latin1 = folder.path("latin1");
    std::fs::write(&latin1, b"caf\xe9").unwrap();

    let rows: [(&Folder, &[&str], i32, &str); 14] = [
        (&folder, &["-p", "a", "--device", "cuda"], 5, "cuda"),
        (&folder, &["-p", "a", "--device", "cuda:1"], 5, "--device cpu"),
        (&folder, &["-p", &long], 1, "the context holds 256"),
        (&folder, &["-p", &long, "-c", "64"], 1, "the context holds 64"),
        (&folder, &["-p", "a", "-c", "257"], 2, "-c/--ctx 257: expected 1 to 256"),
        (&folder, &["-p", "a", "--temp", "-1"], 2, "--temp -1: expected 0 to 100"),
        (&folder, &["-p", "a", "--top-p", "0"], 2, "--top-p 0: expected above 0"),
        (&folder, &["-p", "a", "--page-len", "48"], 2, "--page-len 48: expected a power of two"),
        (&folder, &[], 2, "-p TEXT"),
        (&folder, &["-p", ""], 2, "there is no prompt"),
        (&folder, &["-f", &missing], 1, "missing"),
        (&folder, &["-f", latin1.to_str().unwrap()], 1, "not UTF-8 at byte 3"),
        (&folder, &["-p", "a", "--load-state", &damaged], 1, "damaged"),
        (&broken, &["-p", "a"], 3, "config.json"),
    ];
    for (folder, args, code, what) in rows {
        let mut command = loris(&["run", "-m"]);
        assert_failed(&done(command.arg(folder.0.path()).args(args)), code, what);
    }

    let bare = Folder::bare();
    assert_failed(&bare.run(&["-p", "a"]), 3, "tokenizer.json");
    assert_failed(&done(&mut loris(&["run", "-p", "a", "-m", &missing])), 3, "no such folder");
    assert_failed(&done(&mut loris(&["inspect", &missing])), 3, "no such folder");
    assert_failed(&done(&mut loris(&["bench", &missing])), 3, "no such folder");
    for args in [&["run", "--nonsense"][..], &["nonsense"], &["run", "-p", "a"], &["bench"], &[]] {
        assert_eq!(done(&mut loris(args)).code, Some(2), "{args:?}");
    }
    let device = folder.run(&["-p", "a", "--device", "gpu"]);
    assert!(device.code == Some(2) && device.err.contains("cuda:N"), "{}", device.err);
}

#[test]
fn errors_are_events_too() {
    let folder = Folder::new();
    let run = folder.run(&["-p", &"x".repeat(300), "--json"]);
    assert_eq!(run.code, Some(1));
    let events = run.events();
    let error = &events[events.len() - 1];
    assert_eq!((&error["event"], &error["code"]), (&"error".into(), &1.into()));
    assert_eq!(run.err, format!("error: {}\n", error["message"].as_str().unwrap()));
    assert!(named(&events, "prefill").is_empty(), "refused before anything ran");
}

#[cfg(target_os = "linux")]
#[test]
fn memory_that_is_not_there_is_an_error() {
    let folder = Folder::with_ctx(1 << 28);
    let mut command = Command::new("sh");
    let script = "ulimit -v 4000000; exec \"$@\"";
    command.args(["-c", script, "sh", env!("CARGO_BIN_EXE_loris"), "run", "-p", "a", "-m"]);
    command.arg(folder.0.path()).args(["-c", "268435456"]).stdin(Stdio::null());
    assert_failed(&done(&mut command), 4, "out of memory");
}

#[test]
fn colour_is_asked_for_or_absent() {
    let folder = Folder::new();
    let colored = |vars: &[(&str, &str)], args: &[&str]| {
        let mut command = folder.command("run", &["-p", "a", "-n", "2"]);
        let run = done(command.args(args).envs(vars.iter().copied()));
        assert!(!run.ok().out.contains('\x1b'), "{:?}", run.out);
        run.err.contains('\x1b')
    };
    assert!(!colored(&[], &[]));
    assert!(colored(&[], &["--color", "on"]));
    assert!(colored(&[("CLICOLOR_FORCE", "1")], &[]));
    assert!(!colored(&[("CLICOLOR_FORCE", "0")], &[]));
    assert!(!colored(&[("CLICOLOR_FORCE", "1"), ("NO_COLOR", "1")], &[]));
    assert!(!colored(&[("CLICOLOR_FORCE", "1")], &["--color", "off"]));
}

#[test]
fn a_reader_that_has_left_is_no_error() {
    let folder = Folder::new();
    let state = folder.arg("state");
    for args in [fixed(&["--save-state", &state]), fixed(&["--json"])] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let mut child =
            folder.command("run", &args).stdout(writer).stderr(Stdio::piped()).spawn().unwrap();
        let mut err = String::new();
        child.stderr.take().unwrap().read_to_string(&mut err).unwrap();
        assert_eq!((child.wait().unwrap().code(), err.as_str()), (Some(0), ""));
    }
    assert!(Path::new(&state).is_file(), "what was answered is saved all the same");
}

#[test]
fn sampling_follows_the_flags_then_the_model() {
    let folder = Folder::new();
    folder.write(
        "generation_config.json",
        r#"{"do_sample": true, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1}"#,
    );
    let events = |args: &[&str]| folder.run(&fixed(args)).ok().events();
    let settings = |args: &[&str]| named(&events(args), "load")[0]["settings"].clone();
    let advised = settings(&["--json"]);
    assert_eq!((&advised["temperature"], &advised["top_k"]), (&0.6.into(), &50.into()));
    assert_eq!((&advised["top_p"], &advised["repeat_penalty"]), (&0.9.into(), &1.1.into()));
    assert!(advised["seed"].is_u64());
    let flags = settings(&["--json", "--temp", "0", "--repeat-penalty", "1", "--seed", "7"]);
    assert_eq!((&flags["temperature"], &flags["repeat_penalty"]), (&0.0.into(), &1.0.into()));
    assert_eq!((&flags["top_p"], &flags["seed"]), (&0.9.into(), &7.into()));

    let hot = ["--json", "--temp", "5", "--top-p", "1", "--top-k", "0", "--seed"];
    let answer = |seed| text(&events(&[&hot[..], &[seed]].concat()));
    assert_eq!(answer("1"), answer("1"));
    assert_ne!(answer("1"), answer("2"));
}

#[test]
fn a_stop_text_ends_the_answer_before_it() {
    let folder = Folder::new();
    let whole = text(&folder.run(&fixed(&["--json"])).ok().events());
    let stop = &whole[whole.len() / 2..whole.len() / 2 + 2];
    let events = folder.run(&fixed(&["--json", "--stop", stop, "--stop", "\u{1}"])).ok().events();
    assert_eq!(text(&events), whole[..whole.find(stop).unwrap()]);
    assert_eq!(named(&events, "done")[0]["finish"], "stop");
}

#[test]
fn a_full_context_ends_the_answer() {
    let folder = Folder::new();
    let events =
        folder.run(&["-p", "a", "-n", "1000", "--ignore-eos", "-c", "64", "--json"]).events();
    let done = named(&events, "done")[0];
    assert_eq!((&done["finish"], &done["context_tokens"]), (&"ctx_full".into(), &64.into()));
}

/// What version 3 would have written of a session without options: tokens, logits and pages behind the header.
fn as_version_3(saved: &[u8]) -> Vec<u8> {
    let mut bytes = saved[..64].to_vec();
    bytes[8] = 3;
    bytes[48..56].fill(0);
    bytes[56] = 1; // there are logits
    let mut at = 64;
    while !saved[at..].starts_with(b"end ") {
        let n_bytes = u64::from_le_bytes(saved[at + 8..at + 16].try_into().unwrap());
        let part = at + 16..at + 16 + usize::try_from(n_bytes).unwrap();
        if [&b"tokens"[..], b"logits", b"pages"].iter().any(|name| saved[at..].starts_with(name)) {
            bytes.extend(&saved[part.clone()]);
        }
        at = part.end;
    }
    let sum = xxhash_rust::xxh3::xxh3_64(&bytes);
    bytes.extend(sum.to_le_bytes());
    bytes
}

#[test]
fn a_saved_session_goes_on_as_if_it_had_never_stopped() {
    let folder = Folder::new();
    let state = folder.arg("state");
    let whole = text(&folder.run(&["-p", "a b c", "-n", "20", "--ignore-eos", "--json"]).events());
    let save = ["-p", "a b c", "-n", "8", "--ignore-eos", "--json", "--save-state", &state];
    let first = text(&folder.run(&save).ok().events());
    let resume = ["-n", "12", "--ignore-eos", "--json", "--load-state", &state];
    let rest = folder.run(&resume).ok().events();
    assert_eq!(first + &text(&rest), whole);
    assert!(named(&rest, "prefill").is_empty());

    // With a prompt, what the saved session shares with it is not computed again.
    let again = ["-p", "a b c", "-n", "20", "--ignore-eos", "--json", "--load-state", &state];
    let events = folder.run(&again).ok().events();
    assert_eq!(text(&events), whole);
    let done = named(&events, "done")[0];
    assert_eq!(done["reused_tokens"], done["prompt_tokens"].as_u64().unwrap() - 1);

    let other_format = folder.run(&["-n", "1", "--kv", "f32", "--load-state", &state]);
    assert_failed(&other_format, 1, "KV format");

    // An older file does not say of which config it is, nor where the answer begins.
    let save = ["-p", "a b c", "-n", "0", "--ignore-eos", "--json", "--save-state", &state];
    folder.run(&save).ok();
    std::fs::write(&state, as_version_3(&std::fs::read(&state).unwrap())).unwrap();
    assert_failed(&folder.run(&["-n", "1", "--load-state", &state]), 1, "--trust-old-state");
    let resume = ["-n", "20", "--ignore-eos", "--json", "--load-state", &state];
    let trusting = [&resume[..], &["--trust-old-state"]].concat();
    assert_eq!(text(&folder.run(&trusting).ok().events()), whole);
    let usage = folder.run(&["-p", "a", "--trust-old-state"]);
    assert!(usage.code == Some(2) && usage.err.contains("--load-state"), "{}", usage.err);
}

/// A limit on the size of files stands for a full disk.
#[cfg(unix)]
#[test]
fn a_save_without_room_leaves_the_old_file_and_nothing_else() {
    let folder = Folder::new();
    std::fs::create_dir(folder.path("states")).unwrap();
    let state = folder.write("states/state", "old");
    let run = folder.command("run", &["-p", "a b c", "--save-state", state.to_str().unwrap()]);
    let mut limited = Command::new("sh");
    limited.args(["-c", "trap '' XFSZ; ulimit -f 2; exec \"$@\"", "sh"]).stdin(Stdio::null());
    limited.arg(run.get_program()).args(run.get_args()).args(["-q", "-n", "2", "--ignore-eos"]);
    for (name, value) in run.get_envs() {
        match value {
            Some(value) => limited.env(name, value),
            None => limited.env_remove(name),
        };
    }
    let run = done(&mut limited);
    assert_eq!(run.code, Some(1), "{}", run.err);
    assert!(run.err.contains("states/state: cannot save the session"), "{}", run.err);
    assert_eq!(std::fs::read(&state).unwrap(), b"old");
    assert_eq!(folder.path("states").read_dir().unwrap().count(), 1);
}

/// Before anything runs, and whatever is there stays as it was.
#[test]
fn a_state_that_cannot_be_written_is_refused_before_the_work() {
    let folder = Folder::new();
    let file = folder.write("file", "mine");
    for path in ["missing/state", "file/state", ".", "file/..", ""] {
        let run = folder.run(&fixed(&["--save-state", &folder.arg(path)]));
        assert_failed(&run, 1, "cannot write");
    }
    // A run that fails later leaves an earlier file, and nothing beside it.
    let n_files = || std::fs::read_dir(folder.0.path()).unwrap().count();
    let n_before = n_files();
    for name in ["file", "new"] {
        let run = folder.run(&["-p", &"x".repeat(300), "--save-state", &folder.arg(name)]);
        assert_failed(&run, 1, "the context holds 256");
    }
    assert_eq!((std::fs::read_to_string(&file).unwrap().as_str(), n_files()), ("mine", n_before));
    folder.run(&fixed(&["--save-state", &folder.arg("file")])).ok();
    assert!(std::fs::read(&file).unwrap() != b"mine");

    let csv = folder.arg("missing/a.csv");
    let bench = ["bench", &folder.arg(""), "--policy", "kv=int8", "--csv", &csv];
    assert_failed(&done(&mut loris(&bench)), 1, "cannot write");
}

#[test]
fn inspect_says_what_is_there_and_what_it_takes() {
    let folder = Folder::new();
    let dir = folder.0.path().to_str().unwrap();
    let facts = done(&mut loris(&["inspect", dir, "--json", "--ctx", "128"])).object();
    assert_eq!(facts["architecture"], "llama");
    assert_eq!((&facts["n_layers"], &facts["head_dim"]), (&2.into(), &64.into()));
    assert_eq!((&facts["eos_ids"][0], &facts["chat_template"]), (&2.into(), &true.into()));
    let memory = &facts["memory"];
    // 2 layers, K and V, one head of 64, two bytes each.
    assert_eq!(memory["kv_bytes_per_token"], 2 * 2 * 64 * 2);
    assert_eq!(memory["kv_bytes"], 128 * 2 * 2 * 64 * 2);
    assert_eq!(memory["weight_bytes"], facts["dtypes"]["f32"].as_u64().unwrap() * 4);
    let n = |name: &str| memory[name].as_u64().unwrap();
    let sum = n("kv_bytes") + n("activation_bytes") + n("logits_bytes") + n("tokenizer_bytes");
    assert_eq!(n("beyond_weights_bytes"), sum);

    let shown = done(&mut loris(&["inspect", dir]));
    for word in ["llama", "parameters", "KV a token", "beyond the weights"] {
        assert!(shown.ok().out.contains(word), "{word}: {}", shown.out);
    }
    assert_eq!(done(&mut loris(&["inspect", dir, "--ctx", "257"])).code, Some(2));
}

#[test]
fn bench_gives_a_table_or_an_object() {
    let folder = Folder::bare();
    let dir = folder.0.path().to_str().unwrap();
    let args = [
        "bench",
        dir,
        "--threads",
        "1",
        "--prompt-lens",
        "32,64",
        "--decode",
        "4",
        "--rounds",
        "3",
    ];
    let result = done(loris(&args).arg("--json")).object();
    for (row, tokens) in result["prefill"].as_array().unwrap().iter().zip([32, 64]) {
        assert_eq!(row["tokens"], tokens);
        assert!(row["tok_s"].as_f64().unwrap() > 0.0 && row["ttft_ms"].is_number(), "{row}");
    }
    for name in ["tok_s", "p50_ms", "p95_ms"] {
        assert!(result["decode"][name].is_number(), "{name}: {result}");
    }
    assert_eq!((&result["decode"]["tokens"], &result["threads"]), (&4.into(), &1.into()));
    assert_eq!(result["model"], dir);
    let table = done(&mut loris(&args));
    assert!(table.ok().out.contains("prompt 64"), "{}", table.out);
    assert_eq!(done(&mut loris(&["bench", "--synthetic", "nonsense"])).code, Some(2));
}

#[test]
fn perplexity_is_that_of_the_library() {
    let folder = Folder::new();
    let prose = "It was the best of times, it was the worst of times.".repeat(3);
    let file = folder.write("prose.txt", &prose);
    let dir = folder.0.path().to_str().unwrap();
    let args = ["perplexity", dir, "--threads", "1", "--ctx", "60", "-f", file.to_str().unwrap()];
    let result = done(loris(&args).arg("--json")).object();
    assert_eq!((&result["tokens"], &result["left_out_tokens"]), (&156.into(), &36.into()));

    let options = EngineOptions { device: DeviceChoice::Cpu, ..EngineOptions::default() };
    let engine = Engine::new(&EngineOptions { threads: Some(1), ..options }).unwrap();
    let model = engine.open(folder.0.path(), &ModelOptions::default()).unwrap();
    let tokens = model.tokenizer().unwrap().encode(&prose, Special::Plain).unwrap();
    let mut total = 0.0;
    for (idx, window) in tokens.chunks_exact(60).enumerate() {
        let mut session = model.session(&SessionOptions::default()).unwrap();
        let mut sum = 0.0;
        let mut rows = Vec::new();
        session.logits_of(window, &mut |_, logits| rows.push(logits.to_vec())).unwrap();
        for (row, &next) in rows.iter().zip(&window[1..]) {
            let exp: f64 = row.iter().map(|&l| f64::from(l).exp()).sum();
            sum += exp.ln() - f64::from(row[next as usize]);
        }
        let ours = result["windows"][idx]["mean_nll"].as_f64().unwrap();
        assert!((ours - sum / 59.0).abs() < 1e-9, "window {idx}: {ours} {}", sum / 59.0);
        total += sum / 59.0;
    }
    assert!((result["mean_nll"].as_f64().unwrap() - total / 2.0).abs() < 1e-9);
    assert!((result["perplexity"].as_f64().unwrap() - (total / 2.0).exp()).abs() < 1e-6);

    // Overlapping windows, of each the last 20 tokens; and what 7 tokens at a time are worth.
    let more = ["--json", "--stride", "20", "--skip", "5", "--spans", "7"];
    let result = done(loris(&args).args(more)).object();
    let windows = result["windows"].as_array().unwrap();
    assert_eq!((windows.len(), &result["left_out_tokens"]), (5, &11.into()));
    for (window, ours) in tokens[5..].windows(60).step_by(20).zip(windows) {
        let mut session = model.session(&SessionOptions::default()).unwrap();
        session.prefill(&window[..39]).unwrap();
        let mut sum = 0.0;
        let visit = &mut |idx: usize, logits: &[f32]| {
            if let Some(&next) = window.get(40 + idx) {
                let exp: f64 = logits.iter().map(|&l| f64::from(l).exp()).sum();
                sum += exp.ln() - f64::from(logits[next as usize]);
            }
        };
        session.logits_of(&window[39..], visit).unwrap();
        assert!((ours["mean_nll"].as_f64().unwrap() - sum / 20.0).abs() < 1e-9);
        let spans = ours["spans"].as_array().unwrap();
        let to: Vec<u64> = spans.iter().map(|span| span["to"].as_u64().unwrap()).collect();
        assert_eq!(to, [42, 49, 56, 60]);
        // Token 40, which the first of the rows predicts, to token 42, and so on; the last row predicts nothing.
        let n = [3.0, 7.0, 7.0, 3.0];
        let of = |span: &Value| span["mean_nll"].as_f64().unwrap();
        let total: f64 = spans.iter().zip(n).map(|(span, n)| of(span) * n).sum();
        let all = 20.0 * ours["mean_nll"].as_f64().unwrap();
        assert!((total - all).abs() < 1e-9, "{total} {all}");
    }
    assert_eq!(done(loris(&args).args(["--stride", "61"])).code, Some(2));

    let shown = done(&mut loris(&args));
    assert!(shown.ok().out.contains("window 2") && shown.out.contains("all "), "{}", shown.out);
    assert_eq!(done(loris(&args).args(["--ctx", "1"])).code, Some(2));
    assert_eq!(done(loris(&args[..3]).args(["1", "--ctx", "256"]).args(&args[6..])).code, Some(1));
}

#[test]
fn devices_lists_the_cpu() {
    let devices = done(&mut loris(&["devices", "--json"])).object()["devices"].clone();
    assert_eq!((&devices[0]["name"], &devices[0]["available"]), (&"cpu".into(), &true.into()));
    assert_eq!((&devices[1]["name"], &devices[1]["available"]), (&"cuda".into(), &false.into()));
    let text = done(&mut loris(&["devices"]));
    assert!(text.ok().out.starts_with("cpu") && text.out.contains("/nonexistent"), "{}", text.out);
}

/// The binary with a CUDA device: the twin stands in for one.
#[test]
fn a_cuda_device_is_listed_and_used() {
    let on_twin =
        |mut command: Command| done(command.env("LORIS_CUDA_DRIVER", loris_kernels::TWIN));
    let devices = on_twin(loris(&["devices", "--json"])).object()["devices"].clone();
    assert_eq!((&devices[1]["name"], &devices[1]["available"]), (&"cuda:0".into(), &true.into()));
    assert!(on_twin(loris(&["devices"])).ok().out.contains("cuda:0"));

    let folder = Folder::new();
    let args = ["-p", "a", "-n", "3", "--ignore-eos", "--json", "--chunk", "16"];
    for (device, want) in [("auto", "cuda:0"), ("cuda", "cuda:0"), ("cpu", "cpu")] {
        let run = on_twin(folder.command("run", &[&args[..], &["--device", device]].concat()));
        let events = run.ok().events();
        assert_eq!(named(&events, "load")[0]["device"], want);
        let receipt = &named(&events, "done")[0]["receipt"];
        assert_eq!(receipt["n_replayed"].as_u64() > Some(0), want != "cpu", "{receipt}");
    }
    // What the kernels lack is named; left to choose, loris takes the CPU and says so.
    let refused = on_twin(folder.command("run", &["-p", "a", "--device", "cuda", "--kv", "f32"]));
    assert_failed(&refused, 5, "--kv f32");
    let auto = on_twin(folder.command("run", &["-p", "a", "-n", "1", "--kv", "f32"]));
    assert!(auto.ok().err.contains("on the CPU: cuda: --kv f32"), "{}", auto.err);
    let absent = on_twin(folder.command("run", &["-p", "a", "--device", "cuda:7"]));
    assert_failed(&absent, 5, "cuda:7");
}

#[test]
fn the_demo_model_answers() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/SmolLM2-135M-Instruct");
    if !dir.is_dir() {
        return; // scripts/fetch-model makes it
    }
    let question = "What is the capital of France? Answer in one sentence.";
    let mut command = loris(&["run", "--json", "-n", "40", "-p", question, "-m"]);
    let run = done(command.arg(&dir));
    let events = run.ok().events();
    assert!(text(&events).contains("Paris"), "{}", text(&events));
    let done_event = named(&events, "done")[0];
    assert_eq!(done_event["settings"]["temperature"], 0.0);
    let (peak, kv) = (&done_event["peak_bytes"], &done_event["kv_bytes"]);
    assert!(peak.as_u64() > kv.as_u64(), "{done_event}");

    let mut command = loris(&["run", "--raw", "-q", "--temp", "0", "-n", "8", "-m"]);
    let run = done_with_stdin(command.arg(&dir), "1, 2, 3, 4, 5, 6,");
    assert!(run.ok().out.starts_with(" 7, 8"), "{:?}", run.out);
}

#[test]
fn bench_sets_policies_beside_dense() {
    let folder = Folder::bare();
    let (dir, csv) = (folder.arg(""), folder.arg("lazy.csv"));
    let half = "1:0.5,min-len=0,sinks=0,no-revival";
    let page = ["--page-len", "16"];
    let args = ["--prompt-lens", "64", "--decode", "3", "--rounds", "2"];
    let policies =
        ["--policy", &format!("lazy={half}"), "--policy", "kv=int8", "--policy", "evict=tova:32"];
    let args = [&args[..], &page, &policies].concat();
    let mut command = loris(&["bench", &dir, "--threads", "1", "--json", "--csv", &csv]);
    let run = done(command.args(&args));
    let rows = run.ok().object();
    let [dense, lazy, int8, evicted] = &rows.as_array().unwrap()[..] else { panic!("{rows}") };
    assert_eq!((&dense["policy"], &dense["share"]), (&"dense".into(), &1.0.into()));
    assert_eq!((&dense["ttft_ratio"], &dense["ceiling"]), (&1.0.into(), &1.0.into()));
    // Two layers, and half of the tokens in the second.
    assert_eq!((&lazy["policy"], &lazy["share"]), (&format!("lazy={half}").into(), &0.75.into()));
    let n = |row: &serde_json::Value, name: &str| row[name].as_f64().unwrap();
    assert_eq!(n(lazy, "kv_bytes"), 0.75 * n(dense, "kv_bytes"));
    assert!(n(int8, "bytes_ratio") < 0.8 && n(evicted, "bytes_ratio") == 0.5, "{int8} {evicted}");
    assert!(n(lazy, "aux_bytes") > 0.0 && n(lazy, "p99_ms") >= n(lazy, "p50_ms"));
    assert!(n(lazy, "ceiling") > 1.0 && n(lazy, "ceiling") < 4.0 / 3.0 + 0.2);
    let table = std::fs::read_to_string(&csv).unwrap();
    assert_eq!(table.lines().count(), 5);
    assert!(table.lines().nth(2).unwrap().contains(&format!("\"lazy={half}\"")), "{table}");
    let people = done(loris(&["bench", &dir, "--threads", "1"]).args(&args));
    assert!(people.ok().out.contains("ceiling"), "{}", people.out);
}

#[test]
fn pruning_is_refused_by_name_or_counted() {
    let folder = Folder::new();
    let refused = folder.run(&fixed(&["--lazy", "sometimes"]));
    assert_eq!(refused.code, Some(2));
    assert!(refused.err.contains("lazy") && refused.err.contains("gentle, paper, hard"));
    // A short prompt is below the guard: nothing is pruned, and the answer is the dense one.
    let dense = folder.run(&fixed(&["--json"])).ok().events();
    let lazy = folder.run(&fixed(&["--json", "--lazy", "1:0.5"])).ok().events();
    assert_eq!(text(&dense), text(&lazy));
    assert_eq!(named(&lazy, "done")[0]["receipt"]["n_waiting"], 0);
}

#[test]
fn a_window_has_no_end() {
    let folder = Folder::new();
    let prompt = "the quick brown fox jumps over the lazy dog again and again and again";
    let run = |more: &[&str]| {
        folder.run(&[&["--raw", "--ignore-eos", "--json", "-p", prompt], more].concat())
    };
    // The model's context is 512: an answer of 600 tokens ends there, or streams on.
    let full = run(&["-n", "600"]).ok().events();
    assert_eq!(named(&full, "done")[0]["finish"], "ctx_full");
    let stream = run(&["-n", "600", "--window", "100"]).ok().events();
    let done = &named(&stream, "done")[0];
    assert_eq!(done["finish"], "length");
    let shorter = run(&["--window", "100", "-n", "300"]).ok().events();
    // The sinks' page, and the window with what it shares pages with, in two layers.
    assert!(done["kv_bytes"].as_u64().unwrap() <= 2 * 4 * 64 * 2 * 64 * 2, "{done}");
    assert!(text(&stream).starts_with(&text(&shorter)));
    // A prompt longer than the window streams through, whatever the chunk.
    let small = |chunk: &str| {
        let more = ["--window", "9", "--sink", "2", "-n", "8", "--chunk", chunk];
        text(&run(&more).ok().events())
    };
    assert_eq!(small("16"), small("1"));
    for (more, says) in [
        (&["--sink", "4"][..], "--window"),
        (&["--window", "0"], "window"),
        (&["--window", "100", "--ctx", "50"], "--ctx"),
        (&["--window", "100", "--lazy", "gentle"], "--lazy"),
    ] {
        let refused = run(more);
        assert!(refused.code != Some(0) && refused.err.contains(says), "{more:?}: {}", refused.err);
    }
}

#[test]
fn eviction_frees_pages_and_says_so() {
    let folder = Folder::new();
    let prompt = "the quick brown fox jumps over the lazy dog again and again and again";
    let run = |more: &[&str]| {
        let fixed = ["--raw", "--ignore-eos", "--json", "-n", "40", "--page-len", "16"];
        folder.run(&[&fixed[..], &["-p", prompt], more].concat())
    };
    let receipt = |events: &[Value]| named(events, "done")[0]["receipt"].clone();
    let dense = run(&[]).ok().events();
    let kept = run(&["--evict", "snapkv:100%"]).ok().events();
    assert_eq!(text(&kept), text(&dense));
    let evicted = run(&["--evict", "snapkv:24,window=8"]).ok().events();
    let (dense, evicted) = (receipt(&dense), receipt(&evicted));
    assert_eq!(dense["n_evicted"], 0);
    assert!(evicted["n_evicted"].as_u64().unwrap() > 60, "{evicted}");
    let bytes = |receipt: &Value| receipt["kv_bytes"].as_u64().unwrap();
    assert!(bytes(&evicted) * 2 <= bytes(&dense), "{evicted} {dense}");
    for (more, says) in [
        (&["--evict", "lru:64"][..], "snapkv"),
        (&["--evict", "h2o:64", "--lazy", "gentle"], "--lazy"),
        (&["--evict", "h2o:64", "--window", "64"], "--window"),
    ] {
        let refused = run(more);
        assert!(refused.code != Some(0) && refused.err.contains(says), "{more:?}: {}", refused.err);
    }
}

#[test]
fn a_saved_session_that_prunes_goes_on_with_its_schedule_only() {
    let folder = Folder::new();
    let state = folder.arg("session.kv");
    let prompt = "the quick brown fox jumps over the lazy dog again and again and again";
    let lazy = ["--lazy", "1:0.4,min-len=0,revive=1"];
    let run = |n: &str, more: &[&str]| {
        folder.run(&[&["--raw", "--ignore-eos", "--json", "-n", n][..], more].concat())
    };
    let whole = run("12", &[&lazy[..], &["-p", prompt]].concat()).ok().events();
    let first = run("6", &[&lazy[..], &["-p", prompt, "--save-state", &state]].concat());
    let first = first.ok().events();
    assert!(named(&first, "done")[0]["receipt"]["n_waiting"].as_u64().unwrap() > 0);
    let rest = run("6", &[&lazy[..], &["--load-state", &state]].concat()).ok().events();
    assert_eq!(text(&whole), text(&first) + &text(&rest));
    for (more, reason) in [
        (&[][..], "the saved session prunes; give the --lazy that it was made with"),
        (&["--lazy", "1:0.6"], "schedule"),
    ] {
        let refused = run("6", &[&["--load-state", &state], more].concat());
        assert_eq!(refused.code, Some(1));
        assert!(
            refused.err.contains(reason) || refused.out.contains(reason),
            "{} {}",
            refused.err,
            refused.out
        );
    }
}
