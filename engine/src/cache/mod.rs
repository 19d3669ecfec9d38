//! The KV cache: pages, their accounting, and the token lists that sessions keep over them.

pub mod aux;
pub mod format;
pub mod kv;
pub mod layered;
pub mod pages;
pub mod prefix;

pub use aux::{Aux, AuxPool, AuxRow, Store};
pub use format::{KvFormat, KvFormats, PageForm, PageLayout, Part, Side};
pub use kv::{GIVEN_UP, Gone, Grown, Growth, Pool, Seal, Segment, Unsealed};
pub use layered::{LayeredCache, Taken};
pub use pages::{PageId, PagePool};
pub use prefix::{Filled, Found, ROOT};
