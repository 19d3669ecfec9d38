//! A saved session belongs to a config and a tokenizer, and with others it is refused.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use loris::loader::{Checkpoint, ModelConfig, Tokenizer};
use loris::{Error, Model, SessionOptions};
use serde_json::{Map, Value, json};

use crate::old::old;
use crate::support::{FIXTURES, bits, checkpoint, fixture, open, options};
use crate::{prompt, restore, save, seal};

/// Keys that no layer reads: whatever they say, a session goes on.
const NOT_READ: [&str; 10] = [
    "attention_dropout",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "initializer_range",
    "pad_token_id",
    "pretraining_tp",
    "torch_dtype",
    "transformers_version",
    "use_cache",
];

/// Keys that some fixture must have shown to be facts of the forward pass.
const READ: [&str; 10] = [
    "layer_types",
    "max_window_layers",
    "num_attention_heads",
    "rms_norm_eps",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "sliding_window",
    "tie_word_embeddings",
    "use_sliding_window",
];

type Config = Map<String, Value>;

fn read(name: &str) -> Config {
    serde_json::from_slice(&std::fs::read(fixture(name).join("config.json")).unwrap()).unwrap()
}

/// The fixture's weights with another config; `None` where they do not go together.
fn with_config(name: &str, config: &Config) -> Option<Model> {
    let bytes = serde_json::to_vec(config).unwrap();
    let config = ModelConfig::parse(&bytes, Path::new("config.json")).ok()?;
    let checkpoint = Checkpoint { config, ..checkpoint(name) };
    let engine = crate::support::engine(1);
    engine.open_checkpoint(checkpoint, &options(256)).ok()
}

/// What the model makes of a prompt, and the blob of that session.
fn run(model: &Model) -> Option<(Vec<u32>, Vec<u8>)> {
    let mut s = model.session(&SessionOptions::default()).unwrap();
    s.prefill(&prompt(1, 40)).ok()?;
    Some((bits(s.logits().unwrap()), save(&s)))
}

/// Other values for a key: near ones, and those that `seen` it has elsewhere.
fn others(value: &Value, seen: &[Value]) -> Vec<Value> {
    let mut others: Vec<Value> = seen.to_vec();
    match value {
        Value::Bool(flag) => others.push((!flag).into()),
        Value::Number(n) => match n.as_u64() {
            Some(n) => others.extend([n * 2, n / 2, n + 1, n.saturating_sub(1)].map(Value::from)),
            None => {
                others.extend(n.as_f64().iter().flat_map(|x| [x * 2.0, x / 2.0].map(Value::from)));
            }
        },
        Value::Object(map) => {
            for (key, inner) in map {
                for other in self::others(inner, &[]) {
                    let mut map = map.clone();
                    map.insert(key.clone(), other);
                    others.push(map.into());
                }
                let mut map = map.clone();
                map.remove(key);
                others.push(map.into());
            }
        }
        Value::Array(items) => {
            for kind in ["sliding_attention", "full_attention"] {
                others.push(vec![kind; items.len()].into());
            }
        }
        Value::Null | Value::String(_) => others.push(16.into()),
    }
    others.retain(|other| other != value);
    others
}

#[test]
fn a_config_that_computes_something_else_is_refused() {
    let mut seen: BTreeMap<String, Vec<Value>> = BTreeMap::new();
    for (key, value) in FIXTURES.iter().flat_map(|name| read(name)) {
        let values = seen.entry(key).or_default();
        if !values.contains(&value) {
            values.push(value);
        }
    }
    let (mut refused, mut n_opened) = (BTreeSet::new(), 0);
    let bases = FIXTURES.map(|name| (name, read(name)));
    // Layers with a window and layers without.
    let windows = ["qwen2", "qwen3"].map(|name| {
        let mut config = read(name);
        config["use_sliding_window"] = true.into();
        config["sliding_window"] = 24.into();
        (name, config)
    });
    for (name, config) in bases.into_iter().chain(windows) {
        let model = with_config(name, &config).unwrap();
        let (wanted, blob) = run(&model).unwrap();
        let mut cases: Vec<(&str, Config)> = Vec::new();
        for (key, seen) in &seen {
            let value = config.get(key).unwrap_or(&Value::Null);
            for other in others(value, seen) {
                let mut config = config.clone();
                config.insert(key.clone(), other);
                cases.push((key, config));
            }
            let mut config = config.clone();
            config.remove(key);
            cases.push((key, config));
        }
        // Other heads that fit the same matrices.
        let mut halves = config.clone();
        for (key, times) in
            [("num_attention_heads", 4), ("num_key_value_heads", 4), ("head_dim", 1)]
        {
            let number = |key| config.get(key).and_then(Value::as_u64);
            let divided = || Some(number("hidden_size")? / number("num_attention_heads")?);
            let n = number(key).or_else(divided).unwrap();
            halves.insert(key.into(), (n * times / 2).into());
        }
        cases.push(("num_attention_heads", halves));
        for (key, config) in cases {
            let Some(model) = with_config(name, &config) else { continue };
            n_opened += 1;
            let what = format!("{name}: {key}: {}", config.get(key).unwrap_or(&"absent".into()));
            let differs = run(&model).is_none_or(|(bits, _)| bits != wanted);
            match restore(&model, &blob) {
                Err(Error::SavedState { field: "fingerprint of the model's config", .. }) => {
                    assert!(!NOT_READ.contains(&key), "{what}: changes nothing and is refused");
                    refused.insert(key.to_owned());
                }
                Ok(_) => assert!(!differs, "{what}: computes something else and is restored"),
                Err(e) => assert!(!differs && !NOT_READ.contains(&key), "{what}: {e}"),
            }
        }
    }
    assert!(n_opened > 500, "{n_opened}");
    for key in READ {
        assert!(refused.contains(key), "{key} was never refused: {refused:?}");
    }
}

