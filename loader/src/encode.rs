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
use tokenizers::{Model, NormalizedString, PreTokenizedString, Token, Tokenizer as Inner};
use tokenizers::{OffsetReferential, OffsetType};

use crate::added::{Added, Foreign, Part, Touch};
use crate::error::Error;
use crate::memory;
use crate::pieces::Cuts;
use crate::tokenizer::{guard, refuse_text};
use crate::words::{Normal, Step};

/// Memory that a piece of text takes at most on its way, for each of its bytes and besides.
const PIECE_BYTES: usize = 512;
const PIECE_BYTES_BESIDES: usize = 2 << 20;

/// A tokenizer's way from text to ids.
pub(crate) struct Encoder {
    /// Added tokens that are looked for in the text, and in the normalised text.
    raw: Added,
    normalised: Added,
    normal: Vec<Normal>,
    steps: Vec<Step>,
    cuts: Cuts,
}

/// A text, with what is foreign in it and what is a control token.
#[derive(Clone, Copy)]
pub(crate) struct Source<'a> {
    pub(crate) text: &'a str,
    pub(crate) foreign: Foreign<'a>,
    pub(crate) control: &'a BTreeSet<u32>,
}

impl Encoder {
    pub(crate) fn of(inner: &Inner) -> tokenizers::Result<Encoder> {
        let [raw, normalised] = Added::of(inner)?;
        Ok(Encoder {
            raw,
            normalised,
            normal: Normal::steps(inner.get_normalizer())?,
            steps: Step::steps(inner.get_pre_tokenizer())?,
            cuts: Cuts::of(inner),
        })
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
        self.raw.split(source.text, source.control, touch, |part| {
            if let Some(id) = part.token {
                return memory::extend(ids, &[id], "token ids");
            }
            let mut start = part.range.start;
            for piece in self.cuts.pieces(&source.text[part.range], max) {
                let bytes =
                    PIECE_BYTES.saturating_mul(piece.len()).saturating_add(PIECE_BYTES_BESIDES);
                memory::room_for(bytes, "tokenising a text")?;
                let of_piece = guard(|| self.encode_piece(inner, source, start, piece))
                    .map_err(refuse_text)?;
                memory::extend(ids, &of_piece, "token ids")?;
                start += piece.len();
            }
            Ok(())
        })
    }

    /// The ids of a piece that begins at byte `start` of the text.
    fn encode_piece(
        &self,
        inner: &Inner,
        source: Source<'_>,
        start: usize,
        piece: &str,
    ) -> tokenizers::Result<Vec<u32>> {
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
            self.normal.iter().try_for_each(|step| step.run(&mut part))?;
            let mut parts = Vec::new();
            let text = part.get();
            self.normalised.split(
                text,
                source.control,
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
        self.steps.iter().try_for_each(|step| step.run(&mut pieces))?;
        pieces.tokenize(|word| {
            let tokens = inner.get_model().tokenize(word.get())?;
            let is_wrong = |token: &Token| {
                source.control.contains(&token.id)
                    && touch(word, origin(&tokens, token, word)) != Touch::Nothing
            };
            match tokens.iter().any(is_wrong) {
                false => Ok(tokens),
                true => without(inner, &tokens, source.control, is_wrong),
            }
        })?;
        let splits = pieces.get_splits(OffsetReferential::Normalized, OffsetType::None);
        Ok(splits.iter().flat_map(|split| split.2.iter().flatten()).map(|token| token.id).collect())
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
    control: &BTreeSet<u32>,
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
            if of_char.iter().any(|token| control.contains(&token.id)) {
                return Err(format!("it holds the text of control token {}", token.value).into());
            }
            right.extend(of_char);
        }
    }
    Ok(right)
}
