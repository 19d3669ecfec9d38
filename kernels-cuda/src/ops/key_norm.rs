//! Launcher of `key_norm`: how long the key of each slot is.

use loris_formats::Coding;

use crate::abi::KeyNormArgs;
use crate::kv::check_by_slot;
use crate::ops::by_head_dim;
use crate::{Buffer, Cost, Device, Error, KvPages, Launch, PageTable, to_u32};

const N_WARPS: usize = 4;

/// `norms[slot]` = the length of the slot's key, the mean over the kv heads, for the first `n_slots` slots of a layer.
pub fn key_norm(
    device: &Device,
    pages: &KvPages,
    table: &PageTable,
    layer: usize,
    n_slots: usize,
    norms: &mut Buffer<f32>,
) -> Result<(), Error> {
    check_by_slot(pages.kv, "key_norm")?;
    let kernel = by_head_dim(pages.head_dim, ["key_norm_d32", "key_norm_d64", "key_norm_d128"])?;
    Error::check_room("key_norm layers of the table, at least", table.n_layers, layer + 1)?;
    Error::check_room("key_norm slots of the table, at least", table.n_slots(pages), n_slots)?;
    Error::check_room("key_norm norms, at least", norms.len(), n_slots)?;
    let block_slots = N_WARPS * 256 / pages.head_dim; // a lane takes eight numbers
    let grid = [to_u32(n_slots.div_ceil(block_slots)), 1, 1];
    let launch = Launch { kernel, grid, block: to_u32(32 * N_WARPS), extra_smem: 0 };
    let args = KeyNormArgs {
        pages: pages.abi(),
        table: table.abi(),
        norms: norms.ptr() as *mut f32,
        n_slots: to_u32(n_slots),
        layer: to_u32(layer),
    };
    // SAFETY: `norms` and the table hold n_slots slots, as checked; that its pages exist is the caller's promise.
    unsafe { device.launch(&launch, &args) }
}

/// Reads the keys, of this format, and writes a number a slot.
pub fn key_norm_cost(k: Coding, n_kv_heads: usize, head_dim: usize, n_slots: usize) -> Cost {
    let key_bytes = n_kv_heads * (k.code_bytes(head_dim) + k.param_bytes(head_dim));
    let flops = 2 * n_kv_heads * head_dim * n_slots;
    Cost { bytes: (n_slots * (key_bytes + 4)) as u64, flops: flops as u64 }
}
