//! How the KV cache is stored: what all who speak of its pages share.

/// Index of a page in its pool.
pub type PageId = u32;
