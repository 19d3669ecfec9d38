//! A model of the Llama family in f64, one row at a time, over a cache of which any part may be missing: what the
//! references of the policies are made of.

use std::collections::BTreeMap;

use loris::loader::{Checkpoint, Dtype, ModelConfig};

use crate::reference::{attend, dot, matvec, rms_norm, rotate, silu};

/// All heads of one token in one layer.
pub(crate) type KeyValue = (Vec<f64>, Vec<f64>);

/// The weights of one layer.
#[derive(Clone)]
struct Layer {
    attn_norm: Vec<f64>,
    qkv: [Vec<f64>; 3],
    o: Vec<f64>,
    mlp_norm: Vec<f64>,
    mlp: [Vec<f64>; 3],
}

/// Weights, and for each layer what is in its cache: position to key and value.
#[derive(Clone)]
pub(crate) struct Naive {
    pub(crate) config: ModelConfig,
    embed: Vec<f64>,
    head: Vec<f64>,
    layers: Vec<Layer>,
    final_norm: Vec<f64>,
    pub(crate) kv: Vec<BTreeMap<u32, KeyValue>>,
}

impl Naive {
    pub(crate) fn new(checkpoint: &Checkpoint) -> Self {
        let tensor = |name: &str| -> Vec<f64> {
            let tensor = checkpoint.weights.get(name).unwrap();
            let float = |b: &[u8]| match tensor.dtype {
                Dtype::BF16 => half::bf16::from_le_bytes(b.try_into().unwrap()).to_f64(),
                _ => f64::from(f32::from_le_bytes(b.try_into().unwrap())),
            };
            let n = tensor.shape.iter().product::<usize>();
            tensor.bytes.chunks_exact(tensor.bytes.len() / n).map(float).collect()
        };
        let config = checkpoint.config.clone();
        let layer = |l: usize| {
            let get = |name: &str| tensor(&format!("layers.{l}.{name}.weight"));
            Layer {
                attn_norm: get("input_layernorm"),
                qkv: ["q", "k", "v"].map(|x| get(&format!("self_attn.{x}_proj"))),
                o: get("self_attn.o_proj"),
                mlp_norm: get("post_attention_layernorm"),
                mlp: ["gate", "up", "down"].map(|x| get(&format!("mlp.{x}_proj"))),
            }
        };
        let head = if config.tied_embeddings { "embed_tokens.weight" } else { "lm_head.weight" };
        Self {
            embed: tensor("embed_tokens.weight"),
            head: tensor(head),
            layers: (0..config.n_layers).map(layer).collect(),
            final_norm: tensor("norm.weight"),
            kv: vec![BTreeMap::new(); config.n_layers],
            config,
        }
    }

    /// The hidden state that a token begins with.
    pub(crate) fn embed(&self, id: u32) -> Vec<f64> {
        let hidden = self.config.hidden_dim;
        self.embed[id as usize * hidden..][..hidden].to_vec()
    }

    /// Logits of a token from its last hidden state.
    pub(crate) fn logits(&self, state: &[f64]) -> Vec<f64> {
        matvec(&self.head, &rms_norm(state, &self.final_norm, self.config.norm_eps.into()))
    }

    /// One layer for the tokens at some positions, whose hidden states change; gives their queries. A row sees what
    /// the cache holds up to itself.
    pub(crate) fn layer(&mut self, l: usize, rows: &mut [(u32, &mut Vec<f64>)]) -> Vec<Vec<f64>> {
        let layer = &self.layers[l];
        let (eps, d) = (self.config.norm_eps.into(), self.config.head_dim);
        let (inv_freq, scale) = self.config.rope.inv_freq(d, 0);
        let turned = |x: Vec<f64>, position: u32| -> Vec<f64> {
            x.chunks(d).flat_map(|head| rotate(head, position, &inv_freq, scale)).collect()
        };
        let mut queries = Vec::new();
        for (position, state) in &*rows {
            let x = rms_norm(state, &layer.attn_norm, eps);
            queries.push(turned(matvec(&layer.qkv[0], &x), *position));
            let key = turned(matvec(&layer.qkv[1], &x), *position);
            let old = self.kv[l].insert(*position, (key, matvec(&layer.qkv[2], &x)));
            assert!(old.is_none(), "token {position} is computed twice in layer {l}");
        }
        let group = self.config.n_q_heads / self.config.n_kv_heads;
        for ((position, state), query) in rows.iter_mut().zip(&queries) {
            let mut attended = Vec::new();
            for (head, q) in query.chunks(d).enumerate() {
                let seen = self.kv[l].range(..=*position).map(|(_, kv)| kv);
                let part = |x: &[f64]| x[head / group * d..][..d].to_vec();
                let (keys, values): (Vec<_>, Vec<_>) =
                    seen.map(|(k, v)| (part(k), part(v))).unzip();
                let keys: Vec<&[f64]> = keys.iter().map(Vec::as_slice).collect();
                let values: Vec<&[f64]> = values.iter().map(Vec::as_slice).collect();
                attended.extend(attend(q, &keys, &values));
            }
            add(state, &matvec(&layer.o, &attended));
            let x = rms_norm(state, &layer.mlp_norm, eps);
            let (gate, up) = (matvec(&layer.mlp[0], &x), matvec(&layer.mlp[1], &x));
            let h: Vec<f64> = gate.iter().zip(&up).map(|(&g, &u)| silu(g) * u).collect();
            add(state, &matvec(&layer.mlp[2], &h));
        }
        queries
    }

    /// Attention that every token in a layer's cache gets from some rows, position and query each: the mean over these
    /// and all heads.
    pub(crate) fn scores<'q>(
        &self,
        l: usize,
        rows: impl ExactSizeIterator<Item = (u32, &'q Vec<f64>)>,
    ) -> BTreeMap<u32, f64> {
        let (d, n_heads, n_rows) = (self.config.head_dim, self.config.n_q_heads, rows.len());
        let group = n_heads / self.config.n_kv_heads;
        let mut scores: BTreeMap<u32, f64> = self.kv[l].keys().map(|&p| (p, 0.0)).collect();
        for (position, query) in rows {
            for (head, q) in query.chunks(d).enumerate() {
                let weight =
                    |key: &[f64]| (dot(q, &key[head / group * d..][..d]) / (d as f64).sqrt()).exp();
                let seen: Vec<(u32, f64)> = self.kv[l]
                    .range(..=position)
                    .map(|(&position, (key, _))| (position, weight(key)))
                    .collect();
                let sum: f64 = seen.iter().map(|(_, weight)| weight).sum();
                for (position, weight) in seen {
                    *scores.get_mut(&position).unwrap() += weight / sum / (n_heads * n_rows) as f64;
                }
            }
        }
        scores
    }
}

fn add(x: &mut [f64], y: &[f64]) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
}
