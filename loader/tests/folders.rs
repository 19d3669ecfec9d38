//! Whole model folders, mutated: none panics, and what opens can be used.
//!
//! A folder is one of a few small valid ones; one to three of its JSON files or templates are changed, mostly as
//! values (another value, a key that some file knows, a part moved) and sometimes as bytes. The cases come from a
//! seed, so that each can be made again. A short run is a test; a long one is
//!
//! ```sh
//! TMPDIR=/dev/shm LORIS_FUZZ=10000000 LORIS_FUZZ_SEED=1 cargo test -p loris-loader --test folders -- --nocapture
//! ```
//!
//! With `LORIS_FUZZ_DUMP=cases.jsonl` every case is written with what was made of it, for `folders.py` beside the fixtures,
//! which asks `transformers` for its word.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod common;

use std::collections::BTreeMap;
use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use common::{Folder, Random, added, llama_tokenizer, tiny_config};
use loris_loader::{Chat, Checkpoint, Error, Message, OpenOptions, Special, open};
use serde_json::{Map, Value, json};

type Files = BTreeMap<&'static str, Vec<u8>>;

fn byte_level() -> Value {
    let mut tokenizer = llama_tokenizer("_", &json!([["h", "i"]]));
    tokenizer["normalizer"] = json!({"type": "NFC"});
    tokenizer["pre_tokenizer"] = json!({"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": "\\s+|\\w+"}, "behavior": "Isolated", "invert": false},
        {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false}]});
    tokenizer["decoder"] = json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true});
    tokenizer
}

fn words() -> Value {
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [added(0, "<unk>"), added(3, "<new>")],
        "normalizer": {"type": "Lowercase"}, "pre_tokenizer": {"type": "Whitespace"}, "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "unk_token": "<unk>", "vocab": {"<unk>": 0, "hi": 1, "user": 2}}
    })
}

fn unigram() -> Value {
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [added(0, "<unk>")],
        "normalizer": null, "post_processor": null,
        "pre_tokenizer": {"type": "Metaspace", "replacement": "_", "prepend_scheme": "always", "split": true},
        "decoder": {"type": "Metaspace", "replacement": "_", "prepend_scheme": "always", "split": true},
        "model": {"type": "Unigram", "unk_id": 0, "byte_fallback": false,
                  "vocab": [["<unk>", 0.0], ["_", -1.0], ["h", -2.0], ["i", -2.5], ["hi", -3.0]]}
    })
}

const TEMPLATES: [&str; 3] = [
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}",
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set s = messages[0].content %}{% endif %}{{ s|trim }}{{ eos_token }}",
    "{%- for message in messages -%}{{ '[' + message['role'] ~ ']' + message['content'] }}{%- endfor -%}{% if add_generation_prompt %}>{% endif %}",
];

/// Small folders that open.
fn bases() -> Vec<Files> {
    let mut bases = Vec::new();
    for (i, tokenizer) in
        [llama_tokenizer("_", &json!([["h", "i"]])), byte_level(), words(), unigram()]
            .into_iter()
            .enumerate()
    {
        for family in ["llama", "mistral", "qwen2", "qwen3"] {
            let mut config = tiny_config();
            config["model_type"] = family.into();
            config["architectures"] =
                json!([family[..1].to_uppercase() + &family[1..] + "ForCausalLM"]);
            let class = [
                "LlamaTokenizer",
                "Qwen2Tokenizer",
                "PreTrainedTokenizerFast",
                "TokenizersBackend",
            ][i];
            let token = json!({"content": "<unk>", "lstrip": false, "rstrip": false, "normalized": false,
                               "single_word": false, "special": true});
            let beside = json!({
                "tokenizer_class": class, "bos_token": "<unk>", "eos_token": "<unk>", "add_prefix_space": null,
                "additional_special_tokens": ["<|im_start|>", "<|im_end|>"], "model_max_length": 64,
                "clean_up_tokenization_spaces": false, "legacy": false, "chat_template": TEMPLATES[i % 3],
            });
            let mut beside_by_id = beside.clone();
            beside_by_id["added_tokens_decoder"] = json!({"0": token});
            let generation = json!({"eos_token_id": [2, 3], "do_sample": true, "temperature": 0.6, "top_k": 20,
                                    "top_p": 0.95, "repetition_penalty": 1.05, "num_beams": 1});
            let map = json!({"bos_token": token, "eos_token": "<unk>", "pad_token": "<unk>"});
            let text = |value: &Value| value.to_string().into_bytes();
            let mut files = Files::from([
                ("config.json", text(&config)),
                ("tokenizer.json", text(&tokenizer)),
                ("tokenizer_config.json", text(if i % 2 == 0 { &beside_by_id } else { &beside })),
                ("special_tokens_map.json", text(&map)),
                ("generation_config.json", text(&generation)),
            ]);
            if family.starts_with('q') {
                files.insert("chat_template.jinja", TEMPLATES[(i + 1) % 3].into());
                files.insert("added_tokens.json", b"{\"<unk>\": 0}".to_vec());
            }
            bases.push(files);
        }
    }
    bases
}

