//! The matrix kernels of decode against naive f64 references.
//!
//! The fused norm has two references: one that rounds `x * g` to bf16 exactly where the kernels do,
//! and the textbook's, which rounds nowhere.
#![allow(clippy::unwrap_used, unreachable_pub)]

mod common;
#[path = "decode/qkv.rs"]
mod qkv;

use common::product::{BF16, EPS, SUMS, download, matrix, product, rows, same_bits, seq, widen};
use common::{Random, compare, from_bf16, from_bf16s, to_bf16};
use loris_kernels::ops::batch::{DeviceBatch, HostBatch};
use loris_kernels::ops::{linear_decode, lm_head, mlp_gate_decode};
use loris_kernels::{Buffer, Device, Error, Matrix, Rows};

/// Bound where a norm takes part.
const NORMED: f64 = 1e-4;
/// Bound against a reference that does not round the input.
const TEXTBOOK: f64 = 1e-2;

/// (rows, n, k): counts of rows around a tile of 8 and a group of 16, with tails of k and n; the last
/// k are longer than what a block takes at once.
fn shapes() -> impl Iterator<Item = (usize, usize, usize)> {
    let rows = [0, 1, 2, 7, 8, 9, 15, 16, 17, 33].into_iter();
    let matrices = [(16, 8), (8, 32), (24, 96), (104, 576), (16, 1000), (40, 2600)];
    rows.flat_map(move |rows| matrices.map(|(n, k)| (rows, n, k)))
}

#[test]
fn linear_adds_the_product() {
    let device = common::device();
    for (rows, n, k) in shapes() {
        let mut random = Random::new((rows * 1000 + k) as u64);
        let (a, w) = (random.bf16(rows * k, 1.0), random.bf16(n * k, 1.0));
        let before = random.f32(rows * n, 1.0);
        let got = run_linear(&device, &w, n, &a, k, &before);
        let want = product(&widen(&a), &widen(&w), k)
            .iter()
            .zip(&before)
            .map(|(product, &y)| product + f64::from(y))
            .collect::<Vec<_>>();
        compare(&format!("linear {rows} x {n} x {k}"), &got, &want, n, SUMS, 0.0);
    }
}

#[test]
fn bits_of_a_row_are_its_own() {
    let device = common::device();
    let (rows, n, k) = (33, 24, 1096);
    let mut random = Random::new(1);
    let (a, w) = (random.bf16(rows * k, 1.0), random.bf16(n * k, 1.0));
    let before = random.f32(rows * n, 1.0);
    let (x, norm) = (random.f32(rows * k, 2.0), norm_weights(&mut random, k));
    let up = random.bf16(n * k, 1.0);

    let linear = |rows: std::ops::Range<usize>| {
        let a = &a[rows.start * k..rows.end * k];
        run_linear(&device, &w, n, a, k, &before[rows.start * n..rows.end * n])
    };
    let gate_up = |rows: std::ops::Range<usize>| {
        run_gate_up(&device, [&w, &up], n, &norm, &x[rows.start * k..rows.end * k])
    };
    let logits = |rows: std::ops::Range<usize>| {
        let idx = rows.map(|row| row as u32).collect::<Vec<_>>();
        run_lm_head(&device, &w, n, &norm, &x, &idx)
    };
    let all = (linear(0..rows), gate_up(0..rows), logits(0..rows));
    for part in [0..1, 7..8, 8..9, 32..33, 3..11, 5..18] {
        let values = part.start * n..part.end * n;
        assert!(same_bits(&linear(part.clone()), &all.0[values.clone()]), "linear, rows {part:?}");
        assert_eq!(gate_up(part.clone()), all.1[values.clone()], "gate_up, rows {part:?}");
        assert!(same_bits(&logits(part.clone()), &all.2[values]), "lm_head, rows {part:?}");
    }
    if common::on_twin() {
        for seed in 1..4 {
            common::twin::Twin::get().set_seed(seed);
            assert!(same_bits(&linear(0..9), &all.0[..9 * n]), "linear, threads in order {seed}");
            assert_eq!(gate_up(0..9), all.1[..9 * n], "gate_up, threads in order {seed}");
        }
    }
}

