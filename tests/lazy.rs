//! LazyLLM: a session that prunes agrees with a naive reference of the same algorithm, in numbers and in
//! which tokens are computed where; and what must not change does not.
#![allow(clippy::unwrap_used)]

mod naive;
#[allow(dead_code)] // its comparison by the largest
mod reference;
mod support;

use std::collections::BTreeMap;
use std::ops::ControlFlow;

use loris::backend::cpu::{CpuBackend, CpuOptions};
use loris::backend::{Backend, RowUse};
use loris::compute::{Lazy, PrunePoint};
use loris::loader::{Checkpoint, Dtype, ModelConfig, Weights};
use loris::store::Coding;
use loris::{Error, KvFormat, Model, ModelOptions, Progress, Session, SessionOptions};
use naive::Naive;
use reference::compare_to;
use support::{argmax, bits, checkpoint, deep, isa, open_cpu, open_cuda, prompt, rounded, turn};

const NAME: &str = "llama-tied";

/// A schedule without a guard, so that short sequences are pruned.
fn lazy(points: &[(usize, f64)]) -> Lazy {
    let points = points.iter().map(|&(layer, keep_rate)| PrunePoint { layer, keep_rate }).collect();
    Lazy { min_len: 0, sinks: 2, ..Lazy::new(points) }
}

fn options(chunk: usize) -> ModelOptions {
    ModelOptions {
        kv: KvFormat::F32.into(),
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

/// The whole algorithm, token by token.
#[derive(Clone)]
struct Reference {
    model: Naive,
    lazy: Lazy,
    /// Hidden state of every token behind the last segment that it went through, and how many it did.
    states: Vec<(Vec<f64>, usize)>,
    /// (token, layer) pairs that were computed, and earlier tokens that were taken up again.
    token_layers: usize,
    n_revived: usize,
    /// Of all choices, the narrowest: the ratio of the last score that was taken to the first that was not.
    /// Below the rounding of a device two right implementations may differ.
    margin: f64,
}

impl Reference {
    fn new(checkpoint: &Checkpoint, lazy: &Lazy) -> Self {
        Self {
            model: Naive::new(checkpoint),
            lazy: lazy.clone(),
            states: Vec::new(),
            token_layers: 0,
            n_revived: 0,
            margin: f64::INFINITY,
        }
    }

    /// Logits after the last of `tokens`; `cap` limits what is taken up again at each point.
    fn feed(&mut self, tokens: &[u32], cap: usize) -> Vec<f64> {
        let n_old = self.states.len();
        self.states.extend(tokens.iter().map(|&id| (self.model.embed(id), 0)));
        let points: Vec<usize> = self.lazy.points.iter().map(|point| point.layer).collect();
        let mut bounds = vec![0];
        bounds.extend(points);
        bounds.push(self.model.config.n_layers);
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
                let last = rows.iter().map(|&row| row as u32).zip(&queries);
                let scores = self.model.scores(layers[1] - 1, last.skip(rows.len() - window));
                rows = self.choose(segment, &scores, n_old, cap);
            }
        }
        self.model.logits(&self.states.last().unwrap().0)
    }

    /// One layer for some rows; gives their queries.
    fn layer(&mut self, l: usize, rows: &[usize]) -> Vec<Vec<f64>> {
        let states = self.states.iter_mut().zip(0..);
        let mut rows: Vec<(u32, &mut Vec<f64>)> = states
            .filter(|(_, position)| rows.binary_search(&(*position as usize)).is_ok())
            .map(|((state, _), position)| (position, state))
            .collect();
        self.model.layer(l, &mut rows)
    }

    /// Those in front of the next segment that go on: of a prompt all that are selected, of a generated token
    /// that one and `cap` others. Of a sequence below the guard all are selected.
    fn choose(
        &mut self,
        segment: usize,
        scores: &BTreeMap<u32, f64>,
        n_old: usize,
        cap: usize,
    ) -> Vec<usize> {
        let len = self.states.len();
        let is_in_front = |&p: &u32| self.states[p as usize].1 == segment + 1;
        let reach = self.lazy.pool as u32 / 2;
        let rank = |p: u32| -> f64 {
            let near = scores.range(p.saturating_sub(reach)..=p + reach);
            near.map(|(_, &score)| score).fold(0.0, f64::max)
        };
        let by_rank = |a: &u32, b: &u32| rank(*b).total_cmp(&rank(*a)).then(a.cmp(b));
        // Among neighbours that share a score the earlier comes first in any precision.
        let gap = |order: &[u32], n: usize| match (n.checked_sub(1).map(|i| order[i]), order.get(n))
        {
            (Some(a), Some(&b)) if rank(a) > rank(b) => rank(a) / rank(b),
            _ => f64::INFINITY,
        };
        let forced =
            |p: u32| (p as usize) < self.lazy.sinks || p as usize + self.lazy.window >= len;
        let (mut selected, mut others): (Vec<u32>, Vec<u32>) =
            scores.keys().copied().partition(|&p| forced(p));
        let n_keep = (scores.len() as f64 * self.lazy.points[segment].keep_rate).ceil() as usize;
        let n_others = match len < self.lazy.min_len {
            true => others.len(),
            false => n_keep.saturating_sub(selected.len()),
        };
        others.sort_by(by_rank);
        let mut margin = self.margin.min(gap(&others, n_others));
        selected.extend(&others[..n_others.min(others.len())]);
        selected.retain(is_in_front);
        let (mut old, new): (Vec<u32>, Vec<u32>) =
            selected.into_iter().partition(|&p| (p as usize) < n_old);
        let cap = if self.lazy.revives { cap } else { 0 };
        old.sort_by(by_rank);
        margin = margin.min(gap(&old, cap.min(old.len())));
        old.truncate(cap);
        self.margin = margin;
        let mut rows: Vec<usize> = old.into_iter().chain(new).map(|p| p as usize).collect();
        rows.sort_unstable();
        rows
    }

    fn counts(&self) -> [usize; 3] {
        [self.token_layers, self.n_waiting(), self.n_revived]
    }

    /// Tokens never see later ones, so those that stay are what they were.
    fn truncate(&mut self, len: usize) {
        self.states.truncate(len);
        self.model.kv.iter_mut().for_each(|kv| kv.retain(|&position, _| (position as usize) < len));
    }

    fn n_waiting(&self) -> usize {
        let n_segments = self.lazy.points.len() + 1;
        self.states.iter().filter(|(_, depth)| *depth < n_segments).count()
    }
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
            for id in 0..12 {
                s.decode(id).unwrap();
                let want = reference.feed(&[id], cap);
                check(&s, &want, &reference, &format!("{what}, step {id}"));
            }
        }
        // No choice is closer than f32 can tell apart, in whatever order an instruction set adds.
        assert!(reference.margin > 1.0001, "{}", reference.margin);
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
        let model =
            open_cuda(checkpoint, &ModelOptions { kv: KvFormat::BF16.into(), ..options(chunk) });
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
    (1..).zip(turns).flat_map(|(seed, &n)| turn(s, &prompt(seed, n), 5)).collect()
}

