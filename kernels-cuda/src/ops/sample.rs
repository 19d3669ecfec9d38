//! Launcher of `sample`: a token for each row of logits.

use crate::abi::{LorisSampling, SampleArgs};
use crate::{Buffer, Cost, Device, Error, Launch, Rows};

const N_THREADS: u32 = 1024;
/// Largest vocabulary: sums of its weights fit 64 bits.
pub const MAX_VOCAB_SIZE: usize = (1 << 19) - 1;

/// Draws `tokens[r]` from `logits[r]` as `sampling[r]` says, for the first `n_rows` rows. Ids whose bit is set in
/// `masked` are never drawn. `u32::MAX` stands where a logit is not finite or every id is masked.
pub fn sample(
    device: &Device,
    logits: &Rows<f32>,
    sampling: &Buffer<LorisSampling>,
    masked: Option<&Buffer<u32>>,
    n_rows: usize,
    tokens: &mut Buffer<u32>,
) -> Result<(), Error> {
    sample_from(device, logits, 0, sampling, masked, n_rows, tokens)
}

/// [`sample`] for `n_rows` rows of logits from `first_row` on: `tokens[0]` is the first one's.
pub fn sample_from(
    device: &Device,
    logits: &Rows<f32>,
    first_row: usize,
    sampling: &Buffer<LorisSampling>,
    masked: Option<&Buffer<u32>>,
    n_rows: usize,
    tokens: &mut Buffer<u32>,
) -> Result<(), Error> {
    let vocab_size = logits.width;
    let fits = vocab_size <= MAX_VOCAB_SIZE;
    Error::check_supported("sample vocab_size", vocab_size, fits, "below 2^19")?;
    let end = first_row.saturating_add(n_rows);
    Error::check_room("sample rows of logits, at least", logits.n_rows, end)?;
    Error::check_room("sample sampling, at least", sampling.len(), n_rows)?;
    Error::check_room("sample tokens, at least", tokens.len(), n_rows)?;
    if let Some(masked) = masked {
        Error::check_room("sample mask, at least", masked.len(), vocab_size.div_ceil(32))?;
    }
    let launch =
        Launch { kernel: "sample", grid: [n_rows as u32, 1, 1], block: N_THREADS, extra_smem: 0 };
    let args = SampleArgs {
        logits: (logits.data.ptr() + (4 * first_row * vocab_size) as u64) as *const f32,
        sampling: sampling.ptr() as *const LorisSampling,
        masked: masked.map_or(0, Buffer::ptr) as *const u32,
        tokens: tokens.ptr() as *mut u32,
        vocab_size: vocab_size as u32,
    };
    // SAFETY: logits have the rows up to the last, sampling and tokens n_rows, the mask a bit for every id.
    unsafe { device.launch(&launch, &args) }
}

/// Reads the logits once.
pub fn sample_cost(vocab_size: usize, n_rows: usize) -> Cost {
    Cost { bytes: 4 * (vocab_size * n_rows) as u64, flops: 0 }
}
