//! Words: the steps between a text and what the vocabulary is asked for.
//!
//! The steps are the tokenizer library's, but for those that match a pattern. There the library takes a failure of the
//! pattern's engine, which gives up on long runs, for the end of the matches, and what follows gets wrong ids. Here
//! a failure is an error; and the patterns in use do not fail, as they are matched without looking ahead.

use fancy_regex::Regex as Engine;
use serde_json::Value as Json;
use tokenizers::normalizer::SplitDelimiterBehavior;
use tokenizers::normalizers::NormalizerWrapper;
use tokenizers::pattern::{Invert, Pattern};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::split::SplitPattern;
use tokenizers::{NormalizedString, Normalizer, Offsets, PreTokenizedString, PreTokenizer, Result};

/// How GPT-2 splits words, which [`ByteLevel`] does unless it is told not to.
pub(crate) const GPT2: &str =
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

/// How nearly all patterns for words end: of white space in front of a word, all but the last is a word of its own.
const LAST_SPACE: &str = r"|\s+(?!\S)|\s+";

/// A pattern, compiled.
pub(crate) struct Regex {
    engine: Engine,
    /// Whether the pattern ended in [`LAST_SPACE`]. The engine's ends in a group for white space instead, and what
    /// looking ahead would do is done to what the group matched.
    leaves_last_space: bool,
}

impl Regex {
    pub(crate) fn new(pattern: &str) -> Result<Regex> {
        let words = pattern.strip_suffix(LAST_SPACE);
        let own = words.map(|words| format!(r"{words}|(\s+)"));
        // A group of the pattern's own would be counted too.
        let own =
            own.as_deref().and_then(|own| Engine::new(own).ok().filter(|e| e.captures_len() == 2));
        let leaves_last_space = own.is_some();
        let engine = match own {
            Some(engine) => engine,
            None => Engine::new(pattern)?,
        };
        Ok(Regex { engine, leaves_last_space })
    }

    /// Whether the pattern occurs in `text`; for patterns that cannot fail.
    pub(crate) fn matches(&self, text: &str) -> bool {
        self.engine.is_match(text).unwrap_or(false)
    }

    /// The end of a match once its last white space is left to the next word, if it is to be.
    fn end(&self, text: &str, start: usize, end: usize) -> Result<usize> {
        let found = &text[start..end];
        let Some((last, _)) = found.char_indices().next_back().filter(|&(last, _)| last > 0) else {
            return Ok(end);
        };
        if !self.leaves_last_space || end == text.len() || !found.chars().all(char::is_whitespace) {
            return Ok(end);
        }
        let groups = self.engine.captures_from_pos(text, start)?;
        let is_space = groups.is_some_and(|groups| groups.get(1).is_some());
        Ok(if is_space { start + last } else { end })
    }
}

impl Pattern for &Regex {
    fn find_matches(&self, inside: &str) -> Result<Vec<(Offsets, bool)>> {
        if inside.is_empty() {
            return Ok(vec![((0, 0), false)]);
        }
        let mut matches = Vec::new();
        let mut done = 0;
        let mut add = |start: usize, end: usize| {
            if done != start {
                matches.push(((done, start), false));
            }
            matches.push(((start, end), true));
            done = end;
        };
        if self.leaves_last_space {
            let mut from = 0;
            while let Some(found) = self.engine.find_from_pos(inside, from)? {
                let end = self.end(inside, found.start(), found.end())?;
                if end == found.start() {
                    return Err("a pattern for words matches the empty text".into());
                }
                add(found.start(), end);
                from = end;
            }
        } else {
            for found in self.engine.find_iter(inside) {
                let found = found?;
                add(found.start(), found.end());
            }
        }
        if done != inside.len() {
            matches.push(((done, inside.len()), false));
        }
        Ok(matches)
    }
}

/// One step of normalisation.
pub(crate) enum Normal {
    Replace { pattern: Regex, content: String },
    Library(NormalizerWrapper),
}

