//! Microbenchmarks of the CUDA kernels at the shapes of real models.
//!
//! `cargo bench -p loris-kernels -- [FILTER] [--rev REV] [--csv FILE]` prints a row for each kernel and shape
//! whose text contains FILTER, and appends it to FILE: time of one run, rates, and the share of a large copy by the
//! driver (reads and writes counted) and of the largest matrix product, both measured before. A time is the
//! median of graphs of many runs, so it holds the gap between kernels and no work of the host. Inputs are
//! random, never zero, and in several sets that are larger than the cache together.
//!
//! `--quick` takes tiny shapes once, `--twin` the twin; `cargo test` does both, so that the program itself is
//! tested without a GPU. `../peers/torch_kernels.py` times the same shapes in PyTorch and writes the same columns.

#![allow(clippy::print_stdout, clippy::unwrap_used, unreachable_pub, missing_docs)]

mod support;

use loris_formats::{Coding, KvFormat, PageLayout, Sides};
use loris_kernels::abi::{LorisLogitChange, LorisSampling};
use loris_kernels::ops::attention::{self, AttentionShape, Partial};
use loris_kernels::ops::qkv::{self, QkvWeights};
use loris_kernels::ops::{
    attention_mass, embed, key_norm, linear, linear_decode, lm_head, logit_adjust, mlp_gate,
    mlp_gate_decode, page_copy, page_seal, qkv_decode, rmsnorm, row_copy, sample, slot_move,
    token_select,
};
use loris_kernels::{Buffer, Cost, Device, Error, KvPages, Matrix, PageTable, Rows};
use support::{
    Bench, Options, PAGE_LEN, print_header, random_floats, random_matrix, random_pages,
    random_rows, random_table, random_x, seqs_of, sequences,
};

const EPS: f32 = 1e-5;

/// Shape of a model.
#[derive(Clone, Copy)]
struct Model {
    name: &'static str,
    hidden_dim: usize,
    ffn_dim: usize,
    vocab_size: usize,
    heads: AttentionShape,
}

const fn model(
    name: &'static str,
    [hidden_dim, ffn_dim, vocab_size]: [usize; 3],
    [n_q_heads, n_kv_heads, head_dim]: [usize; 3],
) -> Model {
    let heads = AttentionShape { n_q_heads, n_kv_heads, head_dim };
    Model { name, hidden_dim, ffn_dim, vocab_size, heads }
}

const LLAMA_2_7B: Model = model("llama-2-7b", [4096, 11008, 32_000], [32, 32, 128]);
const LLAMA_3_8B: Model = model("llama-3.1-8b", [4096, 14336, 128_256], [32, 8, 128]);
const LLAMA_3_1B: Model = model("llama-3.2-1b", [2048, 8192, 128_256], [32, 8, 64]);
const SMOLLM2: Model = model("smollm2-135m", [576, 1536, 49_152], [9, 3, 64]);
const TINY: Model = model("tiny", [64, 96, 128], [4, 2, 32]);

