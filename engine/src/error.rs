//! Everything that can go wrong in the engine, one variant per cause.

use thiserror::Error;

/// An engine error. Unless a variant says otherwise, the state of the session that met it is unchanged.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Error {
    /// The model folder could not be read or is not a model that loris runs.
    #[error(transparent)]
    Load(#[from] loris_loader::Error),
    /// An option has a value that cannot be used.
    #[error("option {name}: {value} is not usable; expected {expected}")]
    Option {
        /// The option, as users spell it.
        name: &'static str,
        /// What was given.
        value: String,
        /// What would do.
        expected: String,
    },
    /// Memory that the plan needs could not be had.
    #[error("out of memory: {what} needs {bytes} bytes; lower the context length, chunk or batch")]
    OutOfMemory {
        /// What the memory was for.
        what: &'static str,
        /// How much of it.
        bytes: usize,
    },
    /// Memory of a CUDA device could not be had.
    #[error(
        "out of device memory: {what} needs {bytes} bytes, {free} of {total} are free; lower the context length, chunk or batch, or use --device cpu"
    )]
    OutOfDeviceMemory {
        /// What the memory was for.
        what: &'static str,
        /// How much of it.
        bytes: u64,
        /// What was free.
        free: u64,
        /// What the device has.
        total: u64,
    },
    /// A token id that the model does not have.
    #[error("token id {id} is out of range: the model has {vocab_size} tokens")]
    TokenOutOfRange {
        /// The id.
        id: u32,
        /// Ids are below this.
        vocab_size: usize,
    },
    /// The session's context length would be exceeded.
    #[error(
        "context is full: {needed} tokens are needed, the session was opened for {ctx_len}; open it with a longer context or truncate it"
    )]
    CtxFull {
        /// Tokens the session would hold.
        needed: usize,
        /// Tokens it may hold.
        ctx_len: usize,
    },
    /// The page pool has too few free pages.
    #[error(
        "KV pool is full: {needed} more pages are needed and {free} are free; free or truncate a session, or open the model with a larger pool"
    )]
    KvFull {
        /// Pages that the call needed.
        needed: usize,
        /// Pages that were free.
        free: usize,
    },
    /// The pool of hidden states that wait at prune points is full.
    #[error(
        "aux pool is full: {needed} more pages are needed and {free} are free; free or truncate a session, or open the model with more aux tokens"
    )]
    AuxFull {
        /// Pages that the call needed.
        needed: usize,
        /// Pages that were free.
        free: usize,
    },
    /// The call was cancelled; what it had not finished is undone.
    #[error("cancelled")]
    Cancelled,
    /// The model produced a logit that is not a number.
    #[error(
        "logits at position {pos} are not finite (token {token_id}): the weights or the cache are damaged, or the dtype overflowed"
    )]
    NonFinite {
        /// Position of the row.
        pos: usize,
        /// First vocabulary entry at fault.
        token_id: usize,
    },
    /// A call that the session's state does not allow.
    #[error("{call}: {reason}")]
    State {
        /// The call.
        call: &'static str,
        /// Why it cannot be done now.
        reason: String,
    },
    /// A caller's [`TokenMask`](crate::TokenMask) failed; the session holds the tokens that were shown before.
    #[error("token mask: {reason}")]
    TokenMask {
        /// What it said.
        reason: String,
    },
    /// A saved session that cannot be restored.
    #[error("saved session: {field}: {found} found, {expected} expected")]
    SavedState {
        /// Part of the blob.
        field: &'static str,
        /// What it holds.
        found: String,
        /// What it should hold.
        expected: String,
    },
    /// Reading or writing a file failed.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: String,
        /// Why.
        source: std::io::Error,
    },
    /// The device failed in the middle of a pass.
    #[error("device: {reason}")]
    Device {
        /// What it said.
        reason: String,
    },
    /// The device cannot run this model, or not with these options.
    #[error("{device}: {what} {found} is not supported; expected {expected}; use --device cpu")]
    Unsupported {
        /// The device.
        device: &'static str,
        /// The size or option.
        what: String,
        /// Its value.
        found: String,
        /// What the device can do.
        expected: &'static str,
    },
    /// A device that was asked for is absent.
    #[error("device {device}: {reason}")]
    NoDevice {
        /// What was asked for.
        device: String,
        /// Why it cannot be used.
        reason: String,
    },
}

impl Error {
    /// Names the position that a row of a batch stands for.
    pub(crate) fn at_position(self, at: usize) -> Self {
        match self {
            Self::NonFinite { token_id, .. } => Self::NonFinite { pos: at, token_id },
            e => e,
        }
    }

    pub(crate) fn option(
        name: &'static str,
        value: impl ToString,
        expected: impl Into<String>,
    ) -> Self {
        Self::Option { name, value: value.to_string(), expected: expected.into() }
    }
}

impl From<loris_formats::Refusal> for Error {
    fn from(loris_formats::Refusal { found, expected }: loris_formats::Refusal) -> Self {
        Self::option("kv", found, expected)
    }
}
