//! Launcher of `slot_move`: the slots that stay of a sequence that evicts, to the front of their layers.

use crate::abi::SlotMoveArgs;
use crate::kv::check_by_slot;
use crate::ops::by_head_dim;
use crate::{Buffer, Cost, Device, Error, KvPages, Launch, PageTable, to_u32};

/// In the first layers of `table`, as many as there are lists in `keep`, slot `i` becomes what slot `keep[layer][i]`
/// held; `keep` is `[..][n_keep]`. Lists rise and name slots of the table; where pages hold codes, those of the first page
/// stay.
pub fn slot_move(
    device: &Device,
    pages: &mut KvPages,
    table: &PageTable,
    keep: &Buffer<u32>,
    n_keep: usize,
) -> Result<(), Error> {
    check_by_slot(pages.kv, "slot_move")?;
    let kernel = by_head_dim(pages.head_dim, ["slot_move_d32", "slot_move_d64", "slot_move_d128"])?;
    let n_layers = keep.len().checked_div(n_keep).unwrap_or(0);
    Error::check_size("slot_move slots that stay", keep.len(), n_layers * n_keep)?;
    Error::check_room("slot_move layers of the table, at least", table.n_layers, n_layers)?;
    Error::check_room("slot_move slots of the table, at least", table.n_slots(pages), n_keep)?;
    let grid = [to_u32(2 * pages.n_kv_heads), to_u32(n_layers), 1];
    let launch = Launch { kernel, grid, block: 256, extra_smem: 0 };
    let args = SlotMoveArgs {
        pages: pages.abi(),
        table: table.abi(),
        keep: keep.ptr() as *const u32,
        n_keep: to_u32(n_keep),
    };
    // SAFETY: `keep` holds a list for each layer, and the table a page for each slot that is written; that lists name
    // slots of the table and that its pages exist is the caller's promise.
    unsafe { device.launch(&launch, &args) }
}

/// Reads and writes each slot that moves.
pub fn slot_move_cost(slot_bytes: usize, n_moves: usize) -> Cost {
    Cost { bytes: (2 * slot_bytes * n_moves) as u64, flops: 0 }
}
