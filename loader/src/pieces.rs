//! Where a text can be cut so that its pieces, encoded one by one, give the ids of the whole.
//!
//! The tokenizer library takes hundreds of bytes of memory for a byte of text, so that a long text goes through it in
//! pieces. There are two places for a cut:
//!
//! - *in front of a space* that follows a character other than white space and `▁`;
//! - *behind a line feed* that is alone between two characters other than white space.
//!
//! What is cut is the text between added tokens that are not normalised, so that those do not matter here. Of the others,
//! [`Cuts::of`] sees to it that none holds the two characters at a cut next to each other: no occurrence reaches across,
//! and those on one side are found in the same order with and without the other side. Tokens that take in white space
//! around them or mind their neighbours (`lstrip`, `rstrip`, `single_word`) rule out cuts. What is added around the
//! whole ([`Tokenizer::encode_prompt`](crate::Tokenizer::encode_prompt)) does not depend on the text. That no id depends
//! on whether there is a cut then follows from the other steps, in three kinds of tokenizers.
//!
//! *Byte-level BPE.*
//!
//! 1. Normalisation is none or NFC. Nothing composes with a space behind it or with a line feed in front of
//!    it, and both are starters, which no mark moves past; so each side is normalised by itself. White space stays white space and
//!    nothing else becomes it, so a cut stays one.
//! 2. Words are the matches of one of [`PATTERNS`], from left to right; every character belongs to one. In
//!    none of the alternatives can a space follow another character than white space, or such a character a line feed, so
//!    a match ends at the cut. No pattern looks behind, so the matches on the right are those of the whole text. Those on
//!    the left depend on what comes next in two ways. How far a match goes: the last one could not go on in the
//!    whole text either, as it ends at the cut. And `(?!\S)` behind white space: in front of a cut such a run is
//!    followed by another character on the same side, or it is the line feed at the cut, and one character of white space is one match
//!    whatever follows. Digits are split off, if at all, by looking at one character at a time.
//! 3. Each word is encoded by itself.
//!
//! *In the manner of SentencePiece*, where `▁` stands for a space; cuts are in front of spaces.
//!
//! 1. Normalisation puts marks in front of the text, which the [encoder](crate::encode) does for the first piece only,
//!    and makes each space a mark. Or `Metaspace` does: in front of a piece that begins with a mark it puts none.
//! 2. If `Metaspace` splits, a word ends in front of each mark, and each word is encoded by itself.
//! 3. Else the text is one word, of BPE. A merge makes a token of the vocabulary, whose text is that of its parts. No
//!    token has a mark behind another character, so none reaches across a cut, which is in front of a mark and behind
//!    another character. So merges on one side do not see the other side, and come in the same order without it.
//!    The mark itself is a token, so that a run of unknown characters, which may be one token, ends at it.
//!
//! *BERT's.* Its normaliser looks at one character at a time, or at one and its marks; a space stays one and is no mark. Its
//! words end at white space, and each word is encoded by itself.
//!
//! What cannot be cut goes through the library as one piece, and the memory for that is asked for.

use std::collections::BTreeSet;

use tokenizers::normalizers::NormalizerWrapper;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::split::SplitPattern;
use tokenizers::{AddedToken, ModelWrapper, SplitDelimiterBehavior, Tokenizer as Inner};

/// How words are matched in tokenizers that can be cut: those of Llama 3 and of Qwen. That of GPT-2, which is part of
/// the library, is
/// `'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`.
pub(crate) const PATTERNS: [&str; 2] = [
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
];

/// What stands for a space in the manner of SentencePiece.
const MARK: char = '▁';

/// The kinds of cuts that a tokenizer allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Cuts {
    before_space: bool,
    behind_line: bool,
}

impl Cuts {
    /// Texts stay whole.
    pub(crate) const NONE: Cuts = Cuts { before_space: false, behind_line: false };

    /// What the steps of a tokenizer allow.
    pub(crate) fn of(tokenizer: &Inner) -> Cuts {
        let (by_words, by_marks) = (is_byte_level(tokenizer), is_marked(tokenizer));
        let added = tokenizer.get_added_tokens_decoder();
        let added: Vec<&AddedToken> = added.values().filter(|token| token.normalized).collect();
        let minds = |token: &&AddedToken| token.lstrip || token.rstrip || token.single_word;
        if !(by_words || by_marks || is_bert(tokenizer)) || added.iter().any(minds) {
            return Cuts::NONE;
        }
        let holds = |is_cut: fn(char, char) -> bool| {
            added.iter().any(|token| pairs(&token.content).any(|(a, b)| is_cut(a, b)))
        };
        Cuts {
            before_space: !holds(|a, b| is_word(a) && (b.is_whitespace() || b == MARK)),
            behind_line: by_words && !holds(|a, b| a == '\n' && !b.is_whitespace()),
        }
    }

    /// The pieces of `text`: of at most `max` bytes each, or more where there is no cut.
    pub(crate) fn pieces(self, text: &str, max: usize) -> impl Iterator<Item = &str> {
        let mut rest = Some(text);
        std::iter::from_fn(move || {
            let text = rest?;
            let (piece, behind) = match self.next_cut(text, max) {
                Some(at) => (&text[..at], Some(&text[at..])),
                None => (text, None),
            };
            rest = behind;
            Some(piece)
        })
    }

