//! What `config.json` and `generation_config.json` say about a model, as plain facts.
//!
//! The reader knows the quirks of the four supported families and nothing else: a key that would change the
//! mathematics and is not known (an activation, a bias, a quantisation, a RoPE type) is an error that names it, never
//! a guess. Every number is range-checked and their products are known to fit before anything is allocated.
//! Defaults, and the JSON types that a key may have ([`TYPES`]), are those of `transformers` 5.24, whose outputs are the
//! reference. Stricter than it is the reader where a key says something that the reference passes over (a window of a
//! Llama, a bias of a Mistral, an architecture of another family), and where two keys say different things.

use std::path::Path;

use serde_json::Value;
use xxhash_rust::xxh3::xxh3_64;

use crate::dtype::Dtype;
use crate::error::Error;
use crate::json;
use crate::keys::{Accept, Keys};
use crate::rope::{MAX_CTX, RopeConfig};

/// The file that describes the model.
pub const CONFIG: &str = "config.json";
/// The file with the author's advice on sampling.
pub const GENERATION_CONFIG: &str = "generation_config.json";

const MAX_CONFIG_BYTES: u64 = 1 << 20;
const SUPPORTED: &str = "LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM";

/// A model family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Architecture {
    /// Llama 2 and 3, SmolLM2 and everything else of that shape.
    Llama,
    /// Llama with a sliding window.
    Mistral,
    /// Llama with biases on query, key and value.
    Qwen2,
    /// Llama with norms on each head's query and key.
    Qwen3,
}

/// The facts of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// The family.
    pub architecture: Architecture,
    /// Transformer layers.
    pub n_layers: usize,
    /// Query heads of a layer.
    pub n_q_heads: usize,
    /// Key and value heads of a layer; divides `n_q_heads`.
    pub n_kv_heads: usize,
    /// Dimensions of a head; even.
    pub head_dim: usize,
    /// Dimensions of the residual stream.
    pub hidden_dim: usize,
    /// Dimensions inside the MLP.
    pub ffn_dim: usize,
    /// Rows of the embedding; the tokenizer may know fewer tokens.
    pub vocab_size: usize,
    /// Longest context that the model can use: `max_position_embeddings`, or what its RoPE scaling makes of it.
    pub ctx_len: usize,
    /// Epsilon of the RMS norms.
    pub norm_eps: f32,
    /// Rotary embedding.
    pub rope: RopeConfig,
    /// Whether the output head is the embedding.
    pub tied_embeddings: bool,
    /// Whether the query, key and value projections have biases.
    pub qkv_bias: bool,
    /// Whether each head's query and key are normalised before RoPE.
    pub qk_norm: bool,
    /// For each layer the sliding window, if any: a token sees itself and the `window - 1` before it.
    pub windows: Vec<Option<usize>>,
    /// The token that starts a sequence.
    pub bos_id: Option<u32>,
    /// The tokens that end an answer: the union of config.json, generation_config.json and the tokenizer, sorted.
    pub eos_ids: Vec<u32>,
    /// The padding token.
    pub pad_id: Option<u32>,
    /// The element type that the weights are said to have.
    pub dtype: Option<Dtype>,
    /// The author's advice on sampling.
    pub generation: GenerationDefaults,
}

/// The author's advice on sampling; `None` where there is none.
#[derive(Debug, Clone, Default, PartialEq)]
#[allow(missing_docs)] // fields carry the names and meanings of generation_config.json
pub struct GenerationDefaults {
    pub do_sample: Option<bool>,
    pub temperature: Option<f32>,
    pub top_k: Option<usize>,
    pub top_p: Option<f32>,
    pub min_p: Option<f32>,
    pub repetition_penalty: Option<f32>,
}

impl ModelConfig {
    /// Reads `config.json` and, where it exists, `generation_config.json`.
    pub fn open(dir: &Path) -> Result<ModelConfig, Error> {
        let path = dir.join(CONFIG);
        let Some(bytes) = json::read_file(&path, MAX_CONFIG_BYTES)? else {
            let source = std::io::ErrorKind::NotFound.into();
            return Err(Error::Io { file: path, action: "open (a model folder needs it)", source });
        };
        let map = json::parse_object(&bytes, &path)?;
        let mut config = ModelConfig::read(&Keys { file: &path, parent: "", map: &map })?;
        let path = dir.join(GENERATION_CONFIG);
        if let Some(bytes) = json::read_file(&path, MAX_CONFIG_BYTES)? {
            if !map.contains_key("eos_token_id") {
                config.eos_ids.clear(); // the family's default counts only where no file says anything
            }
            config.add_generation_config(&bytes, &path)?;
        }
        Ok(config)
    }

