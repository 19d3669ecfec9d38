//! Models of a known shape with random weights, for benchmarks.

use loris_loader::{
    Architecture, Checkpoint, Dtype, GenerationDefaults, ModelConfig, RopeConfig, RopeScaling,
    Weights,
};

use super::expected;
use crate::error::Error;

/// Names that [`checkpoint`] knows.
pub const NAMES: [&str; 2] = ["smollm2-135m", "llama-3.2-1b"];

/// A checkpoint with the shape of a published model and random bf16 weights; the same for the same name.
pub fn checkpoint(name: &str) -> Result<Checkpoint, Error> {
    let config = match name {
        "smollm2-135m" => llama(30, 576, 1_536, [9, 3], 49_152, 100_000.0),
        "llama-3.2-1b" => llama(16, 2_048, 8_192, [32, 8], 128_256, 500_000.0),
        _ => return Err(Error::option("synthetic", name, NAMES.join(" or "))),
    };
    let mut state = 1_u64;
    let mut tensors = Vec::new();
    for tensor in expected(&config) {
        let n: usize = tensor.shape.iter().product();
        let mut bytes = Vec::new();
        bytes
            .try_reserve_exact(2 * n)
            .map_err(|_| Error::OutOfMemory { what: "synthetic weights", bytes: 2 * n })?;
        let is_norm = tensor.shape.len() == 1;
        for _ in 0..n {
            let w = if is_norm { half::bf16::ONE } else { small_random(&mut state) };
            bytes.extend_from_slice(&w.to_le_bytes());
        }
        tensors.push((tensor.name, Dtype::BF16, tensor.shape, bytes));
    }
    let weights = Weights::from_memory(tensors)?;
    Ok(Checkpoint { dir: name.into(), config, weights, tokenizer: None, chat: None })
}

/// Uniform in +-0.03, about the spread of trained weights of these widths.
fn small_random(state: &mut u64) -> half::bf16 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    #[allow(clippy::cast_precision_loss)] // 24 bits fit
    let unit = (*state >> 40) as f32 / (1_u32 << 24) as f32;
    half::bf16::from_f32((unit - 0.5) * 0.06)
}

fn llama(
    n_layers: usize,
    hidden_dim: usize,
    ffn_dim: usize,
    [n_q_heads, n_kv_heads]: [usize; 2],
    vocab_size: usize,
    theta: f64,
) -> ModelConfig {
    ModelConfig {
        architecture: Architecture::Llama,
        n_layers,
        n_q_heads,
        n_kv_heads,
        head_dim: 64,
        hidden_dim,
        ffn_dim,
        vocab_size,
        ctx_len: 8_192,
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
