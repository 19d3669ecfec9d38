//! What the shell is told: an exit code, and one line that says what was wrong, where, and what to do.

use std::io;

use loris::{Error, loader};

/// Something failed while running.
pub(crate) const RUN_TIME: u8 = 1;
/// The command line makes no sense.
pub(crate) const USAGE: u8 = 2;
/// The model folder is no model that loris runs.
pub(crate) const BAD_MODEL: u8 = 3;
/// Memory ran out.
pub(crate) const OUT_OF_MEMORY: u8 = 4;
/// A device that was asked for is not there, or cannot run the model.
pub(crate) const NO_DEVICE: u8 = 5;
/// Ctrl-C.
pub(crate) const INTERRUPTED: u8 = 130;

/// Why the program ends early.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) code: u8,
    /// One line; empty: end quietly.
    pub(crate) message: String,
}

impl Failure {
    pub(crate) fn new(code: u8, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }

    pub(crate) fn interrupted() -> Self {
        Self::new(INTERRUPTED, "interrupted")
    }

    /// stdout did not take what was written. A reader that has left has had enough: no error.
    pub(crate) fn stdout(e: &io::Error) -> Self {
        match e.kind() {
            io::ErrorKind::BrokenPipe => Self::new(0, ""),
            _ => Self::new(RUN_TIME, format!("stdout: cannot write: {e}; is the disk full?")),
        }
    }
}

impl From<Error> for Failure {
    fn from(e: Error) -> Self {
        let code = match &e {
            Error::Load(e) => return Self::new(loader_code(e), e.to_string()),
            // The library calls them as the flags are called, or as a flag and a part of its value.
            Error::Option { name, value, expected } => {
                let given = match (name.split_once(' '), value.as_str()) {
                    (Some((flag, part)), value) => format!("{flag} {part}={value}"),
                    (None, "given") => (*name).to_owned(),
                    (None, value) => format!("{name} {value}"),
                };
                return Self::new(USAGE, format!("--{given}: expected {expected}"));
            }
            Error::OutOfMemory { .. } | Error::OutOfDeviceMemory { .. } | Error::KvFull { .. } => {
                OUT_OF_MEMORY
            }
            Error::NoDevice { .. } | Error::Unsupported { .. } => NO_DEVICE,
            Error::Cancelled => return Self::interrupted(),
            _ => RUN_TIME,
        };
        Self::new(code, e.to_string())
    }
}

impl From<loader::Error> for Failure {
    fn from(e: loader::Error) -> Self {
        Self::from(Error::from(e))
    }
}

/// Texts and messages come from the user, everything else from the folder.
fn loader_code(e: &loader::Error) -> u8 {
    use loader::Error as E;
    match e {
        e if e.is_out_of_memory() => OUT_OF_MEMORY,
        E::Text { .. }
        | E::TextTooLong { .. }
        | E::Chat { .. }
        | E::TemplateRefused { .. }
        | E::TemplateBudget { .. }
        | E::FileChanged { .. } => RUN_TIME,
        _ => BAD_MODEL,
    }
}
