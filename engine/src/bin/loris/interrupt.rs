//! Ctrl-C: the first stops the answer, the next one ends the process.
//!
//! While a session works, its canceller is registered; the signal takes it out and uses it. With nothing
//! registered, before the model is loaded or after the first Ctrl-C, the process ends with code 130.

use std::sync::{Mutex, MutexGuard, PoisonError};

use loris::{Canceller, Session};

use crate::exit::{Failure, INTERRUPTED, RUN_TIME};

static RUNNING: Mutex<Option<Canceller>> = Mutex::new(None);

fn running() -> MutexGuard<'static, Option<Canceller>> {
    RUNNING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Takes over SIGINT for the whole process.
pub(crate) fn install() -> Result<(), Failure> {
    let handler = || match running().take() {
        Some(canceller) => canceller.cancel(),
        None => std::process::exit(INTERRUPTED.into()),
    };
    ctrlc::set_handler(handler)
        .map_err(|e| Failure::new(RUN_TIME, format!("cannot handle Ctrl-C: {e}")))
}

/// While this lives, Ctrl-C cancels a session's work instead of ending the process.
#[derive(Debug)]
pub(crate) struct Guard(());

impl Guard {
    pub(crate) fn new(session: &Session) -> Self {
        *running() = Some(session.canceller());
        Self(())
    }

    /// From now on it is this session's work that Ctrl-C cancels. If Ctrl-C came already, its next call
    /// is cancelled: between two sessions there is no moment at which a signal is lost.
    pub(crate) fn turn_to(&self, session: &Session) {
        match &mut *running() {
            Some(canceller) => *canceller = session.canceller(),
            None => session.canceller().cancel(),
        }
    }

    /// Whether Ctrl-C came since the guard was made.
    pub(crate) fn interrupted(&self) -> bool {
        running().is_none()
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        *running() = None;
    }
}
