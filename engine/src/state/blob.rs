//! What a saved session is made of: a [`Header`], then sections, each behind a [`Head`] that names it and says how long it
//! is, then XXH3 of all that, 64 bits. Numbers are little-endian. The sections, in this order:
//!
//! | section | what | of which sessions |
//! |---|---|---|
//! | recipe | a line for each choice: `lazy`, `stream`, `evict`, and what its option reads | all |
//! | counts | [`Counts`]; and how many pages of each segment are sealed, u64 | all; with a cache of sealed pages |
//! | mass | the attention that each slot has got, `[layer][slot]`, f32 | whose policy goes by all of it |
//! | tokens | u32 each | all |
//! | logits | the last ones, f32 | that have some |
//! | depths | how many segments of the layers each token has gone through, u8 | that prune |
//! | slots | of each segment the number of its slots, u64, and their positions, u32 | that prune: all but the first; with a cache of sealed pages: all |
//! | pages | KV, `[layer][K or V][kv_head]`: a head's codes of all slots, then its params | all |
//! | waiting | the hidden states that wait, `[hidden_dim]` each in the format of KV that is not coded, by position | that prune |
//!
//! Where the slots of the first segment are not written, slot i holds token i, but for streams and for sessions that
//! evict: there the slots behind those that were kept hold the last tokens. A slot whose token was cut off stays,
//! because the order of slots decides the bits of attention; what it held does not, unless pages are sealed.
//! KV does not depend on the length of pages but where they are sealed.
//!
//! Whoever adds to what a session holds adds a section: a reader that does not know it names it.

use std::io::{self, Read, Write};

use xxhash_rust::xxh3::Xxh3;

use crate::engine::Model;
use crate::error::Error;

pub(super) const MAGIC: [u8; 8] = *b"loris-kv";
pub(super) const VERSION: u32 = 5;

/// The fixed start of a blob.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub(super) struct Header {
    pub(super) magic: [u8; 8],
    pub(super) version: u32,
    /// Of keys, 0: bf16, 1: f32, 2: fp8, 3: int8, 4: int4, 5: int4-plain, 6: int4-channel, 7: int2; and from bit 8 on
    /// that of values, xor that of keys.
    pub(super) kv_format: u32,
    /// Of the weights that made the cache.
    pub(super) weights: u64,
    pub(super) n_layers: u32,
    pub(super) n_kv_heads: u32,
    pub(super) head_dim: u32,
    pub(super) vocab_size: u32,
    /// Without those that a stream has rolled off.
    pub(super) n_tokens: u64,
    /// [`ModelConfig::fingerprint`](loris_loader::ModelConfig::fingerprint), its low half; see [`Header::n_shareable`].
    pub(super) config: u32,
    /// [`Tokenizer::fingerprint`](loris_loader::Tokenizer::fingerprint), its low half; 0: the model had no tokenizer.
    pub(super) tokenizer: u32,
    /// 0; before version 5: which parts there are.
    pub(super) flags: u32,
    /// 0; before version 5: prune points.
    pub(super) n_points: u32,
}

impl Header {
    /// Without sections: [`old`](super::old).
    pub(super) fn is_old(&self) -> bool {
        self.version < VERSION
    }

    /// What stood in the place of `config` and `tokenizer` before version 4: how many leading tokens came from prefill.
    /// It is not believed.
    pub(super) fn n_shareable(&self) -> u64 {
        u64::from(self.config) | u64::from(self.tokenizer) << 32
    }
}

/// What a section begins with.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub(super) struct Head {
    /// Filled up with spaces.
    name: [u8; 8],
    n_bytes: u64,
}

impl Head {
    pub(super) fn new(name: &str, n_bytes: usize) -> Self {
        let mut padded = [b' '; 8];
        padded[..name.len()].copy_from_slice(name.as_bytes());
        Self { name: padded, n_bytes: n_bytes as u64 }
    }
}

/// What of a session is a number.
#[repr(C)]
#[derive(Clone, Copy, Default, bytemuck::Pod, bytemuck::Zeroable)]
pub(super) struct Counts {
    /// Which must be as long again where pages go or are coded as a whole; else 0.
    pub(super) page_len: u64,
    /// Tokens that a stream has rolled off.
    pub(super) n_gone: u64,
    /// Tokens when some were evicted last.
    pub(super) since: u64,
    /// Slots of a layer where tokens are evicted; else 0.
    pub(super) n_slots: u64,
    /// How many of the tokens are the end of an answer that may go on.
    pub(super) n_answer: u64,
}

/// A blob that is read.
pub(super) struct Blob<'a> {
    from: Summed<&'a mut dyn Read>,
    /// The section that comes next, where its head has been read.
    next: Option<Head>,
    /// Bytes that are left of this section; `None` in a blob without sections.
    left: Option<u64>,
}

impl<'a> Blob<'a> {
    pub(super) fn new(from: &'a mut dyn Read) -> Self {
        Self { from: Summed { inner: from, sum: Xxh3::new() }, next: None, left: None }
    }

