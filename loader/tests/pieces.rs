//! Texts that are encoded in pieces have the ids that they have as a whole.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeSet;
use std::path::Path;

use common::{byte_char, byte_tokenizer};
use loris_loader::{Special, Tokenizer};
use serde_json::{Value, json};
use tokenizers::normalizers::NFC;
use tokenizers::{NormalizedString, Normalizer};

const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// A piece that holds any text of these tests.
const WHOLE: usize = 1 << 20;

fn open(json: &Value) -> Tokenizer {
    Tokenizer::parse(json.to_string().as_bytes(), Path::new("tokenizer.json")).unwrap()
}

/// A byte-level tokenizer whose merges join whatever a word leaves side by side, so that ids tell where words end: of
/// some bytes every two, and every two of those.
fn joining_tokenizer() -> Value {
    let mut json = byte_tokenizer();
    let mut vocab = json["model"]["vocab"].as_object().unwrap().clone();
    vocab.remove("he");
    let some: Vec<String> =
        b" \n\rae1!'s\xc3\xa9\xe2".iter().map(|&b| byte_char(b).to_string()).collect();
    let mut merges = Vec::new();
    let mut add = |a: &str, b: &str| {
        let (id, joined) = (300 + vocab.len(), format!("{a}{b}"));
        if !vocab.contains_key(&joined) {
            vocab.insert(joined, json!(id));
            merges.push(json!([a, b]));
        }
    };
    let pairs: Vec<String> =
        some.iter().flat_map(|a| some.iter().map(move |b| a.clone() + b)).collect();
    some.iter().for_each(|a| some.iter().for_each(|b| add(a, b)));
    pairs.iter().for_each(|a| some.iter().for_each(|b| add(a, b)));
    json["model"]["vocab"] = vocab.into();
    json["model"]["merges"] = merges.into();
    json
}

fn with_steps(steps: Value, normalizer: Value) -> Value {
    let mut json = joining_tokenizer();
    json["pre_tokenizer"] = json!({"type": "Sequence", "pretokenizers": steps});
    json["normalizer"] = normalizer;
    json
}

/// A tokenizer in the manner of SentencePiece, whose merges join whatever is side by side but for a mark behind another
/// character.
fn marked_tokenizer(normalizer: Value, pre_tokenizer: Value) -> Value {
    let some = ["▁", "a", "e", "1", "!", "'", "s", "\n", "é"];
    let mut vocab = serde_json::Map::new();
    vocab.insert("<unk>".into(), json!(0));
    for byte in 0..=255u32 {
        vocab.insert(format!("<0x{byte:02X}>"), json!(byte + 1));
    }
    some.iter().for_each(|token| drop(vocab.insert((*token).into(), json!(vocab.len()))));
    let mut merges = Vec::new();
    let mut tokens: Vec<String> = some.iter().map(|&token| token.into()).collect();
    for _ in 0..2 {
        for a in tokens.clone() {
            for b in some {
                let joined = format!("{a}{b}");
                let is_inside = joined.trim_start_matches('▁').contains('▁');
                if !is_inside && !vocab.contains_key(&joined) {
                    vocab.insert(joined.clone(), json!(vocab.len()));
                    merges.push(json!([a, b]));
                    tokens.push(joined);
                }
            }
        }
    }
    let id = vocab.len();
    let added = |id: usize, content: &str, normalized: bool| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": normalized, "special": true})
    };
    json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [added(id, "<|im_end|>", false), added(id + 1, "<|im_start|>", true)],
        "normalizer": normalizer, "pre_tokenizer": pre_tokenizer, "post_processor": null, "decoder": null,
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
                  "vocab": vocab, "merges": merges}
    })
}