    /// Reads the bytes of a `config.json`; `path` is for messages.
    pub fn parse(bytes: &[u8], path: &Path) -> Result<ModelConfig, Error> {
        let map = json::parse_object(bytes, path)?;
        ModelConfig::read(&Keys { file: path, parent: "", map: &map })
    }

    fn read(keys: &Keys<'_>) -> Result<ModelConfig, Error> {
        refuse_unknown_mathematics(keys)?;
        let architecture = architecture(keys)?;
        check_types(keys, architecture)?;
        refuse_biases(keys, architecture)?;

        let default = architecture.defaults();
        let n_layers = keys.uint("num_hidden_layers", 1..=1024)?.unwrap_or(32);
        let n_q_heads = keys.uint("num_attention_heads", 1..=1024)?.unwrap_or(32);
        let absent = default.n_kv_heads.filter(|_| !keys.map.contains_key("num_key_value_heads"));
        let n_kv_heads =
            keys.uint("num_key_value_heads", 1..=1024)?.or(absent).unwrap_or(n_q_heads);
        if !n_q_heads.is_multiple_of(n_kv_heads) {
            return Err(keys.wrong(
                "num_key_value_heads",
                format!("a divisor of the {n_q_heads} query heads"),
            ));
        }
        let hidden_dim = keys.uint("hidden_size", 1..=1 << 17)?.unwrap_or(4096);
        let head_dim = head_dim(keys, architecture, hidden_dim, n_q_heads)?;
        let max_positions =
            keys.uint("max_position_embeddings", 1..=MAX_CTX)?.unwrap_or(default.max_positions);
        let rope = RopeConfig::read(keys, max_positions)?;
        let vocab_size = keys.uint("vocab_size", 1..=1 << 22)?.unwrap_or(default.vocab_size);
        let eps = Accept {
            expected: "a number between 0 and 1",
            test: |x| (f64::from(f32::MIN_POSITIVE)..1.0).contains(&x),
        };

        let mut eos_ids = keys.token_ids("eos_token_id", vocab_size)?;
        sort_unique(&mut eos_ids);
        let mut bos_id = keys.token_id("bos_token_id", vocab_size)?;
        let default_id = |key, id: u32| {
            let is_absent = default.has_ids && !keys.map.contains_key(key);
            Some(id).filter(|&id| is_absent && (id as usize) < vocab_size)
        };
        bos_id = bos_id.or(default_id("bos_token_id", 1));
        eos_ids.extend(default_id("eos_token_id", 2));
        Ok(ModelConfig {
            architecture,
            n_layers,
            n_q_heads,
            n_kv_heads,
            head_dim,
            hidden_dim,
            ffn_dim: keys.uint("intermediate_size", 1..=1 << 20)?.unwrap_or(default.ffn_dim),
            vocab_size,
            ctx_len: rope.usable_ctx(max_positions),
            norm_eps: keys.float("rms_norm_eps", &eps)?.unwrap_or(1e-6) as f32,
            rope,
            tied_embeddings: keys.boolean("tie_word_embeddings")?.unwrap_or(false),
            qkv_bias: architecture == Architecture::Qwen2,
            qk_norm: architecture == Architecture::Qwen3,
            windows: windows(keys, architecture, n_layers)?,
            bos_id,
            eos_ids,
            pad_id: keys.token_id("pad_token_id", vocab_size)?,
            dtype: dtype(keys)?,
            generation: GenerationDefaults::default(),
        })
    }

