//! Small model folders, made in temporary directories.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)] // each test file uses its part

use std::path::{Path, PathBuf};

use loris_loader::{Checkpoint, Error, Expected, OpenOptions};
use serde_json::{Value, json};
use tempfile::TempDir;

/// A small generator (xorshift), so that the same cases come every time.
pub struct Random(pub u64);

impl Random {
    /// Of a seed that may be small.
    pub fn seeded(seed: u64) -> Random {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }
    pub fn pick<'a, T>(&mut self, list: &'a [T]) -> &'a T {
        &list[self.below(list.len())]
    }
}

/// A model folder that goes away with the test.
pub struct Folder(TempDir);

impl Folder {
    /// A valid folder: a Llama of one layer with tied embeddings, all of its weights bf16 zeros.
    pub fn tiny() -> Folder {
        let folder = Folder(tempfile::tempdir().unwrap());
        folder.write("config.json", tiny_config().to_string());
        folder.write("model.safetensors", tiny_weights());
        folder
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.path().join(name)
    }

    pub fn write(&self, name: &str, bytes: impl AsRef<[u8]>) {
        std::fs::write(self.file(name), bytes).unwrap();
    }

    pub fn remove(&self, name: &str) {
        std::fs::remove_file(self.file(name)).unwrap();
    }

    /// Sets a key of config.json.
    pub fn set(&self, key: &str, value: Value) {
        let mut config = tiny_config();
        config[key] = value;
        self.write("config.json", config.to_string());
    }

    /// Opens the folder and checks its tensors, as the engine does.
    pub fn load(&self) -> Result<Checkpoint, Error> {
        let checkpoint = loris_loader::open(self.path(), &OpenOptions::default())?;
        checkpoint
            .weights
            .check_exactly(&tiny_expected(), &["rotary_emb.inv_freq", "lm_head.weight"])?;
        Ok(checkpoint)
    }
}

pub fn tiny_config() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama",
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
        "hidden_size": 16, "intermediate_size": 24, "vocab_size": 32, "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": true,
        "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "bfloat16"
    })
}

pub fn tiny_expected() -> Vec<Expected> {
    let layer = |name: &str| format!("model.layers.0.{name}.weight");
    [
        ("model.embed_tokens.weight".to_owned(), vec![32, 16]),
        ("model.norm.weight".to_owned(), vec![16]),
        (layer("input_layernorm"), vec![16]),
        (layer("post_attention_layernorm"), vec![16]),
        (layer("self_attn.q_proj"), vec![16, 16]),
        (layer("self_attn.k_proj"), vec![8, 16]),
        (layer("self_attn.v_proj"), vec![8, 16]),
        (layer("self_attn.o_proj"), vec![16, 16]),
        (layer("mlp.gate_proj"), vec![24, 16]),
        (layer("mlp.up_proj"), vec![24, 16]),
        (layer("mlp.down_proj"), vec![16, 24]),
    ]
    .into_iter()
    .map(|(name, shape)| Expected { name, shape })
    .collect()
}

/// A safetensors file of the tiny model.
pub fn tiny_weights() -> Vec<u8> {
    let all: Vec<_> = tiny_expected().into_iter().map(|t| (t.name, "BF16", t.shape)).collect();
    weights(&all)
}

/// A valid safetensors file with these tensors, of zeros.
pub fn weights(tensors: &[(String, &str, Vec<usize>)]) -> Vec<u8> {
    let mut header = serde_json::Map::new();
    let mut end = 0;
    for (name, dtype, shape) in tensors {
        let size =
            loris_loader::Dtype::from_name(dtype).unwrap().size() * shape.iter().product::<usize>();
        let entry = json!({"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]});
        assert!(header.insert(name.clone(), entry).is_none());
        end += size;
    }
    raw(&Value::Object(header).to_string(), end)
}

/// Header text, padded to eight bytes, and `data_len` zeros.
pub fn raw(header: &str, data_len: usize) -> Vec<u8> {
    let padded = header.len().next_multiple_of(8);
    exact(&(header.to_owned() + &" ".repeat(padded - header.len())), data_len)
}

/// Header text as it is, and `data_len` zeros.
pub fn exact(header: &str, data_len: usize) -> Vec<u8> {
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    file.resize(file.len() + data_len, 0);
    file
}

/// A byte-level BPE tokenizer.json without merges but for "he", with `<|im_start|>` and `<|im_end|>`.
pub fn byte_tokenizer() -> Value {
    let mut vocab = serde_json::Map::new();
    for byte in 0..=255u8 {
        vocab.insert(byte_char(byte).to_string(), json!(byte));
    }
    vocab.insert("he".into(), json!(256));
    let added = |id: u32, content: &str| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": true})
    };
    json!({
        "version": "1.0", "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        "padding": null,
        "added_tokens": [added(257, "<|im_start|>"), added(258, "<|im_end|>")],
        "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [257], "tokens": ["<|im_start|>"]}}
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                  "vocab": vocab, "merges": [["h", "e"]]}
    })
}

/// The character that stands for a byte in byte-level vocabularies: itself where it prints, else one from 256 on.
pub fn byte_char(byte: u8) -> char {
    let prints = |b: u8| matches!(b, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    if prints(byte) {
        return char::from(byte);
    }
    let index = (0..byte).filter(|&b| !prints(b)).count() as u32;
    char::from_u32(256 + index).unwrap()
}

/// Name of the fault, the error's variant (for safetensors the fault's), what the message must mention, and how to
/// break the tiny folder.
pub type Row = (&'static str, &'static str, &'static [&'static str], fn(&Folder));

/// Breaks the tiny folder as each row says and holds the error to what the row expects.
pub fn check(rows: &[Row]) {
    for (name, variant, mentions, break_it) in rows {
        let folder = Folder::tiny();
        break_it(&folder);
        let error = match folder.load() {
            Ok(_) => panic!("{name}: accepted"),
            Err(error) => error,
        };
        let (debug, message) = (format!("{error:?}"), error.to_string());
        let found = match &error {
            Error::Safetensors { fault, .. } => format!("{fault:?}"),
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

pub fn added(id: u32, content: &str) -> Value {
    json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
           "normalized": false, "special": true})
}

/// A tokenizer of Llama 2's kind, that writes spaces as `space`: one before every piece of text, which is a token of its own.
pub fn llama_tokenizer(space: &str, merges: &Value) -> Value {
    json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [added(0, "<unk>"), added(1, "<s>"), added(2, "</s>")],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": space}, {"type": "Replace", "pattern": {"String": " "}, "content": space}]},
        "pre_tokenizer": null,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": space}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
                  "vocab": {"<unk>": 0, "<s>": 1, "</s>": 2, space: 3, "h": 4, "i": 5, "hi": 6, "<0x0A>": 7},
                  "merges": merges}
    })
}
