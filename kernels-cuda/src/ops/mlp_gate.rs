//! Launchers of `gate_up_*`.

use crate::abi::GateUpPrefillArgs;
use crate::ops::{equal, linear};
use crate::{Device, Error, Matrix, Rows};

/// `h = bf16(silu(a gate^T) * (a up^T))` for the first `n_rows` rows, many.
pub fn gate_up_prefill(
    device: &Device,
    gate: &Matrix,
    up: &Matrix,
    a: &Rows<u16>,
    n_rows: usize,
    h: &mut Rows<u16>,
) -> Result<(), Error> {
    const OP: &str = "gate_up_prefill";
    linear::check_matrix(OP, "gate", gate)?;
    linear::check_matrix(OP, "up", up)?;
    equal(OP, "k of up", up.k, gate.k)?;
    equal(OP, "n of up", up.n, gate.n)?;
    linear::check_rows(OP, "a", a, n_rows, gate.k)?;
    linear::check_rows(OP, "h", h, n_rows, gate.n)?;
    if n_rows == 0 {
        return Ok(());
    }
    let args = GateUpPrefillArgs {
        a: a.data.ptr() as *const u16,
        gate: gate.data.ptr() as *const u16,
        up: up.data.ptr() as *const u16,
        h: h.data.ptr() as *mut u16,
        n_rows: n_rows as u32,
        n: gate.n as u32,
        k: gate.k as u32,
    };
    // A block computes as many columns of each matrix.
    let block_n = linear::prefill_block_n(device.info(), n_rows, 2 * gate.n);
    let kernel = if block_n == 256 { "gate_up_prefill_n256" } else { "gate_up_prefill_n128" };
    let launch = linear::prefill_launch(kernel, block_n, n_rows, gate.n.div_ceil(block_n / 2));
    // SAFETY: the pointers are to buffers of the sizes just checked.
    unsafe { device.launch(&launch, &args) }
}
