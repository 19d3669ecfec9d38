//! Launcher of `page_seal`: pages of a tail become one page of codes.

use loris_formats::{AttentionShape, Coding, PageLayout, Sides};

use crate::abi::PageSealArgs;
use crate::{Buffer, Cost, Device, Error, KvPages, Launch};

/// Codes pages. `seals` is `[n_seals][n_from + 1]` page ids: as many pages of a tail as hold the slots of a page, in
/// their order, and the page that they become. Pages exist, and none becomes another that is read.
pub fn page_seal(
    device: &Device,
    pages: &mut KvPages,
    seals: &Buffer<u32>,
    n_seals: usize,
) -> Result<(), Error> {
    let expected =
        "keys by channel and values of as many bits in heads of 32 (of 4 bits), 64 or 128";
    let kernel = match (pages.kv.k.coding, pages.kv.v.coding, pages.head_dim) {
        (Coding::INT4_CHANNEL, Coding::INT4, 32) => "page_seal_d32_int4",
        (Coding::INT4_CHANNEL, Coding::INT4, 64) => "page_seal_d64_int4",
        (Coding::INT4_CHANNEL, Coding::INT4, 128) => "page_seal_d128_int4",
        (Coding::INT2_CHANNEL, Coding::INT2, 64) => "page_seal_d64_int2",
        (Coding::INT2_CHANNEL, Coding::INT2, 128) => "page_seal_d128_int2",
        _ => {
            let found = format!("{:?} in heads of {}", pages.kv, pages.head_dim);
            return Err(Error::Unsupported { what: "page_seal".into(), found, expected });
        }
    };
    let n_ids = n_seals * (pages.page_len / pages.tail_len() + 1);
    Error::check_room("page_seal pages, at least", seals.len(), n_ids)?;
    // A scale and a zero for each channel, and for each slot and group.
    let n_series = pages.head_dim.max(pages.page_len * pages.head_dim.div_ceil(64));
    let launch = Launch {
        kernel,
        grid: [n_seals as u32, pages.n_kv_heads as u32, 2],
        block: 128,
        extra_smem: 8 * n_series as u32,
    };
    let args = PageSealArgs { pages: pages.abi(), seals: seals.ptr() as *const u32 };
    // SAFETY: `seals` holds the ids of n_seals seals; that the pages exist is the caller's promise.
    unsafe { device.launch(&launch, &args) }
}

/// Reads the slots of each page in bf16, and writes it.
pub fn page_seal_cost(shape: AttentionShape, kv: Sides, page_len: usize, n_seals: usize) -> Cost {
    let AttentionShape { n_kv_heads, head_dim, .. } = shape;
    let tail_bytes = page_len * Sides::BF16.slot_bytes(n_kv_heads, head_dim);
    let bytes = tail_bytes + PageLayout::new(n_kv_heads, page_len, head_dim, kv).bytes();
    Cost { bytes: (bytes * n_seals) as u64, flops: 0 }
}
