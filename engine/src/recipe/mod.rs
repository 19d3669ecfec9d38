//! What a session is opened with, and what goes with what.
//!
//! Numbers of the model are asked for here, so a session that is opened is one that can run.

pub mod rules;

use crate::compute::Lazy;
use crate::error::Error;
use crate::keep::Evict;
use crate::read::{MAX_SINKS, Rule};
use crate::store::PageLayout;
use rules::Is;

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

/// Tokens that a session without end may take in: positions are 32 bits wide, and so is the end of the tile or split of
/// slots that the last one is in.
const MAX_STREAM: usize = u32::MAX as usize - 1_023;

/// One choice on each axis: what a session computes, keeps and reads. What it stores is its model's choice.
#[derive(Clone, Debug)]
pub(crate) struct Recipe {
    /// Compute: where tokens are pruned.
    pub(crate) lazy: Option<Lazy>,
    /// Keep: which tokens leave the cache for good.
    pub(crate) evict: Option<Evict>,
    /// Keep: what rows see; what no later row sees leaves too.
    pub(crate) rule: Rule,
    /// Pages of another session's prompt may be taken over.
    pub(crate) takes_prefix: bool,
    /// And offered.
    pub(crate) offers_prefix: bool,
    /// Why there are no logits of all rows, where there are none.
    pub(crate) no_logits: Option<&'static str>,
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

impl Recipe {
    /// Slots that a segment holds at most while a pass is under way.
    pub(crate) fn held_at_most(&self, chunk: usize, page_len: usize) -> usize {
        self.rule.capacity() as usize + chunk + 2 * page_len
    }
}

impl SessionOptions {
    /// What a session of a model computes and keeps, and how many tokens it may hold; an error where that does not go
    /// together, or not with the model.
    pub(crate) fn check(&self, facts: &Facts) -> Result<(Recipe, usize), Error> {
        for what in [Is::Ctx, Is::Lazy, Is::Stream, Is::Evict] {
            what.check(self, facts)?;
        }
        let rule = self.stream.map_or(Ok(Rule::ALL), |stream| stream.rule(facts))?;
        if let Some(evict) = &self.evict {
            evict.check()?;
            if evict.n_mass_rows() > facts.chunk {
                let expected = format!("a window of at most the chunk, {}", facts.chunk);
                return Err(Error::option("evict", "given", expected));
            }
        }
        let ctx_len = self.ctx_len.unwrap_or(facts.ctx_len);
        // Beyond the trained context the answers degrade; dynamic scaling is made for it.
        let longest = if facts.is_dynamic { usize::MAX } else { facts.ctx_len };
        if ctx_len == 0 || ctx_len > longest {
            let expected = format!("1 to {longest}, the model's context");
            return Err(Error::option("ctx", ctx_len, expected));
        }
        if let Some(lazy) = &self.lazy {
            check_lazy(lazy, facts)?;
        }
        let recipe = Recipe {
            lazy: self.lazy.clone(),
            evict: self.evict,
            rule,
            takes_prefix: Is::TakesPrefix.check(self, facts).is_ok(),
            offers_prefix: Is::OffersPrefix.check(self, facts).is_ok(),
            no_logits: Is::AllLogits.refused(self, facts),
        };
        Ok((recipe, if rule.rolls() { MAX_STREAM } else { ctx_len }))
    }
}

impl StreamOptions {
    /// What rows see, if the model and its pages have room for that.
    fn rule(self, facts: &Facts) -> Result<Rule, Error> {
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

/// Refuses a schedule that the model, its device or its pools cannot follow.
fn check_lazy(lazy: &Lazy, facts: &Facts) -> Result<(), Error> {
    lazy.check(facts.n_layers)?;
    if lazy.window > facts.chunk {
        let expected = format!("at most the chunk, {}", facts.chunk);
        return Err(Error::option("lazy window", lazy.window, expected));
    }
    if facts.n_aux_pages == 0 {
        let expected = "aux_tokens of ModelOptions above 0: one for each token of such sessions";
        return Err(Error::option("lazy", "given", expected));
    }
    Ok(())
}
