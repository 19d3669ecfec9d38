//! Handles: what a host holds, and how it becomes a Rust value again.

use std::mem::ManuallyDrop;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Mutex, MutexGuard, TryLockError};

use super::status::{Failure, LORIS_E_BUSY, LORIS_E_INVALID_ARG, LORIS_E_POISONED};
use crate::engine::{Engine, Model};
use crate::sampler::Sampler;
use crate::session::{Canceller, Session};
use loris_loader::TextStream;

/// A device and its threads. Immutable; any thread may use it.
#[derive(Debug)]
pub struct loris_engine {
    _opaque: [u8; 0],
}

/// Weights on a device and a pool of KV pages. Immutable but for the pool; any thread may use it.
#[derive(Debug)]
pub struct loris_model {
    _opaque: [u8; 0],
}

/// One sequence: tokens, KV pages, logits, a sampler. One thread at a time.
#[derive(Debug)]
pub struct loris_session {
    _opaque: [u8; 0],
}

/// Turns tokens into text as they come. One thread at a time.
#[derive(Debug)]
pub struct loris_text_stream {
    _opaque: [u8; 0],
}

/// What a handle's pointer points to.
#[repr(C)]
struct Handle<T> {
    /// [`Opaque::TAG`] as long as the handle lives.
    tag: u64,
    value: T,
}

/// What stands behind an opaque type.
pub(super) trait Opaque {
    type Value;
    const TAG: u64;
    const NAME: &'static str;
}

impl Opaque for loris_engine {
    type Value = Engine;
    const TAG: u64 = u64::from_le_bytes(*b"loris-en");
    const NAME: &'static str = "engine";
}

impl Opaque for loris_model {
    type Value = Model;
    const TAG: u64 = u64::from_le_bytes(*b"loris-mo");
    const NAME: &'static str = "model";
}

impl Opaque for loris_session {
    type Value = SharedSession;
    const TAG: u64 = u64::from_le_bytes(*b"loris-se");
    const NAME: &'static str = "session";
}

impl Opaque for loris_text_stream {
    type Value = Mutex<Stream>;
    const TAG: u64 = u64::from_le_bytes(*b"loris-ts");
    const NAME: &'static str = "text stream";
}

/// A session's handle: what one call at a time works on, and what any thread may use.
pub(super) struct SharedSession {
    inner: Mutex<Inner>,
    pub(super) canceller: Canceller,
}

pub(super) struct Inner {
    pub(super) session: Session,
    pub(super) sampler: Sampler,
}

pub(super) struct Stream {
    /// `None` once it was finished.
    pub(super) stream: Option<TextStream>,
    /// The text that was given out last, with a NUL.
    pub(super) text: Vec<u8>,
}

impl SharedSession {
    pub(super) fn new(session: Session, sampler: Sampler) -> Self {
        let canceller = session.canceller();
        Self { inner: Mutex::new(Inner { session, sampler }), canceller }
    }

    /// The session for one call.
    pub(super) fn enter(&self) -> Result<MutexGuard<'_, Inner>, Failure> {
        enter(&self.inner)
    }
}

/// Locks what one call at a time may use. Waiting would hide a defect of the host, so nobody waits.
pub(super) fn enter<T>(mutex: &Mutex<T>) -> Result<MutexGuard<'_, T>, Failure> {
    mutex.try_lock().map_err(|e| match e {
        TryLockError::WouldBlock => {
            Failure::new(LORIS_E_BUSY, "the handle is in use by another call; wait for its end")
        }
        TryLockError::Poisoned(_) => {
            Failure::new(LORIS_E_POISONED, "an earlier call on the handle panicked; free it")
        }
    })
}

/// Makes a handle.
pub(super) fn make<O: Opaque>(value: O::Value) -> *mut O {
    Box::into_raw(Box::new(Handle { tag: O::TAG, value })).cast()
}

/// What a handle stands for.
///
/// # Safety
/// `handle` is NULL or a handle of any kind that was not freed, and lives as long as `'a`.
pub(super) unsafe fn get<'a, O: Opaque>(handle: *const O) -> Result<&'a O::Value, Failure> {
    let handle = handle.cast::<Handle<O::Value>>();
    let refuse =
        |what: &str| Err(Failure::new(LORIS_E_INVALID_ARG, format!("{}: {what}", O::NAME)));
    if handle.is_null() {
        return refuse("is NULL");
    }
    if !handle.is_aligned() {
        return refuse("is not a handle");
    }
    // SAFETY: whatever kind of handle it is, it starts with a tag.
    let tag = unsafe { (&raw const (*handle).tag).read() };
    if tag != O::TAG {
        return refuse("is another kind of handle, or was freed");
    }
    // SAFETY: the tag says that it is a handle of this kind.
    Ok(unsafe { &(*handle).value })
}

/// Frees a handle; NULL and what is no handle of this kind are left alone.
///
/// # Safety
/// As [`get`], and nothing uses the handle during or after the call.
pub(super) unsafe fn free<O: Opaque>(handle: *mut O) {
    // SAFETY: passed on.
    if unsafe { get::<O>(handle) }.is_err() {
        return;
    }
    let handle = handle.cast::<Handle<O::Value>>();
    // SAFETY: `make` made it from a box, and it is not used any more. The value must not be dropped twice.
    let mut boxed = unsafe { Box::from_raw(handle.cast::<Handle<ManuallyDrop<O::Value>>>()) };
    boxed.tag = 0;
    // SAFETY: the value is dropped here and nowhere else.
    let drop_value = AssertUnwindSafe(|| unsafe { ManuallyDrop::drop(&mut boxed.value) });
    let _ = catch_unwind(drop_value); // a panic while freeing has nobody left to poison
}
