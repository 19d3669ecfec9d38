//! Policies: what a session computes and keeps. A policy sees scores and positions; it launches nothing and
//! holds no memory of a device.

pub mod evict;
pub mod lazy;
pub mod share;
pub mod stream;

pub use evict::Evict;
pub use lazy::{Lazy, Order, PrunePoint};
pub use stream::Stream;
