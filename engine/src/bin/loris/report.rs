//! What is said beside the answer: bars, notes and statistics on stderr, JSON events on stdout.
//!
//! Bars exist only where stderr is a terminal and nobody asked for silence or JSON; everything else that
//! is written there stays readable in a file. Colour follows `--color`, then `NO_COLOR`, then
//! `CLICOLOR_FORCE`, then the terminal.

use std::fmt::Display;
use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::{Value, json};

use crate::args::{OutputArgs, When};
use crate::exit::{Failure, INTERRUPTED};

/// What a bar counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unit {
    Bytes,
    Tokens,
}

/// Where and how the program speaks.
#[derive(Debug)]
pub(crate) struct Report {
    quiet: bool,
    json: bool,
    bars: bool,
    color: bool,
}

impl Report {
    pub(crate) fn new(args: &OutputArgs) -> Self {
        let is_terminal = io::stderr().is_terminal();
        let is_set = |name| std::env::var_os(name).is_some_and(|value| !value.is_empty());
        let is_forced =
            std::env::var_os("CLICOLOR_FORCE").is_some_and(|v| !v.is_empty() && v != "0");
        let is_dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
        let color = match args.color {
            When::On => true,
            When::Off => false,
            When::Auto => !is_set("NO_COLOR") && (is_forced || is_terminal && !is_dumb),
        };
        let bars = is_terminal && !is_dumb && !args.quiet && !args.json;
        Self { quiet: args.quiet, json: args.json, bars, color }
    }

    pub(crate) fn is_json(&self) -> bool {
        self.json
    }

    /// A bar; invisible where bars are not wanted.
    pub(crate) fn bar(&self, what: &'static str, unit: Unit, total: usize) -> ProgressBar {
        let target = match self.bars {
            true => ProgressDrawTarget::stderr(),
            false => ProgressDrawTarget::hidden(),
        };
        let template = match unit {
            Unit::Bytes => "{msg} {bar:30} {bytes}/{total_bytes} {bytes_per_sec} ETA {eta}",
            Unit::Tokens => "{msg} {bar:30} {pos}/{len} tokens {per_sec} ETA {eta}",
        };
        let style = ProgressStyle::with_template(template)
            .unwrap_or_else(|_| ProgressStyle::default_bar())
            .progress_chars("=> ");
        let bar = ProgressBar::with_draw_target(Some(total as u64), target)
            .with_style(style)
            .with_message(what);
        if total > 0 {
            bar.tick(); // a first chunk can take long
        }
        bar
    }

    /// Something worth knowing that is not an error; not under `--quiet` or `--json`.
    pub(crate) fn note(&self, text: impl Display) {
        if !self.quiet && !self.json {
            self.say(text);
        }
    }

    /// A line on stderr, dimmed where there is colour. A stderr that is gone is no reason to stop.
    pub(crate) fn say(&self, text: impl Display) {
        let mut err = io::stderr().lock();
        let _ = match self.color {
            true => writeln!(err, "\x1b[2m{text}\x1b[0m"),
            false => writeln!(err, "{text}"),
        };
    }

    /// One JSON event on a line of stdout, if JSON was asked for.
    pub(crate) fn event(&self, name: &str, mut fields: Value) -> Result<(), Failure> {
        if !self.json {
            return Ok(());
        }
        fields["event"] = name.into();
        self.print(&format!("{fields}\n"))
    }

    /// Text on stdout, at once.
    pub(crate) fn print(&self, text: &str) -> Result<(), Failure> {
        let mut out = io::stdout().lock();
        out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(|e| Failure::stdout(&e))
    }

    /// Says why something failed: a line on stderr, and the `error` event.
    pub(crate) fn error(&self, failure: &Failure) -> Result<(), Failure> {
        let message = failure.message.replace(['\n', '\r'], " ");
        let mut err = io::stderr().lock();
        let _ = match (failure.code, self.color) {
            (INTERRUPTED, _) => writeln!(err, "{message}"),
            (_, true) => writeln!(err, "\x1b[1;31merror:\x1b[0m {message}"),
            (_, false) => writeln!(err, "error: {message}"),
        };
        self.event("error", json!({ "code": failure.code, "message": message }))
    }

    /// Says why the program ends, and gives its exit code.
    pub(crate) fn failure(&self, failure: &Failure) -> ExitCode {
        if !failure.message.is_empty() {
            let _ = self.error(failure); // with stdout gone, the exit code still tells
        }
        ExitCode::from(failure.code)
    }
}

/// A number with three digits behind the point, for JSON.
pub(crate) fn rounded(x: f64) -> Value {
    json!((x * 1e3).round() / 1e3)
}

/// Bytes for people.
pub(crate) fn bytes(n: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KB", "MB", "GB", "TB"];
    #[allow(clippy::cast_precision_loss)] // shown with three digits
    let mut n = n as f64;
    let mut unit = 0;
    while n >= 1e3 && unit + 1 < UNITS.len() {
        n /= 1e3;
        unit += 1;
    }
    match unit {
        0 => format!("{n} B"),
        _ => format!("{n:.1} {}", UNITS[unit]),
    }
}

/// The most memory that this process ever held (mapped weights that were touched count), where the
/// system says so.
pub(crate) fn peak_bytes() -> Option<u64> {
    status("VmHWM:")
}

/// The memory that it holds now, its own alone: mapped weights do not count.
pub(crate) fn resident_bytes() -> Option<u64> {
    status("RssAnon:")
}

fn status(name: &str) -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(name))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

/// The value below which a share `p` of sorted values lies (nearest rank); `None` of nothing.
pub(crate) fn quantile(sorted: &[f64], p: f64) -> Option<f64> {
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss)]
    let rank = (sorted.len() as f64 * p).ceil() as usize;
    sorted.get(rank.saturating_sub(1)).copied()
}
