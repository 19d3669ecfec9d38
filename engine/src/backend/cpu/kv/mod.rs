//! Heads of keys and values as pages hold them.
//!
//! A way of coding is a [`Family`](family::Family), a file each, and `choose.rs` the only place that chooses one. Coding is plain
//! arithmetic in a fixed order, the same on every device: where the numbers are equal the codes are.

mod byte;
mod channel;
mod choose;
mod family;
mod fit;
mod group;
mod numbers;
mod packed;
mod pages;
mod rotate;
mod seal;
mod wide;

pub(super) use self::family::Row;
pub(super) use self::numbers::{CHUNK, Numbers, Walk, decoded};
pub use self::pages::CpuPages;
pub(super) use self::pages::{Place, Writer, places};
pub(super) use self::rotate::rotate;
pub(super) use self::seal::{SealPages, n_seal_tasks};
