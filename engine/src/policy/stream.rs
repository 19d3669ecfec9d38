//! StreamingLLM: sequences without end at constant memory (Xiao et al. 2023, arXiv 2309.17453).
//!
//! A row sees the first [`sink`](Stream::sink) tokens, which attention sinks into, and the last
//! [`window`](Stream::window), itself among them; pages that no later row sees are given back. Positions are
//! those in the cache (section 3.2): to a row that has more behind it than it sees, the sinks stand right in front
//! of its window.
//!
//! The paper's code keeps keys unrotated and rotates all of them anew at each step. Distances inside the window do
//! not change when it slides, so here every key is rotated once, to its absolute position, and it is the *query*
//! that meets the sinks in a second rotation, as if it were at position `sink + window - 1`. Nothing in the cache
//! is ever touched again, whatever format it is in.

use crate::error::Error;

/// Sinks of a stream at most: backends weigh them together.
pub const MAX_SINKS: usize = 64;

/// Attention sinks and a rolling window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stream {
    /// Tokens at the start that every row sees.
    pub sink: u32,
    /// Tokens that a row sees besides, itself the last.
    pub window: u32,
}

impl Stream {
    /// Checks the numbers against a model of `ctx_len` tokens whose first page holds `first_len`.
    pub fn new(
        sink: usize,
        window: usize,
        ctx_len: usize,
        first_len: usize,
    ) -> Result<Self, Error> {
        let most = first_len.min(MAX_SINKS);
        if sink > most {
            let expected = format!(
                "at most {most}: {MAX_SINKS}, or what the first page of the KV cache holds uncoded"
            );
            return Err(Error::option("sink", sink, expected));
        }
        let longest = ctx_len.saturating_sub(sink);
        match (u32::try_from(sink), u32::try_from(window)) {
            (Ok(sink), Ok(window @ 1..)) if window as usize <= longest => Ok(Self { sink, window }),
            _ => Err(Error::option(
                "window",
                window,
                format!("1 to {longest}, what the model's context has room for beside the sinks"),
            )),
        }
    }

    /// Tokens that a row sees at most: up to here a stream is like any other sequence.
    pub fn capacity(&self) -> u32 {
        self.sink + self.window // at most the model's context
    }

    /// Where a row stands in the cache: its position, as far as the sinks are concerned.
    pub fn place(&self, position: u32) -> u32 {
        position.min(self.capacity() - 1)
    }

    /// The first position, the sinks left aside, that rows at `position` and later see.
    pub fn first_seen(&self, position: u32) -> u32 {
        match position < self.capacity() {
            true => 0,
            false => position - (self.window - 1),
        }
    }
}
