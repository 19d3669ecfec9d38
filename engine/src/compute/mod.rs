//! Compute: which tokens go through which layers. A schedule sees mass and positions; it launches nothing and holds no
//! memory of a device.

pub mod lazy;

pub use lazy::{Lazy, Order, PrunePoint};
