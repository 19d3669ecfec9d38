//! Read: what of the cache a row attends to.

mod sees;

pub use sees::{MAX_SINKS, Rule};
