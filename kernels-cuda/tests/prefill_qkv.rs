//! Q, K and V of prefill against a naive f64 reference, and nothing beside them in the pages.
#![allow(clippy::unwrap_used)]

mod common;

use std::ops::Range;

use common::{Random, compare, from_bf16, from_bf16s};
use loris_formats::Sides;
use loris_kernels::abi::{LORIS_DENSE, LorisHeads, LorisSeq, QkvPrefillArgs};
use loris_kernels::ops::batch::{DeviceBatch, HostBatch};
use loris_kernels::ops::qkv::{self, QkvWeights};
use loris_kernels::{Buffer, Device, KvPages, Launch, Matrix, Pod, Rows};

/// Bound of f32 sums of exact products, of the largest value of a row.
const SUMS: f64 = 1e-5;
/// What rounding to bf16 adds: relative.
const BF16: f64 = 1.0 / 256.0;
const EPS: f32 = 1e-5;
const N_LAYERS: usize = 3;
const LAYER: usize = 1;

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

#[rustfmt::skip]
const QKV_CASES: &[QkvCase] = &[
    QkvCase { head_dim: 32, n_q_heads: 1, n_kv_heads: 1, hidden_dim: 8, page_len: 16, bias: false, qk_norm: false, seqs: &[(0, 1)] },
    QkvCase { head_dim: 32, n_q_heads: 5, n_kv_heads: 5, hidden_dim: 96, page_len: 16, bias: true, qk_norm: true, seqs: &[(15, 1), (16, 2), (17, 126)] },
    QkvCase { head_dim: 64, n_q_heads: 9, n_kv_heads: 3, hidden_dim: 72, page_len: 64, bias: false, qk_norm: false, seqs: &[(0, 7)] },
    QkvCase { head_dim: 64, n_q_heads: 4, n_kv_heads: 1, hidden_dim: 96, page_len: 64, bias: true, qk_norm: false, seqs: &[(63, 66), (0, 130)] },
    QkvCase { head_dim: 128, n_q_heads: 2, n_kv_heads: 1, hidden_dim: 200, page_len: 256, bias: true, qk_norm: false, seqs: &[(250, 20), (255, 1), (256, 107)] },
    QkvCase { head_dim: 128, n_q_heads: 3, n_kv_heads: 1, hidden_dim: 64, page_len: 16, bias: false, qk_norm: true, seqs: &[(1, 127)] },
];

#[test]
fn heads_go_where_attention_reads_them() {
    let device = common::device();
    for (i, case) in QKV_CASES.iter().enumerate() {
        let model = QkvModel::new(case, i as u64);
        let (n_rows, width) = (case.n_rows(), case.width());
        let got = model.run(&device, 0..n_rows, None);
        compare(&format!("qkv case {i}"), &from_bf16s(&got), &model.reference(), width, SUMS, BF16);

        for block_n in [128, 256] {
            let variant = model.run(&device, 0..n_rows, Some(block_n));
            assert_eq!(variant, got, "qkv case {i}, blocks of {block_n}");
        }

        // Parts of the batch, as other batches.
        for rows in [0..1, n_rows / 2..n_rows, n_rows - 1..n_rows] {
            let part = model.run(&device, rows.clone(), None);
            assert_eq!(part, got[rows.start * width..rows.end * width], "qkv case {i}, {rows:?}");
        }
    }
}

#[test]
fn nothing_happens_without_rows() {
    let device = common::device();
    let case = QkvCase { seqs: &[(3, 0)], ..QKV_CASES[1] };
    assert!(QkvModel::new(&case, 0).run(&device, 0..0, None).is_empty());
}

impl QkvCase {
    fn n_rows(&self) -> usize {
        self.seqs.iter().map(|seq| seq.1).sum()
    }

    /// Q, K and V of a row.
    fn width(&self) -> usize {
        (self.n_q_heads + 2 * self.n_kv_heads) * self.head_dim
    }
}

