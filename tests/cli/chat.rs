//! Conversations through pipes, and Ctrl-C.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdout, Command, Stdio};

use serde_json::Value;

use super::support::{Folder, done_with_stdin, named};

#[test]
fn chat_keeps_what_it_has_computed() {
    let folder = Folder::new();
    let args = ["-n", "6", "--ignore-eos"];
    let lines = "/help\nhi\n\n/stats\nand\\\nthen?\n/nonsense\n/clear\nhi\n/exit\nnever\n";
    let run = done_with_stdin(&mut folder.command("chat", &args), lines);
    assert!(run.ok().err.contains("/clear "), "{}", run.err);
    assert!(run.err.contains("first token after"), "{}", run.err);
    assert!(run.err.contains("/nonsense: no such command"), "{}", run.err);

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
    assert!(run.ok().err.contains("the context is full"), "{}", run.err);
    assert!(run.err.contains("/clear"), "{}", run.err);
    assert!(!run.out.is_empty(), "the next message was answered");
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
