//! Files that are written whole or not at all.

use std::fs::File;
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

/// A file on its way to the place that a path names.
///
/// It is written beside its place, under a name of its own and readable by its owner alone, and [`commit`](Self::commit)
/// moves it there. Whoever opens the path meets the file that was there before or the new one, whole, also after a
/// crash; of several writers the last one's stays. Dropped instead, it leaves nothing.
///
/// Where the path is a symbolic link, the file that it leads to is replaced and the link stays. What is no regular file - a
/// folder, a device, a pipe, a link that leads nowhere - is refused before anything is written.
///
/// ```
/// use std::io::Write;
///
/// let folder = tempfile::tempdir()?;
/// let path = folder.path().join("answer");
/// let mut file = loris::NewFile::create(&path)?;
/// file.write_all(b"42")?;
/// assert!(!path.exists());
/// file.commit()?;
/// assert_eq!(std::fs::read(&path)?, b"42");
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Debug)]
pub struct NewFile {
    path: PathBuf,
    temporary: NamedTempFile,
    /// At the end of links.
    place: PathBuf,
    /// What keeps the file's name; `None`: it cannot be opened, and so not synced.
    folder: Option<File>,
}

impl NewFile {
    /// Begins a file. Fails where it could not be moved to its place.
    pub fn create(path: &Path) -> io::Result<Self> {
        let place = place(path)?;
        let folder = match place.parent() {
            Some(folder) if folder != Path::new("") => folder,
            _ => Path::new("."),
        };
        folder.metadata()?; // which says so without the temporary's name
        let temporary =
            tempfile::Builder::new().prefix(".loris-").suffix(".part").tempfile_in(folder)?;
        let folder = File::open(folder).ok();
        Ok(Self { path: path.into(), temporary, place, folder })
    }

    /// The path as it was given.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Moves the file to its place once it is on the disk, and gives it back for those that go on writing. After an
    /// error the file that was there before is still there; only where the folder could not be written to the disk at
    /// last, the new one is.
    pub fn commit(self) -> io::Result<File> {
        self.temporary.as_file().sync_all()?;
        let file = self.temporary.persist(&self.place)?;
        match self.folder.map_or(Ok(()), |folder| folder.sync_all()) {
            Err(e) if e.kind() != ErrorKind::InvalidInput => Err(e), // file systems without that for folders
            _ => Ok(file),
        }
    }
}

impl Write for NewFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.temporary.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.temporary.flush()
    }
}

/// Where a file of this path belongs.
fn place(path: &Path) -> io::Result<PathBuf> {
    let refuse = |kind, what| {
        Err(io::Error::new(kind, format!("{what}; expected a regular file, or nothing there")))
    };
    if path.file_name().is_none() || path.as_os_str().as_encoded_bytes().ends_with(b"/") {
        return refuse(ErrorKind::InvalidInput, "is no name of a file");
    }
    let link = match path.symlink_metadata() {
        Ok(facts) => facts.is_symlink(),
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(path.into()),
        Err(e) => return Err(e),
    };
    match path.metadata() {
        Ok(facts) if facts.is_dir() => refuse(ErrorKind::IsADirectory, "is a folder"),
        Ok(facts) if !facts.is_file() => {
            refuse(ErrorKind::InvalidInput, "is a device, a pipe or a socket")
        }
        Ok(_) if link => path.canonicalize(),
        Ok(_) => Ok(path.into()),
        Err(e) if e.kind() == ErrorKind::NotFound => {
            refuse(ErrorKind::NotFound, "is a symbolic link that leads nowhere")
        }
        Err(e) => Err(e),
    }
}