/// Formats of the KV cache, and how a case is called.
type Kv = (&'static str, Sides);
const BF16: Sides = kv(KvFormat::BF16, KvFormat::BF16);
const KV: [Kv; 8] = [
    ("", BF16),
    (" kv=fp8", kv(KvFormat::FP8, KvFormat::FP8)),
    (" kv=int8", kv(KvFormat::INT8, KvFormat::INT8)),
    (" kv=int4", kv(KvFormat::INT4, KvFormat::INT4)),
    (" kv=int8:int4", kv(KvFormat::INT8, KvFormat::INT4)),
    (" kv=bf16:int4", kv(KvFormat::BF16, KvFormat::INT4)),
    INT4_CHANNEL,
    INT2,
];
/// Those whose pages are sealed.
const INT4_CHANNEL: Kv = (" kv=int4-channel", kv(KvFormat::INT4_CHANNEL, KvFormat::INT4_CHANNEL));
const INT2: Kv = (" kv=int2", kv(KvFormat::INT2, KvFormat::INT2));

/// The formats that heads of this model can be coded in.
fn formats(model: Model) -> impl Iterator<Item = Kv> {
    KV.into_iter().filter(move |kv| kv.1.v.coding != Coding::INT2 || model.heads.head_dim >= 64)
}

const fn kv(k: KvFormat, v: KvFormat) -> Sides {
    Sides { k: k.row().k, v: v.row().v }
}

fn main() -> Result<(), Error> {
    let args: Vec<String> = std::env::args().collect();
    if args.iter().any(|arg| arg == "--list") {
        // Test runners ask which tests there are: the quick run is one, and it is not ignored.
        if !args.iter().any(|arg| arg == "--ignored") {
            println!("quick: test");
        }
        return Ok(());
    }
    let mut bench = Bench::new(Options::parse())?;
    print_header(&bench.device);
    let quick = bench.options.quick;
    let pick = |full: &[usize], tiny: &[usize]| if quick { tiny.to_vec() } else { full.to_vec() };
    let models = if quick { vec![TINY] } else { vec![LLAMA_2_7B, LLAMA_3_8B, LLAMA_3_1B, SMOLLM2] };

    let size = if quick { 64 } else { 8192 };
    bench.ceilings(|bench| linear_prefill(bench, "square", size, size, size))?;
    for &model in &models {
        for n_rows in pick(&[1, 4, 16], &[1, 4]) {
            decode_products(&mut bench, model, n_rows);
        }
    }
    for &model in &models {
        for n_slots in pick(&[1 << 10, 8 << 10, 32 << 10, 128 << 10], &[70]) {
            for n_seqs in pick(&[1, 16], &[2]) {
                for kv in formats(model) {
                    attention_decode(&mut bench, model, kv, n_seqs, n_slots);
                }
            }
        }
    }
    for &model in &models {
        for n_rows in pick(&[512, 2048, 4096], &[70]) {
            prefill_products(&mut bench, model, n_rows);
        }
        for n_rows in pick(&[2 << 10, 8 << 10, 16 << 10, 32 << 10], &[70]) {
            for kv in formats(model) {
                attention_prefill(&mut bench, model, kv, n_rows);
            }
        }
        for n_slots in pick(&[32 << 10, 128 << 10], &[70]) {
            for kv in formats(model) {
                attention_mass(&mut bench, model, kv, n_slots);
            }
            for kv in formats(model).filter(|kv| !kv.1.are_sealed()) {
                kept_slots(&mut bench, model, kv, n_slots);
            }
        }
    }
    for n in pick(&[32 << 10, 128 << 10], &[100]) {
        token_selects(&mut bench, n);
    }
    for vocab_size in pick(&[49_152, 128_256], &[100]) {
        for n_rows in pick(&[1, 16], &[2]) {
            samples(&mut bench, vocab_size, n_rows);
        }
        logit_adjusts(&mut bench, vocab_size);
    }
    for &model in &models {
        for n_rows in pick(&[1, 4096], &[3]) {
            rows(&mut bench, model, n_rows);
        }
        let n_pairs = if quick { 2 } else { 1024 };
        page_copies(&mut bench, model, n_pairs);
        for kv in formats(model).filter(|kv| kv.1.are_sealed()) {
            page_seals(&mut bench, model, kv, n_pairs);
        }
    }
    Ok(())
}

/// The projections of one layer.
struct Qkv([Matrix; 3]);

impl Qkv {
    fn new(device: &Device, model: Model, seed: u64) -> Result<Self, Error> {
        let Model { hidden_dim, heads, .. } = model;
        let matrix =
            |n_heads, seed| random_matrix(device, n_heads * heads.head_dim, hidden_dim, seed);
        let [n_q, n_kv] = [heads.n_q_heads, heads.n_kv_heads];
        Ok(Self([matrix(n_q, seed)?, matrix(n_kv, seed + 1)?, matrix(n_kv, seed + 2)?]))
    }

    fn weights(&self, heads: AttentionShape) -> QkvWeights<'_> {
        let AttentionShape { n_q_heads, n_kv_heads, head_dim } = heads;
        let [q, k, v] = &self.0;
        QkvWeights { q, k, v, bias: None, qk_norm: None, n_q_heads, n_kv_heads, head_dim, eps: EPS }
    }
}

/// Rows and the weight of their norm.
fn normed(
    d: &Device,
    n: usize,
    width: usize,
    seed: u64,
) -> Result<(Buffer<f32>, Rows<f32>), Error> {
    Ok((random_floats(d, width, seed + 1)?, random_x(d, n, width, seed)?))
}

