//! C programs against the library that lies beside the test: the examples, what hosts do wrong, long runs.
//!
//! Each program is compiled as hosts compile theirs, with all warnings as errors, and runs with AddressSanitizer and
//! LeakSanitizer. The library's own code is not instrumented; what it allocates and frees is seen, and so is every
//! byte that the programs' side of a call touches. A compiler that is missing is a failure.
#![cfg(target_os = "linux")]
#![allow(clippy::print_stdout)] // what is known not to hold, and counts

use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use tempfile::TempDir;

use super::abi::root;

#[path = "../cli/support.rs"]
mod support;

use support::{Done, Folder, done, done_with_stdin, loris};

/// How a program is compiled.
#[derive(Clone, Copy, PartialEq)]
enum Checks {
    Address,
    /// For programs whose subject is what a sanitizer changes: memory in use, the end of a process.
    None,
}

/// A folder with the library under the names that linkers and loaders look for, and the programs made in it.
struct Workshop(TempDir);

impl Workshop {
    fn new() -> Self {
        let library = std::env::current_exe().unwrap().with_file_name("libloris.so");
        assert!(library.is_file(), "{}: cargo makes it beside the test", library.display());
        let dir = TempDir::new().unwrap();
        for name in ["libloris.so", "libloris.so.0"] {
            std::os::unix::fs::symlink(&library, dir.path().join(name)).unwrap();
        }
        Self(dir)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Runs a compiler with the flags that all programs get.
    fn compile_with(
        &self,
        compiler: &str,
        flags: &[&str],
        include: &Path,
        source: &Path,
    ) -> PathBuf {
        let program = self.path(source.file_stem().unwrap().to_str().unwrap());
        let mut command = Command::new(compiler);
        command.args(["-Wall", "-Wextra", "-Werror", "-pedantic", "-g", "-pthread"]).args(flags);
        command.arg("-I").arg(include).arg(source).arg("-o").arg(&program);
        command.arg("-L").arg(self.0.path()).args(["-lloris", "-ldl", "-lm"]);
        command.arg(format!("-Wl,-rpath,{}", self.0.path().display()));
        let output = command.output().unwrap_or_else(|e| panic!("{compiler} is needed: {e}"));
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{command:?}: {said}");
        program
    }

    fn compile_against(&self, include: &Path, source: &str, checks: Checks) -> PathBuf {
        let flags: &[&str] = match checks {
            Checks::Address => &["-std=c99", "-O1", "-fsanitize=address"],
            Checks::None => &["-std=c99", "-O1"],
        };
        self.compile_with("cc", flags, include, &root().join(source))
    }

    fn compile(&self, source: &str, checks: Checks) -> PathBuf {
        self.compile_against(&root().join("engine/include"), source, checks)
    }

    fn example(&self, name: &str) -> PathBuf {
        self.compile(&format!("engine/examples/c/{name}.c"), Checks::Address)
    }

    fn test(&self, name: &str, checks: Checks) -> PathBuf {
        self.compile(&format!("tests/capi/{name}.c"), checks)
    }
}

/// Leaks are reported, and freed memory is overwritten: the library's code, which has no checks, stumbles over it.
const ASAN: &str = "detect_leaks=1:max_free_fill_size=65536";

fn command(program: &Path) -> Command {
    let mut command = Command::new(program);
    command.stdin(Stdio::null());
    command.env("CUDA_VISIBLE_DEVICES", ""); // the CPU, whatever the machine has
    command.env("ASAN_OPTIONS", ASAN).env_remove("LSAN_OPTIONS");
    command
}

/// Asserts exit code 0 and that no sanitizer had anything to report.
fn sound(done: Done) -> Done {
    let Done { code, out, err } = &done;
    assert!(*code == Some(0) && !err.contains("Sanitizer: "), "{code:?}\n{out}\n{err}");
    done
}

fn run(program: &Path, args: &[&str]) -> Done {
    sound(done(command(program).args(args)))
}

fn fixture(name: &str) -> String {
    root().join("tests/fixtures").join(name).to_str().unwrap().to_owned()
}

fn smollm2() -> String {
    let dir = root().join("models/SmolLM2-135M-Instruct");
    assert!(dir.is_dir(), "{} is missing: run scripts/fetch-model first", dir.display());
    dir.to_str().unwrap().to_owned()
}

/// What `loris run` prints.
fn answer_of_the_binary(dir: &str, prompt: &str, n: &str) -> String {
    let answer = done(&mut loris(&["run", "-q", "-m", dir, "-p", prompt, "-n", n]));
    answer.ok();
    assert!(!answer.out.trim().is_empty());
    answer.out
}

#[test]
fn hello_prints_what_the_binary_prints() {
    let workshop = Workshop::new();
    let hello = workshop.example("hello");
    for folder in [Folder::new(), Folder::without_template()] {
        let dir = folder.arg("");
        let expected = answer_of_the_binary(&dir, "hello there", "24");
        assert_eq!(run(&hello, &[&dir, "hello there", "24"]).out, expected);
    }
    let prompt = "Why is the sky blue?";
    let expected = answer_of_the_binary(&smollm2(), prompt, "16");
    assert_eq!(run(&hello, &[&smollm2(), prompt, "16"]).out, expected);
}

#[test]
fn lazy_prints_what_the_binary_prints() {
    let workshop = Workshop::new();
    let program = &workshop.example("lazy");
    let folder = Folder::new();
    let prompt = "the quick brown fox jumps over the lazy dog and finds a loris there, ".repeat(2);
    std::fs::write(folder.path("prompt.txt"), &prompt).unwrap();
    let (dir, file) = (folder.arg(""), folder.arg("prompt.txt"));
    for schedule in
        ["1:0.5,min-len=0,revive=1", "1:1,min-len=0", "1:0.3,min-len=0,window=4,pool=3,no-revival"]
    {
        let args = ["run", "-q", "-m", &dir, "-f", &file, "-n", "24", "--lazy", schedule];
        let expected = done(&mut loris(&args));
        expected.ok();
        let done = run(program, &[&dir, &file, schedule, "24"]);
        assert_eq!(done.out.trim_end(), expected.out.trim_end());
        let all = done.err.starts_with("[100 % of");
        assert_eq!(all, schedule.starts_with("1:1"), "{}", done.err);
    }
}

#[test]
fn the_python_example_prints_what_the_binary_prints() {
    let workshop = Workshop::new();
    let folder = Folder::new();
    let script = root().join("engine/examples/python/generate.py");
    let mut python = command(Path::new("python3"));
    python.env("LORIS_LIBRARY", workshop.path("libloris.so"));
    let dir = folder.arg("");
    let Done { code, out, err } = done(python.arg(script).args([&dir, "hello there", "24"]));
    assert_eq!(code, Some(0), "{err}");
    assert_eq!(format!("{out}\n"), answer_of_the_binary(&dir, "hello there", "24"));
}

/// The examples of masks and logarithms of probabilities, in C and in Python: a number, and the same words about it.
#[test]
fn choices_are_told_in_both_languages() {
    let workshop = Workshop::new();
    let program = workshop.example("choice");
    let script = root().join("engine/examples/python/choice.py");
    let folder = Folder::new();
    for (dir, text) in [(folder.arg(""), "hello"), (smollm2(), "How many legs has a spider?")] {
        let said = run(&program, &[&dir, text]).out;
        let number: String = said.lines().map(|line| line.split_once(": ").unwrap().0).collect();
        assert!(number.len() <= 4 && number.parse::<u32>().is_ok(), "{said}");
        let mut python = command(Path::new("python3"));
        python.env("LORIS_LIBRARY", workshop.path("libloris.so"));
        let Done { code, out, err } = done(python.arg(&script).args([&dir, text]));
        assert_eq!(code, Some(0), "{err}");
        assert_eq!(out, said);
    }
}

#[test]
fn chat_prints_what_the_binary_prints() {
    let workshop = Workshop::new();
    let chat = workshop.example("chat");
    let folder = Folder::new();
    let long = "x".repeat(300);
    for lines in ["hi\n\nand then?\nhi\n".to_owned(), format!("{long}\nhi\n")] {
        let expected = done_with_stdin(&mut folder.command("chat", &["-q", "-n", "8"]), &lines);
        let chat = &mut command(&chat);
        let talk = sound(done_with_stdin(chat.args([&folder.arg(""), "8"]), &lines));
        assert!(!talk.out.is_empty());
        assert_eq!(talk.out, expected.out, "{}", expected.err);
        let has_failed = lines.contains(&long);
        assert_eq!(expected.code, Some(i32::from(has_failed)));
        assert_eq!(talk.err.contains("[no answer: status 2: "), has_failed, "{}", talk.err);
    }
}

#[test]
fn ctrl_c_stops_an_answer_of_chat_and_leaves_at_the_prompt() {
    let workshop = Workshop::new();
    let chat = workshop.example("chat");
    let folder = Folder::with_ctx(1 << 17);
    // An end that is never chosen: no token has this id.
    let config = std::fs::read_to_string(folder.path("config.json")).unwrap();
    folder.write("config.json", &config.replace("\"eos_token_id\":2", "\"eos_token_id\":127"));
    let mut child = command(&chat)
        .args([&folder.arg(""), "100000"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let interrupt = |id: u32| {
        let status = Command::new("kill").args(["-INT", &id.to_string()]).status().unwrap();
        assert!(status.success());
    };
    let mut stdin = child.stdin.take().unwrap();
    let mut out = child.stdout.take().unwrap();
    let mut err = BufReader::new(child.stderr.take().unwrap()).lines();
    stdin.write_all(b"hi\n").unwrap();
    out.read_exact(&mut [0; 4]).unwrap(); // the answer has begun
    interrupt(child.id());
    assert_eq!(err.next().unwrap().unwrap(), "[stopped]");
    // It goes on: the next message is read, and there is no room for it.
    stdin.write_all(format!("{}\n", "x".repeat(140_000)).as_bytes()).unwrap();
    let line = err.next().unwrap().unwrap();
    assert!(line.starts_with("[no answer: status 2: "), "{line}");
    interrupt(child.id());
    assert_eq!(child.wait().unwrap().code(), Some(130));
}

#[test]
fn batch_gives_each_session_its_own_answer() {
    let workshop = Workshop::new();
    let run = run(&workshop.example("batch"), &[&Folder::new().arg("")]);
    assert_eq!(run.out.lines().count(), 2, "{}", run.out);
}

#[test]
fn a_saved_session_goes_on_in_another_process() {
    let workshop = Workshop::new();
    let state = workshop.example("state");
    let file = workshop.path("session").to_str().unwrap().to_owned();
    let folder = Folder::new();
    let text = "Once upon a time";
    for dir in [folder.arg(""), smollm2()] {
        let whole = run(&state, &["whole", &dir, text]).out;
        let first = run(&state, &["save", &dir, &file, text]).out;
        let rest = run(&state, &["resume", &dir, &file]).out;
        assert!(!first.is_empty() && !rest.is_empty(), "{whole}");
        assert_eq!(format!("{first}{rest}"), whole);
    }
    let [whole, through_memory] =
        ["whole", "memory"].map(|command| run(&state, &[command, &folder.arg(""), text]).out);
    assert_eq!(through_memory, whole);
}

#[test]
fn errors_are_what_the_example_says() {
    let workshop = Workshop::new();
    let errors = workshop.example("errors");
    for folder in [Folder::new(), Folder::without_template()] {
        run(&errors, &[&folder.arg("")]);
    }
}

#[test]
fn the_header_is_cpp() {
    let workshop = Workshop::new();
    let source = workshop.path("header.cpp");
    let text =
        "#include <loris.h>\nint main() { return loris_abi_version() != LORIS_ABI_VERSION; }\n";
    std::fs::write(&source, text).unwrap();
    let include = root().join("engine/include");
    run(&workshop.compile_with("c++", &["-std=c++17"], &include, &source), &[]);
}

#[test]
fn an_old_program_runs_as_it_did() {
    let old = Workshop::new();
    std::fs::copy(root().join("tests/capi/old/loris-0.1.h"), old.path("loris.h")).unwrap();
    let source = "tests/capi/old_program.c";
    let folder = Folder::new();
    let from_old =
        run(&old.compile_against(old.0.path(), source, Checks::Address), &[&folder.arg("")]);
    let new = Workshop::new();
    let from_new = run(&new.compile(source, Checks::Address), &[&folder.arg("")]);
    assert_eq!(from_old.out, from_new.out);
    assert!(from_old.out.contains("26 of 100 tokens"), "{}", from_old.out);
}

/// Runs the cases of one of the programs that share `misuse.h`.
fn misuse(name: &str) -> Done {
    let workshop = Workshop::new();
    let folder = Folder::new();
    let files = TempDir::new().unwrap();
    let mut command = command(&workshop.test(name, Checks::Address));
    // Some cases ask for terabytes: a real allocator gives NULL, this one would end the process.
    command.env("ASAN_OPTIONS", format!("{ASAN}:allocator_may_return_null=1"));
    command.args([&folder.arg(""), &fixture("llama-untied"), &fixture("llama-tied")]);
    let run = sound(done(command.arg(fixture("llama-dynamic")).arg(files.path())));
    print!("{}", run.out); // what is known not to hold
    run
}

#[test]
fn arguments_without_a_meaning_are_told() {
    misuse("misuse");
}

#[test]
fn choices_without_a_meaning_are_told() {
    misuse("misuse_choice");
}

#[test]
fn calls_at_the_wrong_time_are_told() {
    let left_out = misuse("misuse_calls").out.contains("left out");
    assert_eq!(
        left_out,
        !cfg!(debug_assertions),
        "panics are tested if the library can be asked to"
    );
}

#[test]
fn damaged_bytes_and_orders_of_freeing_are_no_harm() {
    misuse("misuse_lives");
}

#[test]
fn opening_again_and_again_takes_no_more_memory() {
    let workshop = Workshop::new();
    let reload = workshop.test("reload", Checks::None);
    let library = workshop.path("libloris.so").to_str().unwrap().to_owned();
    for what in ["models", "library"] {
        let (folder, mut reload) = (Folder::new(), command(&reload));
        // One arena: when a thread gets another is chance, and each is a step of more than a megabyte.
        reload.env("MALLOC_ARENA_MAX", "1").args([what, &library, &folder.arg("")]);
        print!("{}", sound(done(&mut reload)).out);
    }
}

#[test]
fn a_process_ends_as_its_host_wishes() {
    let workshop = Workshop::new();
    let exit = workshop.test("exit", Checks::None);
    let folder = Folder::new();
    for what in ["leave", "quiet", "memory"] {
        assert_eq!(run(&exit, &[what, &folder.arg("")]).err, "");
    }
}

/// Each step of a session's life is done or refused, whatever the address space; none ends the process.
#[test]
fn short_memory_is_a_status() {
    let workshop = Workshop::new();
    let program = workshop.test("short_memory", Checks::None);
    let folder = Folder::with_ctx(1 << 14);
    let (dir, file) = (folder.arg(""), workshop.path("session").to_str().unwrap().to_owned());
    let run = |limit: u64| {
        let mut command = command(&program);
        command.args([&dir, &file, &limit.to_string()]);
        // One arena: those of other threads take address space that they do not use.
        sound(done(command.env("MALLOC_ARENA_MAX", "1"))).out
    };
    let free = run(0);
    print!("no limit: {free}");
    let number = |name: &str| -> u64 {
        let (_, rest) = free.split_once(&format!("{name} ")).unwrap();
        1024 * rest.split([',', '\n']).next().unwrap().parse::<u64>().unwrap()
    };
    let (start, loaded) = (number("start"), number("loaded"));
    let even = (0..20).map(|i| loaded * 105 / 100 + loaded * 95 / 100 * i / 19);
    let seed = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64;
    println!("seed {seed}");
    let mut state = seed;
    // One at random in each twentieth of what makes a difference. A program that has used up its memory before it calls
    // is none that this is about.
    let (least, most) = (start + (2 << 20), loaded + (24 << 20));
    let random = (0..20).map(|i| {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let part = (most - least) / 20;
        least + part * i + (state >> 11) % part
    });
    let mut levels: Vec<u64> = even.chain(random).collect();
    levels.sort_unstable();
    let mut refused = std::collections::BTreeMap::new();
    for limit in levels {
        let steps = run(limit);
        print!("{limit} bytes, {:.2} of loaded: {steps}", limit as f64 / loaded as f64);
        for step in steps.trim().split(", ").filter_map(|step| step.strip_suffix(" -8")) {
            *refused.entry(step.to_owned()).or_insert(0) += 1;
        }
    }
    println!("refused: {refused:?}");
    for step in ["load", "tokenize", "refill", "fork", "save"] {
        assert!(refused.contains_key(step), "no level refuses {step}: {refused:?}");
    }
}

#[test]
fn random_calls_from_many_threads_give_the_answers_of_sessions_alone() {
    let workshop = Workshop::new();
    let soak = workshop.test("soak", Checks::Address);
    let folder = Folder::new();
    let files = TempDir::new().unwrap();
    let mut command = command(&soak);
    command.current_dir(files.path()).arg(folder.arg("")).args(["10", "16", "4", "1"]);
    print!("{}", sound(done(&mut command)).out);
}
