//! The architectures that loris runs: which tensors each has, and how they become weights.
//!
//! Llama, Mistral, Qwen2 and Qwen3 are one family of pre-norm decoders; what tells them apart (bias on
//! Q, K and V, a norm over each head, a sliding window, a tied head) are facts of
//! [`ModelConfig`], so one file, [`dense`], serves all four. An architecture with another layer gets a
//! file of its own and a row in [`expected`] and [`weights`].

pub mod dense;
pub mod synthetic;

use loris_loader::{Architecture, Expected, ModelConfig, TensorView, Weights};

use crate::backend::{Backend, LayerWeights};
use crate::error::Error;

/// All weights of a model on a device.
#[derive(Debug)]
pub struct ModelWeights<M, V> {
    /// `[vocab_size][hidden_dim]`.
    pub embed: M,
    /// First to last.
    pub layers: Vec<LayerWeights<M, V>>,
    /// RMS norm before the head, `[hidden_dim]`.
    pub final_norm: V,
    /// `[vocab_size][hidden_dim]`; `None`: the head is `embed`.
    pub head: Option<M>,
}

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

/// Told the bytes of each tensor; an error ends the loading.
pub type Progress<'a> = dyn FnMut(usize) -> Result<(), Error> + 'a;

/// Where weights come from.
#[derive(Clone, Copy, Debug)]
pub enum Source<'a> {
    /// A checkpoint that [`check`] has seen.
    Checkpoint(&'a Weights),
    /// Nowhere: random matrices, made on the device, and norms of ones.
    Random,
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

/// A tensor that [`check`] has seen.
fn tensor(checkpoint: &Weights, name: &str) -> Result<TensorView, Error> {
    let missing = || Error::State { call: "weights", reason: format!("{name} was not checked") };
    checkpoint.get(name).ok_or_else(missing)
}
