//! The bytes of a weight file, mapped or read: the only file of this crate with `unsafe`.
//!
//! [`LoadMode::Mmap`] maps the file privately and read-only, so that weights cost no copy and are shared with the page
//! cache. Its price: a process that truncates the file while it is mapped makes the next access to the lost pages die
//! with SIGBUS, which no Rust code can turn into an error, and one that writes into it changes the weights.
//! Replace a checkpoint by writing a new file and renaming it over the old one; the map keeps the old file alive.
//! [`LoadMode::Read`] copies the file into memory once, aligned to a cache line, and is immune to both.
//!
//! [`Storage::check_unchanged`] compares the file's length and time with those at opening; the engine calls it before each
//! prompt. Files under 8 bytes are never mapped.

use std::fmt;
use std::fs::{File, Metadata};
use std::io::Read;
use std::ops::{Deref, DerefMut, Range};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use memmap2::{Mmap, MmapOptions};

use crate::error::Error;
use crate::json;

/// How weight files come into memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LoadMode {
    /// Map them: no copy, pages come in on first use.
    #[default]
    Mmap,
    /// Read them whole: for files that others may truncate or rewrite.
    Read,
}

/// The bytes of one weight file, or of one tensor that was made in memory.
pub struct Storage {
    /// The file, or a name for what was made in memory.
    pub path: PathBuf,
    backing: Backing,
}

enum Backing {
    Map { map: Mmap, file: File, was: Facts },
    Heap(AlignedBytes),
}

/// What `fstat` said when the file was opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Facts {
    len: u64,
    modified: Option<SystemTime>,
}

impl Facts {
    fn of(meta: &Metadata) -> Facts {
        Facts { len: meta.len(), modified: meta.modified().ok() }
    }

    fn describe(&self) -> String {
        let since = self.modified.and_then(|time| time.duration_since(SystemTime::UNIX_EPOCH).ok());
        let seconds = since.map_or(0.0, |time| time.as_secs_f64());
        format!("{} bytes modified at {seconds:.3}", self.len)
    }
}

impl Storage {
    /// Opens a weight file.
    pub fn open(path: &Path, mode: LoadMode) -> Result<Storage, Error> {
        let io = |action| move |source| Error::Io { file: path.into(), action, source };
        if !json::is_there(path)? {
            return Err(io("open")(std::io::ErrorKind::NotFound.into()));
        }
        let mut file = File::open(path).map_err(io("open"))?;
        let meta = file.metadata().map_err(io("stat"))?;
        let facts = Facts::of(&meta);
        let backing = match mode {
            LoadMode::Mmap if facts.len >= 8 => {
                Backing::Map { map: map(&file).map_err(io("map"))?, file, was: facts }
            }
            _ => Backing::Heap(read(&mut file, path, facts.len)?),
        };
        Ok(Storage { path: path.into(), backing })
    }

    /// Bytes that were made of a file's.
    pub(crate) fn made_of(path: &Path, bytes: AlignedBytes) -> Storage {
        Storage { path: path.into(), backing: Backing::Heap(bytes) }
    }

    /// Wraps bytes that were made in memory.
    pub fn from_memory(name: &str, bytes: AlignedBytes) -> Storage {
        Storage { path: name.into(), backing: Backing::Heap(bytes) }
    }

    /// Whether the bytes are mapped and not in memory of our own.
    pub fn is_mapped(&self) -> bool {
        matches!(self.backing, Backing::Map { .. })
    }

    /// Fails where the length or the time of change of the file that is mapped differ from those when it was opened: its
    /// bytes may be others, or gone. That another file has its name now, or none, does not matter, and bytes in memory
    /// of our own do not change.
    pub fn check_unchanged(&self) -> Result<(), Error> {
        let Backing::Map { file, was, .. } = &self.backing else { return Ok(()) };
        let meta = file.metadata().map_err(|source| Error::Io {
            file: self.path.clone(),
            action: "stat",
            source,
        })?;
        let now = Facts::of(&meta);
        if now == *was {
            return Ok(());
        }
        let (was, now) = (was.describe(), now.describe());
        Err(Error::FileChanged { file: self.path.clone(), was, now })
    }
}

