//! LazyLLM: a session that prunes agrees with a naive reference of the same algorithm, in numbers and in
//! which tokens are computed where; and what must not change does not.
#![allow(clippy::unwrap_used)]

#[allow(dead_code)] // its comparison by the largest
mod reference;
mod support;

use std::collections::BTreeMap;

use loris::backend::cpu::{CpuBackend, CpuOptions};
use loris::backend::{Backend, RowUse};
use loris::loader::{Checkpoint, Dtype, ModelConfig, Weights};
use loris::policy::{Lazy, PrunePoint};
use loris::{KvFormat, Model, ModelOptions, Session, SessionOptions};
use reference::{compare_to, dot, matvec, rms_norm, rotate, silu};
use support::{argmax, bits, checkpoint, open_cpu, open_cuda, rounded};

const NAME: &str = "llama-tied";

/// A schedule without a guard, so that short sequences are pruned.
fn lazy(points: &[(usize, f64)]) -> Lazy {
    let points = points.iter().map(|&(layer, keep_rate)| PrunePoint { layer, keep_rate }).collect();
    Lazy { min_len: 0, sinks: 2, ..Lazy::new(points) }
}

fn options(chunk: usize) -> ModelOptions {
    ModelOptions {
        kv: KvFormat::F32,
        kv_tokens: Some(4096),
        aux_tokens: 4096,
        page_len: 16,
        chunk,
        ..ModelOptions::default()
    }
}

fn session(model: &Model, lazy: Option<&Lazy>) -> Session {
    model.session(&SessionOptions { lazy: lazy.cloned(), ..SessionOptions::default() }).unwrap()
}

/// A prompt of `n` tokens, another for each `seed`.
#[allow(clippy::cast_possible_truncation)]
fn prompt(seed: usize, n: usize) -> Vec<u32> {
    (0..n).map(|i| ((i * 31 + seed * 17 + i * i * (seed + 3)) % 128) as u32).collect()
}

/// The weights of one layer, f64.
struct Layer {
    attn_norm: Vec<f64>,
    qkv: [Vec<f64>; 3],
    o: Vec<f64>,
    mlp_norm: Vec<f64>,
    mlp: [Vec<f64>; 3],
}

/// All heads of one token in one layer.
type KeyValue = (Vec<f64>, Vec<f64>);

/// The whole algorithm, token by token.
struct Reference {
    config: ModelConfig,
    embed: Vec<f64>,
    head: Vec<f64>,
    layers: Vec<Layer>,
    final_norm: Vec<f64>,
    lazy: Lazy,
    /// Hidden state of every token behind the last segment that it went through, and how many it did.
    states: Vec<(Vec<f64>, usize)>,
    /// For each layer: position to key and value, all heads.
    kv: Vec<BTreeMap<u32, KeyValue>>,
    /// (token, layer) pairs that were computed, and earlier tokens that were taken up again.
    token_layers: usize,
    n_revived: usize,
    /// Of all choices, the narrowest: the ratio of the last score that was taken to the first that was not.
    margin: f64,
}

