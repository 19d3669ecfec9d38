//! Text to token ids and back.
//!
//! `tokenizer.json` is read by the `tokenizers` crate; what this module adds is what an engine needs around it.
//! Text from a user is encoded with [`Special::Plain`], where `<|im_end|>` is ten ordinary characters and not the end
//! of the turn; [`Tokenizer::encode_chat`] does that for parts of a text. Truncation and padding that a file may ask
//! for are switched off, because a prompt must never be shortened in silence, and so is what is random in training.
//! Ids that the model has but the tokenizer does not ("padded" vocabularies) can be listed, so that they are never
//! sampled. [`TextStream`](crate::TextStream) turns ids into text as they come.

use std::collections::BTreeSet;
use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use tokenizers::Tokenizer as Inner;
use tokenizers::{AddedToken, Encoding, ModelWrapper, NormalizerWrapper, Token};
use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::added::{Foreign, normalised};
use crate::companions::{Companions, TOKENIZER};
use crate::decode::{Decoder, Run};
use crate::encode::{Control, Encoder, Source, refuse_text};
use crate::error::Error;
use crate::guard::guard;
use crate::json;
use crate::memory;
use crate::words::{Normal, at_most};

/// The longest text that is encoded, in bytes.
pub const MAX_TEXT_BYTES: usize = 64 << 20;

const MAX_TOKENIZER_BYTES: u64 = 256 << 20;

/// The longest piece of a Unigram vocabulary.
const MAX_PIECE_BYTES: usize = 512;

/// A text goes through the tokenizer library in pieces of so many bytes, where it can be cut.
const PIECE: usize = 16 << 10;
/// Memory for the ids of a text while their room doubles, for each of its bytes where a byte is one token, and besides.
const IDS_BYTES: usize = 12;
const IDS_BYTES_BESIDES: usize = 1 << 20;
/// Memory that the library takes at most to decode ids, for each id and for each byte of their texts.
const DECODE_BYTES_OF_ID: usize = 160;
const DECODE_BYTES: usize = 16;
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
    control: Arc<Control>,
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
    decoder: Decoder,
    /// The ids that are put around a prompt; `None`: it is not only that.
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
        let special_ids: BTreeSet<u32> = special.iter().map(|(id, _)| **id).collect();
        let control = Control { ids: special_ids.clone(), unknown: unknown_id };
        let shared = Shared {
            path: path.into(),
            n_ids: last + 1,
            fingerprint,
            holes: (0..last).filter(|id| !ids.contains(id)).collect(),
            special_ids,
            special_texts,
            decoder: guard(|| Decoder::of(inner.get_decoder())).map_err(refuse)?,
            encoder: guard(|| Encoder::of(&inner)).map_err(refuse)?,
            edges: edges(&inner),
            inner,
        };
        Ok(Tokenizer { shared: Arc::new(shared), control: Arc::new(control) })
    }

    /// The same tokenizer, which also takes these ids for control tokens: those that end an answer, which a config says.
    #[must_use]
    pub fn with_control_ids(mut self, ids: &[u32]) -> Tokenizer {
        let control = Arc::make_mut(&mut self.control);
        control.ids.extend(ids);
        control.unknown = control.unknown.filter(|id| !ids.contains(id));
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
            _ if !edges => [&[][..], &[][..]],
            Some([before, after]) => [&before[..], &after[..]],
            None => {
                let why = "its post_processor does more than to put ids around a prompt";
                return Err(Error::Tokenizer { file: shared.path.clone(), why: why.into() });
            }
        };
        let bytes = IDS_BYTES.saturating_mul(text.len()).saturating_add(IDS_BYTES_BESIDES);
        memory::room_for(bytes, "the ids of a text")?;
        let mut ids = Vec::new();
        memory::extend(&mut ids, before, "token ids")?;
        let source = Source { text, foreign: Foreign(foreign), control: &self.control };
        shared.encoder.encode(&shared.inner, source, max, &mut ids)?;
        memory::extend(&mut ids, after, "token ids")?;
        Ok(ids)
    }

    /// The text of these ids; with `Special::Plain` the text of special tokens is part of it, with `Special::Parse`
    /// they are silent.
    pub fn decode(&self, ids: &[u32], special: Special) -> Result<String, Error> {
        self.check_ids(ids)?;
        let tokens = || {
            let shown = |id: &&u32| special == Special::Plain || !self.is_special(**id);
            ids.iter().filter(shown).filter_map(|id| self.id_to_token(*id))
        };
        let n_bytes = DECODE_BYTES.saturating_mul(tokens().map(|token| token.len()).sum());
        let n_ids = DECODE_BYTES_OF_ID.saturating_mul(ids.len());
        memory::room_for(n_bytes.saturating_add(n_ids), "the text of tokens")?;
        self.decoding(|decoder| {
            let (mut run, mut out) = (Run::default(), Vec::new());
            tokens().try_for_each(|token| decoder.push(&mut run, token, &mut out))?;
            decoder.finish(&mut run, &mut out)?;
            Ok(decoder.text(out)?.text)
        })
    }

    pub(crate) fn decoding<T>(
        &self,
        call: impl FnOnce(&Decoder) -> tokenizers::Result<T>,
    ) -> Result<T, Error> {
        let done = guard(|| call(&self.shared.decoder));
        done.map_err(|why| Error::Text { action: "decode", why: why.into() })
    }

    pub(crate) fn check_ids(&self, ids: &[u32]) -> Result<(), Error> {
        let Some(id) = ids.iter().find(|id| **id >= self.shared.n_ids) else { return Ok(()) };
        let why = format!("token id {id}: expected below {}", self.shared.n_ids);
        Err(Error::Text { action: "decode", why: why.into() })
    }

    /// One more than the largest id.
    pub fn vocab_size(&self) -> usize {
        self.shared.n_ids as usize
    }

    /// The most tokens that a text of `n_bytes` can become, with those that are put around a prompt. Most tokenizers
    /// make at most one token of a byte; one that normalises may make more, up to 32.
    pub fn max_tokens(&self, n_bytes: usize) -> usize {
        let edges = self.shared.edges.as_ref().map_or(0, |edges| edges.iter().map(Vec::len).sum());
        self.shared.encoder.max_tokens_of_byte().saturating_mul(n_bytes).saturating_add(edges)
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

    /// The bytes that a token adds to a text, often not whole characters; a special one is its own text. None for an id that
    /// stands for no token. An error where the tokenizer's decoder makes text of several tokens together (WordPiece, CTC).
    pub fn token_bytes(&self, id: u32) -> Result<Vec<u8>, Error> {
        let Some(token) = self.id_to_token(id) else { return Ok(Vec::new()) };
        if self.is_special(id) {
            return Ok(token.into_bytes());
        }
        let bytes = self.decoding(|decoder| decoder.bytes(token))?;
        bytes.ok_or_else(|| {
            let why = "the tokenizer's decoder makes text of several tokens together";
            Error::Text { action: "say which bytes a token is", why: why.into() }
        })
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

    /// Whether this id may be one raw byte, whose text depends on its neighbours.
    pub(crate) fn is_raw_byte(&self, id: u32) -> bool {
        self.id_to_token(id).is_some_and(|token| token.starts_with("<0x"))
    }
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tokenizer({}, {} ids)", self.shared.path.display(), self.shared.n_ids)
    }
}

