//! Launcher of `token_select`: which tokens go on and which wait.

use crate::abi::TokenSelectArgs;
use crate::{Buffer, Cost, Device, Error, Launch};

const N_THREADS: u32 = 1024;
const MAX_N: usize = (1 << 31) - 1;

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
    Error::check_supported("token_select n", n, n <= MAX_N, "below 2^31")?;
    Error::check_room("token_select scores, at least", scores.len(), n)?;
    Error::check_room("token_select n, at least n_keep", n, n_keep)?;
    Error::check_room("token_select n_keep, at least n_head + n_tail", n_keep, n_head + n_tail)?;
    Error::check_room("token_select keep, at least", keep.len(), n_keep)?;
    if let Some(drop) = &drop {
        Error::check_room("token_select drop, at least", drop.len(), n - n_keep)?;
    }
    let launch = Launch {
        kernel: "token_select",
        grid: [n.min(1) as u32, 1, 1],
        block: N_THREADS,
        extra_smem: 0,
    };
    let args = TokenSelectArgs {
        scores: scores.ptr() as *const f32,
        keep: keep.ptr() as *mut u32,
        drop: drop.map_or(0, |drop| drop.ptr()) as *mut u32,
        n: n as u32,
        n_keep: n_keep as u32,
        n_head: n_head as u32,
        n_tail: n_tail as u32,
    };
    // SAFETY: scores holds n, keep n_keep and drop n - n_keep elements.
    unsafe { device.launch(&launch, &args) }
}

/// Reads the scores once, writes every index once.
pub fn token_select_cost(n: usize) -> Cost {
    Cost { bytes: 8 * n as u64, flops: 0 }
}
