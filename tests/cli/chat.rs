//! Conversations through pipes, and Ctrl-C.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, ChildStdout, Command, Stdio};

use loris::{DeviceChoice, Engine, EngineOptions, ModelOptions, SessionOptions};
use serde_json::Value;

use super::support::{Done, Folder, done_with_stdin, named};

#[test]
fn chat_keeps_what_it_has_computed() {
    let folder = Folder::new();
    let args = ["-n", "6", "--ignore-eos"];
    let lines = "/help\nhi\n\n/stats\nand\\\nthen?\n/clear\nhi\n/exit\nnever\n";
    let run = done_with_stdin(&mut folder.command("chat", &args), lines);
    assert!(run.ok().err.contains("/clear "), "{}", run.err);
    assert!(run.err.contains("first token after"), "{}", run.err);

    let json = [&args[..], &["--json"]].concat();
    let run = done_with_stdin(&mut folder.command("chat", &json), "hi\nand\\\nthen?\n/clear\nhi\n");
    let events = run.ok().events();
    let turns = named(&events, "done");
    assert_eq!(turns.len(), 3);
    let n = |turn: usize, name: &str| turns[turn][name].as_u64().unwrap();
    assert_eq!(n(0, "reused_tokens"), 0);
    assert!(n(1, "reused_tokens") >= n(0, "prompt_tokens"), "the first turn is kept");
    assert_eq!(n(2, "prompt_tokens"), n(0, "prompt_tokens"));
    let mut answers = vec![String::new()];
    for event in &events {
        match event["event"].as_str().unwrap() {
            "token" => answers.last_mut().unwrap().push_str(event["text"].as_str().unwrap()),
            "done" => answers.push(String::new()),
            _ => {}
        }
    }
    assert_eq!(answers[0], answers[2]);
}

#[test]
fn chat_says_that_the_context_is_full_and_goes_on() {
    let folder = Folder::new();
    let lines = format!("{}\nhi\n", "x".repeat(300));
    let run = done_with_stdin(&mut folder.command("chat", &["-n", "2", "--ignore-eos"]), &lines);
    assert!(run.err.contains("the context is full"), "{}", run.err);
    assert!(run.err.contains("/clear"), "{}", run.err);
    assert!(!run.out.is_empty(), "the next message was answered");
    assert_eq!(run.code, Some(1), "a program that pipes learns that a message had no answer");
}

#[test]
fn a_line_that_is_no_text_fails_alone() {
    let folder = Folder::new();
    let args = ["-n", "2", "--ignore-eos", "--json"];
    let run = done_with_stdin(&mut folder.command("chat", &args), b"a\xff\nhi\n");
    let events = run.events();
    assert_eq!(named(&events, "done").len(), 1);
    assert_eq!(named(&events, "error").len(), 1);
    assert!(run.err.contains("stdin: line 1: not UTF-8 at byte 1"), "{}", run.err);
    assert_eq!(run.code, Some(1));
    // A byte order mark is none of a message's characters, and neither is a line's end.
    let n_tokens = |lines: &[u8]| {
        let run = done_with_stdin(&mut folder.command("chat", &args), lines);
        named(&run.ok().events(), "done")[0]["prompt_tokens"].as_u64().unwrap()
    };
    assert_eq!(n_tokens(b"\xef\xbb\xbfhi\r\n"), n_tokens(b"hi\n"));
}

/// A program's lines are messages unless they are commands; two slashes always begin a message with one.
#[test]
fn a_message_may_begin_with_a_slash() {
    let folder = Folder::new();
    let args = ["-n", "1", "--ignore-eos", "--json"];
    let n_tokens = |line: &str| {
        let run = done_with_stdin(&mut folder.command("chat", &args), line.as_bytes());
        named(&run.ok().events(), "done")[0]["prompt_tokens"].as_u64().unwrap()
    };
    let one = n_tokens("x\n");
    assert_eq!(n_tokens("/etc/passwd: what is it?\n"), one + 23);
    assert_eq!(n_tokens("/nonsense\n"), one + 8);
    assert_eq!(n_tokens("//help\n"), one + 4);
    assert_eq!(n_tokens("// a comment\n"), one + 10);
}

#[test]
fn a_conversation_is_written_and_goes_on() {
    let folder = Folder::new();
    let args = ["-n", "4", "--ignore-eos", "--json"];
    let path = folder.arg("talk.json");
    let chat =
        |lines: String| done_with_stdin(&mut folder.command("chat", &args), lines.as_bytes());
    let first = chat(format!("/system be brief\nhi\n/save {path}\n/regen\n"));
    let turns = first.ok().events();
    let turns = named(&turns, "done");
    assert_eq!(turns[0]["prompt_tokens"], turns[1]["prompt_tokens"], "the same once more");
    let saved: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    let roles: Vec<_> = saved["messages"].as_array().unwrap().iter().map(|m| &m["role"]).collect();
    assert_eq!(roles, ["system", "user", "assistant"]);
    let n_tokens = |run: &Done, turn: usize| {
        named(&run.ok().events(), "done")[turn]["prompt_tokens"].as_u64().unwrap()
    };
    let whole = chat("/system be brief\nhi\nmore\n".into());
    let in_parts = chat(format!("/load {path}\nmore\n"));
    assert_eq!(n_tokens(&in_parts, 0), n_tokens(&whole, 1));
    let run = chat(format!("/regen\n/load {path}x\n/save\n/load {}\n", folder.arg("config.json")));
    assert_eq!(run.code, Some(1));
    for what in [
        "/regen: there was no message yet",
        "talk.jsonx: cannot read",
        "/save: expected a file",
        "config.json: expected a conversation",
    ] {
        assert!(run.err.contains(what), "{what}: {}", run.err);
    }
}

