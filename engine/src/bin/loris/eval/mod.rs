//! `loris eval`: how well a model answers from long contexts, and what a policy changes about that.
//!
//! `variant` (beside this folder) says which policies there are; `tasks`, `needles` and `lists` make a `sample` from words,
//! `fit` gives it a length, `prompt` makes it tokens, `run` asks the model, `grade` looks at the answer;
//! `resume` reads the answers of an earlier run;
//! `prose` compares predictions of a text; `stats`, `rows` and `plot` make something to look at of it.
//!
//! Every variant gets the same samples, one right after the other and in changing order, so that a machine
//! whose speed drifts favours none. The models of all variants are open at once; variants that need the
//! same model share it.

mod filler;
mod fit;
mod grade;
mod lists;
mod needles;
mod plot;
mod prompt;
mod prose;
mod resume;
mod rng;
mod rows;
mod run;
mod sample;
mod stats;
pub(crate) mod tasks;
mod words;

use std::fs::File;
use std::io::Write;
use std::time::Instant;

use indicatif::ProgressBar;
use loris::loader::{ModelConfig, Special};
use loris::{Model, ModelOptions, Session, SessionOptions};
use serde_json::json;

use crate::args::EvalArgs;
use crate::exit::{Failure, INTERRUPTED, USAGE};
use crate::files::{self, cannot_write};
use crate::interrupt::Guard;
use crate::open;
use crate::prompt::read_file;
use crate::report::{Report, Unit, peak_bytes};
use crate::variant::{Variant, same_models, variants};

use filler::Filler;
use fit::{Misfit, fit};
use prompt::Prompter;
use rows::{Results, Row};
use run::Place;
use tasks::{LENS, Seed, TASKS, Task};

/// Tokens that a later turn's question may take.
const TURN_ROOM: usize = 256;
/// What the tail of a session's tables takes at most where pages are sealed, in pages.
const N_TAIL_PAGES: usize = 72;

/// All that a run needs.
struct Bench<'a> {
    args: &'a EvalArgs,
    report: &'a Report,
    tasks: Vec<Task>,
    variants: Vec<Variant>,
    /// Of each variant.
    models: Vec<Model>,
    filler: Filler,
    /// Tokens of the user's text, for `prose`.
    text: Vec<u32>,
}

/// What every sample needs.
struct Desk<'a> {
    prompter: &'a Prompter<'a>,
    guard: &'a Guard,
    bar: &'a ProgressBar,
}

pub(crate) fn eval(args: &EvalArgs, report: &Report) -> Result<(), Failure> {
    let tasks = check(args)?;
    let longest = longest(args, &tasks);
    let base = args.size.model_options(None);
    let session = SessionOptions { ctx_len: Some(longest), ..SessionOptions::default() };
    let mut variants = variants(&args.policies, &base, &session)?;
    let text = args.text.as_deref().map(read_file).transpose()?;
    let filler = match &text {
        Some(text) => Filler::from_text(text)
            .ok_or_else(|| Failure::new(USAGE, "--text: the file has no words"))?,
        None => Filler::Synthetic,
    };
    let mut samples = None;
    if let Some(path) = &args.csv {
        files::create(path)?; // and dropped: it can be written to
    }
    let mut results = Results::default();
    if let Some(path) = &args.samples {
        let opened = resume::open(path, args.resume, &variants)?;
        (samples, results.outcomes) = (Some(opened.file), opened.outcomes);
    }
    if let Some(dir) = &args.svg {
        std::fs::create_dir_all(dir).map_err(|e| cannot_write(dir, &e))?;
    }
    let models = open_models(args, report, &variants, longest, tasks.contains(&Task::Prose))?;
    for variant in &mut variants {
        variant.fit(models[0].plan().n_layers)?;
    }
    let text = match tasks.contains(&Task::Prose) {
        true => open::tokenizer(&models[0], &args.dir)?
            .encode(text.as_deref().unwrap_or_default(), Special::Plain)?,
        false => Vec::new(),
    };
    let bench = Bench { args, report, tasks, variants, models, filler, text };

    let started = Instant::now();
    let outcome = bench.run(&mut results, &mut samples);
    match outcome {
        Err(failure) if failure.code != INTERRUPTED => return Err(failure),
        _ => bench.finish(&results, started.elapsed().as_secs_f64())?,
    }
    outcome // an interrupted run has shown what it had, and still says that it was interrupted
}

