//! Malformed model folders, each named for its fault: all are refused, with an error of the right kind that names the
//! file and the thing, and none with a panic.

#![allow(clippy::unwrap_used, clippy::semicolon_if_nothing_returned)]

mod common;

use common::{Folder, Row, check, exact, raw, tiny_expected, tiny_weights, weights};
use serde_json::{Value, json};

const FILE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

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

/// An index without a single file.
fn index(f: &Folder, text: impl AsRef<[u8]>) {
    f.remove(FILE);
    f.write(INDEX, text);
}

const LFS: &str = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123\n";
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
    ("index is not JSON", "Json", &[INDEX], |f| index(f, "{")),
    ("index without a map", "Index", &[INDEX, "weight_map"], |f| index(f, "{}")),
    ("index map is a list", "Index", &[INDEX, "weight_map"], |f| index(f, r#"{"weight_map":[]}"#)),
    ("index map is empty", "Index", &[INDEX, "weight_map"], |f| index(f, r#"{"weight_map":{}}"#)),
    ("index lists a tensor twice", "Json", &[INDEX, "key w"], |f| {
        index(f, r#"{"weight_map":{"w":"a.safetensors","w":"b.safetensors"}}"#);
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
    ("an LFS pointer as weights", "Foreign", &[FILE, "Git LFS pointer", "git lfs pull"], |f| {
        f.write(FILE, LFS);
    }),
    ("an LFS pointer as a tokenizer", "Foreign", &["tokenizer.json", "Git LFS pointer"], |f| {
        f.write("tokenizer.json", LFS);
    }),
    ("an LFS pointer as a template", "Foreign", &["chat_template.jinja", "Git LFS"], |f| {
        f.write("chat_template.jinja", LFS);
    }),
    ("an LFS pointer as an index", "Foreign", &[INDEX, "Git LFS"], |f| {
        f.remove(FILE);
        f.write(INDEX, LFS);
    }),
    ("an HTML page as weights", "Foreign", &[FILE, "HTML", "download"], |f| {
        f.write(FILE, "\n<!DOCTYPE html><html>401</html>");
    }),
    ("an HTML page as a config", "Foreign", &["config.json", "HTML"], |f| {
        f.write("config.json", "\u{feff}<html>");
    }),
    ("an adapter alone", "Adapter", &["adapter_config.json", "merge"], |f| {
        f.remove(FILE);
        f.remove("config.json");
        f.write("adapter_config.json", "{}");
    }),
    ("an adapter beside weights", "Adapter", &["adapter_config.json"], |f| {
        f.write("adapter_config.json", "{}");
    }),
    (
        "weights of other kinds",
        "NoWeights",
        &["consolidated.safetensors, pytorch_model.bin cannot be used"],
        |f| {
            f.remove(FILE);
            f.write("pytorch_model.bin", "x");
            f.write("consolidated.safetensors", "x");
        },
    ),
    ("a tensor whose name only holds that of an ignored one", "TensorUnexpected", &[FILE], |f| {
        with_tensor(f, "model.lm_head.weight.more", Some(("BF16", vec![1])));
    }),
    ("tokenizer_config is not an object", "Json", &["tokenizer_config.json"], |f| {
        f.write("tokenizer_config.json", "[]");
    }),
    ("chat template is a number", "Value", &["tokenizer_config.json", "chat_template"], |f| {
        f.write("tokenizer_config.json", r#"{"chat_template": 7}"#);
    }),
    (
        "a chat template without its text",
        "Value",
        &["tokenizer_config.json", "chat_template"],
        |f| {
            f.write("tokenizer_config.json", r#"{"chat_template": [{"name": "tool_use"}]}"#);
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
    ("chat template includes a file", "Template", &["chat_template.jinja", "include"], |f| {
        f.write("chat_template.jinja", "{% include '/etc/passwd' %}");
    }),
];

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
fn the_table_has_at_least_sixty_rows() {
    assert!(SAFETENSORS.len() + FOLDERS.len() >= 60);
}
