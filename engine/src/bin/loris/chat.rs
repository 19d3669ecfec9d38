//! `loris chat`: a conversation.
//!
//! Each turn renders the whole conversation through the template. What the session already holds of the
//! result stays; only the rest is computed. So a template may rewrite history as it likes, and a turn
//! still costs no more than what it adds.

use std::io::{self, BufRead, IsTerminal, Write};
use std::time::Instant;

use loris::loader::Message;
use loris::{Finish, Session};
use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;

use crate::answer::{Answerer, Statistics};
use crate::args::ChatArgs;
use crate::exit::{BAD_MODEL, Failure, INTERRUPTED, RUN_TIME};
use crate::open;
use crate::report::Report;
use crate::run::{check_flags, load_event, open_for_answers};

const HELP: &str = "\
/help         this text
/clear        forget the conversation (the system message stays)
/system TEXT  set the system message; without TEXT, drop it
/stats        what the last answer took
/exit         leave, as Ctrl-D does
A line that ends with \\ goes on in the next. Ctrl-C stops an answer; at the prompt it leaves.";

struct Chat<'a> {
    answerer: Answerer<'a>,
    session: Session,
    system: Option<String>,
    messages: Vec<Message>,
    last: Option<Statistics>,
    report: &'a Report,
}

pub(crate) fn chat(args: &ChatArgs, report: &Report) -> Result<(), Failure> {
    check_flags(&args.generate)?;
    let opened = open_for_answers(&args.model, &args.engine, &args.context, report)?;
    let model = &opened.model;
    open::tokenizer(model, &args.model)?;
    if model.chat_template().is_none() {
        let dir = args.model.display();
        let message = format!(
            "{dir}: has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json); use loris run --raw"
        );
        return Err(Failure::new(BAD_MODEL, message));
    }
    let answerer = Answerer::new(&args.generate, model, opened.load.as_secs_f64(), report)?;
    report.event("load", load_event(&args.model, &opened, &args.engine, answerer.settings()))?;
    let mut chat = Chat {
        answerer,
        session: model.session(&open::session_options(model, &args.context)?)?,
        system: args.system.clone(),
        messages: Vec::new(),
        last: None,
        report,
    };
    let mut input = Input::new()?;
    if input.is_terminal() {
        report.note("/help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves");
    }
    while let Some(line) = input.read()? {
        match line.trim() {
            "" => {}
            "/exit" | "/quit" | "/bye" => break,
            command if command.starts_with('/') => chat.command(command),
            _ => chat.turn(&line)?,
        }
    }
    Ok(())
}

impl Chat<'_> {
    fn command(&mut self, line: &str) {
        let (name, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        match name {
            "/help" => self.report.say(HELP),
            "/clear" => {
                self.messages.clear();
                let _ = self.session.truncate(0); // to nothing is always possible
            }
            "/system" => self.system = Some(rest.trim().to_owned()).filter(|s| !s.is_empty()),
            "/stats" => match &self.last {
                Some(statistics) => self.report.say(statistics.lines()),
                None => self.report.say("there was no answer yet"),
            },
            _ => self.report.say(format!("{name}: no such command; /help lists them")),
        }
    }

    /// One message and its answer. What goes wrong with it is said, and the conversation goes on without
    /// it, unless nobody listens any more.
    fn turn(&mut self, text: &str) -> Result<(), Failure> {
        self.messages.push(Message::new("user", text));
        match self.answer() {
            Ok(answer) => {
                self.messages.push(Message::new("assistant", answer));
                Ok(())
            }
            Err(failure) if failure.code == RUN_TIME || failure.code == INTERRUPTED => {
                self.messages.pop();
                self.report.error(&failure)
            }
            Err(failure) => Err(failure),
        }
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
            Finish::Eos | Finish::Stop => {}
        }
        self.last = Some(answer.statistics);
        Ok(answer.text)
    }

    /// The whole conversation, ready for the model.
    fn tokens(&self) -> Result<Vec<u32>, Failure> {
        let model = self.session.model();
        let system = self.system.iter().map(|text| Message::new("system", text.as_str()));
        let messages: Vec<_> = system.chain(self.messages.iter().cloned()).collect();
        let tokens = model.encode_chat(&messages, true)?;
        Ok(tokens.unwrap_or_default()) // both parts were there when the model was opened
    }
}

/// Where lines come from: an editor at a terminal, plain lines elsewhere.
enum Input {
    Editor(Box<DefaultEditor>),
    /// With a prompt where a person types.
    Lines(Option<&'static str>),
}

impl Input {
    fn new() -> Result<Self, Failure> {
        let typed = io::stdin().is_terminal();
        if !typed || !io::stdout().is_terminal() {
            // The editor would draw on stdout, which belongs to the answer.
            return Ok(Self::Lines(typed.then_some("> ")));
        }
        let editor = DefaultEditor::new().map_err(|e| terminal(&e))?;
        Ok(Self::Editor(Box::new(editor)))
    }

    fn is_terminal(&self) -> bool {
        !matches!(self, Self::Lines(None))
    }

    /// The next message or command; `None` at the end.
    fn read(&mut self) -> Result<Option<String>, Failure> {
        let Some(mut text) = self.line()? else { return Ok(None) };
        while text.ends_with('\\') {
            text.pop();
            text.push('\n');
            let Some(line) = self.line()? else { break };
            text.push_str(&line);
        }
        if let Self::Editor(editor) = self {
            let _ = editor.add_history_entry(text.as_str()); // a lost line of history is no loss
        }
        Ok(Some(text))
    }

    fn line(&mut self) -> Result<Option<String>, Failure> {
        match self {
            Self::Editor(editor) => match editor.readline("> ") {
                Ok(line) => Ok(Some(line)),
                Err(ReadlineError::Eof) => Ok(None),
                Err(ReadlineError::Interrupted) => Err(Failure::interrupted()),
                Err(e) => Err(terminal(&e)),
            },
            Self::Lines(prompt) => {
                if let Some(prompt) = prompt {
                    let mut err = io::stderr().lock();
                    let _ = write!(err, "{prompt}").and_then(|()| err.flush());
                }
                let mut line = String::new();
                let n = io::stdin().lock().read_line(&mut line).map_err(|e| {
                    Failure::new(RUN_TIME, format!("stdin: cannot read a line: {e}; send UTF-8"))
                })?;
                let text = line.strip_suffix('\n').unwrap_or(&line);
                Ok((n > 0).then(|| text.strip_suffix('\r').unwrap_or(text).to_owned()))
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
