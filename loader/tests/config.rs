//! The quirks of config.json, and the RoPE frequencies of `transformers`.
#![allow(clippy::unwrap_used)]

mod common;

use std::path::Path;

use common::tiny_config;
use loris_loader::{Architecture, Dtype, ModelConfig, RopeConfig, RopeScaling};
use serde_json::{Value, json};

/// The tiny configuration with these keys set; a key given as "-" is removed.
fn config(changes: Value) -> ModelConfig {
    let mut config = tiny_config();
    for (key, value) in changes.as_object().unwrap() {
        match value.as_str() {
            Some("-") => drop(config.as_object_mut().unwrap().remove(key)),
            _ => config[key] = value.clone(),
        }
    }
    ModelConfig::parse(config.to_string().as_bytes(), Path::new("config.json")).unwrap()
}

fn qwen(version: u32, changes: Value) -> ModelConfig {
    let mut all = json!({
        "architectures": [format!("Qwen{version}ForCausalLM")], "model_type": format!("qwen{version}"),
        "num_hidden_layers": 4
    });
    for (key, value) in changes.as_object().unwrap() {
        all[key] = value.clone();
    }
    config(all)
}

fn mistral(changes: Value) -> ModelConfig {
    let mut all = json!({"architectures": ["MistralForCausalLM"], "model_type": "mistral", "num_hidden_layers": 2});
    for (key, value) in changes.as_object().unwrap() {
        all[key] = value.clone();
    }
    config(all)
}

#[test]
fn head_dim_is_explicit_or_divided() {
    assert_eq!(config(json!({})).head_dim, 8);
    assert_eq!(config(json!({"head_dim": null})).head_dim, 8);
    assert_eq!(config(json!({"head_dim": 64})).head_dim, 64);
    assert_eq!(
        config(json!({"head_dim": 64, "num_attention_heads": 3, "num_key_value_heads": 3}))
            .head_dim,
        64
    );
    assert_eq!(qwen(3, json!({})).head_dim, 128, "the family's own default");
}

#[test]
fn kv_heads_default_to_heads() {
    assert_eq!(config(json!({})).n_kv_heads, 1);
    assert_eq!(config(json!({})).group_size(), 2);
    assert_eq!(config(json!({"num_key_value_heads": null})).n_kv_heads, 2);
    assert_eq!(config(json!({"num_key_value_heads": "-"})).n_kv_heads, 2);
}

#[test]
fn families_have_their_biases_and_norms() {
    let flags = |c: &ModelConfig| (c.qkv_bias, c.qk_norm);
    assert_eq!(flags(&config(json!({}))), (false, false));
    assert_eq!(flags(&mistral(json!({}))), (false, false));
    assert_eq!(flags(&qwen(2, json!({}))), (true, false));
    assert_eq!(
        flags(&qwen(2, json!({"attention_bias": true}))),
        (true, false),
        "not read by the family"
    );
    assert_eq!(flags(&qwen(3, json!({}))), (false, true));
    assert_eq!(config(json!({"architectures": "-"})).architecture, Architecture::Llama);
    assert_eq!(config(json!({"model_type": "-"})).architecture, Architecture::Llama);
}

#[test]
fn windows_follow_every_key() {
    assert_eq!(config(json!({})).windows, [None]);
    assert_eq!(mistral(json!({"sliding_window": null})).windows, [None, None]);
    assert_eq!(mistral(json!({"sliding_window": 24})).windows, [Some(24); 2]);
    assert_eq!(
        mistral(json!({})).windows,
        [Some(4096); 2],
        "the family's default where the key is absent"
    );
    let off = json!({"use_sliding_window": false, "sliding_window": 8, "max_window_layers": 0});
    assert_eq!(qwen(2, off).windows, [None; 4]);
    let on = json!({"use_sliding_window": true, "sliding_window": 8, "max_window_layers": 3});
    assert_eq!(qwen(2, on).windows, [None, None, None, Some(8)]);
    let types =
        json!(["full_attention", "sliding_attention", "full_attention", "sliding_attention"]);
    let on = json!({"use_sliding_window": true, "sliding_window": 8, "layer_types": types});
    assert_eq!(qwen(3, on).windows, [None, Some(8), None, Some(8)]);
    let off = json!({"use_sliding_window": false, "sliding_window": 8, "layer_types": types});
    assert_eq!(qwen(3, off).windows, [None; 4]);
}

