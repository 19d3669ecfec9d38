//! Model folders in the Hugging Face layout, read as untrusted input.
//!
//! [`open`] turns a folder into a [`Checkpoint`]: the facts of `config.json`, the tensors of its safetensors files
//! (mapped, not copied), and where they exist the tokenizer and the chat template. Each part can be opened alone.
//! Everything that a file says is checked before it is used or anything is allocated for it: what is malformed,
//! ambiguous or not understood is an [`Error`] that names the file and the thing, never a guess and never a panic.
//!
//! ```no_run
//! use loris_loader::{OpenOptions, open};
//!
//! let checkpoint = open("SmolLM2-135M-Instruct".as_ref(), &OpenOptions::default())?;
//! let config = &checkpoint.config;
//! let embedding = checkpoint.weights.expect("embed_tokens.weight", &[config.vocab_size, config.hidden_dim])?;
//! println!("{} layers, first byte {}", config.n_layers, embedding.bytes[0]);
//! # Ok::<(), loris_loader::Error>(())
//! ```

#![deny(missing_docs)]

mod added;
mod chat;
mod companions;
mod config;
mod decode;
mod dtype;
mod encode;
mod error;
mod guard;
mod jinja;
mod json;
mod keys;
mod mapping;
pub mod memory;
mod ordered;
mod pieces;
mod quoted;
mod rope;
pub mod safetensors;
mod shards;
mod stream;
mod tokenizer;
mod words;

use std::path::{Path, PathBuf};

use companions::Companions;

pub use chat::{
    CHAT_TEMPLATE, CHAT_TEMPLATES, COPY_BUDGET, Chat, ChatTemplate, FUEL, MAX_TEMPLATE_BYTES,
    Message,
};
pub use companions::{ADDED_TOKENS, SPECIAL_TOKENS_MAP, TOKENIZER, TOKENIZER_CONFIG};
pub use config::{Architecture, CONFIG, GENERATION_CONFIG, GenerationDefaults, ModelConfig};
pub use dtype::Dtype;
pub use error::Error;
pub use mapping::{AlignedBytes, LoadMode, Storage, TensorBytes};
pub use ordered::Json;
pub use quoted::Text;
pub use rope::{RopeConfig, RopeScaling};
pub use shards::{Expected, INDEX, SINGLE, TensorView, Weights, normalise, parse_index};
pub use stream::TextStream;
pub use tokenizer::{MAX_TEXT_BYTES, Special, Tokenizer};

/// The file that says that a folder holds an adapter.
const ADAPTER_CONFIG: &str = "adapter_config.json";

/// How to open a model folder.
#[derive(Debug, Clone, Default)]
pub struct OpenOptions {
    /// Map or read the weight files.
    pub load: LoadMode,
}

/// A model folder, opened.
#[derive(Debug)]
pub struct Checkpoint {
    /// The folder.
    pub dir: PathBuf,
    /// The model's facts.
    pub config: ModelConfig,
    /// The model's tensors.
    pub weights: Weights,
    /// The tokenizer, where the folder has one.
    pub tokenizer: Option<Tokenizer>,
    /// The chat template, where the folder has one.
    pub chat: Option<ChatTemplate>,
    /// What is odd about the folder without being wrong; for people.
    pub warnings: Vec<String>,
}

/// Opens a model folder.
pub fn open(dir: &Path, options: &OpenOptions) -> Result<Checkpoint, Error> {
    open_with_progress(dir, options, &mut |_, _| {})
}

/// Opens a model folder. `progress` hears how many of how many weight files are open.
pub fn open_with_progress(
    dir: &Path,
    options: &OpenOptions,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Checkpoint, Error> {
    let adapter = dir.join(ADAPTER_CONFIG);
    if json::is_there(&adapter)? {
        // The reference puts it on top of the weights.
        return Err(Error::Adapter { file: adapter });
    }
    let mut config = ModelConfig::open(dir)?;
    let mut weights = Weights::open(dir, options.load, progress)?;
    config.tied_embeddings = config.tied_embeddings && weights.is_tied();
    (0..config.n_layers).try_for_each(|layer| weights.unify(layer))?;
    let tokenizer = Tokenizer::open(dir)?;
    let chat = ChatTemplate::open(dir)?;
    if let Some(tokenizer) = &tokenizer
        && let Some(id) =
            Companions::open(dir)?.text("eos_token").and_then(|text| tokenizer.token_to_id(text))
    {
        config.add_eos(id);
    }
    let tokenizer = tokenizer.map(|tokenizer| tokenizer.with_control_ids(&config.eos_ids));
    let mut warnings = weights.warnings().to_vec();
    // The reference makes biases that no file has zeros, with a warning.
    if config.qkv_bias && !weights.names().any(|name| name.ends_with("_proj.bias")) {
        config.qkv_bias = false;
        warnings.push(format!(
            "{}: this architecture has biases of q, k and v, and the weights have none: they are taken as 0",
            dir.display()
        ));
    }
    Ok(Checkpoint { dir: dir.into(), config, weights, tokenizer, chat, warnings })
}
