//! `loris chat`: a conversation.
//!
//! Each turn renders the whole conversation through the template. What the session already holds of the
//! result stays; only the rest is computed. So a template may rewrite history as it likes, and a turn
//! still costs no more than what it adds.

use std::io::{self, BufRead, IsTerminal, Write};
use std::ops::ControlFlow;
use std::path::Path;
use std::time::Instant;

use loris::loader::{Chat as Conversation, Message};
use loris::{Finish, Session};
use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;
use serde_json::{Value, json};

use crate::answer::{Answerer, DEAD_END, Statistics};
use crate::args::ChatArgs;
use crate::exit::{BAD_MODEL, Failure, INTERRUPTED, RUN_TIME};
use crate::files;
use crate::open;
use crate::prompt::{self, BYTE_ORDER_MARK, Templating};
use crate::report::Report;
use crate::run::{check_flags, load_event, open_for_answers};

const HELP: &str = "\
/help         this text
/clear        forget the conversation (the system message stays)
/system TEXT  set the system message; without TEXT, drop it
/regen        answer the last message once more
/save FILE    write the conversation, as JSON that loris run --messages takes
/load FILE    go on with a conversation that was written
/stats        what the last answer took
/exit         leave, as Ctrl-D does
A message that begins with a slash is written with two. A line that ends with \\ goes on in the next. Ctrl-C stops an \
answer; at the prompt it leaves.";

struct Chat<'a> {
    answerer: Answerer<'a>,
    session: Session,
    system: Option<String>,
    /// Roles and contents.
    messages: Vec<(String, String)>,
    templating: Templating,
    last: Option<Statistics>,
    report: &'a Report,
}

pub(crate) fn chat(args: &ChatArgs, report: &Report) -> Result<(), Failure> {
    let grammar = check_flags(&args.generate, report)?;
    let opened = open_for_answers(&args.model, &args.engine, &args.context, report)?;
    let model = &opened.model;
    open::tokenizer(model, &args.model)?;
    let templating = Templating::new(model, &args.model, &args.template)?;
    if !templating.is_there() {
        let dir = args.model.display();
        let message = format!(
            "{dir}: has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json); bring one with --chat-template, or use loris run --raw"
        );
        return Err(Failure::new(BAD_MODEL, message));
    }
    let grammar = grammar.map(|source| source.compile(model)).transpose()?;
    let load_s = opened.load.as_secs_f64();
    let answerer = Answerer::new(&args.generate, model, grammar, load_s, report)?;
    report.event("load", load_event(&args.model, &opened, &args.engine, answerer.settings()))?;
    let mut chat = Chat {
        answerer,
        session: model.session(&open::session_options(model, &args.context)?)?,
        system: args.system.clone(),
        messages: Vec::new(),
        templating,
        last: None,
        report,
    };
    let mut input = Input::new()?;
    let mut has_failed = false;
    if input.is_terminal() {
        report.note("/help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves");
    }
    while let Some(line) = input.read()? {
        let outcome = match line {
            Line::Text(text) => match chat.line(&text, input.is_terminal()) {
                Ok(ControlFlow::Break(())) => break,
                Ok(ControlFlow::Continue(())) => Ok(()),
                Err(failure) => Err(failure),
            },
            Line::Broken(failure) => Err(failure),
        };
        // What goes wrong with a line is said, and the conversation goes on without it, unless nobody listens any more.
        match outcome {
            Err(failure) if failure.code == RUN_TIME || failure.code == INTERRUPTED => {
                has_failed = true;
                report.error(&failure)?;
            }
            outcome => outcome?,
        }
    }
    match has_failed && !input.is_terminal() {
        true => Err(Failure::new(RUN_TIME, "")), // each was said
        false => Ok(()),
    }
}

