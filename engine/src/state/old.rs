//! Versions 1 to 4, which are read and no longer written: what they have in another way.
//!
//! In front of the tokens, in this order:
//!
//! | | of which sessions |
//! |---|---|
//! | [`Schedule`], and a [`Point`] for each prune point | that prune |
//! | [`Streamed`] | streams |
//! | [`Evicted`], and for `h2o` the attention that each slot has got | that evict |
//! | the length of a page, u64, and how many pages of each segment are sealed, u64 | with a cache of sealed pages |
//! | how many of the tokens are the end of an answer, u64 | [`HAS_ANSWER`] |
//!
//! What follows is the same, without marks between. Version 3 did not say with which config and tokenizer it was made,
//! version 2 had no streams and no eviction, version 1 no pruning either.

use super::blob::{Blob, Counts, Header, at_most, mismatch};
use crate::compute::lazy::MAX_POINTS;
use crate::compute::{Lazy, Order, PrunePoint};
use crate::error::Error;
use crate::keep::{Evict, Keep, Rank, TABLE};
use crate::memory;
use crate::recipe::{SessionOptions, StreamOptions};

/// A row of logits follows the tokens.
pub(super) const HAS_LOGITS: u32 = 1;
/// [`Streamed`] comes in front of the tokens.
const IS_STREAM: u32 = 2;
/// [`Evicted`] does.
const EVICTS: u32 = 4;
/// Numbers of sealed pages do.
const IS_SEALED: u32 = 8;
/// The length of an answer does.
const HAS_ANSWER: u32 = 16;

/// What a stream sees, and has rolled off.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Streamed {
    sink: u32,
    window: u32,
    n_gone: u64,
    /// Pages go as a whole, so they must be as long again.
    page_len: u64,
}

/// [`Evict`], and the slots of a layer.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Evicted {
    /// Its place in [`TABLE`].
    rank: u32,
    /// 1: `share` is kept, else `tokens`.
    is_share: u32,
    tokens: u64,
    share: f64,
    sinks: u64,
    window: u32,
    pool: u32,
    /// Tokens when some were evicted last.
    since: u64,
    n_slots: u64,
}

/// [`Lazy`] without its points.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Schedule {
    sinks: u64,
    min_len: u64,
    max_revived: u64,
    window: u32,
    /// 0 or 1.
    revives: u32,
    /// 0: by attention, 1: random.
    order: u32,
    seed: u32,
    pool: u32,
    reserved: u32,
}

/// [`PrunePoint`].
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Point {
    keep_rate: f64,
    layer: u64,
}

fn policy_of(evicted: &Evicted) -> Result<Evict, Error> {
    let &Evicted { rank, is_share, tokens, share, sinks, window, pool, .. } = evicted;
    let Some(rank) = Rank::at(rank as usize) else {
        let expected = format!("less than {}", TABLE.len());
        return Err(mismatch("eviction policy", rank.to_string(), expected));
    };
    let count = |n: u64| usize::try_from(n).unwrap_or(usize::MAX);
    let keep = match is_share {
        0 => Keep::Tokens(count(tokens)),
        1 => Keep::Share(share),
        found => return Err(mismatch("flag of a share", found.to_string(), "0 or 1".into())),
    };
    Ok(Evict { rank, keep, sinks: count(sinks), window: window as usize, pool: pool as usize })
}