#[test]
fn gate_up_is_silu_of_gate_times_up() {
    let device = common::device();
    for (rows, n, k) in shapes() {
        let mut random = Random::new((rows * 1000 + k) as u64);
        let (x, norm) = (random.f32(rows * k, 3.0), norm_weights(&mut random, k));
        let scale = 2.0 / (k as f32).sqrt();
        let (gate, up) = (random.bf16(n * k, scale), random.bf16(n * k, scale));
        let got = from_bf16s(&run_gate_up(&device, [&gate, &up], n, &norm, &x));
        // Two products meet in a value, and so do their errors.
        for (rounded, bound) in [(true, NORMED), (false, 2.0 * TEXTBOOK)] {
            let a = normed(&x, &norm, rounded);
            let (g, u) = (product(&a, &widen(&gate), k), product(&a, &widen(&up), k));
            let want =
                g.iter().zip(&u).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect::<Vec<_>>();
            compare(&format!("gate_up {rows} x {n} x {k}"), &got, &want, n, bound, BF16);
        }
    }
}

#[test]
fn logits_are_of_the_rows_asked_for() {
    let device = common::device();
    for (rows, n, k) in [
        (&[][..], 16, 32),
        (&[0], 1, 8),
        (&[2], 15, 96),
        (&[3, 1], 16, 576),
        (&[0, 1, 2, 3, 4, 5, 6, 7], 17, 2600),
        (&[8, 7, 6, 5, 4, 3, 2, 1, 0], 100, 32),
        (&[4; 17], 17, 96),
    ] {
        let mut random = Random::new(k as u64);
        let (x, norm) = (random.f32(9 * k, 3.0), norm_weights(&mut random, k));
        let head = random.bf16(n * k, 1.0);
        let got = run_lm_head(&device, &head, n, &norm, &x, rows);
        let picked =
            rows.iter().flat_map(|&r| &x[r as usize * k..][..k]).copied().collect::<Vec<_>>();
        for (rounded, bound) in [(true, NORMED), (false, TEXTBOOK)] {
            let want = product(&normed(&picked, &norm, rounded), &widen(&head), k);
            // A row of one logit has no larger one to be measured by.
            let bound = if n == 1 { 10.0 * bound } else { bound };
            compare(&format!("lm_head {} x {n} x {k}", rows.len()), &got, &want, n, bound, 0.0);
        }
    }
}

#[test]
fn large_and_small_rows_keep_their_precision() {
    let device = common::device();
    let (n, k) = (16, 96);
    let mut random = Random::new(7);
    let (norm, head) = (norm_weights(&mut random, k), random.bf16(n * k, 1.0));
    for magnitude in [1e-3f32, 1.0, 1e4] {
        let x = random.f32(3 * k, magnitude);
        let got = run_lm_head(&device, &head, n, &norm, &x, &[0, 1, 2]);
        let want = product(&normed(&x, &norm, true), &widen(&head), k);
        compare(&format!("magnitude {magnitude}"), &got, &want, n, NORMED, 0.0);
    }
    let zeros = run_lm_head(&device, &head, n, &norm, &vec![0.0; k], &[0]);
    assert!(zeros.iter().all(|&logit| logit == 0.0));
}

