//! `loris`: a model folder in, streamed text out.
//!
//! One file per concern: `args` is what users type, `exit` what the shell is told, `report` what goes to
//! stderr and into JSON events, `interrupt` what Ctrl-C does, `open` and `prompt` lead to a session and
//! its tokens, `grammar` says which tokens an answer may have, `answer` runs one prompt and counts. Each subcommand is one file on top of these.
//!
//! stdout carries the answer and nothing else. Everything that this program does goes through the public
//! API of the library, so each file is also an example of its use.

mod answer;
mod args;
mod bench;
mod chat;
mod compare;
mod devices;
mod eval;
mod exit;
mod files;
mod grammar;
mod inspect;
mod interrupt;
mod measure;
mod open;
mod perplexity;
mod prompt;
mod report;
mod run;
mod variant;

use std::process::ExitCode;

use clap::Parser;

use args::{Cli, Command};
use report::Report;

fn main() -> ExitCode {
    let Cli { command, output } = Cli::parse(); // a usage error ends the process with code 2
    let report = Report::new(&output);
    let outcome = interrupt::install().and_then(|()| match &command {
        Command::Run(args) => run::run(args, &report),
        Command::Chat(args) => chat::chat(args, &report),
        Command::Inspect(args) => inspect::inspect(args, &report),
        Command::Bench(args) => bench::bench(args, &report),
        Command::Perplexity(args) => perplexity::perplexity(args, &report),
        Command::Eval(args) => eval::eval(args, &report),
        Command::Devices => devices::devices(&report),
    });
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => report.failure(&failure),
    }
}