impl Reference {
    fn new(checkpoint: &Checkpoint, lazy: &Lazy) -> Self {
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
            lazy: lazy.clone(),
            states: Vec::new(),
            kv: vec![BTreeMap::new(); config.n_layers],
            token_layers: 0,
            n_revived: 0,
            margin: f64::INFINITY,
            config,
        }
    }

    /// Logits after the last of `tokens`; `cap` limits what is taken up again at each point.
    fn feed(&mut self, tokens: &[u32], cap: usize) -> Vec<f64> {
        let hidden = self.config.hidden_dim;
        let n_old = self.states.len();
        for &id in tokens {
            let row = self.embed[id as usize * hidden..][..hidden].to_vec();
            self.states.push((row, 0));
        }
        let points: Vec<usize> = self.lazy.points.iter().map(|point| point.layer).collect();
        let mut bounds = vec![0];
        bounds.extend(points);
        bounds.push(self.config.n_layers);
        let mut rows: Vec<usize> = (n_old..self.states.len()).collect();
        for (segment, layers) in bounds.windows(2).enumerate() {
            let mut queries = Vec::new();
            for l in layers[0]..layers[1] {
                queries = self.layer(l, &rows);
            }
            for &row in &rows {
                assert_eq!(self.states[row].1, segment, "each segment once, in order");
                self.states[row].1 += 1;
            }
            self.token_layers += rows.len() * (layers[1] - layers[0]);
            self.n_revived +=
                if segment > 0 { rows.iter().filter(|&&r| r < n_old).count() } else { 0 };
            if segment < self.lazy.points.len() {
                let window = self.lazy.window.min(tokens.len());
                let scores = self.scores(layers[1] - 1, &rows, &queries, window);
                rows = self.choose(segment, &scores, n_old, cap);
            }
        }
        let last =
            rms_norm(&self.states.last().unwrap().0, &self.final_norm, self.config.norm_eps.into());
        matvec(&self.head, &last)
    }

    /// One layer for some rows; gives their queries.
    fn layer(&mut self, l: usize, rows: &[usize]) -> Vec<Vec<f64>> {
        let layer = &self.layers[l];
        let (eps, d) = (self.config.norm_eps.into(), self.config.head_dim);
        let (inv_freq, scale) = self.config.rope.inv_freq(d, 0);
        let turned = |x: Vec<f64>, row: usize| -> Vec<f64> {
            x.chunks(d).flat_map(|head| rotate(head, row as u32, &inv_freq, scale)).collect()
        };
        let mut queries = Vec::new();
        for &row in rows {
            let x = rms_norm(&self.states[row].0, &layer.attn_norm, eps);
            queries.push(turned(matvec(&layer.qkv[0], &x), row));
            let key = turned(matvec(&layer.qkv[1], &x), row);
            let old = self.kv[l].insert(row as u32, (key, matvec(&layer.qkv[2], &x)));
            assert!(old.is_none(), "token {row} is computed twice in layer {l}");
        }
        let group = self.config.n_q_heads / self.config.n_kv_heads;
        for (&row, query) in rows.iter().zip(&queries) {
            let mut attended = Vec::new();
            for (head, q) in query.chunks(d).enumerate() {
                let seen = self.kv[l].range(..=row as u32).map(|(_, kv)| kv);
                let part = |x: &[f64]| x[head / group * d..][..d].to_vec();
                let (keys, values): (Vec<_>, Vec<_>) =
                    seen.map(|(k, v)| (part(k), part(v))).unzip();
                let keys: Vec<&[f64]> = keys.iter().map(Vec::as_slice).collect();
                let values: Vec<&[f64]> = values.iter().map(Vec::as_slice).collect();
                attended.extend(reference::attend(q, &keys, &values));
            }
            let state = &mut self.states[row].0;
            add(state, &matvec(&layer.o, &attended));
            let x = rms_norm(state, &layer.mlp_norm, eps);
            let (gate, up) = (matvec(&layer.mlp[0], &x), matvec(&layer.mlp[1], &x));
            let h: Vec<f64> = gate.iter().zip(&up).map(|(&g, &u)| silu(g) * u).collect();
            add(state, &matvec(&layer.mlp[2], &h));
        }
        queries
    }

    /// Equation 1 over the last `window` rows.
    fn scores(
        &self,
        l: usize,
        rows: &[usize],
        queries: &[Vec<f64>],
        window: usize,
    ) -> BTreeMap<u32, f64> {
        let (d, n_heads) = (self.config.head_dim, self.config.n_q_heads);
        let group = n_heads / self.config.n_kv_heads;
        let mut scores: BTreeMap<u32, f64> = self.kv[l].keys().map(|&p| (p, 0.0)).collect();
        for (&row, query) in rows.iter().zip(queries).skip(rows.len() - window) {
            for (head, q) in query.chunks(d).enumerate() {
                let weight =
                    |key: &[f64]| (dot(q, &key[head / group * d..][..d]) / (d as f64).sqrt()).exp();
                let seen: Vec<(u32, f64)> = self.kv[l]
                    .range(..=row as u32)
                    .map(|(&position, (key, _))| (position, weight(key)))
                    .collect();
                let sum: f64 = seen.iter().map(|(_, weight)| weight).sum();
                for (position, weight) in seen {
                    *scores.get_mut(&position).unwrap() += weight / sum / (n_heads * window) as f64;
                }
            }
        }
        scores
    }

    fn choose(
        &mut self,
        segment: usize,
        scores: &BTreeMap<u32, f64>,
        n_old: usize,
        cap: usize,
    ) -> Vec<usize> {
        let len = self.states.len();
        let forced =
            |p: u32| (p as usize) < self.lazy.sinks || p as usize + self.lazy.window >= len;
        let mut order: Vec<u32> = scores.keys().copied().collect();
        order.sort_by(|a, b| {
            forced(*b).cmp(&forced(*a)).then(scores[b].total_cmp(&scores[a])).then(a.cmp(b))
        });
        let n_forced = order.iter().filter(|&&p| forced(p)).count();
        let rate = self.lazy.points[segment].keep_rate;
        let n_keep = (order.len() as f64 * rate).ceil() as usize;
        let n_keep = n_keep.max(n_forced);
        let mut margin = self.margin;
        let mut note = |order: &[u32], n: usize| {
            if let [.., taken] = order[..n]
                && let [left, ..] = order[n..]
            {
                margin = margin.min(scores[&taken] / scores[&left]);
            }
        };
        if n_keep > n_forced {
            note(&order, n_keep);
        }
        order.truncate(n_keep);
        order.retain(|&p| self.states[p as usize].1 == segment + 1);
        let (mut old, new): (Vec<u32>, Vec<u32>) =
            order.into_iter().partition(|&p| (p as usize) < n_old);
        old.sort_by(|a, b| scores[b].total_cmp(&scores[a]).then(a.cmp(b)));
        note(&old, cap.min(old.len()));
        self.margin = margin;
        old.truncate(cap);
        let mut rows: Vec<usize> = old.into_iter().chain(new).map(|p| p as usize).collect();
        rows.sort_unstable();
        rows
    }

    fn counts(&self) -> [usize; 3] {
        [self.token_layers, self.n_waiting(), self.n_revived]
    }

    fn n_waiting(&self) -> usize {
        let n_segments = self.lazy.points.len() + 1;
        self.states.iter().filter(|(_, depth)| *depth < n_segments).count()
    }
}