/// The products of a decode step.
fn decode_products(bench: &mut Bench, model: Model, n_rows: usize) {
    let Model { name, hidden_dim, ffn_dim, vocab_size, heads } = model;
    let q_dim = heads.n_q_heads * heads.head_dim;
    let kv_dim = heads.n_kv_heads * heads.head_dim;
    for (n, k) in [(hidden_dim, q_dim), (hidden_dim, ffn_dim)] {
        bench.case(
            ["linear", "decode"],
            &format!("{name} rows={n_rows} n={n} k={k}"),
            Cost::product(n_rows, n, k, [2, 8]),
            |d, seed| {
                let a = random_rows(d, n_rows, k, seed)?;
                Ok((random_matrix(d, n, k, seed)?, a, random_x(d, n_rows, n, seed)?))
            },
            |d, (w, a, x)| linear_decode::linear_decode(d, w, a, n_rows, x),
        );
    }
    let n = ffn_dim;
    bench.case(
        ["gate_up", "decode"],
        &format!("{name} rows={n_rows} n={n} k={hidden_dim}"),
        Cost::product(n_rows, 2 * n, hidden_dim, [4, 1]),
        |d, seed| {
            let gate = random_matrix(d, n, hidden_dim, seed)?;
            let up = random_matrix(d, n, hidden_dim, seed + 1)?;
            let (norm, x) = normed(d, n_rows, hidden_dim, seed)?;
            Ok((gate, up, norm, x, Rows::new(d, n_rows, n, "h")?))
        },
        |d, (gate, up, norm, x, h)| {
            mlp_gate_decode::gate_up_decode(d, gate, up, norm, EPS, x, n_rows, h)
        },
    );
    bench.case(
        ["qkv", "decode"],
        &format!("{name} rows={n_rows} n={} k={hidden_dim}", q_dim + 2 * kv_dim),
        Cost::product(n_rows, q_dim + 2 * kv_dim, hidden_dim, [4, 2]),
        |d, seed| {
            let (batch, pages) = sequences(d, heads, BF16, &vec![(PAGE_LEN, 1); n_rows], seed)?;
            let (norm, x) = normed(d, n_rows, hidden_dim, seed)?;
            let raw = Rows::new(d, n_rows, q_dim + 2 * kv_dim, "raw")?;
            let q = Rows::new(d, n_rows, q_dim, "q")?;
            Ok((Qkv::new(d, model, seed)?, norm, x, batch, raw, q, pages))
        },
        |d, (w, norm, x, batch, raw, q, pages)| {
            qkv_decode::qkv_decode(d, &w.weights(heads), norm, x, batch, 0, raw, q, pages)
        },
    );
    bench.case(
        ["lm_head", "decode"],
        &format!("{name} rows={n_rows} n={vocab_size} k={hidden_dim}"),
        Cost::product(n_rows, vocab_size, hidden_dim, [4, 4]),
        |d, seed| {
            let (batch, _) = sequences(d, heads, BF16, &vec![(0, 1); n_rows], seed)?;
            let (norm, x) = normed(d, n_rows, hidden_dim, seed)?;
            let logits = Rows::new(d, n_rows, vocab_size, "logits")?;
            Ok((random_matrix(d, vocab_size, hidden_dim, seed)?, norm, x, batch, logits))
        },
        |d, (head, norm, x, batch, logits)| lm_head::lm_head(d, head, norm, EPS, x, batch, logits),
    );
}

/// One token for each of `n_seqs` sequences of `n_slots` slots.
fn attention_decode(bench: &mut Bench, model: Model, (tag, kv): Kv, n_seqs: usize, n_slots: usize) {
    let Model { name, heads, .. } = model;
    let q_dim = heads.n_q_heads * heads.head_dim;
    let seqs = vec![(n_slots - 1, 1); n_seqs];
    bench.case(
        ["attention", "decode"],
        &format!("{name} rows={n_seqs} context={n_slots}{tag}"),
        attention::attention_cost(heads, kv, &seqs_of(&seqs), None),
        |d, seed| {
            let (batch, pages) = sequences(d, heads, kv, &seqs, seed)?;
            let q = random_rows(d, n_seqs, q_dim, seed)?;
            let partial = Partial::new(d, heads, n_seqs, attention::n_splits(kv, n_slots))?;
            Ok((batch, pages, q, partial, Rows::new(d, n_seqs, q_dim, "out")?))
        },
        |d, (batch, pages, q, partial, out)| {
            attention::attention_decode(d, heads, batch, 0, None, q, pages, partial, out, None)
        },
    );
}

