//! Launchers of attention over pages: flash attention of many rows, and split decode attention of few.
//!
//! A row sees the slots in use of its sequence whose positions are at most its own and inside the window. Which
//! of the two kernels runs is the caller's choice by phase; a row's bits depend on neither the other rows, nor
//! chunks, nor pages.

pub use loris_formats::AttentionShape;
use loris_formats::{Coding, HEAD_DIMS, Sides};

use crate::abi::{
    AttentionDecodeArgs, AttentionMergeArgs, AttentionPrefillArgs, LORIS_NO_WINDOW,
    LORIS_SPLIT_LEN, LorisQTile, LorisSeq,
};
use crate::images::generated::{ATTENTION_DECODE, ATTENTION_PREFILL};
use crate::kv::attention_variant;
use crate::ops::batch::DeviceBatch;
use crate::ops::by_head_dim;
use crate::{Buffer, Cost, Device, Error, KvPages, Launch, Rows, to_u32};

/// Packed rows of a block and slots of a tile of the prefill kernels.
const BLOCK_Q: usize = 128;
const BLOCK_KV: usize = 64;
const MERGE: [&str; 3] = ["attention_merge_d32", "attention_merge_d64", "attention_merge_d128"];

pub(crate) fn scale(shape: AttentionShape) -> f32 {
    1.0 / (shape.head_dim as f32).sqrt()
}

/// The kernel of a shape's head_dim.
pub(crate) fn variant(
    shape: AttentionShape,
    kernels: [&'static str; HEAD_DIMS.len()],
) -> Result<&'static str, Error> {
    let AttentionShape { n_q_heads, n_kv_heads, head_dim } = shape;
    let whole = n_kv_heads > 0 && n_q_heads > 0 && n_q_heads.is_multiple_of(n_kv_heads);
    let expected = "a multiple of n_kv_heads";
    Error::check_supported("attention n_q_heads", n_q_heads, whole, expected)?;
    by_head_dim(head_dim, kernels)
}

/// The pool and the batch fit the shape and each other.
pub(crate) fn check_pages(
    shape: AttentionShape,
    batch: &DeviceBatch,
    layer: usize,
    pages: &KvPages,
) -> Result<(), Error> {
    let page_len = pages.page_len;
    let is_supported = page_len.is_power_of_two() && (16..=256).contains(&page_len);
    let expected = "a power of two from 16 to 256";
    Error::check_supported("attention page_len", page_len, is_supported, expected)?;
    Error::check_size("attention pages n_kv_heads", pages.n_kv_heads, shape.n_kv_heads)?;
    Error::check_size("attention pages head_dim", pages.head_dim, shape.head_dim)?;
    let has_codes = pages.kv.v.coding != Coding::INT2 || shape.head_dim >= 64;
    Error::check_supported("int2 head_dim", shape.head_dim, has_codes, "64 or 128")?;
    Error::check_room("attention pages, at least", pages.n_pages, batch.n_pages())?;
    let bytes = pages.n_pages * pages.page_bytes();
    Error::check_room("attention pages data, at least", pages.data.len(), bytes)?;
    Error::check_room("attention layers, at least", batch.n_layers(), layer + 1)
}

/// The pages, the rows of Q and of what comes out, and the log sums fit the shape and the batch.
fn check(
    shape: AttentionShape,
    batch: &DeviceBatch,
    layer: usize,
    q: &Rows<u16>,
    pages: &KvPages,
    out: &Rows<u16>,
    lse: Option<&Buffer<f32>>,
) -> Result<(), Error> {
    let (n_rows, width) = (batch.n_rows(), shape.n_q_heads * shape.head_dim);
    check_pages(shape, batch, layer, pages)?;
    Error::check_size("attention q width", q.width, width)?;
    Error::check_room("attention q rows, at least", q.n_rows, n_rows)?;
    Error::check_size("attention out width", out.width, width)?;
    Error::check_room("attention out rows, at least", out.n_rows, n_rows)?;
    lse.map_or(Ok(()), |lse| {
        Error::check_room("attention lse, at least", lse.len(), n_rows * shape.n_q_heads)
    })
}

