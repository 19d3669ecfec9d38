//! Files that the program leaves behind, each whole or not at all. Before the work each is begun and dropped, so that a path
//! which cannot be written to is noticed then, and nothing of it is left where the program is interrupted.

use std::io::{self, Write};
use std::path::Path;

use loris::NewFile;

use crate::exit::{Failure, RUN_TIME};

/// Begins a file.
pub(crate) fn create(path: &Path) -> Result<NewFile, Failure> {
    NewFile::create(path).map_err(|e| cannot_write(path, &e))
}

/// Writes a file that was begun.
pub(crate) fn write(mut file: NewFile, text: &str) -> Result<(), Failure> {
    let path = file.path().to_owned();
    let written = file.write_all(text.as_bytes()).and_then(|()| file.commit());
    written.map(drop).map_err(|e| cannot_write(&path, &e))
}

pub(crate) fn cannot_write(path: &Path, e: &io::Error) -> Failure {
    Failure::new(RUN_TIME, format!("{}: cannot write: {e}", path.display()))
}
