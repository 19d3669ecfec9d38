//! Q, K and V of a batch: what kernels are given, what they leave, and a naive f64 reference.
#![allow(dead_code, unreachable_pub)] // each test uses its part

use std::ops::Range;

use loris_formats::Sides;
use loris_kernels::ops::batch::{DeviceBatch, HostBatch};
use loris_kernels::ops::qkv::QkvWeights;
use loris_kernels::{Buffer, Device, KvPages, Rows};

use super::Random;
use super::product::{EPS, download, matrix, product, rows, seq, widen};

const N_LAYERS: usize = 3;
/// The layer that runs.
pub const LAYER: usize = 1;

/// A model's heads and a batch of sequences.
#[derive(Clone, Copy)]
pub struct QkvCase {
    pub head_dim: usize,
    pub n_q_heads: usize,
    pub n_kv_heads: usize,
    pub hidden_dim: usize,
    pub page_len: usize,
    pub bias: bool,
    pub qk_norm: bool,
    /// (slots in use, rows) of each sequence.
    pub seqs: &'static [(usize, usize)],
}

pub const PLAIN: [bool; 2] = [false, false];
pub const BIAS: [bool; 2] = [true, false];
pub const QK_NORM: [bool; 2] = [false, true];
pub const BIAS_AND_QK_NORM: [bool; 2] = [true, true];

pub const fn case(
    head_dim: usize,
    [n_q_heads, n_kv_heads]: [usize; 2],
    hidden_dim: usize,
    page_len: usize,
    [bias, qk_norm]: [bool; 2],
    seqs: &'static [(usize, usize)],
) -> QkvCase {
    QkvCase { head_dim, n_q_heads, n_kv_heads, hidden_dim, page_len, bias, qk_norm, seqs }
}

impl QkvCase {
    pub fn n_rows(&self) -> usize {
        self.seqs.iter().map(|seq| seq.1).sum()
    }

    /// Q, K and V of a row.
    pub fn width(&self) -> usize {
        (self.n_q_heads + 2 * self.n_kv_heads) * self.head_dim
    }
}

/// Weights and angles of a case on the host.
pub struct QkvModel {
    case: QkvCase,
    w: [Vec<u16>; 3],
    bias: Vec<f32>,
    qk_norm: [Vec<f32>; 2],
    cos_sin: Vec<f32>,
}

impl QkvModel {
    pub fn new(case: QkvCase, random: &mut Random) -> Self {
        let (d, k) = (case.head_dim, case.hidden_dim);
        let angles = random.f32(case.n_rows() * d / 2, 3.0);
        let scale = 2.0 / (k as f32).sqrt();
        Self {
            case,
            w: [case.n_q_heads, case.n_kv_heads, case.n_kv_heads]
                .map(|n_heads| random.bf16(n_heads * d * k, scale)),
            bias: random.f32(case.width(), 1.0),
            qk_norm: [(); 2].map(|()| random.f32(d, 2.0)),
            cos_sin: angles.iter().flat_map(|a| [a.cos(), a.sin()]).collect(),
        }
    }

    /// Q, K and V of some rows of the batch, one head after the other, as `op` makes them of a batch
    /// of their own, in the second of three layers. Everything else in the pages stays as it was.
    pub fn run(
        &self,
        device: &Device,
        part: Range<usize>,
        op: impl FnOnce(&QkvWeights<'_>, &DeviceBatch, &mut Rows<u16>, &mut KvPages),
    ) -> Vec<u16> {
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
                seqs.push(seq(ours.start - part.start, ours.len(), kv_start, table_start));
                slots.extend((kv_start..kv_start + ours.len()).map(|slot| {
                    let entry = table_start + slot / page_len * N_LAYERS + LAYER;
                    (page_tables[entry] as usize, slot % page_len)
                }));
            }
            first_row += n;
            table_start += (kv_start + n).div_ceil(page_len) * N_LAYERS;
        }
        let mut batch = DeviceBatch::new(device, part.len().max(64), d).unwrap();
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
        op(&weights, &batch, &mut q, &mut pages);

        // Take the rows' K and V out of the pages: nothing else is there.
        let q = download(device, &q.data, part.len() * q_width);
        let bytes = download(device, &pages.data, poison.len());
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

    /// The same of all rows in f64, from what goes into the products.
    pub fn reference(&self, a: &[f64]) -> Vec<f64> {
        let case = self.case;
        let d = case.head_dim;
        let sums = self.w.each_ref().map(|w| product(a, &widen(w), case.hidden_dim));
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
