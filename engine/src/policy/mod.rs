//! Policies: what a session computes and keeps. A policy sees scores and positions; it launches nothing and
//! holds no memory of a device.

pub mod lazy;
pub mod share;
pub mod stream;

pub use lazy::{Lazy, Order, PrunePoint};
pub use stream::Stream;

use crate::keep::Evict;

/// What a session computes and keeps.
#[derive(Clone, Debug, Default)]
pub struct Policies {
    /// Where tokens are pruned.
    pub lazy: Option<Lazy>,
    /// What every token sees.
    pub stream: Option<Stream>,
    /// Which tokens leave the cache.
    pub evict: Option<Evict>,
}

impl Policies {
    /// Tokens up to which a sequence is as any other: those that a stream's rows see.
    pub fn capacity(&self) -> usize {
        self.stream.map_or(usize::MAX, |stream| stream.capacity() as usize)
    }
}