#[test]
fn ids_are_a_number_a_list_or_null() {
    assert_eq!(config(json!({"eos_token_id": [7, 3, 7]})).eos_ids, [3, 7]);
    assert_eq!(config(json!({"eos_token_id": null})).eos_ids, [0u32; 0]);
    assert_eq!(config(json!({"bos_token_id": null})).bos_id, None);
    assert_eq!(config(json!({"pad_token_id": -1})).pad_id, None);
    assert_eq!(config(json!({"pad_token_id": 31})).pad_id, Some(31));
}

#[test]
fn generation_config_adds_and_advises() {
    let mut config = config(json!({}));
    let advice = json!({"eos_token_id": [2, 5], "do_sample": true, "temperature": 0.6, "top_k": 20, "top_p": 0.95});
    config
        .add_generation_config(advice.to_string().as_bytes(), Path::new("generation_config.json"))
        .unwrap();
    assert_eq!(config.eos_ids, [2, 5]);
    let advice = &config.generation;
    assert_eq!((advice.do_sample, advice.top_k, advice.top_p), (Some(true), Some(20), Some(0.95)));
    assert_eq!(
        (advice.temperature, advice.min_p, advice.repetition_penalty),
        (Some(0.6), None, None)
    );
}

#[test]
fn rope_is_read_from_old_and_new_keys() {
    let plain = |theta| RopeConfig { theta, scaling: RopeScaling::None };
    assert_eq!(config(json!({"rope_theta": "-"})).rope, plain(10_000.0));
    assert_eq!(config(json!({"rope_theta": 1e6, "rope_scaling": null})).rope, plain(1e6));
    let new =
        json!({"rope_theta": "-", "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}});
    assert_eq!(config(new).rope, plain(5e5));
    let linear = RopeScaling::Linear { factor: 2.0 };
    assert_eq!(
        config(json!({"rope_scaling": {"type": "linear", "factor": 2}})).rope.scaling,
        linear
    );
    assert_eq!(
        config(json!({"rope_scaling": {"rope_type": "linear", "factor": 2.0}})).rope.scaling,
        linear
    );
    let dynamic = json!({"rope_scaling": {"type": "dynamic", "factor": 2.0}});
    assert_eq!(
        config(dynamic).rope.scaling,
        RopeScaling::Dynamic { factor: 2.0, original_ctx: 64 }
    );
    let llama3 = json!({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 16}});
    let expected = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_ctx: 16,
    };
    assert_eq!(config(llama3).rope.scaling, expected);
}

/// Where loris refuses what the reference reads, and why: the key, and what the message holds. In all other rows both
/// refuse, or both accept with the same facts.
const STRICTER: &[(&str, &str)] = &[
    // Numbers that no model has.
    ("num_hidden_layers", "1 to 1024"),
    ("num_attention_heads", "1 to 1024"),
    ("num_attention_heads", "a divisor of"),
    ("num_key_value_heads", "1 to 1024"),
    ("num_key_value_heads", "a divisor of"),
    ("hidden_size", "1 to 131072"),
    ("hidden_size", "num_attention_heads: expected a divisor"),
    ("hidden_size", "head_dim: expected an even number"),
    ("intermediate_size", "1 to 1048576"),
    ("vocab_size", "1 to 4194304"),
    ("max_position_embeddings", "1 to 268435456"),
    ("head_dim", "2 to 512"),
    ("num_attention_heads", "head_dim: expected an even number"),
    ("rope_theta", "a number above 1"),
    ("sliding_window", "1 to 268435456"),
    ("max_window_layers", "0 to 1048576"),
    // Mathematics that is not done.
    ("hidden_act", "silu"),
    ("attention_bias", "not supported"),
    ("mlp_bias", "not supported"),
    ("rope_scaling", "partial rotary"),
    // Words that the reference passes over.
    ("sliding_window", "whose reference has no window"),
    ("layer_types", "entries that agree with sliding_window"),
    ("rope_scaling", "one set of parameters for all layers"),
    ("rope_parameters", "one set of parameters for all layers"),
    // Two keys that disagree, where the reference takes one in silence.
    ("rope_scaling", "that of the top level"),
    ("rope_parameters", "that of the top level"),
    // A scaling without its type or with null in it.
    ("rope_scaling", "a number from 1"),
    ("rope_parameters", "a number from 1"),
];

