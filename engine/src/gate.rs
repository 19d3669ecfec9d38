//! Whose turn it is on the device.
//!
//! Many threads step their sessions, and a device runs one pass at a time. Turns are given in the order of
//! arrival, so that no thread starves, which a mutex does not promise. Whoever waits can be called off: a
//! cancelled session does not sit through somebody else's pass.
//!
//! The line is a queue under a lock that is held for a few instructions, and everyone in it sleeps on a
//! condition of their own: a turn that ends wakes the next thread and no other. The gate does not hold the
//! device, so that a [`Canceller`](crate::Canceller), which has to reach the line, keeps no weights alive.

use std::collections::VecDeque;

use crate::sync::{Arc, Condvar, Mutex, PoisonError, lock};

/// A line of threads; the first has the turn.
#[derive(Debug, Default)]
pub(crate) struct Gate {
    line: Mutex<VecDeque<Arc<Condvar>>>,
}

/// The turn: dropped, by a panic too, it goes to the next in line.
#[derive(Debug)]
pub(crate) struct Turn<'a>(&'a Gate);

impl Gate {
    /// Waits for the turn.
    pub(crate) fn enter(&self) -> Turn<'_> {
        self.enter_unless(|| false).unwrap_or_else(|| unreachable!("nobody can stop it"))
    }

    /// Waits for the turn, or until `is_stopped`, which is asked again whenever somebody calls
    /// [`wake`](Self::wake): then `None`.
    pub(crate) fn enter_unless(&self, is_stopped: impl Fn() -> bool) -> Option<Turn<'_>> {
        let me = Arc::new(Condvar::new());
        let mut line = lock(&self.line);
        line.push_back(me.clone());
        while !line.front().is_some_and(|first| Arc::ptr_eq(first, &me)) {
            if is_stopped() {
                line.retain(|other| !Arc::ptr_eq(other, &me));
                return None;
            }
            line = me.wait(line).unwrap_or_else(PoisonError::into_inner);
        }
        Some(Turn(self))
    }

    /// Has everyone who waits look whether they are stopped. What they look at is to be set before the
    /// call: taking the lock makes sure that nobody is between looking and going to sleep.
    pub(crate) fn wake(&self) {
        lock(&self.line).iter().for_each(|waiting| waiting.notify_one());
    }

    /// Threads in the line, the one that has the turn included.
    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        lock(&self.line).len()
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut line = lock(&self.0.line);
        line.pop_front();
        if let Some(next) = line.front() {
            next.notify_one();
        }
    }
}
