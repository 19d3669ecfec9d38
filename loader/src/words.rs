//! Words: the steps between a text and what the vocabulary is asked for.
//!
//! The steps are the tokenizer library's, but for those that match a pattern. There the library takes a failure of the
//! pattern's engine, which gives up on long runs, for the end of the matches, and what follows gets wrong ids. Here
//! a failure is an error; and the patterns in use do not fail, as they are matched without looking ahead.

use fancy_regex::{Regex as Engine, RegexBuilder};
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

/// How often a pattern may try again for one match; then its text is refused.
const MAX_BACKTRACKS: usize = 100_000;

/// A pattern, compiled.
pub(crate) struct Regex {
    engine: Engine,
    /// Whether the pattern ended in [`LAST_SPACE`]. The engine's ends in a group for white space instead, and what
    /// looking ahead would do is done to what the group matched.
    leaves_last_space: bool,
    /// The length of the text that it matches; 0: it matches more than one text.
    literal_len: usize,
}

impl Regex {
    pub(crate) fn new(pattern: &str) -> Result<Regex> {
        let words = pattern.strip_suffix(LAST_SPACE);
        let own = words.map(|words| format!(r"{words}|(\s+)"));
        // A group of the pattern's own would be counted too.
        let build = |text: &str| RegexBuilder::new(text).backtrack_limit(MAX_BACKTRACKS).build();
        let own = own.and_then(|own| build(&own).ok().filter(|own| own.captures_len() == 2));
        let leaves_last_space = own.is_some();
        let engine = match own {
            Some(engine) => engine,
            None => build(pattern)?,
        };
        Ok(Regex { engine, leaves_last_space, literal_len: 0 })
    }

    /// The pattern of a `Replace` step, which the library keeps to itself, but writes.
    pub(crate) fn of_json(step: &impl serde::Serialize) -> Result<Regex> {
        match serde_json::to_value(step)?.get("pattern") {
            Some(pattern) => match (pattern.get("Regex"), pattern.get("String")) {
                (Some(Json::String(pattern)), _) => Regex::new(pattern),
                (_, Some(Json::String(text))) => {
                    let literal = Regex::new(&fancy_regex::escape(text))?;
                    Ok(Regex { literal_len: text.len(), ..literal })
                }
                _ => Err("a pattern is neither Regex nor String".into()),
            },
            None => Err("a step has no pattern".into()),
        }
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
        self.find(inside)
    }
}

