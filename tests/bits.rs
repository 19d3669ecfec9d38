//! The bits of logits and of what is held, for every KV format in every kind of session: two fixtures on the portable
//! instruction set, beside the hashes of `bits.txt`. A change that is meant to change no bit leaves that file as it is;
//! one that is meant to writes it anew with `LORIS_BLESS=1` and says why.
//!
//! (Angles come from the system's sine and cosine, which may differ by a last digit between systems: where this
//! test fails on an unchanged tree, compare two trees on one machine.)
#![allow(clippy::unwrap_used)]

mod support;

use std::fmt::Write as _;
use std::path::PathBuf;

use loris::backend::cpu::Isa;
use loris::compute::{Lazy, PrunePoint};
use loris::keep::Evict;
use loris::loader::Dtype;
use loris::{Error, KvFormat, Model, ModelOptions, Session, SessionOptions, StreamOptions};
use support::{deep, open_on, options, rounded};
use xxhash_rust::xxh3::Xxh3;

const FIXTURES: [&str; 2] = ["llama-tied", "qwen3"];
/// Tokens of the first prompt, and of the next turn's.
const PROMPT: usize = 150;
const TURN: usize = 21;
/// Tokens that are decoded behind each.
const ANSWER: usize = 20;

/// The kinds of sessions, by name.
fn kinds() -> [(&'static str, SessionOptions); 5] {
    let dense = SessionOptions::default;
    let point = PrunePoint { layer: 2, keep_rate: 0.5 };
    let lazy = Lazy { min_len: 1, window: 1, ..Lazy::new(vec![point]) };
    let evict = |spec| Some(Evict::parse(spec).unwrap());
    [
        ("dense", dense()),
        ("lazy", SessionOptions { lazy: Some(lazy), ..dense() }),
        (
            "stream",
            SessionOptions { stream: Some(StreamOptions { sink: 4, window: 40 }), ..dense() },
        ),
        ("snapkv", SessionOptions { evict: evict("snapkv:48"), ..dense() }),
        ("h2o", SessionOptions { evict: evict("h2o:25%"), ..dense() }),
    ]
}

fn tokens(seed: usize, n: usize) -> Vec<u32> {
    (0..n)
        .map(|i| u32::try_from((i * 31 + seed * 17 + i * i * (seed + 3)) % 120).unwrap())
        .collect()
}

/// Hashes of every row of logits that the session gives on its way, and of what it holds then.
fn hashes(session: &mut Session) -> Result<(u64, u64), Error> {
    let mut rows = Xxh3::new();
    let mut note = |session: &Session| {
        session.logits().unwrap().iter().for_each(|logit| rows.update(&logit.to_le_bytes()));
    };
    for (seed, n) in [(1, PROMPT), (2, TURN)] {
        session.prefill(&tokens(seed, n))?;
        note(session);
        for token in tokens(seed + 7, ANSWER) {
            session.decode(token)?;
            note(session);
        }
    }
    let mut saved = Vec::new();
    session.save(&mut saved)?;
    let mut held = Xxh3::new();
    let mut at = 64; // behind the header come sections
    while !saved[at..].starts_with(b"end ") {
        let n_bytes = u64::from_le_bytes(saved[at + 8..at + 16].try_into().unwrap());
        let part = at + 16..at + 16 + usize::try_from(n_bytes).unwrap();
        at = part.end;
        held.update(&saved[part]);
    }
    Ok((rows.digest(), held.digest()))
}

/// A line of `bits.txt`: what does not go together is refused.
fn line(model: &Model, name: &str, kind: &str, session: &SessionOptions) -> String {
    let kv = model.plan().kv;
    match model.session(session) {
        Err(_) => format!("{name} {kv} {kind} refused"),
        Ok(mut session) => {
            let (rows, held) = hashes(&mut session).unwrap();
            format!("{name} {kv} {kind} {rows:016x} {held:016x}")
        }
    }
}

#[test]
fn no_bit_has_changed() {
    let mut found = String::new();
    for name in FIXTURES {
        for kv in KvFormat::ALL {
            let sizes = ModelOptions {
                kv: kv.into(),
                aux_tokens: 512,
                page_len: 16,
                chunk: 48,
                ..options(1_024)
            };
            let mut checkpoint = deep(rounded(name, Dtype::BF16), 4);
            checkpoint.config.ctx_len = 512;
            let model = open_on(Isa::Portable, checkpoint, &sizes);
            for (kind, session) in kinds() {
                writeln!(found, "{}", line(&model, name, kind, &session)).unwrap();
            }
        }
    }
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/bits.txt");
    if std::env::var_os("LORIS_BLESS").is_some() {
        std::fs::write(&path, &found).unwrap();
    }
    let known = std::fs::read_to_string(&path).unwrap();
    let differ = found.lines().zip(known.lines()).filter(|(found, known)| found != known);
    let differ: Vec<_> = differ.map(|(found, known)| format!("{found}, was {known}")).collect();
    assert!(differ.is_empty(), "{differ:#?}");
    assert_eq!(found.lines().count(), known.lines().count());
    let n_refused = found.lines().filter(|line| line.ends_with("refused")).count();
    assert!(n_refused * 4 < found.lines().count(), "most things go together");
}
