//! Sequences with queries, keys and values for tests of attention, their pages on a device, and the textbook.
#![allow(dead_code, unreachable_pub, clippy::print_stdout)] // each test uses its part

use std::ops::Range;

use loris_formats::{Coding, Held, PageLayout, Sides, When};
use loris_kernels::abi::{LORIS_DENSE, LorisSeq};
use loris_kernels::ops::attention::{AttentionShape, q_tiles};
use loris_kernels::ops::batch::{DeviceBatch, HostBatch};
use loris_kernels::{Buffer, Device, KvPages, Rows};

use crate::common::{Random, from_bf16, from_bf16s};

/// Page tables of two layers; the other one has pages of its own.
const N_LAYERS: usize = 2;
pub const LAYER: usize = 1;
pub const NAN: u16 = 0xffff;

pub const fn shape(n_q_heads: usize, n_kv_heads: usize, head_dim: usize) -> AttentionShape {
    AttentionShape { n_q_heads, n_kv_heads, head_dim }
}

/// What the slots of a sequence hold as positions.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Positions {
    Dense,
    /// Stored, slot i at i + offset.
    From(u32),
    /// Stored and ascending with gaps.
    Sparse,
    Descending,
    Permuted,
}

/// Pages of both keys and values in a format.
pub const fn both(format: Coding) -> Sides {
    pair(format, format)
}

/// Pages of keys and of values; values are rotated, and pages sealed, as the engine does it.
pub const fn pair(k: Coding, v: Coding) -> Sides {
    let rotated = matches!(v, Coding::INT4);
    let when = if k.is_by_channel() { When::Sealed } else { When::Append };
    Sides { k: Held { when, ..Held::new(k) }, v: Held { rotated, when, ..Held::new(v) } }
}

/// Every pair that attention is compiled for where pages hold codes.
pub const CODED: [Sides; 5] = [
    both(Coding::FP8),
    both(Coding::INT8),
    both(Coding::INT4),
    pair(Coding::INT8, Coding::INT4),
    pair(Coding::BF16, Coding::INT4),
];

/// bf16 and [`CODED`].
pub fn formats() -> impl Iterator<Item = Sides> {
    [Sides::BF16].into_iter().chain(CODED)
}

/// Slots of the first page of a table whose other pages hold codes.
const N_WIDE: usize = 4;

/// A head of a slot: its bytes, and the numbers that they stand for.
#[derive(Clone, Debug, Default)]
pub struct Head {
    pub codes: Vec<u8>,
    pub params: Vec<u8>,
    pub values: Vec<f64>,
}

impl Head {
    /// Random codes of numbers from -max to max. What they stand for is written down here by the definition.
    fn random(format: Coding, head_dim: usize, max: f32, random: &mut Random) -> Self {
        let f16 = |x: f32| half::f16::from_f32(x);
        let mut head = Self::default();
        match format {
            Coding::BF16 => {
                for bits in random.bf16(head_dim, max) {
                    head.codes.extend(bits.to_le_bytes());
                    head.values.push(from_bf16(bits).into());
                }
            }
            Coding::INT8 => {
                let scale = f16(random.uniform(0.2, max) / 127.0);
                head.params.extend(scale.to_le_bytes());
                for _ in 0..head_dim {
                    let code = random.below(255) as i32 - 127;
                    head.codes.push(code as i8 as u8);
                    head.values.push(f64::from(code) * scale.to_f64());
                }
            }
            Coding::FP8 => {
                let scale = f16(random.uniform(0.2, max) / 448.0);
                head.params.extend(scale.to_le_bytes());
                for _ in 0..head_dim {
                    let (code, sign) = (random.below(0x7f) as u8, random.below(2) as u8);
                    let (exponent, mantissa) = (i32::from(code >> 3), f64::from(code & 7) / 8.0);
                    let magnitude = match exponent {
                        0 => mantissa / 64.0,
                        _ => (1.0 + mantissa) * 2.0f64.powi(exponent - 7),
                    };
                    head.codes.push(code | sign << 7);
                    let value = if sign == 0 { magnitude } else { -magnitude };
                    head.values.push(value * scale.to_f64());
                }
            }
            Coding::INT4 => {
                let group = if head_dim == 32 { 32 } else { 64 };
                head.codes = vec![0; head_dim / 2];
                for first in (0..head_dim).step_by(group) {
                    // Some groups are constant: their scale is 0, and so are their codes.
                    let spread = random.uniform(0.3, 1.5) * max;
                    let range = if random.below(5) == 0 { 0.0 } else { spread };
                    let scale = f16(range / 15.0);
                    let zero = f16(random.uniform(-0.1, 0.1) * max - range / 2.0);
                    head.params.extend([scale.to_le_bytes(), zero.to_le_bytes()].concat());
                    for i in first..first + group {
                        let code = if range == 0.0 { 0 } else { random.below(16) as u8 };
                        // Byte i of 32 numbers has numbers i and 16 + i.
                        head.codes[i / 32 * 16 + i % 16] |= code << (i % 32 / 16 * 4);
                        head.values.push(f64::from(code) * scale.to_f64() + zero.to_f64());
                    }
                }
            }
            other => unreachable!("{other:?}: pages that are sealed are tested in sessions"),
        }
        head
    }
}

