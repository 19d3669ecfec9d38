//! Q, K and V of decode, from the residual stream to q and the pages.

use std::ops::Range;

use loris_formats::Sides;
use loris_kernels::ops::batch::{DeviceBatch, HostBatch};
use loris_kernels::ops::qkv::QkvWeights;
use loris_kernels::ops::qkv_decode;
use loris_kernels::{Buffer, Device, KvPages};

use crate::common::{self, Random, from_bf16s};
use crate::*;

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
    case(128, [2, 1], 1096, 64, PLAIN, &[(63, 2), (0, 1), (64, 1), (5, 4)]),
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
        let (got, want) = (got.heads(case), model.reference(batch));
        let width = n_heads * case.head_dim;
        compare(&format!("qkv case {i}"), &from_bf16s(&got), &want, width, NORMED, BF16);

        // Each row alone has the same bits.
        for row in [0, n_rows / 2, n_rows - 1] {
            let alone = model.run(&device, row..row + 1).heads(case);
            assert_eq!(alone, got[row * width..][..width], "qkv case {i}, row {row} alone");
        }
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
    fn run(&self, device: &Device, batch_rows: Range<usize>) -> QkvOutput {
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
            page_tables: &page_tables,
            n_layers: N_LAYERS,
            tokens: &vec![0; n_rows],
            cos_sin: &self.cos_sin[batch_rows.start * d..batch_rows.end * d],
            ..HostBatch::default()
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
            kv: Sides::default(),
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
    fn reference(&self, batch_rows: Range<usize>) -> Vec<f64> {
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
    fn heads(mut self, case: &QkvCase) -> Vec<u16> {
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