impl Bench<'_> {
    fn run(&self, results: &mut Results, samples: &mut Option<File>) -> Result<(), Failure> {
        let (args, model) = (self.args, &self.models[0]);
        let tokenizer = open::tokenizer(model, &args.dir)?;
        let is_chat = !args.raw && model.chat_template().is_some();
        if !is_chat && !args.raw {
            self.report
                .note("note: the folder has no chat template; prompts are texts to go on with");
        }
        let prompter = Prompter { model, tokenizer, is_chat };
        self.report.event("load", self.settings(is_chat))?;
        let idle = model.session(&SessionOptions::default())?;
        let guard = Guard::new(&idle);
        self.warm_up(&guard)?;
        let bar = self.report.bar("evaluating", Unit::Tokens, self.n_tokens());
        let desk = Desk { prompter: &prompter, guard: &guard, bar: &bar };
        let outcome = self.each(&desk, results, samples);
        bar.finish_and_clear();
        outcome
    }

    /// A sample of each task and length, then the next of each: what was done when a run is interrupted
    /// has as many of one as of another.
    fn each(
        &self,
        desk: &Desk<'_>,
        results: &mut Results,
        samples: &mut Option<File>,
    ) -> Result<(), Failure> {
        let args = self.args;
        for idx in 0..args.samples_per_task.max(args.prose_windows) {
            for &len in &args.lens {
                for &task in &self.tasks {
                    let seed = Seed { seed: args.seed, len, idx };
                    if task == Task::Prose {
                        self.prose(seed, desk, results)?;
                    } else if idx < args.samples_per_task {
                        self.sample(task, seed, desk, results, samples)?;
                    }
                    if desk.guard.interrupted() {
                        return Err(Failure::interrupted());
                    }
                }
            }
        }
        Ok(())
    }

    /// Brings weights and buffers into memory, so that the first sample's time is like the others'.
    fn warm_up(&self, guard: &Guard) -> Result<(), Failure> {
        for (model, variant) in self.models.iter().zip(&self.variants) {
            let mut session: Session = model.session(&variant.session)?;
            guard.turn_to(&session);
            session.prefill(&vec![0; *LENS.start()])?;
            session.decode(0)?;
        }
        Ok(())
    }

    fn sample(
        &self,
        task: Task,
        seed: Seed,
        desk: &Desk<'_>,
        results: &mut Results,
        samples: &mut Option<File>,
    ) -> Result<(), Failure> {
        let Desk { prompter, guard, bar } = desk;
        let n = self.variants.len();
        let is_done = |variant| resume::has(&results.outcomes, variant, task, seed);
        let done: Vec<bool> = (0..n).map(is_done).collect();
        bar.inc((seed.len * done.iter().filter(|is_done| **is_done).count()) as u64);
        if done.iter().all(|is_done| *is_done) {
            return Ok(());
        }
        let fitted = fit(task, seed, &self.filler, &mut |sample| prompter.first(sample));
        let fitted = fitted.map_err(|misfit| match misfit {
            Misfit::Encode(failure) => failure,
            Misfit::TooShort { least } => {
                let (len, name) = (seed.len, task.name());
                let message =
                    format!("--lens {len}: the shortest prompt of {name} has {least} tokens");
                Failure::new(USAGE, message)
            }
        })?;
        for turn in 0..n {
            let variant = (seed.idx + turn) % n; // the order changes from sample to sample
            if done[variant] {
                continue;
            }
            let place = Place {
                variant,
                model: &self.models[variant],
                session: &self.variants[variant].session,
                guard,
                prompter,
                max_tokens: self.args.max_tokens.unwrap_or(task.max_tokens()),
            };
            let outcomes = run::run(&place, task, seed, &fitted)?;
            bar.inc(seed.len as u64);
            for outcome in outcomes {
                let line = outcome.json(&self.variants[variant].name);
                if let (Some(file), Some(path)) = (samples.as_mut(), &self.args.samples) {
                    writeln!(file, "{line}").map_err(|e| cannot_write(path, &e))?;
                }
                self.report.event("sample", line)?;
                results.outcomes.push(outcome);
            }
        }
        Ok(())
    }

    /// One window of prose; the windows are spread over the text.
    fn prose(&self, seed: Seed, desk: &Desk<'_>, results: &mut Results) -> Result<(), Failure> {
        let Seed { len, idx, .. } = seed;
        let n_there = self.text.len() / len;
        let n = n_there.min(self.args.prose_windows);
        if n == 0 {
            let message = format!(
                "--text: has {} tokens, fewer than one window of {len}; give a longer one or leave out prose",
                self.text.len()
            );
            return Err(Failure::new(USAGE, message));
        }
        if idx >= n {
            return Ok(());
        }
        let at = idx * n_there / n * len;
        let places: Vec<_> =
            self.models.iter().zip(&self.variants).map(|(m, v)| (m, &v.session)).collect();
        let window = match self.variants.iter().any(Variant::prunes) {
            true => prose::tail,
            false => prose::window,
        };
        let measures = window(&places, desk.guard, &self.text[at..at + len], &mut |n| {
            desk.bar.inc(n as u64);
        })?;
        results.windows.push((len, measures));
        Ok(())
    }

    /// Tokens of all prompts, for the bar.
    fn n_tokens(&self) -> usize {
        let n_of = |task: &Task| match task {
            Task::Prose => self.args.prose_windows,
            _ => self.args.samples_per_task,
        };
        let n: usize = self.tasks.iter().map(n_of).sum();
        let lens = self.args.lens.iter().fold(0_usize, |sum, &len| sum.saturating_add(len));
        lens.saturating_mul(n).saturating_mul(self.variants.len())
    }

    fn settings(&self, is_chat: bool) -> serde_json::Value {
        let args = self.args;
        let model = &self.models[0];
        let names: Vec<_> = self.variants.iter().map(|variant| variant.name.as_str()).collect();
        let tasks: Vec<_> = self.tasks.iter().map(|task| task.name()).collect();
        json!({
            "model": args.dir.display().to_string(), "device": model.placement().device,
            "kv_format": model.plan().kv.to_string(),
            "threads": open::n_threads(&args.engine), "policies": names, "tasks": tasks,
            "lens": args.lens, "samples_per_task": args.samples_per_task, "seed": args.seed,
            "prose_windows": args.prose_windows, "chat": is_chat,
            "text": args.text.as_ref().map(|path| path.display().to_string()),
        })
    }

    /// Shows and writes what there is.
    fn finish(&self, results: &Results, seconds: f64) -> Result<(), Failure> {
        let Self { args, report, variants, .. } = self;
        let rows: Vec<Row> = rows::rows(results, &self.tasks, &args.lens, variants.len());
        if let Some(path) = &args.csv {
            files::write(files::create(path)?, &rows::csv(&rows, variants))?;
        }
        if let (Some(dir), false) = (&args.svg, results.outcomes.is_empty()) {
            plot::write(dir, results, variants, &args.lens)?;
        }
        for row in &rows {
            report.event("row", rows::json(row, variants))?;
        }
        let done = json!({
            "rows": rows.len(), "samples": results.outcomes.len(),
            "seconds": crate::report::rounded(seconds), "peak_bytes": peak_bytes(),
        });
        report.event("done", done)?;
        if !report.is_json() {
            report.print(&rows::table(&rows, variants))?;
            report.note(format!("{} answers in {seconds:.1} s", results.outcomes.len()));
        }
        Ok(())
    }
}