fn facts(c: &ModelConfig) -> Value {
    let windows: Vec<Value> = c.windows.iter().map(|w| json!(w)).collect();
    json!({
        "layers": c.n_layers, "heads": c.n_q_heads, "kv_heads": c.n_kv_heads, "hidden": c.hidden_dim,
        "ffn": c.ffn_dim, "vocab": c.vocab_size, "head_dim": c.head_dim, "tied": c.tied_embeddings, "windows": windows,
        "bos": c.bos_id, "pad": c.pad_id, "eos": c.eos_ids
    })
}

/// The same facts, of what the reference says; ids that no row has are none.
fn expected_facts(facts: &Value) -> Value {
    let vocab = facts["vocab"].as_i64().unwrap();
    let has_row = |id: &Value| id.as_i64().is_some_and(|id| (0..vocab).contains(&id));
    let one = |id: &Value| if has_row(id) { id.clone() } else { Value::Null };
    let eos = match &facts["eos"] {
        Value::Array(list) => list.clone(),
        Value::Null => vec![],
        one => vec![one.clone()],
    };
    let mut out = json!({"bos": one(&facts["bos"]), "pad": one(&facts["pad"])});
    out["eos"] = eos.into_iter().filter(has_row).collect();
    for key in
        ["layers", "heads", "kv_heads", "hidden", "ffn", "vocab", "head_dim", "tied", "windows"]
    {
        out[key] = facts[key].clone();
    }
    out
}

/// The reference's RoPE, read again by the other way of writing it.
fn same_rope(c: &ModelConfig, facts: &Value, family: &str) {
    let number = |key: &str| facts["rope"][key].as_f64();
    assert_eq!(c.rope.theta, number("rope_theta").unwrap());
    let original = facts["rope"]["original_max_position_embeddings"].as_u64().map(|n| n as usize);
    let max = facts["max_positions"].as_u64().unwrap() as usize;
    match (&c.rope.scaling, facts["rope"]["rope_type"].as_str().unwrap_or("default")) {
        (RopeScaling::None, "default") => assert_eq!(c.ctx_len, max),
        (RopeScaling::Linear { factor }, "linear" | "proportional") => {
            assert_eq!(*factor, number("factor").unwrap_or(1.0));
        }
        (RopeScaling::Dynamic { factor, original_ctx }, "dynamic") => {
            assert_eq!((Some(*factor), *original_ctx), (number("factor"), max));
        }
        (RopeScaling::Yarn { factor, original_ctx, truncate, attention_factor, .. }, "yarn") => {
            assert_eq!(Some(*original_ctx), original);
            assert_eq!(*factor, number("factor").unwrap_or(max as f64 / *original_ctx as f64));
            assert_eq!(*truncate, facts["rope"]["truncate"].as_bool().unwrap_or(true));
            assert_eq!(*attention_factor, number("attention_factor"));
        }
        (
            RopeScaling::Llama3 { factor, original_ctx, low_freq_factor, high_freq_factor },
            "llama3",
        ) => {
            assert_eq!((Some(*factor), Some(*original_ctx)), (number("factor"), original));
            assert_eq!(Some(*low_freq_factor), number("low_freq_factor"));
            assert_eq!(Some(*high_freq_factor), number("high_freq_factor"));
        }
        (found, expected) => panic!("{family}: {found:?}, expected {expected}: {facts}"),
    }
}