fn keeping_all_is_dense(open: &dyn Fn(&ModelOptions) -> Model, turns: &[usize]) {
    for (chunk, rate, min_len) in [(512, 1.0, 0), (9, 1.0, 0), (33, 0.3, 10_000)] {
        let model = open(&ModelOptions { kv: KvFormat::BF16.into(), ..options(chunk) });
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
        let options = ModelOptions { kv: KvFormat::BF16.into(), ..options.clone() };
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
    let mut backend = CpuBackend::new(CpuOptions { threads: 1, isa: Some(isa()) }).unwrap();
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
    let (mut transit, mut waiting) = (rows(RowUse::Transit), rows(RowUse::Waiting(Coding::BF16)));
    let mut exact = rows(RowUse::Waiting(Coding::F32));
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

/// Whole numbers from a range, the same in every run.
fn random(seed: u64) -> impl FnMut(std::ops::Range<usize>) -> usize {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) + 1;
    move |range| {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        range.start + (state >> 33) as usize % range.len()
    }
}

const N_LAYERS: usize = 6;

/// Any points, rates, windows, caps, pools and guards.
fn random_lazy(random: &mut impl FnMut(std::ops::Range<usize>) -> usize) -> Lazy {
    let mut points = Vec::new();
    for layer in 1..N_LAYERS {
        if random(0..5) < 2 {
            points.push((layer, random(1..11) as f64 / 10.0));
        }
    }
    if points.is_empty() {
        points.push((random(1..N_LAYERS), 0.4));
    }
    Lazy {
        window: random(1..6),
        sinks: random(0..4),
        pool: [1, 1, 3, 5][random(0..4)],
        min_len: [0, 0, 0, 40][random(0..4)],
        max_revived: [0, 1, 3, 16, usize::MAX][random(0..5)],
        revives: random(0..5) > 0,
        ..lazy(&points)
    }
}

/// A session and the reference, side by side.
struct Pair {
    session: Session,
    reference: Reference,
    n_fed: usize,
}

impl Pair {
    fn prefill(&mut self, tokens: &[u32], what: &str) {
        self.session.prefill(tokens).unwrap();
        let want = self.reference.feed(tokens, usize::MAX);
        self.check(&want, tokens.len(), what);
    }

    fn decode(&mut self, id: u32, what: &str) {
        self.session.decode(id).unwrap();
        let want = self.reference.feed(&[id], self.reference.lazy.max_revived);
        self.check(&want, 1, what);
    }

    fn check(&mut self, want: &[f64], n: usize, what: &str) {
        self.n_fed += n;
        if self.is_thin() {
            return;
        }
        check(&self.session, want, &self.reference, what);
        let receipt = self.session.receipt();
        assert!(receipt.token_layers <= self.n_fed * N_LAYERS, "{what}: more than dense");
    }

    /// A choice came up that f32 cannot make: it may be made otherwise, and what follows is another story.
    fn is_thin(&self) -> bool {
        self.reference.margin < 1.0001
    }

    fn fork(&self) -> Self {
        let Self { session, reference, n_fed } = self;
        Self { session: session.fork().unwrap(), reference: reference.clone(), n_fed: *n_fed }
    }
}

/// The reference asserts that a token goes through each layer at most once and in order; that the session
/// computes as many says that it does so too.
#[test]
fn random_schedules_turns_forks_and_truncations_follow_the_reference() {
    let of_six = || deep(checkpoint(NAME), N_LAYERS);
    let (mut n_revived, mut n_thin, n_runs) = (0, 0, 24);
    for seed in 0..n_runs {
        let mut random = random(seed);
        let lazy = random_lazy(&mut random);
        let chunk = random(lazy.window..70);
        let model = open_cpu(of_six(), &options(chunk));
        let reference = Reference::new(&of_six(), &lazy);
        let mut pair = Pair { session: session(&model, Some(&lazy)), reference, n_fed: 0 };
        let mut other: Option<Pair> = None;
        let n_acts = 14;
        for act in 0..n_acts {
            let what = format!("seed {seed}, act {act}, chunk {chunk}, {lazy:?}");
            if pair.is_thin() {
                n_thin += 1;
                break;
            }
            match if act == 0 { 0 } else { random(0..8) } {
                0 | 1 => {
                    let n = random(1..45);
                    pair.prefill(&prompt(random(0..50), n), &what);
                }
                2 => {
                    let len = pair.session.len();
                    let kept = len - random(0..len.min(25));
                    pair.session.truncate(kept).unwrap();
                    pair.reference.truncate(kept);
                    assert_eq!(
                        pair.session.receipt().n_waiting,
                        pair.reference.n_waiting(),
                        "{what}"
                    );
                }
                3 => {
                    // The two share pages until they write; either may go first, and the other is kept.
                    let mut fork = pair.fork();
                    if random(0..2) == 0 {
                        std::mem::swap(&mut pair, &mut fork);
                    }
                    fork.prefill(&prompt(random(0..50), random(1..20)), &what);
                    if !fork.is_thin() {
                        other = Some(fork);
                    }
                }
                4 => {
                    if let Some(other) = &mut other {
                        std::mem::swap(&mut pair, other);
                    }
                }
                _ => {
                    for _ in 0..random(1..6) {
                        if !pair.is_thin() {
                            pair.decode(random(0..128) as u32, &what);
                        }
                    }
                }
            }
        }
        n_revived += pair.reference.n_revived;
        drop((pair, other));
        let usage = model.pool_usage();
        assert_eq!((usage.n_used, usage.n_aux_used), (0, 0), "seed {seed}");
    }
    assert!(n_revived > 500, "{n_revived} revived");
    assert!(n_thin < n_runs / 4, "{n_thin} of {n_runs} runs came to a choice that is too close");
}

/// Where a session is cut back to a length that is not pruned, much waits that now may go on: no more of it at a time
/// than the schedule says.
#[test]
fn a_step_below_the_guard_takes_up_no_more_than_the_cap() {
    let of_six = || deep(checkpoint(NAME), N_LAYERS);
    for (cap, revives) in [(0, true), (1, true), (3, true), (3, false)] {
        let lazy = Lazy { min_len: 50, max_revived: cap, revives, ..lazy(&[(1, 0.3), (4, 0.5)]) };
        let model = open_cpu(of_six(), &options(16));
        let reference = Reference::new(&of_six(), &lazy);
        let mut pair = Pair { session: session(&model, Some(&lazy)), reference, n_fed: 0 };
        pair.prefill(&prompt(3, 60), "the prompt");
        pair.session.truncate(30).unwrap();
        pair.reference.truncate(30);
        assert!(pair.session.receipt().n_waiting > 20, "{:?}", pair.session.receipt());
        for step in 0..6 {
            let what = format!("cap {cap}, revives {revives}, step {step}");
            let before = pair.session.receipt();
            pair.decode(7 + step, &what);
            let n_revived = pair.session.receipt().n_revived - before.n_revived;
            assert!(n_revived <= if revives { 2 * cap } else { 0 }, "{what}: {n_revived}");
            assert!(!revives || n_revived >= cap, "{what}: {n_revived}");
        }
        // A prompt takes up all of it, unless nothing is ever taken up again.
        pair.prefill(&prompt(4, 5), "the next turn");
        assert_eq!(pair.session.receipt().n_waiting > 0, !revives);
        assert!(!pair.is_thin());
    }
}

#[test]
fn sessions_of_different_schedules_in_one_step_change_no_bit_of_each_other() {
    let schedules = [
        None,
        Some(lazy(&[(1, 0.5), (4, 0.5)])),
        Some(Lazy { window: 3, max_revived: 1, ..lazy(&[(1, 0.3), (2, 0.5), (5, 0.7)]) }),
        Some(Lazy { min_len: 30, ..lazy(&[(3, 0.2)]) }),
        None,
        Some(lazy(&[(1, 0.5), (4, 0.5)])),
    ];
    for (chunk, batch) in [(16, 16), (5, 3), (64, 4)] {
        let options = ModelOptions { kv: KvFormat::BF16.into(), batch, ..options(chunk) };
        let model = open_cpu(deep(checkpoint(NAME), N_LAYERS), &options);
        let turns = [(1, 40), (2, 3), (3, 25)];
        let alone: Vec<Vec<Vec<u32>>> = schedules
            .iter()
            .enumerate()
            .map(|(i, lazy)| {
                let mut s = session(&model, lazy.as_ref());
                turns
                    .iter()
                    .flat_map(|&(seed, n)| turn(&mut s, &prompt(seed + 10 * i, n), 6))
                    .collect()
            })
            .collect();
        let mut all: Vec<Session> = schedules.iter().map(|l| session(&model, l.as_ref())).collect();
        let mut seen: Vec<Vec<Vec<u32>>> = vec![Vec::new(); all.len()];
        let mut is_idle = vec![true; all.len()];
        // Session i begins at step i, so that passes hold prompts of some and tokens of others.
        for step in 0.. {
            for (i, s) in all.iter_mut().enumerate().take(step) {
                if is_idle[i] && seen[i].len() < alone[i].len() {
                    is_idle[i] = false;
                    match seen[i].len() % 7 {
                        0 => {
                            let (seed, n) = turns[seen[i].len() / 7];
                            s.feed(&prompt(seed + 10 * i, n)).unwrap();
                        }
                        _ => s.push(argmax(s.logits().unwrap()) as u32).unwrap(),
                    }
                }
            }
            let mut refs: Vec<&mut Session> = all.iter_mut().collect();
            let results = model.step(&mut refs);
            for (i, result) in results.iter().enumerate() {
                if *result.as_ref().unwrap() == Progress::Ready {
                    seen[i].push(bits(all[i].logits().unwrap()));
                    is_idle[i] = true;
                }
            }
            if seen.iter().zip(&alone).all(|(seen, alone)| seen.len() == alone.len()) {
                break;
            }
            assert!(step < 500, "no end: {:?}", seen.iter().map(Vec::len).collect::<Vec<_>>());
        }
        for (i, (seen, alone)) in seen.iter().zip(&alone).enumerate() {
            assert!(seen == alone, "session {i}, chunk {chunk}, batch {batch}");
        }
        drop(all);
        assert_eq!((model.pool_usage().n_used, model.pool_usage().n_aux_used), (0, 0));
    }
}

#[test]
fn prompts_of_different_schedules_all_go_on_in_every_step() {
    let schedules = [
        None,
        Some(lazy(&[(1, 0.5), (4, 0.5)])),
        Some(Lazy { window: 9, ..lazy(&[(2, 0.3)]) }),
        Some(lazy(&[(3, 0.2)])),
    ];
    let model = open_cpu(deep(checkpoint(NAME), N_LAYERS), &options(24));
    for first in 0..schedules.len() {
        let mut all: Vec<Session> = schedules.iter().map(|l| session(&model, l.as_ref())).collect();
        all.iter_mut().enumerate().for_each(|(i, s)| s.feed(&prompt(i, 100)).unwrap());
        all.rotate_left(first);
        while all.iter().any(|s| s.logits().is_none()) {
            let before: Vec<usize> = all.iter().map(|s| s.receipt().token_layers).collect();
            let mut refs: Vec<&mut Session> = all.iter_mut().collect();
            assert!(model.step(&mut refs).iter().all(Result::is_ok));
            let mut n_rows = 0;
            for (s, before) in all.iter().zip(before) {
                let n_layers = s.receipt().token_layers - before;
                n_rows += n_layers.div_ceil(N_LAYERS);
                assert!(n_layers > 0 || s.logits().is_some(), "first {first}");
            }
            assert!(n_rows <= 24);
        }
    }
}

#[test]
fn prompts_that_prune_and_begin_alike_are_computed_once() {
    let lazy = lazy(&[(2, 0.4), (3, 0.5)]);
    let begin = prompt(1, 100);
    let prompts: Vec<_> = (0..4).map(|i| [&begin[..], &prompt(10 + i, 9)].concat()).collect();
    let alone = open_cpu(deep(checkpoint(NAME), N_LAYERS), &options(32));
    for chunk in [16, 32, 64] {
        let keeping = ModelOptions { keep_prefixes: true, ..options(chunk) };
        let model = open_cpu(deep(checkpoint(NAME), N_LAYERS), &keeping);
        let mut all: Vec<Session> = prompts.iter().map(|_| session(&model, Some(&lazy))).collect();
        all.iter_mut().zip(&prompts).for_each(|(s, tokens)| s.feed(tokens).unwrap());
        while all.iter().any(|s| s.logits().is_none()) {
            let mut refs: Vec<&mut Session> = all.iter_mut().collect();
            assert!(model.step(&mut refs).iter().all(Result::is_ok));
        }
        let n_shared: usize = all.iter().map(|s| s.receipt().n_shared).sum();
        assert_eq!(n_shared, 3 * 96, "chunk {chunk}");
        for (s, tokens) in all.iter_mut().zip(&prompts) {
            let mut computes = session(&alone, Some(&lazy));
            let want = answer(&mut computes, tokens);
            assert!(bits(s.logits().unwrap()) == want[0], "chunk {chunk}");
            for want in &want[1..] {
                s.decode(argmax(s.logits().unwrap()) as u32).unwrap();
                assert!(bits(s.logits().unwrap()) == *want, "chunk {chunk}");
            }
        }
        drop(all);
        assert_eq!((model.pool_usage().n_used, model.pool_usage().n_aux_used), (0, 0));
    }
}

/// All that a call which fails must leave.
fn left(s: &Session) -> (Vec<u32>, loris::Receipt, Option<Vec<u32>>, [usize; 2]) {
    let usage = s.model().pool_usage();
    (s.tokens().to_vec(), s.receipt(), s.logits().map(bits), [usage.n_used, usage.n_aux_used])
}

#[test]
fn a_full_pool_in_the_middle_loses_nothing() {
    let lazy = Lazy { max_revived: 2, ..lazy(&[(1, 0.4), (3, 0.5), (4, 0.5)]) };
    let open = |kv_pages: usize, aux_pages: usize| {
        let sizes = ModelOptions {
            kv_tokens: Some(16 * kv_pages),
            aux_tokens: 16 * aux_pages,
            ..options(8)
        };
        open_cpu(deep(checkpoint(NAME), N_LAYERS), &sizes)
    };
    let roomy = open(20, 20);
    let mut s = session(&roomy, Some(&lazy));
    let mut want = turn(&mut s, &prompt(1, 30), 6);
    want.extend(turn(&mut s, &prompt(2, 60), 6));
    let (mut n_kv, mut n_aux, mut n_whole) = (0, 0, 0);
    let sizes = (1..9).map(|n| (20, n)).chain((1..9).map(|n| (n, 20)));
    for (kv_pages, aux_pages) in sizes {
        let model = open(kv_pages, aux_pages);
        let mut s = session(&model, Some(&lazy));
        let mut n_seen = 0;
        // Each call that fails is tried again, which fails the same way; then the session has lost nothing, and
        // what it can still do is what it could have done.
        'calls: for (seed, n) in [(1, 30), (2, 60)] {
            for step in 0..7 {
                let before = left(&s);
                for _ in 0..2 {
                    let outcome = match step {
                        0 => s.prefill(&prompt(seed, n)),
                        _ => s.decode(argmax(s.logits().unwrap()) as u32),
                    };
                    match outcome {
                        Ok(()) => break,
                        Err(Error::KvFull { .. }) => n_kv += 1,
                        Err(Error::AuxFull { .. }) => n_aux += 1,
                        Err(e) => panic!("{e}"),
                    }
                    assert!(left(&s) == before, "{kv_pages} and {aux_pages} pages, step {step}");
                }
                if s.tokens().len() == before.0.len() {
                    break 'calls;
                }
                assert!(
                    bits(s.logits().unwrap()) == want[n_seen],
                    "{kv_pages} and {aux_pages} pages"
                );
                n_seen += 1;
            }
        }
        n_whole += usize::from(n_seen == want.len());
        if n_seen == 7 {
            // The second turn did not fit: a shorter one goes on from what is there.
            let mut short = session(&roomy, Some(&lazy));
            turn(&mut short, &prompt(1, 30), 6);
            short.decode(5).unwrap();
            if s.decode(5).is_ok() {
                assert!(bits(s.logits().unwrap()) == bits(short.logits().unwrap()));
            }
        }
        drop(s);
        assert_eq!((model.pool_usage().n_used, model.pool_usage().n_aux_used), (0, 0));
    }
    // How many fail depends on who goes on, and so on rounding. But a page of each segment, or of waiting tokens, is too
    // little for the first prompt, and eight a layer hold both turns whoever goes on.
    assert!(n_kv >= 2 && n_aux >= 2 && n_whole >= 1, "{n_kv}, {n_aux}, {n_whole}");
}