/// The work list of a prefill batch: all packed rows of all sequences, those that see most first.
pub fn q_tiles(shape: AttentionShape, seqs: &[LorisSeq]) -> Vec<LorisQTile> {
    let group_size = shape.group_size().max(1);
    let mut tiles: Vec<(usize, LorisQTile)> = Vec::new();
    for (seq_idx, seq) in seqs.iter().enumerate() {
        let n_packed = seq.n_rows as usize * group_size;
        for start in (0..n_packed).step_by(BLOCK_Q) {
            let last_row = (start + BLOCK_Q).min(n_packed).div_ceil(group_size);
            let n_kv_tiles = (seq.kv_start as usize + last_row).div_ceil(BLOCK_KV);
            let tile = LorisQTile { seq_idx: to_u32(seq_idx), packed_start: to_u32(start) };
            tiles.push((n_kv_tiles, tile));
        }
    }
    tiles.sort_by_key(|&(n_kv_tiles, _)| std::cmp::Reverse(n_kv_tiles));
    tiles.into_iter().map(|(_, tile)| tile).collect()
}

/// Attention of the batch's rows by the work list in the batch (see [`q_tiles`]); `lse` is `[n_rows][n_q_heads]`.
#[allow(clippy::too_many_arguments)]
pub fn attention_prefill(
    device: &Device,
    shape: AttentionShape,
    batch: &DeviceBatch,
    layer: usize,
    window: Option<u32>,
    q: &Rows<u16>,
    pages: &KvPages,
    out: &mut Rows<u16>,
    lse: Option<&mut Buffer<f32>>,
) -> Result<(), Error> {
    let kernel = variant(shape, ATTENTION_PREFILL[attention_variant(pages.kv)?])?;
    check(shape, batch, layer, q, pages, out, lse.as_deref())?;
    let grid = [to_u32(batch.n_tiles()), to_u32(shape.n_kv_heads), 1];
    let launch = Launch { kernel, grid, block: 128, extra_smem: 0 };
    let args = AttentionPrefillArgs {
        q: q.data.ptr() as *const _,
        out: out.data.ptr() as *mut _,
        lse: lse.map_or(0, |lse| lse.ptr()) as *mut _,
        tiles: batch.tiles() as *const _,
        pages: pages.abi(),
        batch: batch.abi(),
        layer: to_u32(layer),
        n_q_heads: to_u32(shape.n_q_heads),
        window: window.unwrap_or(LORIS_NO_WINDOW),
        scale: scale(shape),
    };
    // SAFETY: the buffers hold what the kernel reads and writes, as checked.
    unsafe { device.launch(&launch, &args) }
}

/// What the splits of decode attention give, before they are put together.
#[derive(Debug)]
pub struct Partial {
    /// `[n_rows][n_q_heads][max_splits][head_dim]`
    pub out: Buffer<f32>,
    /// `[n_rows][n_q_heads][max_splits][2]`
    pub ml: Buffer<f32>,
}

impl Partial {
    /// Room for `max_rows` rows whose sequences have up to `max_splits` splits of [`LORIS_SPLIT_LEN`] slots.
    pub fn new(
        device: &Device,
        shape: AttentionShape,
        max_rows: usize,
        max_splits: usize,
    ) -> Result<Self, Error> {
        let n_parts = max_rows * shape.n_q_heads * max_splits.next_power_of_two();
        let out = Buffer::new(device, n_parts * shape.head_dim, "attention partial sums")?;
        Ok(Self { out, ml: Buffer::new(device, n_parts * 2, "attention partial maxima")? })
    }
}

/// Splits that a launch for sequences of `max_kv_len` slots in pages of these formats has: rounded up, so that a
/// captured launch serves sequences that grow.
pub fn n_splits(kv: Sides, max_kv_len: usize) -> usize {
    (max_kv_len + kv.skew()).div_ceil(LORIS_SPLIT_LEN as usize).next_power_of_two()
}

