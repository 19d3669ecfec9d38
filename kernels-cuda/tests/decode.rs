//! The matrix kernels of decode against naive f64 references.
//!
//! The fused norm has two references: one that rounds `x * g` to bf16 exactly where the kernels do,
//! and the textbook's, which rounds nowhere.

mod common;

use common::{Random, compare, from_bf16, from_bf16s, to_bf16};
use loris_kernels::abi::{LORIS_DENSE, LorisSeq};
use loris_kernels::ops::batch::{DeviceBatch, HostBatch};
use loris_kernels::ops::qkv::QkvWeights;
use loris_kernels::ops::{linear_decode, lm_head, mlp_gate_decode, qkv_decode};
use loris_kernels::{Buffer, Device, Error, KvPages, Matrix, Rows};

const EPS: f32 = 1e-5;
/// Bound of f32 sums of exact products, of the largest value of a row.
const SUMS: f64 = 1e-5;
/// Bound where a norm takes part.
const NORMED: f64 = 1e-4;
/// Bound against a reference that does not round the input.
const TEXTBOOK: f64 = 1e-2;
/// Relative error of rounding to bf16.
const BF16: f64 = 1.0 / 256.0;

#[test]
fn linear_adds_the_product() {
    let device = common::device();
    // (rows, n, k): every count of rows around a tile of 8 and a group of 16, every tail of k and
    // n.
    for (rows, n, k) in [
        (0, 16, 32),
        (1, 8, 8),
        (1, 16, 96),
        (2, 24, 32),
        (7, 104, 576),
        (8, 16, 1000),
        (9, 40, 96),
        (15, 16, 576),
        (16, 24, 1000),
        (17, 8, 32),
        (33, 16, 96),
    ] {
        let mut random = Random::new((rows * 1000 + k) as u64);
        let (a, w) = (random.bf16(rows * k, 1.0), random.bf16(n * k, 1.0));
        let before = random.f32(rows * n, 1.0);
        let got = run_linear(&device, &w, n, &a, k, &before);
        let want = product(&widen(&a), &widen(&w), k)
            .iter()
            .zip(&before)
            .map(|(product, &y)| product + f64::from(y))
            .collect::<Vec<_>>();
        check(&format!("linear {rows} x {n} x {k}"), &got, &want, n, SUMS, 0.0);
    }
}

#[test]
fn bits_of_a_row_are_its_own() {
    let device = common::device();
    let (rows, n, k) = (33, 24, 600);
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
}

