//! Q, K and V of prefill against a naive f64 reference, and nothing beside them in the pages.
#![allow(clippy::unwrap_used)]

mod common;

use std::ops::Range;

use common::product::{BF16, SUMS, rows, widen};
use common::qkv::{BIAS, BIAS_AND_QK_NORM, LAYER, PLAIN, QK_NORM, QkvCase, QkvModel, case};
use common::{Random, compare, from_bf16s};
use loris_kernels::abi::{LorisHeads, QkvPrefillArgs};
use loris_kernels::ops::batch::DeviceBatch;
use loris_kernels::ops::qkv::{self, QkvWeights};
use loris_kernels::{Buffer, Device, KvPages, Launch, Rows};

const QKV_CASES: [QkvCase; 6] = [
    case(32, [1, 1], 8, 16, PLAIN, &[(0, 1)]),
    case(32, [5, 5], 96, 16, BIAS_AND_QK_NORM, &[(15, 1), (16, 2), (17, 126)]),
    case(64, [9, 3], 72, 64, PLAIN, &[(0, 7)]),
    case(64, [4, 1], 96, 64, BIAS, &[(63, 66), (0, 130)]),
    case(128, [2, 1], 200, 256, BIAS, &[(250, 20), (255, 1), (256, 107)]),
    case(128, [3, 1], 64, 16, QK_NORM, &[(1, 127)]),
];

/// Q, K and V of some rows of the batch; `variant` says how many columns a block computes, else the
/// launcher chooses.
fn run(
    device: &Device,
    model: &QkvModel,
    a: &[u16],
    k: usize,
    part: Range<usize>,
    variant: Option<usize>,
) -> Vec<u16> {
    let a = rows(device, &a[part.start * k..part.end * k], k);
    model.run(device, part, |weights, batch, q, pages| match variant {
        None => qkv::qkv_prefill(device, weights, &a, batch, LAYER, q, pages).unwrap(),
        Some(block_n) => launch(device, weights, &a, batch, q, pages, block_n),
    })
}

#[test]
fn heads_go_where_attention_reads_them() {
    let device = common::device();
    for (i, case) in QKV_CASES.into_iter().enumerate() {
        let (n_rows, width, k) = (case.n_rows(), case.width(), case.hidden_dim);
        let mut random = Random::new(i as u64);
        let model = QkvModel::new(case, &mut random);
        let a = random.bf16(n_rows * k, 1.0);
        let got = run(&device, &model, &a, k, 0..n_rows, None);
        let want = model.reference(&widen(&a));
        compare(&format!("qkv case {i}"), &from_bf16s(&got), &want, width, SUMS, BF16);

        for block_n in [128, 256] {
            let variant = run(&device, &model, &a, k, 0..n_rows, Some(block_n));
            assert_eq!(variant, got, "qkv case {i}, blocks of {block_n}");
        }

        // Parts of the batch, as other batches.
        for rows in [0..1, n_rows / 2..n_rows, n_rows - 1..n_rows] {
            let part = run(&device, &model, &a, k, rows.clone(), None);
            assert_eq!(part, got[rows.start * width..rows.end * width], "qkv case {i}, {rows:?}");
        }
    }
}

#[test]
fn nothing_happens_without_rows() {
    let case = QkvCase { seqs: &[(3, 0)], ..QKV_CASES[1] };
    let model = QkvModel::new(case, &mut Random::new(0));
    assert!(run(&common::device(), &model, &[], case.hidden_dim, 0..0, None).is_empty());
}

/// Launches the variant whose blocks compute `block_n` columns.
fn launch(
    device: &Device,
    weights: &QkvWeights<'_>,
    a: &Rows<u16>,
    batch: &DeviceBatch,
    q: &Rows<u16>,
    pages: &KvPages,
    block_n: usize,
) {
    let ptr = |buffer: Option<&Buffer<f32>>| buffer.map_or(0, Buffer::ptr) as *const f32;
    let [wq, wk, wv] = [weights.q, weights.k, weights.v].map(|w| w.data.ptr() as *const u16);
    let heads = LorisHeads {
        bias: ptr(weights.bias),
        q_norm: ptr(weights.qk_norm.map(|norm| norm[0])),
        k_norm: ptr(weights.qk_norm.map(|norm| norm[1])),
        cos_sin: batch.cos_sin() as *const f32,
        q: q.data.ptr() as *mut u16,
        pages: pages.abi(),
        batch: batch.abi(),
        layer: LAYER as u32,
        n_q_heads: weights.n_q_heads as u32,
        head_dim: weights.head_dim as u32,
        eps: weights.eps,
    };
    let args =
        QkvPrefillArgs { a: a.data.ptr() as *const u16, wq, wk, wv, heads, k: a.width as u32 };
    let kernel = match (weights.head_dim, block_n) {
        (32, 128) => "qkv_prefill_d32_n128",
        (64, 128) => "qkv_prefill_d64_n128",
        (128, 128) => "qkv_prefill_d128_n128",
        (32, 256) => "qkv_prefill_d32_n256",
        (64, 256) => "qkv_prefill_d64_n256",
        _ => "qkv_prefill_d128_n256",
    };
    let n_tiles = weights.q.n.div_ceil(block_n) + 2 * weights.k.n.div_ceil(block_n);
    let launch = Launch {
        kernel,
        grid: [(batch.n_rows().div_ceil(128) * n_tiles) as u32, 1, 1],
        block: block_n as u32,
        extra_smem: 0,
    };
    // SAFETY: the arguments are of the sizes of this batch.
    unsafe { device.launch(&launch, &args).unwrap() };
}