impl Normal {
    /// The steps of a tokenizer's normaliser.
    pub(crate) fn steps(normalizer: Option<&NormalizerWrapper>) -> Result<Vec<Normal>> {
        let mut steps = Vec::new();
        normalizer.map_or(Ok(()), |step| Normal::add(step, &mut steps)).map(|()| steps)
    }

    fn add(step: &NormalizerWrapper, steps: &mut Vec<Normal>) -> Result<()> {
        match step {
            NormalizerWrapper::Sequence(sequence) => {
                return sequence.as_ref().iter().try_for_each(|step| Normal::add(step, steps));
            }
            NormalizerWrapper::Replace(replace) => {
                // The library keeps the pattern to itself, but writes it.
                let pattern = serde_json::to_value(step)?["pattern"].take();
                if let Some(pattern) = pattern.get("Regex").and_then(Json::as_str) {
                    let pattern = Regex::new(pattern)?;
                    steps.push(Normal::Replace { pattern, content: replace.content.clone() });
                    return Ok(());
                }
            }
            _ => {}
        }
        steps.push(Normal::Library(step.clone()));
        Ok(())
    }

    pub(crate) fn run(&self, text: &mut NormalizedString) -> Result<()> {
        match self {
            Normal::Replace { pattern, content } => text.replace(pattern, content),
            Normal::Library(step) => step.normalize(text),
        }
    }
}

/// One step from a text to words.
pub(crate) enum Step {
    Split {
        pattern: Regex,
        behavior: SplitDelimiterBehavior,
        invert: bool,
    },
    /// A space in front of what has none.
    PrefixSpace,
    Library(PreTokenizerWrapper),
}

impl Step {
    /// The steps of a tokenizer's pre-tokenizer.
    pub(crate) fn steps(pre_tokenizer: Option<&PreTokenizerWrapper>) -> Result<Vec<Step>> {
        let mut steps = Vec::new();
        pre_tokenizer.map_or(Ok(()), |step| Step::add(step, &mut steps)).map(|()| steps)
    }

    fn add(step: &PreTokenizerWrapper, steps: &mut Vec<Step>) -> Result<()> {
        match step {
            PreTokenizerWrapper::Sequence(sequence) => {
                sequence.as_ref().iter().try_for_each(|step| Step::add(step, steps))?;
            }
            PreTokenizerWrapper::Split(split) => {
                if let SplitPattern::Regex(pattern) = &split.pattern {
                    let (behavior, invert) = (split.behavior, split.invert);
                    steps.push(Step::Split { pattern: Regex::new(pattern)?, behavior, invert });
                } else {
                    steps.push(Step::Library(step.clone()));
                }
            }
            PreTokenizerWrapper::ByteLevel(level) => {
                if level.add_prefix_space {
                    steps.push(Step::PrefixSpace);
                }
                if level.use_regex {
                    let (behavior, invert) = (SplitDelimiterBehavior::Isolated, false);
                    steps.push(Step::Split { pattern: Regex::new(GPT2)?, behavior, invert });
                }
                let bytes = ByteLevel::new(false, level.trim_offsets, false);
                steps.push(Step::Library(PreTokenizerWrapper::ByteLevel(bytes)));
            }
            _ => steps.push(Step::Library(step.clone())),
        }
        Ok(())
    }

    pub(crate) fn run(&self, text: &mut PreTokenizedString) -> Result<()> {
        match self {
            Step::Split { pattern, behavior, invert: false } => {
                text.split(|_, part| part.split(pattern, *behavior))
            }
            Step::Split { pattern, behavior, invert: true } => {
                text.split(|_, part| part.split(Invert(pattern), *behavior))
            }
            Step::PrefixSpace => text.split(|_, mut part| {
                if !part.get().starts_with(' ') {
                    part.prepend(" ");
                }
                Ok([part])
            }),
            Step::Library(step) => step.pre_tokenize(text),
        }
    }
}
