//! Going on with a run that was interrupted: the answers that its file of samples has already.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;

use super::run::Outcome;
use super::tasks::{Seed, Task};
use crate::exit::{Failure, RUN_TIME};
use crate::files::{self, cannot_write};
use crate::variant::Variant;

/// A file of samples that is open for more, and the outcomes in it.
#[derive(Debug)]
pub(crate) struct Samples {
    pub(crate) file: File,
    pub(crate) outcomes: Vec<Outcome>,
}

/// Starts a new file, or goes on with the one that is there.
pub(crate) fn open(path: &Path, goes_on: bool, variants: &[Variant]) -> Result<Samples, Failure> {
    if !goes_on || !path.exists() {
        // In its place before there is anything in it: what an interrupted run has come to is wanted.
        let file = files::create(path)?.commit().map_err(|e| cannot_write(path, &e))?;
        return Ok(Samples { file, outcomes: Vec::new() });
    }
    if !path.is_file() {
        let message = format!("{}: cannot go on with what is no regular file", path.display());
        return Err(Failure::new(RUN_TIME, message));
    }
    let cannot_read = |e| Failure::new(RUN_TIME, format!("{}: cannot read: {e}", path.display()));
    let (mut lines, mut is_whole) = (BTreeMap::new(), true);
    for line in BufReader::new(File::open(path).map_err(cannot_read)?).split(b'\n') {
        // The last line may have been cut off.
        let parsed = serde_json::from_slice(&line.map_err(cannot_read)?);
        is_whole = parsed.is_ok();
        if let Some(outcome) = parsed.ok().and_then(|line| Outcome::from_json(&line, variants)) {
            let Outcome { variant, task, seed: Seed { seed, len, idx }, turn, .. } = outcome;
            lines.insert((variant, task.name(), seed, len, idx, turn), outcome);
        }
    }
    let mut file =
        OpenOptions::new().append(true).open(path).map_err(|e| cannot_write(path, &e))?;
    if !is_whole {
        writeln!(file).map_err(|e| cannot_write(path, &e))?;
    }
    let all: Vec<Outcome> = lines.into_values().collect();
    let outcomes = all.iter().filter(|o| has(&all, o.variant, o.task, o.seed)).cloned().collect();
    Ok(Samples { file, outcomes })
}

/// True if every turn of a sample is among the outcomes.
pub(crate) fn has(outcomes: &[Outcome], variant: usize, task: Task, seed: Seed) -> bool {
    let of = |o: &&Outcome| (o.variant, o.task, o.seed) == (variant, task, seed);
    outcomes.iter().filter(of).count() == task.n_turns()
}
