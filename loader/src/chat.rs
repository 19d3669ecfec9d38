//! Chat templates: a chat to the prompt that the model was trained on.
//!
//! [`Chat`] is the data of a chat, [`ChatTemplate`] a folder's templates. `chat_template.jinja` and the files of
//! `additional_chat_templates/` win over the `chat_template` of tokenizer_config.json, which is a text, a list of
//! `{name, template}` or an object. What `transformers` 5.24 does to a chat before it renders is done here: keys that are
//! null go, a message's reasoning is there under each of its names, and a final message that is to be continued is cut
//! where its text ends.
//!
//! Every string of a chat is foreign to the template, and its bytes stay known through the rendering (see
//! `jinja::text`): control tokens are parsed only of what the template wrote. A role is the template's word where it is
//! one that is in general use or stands in the template, and a text like any other where not.
//!
//! A template is a program from a stranger: its size, work, memory and depth are bounded, and it runs on a stack of its
//! own. The budget follows the chat's length.
//!
//! After a template no token that starts a sequence is added: the template writes it.

use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use serde_json::Value as Config;

use crate::companions::{Companions, TOKENIZER_CONFIG};
use crate::error::Error;
use crate::jinja::{self, Builder, Dict, Items, Meter, Program, Run, Str, Value};
use crate::json;
use crate::memory;
use crate::ordered::Json;
use crate::tokenizer::Tokenizer;

/// The template's own file.
pub const CHAT_TEMPLATE: &str = "chat_template.jinja";
/// The folder of templates with names, each `NAME.jinja`.
pub const CHAT_TEMPLATES: &str = "additional_chat_templates";

/// The longest template, in bytes.
pub const MAX_TEMPLATE_BYTES: usize = 256 << 10;
/// The most instructions that a rendering may run, besides 64 for each byte of the chat.
pub const FUEL: u64 = 2_000_000;
/// The most bytes that a rendering may copy, besides 64 times the chat's.
pub const COPY_BUDGET: u64 = 16 << 20;

/// Memory that reading a template takes at most, for each of its bytes.
const PARSE_BYTES: usize = 512;
/// The same to render, for each byte of the budget: a text's room doubles as it grows, and while it does the old one
/// is there too.
const RENDER_BYTES: usize = 3;
const BESIDES: usize = 1 << 20;
/// The stack that templates are read and run on. Their depth is bounded so that it is enough.
const STACK: usize = 32 << 20;
/// The most templates of a folder.
const MAX_TEMPLATES: usize = 64;
/// What a value of a chat weighs, besides its text.
const VALUE_BYTES: u64 = 64;

const MAX_TOKENIZER_CONFIG_BYTES: u64 = 32 << 20;

/// Roles in general use. A template may build a control token of one (`'<|' + message.role + '|>'`).
const ROLES: [&str; 11] = [
    "assistant",
    "bot",
    "developer",
    "function",
    "human",
    "ipython",
    "model",
    "observation",
    "system",
    "tool",
    "user",
];
/// The names that a message's reasoning goes under; the first is what templates read.
const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];
/// Marks where the final message ends. It is the reference's, for templates that look at it.
const CONTINUE: &str = "CONTINUE_FINAL_MESSAGE_TAG ";
/// Variables that a chat has anyway.
const OWN_VARIABLES: [&str; 4] = ["messages", "tools", "documents", "add_generation_prompt"];

/// One message of a chat: its keys and values.
#[derive(Debug, Clone, PartialEq)]
pub struct Message {
    /// `role`, `content` and what else the template knows (`tool_calls`, `name`, ...), in order.
    pub fields: Vec<(String, Json)>,
}

impl Message {
    /// A message of text. The role is `system`, `user` or `assistant`, or what else the template knows.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Message {
        let text = |text: String| Json::Text(text);
        Message {
            fields: vec![
                ("role".into(), text(role.into())),
                ("content".into(), text(content.into())),
            ],
        }
    }

    /// The value of a key.
    pub fn get(&self, key: &str) -> Option<&Json> {
        self.fields.iter().find(|(have, _)| have == key).map(|(_, value)| value)
    }
}

