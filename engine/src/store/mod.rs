//! How the KV cache is stored: what all who speak of its pages share.

pub use loris_formats::{
    AttentionShape, Code, Coding, FORMATS, Format, HEAD_DIMS, Held, KvFormat, KvFormats, PageForm,
    PageLayout, Part, Run, Runs, Share, Side, Sides, When,
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
