//! What a session is asked for, and the numbers of its model that decide what it may do.

use crate::compute::Lazy;
use crate::error::Error;
use crate::keep::Evict;
use crate::read::{MAX_SINKS, Rule};
use crate::store::PageLayout;

/// How a session is opened.
#[derive(Clone, Debug, Default)]
pub struct SessionOptions {
    /// Tokens the session may hold; `None`: what the model was trained for.
    pub ctx_len: Option<usize>,
    /// Where tokens are pruned; `None`: every token goes through every layer.
    pub lazy: Option<Lazy>,
    /// Attention sinks and a rolling window, for sequences without end; `None`: every token sees all before it.
    pub stream: Option<StreamOptions>,
    /// Which tokens leave the cache for good, layer by layer; `None`: none does.
    pub evict: Option<Evict>,
    /// Restores blobs of before version 4 of the format too. They do not say with which config and tokenizer they were
    /// made: if it was not the model's, the session answers nonsense.
    pub trust_old_state: bool,
}

/// What a session without end sees; see [`Rule`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StreamOptions {
    /// Tokens at the start that every token sees.
    pub sink: usize,
    /// Tokens that a token sees besides, itself the last.
    pub window: usize,
}

/// Numbers of a model that decide what its sessions may do.
#[derive(Clone, Copy, Debug)]
pub struct Facts {
    /// Shape of a page.
    pub layout: PageLayout,
    /// Pages in the pool.
    pub n_pages: usize,
    /// Pages of hidden states that wait.
    pub n_aux_pages: usize,
    /// Layers.
    pub n_layers: usize,
    /// Prompt rows of a pass.
    pub chunk: usize,
    /// Context it was trained for.
    pub ctx_len: usize,
    /// The smallest window of a layer, if any has one.
    pub least_window: Option<usize>,
    /// Keys are turned by the length of their prompt.
    pub is_dynamic: bool,
    /// Hidden states of prompts are kept.
    pub keeps_prefixes: bool,
}

impl StreamOptions {
    /// What rows see, if the model and its pages have room for that.
    pub(super) fn rule(self, facts: &Facts) -> Result<Rule, Error> {
        let rule = self.rule_within(facts.ctx_len, facts.layout.first_len())?;
        let slots = rule.capacity() as usize + facts.chunk + 2 * facts.layout.page_len;
        let needed = facts.layout.n_pages(slots) * facts.n_layers;
        match needed > facts.n_pages {
            true => Err(Error::KvFull { needed, free: facts.n_pages }),
            false => Ok(rule),
        }
    }

    /// What rows see, checked against a model of `ctx_len` tokens whose first page holds `first_len`.
    pub fn rule_within(self, ctx_len: usize, first_len: usize) -> Result<Rule, Error> {
        let Self { sink, window } = self;
        let most = first_len.min(MAX_SINKS);
        if sink > most {
            let expected = format!(
                "at most {most}: {MAX_SINKS}, or what the first page of the KV cache holds uncoded"
            );
            return Err(Error::option("sink", sink, expected));
        }
        let longest = ctx_len.saturating_sub(sink);
        match (u32::try_from(sink), u32::try_from(window)) {
            (Ok(sinks), Ok(window @ 1..)) if window as usize <= longest => {
                Ok(Rule { sinks, window })
            }
            _ => Err(Error::option(
                "window",
                window,
                format!("1 to {longest}, what the model's context has room for beside the sinks"),
            )),
        }
    }
}