fn interrupt(child: &Child) {
    let status = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(status.success());
}

fn spawn(command: &mut Command) -> (Child, BufReader<ChildStdout>) {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let out = BufReader::new(child.stdout.take().unwrap());
    (child, out)
}

/// Reads events up to and including the first of a kind.
fn wait_for(out: &mut impl BufRead, name: &str) -> Value {
    loop {
        let mut line = String::new();
        assert_ne!(out.read_line(&mut line).unwrap(), 0, "stdout ended before {name}");
        let event: Value = serde_json::from_str(&line).unwrap();
        if event["event"] == name {
            return event;
        }
    }
}

#[cfg(unix)]
#[test]
fn ctrl_c_stops_a_run_with_code_130() {
    let folder = Folder::with_ctx(1 << 20);
    let args = ["-p", "a", "-n", "900000", "--ignore-eos", "-c", "1000000", "--json"];
    let (mut child, mut out) = spawn(&mut folder.command("run", &args));
    wait_for(&mut out, "token");
    interrupt(&child);
    assert_eq!(wait_for(&mut out, "done")["finish"], "cancelled");
    assert_eq!(wait_for(&mut out, "error")["code"], 130);
    assert_eq!(child.wait().unwrap().code(), Some(130));
}

/// What is saved of an answer that Ctrl-C ended is all of it that was shown, and goes on as if it had not been.
#[cfg(unix)]
#[test]
fn ctrl_c_loses_no_token_of_a_saved_answer() {
    let folder = Folder::with_ctx(1 << 20);
    let state = folder.arg("state");
    let common = ["--ignore-eos", "-c", "100000", "--json"];
    let start = [&common[..], &["-p", "a", "-n", "90000", "--save-state", &state]].concat();
    let (mut child, mut out) = spawn(&mut folder.command("run", &start));
    let mut ids = Vec::new();
    while ids.len() < 5 {
        ids.push(wait_for(&mut out, "token")["id"].as_u64().unwrap());
    }
    interrupt(&child);
    let mut rest = String::new();
    out.read_to_string(&mut rest).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(130), "{rest}");
    let parse = |line: &str| serde_json::from_str::<Value>(line).unwrap();
    let events: Vec<Value> = rest.lines().map(parse).collect();
    let done = named(&events, "done")[0];
    assert_eq!(done["finish"], "cancelled");
    ids.extend(ids_of(&events));

    let restored = {
        let options = EngineOptions { device: DeviceChoice::Cpu, ..EngineOptions::default() };
        let engine = Engine::new(&options).unwrap();
        let model = engine.open(folder.0.path(), &ModelOptions::default()).unwrap();
        let session = model.restore_file(state.as_ref(), &SessionOptions::default()).unwrap();
        session.tokens().iter().map(|&id| id.into()).collect::<Vec<u64>>()
    };
    let n_prompt = done["prompt_tokens"].as_u64().unwrap() as usize;
    assert!(restored[n_prompt..] == ids, "{} of {} tokens", restored.len() - n_prompt, ids.len());

    let more = folder.run(&[&common[..], &["-n", "9", "--load-state", &state]].concat());
    let n = (ids.len() + 9).to_string();
    let whole = folder.run(&[&common[..], &["-n", &n, "-p", "a"]].concat());
    ids.extend(ids_of(&more.ok().events()));
    assert!(ids_of(&whole.ok().events()).eq(ids));
}

/// The tokens of an answer.
fn ids_of(events: &[Value]) -> impl Iterator<Item = u64> {
    let ids: Vec<u64> =
        named(events, "token").iter().filter_map(|token| token["id"].as_u64()).collect();
    ids.into_iter()
}

#[cfg(unix)]
#[test]
fn ctrl_c_stops_an_answer_and_the_chat_goes_on() {
    let folder = Folder::with_ctx(1 << 20);
    let args = ["-n", "900000", "--ignore-eos", "-c", "1000000", "--json"];
    let (mut child, mut out) = spawn(&mut folder.command("chat", &args));
    let mut stdin = child.stdin.take().unwrap();
    for _ in 0..2 {
        stdin.write_all(b"hi\n").unwrap();
        wait_for(&mut out, "token");
        interrupt(&child);
        assert_eq!(wait_for(&mut out, "done")["finish"], "cancelled");
    }
    stdin.write_all(b"/exit\n").unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(0));

    let (mut child, mut out) = spawn(&mut folder.command("chat", &args));
    let _open = child.stdin.take();
    wait_for(&mut out, "load");
    interrupt(&child); // nothing is being answered: leave
    assert_eq!(child.wait().unwrap().code(), Some(130));
}
