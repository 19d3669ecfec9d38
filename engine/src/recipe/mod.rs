//! What a session is opened with, and what goes with what.
//!
//! Numbers of the model are asked for here, so a session that is opened is one that can run.

mod options;
pub mod rules;

pub use options::{Facts, SessionOptions, StreamOptions};

use crate::compute::Lazy;
use crate::error::Error;
use crate::keep::Evict;
use crate::read::Rule;
use rules::Is;

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