/// Keys that the files know, to be put where they are not.
const KEYS: &[&str] = &[
    "rope_scaling",
    "rope_parameters",
    "rope_theta",
    "rope_type",
    "type",
    "factor",
    "original_max_position_embeddings",
    "low_freq_factor",
    "high_freq_factor",
    "beta_fast",
    "attention_factor",
    "head_dim",
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
    "layer_types",
    "num_experts",
    "attention_bias",
    "quantization_config",
    "vocab_size",
    "max_position_embeddings",
    "eos_token_id",
    "pad_token_id",
    "tie_word_embeddings",
    "dtype",
    "added_tokens_decoder",
    "extra_special_tokens",
    "additional_special_tokens",
    "pad_token",
    "unk_token",
    "image_token",
    "add_prefix_space",
    "add_bos_token",
    "split_special_tokens",
    "content",
    "special",
    "normalized",
    "lstrip",
    "0",
    "5",
    "9",
    "suppress_tokens",
    "min_length",
    "num_beams",
    "truncation",
    "padding",
    "normalizer",
    "pre_tokenizer",
    "decoder",
    "post_processor",
    "model",
    "vocab",
    "merges",
    "dropout",
    "unk_id",
    "prefix",
    "cls",
    "sep",
    "pattern",
    "__type",
];

fn any_value(random: &mut Random) -> Value {
    let numbers = [0, 1, 2, 3, 7, -1, 16, 31, 32, 64, 255, 1 << 20, 1 << 32, i64::MAX, i64::MIN];
    let floats = [0.0, 0.5, 1.0, 4.0, 1e-9, 1e6, 1e30, -1.0, 1e308];
    let texts = [
        "",
        "<s>",
        "</s>",
        "<unk>",
        "<new>",
        "hi",
        " ",
        "_",
        "\u{2581}",
        "linear",
        "yarn",
        "dynamic",
        "llama3",
        "longrope",
        "AddedToken",
        "float16",
        "silu",
        "gelu",
        "full_attention",
        "sliding_attention",
        "é",
        "\u{0}",
        "😀",
        "LlamaTokenizer",
        "{{ bos_token }}",
        "Sequence",
        "ByteLevel",
        "Metaspace",
        "BPE",
        "Unigram",
        "WordPiece",
        "Replace",
        "(a+)+$",
        "[",
    ];
    match random.below(9) {
        0 => Value::Null,
        1 => json!(random.below(2) == 0),
        2 | 3 => json!(random.pick(&numbers)),
        4 => json!(random.pick(&floats)),
        5 | 6 => json!(random.pick(&texts)),
        7 => (0..random.below(3)).map(|_| any_value(random)).collect(),
        _ => {
            let mut map = Map::new();
            for _ in 0..random.below(4) {
                map.insert((*random.pick(KEYS)).into(), any_value(random));
            }
            Value::Object(map)
        }
    }
}

/// A part of a value.
fn part<'a>(value: &'a mut Value, random: &mut Random) -> &'a mut Value {
    let n = match &*value {
        Value::Array(list) => list.len(),
        Value::Object(map) => map.len(),
        _ => 0,
    };
    if n == 0 || random.below(4) == 0 {
        return value;
    }
    let i = random.below(n);
    match value {
        Value::Array(list) => part(&mut list[i], random),
        Value::Object(map) => part(map.values_mut().nth(i).unwrap(), random),
        other => other,
    }
}

