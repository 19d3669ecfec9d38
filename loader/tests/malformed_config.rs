//! Malformed configurations, each named for its fault, in the manner of `malformed.rs`.
#![allow(clippy::unwrap_used, clippy::semicolon_if_nothing_returned)]

mod common;

use common::{Row, check, tiny_config};
use serde_json::{Value, json};

const CONFIG: &str = "config.json";

const CONFIGS: &[Row] = &[
    ("no config", "Io", &[CONFIG], |f| f.remove(CONFIG)),
    ("config is empty", "Json", &[CONFIG], |f| f.write(CONFIG, "")),
    ("config is a list", "Json", &[CONFIG, "a list"], |f| f.write(CONFIG, "[1,2,3,4,5,6,7,8,9]")),
    ("config holds NaN", "Json", &[CONFIG], |f| f.write(CONFIG, r#"{"rms_norm_eps": NaN}"#)),
    ("config key twice", "Json", &[CONFIG, "vocab_size"], |f| {
        f.write(CONFIG, r#"{"vocab_size": 1, "vocab_size": 2}"#);
    }),
    ("config over a mebibyte", "TooLarge", &[CONFIG, "1048576"], |f| {
        f.write(CONFIG, format!("{}{}", tiny_config(), " ".repeat(1 << 20)));
    }),
    (
        "unknown architecture",
        "Unsupported",
        &[CONFIG, "MambaForCausalLM", "LlamaForCausalLM"],
        |f| {
            f.set("architectures", json!(["MambaForCausalLM"]));
        },
    ),
    ("unknown family", "Unsupported", &[CONFIG, "model_type", "gemma"], |f| {
        f.set("model_type", json!("gemma"))
    }),
    ("architecture and family differ", "Value", &[CONFIG, "model_type", "qwen2"], |f| {
        f.set("model_type", json!("qwen2"));
    }),
    ("multimodal", "Unsupported", &[CONFIG, "text_config"], |f| f.set("text_config", json!({}))),
    ("quantised", "Quantised", &[CONFIG, "quantization_config"], |f| {
        f.set("quantization_config", json!({"quant_method": "fp8"}));
    }),
    ("unknown activation", "Unsupported", &[CONFIG, "hidden_act", "gelu", "silu"], |f| {
        f.set("hidden_act", json!("gelu"));
    }),
    ("attention bias", "Unsupported", &[CONFIG, "attention_bias"], |f| {
        f.set("attention_bias", json!(true))
    }),
    ("mlp bias", "Unsupported", &[CONFIG, "mlp_bias"], |f| f.set("mlp_bias", json!(true))),
    ("no layers", "Value", &[CONFIG, "num_hidden_layers", "1 to 1024", "found 0"], |f| {
        f.set("num_hidden_layers", json!(0));
    }),
    ("a billion layers", "Value", &[CONFIG, "num_hidden_layers", "1000000000"], |f| {
        f.set("num_hidden_layers", json!(1_000_000_000));
    }),
    ("layers missing", "Value", &[CONFIG, "num_hidden_layers", "found null"], |f| {
        f.set("num_hidden_layers", Value::Null);
    }),
    ("layers as a string", "Value", &[CONFIG, "num_hidden_layers", "\"2\""], |f| {
        f.set("num_hidden_layers", json!("2"));
    }),
    ("layers as a float", "Value", &[CONFIG, "num_hidden_layers", "2.0"], |f| {
        f.set("num_hidden_layers", json!(2.0))
    }),
    ("negative heads", "Value", &[CONFIG, "num_attention_heads", "-1"], |f| {
        f.set("num_attention_heads", json!(-1));
    }),
    ("kv heads do not divide", "Value", &[CONFIG, "num_key_value_heads", "found 3"], |f| {
        f.set("num_key_value_heads", json!(3));
    }),
    (
        "heads do not divide hidden",
        "Value",
        &[CONFIG, "num_attention_heads", "hidden_size = 16"],
        |f| {
            let mut config = tiny_config();
            config["num_attention_heads"] = json!(3);
            config["num_key_value_heads"] = json!(3);
            f.write(CONFIG, config.to_string());
        },
    ),
    ("odd head_dim", "Value", &[CONFIG, "head_dim", "found 3"], |f| f.set("head_dim", json!(3))),
    ("head_dim of 514", "Value", &[CONFIG, "head_dim", "514"], |f| f.set("head_dim", json!(514))),
    ("huge hidden size", "Value", &[CONFIG, "hidden_size"], |f| {
        f.set("hidden_size", json!(1u64 << 40))
    }),
    ("no vocabulary", "Value", &[CONFIG, "vocab_size"], |f| f.set("vocab_size", json!(0))),
    ("no context", "Value", &[CONFIG, "max_position_embeddings"], |f| {
        f.set("max_position_embeddings", json!(0))
    }),
    ("eps of 0", "Value", &[CONFIG, "rms_norm_eps"], |f| f.set("rms_norm_eps", json!(0.0))),
    ("negative theta", "Value", &[CONFIG, "rope_theta", "-1"], |f| {
        f.set("rope_theta", json!(-1.0))
    }),
    ("theta as text", "Value", &[CONFIG, "rope_theta", "NaN"], |f| {
        f.set("rope_theta", json!("NaN"))
    }),
    (
        "unknown rope type",
        "Unsupported",
        &[CONFIG, "rope_scaling.rope_type", "magic", "yarn"],
        |f| {
            f.set("rope_scaling", json!({"rope_type": "magic", "factor": 2.0}));
        },
    ),
    ("longrope", "Unsupported", &[CONFIG, "longrope"], |f| {
        f.set("rope_scaling", json!({"type": "longrope"}))
    }),
    ("rope factor missing", "Value", &[CONFIG, "rope_scaling.factor", "nothing"], |f| {
        f.set("rope_scaling", json!({"rope_type": "linear"}));
    }),
    ("rope factor below 1", "Value", &[CONFIG, "rope_scaling.factor", "0.5"], |f| {
        f.set("rope_scaling", json!({"rope_type": "linear", "factor": 0.5}));
    }),
    ("llama3 factors reversed", "Value", &[CONFIG, "high_freq_factor"], |f| {
        let scaling = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0});
        f.set("rope_scaling", scaling);
    }),
    ("two thetas", "Value", &[CONFIG, "rope_parameters.rope_theta"], |f| {
        f.set("rope_parameters", json!({"rope_type": "default", "rope_theta": 5.0}));
    }),
    ("rope per layer type", "Unsupported", &[CONFIG, "rope_parameters"], |f| {
        let nested = json!({"full_attention": {"rope_theta": 1e4}, "sliding_attention": {"rope_theta": 1e6}});
        f.set("rope_parameters", nested);
    }),
    ("partial rotary", "Value", &[CONFIG, "partial_rotary_factor", "0.5"], |f| {
        f.set("partial_rotary_factor", json!(0.5));
    }),
    ("window on llama", "Unsupported", &[CONFIG, "sliding_window"], |f| {
        f.set("sliding_window", json!(8))
    }),
    ("layer types too few", "Value", &[CONFIG, "layer_types"], |f| f.set("layer_types", json!([]))),
    ("unknown layer type", "Unsupported", &[CONFIG, "layer_types"], |f| {
        f.set("layer_types", json!(["linear_attention"]));
    }),
    ("fp8 dtype", "Unsupported", &[CONFIG, "torch_dtype", "float8"], |f| {
        f.set("torch_dtype", json!("float8_e4m3fn"));
    }),
    ("temperature below 0", "Value", &["generation_config.json", "temperature", "-1"], |f| {
        f.write("generation_config.json", r#"{"temperature": -1.0}"#);
    }),
    ("generation config is a list", "Json", &["generation_config.json"], |f| {
        f.write("generation_config.json", "[]")
    }),
];

#[test]
fn malformed_configurations_are_refused() {
    check(CONFIGS);
}
