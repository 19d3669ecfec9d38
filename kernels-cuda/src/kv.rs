//! Pools of KV pages, the number formats that they hold, and tables.

use crate::abi::{
    LORIS_KV_BF16, LORIS_KV_FP8, LORIS_KV_INT2, LORIS_KV_INT2_CHANNEL, LORIS_KV_INT4,
    LORIS_KV_INT4_CHANNEL, LORIS_KV_INT8, LORIS_KV_SKEW, LORIS_KV_WIDE, LorisPages, LorisTable,
};
use crate::ops::attention::to_u32;
use crate::{Buffer, Device, Error};

/// Number format of keys or of values in pages: `include/kv_format.cuh` says what the codes are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KvFormat {
    /// bfloat16.
    #[default]
    Bf16,
    /// e4m3 floats with a scale for each slot and head.
    Fp8,
    /// 8-bit integers with a scale for each slot and head.
    Int8,
    /// 4-bit integers with a scale and a zero for each group of 64 numbers, of 32 in heads of 32.
    Int4,
    /// 2-bit integers with params as those of `Int4`; values, beside keys of `Int2Channel`.
    Int2,
    /// 4-bit integers with a scale and a zero for each channel of a page; keys, beside values of `Int4`.
    Int4Channel,
    /// 2-bit integers with params as those of `Int4Channel`.
    Int2Channel,
}

impl KvFormat {
    /// Bytes of the codes of a head of one slot.
    pub fn code_bytes(self, head_dim: usize) -> usize {
        match self {
            Self::Bf16 => 2 * head_dim,
            Self::Fp8 | Self::Int8 => head_dim,
            Self::Int4 | Self::Int4Channel => head_dim / 2,
            Self::Int2 | Self::Int2Channel => head_dim / 4,
        }
    }

    /// Bytes of what its codes are multiplied with.
    pub fn param_bytes(self, head_dim: usize) -> usize {
        match self {
            Self::Bf16 | Self::Int4Channel | Self::Int2Channel => 0,
            Self::Fp8 | Self::Int8 => 2,
            Self::Int4 | Self::Int2 => 4 * (head_dim / 64).max(1),
        }
    }

    /// Bytes of what the codes of all slots of a page are multiplied with, of a head.
    pub fn channel_bytes(self, head_dim: usize) -> usize {
        if self.is_by_channel() { 4 * head_dim } else { 0 }
    }

    fn is_by_channel(self) -> bool {
        matches!(self, Self::Int4Channel | Self::Int2Channel)
    }

    fn abi(self) -> u32 {
        match self {
            Self::Bf16 => LORIS_KV_BF16,
            Self::Fp8 => LORIS_KV_FP8,
            Self::Int8 => LORIS_KV_INT8,
            Self::Int4 => LORIS_KV_INT4,
            Self::Int2 => LORIS_KV_INT2,
            Self::Int4Channel => LORIS_KV_INT4_CHANNEL,
            Self::Int2Channel => LORIS_KV_INT2_CHANNEL,
        }
    }
}

/// What the pages of a pool hold. [`Default`] is bf16.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KvFormats {
    /// Of keys.
    pub k: KvFormat,
    /// Of values.
    pub v: KvFormat,
    /// Keys, and queries, are multiplied with a Hadamard matrix before they are coded.
    pub k_rotated: bool,
    /// Values are, and what attention gives is multiplied back.
    pub v_rotated: bool,
}

impl KvFormats {
    /// Pages hold codes, but for the first of a table.
    pub fn is_coded(self) -> bool {
        (self.k, self.v) != (KvFormat::Bf16, KvFormat::Bf16)
    }

    /// Pages are coded as a whole (`page_seal`); behind them a table has a tail of bf16 pages.
    pub fn are_sealed(self) -> bool {
        self.k.is_by_channel()
    }

    /// Refuses pages that are coded as a whole, whose slots nothing can be done with one by one.
    pub(crate) fn check_by_slot(self, op: &str) -> Result<(), Error> {
        match self.are_sealed() {
            false => Ok(()),
            true => Err(Error::Unsupported {
                what: format!("{op} formats of the KV cache"),
                found: format!("{self:?}"),
                expected: "those that code each slot by itself",
            }),
        }
    }

    /// What attention counts slots from: see `LORIS_KV_SKEW`.
    pub fn skew(self) -> usize {
        if self.is_coded() { LORIS_KV_SKEW as usize } else { 0 }
    }

