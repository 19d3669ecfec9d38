//! Launcher of `aux_gather`: rows by index.

use bytemuck::Pod;

use crate::abi::AuxGatherArgs;
use crate::{Buffer, Cost, Device, Error, Launch, Rows};

const N_THREADS: u32 = 128;
/// Bytes that a block copies.
const RUN: u32 = N_THREADS * 4 * 16;

/// `to[i] = from[idx[i]]` for `n_rows` rows. Indices are below the rows of `from`.
pub fn gather_rows<T: Pod>(
    device: &Device,
    from: &Rows<T>,
    idx: &Buffer<u32>,
    n_rows: usize,
    to: &mut Rows<T>,
) -> Result<(), Error> {
    let row_bytes = from.width * size_of::<T>();
    let is_whole = row_bytes.is_multiple_of(16) && row_bytes <= u32::MAX as usize;
    Error::check_supported("aux_gather row bytes", row_bytes, is_whole, "multiples of 16")?;
    Error::check_size("aux_gather width of the target", to.width, from.width)?;
    Error::check_room("aux_gather rows of the target, at least", to.n_rows, n_rows)?;
    Error::check_room("aux_gather indices, at least", idx.len(), n_rows)?;
    let (n_rows, row_bytes) = (n_rows as u32, row_bytes as u32);
    let launch = Launch {
        kernel: "aux_gather",
        grid: [n_rows, row_bytes.div_ceil(RUN), 1],
        block: N_THREADS,
        smem_bytes: 0,
    };
    let args = AuxGatherArgs {
        from: from.data.ptr() as *const _,
        to: to.data.ptr() as *mut _,
        idx: idx.ptr() as *const u32,
        n_rows,
        row_bytes,
    };
    // SAFETY: `idx` and `to` have n_rows rows; that the indices exist is the caller's promise.
    unsafe { device.launch(&launch, &args) }
}

/// Reads and writes each row, and reads its index.
pub fn gather_rows_cost(row_bytes: usize, n_rows: usize) -> Cost {
    Cost { bytes: (n_rows * (2 * row_bytes + 4)) as u64, flops: 0 }
}
