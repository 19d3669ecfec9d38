//! Pools of KV pages and tables.

use loris_formats::{CODINGS, Coding, PageLayout, Share, Sides};

use crate::abi::{LorisPages, LorisTable};
use crate::{Buffer, Device, Error, to_u32};

/// A coding's number in `formats.h`.
fn abi(coding: Coding) -> u32 {
    CODINGS.iter().position(|&other| other == coding).map_or(u32::MAX, to_u32)
}

/// Refuses pages that are coded as a whole, whose slots nothing can be done with one by one.
pub(crate) fn check_by_slot(kv: Sides, op: &str) -> Result<(), Error> {
    match kv.are_sealed() {
        false => Ok(()),
        true => Err(Error::Unsupported {
            what: format!("{op} formats of the KV cache"),
            found: format!("{kv:?}"),
            expected: "those that code each slot by itself",
        }),
    }
}

/// Whether attention is compiled for them.
pub fn has_kernels(kv: Sides) -> bool {
    attention_variant(kv).is_ok()
}

/// Which of [`PAIRS`](loris_formats::PAIRS) this is.
pub(crate) fn attention_variant(kv: Sides) -> Result<usize, Error> {
    let is_rotated_back = !kv.v.rotated || kv.v.coding.share == Share::Group;
    // Pages are sealed by one kernel for both sides.
    let fits = is_rotated_back && kv.k.when == kv.v.when;
    kv.pair().filter(|_| fits).ok_or_else(|| Error::Unsupported {
        what: "formats of the KV cache".into(),
        found: format!("{kv:?}"),
        expected: "bf16, fp8, int8 or int4 of both sides, int4 values with int8 or bf16 keys, or keys by channel \
                   with values of as many bits; rotated values are int4 or int2",
    })
}

/// A pool of KV pages.
#[derive(Debug)]
pub struct KvPages {
    /// `[n_pages]` of [`page_bytes`](Self::page_bytes), as `LorisPages` in `abi.h` says.
    pub data: Buffer<u8>,
    /// Pages in the pool.
    pub n_pages: usize,
    /// Key and value heads.
    pub n_kv_heads: usize,
    /// Slots of a page, a power of two.
    pub page_len: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// What it holds.
    pub kv: Sides,
}

impl KvPages {
    /// What its pages look like, in a table whose pages are all sealed.
    pub fn layout(&self) -> PageLayout {
        PageLayout::new(self.n_kv_heads, self.page_len, self.head_dim, self.kv)
            .with_sealed(usize::MAX)
    }

    /// Bytes of a page.
    pub fn page_bytes(&self) -> usize {
        self.layout().bytes()
    }

    /// Slots of a page of a tail.
    pub fn tail_len(&self) -> usize {
        self.layout().tail_len()
    }

    /// As kernels take it.
    pub fn abi(&self) -> LorisPages {
        LorisPages {
            base: self.data.ptr() as *mut _,
            page_bytes: self.page_bytes() as u64,
            page_len_log2: self.page_len.trailing_zeros(),
            tail_len_log2: self.tail_len().trailing_zeros(),
            n_kv_heads: u32::try_from(self.n_kv_heads).unwrap_or(u32::MAX),
            k_coding: abi(self.kv.k.coding),
            v_coding: abi(self.kv.v.coding),
            k_rotated: self.kv.k.rotated.into(),
            v_rotated: self.kv.v.rotated.into(),
        }
    }
}

/// The page table of one sequence. Its pages exist.
#[derive(Debug)]
pub struct PageTable {
    /// Page ids, `[page_idx][n_layers]`.
    pub pages: Buffer<u32>,
    /// Layers: the stride.
    pub n_layers: usize,
}

impl PageTable {
    /// A table on the device.
    pub fn new(device: &Device, pages: &[u32], n_layers: usize) -> Result<Self, Error> {
        Ok(Self { pages: Buffer::from_slice(device, pages, "a page table")?, n_layers })
    }

    /// Slots of a layer that there are pages for.
    pub(crate) fn n_slots(&self, pages: &KvPages) -> usize {
        pages.layout().n_slots(self.pages.len() / self.n_layers.max(1))
    }

    pub(crate) fn abi(&self) -> LorisTable {
        LorisTable { pages: self.pages.ptr() as *const u32, n_layers: to_u32(self.n_layers) }
    }
}
