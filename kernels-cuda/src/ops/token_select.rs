//! Launcher of `token_select`: which tokens go on and which wait.

use super::{at_least, size};
use crate::abi::TokenSelectArgs;
use crate::buffer::Buffer;
use crate::device::Device;
use crate::error::Error;
use crate::launch::{Cost, Launch};

const N_THREADS: u32 = 1024;
/// Four histograms of 2048 bins and what the scans need: `sizeof(Smem)` of the kernel.
const SMEM_BYTES: u32 = 33_160;

/// Writes the indices of the `n_keep` best of the first `n` scores to `keep` and those of the others to `drop`, both
/// ascending. The first `n_head` and the last `n_tail` are always kept; of equal scores the lower index is.
/// Scores may be infinite, never NaN.
#[allow(clippy::too_many_arguments)] // four counts and three buffers, each its own
pub fn token_select(
    device: &Device,
    scores: &Buffer<f32>,
    n: usize,
    n_keep: usize,
    n_head: usize,
    n_tail: usize,
    keep: &mut Buffer<u32>,
    drop: Option<&mut Buffer<u32>>,
) -> Result<(), Error> {
    at_least("token_select", "scores", scores.len(), n)?;
    at_least("token_select", "n beside n_keep", n, n_keep)?;
    at_least("token_select", "n_keep beside n_head + n_tail", n_keep, n_head + n_tail)?;
    at_least("token_select", "keep", keep.len(), n_keep)?;
    if let Some(drop) = &drop {
        at_least("token_select", "drop", drop.len(), n - n_keep)?;
    }
    if n == 0 {
        return Ok(());
    }
    let launch = Launch {
        kernel: "token_select",
        grid: [1, 1, 1],
        block: N_THREADS,
        smem_bytes: SMEM_BYTES,
    };
    let args = TokenSelectArgs {
        scores: scores.ptr() as *const f32,
        keep: keep.ptr() as *mut u32,
        drop: drop.map_or(0, |drop| drop.ptr()) as *mut u32,
        n: size("token_select", "n", n)?,
        n_keep: size("token_select", "n_keep", n_keep)?,
        n_head: size("token_select", "n_head", n_head)?,
        n_tail: size("token_select", "n_tail", n_tail)?,
    };
    // SAFETY: scores holds n, keep n_keep and drop n - n_keep elements.
    unsafe { device.launch(&launch, &args) }
}

/// Reads the scores once, writes every index once.
#[must_use]
pub fn token_select_cost(n: usize) -> Cost {
    Cost { bytes: 8 * n as u64, flops: 0 }
}
