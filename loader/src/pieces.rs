//! Where a text can be cut so that its pieces, encoded one by one, give the ids of the whole.
//!
//! The tokenizer library takes hundreds of bytes of memory for a byte of text, so that a long text goes through it in
//! pieces. There are two places for a cut:
//!
//! - *in front of a space* that follows a character other than white space;
//! - *behind a line feed* that is alone between two characters other than white space.
//!
//! That no id depends on whether there is a cut follows from what the library does, step by step:
//!
//! 1. Added tokens are found by their text, leftmost and longest first. [`Cuts::of`] sees to it that none holds the two
//!    characters at a cut next to each other, so no occurrence reaches across, and those on one side are found in the same
//!    order with and without the other side. Tokens that take in white space around them or mind their neighbours
//!    (`lstrip`, `rstrip`, `single_word`) rule out cuts.
//! 2. Normalisation is none or NFC. Nothing composes with a space behind it or with a line feed in front of
//!    it, and both are starters, which no mark moves past; so each side is normalised by itself. White space stays white space and
//!    nothing else becomes it, so a cut stays one.
//! 3. Words are the matches of one of [`PATTERNS`], from left to right; every character belongs to one. In
//!    none of the alternatives can a space follow another character than white space, or such a character a line feed, so
//!    a match ends at the cut. No pattern looks behind, so the matches on the right are those of the whole text. Those on
//!    the left depend on what comes next in two ways. How far a match goes: the last one could not go on in the
//!    whole text either, as it ends at the cut. And `(?!\S)` behind white space: in front of a cut such a run is
//!    followed by another character on the same side, or it is the line feed at the cut, and one character of white space is one match
//!    whatever follows. Digits are split off, if at all, by looking at one character at a time.
//! 4. Each word is encoded by itself.
//! 5. What is added around the whole ([`Tokenizer::encode_prompt`](crate::Tokenizer::encode_prompt)) does not depend on
//!    the text.
//!
//! The library gives up on white space of a million characters on end and takes all that follows for one word; with cuts, all
//! that follows up to the next one.

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
        let is_by_words =
            tokenizer.get_pre_tokenizer().is_some_and(|pre| ends_words(pre) == Some(true));
        let is_local = matches!(tokenizer.get_normalizer(), None | Some(NormalizerWrapper::NFC(_)));
        let is_certain =
            matches!(tokenizer.get_model(), ModelWrapper::BPE(bpe) if bpe.dropout.is_none());
        let added = tokenizer.get_added_tokens_decoder();
        let minds = |token: &AddedToken| token.lstrip || token.rstrip || token.single_word;
        if !is_by_words || !is_local || !is_certain || added.values().any(minds) {
            return Cuts::NONE;
        }
        let holds = |is_cut: fn(char, char) -> bool| {
            let pairs =
                |text: &str| text.chars().zip(text.chars().skip(1)).any(|(a, b)| is_cut(a, b));
            added.values().any(|token| pairs(&token.content))
        };
        Cuts {
            before_space: !holds(|a, b| !a.is_whitespace() && b.is_whitespace()),
            behind_line: !holds(|a, b| a == '\n' && !b.is_whitespace()),
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
        let is_word = |c: Option<char>| c.is_some_and(|c| !c.is_whitespace());
        let mut before = before.chars().rev();
        match before.next() {
            Some('\n') => {
                self.behind_line && is_word(before.next()) && is_word(behind.chars().next())
            }
            last => self.before_space && behind.starts_with(' ') && is_word(last),
        }
    }
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
