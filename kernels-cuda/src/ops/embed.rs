//! Launcher of `embed`: rows of the embedding table as f32.

use super::batch::DeviceBatch;
use crate::abi::EmbedArgs;
use crate::{Cost, Device, Error, Launch, Matrix, Rows};

const N_THREADS: u32 = 256;

/// `x[r] = table[tokens[r]]`. Tokens are below the table's rows.
pub fn embed(
    device: &Device,
    table: &Matrix,
    batch: &DeviceBatch,
    x: &mut Rows<f32>,
) -> Result<(), Error> {
    let (hidden_dim, n_rows) = (table.k, batch.n_rows());
    let is_whole = hidden_dim.is_multiple_of(8);
    Error::check_supported("embed hidden_dim", hidden_dim, is_whole, "multiples of 8")?;
    Error::check_size("embed table", table.data.len(), table.n * table.k)?;
    Error::check_size("embed width of x", x.width, hidden_dim)?;
    Error::check_room("embed rows of x, at least", x.n_rows, n_rows)?;
    let n_threads = n_rows * (hidden_dim / 8);
    let fits = n_threads <= u32::MAX as usize;
    Error::check_supported("embed rows * hidden_dim / 8", n_threads, fits, "below 2^32")?;
    let launch = Launch {
        kernel: "embed",
        grid: [(n_threads as u32).div_ceil(N_THREADS), 1, 1],
        block: N_THREADS,
        extra_smem: 0,
    };
    let args = EmbedArgs {
        table: table.data.ptr() as *const u16,
        tokens: batch.tokens() as *const u32,
        x: x.data.ptr() as *mut f32,
        hidden_dim: hidden_dim as u32,
        n_rows: n_rows as u32,
    };
    // SAFETY: the table has hidden_dim columns and x has n_rows rows of them; tokens are the caller's promise.
    unsafe { device.launch(&launch, &args) }
}

/// Reads bf16, writes f32.
pub fn embed_cost(hidden_dim: usize, n_rows: usize) -> Cost {
    Cost { bytes: (n_rows * (6 * hidden_dim + 4)) as u64, flops: 0 }
}