    /// Adds the bytes of a `generation_config.json`; `path` is for messages.
    pub fn add_generation_config(&mut self, bytes: &[u8], path: &Path) -> Result<(), Error> {
        let map = json::parse_object(bytes, path)?;
        let keys = Keys { file: path, parent: "", map: &map };
        self.eos_ids.extend(keys.token_ids("eos_token_id", self.vocab_size)?);
        sort_unique(&mut self.eos_ids);
        self.bos_id = self.bos_id.or(keys.token_id("bos_token_id", self.vocab_size)?);

        refuse_unknown_generation(&keys)?;
        let positive = Accept { expected: "a number above 0", test: |x| x > 0.0 && x < 1e6 };
        let not_negative =
            Accept { expected: "a number from 0", test: |x| (0.0..1e6).contains(&x) };
        let share = Accept { expected: "a number from 0 to 1", test: |x| (0.0..=1.0).contains(&x) };
        let float =
            |key, accept| -> Result<_, Error> { Ok(keys.float(key, accept)?.map(|x| x as f32)) };
        self.generation = GenerationDefaults {
            do_sample: keys.boolean("do_sample")?,
            temperature: float("temperature", &not_negative)?,
            top_k: keys.uint("top_k", 0..=1 << 22)?,
            top_p: float("top_p", &share)?,
            min_p: float("min_p", &share)?,
            repetition_penalty: float("repetition_penalty", &positive)?,
        };
        Ok(())
    }

    /// Adds a token that ends an answer, unless the model has no row for it and so never gives it.
    pub fn add_eos(&mut self, id: u32) {
        self.eos_ids.extend(Some(id).filter(|&id| (id as usize) < self.vocab_size));
        sort_unique(&mut self.eos_ids);
    }

    /// A number that tells apart configurations with which the same weights compute something else: of every fact that
    /// the layers read, and of no other. It is part of the format of saved sessions, so it never changes for a
    /// configuration.
    pub fn fingerprint(&self) -> u64 {
        // Field by field, so that a new one has to be placed here.
        let ModelConfig {
            architecture,
            n_layers,
            n_q_heads,
            n_kv_heads,
            head_dim,
            hidden_dim,
            ffn_dim,
            vocab_size,
            norm_eps,
            rope,
            tied_embeddings,
            qkv_bias,
            qk_norm,
            windows,
            // How long a session may be, where an answer ends, what is advised; and what tensors say themselves.
            ctx_len: _,
            bos_id: _,
            eos_ids: _,
            pad_id: _,
            generation: _,
            dtype: _,
        } = self;
        let architecture = match architecture {
            Architecture::Llama => 0,
            Architecture::Mistral => 1,
            Architecture::Qwen2 => 2,
            Architecture::Qwen3 => 3,
        };
        let sizes = [n_layers, n_q_heads, n_kv_heads, head_dim, hidden_dim, ffn_dim, vocab_size];
        let mut facts = vec![architecture, u64::from(norm_eps.to_bits())];
        facts.extend(sizes.map(|&size| size as u64));
        facts.extend([tied_embeddings, qkv_bias, qk_norm].map(|&flag| u64::from(flag)));
        facts.extend(rope.facts());
        facts.extend(windows.iter().map(|window| window.map_or(0, |window| window as u64)));
        let bytes: Vec<u8> = facts.into_iter().flat_map(u64::to_le_bytes).collect();
        xxh3_64(&bytes)
    }

    /// Query heads that share one key and value head.
    pub fn group_size(&self) -> usize {
        self.n_q_heads / self.n_kv_heads
    }
}

/// What a family has where config.json says nothing; where all have the same it stands at its place.
struct Defaults {
    vocab_size: usize,
    ffn_dim: usize,
    n_kv_heads: Option<usize>,
    max_positions: usize,
    /// Whether token 1 starts a sequence and token 2 ends it.
    has_ids: bool,
}

impl Architecture {
    fn defaults(self) -> Defaults {
        let (vocab_size, ffn_dim, n_kv_heads, max_positions, has_ids) = match self {
            Architecture::Llama => (32_000, 11_008, None, 2048, true),
            Architecture::Mistral => (32_000, 14_336, Some(8), 131_072, true),
            Architecture::Qwen2 | Architecture::Qwen3 => (151_936, 22_016, Some(32), 32_768, false),
        };
        Defaults { vocab_size, ffn_dim, n_kv_heads, max_positions, has_ids }
    }
}