/// A chat, and how it is to be rendered.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Chat {
    /// The messages.
    pub messages: Vec<Message>,
    /// The tools that the model may call, each an object (usually a JSON schema).
    pub tools: Option<Vec<Json>>,
    /// Documents to answer from, each an object.
    pub documents: Option<Vec<Json>>,
    /// What else the template asks for by name, such as `enable_thinking`.
    pub variables: Vec<(String, Json)>,
    /// Whether the prompt ends where the model's answer begins.
    pub add_generation_prompt: bool,
    /// The field of the final message whose text the model goes on with (`content`): the prompt ends where it does.
    pub continue_final_message: Option<String>,
    /// The name of one of the folder's templates, or the text of one of one's own, instead of the folder's.
    pub chat_template: Option<String>,
    /// The clock that the template sees, in seconds since 1970 in UTC; `None`: the time of the rendering.
    pub now: Option<u64>,
}

impl Chat {
    /// A chat that the model is to answer.
    pub fn new(messages: impl Into<Vec<Message>>) -> Chat {
        Chat { messages: messages.into(), add_generation_prompt: true, ..Chat::default() }
    }

    /// Reads an object with the keys of a chat request: `messages`, `tools`, `documents`,
    /// `chat_template_kwargs` or `variables`, `add_generation_prompt` (true unless the final message is to be continued),
    /// `continue_final_message` (true, or the name of a field), `chat_template`. Other keys are refused.
    pub fn from_json(text: &str) -> Result<Chat, Error> {
        json::room_to_read(text.as_bytes())?;
        let invalid = |why| Error::Chat { why: format!("not valid JSON: {why}").into() };
        Chat::from_value(Json::parse(text).map_err(invalid)?)
    }

    /// [`from_json`](Self::from_json) of a value that was read.
    pub fn from_value(value: Json) -> Result<Chat, Error> {
        let refuse = |why: String| Error::Chat { why: why.into() };
        let request = match value {
            Json::Object(request) => request,
            other => return Err(refuse(format!("expected an object, found {}", other.kind()))),
        };
        let mut chat = Chat::default();
        let mut add = None;
        for (key, value) in request {
            let wrong = |expected: &str, value: &Json| {
                Err(refuse(format!("{key}: expected {expected}, found {}", value.kind())))
            };
            match (key.as_str(), value) {
                ("messages", Json::List(list)) => {
                    for message in list {
                        match message {
                            Json::Object(fields) => chat.messages.push(Message { fields }),
                            other => return wrong("a list of objects", &other),
                        }
                    }
                }
                ("messages", other) => return wrong("a list", &other),
                (
                    "tools" | "documents" | "chat_template" | "continue_final_message",
                    Json::Null,
                ) => {}
                ("tools", Json::List(list)) => chat.tools = Some(list),
                ("documents", Json::List(list)) => chat.documents = Some(list),
                ("tools" | "documents", other) => return wrong("a list of objects", &other),
                ("chat_template_kwargs" | "variables", Json::Object(list)) => {
                    chat.variables.extend(list);
                }
                ("chat_template_kwargs" | "variables", other) => return wrong("an object", &other),
                ("add_generation_prompt", Json::Bool(is)) => add = Some(is),
                ("add_generation_prompt", other) => return wrong("true or false", &other),
                ("continue_final_message", Json::Bool(is)) => {
                    chat.continue_final_message = is.then(|| "content".into());
                }
                ("continue_final_message", Json::Text(field)) => {
                    chat.continue_final_message = Some(field);
                }
                ("continue_final_message", other) => {
                    return wrong("true, false or a field's name", &other);
                }
                ("chat_template", Json::Text(text)) => chat.chat_template = Some(text),
                ("chat_template", other) => return wrong("a string", &other),
                _ => {
                    return Err(refuse(format!(
                        "key {key} is not known; expected messages, tools, documents, \
                    chat_template_kwargs, variables, add_generation_prompt, continue_final_message or chat_template"
                    )));
                }
            }
        }
        chat.add_generation_prompt = add.unwrap_or(chat.continue_final_message.is_none());
        Ok(chat)
    }

