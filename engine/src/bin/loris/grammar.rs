//! Answers that follow a JSON schema or a grammar: before each token, llguidance says which ones may come.
//!
//! The grammar holds for what is generated, from its first token on. It may end where the grammar says so: there, and only there, an
//! end-of-sequence token is allowed. -n, a full context and --stop end it before.
//!
//! Schemas and grammars come from anywhere, so what they may cost is bounded: their bytes and nesting here, the size of what
//! they become by llguidance's own limits ([`limits`]), and what those let through by time and memory ([`bounded`]).

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use llguidance::api::{ParserLimits, StopReason, TopLevelGrammar};
use llguidance::toktrie::{ApproximateTokEnv, SimpleVob, TokEnv, TokRxInfo, TokTrie};
use llguidance::{ParserFactory, TokenParser};
use loris::Model;
use serde_json::{Value, json};

use crate::args::GenerateArgs;
use crate::exit::{BAD_MODEL, Failure, USAGE};
use crate::prompt::read_file;
use crate::report::resident_bytes;

/// Of a file.
const MAX_BYTES: usize = 1 << 20;
/// Brackets within brackets.
const MAX_NESTING: usize = 64;

/// To compile it.
const MAX_TIME: Duration = Duration::from_secs(10);
const MAX_MEMORY: u64 = 512 << 20;

/// Of the thread that compiles, for each byte of a file and besides: nine bytes are the least that go one level deeper.
const STACK_OF_BYTE: usize = 1 << 10;
const STACK: usize = 8 << 20;

/// Between the parts of JSON: a model that has nothing to say goes on with spaces without end.
const WHITESPACE: &str = r"| |\n[ \t]{0,40}";

/// What a grammar may become, and what a mask may cost.
fn limits() -> ParserLimits {
    ParserLimits {
        max_items_in_row: 2_000,
        initial_lexer_fuel: 1_000_000, // some 20 ms
        step_lexer_fuel: 200_000,
        step_max_items: 50_000,
        max_lexer_states: 50_000, // of 1 to 2 kB
        max_grammar_size: 500_000,
        precompute_large_lexemes: true,
        verbose_errors: false,
    }
}

/// What the flags ask for, read and not yet compiled.
#[derive(Debug)]
pub(crate) struct Source {
    grammar: TopLevelGrammar,
    /// The flag and its file, for messages.
    name: String,
    n_bytes: usize,
}

impl Source {
    pub(crate) fn read(args: &GenerateArgs) -> Result<Option<Self>, Failure> {
        let read = |flag: &str, path: &Path| {
            let name = format!("--{flag} {}", path.display());
            let text = read_file(path)?;
            check(&text).map_err(|why| refuse(&name, why))?;
            Ok::<_, Failure>((name, text.len(), text))
        };
        if let Some(path) = &args.json_schema {
            let (name, n_bytes, text) = read("json-schema", path)?;
            let mut schema: Value = serde_json::from_str(&text)
                .map_err(|e| refuse(&name, format!("not valid JSON: {e}")))?;
            if let Some(schema) = schema.as_object_mut() {
                // A schema may say it otherwise.
                schema
                    .entry("x-guidance")
                    .or_insert_with(|| json!({ "whitespace_pattern": WHITESPACE }));
            }
            let grammar = TopLevelGrammar::from_json_schema(schema);
            return Ok(Some(Self { grammar, name, n_bytes }));
        }
        let Some(path) = &args.grammar else { return Ok(None) };
        let (name, n_bytes, text) = read("grammar", path)?;
        Ok(Some(Self { grammar: TopLevelGrammar::from_lark(text), name, n_bytes }))
    }

    /// The grammar over a model's tokens.
    pub(crate) fn compile(self, model: &Model) -> Result<Grammar, Failure> {
        let Self { grammar, name, n_bytes } = self;
        let env = tokens(model).map_err(|why| Failure::new(BAD_MODEL, format!("{name}: {why}")))?;
        let fresh = bounded(n_bytes, move || {
            let mut factory = ParserFactory::new_simple(&env).map_err(|e| e.to_string())?;
            *factory.limits_mut() = limits();
            factory.quiet();
            let mut parser = factory.create_parser(grammar).map_err(|e| e.to_string())?;
            parser.start_without_prompt();
            Ok(parser)
        });
        let fresh = fresh.map_err(|why| refuse(&name, why))?;
        Ok(Grammar { parser: fresh.deep_clone(), fresh, taken: Vec::new() })
    }
}

/// A compiled grammar, and how far an answer is in it.
pub(crate) struct Grammar {
    fresh: TokenParser,
    parser: TokenParser,
    /// Tokens that `parser` has taken.
    taken: Vec<u32>,
}

impl std::fmt::Debug for Grammar {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Grammar").field("taken", &self.taken).finish_non_exhaustive()
    }
}

impl Grammar {
    /// Sets the tokens that may follow an answer, none where nothing can; a [`TokenMask`](loris::TokenMask).
    pub(crate) fn mask(&mut self, answer: &[u32], allowed: &mut [u32]) -> Result<(), String> {
        if !answer.starts_with(&self.taken) {
            self.begin();
        }
        let new = &answer[self.taken.len()..];
        self.taken.extend_from_slice(new);
        let parser = &mut self.parser;
        match guard(|| next(parser, new)) {
            Ok(mask) => {
                allowed.iter_mut().zip(mask.as_slice()).for_each(|(to, from)| *to = *from);
                Ok(())
            }
            Err(why) => {
                self.begin();
                Err(format!("the grammar cannot go on: {why}"))
            }
        }
    }

