//! Ids to text as they come.

use crate::decode::{Run, Text};
use crate::error::Error;
use crate::tokenizer::{Special, Tokenizer};

/// Ids to text as they come. What [`push`](TextStream::push) and [`finish`](TextStream::finish) return, joined, is
/// what [`Tokenizer::decode`] makes of all ids at once. Text is held back only while a later id may change it: an
/// incomplete character, or a run of raw bytes (`<0x0A>`), which is known to be text when it ends.
///
/// Each push decodes a short window of the latest tokens, so that a long answer costs no more per token than a short one.
#[derive(Debug, Clone)]
pub struct TextStream {
    tokenizer: Tokenizer,
    special: Special,
    run: Run,
    window: Vec<String>,
    /// How much of the window's text was returned.
    emitted: usize,
}

impl TextStream {
    /// Tokens in a window after it was cut, and when it is cut. The first must cover the three tokens over which an
    /// incomplete character can stretch, and one more for decoders that treat the first token differently.
    const KEEP: usize = 8;
    const CUT: usize = 24;
    /// Ids that a stream's state can depend on: those of a window and of a run, where no run began before them.
    const MEMORY: usize = 128;

    /// A stream; `special` as in [`Tokenizer::decode`].
    pub fn new(tokenizer: &Tokenizer, special: Special) -> TextStream {
        TextStream {
            tokenizer: tokenizer.clone(),
            special,
            run: Run::default(),
            window: Vec::new(),
            emitted: 0,
        }
    }

    /// A stream that goes on where one that took the ids of `before`, and was not finished, is dropped: the texts that
    /// both return, joined, are the text of all ids. What the first held back comes with the second's text.
    pub fn after(
        tokenizer: &Tokenizer,
        special: Special,
        before: &[u32],
    ) -> Result<TextStream, Error> {
        let mut stream = TextStream::new(tokenizer, special);
        let start = before.len().saturating_sub(TextStream::MEMORY);
        let is_raw = |id: &u32| tokenizer.is_raw_byte(*id) || stream.is_silent(*id);
        let start = before[..start].iter().rposition(|id| !is_raw(id)).unwrap_or(0);
        for &id in &before[start..] {
            stream.push(id)?;
        }
        Ok(stream)
    }

    /// Takes the next id and returns the text that is now complete, often one word, sometimes nothing.
    pub fn push(&mut self, id: u32) -> Result<String, Error> {
        self.tokenizer.check_ids(&[id])?;
        // Silent tokens stay out of the window, where they could be all the context that is left.
        if self.is_silent(id) {
            return Ok(String::new());
        }
        let Some(token) = self.tokenizer.id_to_token(id) else { return Ok(String::new()) };
        let (mut run, mut new) = (self.run.clone(), Vec::new());
        self.tokenizer.decoding(|decoder| decoder.push(&mut run, token, &mut new))?;
        let n_new = new.len();
        self.window.append(&mut new);
        let text = self.text().inspect_err(|_| self.window.truncate(self.window.len() - n_new))?;
        self.run = run;
        let new = self.take(&text.text, text.text.len() - text.open);
        if self.window.len() >= TextStream::CUT {
            self.window.drain(..self.window.len() - TextStream::KEEP);
            let kept = self.text()?;
            self.emitted = kept.text.len() - kept.open;
        }
        Ok(new)
    }

    /// Ends the stream and returns what was held back.
    pub fn finish(mut self) -> Result<String, Error> {
        let TextStream { tokenizer, run, window, .. } = &mut self;
        tokenizer.decoding(|decoder| decoder.finish(run, window))?;
        let text = self.text()?.text;
        Ok(self.take(&text, text.len()))
    }

    fn is_silent(&self, id: u32) -> bool {
        self.special == Special::Parse && self.tokenizer.is_special(id)
    }

    fn text(&self) -> Result<Text, Error> {
        self.tokenizer.decoding(|decoder| decoder.text(self.window.clone()))
    }

    fn take(&mut self, text: &str, end: usize) -> String {
        match text.get(self.emitted..end) {
            Some(new) => {
                self.emitted = end;
                new.to_owned()
            }
            None => String::new(),
        }
    }
}