    /// What the chat weighs, in bytes.
    fn size(&self) -> u64 {
        let lists = self.tools.iter().chain(&self.documents).flatten();
        let variables =
            self.variables.iter().chain(self.messages.iter().flat_map(|message| &message.fields));
        let named = variables.map(|(key, value)| key.len() as u64 + size(value));
        lists.map(size).chain(named).fold(0, u64::saturating_add)
    }
}

fn size(value: &Json) -> u64 {
    let inner = match value {
        Json::Text(text) => text.len() as u64,
        Json::List(list) => list.iter().map(size).fold(0, u64::saturating_add),
        Json::Object(entries) => entries
            .iter()
            .map(|(key, value)| key.len() as u64 + size(value))
            .fold(0, u64::saturating_add),
        _ => 0,
    };
    inner.saturating_add(VALUE_BYTES)
}

/// A folder's chat templates, compiled and checked.
#[derive(Clone)]
pub struct ChatTemplate {
    path: PathBuf,
    templates: Arc<Vec<Template>>,
    /// `bos_token` and the like with their texts.
    special_tokens: Vec<(String, String)>,
}

/// One of them.
struct Template {
    name: String,
    source: String,
    /// The program, or why there is none.
    program: Result<Program, String>,
}

/// The name of the template that is used unless another is asked for.
const DEFAULT: &str = "default";
/// The name of the one for chats with tools.
const TOOL_USE: &str = "tool_use";

impl ChatTemplate {
    /// Opens a folder's chat templates, or gives `None` where it has none.
    pub fn open(dir: &Path) -> Result<Option<ChatTemplate>, Error> {
        let config_path = dir.join(TOKENIZER_CONFIG);
        let config =
            json::read_object(&config_path, MAX_TOKENIZER_CONFIG_BYTES)?.unwrap_or_default();
        let special_tokens = named_tokens(dir)?;
        let files = template_files(dir)?;
        let (path, sources) = match files.is_empty() {
            false => (dir.join(CHAT_TEMPLATE), files),
            true => match config.get("chat_template") {
                None | Some(Config::Null) => return Ok(None),
                Some(value) => {
                    let sources = configured_templates(value).ok_or_else(|| Error::Value {
                        file: config_path.clone(),
                        key: "chat_template".into(),
                        expected: "a string, an object of strings, or a list of {name, template}"
                            .into(),
                        actual: json::describe(value),
                    })?;
                    (config_path, sources)
                }
            },
        };
        ChatTemplate::of(sources, &path, special_tokens).map(Some)
    }

    /// Opens a template of one's own, a file, with the special tokens of a model's folder.
    pub fn open_file(dir: &Path, file: &Path) -> Result<ChatTemplate, Error> {
        let source = read_template(file)?.ok_or_else(|| Error::Io {
            file: file.into(),
            action: "open",
            source: std::io::ErrorKind::NotFound.into(),
        })?;
        ChatTemplate::of(vec![(DEFAULT.into(), source)], file, named_tokens(dir)?)
    }