/// Multiplied with the Hadamard matrix over the square root of its size, element by element.
fn hadamard(x: &[f64]) -> Vec<f64> {
    let sign = |i: usize, j: usize| if (i & j).count_ones().is_multiple_of(2) { 1.0 } else { -1.0 };
    let factor = 1.0 / (x.len() as f64).sqrt();
    let row = |i| x.iter().enumerate().map(|(j, x)| sign(i, j) * x).sum::<f64>() * factor;
    (0..x.len()).map(row).collect()
}

/// What rows of a stream see, and the slots behind its first page that were given back.
#[derive(Clone, Copy, Debug, Default)]
pub struct Stream {
    pub sink: u32,
    pub window: u32,
    pub n_gone: usize,
}

/// Cosine and sine of pair `i` of a query at `position` that meets the sinks: quarters of a turn, so that every number is
/// exact.
fn quarter(position: u32, i: usize) -> [f32; 2] {
    [[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]][(position as usize + i) % 4]
}

/// A sequence: what its slots hold, and for each the query of the row that was appended there.
#[derive(Clone, Debug)]
pub struct Sequence {
    pub shape: AttentionShape,
    pub is_dense: bool,
    pub stream: Option<Stream>,
    pub positions: Vec<u32>,
    /// bf16 `[slot][n_q_heads][head_dim]`
    pub q: Vec<u16>,
    pub kv: Sides,
    /// Keys and values, `[slot][n_kv_heads]` each.
    pub heads: [Vec<Head>; 2],
}

impl Sequence {
    /// `q_scale` says how sharp attention is.
    pub fn new(shape: AttentionShape, len: u32, kind: Positions, q_scale: f32, seed: u64) -> Self {
        Self::coded(Sides::BF16, shape, len, kind, q_scale, seed)
    }

    /// The same in pages of other formats.
    pub fn coded(
        kv: Sides,
        shape: AttentionShape,
        len: u32,
        kind: Positions,
        q_scale: f32,
        seed: u64,
    ) -> Self {
        let mut random = Random::new(seed);
        let mut positions: Vec<u32> = match kind {
            Positions::Dense | Positions::Permuted => (0..len).collect(),
            Positions::From(offset) => (offset..offset + len).collect(),
            Positions::Sparse => (0..len).map(|i| 3 * i + i % 3).collect(),
            Positions::Descending => (0..len).rev().collect(),
        };
        if kind == Positions::Permuted {
            for i in 1..positions.len() {
                positions.swap(i, random.below(i + 1));
            }
        }
        let q = random.bf16(len as usize * shape.n_q_heads * shape.head_dim, q_scale);
        // Rotated values are such that what attention gives is up to 1 once they are rotated back.
        let max_value = if kv.v.rotated { 0.4 } else { 1.0 };
        let heads = [(kv.k.coding, 1.0), (kv.v.coding, max_value)].map(|(format, max)| {
            let slots = (0..len as usize * shape.n_kv_heads).map(|i| i / shape.n_kv_heads);
            let format = |slot| if slot < N_WIDE { Coding::BF16 } else { format };
            slots.map(|slot| Head::random(format(slot), shape.head_dim, max, &mut random)).collect()
        });
        let is_dense = kind == Positions::Dense;
        Self { shape, is_dense, stream: None, positions, q, kv, heads }
    }

    /// The same as a stream.
    pub fn streaming(&self, sink: u32, window: u32, n_gone: usize) -> Self {
        Self { stream: Some(Stream { sink, window, n_gone }), ..self.clone() }
    }

