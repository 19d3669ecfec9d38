//! What a call has changed of a sequence: what to go back to, and what is kept for that.

use std::collections::BTreeMap;

use super::pending::Drawn;
use super::segment::{Gone, Unsealed};
use crate::pool::AuxRow;
use crate::receipt::Receipt;

/// What to go back to.
#[derive(Debug)]
pub(crate) struct Checkpoint {
    pub(crate) len: usize,
    pub(crate) segments: Vec<Extent>,
    /// Slots that the first segment had given back, and the pages that it has since then.
    pub(crate) n_gone: usize,
    pub(crate) gone: Vec<Gone>,
    /// Earlier tokens that have moved on since: how deep they were, and where they waited.
    pub(crate) moved: BTreeMap<u32, (u8, AuxRow)>,
}

/// How far a segment went, and columns of its tail that have been sealed since.
#[derive(Debug)]
pub(crate) struct Extent {
    pub(crate) n_slots: usize,
    pub(crate) n_sealed: usize,
    pub(crate) unsealed: Unsealed,
}

/// What a sequence was before what is pending, besides what it holds.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Before {
    pub(crate) receipt: Receipt,
    pub(crate) answer_start: usize,
    pub(crate) logits_ready: bool, // logits change only where nothing can fail any more
    pub(crate) drawn: Option<Drawn>,
}
