//! Launcher of `linear_decode_store` as the last product of a model: the logits.

use crate::abi::LinearDecodeArgs;
use crate::ops::batch::DeviceBatch;
use crate::ops::linear_decode::{check_weights, decode_launch, norm_input};
use crate::{Buffer, Device, Error, Matrix, Rows};

/// `logits[i] = norm(x[r]) head^T` for the i-th of the rows r whose logits the batch wants.
pub fn lm_head(
    device: &Device,
    head: &Matrix,
    norm: &Buffer<f32>,
    eps: f32,
    x: &Rows<f32>,
    batch: &DeviceBatch,
    logits: &mut Rows<f32>,
) -> Result<(), Error> {
    let n_rows = batch.n_logit_rows();
    check_weights(head)?;
    Error::check_size("lm_head width of x", x.width, head.k)?;
    Error::check_room("lm_head rows of x, at least", x.n_rows, batch.n_rows())?;
    Error::check_size("lm_head width of logits", logits.width, head.n)?;
    Error::check_room("lm_head rows of logits, at least", logits.n_rows, n_rows)?;
    let args = LinearDecodeArgs {
        in_: norm_input(x, norm, eps, Some(batch.logit_rows()), n_rows)?,
        w: head.data.ptr() as *const u16,
        y: logits.data.ptr() as *mut f32,
        n: head.n as u32,
    };
    let kernels = ["linear_decode_store_r8", "linear_decode_store_r16"];
    let launch = decode_launch(kernels, n_rows, head.n);
    // SAFETY: the pointers are to buffers of the sizes just checked; logit rows are rows of the
    // batch.
    unsafe { device.launch(&launch, &args) }
}