/// The JSON types that a key may have: i, an integer; f, a number with a point or an exponent; b, true or false; s, a
/// text; l, a list; n, null; and the families that it belongs to: l, Llama; m, Mistral; 2 and 3, Qwen2 and Qwen3.
const TYPES: [(&str, &str, &str); 31] = [
    ("vocab_size", "i", "lm23"),
    ("hidden_size", "i", "lm23"),
    ("intermediate_size", "i", "lm23"),
    ("num_hidden_layers", "i", "lm23"),
    ("num_attention_heads", "i", "lm23"),
    ("num_key_value_heads", "in", "l23"),
    ("num_key_value_heads", "i", "m"),
    ("head_dim", "in", "lm"),
    ("head_dim", "i", "3"),
    ("hidden_act", "s", "lm23"),
    ("max_position_embeddings", "i", "lm23"),
    ("initializer_range", "f", "lm23"),
    ("rms_norm_eps", "f", "lm23"),
    ("use_cache", "b", "lm23"),
    ("pad_token_id", "in", "lm23"),
    ("bos_token_id", "in", "lm23"),
    ("eos_token_id", "iln", "lm23"),
    ("pretraining_tp", "in", "l"),
    ("tie_word_embeddings", "b", "lm23"),
    ("attention_bias", "b", "l3"),
    ("attention_dropout", "ifn", "l"),
    ("attention_dropout", "if", "m23"),
    ("mlp_bias", "b", "l"),
    ("sliding_window", "in", "m23"),
    ("use_sliding_window", "b", "23"),
    ("max_window_layers", "i", "23"),
    ("layer_types", "ln", "lm23"),
    ("architectures", "ln", "lm23"),
    ("is_encoder_decoder", "b", "lm23"),
    ("chunk_size_feed_forward", "i", "lm23"),
    ("rope_parameters", "on", "lm23"),
];

/// Holds every key that is there to its types.
fn check_types(keys: &Keys<'_>, architecture: Architecture) -> Result<(), Error> {
    let family = match architecture {
        Architecture::Llama => 'l',
        Architecture::Mistral => 'm',
        Architecture::Qwen2 => '2',
        Architecture::Qwen3 => '3',
    };
    for (key, types, families) in TYPES {
        let Some(value) = keys.map.get(key).filter(|_| families.contains(family)) else { continue };
        let found = match value {
            Value::Null => 'n',
            Value::Bool(_) => 'b',
            Value::Number(number) if number.is_f64() => 'f',
            Value::Number(_) => 'i',
            Value::String(_) => 's',
            Value::Array(_) => 'l',
            Value::Object(_) => 'o',
        };
        if !types.contains(found) {
            let name = |letter| match letter {
                'n' => "null",
                'b' => "true or false",
                'f' => "a number with a point",
                'i' => "an integer",
                's' => "a string",
                'l' => "a list",
                _ => "an object",
            };
            let names: Vec<&str> = types.chars().map(name).collect();
            return Err(keys.wrong(key, names.join(" or ")));
        }
    }
    Ok(())
}

/// Keys that change what the model computes, in ways that this engine does not.
fn refuse_unknown_mathematics(keys: &Keys<'_>) -> Result<(), Error> {
    if keys.get("quantization_config").is_some() || keys.get("compression_config").is_some() {
        let what = "quantization_config".into();
        return Err(Error::Quantised { file: keys.file.into(), what });
    }
    for key in ["text_config", "vision_config", "audio_config"] {
        if keys.get(key).is_some() {
            return Err(
                keys.unsupported(key, "text-only checkpoints, whose config.json has no such key")
            );
        }
    }
    for key in [
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "num_experts",
        "num_local_experts",
        "no_rope_layers",
        "per_layer_config",
        "is_encoder_decoder",
    ] {
        // A number of 0, an empty list, false: without it.
        if keys.truth(key) {
            return Err(keys.unsupported(key, "dense decoders without this key"));
        }
    }
    if keys.get("is_causal") == Some(&Value::Bool(false)) {
        return Err(keys.unsupported("is_causal", "true"));
    }
    if let Some(name) = keys.get("transformers_weights")
        && name != crate::SINGLE
        && name != crate::INDEX
    {
        return Err(keys.unsupported("transformers_weights", "model.safetensors and its index"));
    }
    match keys.get("hidden_act").and_then(Value::as_str) {
        None | Some("silu" | "swish") => Ok(()),
        Some(_) => Err(keys.unsupported("hidden_act", "silu, swish")),
    }
}