#[test]
fn gate_up_is_silu_of_gate_times_up() {
    let device = common::device();
    for (rows, n, k) in [
        (0, 16, 32),
        (1, 8, 8),
        (1, 24, 576),
        (2, 16, 96),
        (7, 16, 32),
        (8, 40, 1000),
        (9, 16, 96),
        (16, 8, 576),
        (17, 16, 1000),
    ] {
        let mut random = Random::new((rows * 1000 + k) as u64);
        let (x, norm) = (random.f32(rows * k, 3.0), norm_weights(&mut random, k));
        let scale = 2.0 / (k as f32).sqrt();
        let (gate, up) = (random.bf16(n * k, scale), random.bf16(n * k, scale));
        let got = from_bf16s(&run_gate_up(&device, [&gate, &up], n, &norm, &x));
        for (rounded, bound) in [(true, NORMED), (false, TEXTBOOK)] {
            let a = normed(&x, &norm, rounded);
            let (g, u) = (product(&a, &widen(&gate), k), product(&a, &widen(&up), k));
            let want =
                g.iter().zip(&u).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect::<Vec<_>>();
            check(&format!("gate_up {rows} x {n} x {k}"), &got, &want, n, bound, BF16);
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
        (&[0, 1, 2, 3, 4, 5, 6, 7], 17, 1000),
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
            check(&format!("lm_head {} x {n} x {k}", rows.len()), &got, &want, n, bound, 0.0);
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
        check(&format!("magnitude {magnitude}"), &got, &want, n, NORMED, 0.0);
    }
    let zeros = run_lm_head(&device, &head, n, &norm, &vec![0.0; k], &[0]);
    assert!(zeros.iter().all(|&logit| logit == 0.0));
}

/// A model's heads and a batch of sequences.
struct QkvCase {
    head_dim: usize,
    n_q_heads: usize,
    n_kv_heads: usize,
    hidden_dim: usize,
    page_len: usize,
    bias: bool,
    qk_norm: bool,
    /// (slots in use, rows) of each sequence.
    seqs: &'static [(usize, usize)],
}

const PLAIN: [bool; 2] = [false, false];
const BIAS: [bool; 2] = [true, false];
const QK_NORM: [bool; 2] = [false, true];
const BIAS_AND_QK_NORM: [bool; 2] = [true, true];

const QKV_CASES: &[QkvCase] = &[
    case(32, [1, 1], 8, 16, PLAIN, &[(0, 1)]),
    case(64, [3, 1], 96, 16, BIAS, &[(15, 1), (16, 1), (17, 1)]),
    case(128, [2, 1], 1000, 64, PLAIN, &[(63, 2), (0, 1), (64, 1), (5, 4)]),
    case(32, [4, 2], 32, 32, BIAS, &[(31, 9), (1, 8)]),
    case(32, [5, 1], 96, 16, BIAS_AND_QK_NORM, &[(16, 1), (0, 1)]),
    case(64, [2, 2], 32, 16, QK_NORM, &[(15, 2), (3, 7)]),
    case(128, [2, 1], 96, 16, QK_NORM, &[(7, 1)]),
];

const fn case(
    head_dim: usize,
    [n_q_heads, n_kv_heads]: [usize; 2],
    hidden_dim: usize,
    page_len: usize,
    [bias, qk_norm]: [bool; 2],
    seqs: &'static [(usize, usize)],
) -> QkvCase {
    QkvCase { head_dim, n_q_heads, n_kv_heads, hidden_dim, page_len, bias, qk_norm, seqs }
}

#[test]
fn heads_go_where_attention_reads_them() {
    let device = common::device();
    for (i, case) in QKV_CASES.iter().enumerate() {
        let model = QkvModel::new(case, i as u64);
        let n_rows = case.seqs.iter().map(|seq| seq.1).sum::<usize>();
        let batch = 0..n_rows;
        let got = model.run(&device, batch.clone());
        let n_heads = case.n_q_heads + 2 * case.n_kv_heads;
        let (got, want) = (got.rows(case), model.reference(batch));
        let width = n_heads * case.head_dim;
        check(&format!("qkv case {i}"), &from_bf16s(&got), &want, width, NORMED, BF16);

        // Each row alone has the same bits.
        for row in [0, n_rows / 2, n_rows - 1] {
            let alone = model.run(&device, row..row + 1).rows(case);
            assert_eq!(alone, got[row * width..][..width], "qkv case {i}, row {row} alone");
        }
    }
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

fn matrix(device: &Device, w: &[u16], n: usize) -> Matrix {
    Matrix { data: Buffer::from_slice(device, w, "w").unwrap(), n, k: w.len() / n }
}

/// Rows on the device; there is room for one where there are none.
fn rows<T: loris_kernels::Pod>(device: &Device, data: &[T], width: usize) -> Rows<T> {
    let n_rows = data.len() / width;
    let mut rows = Rows::new(device, n_rows.max(1), width, "rows").unwrap();
    rows.data.upload(device, 0, data).unwrap();
    rows
}

fn download<T: loris_kernels::Pod>(device: &Device, from: &Buffer<T>, len: usize) -> Vec<T> {
    let mut out = vec![T::zeroed(); len];
    from.download(device, 0, &mut out).unwrap();
    out
}

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
        slot_positions: &[],
        page_tables: &[0; 8],
        n_layers: 1,
        tokens: &vec![0; n_rows],
        cos_sin: &vec![0.0; n_rows * 64],
        tiles: &[],
        logit_rows,
    };
    batch.upload(device, &host).unwrap();
    let mut logits = rows(device, &vec![f32::NAN; logit_rows.len() * n], n);
    let head = matrix(device, head, n);
    let norm = Buffer::from_slice(device, norm, "norm").unwrap();
    lm_head::lm_head(device, &head, &norm, EPS, &rows(device, x, k), &batch, &mut logits).unwrap();
    download(device, &logits.data, logit_rows.len() * n)
}

fn seq(row_start: usize, n_rows: usize, kv_start: usize, page_table_start: usize) -> LorisSeq {
    LorisSeq {
        row_start: row_start as u32,
        n_rows: n_rows as u32,
        kv_start: kv_start as u32,
        page_table_start: page_table_start as u32,
        positions_start: LORIS_DENSE,
    }
}

/// Weights, rows and sequences of a case on the host.
struct QkvModel<'a> {
    case: &'a QkvCase,
    w: [Vec<u16>; 3],
    bias: Vec<f32>,
    qk_norm: [Vec<f32>; 2],
    norm: Vec<f32>,
    x: Vec<f32>,
    cos_sin: Vec<f32>,
}