/// Weights and rows of a case on the host.
struct QkvModel<'a> {
    case: &'a QkvCase,
    w: [Vec<u16>; 3],
    bias: Vec<f32>,
    qk_norm: [Vec<f32>; 2],
    a: Vec<u16>,
    cos_sin: Vec<f32>,
}

impl<'a> QkvModel<'a> {
    fn new(case: &'a QkvCase, seed: u64) -> Self {
        let mut random = Random::new(seed);
        let (d, k, n_rows) = (case.head_dim, case.hidden_dim, case.n_rows());
        let angles = random.f32(n_rows * d / 2, 3.0);
        let scale = 2.0 / (k as f32).sqrt();
        Self {
            case,
            w: [case.n_q_heads, case.n_kv_heads, case.n_kv_heads]
                .map(|n_heads| random.bf16(n_heads * d * k, scale)),
            bias: random.f32(case.width(), 1.0),
            qk_norm: [(); 2].map(|()| random.f32(d, 2.0)),
            a: random.bf16(n_rows * k, 1.0),
            cos_sin: angles.iter().flat_map(|a| [a.cos(), a.sin()]).collect(),
        }
    }

    /// Q, K and V of some rows of the batch, run as a batch of their own, in the second of three
    /// layers; `variant` says how many columns a block computes, else the launcher chooses.
    fn run(&self, device: &Device, part: Range<usize>, variant: Option<usize>) -> Vec<u16> {
        let case = self.case;
        let (d, k, page_len) = (case.head_dim, case.hidden_dim, case.page_len);

        // Pages are handed out backwards, the table of one sequence after the other's.
        let n_table = case.seqs.iter().map(|s| (s.0 + s.1).div_ceil(page_len)).sum::<usize>();
        let page_tables = (0..(n_table * N_LAYERS) as u32).rev().collect::<Vec<_>>();
        let (mut seqs, mut row_seq, mut slots) = (Vec::new(), Vec::new(), Vec::new());
        let (mut first_row, mut table_start) = (0, 0);
        for &(kv_start, n) in case.seqs {
            let ours = first_row.max(part.start)..(first_row + n).min(part.end);
            if !ours.is_empty() {
                let kv_start = kv_start + ours.start - first_row;
                row_seq.extend(ours.clone().map(|_| seqs.len() as u32));
                seqs.push(LorisSeq {
                    row_start: (ours.start - part.start) as u32,
                    n_rows: ours.len() as u32,
                    kv_start: kv_start as u32,
                    page_table_start: table_start as u32,
                    positions_start: LORIS_DENSE,
                    ..LorisSeq::default()
                });
                slots.extend((kv_start..kv_start + ours.len()).map(|slot| {
                    let entry = table_start + slot / page_len * N_LAYERS + LAYER;
                    (page_tables[entry] as usize, slot % page_len)
                }));
            }
            first_row += n;
            table_start += (kv_start + n).div_ceil(page_len) * N_LAYERS;
        }
        let mut batch = DeviceBatch::new(device, part.len().max(1), d).unwrap();
        let host = HostBatch {
            seqs: &seqs,
            row_seq: &row_seq,
            positions: &vec![0; part.len()],
            page_tables: &page_tables,
            n_layers: N_LAYERS,
            tokens: &vec![0; part.len()],
            cos_sin: &self.cos_sin[part.start * d..part.end * d],
            ..HostBatch::default()
        };
        batch.upload(device, &host).unwrap();

        let [wq, wk, wv] = [0, 1, 2].map(|i| {
            let data = Buffer::from_slice(device, &self.w[i], "w").unwrap();
            Matrix { data, n: self.w[i].len() / k, k }
        });
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
        let page_elems = 2 * case.n_kv_heads * page_len * d;
        let n_pages = page_tables.len();
        let poison = vec![0xff; n_pages * page_elems * 2];
        let mut pages = KvPages {
            data: Buffer::from_slice(device, &poison, "pages").unwrap(),
            n_pages,
            n_kv_heads: case.n_kv_heads,
            page_len,
            head_dim: d,
            kv: Sides::default(),
        };
        let q_width = case.n_q_heads * d;
        let mut q = rows(device, &vec![0xffff; part.len() * q_width], q_width);
        let a = rows(device, &self.a[part.start * k..part.end * k], k);
        match variant {
            None => {
                qkv::qkv_prefill(device, &weights, &a, &batch, LAYER, &mut q, &mut pages).unwrap();
            }
            Some(block_n) => launch(device, &weights, &a, &batch, &q, &pages, block_n),
        }

        // Take the rows' K and V out of the pages: nothing else is there.
        let q = download(device, &q.data, part.len() * q_width);
        let bytes = download(device, &pages.data, n_pages * page_elems * 2);
        let mut elems =
            bytes.chunks(2).map(|b| u16::from_le_bytes([b[0], b[1]])).collect::<Vec<_>>();
        let mut out = Vec::new();
        for (row, &(page, slot)) in slots.iter().enumerate() {
            out.extend_from_slice(&q[row * q_width..][..q_width]);
            for side_head in 0..2 * case.n_kv_heads {
                let start = page * page_elems + (side_head * page_len + slot) * d;
                out.extend_from_slice(&elems[start..][..d]);
                elems[start..][..d].fill(0xffff);
            }
        }
        assert!(elems.iter().all(|&bits| bits == 0xffff), "a write beside the rows' slots");
        out
    }

