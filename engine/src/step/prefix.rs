//! Prefixes: pages that a sequence takes over from another one's prompt, and those that it offers.

use super::member::Member;
use crate::pool::{ChainKey, Filled, Pool, ROOT};
use crate::sequence::{Mark, Pending};

impl Member<'_> {
    /// Rows of a prompt are through the first segment: lets other sessions share the pages that they filled there, where
    /// `n_before` tokens could be shared before. What a full page holds is final: it leaves the index before
    /// anything is written to it again. One that prunes needs the hidden states behind it too, which are there if
    /// the model was opened to keep them.
    pub(crate) fn offer_prefix(&self, n_before: usize, pool: &mut Pool) {
        let layout = &self.shared.plan.layout;
        let n_full = |n_tokens: usize| layout.place(n_tokens).0;
        let is_prompt = matches!(self.seq.pending, Pending::Prompt { .. });
        if !is_prompt || !self.offers() || n_full(self.seq.n_shareable) == n_full(n_before) {
            return;
        }
        let segment = &self.seq.segments[0];
        let prunes = self.seq.recipe.lazy.is_some();
        let hidden =
            prunes.then(|| self.seq.waiting.whole_pages(self.seq.n_shareable, layout.page_len));
        let filled = Filled {
            page_table: &segment.body,
            n_layers: segment.n_layers,
            hidden: hidden.as_deref(),
        };
        let tokens = &self.seq.tokens[..self.seq.n_shareable];
        let held = pool.prefixes.enter(self.prefix_root(), tokens, layout, filled);
        pool.aux.transit.share(&held);
    }

    /// True if other sessions may share its pages.
    fn offers(&self) -> bool {
        let plan = &self.shared.plan;
        let has_rolled = self.seq.segments[0].slots.n_gone() > 0;
        // A stream whose prompt is longer than what it sees leaves its pages behind before the prompt is through.
        let end = u32::try_from(self.seq.len() + self.seq.pending.len()).unwrap_or(u32::MAX);
        let first_gone = plan.layout.n_slots(2);
        let will_roll = self.seq.recipe.rule.first_seen(end) as usize >= first_gone;
        self.seq.recipe.offers_prefix && !has_rolled && !will_roll
    }

    /// Where the chains of pages begin that the session may share.
    pub(crate) fn prefix_root(&self) -> ChainKey {
        if self.seq.recipe.lazy.is_some() { self.seq.segments[0].n_layers as u64 } else { ROOT }
    }

    /// The prompt and how much of it is done, if it is all that the session has and not through the first segment.
    fn whole_prompt(&self) -> Option<(&[u32], usize)> {
        match &self.seq.pending {
            Pending::Prompt { tokens, done }
                if self.seq.len() == *done && self.seq.stage.segment == 0 =>
            {
                Some((tokens, *done))
            }
            _ => None,
        }
    }

    /// The leading tokens of a prompt whose pages may be another session's, and how many of them are done: full pages.
    fn wanted(&self) -> Option<(&[u32], usize)> {
        let (tokens, done) = self.whole_prompt()?;
        let shared = self.shared;
        let layout = &shared.plan.layout;
        if !self.seq.recipe.takes_prefix || layout.n_slots(layout.n_pages(done)) != done {
            return None;
        }
        // The last token is always computed, as its logits are wanted, and so are all rows that score together. Up to its
        // capacity a stream is as any other.
        let capacity = self.seq.recipe.rule.capacity() as usize;
        Some((&tokens[..(tokens.len() - self.seq.n_mass_rows()).min(capacity)], done))
    }

    /// The tokens of a prompt up to the end of the page that it could take over next.
    pub(crate) fn next_page(&self) -> Option<&[u32]> {
        let (wanted, done) = self.wanted()?;
        let layout = &self.shared.plan.layout;
        wanted.get(..layout.n_slots(layout.n_pages(done) + 1))
    }

    /// True if the session computes a prompt that begins with these tokens, and others may share its pages as soon as it
    /// has come to their end.
    pub(crate) fn is_filling(&self, wanted: &[u32]) -> bool {
        let capacity = self.seq.recipe.rule.capacity() as usize;
        let is_ahead = |(tokens, done): (&[u32], usize)| {
            // From the end: prompts that begin alike differ there.
            let begins_so = |begin: &[u32]| begin.iter().rev().eq(wanted.iter().rev());
            done < wanted.len() && tokens.get(..wanted.len()).is_some_and(begins_so)
        };
        self.offers() && wanted.len() <= capacity && self.whole_prompt().is_some_and(is_ahead)
    }

    /// Takes over the next full pages that another session's prompt has filled already; gives what the sequence was
    /// before, if there are any.
    pub(crate) fn share_prefix(&mut self) -> Option<Mark> {
        let root = self.prefix_root();
        let (wanted, n_done) = self.wanted()?;
        let shared = self.shared;
        let layout = &shared.plan.layout;
        let mut pool = shared.pool();
        let mut found = pool.prefixes.find(root, wanted, layout);
        let n_layers = self.seq.segments[0].n_layers;
        let end = layout.n_slots(found.columns.len() / n_layers);
        if end <= n_done {
            return None;
        }
        let to = self.seq.mark();
        found.skip(layout.n_pages(n_done), n_layers);
        pool.pages.share(&found.columns);
        pool.aux.transit.share(&found.hidden);
        self.seq.adopt(found, n_done..end, layout.page_len);
        if let Pending::Prompt { tokens, done } = &mut self.seq.pending {
            self.seq.tokens.extend_from_slice(&tokens[n_done..end]);
            *done = end;
        }
        self.seq.n_shareable = end;
        self.seq.receipt.n_shared += end - n_done;
        Some(to)
    }
}