    /// Compiles a template; `path` is for messages, `special_tokens` are variables with their values.
    pub fn parse(
        source: &str,
        path: &Path,
        special_tokens: Vec<(&'static str, String)>,
    ) -> Result<ChatTemplate, Error> {
        let named = special_tokens.into_iter().map(|(name, text)| (name.to_owned(), text));
        ChatTemplate::of(vec![(DEFAULT.into(), source.into())], path, named.collect())
    }

    fn of(
        sources: Vec<(String, String)>,
        path: &Path,
        special_tokens: Vec<(String, String)>,
    ) -> Result<ChatTemplate, Error> {
        let mut templates = Vec::new();
        for (name, source) in sources {
            let program = compile(&source, path)?;
            if let (DEFAULT, Err(why)) = (name.as_str(), &program) {
                return Err(Error::Template { file: path.into(), why: why.clone().into() });
            }
            templates.push(Template { name, source, program });
        }
        Ok(ChatTemplate { path: path.into(), templates: Arc::new(templates), special_tokens })
    }

    /// Renders a chat.
    pub fn render(&self, chat: &Chat) -> Result<String, Error> {
        self.render_marked(chat).map(|(text, _)| text)
    }

    /// The ids of a chat, ready for the model: control tokens are parsed where the template wrote them, and are
    /// text where the chat did. Nothing is to be added in front of them.
    pub fn encode(&self, tokenizer: &Tokenizer, chat: &Chat) -> Result<Vec<u32>, Error> {
        let (text, foreign) = self.render_marked(chat)?;
        tokenizer.encode_chat(&text, &foreign)
    }

    /// Renders a chat, and says which bytes of the result came from it and not from the template.
    pub fn render_marked(&self, chat: &Chat) -> Result<(String, Vec<Range<usize>>), Error> {
        let mut own = None;
        let template = self.choose(chat, &mut own)?;
        let refuse = |why: String| Error::Template { file: self.path.clone(), why: why.into() };
        let program = template.program.as_ref().map_err(|why| refuse(why.clone()))?;
        check(chat)?;
        let input = chat.size();
        let bytes = COPY_BUDGET.saturating_add(input.saturating_mul(64));
        let steps = FUEL.saturating_add(input.saturating_mul(64));
        let asked = usize::try_from(bytes).unwrap_or(usize::MAX).saturating_mul(RENDER_BYTES);
        memory::room_for(asked.saturating_add(BESIDES), "rendering a chat")?;
        let (tail, continued) = continued(chat, &template.source)?;

        let rendered = on_own_stack(|| {
            let meter = Meter::new(steps, bytes);
            let mut run = Run::new(program, &meter, chat.now.unwrap_or_else(now));
            self.set_variables(&mut run, program, chat, tail, &meter)?;
            let mut out = Builder::new(&meter);
            run.render(&mut out)?;
            Ok(out.into_parts())
        })?
        .ok_or_else(|| refuse("the renderer failed on it".into()))?;
        let (text, foreign) = rendered.map_err(|fault| match fault {
            jinja::Fault::Refused(why) => {
                Error::TemplateRefused { file: self.path.clone(), why: why.into() }
            }
            jinja::Fault::Budget(what) => Error::TemplateBudget {
                file: self.path.clone(),
                what,
                limit: if what == "instructions" { steps } else { bytes },
            },
            jinja::Fault::Wrong(why) => refuse(why),
            jinja::Fault::WrongAt(line, why) => refuse(format!("line {line}: {why}")),
        })?;
        match continued {
            Some(last) => cut_after(text, foreign, &last),
            None => Ok((text, foreign)),
        }
    }

    /// The template for a chat, as the reference chooses.
    fn choose<'a>(
        &'a self,
        chat: &Chat,
        own: &'a mut Option<Template>,
    ) -> Result<&'a Template, Error> {
        let named = |name: &str| self.templates.iter().find(|template| template.name == name);
        let found = match &chat.chat_template {
            Some(asked) => match named(asked) {
                Some(template) => return Ok(template),
                None => {
                    let program = compile(asked, Path::new("chat_template"))?;
                    let template = Template { name: String::new(), source: asked.clone(), program };
                    return Ok(own.insert(template));
                }
            },
            None => chat.tools.as_ref().and_then(|_| named(TOOL_USE)).or_else(|| named(DEFAULT)),
        };
        found.ok_or_else(|| {
            let names: Vec<&str> =
                self.templates.iter().map(|template| template.name.as_str()).collect();
            let why = format!("none is called default; name one of {}", names.join(", "));
            Error::Template { file: self.path.clone(), why: why.into() }
        })
    }

    fn set_variables(
        &self,
        run: &mut Run<'_>,
        program: &Program,
        chat: &Chat,
        tail: Option<Vec<(String, Json)>>,
        meter: &Meter,
    ) -> Result<(), jinja::Fault> {
        for (name, text) in &self.special_tokens {
            run.set_global(name, Value::own(text));
        }
        for (name, value) in &chat.variables {
            if run.asks_for(name) {
                run.set_global(name, to_value(value, meter)?);
            }
        }
        let last = chat.messages.len().saturating_sub(1);
        let mut messages = Vec::new();
        for (at, message) in chat.messages.iter().enumerate() {
            let fields = tail.as_ref().filter(|_| at == last).unwrap_or(&message.fields);
            let fields = with_reasoning(fields);
            let mut entries = Vec::new();
            for (key, value) in fields {
                let value = match (key, value) {
                    ("role", Json::Text(role)) if is_role(role, program) => Value::own(role),
                    (_, value) => to_value(value, meter)?,
                };
                meter.take(key.len())?;
                entries.push((Value::Str(Str::foreign(key)), value));
            }
            messages.push(Value::Dict(Dict::new(entries, meter)?));
        }
        run.set_global("messages", Value::list(messages, meter)?);
        // The reference defines both as None where there are none, and templates ask for that.
        for (name, list) in [("tools", &chat.tools), ("documents", &chat.documents)] {
            let value = match list {
                None => Value::None,
                Some(list) => to_list(list, meter)?,
            };
            run.set_global(name, value);
        }
        run.set_global("add_generation_prompt", Value::Bool(chat.add_generation_prompt));
        Ok(())
    }
}

