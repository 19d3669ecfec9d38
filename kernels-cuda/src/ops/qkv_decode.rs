//! Launchers of `qkv_decode` and `qkv_finish`: projections of few rows that end in attention's q
//! and in the pages.

use std::ptr;

use crate::abi::{LorisHeads, QkvDecodeArgs, QkvFinishArgs};
use crate::ops::batch::DeviceBatch;
use crate::ops::linear_decode::{check_weights, decode_launch, norm_input};
use crate::ops::qkv::QkvWeights;
use crate::{Buffer, Device, Error, KvPages, Launch, Rows};

/// Q of the batch's rows of `x`, normalised on the way, to `q`; K and V to their slots of `pages`.
///
/// A head with a q/k norm must be complete before it is rotated, and every head before it is coded: their projections
/// go through `raw`, `[n_rows][(n_q_heads + 2 n_kv_heads) * head_dim]`, which is not touched otherwise.
#[expect(clippy::too_many_arguments)]
pub fn qkv_decode(
    device: &Device,
    weights: &QkvWeights<'_>,
    norm: &Buffer<f32>,
    x: &Rows<f32>,
    batch: &DeviceBatch,
    layer: usize,
    raw: &mut Rows<f32>,
    q: &mut Rows<u16>,
    pages: &mut KvPages,
) -> Result<(), Error> {
    let n_rows = batch.n_rows();
    let heads = weights.heads(batch, layer, q, pages)?;
    for matrix in [weights.q, weights.k, weights.v] {
        check_weights(matrix)?;
    }
    Error::check_size("qkv_decode width of x", x.width, weights.q.k)?;
    Error::check_room("qkv_decode rows of x, at least", x.n_rows, n_rows)?;
    let n = weights.q.n + 2 * weights.k.n;
    let is_finished_later = weights.qk_norm.is_some() || pages.kv.are_coded();
    if is_finished_later {
        Error::check_size("qkv_decode width of raw", raw.width, n)?;
        Error::check_room("qkv_decode rows of raw, at least", raw.n_rows, n_rows)?;
    }
    let raw = if is_finished_later { raw.data.ptr() as *mut f32 } else { ptr::null_mut() };
    let args = QkvDecodeArgs {
        in_: norm_input(x, norm, weights.eps, None, n_rows)?,
        wq: weights.q.data.ptr() as *const u16,
        wk: weights.k.data.ptr() as *const u16,
        wv: weights.v.data.ptr() as *const u16,
        raw,
        heads,
    };
    let launch = decode_launch(["qkv_decode_r8", "qkv_decode_r16"], n_rows, n);
    // SAFETY: the pointers are to buffers of the sizes just checked, and the batch names pages of
    // the pool.
    unsafe { device.launch(&launch, &args) }?;
    if raw.is_null() { Ok(()) } else { qkv_finish(device, n_rows, raw, heads) }
}

/// Bias, q/k norm, rotation and append of the projections in `raw`.
fn qkv_finish(
    device: &Device,
    n_rows: usize,
    raw: *const f32,
    heads: LorisHeads,
) -> Result<(), Error> {
    let kernel = match heads.head_dim {
        32 => "qkv_finish_d32",
        64 => "qkv_finish_d64",
        _ => "qkv_finish_d128",
    };
    let n_heads = heads.n_q_heads + 2 * heads.pages.n_kv_heads;
    let heads_of_block = 1024 / heads.head_dim; // HeadGroup: 256 / D in each of four warps
    let grid = [n_rows as u32, n_heads.div_ceil(heads_of_block), 1];
    let launch = Launch { kernel, grid, block: 128, extra_smem: 0 };
    // SAFETY: `qkv_decode` has checked the sizes, and has filled `raw` in this stream.
    unsafe { device.launch(&launch, &QkvFinishArgs { raw, heads }) }
}
