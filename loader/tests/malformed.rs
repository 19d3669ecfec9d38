//! Malformed model folders, each named for its fault: all are refused, with an error of the right kind that names the
//! file and the thing, and none with a panic.

mod common;

use common::{Folder, exact, raw, tiny_config, tiny_expected, tiny_weights, weights};
use serde_json::{Value, json};

/// Name of the fault, the error's variant (for safetensors the fault's), what the message must mention, and how to
/// break a valid folder.
type Row = (&'static str, &'static str, &'static [&'static str], fn(&Folder));

const FILE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const CONFIG: &str = "config.json";

fn header(f: &Folder, text: &str, data_len: usize) {
    f.write(FILE, raw(text, data_len));
}

fn tensor(dtype: &str, shape: &str, offsets: &str) -> String {
    format!(r#"{{"w":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}"#)
}

/// The tiny model with one tensor's entry replaced, or dropped.
fn with_tensor(f: &Folder, name: &str, replacement: Option<(&str, Vec<usize>)>) {
    let mut tensors: Vec<_> =
        tiny_expected().into_iter().map(|t| (t.name, "BF16", t.shape)).collect();
    tensors.retain(|t| t.0 != name);
    let replacement = replacement.map(|(dtype, shape)| {
        let dtype: &'static str = loris_loader::Dtype::from_name(dtype).unwrap().name();
        (name.to_owned(), dtype, shape)
    });
    // In order of element size, so that all are aligned.
    tensors.extend(replacement);
    tensors.sort_by_key(|t| std::cmp::Reverse(loris_loader::Dtype::from_name(t.1).unwrap().size()));
    f.write(FILE, weights(&tensors));
}

/// The tiny model in two shards, with the index changed by `change`.
fn sharded(f: &Folder, change: impl FnOnce(&mut Value)) {
    let all: Vec<_> = tiny_expected().into_iter().map(|t| (t.name, "BF16", t.shape)).collect();
    let (a, b) = all.split_at(4);
    f.remove(FILE);
    f.write("a.safetensors", weights(a));
    f.write("b.safetensors", weights(b));
    let place = |part: &[(String, &str, Vec<usize>)], shard: &str| -> Vec<(String, Value)> {
        part.iter().map(|t| (t.0.clone(), json!(shard))).collect()
    };
    let map: serde_json::Map<_, _> =
        place(a, "a.safetensors").into_iter().chain(place(b, "b.safetensors")).collect();
    let mut index = json!({"metadata": {"total_size": 1}, "weight_map": map});
    change(&mut index);
    f.write(INDEX, index.to_string());
}

const NORM: &str = "model.norm.weight";

const SAFETENSORS: &[Row] = &[
    ("empty file", "TooShort", &[FILE, "0 bytes"], |f| f.write(FILE, b"")),
    ("seven bytes", "TooShort", &[FILE, "7 bytes"], |f| f.write(FILE, [0; 7])),
    ("header length 0", "HeaderStart", &[FILE], |f| f.write(FILE, [0; 8])),
    ("header longer than the file", "HeaderTooLong", &[FILE, "400"], |f| {
        f.write(FILE, [&400u64.to_le_bytes()[..], b"{}"].concat());
    }),
    ("header length 2^64 - 1", "HeaderTooLong", &[FILE], |f| f.write(FILE, [0xff; 64])),
    ("leading space", "HeaderStart", &[FILE, "32"], |f| f.write(FILE, exact(" {}     ", 0))),
    ("byte order mark", "HeaderStart", &[FILE], |f| f.write(FILE, exact("\u{feff}{}   ", 0))),
    ("trailing newline", "HeaderEnd", &[FILE], |f| f.write(FILE, exact("{}     \n", 0))),
    ("trailing NUL", "HeaderEnd", &[FILE], |f| f.write(FILE, exact("{}     \0", 0))),
    ("text after the object", "Json", &[FILE], |f| header(f, "{}{}", 0)),
    ("header is a list", "HeaderStart", &[FILE], |f| header(f, "[]", 0)),
    ("header cut short", "HeaderEnd", &[FILE], |f| header(f, r#"{"w":{"dtype":"F32""#, 0)),
    ("nested ten thousand deep", "Json", &[FILE], |f| {
        header(f, &format!(r#"{{"w":{}{}}}"#, "[".repeat(10_000), "]".repeat(10_000)), 0);
    }),
    ("invalid UTF-8", "Json", &[FILE], |f| {
        let mut file = raw(r#"{"w":{}}"#, 0);
        file[10] = 0xff;
        f.write(FILE, file);
    }),
    ("tensor given twice", "DuplicateName", &[FILE, "tensor w"], |f| {
        let entry = r#""w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}"#;
        header(f, &format!("{{{entry},{entry}}}"), 4);
    }),
    ("tensor given twice, once escaped", "DuplicateName", &[FILE, "tensor w"], |f| {
        let entry = r#":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}"#;
        header(f, &format!(r#"{{"w"{entry},"\u0077"{entry}}}"#), 4);
    }),
    ("dtype given twice", "DuplicateKey", &[FILE, "tensor w", "dtype"], |f| {
        header(f, r#"{"w":{"dtype":"F32","dtype":"I32","shape":[1],"data_offsets":[0,4]}}"#, 4);
    }),
    ("unknown inner key", "UnknownKey", &[FILE, "tensor w", "stride"], |f| {
        header(f, r#"{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"stride":[1]}}"#, 4);
    }),
    ("dtype missing", "MissingKey", &[FILE, "tensor w", "dtype"], |f| {
        header(f, r#"{"w":{"shape":[1],"data_offsets":[0,4]}}"#, 4);
    }),
    ("shape missing", "MissingKey", &[FILE, "tensor w", "shape"], |f| {
        header(f, r#"{"w":{"dtype":"F32","data_offsets":[0,4]}}"#, 4);
    }),
    ("offsets missing", "MissingKey", &[FILE, "tensor w", "data_offsets"], |f| {
        header(f, r#"{"w":{"dtype":"F32","shape":[1]}}"#, 4);
    }),
    ("unknown dtype", "UnknownDtype", &[FILE, "tensor w", "F33"], |f| {
        header(f, &tensor("F33", "[1]", "[0,4]"), 4)
    }),
    ("dtype in lower case", "UnknownDtype", &[FILE, "f32"], |f| {
        header(f, &tensor("f32", "[1]", "[0,4]"), 4)
    }),
    ("empty name", "Name", &[FILE], |f| {
        header(f, r#"{"":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#, 4);
    }),
    ("name of 513 bytes", "Name", &[FILE, "513 bytes"], |f| {
        let name = "n".repeat(513);
        header(
            f,
            &format!(r#"{{"{name}":{{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}}}"#),
            4,
        );
    }),
    ("NUL in a name", "Name", &[FILE, "\\u{0}"], |f| {
        header(f, r#"{"a\u0000b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#, 4);
    }),
    ("escape code in a name", "Name", &[FILE, "\\u{1b}"], |f| {
        header(f, r#"{"\u001b[2J":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#, 4);
    }),
    ("rank 9", "Rank", &[FILE, "tensor w"], |f| {
        header(f, &tensor("F32", "[1,1,1,1,1,1,1,1,1]", "[0,4]"), 4)
    }),
    ("a million dimensions", "Rank", &[FILE, "tensor w"], |f| {
        let shape = format!("[{}1]", "1,".repeat(1_000_000));
        header(f, &tensor("F32", &shape, "[0,4]"), 4);
    }),
    ("dimension over 2^40", "Dim", &[FILE, "tensor w"], |f| {
        header(f, &tensor("F32", "[0,1099511627777]", "[0,0]"), 0);
    }),
    ("shape product overflows", "Overflow", &[FILE, "tensor w"], |f| {
        header(f, &tensor("F32", "[1099511627776,1099511627776]", "[0,4]"), 4);
    }),
    ("byte count overflows", "Overflow", &[FILE, "tensor w"], |f| {
        header(f, &tensor("F64", "[1099511627776,4194304]", "[0,4]"), 4);
    }),
    ("negative dimension", "Json", &[FILE, "-1"], |f| {
        header(f, &tensor("F32", "[-1]", "[0,4]"), 4)
    }),
    ("fractional dimension", "Json", &[FILE, "1.5"], |f| {
        header(f, &tensor("F32", "[1.5]", "[0,4]"), 4)
    }),
    ("dimension over 2^64", "Json", &[FILE], |f| {
        header(f, &tensor("F32", "[18446744073709551616]", "[0,4]"), 4);
    }),
    ("offsets past the end", "OffsetsOutside", &[FILE, "tensor w", "4 bytes"], |f| {
        header(f, &tensor("F32", "[2]", "[0,8]"), 4);
    }),
    ("offsets backwards", "OffsetsOutside", &[FILE, "tensor w"], |f| {
        header(f, &tensor("F32", "[1]", "[4,0]"), 4)
    }),
    ("offset 2^64 - 1", "OffsetsOutside", &[FILE, "tensor w"], |f| {
        header(f, &tensor("F32", "[1]", "[0,18446744073709551615]"), 4);
    }),
    ("three offsets", "Json", &[FILE], |f| header(f, &tensor("F32", "[1]", "[0,4,4]"), 4)),
    ("one offset", "Json", &[FILE], |f| header(f, &tensor("F32", "[1]", "[0]"), 4)),
    ("shape larger than its bytes", "Size", &[FILE, "tensor w", "8 bytes", "give 4"], |f| {
        header(f, &tensor("F32", "[2]", "[0,4]"), 4);
    }),
    ("hole at the start", "NotContiguous", &[FILE, "tensor w"], |f| {
        header(f, &tensor("F32", "[1]", "[4,8]"), 8)
    }),
    ("hole between", "NotContiguous", &[FILE, "tensor b", "no tensor owns"], |f| {
        header(
            f,
            r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},
                      "b":{"dtype":"F32","shape":[1],"data_offsets":[8,12]}}"#,
            12,
        );
    }),
    ("overlap", "NotContiguous", &[FILE, "tensor b", "overlaps"], |f| {
        header(
            f,
            r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},
                      "b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}"#,
            12,
        );
    }),
    ("two names for the same bytes", "NotContiguous", &[FILE, "tensor b"], |f| {
        header(
            f,
            r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},
                      "b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#,
            4,
        );
    }),
    ("trailing bytes", "TrailingBytes", &[FILE, "5 bytes", "expected 4"], |f| {
        header(f, &tensor("F32", "[1]", "[0,4]"), 5);
    }),
    ("header not padded", "Misaligned", &[FILE, "tensor w", "multiple of 4"], |f| {
        f.write(FILE, exact(&format!("{} ", tensor("F32", "[1]", "[0,4]")), 4));
    }),
    ("odd offset", "Misaligned", &[FILE, "tensor b"], |f| {
        header(
            f,
            r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},
                      "b":{"dtype":"BF16","shape":[1],"data_offsets":[1,3]}}"#,
            3,
        );
    }),
    ("metadata of numbers", "Json", &[FILE], |f| header(f, r#"{"__metadata__":{"a":1}}"#, 0)),
    ("metadata is a list", "Json", &[FILE], |f| header(f, r#"{"__metadata__":[]}"#, 0)),
    ("metadata key twice", "Metadata", &[FILE, "key a"], |f| {
        header(f, r#"{"__metadata__":{"a":"1","a":"2"}}"#, 0);
    }),
    ("metadata twice", "Metadata", &[FILE], |f| {
        header(f, r#"{"__metadata__":{},"__metadata__":{}}"#, 0)
    }),
    ("too many tensors", "TooManyTensors", &[FILE, "200000"], |f| {
        let entry =
            |i: usize| format!(r#""{i}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}"#);
        let all: Vec<String> = (0..200_001).map(entry).collect();
        header(f, &format!("{{{}}}", all.join(",")), 0);
    }),
];

const FOLDERS: &[Row] = &[
    ("no weights", "NoWeights", &[FILE, INDEX], |f| f.remove(FILE)),
    ("weights are a folder", "Io", &[FILE], |f| {
        f.remove(FILE);
        std::fs::create_dir(f.file(FILE)).unwrap();
    }),
    ("weights of another model", "TensorUnexpected", &[FILE, "tensor w"], |f| {
        let mut all: Vec<_> =
            tiny_expected().into_iter().map(|t| (t.name, "BF16", t.shape)).collect();
        all.push(("w".into(), "BF16", vec![4]));
        f.write(FILE, weights(&all));
    }),
    ("tensor missing", "TensorMissing", &[NORM, "[16]"], |f| with_tensor(f, NORM, None)),
    ("tensor of the wrong shape", "TensorShape", &[FILE, "norm.weight", "[16]", "[17]"], |f| {
        with_tensor(f, NORM, Some(("BF16", vec![17])));
    }),
    ("tensor transposed", "TensorShape", &[FILE, "[24, 16]", "[16, 24]"], |f| {
        with_tensor(f, "model.layers.0.mlp.up_proj.weight", Some(("BF16", vec![16, 24])));
    }),
    ("tensor of integers", "TensorDtype", &[FILE, "norm.weight", "I32"], |f| {
        with_tensor(f, NORM, Some(("I32", vec![16])));
    }),
    ("tensor of doubles", "TensorDtype", &[FILE, "norm.weight", "F64"], |f| {
        with_tensor(f, NORM, Some(("F64", vec![16])));
    }),
    (
        "fp8 weights",
        "Quantised",
        &[FILE, "F8_E4M3", "quantised checkpoints are not supported"],
        |f| {
            with_tensor(f, "model.layers.0.mlp.up_proj.weight", Some(("F8_E4M3", vec![24, 16])));
        },
    ),
    ("weight scales", "Quantised", &[FILE, "weight_scale", "quantised"], |f| {
        with_tensor(f, "model.layers.0.mlp.up_proj.weight_scale", Some(("F32", vec![1])));
    }),
    (
        "two spellings of a name",
        "NameCollision",
        &[FILE, "model.norm.weight", "norm.weight"],
        |f| {
            with_tensor(f, "norm.weight", Some(("BF16", vec![16])));
        },
    ),
    ("index is not JSON", "Json", &[INDEX], |f| f.write(INDEX, "{")),
    ("index without a map", "Index", &[INDEX, "weight_map"], |f| f.write(INDEX, "{}")),
    ("index map is a list", "Index", &[INDEX, "weight_map"], |f| {
        f.write(INDEX, r#"{"weight_map":[]}"#)
    }),
    ("index map is empty", "Index", &[INDEX, "weight_map"], |f| {
        f.write(INDEX, r#"{"weight_map":{}}"#)
    }),
    ("index lists a tensor twice", "Json", &[INDEX, "key w"], |f| {
        f.write(INDEX, r#"{"weight_map":{"w":"a.safetensors","w":"b.safetensors"}}"#);
    }),
    ("shard is a number", "Index", &[INDEX, NORM], |f| {
        sharded(f, |i| i["weight_map"][NORM] = json!(1))
    }),
    ("shard in a parent folder", "ShardName", &[INDEX, NORM, "../a.safetensors"], |f| {
        sharded(f, |i| i["weight_map"][NORM] = json!("../a.safetensors"));
    }),
    ("shard with a path", "ShardName", &[INDEX, "/etc/a.safetensors"], |f| {
        sharded(f, |i| i["weight_map"][NORM] = json!("/etc/a.safetensors"));
    }),
    ("shard with a backslash", "ShardName", &[INDEX], |f| {
        sharded(f, |i| i["weight_map"][NORM] = json!("..\\a.safetensors"));
    }),
    ("shard with a NUL", "ShardName", &[INDEX], |f| {
        sharded(f, |i| i["weight_map"][NORM] = json!("a\0.safetensors"));
    }),
    ("shard of another format", "ShardName", &[INDEX, "model.bin"], |f| {
        sharded(f, |i| i["weight_map"][NORM] = json!("model.bin"));
    }),
    ("shard missing", "ShardMissing", &[INDEX, "c.safetensors"], |f| {
        sharded(f, |i| i["weight_map"][NORM] = json!("c.safetensors"));
    }),
    ("shard lacks a tensor", "TensorNotInShard", &["b.safetensors", "extra"], |f| {
        sharded(f, |i| i["weight_map"]["extra"] = json!("b.safetensors"));
    }),
    ("tensor in another shard", "TensorTwice", &["a.safetensors", NORM, "b.safetensors"], |f| {
        sharded(f, |i| i["weight_map"][NORM] = json!("b.safetensors"));
    }),
    ("tensor in two shards", "TensorTwice", &["b.safetensors", NORM], |f| {
        sharded(f, |_| ());
        let mut b: Vec<_> =
            tiny_expected().into_iter().skip(4).map(|t| (t.name, "BF16", t.shape)).collect();
        b.push((NORM.into(), "BF16", vec![16]));
        f.write("b.safetensors", weights(&b));
    }),
    ("tensor that the index forgets", "TensorNotInIndex", &["a.safetensors", NORM], |f| {
        sharded(f, |i| {
            i["weight_map"].as_object_mut().unwrap().remove(NORM);
        });
    }),
    ("malformed shard", "TooShort", &["b.safetensors"], |f| {
        sharded(f, |_| ());
        f.write("b.safetensors", b"");
    }),
    ("tokenizer is not JSON", "Tokenizer", &["tokenizer.json"], |f| f.write("tokenizer.json", "{")),
    ("tokenizer without a model", "Tokenizer", &["tokenizer.json"], |f| {
        f.write("tokenizer.json", "{}")
    }),
    (
        "tokenizer larger than the model",
        "Tokenizer",
        &["tokenizer.json", "259 ids", "vocab_size = 32"],
        |f| {
            f.write("tokenizer.json", common::byte_tokenizer().to_string());
        },
    ),
    ("tokenizer_config is not an object", "Json", &["tokenizer_config.json"], |f| {
        f.write("tokenizer_config.json", "[]");
    }),
    ("chat template is a number", "Value", &["tokenizer_config.json", "chat_template"], |f| {
        f.write("tokenizer_config.json", r#"{"chat_template": 7}"#);
    }),
    (
        "chat templates without a default",
        "Value",
        &["tokenizer_config.json", "chat_template"],
        |f| {
            f.write(
                "tokenizer_config.json",
                r#"{"chat_template": [{"name": "tool_use", "template": ""}]}"#,
            );
        },
    ),
    ("chat template does not parse", "Template", &["chat_template.jinja"], |f| {
        f.write("chat_template.jinja", "{% for m in messages %}");
    }),
    ("chat template is not UTF-8", "Template", &["chat_template.jinja"], |f| {
        f.write("chat_template.jinja", [0xff, 0xfe]);
    }),
    ("chat template too long", "TooLarge", &["chat_template.jinja", "262144"], |f| {
        f.write("chat_template.jinja", vec![b' '; (256 << 10) + 1]);
    }),
    ("chat template includes a file", "Template", &["chat_template.jinja", "statement"], |f| {
        f.write("chat_template.jinja", "{% include '/etc/passwd' %}");
    }),
];

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
    ("eos past the vocabulary", "Value", &[CONFIG, "eos_token_id", "32"], |f| {
        f.set("eos_token_id", json!([2, 32]))
    }),
    ("negative bos", "Value", &[CONFIG, "bos_token_id", "-1"], |f| {
        f.set("bos_token_id", json!(-1))
    }),
    ("fp8 dtype", "Unsupported", &[CONFIG, "torch_dtype", "float8"], |f| {
        f.set("torch_dtype", json!("float8_e4m3fn"));
    }),
    ("temperature below 0", "Value", &["generation_config.json", "temperature", "-1"], |f| {
        f.write("generation_config.json", r#"{"temperature": -1.0}"#);
    }),
    (
        "generation eos past the vocabulary",
        "Value",
        &["generation_config.json", "eos_token_id"],
        |f| {
            f.write("generation_config.json", r#"{"eos_token_id": 9999}"#);
        },
    ),
    ("generation config is a list", "Json", &["generation_config.json"], |f| {
        f.write("generation_config.json", "[]")
    }),
];

fn check(rows: &[Row]) {
    for (name, variant, mentions, break_it) in rows {
        let folder = Folder::tiny();
        break_it(&folder);
        let error = match folder.load() {
            Ok(_) => panic!("{name}: accepted"),
            Err(error) => error,
        };
        let (debug, message) = (format!("{error:?}"), error.to_string());
        let found = match &error {
            loris_loader::Error::Safetensors { fault, .. } => format!("{fault:?}"),
            _ => debug.clone(),
        };
        let found = found.split([' ', '{', '(']).next().unwrap();
        assert_eq!(found, *variant, "{name}: {message}");
        for text in *mentions {
            assert!(message.contains(text), "{name}: {message:?} does not mention {text:?}");
        }
        assert!(!message.chars().any(|c| c.is_control()), "{name}: {message:?}");
        assert!(message.len() < 1000, "{name}: {message}");
    }
}

#[test]
fn the_folder_that_the_rows_break_is_valid() {
    let folder = Folder::tiny();
    let checkpoint = folder.load().unwrap();
    assert_eq!(checkpoint.weights.names().count(), tiny_expected().len());
    sharded(&folder, |_| ());
    folder.write("consolidated.safetensors", b"not looked at");
    let sharded = folder.load().unwrap();
    assert_eq!(sharded.weights.total_bytes(), checkpoint.weights.total_bytes());
    assert_eq!(tiny_weights(), tiny_weights());
}

#[test]
fn malformed_weight_files_are_refused() {
    check(SAFETENSORS);
}

#[test]
fn malformed_folders_are_refused() {
    check(FOLDERS);
}

#[test]
fn malformed_configurations_are_refused() {
    check(CONFIGS);
}

#[test]
fn the_table_has_at_least_sixty_rows() {
    assert!(SAFETENSORS.len() + FOLDERS.len() + CONFIGS.len() >= 60);
}