impl Chat<'_> {
    /// A message or a command; breaks where the conversation is to end.
    fn line(&mut self, line: &str, is_typed: bool) -> Result<ControlFlow<()>, Failure> {
        let text = line.trim();
        let (name, rest) = text.split_once(char::is_whitespace).unwrap_or((text, ""));
        let rest = rest.trim();
        match name {
            "" => {}
            "/exit" | "/quit" | "/bye" => return Ok(ControlFlow::Break(())),
            "/help" => self.report.say(HELP),
            "/clear" => {
                self.messages.clear();
                let _ = self.session.truncate(0); // to nothing is always possible
            }
            "/system" => self.system = Some(rest.to_owned()).filter(|s| !s.is_empty()),
            "/regen" => self.answer_again()?,
            "/save" => self.save(rest)?,
            "/load" => self.load(rest)?,
            "/stats" => match &self.last {
                Some(statistics) => self.report.say(statistics.lines()),
                None => self.report.say("there was no answer yet"),
            },
            // A person mistypes a command; a program sends a path.
            word if is_typed && is_command(word) => {
                let hint = "/help lists the commands, and // begins a message with a slash";
                self.report.say(format!("{word}: no such command; {hint}"));
            }
            word if word.starts_with("//") => self.turn(line.trim_start().split_at(1).1)?,
            _ => self.turn(line)?,
        }
        Ok(ControlFlow::Continue(()))
    }

    /// The last message's answer, made once more.
    fn answer_again(&mut self) -> Result<(), Failure> {
        let Some(last) = self.messages.iter().rposition(|(role, _)| role == "user") else {
            return Err(Failure::new(RUN_TIME, "/regen: there was no message yet"));
        };
        let answers = self.messages.split_off(last + 1);
        let outcome = self.answer();
        match outcome {
            Ok(answer) => self.messages.push(("assistant".into(), answer)),
            Err(failure) => {
                self.messages.extend(answers);
                return Err(failure);
            }
        }
        Ok(())
    }

    fn save(&self, path: &str) -> Result<(), Failure> {
        if path.is_empty() {
            return Err(Failure::new(RUN_TIME, "/save: expected a file"));
        }
        let message = |(role, content)| json!({ "role": role, "content": content });
        let messages: Vec<_> = self.conversation().map(message).collect();
        let file = files::create(Path::new(path))?;
        files::write(file, &format!("{:#}\n", json!({ "messages": messages })))
    }

    fn load(&mut self, path: &str) -> Result<(), Failure> {
        let text = prompt::read_file(Path::new(path))?;
        let mut messages = saved_messages(&text).ok_or_else(|| {
            let what = "expected a conversation that /save wrote: {\"messages\": [{\"role\": ..., \"content\": ...}, ...]}";
            Failure::new(RUN_TIME, format!("/load {path}: {what}"))
        })?;
        let has_system = messages.first().is_some_and(|(role, _)| role == "system");
        self.system = has_system.then(|| messages.remove(0).1);
        self.messages = messages;
        Ok(())
    }

    /// One message and its answer. A message that gets none is no part of the conversation.
    fn turn(&mut self, text: &str) -> Result<(), Failure> {
        self.messages.push(("user".into(), text.into()));
        match self.answer() {
            Ok(answer) => self.messages.push(("assistant".into(), answer)),
            Err(failure) => {
                self.messages.pop();
                return Err(failure);
            }
        }
        Ok(())
    }

    fn answer(&mut self) -> Result<String, Failure> {
        let started = Instant::now();
        let tokens = self.tokens()?;
        if tokens.len() >= self.session.ctx_len() {
            let message = format!(
                "the context is full: with this message the conversation has {} tokens and the context holds {}; /clear starts a new one, -c/--ctx sets its length, and with --window a conversation has no end",
                tokens.len(),
                self.session.ctx_len()
            );
            return Err(Failure::new(RUN_TIME, message));
        }
        let answer = self.answerer.answer(&mut self.session, &tokens, started)?;
        if let Some(failure) = answer.failure {
            return Err(failure);
        }
        if !self.report.is_json() && !answer.text.ends_with('\n') {
            self.report.print("\n")?;
        }
        self.report.event("done", answer.statistics.event())?;
        match answer.statistics.finish {
            Finish::CtxFull => self.report.say(format!(
                "the context of {} tokens is full and the answer ends here; /clear starts a new conversation, and with --window one has no end",
                self.session.ctx_len()
            )),
            Finish::Length => self.report.note("the answer reached -n/--max-tokens"),
            Finish::Cancelled => self.report.note("stopped"),
            Finish::DeadEnd => self.report.say(DEAD_END),
            Finish::Eos | Finish::Stop => {}
        }
        self.last = Some(answer.statistics);
        Ok(answer.text)
    }

    /// The whole conversation, ready for the model.
    fn tokens(&self) -> Result<Vec<u32>, Failure> {
        let model = self.session.model();
        let Some(tokenizer) = model.tokenizer() else { return Ok(Vec::new()) }; // it was there
        let messages: Vec<_> = self.conversation().map(|(r, c)| Message::new(r, c)).collect();
        self.templating.encode(tokenizer, Conversation::new(messages))
    }

    /// Roles and contents, the system message first.
    fn conversation(&self) -> impl Iterator<Item = (&str, &str)> {
        let system = self.system.iter().map(|text| ("system", text.as_str()));
        system.chain(self.messages.iter().map(|(role, content)| (role.as_str(), content.as_str())))
    }
}

