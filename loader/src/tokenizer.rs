//! Text to token ids and back.
//!
//! `tokenizer.json` is read by the `tokenizers` crate; what this module adds is what an engine needs around it.
//! Text from a user is encoded with [`Special::Plain`], where `<|im_end|>` is ten ordinary characters and not the end
//! of the turn; [`Tokenizer::encode_chat`] does that for parts of a text. Truncation and padding that a file may ask
//! for are switched off, because a prompt must never be shortened in silence, and so is what is random in training.
//! Ids that the model has but the tokenizer does not ("padded" vocabularies) can be listed, so that they are never
//! sampled. [`TextStream`] turns ids into text as they come.

use std::collections::BTreeSet;
use std::fmt;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokenizers::Tokenizer as Inner;
use tokenizers::{Encoding, ModelWrapper, Token};
use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::added::Foreign;
use crate::companions::Companions;
use crate::encode::{Encoder, Source};
use crate::error::Error;
use crate::json;
use crate::memory;

/// The tokenizer's file.
pub const TOKENIZER: &str = "tokenizer.json";
/// The longest text that is encoded, in bytes.
pub const MAX_TEXT_BYTES: usize = 64 << 20;

const MAX_TOKENIZER_BYTES: u64 = 256 << 20;

/// A text goes through the tokenizer library in pieces of so many bytes, where it can be cut.
const PIECE: usize = 16 << 10;
/// Memory that the library takes at most to decode ids, for each id and for each byte of their texts.
const DECODE_BYTES_OF_ID: usize = 160;
const DECODE_BYTES: usize = 16;
/// The same to put ids around those of a prompt, for each of its ids.
const POST_PROCESS_BYTES: usize = 512;
/// The same to read a file, for each value in it and for each of its bytes.
const READ_BYTES_OF_VALUE: usize = 400;
const READ_BYTES: usize = 4;

/// What the text of a special token means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Special {
    /// The special token: for text that a chat template or the developer wrote.
    Parse,
    /// Its characters: for text from users.
    Plain,
}

/// A tokenizer. Clones share it.
#[derive(Clone)]
pub struct Tokenizer {
    shared: Arc<Shared>,
    /// The ids that steer the model: special tokens, and those that end an answer. An unknown token steers nothing.
    control: Arc<BTreeSet<u32>>,
}

struct Shared {
    path: PathBuf,
    inner: Inner,
    encoder: Encoder,
    n_ids: u32,
    /// Of every token's text and id.
    fingerprint: u64,
    /// Ids below `n_ids` that no token has.
    holes: Vec<u32>,
    special_ids: BTreeSet<u32>,
    /// The texts of special tokens, longest first.
    special_texts: Vec<String>,
    byte_fallback: bool,
    /// The ids that are put around a prompt; `None`: the library has to be asked.
    edges: Option<[Vec<u32>; 2]>,
}

impl Tokenizer {
    /// Opens `tokenizer.json`, or gives `None` where the folder has none.
    pub fn open(dir: &Path) -> Result<Option<Tokenizer>, Error> {
        let path = dir.join(TOKENIZER);
        let Some(bytes) = json::read_file(&path, MAX_TOKENIZER_BYTES)? else { return Ok(None) };
        Tokenizer::parse_with(&bytes, &path, &Companions::open(dir)?).map(Some)
    }

    /// Reads the bytes of a `tokenizer.json` that has no files beside it; `path` is for messages.
    pub fn parse(bytes: &[u8], path: &Path) -> Result<Tokenizer, Error> {
        Tokenizer::parse_with(bytes, path, &Companions::default())
    }

    fn parse_with(bytes: &[u8], path: &Path, companions: &Companions) -> Result<Tokenizer, Error> {
        // The library's code runs all the way: also a look at its vocabulary may panic.
        guard(|| Ok(Tokenizer::build(bytes, path, companions)))
            .map_err(|why| Error::Tokenizer { file: path.into(), why: why.into() })?
    }