fn schedule_of(blob: &mut Blob<'_>, n_points: usize) -> Result<Lazy, Error> {
    let schedule: Schedule = blob.pod("schedule")?;
    let mut points: Vec<Point> = memory::zeros(n_points, "prune points")?;
    blob.read(bytemuck::cast_slice_mut(&mut points), "prune points")?;
    let Schedule { sinks, min_len, max_revived, window, revives, order, seed, pool, reserved } =
        schedule;
    if reserved != 0 {
        return Err(mismatch("reserved word", reserved.to_string(), "0".into()));
    }
    let flag = |field, found: u32| match found {
        0 | 1 => Ok(found == 1),
        _ => Err(mismatch(field, found.to_string(), "0 or 1".into())),
    };
    let order = match (flag("order of a schedule", order)?, seed) {
        (false, 0) => Order::Attention,
        (false, seed) => return Err(mismatch("seed", seed.to_string(), "0".into())),
        (true, seed) => Order::Random { seed },
    };
    // Saturating: more than any sequence is long is all the same.
    let count = |n: u64| usize::try_from(n).unwrap_or(usize::MAX);
    let point = |&Point { keep_rate, layer }: &_| PrunePoint { layer: count(layer), keep_rate };
    Ok(Lazy {
        points: points.iter().map(point).collect(),
        window: window as usize,
        sinks: count(sinks),
        pool: pool as usize,
        min_len: count(min_len),
        max_revived: count(max_revived),
        revives: flag("revival of a schedule", revives)?,
        order,
    })
}

/// Refuses logits of no token, flags that the version did not have, and such as do not go together.
pub(super) fn check(header: &Header, are_sealed: bool) -> Result<(), Error> {
    let flags = match header.version {
        1 | 2 => HAS_LOGITS,
        3 => HAS_LOGITS | IS_STREAM | EVICTS | IS_SEALED,
        _ => HAS_LOGITS | IS_STREAM | EVICTS | IS_SEALED | HAS_ANSWER,
    };
    let refuse = |expected: String| Err(mismatch("flags", header.flags.to_string(), expected));
    if header.flags & !flags != 0 {
        return refuse(format!("some of {flags}"));
    }
    if (header.flags & IS_SEALED != 0) != are_sealed {
        return refuse("sealed pages where the KV format has them".into());
    }
    if header.flags & IS_STREAM != 0 && header.flags & EVICTS != 0 {
        return refuse("no stream that evicts".into());
    }
    if header.flags & HAS_LOGITS != 0 && header.n_tokens == 0 {
        return Err(mismatch("tokens", "0".into(), "1 or more, as there are logits".into()));
    }
    let most = if header.version == 1 { 0 } else { MAX_POINTS as u64 };
    at_most("prune points", header.n_points.into(), most).map(drop)
}

/// What the session was opened with, and what of its counts comes with that.
pub(super) fn recipe(
    blob: &mut Blob<'_>,
    header: &Header,
) -> Result<(SessionOptions, Counts), Error> {
    let (mut options, mut counts) = (SessionOptions::default(), Counts::default());
    if header.n_points > 0 {
        options.lazy = Some(schedule_of(blob, header.n_points as usize)?);
    }
    if header.flags & IS_STREAM != 0 {
        let Streamed { sink, window, n_gone, page_len } = blob.pod("stream")?;
        options.stream = Some(StreamOptions { sink: sink as usize, window: window as usize });
        counts = Counts { n_gone, page_len, ..counts };
    }
    if header.flags & EVICTS != 0 {
        let evicted: Evicted = blob.pod("eviction")?;
        options.evict = Some(policy_of(&evicted)?);
        counts = Counts { since: evicted.since, n_slots: evicted.n_slots, ..counts };
    }
    Ok((options, counts))
}

/// The other counts, which stand behind the attention of slots.
pub(super) fn counts(
    blob: &mut Blob<'_>,
    header: &Header,
    n_segments: usize,
    counts: &mut Counts,
) -> Result<Vec<u64>, Error> {
    let mut n_sealed = Vec::new();
    if header.flags & IS_SEALED != 0 {
        counts.page_len = blob.pod("sealed pages")?;
        for _ in 0..n_segments {
            n_sealed.push(blob.pod("sealed pages")?);
        }
    }
    if header.flags & HAS_ANSWER != 0 {
        counts.n_answer = blob.pod("answer")?;
    }
    Ok(n_sealed)
}
