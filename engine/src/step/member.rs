//! What a step has of a session.

use loris_loader::{ModelConfig, RopeScaling};

use crate::engine::Shared;
use crate::sequence::{Pending, Sequence};
use crate::sync::Arc;
use crate::sync::atomic::AtomicBool;

/// What a step did for one session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Nothing was queued.
    Idle,
    /// Queued tokens are still to be computed; step again.
    Pending {
        /// Queued tokens that are in the cache.
        done: usize,
        /// Tokens that were queued.
        total: usize,
    },
    /// All queued tokens are in the cache and the logits of the last are ready.
    Ready,
}

/// A sequence of a model, and what stands beside it.
pub(crate) struct Member<'s> {
    pub(crate) shared: &'s Shared,
    pub(crate) seq: &'s mut Sequence,
    pub(crate) rope: &'s mut Rope,
    /// Of the last token, `[vocab_size]`.
    pub(crate) logits: &'s mut [f32],
    pub(crate) cancel: &'s Arc<AtomicBool>,
}

/// Rotation frequencies for a sequence length.
#[derive(Clone, Debug)]
pub(crate) struct Rope {
    pub(crate) inv_freq: Vec<f64>,
    pub(crate) scale: f64,
    seq_len: usize,
}

impl Member<'_> {
    /// The same for a while.
    pub(crate) fn again(&mut self) -> Member<'_> {
        let Self { shared, seq, rope, logits, cancel } = self;
        Member { shared, seq, rope, logits, cancel }
    }

    /// How far what is queued has come.
    pub(crate) fn progress(&self) -> Progress {
        match &self.seq.pending {
            Pending::Nothing => Progress::Idle,
            Pending::Prompt { tokens, done } => {
                Progress::Pending { done: self.seq.tokens_worth(*done), total: tokens.len() }
            }
            Pending::Token(_) => Progress::Pending { done: 0, total: 1 },
        }
    }

    /// A generated token goes through all segments or through none.
    pub(crate) fn undo_token(&mut self) {
        self.seq.undo_token(&self.shared.plan.layout, &mut self.shared.pool());
    }
}

impl Rope {
    pub(crate) fn new(config: &ModelConfig, seq_len: usize) -> Self {
        let (inv_freq, scale) = config.rope.inv_freq(config.head_dim, seq_len);
        Self { inv_freq, scale, seq_len }
    }

    /// Dynamic scaling depends on how long the sequence will be with all that is queued; no other does.
    pub(crate) fn fit(&mut self, config: &ModelConfig, seq_len: usize) {
        let dynamic = matches!(config.rope.scaling, RopeScaling::Dynamic { .. });
        if dynamic && seq_len != self.seq_len {
            *self = Self::new(config, seq_len);
        }
    }
}
