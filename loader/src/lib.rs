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
mod config;
mod decode;
mod dtype;
mod encode;
mod error;
mod json;
mod keys;
mod mapping;
pub mod memory;
mod metered;
mod pieces;
mod python;
mod rope;
pub mod safetensors;
mod shards;
mod shield;
mod stream;
mod tokenizer;
mod words;

use std::path::{Path, PathBuf};

pub use chat::{
    CHAT_TEMPLATE, COPY_BUDGET, ChatTemplate, FUEL, MAX_TEMPLATE_BYTES, Message, TOKENIZER_CONFIG,
};
pub use config::{Architecture, CONFIG, GENERATION_CONFIG, GenerationDefaults, ModelConfig};
pub use dtype::Dtype;
pub use error::{Error, Text};
pub use mapping::{AlignedBytes, LoadMode, Storage, TensorBytes};
pub use rope::{RopeConfig, RopeScaling};
pub use shards::{Expected, INDEX, SINGLE, TensorView, Weights, normalise, parse_index};
pub use stream::TextStream;
pub use tokenizer::{MAX_TEXT_BYTES, Special, TOKENIZER, Tokenizer};

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
    let mut config = ModelConfig::open(dir)?;
    let weights = Weights::open(dir, options.load, progress)?;
    let tokenizer = Tokenizer::open(dir)?;
    let chat = ChatTemplate::open(dir)?;
    if let Some(tokenizer) = &tokenizer {
        tokenizer.check_vocab(config.vocab_size)?;
        if let Some(id) = chat::eos_token(dir)?.and_then(|text| tokenizer.token_to_id(&text)) {
            config.add_eos(id);
        }
    }
    Ok(Checkpoint { dir: dir.into(), config, weights, tokenizer, chat })
}