impl Deref for Storage {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        match &self.backing {
            Backing::Map { map, .. } => map,
            Backing::Heap(bytes) => bytes,
        }
    }
}

impl fmt::Debug for Storage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = if self.is_mapped() { "mapped" } else { "in memory" };
        write!(f, "Storage({}, {} bytes, {kind})", self.path.display(), self.len())
    }
}

fn map(file: &File) -> std::io::Result<Mmap> {
    // SAFETY: the map is private and read-only. That nobody truncates or rewrites the file meanwhile is the caller's
    // part of the bargain, as the module's documentation says; `LoadMode::Read` is there for who cannot promise it.
    unsafe { MmapOptions::new().map(file) }
}

fn read(file: &mut File, path: &Path, len: u64) -> Result<AlignedBytes, Error> {
    let bytes = usize::try_from(len).unwrap_or(usize::MAX);
    let mut buffer =
        AlignedBytes::zeroed(bytes).ok_or(Error::OutOfMemory { file: path.into(), bytes })?;
    file.read_exact(&mut buffer).map_err(|source| Error::Io {
        file: path.into(),
        action: "read to the length it had when opened",
        source,
    })?;
    Ok(buffer)
}

/// Bytes on the heap, aligned to a cache line.
#[derive(Clone, Default)]
pub struct AlignedBytes {
    lines: Vec<Line>,
    len: usize,
}

#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
struct Line([u8; 64]);

impl AlignedBytes {
    /// `len` zero bytes, or `None` where there is no memory for them.
    pub fn zeroed(len: usize) -> Option<AlignedBytes> {
        let n_lines = len.div_ceil(64);
        let mut lines = Vec::new();
        lines.try_reserve_exact(n_lines).ok()?;
        lines.resize(n_lines, Line([0; 64]));
        Some(AlignedBytes { lines, len })
    }
}

impl Deref for AlignedBytes {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.lines)[..self.len]
    }
}

impl DerefMut for AlignedBytes {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut bytemuck::cast_slice_mut(&mut self.lines)[..self.len]
    }
}

impl From<Vec<u8>> for AlignedBytes {
    fn from(bytes: Vec<u8>) -> AlignedBytes {
        let mut lines = vec![Line([0; 64]); bytes.len().div_ceil(64)];
        bytemuck::cast_slice_mut(&mut lines)[..bytes.len()].copy_from_slice(&bytes);
        AlignedBytes { lines, len: bytes.len() }
    }
}

impl fmt::Debug for AlignedBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AlignedBytes({} bytes)", self.len)
    }
}

/// A range of a [`Storage`] that keeps it alive: what the engine holds as a tensor's bytes.
#[derive(Clone)]
pub struct TensorBytes {
    storage: Arc<Storage>,
    range: Range<usize>,
}

impl TensorBytes {
    /// The bytes of `storage` in `range`, or `None` where it has no such bytes.
    pub fn new(storage: Arc<Storage>, range: Range<usize>) -> Option<TensorBytes> {
        storage.get(range.clone())?;
        Some(TensorBytes { storage, range })
    }

    /// All bytes of `storage`.
    pub(crate) fn whole(storage: Arc<Storage>) -> TensorBytes {
        let range = 0..storage.len();
        TensorBytes { storage, range }
    }

    /// The file that the bytes lie in.
    pub fn storage(&self) -> &Arc<Storage> {
        &self.storage
    }

    /// Where in the file the bytes lie.
    pub fn range(&self) -> Range<usize> {
        self.range.clone()
    }
}

impl Deref for TensorBytes {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.storage[self.range.clone()]
    }
}

impl fmt::Debug for TensorBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TensorBytes({} bytes of {})", self.range.len(), self.storage.path.display())
    }
}