#[test]
fn a_prompt_can_be_stopped_after_every_pass() {
    let lazy = Lazy { max_revived: 2, ..lazy(&[(1, 0.4), (3, 0.5), (4, 0.5)]) };
    let model = open_cpu(deep(checkpoint(NAME), N_LAYERS), &options(8));
    let mut other = session(&model, Some(&lazy));
    turn(&mut other, &prompt(1, 30), 6);
    let mut s = other.fork().unwrap();
    let want = turn(&mut other, &prompt(2, 40), 6);
    drop(other);
    let before = left(&s);
    let mut n_stopped = 0;
    loop {
        let mut n_left = n_stopped;
        let outcome = s.prefill_with(&prompt(2, 40), &mut |_, _| match n_left {
            0 => ControlFlow::Break(()),
            _ => {
                n_left -= 1;
                ControlFlow::Continue(())
            }
        });
        if outcome.is_ok() {
            break;
        }
        assert!(left(&s) == before, "after pass {n_stopped}");
        // The same for one that is stepped, and then dropped by its owner.
        s.feed(&prompt(2, 40)).unwrap();
        for _ in 0..=n_stopped {
            assert!(matches!(model.step(&mut [&mut s])[0], Ok(Progress::Pending { .. })));
        }
        assert_eq!(s.clear_pending(), 40);
        assert!(left(&s) == before, "cleared after pass {n_stopped}");
        n_stopped += 1;
    }
    // Five chunks through the first segment, and a pass at least for each of the other three.
    assert!(n_stopped >= 7, "{n_stopped} passes");
    assert!(bits(s.logits().unwrap()) == want[0]);
    for want in &want[1..] {
        s.decode(argmax(s.logits().unwrap()) as u32).unwrap();
        assert!(bits(s.logits().unwrap()) == *want);
    }
}

