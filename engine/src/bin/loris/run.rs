//! `loris run`: one prompt, one answer.

use std::path::Path;
use std::time::Instant;

use loris::{Error, Finish, Model, SamplerParams, Session, SessionOptions};
use serde_json::{Value, json};

use crate::answer::{Answer, Answerer, DEAD_END, sampling};
use crate::args::{ContextArgs, EngineArgs, GenerateArgs, RunArgs};
use crate::exit::{Failure, RUN_TIME, USAGE};
use crate::files;
use crate::grammar;
use crate::open::{self, Opened};
use crate::prompt::{self, Prompt, Templating};
use crate::report::Report;

pub(crate) fn run(args: &RunArgs, report: &Report) -> Result<(), Failure> {
    let grammar = check_flags(&args.generate, report)?;
    if args.prompt_logprobs.is_some() {
        needs_json("--prompt-logprobs", report)?;
    }
    if let Some(path) = &args.save_state {
        files::create(path)?; // and dropped: it can be written to
    }
    open::engine(&args.engine)?;
    open::check_dir(&args.model)?;
    let prompt = prompt::prompt(args)?;
    let prompt = prompt.filter(|p| !matches!(p, Prompt::Text(text) if text.is_empty()));
    if prompt.is_none() && args.load_state.is_none() {
        let message = "there is no prompt; give -p TEXT or -f FILE, or pipe text to stdin";
        return Err(Failure::new(USAGE, message));
    }

    let opened = open_for_answers(&args.model, &args.engine, &args.context, report)?;
    let model = &opened.model;
    let tokenizer = open::tokenizer(model, &args.model)?;
    let grammar = grammar.map(|source| source.compile(model)).transpose()?;
    let load_s = opened.load.as_secs_f64();
    let mut answerer = Answerer::new(&args.generate, model, grammar, load_s, report)?;
    answerer.prompt_logprobs = args.prompt_logprobs;
    report.event("load", load_event(&args.model, &opened, &args.engine, answerer.settings()))?;
    let templating = Templating::new(model, &args.model, &args.template)?;
    if !args.raw && !templating.is_there() {
        report.note("note: the folder has no chat template; the prompt goes in as it is");
    }
    let mut session = session(args, model)?;

    let started = Instant::now();
    let tokens = match prompt {
        None => Vec::new(),
        Some(prompt) => prompt::encode(&templating, tokenizer, args, prompt)?,
    };
    let mut answer = answerer.answer(&mut session, &tokens, started)?;
    if let Some(path) = &args.save_state {
        save(&session, path)?; // also where nobody reads the answer any more
    }
    if let Some(failure) = answer.failure.take() {
        return Err(failure);
    }
    if !report.is_json() && !answer.text.is_empty() && !answer.text.ends_with('\n') {
        report.print("\n")?;
    }
    finish(&answerer, &answer, report)
}

/// Statistics, and the exit code of an answer that was interrupted.
fn finish(answerer: &Answerer<'_>, answer: &Answer, report: &Report) -> Result<(), Failure> {
    let mut event = answer.statistics.event();
    event["settings"] = answerer.settings();
    report.event("done", event)?;
    report.note(answer.statistics.lines());
    match answer.statistics.finish {
        Finish::Cancelled => Err(Failure::interrupted()),
        Finish::DeadEnd => Err(Failure::new(RUN_TIME, DEAD_END)),
        _ => Ok(()),
    }
}

/// Refuses flags that no model could make sense of, before one is opened; gives the grammar that they ask for.
pub(crate) fn check_flags(
    args: &GenerateArgs,
    report: &Report,
) -> Result<Option<grammar::Source>, Failure> {
    let params: SamplerParams = sampling(args, &Default::default());
    params.check()?;
    if args.logprobs.is_some() {
        needs_json("--logprobs", report)?;
    }
    grammar::Source::read(args)
}

fn needs_json(flag: &str, report: &Report) -> Result<(), Failure> {
    match report.is_json() {
        true => Ok(()),
        false => Err(Failure::new(USAGE, format!("{flag}: is shown in events; add --json"))),
    }
}

/// Opens a folder for sessions that are used one at a time.
pub(crate) fn open_for_answers(
    dir: &Path,
    engine: &EngineArgs,
    context: &ContextArgs,
    report: &Report,
) -> Result<Opened, Failure> {
    let check = |config: &_| open::check_context(context, config);
    open::open(dir, engine, context.model_options(), &check, report)
}

/// The fields of a `load` event.
pub(crate) fn load_event(
    dir: &Path,
    opened: &Opened,
    engine: &EngineArgs,
    settings: Value,
) -> Value {
    let plan = opened.model.plan();
    json!({
        "model": dir.display().to_string(),
        "architecture": format!("{:?}", opened.model.config().architecture).to_lowercase(),
        "load_s": crate::report::rounded(opened.load.as_secs_f64()),
        "weight_bytes": plan.weight_bytes,
        "device": opened.model.placement().device,
        "threads": open::n_threads(engine),
        "kv_format": plan.kv.to_string(),
        "page_len": plan.layout.page_len,
        "chunk": plan.chunk,
        "settings": settings,
    })
}

/// An empty session, or the saved one.
fn session(args: &RunArgs, model: &Model) -> Result<Session, Failure> {
    let options = SessionOptions {
        trust_old_state: args.trust_old_state,
        ..open::session_options(model, &args.context)?
    };
    let Some(path) = &args.load_state else { return Ok(model.session(&options)?) };
    model.restore_file(path, &options).map_err(|e| match e {
        Error::SavedState { field: "version", .. } => {
            Failure::new(RUN_TIME, format!("{}: {e}", path.display()))
        }
        Error::SavedState { .. } => Failure::new(
            RUN_TIME,
            format!(
                "{}: {e}; save it again with this model, --kv, --lazy, --window or --evict",
                path.display()
            ),
        ),
        Error::Io { source, .. } => {
            let path = path.display();
            let message =
                format!("{path}: cannot open the saved session: {source}; --save-state makes one");
            Failure::new(RUN_TIME, message)
        }
        Error::Option { name: "lazy", .. } if args.context.lazy.is_none() => {
            let path = path.display();
            let message =
                format!("{path}: the saved session prunes; give the --lazy that it was made with");
            Failure::new(RUN_TIME, message)
        }
        e => e.into(),
    })
}

/// Saves the session, which holds all that was shown, whatever ended the answer; the file is complete or not there.
fn save(session: &Session, path: &Path) -> Result<(), Failure> {
    session.save_file(path).map_err(|e| {
        Failure::new(RUN_TIME, format!("{}: cannot save the session: {e}", path.display()))
    })
}
