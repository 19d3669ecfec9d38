//! From tokens to text.
//!
//! The steps are the tokenizer library's, in its order, but for three that are done here: so that what a file asks for
//! is bounded (`Replace`), and so that it is known which text at the end may still change (`ByteFallback`, `ByteLevel`).
//! A whole list of ids and a stream of them run the same code, so that they cannot give different texts.
//!
//! Raw bytes (`<0x0A>`) next to each other are a run. As in the library, a run that is UTF-8 is that text, and any other is
//! one U+FFFD for each byte; so the text of a run is known when it ends. A run also ends where it holds [`RUN`] bytes
//! of complete characters: no one waits for longer. (The library has no such end; texts differ where more than so many
//! raw bytes in a row are not UTF-8.)

use tokenizers::{Decoder as _, DecoderWrapper};

use crate::words::Regex;

/// Raw bytes after which a run of complete characters, or of no text, ends.
const RUN: usize = 64;
/// How much longer the text of tokens may become on its way, and besides.
const GROWTH: usize = 16;
const GROWTH_BESIDES: usize = 1 << 10;

/// A tokenizer's way from tokens to text.
pub(crate) struct Decoder {
    /// Steps that see one token after the other.
    early: Vec<Early>,
    /// Steps that see all of them; `None`: the tokenizer has no decoder at all.
    late: Option<Vec<Late>>,
}

enum Early {
    Replace(Replace),
    ByteFallback,
}

enum Late {
    Replace(Replace),
    ByteLevel,
    Library(DecoderWrapper),
}

struct Replace {
    pattern: Regex,
    content: String,
}

/// The raw bytes of a run that has not ended.
#[derive(Debug, Clone, Default)]
pub(crate) struct Run(Vec<u8>);

/// Text, and how many bytes at its end another token may still change.
pub(crate) struct Text {
    pub(crate) text: String,
    pub(crate) open: usize,
}

type Result<T> = tokenizers::Result<T>;

impl Decoder {
    pub(crate) fn of(decoder: Option<&DecoderWrapper>) -> Result<Decoder> {
        let Some(decoder) = decoder else { return Ok(Decoder { early: Vec::new(), late: None }) };
        let mut steps = Vec::new();
        flatten(decoder, &mut steps);
        let mut early = Vec::new();
        let mut late = Vec::new();
        for step in steps {
            let has_run = early.iter().any(|step| matches!(step, Early::ByteFallback));
            match step {
                DecoderWrapper::Replace(replace) => {
                    let content = replace.content.clone();
                    let replace = Replace { pattern: Regex::of_json(step)?, content };
                    if late.is_empty() {
                        early.push(Early::Replace(replace));
                    } else {
                        late.push(Late::Replace(replace));
                    }
                }
                DecoderWrapper::ByteFallback(_) if late.is_empty() && !has_run => {
                    early.push(Early::ByteFallback);
                }
                DecoderWrapper::ByteLevel(_) => late.push(Late::ByteLevel),
                _ => late.push(Late::Library(step.clone())),
            }
        }
        Ok(Decoder { early, late: Some(late) })
    }

    /// Takes the next token; what is known of the text then goes to `out`.
    pub(crate) fn push(&self, run: &mut Run, token: String, out: &mut Vec<String>) -> Result<()> {
        early(&self.early, run, limit(token.len()), token, out)
    }

    /// There is no next token.
    pub(crate) fn finish(&self, run: &mut Run, out: &mut Vec<String>) -> Result<()> {
        let Some(at) = self.early.iter().position(|step| matches!(step, Early::ByteFallback))
        else {
            return Ok(());
        };
        run.end(&mut |text| {
            early(&self.early[at + 1..], &mut Run::default(), limit(text.len()), text, out)
        })
    }

    /// The bytes that a token is in a text; `None`: these are a matter of the tokens around it, or of where it stands.
    /// (What only happens at the ends of a text is passed over: a space that is dropped in front.)
    pub(crate) fn bytes(&self, mut token: String) -> Result<Option<Vec<u8>>> {
        let limit = limit(token.len());
        for step in &self.early {
            match step {
                Early::Replace(replace) => token = replace.run(&token, limit)?,
                Early::ByteFallback => {
                    if let Some(byte) = raw_byte(&token) {
                        return Ok(Some(vec![byte]));
                    }
                }
            }
        }
        let mut bytes = None;
        let mut is_fused = false;
        let Some(late) = &self.late else { return Ok(None) };
        for step in late {
            match step {
                Late::Replace(replace) if bytes.is_none() && !is_fused => {
                    token = replace.run(&token, limit)?;
                }
                Late::ByteLevel if bytes.is_none() => bytes = Some(bytes_of(&token)),
                Late::Library(DecoderWrapper::Fuse(_)) => is_fused = true,
                Late::Library(DecoderWrapper::Strip(_)) if is_fused || bytes.is_some() => {}
                Late::Library(DecoderWrapper::Metaspace(space)) if bytes.is_none() => {
                    token = token.replace(space.get_replacement(), " ");
                }
                _ => return Ok(None),
            }
        }
        Ok(Some(bytes.unwrap_or_else(|| token.into_bytes())))
    }