/// Bits of the logits after a prompt that begins like others' and after some greedy tokens.
fn answer(s: &mut Session, prompt: &[u32]) -> Vec<Vec<u32>> {
    s.prefill(prompt).unwrap();
    let mut out = vec![bits(s.logits().unwrap())];
    for _ in 0..4 {
        s.decode(argmax(s.logits().unwrap()) as u32).unwrap();
        out.push(bits(s.logits().unwrap()));
    }
    out
}

fn prefixes_are_shared(open: &dyn Fn(&ModelOptions) -> Model) {
    // 100 tokens are 6 full pages; first segment: two layers of five.
    let begin = prompt(1, 100);
    let prompts: Vec<Vec<u32>> = [(2, 30), (3, 17), (4, 5)]
        .map(|(seed, n)| [begin.clone(), prompt(seed, n)].concat())
        .into();
    let hard = lazy(&[(2, 0.4), (3, 0.5)]);
    let mild = lazy(&[(2, 0.8)]);
    let other = lazy(&[(1, 0.5)]);
    let keeping = ModelOptions { keep_prefixes: true, ..options(32) };
    let (model, alone) = (open(&keeping), open(&options(32)));
    let check = |lazy: Option<&Lazy>, prompt: &[u32], n_shared: usize| {
        let (mut shares, mut computes) = (session(&model, lazy), session(&alone, lazy));
        assert!(answer(&mut shares, prompt) == answer(&mut computes, prompt), "{lazy:?}");
        let (receipt, whole) = (shares.receipt(), computes.receipt());
        assert_eq!(receipt.n_shared, n_shared, "{lazy:?}");
        let skipped = n_shared * lazy.map_or(N_LAYERS, |lazy| lazy.points[0].layer);
        assert_eq!(receipt.token_layers + skipped, whole.token_layers);
        assert_eq!((receipt.n_waiting, receipt.aux_bytes), (whole.n_waiting, whole.aux_bytes));
        shares
    };
    let first = check(Some(&hard), &prompts[0], 0);
    let second = check(Some(&hard), &prompts[1], 96);
    let third = check(Some(&mild), &prompts[2], 96); // the first point is what counts
    // Rows that score together are all computed.
    drop(check(Some(&Lazy { window: 9, ..mild.clone() }), &begin, 80));
    let fork = second.fork().unwrap();
    drop(check(Some(&other), &prompts[2], 0));
    drop(check(None, &prompts[2], 0));
    let dense = check(None, &prompts[1], 0);
    drop(check(None, &prompts[0], 96));
    // The pages live as long as somebody holds them, and what is kept with them too.
    drop((first, second, dense));
    drop(check(Some(&hard), &prompts[0], 96));
    drop((third, fork));
    assert_eq!((model.pool_usage().n_used, model.pool_usage().n_aux_used), (0, 0));
    drop(check(Some(&hard), &prompts[0], 0));
    assert_eq!((model.pool_usage().n_used, model.pool_usage().n_aux_used), (0, 0));
}

