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
mod fault;
mod filters;
mod format;
mod functions;
mod items;
mod json;
mod lexer;
mod methods;
mod operators;
mod parser;
mod run;
mod tests;
mod text;
mod time;
mod value;

pub(crate) use fault::Fault;
pub(crate) use parser::Program;
pub(crate) use run::Run;
pub(crate) use text::{Builder, Meter, Str, is_space};
pub(crate) use value::{Dict, Items, Value};

/// Compiles a template.
pub(crate) fn compile(source: &str) -> Result<Program, String> {
    parser::parse(lexer::lex(source)?)
}
