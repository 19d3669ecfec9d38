//! Chat contents that cannot speak for the template.
//!
//! A chat template renders one string in which the template's own `<|im_end|>` and one that a user typed look alike.
//! Before rendering, [`Tokenizer::shield`] replaces the text of every special token inside a content by a mark made of
//! Unicode noncharacters, which no template treats specially and no text holds; [`Tokenizer::encode_shielded`] encodes
//! the rendered string with special tokens parsed, and the marks as the plain characters that they stand for.
//! Contents without such text, the normal case, are not changed and give the ids that they always gave.

use std::borrow::Cow;

use crate::chat::{ChatTemplate, Message};
use crate::error::Error;
use crate::memory;
use crate::tokenizer::{Special, Tokenizer};

const OPEN: char = '\u{fdd0}';
const CLOSE: char = '\u{fdd1}';

/// Memory that shielding takes at most for each byte: a special token of one character becomes a mark of nine, in a
/// string whose room doubles as it grows.
const SHIELD_BYTES: usize = 32;

impl Tokenizer {
    /// Marks the text of special tokens in a content that a chat template will render.
    pub fn shield<'a>(&self, content: &'a str) -> Cow<'a, str> {
        let texts = self.special_texts();
        let marked = |c: char| c == OPEN || c == CLOSE;
        if !content.contains(marked) && !texts.iter().any(|text| content.contains(text.as_str())) {
            return Cow::Borrowed(content);
        }
        let mut out = String::with_capacity(content.len());
        let mut rest = content;
        while let Some(c) = rest.chars().next() {
            // Longest first, so that of two tokens that start here the one that the tokenizer would take is taken.
            let at =
                texts.iter().position(|text| !text.is_empty() && rest.starts_with(text.as_str()));
            let len = match at {
                Some(index) => {
                    out.extend([OPEN.to_string(), index.to_string(), CLOSE.to_string()]);
                    texts[index].len()
                }
                // A mark that the user typed means nothing and is dropped.
                None if marked(c) => c.len_utf8(),
                None => {
                    out.push(c);
                    c.len_utf8()
                }
            };
            rest = &rest[len..];
        }
        Cow::Owned(out)
    }

    /// Encodes a rendered chat whose contents were shielded.
    pub fn encode_shielded(&self, rendered: &str) -> Result<Vec<u32>, Error> {
        let mut ids = Vec::new();
        let mut rest = rendered;
        while let Some((before, tail)) = rest.split_once(OPEN) {
            let mark = tail.split_once(CLOSE);
            let text =
                mark.and_then(|(index, _)| self.special_texts().get(index.parse::<usize>().ok()?));
            memory::extend(&mut ids, &self.encode(before, Special::Parse)?, "token ids")?;
            // A template that cut a mark in two leaves a part that means nothing.
            rest = match (text, mark) {
                (Some(text), Some((_, after))) => {
                    memory::extend(&mut ids, &self.encode(text, Special::Plain)?, "token ids")?;
                    after
                }
                _ => tail,
            };
        }
        memory::extend(&mut ids, &self.encode(rest, Special::Parse)?, "token ids")?;
        Ok(ids)
    }
}

impl ChatTemplate {
    /// The ids of a chat, ready for the model: rendered by the template, with the contents' own special tokens kept
    /// from being parsed. Nothing is to be added in front of them.
    pub fn encode(
        &self,
        tokenizer: &Tokenizer,
        messages: &[Message],
        add_generation_prompt: bool,
    ) -> Result<Vec<u32>, Error> {
        let n_bytes: usize = messages.iter().map(|m| m.role.len() + m.content.len()).sum();
        let bytes = SHIELD_BYTES.saturating_mul(n_bytes) + size_of_val(messages);
        memory::room_for(bytes, "a chat's messages")?;
        let shield =
            |m: &Message| Message::new(tokenizer.shield(&m.role), tokenizer.shield(&m.content));
        let shielded: Vec<Message> = messages.iter().map(shield).collect();
        tokenizer.encode_shielded(&self.render(&shielded, add_generation_prompt)?)
    }
}