impl fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ChatTemplate({})", self.path.display())
    }
}

/// Whether a role is a word of the template's and not just a text.
fn is_role(role: &str, program: &Program) -> bool {
    let is_name = role.len() <= 64
        && role.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-');
    is_name && (ROLES.contains(&role) || program.texts.iter().any(|text| text == role))
}

/// A message's fields without those that are null, its reasoning under each name that templates ask for.
fn with_reasoning(fields: &[(String, Json)]) -> Vec<(&str, &Json)> {
    let given = fields.iter().map(|(key, value)| (key.as_str(), value));
    let mut fields: Vec<(&str, &Json)> = given.filter(|(_, value)| **value != Json::Null).collect();
    let find =
        |fields: &[(&str, &Json)], name: &str| fields.iter().position(|(key, _)| *key == name);
    let Some(reasoning) = REASONING.iter().find_map(|name| find(&fields, name)) else {
        return fields;
    };
    let value = fields[reasoning].1;
    // In the order that the reference's dict has.
    if find(&fields, REASONING[1]).is_none() {
        fields.insert(0, (REASONING[1], value));
    }
    match find(&fields, REASONING[0]) {
        Some(at) => fields[at].1 = value,
        None => fields.push((REASONING[0], value)),
    }
    fields
}

/// What a chat must be before it is rendered.
fn check(chat: &Chat) -> Result<(), Error> {
    let refuse = |why: &str| Err(Error::Chat { why: why.into() });
    if chat.messages.is_empty() {
        return refuse("messages: expected at least one");
    }
    if chat.continue_final_message.is_some() && chat.add_generation_prompt {
        return refuse(
            "continue_final_message and add_generation_prompt: expected one of them; a final message that \
            goes on has no header of a new one after it",
        );
    }
    for (name, list) in [("tools", &chat.tools), ("documents", &chat.documents)] {
        if let Some(other) = list.iter().flatten().find(|item| !matches!(item, Json::Object(_))) {
            return refuse(&format!("{name}: expected a list of objects, found {}", other.kind()));
        }
    }
    match chat.variables.iter().find(|(name, _)| OWN_VARIABLES.contains(&name.as_str())) {
        Some((name, _)) => refuse(&format!(
            "variable {name}: the chat has it; expected it there and not as a variable"
        )),
        None => Ok(()),
    }
}

