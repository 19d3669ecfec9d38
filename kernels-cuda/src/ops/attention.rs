//! Launchers of attention over pages: flash attention of many rows, and split decode attention of few.
//!
//! A row sees the slots in use of its sequence whose positions are at most its own and inside the window. Which
//! of the two kernels runs is the caller's choice by phase; a row's bits depend on neither the other rows, nor
//! chunks, nor pages.

use loris_formats::{Coding, PAIRS, Sides};

use crate::abi::{
    AttentionDecodeArgs, AttentionMergeArgs, AttentionPrefillArgs, LORIS_NO_WINDOW,
    LORIS_SPLIT_LEN, LorisQTile, LorisSeq,
};
use crate::kv::attention_variant;
use crate::ops::batch::DeviceBatch;
use crate::ops::by_head_dim;
use crate::{Buffer, Cost, Device, Error, KvPages, Launch, Rows, to_u32};

/// Packed rows of a block and slots of a tile of the prefill kernels.
const BLOCK_Q: usize = 128;
const BLOCK_KV: usize = 64;
/// The kernels of heads of 32, 64 and 128 for each pair of formats, in the order of [`PAIRS`].
type Kernels = [[&'static str; 3]; PAIRS.len()];
macro_rules! kernels {
    (@ $name:literal $formats:literal) => {
        [
            concat!($name, "_d32", $formats),
            concat!($name, "_d64", $formats),
            concat!($name, "_d128", $formats),
        ]
    };
    ($name:literal) => {
        [
            kernels!(@ $name ""),
            kernels!(@ $name "_kvfp8"),
            kernels!(@ $name "_kvint8"),
            kernels!(@ $name "_kvint4"),
            kernels!(@ $name "_kvint8_int4"),
            kernels!(@ $name "_kvbf16_int4"),
            kernels!(@ $name "_kvint4_channel"),
            kernels!(@ $name "_kvint2"),
        ]
    };
}

const PREFILL: Kernels = kernels!("attention_prefill");
const DECODE: Kernels = kernels!("attention_decode");
const MERGE: [&str; 3] = ["attention_merge_d32", "attention_merge_d64", "attention_merge_d128"];

/// Heads of an attention layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionShape {
    /// Query heads, a multiple of `n_kv_heads`.
    pub n_q_heads: usize,
    /// Key and value heads.
    pub n_kv_heads: usize,
    /// Elements of a head: 32, 64 or 128.
    pub head_dim: usize,
}

impl AttentionShape {
    /// Query heads that share a key and value head.
    pub fn group_size(&self) -> usize {
        self.n_q_heads / self.n_kv_heads.max(1)
    }

    pub(crate) fn scale(&self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }

    /// The kernel of this head_dim.
    pub(crate) fn variant(&self, kernels: [&'static str; 3]) -> Result<&'static str, Error> {
        let Self { n_q_heads, n_kv_heads, head_dim } = *self;
        let whole = n_kv_heads > 0 && n_q_heads > 0 && n_q_heads.is_multiple_of(n_kv_heads);
        Error::check_supported(
            "attention n_q_heads",
            n_q_heads,
            whole,
            "a multiple of n_kv_heads",
        )?;
        by_head_dim(head_dim, kernels)
    }

    /// The pool and the batch fit the shape and each other.
    pub(crate) fn check_pages(
        &self,
        batch: &DeviceBatch,
        layer: usize,
        pages: &KvPages,
    ) -> Result<(), Error> {
        let page_len = pages.page_len;
        let is_supported = page_len.is_power_of_two() && (16..=256).contains(&page_len);
        let expected = "a power of two from 16 to 256";
        Error::check_supported("attention page_len", page_len, is_supported, expected)?;
        Error::check_size("attention pages n_kv_heads", pages.n_kv_heads, self.n_kv_heads)?;
        Error::check_size("attention pages head_dim", pages.head_dim, self.head_dim)?;
        let has_codes = pages.kv.v.coding != Coding::INT2 || self.head_dim >= 64;
        Error::check_supported("int2 head_dim", self.head_dim, has_codes, "64 or 128")?;
        Error::check_room("attention pages, at least", pages.n_pages, batch.n_pages())?;
        let bytes = pages.n_pages * pages.page_bytes();
        Error::check_room("attention pages data, at least", pages.data.len(), bytes)?;
        Error::check_room("attention layers, at least", batch.n_layers(), layer + 1)
    }

    pub(crate) fn check_rows(
        &self,
        what: [&'static str; 2],
        n_rows: usize,
        rows: &Rows<u16>,
    ) -> Result<(), Error> {
        Error::check_size(what[0], rows.width, self.n_q_heads * self.head_dim)?;
        Error::check_room(what[1], rows.n_rows, n_rows)
    }

    fn check(
        &self,
        batch: &DeviceBatch,
        layer: usize,
        q: &Rows<u16>,
        pages: &KvPages,
        out: &Rows<u16>,
        lse: Option<&Buffer<f32>>,
    ) -> Result<(), Error> {
        let n_rows = batch.n_rows();
        self.check_pages(batch, layer, pages)?;
        self.check_rows(["attention q width", "attention q rows, at least"], n_rows, q)?;
        self.check_rows(["attention out width", "attention out rows, at least"], n_rows, out)?;
        lse.map_or(Ok(()), |lse| {
            Error::check_room("attention lse, at least", lse.len(), n_rows * self.n_q_heads)
        })
    }
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
    let kernel = shape.variant(PREFILL[attention_variant(pages.kv)?])?;
    shape.check(batch, layer, q, pages, out, lse.as_deref())?;
    let smem_bytes = prefill_smem(pages.kv, shape.head_dim);
    let grid = [to_u32(batch.n_tiles()), to_u32(shape.n_kv_heads), 1];
    let launch = Launch { kernel, grid, block: 128, smem_bytes: to_u32(smem_bytes) };
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
        scale: shape.scale(),
    };
    // SAFETY: the buffers hold what the kernel reads and writes, as checked.
    unsafe { device.launch(&launch, &args) }
}

/// Q, tiles of K and V, a word a packed row, and what the four warps look at.
fn prefill_smem(kv: Sides, head_dim: usize) -> usize {
    let row_bytes = 2 * head_dim;
    let tiles = match kv.are_coded() {
        false => 3 * BLOCK_KV * row_bytes, // three half tiles of K or V
        true => {
            // A tile of each, codes of each, what is kept of the params of K, and sums of each row of Q.
            let of = |format: Coding| format.code_bytes(head_dim) + format.param_bytes(head_dim);
            let k_codes = if kv.k.coding == Coding::BF16 { 0 } else { of(kv.k.coding) };
            let (k_params, q_sums) = match kv.k.coding {
                Coding::INT4 => (8 + 32, BLOCK_Q * 32), // two floats, and split zeros and sums
                k => (k.param_bytes(head_dim), 0),
            };
            // Each of four warps has the params of its run's channels.
            let channels = 4 * kv.k.coding.channel_bytes(head_dim);
            let codes = BLOCK_KV * (k_codes + of(kv.v.coding) + k_params) + channels;
            2 * BLOCK_KV * row_bytes + codes + q_sums
        }
    };
    BLOCK_Q * row_bytes + tiles + BLOCK_Q * 4 + 4 * 32
}

/// Q of 16 heads; four warps' runs of 16 slots of K and V, which may be bf16 where pages are sealed; a `row_max` and
/// `row_sum` for each warp and head.
fn decode_smem(kv: Sides, head_dim: usize) -> usize {
    let kv = if kv.are_sealed() { Sides::BF16 } else { kv };
    let of = |format: Coding| 16 * (format.code_bytes(head_dim) + format.param_bytes(head_dim));
    let stage = 4 * (of(kv.k.coding) + of(kv.v.coding));
    let n_stages = if 4 * stage <= 68 << 10 { 4 } else { 2 };
    16 * 2 * head_dim + n_stages * stage + 4 * 16 * 8
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
    let kernel = shape.variant(DECODE[attention_variant(pages.kv)?])?;
    let merge_kernel = shape.variant(MERGE)?;
    let (n_rows, group_size) = (batch.n_rows(), shape.group_size());
    let n_splits = n_splits(pages.kv, batch.max_kv_len());
    Error::check_supported("attention_decode group_size", group_size, group_size <= 16, "1 to 16")?;
    Error::check_supported("attention_decode rows", n_rows, n_rows <= 65535, "up to 65535")?;
    shape.check(batch, layer, q, pages, out, lse.as_deref())?;
    let n_parts = n_rows * shape.n_q_heads * n_splits;
    let sums = n_parts * shape.head_dim;
    Error::check_room("attention_decode partial sums, at least", partial.out.len(), sums)?;
    Error::check_room("attention_decode partial maxima, at least", partial.ml.len(), n_parts * 2)?;

    let smem_bytes = decode_smem(pages.kv, shape.head_dim);
    let grid = [to_u32(n_splits), to_u32(shape.n_kv_heads), to_u32(n_rows)];
    let launch = Launch { kernel, grid, block: 128, smem_bytes: to_u32(smem_bytes) };
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
        scale: shape.scale(),
    };
    // SAFETY: the buffers hold what the kernel reads and writes, as checked.
    unsafe { device.launch(&launch, &args)? };

    let grid = [to_u32(shape.n_q_heads), to_u32(n_rows), 1];
    let smem_bytes = to_u32(8 * (shape.head_dim + 1) * 4); // a sum and its row_sum for each of 8 warps
    let launch = Launch { kernel: merge_kernel, grid, block: 256, smem_bytes };
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
