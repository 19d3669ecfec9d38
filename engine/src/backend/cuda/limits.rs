//! What the kernels can take, and what a model takes of a device.

use loris_kernels::has_kernels;
use loris_loader::ModelConfig;

use crate::error::Error;
use crate::plan::Plan;
use crate::store::{HEAD_DIMS, Sides};

/// Fails where the kernels lack what the model or an option asks for.
pub fn check(plan: &Plan, config: &ModelConfig) -> Result<(), Error> {
    let group_size = plan.shape.group_size();
    if group_size > 16 {
        return Err(unsupported("query heads a key head", group_size, "at most 16"));
    }
    for (what, width) in [("hidden_dim", config.hidden_dim), ("ffn_dim", config.ffn_dim)] {
        if !width.is_multiple_of(8) {
            return Err(unsupported(what, width, "a multiple of 8"));
        }
    }
    check_pages(plan.shape.head_dim, plan.layout.kv, plan.kv)
}

/// Pages of heads of this width in these formats, which are called `name`.
pub(super) fn check_pages(head_dim: usize, kv: Sides, name: impl ToString) -> Result<(), Error> {
    if !HEAD_DIMS.contains(&head_dim) {
        return Err(unsupported("head_dim", head_dim, "32, 64 or 128"));
    }
    match has_kernels(kv) {
        true => Ok(()),
        false => Err(unsupported("--kv", name, KV_FORMATS)),
    }
}

/// What [`has_kernels`] takes.
const KV_FORMATS: &str = "bf16, fp8, int8, int4, int4-plain, int4-channel, int2, int8:int4 or bf16:int4; other formats on the CPU";

/// Device memory of a model, all of it taken from the start: weights are bf16 there whatever they are stored in, operands of
/// products too, and the page pool is not taken as it fills.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CudaBytes {
    /// Weights in bf16.
    pub weights: u64,
    /// The page pool.
    pub kv: u64,
    /// Hidden states between segments of the layers.
    pub aux: u64,
    /// Activations of one pass.
    pub activations: u64,
    /// Logits of one pass.
    pub logits: u64,
}

impl CudaBytes {
    /// Of a model with `n_params` weights.
    pub fn new(plan: &Plan, config: &ModelConfig, n_params: u64) -> Self {
        let q_dim = plan.shape.n_q_heads * plan.shape.head_dim;
        // The residual stream in f32; its norm, Q, the attention output and the MLP's row in bf16.
        // And in f32 what attention leaves for its mass.
        let row = 4 * (config.hidden_dim + plan.shape.n_q_heads)
            + 2 * (config.hidden_dim + 2 * q_dim + config.ffn_dim);
        Self {
            weights: n_params.saturating_mul(2),
            kv: plan.kv_bytes as u64,
            aux: (plan.aux_bytes() + plan.transit_bytes()) as u64,
            activations: (plan.max_rows as u64).saturating_mul(row as u64),
            logits: plan.logits_bytes as u64,
        }
    }

    /// All of it.
    pub fn total(&self) -> u64 {
        [self.weights, self.kv, self.aux, self.activations, self.logits]
            .into_iter()
            .fold(0, u64::saturating_add)
    }
}

pub(super) fn unsupported(
    what: &'static str,
    found: impl ToString,
    expected: &'static str,
) -> Error {
    Error::Unsupported { device: "cuda", what: what.into(), found: found.to_string(), expected }
}
