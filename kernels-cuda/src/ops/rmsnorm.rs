//! Launcher of `rmsnorm`.

use crate::abi::RmsnormArgs;
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
    Error::check_supported("rmsnorm hidden_dim", x.width, x.width % 8 == 0, "multiples of 8")?;
    Error::check_size("rmsnorm weight", weight.len(), x.width)?;
    Error::check_size("rmsnorm width of out", out.width, x.width)?;
    Error::check_room("rmsnorm rows of x, at least", x.n_rows, n_rows)?;
    Error::check_room("rmsnorm rows of out, at least", out.n_rows, n_rows)?;
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
    let launch = Launch {
        kernel: "rmsnorm",
        grid: [n_rows as u32, 1, 1],
        block: N_THREADS,
        smem_bytes: N_THREADS / 32 * 4, // a sum for each warp
    };
    // SAFETY: the pointers are to buffers of the sizes just checked.
    unsafe { device.launch(&launch, &args) }
}

/// x once, out once, the weight once.
pub fn rmsnorm_cost(n_rows: usize, hidden_dim: usize) -> Cost {
    let n = (n_rows * hidden_dim) as u64;
    Cost { bytes: n * 6 + hidden_dim as u64 * 4, flops: n * 4 }
}