/// Refuses what makes no sense; gives the tasks.
fn check(args: &EvalArgs) -> Result<Vec<Task>, Failure> {
    let usage = |message: String| Err(Failure::new(USAGE, message));
    let tasks: Vec<Task> = match args.tasks.as_slice() {
        [] => TASKS.map(|(task, _)| task).into_iter().collect(),
        tasks => tasks.to_vec(),
    };
    // Among all tasks `prose` is left out where there is none.
    let keep = |&task: &Task| task != Task::Prose || args.text.is_some();
    if !args.tasks.is_empty() && !tasks.iter().all(keep) {
        return usage("--tasks prose: needs a text; give --text FILE".into());
    }
    let tasks: Vec<Task> = tasks.into_iter().filter(keep).collect();
    for (idx, task) in tasks.iter().enumerate() {
        if tasks[..idx].contains(task) {
            return usage(format!("--tasks {}: given twice", task.name()));
        }
    }
    for (idx, &len) in args.lens.iter().enumerate() {
        if args.lens[..idx].contains(&len) {
            return usage(format!("--lens {len}: given twice"));
        }
    }
    Ok(tasks)
}

/// Tokens of the longest session.
fn longest(args: &EvalArgs, tasks: &[Task]) -> usize {
    let beyond = |task: &Task| match task {
        Task::Prose => 0,
        _ => {
            let answer = args.max_tokens.unwrap_or(task.max_tokens());
            task.n_turns() * answer + (task.n_turns() - 1) * TURN_ROOM
        }
    };
    let len = args.lens.iter().copied().max().unwrap_or(0);
    len + tasks.iter().map(beyond).max().unwrap_or(0)
}

/// A model for each variant. Variants whose options of the model are the same share one.
fn open_models(
    args: &EvalArgs,
    report: &Report,
    variants: &[Variant],
    longest: usize,
    has_prose: bool,
) -> Result<Vec<Model>, Failure> {
    let same = same_models(variants);
    let mut models: Vec<Model> = Vec::new();
    for (idx, variant) in variants.iter().enumerate() {
        if same[idx] < idx {
            models.push(models[same[idx]].clone());
            continue;
        }
        // A window of prose is open in all variants at once, a sample in one.
        let n_sessions = if has_prose { same.iter().filter(|&&s| s == idx).count() } else { 1 };
        let rows = if has_prose { prose::ROWS } else { variant.model.batch };
        // A page of its own at either end of each.
        let page_len = args.size.page_len.max(1);
        let tail = if variant.model.kv.are_sealed() { N_TAIL_PAGES * page_len } else { 0 };
        let n_tokens =
            (longest.next_multiple_of(page_len) + page_len + tail).saturating_mul(n_sessions);
        let options = ModelOptions {
            kv_tokens: Some(n_tokens),
            aux_tokens: if variants.iter().any(Variant::prunes) { n_tokens } else { 0 },
            batch: rows,
            ..variant.model.clone()
        };
        let check = |config: &ModelConfig| match open::has_room(config, longest) {
            true => Ok(()),
            false => {
                let message = format!(
                    "--lens: prompts and answers take up to {longest} tokens, and the model's context is {}",
                    config.ctx_len
                );
                Err(Failure::new(USAGE, message))
            }
        };
        models.push(open::open(&args.dir, &args.engine, options, &check, report)?.model);
    }
    Ok(models)
}
