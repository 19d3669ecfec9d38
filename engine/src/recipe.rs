//! What a session is opened with, and what goes with what.
//!
//! Numbers of the model are asked for here, so a session that is opened is one that can run.

use loris_loader::{ModelConfig, RopeScaling};

use crate::error::Error;
use crate::keep::Evict;
use crate::plan::Plan;
use crate::policy::{Lazy, Policies, Stream};

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

/// What a session without end sees; see [`Stream`].
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

impl SessionOptions {
    /// What a session of a model computes and keeps, and how many tokens it may hold; an error where that does not go
    /// together, or not with the model.
    pub(crate) fn check(
        &self,
        plan: &Plan,
        config: &ModelConfig,
    ) -> Result<(Policies, usize), Error> {
        let stream =
            self.stream.map(|stream| self.check_stream(stream, plan, config)).transpose()?;
        if let Some(evict) = &self.evict {
            self.check_evict(evict, plan, config)?;
        }
        let ctx_len = self.ctx_len.unwrap_or(plan.ctx_len);
        // Beyond the trained context the answers degrade; dynamic scaling is made for it.
        let longest = match config.rope.scaling {
            RopeScaling::Dynamic { .. } => usize::MAX,
            _ => plan.ctx_len,
        };
        if ctx_len == 0 || ctx_len > longest {
            let expected = format!("1 to {longest}, the model's context");
            return Err(Error::option("ctx", ctx_len, expected));
        }
        if let Some(lazy) = &self.lazy {
            check_lazy(lazy, plan)?;
        }
        let policies = Policies { lazy: self.lazy.clone(), stream, evict: self.evict };
        Ok((policies, if stream.is_some() { MAX_STREAM } else { ctx_len }))
    }

    /// The stream that a session asks for, if everything else goes with it.
    fn check_stream(
        &self,
        stream: StreamOptions,
        plan: &Plan,
        config: &ModelConfig,
    ) -> Result<Stream, Error> {
        let StreamOptions { sink, window } = stream;
        let refuse = |option: &'static str, value: String, why: &str| {
            Err(Error::option(option, value, why.to_owned()))
        };
        if let Some(ctx_len) = self.ctx_len {
            return refuse("ctx", ctx_len.to_string(), "none with a window, which has no end");
        }
        if self.lazy.is_some() {
            return refuse(
                "lazy",
                "given".into(),
                "none with a window: what is pruned waits for ever",
            );
        }
        if plan.layout.kv.are_sealed() {
            let expected = "none with a KV cache of sealed pages; take int4 or int8";
            return refuse("window", window.to_string(), expected);
        }
        if matches!(config.rope.scaling, RopeScaling::Dynamic { .. }) {
            return refuse(
                "window",
                window.to_string(),
                "none with dynamic RoPE, which changes with length",
            );
        }
        let stream = Stream::new(sink, window, plan.ctx_len, plan.layout.first_len())?;
        if let Some(&least) = config.windows.iter().flatten().min().filter(|&&least| window > least)
        {
            return refuse(
                "window",
                window.to_string(),
                &format!("at most {least}, the model's own window"),
            );
        }
        let slots = stream.capacity() as usize + plan.chunk + 2 * plan.layout.page_len;
        let needed = plan.layout.n_pages(slots) * plan.n_layers;
        if needed > plan.n_pages {
            return Err(Error::KvFull { needed, free: plan.n_pages });
        }
        Ok(stream)
    }

    /// Refuses an eviction policy that something else does not go with.
    fn check_evict(&self, evict: &Evict, plan: &Plan, config: &ModelConfig) -> Result<(), Error> {
        evict.check()?;
        let refuse = |why: String| Err(Error::option("evict", "given", why));
        if self.lazy.is_some() {
            return refuse("none with lazy, which keeps what is pruned for later".into());
        }
        if self.stream.is_some() {
            return refuse("none with a window, which forgets on its own".into());
        }
        if config.windows.iter().any(Option::is_some) {
            return refuse("none with layers that see a window of their own".into());
        }
        if plan.layout.kv.are_sealed() {
            return refuse("none with a KV cache of sealed pages; take int4 or int8".into());
        }
        let n_wide = plan.layout.first_len();
        if plan.layout.skew() > 0 && evict.sinks < n_wide {
            return refuse(format!("sinks={n_wide} or more, the first tokens of a coded cache"));
        }
        match evict.n_mass_rows() > plan.chunk {
            true => refuse(format!("a window of at most the chunk, {}", plan.chunk)),
            false => Ok(()),
        }
    }
}

/// Refuses a schedule that the model, its device or its pools cannot follow.
fn check_lazy(lazy: &Lazy, plan: &Plan) -> Result<(), Error> {
    lazy.check(plan.n_layers)?;
    if lazy.window > plan.chunk {
        let expected = format!("at most the chunk, {}", plan.chunk);
        return Err(Error::option("lazy window", lazy.window, expected));
    }
    if plan.layout.kv.are_sealed() && lazy.window > 1 {
        let expected = "1 with a KV cache of sealed pages, whose rows come page by page";
        return Err(Error::option("lazy window", lazy.window, expected));
    }
    if plan.n_aux_pages == 0 {
        let expected = "aux_tokens of ModelOptions above 0: one for each token of such sessions";
        return Err(Error::option("lazy", "given", expected));
    }
    Ok(())
}