/// What the library works on while it reads a file.
#[derive(serde::Deserialize)]
struct Head {
    normalizer: Option<NormalizerWrapper>,
    #[serde(default)]
    added_tokens: Vec<AddedToken>,
    model: ModelHead,
}

#[derive(serde::Deserialize)]
struct ModelHead {
    vocab: Option<LongestPiece>,
}

/// The length of the longest piece of a Unigram model, whose vocabulary is a list; of another's, 0.
struct LongestPiece(usize);

impl<'de> Deserialize<'de> for LongestPiece {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<LongestPiece, D::Error> {
        struct OfVocab;
        impl<'de> Visitor<'de> for OfVocab {
            type Value = LongestPiece;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a vocabulary")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<LongestPiece, A::Error> {
                while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
                Ok(LongestPiece(0))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<LongestPiece, A::Error> {
                let mut longest = 0;
                while let Some((piece, _)) = list.next_element::<(String, IgnoredAny)>()? {
                    longest = longest.max(piece.len());
                }
                Ok(LongestPiece(longest))
            }
        }
        deserializer.deserialize_any(OfVocab)
    }
}

/// Reads a file, without what is for training only.
fn read(bytes: &[u8]) -> tokenizers::Result<Inner> {
    let not_one = |err: &dyn fmt::Display| format!("not a tokenizer: {err}");
    // The library normalises added tokens, without a bound.
    let head: Head = serde_json::from_slice(bytes).map_err(|err| not_one(&err))?;
    let steps = Normal::steps(head.normalizer.as_ref())?;
    // It makes of them a tree as deep as the longest, which it takes apart by recursion, and looks each part of it up.
    let longest = head.model.vocab.map_or(0, |LongestPiece(longest)| longest);
    at_most(longest, MAX_PIECE_BYTES, "bytes in a piece of its vocabulary")?;
    for token in head.added_tokens.iter().filter(|token| token.normalized) {
        normalised(&token.content, &steps)?;
    }
    let mut inner = Inner::from_bytes(bytes).map_err(|err| not_one(&err))?;
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
