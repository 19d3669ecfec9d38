//! Saving and restoring a session.
//!
//! A blob is a header, the tokens, the last logits if there are any, and the KV of every layer as
//! `[layer][K|V][kv_head][token][head_dim]`, which does not depend on the page length; then a checksum
//! (XXH3, 64 bits) of all that. Numbers are little-endian. A blob is parsed as untrusted: every field is
//! checked against the opened model before memory is taken, and a session exists only if all of it was
//! sound. The checksum finds damage, not malice: a forged cache gives wrong text, never a wrong access.

use std::fs::File;
use std::io::{self, BufRead, BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use xxhash_rust::xxh3::Xxh3;

use crate::cache::{KvFormat, PageLayout, Side};
use crate::engine::Model;
use crate::error::Error;
use crate::memory;
use crate::session::{Pending, Session, SessionOptions};

const MAGIC: [u8; 8] = *b"loris-kv";
const VERSION: u32 = 1;

/// The fixed start of a blob.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Header {
    magic: [u8; 8],
    version: u32,
    /// 0: bf16, 1: f32.
    kv_format: u32,
    /// Of the weights that made the cache.
    fingerprint: u64,
    n_layers: u32,
    n_kv_heads: u32,
    head_dim: u32,
    vocab_size: u32,
    n_tokens: u64,
    /// Leading tokens that prefill wrote.
    n_shareable: u64,
    /// 1 if a row of logits follows the tokens.
    has_logits: u32,
    reserved: u32,
}

impl Session {
    /// Writes the session so that [`Model::restore`] can continue it, also in another process.
    pub fn save(&self, out: &mut dyn Write) -> Result<(), Error> {
        self.check_savable()?;
        let mut out = Summed { inner: out, sum: Xxh3::new() };
        self.write(&mut out).and_then(|()| {
            let sum = out.sum.digest();
            out.inner.write_all(&sum.to_le_bytes()).map_err(io_error)
        })
    }

    fn check_savable(&self) -> Result<(), Error> {
        let refuse = |reason: &str| Err(Error::State { call: "save", reason: reason.into() });
        if self.pending != Pending::Nothing {
            return refuse("tokens are queued; step or clear them first");
        }
        if self.lazy.is_some() {
            return refuse("a session that prunes cannot be saved yet; fork it instead");
        }
        Ok(())
    }

    /// Bytes that [`save`](Self::save) writes now.
    pub fn saved_bytes(&self) -> Result<usize, Error> {
        self.check_savable()?;
        let plan = self.model.plan();
        let logits = if self.logits_ready { self.logits.len() * size_of::<f32>() } else { 0 };
        let token = size_of::<u32>() + plan.kv_bytes_per_token;
        Ok(size_of::<Header>() + self.len() * token + logits + size_of::<u64>())
    }

    /// Saves to a file, which is complete or not there: it is written beside its place and renamed.
    pub fn save_file(&self, path: &Path) -> Result<(), Error> {
        let mut part = path.as_os_str().to_owned();
        part.push(".part");
        let part = PathBuf::from(part);
        let io = |source: io::Error| Error::Io { path: part.display().to_string(), source };
        let write = || {
            let mut out = BufWriter::new(File::create(&part).map_err(io)?);
            self.save(&mut out)?;
            out.flush().map_err(io)?;
            std::fs::rename(&part, path).map_err(io)
        };
        write().inspect_err(|_| {
            let _ = std::fs::remove_file(&part); // the first error is the one to tell
        })
    }

    fn write(&self, out: &mut Summed<&mut dyn Write>) -> Result<(), Error> {
        let shared = &*self.model.shared;
        let header = Header {
            n_tokens: self.len() as u64,
            n_shareable: self.n_shareable as u64,
            has_logits: u32::from(self.logits_ready),
            ..expected_header(&self.model)
        };
        out.write_all(bytemuck::bytes_of(&header)).map_err(io_error)?;
        out.write_all(bytemuck::cast_slice(&self.tokens)).map_err(io_error)?;
        if self.logits_ready {
            out.write_all(bytemuck::cast_slice(&self.logits)).map_err(io_error)?;
        }
        let layout = shared.plan.layout;
        let n_columns = self.cache.segments[0].page_table.len() / shared.plan.n_layers;
        let mut pages = buffer(n_columns, layout.bytes())?;
        for layer in 0..shared.plan.n_layers {
            let mut device = shared.device();
            for (i, page) in pages.chunks_exact_mut(layout.bytes()).enumerate() {
                device.read_page(
                    self.cache.segments[0].page_table[i * shared.plan.n_layers + layer],
                    page,
                )?;
            }
            drop(device);
            for run in runs(&layout, self.len()) {
                out.write_all(&pages[run]).map_err(io_error)?;
            }
        }
        Ok(())
    }
}

