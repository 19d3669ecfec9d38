//! Random weights, the same on every device.

use loris_kernels::ops::fill_random;
use loris_loader::{Dtype, Expected, TensorView, Weights};

use crate::error::Error;

/// Matrices are uniform in +-0.03, about the spread of trained weights of these widths.
pub(crate) const SCALE: f32 = 0.03;

/// The seed and the shape of a tensor: element i is `fill_random::value(seed, i, SCALE)`, and no two tensors
/// share a counter.
pub(crate) fn place<'a>(tensors: &'a [Expected], name: &str) -> Result<(u64, &'a [usize]), Error> {
    let mut seed = 0;
    for tensor in tensors {
        if tensor.name == name {
            return Ok((seed, &tensor.shape));
        }
        seed += tensor.shape.iter().product::<usize>() as u64;
    }
    Err(Error::State { call: "weights", reason: format!("{name} is not expected") })
}

/// A vector of ones.
pub(crate) fn ones(shape: &[usize]) -> Result<TensorView, Error> {
    tensor(shape, |_| half::bf16::ONE)
}

/// A matrix of `fill_random` on the host.
pub(crate) fn matrix(n: usize, k: usize, seed: u64, scale: f32) -> Result<TensorView, Error> {
    tensor(&[n, k], |i| half::bf16::from_bits(fill_random::value(seed, i as u64, scale)))
}

fn tensor(shape: &[usize], value: impl Fn(usize) -> half::bf16) -> Result<TensorView, Error> {
    let n: usize = shape.iter().product();
    let mut bytes = Vec::new();
    bytes
        .try_reserve_exact(2 * n)
        .map_err(|_| Error::OutOfMemory { what: "synthetic weights", bytes: 2 * n })?;
    bytes.extend((0..n).flat_map(|i| value(i).to_le_bytes()));
    let weights = Weights::from_memory(vec![("".into(), Dtype::BF16, shape.to_vec(), bytes)])?;
    weights.get("").ok_or_else(|| Error::State { call: "weights", reason: "none were made".into() })
}