/// Attention of few rows: every split of every row, then their sum.
#[allow(clippy::too_many_arguments)]
pub fn attention_decode(
    device: &Device,
    shape: AttentionShape,
    batch: &DeviceBatch,
    layer: usize,
    window: Option<u32>,
    q: &Rows<u16>,
    pages: &KvPages,
    partial: &mut Partial,
    out: &mut Rows<u16>,
    lse: Option<&mut Buffer<f32>>,
) -> Result<(), Error> {
    let kernel = variant(shape, ATTENTION_DECODE[attention_variant(pages.kv)?])?;
    let merge_kernel = variant(shape, MERGE)?;
    let (n_rows, group_size) = (batch.n_rows(), shape.group_size());
    let n_splits = n_splits(pages.kv, batch.max_kv_len());
    Error::check_supported("attention_decode group_size", group_size, group_size <= 16, "1 to 16")?;
    Error::check_supported("attention_decode rows", n_rows, n_rows <= 65535, "up to 65535")?;
    check(shape, batch, layer, q, pages, out, lse.as_deref())?;
    let n_parts = n_rows * shape.n_q_heads * n_splits;
    let sums = n_parts * shape.head_dim;
    Error::check_room("attention_decode partial sums, at least", partial.out.len(), sums)?;
    Error::check_room("attention_decode partial maxima, at least", partial.ml.len(), n_parts * 2)?;

    let grid = [to_u32(n_splits), to_u32(shape.n_kv_heads), to_u32(n_rows)];
    let launch = Launch { kernel, grid, block: 128, extra_smem: 0 };
    let args = AttentionDecodeArgs {
        q: q.data.ptr() as *const _,
        partial_out: partial.out.ptr() as *mut _,
        partial_ml: partial.ml.ptr() as *mut _,
        pages: pages.abi(),
        batch: batch.abi(),
        layer: to_u32(layer),
        n_q_heads: to_u32(shape.n_q_heads),
        window: window.unwrap_or(LORIS_NO_WINDOW),
        max_splits: to_u32(n_splits),
        scale: scale(shape),
    };
    // SAFETY: the buffers hold what the kernel reads and writes, as checked.
    unsafe { device.launch(&launch, &args)? };

    let grid = [to_u32(shape.n_q_heads), to_u32(n_rows), 1];
    let launch = Launch { kernel: merge_kernel, grid, block: 256, extra_smem: 0 };
    let args = AttentionMergeArgs {
        partial_out: args.partial_out,
        partial_ml: args.partial_ml,
        out: out.data.ptr() as *mut _,
        lse: lse.map_or(0, |lse| lse.ptr()) as *mut _,
        batch: args.batch,
        n_q_heads: args.n_q_heads,
        max_splits: args.max_splits,
        skew: to_u32(pages.kv.skew()),
        rotated: pages.kv.v.rotated.into(),
    };
    // SAFETY: as above.
    unsafe { device.launch(&launch, &args) }
}

/// What attention of the rows of these sequences must do, their slots being positions: each visible slot's K and V
/// read once a sequence, and two products for each pair of a row and a slot that it sees.
pub fn attention_cost(
    shape: AttentionShape,
    kv: Sides,
    seqs: &[LorisSeq],
    window: Option<u32>,
) -> Cost {
    let AttentionShape { n_q_heads, n_kv_heads, head_dim } = shape;
    let window = window.map_or(u64::MAX, u64::from);
    let (mut n_rows, mut n_slots, mut n_pairs) = (0, 0, 0);
    for seq in seqs {
        let (start, end) = (u64::from(seq.kv_start), u64::from(seq.kv_start + seq.n_rows));
        n_rows += end - start;
        n_slots += if start == end { 0 } else { end.min((end - start - 1).saturating_add(window)) };
        n_pairs += (start + 1..=end).map(|visible| visible.min(window)).sum::<u64>();
    }
    // Bytes: q and out; K and V.
    let (rows, slots) = (4 * n_q_heads * head_dim, kv.slot_bytes(n_kv_heads, head_dim));
    let flops = (4 * n_q_heads * head_dim) as u64 * n_pairs;
    Cost { bytes: rows as u64 * n_rows + slots as u64 * n_slots, flops }
}
