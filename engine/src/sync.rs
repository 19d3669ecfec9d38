//! Locks, atomics and threads: the standard library's, or with `--cfg shuttle` those of a model checker
//! that tries out schedules (`tests/shuttle.rs`). Whatever threads of the engine share goes through here.

#[cfg(shuttle)]
pub(crate) use shuttle::{
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, atomic},
    thread,
};
#[cfg(not(shuttle))]
pub(crate) use std::{
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, atomic},
    thread,
};

/// Locks, whatever became of the last holder: what these locks guard is whole between any two calls.
pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
