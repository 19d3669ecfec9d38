//! From text to the tokens of a prompt.
//!
//! Through a chat template, what users and files say cannot speak for the template: the text of a special
//! token inside a message (`<|im_end|>`) stays text, while the template's own special tokens are parsed.
//! Ordinary text gets the ids that Hugging Face gives it. A template writes the token that starts a
//! sequence itself, so none is added after one.

use std::io::{IsTerminal, Read};
use std::path::Path;

use loris::Model;
use loris::loader::{Chat, ChatTemplate, Json, Message, Special, Tokenizer};

use crate::args::{RunArgs, TemplateArgs};
use crate::exit::{BAD_MODEL, Failure, RUN_TIME, USAGE};

/// What editors may begin a text with.
pub(crate) const BYTE_ORDER_MARK: char = '\u{feff}';

/// What a prompt is made of.
#[derive(Debug)]
pub(crate) enum Prompt {
    Text(String),
    /// The conversation of --messages.
    Chat(Box<Chat>),
}

/// The prompt that the flags or stdin give; `None` where there is none.
pub(crate) fn prompt(args: &RunArgs) -> Result<Option<Prompt>, Failure> {
    let Some(path) = &args.messages else { return Ok(text(args)?.map(Prompt::Text)) };
    let text = if path.as_os_str() == "-" { stdin()? } else { read_file(path)? };
    // A list is that of an object's messages.
    let request = match text.trim_start().starts_with('[') {
        true => format!("{{\"messages\": {text}}}"),
        false => text,
    };
    let mut chat = Chat::from_json(&request)
        .map_err(|e| Failure::new(USAGE, format!("--messages {}: {e}", path.display())))?;
    if let Some(path) = &args.tools {
        chat.tools = Some(tools(path)?);
    }
    Ok(Some(Prompt::Chat(Box::new(chat))))
}

fn text(args: &RunArgs) -> Result<Option<String>, Failure> {
    match (&args.prompt, &args.file) {
        (Some(text), _) if text != "-" => Ok(Some(text.clone())),
        (None, Some(path)) if path.as_os_str() != "-" => read_file(path).map(cut_newline).map(Some),
        (None, None) if std::io::stdin().is_terminal() => Ok(None),
        _ => Ok(Some(cut_newline(stdin()?)).filter(|text| !text.is_empty())),
    }
}

fn tools(path: &Path) -> Result<Vec<Json>, Failure> {
    let refuse = |why: &str| Failure::new(USAGE, format!("--tools {}: {why}", path.display()));
    match Json::parse(&read_file(path)?) {
        Ok(Json::List(tools)) => Ok(tools),
        Ok(_) => Err(refuse("expected a list of objects")),
        Err(why) => Err(refuse(&format!("not valid JSON: {why}"))),
    }
}

fn stdin() -> Result<String, Failure> {
    let mut bytes = Vec::new();
    let read = std::io::stdin().lock().read_to_end(&mut bytes);
    read.map_err(|e| Failure::new(RUN_TIME, format!("stdin: cannot read: {e}")))?;
    utf8(bytes, "stdin")
}

/// A text file, without a byte order mark.
pub(crate) fn read_file(path: &Path) -> Result<String, Failure> {
    let name = path.display().to_string();
    let bytes = std::fs::read(path)
        .map_err(|e| Failure::new(RUN_TIME, format!("{name}: cannot read: {e}; check the path")))?;
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

/// The template that a run uses and what it is told besides the chat.
#[derive(Debug)]
pub(crate) struct Templating {
    template: Option<ChatTemplate>,
    variables: Vec<(String, Json)>,
    /// Of the folder's, where one was asked for.
    name: Option<String>,
}

impl Templating {
    /// As the flags say: the folder's, one of its templates by name, or a file.
    pub(crate) fn new(model: &Model, dir: &Path, args: &TemplateArgs) -> Result<Self, Failure> {
        let variables = args.template_var.clone();
        let folder = || model.chat_template().cloned();
        let (template, name) = match &args.chat_template {
            None => (folder(), None),
            Some(file) if file.is_file() => (Some(ChatTemplate::open_file(dir, file)?), None),
            Some(name) => (folder(), name.to_str().map(str::to_owned)),
        };
        Ok(Self { template, variables, name })
    }

    /// Whether there is a template.
    pub(crate) fn is_there(&self) -> bool {
        self.template.is_some()
    }

    /// The ids of a chat.
    pub(crate) fn encode(
        &self,
        tokenizer: &Tokenizer,
        mut chat: Chat,
    ) -> Result<Vec<u32>, Failure> {
        let Some(template) = &self.template else {
            let message = "the folder has no chat template; --chat-template FILE brings one";
            return Err(Failure::new(BAD_MODEL, message));
        };
        chat.variables.extend(self.variables.iter().cloned());
        if self.name.is_some() {
            chat.chat_template = self.name.clone();
        }
        Ok(template.encode(tokenizer, &chat)?)
    }
}

/// The tokens of one prompt, by template if there is one to apply.
pub(crate) fn encode(
    templating: &Templating,
    tokenizer: &Tokenizer,
    args: &RunArgs,
    prompt: Prompt,
) -> Result<Vec<u32>, Failure> {
    let text = match prompt {
        Prompt::Chat(chat) => return templating.encode(tokenizer, *chat),
        Prompt::Text(text) if args.raw => {
            return Ok(tokenizer.encode_prompt(&text, Special::Parse)?);
        }
        Prompt::Text(text) => text,
    };
    if !templating.is_there() {
        let is_given = [
            ("--system", args.system.is_some()),
            ("--tools", args.tools.is_some()),
            ("--assistant", args.assistant.is_some()),
        ];
        return match is_given.iter().find(|(_, is_given)| *is_given) {
            Some((flag, _)) => {
                let message = format!(
                    "{flag}: the folder has no chat template to put it in; leave it out, or bring one with --chat-template"
                );
                Err(Failure::new(USAGE, message))
            }
            None => Ok(tokenizer.encode_prompt(&text, Special::Plain)?),
        };
    }
    let system = args.system.iter().map(|text| Message::new("system", text.as_str()));
    let assistant = args.assistant.iter().map(|text| Message::new("assistant", text.as_str()));
    let messages: Vec<_> = system.chain([Message::new("user", text)]).chain(assistant).collect();
    let mut chat = Chat::new(messages);
    if args.assistant.is_some() {
        chat.continue_final_message = Some("content".into());
        chat.add_generation_prompt = false;
    }
    if let Some(path) = &args.tools {
        chat.tools = Some(tools(path)?);
    }
    templating.encode(tokenizer, chat)
}
