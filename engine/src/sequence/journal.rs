//! What was changed of a sequence since a call began, and where to go back to.
//!
//! A pass changes the sequence in place. What grows is cut back to a mark; what was replaced or taken out is in the log, and is
//! put back from there, the last first. A call's mark is older than those of its passes, so one log serves both.

use super::pending::Drawn;
use super::segment::Ends;
use crate::pool::AuxRow;
use crate::receipt::Receipt;
use crate::store::PageId;

/// Changes since the call began; nothing between calls.
#[derive(Debug, Default)]
pub(crate) struct Journal {
    pub(crate) log: Vec<Delta>,
    pub(crate) call: Option<Mark>,
}

/// A point to go back to.
#[derive(Debug)]
pub(crate) struct Mark {
    /// The length of the log.
    pub(crate) at: usize,
    /// Of each segment.
    pub(crate) ends: Vec<Ends>,
    pub(crate) n_tokens: usize,
    pub(crate) notes: Notes,
}

/// What is noted of a sequence besides what it holds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Notes {
    pub(crate) receipt: Receipt,
    pub(crate) answer_start: usize,
    pub(crate) n_shareable: usize,
    pub(crate) logits_ready: bool, // logits change only where nothing can fail any more
    pub(crate) drawn: Option<Drawn>,
}

/// What was replaced or taken out. Pages in it are still held.
#[derive(Debug)]
pub(crate) enum Delta {
    /// A copy took the place of the segment's last column, which others hold too.
    Swapped { segment: usize, column: Vec<PageId> },
    /// Columns at the front of the segment's tail are sealed.
    Sealed { segment: usize, columns: Vec<PageId> },
    /// The column behind the first of the first segment left, and its slots.
    Rolled { positions: Vec<u32>, column: Vec<PageId> },
    /// A token's hidden state was in this row, and the token was so deep.
    Moved { position: u32, row: AuxRow, depth: u8 },
    /// The attention that slots had got.
    Measured { sums: Vec<Vec<f32>> },
}

impl Journal {
    /// KV pages that nothing but the log holds.
    pub(crate) fn n_pages(&self) -> usize {
        let of = |delta: &Delta| match delta {
            Delta::Swapped { column, .. } | Delta::Rolled { column, .. } => column.len(),
            Delta::Sealed { columns, .. } => columns.len(),
            Delta::Moved { .. } | Delta::Measured { .. } => 0,
        };
        self.log.iter().map(of).sum()
    }

    /// Slots of a segment, and slots gone from it, when the call began; no call: none.
    pub(crate) fn ends(&self, segment: usize) -> Ends {
        self.call.as_ref().map_or_else(Ends::default, |call| call.ends[segment])
    }
}