/// The products of a chunk of a prompt.
fn prefill_products(bench: &mut Bench, model: Model, n_rows: usize) {
    let Model { name, hidden_dim, ffn_dim, heads, .. } = model;
    let q_dim = heads.n_q_heads * heads.head_dim;
    let kv_dim = heads.n_kv_heads * heads.head_dim;
    for k in [q_dim, ffn_dim] {
        linear_prefill(bench, name, n_rows, hidden_dim, k);
    }
    bench.case(
        ["gate_up", "prefill"],
        &format!("{name} rows={n_rows} n={ffn_dim} k={hidden_dim}"),
        Cost::product(n_rows, 2 * ffn_dim, hidden_dim, [2, 1]),
        |d, seed| {
            let gate = random_matrix(d, ffn_dim, hidden_dim, seed)?;
            let up = random_matrix(d, ffn_dim, hidden_dim, seed + 1)?;
            let a = random_rows(d, n_rows, hidden_dim, seed)?;
            Ok((gate, up, a, Rows::new(d, n_rows, ffn_dim, "h")?))
        },
        |d, (gate, up, a, h)| mlp_gate::gate_up_prefill(d, gate, up, a, n_rows, h),
    );
    bench.case(
        ["qkv", "prefill"],
        &format!("{name} rows={n_rows} n={} k={hidden_dim}", q_dim + 2 * kv_dim),
        Cost::product(n_rows, q_dim + 2 * kv_dim, hidden_dim, [2, 2]),
        |d, seed| {
            let (batch, pages) = sequences(d, heads, BF16, &[(0, n_rows)], seed)?;
            let a = random_rows(d, n_rows, hidden_dim, seed)?;
            Ok((Qkv::new(d, model, seed)?, a, batch, Rows::new(d, n_rows, q_dim, "q")?, pages))
        },
        |d, (w, a, batch, q, pages)| qkv::qkv_prefill(d, &w.weights(heads), a, batch, 0, q, pages),
    );
}

fn linear_prefill(bench: &mut Bench, name: &str, n_rows: usize, n: usize, k: usize) -> Option<f64> {
    bench.case(
        ["linear", "prefill"],
        &format!("{name} rows={n_rows} n={n} k={k}"),
        Cost::product(n_rows, n, k, [2, 8]),
        |d, seed| {
            let a = random_rows(d, n_rows, k, seed)?;
            Ok((random_matrix(d, n, k, seed)?, a, random_x(d, n_rows, n, seed)?))
        },
        |d, (w, a, x)| linear::linear_prefill(d, w, a, n_rows, x),
    )
}

/// A prompt of `n_rows` tokens, causal.
fn attention_prefill(bench: &mut Bench, model: Model, (tag, kv): Kv, n_rows: usize) {
    let Model { name, heads, .. } = model;
    let q_dim = heads.n_q_heads * heads.head_dim;
    bench.case(
        ["attention", "prefill"],
        &format!("{name} rows={n_rows}{tag}"),
        attention::attention_cost(heads, kv, &seqs_of(&[(0, n_rows)]), None),
        |d, seed| {
            let (batch, pages) = sequences(d, heads, kv, &[(0, n_rows)], seed)?;
            let q = random_rows(d, n_rows, q_dim, seed)?;
            Ok((batch, pages, q, Rows::new(d, n_rows, q_dim, "out")?))
        },
        |d, (batch, pages, q, out)| {
            attention::attention_prefill(d, heads, batch, 0, None, q, pages, out, None)
        },
    );
}

/// Scores of all slots by the last row.
fn attention_mass(bench: &mut Bench, model: Model, (tag, kv): Kv, n_slots: usize) {
    let Model { name, heads, .. } = model;
    bench.case(
        ["attention_mass", "prefill"],
        &format!("{name} rows=1 context={n_slots}{tag}"),
        attention_mass::attention_mass_cost(heads, kv.k.coding, n_slots, 1),
        |d, seed| {
            let (batch, pages) = sequences(d, heads, kv, &[(n_slots - 1, 1)], seed)?;
            let q = random_rows(d, 1, heads.n_q_heads * heads.head_dim, seed)?;
            let lse = Buffer::from_slice(d, &vec![20.0; heads.n_q_heads], "lse")?;
            Ok((batch, pages, q, lse, Buffer::new(d, n_slots, "scores")?))
        },
        |d, (batch, pages, q, lse, scores)| {
            attention_mass::attention_mass(
                d,
                heads,
                batch,
                0,
                0..1,
                0,
                None,
                q,
                lse,
                pages,
                0,
                scores,
            )
        },
    );
}

