//! What the library has to say besides results and errors, to whoever wants to hear it.

use std::fmt;
use std::sync::Arc;

/// How much a message matters; a higher level is less important.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// A device failed.
    Error = 1,
    /// Something was decided that its user may not expect.
    Warn = 2,
    /// What was opened, and where.
    Info = 3,
}

type Say = dyn Fn(Level, &str) + Send + Sync;

/// A receiver of messages, called on the thread that the message is about; the default hears nothing.
#[derive(Clone, Default)]
pub struct Log(Option<(Level, Arc<Say>)>);

impl Log {
    /// Sends messages up to `level` to `say`.
    pub fn new(level: Level, say: impl Fn(Level, &str) + Send + Sync + 'static) -> Self {
        Self(Some((level, Arc::new(say))))
    }

    pub(crate) fn say(&self, level: Level, message: fmt::Arguments<'_>) {
        if let Some((wanted, say)) = &self.0
            && level <= *wanted
        {
            say(level, &message.to_string());
        }
    }
}

impl fmt::Debug for Log {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Log").field(&self.0.as_ref().map(|(level, _)| level)).finish()
    }
}
