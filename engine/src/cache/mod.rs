//! The KV cache: pages, their accounting, and the token lists that sessions keep over them.

pub mod format;
pub mod kv;
pub mod pages;
pub mod prefix;

pub use format::{KvFormat, PageLayout, Side};
pub use kv::{Growth, Pool, Segment};
pub use pages::{PageId, PagePool};