    /// The header is through, and sections follow.
    pub(super) fn has_sections(&mut self) {
        self.left = Some(0);
    }

    /// Begins a section if it is the next, and gives its length.
    pub(super) fn begins(&mut self, name: &'static str) -> Result<Option<u64>, Error> {
        if let Some(left @ 1..) = self.left {
            let expected = "the end of the section in front of it".into();
            return Err(mismatch(name, format!("{left} bytes more"), expected));
        }
        let mut next = Head::new("", 0);
        match self.next.take() {
            Some(head) => next = head,
            None => self.raw(bytemuck::bytes_of_mut(&mut next), name)?,
        }
        if next.name == Head::new(name, 0).name {
            self.left = Some(next.n_bytes);
            return Ok(self.left);
        }
        self.next = Some(next);
        Ok(None)
    }

    /// Begins the section that must be the next; in a blob without sections it just goes on.
    pub(super) fn begin(&mut self, name: &'static str) -> Result<u64, Error> {
        if self.left.is_none() {
            return Ok(0);
        }
        self.begins(name)?.ok_or_else(|| {
            let found = self.next.map_or([b' '; 8], |next| next.name);
            let found = String::from_utf8_lossy(&found).trim_end().to_owned();
            mismatch("section", found, name.into())
        })
    }

    pub(super) fn read(&mut self, out: &mut [u8], field: &'static str) -> Result<(), Error> {
        if let Some(left) = &mut self.left {
            let n_bytes = out.len() as u64;
            *left = left.checked_sub(n_bytes).ok_or_else(|| {
                let found = format!("{left} bytes of the section");
                mismatch(field, found, format!("{n_bytes} bytes"))
            })?;
        }
        self.raw(out, field)
    }

    pub(super) fn pod<T: bytemuck::Pod>(&mut self, field: &'static str) -> Result<T, Error> {
        let mut value = T::zeroed();
        self.read(bytemuck::bytes_of_mut(&mut value), field)?;
        Ok(value)
    }

    fn raw(&mut self, out: &mut [u8], field: &'static str) -> Result<(), Error> {
        match self.from.inner.read_exact(out) {
            Ok(()) => {
                self.from.sum.update(out);
                Ok(())
            }
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Err(mismatch(
                field,
                "the end of the data".into(),
                format!("{} more bytes", out.len()),
            )),
            Err(e) => Err(io_error(e)),
        }
    }

    /// All of it has been read: compares the checksum.
    pub(super) fn end(mut self) -> Result<(), Error> {
        let n_bytes = self.begin("end")?;
        let sum = self.from.sum.digest();
        let mut stored = [0; 8];
        if self.left.is_some() && n_bytes != size_of_val(&stored) as u64 {
            return Err(mismatch("end", format!("{n_bytes} bytes"), "8".into()));
        }
        self.raw(&mut stored, "checksum")?;
        match u64::from_le_bytes(stored) {
            stored if stored == sum => Ok(()),
            stored => Err(mismatch("checksum", format!("{stored:016x}"), format!("{sum:016x}"))),
        }
    }
}

/// A header for this model without the counts of a session.
pub(super) fn expected_header(model: &Model) -> Header {
    let plan = model.plan();
    #[allow(clippy::cast_possible_truncation)] // range-checked when the config was read
    let small = |n: usize| n as u32;
    #[allow(clippy::cast_possible_truncation)] // of the bits of a hash
    let low = |hash: u64| hash as u32;
    Header {
        magic: MAGIC,
        version: VERSION,
        kv_format: plan.kv.id(),
        weights: model.shared.fingerprint,
        n_layers: small(plan.n_layers),
        n_kv_heads: small(plan.layout.n_kv_heads),
        head_dim: small(plan.layout.head_dim),
        vocab_size: small(model.config().vocab_size),
        n_tokens: 0,
        config: low(model.config().fingerprint()),
        tokenizer: model.tokenizer().map_or(0, |tokenizer| low(tokenizer.fingerprint())),
        flags: 0,
        n_points: 0,
    }
}

/// A count that is no more than `max`.
pub(super) fn at_most(field: &'static str, found: u64, max: u64) -> Result<usize, Error> {
    let refuse = || mismatch(field, found.to_string(), format!("at most {max}"));
    usize::try_from(found).ok().filter(|_| found <= max).ok_or_else(refuse)
}

/// A reader or writer that sums what passes through.
pub(super) struct Summed<T> {
    pub(super) inner: T,
    pub(super) sum: Xxh3,
}

impl Summed<&mut dyn Write> {
    pub(super) fn write(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.sum.update(bytes);
        self.inner.write_all(bytes).map_err(io_error)
    }
}

pub(super) fn mismatch(field: &'static str, found: String, expected: String) -> Error {
    Error::SavedState { field, found, expected }
}

pub(super) fn io_error(source: io::Error) -> Error {
    Error::Io { path: "saved session".into(), source }
}
