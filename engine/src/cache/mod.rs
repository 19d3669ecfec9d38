//! The KV cache: the token lists that sessions keep over pages.

pub mod aux;
pub mod kv;
pub mod layered;

pub use aux::Aux;
pub use kv::{GIVEN_UP, Gone, Grown, Growth, Segment, Unsealed};
pub use layered::{LayeredCache, Taken};