    fn begin(&mut self) {
        self.parser = self.fresh.deep_clone();
        self.taken.clear();
    }
}

/// The tokens that may come behind `new`.
fn next(parser: &mut TokenParser, new: &[u32]) -> Result<SimpleVob, String> {
    let said = |parser: &TokenParser| {
        parser.error_message().unwrap_or_else(|| parser.stop_reason().to_string())
    };
    for &id in new {
        if parser.consume_token(id).is_err() {
            return Err(format!("token {id} is not in it: {}", said(parser)));
        }
        let _ = parser.check_stop(); // it says so in `stop_reason`
    }
    let tokens = parser.token_env.clone();
    match parser.stop_reason() {
        StopReason::NotStopped => {}
        StopReason::NoExtension => return Ok(tokens.tok_trie().eos_token_set()),
        _ => return Err(said(parser)),
    }
    match (parser.compute_mask(), parser.stop_reason()) {
        (Ok(mask), _) => Ok(mask),
        (Err(_), StopReason::NoExtensionBias) => Ok(tokens.tok_trie().alloc_token_set()), // a dead end
        (Err(_), _) => Err(said(parser)),
    }
}

/// What a model's tokens are in a text.
fn tokens(model: &Model) -> Result<TokEnv, String> {
    let Some(tokenizer) = model.tokenizer() else {
        return Err("the folder has no tokenizer.json, which a grammar needs".into());
    };
    let config = model.config();
    let Some(&eos) = config.eos_ids.first() else {
        return Err(
            "the model has no end-of-sequence token, which ends an answer by a grammar".into()
        );
    };
    let mut words = Vec::new();
    for id in (0..).take(config.vocab_size) {
        let bytes = tokenizer.token_bytes(id).map_err(|e| e.to_string())?;
        // A text cannot have a special token in it; a grammar can by its name.
        let marker = tokenizer.is_special(id).then_some(TokTrie::SPECIAL_TOKEN_MARKER);
        words.push(marker.into_iter().chain(bytes).collect());
    }
    guard(|| {
        let n_words = u32::try_from(words.len()).map_err(|e| e.to_string())?;
        let trie = TokTrie::from(&TokRxInfo::new(n_words, eos), &words);
        Ok(Arc::new(ApproximateTokEnv::new(trie.with_eos_tokens(&config.eos_ids))) as TokEnv)
    })
}

/// Refuses what could take long only to be read.
fn check(text: &str) -> Result<(), String> {
    if text.len() > MAX_BYTES {
        return Err(format!("has {} bytes; expected at most {MAX_BYTES}", text.len()));
    }
    // Brackets in strings count too: no schema that people write comes near.
    let mut depth = 0_usize;
    for byte in text.bytes() {
        match byte {
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        if depth > MAX_NESTING {
            return Err(format!("has more than {MAX_NESTING} brackets in each other"));
        }
    }
    Ok(())
}

fn refuse(name: &str, why: String) -> Failure {
    Failure::new(USAGE, format!("{name}: {why}"))
}

/// Compiles a text of so many bytes on a thread of its own. One that takes too long, or too much memory, is left to the end of the
/// process, which is near: the flags that asked for it are refused.
fn bounded<T: Send + 'static>(
    n_bytes: usize,
    compile: impl FnOnce() -> Result<T, String> + Send + 'static,
) -> Result<T, String> {
    // What refers to what refers to what is compiled one within the other.
    let stack = STACK + STACK_OF_BYTE * n_bytes;
    let (sender, receiver) = mpsc::channel();
    let before = resident_bytes().unwrap_or(0);
    let deadline = Instant::now() + MAX_TIME;
    let run = move || {
        let _ = sender.send(guard(compile)); // nobody listens any more
    };
    std::thread::Builder::new()
        .stack_size(stack)
        .spawn(run)
        .map_err(|e| format!("no thread with a stack of {stack} bytes: {e}"))?;
    loop {
        match receiver.recv_timeout(Duration::from_millis(10)) {
            Ok(done) => return done,
            Err(RecvTimeoutError::Disconnected) => return Err(FAILED.into()),
            Err(RecvTimeoutError::Timeout) => {}
        }
        if Instant::now() > deadline {
            return Err(format!(
                "takes more than {} s to compile; make it simpler",
                MAX_TIME.as_secs()
            ));
        }
        if resident_bytes().is_some_and(|now| now > before + MAX_MEMORY) {
            let mib = MAX_MEMORY >> 20;
            return Err(format!("takes more than {mib} MiB to compile; make it simpler"));
        }
    }
}

const FAILED: &str = "the grammar library failed on it";

/// Foreign code: what it panics with is an error.
fn guard<T>(call: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    let done = catch_unwind(AssertUnwindSafe(call)).unwrap_or(Err(FAILED.into()));
    // The library catches its own panics too, and says where it was.
    done.map_err(|why| why.split("<backtrace>").next().unwrap_or_default().trim().to_owned())
}