/// What eviction asks of a layer: the lengths of its keys, and every other slot to the front.
fn kept_slots(bench: &mut Bench, model: Model, (tag, kv): Kv, n_slots: usize) {
    let Model { name, heads: AttentionShape { n_kv_heads, head_dim, .. }, .. } = model;
    let n_pages = n_slots.div_ceil(PAGE_LEN) + usize::from(kv.are_coded());
    let make = |d: &Device, seed| {
        let table = PageTable::new(d, &random_table(n_pages, seed), 1)?;
        Ok((table, random_pages(d, model.heads, kv, n_pages, seed)?))
    };
    bench.case(
        ["key_norm", "any"],
        &format!("{name} context={n_slots}{tag}"),
        key_norm::key_norm_cost(kv.k.coding, n_kv_heads, head_dim, n_slots),
        |d, seed| Ok((make(d, seed)?, Buffer::new(d, n_slots, "norms")?)),
        |d, ((table, pages), norms)| key_norm::key_norm(d, pages, table, 0, n_slots, norms),
    );
    let keep: Vec<u32> = (0..4).chain((4..n_slots as u32).step_by(2)).collect();
    bench.case(
        ["slot_move", "any"],
        &format!("{name} context={n_slots} layers=1{tag}"),
        slot_move::slot_move_cost(kv.slot_bytes(n_kv_heads, head_dim), keep.len() - 5),
        |d, seed| Ok((make(d, seed)?, Buffer::from_slice(d, &keep, "keep")?)),
        |d, ((table, pages), on_device)| {
            slot_move::slot_move(d, pages, table, on_device, keep.len())
        },
    );
}

/// Half of the tokens.
fn token_selects(bench: &mut Bench, n: usize) {
    bench.case(
        ["token_select", "half"],
        &format!("n={n}"),
        token_select::token_select_cost(n),
        |d, seed| {
            let (keep, drop) = (Buffer::new(d, n / 2, "keep")?, Buffer::new(d, n - n / 2, "drop")?);
            Ok((random_floats(d, n, seed)?, keep, drop))
        },
        |d, (scores, keep, drop)| {
            token_select::token_select(d, scores, n, n / 2, 4, 16, keep, Some(drop))
        },
    );
}

fn samples(bench: &mut Bench, vocab_size: usize, n_rows: usize) {
    let plain = LorisSampling { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, uniform: 0.5 };
    for (variant, sampling) in [
        ("greedy", LorisSampling { temperature: 0.0, ..plain }),
        ("plain", plain),
        ("top_k=40", LorisSampling { top_k: 40, ..plain }),
        ("top_p=0.9", LorisSampling { top_p: 0.9, ..plain }),
    ] {
        bench.case(
            ["sample", variant],
            &format!("rows={n_rows} vocab={vocab_size}"),
            sample::sample_cost(vocab_size, n_rows),
            |d, seed| {
                // Cubes of uniform numbers: few likely tokens, as models have.
                let value = |i: u32| (i.wrapping_mul(2_654_435_761) >> 8) as f32 / (1 << 23) as f32;
                let cube = |x: f32| 15.0 * (x - 1.0).powi(3);
                let n = (n_rows * vocab_size) as u32;
                let logits: Vec<f32> = (0..n).map(|i| cube(value(i + seed as u32))).collect();
                let data = Buffer::from_slice(d, &logits, "logits")?;
                let logits = Rows { data, n_rows, width: vocab_size };
                let sampling = Buffer::from_slice(d, &vec![sampling; n_rows], "sampling")?;
                Ok((logits, sampling, Buffer::new(d, n_rows, "tokens")?))
            },
            |d, (logits, sampling, tokens)| {
                sample::sample(d, logits, sampling, None, n_rows, tokens)
            },
        );
    }
}

/// A row of logits with the penalties of a long answer.
fn logit_adjusts(bench: &mut Bench, vocab_size: usize) {
    let n_changes = 4_096;
    bench.case(
        ["logit_adjust", "any"],
        &format!("changes={n_changes} vocab={vocab_size}"),
        logit_adjust::logit_adjust_cost(vocab_size, n_changes),
        |d, seed| {
            let data = random_floats(d, vocab_size, seed)?;
            let logits = Rows { data, n_rows: 1, width: vocab_size };
            let change = |i: usize| LorisLogitChange {
                id: (i * 7 % vocab_size) as u32,
                bias: 0.0,
                factor: 1.1,
                minus: 0.2,
            };
            let changes: Vec<_> = (0..n_changes.min(vocab_size)).map(change).collect();
            let changes = Buffer::from_slice(d, &changes, "changes")?;
            Ok((logits, changes, Rows::new(d, 1, vocab_size, "out")?))
        },
        |d, (logits, changes, out)| {
            logit_adjust::logit_adjust(d, logits, 0, changes, changes.len(), out)
        },
    );
}