#[test]
fn sizes_that_do_not_fit_are_refused() {
    let device = common::device();
    let matrix = |n, k| Matrix { data: Buffer::new(&device, n * k, "w").unwrap(), n, k };
    let mut x = Rows::<f32>::new(&device, 2, 16, "x").unwrap();
    let a = |width| Rows::<u16>::new(&device, 2, width, "a").unwrap();
    let mut linear = |w: &Matrix, a: &Rows<u16>, n_rows| {
        linear_decode::linear_decode(&device, w, a, n_rows, &mut x)
    };
    assert!(matches!(linear(&matrix(16, 32), &a(40), 2), Err(Error::Size { .. })));
    assert!(matches!(linear(&matrix(16, 32), &a(32), 3), Err(Error::Size { .. })));
    assert!(matches!(linear(&matrix(24, 32), &a(32), 2), Err(Error::Size { .. })));
    assert!(matches!(linear(&matrix(16, 12), &a(12), 2), Err(Error::Unsupported { .. })));
}

// What runs on the device.

fn run_linear(
    device: &Device,
    w: &[u16],
    n: usize,
    a: &[u16],
    k: usize,
    before: &[f32],
) -> Vec<f32> {
    let n_rows = a.len() / k;
    let mut y = rows(device, before, n);
    linear_decode::linear_decode(
        device,
        &matrix(device, w, n),
        &rows(device, a, k),
        n_rows,
        &mut y,
    )
    .unwrap();
    download(device, &y.data, n_rows * n)
}

fn run_gate_up(device: &Device, w: [&[u16]; 2], n: usize, norm: &[f32], x: &[f32]) -> Vec<u16> {
    let (k, n_rows) = (norm.len(), x.len() / norm.len());
    let mut h = rows(device, &vec![0xffff; n_rows * n], n);
    let [gate, up] = w.map(|w| matrix(device, w, n));
    let norm = Buffer::from_slice(device, norm, "norm").unwrap();
    let x = rows(device, x, k);
    mlp_gate_decode::gate_up_decode(device, &gate, &up, &norm, EPS, &x, n_rows, &mut h).unwrap();
    download(device, &h.data, n_rows * n)
}

fn run_lm_head(
    device: &Device,
    head: &[u16],
    n: usize,
    norm: &[f32],
    x: &[f32],
    logit_rows: &[u32],
) -> Vec<f32> {
    let k = norm.len();
    let n_rows = x.len() / k;
    let mut batch = DeviceBatch::new(device, 64, 64).unwrap();
    let seqs = [seq(0, n_rows, 0, 0)];
    let host = HostBatch {
        seqs: &seqs,
        row_seq: &vec![0; n_rows],
        positions: &(0..n_rows as u32).collect::<Vec<_>>(),
        page_tables: &[0; 8],
        n_layers: 1,
        tokens: &vec![0; n_rows],
        cos_sin: &vec![0.0; n_rows * 64],
        logit_rows,
        ..HostBatch::default()
    };
    batch.upload(device, &host).unwrap();
    let mut logits = rows(device, &vec![f32::NAN; logit_rows.len() * n], n);
    let head = matrix(device, head, n);
    let norm = Buffer::from_slice(device, norm, "norm").unwrap();
    lm_head::lm_head(device, &head, &norm, EPS, &rows(device, x, k), &batch, &mut logits).unwrap();
    download(device, &logits.data, logit_rows.len() * n)
}

// References.

/// Rows divided by their rms, times the norm's weight; `rounded`: x times the weight is rounded to
/// bf16.
fn normed(x: &[f32], norm: &[f32], rounded: bool) -> Vec<f64> {
    let mut out = Vec::new();
    for row in x.chunks(norm.len()) {
        let mean = row.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / norm.len() as f64;
        let scale = 1.0 / (mean + f64::from(EPS)).sqrt();
        out.extend(row.iter().zip(norm).map(|(&x, &g)| {
            let exact = f64::from(x) * f64::from(g);
            scale * if rounded { f64::from(from_bf16(to_bf16(x * g))) } else { exact }
        }));
    }
    out
}

/// Weights of a norm: about 1.
fn norm_weights(random: &mut Random, n: usize) -> Vec<f32> {
    (0..n).map(|_| random.uniform(0.5, 1.5)).collect()
}
