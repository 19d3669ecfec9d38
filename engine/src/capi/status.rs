//! Statuses, and which error leads to which.

use std::fmt::{self, Write};
use std::io::ErrorKind;

use crate::error::Error;
use loris_loader::Error as LoadError;

/// Done.
pub const LORIS_OK: i32 = 0;
/// loris_session_cancel, or a callback, stopped the call.
pub const LORIS_CANCELLED: i32 = 1;
/// The session's context length would be exceeded. Truncate the session, or open one with a longer context.
pub const LORIS_CTX_FULL: i32 = 2;
/// The model's page pool is full. Free or truncate a session, or open the model with more kv_tokens.
pub const LORIS_KV_FULL: i32 = 3;
/// The model ended its answer.
pub const LORIS_EOS: i32 = 4;
/// A stop text was reached.
pub const LORIS_STOP: i32 = 5;
/// Tokens are still queued: step again.
pub const LORIS_PENDING: i32 = 6;
/// Nothing was queued.
pub const LORIS_IDLE: i32 = 7;
/// The caller's buffer is too small; the length that is needed was written, the buffer was not.
pub const LORIS_BUFFER_TOO_SMALL: i32 = 8;
/// No token may come next: a mask allows none. Since 0.6.
pub const LORIS_DEAD_END: i32 = 9;

/// An argument or option has no meaning: NULL, out of range, not UTF-8, another kind of handle.
pub const LORIS_E_INVALID_ARG: i32 = -1;
/// The state of the session does not allow the call now.
pub const LORIS_E_STATE: i32 = -2;
/// Another call on the same session runs, in another thread or around this callback.
pub const LORIS_E_BUSY: i32 = -3;
/// An earlier call on the session panicked. The session can only be freed.
pub const LORIS_E_POISONED: i32 = -4;
/// Reading or writing a file failed.
pub const LORIS_E_IO: i32 = -5;
/// A file, or a saved session, is not what it should be.
pub const LORIS_E_FORMAT: i32 = -6;
/// This version, or the device, does not do what was asked for; the message names it.
pub const LORIS_E_UNSUPPORTED: i32 = -7;
/// Host memory could not be had.
pub const LORIS_E_OOM_HOST: i32 = -8;
/// Device memory could not be had.
pub const LORIS_E_OOM_DEVICE: i32 = -9;
/// The device that was asked for is absent.
pub const LORIS_E_NO_DEVICE: i32 = -10;
/// The device failed.
pub const LORIS_E_DEVICE: i32 = -11;
/// The model produced a value that is not a number.
pub const LORIS_E_NUMERIC: i32 = -12;
/// A defect of the library: a panic was caught. The sessions of the call are poisoned.
pub const LORIS_E_PANIC: i32 = -13;
/// A callback said that it failed. Since 0.6.
pub const LORIS_E_CALLBACK: i32 = -14;

/// Why a call did not end with [`LORIS_OK`].
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) status: i32,
    pub(super) message: String,
}

impl Failure {
    pub(super) fn new(status: i32, message: impl Into<String>) -> Self {
        Self { status, message: message.into() }
    }

    /// A failure with the text of an error: none where not even that much memory is left.
    pub(super) fn of(status: i32, e: &dyn fmt::Display) -> Self {
        let mut message = String::new();
        if message.try_reserve(256).is_ok() {
            let _ = write!(message, "{e}");
        }
        Self { status, message }
    }

    pub(super) fn invalid(message: impl Into<String>) -> Self {
        Self::new(LORIS_E_INVALID_ARG, message)
    }
}

impl From<Error> for Failure {
    fn from(e: Error) -> Self {
        let status = match &e {
            Error::Load(e) => load_status(e),
            Error::Option { .. } | Error::TokenOutOfRange { .. } => LORIS_E_INVALID_ARG,
            Error::OutOfMemory { .. } => LORIS_E_OOM_HOST,
            Error::OutOfDeviceMemory { .. } => LORIS_E_OOM_DEVICE,
            Error::CtxFull { .. } => LORIS_CTX_FULL,
            Error::KvFull { .. } | Error::AuxFull { .. } => LORIS_KV_FULL,
            Error::Cancelled => LORIS_CANCELLED,
            Error::NonFinite { .. } => LORIS_E_NUMERIC,
            Error::State { .. } => LORIS_E_STATE,
            Error::TokenMask { .. } => LORIS_E_CALLBACK,
            Error::SavedState { .. } => LORIS_E_FORMAT,
            Error::Io { source, .. } if source.kind() == ErrorKind::OutOfMemory => LORIS_E_OOM_HOST,
            Error::Io { .. } => LORIS_E_IO,
            Error::Device { .. } => LORIS_E_DEVICE,
            Error::Unsupported { .. } => LORIS_E_UNSUPPORTED,
            Error::NoDevice { .. } => LORIS_E_NO_DEVICE,
        };
        Self::of(status, &e)
    }
}

impl From<LoadError> for Failure {
    fn from(e: LoadError) -> Self {
        Self::from(Error::from(e))
    }
}

/// Texts and messages come from the caller, everything else from the folder.
fn load_status(e: &LoadError) -> i32 {
    match e {
        e if e.is_out_of_memory() => LORIS_E_OOM_HOST,
        LoadError::Io { .. } | LoadError::FileChanged { .. } | LoadError::NoWeights { .. } => {
            LORIS_E_IO
        }
        LoadError::Unsupported { .. } | LoadError::Quantised { .. } | LoadError::Adapter { .. } => {
            LORIS_E_UNSUPPORTED
        }
        LoadError::Text { .. }
        | LoadError::TextTooLong { .. }
        | LoadError::Chat { .. }
        | LoadError::TemplateRefused { .. }
        | LoadError::TemplateBudget { .. } => LORIS_E_INVALID_ARG,
        _ => LORIS_E_FORMAT,
    }
}
