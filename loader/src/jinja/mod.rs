//! Jinja 3 as chat templates use it, with the environment of `transformers` 5.24 and three properties that a
//! library does not give:
//!
//! - values are Python's (integers, floats, text by characters, `repr`, what is undefined), so that a prompt is
//!   the one that the model was trained on, byte for byte;
//! - every text knows which of its bytes came from outside (`text`), so that a user's text never becomes a control
//!   token, by construction and not by a list of spellings;
//! - work, memory and depth are bounded as it runs (`text::Meter`), because a template is a stranger's program.
//!
//! What a chat template has no use for is refused by name: other templates (`include`, `import`, `extends`,
//! `block`), `autoescape`, and the filters that chance or HTML are in.

mod eval;
mod filters;
mod format;
mod functions;
mod json;
mod lexer;
mod methods;
mod parser;
mod tests;
mod text;
mod time;
mod value;

pub(crate) use eval::Run;
pub(crate) use parser::Program;
pub(crate) use text::{Builder, Meter, Str, is_space};
pub(crate) use value::{Dict, Items, Value};

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
    fn at(self, line: u32) -> Fault {
        match self {
            Fault::Wrong(why) => Fault::WrongAt(line, why),
            other => other,
        }
    }
}

fn fault(why: impl AsRef<str>) -> Fault {
    Fault::Wrong(why.as_ref().to_owned())
}

/// Compiles a template.
pub(crate) fn compile(source: &str) -> Result<Program, String> {
    parser::parse(lexer::lex(source)?)
}
