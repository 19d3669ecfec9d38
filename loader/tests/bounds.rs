//! The memory that foreign code takes is no more than what was asked for before it ran.
//!
//! This binary's allocator counts. What is asked for and let go at once is an allocation that is freed before any other
//! is made: the largest such is what a call has asked for. All else is what it takes. One test, because it measures
//! the process.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};

use common::byte_tokenizer;
use loris_loader::{Chat, ChatTemplate, Message, Special, Tokenizer, parse_index, safetensors};
use serde_json::json;

struct Counting;

#[global_allocator]
static COUNTING: Counting = Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);
static ASKED: AtomicUsize = AtomicUsize::new(0);
/// The latest allocation, and its size.
static LAST: AtomicUsize = AtomicUsize::new(0);
static LAST_SIZE: AtomicUsize = AtomicUsize::new(0);
/// Who counts: the test's runner has a thread of its own.
static BUSY: AtomicBool = AtomicBool::new(false);

/// What an allocator takes for `size` bytes: glibc has a header of 8, steps of 16 and at least 32.
fn cost(size: usize) -> usize {
    (size + 8).next_multiple_of(16).max(32)
}

fn counting<T>(count: impl FnOnce() -> T) -> T {
    while BUSY.swap(true, SeqCst) {
        std::hint::spin_loop();
    }
    let counted = count();
    BUSY.store(false, SeqCst);
    counted
}

fn add(size: usize) {
    PEAK.fetch_max(LIVE.fetch_add(cost(size), SeqCst) + cost(size), SeqCst);
}

/// The latest allocation lives on: it counts.
fn count_last() {
    if LAST.swap(0, SeqCst) != 0 {
        add(LAST_SIZE.load(SeqCst));
    }
}

// SAFETY: the system's allocator does the work.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: passed on.
        let ptr = unsafe { System.alloc(layout) };
        counting(|| {
            count_last();
            LAST_SIZE.store(layout.size(), SeqCst);
            LAST.store(ptr as usize, SeqCst);
        });
        ptr
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        counting(|| {
            if LAST.load(SeqCst) == ptr as usize {
                LAST.store(0, SeqCst);
                ASKED.fetch_max(layout.size(), SeqCst);
            } else {
                LIVE.fetch_sub(cost(layout.size()), SeqCst);
            }
        });
        // SAFETY: passed on.
        unsafe { System.dealloc(ptr, layout) };
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        counting(|| {
            count_last();
            add(new_size); // as if both were there for a moment, which may be so
            LIVE.fetch_sub(cost(layout.size()), SeqCst);
        });
        // SAFETY: passed on.
        unsafe { System.realloc(ptr, layout, new_size) }
    }
}

/// Runs a call on `n_bytes` of input and holds it to what it asked for.
fn check<T>(what: &str, n_bytes: usize, call: impl FnOnce() -> T) -> T {
    counting(count_last);
    let before = LIVE.load(SeqCst);
    PEAK.store(before, SeqCst);
    ASKED.store(0, SeqCst);
    let value = call();
    counting(count_last);
    let (took, asked) = (PEAK.load(SeqCst) - before, ASKED.load(SeqCst));
    let each = |bytes: usize| bytes as f64 / n_bytes as f64;
    println!(
        "{what}: {n_bytes} bytes take {took} ({:.0} each), {asked} were asked for",
        each(took)
    );
    assert!(took <= asked, "{what}: {took} bytes were taken, {asked} asked for");
    value
}

fn open(json: &serde_json::Value) -> Tokenizer {
    Tokenizer::parse(json.to_string().as_bytes(), Path::new("tokenizer.json")).unwrap()
}

const N: usize = 12_000;

fn texts() -> Vec<(&'static str, String)> {
    let mut seed = 1_u64;
    let mut random = move || {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) as u32
    };
    let words: String = (0..N / 5)
        .map(|i| if i % 4 == 0 { ' ' } else { char::from(b'a' + (random() % 26) as u8) })
        .collect();
    let any: String = (0..N / 4).filter_map(|_| char::from_u32(random() % 0x11_0000)).collect();
    vec![
        ("words", words),
        ("any characters", any),
        ("digits", "1234567890".repeat(N / 10)),
        ("letters apart", "a 1 ".repeat(N / 4)),
        ("one letter", "x".repeat(N)),
        ("punctuation", "!a".repeat(N / 2)),
        ("spaces", " ".repeat(N)),
        ("lines", "a\n".repeat(N / 2)),
        ("accents", "é".repeat(N / 2)),
        ("ideographs", "日本".repeat(N / 6)),
        ("emoji", "🙂".repeat(N / 4)),
        ("special tokens", "<|im_end|>".repeat(N / 10)),
    ]
}