impl Model {
    /// Opens a session from what [`Session::save`] wrote for the same weights and KV format.
    pub fn restore(&self, from: &mut dyn Read, options: &SessionOptions) -> Result<Session, Error> {
        if options.lazy.is_some() {
            let expected = "none: a restored session does not prune yet";
            return Err(Error::option("lazy", "given", expected));
        }
        let mut session = Session::new(self.clone(), options)?;
        let mut from = Summed { inner: from, sum: Xxh3::new() };
        let header = self.read_header(&mut from, &session)?;
        let Header { n_tokens, n_shareable, has_logits, .. } = header;
        #[allow(clippy::cast_possible_truncation)] // at most the context length, checked
        let (n_tokens, n_shareable) = (n_tokens as usize, n_shareable as usize);

        let mut tokens = memory::zeros::<u32>(n_tokens, "the saved tokens")?;
        read(&mut from, bytemuck::cast_slice_mut(&mut tokens), "tokens")?;
        let vocab_size = self.config().vocab_size;
        if let Some(&id) = tokens.iter().find(|&&id| id as usize >= vocab_size) {
            return Err(mismatch("tokens", format!("id {id}"), format!("ids below {vocab_size}")));
        }
        if has_logits == 1 {
            read(&mut from, bytemuck::cast_slice_mut(&mut session.logits), "logits")?;
            if session.logits.iter().any(|l| !l.is_finite()) {
                return Err(mismatch(
                    "logits",
                    "a non-finite value".into(),
                    "finite values".into(),
                ));
            }
        }
        session.take_tokens(tokens)?;
        self.read_pages(&mut from, &session)?;
        let sum = from.sum.digest();
        let mut stored = [0; 8];
        read(&mut from, &mut stored, "checksum")?;
        if u64::from_le_bytes(stored) != sum {
            let stored = u64::from_le_bytes(stored);
            return Err(mismatch("checksum", format!("{stored:016x}"), format!("{sum:016x}")));
        }
        session.n_shareable = n_shareable;
        session.logits_ready = has_logits == 1;
        Ok(session)
    }

    /// As [`restore`](Self::restore), from a file.
    pub fn restore_file(&self, path: &Path, options: &SessionOptions) -> Result<Session, Error> {
        let io = |source: io::Error| Error::Io { path: path.display().to_string(), source };
        let mut file = BufReader::new(File::open(path).map_err(io)?);
        let session = self.restore(&mut file, options)?;
        match file.fill_buf().map_err(io)?.len() {
            0 => Ok(session),
            n => Err(mismatch("end", format!("{n} bytes or more"), "nothing".into())),
        }
    }

    fn read_header(
        &self,
        from: &mut Summed<&mut dyn Read>,
        session: &Session,
    ) -> Result<Header, Error> {
        let mut header: Header = bytemuck::Zeroable::zeroed();
        read(from, bytemuck::bytes_of_mut(&mut header), "header")?;
        let want = expected_header(self);
        let check = |field, found: u64, expected: u64| match found == expected {
            true => Ok(()),
            false => Err(mismatch(field, found.to_string(), expected.to_string())),
        };
        check("magic", u64::from_le_bytes(header.magic), u64::from_le_bytes(want.magic))?;
        check("version", header.version.into(), want.version.into())?;
        check("KV format (0 = bf16, 1 = f32)", header.kv_format.into(), want.kv_format.into())?;
        check("fingerprint of the weights", header.fingerprint, want.fingerprint)?;
        check("layers", header.n_layers.into(), want.n_layers.into())?;
        check("kv heads", header.n_kv_heads.into(), want.n_kv_heads.into())?;
        check("head width", header.head_dim.into(), want.head_dim.into())?;
        check("vocabulary", header.vocab_size.into(), want.vocab_size.into())?;
        check("reserved word", header.reserved.into(), 0)?;
        let at_most = |field, found: u64, max: u64| match found <= max {
            true => Ok(()),
            false => Err(mismatch(field, found.to_string(), format!("at most {max}"))),
        };
        at_most("tokens (the session's context length)", header.n_tokens, session.ctx_len as u64)?;
        let plan = self.plan();
        // Before memory is taken for as many tokens as a header may claim.
        let in_pool = plan.n_pages / plan.n_layers * plan.layout.page_len;
        if header.n_tokens > in_pool as u64 {
            let n_columns = header.n_tokens.div_ceil(plan.layout.page_len as u64);
            let needed = n_columns.saturating_mul(plan.n_layers as u64);
            let needed = usize::try_from(needed).unwrap_or(usize::MAX);
            return Err(Error::KvFull { needed, free: self.shared.pool().pages.n_free() });
        }
        at_most("shareable tokens", header.n_shareable, header.n_tokens)?;
        at_most("logits flag", header.has_logits.into(), u64::from(header.n_tokens > 0))?;
        Ok(header)
    }

