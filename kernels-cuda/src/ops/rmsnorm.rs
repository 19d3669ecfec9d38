//! Launcher of `rmsnorm`.

use crate::abi::RmsnormArgs;
use crate::ops::{equal, linear, multiple};
use crate::{Buffer, Cost, Device, Error, Launch, Rows};

const N_THREADS: u32 = 256;

/// `out = bf16(x / sqrt(mean(x^2) + eps) * weight)` for the first `n_rows` rows.
pub fn rmsnorm(
    device: &Device,
    x: &Rows<f32>,
    weight: &Buffer<f32>,
    eps: f32,
    n_rows: usize,
    out: &mut Rows<u16>,
) -> Result<(), Error> {
    const OP: &str = "rmsnorm";
    multiple(OP, "hidden_dim", x.width, 8)?;
    equal(OP, "elements of weight", weight.len(), x.width)?;
    linear::check_rows(OP, "x", x, n_rows, x.width)?;
    linear::check_rows(OP, "out", out, n_rows, x.width)?;
    if n_rows == 0 {
        return Ok(());
    }
    let args = RmsnormArgs {
        x: x.data.ptr() as *const f32,
        weight: weight.ptr() as *const f32,
        out: out.data.ptr() as *mut u16,
        hidden_dim: x.width as u32,
        n_rows: n_rows as u32,
        eps,
    };
    let launch =
        Launch { kernel: "rmsnorm", grid: [n_rows as u32, 1, 1], block: N_THREADS, extra_smem: 0 };
    // SAFETY: the pointers are to buffers of the sizes just checked.
    unsafe { device.launch(&launch, &args) }
}

/// x once, out once, the weight once.
pub fn rmsnorm_cost(n_rows: usize, hidden_dim: usize) -> Cost {
    let n = (n_rows * hidden_dim) as u64;
    Cost { bytes: n * 6 + hidden_dim as u64 * 4, flops: n * 4 }
}
