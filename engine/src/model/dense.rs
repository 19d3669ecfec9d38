//! Llama, Mistral, Qwen2 and Qwen3: pre-norm decoders with grouped-query attention and a SiLU-gated MLP.
//!
//! Names are those of the Hugging Face checkpoints without the leading `model.`.

use loris_loader::{Expected, ModelConfig};

use super::weights::{ModelWeights, Progress, Source, tensor};
use crate::backend::{Backend, LayerWeights, random};
use crate::error::Error;

/// The tensors of a checkpoint, in the order of the forward pass.
pub(super) fn expected(config: &ModelConfig) -> Vec<Expected> {
    let (hidden, ffn, vocab) = (config.hidden_dim, config.ffn_dim, config.vocab_size);
    let q_dim = config.n_q_heads * config.head_dim;
    let kv_dim = config.n_kv_heads * config.head_dim;
    let mut tensors = Vec::new();
    let mut add = |name: String, shape: &[usize]| {
        tensors.push(Expected { name, shape: shape.to_vec() });
    };
    add("embed_tokens.weight".into(), &[vocab, hidden]);
    for layer_idx in 0..config.n_layers {
        let mut add = |name: &str, shape: &[usize]| add(layer_name(layer_idx, name), shape);
        add("input_layernorm.weight", &[hidden]);
        add("self_attn.q_proj.weight", &[q_dim, hidden]);
        add("self_attn.k_proj.weight", &[kv_dim, hidden]);
        add("self_attn.v_proj.weight", &[kv_dim, hidden]);
        if config.qkv_bias {
            add("self_attn.q_proj.bias", &[q_dim]);
            add("self_attn.k_proj.bias", &[kv_dim]);
            add("self_attn.v_proj.bias", &[kv_dim]);
        }
        if config.qk_norm {
            add("self_attn.q_norm.weight", &[config.head_dim]);
            add("self_attn.k_norm.weight", &[config.head_dim]);
        }
        add("self_attn.o_proj.weight", &[hidden, q_dim]);
        add("post_attention_layernorm.weight", &[hidden]);
        add("mlp.gate_proj.weight", &[ffn, hidden]);
        add("mlp.up_proj.weight", &[ffn, hidden]);
        add("mlp.down_proj.weight", &[hidden, ffn]);
    }
    add("norm.weight".into(), &[hidden]);
    if !config.tied_embeddings {
        add("lm_head.weight".into(), &[vocab, hidden]);
    }
    tensors
}

/// Puts every expected tensor on the device.
pub(super) fn weights<B: Backend>(
    config: &ModelConfig,
    source: Source<'_>,
    backend: &mut B,
    progress: &mut Progress<'_>,
) -> Result<ModelWeights<B::Matrix, B::Vector>, Error> {
    let expected = expected(config);
    let mut upload = Upload { config, expected, source, backend, progress };
    let embed = upload.matrix("embed_tokens.weight")?;
    let mut layers = Vec::with_capacity(config.n_layers);
    for layer_idx in 0..config.n_layers {
        layers.push(upload.layer(layer_idx)?);
    }
    let final_norm = upload.vector("norm.weight")?;
    let head = match config.tied_embeddings {
        true => None,
        false => Some(upload.matrix("lm_head.weight")?),
    };
    Ok(ModelWeights { embed, layers, final_norm, head })
}

struct Upload<'a, B> {
    config: &'a ModelConfig,
    expected: Vec<Expected>,
    source: Source<'a>,
    backend: &'a mut B,
    progress: &'a mut Progress<'a>,
}

impl<B: Backend> Upload<'_, B> {
    fn matrix(&mut self, name: &str) -> Result<B::Matrix, Error> {
        match self.source {
            Source::Checkpoint(checkpoint) => {
                let tensor = tensor(checkpoint, name)?;
                (self.progress)(tensor.bytes.len())?;
                self.backend.matrix(&tensor)
            }
            Source::Random => {
                let (seed, shape) = random::place(&self.expected, name)?;
                let (n, k) = (shape[0], shape[1]);
                (self.progress)(2 * n * k)?;
                self.backend.random_matrix(n, k, seed, random::SCALE)
            }
        }
    }

    fn vector(&mut self, name: &str) -> Result<B::Vector, Error> {
        self.vectors(&[name])
    }

    /// Vectors end to end.
    fn vectors(&mut self, names: &[&str]) -> Result<B::Vector, Error> {
        let part = |name: &&str| match self.source {
            Source::Checkpoint(checkpoint) => tensor(checkpoint, name),
            Source::Random => random::ones(random::place(&self.expected, name)?.1),
        };
        let parts = names.iter().map(part).collect::<Result<Vec<_>, _>>()?;
        (self.progress)(parts.iter().map(|part| part.bytes.len()).sum())?;
        self.backend.vector(&parts)
    }

    fn layer(&mut self, layer_idx: usize) -> Result<LayerWeights<B::Matrix, B::Vector>, Error> {
        let name = |name: &str| layer_name(layer_idx, name);
        let qkv_bias = match self.config.qkv_bias {
            true => Some(self.vectors(&[
                &name("self_attn.q_proj.bias"),
                &name("self_attn.k_proj.bias"),
                &name("self_attn.v_proj.bias"),
            ])?),
            false => None,
        };
        let qk_norm = match self.config.qk_norm {
            true => Some([
                self.vector(&name("self_attn.q_norm.weight"))?,
                self.vector(&name("self_attn.k_norm.weight"))?,
            ]),
            false => None,
        };
        Ok(LayerWeights {
            attn_norm: self.vector(&name("input_layernorm.weight"))?,
            q: self.matrix(&name("self_attn.q_proj.weight"))?,
            k: self.matrix(&name("self_attn.k_proj.weight"))?,
            v: self.matrix(&name("self_attn.v_proj.weight"))?,
            qkv_bias,
            qk_norm,
            o: self.matrix(&name("self_attn.o_proj.weight"))?,
            mlp_norm: self.vector(&name("post_attention_layernorm.weight"))?,
            gate: self.matrix(&name("mlp.gate_proj.weight"))?,
            up: self.matrix(&name("mlp.up_proj.weight"))?,
            down: self.matrix(&name("mlp.down_proj.weight"))?,
        })
    }
}

fn layer_name(layer_idx: usize, name: &str) -> String {
    format!("layers.{layer_idx}.{name}")
}
