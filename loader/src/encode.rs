//! From text to ids, with control tokens parsed only where they may be.
//!
//! The steps are the tokenizer library's, run in its order (see [`Added`], [`Normal`], [`Step`], and its model), over
//! the whole text. So the ids are those of `transformers`; with all of a text foreign, those of its
//! `split_special_tokens`. Two things differ:
//!
//! - whether a control token is parsed is asked of the bytes that it is made from, not of the whole tokenizer;
//! - a model that holds a control token among its ordinary pieces, as some vocabularies do, does not make one from
//!   foreign bytes: the piece is encoded character by character, and if that makes a control token too, the text is refused.

use std::collections::BTreeSet;
use std::ops::Range;

use tokenizers::normalizer::Range as Of;
use tokenizers::{
    Model, ModelWrapper, NormalizedString, PreTokenizedString, Token, Tokenizer as Inner,
};
use tokenizers::{OffsetReferential, OffsetType};

use crate::added::{Added, Foreign, Part, Touch};
use crate::error::Error;
use crate::guard::guard;
use crate::memory;
use crate::pieces::Cuts;
use crate::words::{GROWS, MAX_GROWTH, Normal, Step, at_most};

/// Memory that a piece of text takes at most on its way, for each of its bytes and besides.
const PIECE_BYTES: usize = 512;
const PIECE_BYTES_BESIDES: usize = 2 << 20;

/// What is looked up for each character or word is no longer than this.
const MAX_MARK_BYTES: usize = 64;
/// Words in which every part is looked up.
const MAX_WORD_CHARS: usize = 512;

/// A tokenizer's way from text to ids.
pub(crate) struct Encoder {
    /// Added tokens that are looked for in the text, and in the normalised text.
    raw: Added,
    normalised: Added,
    normal: Vec<Normal>,
    steps: Vec<Step>,
    /// The most tokens of a byte of text.
    growth: usize,
    cuts: Cuts,
}

/// The ids that steer the model: special tokens, and those that end an answer.
#[derive(Debug, Clone)]
pub(crate) struct Control {
    pub(crate) ids: BTreeSet<u32>,
    /// What stands for text that the vocabulary does not have, where it steers nothing.
    pub(crate) unknown: Option<u32>,
}

impl Control {
    /// Whether a model must not make this id of foreign text.
    pub(crate) fn steers(&self, id: u32) -> bool {
        self.ids.contains(&id) && self.unknown != Some(id)
    }
}

/// A text, with what is foreign in it and what is a control token.
#[derive(Clone, Copy)]
pub(crate) struct Source<'a> {
    pub(crate) text: &'a str,
    pub(crate) foreign: Foreign<'a>,
    pub(crate) control: &'a Control,
}

impl Encoder {
    pub(crate) fn of(inner: &Inner) -> tokenizers::Result<Encoder> {
        let normal = Normal::steps(inner.get_normalizer())?;
        let steps = Step::steps(inner.get_pre_tokenizer())?;
        let of_model = bounded_model(inner.get_model())?;
        let of_normal = normal.iter().map(Normal::growth);
        let of_steps = steps.iter().enumerate().map(|(i, step)| step.growth(i + 1 == steps.len()));
        let growth = of_normal.chain(of_steps).fold(of_model, usize::saturating_mul);
        let [raw, normalised] = Added::of(inner, &normal)?;
        let cuts = Cuts::of(inner);
        Ok(Encoder { raw, normalised, normal, steps, growth: growth.min(MAX_GROWTH), cuts })
    }

    /// The most tokens of a byte of text. A text of which more would come is refused.
    pub(crate) fn max_tokens_of_byte(&self) -> usize {
        self.growth
    }

    /// Adds the ids of a text to `ids`, in pieces of at most `max` bytes where the text can be cut.
    pub(crate) fn encode(
        &self,
        inner: &Inner,
        source: Source<'_>,
        max: usize,
        ids: &mut Vec<u32>,
    ) -> Result<(), Error> {
        let touch = |range: Range<usize>| source.foreign.touch(&range);
        let mut asked = 0;
        self.raw.split(source.text, &source.control.ids, touch, |part| {
            if let Some(id) = part.token {
                return memory::extend(ids, &[id], "token ids");
            }
            let first = part.range.start;
            let mut start = first;
            for piece in self.cuts.pieces(&source.text[part.range], max) {
                // A piece takes no more than one before it that was as long.
                if piece.len() > asked {
                    asked = piece.len();
                    let bytes =
                        PIECE_BYTES.saturating_mul(asked).saturating_add(PIECE_BYTES_BESIDES);
                    memory::room_for(bytes, "tokenising a text")?;
                }
                let of_piece = guard(|| self.encode_piece(inner, source, first..start, piece))
                    .map_err(refuse_text)?;
                memory::extend(ids, &of_piece, "token ids")?;
                start += piece.len();
            }
            Ok(())
        })
    }

