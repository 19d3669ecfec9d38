//! What weights come from, and what they become.

use loris_loader::{TensorView, Weights};

use crate::backend::LayerWeights;
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

/// Told the bytes of each tensor; an error ends the loading.
pub type Progress<'a> = dyn FnMut(usize) -> Result<(), Error> + 'a;

/// Where weights come from.
#[derive(Clone, Copy, Debug)]
pub enum Source<'a> {
    /// A checkpoint that [`check`](super::check) has seen.
    Checkpoint(&'a Weights),
    /// Nowhere: random matrices, made on the device, and norms of ones.
    Random,
}

/// A tensor that [`check`](super::check) has seen.
pub(super) fn tensor(checkpoint: &Weights, name: &str) -> Result<TensorView, Error> {
    let missing = || Error::State { call: "weights", reason: format!("{name} was not checked") };
    checkpoint.get(name).ok_or_else(missing)
}
