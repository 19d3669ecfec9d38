//! What ends a rendering.

/// Why a template stopped.
#[derive(Debug)]
pub(crate) enum Fault {
    /// It said so itself, in these words.
    Refused(String),
    /// It asked for more than its budget of this.
    Budget(&'static str),
    /// It did what it cannot do.
    Wrong(String),
    /// The same, on a known line.
    WrongAt(u32, String),
}

impl Fault {
    pub(super) fn at(self, line: u32) -> Fault {
        match self {
            Fault::Wrong(why) => Fault::WrongAt(line, why),
            other => other,
        }
    }
}

pub(super) fn fault(why: impl AsRef<str>) -> Fault {
    Fault::Wrong(why.as_ref().to_owned())
}
