//! What goes with what: a row for each pair that does not, or only with numbers that agree. All others go.

use super::options::{Facts, SessionOptions};
use crate::error::Error;

/// What a session may be asked for, or a model may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Is {
    /// Tokens are pruned layer by layer.
    Lazy,
    /// Rows see sinks and a window.
    Stream,
    /// Tokens leave the cache for good.
    Evict,
    /// Of which all rows' attention counts.
    AllMass,
    /// A length of context.
    Ctx,
    /// Logits of every row.
    AllLogits,
    /// Pages of another session's prompt are taken over.
    TakesPrefix,
    /// And offered to others.
    OffersPrefix,
    /// Hidden states of prompts are kept for that.
    KeepsPrefixes,
    /// A cache whose pages hold codes.
    Coded,
    /// Such that a page is coded as a whole.
    Sealed,
    /// Layers with a window of their own.
    Windows,
    /// Keys are turned by the length of their prompt.
    DynamicRope,
}

/// Two that are in each other's way.
#[derive(Clone, Copy, Debug)]
pub struct Pair {
    /// What is refused or left out.
    pub what: Is,
    /// With what.
    pub with: Is,
    /// When.
    pub verdict: Verdict,
    /// What is expected instead, or why.
    pub why: &'static str,
}

/// When a pair does not go.
#[derive(Clone, Copy, Debug)]
pub enum Verdict {
    /// Never.
    Refused,
    /// If numbers do not agree.
    GoesIf(fn(&SessionOptions, &Facts) -> Result<(), Error>),
}

use Is::{
    AllLogits, AllMass, Coded, Ctx, DynamicRope, Evict, KeepsPrefixes, Lazy, OffersPrefix, Sealed,
    Stream, TakesPrefix, Windows,
};

/// All of them.
pub const TABLE: &[Pair] = &[
    refused(Ctx, Stream, "none with a window, which has no end"),
    refused(Lazy, Stream, "none with a window: what is pruned waits for ever"),
    refused(Stream, Sealed, "none with a KV cache of sealed pages; take int4 or int8"),
    refused(Stream, DynamicRope, "none with dynamic RoPE, which changes with length"),
    goes_if(Stream, Windows, "at most the model's own window", |options, facts| {
        let (asked, least) = (options.stream.map_or(0, |stream| stream.window), facts.least_window);
        match least.filter(|&least| asked > least) {
            None => Ok(()),
            Some(least) => {
                let expected = format!("at most {least}, the model's own window");
                Err(Error::option("window", asked, expected))
            }
        }
    }),
    refused(Evict, Lazy, "none with lazy, which keeps what is pruned for later"),
    refused(Evict, Stream, "none with a window, which forgets on its own"),
    refused(Evict, Windows, "none with layers that see a window of their own"),
    refused(Evict, Sealed, "none with a KV cache of sealed pages; take int4 or int8"),
    goes_if(
        Evict,
        Coded,
        "sinks that cover the first tokens of a coded cache",
        |options, facts| {
            let n_wide = facts.layout.first_len();
            match options.evict.filter(|evict| evict.sinks < n_wide) {
                None => Ok(()),
                Some(_) => {
                    let expected =
                        format!("sinks={n_wide} or more, the first tokens of a coded cache");
                    Err(Error::option("evict", "given", expected))
                }
            }
        },
    ),
    goes_if(Lazy, Sealed, ONE_ROW, |options, _| match &options.lazy {
        Some(lazy) if lazy.window > 1 => Err(Error::option("lazy window", lazy.window, ONE_ROW)),
        _ => Ok(()),
    }),
    refused(
        KeepsPrefixes,
        Coded,
        "false with a coded KV cache: their pages do not hold the same tokens",
    ),
    refused(AllLogits, Lazy, NO_LOGITS),
    refused(AllLogits, Evict, NO_LOGITS),
    refused(TakesPrefix, Sealed, "what a row sees of sealed pages depends on where it stands"),
    refused(TakesPrefix, DynamicRope, "a key is turned by the length of the prompt it came with"),
    refused(TakesPrefix, AllMass, "pages do not say what attention their tokens got"),
    refused(OffersPrefix, Sealed, "what a row sees of sealed pages depends on where it stands"),
    goes_if(OffersPrefix, Lazy, "a model that keeps prefixes", |_, facts| {
        match facts.keeps_prefixes {
            true => Ok(()),
            false => Err(Error::option("keep-prefixes", false, "true for sessions that prune")),
        }
    }),
];

const ONE_ROW: &str = "1 with a KV cache of sealed pages, whose rows come page by page";
const NO_LOGITS: &str =
    "a session that prunes or evicts has no logits of all rows; open one without lazy and evict";

const fn refused(what: Is, with: Is, why: &'static str) -> Pair {
    Pair { what, with, verdict: Verdict::Refused, why }
}

const fn goes_if(
    what: Is,
    with: Is,
    why: &'static str,
    check: fn(&SessionOptions, &Facts) -> Result<(), Error>,
) -> Pair {
    Pair { what, with, verdict: Verdict::GoesIf(check), why }
}

impl Is {
    /// The option that asks for it, and what was asked; `None`: it is not there.
    fn asked(self, options: &SessionOptions, facts: &Facts) -> Option<(&'static str, String)> {
        let flag = |name, is_there: bool| is_there.then(|| (name, "given".to_owned()));
        let kv = facts.layout.kv;
        match self {
            Self::Lazy => flag("lazy", options.lazy.is_some()),
            Self::Stream => options.stream.map(|stream| ("window", stream.window.to_string())),
            Self::Evict => flag("evict", options.evict.is_some()),
            Self::AllMass => flag("evict", options.evict.is_some_and(|evict| evict.counts_all())),
            Self::Ctx => options.ctx_len.map(|ctx_len| ("ctx", ctx_len.to_string())),
            Self::AllLogits => flag("logits of all rows", true),
            Self::TakesPrefix | Self::OffersPrefix => flag("prefix", true),
            Self::KeepsPrefixes => {
                facts.keeps_prefixes.then(|| ("keep-prefixes", true.to_string()))
            }
            Self::Coded => flag("kv", facts.layout.skew() > 0),
            Self::Sealed => flag("kv", kv.are_sealed()),
            Self::Windows => flag("layers", facts.least_window.is_some()),
            Self::DynamicRope => flag("rope", facts.is_dynamic),
        }
    }

    /// Why it never goes with what else is there.
    pub(crate) fn refused(self, options: &SessionOptions, facts: &Facts) -> Option<&'static str> {
        let is_there =
            |pair: &&Pair| pair.what == self && pair.with.asked(options, facts).is_some();
        let mut pairs = TABLE.iter().filter(is_there);
        pairs.find(|pair| matches!(pair.verdict, Verdict::Refused)).map(|pair| pair.why)
    }

    /// Why it does not go with this.
    pub(crate) fn why_not(self, with: Self) -> Option<&'static str> {
        TABLE.iter().find(|pair| pair.what == self && pair.with == with).map(|pair| pair.why)
    }

    /// Refuses it where something else that is there is in its way.
    pub(crate) fn check(self, options: &SessionOptions, facts: &Facts) -> Result<(), Error> {
        let Some((name, value)) = self.asked(options, facts) else { return Ok(()) };
        let is_there =
            |pair: &&Pair| pair.what == self && pair.with.asked(options, facts).is_some();
        TABLE.iter().filter(is_there).try_for_each(|pair| match pair.verdict {
            Verdict::Refused => Err(Error::option(name, value.clone(), pair.why)),
            Verdict::GoesIf(check) => check(options, facts),
        })
    }
}