#[test]
fn configurations_are_read_as_in_transformers() {
    let file: Value = serde_json::from_str(include_str!("fixtures/configs.json")).unwrap();
    let rows = file["rows"].as_array().unwrap();
    let mut first = std::collections::BTreeMap::new();
    let (mut agreed, mut refused, mut stricter, mut wrong) = (0, 0, 0, Vec::new());
    for row in rows {
        let family = row["family"].as_str().unwrap();
        let class = family[..1].to_uppercase() + &family[1..] + "ForCausalLM";
        let mut config = file["small"].clone();
        config["model_type"] = family.into();
        config["architectures"] = json!([class]);
        let changes = row["changes"].as_object().unwrap();
        for (key, value) in changes {
            config[key] = value.clone();
        }
        config.as_object_mut().unwrap().retain(|_, value| value != "-");
        let read = ModelConfig::parse(config.to_string().as_bytes(), Path::new("config.json"));
        let base = first.entry(family).or_insert(&row["facts"]);
        let expected = row["facts"].as_object().map(|own| {
            let mut all = base.as_object().unwrap().clone();
            all.extend(own.clone());
            Value::Object(all)
        });
        match (read, &expected.unwrap_or_default()) {
            (Err(_), Value::Null) => refused += 1,
            (Ok(_), Value::Null) => wrong.push(format!("accepted: {row}")),
            (Err(error), _) => {
                let message = error.to_string();
                let known = |(key, part): &&(&str, &str)| {
                    changes.contains_key(*key) && message.contains(part)
                };
                match STRICTER.iter().find(known) {
                    Some(_) => stricter += 1,
                    None => wrong.push(format!("refused: {message}: {row}")),
                }
            }
            (Ok(c), expected) => {
                let (found, facts) = (facts(&c), expected_facts(expected));
                if found != facts {
                    wrong.push(format!("{found} is not {facts}: {}", row["changes"]));
                }
                assert_eq!(
                    f64::from(c.norm_eps),
                    f64::from(expected["eps"].as_f64().unwrap() as f32)
                );
                same_rope(&c, expected, family);
                agreed += 1;
            }
        }
    }
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), rows.len(), wrong.join("\n"));
    assert!(agreed > 300 && refused > 200 && stricter < 200, "{agreed} {refused} {stricter}");
}