fn add(x: &mut [f64], y: &[f64]) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
}

fn check(session: &Session, want: &[f64], reference: &Reference, what: &str) {
    compare_to(session.logits().unwrap(), want, 1e-4, 1e-4, what);
    let what = format!("{what}: (token, layer) pairs, waiting, revived");
    assert_eq!(counts(session), reference.counts(), "{what}");
}

/// (token, layer) pairs that were computed, tokens that wait, and tokens that were taken up again.
fn counts(session: &Session) -> [usize; 3] {
    let receipt = session.receipt();
    [receipt.token_layers, receipt.n_waiting, receipt.n_revived]
}

#[test]
fn a_session_follows_the_reference_token_by_token() {
    let checkpoint = checkpoint(NAME);
    let n_layers = checkpoint.config.n_layers;
    assert!(n_layers >= 2, "{n_layers}");
    let (mut n_revived, mut n_pruned) = (0, 0);
    for (window, cap, rate, chunk) in
        [(1, 16, 0.5, 512), (1, 2, 0.3, 7), (4, 1, 0.5, 16), (3, 16, 0.7, 5), (1, 0, 0.5, 64)]
    {
        let points: Vec<(usize, f64)> = (1..n_layers).map(|layer| (layer, rate)).collect();
        let lazy = Lazy { window, max_revived: cap, ..lazy(&points) };
        let mut reference = Reference::new(&checkpoint, &lazy);
        let model = open_cpu(self::checkpoint(NAME), &options(chunk));
        let mut s = session(&model, Some(&lazy));
        for (turn, n) in [(1, 60), (2, 1), (3, 30)] {
            let what =
                format!("window {window}, cap {cap}, rate {rate}, chunk {chunk}, turn {turn}");
            s.prefill(&prompt(turn, n)).unwrap();
            let want = reference.feed(&prompt(turn, n), usize::MAX);
            check(&s, &want, &reference, &what);
            n_pruned += reference.n_waiting();
            for step in 0..12 {
                let id = argmax(s.logits().unwrap()) as u32;
                s.decode(id).unwrap();
                let want = reference.feed(&[id], cap);
                check(&s, &want, &reference, &format!("{what}, step {step}"));
            }
        }
        n_revived += reference.n_revived;
        drop(s);
        assert_eq!(model.pool_usage().n_used, 0);
    }
    assert!(n_revived > 100 && n_pruned > 100, "{n_revived} revived, {n_pruned} pruned");
}