    /// Bytes of a slot, without what a page's slots have in common; those that are not coded excepted.
    pub fn slot_bytes(self, n_kv_heads: usize, head_dim: usize) -> usize {
        let head = |format: KvFormat| format.code_bytes(head_dim) + format.param_bytes(head_dim);
        n_kv_heads * (head(self.k) + head(self.v))
    }

    /// Bytes of a page.
    pub fn page_bytes(self, n_kv_heads: usize, page_len: usize, head_dim: usize) -> usize {
        let channels = n_kv_heads * self.k.channel_bytes(head_dim);
        let coded = page_len * self.slot_bytes(n_kv_heads, head_dim) + channels;
        let first = LORIS_KV_WIDE as usize * Self::default().slot_bytes(n_kv_heads, head_dim);
        coded.max(first).next_multiple_of(16)
    }

    /// Slots of a page of a tail, a power of two: as many as there is room for in bf16.
    pub fn tail_len(self, n_kv_heads: usize, page_len: usize, head_dim: usize) -> usize {
        let slot_bytes = Self::default().slot_bytes(n_kv_heads, head_dim).max(1);
        let n = self.page_bytes(n_kv_heads, page_len, head_dim) / slot_bytes;
        1 << n.min(page_len).max(1).ilog2()
    }

    /// Whether attention is compiled for them.
    pub fn has_kernels(self) -> bool {
        self.attention_variant().is_ok()
    }

    /// Which of [`ATTENTION`] this is.
    pub(crate) fn attention_variant(self) -> Result<usize, Error> {
        let is_rotated_back = !self.v_rotated || matches!(self.v, KvFormat::Int4 | KvFormat::Int2);
        let variant = ATTENTION.iter().position(|&pair| pair == (self.k, self.v));
        variant.filter(|_| is_rotated_back).ok_or_else(|| Error::Unsupported {
            what: "formats of the KV cache".into(),
            found: format!("{self:?}"),
            expected: "bf16, fp8, int8 or int4 of both sides, int4 values with int8 or bf16 keys, or keys by channel \
                       with values of as many bits; rotated values are int4 or int2",
        })
    }
}

/// The pairs that attention is compiled for, in the order in which launchers list their kernels.
pub(crate) const ATTENTION: [(KvFormat, KvFormat); 8] = {
    use KvFormat::{Bf16, Fp8, Int2, Int2Channel, Int4, Int4Channel, Int8};
    [
        (Bf16, Bf16),
        (Fp8, Fp8),
        (Int8, Int8),
        (Int4, Int4),
        (Int8, Int4),
        (Bf16, Int4),
        (Int4Channel, Int4),
        (Int2Channel, Int2),
    ]
};

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
    pub kv: KvFormats,
}

impl KvPages {
    /// Bytes of a page.
    pub fn page_bytes(&self) -> usize {
        self.kv.page_bytes(self.n_kv_heads, self.page_len, self.head_dim)
    }

    /// Slots of a table of so many pages.
    pub fn n_slots(&self, n_pages: usize) -> usize {
        let n_slots = n_pages * self.page_len;
        if self.kv.is_coded() && n_pages > 0 {
            return n_slots - self.page_len + LORIS_KV_WIDE as usize;
        }
        n_slots
    }

    /// Slots of a page of a tail.
    pub fn tail_len(&self) -> usize {
        self.kv.tail_len(self.n_kv_heads, self.page_len, self.head_dim)
    }

    /// As kernels take it.
    pub fn abi(&self) -> LorisPages {
        LorisPages {
            base: self.data.ptr() as *mut _,
            page_bytes: self.page_bytes() as u64,
            page_len_log2: self.page_len.trailing_zeros(),
            tail_len_log2: self.tail_len().trailing_zeros(),
            n_kv_heads: u32::try_from(self.n_kv_heads).unwrap_or(u32::MAX),
            k_format: self.kv.k.abi(),
            v_format: self.kv.v.abi(),
            k_rotated: self.kv.k_rotated.into(),
            v_rotated: self.kv.v_rotated.into(),
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
        pages.n_slots(self.pages.len() / self.n_layers.max(1))
    }

    pub(crate) fn abi(&self) -> LorisTable {
        LorisTable { pages: self.pages.ptr() as *const u32, n_layers: to_u32(self.n_layers) }
    }
}
