//! Launcher of `linear_decode_add`, and what the launchers of all kernels of `gemv_decode.cuh`
//! share.
//!
//! Weights stream past up to 16 rows a block. There is a kernel for at most 8 rows and one for any
//! number; a row has the same bits in both, so the choice is one of speed.

use std::ptr;

use crate::abi::{LORIS_DECODE_ROWS, LinearDecodeArgs, LorisDecodeInput};
use crate::{Buffer, Device, Error, Launch, Matrix, Rows};

/// Rows of each weight matrix that a block takes.
const WEIGHT_ROWS: usize = 16;

/// `x += a w^T` of the first `n_rows` rows.
pub fn linear_decode(
    device: &Device,
    w: &Matrix,
    a: &Rows<u16>,
    n_rows: usize,
    x: &mut Rows<f32>,
) -> Result<(), Error> {
    check_weights(w)?;
    Error::check_size("linear_decode width of a", a.width, w.k)?;
    Error::check_size("linear_decode width of x", x.width, w.n)?;
    Error::check_room("linear_decode rows of a, at least", a.n_rows, n_rows)?;
    Error::check_room("linear_decode rows of x, at least", x.n_rows, n_rows)?;
    let args = LinearDecodeArgs {
        in_: LorisDecodeInput {
            x: ptr::null(),
            norm: ptr::null(),
            a: a.data.ptr() as *const u16,
            row_idx: ptr::null(),
            n_rows: n_rows as u32,
            k: w.k as u32,
            eps: 0.0,
        },
        w: w.data.ptr() as *const u16,
        y: x.data.ptr() as *mut f32,
        n: w.n as u32,
    };
    let launch = decode_launch(["linear_decode_add_r8", "linear_decode_add_r16"], n_rows, w.n);
    // SAFETY: the pointers are to buffers of the sizes just checked.
    unsafe { device.launch(&launch, &args) }
}

/// `Ok` if the kernels can stream the matrix.
pub(super) fn check_weights(w: &Matrix) -> Result<(), Error> {
    Error::check_supported("decode k", w.k, w.k > 0 && w.k.is_multiple_of(8), "multiples of 8")?;
    let n_max = WEIGHT_ROWS * usize::from(u16::MAX);
    Error::check_supported("decode n", w.n, w.n > 0 && w.n <= n_max, "1 to 1048560")?;
    Error::check_room("decode weights, at least", w.data.len(), w.n.saturating_mul(w.k))
}

/// Rows of `x` that are normalised on the way: those of `row_idx` (a device address) where there is
/// one, else the first. The caller has checked how many rows there are.
pub(super) fn norm_input(
    x: &Rows<f32>,
    norm: &Buffer<f32>,
    eps: f32,
    row_idx: Option<u64>,
    n_rows: usize,
) -> Result<LorisDecodeInput, Error> {
    Error::check_size("decode norm", norm.len(), x.width)?;
    Ok(LorisDecodeInput {
        x: x.data.ptr() as *const f32,
        norm: norm.ptr() as *const f32,
        a: ptr::null(),
        row_idx: row_idx.unwrap_or(0) as *const u32,
        n_rows: n_rows as u32,
        k: x.width as u32,
        eps,
    })
}

/// The launch for `n` rows of each matrix; `kernels` are those for at most 8 rows and
/// for any number. Blocks of the same weights are neighbours.
pub(super) fn decode_launch(kernels: [&'static str; 2], n_rows: usize, n: usize) -> Launch {
    let many = n_rows > 8;
    Launch {
        kernel: kernels[usize::from(many)],
        grid: [
            n_rows.div_ceil(LORIS_DECODE_ROWS as usize) as u32,
            n.div_ceil(WEIGHT_ROWS) as u32,
            1,
        ],
        block: 256,
        extra_smem: 0,
    }
}
