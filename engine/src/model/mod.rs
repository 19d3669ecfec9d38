//! The architectures that loris runs: which tensors each has, and how they become weights.
//!
//! Llama, Mistral, Qwen2 and Qwen3 are one family of pre-norm decoders; what tells them apart (bias on
//! Q, K and V, a norm over each head, a sliding window, a tied head) are facts of
//! [`ModelConfig`], so one file, [`dense`], serves all four. An architecture with another layer gets a
//! file of its own and a row in [`expected`] and [`weights`].

pub mod dense;
pub mod synthetic;
mod weights;

use loris_loader::{Architecture, Expected, ModelConfig, Weights};

pub use self::weights::{ModelWeights, Progress, Source};
use crate::backend::Backend;
use crate::error::Error;

/// Every tensor that a checkpoint of this architecture must hold, and nothing else.
pub fn expected(config: &ModelConfig) -> Vec<Expected> {
    match config.architecture {
        Architecture::Llama | Architecture::Mistral | Architecture::Qwen2 | Architecture::Qwen3 => {
            dense::expected(config)
        }
    }
}

/// Fails unless the checkpoint holds exactly the tensors of its architecture.
pub fn check(config: &ModelConfig, checkpoint: &Weights) -> Result<(), Error> {
    // A tied head is the embedding, whatever else a file calls so; rotation frequencies are computed.
    let ignored: &[&str] = match config.tied_embeddings {
        true => &["rotary_emb.inv_freq", "lm_head.weight"],
        false => &["rotary_emb.inv_freq"],
    };
    Ok(checkpoint.check_exactly(&expected(config), ignored)?)
}

/// Puts the weights on a device; `progress` is told the bytes of each tensor and may stop it.
pub fn weights<B: Backend>(
    config: &ModelConfig,
    source: Source<'_>,
    backend: &mut B,
    progress: &mut Progress<'_>,
) -> Result<ModelWeights<B::Matrix, B::Vector>, Error> {
    match config.architecture {
        Architecture::Llama | Architecture::Mistral | Architecture::Qwen2 | Architecture::Qwen3 => {
            dense::weights(config, source, backend, progress)
        }
    }
}