#[test]
fn sessions_that_prune_share_what_is_before_their_first_point() {
    prefixes_are_shared(&|options| open_cpu(deep(checkpoint(NAME), N_LAYERS), options));
}

/// The store of hidden states holds one of two prompts at a time: half of each would be of no use.
#[test]
fn prompts_whose_hidden_states_do_not_fit_beside_each_other_go_one_after_the_other() {
    let lazy = lazy(&[(2, 0.4)]);
    let sizes = ModelOptions { aux_tokens: 10 * 16, ..options(16) };
    let model = open_cpu(deep(checkpoint(NAME), N_LAYERS), &sizes);
    let alone = |seed| {
        let mut s = session(&model, Some(&lazy));
        s.prefill(&prompt(seed, 130)).unwrap();
        bits(s.logits().unwrap())
    };
    let want = [alone(1), alone(2)];
    let mut all = [session(&model, Some(&lazy)), session(&model, Some(&lazy))];
    all[0].feed(&prompt(1, 130)).unwrap();
    all[1].feed(&prompt(2, 130)).unwrap();
    for _ in 0..200 {
        let [a, b] = &mut all;
        for result in model.step(&mut [a, b]) {
            result.unwrap();
        }
    }
    assert!(all.iter().map(|s| bits(s.logits().unwrap())).eq(want));
}

