//! The KV cache: pages, their accounting, and the token lists that sessions keep over them.

pub mod aux;
pub mod kv;
pub mod layered;
pub mod pages;
pub mod prefix;

pub use loris_formats::{
    Code, Coding, FORMATS, Held, KvFormat, KvFormats, PageForm, PageLayout, Part, Run, Share, Side,
    Sides, When,
};

pub use aux::{Aux, AuxPool, AuxRow, Store};
pub use kv::{GIVEN_UP, Gone, Grown, Growth, Pool, Seal, Segment, Unsealed};
pub use layered::{LayeredCache, Taken};
pub use pages::{PageId, PagePool};
pub use prefix::{Filled, Found, ROOT};
