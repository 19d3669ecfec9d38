//! Launcher of `embed`: rows of the embedding table as f32.

use super::batch::DeviceBatch;
use super::{at_least, equal, multiple, size};
use crate::abi::EmbedArgs;
use crate::buffer::{Matrix, Rows};
use crate::device::Device;
use crate::error::Error;
use crate::launch::{Cost, Launch};

const N_THREADS: u32 = 256;

/// `x[r] = table[tokens[r]]`. Tokens are below the table's rows.
pub fn embed(
    device: &Device,
    table: &Matrix,
    batch: &DeviceBatch,
    x: &mut Rows<f32>,
) -> Result<(), Error> {
    let (hidden_dim, n_rows) = (table.k, batch.n_rows());
    multiple("embed", "hidden_dim", hidden_dim, 8)?;
    equal("embed", "width of x", x.width, hidden_dim)?;
    at_least("embed", "rows of x", x.n_rows, n_rows)?;
    let n_chunks = size("embed", "hidden_dim / 8 * rows", hidden_dim / 8 * n_rows)?;
    if n_chunks == 0 {
        return Ok(());
    }
    let launch = Launch {
        kernel: "embed",
        grid: [n_chunks.div_ceil(N_THREADS), 1, 1],
        block: N_THREADS,
        smem_bytes: 0,
    };
    let args = EmbedArgs {
        table: table.data.ptr() as *const u16,
        tokens: batch.tokens() as *const u32,
        x: x.data.ptr() as *mut f32,
        hidden_dim: size("embed", "hidden_dim", hidden_dim)?,
        n_rows: size("embed", "rows", n_rows)?,
    };
    // SAFETY: the table has hidden_dim columns and x has n_rows rows of them; tokens are the caller's promise.
    unsafe { device.launch(&launch, &args) }
}

/// Reads bf16, writes f32.
#[must_use]
pub fn embed_cost(hidden_dim: usize, n_rows: usize) -> Cost {
    Cost { bytes: (n_rows * (6 * hidden_dim + 4)) as u64, flops: 0 }
}