/// It is part of the file format.
#[test]
fn the_fingerprint_of_a_config_stays_what_it_is() {
    let of = |name: &str| checkpoint(name).config.fingerprint();
    assert_eq!(of("llama-yarn"), 11_243_552_623_188_598_492);
    assert_eq!(of("mistral-window"), 13_259_460_036_619_653_199);
}

/// A tokenizer of these words, ids from 0 on.
fn tokenizer(words: &[&str]) -> Option<Tokenizer> {
    let vocab: Config = words.iter().zip(0..).map(|(&word, id)| (word.into(), id.into())).collect();
    let file = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": null, "post_processor": null, "decoder": null,
        "model": { "type": "WordLevel", "unk_token": "a", "vocab": vocab },
    });
    Some(Tokenizer::parse(file.to_string().as_bytes(), Path::new("tokenizer.json")).unwrap())
}

#[test]
fn a_tokenizer_whose_ids_mean_something_else_is_refused() {
    let with =
        |tokenizer| open(Checkpoint { tokenizer, ..checkpoint("llama-tied") }, &options(256));
    let model = with(tokenizer(&["a", "b", "c"]));
    let (_, blob) = run(&model).unwrap();
    let empty = save(&model.session(&SessionOptions::default()).unwrap());
    for words in [&["a", "c", "b"][..], &["a", "b"], &["a", "b", "c", "d"]] {
        let other = with(tokenizer(words));
        let field = "fingerprint of the tokenizer's ids";
        match restore(&other, &blob) {
            Err(Error::SavedState { field: found, .. }) if found == field => {}
            other => panic!("{words:?}: {other:?}"),
        }
        assert!(
            restore(&other, &empty).is_ok(),
            "there is no token that could mean something else"
        );
    }
    // Read once more it is the same; and ids alone mean what the embedder says.
    assert!(restore(&with(tokenizer(&["a", "b", "c"])), &blob).is_ok());
    let bare = with(None);
    assert!(restore(&bare, &blob).is_ok());
    assert!(restore(&model, &run(&bare).unwrap().1).is_ok());
}

/// Files of before version 4 do not say with which config they were made.
#[test]
fn older_versions_are_restored_where_the_embedder_says_so() {
    let config = read("llama3-rope");
    let model = with_config("llama3-rope", &config).unwrap();
    let (wanted, blob) = run(&model).unwrap();
    let trusting = SessionOptions { trust_old_state: true, ..SessionOptions::default() };
    let mut other = config.clone();
    other["rope_theta"] = 1e4.into();
    let other = with_config("llama3-rope", &other).unwrap();
    for version in [1, 2, 3] {
        let with_shareable = |n: u64| {
            let mut blob = old(&blob);
            blob[8] = version;
            blob[48..56].copy_from_slice(&n.to_le_bytes());
            seal(&mut blob);
            blob
        };
        let old = with_shareable(40);
        for model in [&model, &other] {
            match restore(model, &old) {
                Err(e @ Error::SavedState { field: "version", .. }) => {
                    assert!(e.to_string().contains("trust_old_state"), "{e}");
                }
                other => panic!("version {version}: {other:?}"),
            }
        }
        let restored = model.restore(&mut &*old, &trusting).unwrap();
        assert!(bits(restored.logits().unwrap()) == wanted, "version {version}");
        assert!(save(&restored) == blob, "what is saved again is of this version");
        // Who says so is believed; weights are looked at all the same.
        assert!(other.restore(&mut &*old, &trusting).is_ok());
        let weights = open(checkpoint("llama-tied"), &options(256));
        match weights.restore(&mut &*old, &trusting) {
            Err(Error::SavedState { field: "fingerprint of the weights", .. }) => {}
            other => panic!("version {version}: {other:?}"),
        }
        match model.restore(&mut &*with_shareable(41), &trusting) {
            Err(Error::SavedState { field: "shareable tokens", .. }) => {}
            other => panic!("version {version}: {other:?}"),
        }
    }
    // What says of which config it is, is looked at even so.
    assert!(other.restore(&mut &*blob, &trusting).is_err());
    assert!(model.restore(&mut &*blob, &trusting).is_ok());
}
