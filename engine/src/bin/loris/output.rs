//! Files that are written when the work is done: whether they can be is looked at before it begins.

use std::fs::OpenOptions;
use std::io::{Error, ErrorKind};
use std::path::Path;

use crate::exit::{Failure, RUN_TIME};

/// Fails where a file cannot be made, and touches none that is there: another one is made beside it, and removed.
pub(crate) fn check(path: &Path) -> Result<(), Failure> {
    probe(path).map_err(|e| cannot_write(path, &e))
}

/// A file did not take what was to be written.
pub(crate) fn cannot_write(path: &Path, e: &Error) -> Failure {
    Failure::new(RUN_TIME, format!("{}: cannot write: {e}", path.display()))
}

fn probe(path: &Path) -> Result<(), Error> {
    match path.symlink_metadata() {
        Ok(there) if there.is_dir() => return Err(ErrorKind::IsADirectory.into()),
        Ok(there) if !there.is_file() => return Ok(()), // a device or a link: only writing tells
        Err(e) if e.kind() != ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    if path.file_name().is_none() {
        return Err(ErrorKind::InvalidFilename.into());
    }
    let beside = path.with_file_name(format!(".loris-{}", std::process::id()));
    OpenOptions::new().write(true).create_new(true).open(&beside)?;
    std::fs::remove_file(beside)
}