impl Regex {
    /// The parts of a text, and whether they match.
    pub(crate) fn find(&self, inside: &str) -> Result<Vec<(Offsets, bool)>> {
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

/// How much longer a text may become on its way to words: its bytes for each of its own.
pub(crate) const MAX_GROWTH: usize = 32;
/// The most steps of a kind that a file may ask for.
const MAX_STEPS: usize = 32;

pub(crate) const GROWS: &str =
    "the tokenizer makes more than 32 bytes of a byte of text on its way to words";

/// One step of normalisation.
pub(crate) enum Normal {
    Replace { pattern: Regex, content: String },
    Library(NormalizerWrapper),
}

impl Normal {
    /// The steps of a tokenizer's normaliser.
    pub(crate) fn steps(normalizer: Option<&NormalizerWrapper>) -> Result<Vec<Normal>> {
        let mut steps = Vec::new();
        normalizer.map_or(Ok(()), |step| Normal::add(step, &mut steps))?;
        at_most(steps.len(), MAX_STEPS, "steps in its normalizer")?;
        Ok(steps)
    }

    fn add(step: &NormalizerWrapper, steps: &mut Vec<Normal>) -> Result<()> {
        match step {
            NormalizerWrapper::Sequence(sequence) => {
                return sequence.as_ref().iter().try_for_each(|step| Normal::add(step, steps));
            }
            NormalizerWrapper::Replace(replace) => {
                let content = replace.content.clone();
                steps.push(Normal::Replace { pattern: Regex::of_json(step)?, content });
                return Ok(());
            }
            NormalizerWrapper::Prepend(prepend) => {
                at_most(
                    prepend.prepend.len(),
                    MAX_GROWTH - 1,
                    "bytes that its normalizer prepends",
                )?;
            }
            NormalizerWrapper::Precompiled(_) => {
                let longest = longest_of_charsmap(step)?;
                at_most(longest, 4 * MAX_GROWTH, "bytes that its normalizer makes of a character")?;
            }
            _ => {}
        }
        steps.push(Normal::Library(step.clone()));
        Ok(())
    }

    /// How many bytes at most it makes of one, as far as that can be known.
    pub(crate) fn growth(&self) -> usize {
        match self {
            // Where there may be an empty match, in front of each byte.
            Normal::Replace { pattern, content } => match pattern.literal_len {
                0 => 1 + content.len(),
                len => content.len().div_ceil(len).max(1),
            },
            Normal::Library(step) => match step {
                NormalizerWrapper::StripNormalizer(_)
                | NormalizerWrapper::StripAccents(_)
                | NormalizerWrapper::Nmt(_) => 1,
                NormalizerWrapper::Lowercase(_) | NormalizerWrapper::ByteLevel(_) => 2,
                // The Unicode standard's figures for UTF-8.
                NormalizerWrapper::NFC(_) | NormalizerWrapper::NFD(_) => 3,
                NormalizerWrapper::NFKC(_) | NormalizerWrapper::NFKD(_) => 11,
                NormalizerWrapper::Prepend(prepend) => 1 + prepend.prepend.len(),
                _ => MAX_GROWTH,
            },
        }
    }

    /// Whether it puts something in front of a text.
    pub(crate) fn prepends(&self) -> bool {
        matches!(self, Normal::Library(NormalizerWrapper::Prepend(_)))
    }

    /// Normalises a part of a text, which may become `limit` bytes long.
    pub(crate) fn run(&self, text: &mut NormalizedString, limit: usize) -> Result<()> {
        match self {
            Normal::Replace { pattern, content } => {
                let parts = pattern.find(text.get())?;
                let len = |&((start, end), is_match): &(Offsets, bool)| {
                    if is_match { content.len() } else { end - start }
                };
                if parts.iter().map(len).fold(0, usize::saturating_add) > limit {
                    return Err(GROWS.into());
                }
                text.replace(&Found(parts), content)?;
            }
            Normal::Library(step) => step.normalize(text)?,
        }
        if text.get().len() > limit { Err(GROWS.into()) } else { Ok(()) }
    }
}

/// Matches that were found already.
struct Found(Vec<(Offsets, bool)>);

impl Pattern for &Found {
    fn find_matches(&self, _: &str) -> Result<Vec<(Offsets, bool)>> {
        Ok(self.0.clone())
    }
}

/// Refuses what a file asks for beyond a limit.
pub(crate) fn at_most(found: usize, limit: usize, what: &str) -> Result<()> {
    match found <= limit {
        true => Ok(()),
        false => Err(format!("{found} {what}, expected at most {limit}").into()),
    }
}

/// The longest text that a map of characters makes of one. The map is in base64: the length of a trie, the trie, and
/// texts that end with a zero.
fn longest_of_charsmap(step: &NormalizerWrapper) -> Result<usize> {
    let json = serde_json::to_value(step)?;
    let text = json.get("precompiled_charsmap").and_then(Json::as_str).unwrap_or_default();
    let mut bytes = Vec::with_capacity(text.len());
    let (mut bits, mut n_bits) = (0_u32, 0);
    for digit in text.bytes() {
        let value = match digit {
            b'A'..=b'Z' => digit - b'A',
            b'a'..=b'z' => digit - b'a' + 26,
            b'0'..=b'9' => digit - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => break,
        };
        (bits, n_bits) = (bits << 6 | u32::from(value), n_bits + 6);
        if n_bits >= 8 {
            n_bits -= 8;
            bytes.push((bits >> n_bits) as u8);
        }
    }
    let n_trie = bytes.first_chunk::<4>().map_or(0, |len| u32::from_le_bytes(*len) as usize);
    let texts = bytes.get(4_usize.saturating_add(n_trie)..).unwrap_or_default();
    Ok(texts.split(|&byte| byte == 0).map(<[u8]>::len).max().unwrap_or(0))
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
        pre_tokenizer.map_or(Ok(()), |step| Step::add(step, &mut steps))?;
        at_most(steps.len(), MAX_STEPS, "steps in its pre_tokenizer")?;
        Ok(steps)
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

    /// How many bytes at most it makes of one; with `is_last`, how many characters.
    pub(crate) fn growth(&self, is_last: bool) -> usize {
        match self {
            Step::PrefixSpace => 2,
            Step::Library(PreTokenizerWrapper::ByteLevel(_)) if is_last => 1,
            Step::Library(PreTokenizerWrapper::ByteLevel(_)) => 2,
            // A mark of three bytes in front, and one for each space.
            Step::Library(PreTokenizerWrapper::Metaspace(step)) => {
                1 + step.get_replacement().len_utf8()
            }
            _ => 1,
        }
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