#[test]
fn scaled_contexts_are_usable() {
    let ctx = |max: usize, rope: Value| {
        config(json!({"max_position_embeddings": max, "rope_scaling": rope})).ctx_len
    };
    let yarn = |more: Value| {
        let mut rope = json!({"rope_type": "yarn", "factor": 4.0});
        rope.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        rope
    };
    let qwen = json!({"original_max_position_embeddings": 32768});
    assert_eq!(ctx(32768, yarn(qwen.clone())), 131_072, "as the card of Qwen2.5 writes it");
    assert_eq!(ctx(40960, yarn(qwen.clone())), 131_072, "as the card of Qwen3 writes it");
    assert_eq!(ctx(131_072, yarn(qwen)), 131_072, "with the longer context said");
    assert_eq!(ctx(32768, yarn(json!({}))), 131_072);
    assert_eq!(ctx(4096, json!({"type": "linear", "factor": 2.5})), 10_240);
    assert_eq!(ctx(4096, json!({"type": "dynamic", "factor": 2})), 8192);
    let llama3 = json!({"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192});
    assert_eq!(ctx(131_072, llama3.clone()), 131_072, "a factor of frequencies");
    assert_eq!(ctx(8192, llama3), 262_144);
    assert_eq!(ctx(1 << 28, json!({"type": "linear", "factor": 1e8})), 1 << 28);
}

#[test]
fn defaults_of_the_family_end_answers_only_where_no_file_says_how() {
    let folder = common::Folder::tiny();
    let eos = |files: [Option<Value>; 2]| {
        let mut config = tiny_config();
        config.as_object_mut().unwrap().remove("eos_token_id");
        if let Some(id) = &files[0] {
            config["eos_token_id"] = id.clone();
        }
        folder.write("config.json", config.to_string());
        drop(std::fs::remove_file(folder.file("generation_config.json")));
        if let Some(generation) = &files[1] {
            folder.write("generation_config.json", generation.to_string());
        }
        ModelConfig::open(folder.path()).unwrap().eos_ids
    };
    assert_eq!(eos([None, None]), [2]);
    assert_eq!(eos([None, Some(json!({"eos_token_id": 7}))]), [7]);
    assert_eq!(eos([None, Some(json!({}))]), [0u32; 0]);
    assert_eq!(eos([Some(json!(3)), Some(json!({"eos_token_id": [7, -1, 99]}))]), [3, 7]);
}

#[test]
fn advice_that_decides_tokens_and_is_not_followed_is_refused_by_name() {
    let read = |text: &str| {
        config(json!({}))
            .add_generation_config(text.as_bytes(), Path::new("generation_config.json"))
    };
    for neutral in [
        r#"{"num_beams": 1, "min_length": 0, "no_repeat_ngram_size": 0, "suppress_tokens": [], "stop_strings": null}"#,
        r#"{"typical_p": 0.5, "epsilon_cutoff": 0.1, "do_sample": false}"#,
        r#"{"typical_p": 1.0, "do_sample": true, "guidance_scale": 1, "forced_eos_token_id": null}"#,
        r#"{"max_new_tokens": 7, "max_length": 9, "use_cache": true, "transformers_version": "4"}"#,
        r#"{"temperature": 0, "top_k": 0, "top_p": 0, "min_p": 1, "repetition_penalty": 1}"#,
        r#"{"do_sample": false, "temperature": 0.6, "top_p": null, "top_k": null}"#,
    ] {
        read(neutral).unwrap_or_else(|error| panic!("{neutral}: {error}"));
    }
    for (key, value) in [
        ("suppress_tokens", "[1]"),
        ("begin_suppress_tokens", "[1]"),
        ("bad_words_ids", "[[1]]"),
        ("forced_bos_token_id", "0"),
        ("min_new_tokens", "3"),
        ("num_beams", "4"),
        ("no_repeat_ngram_size", "2"),
        ("stop_strings", "[\"x\"]"),
        ("top_k", "-1"),
        ("repetition_penalty", "0"),
        ("top_p", "1.5"),
        ("temperature", "-1"),
        ("do_sample", "1"),
    ] {
        let message = read(&format!("{{\"{key}\": {value}}}")).unwrap_err().to_string();
        assert!(message.contains(key) && message.contains("generation_config.json"), "{message}");
    }
    assert!(read(r#"{"typical_p": 0.5, "do_sample": true}"#).is_err());
}

#[test]
fn dtype_has_two_names() {
    assert_eq!(config(json!({})).dtype, Some(Dtype::BF16));
    assert_eq!(config(json!({"torch_dtype": "-", "dtype": "float32"})).dtype, Some(Dtype::F32));
    assert_eq!(config(json!({"torch_dtype": "-"})).dtype, None);
}

#[test]
fn rope_frequencies_are_those_of_transformers() {
    let cases: Vec<Value> = serde_json::from_str(include_str!("fixtures/rope.json")).unwrap();
    assert!(cases.len() >= 12);
    for case in &cases {
        let head_dim = case["head_dim"].as_u64().unwrap() as usize;
        let config = config(json!({
            "rope_theta": "-", "rope_parameters": case["rope_parameters"], "head_dim": head_dim,
            "max_position_embeddings": case["max_position_embeddings"]
        }));
        let (inv_freq, factor) =
            config.rope.inv_freq(head_dim, case["seq_len"].as_u64().unwrap() as usize);
        let expected: Vec<f64> =
            case["inv_freq"].as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect();
        assert_eq!(inv_freq.len(), expected.len(), "{case}");
        for (ours, theirs) in inv_freq.iter().zip(&expected) {
            // Theirs is computed in float32.
            assert!(
                (ours - theirs).abs() <= 2e-6 * theirs.abs(),
                "{ours} {theirs} {}",
                case["rope_parameters"]
            );
        }
        assert!(
            (factor - case["factor"].as_f64().unwrap()).abs() < 1e-12,
            "{}",
            case["rope_parameters"]
        );
    }
}