fn tokenizers() -> Vec<(&'static str, Tokenizer)> {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/SmolLM2-135M-Instruct");
    let mut splits = byte_tokenizer();
    splits["added_tokens"][0]["content"] = json!("x");
    splits["added_tokens"][0]["special"] = json!(false); // which no user could write otherwise
    let mut whole = byte_tokenizer();
    whole["pre_tokenizer"] = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
                                    "use_regex": false});
    let mut composed = byte_tokenizer();
    composed["normalizer"] = json!({"type": "NFC"});
    vec![
        ("smollm2", Tokenizer::open(&model).unwrap().expect("run scripts/fetch-model first")),
        ("bytes", open(&byte_tokenizer())),
        ("bytes in one word", open(&whole)),
        ("bytes with NFC", open(&composed)),
        ("bytes with a token of one letter", open(&splits)),
    ]
}

fn check_texts() {
    for (name, tokenizer) in tokenizers() {
        for (kind, text) in texts() {
            for special in [Special::Parse, Special::Plain] {
                let what = format!("{name}, {kind}");
                let ids = check(&format!("{what}, encoded"), text.len(), || {
                    tokenizer.encode_by(&text, special, true, usize::MAX).unwrap()
                });
                check(&format!("{what}, decoded"), text.len(), || {
                    tokenizer.decode(&ids, Special::Plain).unwrap()
                });
            }
        }
    }
}