/// Keys of generation_config.json that decide which tokens an answer has and are not followed, with the value that means
/// nothing (besides null, false, 0 and what is empty), and whether they count only where `do_sample` is true. What is
/// in neither table is of no effect on a single answer (`max_new_tokens`, caching, output), or read.
const UNKNOWN_GENERATION: [(&str, Option<f64>, bool); 28] = [
    ("num_beams", Some(1.0), false),
    ("num_beam_groups", Some(1.0), false),
    ("num_return_sequences", Some(1.0), false),
    ("min_length", None, false),
    ("min_new_tokens", None, false),
    ("no_repeat_ngram_size", None, false),
    ("encoder_no_repeat_ngram_size", None, false),
    ("encoder_repetition_penalty", Some(1.0), false),
    ("diversity_penalty", None, false),
    ("guidance_scale", Some(1.0), false),
    ("penalty_alpha", None, false),
    ("suppress_tokens", None, false),
    ("begin_suppress_tokens", None, false),
    ("bad_words_ids", None, false),
    ("force_words_ids", None, false),
    ("sequence_bias", None, false),
    ("constraints", None, false),
    ("exponential_decay_length_penalty", None, false),
    ("stop_strings", None, false),
    ("watermarking_config", None, false),
    ("dola_layers", None, false),
    ("token_healing", None, false),
    ("typical_p", Some(1.0), true),
    ("epsilon_cutoff", None, true),
    ("eta_cutoff", None, true),
    ("top_h", None, true),
    ("smoothing_factor", None, true),
    ("mirostat_mode", None, true),
];

/// The same, where 0 is a token.
const UNKNOWN_TOKENS: [&str; 3] =
    ["forced_bos_token_id", "forced_eos_token_id", "decoder_start_token_id"];

fn refuse_unknown_generation(keys: &Keys<'_>) -> Result<(), Error> {
    let samples = keys.boolean("do_sample")? == Some(true);
    for (key, neutral, when_sampled) in UNKNOWN_GENERATION {
        let is_neutral = neutral.is_some() && keys.get(key).and_then(Value::as_f64) == neutral;
        if keys.truth(key) && !is_neutral && (samples || !when_sampled) {
            return Err(keys.unsupported(key, "folders whose generation_config.json leaves it out"));
        }
    }
    for key in UNKNOWN_TOKENS {
        if keys.get(key).is_some() {
            return Err(keys.unsupported(key, "folders whose generation_config.json leaves it out"));
        }
    }
    Ok(())
}

fn refuse_biases(keys: &Keys<'_>, architecture: Architecture) -> Result<(), Error> {
    // Qwen2's biases are part of the family; its reference does not read the flag.
    if architecture != Architecture::Qwen2 && keys.truth("attention_bias") {
        return Err(keys.unsupported("attention_bias", "false"));
    }
    if keys.truth("mlp_bias") {
        return Err(keys.unsupported("mlp_bias", "false"));
    }
    Ok(())
}

fn architecture(keys: &Keys<'_>) -> Result<Architecture, Error> {
    use Architecture::{Llama, Mistral, Qwen2, Qwen3};
    let class = match keys.list("architectures")? {
        None | Some([]) => None,
        Some([first, ..]) => {
            let class = match first.as_str() {
                Some("LlamaForCausalLM" | "LlamaModel") => Llama,
                Some("MistralForCausalLM" | "MistralModel") => Mistral,
                Some("Qwen2ForCausalLM" | "Qwen2Model") => Qwen2,
                Some("Qwen3ForCausalLM" | "Qwen3Model") => Qwen3,
                _ => return Err(keys.unsupported("architectures", SUPPORTED)),
            };
            Some(class)
        }
    };
    let family = match keys.text("model_type")? {
        None => None,
        Some("llama") => Some(Llama),
        Some("mistral") => Some(Mistral),
        Some("qwen2") => Some(Qwen2),
        Some("qwen3") => Some(Qwen3),
        Some(_) => return Err(keys.unsupported("model_type", "llama, mistral, qwen2, qwen3")),
    };
    match (class, family) {
        (Some(class), Some(family)) if class != family => {
            Err(keys.wrong("model_type", format!("that of architectures[0], {class:?}")))
        }
        (Some(architecture), _) | (None, Some(architecture)) => Ok(architecture),
        (None, None) => Err(keys.wrong("architectures", format!("one of {SUPPORTED}"))),
    }
}