/// The final message with a mark after the text that is to be continued, and that text.
#[allow(clippy::type_complexity)]
fn continued(
    chat: &Chat,
    source: &str,
) -> Result<(Option<Vec<(String, Json)>>, Option<String>), Error> {
    let (Some(field), Some(last)) = (&chat.continue_final_message, chat.messages.last()) else {
        return Ok((None, None));
    };
    let refuse =
        |why: String| Err(Error::Chat { why: format!("continue_final_message: {why}").into() });
    let mut fields: Vec<(String, Json)> = with_reasoning(&last.fields)
        .into_iter()
        .map(|(key, value)| (key.to_owned(), value.clone()))
        .collect();
    let Some(value) = fields.iter().find(|(key, _)| key == field).map(|(_, value)| value.clone())
    else {
        return refuse(format!("the final message has no {field}"));
    };
    let is_reasoning = REASONING.contains(&field.as_str());
    let is_same = |key: &str, other: &Json| {
        key == field || (is_reasoning && REASONING.contains(&key) && *other == value)
    };
    if !fields.iter().any(|(key, other)| is_same(key, other) && source.contains(key.as_str())) {
        return refuse(format!("the template does not read {field}"));
    }
    let mut text = None;
    for (_, item) in fields.iter_mut().filter(|(key, other)| is_same(key, other)) {
        match item {
            Json::Text(content) => {
                text = Some(content.clone());
                content.push_str(CONTINUE);
            }
            Json::List(parts) => {
                let blocks = parts.iter_mut().rev().filter_map(|part| match part {
                    Json::Object(block) => block.iter_mut().find(|(key, _)| key == "text"),
                    _ => None,
                });
                let mut blocks = blocks;
                if let Some((_, Json::Text(content))) = blocks.next() {
                    text = Some(content.clone());
                    content.push_str(CONTINUE);
                }
            }
            _ => {}
        }
    }
    match text {
        Some(text) => Ok((Some(fields), Some(text))),
        None => refuse(format!("{field}: expected a text, or parts with a text")),
    }
}

/// The prompt up to where the final message's text ends.
fn cut_after(
    mut text: String,
    mut foreign: Vec<Range<usize>>,
    last: &str,
) -> Result<(String, Vec<Range<usize>>), Error> {
    let is_space = jinja::is_space;
    let place =
        text.rfind(CONTINUE.trim_end()).filter(|_| text.contains(last.trim_matches(is_space)));
    let Some(at) = place else {
        let why =
            "continue_final_message: the template drops the final message, or changes its text";
        return Err(Error::Chat { why: why.into() });
    };
    let kept = text.get(at..).is_some_and(|rest| rest.starts_with(CONTINUE));
    let before = text.get(..at).unwrap_or_default();
    // A template that trims takes the white space before the mark too.
    let end = if kept { at } else { before.trim_end_matches(is_space).len() };
    text.truncate(end);
    foreign.retain_mut(|range| {
        range.end = range.end.min(end);
        range.start < range.end
    });
    Ok((text, foreign))
}

fn to_list(list: &[Json], meter: &Meter) -> Result<Value, jinja::Fault> {
    let list: Result<Vec<Value>, _> = list.iter().map(|item| to_value(item, meter)).collect();
    Ok(Value::List(Items::new(list?, meter)?))
}

/// A value of a chat as a template sees it: every text of it is foreign.
fn to_value(value: &Json, meter: &Meter) -> Result<Value, jinja::Fault> {
    Ok(match value {
        Json::Null => Value::None,
        Json::Bool(is) => Value::Bool(*is),
        Json::Int(n) => Value::Int(*n),
        Json::Float(n) => Value::Float(*n),
        Json::Text(text) => {
            meter.take(text.len())?;
            Value::Str(Str::foreign(text))
        }
        Json::List(list) => to_list(list, meter)?,
        Json::Object(object) => {
            let mut entries = Vec::new();
            for (key, value) in object {
                meter.take(key.len())?;
                entries.push((Value::Str(Str::foreign(key)), to_value(value, meter)?));
            }
            Value::Dict(Dict::new(entries, meter)?)
        }
    })
}

fn now() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since.unwrap_or_default().as_secs()
}