/// What a run leaves: q, the pages, and the pages' slots of its rows.
struct QkvOutput {
    q: Vec<u16>,
    pages: Vec<u16>,
    /// (page, slot in it) of each row.
    slots: Vec<(usize, usize)>,
}

impl<'a> QkvModel<'a> {
    fn new(case: &'a QkvCase, seed: u64) -> Self {
        let mut random = Random::new(seed);
        let (d, k) = (case.head_dim, case.hidden_dim);
        let n_rows = case.seqs.iter().map(|seq| seq.1).sum::<usize>();
        let heads = [case.n_q_heads, case.n_kv_heads, case.n_kv_heads];
        let scale = 2.0 / (k as f32).sqrt();
        let angles = random.f32(n_rows * d / 2, 3.0);
        Self {
            case,
            w: heads.map(|n| random.bf16(n * d * k, scale)),
            bias: random.f32(heads.iter().sum::<usize>() * d, 1.0),
            qk_norm: [norm_weights(&mut random, d), norm_weights(&mut random, d)],
            norm: norm_weights(&mut random, k),
            x: random.f32(n_rows * k, 2.0),
            cos_sin: angles.iter().flat_map(|a| [a.cos(), a.sin()]).collect(),
        }
    }

    /// Runs some rows of the batch as a batch of their own, in the second of three layers.
    fn run(&self, device: &Device, batch_rows: std::ops::Range<usize>) -> QkvOutput {
        const N_LAYERS: usize = 3;
        const LAYER: usize = 1;
        let case = self.case;
        let (d, k) = (case.head_dim, case.hidden_dim);
        let n_rows = batch_rows.len();

        // Pages are handed out backwards, a table of all layers after the other.
        let (mut seqs, mut row_seq, mut slots) = (Vec::new(), Vec::new(), Vec::new());
        let n_table = case.seqs.iter().map(|s| (s.0 + s.1).div_ceil(case.page_len)).sum::<usize>();
        let page_tables = (0..(n_table * N_LAYERS) as u32).rev().collect::<Vec<_>>();
        let (mut first_row, mut table_start) = (0, 0);
        for &(kv_start, n) in case.seqs {
            let ours = first_row.max(batch_rows.start)..(first_row + n).min(batch_rows.end);
            if !ours.is_empty() {
                let kv_start = kv_start + ours.start - first_row;
                row_seq.extend(ours.clone().map(|_| seqs.len() as u32));
                seqs.push(seq(ours.start - batch_rows.start, ours.len(), kv_start, table_start));
                slots.extend((kv_start..kv_start + ours.len()).map(|slot| {
                    let entry = table_start + slot / case.page_len * N_LAYERS + LAYER;
                    (page_tables[entry] as usize, slot % case.page_len)
                }));
            }
            first_row += n;
            table_start += (kv_start + n).div_ceil(case.page_len) * N_LAYERS;
        }
        let mut batch = DeviceBatch::new(device, 64, d).unwrap();
        let host = HostBatch {
            seqs: &seqs,
            row_seq: &row_seq,
            positions: &vec![0; n_rows],
            slot_positions: &[],
            page_tables: &page_tables,
            n_layers: N_LAYERS,
            tokens: &vec![0; n_rows],
            cos_sin: &self.cos_sin[batch_rows.start * d..batch_rows.end * d],
            tiles: &[],
            logit_rows: &[],
        };
        batch.upload(device, &host).unwrap();

        let n_pages = page_tables.len();
        let page_elems = 2 * case.n_kv_heads * case.page_len * d;
        let poison = vec![0xffu8; n_pages * page_elems * 2];
        let mut pages = KvPages {
            data: Buffer::from_slice(device, &poison, "pages").unwrap(),
            n_pages,
            n_kv_heads: case.n_kv_heads,
            page_len: case.page_len,
            head_dim: d,
        };
        let n_heads = case.n_q_heads + 2 * case.n_kv_heads;
        let mut q = rows(device, &vec![0xffff; n_rows * case.n_q_heads * d], case.n_q_heads * d);
        let mut raw = rows(device, &vec![f32::NAN; n_rows * n_heads * d], n_heads * d);
        let [wq, wk, wv] = [0, 1, 2].map(|i| matrix(device, &self.w[i], self.w[i].len() / k));
        let bias = Buffer::from_slice(device, &self.bias, "bias").unwrap();
        let [q_norm, k_norm] =
            [0, 1].map(|i| Buffer::from_slice(device, &self.qk_norm[i], "norm").unwrap());
        let weights = QkvWeights {
            q: &wq,
            k: &wk,
            v: &wv,
            bias: case.bias.then_some(&bias),
            qk_norm: case.qk_norm.then_some([&q_norm, &k_norm]),
            n_q_heads: case.n_q_heads,
            n_kv_heads: case.n_kv_heads,
            head_dim: d,
            eps: EPS,
        };
        let norm = Buffer::from_slice(device, &self.norm, "norm").unwrap();
        let x = rows(device, &self.x[batch_rows.start * k..batch_rows.end * k], k);
        qkv_decode::qkv_decode(
            device, &weights, &norm, &x, &batch, LAYER, &mut raw, &mut q, &mut pages,
        )
        .unwrap();

        let bytes = download(device, &pages.data, poison.len());
        let pages = bytes.chunks(2).map(|b| u16::from_le_bytes([b[0], b[1]])).collect();
        QkvOutput { q: download(device, &q.data, n_rows * case.n_q_heads * d), pages, slots }
    }