/// An explicit `head_dim` wins over `hidden_size / num_attention_heads`.
fn head_dim(
    keys: &Keys<'_>,
    architecture: Architecture,
    hidden_dim: usize,
    n_q_heads: usize,
) -> Result<usize, Error> {
    let explicit = keys.uint("head_dim", 2..=512)?;
    // Qwen3's reference takes 128 where the key is absent.
    let absent =
        (architecture == Architecture::Qwen3 && !keys.map.contains_key("head_dim")).then_some(128);
    let head_dim = match explicit.or(absent) {
        Some(head_dim) => head_dim,
        None if !hidden_dim.is_multiple_of(n_q_heads) => {
            return Err(keys
                .wrong("num_attention_heads", format!("a divisor of hidden_size = {hidden_dim}")));
        }
        None => hidden_dim / n_q_heads,
    };
    if !head_dim.is_multiple_of(2) || !(2..=512).contains(&head_dim) {
        return Err(keys.wrong(
            "head_dim",
            format!("an even number from 2 to 512 (hidden_size / heads = {head_dim})"),
        ));
    }
    Ok(head_dim)
}

/// For each layer its sliding window.
fn windows(
    keys: &Keys<'_>,
    architecture: Architecture,
    n_layers: usize,
) -> Result<Vec<Option<usize>>, Error> {
    let given = || keys.uint("sliding_window", 1..=MAX_CTX);
    let default = if keys.map.contains_key("sliding_window") { None } else { Some(4096) };
    let window = match architecture {
        Architecture::Llama if keys.get("sliding_window").is_some() => {
            return Err(
                keys.unsupported("sliding_window", "null for llama, whose reference has no window")
            );
        }
        Architecture::Llama => None,
        Architecture::Mistral => given()?.or(default),
        Architecture::Qwen2 | Architecture::Qwen3 => {
            let on = keys.boolean("use_sliding_window")?.unwrap_or(false);
            if on { given()?.or(default) } else { None }
        }
    };
    let qwen = matches!(architecture, Architecture::Qwen2 | Architecture::Qwen3);
    let Some(types) = keys.list("layer_types")? else {
        let first =
            if qwen { keys.uint("max_window_layers", 0..=1 << 20)?.unwrap_or(28) } else { 0 };
        return Ok((0..n_layers).map(|layer| window.filter(|_| layer >= first)).collect());
    };
    if types.len() != n_layers {
        return Err(
            keys.wrong("layer_types", format!("one entry for each of the {n_layers} layers"))
        );
    }
    let layer = |kind: &Value| match kind.as_str() {
        Some("full_attention") if qwen || window.is_none() => Ok(None),
        // With the window switched off, Qwen's sliding layers are full ones.
        Some("sliding_attention") if qwen || window.is_some() => Ok(window),
        Some("full_attention" | "sliding_attention") => {
            Err(keys.wrong("layer_types", "entries that agree with sliding_window"))
        }
        _ => Err(keys.unsupported("layer_types", "full_attention, sliding_attention")),
    };
    types.iter().map(layer).collect()
}

fn dtype(keys: &Keys<'_>) -> Result<Option<Dtype>, Error> {
    let key = if keys.get("dtype").is_some() { "dtype" } else { "torch_dtype" };
    match keys.text(key)? {
        None | Some("auto") => Ok(None),
        Some("bfloat16") => Ok(Some(Dtype::BF16)),
        Some("float16" | "half") => Ok(Some(Dtype::F16)),
        Some("float32" | "float") => Ok(Some(Dtype::F32)),
        Some(_) => Err(keys.unsupported(key, "bfloat16, float16, float32")),
    }
}

fn sort_unique(ids: &mut Vec<u32>) {
    ids.sort_unstable();
    ids.dedup();
}
