//! How the KV cache is stored: what all who speak of its pages share.

pub use loris_formats::{
    Code, Coding, FORMATS, Held, KvFormat, KvFormats, PageForm, PageLayout, Part, Run, Runs, Share,
    Side, Sides, When,
};

/// Index of a page in its pool.
pub type PageId = u32;

/// The pages of one layer that are coded into one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seal {
    /// In 16 bits, in the order of their slots.
    pub from: Vec<PageId>,
    /// A page of the same bytes.
    pub to: PageId,
}

/// Head counts and widths of the attention block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttentionShape {
    /// Query heads.
    pub n_q_heads: usize,
    /// Key and value heads; `n_q_heads` is a multiple.
    pub n_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
}

impl AttentionShape {
    /// Query heads that share a key head.
    pub fn group_size(&self) -> usize {
        self.n_q_heads / self.n_kv_heads
    }
}