/// What works on the hidden state.
fn rows(bench: &mut Bench, model: Model, n_rows: usize) {
    let Model { name, hidden_dim, vocab_size, heads, .. } = model;
    let shape = format!("{name} rows={n_rows} n={hidden_dim}");
    bench.case(
        ["embed", "any"],
        &shape,
        embed::embed_cost(hidden_dim, n_rows),
        |d, seed| {
            let table = random_matrix(d, vocab_size.min(8192), hidden_dim, seed)?;
            let (batch, _) = sequences(d, heads, BF16, &[(0, n_rows)], seed)?;
            Ok((table, batch, Rows::new(d, n_rows, hidden_dim, "x")?))
        },
        |d, (table, batch, x)| embed::embed(d, table, batch, x),
    );
    bench.case(
        ["rmsnorm", "any"],
        &shape,
        rmsnorm::rmsnorm_cost(n_rows, hidden_dim),
        |d, seed| {
            let (norm, x) = normed(d, n_rows, hidden_dim, seed)?;
            Ok((x, norm, Rows::new(d, n_rows, hidden_dim, "out")?))
        },
        |d, (x, norm, out)| rmsnorm::rmsnorm(d, x, norm, EPS, n_rows, out),
    );
    let pairs: Vec<(u32, u32)> = (0..n_rows as u32).map(|i| (2 * i, i)).collect();
    bench.case(
        ["row_copy", "f32"],
        &shape,
        row_copy::row_copy_cost(4 * hidden_dim, 4 * hidden_dim, n_rows),
        |d, seed| {
            let from = random_x(d, 2 * n_rows, hidden_dim, seed)?;
            Ok((from, Rows::<f32>::new(d, n_rows, hidden_dim, "to")?))
        },
        |d, (from, to)| row_copy::row_copy(d, from, to, &pairs),
    );
    bench.case(
        ["row_copy", "f32 to bf16"],
        &shape,
        row_copy::row_copy_cost(4 * hidden_dim, 2 * hidden_dim, n_rows),
        |d, seed| {
            let from = random_x(d, 2 * n_rows, hidden_dim, seed)?;
            Ok((from, Rows::<u16>::new(d, n_rows, hidden_dim, "to")?))
        },
        |d, (from, to)| row_copy::row_copy(d, from, to, &pairs),
    );
}

fn page_copies(bench: &mut Bench, model: Model, n_pairs: usize) {
    let Model { name, heads, .. } = model;
    let page_bytes = 4 * heads.n_kv_heads * PAGE_LEN * heads.head_dim;
    bench.case(
        ["page_copy", "any"],
        &format!("{name} pages={n_pairs} bytes={page_bytes}"),
        page_copy::page_copy_cost(page_bytes as u64, n_pairs),
        |d, seed| {
            let pages: KvPages = random_pages(d, heads, BF16, 2 * n_pairs, seed)?;
            let pairs: Vec<u32> =
                (0..n_pairs as u32).flat_map(|i| [i, i + n_pairs as u32]).collect();
            Ok((pages, Buffer::from_slice(d, &pairs, "pairs")?))
        },
        |d, (pages, pairs)| page_copy::page_copy(d, pages, pairs, n_pairs),
    );
}

fn page_seals(bench: &mut Bench, model: Model, (kv_name, kv): Kv, n_seals: usize) {
    let Model { name, heads, .. } = model;
    let AttentionShape { n_kv_heads, head_dim, .. } = heads;
    let n_from = PAGE_LEN / PageLayout::new(n_kv_heads, PAGE_LEN, head_dim, kv).tail_len();
    bench.case(
        ["page_seal", "any"],
        &format!("{name}{kv_name} pages={n_seals}"),
        page_seal::page_seal_cost(heads, kv, PAGE_LEN, n_seals),
        |d, seed| {
            let n_pages = n_seals * (n_from + 1);
            let pages: KvPages = random_pages(d, heads, kv, n_pages, seed)?;
            let seals: Vec<u32> = (0..n_pages as u32).collect();
            Ok((pages, Buffer::from_slice(d, &seals, "seals")?))
        },
        |d, (pages, seals)| page_seal::page_seal(d, pages, seals, n_seals),
    );
}
