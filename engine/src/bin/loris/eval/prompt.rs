//! From samples to tokens: the first prompt, and what comes between an answer and the next one.

use loris::Model;
use loris::loader::{Chat, Message, Special, Tokenizer};

use super::sample::{Sample, Turn};
use crate::exit::{BAD_MODEL, Failure};

/// Makes the tokens of prompts.
#[derive(Debug)]
pub(crate) struct Prompter<'m> {
    pub(crate) model: &'m Model,
    pub(crate) tokenizer: &'m Tokenizer,
    /// Through the chat template; else as a text to go on with.
    pub(crate) is_chat: bool,
}

impl Prompter<'_> {
    /// The prompt of a sample's first turn, up to where the model's own words begin.
    pub(crate) fn first(&self, sample: &Sample) -> Result<Vec<u32>, Failure> {
        let Some(turn) = sample.turns.first() else { return Ok(Vec::new()) };
        let asked = format!("{}\n\n{}", sample.context, turn.question);
        if !self.is_chat {
            let text = format!("{asked} {}", turn.lead);
            return Ok(self.tokenizer.encode_prompt(&text, Special::Plain)?);
        }
        let mut tokens = self.chat([Message::new("user", asked)])?;
        tokens.extend(self.tokenizer.encode(&turn.lead, Special::Plain)?);
        Ok(tokens)
    }

    /// What follows an answer: its end, the next question, the beginning of its answer.
    pub(crate) fn next(&self, turn: &Turn) -> Result<Vec<u32>, Failure> {
        if !self.is_chat {
            let text = format!("\n\n{} {}", turn.question, turn.lead);
            return Ok(self.tokenizer.encode(&text, Special::Plain)?);
        }
        // Two chats that differ in the answer alone end alike, with just these tokens. The answer that
        // the model gave stays in the session as it was generated and is not encoded again.
        let with = |answer: &str| {
            let question = Message::new("user", turn.question.as_str());
            self.chat([Message::new("user", "A"), Message::new("assistant", answer), question])
        };
        let (one, other) = (with("yes")?, with("no")?);
        let n_common = one.iter().rev().zip(other.iter().rev()).take_while(|(a, b)| a == b).count();
        let mut tokens = one[one.len() - n_common..].to_vec();
        tokens.extend(self.tokenizer.encode(&turn.lead, Special::Plain)?);
        Ok(tokens)
    }

    fn chat(&self, messages: impl Into<Vec<Message>>) -> Result<Vec<u32>, Failure> {
        self.model.encode_chat(&Chat::new(messages))?.ok_or_else(|| {
            Failure::new(BAD_MODEL, "the folder has no chat template; use --raw") // was looked at before
        })
    }
}