    fn read_pages(&self, from: &mut Summed<&mut dyn Read>, session: &Session) -> Result<(), Error> {
        let plan = self.plan();
        let layout = plan.layout;
        let n_columns = session.cache.segments[0].page_table.len() / plan.n_layers;
        let mut pages = buffer(n_columns, layout.bytes())?;
        for layer in 0..plan.n_layers {
            for run in runs(&layout, session.len()) {
                read(from, &mut pages[run], "pages")?;
            }
            let mut device = self.shared.device();
            for (i, page) in pages.chunks_exact(layout.bytes()).enumerate() {
                device.write_page(
                    session.cache.segments[0].page_table[i * plan.n_layers + layer],
                    page,
                )?;
            }
        }
        Ok(())
    }
}

impl Session {
    /// Makes room for restored tokens.
    fn take_tokens(&mut self, tokens: Vec<u32>) -> Result<(), Error> {
        let model = self.model.clone();
        let mut pool = model.shared.pool();
        #[allow(clippy::cast_possible_truncation)] // bounded by the context length
        let positions = (0..tokens.len() as u32).collect();
        let taken =
            self.cache.take(0, positions, Vec::new(), model.plan().layout.page_len, &mut pool)?;
        self.cache.commit(taken, &mut pool);
        self.tokens = tokens;
        Ok(())
    }
}

/// A header for this model without the counts of a session.
fn expected_header(model: &Model) -> Header {
    let plan = model.plan();
    #[allow(clippy::cast_possible_truncation)] // range-checked when the config was read
    let small = |n: usize| n as u32;
    Header {
        magic: MAGIC,
        version: VERSION,
        kv_format: match plan.layout.format {
            KvFormat::Bf16 => 0,
            KvFormat::F32 => 1,
        },
        fingerprint: model.shared.fingerprint,
        n_layers: small(plan.n_layers),
        n_kv_heads: small(plan.layout.n_kv_heads),
        head_dim: small(plan.layout.head_dim),
        vocab_size: small(model.config().vocab_size),
        n_tokens: 0,
        n_shareable: 0,
        has_logits: 0,
        reserved: 0,
    }
}

/// Byte ranges of the used slots of one layer's pages laid end to end, in the order of a blob.
fn runs(layout: &PageLayout, n_tokens: usize) -> impl Iterator<Item = std::ops::Range<usize>> {
    let layout = *layout;
    let bytes = layout.format.bytes();
    let heads = [Side::K, Side::V].into_iter().flat_map(move |side| {
        (0..layout.n_kv_heads).map(move |head| layout.head(side, head) * bytes)
    });
    heads.flat_map(move |head| {
        (0..n_tokens.div_ceil(layout.page_len)).map(move |page_idx| {
            let n_slots = (n_tokens - page_idx * layout.page_len).min(layout.page_len);
            let start = page_idx * layout.bytes() + head;
            start..start + n_slots * layout.head_dim * bytes
        })
    })
}

/// A reader or writer that sums what passes through.
struct Summed<T> {
    inner: T,
    sum: Xxh3,
}

impl Summed<&mut dyn Write> {
    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.sum.update(bytes);
        self.inner.write_all(bytes)
    }
}

fn read(
    from: &mut Summed<&mut dyn Read>,
    out: &mut [u8],
    field: &'static str,
) -> Result<(), Error> {
    match from.inner.read_exact(out) {
        Ok(()) => {
            from.sum.update(out);
            Ok(())
        }
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => {
            Err(mismatch(field, "the end of the data".into(), format!("{} more bytes", out.len())))
        }
        Err(e) => Err(io_error(e)),
    }
}

fn buffer(n: usize, bytes: usize) -> Result<Vec<u8>, Error> {
    memory::zeros(n * bytes, "one layer's pages") // no more than the page pool
}

fn mismatch(field: &'static str, found: String, expected: String) -> Error {
    Error::SavedState { field, found, expected }
}

fn io_error(source: io::Error) -> Error {
    Error::Io { path: "saved session".into(), source }
}