    /// Q, K and V of each row, one head after the other.
    fn reference(&self, batch_rows: std::ops::Range<usize>) -> Vec<f64> {
        let case = self.case;
        let (d, k) = (case.head_dim, case.hidden_dim);
        let mut out = Vec::new();
        for row in batch_rows {
            let a = normed(&self.x[row * k..][..k], &self.norm, true);
            let mut heads =
                self.w.iter().flat_map(|w| product(&a, &widen(w), k)).collect::<Vec<_>>();
            for (h, head) in heads.chunks_mut(d).enumerate() {
                if case.bias {
                    let bias = &self.bias[h * d..][..d];
                    head.iter_mut().zip(bias).for_each(|(x, &b)| *x += f64::from(b));
                }
                if h >= case.n_q_heads + case.n_kv_heads {
                    continue;
                }
                if case.qk_norm {
                    let norm = &self.qk_norm[usize::from(h >= case.n_q_heads)];
                    let mean = head.iter().map(|x| x * x).sum::<f64>() / d as f64;
                    let scale = 1.0 / (mean + f64::from(EPS)).sqrt();
                    head.iter_mut().zip(norm).for_each(|(x, &g)| *x *= scale * f64::from(g));
                }
                for i in 0..d / 2 {
                    let [cos, sin] = [0, 1].map(|j| f64::from(self.cos_sin[row * d + 2 * i + j]));
                    let (x, y) = (head[i], head[i + d / 2]);
                    head[i] = x * cos - y * sin;
                    head[i + d / 2] = y * cos + x * sin;
                }
            }
            out.extend(heads);
        }
        out
    }
}

impl QkvOutput {
    /// Q, K and V of each row, one head after the other. Everything else in the pages is as it was.
    fn rows(mut self, case: &QkvCase) -> Vec<u16> {
        let d = case.head_dim;
        let q_width = case.n_q_heads * d;
        let mut out = Vec::new();
        for (row, &(page, slot)) in self.slots.iter().enumerate() {
            out.extend(&self.q[row * q_width..][..q_width]);
            for head in 0..2 * case.n_kv_heads {
                let at = ((page * 2 * case.n_kv_heads + head) * case.page_len + slot) * d;
                out.extend(&self.pages[at..][..d]);
                self.pages[at..][..d].fill(0xffff);
            }
        }
        assert!(self.pages.iter().all(|&bits| bits == 0xffff), "a slot of no row was written");
        out
    }
}

// References and comparisons.

/// `a w^T` of rows of k.
fn product(a: &[f64], w: &[f64], k: usize) -> Vec<f64> {
    let dot = |a: &[f64], w: &[f64]| a.iter().zip(w).map(|(a, w)| a * w).sum::<f64>();
    a.chunks(k).flat_map(|a| w.chunks(k).map(move |w| dot(a, w))).collect()
}

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

/// Compares, and says how close it was.
#[track_caller]
fn check(what: &str, got: &[f32], want: &[f64], width: usize, bound: f64, relative: f64) {
    let worst = compare(what, got, want, width, bound, relative);
    println!("{what}: {worst:.1e} of {bound:.0e} + {relative:.0e}");
}

fn same_bits(a: &[f32], b: &[f32]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits())
}

fn widen(a: &[u16]) -> Vec<f64> {
    a.iter().map(|&bits| f64::from(from_bf16(bits))).collect()
}

/// Weights of a norm: about 1.
fn norm_weights(random: &mut Random, n: usize) -> Vec<f32> {
    (0..n).map(|_| random.uniform(0.5, 1.5)).collect()
}
