//! Launchers of `linear_*`, and what the matrix products of prefill have in common.

use crate::abi::LinearPrefillArgs;
use crate::images::kernel;
use crate::ops::{at_least, equal, multiple};
use crate::{Device, DeviceInfo, Error, Launch, Matrix, Pod, Rows};

/// Rows of a block of a product of prefill.
const BLOCK_M: usize = 128;

/// Columns of a block of a prefill product: 256 where every SM gets such a block and can hold it,
/// for fewer bytes from L2; 128 otherwise. An element's bits are the same in both.
pub(super) fn prefill_block_n(info: &DeviceInfo, n_rows: usize, n_cols: usize) -> usize {
    let n_wide = n_rows.div_ceil(BLOCK_M) * n_cols.div_ceil(256);
    // All such products have as much shared memory.
    let fits = kernel("linear_prefill_n256").is_some_and(|wide| wide.smem <= info.max_smem);
    if n_wide >= info.n_sms as usize && fits { 256 } else { 128 }
}

/// The launch of a prefill product with `n_col_tiles` tiles of `block_n` columns.
pub(super) fn prefill_launch(
    kernel: &'static str,
    block_n: usize,
    n_rows: usize,
    n_col_tiles: usize,
) -> Launch {
    Launch {
        kernel,
        grid: [(n_rows.div_ceil(BLOCK_M) * n_col_tiles) as u32, 1, 1],
        block: block_n as u32, // a warp for each 64 x 64
        extra_smem: 0,
    }
}

/// A matrix is whole, and 16 bytes hold eight elements of a row of it or of the product.
pub(super) fn check_matrix(op: &str, what: &str, matrix: &Matrix) -> Result<(), Error> {
    multiple(op, &format!("k of {what}"), matrix.k, 8)?;
    multiple(op, &format!("n of {what}"), matrix.n, 8)?;
    at_least(op, &format!("elements of {what}"), matrix.data.len(), matrix.n * matrix.k)
}

/// There are `n_rows` rows of `width`.
pub(super) fn check_rows<T: Pod>(
    op: &str,
    what: &str,
    rows: &Rows<T>,
    n_rows: usize,
    width: usize,
) -> Result<(), Error> {
    equal(op, &format!("width of {what}"), rows.width, width)?;
    at_least(op, &format!("rows of {what}"), rows.n_rows, n_rows)?;
    at_least(op, &format!("elements of {what}"), rows.data.len(), n_rows * width)
}

/// `x += a W^T` for the first `n_rows` rows, many.
pub fn linear_prefill(
    device: &Device,
    w: &Matrix,
    a: &Rows<u16>,
    n_rows: usize,
    x: &mut Rows<f32>,
) -> Result<(), Error> {
    const OP: &str = "linear_prefill";
    check_matrix(OP, "w", w)?;
    check_rows(OP, "a", a, n_rows, w.k)?;
    check_rows(OP, "x", x, n_rows, w.n)?;
    if n_rows == 0 {
        return Ok(());
    }
    let args = LinearPrefillArgs {
        a: a.data.ptr() as *const u16,
        w: w.data.ptr() as *const u16,
        x: x.data.ptr() as *mut f32,
        n_rows: n_rows as u32,
        n: w.n as u32,
        k: w.k as u32,
    };
    let block_n = prefill_block_n(device.info(), n_rows, w.n);
    let kernel = if block_n == 256 { "linear_prefill_n256" } else { "linear_prefill_n128" };
    let launch = prefill_launch(kernel, block_n, n_rows, w.n.div_ceil(block_n));
    // SAFETY: the pointers are to buffers of the sizes just checked.
    unsafe { device.launch(&launch, &args) }
}
