//! Chat templates: messages to the prompt that the model was trained on.
//!
//! `chat_template.jinja` wins over the `chat_template` of tokenizer_config.json, which is a string or a list of named
//! ones (then the one called `default`). The environment is that of `transformers`: blocks trimmed, `tojson` as
//! Python's `json.dumps` writes, `raise_exception`, `strftime_now` (in UTC), `{% generation %}` marks without effect.
//!
//! A template is untrusted: its size, instructions, copied bytes and output are bounded (see the `metered` module),
//! so that the worst it can do is to be refused. The budget follows the messages' length. What remains is time and
//! memory in proportion to the budget: a hostile template can use up to [`COPY_BUDGET`] and 64 times the messages' bytes.
//!
//! After a template no token that starts a sequence is added: the template writes it.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{Environment, ErrorKind, Value};
use serde_json::Value as Json;

use crate::companions::Companions;
use crate::error::Error;
use crate::json;
use crate::memory;
use crate::metered::{Metered, meter};
use crate::python::{self, Budget};

/// The template's own file.
pub const CHAT_TEMPLATE: &str = "chat_template.jinja";
/// The file that holds the template otherwise, and the special tokens' texts.
pub const TOKENIZER_CONFIG: &str = "tokenizer_config.json";

/// The longest template, in bytes.
pub const MAX_TEMPLATE_BYTES: usize = 256 << 10;
/// The most instructions that a rendering may run, besides 1,000 for each message.
pub const FUEL: u64 = 200_000;
/// The most bytes that a rendering may copy, besides 64 times the messages' bytes.
pub const COPY_BUDGET: u64 = 16 << 20;

/// Memory that the template library takes at most to read a template, for each of its bytes.
const PARSE_BYTES: usize = 160;
/// The same to render a chat, for each byte of the budget: what was copied, what is being copied, and the output, whose
/// room doubles as it grows.
const RENDER_BYTES: usize = 3;
/// Besides, for each message, and for the environment.
const MESSAGE_BYTES: usize = 1 << 10;
const ENVIRONMENT_BYTES: usize = 1 << 20;

const MAX_TOKENIZER_CONFIG_BYTES: u64 = 32 << 20;

/// One message of a chat.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Message {
    /// `system`, `user` or `assistant`, or what else the template knows.
    pub role: String,
    /// The text.
    pub content: String,
}

/// A chat template, compiled and checked.
#[derive(Clone)]
pub struct ChatTemplate {
    path: PathBuf,
    metered: Arc<Metered>,
    /// `bos_token` and the like with their texts.
    special_tokens: Vec<(String, String)>,
}

impl Message {
    /// A message.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Message {
        Message { role: role.into(), content: content.into() }
    }
}

impl ChatTemplate {
    /// Opens a folder's chat template, or gives `None` where it has none.
    pub fn open(dir: &Path) -> Result<Option<ChatTemplate>, Error> {
        let config_path = dir.join(TOKENIZER_CONFIG);
        let config =
            json::read_object(&config_path, MAX_TOKENIZER_CONFIG_BYTES)?.unwrap_or_default();
        let special_tokens: Vec<(String, String)> = Companions::open(dir)?
            .named()
            .map(|(name, text)| (name.to_owned(), text.to_owned()))
            .collect();
        let path = dir.join(CHAT_TEMPLATE);
        if let Some(bytes) = json::read_file(&path, MAX_TEMPLATE_BYTES as u64)? {
            let source = String::from_utf8(bytes).map_err(|err| Error::Template {
                file: path.clone(),
                why: err.to_string().into(),
            })?;
            return ChatTemplate::parse_with(&source, &path, special_tokens).map(Some);
        }
        match config.get("chat_template") {
            None | Some(Json::Null) => Ok(None),
            Some(value) => {
                let source = default_template(value).ok_or_else(|| Error::Value {
                    file: config_path.clone(),
                    key: "chat_template".into(),
                    expected: "a string, or a list of {name, template} with one named default"
                        .into(),
                    actual: json::describe(value),
                })?;
                ChatTemplate::parse_with(source, &config_path, special_tokens).map(Some)
            }
        }
    }