    /// As many slots as may be given back before row `row` and those behind it, in pages of this length.
    pub fn most_gone(&self, row: usize, page_len: usize) -> usize {
        let Stream { sink, window, .. } = self.stream.unwrap();
        let first_len = if self.kv.are_coded() { N_WIDE } else { page_len };
        let n_unseen = (row + 1).saturating_sub(window as usize + first_len);
        if row < (sink + window) as usize { 0 } else { n_unseen / page_len * page_len }
    }

    /// The slots below `kv_len` that the row of a slot sees, and its scores of them, by head.
    pub fn scores(
        &self,
        row: usize,
        head: usize,
        kv_len: usize,
        window: Option<u32>,
    ) -> Vec<(usize, f64)> {
        let AttentionShape { n_q_heads, n_kv_heads, head_dim } = self.shape;
        let q = from_bf16s(&self.q[(row * n_q_heads + head) * head_dim..][..head_dim]);
        let kv_head = head / self.shape.group_size();
        let own = self.positions[row];
        let full = self.stream.filter(|stream| own >= stream.sink + stream.window);
        let is_sink = |p: u32| full.is_some_and(|stream| p < stream.sink);
        let window = window.unwrap_or(u32::MAX).min(full.map_or(u32::MAX, |s| s.window));
        let sees = |p: u32| p <= own && own - p < window || is_sink(p);
        let slots = (0..kv_len).filter(|&slot| sees(self.positions[slot]));
        let half = head_dim / 2;
        let turned: Vec<f32> = (0..head_dim)
            .map(|i| {
                let [cos, sin] = quarter(own, i % half);
                if i < half {
                    q[i] * cos - q[i + half] * sin
                } else {
                    q[i] * cos + q[i - half] * sin
                }
            })
            .collect();
        slots
            .map(|slot| {
                let q = if is_sink(self.positions[slot]) { &turned } else { &q };
                let k = &self.heads[0][slot * n_kv_heads + kv_head].values;
                let dot: f64 = q.iter().zip(k).map(|(&q, &k)| f64::from(q) * k).sum();
                (slot, dot / (head_dim as f64).sqrt())
            })
            .collect()
    }

    /// Attention of a row and head by the textbook, and the logarithm of its sum.
    pub fn attention(
        &self,
        row: usize,
        head: usize,
        kv_len: usize,
        window: Option<u32>,
    ) -> (Vec<f64>, f64) {
        let AttentionShape { n_kv_heads, head_dim, .. } = self.shape;
        let kv_head = head / self.shape.group_size();
        let scores = self.scores(row, head, kv_len, window);
        let largest = scores.iter().fold(f64::NEG_INFINITY, |a, &(_, s)| a.max(s));
        let sum: f64 = scores.iter().map(|&(_, s)| (s - largest).exp()).sum();
        let mut out = vec![0.0; head_dim];
        for (slot, score) in scores {
            let p = (score - largest).exp() / sum;
            let v = &self.heads[1][slot * n_kv_heads + kv_head].values;
            for (out, &v) in out.iter_mut().zip(v) {
                *out += p * v;
            }
        }
        if self.kv.v.rotated {
            out = hadamard(&out);
        }
        (out, if sum > 0.0 { largest + sum.ln() } else { f64::NEG_INFINITY })
    }
}

/// Rows of a sequence in a batch: those of slots `kv_start .. kv_start + n_rows`, which are its last ones.
#[derive(Clone, Copy, Debug)]
pub struct Part<'a> {
    pub seq: &'a Sequence,
    pub kv_start: usize,
    pub n_rows: usize,
}

impl<'a> Part<'a> {
    pub fn all(seq: &'a Sequence) -> Self {
        Self { seq, kv_start: 0, n_rows: seq.positions.len() }
    }
    pub fn last(seq: &'a Sequence, n_rows: usize) -> Self {
        Self { seq, kv_start: seq.positions.len() - n_rows, n_rows }
    }
    pub fn kv_len(&self) -> usize {
        self.kv_start + self.n_rows
    }
}

/// Where a head of a slot is: the page of its table, and bytes of that.
#[derive(Clone, Debug)]
pub struct HeadAt {
    pub page_idx: usize,
    pub codes: Range<usize>,
    pub params: Range<usize>,
}