    fn build(bytes: &[u8], path: &Path, companions: &Companions) -> Result<Tokenizer, Error> {
        let refuse = |why: String| Error::Tokenizer { file: path.into(), why: why.into() };
        let n_values = READ_BYTES_OF_VALUE.saturating_mul(json::n_values(bytes));
        let n_bytes = READ_BYTES.saturating_mul(bytes.len());
        memory::room_for(n_values.saturating_add(n_bytes), "the tokenizer")?;
        let mut inner = guard(|| read(bytes)).map_err(refuse)?;
        companions.apply(&mut inner, path)?;
        let vocab = inner.get_vocab(true);
        // A sum, because the order of a map is a matter of chance.
        let of_token =
            |(text, id): (&String, &u32)| xxh3_64_with_seed(text.as_bytes(), u64::from(*id));
        let fingerprint = vocab.iter().map(of_token).fold(0, u64::wrapping_add);
        let ids: BTreeSet<u32> = vocab.into_values().collect();
        let Some(&last) = ids.last().filter(|&&last| last < 1 << 22) else {
            return Err(refuse(format!(
                "expected ids below 2^22 and at least one, found {:?}",
                ids.last()
            )));
        };
        let added = inner.get_added_tokens_decoder();
        let special: Vec<_> = added.iter().filter(|(_, token)| token.special).collect();
        let mut special_texts: Vec<String> =
            special.iter().map(|(_, token)| token.content.clone()).collect();
        special_texts.sort_by_key(|text| std::cmp::Reverse(text.len()));
        let unknown_id = unknown_token(&inner).and_then(|text| inner.token_to_id(&text));
        let decoder = serde_json::to_string(&inner.get_decoder()).unwrap_or_default();
        let special_ids: BTreeSet<u32> = special.iter().map(|(id, _)| **id).collect();
        let control = special_ids.iter().copied().filter(|id| Some(*id) != unknown_id).collect();
        let shared = Shared {
            path: path.into(),
            n_ids: last + 1,
            fingerprint,
            holes: (0..last).filter(|id| !ids.contains(id)).collect(),
            special_ids,
            special_texts,
            byte_fallback: decoder.contains("\"ByteFallback\""),
            encoder: guard(|| Encoder::of(&inner)).map_err(refuse)?,
            edges: edges(&inner),
            inner,
        };
        Ok(Tokenizer { shared: Arc::new(shared), control: Arc::new(control) })
    }

    /// The same tokenizer, which also takes these ids for control tokens: those that end an answer, which a config says.
    #[must_use]
    pub fn with_control_ids(mut self, ids: &[u32]) -> Tokenizer {
        Arc::make_mut(&mut self.control).extend(ids);
        self
    }

    /// Encodes a text as it is.
    pub fn encode(&self, text: &str, special: Special) -> Result<Vec<u32>, Error> {
        self.encode_by(text, special, false, PIECE)
    }

    /// Encodes a whole prompt that no chat template was applied to: where the tokenizer says so, with the token that
    /// starts a sequence.
    pub fn encode_prompt(&self, text: &str, special: Special) -> Result<Vec<u32>, Error> {
        self.encode_by(text, special, true, PIECE)
    }

    /// Encodes a text of which parts are foreign: `foreign` are their byte ranges, sorted and apart. Control tokens are
    /// parsed where none of their bytes is foreign; a foreign part is ordinary text, as with [`Special::Plain`].
    /// The text is encoded as one, so that the ids are those that it has as a whole.
    pub fn encode_chat(&self, text: &str, foreign: &[Range<usize>]) -> Result<Vec<u32>, Error> {
        let mut joined: Vec<Range<usize>> = Vec::with_capacity(foreign.len());
        for range in foreign.iter().cloned() {
            let last = joined.last().map_or(0, |last| last.end);
            if range.start < last || range.end < range.start || range.end > text.len() {
                let n = text.len();
                let why = format!("byte range {range:?}: expected sorted, apart and below {n}");
                return Err(refuse_text(why));
            }
            match joined.last_mut() {
                Some(last) if last.end == range.start => last.end = range.end,
                _ if range.is_empty() => {}
                _ => joined.push(range),
            }
        }
        self.encode_as(text, &joined, false, PIECE)
    }

    /// [`encode`](Self::encode), or with `edges` [`encode_prompt`](Self::encode_prompt), in pieces of at most `max`
    /// bytes where the text can be cut. The ids do not depend on `max`.
    #[doc(hidden)]
    pub fn encode_by(
        &self,
        text: &str,
        special: Special,
        edges: bool,
        max: usize,
    ) -> Result<Vec<u32>, Error> {
        let all = 0..text.len();
        match special {
            Special::Parse => self.encode_as(text, &[], edges, max),
            Special::Plain => self.encode_as(text, std::slice::from_ref(&all), edges, max),
        }
    }

