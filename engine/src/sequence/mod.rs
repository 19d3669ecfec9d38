//! A sequence: the tokens of one conversation, and what is held of them.

mod journal;
mod segment;
mod waiting;

pub(crate) use journal::{LayeredCache, Taken};
pub(crate) use segment::{GIVEN_UP, Segment};
