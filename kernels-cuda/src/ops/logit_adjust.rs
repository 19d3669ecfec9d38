//! Launcher of `logit_adjust`: a row of logits with biases and penalties.

use crate::abi::{LogitAdjustArgs, LorisLogitChange};
use crate::{Buffer, Cost, Device, Error, Launch, Rows};

const N_THREADS: u32 = 256;
/// Logits that a block copies.
const RUN: usize = N_THREADS as usize * 8;

/// `out[0] = logits[row]`, changed at the ids of the first `n_changes` changes. No id is in two of them; ids that there are not
/// are passed over.
pub fn logit_adjust(
    device: &Device,
    logits: &Rows<f32>,
    row: usize,
    changes: &Buffer<LorisLogitChange>,
    n_changes: usize,
    out: &mut Rows<f32>,
) -> Result<(), Error> {
    let vocab_size = logits.width;
    let fits = u32::try_from(vocab_size).is_ok() && u32::try_from(n_changes).is_ok();
    Error::check_supported("logit_adjust vocab_size", vocab_size, fits, "below 2^32")?;
    Error::check_size("logit_adjust width of the target", out.width, vocab_size)?;
    Error::check_room("logit_adjust rows, at least", logits.n_rows, row.saturating_add(1))?;
    Error::check_room("logit_adjust rows of the target, at least", out.n_rows, 1)?;
    Error::check_room("logit_adjust changes, at least", changes.len(), n_changes)?;
    let grid = [vocab_size.div_ceil(RUN) as u32, 1, 1];
    let launch = Launch { kernel: "logit_adjust", grid, block: N_THREADS, extra_smem: 0 };
    let args = LogitAdjustArgs {
        logits: (logits.data.ptr() + (4 * row * vocab_size) as u64) as *const f32,
        changes: changes.ptr() as *const LorisLogitChange,
        out: out.data.ptr() as *mut f32,
        vocab_size: vocab_size as u32,
        n_changes: n_changes as u32,
    };
    // SAFETY: the row, as many changes and a row of the target are there, as checked; `out` is borrowed alone, so it is no
    // part of the logits.
    unsafe { device.launch(&launch, &args) }
}

/// Reads and writes a row, and reads the changes.
pub fn logit_adjust_cost(vocab_size: usize, n_changes: usize) -> Cost {
    Cost { bytes: (8 * vocab_size + 16 * n_changes) as u64, flops: 0 }
}
