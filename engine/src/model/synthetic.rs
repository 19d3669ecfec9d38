//! Models of a known shape with random weights, for benchmarks: nothing to download, and what only the shape
//! decides - time and memory - is that of the real model.

use loris_loader::{Architecture, Dtype, GenerationDefaults, ModelConfig, RopeConfig, RopeScaling};

use super::expected;
use crate::error::Error;

/// Names that [`config`] knows.
pub const NAMES: [&str; 4] = ["smollm2-135m", "llama-3.2-1b", "llama-2-7b", "llama-3.1-8b"];

/// Facts of a published model.
pub fn config(name: &str) -> Result<ModelConfig, Error> {
    let llama3 = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_ctx: 8_192,
    };
    Ok(match name {
        "smollm2-135m" => llama(30, [576, 1_536], [9, 3, 64], 49_152, 8_192, 100_000.0),
        "llama-3.2-1b" => llama(16, [2_048, 8_192], [32, 8, 64], 128_256, 8_192, 500_000.0),
        "llama-2-7b" => ModelConfig {
            tied_embeddings: false,
            ..llama(32, [4_096, 11_008], [32, 32, 128], 32_000, 4_096, 10_000.0)
        },
        "llama-3.1-8b" => ModelConfig {
            tied_embeddings: false,
            rope: RopeConfig { theta: 500_000.0, scaling: llama3 },
            ..llama(32, [4_096, 14_336], [32, 8, 128], 128_256, 131_072, 500_000.0)
        },
        _ => return Err(Error::option("synthetic", name, NAMES.join(" or "))),
    })
}

/// Bytes of all weights, as bf16.
pub(crate) fn weight_bytes(config: &ModelConfig) -> u64 {
    expected(config).iter().map(|t| 2 * t.shape.iter().product::<usize>() as u64).sum()
}

fn llama(
    n_layers: usize,
    [hidden_dim, ffn_dim]: [usize; 2],
    [n_q_heads, n_kv_heads, head_dim]: [usize; 3],
    vocab_size: usize,
    ctx_len: usize,
    theta: f64,
) -> ModelConfig {
    ModelConfig {
        architecture: Architecture::Llama,
        n_layers,
        n_q_heads,
        n_kv_heads,
        head_dim,
        hidden_dim,
        ffn_dim,
        vocab_size,
        ctx_len,
        norm_eps: 1e-5,
        rope: RopeConfig { theta, scaling: RopeScaling::None },
        tied_embeddings: true,
        qkv_bias: false,
        qk_norm: false,
        windows: vec![None; n_layers],
        bos_id: None,
        eos_ids: Vec::new(),
        pad_id: None,
        dtype: Some(Dtype::BF16),
        generation: GenerationDefaults::default(),
    }
}
