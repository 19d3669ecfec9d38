//! Launcher of `row_copy`: rows by index, from one store to another, in f32 or bf16 each.

use crate::abi::{LORIS_ROW_PAIRS, LorisRowPair, RowCopyArgs};
use crate::{Cost, Device, Error, Launch, Pod, Rows};

const N_THREADS: u32 = 128;
/// Columns that a block copies.
const RUN: usize = N_THREADS as usize * 2 * 8;
const MAX_PAIRS: usize = LORIS_ROW_PAIRS as usize;

/// What a row's elements are: `f32`, or `u16` for the bits of a bf16.
pub trait Element: Pod {
    /// Whether it is a bf16.
    const IS_BF16: bool;
}

impl Element for f32 {
    const IS_BF16: bool = false;
}

impl Element for u16 {
    const IS_BF16: bool = true;
}

/// `to[pair.1] = from[pair.0]` for every pair, rounded to nearest even where f32 becomes bf16. No row of `to` is in
/// two pairs.
pub fn row_copy<A: Element, B: Element>(
    device: &Device,
    from: &Rows<A>,
    to: &mut Rows<B>,
    pairs: &[(u32, u32)],
) -> Result<(), Error> {
    let width = from.width;
    let is_whole = width.is_multiple_of(8) && u32::try_from(width).is_ok();
    Error::check_supported("row_copy width", width, is_whole, "a multiple of 8")?;
    Error::check_size("row_copy width of the target", to.width, width)?;
    let end =
        |row: fn(&(u32, u32)) -> u32| pairs.iter().map(row).max().map_or(0, |r| r as usize + 1);
    Error::check_room("row_copy rows, at least", from.n_rows, end(|pair| pair.0))?;
    Error::check_room("row_copy rows of the target, at least", to.n_rows, end(|pair| pair.1))?;
    let kernel = match (A::IS_BF16, B::IS_BF16) {
        (false, false) => "row_copy_f32",
        (false, true) => "row_copy_f32_bf16",
        (true, false) => "row_copy_bf16_f32",
        (true, true) => "row_copy_bf16",
    };
    for pairs in pairs.chunks(MAX_PAIRS) {
        let grid = [pairs.len() as u32, width.div_ceil(RUN) as u32, 1];
        let launch = Launch { kernel, grid, block: N_THREADS, extra_smem: 0 };
        let mut args = RowCopyArgs {
            from: from.data.ptr() as *const _,
            to: to.data.ptr() as *mut _,
            width: width as u32,
            pairs: [LorisRowPair { from: 0, to: 0 }; MAX_PAIRS],
        };
        for (pair, &(from, to)) in args.pairs.iter_mut().zip(pairs) {
            *pair = LorisRowPair { from, to };
        }
        // SAFETY: the rows of the pairs lie within the buffers, as checked; `to` is borrowed alone, so the two do
        // not overlap.
        unsafe { device.launch(&launch, &args)? };
    }
    Ok(())
}

/// Reads and writes each row.
pub fn row_copy_cost(from_row_bytes: usize, to_row_bytes: usize, n_pairs: usize) -> Cost {
    Cost { bytes: (n_pairs * (from_row_bytes + to_row_bytes)) as u64, flops: 0 }
}
