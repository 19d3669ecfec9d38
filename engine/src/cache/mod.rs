//! The KV cache: pages, their accounting, and the token lists that sessions keep over them.

pub mod format;
pub mod pages;

pub use format::{KvFormat, PageLayout, Side};
pub use pages::{PageId, PagePool};