    /// The last cut in the first `max` bytes of `text`, or the first behind them; none if all of it is one piece.
    fn next_cut(self, text: &str, max: usize) -> Option<usize> {
        if text.len() <= max || self == Cuts::NONE {
            return None;
        }
        let is_cut = |&at: &usize| self.is_cut(text, at);
        (1..=max).rev().find(is_cut).or_else(|| (max + 1..text.len()).find(is_cut))
    }

    fn is_cut(self, text: &str, at: usize) -> bool {
        let bytes = text.as_bytes();
        // The quick look first: most places are none.
        if !(bytes[at] == b' ' && self.before_space || bytes[at - 1] == b'\n' && self.behind_line) {
            return false;
        }
        let Some((before, behind)) = text.split_at_checked(at) else { return false };
        let is_text = |c: Option<char>| c.is_some_and(|c| !c.is_whitespace());
        let mut before = before.chars().rev();
        match before.next() {
            Some('\n') => {
                self.behind_line && is_text(before.next()) && is_text(behind.chars().next())
            }
            last => self.before_space && behind.starts_with(' ') && last.is_some_and(is_word),
        }
    }
}

/// Whether a cut may be behind this character, in front of a space.
fn is_word(c: char) -> bool {
    !c.is_whitespace() && c != MARK
}

fn pairs(text: &str) -> impl Iterator<Item = (char, char)> {
    text.chars().zip(text.chars().skip(1))
}

fn is_byte_level(tokenizer: &Inner) -> bool {
    tokenizer.get_pre_tokenizer().is_some_and(|pre| ends_words(pre) == Some(true))
        && matches!(tokenizer.get_normalizer(), None | Some(NormalizerWrapper::NFC(_)))
        && matches!(tokenizer.get_model(), ModelWrapper::BPE(_))
}

fn is_bert(tokenizer: &Inner) -> bool {
    matches!(tokenizer.get_normalizer(), None | Some(NormalizerWrapper::BertNormalizer(_)))
        && matches!(tokenizer.get_pre_tokenizer(), Some(PreTokenizerWrapper::BertPreTokenizer(_)))
}

/// Whether a tokenizer works in the manner of SentencePiece, as the proof has it.
fn is_marked(tokenizer: &Inner) -> bool {
    let steps = match tokenizer.get_normalizer() {
        None => &[][..],
        Some(NormalizerWrapper::Sequence(steps)) => steps.as_ref(),
        Some(step) => std::slice::from_ref(step),
    };
    let is_mark = |step: &NormalizerWrapper| {
        let json = serde_json::to_value(step).unwrap_or_default();
        json["pattern"]["String"] == " " && json["content"] == MARK.to_string()
    };
    let is_known = |step: &NormalizerWrapper| match step {
        NormalizerWrapper::Prepend(prepend) => prepend.prepend == MARK.to_string(),
        NormalizerWrapper::Replace(_) => is_mark(step),
        _ => false,
    };
    let marks = steps.iter().any(|step| matches!(step, NormalizerWrapper::Replace(_)));
    if !steps.iter().all(is_known) {
        return false;
    }
    match tokenizer.get_pre_tokenizer() {
        None => marks && ends_tokens(tokenizer.get_model()),
        Some(PreTokenizerWrapper::Metaspace(step)) => {
            step.get_replacement() == MARK
                && (step.get_split() || ends_tokens(tokenizer.get_model()))
        }
        // There are no spaces left for it.
        Some(PreTokenizerWrapper::Split(split)) => {
            marks
                && split.pattern == SplitPattern::String(" ".into())
                && split.behavior != SplitDelimiterBehavior::Removed
                && !split.invert
                && ends_tokens(tokenizer.get_model())
        }
        _ => false,
    }
}

/// Whether the tokens of this model end in front of each mark that follows another character.
fn ends_tokens(model: &ModelWrapper) -> bool {
    let ModelWrapper::BPE(bpe) = model else { return false };
    let vocab = bpe.get_vocab();
    let ids: BTreeSet<u32> = vocab.values().copied().collect();
    bpe.continuing_subword_prefix.is_none()
        && bpe.end_of_word_suffix.is_none()
        && !bpe.ignore_merges
        && vocab.contains_key(&MARK.to_string())
        // Merges are of ids: one that two texts had could be merged for the other's sake.
        && ids.len() == vocab.len()
        && vocab.keys().all(|text| !pairs(text).any(|(a, b)| a != MARK && b == MARK))
}

/// Whether words end at every cut once this step is done; `None`: it may look across one.
fn ends_words(step: &PreTokenizerWrapper) -> Option<bool> {
    match step {
        PreTokenizerWrapper::Digits(_) => Some(false),
        // A space in front of a text would be one in front of each piece.
        PreTokenizerWrapper::ByteLevel(step) => {
            (step.use_regex && !step.add_prefix_space).then_some(true)
        }
        PreTokenizerWrapper::Split(split) => match &split.pattern {
            SplitPattern::Regex(pattern) => {
                let is_known = PATTERNS.contains(&pattern.as_str());
                let keeps_all = split.behavior == SplitDelimiterBehavior::Isolated && !split.invert;
                (is_known && keeps_all).then_some(true)
            }
            SplitPattern::String(_) => None,
        },
        PreTokenizerWrapper::Sequence(steps) => {
            // Behind the step at which words end, the others see one side at a time.
            for step in steps.as_ref() {
                if ends_words(step)? {
                    return Some(true);
                }
            }
            Some(false)
        }
        _ => None,
    }
}