fn change_value(root: &mut Value, random: &mut Random) {
    let kind = random.below(6);
    let other = part(root, random).clone();
    let at = part(root, random);
    match (kind, at) {
        (0, Value::Object(map)) if !map.is_empty() => {
            let key = map.keys().nth(random.below(map.len())).unwrap().clone();
            map.remove(&key);
        }
        (1 | 2, Value::Object(map)) => {
            map.insert((*random.pick(KEYS)).into(), any_value(random));
        }
        (0, Value::Array(list)) if !list.is_empty() => drop(list.remove(random.below(list.len()))),
        (1 | 2, Value::Array(list)) => list.push(any_value(random)),
        (3, at) => *at = other,
        (_, at) => *at = any_value(random),
    }
}

const JINJA: &[&str] = &[
    "{{",
    "}}",
    "{%",
    "%}",
    "{#",
    "#}",
    "-%}",
    "{%-",
    " for m in messages ",
    " endfor ",
    " if ",
    " else ",
    " endif ",
    "messages",
    "[0]",
    ".content",
    "['role']",
    "|trim",
    "|tojson",
    "|length",
    " ~ ",
    " + ",
    " * 9 ",
    " % ",
    "loop.index",
    " set x = ",
    "namespace(a=1)",
    "range(9)",
    "raise_exception('x')",
    "strftime_now('%Y')",
    "(",
    ")",
    "[",
    "]",
    "{",
    "}",
    "'",
    "\"",
    "\n",
    " in ",
    " is defined",
    "not ",
    "macro f(a)",
    "endmacro",
    "call",
    "bos_token",
    "x.y",
    ".split('a')",
    "[::-1]",
    "[1:]",
    "none",
    "true",
    "1",
    "0.5",
    "<|im_start|>",
    "é",
    "\u{0}",
];

fn change_text(bytes: &mut Vec<u8>, pool: &[&str], random: &mut Random) {
    let at = random.below(bytes.len() + 1);
    match random.below(5) {
        0 => bytes.truncate(at),
        1 if at < bytes.len() => bytes[at] ^= 1 << random.below(8),
        2 => {
            let end = (at + random.below(12)).min(bytes.len());
            bytes.drain(at..end);
        }
        _ => {
            let piece = random.pick(pool).as_bytes();
            bytes.splice(at..at, piece.iter().copied());
        }
    }
}

fn mutate(files: &mut Files, random: &mut Random) {
    for _ in 0..=random.below(3) {
        let names: Vec<&'static str> = files.keys().copied().collect();
        let name = *random.pick(&names);
        let bytes = files.get_mut(name).unwrap();
        if name.ends_with(".jinja") {
            for _ in 0..=random.below(3) {
                change_text(bytes, JINJA, random);
            }
        } else if let Some(mut value) =
            serde_json::from_slice::<Value>(bytes).ok().filter(|_| random.below(12) > 0)
        {
            for _ in 0..=random.below(2) {
                change_value(&mut value, random);
            }
            if random.below(4) == 0
                && let Some(Value::String(template)) = value.get_mut("chat_template")
            {
                let mut text = std::mem::take(template).into_bytes();
                change_text(&mut text, JINJA, random);
                *template = String::from_utf8_lossy(&text).into_owned();
            }
            *bytes = value.to_string().into_bytes();
        } else if random.below(4) == 0 {
            files.remove(name);
        } else {
            change_text(
                bytes,
                &[
                    "\"", "{", "}", "[", "]", ",", ":", "1", "e9", "null", " ", "\\u0000",
                    "\u{feff}",
                ],
                random,
            );
        }
    }
}

const TEXTS: [&str; 3] = ["hi", " hi<s>hi</s> user <new>\n", "é😀 <|im_start|>x<|im_end|>"];