/// By the definition of pages: `[K|V][n_kv_heads]`, each the codes of all slots and behind them their params.
pub fn head_at(
    kv: Sides,
    n_kv_heads: usize,
    head_dim: usize,
    page_len: usize,
    slot: usize,
    side: usize,
    head: usize,
) -> HeadAt {
    let first_len = if kv.are_coded() { N_WIDE } else { page_len };
    let (page_idx, in_page, len) = match slot.checked_sub(first_len) {
        None => (0, slot, first_len),
        Some(rest) => (1 + rest / page_len, rest % page_len, page_len),
    };
    let is_wide = page_idx == 0 && kv.are_coded();
    let formats = if is_wide { [Coding::BF16; 2] } else { [kv.k.coding, kv.v.coding] };
    let sizes = formats.map(|f| [f.code_bytes(head_dim), f.param_bytes(head_dim)]);
    let run_bytes = sizes.map(|size| len * (size[0] + size[1]));
    let run = side * n_kv_heads * run_bytes[0] + head * run_bytes[side];
    let [codes, params] = sizes[side];
    let at = [run + in_page * codes, run + len * codes + in_page * params];
    HeadAt { page_idx, codes: at[0]..at[0] + codes, params: at[1]..at[1] + params }
}

/// Parts of sequences on a device. Slots and pages that are not in use hold NaN.
#[derive(Debug)]
pub struct Uploaded {
    pub batch: DeviceBatch,
    pub pages: KvPages,
    /// Five numbers of no meaning, then the tables of the parts.
    pub page_tables: Vec<u32>,
    pub q: Rows<u16>,
    pub out: Rows<u16>,
    pub lse: Buffer<f32>,
}

pub fn upload(device: &Device, parts: &[Part<'_>], page_len: usize) -> Uploaded {
    let shape = parts[0].seq.shape;
    let AttentionShape { n_q_heads, n_kv_heads, head_dim } = shape;
    let kv = parts[0].seq.kv;
    let first_len = if kv.are_coded() { N_WIDE } else { page_len };
    let n_pages_of = |n_slots: usize| match n_slots {
        0 => 0,
        n => 1 + n.saturating_sub(first_len).div_ceil(page_len),
    };
    let n_gone = |part: &Part<'_>| part.seq.stream.map_or(0, |stream| stream.n_gone);
    let n_used: usize = parts.iter().map(|p| n_pages_of(p.kv_len() - n_gone(p))).sum();
    let n_pages = n_used * N_LAYERS + 1;
    let page_bytes = PageLayout::new(n_kv_heads, page_len, head_dim, kv).bytes();
    let mut pool = vec![0xff; n_pages * page_bytes];
    let (mut seqs, mut row_seq, mut positions) = (Vec::new(), Vec::new(), Vec::new());
    let (mut slot_positions, mut page_tables, mut q) = (vec![7; 3], vec![0; 5], Vec::new());
    let mut sink_cos_sin = Vec::new();
    for (seq_idx, part) in parts.iter().enumerate() {
        let (seq, kv_len, n_gone) = (part.seq, part.kv_len(), n_gone(part));
        let Stream { sink, window, .. } = seq.stream.unwrap_or_default();
        seqs.push(LorisSeq {
            row_start: row_seq.len() as u32,
            n_rows: part.n_rows as u32,
            kv_start: (part.kv_start - n_gone) as u32,
            page_table_start: page_tables.len() as u32,
            positions_start: if seq.is_dense { LORIS_DENSE } else { slot_positions.len() as u32 },
            n_sealed: 0,
            n_gone: n_gone as u32,
            sink,
            window,
        });
        if !seq.is_dense {
            let gone = first_len..first_len + n_gone;
            let positions = seq.positions[..kv_len].iter().enumerate();
            slot_positions
                .extend(positions.map(|(i, &p)| if gone.contains(&i) { u32::MAX } else { p }));
        }
        for position in &seq.positions[part.kv_start..kv_len] {
            sink_cos_sin.extend((0..head_dim / 2).flat_map(|i| quarter(*position, i)));
        }
        row_seq.extend(std::iter::repeat_n(seq_idx as u32, part.n_rows));
        positions.extend(&seq.positions[part.kv_start..kv_len]);
        q.extend(&seq.q[part.kv_start * n_q_heads * head_dim..kv_len * n_q_heads * head_dim]);
        let gone = 1..1 + n_gone / page_len;
        for page_idx in (0..n_pages_of(kv_len)).filter(|idx| !gone.contains(idx)) {
            // The pool is handed out from its end, so that a sequence's pages do not ascend.
            let first = n_pages - 1 - (page_tables.len() - 5);
            page_tables.extend([first as u32, first as u32 - 1]);
            let page = &mut pool[(first - LAYER) * page_bytes..][..page_bytes];
            let len = if page_idx == 0 { first_len } else { page_len };
            let start = if page_idx == 0 { 0 } else { first_len + (page_idx - 1) * page_len };
            for (slot, head) in (start..kv_len.min(start + len))
                .flat_map(|slot| (0..n_kv_heads).map(move |h| (slot, h)))
            {
                for side in 0..2 {
                    let Head { codes, params, .. } = &seq.heads[side][slot * n_kv_heads + head];
                    let at = head_at(kv, n_kv_heads, head_dim, page_len, slot, side, head);
                    page[at.codes].copy_from_slice(codes);
                    page[at.params].copy_from_slice(params);
                }
            }
        }
    }
    if seqs.iter().all(|seq| seq.sink == 0) {
        sink_cos_sin.clear();
    }
    let n_rows = row_seq.len();
    let tiles = q_tiles(shape, &seqs);
    let mut batch = DeviceBatch::new(device, n_rows, head_dim).unwrap();
    let host = HostBatch {
        seqs: &seqs,
        row_seq: &row_seq,
        positions: &positions,
        slot_positions: &slot_positions,
        page_tables: &page_tables,
        n_layers: N_LAYERS,
        sink_cos_sin: &sink_cos_sin,
        tiles: &tiles,
        ..HostBatch::default()
    };
    batch.upload(device, &host).unwrap();
    let data = Buffer::from_slice(device, &pool, "pages").unwrap();
    let width = n_q_heads * head_dim;
    let poison = vec![NAN; n_rows * width];
    Uploaded {
        batch,
        pages: KvPages { data, n_pages, n_kv_heads, page_len, head_dim, kv },
        page_tables,
        q: Rows { data: Buffer::from_slice(device, &q, "q").unwrap(), n_rows, width },
        out: Rows { data: Buffer::from_slice(device, &poison, "out").unwrap(), n_rows, width },
        lse: Buffer::from_slice(device, &vec![f32::NAN; n_rows * n_q_heads], "lse").unwrap(),
    }
}

/// What attention gave: bf16 `[n_rows][n_q_heads][head_dim]` and `[n_rows][n_q_heads]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Given {
    pub out: Vec<u16>,
    pub lse: Vec<f32>,
}