    /// The ids of a piece; `before` is the part that it belongs to, as far as it was in pieces before this one.
    fn encode_piece(
        &self,
        inner: &Inner,
        source: Source<'_>,
        before: Range<usize>,
        piece: &str,
    ) -> tokenizers::Result<Vec<u32>> {
        let start = before.end;
        // Steps may ask whether they are at the start of the text, so that a piece behind it says that it is not.
        let (text, shift) = match start {
            0 => (NormalizedString::from(piece), 0),
            _ => {
                let longer = NormalizedString::from(format!("x{piece}"));
                (longer.slice(Of::Original(1..)).ok_or(BAD_SPLIT)?, 1)
            }
        };
        let touch = |part: &NormalizedString, range: Range<usize>| {
            let first = start + part.offsets_original().0 - shift;
            // A range that has no origin has none of its own either.
            let Some(origin) = part.convert_offsets(Of::Normalized(range)) else {
                return Touch::Part;
            };
            source.foreign.touch(&(first + origin.start..first + origin.end))
        };
        let mut pieces = PreTokenizedString::from(text);
        pieces.split(|_, mut part| {
            let limit = MAX_GROWTH.saturating_mul(part.len_original());
            // What goes in front of a text goes in front of its first piece.
            let steps = self.normal.iter().filter(|step| before.is_empty() || !step.prepends());
            steps.into_iter().try_for_each(|step| step.run(&mut part, limit))?;
            let mut parts = Vec::new();
            let text = part.get();
            self.normalised.split(
                text,
                &source.control.ids,
                |range| touch(&part, range),
                |found| {
                    let Part { token, range } = found;
                    let slice = part.slice(Of::Normalized(range)).ok_or(BAD_SPLIT)?;
                    let len = slice.get().len();
                    let token = token.map(|id| vec![Token::new(id, String::new(), (0, len))]);
                    parts.push((slice, token));
                    Ok::<_, tokenizers::Error>(())
                },
            )?;
            Ok(parts)
        })?;
        for step in &self.steps {
            step.run(&mut pieces)?;
            // Bytes become characters of up to two at last.
            if step.growth(false) > 1 && n_bytes(&pieces) > 2 * MAX_GROWTH * piece.len() {
                return Err(GROWS.into());
            }
        }
        pieces.tokenize(|word| {
            let tokens = inner.get_model().tokenize(word.get())?;
            let is_wrong = |token: &Token| {
                source.control.steers(token.id)
                    && touch(word, origin(&tokens, token, word)) != Touch::Nothing
            };
            match tokens.iter().any(is_wrong) {
                false => Ok(tokens),
                true => without(inner, &tokens, source.control, is_wrong),
            }
        })?;
        let splits = pieces.get_splits(OffsetReferential::Normalized, OffsetType::None);
        let ids: Vec<u32> = splits
            .iter()
            .flat_map(|split| split.2.iter().flatten())
            .map(|token| token.id)
            .collect();
        match ids.len() <= self.growth * piece.len() {
            true => Ok(ids),
            false => Err(format!("it becomes more than {} tokens for a byte", self.growth).into()),
        }
    }
}

fn n_bytes(pieces: &PreTokenizedString) -> usize {
    let splits = pieces.get_splits(OffsetReferential::Normalized, OffsetType::None);
    splits.iter().map(|split| split.0.len()).sum()
}

/// Refuses a model whose work for a byte of text has no bound that is worth the name; else gives the most tokens that it
/// makes of a byte.
fn bounded_model(model: &ModelWrapper) -> tokenizers::Result<usize> {
    let marks = |texts: &[&Option<String>]| {
        texts.iter().try_for_each(|text| {
            let len = text.as_ref().map_or(0, String::len);
            at_most(len, MAX_MARK_BYTES, "bytes in unk_token or what marks the parts of words")
        })
    };
    let len = |text: &Option<String>| text.as_ref().map_or(0, String::len);
    match model {
        ModelWrapper::BPE(bpe) => {
            let (prefix, suffix) = (&bpe.continuing_subword_prefix, &bpe.end_of_word_suffix);
            marks(&[&bpe.unk_token, prefix, suffix])?;
            Ok(if bpe.byte_fallback { 1 + len(prefix) + len(suffix) } else { 1 })
        }
        ModelWrapper::WordPiece(model) => {
            let [unknown, prefix] = [&model.unk_token, &model.continuing_subword_prefix];
            marks(&[&Some(unknown.clone()), &Some(prefix.clone())])?;
            let longest = model.max_input_chars_per_word;
            at_most(longest, MAX_WORD_CHARS, "in max_input_chars_per_word")?;
            Ok(1)
        }
        ModelWrapper::WordLevel(model) => marks(&[&Some(model.unk_token.clone())]).map(|()| 1),
        ModelWrapper::Unigram(_) => Ok(1),
    }
}

const BAD_SPLIT: &str = "a step of the tokenizer cuts a character in two";

/// Where in its word a token comes from: its offsets if they can be trusted, else the whole word.
fn origin(tokens: &[Token], token: &Token, word: &NormalizedString) -> Range<usize> {
    // A model may drop what it does not know, and what follows is then said to be further in front.
    let is_exact = tokens.last().is_some_and(|last| last.offsets.1 == word.get().len());
    if is_exact { token.offsets.0..token.offsets.1 } else { 0..word.get().len() }
}

/// These tokens, but those that are `wrong` character by character.
fn without(
    inner: &Inner,
    tokens: &[Token],
    control: &Control,
    is_wrong: impl Fn(&Token) -> bool,
) -> tokenizers::Result<Vec<Token>> {
    let mut right = Vec::new();
    for token in tokens {
        if !is_wrong(token) {
            right.push(token.clone());
            continue;
        }
        for c in token.value.chars() {
            let of_char = inner.get_model().tokenize(c.encode_utf8(&mut [0; 4]))?;
            if of_char.iter().any(|token| control.steers(token.id)) {
                return Err(format!("it holds the text of control token {}", token.value).into());
            }
            right.extend(of_char);
        }
    }
    Ok(right)
}

pub(crate) fn refuse_text(why: String) -> Error {
    Error::Text { action: "encode this text", why: why.into() }
}