/// What a folder is good for: each part's answer, or that it was refused.
fn use_folder(checkpoint: &Checkpoint) -> Value {
    let mut out = json!({});
    if let Some(tokenizer) = &checkpoint.tokenizer {
        let ids: Vec<_> =
            TEXTS.iter().map(|text| tokenizer.encode(text, Special::Parse).ok()).collect();
        for ids in ids.iter().flatten() {
            drop(tokenizer.decode(ids, Special::Parse));
        }
        drop(tokenizer.encode(TEXTS[1], Special::Plain));
        out["prompt"] = json!(tokenizer.encode_prompt(TEXTS[0], Special::Parse).ok());
        out["ids"] = json!(ids);
        if let Some(template) = &checkpoint.chat {
            let chat = Chat::new([Message::new("system", " hi "), Message::new("user", "<s>hi")]);
            out["chat"] = json!(template.render(&chat).ok());
            drop(template.encode(tokenizer, &chat));
        }
    }
    out
}

struct Run {
    folder: Folder,
    on_disk: Files,
}

impl Run {
    fn new() -> Run {
        let folder = Folder::tiny();
        folder.remove("config.json");
        Run { folder, on_disk: Files::new() }
    }

    /// Makes the folder hold these files, and opens it.
    fn open(&mut self, files: &Files) -> Result<Checkpoint, Error> {
        for name in self.on_disk.keys().filter(|name| !files.contains_key(*name)) {
            self.folder.remove(name);
        }
        for (name, bytes) in
            files.iter().filter(|(name, bytes)| self.on_disk.get(*name) != Some(*bytes))
        {
            self.folder.write(name, bytes);
        }
        self.on_disk.clone_from(files);
        open(self.folder.path(), &OpenOptions::default())
    }
}

/// Where the latest panic was.
static LAST: Mutex<String> = Mutex::new(String::new());

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().map_or(default, |text| text.parse().unwrap())
}

#[test]
fn mutated_folders_never_panic() {
    let (count, seed) = (number("LORIS_FUZZ", 2_000), number("LORIS_FUZZ_SEED", 1));
    let mut dump =
        std::env::var_os("LORIS_FUZZ_DUMP").map(|path| std::fs::File::create(path).unwrap());
    let bases = bases();
    let mut run = Run::new();
    for base in &bases {
        run.open(base).unwrap();
    }
    // The panics of foreign code are errors by the time that they are seen; only those that get through are said.
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|info| {
        *LAST.lock().unwrap() = info.location().map(ToString::to_string).unwrap_or_default();
    }));
    let (mut opened, mut slowest) = (0_u64, Duration::ZERO);
    let mut failed = None;
    let started = Instant::now();
    for case in 0..count {
        let mut random = Random::seeded(seed.wrapping_mul(1 << 40).wrapping_add(case));
        random.next();
        let mut files = random.pick(&bases).clone();
        mutate(&mut files, &mut random);
        let since = Instant::now();
        let result = catch_unwind(AssertUnwindSafe(|| {
            run.open(&files)
                .map(|checkpoint| use_folder(&checkpoint))
                .map_err(|error| error.to_string())
        }));
        slowest = slowest.max(since.elapsed());
        let Ok(result) = result else {
            failed = Some((case, files));
            break;
        };
        opened += u64::from(result.is_ok());
        if let Some(dump) = &mut dump {
            let text = |bytes: &Vec<u8>| String::from_utf8(bytes.clone()).ok();
            let files: BTreeMap<_, _> =
                files.iter().map(|(name, bytes)| (name, text(bytes))).collect();
            let row = match result {
                Ok(made) => json!({"case": case, "files": files, "made": made}),
                Err(error) => json!({"case": case, "files": files, "error": error}),
            };
            writeln!(dump, "{row}").unwrap();
        }
        if case % 100_000 == 99_999 {
            println!(
                "{} cases, {opened} opened, {:.0} a second",
                case + 1,
                (case + 1) as f64 / started.elapsed().as_secs_f64()
            );
        }
    }
    std::panic::set_hook(hook);
    if let Some((case, files)) = failed {
        let shown: BTreeMap<_, _> =
            files.iter().map(|(name, bytes)| (name, String::from_utf8_lossy(bytes))).collect();
        panic!("case {case} of seed {seed} panics at {}: {shown:#?}", LAST.lock().unwrap());
    }
    let rate = count as f64 / started.elapsed().as_secs_f64();
    println!(
        "{count} cases of seed {seed}: {opened} opened, {rate:.0} a second, the slowest took {slowest:?}"
    );
    assert!(opened > count / 20 && opened < count, "{opened} of {count} opened");
}