impl Given {
    pub fn read(device: &Device, uploaded: &Uploaded) -> Self {
        let out = uploaded.out.data.to_vec(device).unwrap();
        Self { out, lse: uploaded.lse.to_vec(device).unwrap() }
    }

    /// Rows of the batch, as if they were alone.
    pub fn rows(&self, rows: std::ops::Range<usize>, shape: AttentionShape) -> Self {
        let heads = rows.start * shape.n_q_heads..rows.end * shape.n_q_heads;
        let elems = heads.start * shape.head_dim..heads.end * shape.head_dim;
        Self { out: self.out[elems].to_vec(), lse: self.lse[heads].to_vec() }
    }
}

/// Holds what was given against the textbook, and prints the largest errors.
#[track_caller]
pub fn check(parts: &[Part<'_>], page_len: usize, window: Option<u32>, given: Given) -> Given {
    let (shape, kv) = (parts[0].seq.shape, parts[0].seq.kv);
    let AttentionShape { n_q_heads, head_dim, .. } = shape;
    let what = format!("{shape:?}, {kv:?}, page_len {page_len}, window {window:?}");
    let (mut worst_out, mut worst_lse, mut i) = (0.0f64, 0.0f64, 0);
    for part in parts {
        for row in part.kv_start..part.kv_len() {
            for head in 0..n_q_heads {
                let (want, lse) = part.seq.attention(row, head, part.kv_len(), window);
                let got = from_bf16s(&given.out[i * head_dim..][..head_dim]);
                for (d, (&got, want)) in got.iter().zip(want).enumerate() {
                    // Values are up to 1; weights and the sum are rounded to bf16, by up to 2^-8 each.
                    let error = (f64::from(got) - want).abs();
                    assert!(
                        error <= 6e-3,
                        "{what}: row {row}, head {head}, {d}: {got} instead of {want}"
                    );
                    worst_out = worst_out.max(error);
                }
                let got = f64::from(given.lse[i]);
                let error = if got == lse { 0.0 } else { (got - lse).abs() };
                assert!(error <= 1e-4, "{what}: lse of row {row}, head {head}: {got}, not {lse}");
                worst_lse = worst_lse.max(error);
                i += 1;
            }
        }
    }
    assert_eq!(given.lse.len(), i);
    println!("{what}: out {worst_out:.1e}, lse {worst_lse:.1e}");
    given
}
