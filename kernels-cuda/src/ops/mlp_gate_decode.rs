//! Launcher of `gate_up_decode`: norm, both products and the activation for few rows.

use crate::abi::GateUpDecodeArgs;
use crate::ops::linear_decode::{check_weights, decode_launch, norm_input};
use crate::{Buffer, Device, Error, Matrix, Rows};

/// `h = silu(norm(x) gate^T) * (norm(x) up^T)` of the first `n_rows` rows.
#[expect(clippy::too_many_arguments)]
pub fn gate_up_decode(
    device: &Device,
    gate: &Matrix,
    up: &Matrix,
    norm: &Buffer<f32>,
    eps: f32,
    x: &Rows<f32>,
    n_rows: usize,
    h: &mut Rows<u16>,
) -> Result<(), Error> {
    check_weights(gate)?;
    check_weights(up)?;
    Error::check_size("gate_up_decode n of up", up.n, gate.n)?;
    Error::check_size("gate_up_decode k of up", up.k, gate.k)?;
    Error::check_size("gate_up_decode width of x", x.width, gate.k)?;
    Error::check_size("gate_up_decode width of h", h.width, gate.n)?;
    Error::check_room("gate_up_decode rows of x, at least", x.n_rows, n_rows)?;
    Error::check_room("gate_up_decode rows of h, at least", h.n_rows, n_rows)?;
    let args = GateUpDecodeArgs {
        in_: norm_input(x, norm, eps, None, n_rows)?,
        gate: gate.data.ptr() as *const u16,
        up: up.data.ptr() as *const u16,
        h: h.data.ptr() as *mut u16,
        n: gate.n as u32,
    };
    let launch = decode_launch(["gate_up_decode_r8", "gate_up_decode_r16"], n_rows, gate.n);
    // SAFETY: the pointers are to buffers of the sizes just checked.
    unsafe { device.launch(&launch, &args) }
}
