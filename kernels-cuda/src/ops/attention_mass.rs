//! Launcher of `attention_mass`: how much some rows look at each slot of their sequence.

use std::ops::Range;

use loris_formats::{AttentionShape, Coding};

use crate::abi::{AttentionMassArgs, LORIS_NO_WINDOW, LORIS_SCORE_ROWS};
use crate::images::generated::ATTENTION_MASS;
use crate::kv::attention_variant;
use crate::ops::attention::{check_pages, scale, variant};
use crate::ops::batch::DeviceBatch;
use crate::{Buffer, Cost, Device, Error, KvPages, Launch, Rows, to_u32};

/// Slots of a block.
const BLOCK_SLOTS: usize = 64;
/// Rows of a launch.
const MAX_ROWS: usize = LORIS_SCORE_ROWS as usize;

/// Adds to `scores[slot]`, for all slots in use of sequence `seq_idx`, the attention that `rows` of the batch, which
/// are rows of that sequence, pay the slot: the mean over query heads by the `lse` that attention gave, row after row.
/// The first `n_so_far` scores are added to, the others begin at 0. The bits do not depend on how many rows come
/// together.
#[allow(clippy::too_many_arguments)]
pub fn attention_mass(
    device: &Device,
    shape: AttentionShape,
    batch: &DeviceBatch,
    seq_idx: usize,
    rows: Range<usize>,
    layer: usize,
    window: Option<u32>,
    q: &Rows<u16>,
    lse: &Buffer<f32>,
    pages: &KvPages,
    n_so_far: usize,
    scores: &mut Buffer<f32>,
) -> Result<(), Error> {
    let kernel = variant(shape, ATTENTION_MASS[attention_variant(pages.kv)?])?;
    let (n_rows, max_kv_len) = (batch.n_rows(), batch.max_kv_len());
    check_pages(shape, batch, layer, pages)?;
    let width = shape.n_q_heads * shape.head_dim;
    Error::check_size("attention_mass q width", q.width, width)?;
    Error::check_room("attention_mass q rows, at least", q.n_rows, n_rows)?;
    Error::check_room("attention_mass sequences, at least", batch.n_seqs(), seq_idx + 1)?;
    Error::check_supported("attention_mass rows", rows.len(), !rows.is_empty(), "at least one")?;
    Error::check_room("attention_mass rows of the batch, at least", n_rows, rows.end)?;
    Error::check_room("attention_mass lse, at least", lse.len(), n_rows * shape.n_q_heads)?;
    Error::check_room("attention_mass scores, at least", scores.len(), max_kv_len)?;

    let grid = [to_u32((max_kv_len + pages.kv.skew()).div_ceil(BLOCK_SLOTS)), 1, 1];
    for row_start in rows.clone().step_by(MAX_ROWS) {
        let n_mass_rows = MAX_ROWS.min(rows.end - row_start);
        let extra_smem = to_u32(n_mass_rows * BLOCK_SLOTS * 4); // what each row pays each slot
        let launch = Launch { kernel, grid, block: 128, extra_smem };
        let n_so_far = if row_start == rows.start { n_so_far } else { max_kv_len };
        let args = AttentionMassArgs {
            q: q.data.ptr() as *const _,
            lse: lse.ptr() as *const _,
            scores: scores.ptr() as *mut _,
            pages: pages.abi(),
            batch: batch.abi(),
            seq_idx: to_u32(seq_idx),
            row_start: to_u32(row_start),
            n_mass_rows: to_u32(n_mass_rows),
            n_so_far: to_u32(n_so_far),
            layer: to_u32(layer),
            n_q_heads: to_u32(shape.n_q_heads),
            window: window.unwrap_or(LORIS_NO_WINDOW),
            scale: scale(shape),
        };
        // SAFETY: the buffers hold what the kernel reads and writes, as checked.
        unsafe { device.launch(&launch, &args)? };
    }
    Ok(())
}

/// What scoring `kv_len` slots by `n_rows` rows of a launch must do: K, of this format, read once.
pub fn attention_mass_cost(shape: AttentionShape, k: Coding, kv_len: usize, n_rows: usize) -> Cost {
    let AttentionShape { n_q_heads, n_kv_heads, head_dim } = shape;
    let head_bytes = k.code_bytes(head_dim) + k.param_bytes(head_dim);
    let bytes = kv_len * (n_kv_heads * head_bytes + 4) + n_rows * n_q_heads * (2 * head_dim + 4);
    Cost { bytes: bytes as u64, flops: (2 * n_q_heads * head_dim * kv_len * n_rows) as u64 }
}