/// Those that use `▁` for a space, and BERT's.
fn marked_tokenizers() -> Vec<(&'static str, Tokenizer)> {
    let mark = json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"});
    let prepend = json!({"type": "Prepend", "prepend": "▁"});
    let legacy = json!({"type": "Sequence", "normalizers": [prepend, mark]});
    let metaspace = |scheme: &str, split: bool| json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": split});
    let split = json!({"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": false});
    let mut no_bytes = marked_tokenizer(legacy.clone(), Value::Null);
    no_bytes["model"]["byte_fallback"] = json!(false);
    let mut unigram = marked_tokenizer(Value::Null, metaspace("always", true));
    let vocab = unigram["model"]["vocab"].as_object().unwrap().clone();
    let scored: Vec<Value> =
        vocab.keys().map(|token| json!([token, -1.0 / token.len() as f64 - 1.0])).collect();
    unigram["model"] =
        json!({"type": "Unigram", "unk_id": 0, "byte_fallback": true, "vocab": scored});
    let mut bert = marked_tokenizer(
        json!({"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true, "strip_accents": null, "lowercase": true}),
        json!({"type": "BertPreTokenizer"}),
    );
    let mut words = vocab.clone();
    vocab.keys().for_each(|token| drop(words.insert(format!("##{token}"), json!(words.len() + 9))));
    bert["model"] = json!({"type": "WordPiece", "unk_token": "<unk>", "continuing_subword_prefix": "##",
                           "max_input_chars_per_word": 100, "vocab": words});
    vec![
        ("llama2", open(&marked_tokenizer(legacy, Value::Null))),
        ("llama2 without bytes", open(&no_bytes)),
        ("gemma", open(&marked_tokenizer(mark, split))),
        ("metaspace", open(&marked_tokenizer(Value::Null, metaspace("first", false)))),
        ("metaspace, always", open(&marked_tokenizer(Value::Null, metaspace("always", false)))),
        ("metaspace words", open(&marked_tokenizer(Value::Null, metaspace("first", true)))),
        ("unigram", open(&unigram)),
        ("bert", open(&bert)),
    ]
}

/// The tokenizers that texts are cut for, by the words that they make.
fn tokenizers() -> Vec<(&'static str, Tokenizer)> {
    let split = |pattern| {
        json!([
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false}
        ])
    };
    let digits = json!([
        {"type": "Digits", "individual_digits": true},
        {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true}
    ]);
    let runs = json!([
        {"type": "Digits", "individual_digits": false},
        {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true}
    ]);
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/SmolLM2-135M-Instruct");
    vec![
        ("bytes", open(&byte_tokenizer())),
        ("gpt2", open(&joining_tokenizer())),
        ("gpt2 with digits", open(&with_steps(digits, Value::Null))),
        ("gpt2 with numbers", open(&with_steps(runs, Value::Null))),
        ("llama3", open(&with_steps(split(LLAMA3), Value::Null))),
        ("qwen", open(&with_steps(split(QWEN), json!({"type": "NFC"})))),
        ("smollm2", Tokenizer::open(&model).unwrap().expect("run scripts/fetch-model first")),
    ]
}

const FRAGMENTS: [&str; 46] = [
    "▁",
    "a▁",
    "a",
    "e",
    "es",
    "a'll",
    "'s",
    "'",
    "'S",
    "it's",
    " ",
    " ",
    "  ",
    "   ",
    "\n",
    "\n",
    "\n\n",
    "\r\n",
    "\r",
    "\t",
    "\u{a0}",
    "\u{2003}",
    "\u{85}",
    "\u{2028}",
    "\u{200b}",
    "\u{feff}",
    "1",
    "12",
    "1234567",
    "!",
    "!!",
    "?!",
    "...",
    "é",
    "e\u{301}",
    "\u{301}",
    "\u{345}",
    "日本語",
    "。",
    "ｶﾞ",
    "각",
    "\u{1100}\u{1161}",
    "🙂",
    "👩‍👩‍👧",
    "<|im_end|>",
    "<|im_start|>",
];

struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % n
    }
}

fn texts() -> Vec<String> {
    let mut random = Random(5);
    let mut texts: Vec<String> = [
        "",
        " ",
        "a",
        "\n",
        "aaaaaaaaaaaaaaaaaaaaaaaaaaaa",
        "                        ",
        "\n\n\n\n\n\n\n\n\n\n\n\n",
        "a b c d e f g h",
        "a\nb\nc\n\nd\n\n\ne",
        " \n \n \n",
        "111 222 3333 44444",
        "!\n/\n!a\n'\ns",
        "a \n a\n a\n\ta",
    ]
    .map(str::to_owned)
    .to_vec();
    texts.extend((0..400).map(|_| {
        (0..1 + random.below(14)).map(|_| FRAGMENTS[random.below(FRAGMENTS.len())]).collect()
    }));
    // Every three fragments in a row, so that every cut is tried between everything.
    for a in FRAGMENTS {
        for b in [" ", "\n"] {
            texts.extend(FRAGMENTS.iter().map(|c| format!("a{a}{b}{c}e")));
        }
    }
    texts
}

#[test]
fn pieces_have_the_ids_of_the_whole() {
    let texts = texts();
    for (name, tokenizer) in tokenizers().into_iter().chain(marked_tokenizers()) {
        for (index, text) in texts.iter().enumerate() {
            // The many short ones have one cut or two: a piece is as short as it can be.
            let maxes: &[usize] = if index < 400 { &[1, 2, 3, 5, 8, 13] } else { &[1] };
            let (special, edges) = [(Special::Parse, true), (Special::Plain, false)][index % 2];
            let encode = |max| tokenizer.encode_by(text, special, edges, max).unwrap();
            let whole = encode(WHOLE);
            for &max in maxes {
                assert_eq!(encode(max), whole, "{name}: {text:?} in pieces of {max}");
            }
        }
    }
}

