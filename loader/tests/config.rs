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
    assert_eq!(qwen(3, json!({"head_dim": null})).head_dim, 8);
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
    let nested = json!({"rope_theta": 7.0, "rope_type": "default"});
    let nested = json!({"full_attention": nested.clone(), "sliding_attention": nested});
    assert_eq!(config(json!({"rope_theta": "-", "rope_parameters": nested})).rope, plain(7.0));
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