    /// The text of all that [`push`](Decoder::push) and [`finish`](Decoder::finish) gave.
    pub(crate) fn text(&self, mut tokens: Vec<String>) -> Result<Text> {
        let Some(late) = &self.late else { return Ok(Text { text: tokens.join(" "), open: 0 }) };
        let limit = limit(tokens.iter().map(String::len).sum());
        let mut open = 0;
        for step in late {
            match step {
                Late::Replace(replace) => {
                    tokens = tokens
                        .iter()
                        .map(|token| replace.run(token, limit))
                        .collect::<Result<_>>()?;
                }
                Late::ByteLevel => {
                    let bytes: Vec<u8> = tokens.iter().flat_map(|token| bytes_of(token)).collect();
                    let is_open =
                        bytes.utf8_chunks().last().is_some_and(|last| is_start(last.invalid()));
                    open = if is_open { '\u{fffd}'.len_utf8() } else { 0 };
                    tokens = vec![String::from_utf8_lossy(&bytes).into_owned()];
                }
                // The library assumes that there is a token.
                Late::Library(_) if tokens.is_empty() => {}
                Late::Library(step) => tokens = step.decode_chain(tokens)?,
            }
            if tokens.iter().map(String::len).sum::<usize>() > limit {
                return Err(TOO_LONG.into());
            }
        }
        let text = tokens.concat();
        Ok(Text { open: if text.ends_with('\u{fffd}') { open } else { 0 }, text })
    }
}

const TOO_LONG: &str =
    "the tokenizer's decoder makes text that is more than 16 times as long as the tokens";

fn limit(len: usize) -> usize {
    len.saturating_mul(GROWTH).saturating_add(GROWTH_BESIDES)
}

fn flatten<'a>(decoder: &'a DecoderWrapper, steps: &mut Vec<&'a DecoderWrapper>) {
    match decoder {
        DecoderWrapper::Sequence(sequence) => {
            sequence.get_decoders().iter().for_each(|step| flatten(step, steps));
        }
        _ => steps.push(decoder),
    }
}

/// Runs a token through these steps, in which it may become `limit` bytes long.
fn early(
    steps: &[Early],
    run: &mut Run,
    limit: usize,
    token: String,
    out: &mut Vec<String>,
) -> Result<()> {
    let Some((step, steps)) = steps.split_first() else {
        out.push(token);
        return Ok(());
    };
    match step {
        Early::Replace(replace) => early(steps, run, limit, replace.run(&token, limit)?, out),
        Early::ByteFallback => {
            // There is one run, and behind its step none.
            let mut next = |text| early(steps, &mut Run::default(), limit, text, out);
            match raw_byte(&token) {
                Some(byte) => run.add(byte, &mut next),
                None => run.end(&mut next).and_then(|()| next(token)),
            }
        }
    }
}

/// The byte that a token like `<0x0A>` stands for.
fn raw_byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() == 2 { u8::from_str_radix(digits, 16).ok() } else { None }
}

/// Whether more bytes could make a character of these.
fn is_start(bytes: &[u8]) -> bool {
    !bytes.is_empty() && std::str::from_utf8(bytes).is_err_and(|err| err.error_len().is_none())
}

impl Run {
    fn add(&mut self, byte: u8, next: &mut impl FnMut(String) -> Result<()>) -> Result<()> {
        self.0.push(byte);
        let is_open = std::str::from_utf8(&self.0).is_err_and(|err| err.error_len().is_none());
        if self.0.len() >= RUN && !is_open { self.end(next) } else { Ok(()) }
    }

    fn end(&mut self, next: &mut impl FnMut(String) -> Result<()>) -> Result<()> {
        let bytes = std::mem::take(&mut self.0);
        if bytes.is_empty() {
            return Ok(());
        }
        next(String::from_utf8(bytes).unwrap_or_else(|err| "\u{fffd}".repeat(err.as_bytes().len())))
    }
}

impl Replace {
    fn run(&self, token: &str, limit: usize) -> Result<String> {
        let mut text = String::new();
        for ((start, end), is_match) in self.pattern.find(token)? {
            text.push_str(if is_match { &self.content } else { &token[start..end] });
            if text.len() > limit {
                return Err(TOO_LONG.into());
            }
        }
        Ok(text)
    }
}

/// The bytes of a byte-level token; of a token that is none, its own.
fn bytes_of(token: &str) -> Vec<u8> {
    let bytes: Option<Vec<u8>> = token.chars().map(byte_of).collect();
    bytes.unwrap_or_else(|| token.as_bytes().to_vec())
}

/// The byte that a character of a byte-level vocabulary stands for: those that print stand for themselves, the others
/// are numbered from 256 on.
fn byte_of(c: char) -> Option<u8> {
    match u32::from(c) {
        code @ (0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff) => u8::try_from(code).ok(),
        code @ 0x100..=0x120 => u8::try_from(code - 0x100).ok(),
        code @ 0x121..=0x142 => u8::try_from(code - 0x121 + 0x7f).ok(),
        0x143 => Some(0xad),
        _ => None,
    }
}