/// Runs `body` on a stack whose size is known, whatever the caller's is; `None` where it panicked.
fn on_own_stack<T: Send>(body: impl FnOnce() -> T + Send) -> Result<Option<T>, Error> {
    let none = || Error::NoMemory { what: "the stack of a chat template", bytes: STACK };
    if !memory::has_space(STACK) {
        return Err(none());
    }
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("template".into()).stack_size(STACK);
        let running = thread.spawn_scoped(scope, body).map_err(|_| none())?;
        Ok(running.join().ok())
    })
}

/// The program of a template's text, or why it has none.
fn compile(source: &str, path: &Path) -> Result<Result<Program, String>, Error> {
    let limit = MAX_TEMPLATE_BYTES as u64;
    if source.len() as u64 > limit {
        return Err(Error::TooLarge { file: path.into(), actual: source.len() as u64, limit });
    }
    memory::room_for(PARSE_BYTES * source.len() + BESIDES, "reading a chat template")?;
    let compiled = on_own_stack(|| jinja::compile(source))?;
    Ok(compiled.unwrap_or_else(|| Err("the parser failed on it".into())))
}

/// The text of a template's file.
fn read_template(path: &Path) -> Result<Option<String>, Error> {
    let Some(bytes) = json::read_file(path, MAX_TEMPLATE_BYTES as u64)? else { return Ok(None) };
    match String::from_utf8(bytes) {
        Ok(source) => Ok(Some(source)),
        Err(err) => Err(Error::Template { file: path.into(), why: err.to_string().into() }),
    }
}

/// The templates that are files of their own, by name.
fn template_files(dir: &Path) -> Result<Vec<(String, String)>, Error> {
    let mut templates = Vec::new();
    if let Some(source) = read_template(&dir.join(CHAT_TEMPLATE))? {
        templates.push((DEFAULT.to_owned(), source));
    }
    let folder = dir.join(CHAT_TEMPLATES);
    let io = |source| Error::Io { file: folder.clone(), action: "list", source };
    let listed = match std::fs::read_dir(&folder) {
        Err(err)
            if matches!(
                err.kind(),
                std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory
            ) =>
        {
            return Ok(templates);
        }
        other => other.map_err(io)?,
    };
    let mut names = Vec::new();
    for entry in listed {
        let name = entry.map_err(io)?.file_name();
        if let Some(name) = name.to_str().and_then(|name| name.strip_suffix(".jinja")) {
            names.push(name.to_owned());
        }
    }
    names.sort_unstable();
    if names.len() > MAX_TEMPLATES {
        let why = format!("{} templates, expected at most {MAX_TEMPLATES}", names.len());
        return Err(Error::Template { file: folder, why: why.into() });
    }
    for name in names {
        let path = folder.join(format!("{name}.jinja"));
        let source = read_template(&path)?.unwrap_or_default();
        // As in the reference, a file of this name replaces the folder's own.
        templates.retain(|(have, _)| *have != name);
        templates.push((name, source));
    }
    Ok(templates)
}

/// The templates in tokenizer_config.json, by name.
fn configured_templates(value: &Config) -> Option<Vec<(String, String)>> {
    let pair = |name: &str, source: &Config| Some((name.to_owned(), source.as_str()?.to_owned()));
    let templates: Option<Vec<(String, String)>> = match value {
        Config::String(source) => Some(vec![(DEFAULT.into(), source.clone())]),
        Config::Array(list) => list
            .iter()
            .map(|entry| pair(entry.get("name")?.as_str()?, entry.get("template")?))
            .collect(),
        Config::Object(map) => map.iter().map(|(name, source)| pair(name, source)).collect(),
        _ => None,
    };
    templates.filter(|list| !list.is_empty() && list.len() <= MAX_TEMPLATES)
}

/// `bos_token` and the like with their texts, as the folder's files have them.
fn named_tokens(dir: &Path) -> Result<Vec<(String, String)>, Error> {
    let companions = Companions::open(dir)?;
    Ok(companions.named().map(|(name, text)| (name.to_owned(), text.to_owned())).collect())
}