    fn encode_as(
        &self,
        text: &str,
        foreign: &[Range<usize>],
        edges: bool,
        max: usize,
    ) -> Result<Vec<u32>, Error> {
        if text.len() > MAX_TEXT_BYTES {
            return Err(Error::TextTooLong { actual: text.len(), limit: MAX_TEXT_BYTES });
        }
        let shared = &*self.shared;
        let [before, after] = match &shared.edges {
            Some([before, after]) if edges => [&before[..], &after[..]],
            _ => [&[][..], &[][..]],
        };
        let mut ids = Vec::new();
        memory::extend(&mut ids, before, "token ids")?;
        let source = Source { text, foreign: Foreign(foreign), control: &self.control };
        shared.encoder.encode(&shared.inner, source, max, &mut ids)?;
        memory::extend(&mut ids, after, "token ids")?;
        if edges && shared.edges.is_none() {
            let bytes = POST_PROCESS_BYTES.saturating_mul(ids.len());
            memory::room_for(bytes, "what a tokenizer puts around a prompt")?;
            let processed = guard(|| shared.inner.post_process(encoding(&ids), None, true));
            return processed.map(|encoding| encoding.get_ids().to_vec()).map_err(refuse_text);
        }
        Ok(ids)
    }

    /// The text of these ids; with `Special::Plain` the text of special tokens is part of it, with `Special::Parse`
    /// they are silent.
    pub fn decode(&self, ids: &[u32], special: Special) -> Result<String, Error> {
        if let Some(id) = ids.iter().find(|id| **id >= self.shared.n_ids) {
            let why = format!("token id {id}: expected below {}", self.shared.n_ids);
            return Err(Error::Text { action: "decode", why: why.into() });
        }
        let inner = &self.shared.inner;
        let len = |id: &u32| self.id_to_token(*id).map_or(0, |token| token.len());
        let n_bytes = DECODE_BYTES.saturating_mul(ids.iter().map(len).sum());
        let n_ids = DECODE_BYTES_OF_ID.saturating_mul(ids.len());
        memory::room_for(n_bytes.saturating_add(n_ids), "the text of tokens")?;
        let text = guard(|| inner.decode(ids, special == Special::Parse));
        text.map_err(|why| Error::Text { action: "decode", why: why.into() })
    }

    /// One more than the largest id.
    pub fn vocab_size(&self) -> usize {
        self.shared.n_ids as usize
    }

    /// A number that tells tokenizers apart whose ids mean different tokens.
    pub fn fingerprint(&self) -> u64 {
        self.shared.fingerprint
    }

    /// The id of a token, by its text in the vocabulary.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        guard(|| Ok(self.shared.inner.token_to_id(token))).ok().flatten()
    }

    /// A token's text in the vocabulary (which is not what it decodes to).
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        guard(|| Ok(self.shared.inner.id_to_token(id))).ok().flatten()
    }

    /// Whether the id is that of a special token.
    pub fn is_special(&self, id: u32) -> bool {
        self.shared.special_ids.contains(&id)
    }

    /// The texts of special tokens, longest first.
    pub fn special_texts(&self) -> &[String] {
        &self.shared.special_texts
    }

    /// The ids below `vocab_size`, the model's, that stand for no token and must never be sampled.
    pub fn padded_ids(&self, vocab_size: usize) -> impl Iterator<Item = u32> + '_ {
        let end = u32::try_from(vocab_size).unwrap_or(u32::MAX);
        self.shared.holes.iter().copied().filter(move |&id| id < end).chain(self.shared.n_ids..end)
    }

    /// Whether this id is one raw byte that is joined with its neighbours, as in vocabularies with byte fallback.
    fn is_raw_byte(&self, id: u32) -> bool {
        self.shared.byte_fallback
            && self.id_to_token(id).is_some_and(|token| {
                token.len() == 6 && token.starts_with("<0x") && token.ends_with('>')
            })
    }
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tokenizer({}, {} ids)", self.shared.path.display(), self.shared.n_ids)
    }
}

/// Runs code of the tokenizer library, which was not written for hostile files and texts: a panic there is an error here.
pub(crate) fn guard<T>(call: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(result) => result.map_err(|err| err.to_string()),
        Err(_) => Err("the tokenizer library failed on it".into()),
    }
}

/// Reads a file, without what is for training only.
fn read(bytes: &[u8]) -> tokenizers::Result<Inner> {
    let mut inner = Inner::from_bytes(bytes).map_err(|err| format!("not a tokenizer: {err}"))?;
    inner.with_truncation(None)?;
    inner.with_padding(None);
    if let ModelWrapper::BPE(bpe) = inner.get_model()
        && bpe.dropout.is_some()
    {
        let mut certain = bpe.clone();
        certain.dropout = None;
        inner.with_model(certain);
    }
    Ok(inner)
}

pub(crate) fn refuse_text(why: String) -> Error {
    Error::Text { action: "encode this text", why: why.into() }
}

