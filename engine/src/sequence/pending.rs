//! What is queued for a sequence, and how far it has come through the segments.

/// Tokens that were given to a sequence and are not in its cache yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Pending {
    Nothing,
    /// A prompt, of which the first `done` tokens are in the cache.
    Prompt {
        tokens: Vec<u32>,
        done: usize,
    },
    /// One generated token.
    Token(u32),
}

impl Pending {
    /// Tokens that are still to be computed.
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Nothing => 0,
            Self::Prompt { tokens, done } => tokens.len() - done,
            Self::Token(_) => 1,
        }
    }
}

/// The segment that tokens are going through: the new ones through the first, then those that were chosen at
/// each prune point through the next.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Stage {
    pub(crate) segment: usize,
    /// Positions that are to go through a segment behind the first, ascending.
    pub(crate) chosen: Vec<u32>,
    /// How many of them have.
    pub(crate) done: usize,
    /// Positions that have come through the segment before and were not chosen, ascending: in the next pass they begin to wait;
    /// their hidden states. There is one, because the new tokens at the end always go on.
    pub(crate) pruned: Vec<u32>,
}

/// Rows of one sequence in one pass.
#[derive(Debug)]
pub(crate) struct Work {
    /// The layers: a segment of the sequence's.
    pub(crate) segment: usize,
    pub(crate) tokens: Vec<u32>,
    /// Ascending.
    pub(crate) positions: Vec<u32>,
    /// No row is left for this segment afterwards.
    pub(crate) ends_stage: bool,
    /// The last row's logits are wanted.
    pub(crate) is_last: bool,
}

/// How a prompt fared in the steps before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Turn {
    /// Steps in a row that it got no rows, others did, and nobody computed any for it.
    pub(crate) waited: usize,
    /// The last step was an error: nobody waits for this prompt.
    pub(crate) is_stuck: bool,
}

/// A token that the device drew after run `run` from row `idx` of its logits.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Drawn {
    pub(crate) token: u32,
    pub(crate) run: u64,
    pub(crate) idx: usize,
}
