//! Added tokens: texts that are tokens before the vocabulary is asked.
//!
//! They are found as the tokenizer library's `AddedVocabulary` finds them: leftmost and longest first, those that are
//! not normalised in the text, then the others in its normalised parts. What the library does not have is that control
//! tokens are looked for only in the text's own bytes, not in those that are foreign to it (a user wrote them).

use std::collections::BTreeSet;
use std::ops::Range;

use aho_corasick::{AhoCorasick, Input, MatchKind};
use tokenizers::{AddedToken, NormalizedString, Tokenizer as Inner};

use crate::words::{MAX_GROWTH, Normal, Regex};

/// How much of a part of a text is foreign.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Touch {
    Nothing,
    Part,
    All,
}

/// The byte ranges of a text in which no control token is parsed: sorted, apart and not empty.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Foreign<'a>(pub(crate) &'a [Range<usize>]);

impl Foreign<'_> {
    /// How much of `range` is foreign.
    pub(crate) fn touch(self, range: &Range<usize>) -> Touch {
        let next = self.0.partition_point(|foreign| foreign.end <= range.start);
        match self.0.get(next) {
            Some(foreign) if foreign.start <= range.start && range.end <= foreign.end => Touch::All,
            Some(foreign) if foreign.start < range.end => Touch::Part,
            _ => Touch::Nothing,
        }
    }
}

/// A part of a text: what an added token stands for, or the text between two.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Part {
    pub(crate) token: Option<u32>,
    pub(crate) range: Range<usize>,
}

/// The added tokens of one kind.
pub(crate) struct Added {
    texts: Option<AhoCorasick>,
    /// In the order of the patterns.
    tokens: Vec<(u32, AddedToken)>,
    word: Regex,
}

impl Added {
    /// Those that are looked for in the text as it is, and those that are looked for in normalised text.
    pub(crate) fn of(inner: &Inner, steps: &[Normal]) -> tokenizers::Result<[Added; 2]> {
        let mut tokens: Vec<_> = inner.get_added_tokens_decoder().into_iter().collect();
        tokens.sort_by_key(|(id, _)| *id);
        let (normal, raw): (Vec<_>, Vec<_>) =
            tokens.into_iter().partition(|(_, token)| token.normalized);
        let text_of = |token: &AddedToken| match token.normalized {
            true => normalised(&token.content, steps),
            false => Ok(token.content.clone()),
        };
        let build = |tokens: Vec<(u32, AddedToken)>| {
            let texts = tokens.iter().map(|(_, t)| text_of(t)).collect::<Result<Vec<_>, _>>()?;
            let found = AhoCorasick::builder().match_kind(MatchKind::LeftmostLongest).build(&texts);
            Ok::<_, tokenizers::Error>(Added {
                texts: if texts.is_empty() { None } else { Some(found?) },
                tokens,
                word: Regex::new(r"^\w$")?,
            })
        };
        Ok([build(raw)?, build(normal)?])
    }

    /// The parts of `text`, in order. `is_control` says which ids are only parsed where `touch`, of the range of
    /// their text, is nothing.
    pub(crate) fn split<E>(
        &self,
        text: &str,
        control: &BTreeSet<u32>,
        touch: impl Fn(Range<usize>) -> Touch,
        mut each: impl FnMut(Part) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut done = 0;
        let (mut from, mut to) = (0, text.len());
        loop {
            let is_retry = to < text.len();
            let (index, found) = match self.find(text, from..to) {
                Some((index, found)) if !is_retry || found.start == from => (index, found),
                // Nothing shorter starts where the token that was refused did.
                _ if is_retry => {
                    (from, to) = (next_char(text, from), text.len());
                    continue;
                }
                _ => break,
            };
            let (id, token) = &self.tokens[index];
            if control.contains(id) {
                match touch(found.clone()) {
                    Touch::Nothing => {}
                    // As the library does: the text of a token that is not parsed is taken, for no other to start in it.
                    Touch::All => {
                        (from, to) = (found.end, text.len());
                        continue;
                    }
                    // Foreign bytes must not hide a token that is in the text's own: a shorter one, or a later one.
                    Touch::Part => {
                        (from, to) = (found.start, last_char(text, found.end));
                        continue;
                    }
                }
            }
            (from, to) = (found.end, text.len());
            if token.single_word && !self.is_apart(text, &found) {
                continue;
            }
            let Range { mut start, mut end } = found;
            if token.lstrip {
                start = text[..start].trim_end().len().max(done);
            }
            if token.rstrip {
                end = text.len() - text[end..].trim_start().len();
            }
            if done < start {
                each(Part { token: None, range: done..start })?;
            }
            each(Part { token: Some(*id), range: start..end })?;
            done = end;
        }
        match done < text.len() || text.is_empty() {
            true => each(Part { token: None, range: done..text.len() }),
            false => Ok(()),
        }
    }

    fn find(&self, text: &str, range: Range<usize>) -> Option<(usize, Range<usize>)> {
        let found = self.texts.as_ref()?.find(Input::new(text).range(range))?;
        Some((found.pattern().as_usize(), found.range()))
    }

    fn is_apart(&self, text: &str, range: &Range<usize>) -> bool {
        let is_word =
            |c: Option<char>| c.is_some_and(|c| self.word.matches(c.encode_utf8(&mut [0; 4])));
        !is_word(text[..range.start].chars().next_back())
            && !is_word(text[range.end..].chars().next())
    }
}

/// What these steps make of the text of an added token.
pub(crate) fn normalised(text: &str, steps: &[Normal]) -> tokenizers::Result<String> {
    let mut text = NormalizedString::from(text);
    let limit = MAX_GROWTH.saturating_mul(text.len());
    steps.iter().try_for_each(|step| step.run(&mut text, limit))?;
    Ok(text.get().to_owned())
}

fn next_char(text: &str, at: usize) -> usize {
    at + text[at..].chars().next().map_or(1, char::len_utf8)
}

fn last_char(text: &str, at: usize) -> usize {
    at - text[..at].chars().next_back().map_or(0, char::len_utf8)
}
