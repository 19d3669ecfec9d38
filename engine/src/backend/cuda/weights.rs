//! From tensors of a checkpoint to device memory.
//!
//! A bf16 matrix goes from the mapped file through pinned memory as it is; the others are rounded to bf16,
//! nearest even, a piece at a time. Vectors are few and small, and f32 on the device.

use loris_kernels::{Buffer, Device, Matrix, Staging};
use loris_loader::{Dtype, TensorView};

use super::limits::unsupported;
use crate::backend::check_weight;
use crate::error::Error;

/// Bytes of each half of the pinned memory.
const HALF_BYTES: usize = 8 << 20;
/// Elements that are converted at a time.
const PIECE: usize = 1 << 20;

pub(super) fn matrix(
    device: &Device,
    staging: &mut Option<Staging>,
    tensor: &TensorView,
) -> Result<Matrix, Error> {
    check_weight(tensor, 2)?;
    let (n, k) = (tensor.shape[0], tensor.shape[1]);
    if !k.is_multiple_of(8) {
        return Err(unsupported("columns of a matrix", k, "a multiple of 8"));
    }
    let staging = match staging {
        Some(staging) => staging,
        none => none.insert(Staging::new(device, HALF_BYTES)?),
    };
    let mut matrix = Matrix::new(device, n, k, "weights")?;
    let data = &mut matrix.data;
    let bytes: &[u8] = &tensor.bytes;
    match (tensor.dtype, bytemuck::try_cast_slice(bytes)) {
        (Dtype::BF16, Ok(bits)) => data.upload_staged(device, staging, 0, bits, &mut |_| ())?,
        _ => {
            let mut bits = Vec::with_capacity(PIECE);
            let element = if tensor.dtype == Dtype::F32 { 4 } else { 2 };
            for (i, piece) in bytes.chunks(PIECE * element).enumerate() {
                bits.clear();
                bits.extend(floats(tensor.dtype, piece).map(|x| half::bf16::from_f32(x).to_bits()));
                data.upload_staged(device, staging, i * PIECE, &bits, &mut |_| ())?;
            }
        }
    }
    Ok(matrix)
}

pub(super) fn vector(device: &Device, parts: &[TensorView]) -> Result<Buffer<f32>, Error> {
    let mut values = Vec::new();
    for part in parts {
        check_weight(part, 1)?;
        values.extend(floats(part.dtype, &part.bytes));
    }
    Ok(Buffer::from_slice(device, &values, "weights of norms and biases")?)
}

/// Elements that `check_weight` has seen, wherever in the file they begin.
fn floats(dtype: Dtype, bytes: &[u8]) -> impl Iterator<Item = f32> {
    let element = if dtype == Dtype::F32 { 4 } else { 2 };
    bytes.chunks_exact(element).map(move |e| match dtype {
        Dtype::BF16 => half::bf16::from_le_bytes([e[0], e[1]]).to_f32(),
        Dtype::F16 => half::f16::from_le_bytes([e[0], e[1]]).to_f32(),
        _ => f32::from_le_bytes([e[0], e[1], e[2], e[3]]),
    })
}
