//! From text to the tokens of a prompt.
//!
//! Through a chat template, what users and files say cannot speak for the template: the text of a special
//! token inside a message (`<|im_end|>`) stays text, while the template's own special tokens are parsed.
//! Ordinary text gets the ids that Hugging Face gives it. A template writes the token that starts a
//! sequence itself, so none is added after one.

use std::io::{IsTerminal, Read};
use std::path::Path;

use loris::Model;
use loris::loader::{Message, Special, Tokenizer};

use crate::args::RunArgs;
use crate::exit::{Failure, RUN_TIME, USAGE};

/// What editors may begin a text with.
pub(crate) const BYTE_ORDER_MARK: char = '\u{feff}';

/// The prompt that the flags or stdin give; `None` where there is none.
pub(crate) fn text(args: &RunArgs) -> Result<Option<String>, Failure> {
    match (&args.prompt, &args.file) {
        (Some(text), _) if text != "-" => Ok(Some(text.clone())),
        (None, Some(path)) if path.as_os_str() != "-" => read_file(path).map(cut_newline).map(Some),
        (None, None) if std::io::stdin().is_terminal() => Ok(None),
        _ => {
            let mut bytes = Vec::new();
            let read = std::io::stdin().lock().read_to_end(&mut bytes);
            read.map_err(|e| Failure::new(RUN_TIME, format!("stdin: cannot read: {e}")))?;
            let text = cut_newline(utf8(bytes, "stdin")?);
            Ok(Some(text).filter(|text| !text.is_empty()))
        }
    }
}

/// A text file, without a byte order mark.
pub(crate) fn read_file(path: &Path) -> Result<String, Failure> {
    let name = path.display().to_string();
    let bytes = std::fs::read(path)
        .map_err(|e| Failure::new(RUN_TIME, format!("{name}: cannot read: {e}; check -f")))?;
    utf8(bytes, &name)
}

fn utf8(bytes: Vec<u8>, name: &str) -> Result<String, Failure> {
    let text = String::from_utf8(bytes).map_err(|e| {
        let at = e.utf8_error().valid_up_to();
        Failure::new(RUN_TIME, format!("{name}: not UTF-8 at byte {at}; convert it first"))
    })?;
    // Some editors begin a text with a mark that nobody means.
    Ok(text.strip_prefix(BYTE_ORDER_MARK).map(str::to_owned).unwrap_or(text))
}

/// Editors and `echo` end a text with a newline that nobody means.
fn cut_newline(mut text: String) -> String {
    if text.ends_with('\n') {
        text.pop();
        if text.ends_with('\r') {
            text.pop();
        }
    }
    text
}

/// The tokens of one prompt, by template if there is one to apply.
pub(crate) fn encode(
    model: &Model,
    tokenizer: &Tokenizer,
    args: &RunArgs,
    text: &str,
) -> Result<Vec<u32>, Failure> {
    if args.raw {
        return Ok(tokenizer.encode_prompt(text, Special::Parse)?);
    }
    let system = args.system.iter().map(|text| Message::new("system", text.as_str()));
    let messages: Vec<_> = system.chain([Message::new("user", text)]).collect();
    match model.encode_chat(&messages, true)? {
        Some(tokens) => Ok(tokens),
        None if args.system.is_some() => {
            let message = "--system: the folder has no chat template to put it in; leave it out";
            Err(Failure::new(USAGE, message))
        }
        None => Ok(tokenizer.encode_prompt(text, Special::Plain)?),
    }
}