/// Whether a word could be meant as a command.
fn is_command(word: &str) -> bool {
    let name = word.strip_prefix('/');
    name.is_some_and(|name| !name.is_empty() && name.chars().all(|c| c.is_ascii_lowercase()))
}

fn saved_messages(text: &str) -> Option<Vec<(String, String)>> {
    let saved: Value = serde_json::from_str(text).ok()?;
    let message = |saved: &Value| {
        Some((saved.get("role")?.as_str()?.to_owned(), saved.get("content")?.as_str()?.to_owned()))
    };
    saved.get("messages")?.as_array()?.iter().map(message).collect()
}

/// A line of input, or why it is none.
enum Line {
    Text(String),
    Broken(Failure),
}

/// Where lines come from: an editor at a terminal, plain lines elsewhere.
enum Input {
    Editor(Box<DefaultEditor>),
    Lines {
        /// Where a person types.
        prompt: Option<&'static str>,
        n_read: usize,
    },
}

impl Input {
    fn new() -> Result<Self, Failure> {
        let typed = io::stdin().is_terminal();
        if !typed || !io::stdout().is_terminal() {
            // The editor would draw on stdout, which belongs to the answer.
            return Ok(Self::Lines { prompt: typed.then_some("> "), n_read: 0 });
        }
        let editor = DefaultEditor::new().map_err(|e| terminal(&e))?;
        Ok(Self::Editor(Box::new(editor)))
    }

    fn is_terminal(&self) -> bool {
        !matches!(self, Self::Lines { prompt: None, .. })
    }

    /// The next message or command; `None` at the end.
    fn read(&mut self) -> Result<Option<Line>, Failure> {
        let Some(first) = self.line()? else { return Ok(None) };
        let Line::Text(mut text) = first else { return Ok(Some(first)) };
        while text.ends_with('\\') {
            text.pop();
            text.push('\n');
            match self.line()? {
                Some(Line::Text(line)) => text.push_str(&line),
                Some(broken) => return Ok(Some(broken)),
                None => break,
            }
        }
        if let Self::Editor(editor) = self {
            let _ = editor.add_history_entry(text.as_str()); // a lost line of history is no loss
        }
        Ok(Some(Line::Text(text)))
    }

    fn line(&mut self) -> Result<Option<Line>, Failure> {
        let prompt = match self {
            Self::Editor(editor) => {
                return match editor.readline("> ") {
                    Ok(line) => Ok(Some(Line::Text(line))),
                    Err(ReadlineError::Eof) => Ok(None),
                    Err(ReadlineError::Interrupted) => Err(Failure::interrupted()),
                    Err(e) => Err(terminal(&e)),
                };
            }
            Self::Lines { prompt, .. } => *prompt,
        };
        if let Some(prompt) = prompt {
            let mut err = io::stderr().lock();
            let _ = write!(err, "{prompt}").and_then(|()| err.flush());
        }
        let mut line = Vec::new();
        let n = io::stdin()
            .lock()
            .read_until(b'\n', &mut line)
            .map_err(|e| Failure::new(RUN_TIME, format!("stdin: cannot read a line: {e}")))?;
        if n == 0 {
            return Ok(None);
        }
        Ok(Some(self.text(line)))
    }

    /// A line without its end, and the first one without a byte order mark.
    fn text(&mut self, mut line: Vec<u8>) -> Line {
        if line.ends_with(b"\n") {
            line.pop();
            if line.ends_with(b"\r") {
                line.pop();
            }
        }
        let Self::Lines { n_read, .. } = self else { return Line::Text(String::new()) };
        *n_read += 1;
        match String::from_utf8(line) {
            Ok(text) if *n_read == 1 => {
                Line::Text(text.trim_start_matches(BYTE_ORDER_MARK).to_owned())
            }
            Ok(text) => Line::Text(text),
            Err(e) => {
                let at = e.utf8_error().valid_up_to();
                let message =
                    format!("stdin: line {n_read}: not UTF-8 at byte {at}; convert it first");
                Line::Broken(Failure::new(RUN_TIME, message))
            }
        }
    }
}

fn terminal(e: &ReadlineError) -> Failure {
    Failure::new(
        RUN_TIME,
        format!("terminal: cannot read a line: {e}; pipe lines to stdin instead"),
    )
}