/// The kernels round to bf16 what the reference does not, which moves scores by some 1 %. The prompts are such that no
/// choice is closer than [`MARGIN`], so it must be the same; logits are compared as those of other sessions are.
#[test]
fn a_session_on_cuda_follows_the_reference_token_by_token() {
    const MARGIN: f64 = 1.03;
    let (mut n_revived, mut n_pruned) = (0, 0);
    for (seed, name, points, window, cap, chunk) in [
        (117, "llama-tied", &[(1, 0.5)][..], 1, 2, 64),
        (32, "llama-tied", &[(1, 0.3)], 3, 16, 7),
        (4, "llama-sharded", &[(1, 0.6), (2, 0.5)], 1, 16, 16),
        (119, "llama-sharded", &[(1, 0.5), (2, 0.7)], 2, 1, 5),
    ] {
        let checkpoint = rounded(name, Dtype::BF16);
        let lazy = Lazy { window, max_revived: cap, ..lazy(points) };
        let mut reference = Reference::new(&checkpoint, &lazy);
        let model = open_cuda(checkpoint, &ModelOptions { kv: KvFormat::Bf16, ..options(chunk) });
        let mut s = session(&model, Some(&lazy));
        let (mut difference, mut norm) = (0.0, 0.0);
        for (turn, n, n_steps) in [(1, 24, 4), (2, 9, 3)] {
            let tokens = prompt(seed + turn, n + n_steps);
            for step in 0..=n_steps {
                let want = match step {
                    0 => {
                        s.prefill(&tokens[..n]).unwrap();
                        reference.feed(&tokens[..n], usize::MAX)
                    }
                    _ => {
                        s.decode(tokens[n + step - 1]).unwrap();
                        reference.feed(&tokens[n + step - 1..n + step], cap)
                    }
                };
                for (&got, want) in s.logits().unwrap().iter().zip(&want) {
                    difference += (f64::from(got) - want).powi(2);
                    norm += want.powi(2);
                }
                assert_eq!(counts(&s), reference.counts(), "{name}, turn {turn}, step {step}");
            }
        }
        let (distance, margin) = (f64::sqrt(difference / norm), reference.margin);
        assert!(margin > MARGIN, "{name}, seed {seed}: {margin}");
        assert!(distance <= 2e-2, "{name}, seed {seed}: {distance:e}");
        n_revived += reference.n_revived;
        n_pruned += reference.n_waiting();
    }
    assert!(n_revived > 50 && n_pruned > 10, "{n_revived} revived, {n_pruned} waiting");
}

/// Bits of the logits after each of some turns, of so many tokens each, and after each of five more tokens.
fn run(s: &mut Session, turns: &[usize]) -> Vec<Vec<u32>> {
    let mut out = Vec::new();
    for (turn, &n) in (1..).zip(turns) {
        s.prefill(&prompt(turn, n)).unwrap();
        out.push(bits(s.logits().unwrap()));
        for _ in 0..5 {
            s.decode(argmax(s.logits().unwrap()) as u32).unwrap();
            out.push(bits(s.logits().unwrap()));
        }
    }
    out
}

