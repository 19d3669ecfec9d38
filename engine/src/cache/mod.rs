//! The KV cache: what a page looks like, and the token lists that sessions keep over pages.

pub mod aux;
pub mod kv;
pub mod layered;

pub use loris_formats::{
    Code, Coding, FORMATS, Held, KvFormat, KvFormats, PageForm, PageLayout, Part, Run, Share, Side,
    Sides, When,
};

pub use aux::Aux;
pub use kv::{GIVEN_UP, Gone, Grown, Growth, Segment, Unsealed};
pub use layered::{LayeredCache, Taken};