/// The test above sees a cut that is none: in these tokenizers most others change ids.
#[test]
fn other_cuts_would_be_seen() {
    for (name, tokenizer) in tokenizers().into_iter().skip(1) {
        let whole = |text: &str| tokenizer.encode_by(text, Special::Plain, false, WHOLE).unwrap();
        for text in ["aa", "a !", "!\n\n", "  ", "\n\n", " a", "''"] {
            let pieces: Vec<u32> =
                text.char_indices().flat_map(|(i, c)| whole(&text[i..i + c.len_utf8()])).collect();
            if text != "a !" && !(text == "!\n\n" && name.starts_with("gpt2")) {
                assert_ne!(pieces, whole(text), "{name}: {text:?}");
            }
        }
    }
}

/// A tokenizer that may look across a cut keeps its texts whole; what shows it is that a piece of one byte is no
/// other than the whole where an added token spans the cut, takes in white space or minds its neighbours.
#[test]
fn steps_that_look_across_rule_out_cuts() {
    let added = |content: &str, flag: &str, normalized: bool| {
        let mut token = json!({"id": 258, "content": content, "single_word": false, "lstrip": false,
                               "rstrip": false, "normalized": normalized, "special": false});
        if !flag.is_empty() {
            token[flag] = json!(true);
        }
        let mut json = joining_tokenizer();
        json["added_tokens"][1] = token;
        json
    };
    let mut prefix_space = joining_tokenizer();
    prefix_space["pre_tokenizer"]["add_prefix_space"] = json!(true);
    let unknown = json!([
        {"type": "Split", "pattern": {"Regex": r"\S+\s*|\s+"}, "behavior": "Isolated", "invert": false},
        {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false}
    ]);
    let bytes_first = json!([
        {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
        {"type": "Split", "pattern": {"Regex": LLAMA3}, "behavior": "Isolated", "invert": false}
    ]);
    let mut no_words = joining_tokenizer();
    no_words["pre_tokenizer"] = Value::Null;
    let prepend = json!({"type": "Prepend", "prepend": "a"});
    let strip = json!({"type": "Strip", "strip_left": true, "strip_right": true});
    let level = json!([{"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true}]);
    let cases = [
        ("a token that spans a cut", added("a b", "", false)),
        ("a normalized token that spans a cut", added("a b", "", true)),
        ("a token across lines", added("a\nb", "", false)),
        ("a token that takes in white space behind it", added("<x>", "rstrip", false)),
        ("a token that takes in white space in front", added("<x>", "lstrip", false)),
        ("a token that is a word", added("b", "single_word", false)),
        ("a space in front of a text", prefix_space),
        ("an unknown pattern", with_steps(unknown, Value::Null)),
        ("bytes before words", with_steps(bytes_first, Value::Null)),
        ("no words", no_words),
        ("a prefix", with_steps(level.clone(), prepend)),
        ("stripped ends", with_steps(level, strip)),
    ];
    for (name, json) in cases {
        let tokenizer = open(&json);
        for text in
            texts().iter().map(String::as_str).chain(["a b", "a\nb", "<x> b <x>", "ab b\nb"])
        {
            let encode = |max| tokenizer.encode_by(text, Special::Parse, true, max).unwrap();
            assert_eq!(encode(1), encode(WHOLE), "{name}: {text:?}");
        }
    }
}

/// What is said of NFC in the proof, of every character.
#[test]
fn normalisation_stays_on_its_side_of_a_cut() {
    let nfc = |text: &str| {
        let mut text = NormalizedString::from(text);
        NFC.normalize(&mut text).unwrap();
        text.get().to_owned()
    };
    let mut whitespace = BTreeSet::new();
    // What is not assigned, or for private use, is left alone.
    for c in ('\0'..='\u{323af}').chain('\u{e0000}'..='\u{e0fff}') {
        let alone = nfc(&c.to_string());
        assert!(alone.chars().all(|n| n.is_whitespace() == c.is_whitespace()), "{c:?}");
        if c.is_whitespace() {
            whitespace.insert(c);
            assert_eq!(alone.chars().count(), 1, "{c:?}");
        }
        assert_eq!(nfc(&format!("a{c} e")), format!("{} e", nfc(&format!("a{c}"))), "{c:?}");
        assert_eq!(nfc(&format!("a\n{c}e")), format!("a\n{}", nfc(&format!("{c}e"))), "{c:?}");
    }
    assert!(whitespace.contains(&' ') && whitespace.contains(&'\n') && whitespace.len() < 30);
}