fn keeping_all_is_dense(open: &dyn Fn(&ModelOptions) -> Model, turns: &[usize]) {
    for (chunk, rate, min_len) in [(512, 1.0, 0), (9, 1.0, 0), (33, 0.3, 10_000)] {
        let model = open(&ModelOptions { kv: KvFormat::Bf16, ..options(chunk) });
        let want = run(&mut session(&model, None), turns);
        let lazy = Lazy { min_len, ..lazy(&[(1, rate)]) };
        let mut s = session(&model, Some(&lazy));
        assert!(run(&mut s, turns) == want, "chunk {chunk}, rate {rate}, guard {min_len}");
        assert_eq!((s.receipt().n_waiting, s.receipt().n_revived), (0, 0));
    }
}

#[test]
fn keeping_all_is_dense_bit_for_bit() {
    keeping_all_is_dense(&|options| open_cpu(checkpoint(NAME), options), &[100, 1, 17]);
}

#[test]
fn keeping_all_on_cuda_is_dense_bit_for_bit() {
    keeping_all_is_dense(&|options| open_cuda(rounded(NAME, Dtype::BF16), options), &[40, 1, 9]);
}

/// Chunks and page lengths, and turns whose first is longer than the chunks.
fn the_choice_is_the_same(
    open: &dyn Fn(&ModelOptions) -> Model,
    turns: &[usize],
    forms: &[(usize, usize)],
) {
    let lazy = Lazy { window: 3, ..lazy(&[(1, 0.4)]) };
    let want = run(&mut session(&open(&options(512)), Some(&lazy)), turns);
    for &(chunk, page_len) in forms {
        let model = open(&ModelOptions { page_len, ..options(chunk) });
        let mut s = session(&model, Some(&lazy));
        assert!(run(&mut s, turns) == want, "chunk {chunk}, page {page_len}");
    }
}

#[test]
fn what_is_kept_does_not_depend_on_chunks_or_pages() {
    let forms = [(4, 16), (7, 32), (64, 64), (99, 16), (101, 128)];
    the_choice_is_the_same(&|options| open_cpu(checkpoint(NAME), options), &[100, 1, 17], &forms);
}

#[test]
fn what_is_kept_on_cuda_does_not_depend_on_chunks_or_pages() {
    let open = |options: &ModelOptions| {
        let options = ModelOptions { kv: KvFormat::Bf16, ..options.clone() };
        open_cuda(rounded(NAME, Dtype::BF16), &options)
    };
    the_choice_is_the_same(&open, &[50, 1, 9], &[(4, 16), (7, 32), (49, 16), (51, 128)]);
}

/// A model with the proportions of Llama-3.1-8B - 32 layers, and a hidden state of 1/16 of a token's KV in
/// 16 bits - with weights of no meaning.
fn shape_of_8b() -> Checkpoint {
    let (n_layers, n_kv_heads, head_dim) = (32, 1, 8);
    let hidden_dim = 4 * n_kv_heads * head_dim;
    let like = checkpoint(NAME);
    let config = ModelConfig {
        n_layers,
        n_q_heads: 4,
        n_kv_heads,
        head_dim,
        hidden_dim,
        ffn_dim: 2 * hidden_dim,
        ctx_len: 4096,
        windows: vec![None; n_layers],
        ..like.config.clone()
    };
    let mut tensors = Vec::new();
    let mut add = |name: String, shape: &[usize]| {
        let n: usize = shape.iter().product();
        let value = |i: usize| match shape.len() {
            1 => 1.0_f32,
            _ => ((i * 37 + name.len() * 11 + i * i % 101) % 64) as f32 / 128.0 - 0.25,
        };
        let bytes: Vec<u8> = (0..n).flat_map(|i| value(i).to_le_bytes()).collect();
        tensors.push((name, Dtype::F32, shape.to_vec(), bytes));
    };
    add("embed_tokens.weight".into(), &[config.vocab_size, hidden_dim]);
    add("norm.weight".into(), &[hidden_dim]);
    for l in 0..n_layers {
        let mut add = |part: &str, shape: &[usize]| add(format!("layers.{l}.{part}.weight"), shape);
        let (q, kv, ffn) = (hidden_dim, n_kv_heads * head_dim, config.ffn_dim);
        add("input_layernorm", &[hidden_dim]);
        add("post_attention_layernorm", &[hidden_dim]);
        add("self_attn.q_proj", &[q, hidden_dim]);
        add("self_attn.k_proj", &[kv, hidden_dim]);
        add("self_attn.v_proj", &[kv, hidden_dim]);
        add("self_attn.o_proj", &[hidden_dim, q]);
        add("mlp.gate_proj", &[ffn, hidden_dim]);
        add("mlp.up_proj", &[ffn, hidden_dim]);
        add("mlp.down_proj", &[hidden_dim, ffn]);
    }
    Checkpoint { config, weights: Weights::from_memory(tensors).unwrap(), ..like }
}

