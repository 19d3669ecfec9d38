//! Model folders small enough to run in a moment, and the binary to run on them.
#![allow(dead_code)] // each test binary uses its part
#![allow(clippy::unwrap_used)]

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};
use tempfile::TempDir;

pub(crate) const SPECIAL: [&str; 5] = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"];

const TEMPLATE: &str = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

/// A model folder in a folder of its own, gone when dropped.
pub(crate) struct Folder(pub(crate) TempDir);

impl Folder {
    /// A fixture with random weights.
    pub(crate) fn bare() -> Self {
        let dir = TempDir::new().unwrap();
        let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/llama-tied");
        for name in ["config.json", "model.safetensors"] {
            std::fs::copy(fixture.join(name), dir.path().join(name)).unwrap();
        }
        Self(dir)
    }

    /// With a tokenizer: one token a character, of printable ASCII and newline.
    pub(crate) fn without_template() -> Self {
        let folder = Self::bare();
        folder.write("tokenizer.json", &tokenizer().to_string());
        folder
    }

    /// With a tokenizer and a chat template.
    pub(crate) fn new() -> Self {
        let folder = Self::without_template();
        folder.write("chat_template.jinja", TEMPLATE);
        folder
    }

    /// With room for a long answer.
    pub(crate) fn with_ctx(ctx_len: usize) -> Self {
        let folder = Self::new();
        let config = std::fs::read_to_string(folder.path("config.json")).unwrap();
        let mut config: Value = serde_json::from_str(&config).unwrap();
        config["max_position_embeddings"] = ctx_len.into();
        folder.write("config.json", &config.to_string());
        folder
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// A path as an argument.
    pub(crate) fn arg(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    pub(crate) fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.path(name);
        std::fs::write(&path, text).unwrap();
        path
    }

    /// `loris SUBCOMMAND -m FOLDER ARGS...`, on one thread: the models are too small for more.
    pub(crate) fn command(&self, subcommand: &str, args: &[&str]) -> Command {
        let mut command = loris(&[subcommand, "--threads", "1", "-m"]);
        command.arg(self.0.path()).args(args);
        if let Some(isa) = std::env::var_os("LORIS_TEST_ISA") {
            command.arg("--isa").arg(isa); // as `isa` of `tests/support`
        }
        command
    }

    pub(crate) fn run(&self, args: &[&str]) -> Done {
        done(&mut self.command("run", args))
    }
}

fn tokenizer() -> Value {
    let chars = (32..127_u8).map(|c| char::from(c).to_string()).chain(["\n".to_owned()]);
    let tokens = SPECIAL.iter().map(|s| (*s).to_owned()).chain(chars);
    let vocab: serde_json::Map<String, Value> =
        tokens.enumerate().map(|(id, token)| (token, id.into())).collect();
    let added: Vec<Value> = SPECIAL
        .iter()
        .enumerate()
        .map(|(id, text)| {
            json!({ "id": id, "content": text, "single_word": false, "lstrip": false,
                    "rstrip": false, "normalized": false, "special": true })
        })
        .collect();
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
        "normalizer": null, "pre_tokenizer": null, "post_processor": null,
        "decoder": { "type": "Fuse" },
        "model": { "type": "BPE", "dropout": null, "unk_token": "<unk>",
                   "continuing_subword_prefix": null, "end_of_word_suffix": null,
                   "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": [] },
    })
}

/// The binary, in an environment that says nothing of colour.
pub(crate) fn loris(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_loris"));
    command.args(args).stdin(Stdio::null());
    command.env_remove("NO_COLOR").env_remove("CLICOLOR_FORCE").env_remove("CLICOLOR");
    command.env("LORIS_CUDA_DRIVER", "/nonexistent/libcuda.so"); // the CPU, whatever the machine has
    command
}

/// What a process left behind.
pub(crate) struct Done {
    pub(crate) code: Option<i32>,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl Done {
    /// The lines of stdout as JSON.
    pub(crate) fn events(&self) -> Vec<Value> {
        let parse =
            |line: &str| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"));
        self.out.lines().map(parse).collect()
    }

    /// The one JSON object on stdout.
    pub(crate) fn object(&self) -> Value {
        self.ok();
        assert_eq!(self.out.lines().count(), 1, "{}", self.out);
        serde_json::from_str(&self.out).unwrap()
    }

    /// Asserts success.
    pub(crate) fn ok(&self) -> &Self {
        assert_eq!(self.code, Some(0), "{}", self.err);
        self
    }
}

impl From<Output> for Done {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code(),
            out: String::from_utf8(output.stdout).unwrap(),
            err: String::from_utf8(output.stderr).unwrap(),
        }
    }
}

pub(crate) fn done(command: &mut Command) -> Done {
    command.output().unwrap().into()
}

/// Runs a command with a text on stdin.
pub(crate) fn done_with_stdin(command: &mut Command, stdin: impl AsRef<[u8]>) -> Done {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(stdin.as_ref()).unwrap();
    child.wait_with_output().unwrap().into()
}

/// Events of one kind.
pub(crate) fn named<'e>(events: &'e [Value], name: &str) -> Vec<&'e Value> {
    events.iter().filter(|event| event["event"] == name).collect()
}

/// The text of all `token` events.
pub(crate) fn text(events: &[Value]) -> String {
    named(events, "token").iter().map(|event| event["text"].as_str().unwrap()).collect()
}
