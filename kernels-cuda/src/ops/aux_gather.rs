//! Launcher of `aux_gather`: rows by index.

use super::{at_least, equal, multiple, size};
use crate::abi::AuxGatherArgs;
use crate::buffer::{Buffer, Pod, Rows};
use crate::device::Device;
use crate::error::Error;
use crate::launch::{Cost, Launch};

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
    multiple("aux_gather", "bytes of a row", row_bytes, 16)?;
    equal("aux_gather", "width of the target", to.width, from.width)?;
    at_least("aux_gather", "rows of the target", to.n_rows, n_rows)?;
    at_least("aux_gather", "indices", idx.len(), n_rows)?;
    if n_rows == 0 || row_bytes == 0 {
        return Ok(());
    }
    let row_bytes: u32 = size("aux_gather", "bytes of a row", row_bytes)?;
    let n_rows = size("aux_gather", "rows", n_rows)?;
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
#[must_use]
pub fn gather_rows_cost(row_bytes: usize, n_rows: usize) -> Cost {
    Cost { bytes: (n_rows * (2 * row_bytes + 4)) as u64, flops: 0 }
}
