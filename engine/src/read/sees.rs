//! What a row sees, by positions: StreamingLLM (Xiao et al. 2023, arXiv 2309.17453).
//!
//! A row sees the first [`sinks`](Rule::sinks) positions, which attention sinks into, and the last
//! [`window`](Rule::window), its own among them; pages that no later row sees are given back. Positions are
//! those in the cache (section 3.2): to a row that has more behind it than it sees, the sinks stand right in front
//! of its window.
//!
//! The paper's code keeps keys unrotated and rotates all of them anew at each step. Distances inside the window do
//! not change when it slides, so here every key is rotated once, to its absolute position, and it is the *query*
//! that meets the sinks in a second rotation, as if it were at position `sinks + window - 1`. Nothing in the cache
//! is ever touched again, whatever format it is in.

use std::ops::Range;

/// Sinks at most: backends weigh them together.
pub const MAX_SINKS: usize = 64;

/// What the rows of a sequence see, by position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rule {
    /// Positions at the start that every row sees.
    pub sinks: u32,
    /// Positions that a row sees besides, its own the last; [`Rule::ALL`] has no such end.
    pub window: u32,
}

impl Rule {
    /// A row sees all up to itself.
    pub const ALL: Self = Self { sinks: 0, window: u32::MAX };

    /// False if a row sees all up to itself, however long the sequence is.
    pub fn rolls(self) -> bool {
        self != Self::ALL
    }

    /// Positions that a row sees at most: a sequence that is no longer is like any other.
    pub fn capacity(self) -> u32 {
        self.sinks.saturating_add(self.window)
    }

    /// Where a row stands to the sinks: its position, or at the end of what it sees.
    pub fn place(self, position: u32) -> u32 {
        position.min(self.capacity() - 1)
    }

    /// The first position, the sinks left aside, that rows at `position` and later see.
    pub fn first_seen(self, position: u32) -> u32 {
        match position < self.capacity() {
            true => 0,
            false => position - (self.window - 1),
        }
    }

    /// The positions that a row sees, but for sinks that it meets turned, in a layer with a window of its own.
    pub fn seen(self, position: u32, layer_window: Option<usize>) -> Range<u32> {
        let of_layer = layer_window.and_then(|window| u32::try_from(window).ok());
        let first = of_layer.map_or(0, |window| position.saturating_add(1).saturating_sub(window));
        first.max(self.first_seen(position))..position.saturating_add(1)
    }

    /// The sinks that a row meets turned: all, once it has more behind it than it sees.
    pub fn sinks(self, position: u32) -> Range<u32> {
        0..if position < self.capacity() { 0 } else { self.sinks }
    }
}
