//! Launcher of `page_copy`: whole KV pages, for copy-on-write and for forks.

use crate::abi::PageCopyArgs;
use crate::{Buffer, Cost, Device, Error, KvPages, Launch};

const N_THREADS: u32 = 256;
/// Bytes that a block copies.
const RUN: u64 = N_THREADS as u64 * 4 * 16;

/// Copies page `pairs[2 i]` to page `pairs[2 i + 1]`. Pages exist, and none is both source and target.
pub fn page_copy(
    device: &Device,
    pages: &mut KvPages,
    pairs: &Buffer<u32>,
    n_pairs: usize,
) -> Result<(), Error> {
    Error::check_room("page_copy pairs, at least", pairs.len(), 2 * n_pairs)?;
    let (pages, n_pairs) = (pages.abi(), n_pairs as u32);
    let launch = Launch {
        kernel: "page_copy",
        grid: [n_pairs, pages.page_bytes.div_ceil(RUN) as u32, 1],
        block: N_THREADS,
        extra_smem: 0,
    };
    let args = PageCopyArgs { pages, pairs: pairs.ptr() as *const u32, n_pairs };
    // SAFETY: `pairs` holds n_pairs pairs; that the pages exist is the caller's promise.
    unsafe { device.launch(&launch, &args) }
}

/// Reads and writes each page.
pub fn page_copy_cost(page_bytes: u64, n_pairs: usize) -> Cost {
    Cost { bytes: 2 * page_bytes * n_pairs as u64, flops: 0 }
}