    /// Compiles a template; `path` is for messages, `special_tokens` are variables with their values.
    pub fn parse(
        source: &str,
        path: &Path,
        special_tokens: Vec<(&'static str, String)>,
    ) -> Result<ChatTemplate, Error> {
        let named = |(name, text): (&str, String)| (name.to_owned(), text);
        ChatTemplate::parse_with(source, path, special_tokens.into_iter().map(named).collect())
    }

    fn parse_with(
        source: &str,
        path: &Path,
        special_tokens: Vec<(String, String)>,
    ) -> Result<ChatTemplate, Error> {
        let limit = MAX_TEMPLATE_BYTES as u64;
        if source.len() as u64 > limit {
            return Err(Error::TooLarge { file: path.into(), actual: source.len() as u64, limit });
        }
        let refuse = |why: String| Error::Template { file: path.into(), why: why.into() };
        let bytes = PARSE_BYTES * source.len() + ENVIRONMENT_BYTES;
        memory::room_for(bytes, "reading a chat template")?;
        let metered =
            meter(&python::without_generation_marks(source), &syntax()).map_err(refuse)?;
        let template =
            ChatTemplate { path: path.into(), metered: Arc::new(metered), special_tokens };
        let env = template.environment(&Arc::new(Budget::new(0)), 1)?;
        env.template_from_str(&template.metered.source).map_err(|err| refuse(err.to_string()))?;
        Ok(template)
    }

    /// Renders a chat. With `add_generation_prompt` it ends where the model's answer begins.
    pub fn render(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
    ) -> Result<String, Error> {
        let input: u64 = messages.iter().map(|m| (m.role.len() + m.content.len()) as u64).sum();
        let limit = COPY_BUDGET.saturating_add(input.saturating_mul(64));
        self.room_to_render(limit, messages.len())?;
        let budget = Arc::new(Budget::new(limit));
        let env = self.environment(&budget, messages.len())?;
        let template = env
            .template_from_str(&self.metered.source)
            .map_err(|err| self.explain(&err, &budget))?;
        let own = self.special_tokens.iter().map(|(name, text)| (name.as_str(), Value::from(text)));
        let context: BTreeMap<&str, Value> = own
            .chain([
                ("messages", Value::from(Serde(messages))),
                ("add_generation_prompt", Value::from(add_generation_prompt)),
                // `transformers` defines both as None where there are none, and templates ask for that.
                ("tools", Value::from(())),
                ("documents", Value::from(())),
            ])
            .collect();

        let mut out = CappedWriter { bytes: Vec::new(), limit: budget.limit() };
        template
            .render_captured_to(Value::from(context), &mut out)
            .map_err(|err| self.explain(&err, &budget))?;
        String::from_utf8(out.bytes)
            .map_err(|err| Error::Template { file: self.path.clone(), why: err.to_string().into() })
    }

    fn room_to_render(&self, budget: u64, n_messages: usize) -> Result<(), Error> {
        let copied = usize::try_from(budget).unwrap_or(usize::MAX).saturating_mul(RENDER_BYTES);
        let parsed = PARSE_BYTES * self.metered.source.len() + ENVIRONMENT_BYTES;
        let messages = MESSAGE_BYTES.saturating_mul(n_messages);
        let bytes = copied.saturating_add(parsed).saturating_add(messages);
        memory::room_for(bytes, "rendering a chat")
    }

    fn environment(
        &self,
        budget: &Arc<Budget>,
        n_messages: usize,
    ) -> Result<Environment<'_>, Error> {
        let mut env = Environment::new();
        env.set_syntax(syntax());
        // Literal text that is collected is not metered; it costs an instruction each time.
        let by_capture = (256 << 20) / self.metered.longest_captured.max(1) as u64;
        let by_messages = FUEL.saturating_add(1000 * n_messages as u64);
        env.set_fuel(Some(by_messages.min(by_capture)));
        env.set_recursion_limit(64);
        python::install(&mut env, budget);
        Ok(env)
    }

    fn explain(&self, err: &minijinja::Error, budget: &Budget) -> Error {
        let file = self.path.clone();
        if let Some(why) = budget.refused() {
            return Error::TemplateRefused { file, why: why.into() };
        }
        if budget.is_spent() || err.kind() == ErrorKind::WriteFailure {
            return Error::TemplateBudget {
                file,
                what: "bytes copied or written",
                limit: budget.limit(),
            };
        }
        if err.kind() == ErrorKind::OutOfFuel {
            return Error::TemplateBudget { file, what: "instructions", limit: FUEL };
        }
        Error::Template { file, why: err.to_string().into() }
    }
}

impl fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ChatTemplate({})", self.path.display())
    }
}

fn default_template(value: &Json) -> Option<&str> {
    let named = |entry: &&Json| entry.get("name").and_then(Json::as_str) == Some("default");
    match value {
        Json::String(source) => Some(source),
        Json::Array(list) => list.iter().find(named)?.get("template")?.as_str(),
        _ => None,
    }
}

fn syntax() -> SyntaxConfig {
    // Only delimiters can make a syntax invalid, and these are the usual ones.
    SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().unwrap_or_default()
}

/// Output that stops at its limit.
struct CappedWriter {
    bytes: Vec<u8>,
    limit: u64,
}

impl std::io::Write for CappedWriter {
    fn write(&mut self, data: &[u8]) -> std::io::Result<usize> {
        if (self.bytes.len() + data.len()) as u64 > self.limit {
            return Err(std::io::Error::other("output too long"));
        }
        self.bytes.extend_from_slice(data);
        Ok(data.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