#[test]
fn a_pruned_prompt_takes_three_quarters_of_the_bytes_at_most() {
    let n = 2048;
    let options = ModelOptions {
        kv_tokens: Some(2 * n),
        aux_tokens: n,
        ..ModelOptions::default() // pages of 64, KV in bf16
    };
    let model = open_cpu(shape_of_8b(), &options);
    let mut dense = session(&model, None);
    dense.prefill(&prompt(1, n)).unwrap();
    let dense = dense.receipt().kv_bytes;
    assert_eq!(dense, n * model.plan().kv_bytes_per_token);
    assert_eq!(model.plan().kv_bytes_per_token, 16 * 2 * model.config().hidden_dim);

    let mut pruned = session(&model, Some(&Lazy::parse("paper", 32).unwrap()));
    pruned.prefill(&prompt(1, n)).unwrap();
    let receipt = pruned.receipt();
    assert_eq!(receipt.n_waiting, n - 703, "0.7 of 0.7 of 0.7 went through");
    assert_eq!(receipt.aux_bytes, receipt.n_waiting.div_ceil(64) * model.plan().aux_page_bytes);
    let bytes = receipt.kv_bytes + receipt.aux_bytes;
    assert!(4 * bytes <= 3 * dense, "{bytes} of {dense}");
    assert_eq!(model.pool_usage().n_aux_used, receipt.n_waiting.div_ceil(64), "none in transit");
}

#[test]
fn rows_that_wait_in_bf16_are_rounded_to_nearest_even() {
    let mut backend = CpuBackend::new(CpuOptions { threads: 1, isa: None }).unwrap();
    let width = 24;
    // Every way a mantissa can end, a tie of each parity among them, in both signs; and what is as it was.
    let patterns = [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff].into_iter().flat_map(|low: u32| {
        [0x3f80_0000_u32, 0x3f81_0000, 0xbf81_0000, 0x0001_0000]
            .map(|high| f32::from_bits(high | low))
    });
    let row: Vec<f32> = patterns.collect();
    let want: Vec<f32> = row
        .iter()
        .map(|x| {
            let bits = x.to_bits();
            f32::from_bits((bits + 0x7fff + (bits >> 16 & 1)) & 0xffff_0000)
        })
        .collect();
    let mut rows = |holds| backend.rows(3, width, holds).unwrap();
    let (mut transit, mut waiting) = (rows(RowUse::Transit), rows(RowUse::Waiting(KvFormat::Bf16)));
    let mut exact = rows(RowUse::Waiting(KvFormat::F32));
    let mut got = vec![0.0; width];
    backend.write_rows(&mut transit, 2, &row).unwrap();
    backend.copy_rows(&transit, &mut waiting, &[(2, 1)]).unwrap();
    backend.read_rows(&waiting, 1, &mut got).unwrap();
    assert!(bits(&got) == bits(&want), "{got:?}, {want:?}");
    backend.copy_rows(&waiting, &mut transit, &[(1, 0)]).unwrap();
    backend.read_rows(&transit, 0, &mut got).unwrap();
    assert!(bits(&got) == bits(&want));
    backend.copy_rows(&transit, &mut exact, &[(2, 0)]).unwrap();
    backend.read_rows(&exact, 0, &mut got).unwrap();
    assert!(bits(&got) == bits(&row));
}