/// The ids that the tokenizer puts around those of a text, if it puts them around and does nothing else.
fn edges(inner: &Inner) -> Option<[Vec<u32>; 2]> {
    const TEXT: u32 = u32::MAX;
    let prompt = guard(|| inner.post_process(encoding(&[TEXT]), None, true)).ok()?;
    let mut parts = prompt.get_ids().split(|&id| id == TEXT);
    match (parts.next(), parts.next(), parts.next()) {
        (Some(before), Some(after), None) => Some([before.to_vec(), after.to_vec()]),
        _ => None,
    }
}

fn encoding(ids: &[u32]) -> Encoding {
    Encoding::from_tokens(ids.iter().map(|&id| Token::new(id, String::new(), (0, 0))).collect(), 0)
}

fn unknown_token(inner: &Inner) -> Option<String> {
    match inner.get_model() {
        ModelWrapper::BPE(bpe) => bpe.get_unk_token().clone(),
        ModelWrapper::WordPiece(model) => Some(model.unk_token.clone()),
        ModelWrapper::WordLevel(model) => Some(model.unk_token.clone()),
        ModelWrapper::Unigram(_) => Some("<unk>".into()),
    }
}

/// Ids to text as they come. What [`push`](TextStream::push) and [`finish`](TextStream::finish) return, joined, is
/// what [`Tokenizer::decode`] makes of all ids at once. The last character is held back while it may be incomplete.
///
/// Each push decodes a short window of the latest ids, so that a long answer costs no more per token than a short one.
#[derive(Debug, Clone)]
pub struct TextStream {
    tokenizer: Tokenizer,
    special: Special,
    window: Vec<u32>,
    /// How much of the window's text was returned.
    emitted: usize,
    /// How many ids at the window's end are raw bytes that wait for their neighbours.
    raw_bytes: usize,
}

impl TextStream {
    /// Ids in a window after it was cut, and when it is cut. The first must cover the three ids over which an
    /// incomplete character can stretch, and one more for decoders that treat the first token differently.
    const KEEP: usize = 8;
    const CUT: usize = 24;
    /// The longest run of raw bytes that is held back. A byte that fits no character spoils the whole run in a one-shot
    /// decode; past this length the stream stops waiting for it.
    const MAX_RAW_BYTES: usize = 256;

    /// A stream; `special` as in [`Tokenizer::decode`].
    pub fn new(tokenizer: &Tokenizer, special: Special) -> TextStream {
        TextStream {
            tokenizer: tokenizer.clone(),
            special,
            window: Vec::new(),
            emitted: 0,
            raw_bytes: 0,
        }
    }

    /// A stream that goes on behind the ids `before`, whose complete text was returned.
    pub fn after(
        tokenizer: &Tokenizer,
        special: Special,
        before: &[u32],
    ) -> Result<TextStream, Error> {
        let mut stream = TextStream::new(tokenizer, special);
        let n = before.len().saturating_sub(TextStream::CUT + TextStream::MAX_RAW_BYTES);
        before[n..].iter().try_for_each(|&id| stream.push(id).map(drop))?;
        Ok(stream)
    }

    /// Takes the next id and returns the text that is now complete, often one word, sometimes nothing.
    pub fn push(&mut self, id: u32) -> Result<String, Error> {
        // Silent tokens stay out of the window, where they could be all the context that is left.
        if self.special == Special::Parse && self.tokenizer.is_special(id) {
            return Ok(String::new());
        }
        self.window.push(id);
        if self.tokenizer.is_raw_byte(id) && self.raw_bytes < TextStream::MAX_RAW_BYTES {
            self.raw_bytes += 1;
            return Ok(String::new());
        }
        self.raw_bytes = 0;
        let text = self.tokenizer.decode(&self.window, self.special).inspect_err(|_| {
            self.window.pop();
        })?;
        let held = if text.ends_with('\u{fffd}') { '\u{fffd}'.len_utf8() } else { 0 };
        let new = self.take(&text, text.len() - held);
        if self.window.len() >= TextStream::CUT {
            self.window.drain(..self.window.len() - TextStream::KEEP);
            let kept = self.tokenizer.decode(&self.window, self.special)?;
            self.emitted = kept.len().saturating_sub(held);
        }
        Ok(new)
    }

    /// Ends the stream and returns what was held back.
    pub fn finish(mut self) -> Result<String, Error> {
        let text = self.tokenizer.decode(&self.window, self.special)?;
        Ok(self.take(&text, text.len()))
    }

    fn take(&mut self, text: &str, end: usize) -> String {
        match text.get(self.emitted..end) {
            Some(new) => {
                self.emitted = end;
                new.to_owned()
            }
            None => String::new(),
        }
    }
}