#[test]
fn kept_hidden_states_make_room_and_are_lost_with_a_call_that_fails() {
    let lazy = lazy(&[(2, 0.4)]);
    // 11 pages in transit: 4 that the first prompt leaves behind and 9 of the last are more.
    let sizes = ModelOptions { keep_prefixes: true, aux_tokens: 10 * 16, ..options(16) };
    let model = open_cpu(deep(checkpoint(NAME), N_LAYERS), &sizes);
    let mut sessions = Vec::new();
    for (seed, n, n_shared) in [(1, 70, 0), (1, 70, 64), (2, 130, 0)] {
        sessions.truncate(1);
        let mut s = session(&model, Some(&lazy));
        s.prefill(&prompt(seed, n)).unwrap();
        assert_eq!(s.receipt().n_shared, n_shared);
        sessions.push(s);
    }
    // The last prompt needed the room: what the first had left cannot be shared any more.
    sessions.truncate(1);
    let mut s = session(&model, Some(&lazy));
    s.prefill(&prompt(1, 70)).unwrap();
    assert_eq!(s.receipt().n_shared, 0);
    drop((s, sessions));
    assert_eq!((model.pool_usage().n_used, model.pool_usage().n_aux_used), (0, 0));

    // A prompt that is stopped behind the first segment takes what it has offered with it.
    let mut s = session(&model, Some(&lazy));
    let stopped = s.prefill_with(&prompt(5, 70), &mut |done, _| match done > 30 {
        true => ControlFlow::Break(()),
        false => ControlFlow::Continue(()),
    });
    assert!(matches!(stopped, Err(Error::Cancelled)));
    assert_eq!((model.pool_usage().n_used, model.pool_usage().n_aux_used), (0, 0));
    // A session that shares and is stopped leaves the other's as it was.
    s.prefill(&prompt(5, 70)).unwrap();
    let before = (left(&s), model.pool_usage().n_aux_used);
    for stop_at in 0..60 {
        let mut other = session(&model, Some(&lazy));
        let mut n = 0;
        let outcome = other.prefill_with(&prompt(5, 70), &mut |_, _| {
            n += 1;
            if n > stop_at { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        drop(other);
        assert!((left(&s), model.pool_usage().n_aux_used) == before, "stopped at {stop_at}");
        if outcome.is_ok() {
            break;
        }
    }
}

/// Where chunks do not end with pages, a page of rows can hold tokens in another order: it is not shared then.
#[test]
fn chunks_that_cut_pages_change_no_bit() {
    let lazy = lazy(&[(2, 0.4)]);
    let open = |keep_prefixes| {
        let sizes = ModelOptions { keep_prefixes, ..options(24) };
        open_cpu(deep(checkpoint(NAME), N_LAYERS), &sizes)
    };
    let (keeping, alone) = (open(true), open(false));
    let mut n_shared = Vec::new();
    for seed in 0..6 {
        // Pages come back in another order than they were taken, and are taken in that.
        let mut before = session(&keeping, Some(&lazy));
        before.prefill(&prompt(seed, 100)).unwrap();
        let (mut a, mut b) = (session(&keeping, Some(&lazy)), session(&alone, Some(&lazy)));
        assert!(answer(&mut a, &prompt(seed, 120)) == answer(&mut b, &prompt(seed, 120)));
        n_shared.push(a.receipt().n_shared);
    }
    assert!(n_shared.contains(&96) && n_shared.iter().any(|&n| n < 96), "{n_shared:?}");
}