/// Tokenizers of the other kinds: `▁` for a space, with and without words, and BERT's.
fn other_tokenizers() -> Vec<(&'static str, Tokenizer)> {
    let mut vocab = serde_json::Map::new();
    let tokens =
        ["<unk>", "▁", "s", "o", "m", "e", "w", "r", "d", "a", "n", "l", "i", "▁some", "##o"];
    tokens.iter().for_each(|token| drop(vocab.insert((*token).into(), json!(vocab.len()))));
    let model = |model: serde_json::Value,
                 normalizer: serde_json::Value,
                 pre: serde_json::Value| {
        open(&json!({"version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
                     "normalizer": normalizer, "pre_tokenizer": pre, "post_processor": null, "decoder": null,
                     "model": model}))
    };
    let bpe = json!({"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
                     "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": false, "ignore_merges": false,
                     "vocab": vocab, "merges": []});
    let scored: Vec<_> = tokens.iter().map(|token| json!([token, -1.0])).collect();
    let unigram = json!({"type": "Unigram", "unk_id": 0, "byte_fallback": false, "vocab": scored});
    let word_piece = json!({"type": "WordPiece", "unk_token": "<unk>", "continuing_subword_prefix": "##",
                            "max_input_chars_per_word": 100, "vocab": vocab});
    let legacy = json!({"type": "Sequence", "normalizers": [
        {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]});
    let metaspace = |split| json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": split});
    let none = serde_json::Value::Null;
    let bert = json!({"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true, "strip_accents": null, "lowercase": true});
    vec![
        ("llama2", model(bpe.clone(), legacy, none.clone())),
        ("metaspace", model(bpe, none.clone(), metaspace(false))),
        ("unigram", model(unigram, none, metaspace(true))),
        ("bert", model(word_piece, bert, json!({"type": "BertPreTokenizer"}))),
    ]
}

/// A text that can be cut asks for a piece's memory, and for its ids: no more than 20 bytes for a byte, and 16 MiB.
fn check_pieces() {
    let text = "some words and\nlines\n".repeat(20_000);
    for (name, tokenizer) in tokenizers().into_iter().take(2).chain(other_tokenizers()) {
        let what = format!("{name}, a long text");
        let encode = || tokenizer.encode(&text, Special::Plain).unwrap();
        counting(count_last);
        let before = LIVE.load(SeqCst);
        PEAK.store(before, SeqCst);
        ASKED.store(0, SeqCst);
        let ids = encode();
        counting(count_last);
        let (took, asked) = (PEAK.load(SeqCst) - before, ASKED.load(SeqCst));
        let each = took as f64 / text.len() as f64;
        println!(
            "{what}: {} bytes, {} ids take {took} ({each:.1} each), {asked} asked",
            text.len(),
            ids.len()
        );
        assert!(took.max(asked) < 20 * text.len() + (16 << 20), "{what}: {took}, {asked}");
    }
}

fn check_json() {
    let list = |item: &str, n: usize| format!("[{}]", vec![item; n].join(","));
    for (what, value) in [
        ("numbers", list("0", N)),
        ("lists", list("[]", N)),
        ("lists of one", list("[0]", N)),
        ("objects", list("{\"\":0}", N)),
        ("objects of six", list("{\"a\":0,\"b\":0,\"c\":0,\"d\":0,\"e\":0,\"f\":0}", N / 8)),
        ("texts", list("\"\"", N)),
        ("short texts", list("\"a\"", N)),
        ("one text", format!("\"{}\"", "a".repeat(N))),
        ("escapes", format!("\"{}\"", "\\n".repeat(N / 2))),
        (
            "keys",
            format!(
                "{{{}}}",
                (0..N / 8).map(|i| format!("\"{i}\":0")).collect::<Vec<_>>().join(",")
            ),
        ),
    ] {
        let index = format!("{{\"weight_map\":{{\"a\":\"b.safetensors\"}},\"x\":{value}}}");
        check(what, index.len(), || parse_index(index.as_bytes(), Path::new("index")).unwrap());
    }
}

fn check_tokenizer_files() {
    let model = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../models/SmolLM2-135M-Instruct/tokenizer.json");
    let bytes = std::fs::read(model).unwrap();
    check("SmolLM2's tokenizer", bytes.len(), || Tokenizer::parse(&bytes, Path::new("t")).unwrap());
    let mut json = byte_tokenizer();
    let mut merges = Vec::new();
    let vocab = json["model"]["vocab"].as_object_mut().unwrap();
    for i in 0..40_000_u32 {
        let (a, b) = (char::from(b'a' + (i % 26) as u8), char::from(b'a' + (i / 26 % 26) as u8));
        let longer = format!("{a}{b}{i}");
        vocab.insert(longer, json!(1_000 + i));
        if i < 26 * 26 {
            vocab.insert(format!("{a}{b}"), json!(300 + i));
            merges.push(json!([a.to_string(), b.to_string()]));
        }
    }
    json["model"]["merges"] = merges.into();
    let bytes = json.to_string();
    check("a tokenizer of many tokens", bytes.len(), || {
        Tokenizer::parse(bytes.as_bytes(), Path::new("t")).unwrap()
    });
    let added: Vec<_> = (0..5_000_u32)
        .map(|i| {
            json!({"id": 300 + i, "content": format!("<{i}>"), "single_word": false, "lstrip": false,
                   "rstrip": false, "normalized": i % 2 == 0, "special": true})
        })
        .collect();
    let mut json = byte_tokenizer();
    json["added_tokens"] = added.into();
    let bytes = json.to_string();
    check("a tokenizer of added tokens", bytes.len(), || {
        Tokenizer::parse(bytes.as_bytes(), Path::new("t")).unwrap()
    });
}

fn check_headers() {
    let tensors: Vec<(String, &str, Vec<usize>)> =
        (0..20_000).map(|i| (format!("{i}"), "BF16", vec![0, 1])).collect();
    let file = common::weights(&tensors);
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("model.safetensors"), &file).unwrap();
    assert_eq!(safetensors::parse(&file).unwrap().tensors.len(), 20_000);
    check("a header", file.len(), || {
        loris_loader::Weights::open(dir.path(), loris_loader::LoadMode::Mmap, &mut |_, _| {})
            .unwrap()
    });
}

fn check_templates() {
    let n = 20_000;
    for (what, source) in [
        ("text", "a".repeat(n)),
        ("variables", "{{a}}".repeat(n / 5)),
        ("conditions", "{%if a%}{%endif%}".repeat(n / 17)),
        ("sums", format!("{{{{{}}}}}", vec!["1"; 1_000].join("+"))),
        ("texts in a row", format!("{{{{{}}}}}", vec!["''"; 1_000].join("~"))),
        ("a list", format!("{{{{[{}]}}}}", vec!["1"; n / 2].join(","))),
        ("calls", "{{a()}}".repeat(n / 7)),
        ("slices", "{{a[1:]}}".repeat(n / 9)),
        ("filters", format!("{{{{a{}}}}}", "|trim".repeat(400))),
        ("loops", "{%for a in b%}{%endfor%}".repeat(n / 24)),
    ] {
        let parse = || ChatTemplate::parse(&source, Path::new("chat"), Vec::new());
        drop(check(&format!("a template of {what}"), source.len(), parse));
    }
    let n_bytes = 20 * 10_000;
    let messages: Vec<Message> =
        (0..20).map(|_| Message::new("user", "word ".repeat(2_000))).collect();
    let chat = Chat::new(messages);
    for (what, source) in [
        (
            "an ordinary template",
            "{% for m in messages %}{{ m.role ~ ': ' ~ m.content }}{% endfor %}",
        ),
        (
            "doubling",
            "{% set ns = namespace(s='aaaaaaaa') %}{% for i in range(40) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
        ),
        (
            "lists of lists",
            "{% set ns = namespace(s=[0]) %}{% for i in range(40) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
        ),
        (
            "all contents again and again",
            "{% for i in range(10000) %}{% for m in messages %}{{ m.content }}{% endfor %}{% endfor %}",
        ),
        ("replacing", "{{ messages[0].content|replace('o', messages[1].content) }}"),
        ("joining", "{{ range(20000)|join(messages[0].content) }}"),
        ("JSON", "{{ messages|tojson(indent=4) }}"),
        ("repeating", "{{ messages[0].content * 100000 }}"),
    ] {
        let template = ChatTemplate::parse(source, Path::new("chat"), Vec::new()).unwrap();
        drop(check(&format!("rendering: {what}"), n_bytes, || template.render(&chat)));
    }
}

#[test]
fn what_foreign_code_takes_was_asked_for() {
    check_json();
    check_headers();
    check_tokenizer_files();
    check_templates();
    check_texts();
    check_pieces();
}