    /// Q, K and V of all rows, in f64.
    fn reference(&self) -> Vec<f64> {
        let case = self.case;
        let d = case.head_dim;
        let a = widen(&self.a);
        let sums = [0, 1, 2].map(|i| product(&a, &widen(&self.w[i]), case.hidden_dim));
        let mut out = Vec::new();
        for row in 0..case.n_rows() {
            let first = out.len();
            for sums in &sums {
                let width = sums.len() / case.n_rows();
                out.extend_from_slice(&sums[row * width..][..width]);
            }
            for (head, x) in out[first..].chunks_mut(d).enumerate() {
                if case.bias {
                    let bias = &self.bias[head * d..];
                    x.iter_mut().zip(bias).for_each(|(x, &b)| *x += f64::from(b));
                }
                if head >= case.n_q_heads + case.n_kv_heads {
                    continue; // V
                }
                if case.qk_norm {
                    let mean = x.iter().map(|x| x * x).sum::<f64>() / d as f64;
                    let norm = &self.qk_norm[usize::from(head >= case.n_q_heads)];
                    let rms = (mean + f64::from(EPS)).sqrt();
                    x.iter_mut().zip(norm).for_each(|(x, &w)| *x *= f64::from(w) / rms);
                }
                for i in 0..d / 2 {
                    let at = row * d + 2 * i;
                    let [cos, sin] = [at, at + 1].map(|at| f64::from(self.cos_sin[at]));
                    let (lo, hi) = (x[i], x[i + d / 2]);
                    (x[i], x[i + d / 2]) = (lo * cos - hi * sin, hi * cos + lo * sin);
                }
            }
        }
        out
    }
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

/// Rows on the device; there is room for one where there are none.
fn rows<T: Pod>(device: &Device, data: &[T], width: usize) -> Rows<T> {
    let n_rows = data.len() / width;
    let mut rows = Rows::new(device, n_rows.max(1), width, "rows").unwrap();
    rows.data.upload(device, 0, data).unwrap();
    rows
}

fn download<T: Pod>(device: &Device, from: &Buffer<T>, len: usize) -> Vec<T> {
    let mut out = vec![T::zeroed(); len];
    from.download(device, 0, &mut out).unwrap();
    out
}

/// a w^T in f64: a is `[..][k]`, w is `[n][k]`.
fn product(a: &[f64], w: &[f64], k: usize) -> Vec<f64> {
    a.chunks(k)
        .flat_map(|a| w.chunks(k).map(|w| a.iter().zip(w).map(|(a, w)| a * w).sum()))
        .collect()
}

fn widen(bits: &[u16]) -> Vec<f64> {
    bits.iter().map(|&bits| f64::from(from_bf16(bits))).collect()
}
