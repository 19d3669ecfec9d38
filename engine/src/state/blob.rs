//! What a saved session is made of.
//!
//! In this order, numbers little-endian:
//!
//! | | of which sessions |
//! |---|---|
//! | [`Header`] | all |
//! | [`Schedule`], and a [`Point`] for each prune point | that prune |
//! | [`Streamed`] | streams |
//! | [`Evicted`], and for `h2o` the attention that each slot has got, `[layer][slot]`, f32 | that evict |
//! | [`Sealed`], and how many pages of each segment are sealed, u64 | with a cache of sealed pages |
//! | the tokens, u32 | all |
//! | the last logits, f32 | that have some |
//! | how many segments of the layers each token has gone through, u8 | that prune |
//! | of each segment the number of its slots, u64, and their positions, u32 | that prune: of all segments but the first; with a cache of sealed pages: of all |
//! | KV, `[layer][K or V][kv_head]`: a head's codes of all slots, then its params | all |
//! | the hidden states that wait, `[hidden_dim]` each in the format of KV that is not coded, by position | that prune |
//! | XXH3 of all that, 64 bits | all |
//!
//! Where the slots of the first segment are not written, slot i holds token i, but for streams and for sessions that
//! evict: there the slots behind those that were kept hold the last tokens. A slot whose token was forgotten stays,
//! because the order of slots decides the bits of attention; what it held does not, unless pages are sealed.
//! KV does not depend on the length of pages but where they are sealed.
//!
//! Version 3 did not say with which config and tokenizer it was made, version 2 had no streams and no eviction, version
//! 1 no pruning either.

use std::io::{self, Read, Write};

use xxhash_rust::xxh3::Xxh3;

use crate::compute::{Lazy, Order, PrunePoint};
use crate::engine::Model;
use crate::error::Error;
use crate::keep::{Evict, Keep, Rank, TABLE};
use crate::memory;

pub(super) const MAGIC: [u8; 8] = *b"loris-kv";
pub(super) const VERSION: u32 = 4;

/// The fixed start of a blob.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub(super) struct Header {
    pub(super) magic: [u8; 8],
    pub(super) version: u32,
    /// Of keys, 0: bf16, 1: f32, 2: fp8, 3: int8, 4: int4, 5: int4-plain, 6: int4-channel, 7: int2; and from bit 8 on
    /// that of values, xor that of keys.
    pub(super) kv_format: u32,
    /// Of the weights that made the cache.
    pub(super) weights: u64,
    pub(super) n_layers: u32,
    pub(super) n_kv_heads: u32,
    pub(super) head_dim: u32,
    pub(super) vocab_size: u32,
    /// Without those that a stream has left behind.
    pub(super) n_tokens: u64,
    /// [`ModelConfig::fingerprint`](loris_loader::ModelConfig::fingerprint), its low half; see [`Header::n_shareable`].
    pub(super) config: u32,
    /// [`Tokenizer::fingerprint`](loris_loader::Tokenizer::fingerprint), its low half; 0: the model had no tokenizer.
    pub(super) tokenizer: u32,
    /// [`HAS_LOGITS`], [`IS_STREAM`], [`EVICTS`], [`IS_SEALED`], [`HAS_ANSWER`].
    pub(super) flags: u32,
    /// Prune points; 0 in a session that does not prune, and in version 1.
    pub(super) n_points: u32,
}

impl Header {
    /// What stood in the place of `config` and `tokenizer` before version 4: how many leading tokens came from prefill.
    /// It is not believed.
    pub(super) fn n_shareable(&self) -> u64 {
        u64::from(self.config) | u64::from(self.tokenizer) << 32
    }
}

/// A row of logits follows the tokens.
pub(super) const HAS_LOGITS: u32 = 1;
/// [`Streamed`] comes in front of the tokens.
pub(super) const IS_STREAM: u32 = 2;
/// [`Evicted`] does, and for `h2o` the attention that each slot has got, `[layer][slot]`, f32.
pub(super) const EVICTS: u32 = 4;
/// [`Sealed`] does, and the number of sealed pages of each segment, 64 bits each.
pub(super) const IS_SEALED: u32 = 8;
/// How many of the tokens are the end of an answer that may go on stands right in front of the tokens, 64 bits.
pub(super) const HAS_ANSWER: u32 = 16;

/// What a stream sees, and has left behind.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub(super) struct Streamed {
    pub(super) sink: u32,
    pub(super) window: u32,
    pub(super) n_gone: u64,
    /// Pages go as a whole, so they must be as long again.
    pub(super) page_len: u64,
}

/// Of a cache whose pages are coded as a whole.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub(super) struct Sealed {
    /// Which must be as long again.
    pub(super) page_len: u64,
}

/// [`Evict`], and the slots of a layer.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub(super) struct Evicted {
    /// Its place in [`TABLE`].
    pub(super) rank: u32,
    /// 1: `share` is kept, else `tokens`.
    pub(super) is_share: u32,
    pub(super) tokens: u64,
    pub(super) share: f64,
    pub(super) sinks: u64,
    pub(super) window: u32,
    pub(super) pool: u32,
    /// Tokens when some were evicted last.
    pub(super) since: u64,
    pub(super) n_slots: u64,
}

/// [`Lazy`] without its points.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub(super) struct Schedule {
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
pub(super) struct Point {
    keep_rate: f64,
    layer: u64,
}

pub(super) fn evicted_of(evict: Evict, since: usize, n_slots: usize) -> Evicted {
    // By name, so that none is forgotten.
    let Evict { rank, keep, sinks, window, pool } = evict;
    let (is_share, tokens, share) = match keep {
        Keep::Tokens(tokens) => (0, tokens as u64, 0.0),
        Keep::Share(share) => (1, 0, share),
    };
    #[allow(clippy::cast_possible_truncation)] // at most 64
    Evicted {
        rank: rank.idx() as u32,
        is_share,
        tokens,
        share,
        sinks: sinks as u64,
        window: window as u32,
        pool: pool as u32,
        since: since as u64,
        n_slots: n_slots as u64,
    }
}

pub(super) fn policy_of(evicted: &Evicted) -> Result<Evict, Error> {
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

pub(super) fn schedule_of(lazy: &Lazy) -> (Schedule, Vec<Point>) {
    // By name, so that none is forgotten.
    let Lazy { points, window, sinks, pool, min_len, max_revived, revives, order } = lazy;
    let (order, seed) = match *order {
        Order::Attention => (0, 0),
        Order::Random { seed } => (1, seed),
    };
    #[allow(clippy::cast_possible_truncation)] // at most 64
    let schedule = Schedule {
        sinks: *sinks as u64,
        min_len: *min_len as u64,
        max_revived: *max_revived as u64,
        window: *window as u32,
        revives: u32::from(*revives),
        order,
        seed,
        pool: *pool as u32,
        reserved: 0,
    };
    let point = |&PrunePoint { layer, keep_rate }: &_| Point { keep_rate, layer: layer as u64 };
    (schedule, points.iter().map(point).collect())
}

pub(super) fn read_schedule(
    from: &mut Summed<&mut dyn Read>,
    n_points: usize,
) -> Result<Lazy, Error> {
    let schedule: Schedule = read_pod(from, "schedule")?;
    let mut points: Vec<Point> = memory::zeros(n_points, "prune points")?;
    read(from, bytemuck::cast_slice_mut(&mut points), "prune points")?;
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

/// A header for this model without the counts of a session.
pub(super) fn expected_header(model: &Model) -> Header {
    let plan = model.plan();
    #[allow(clippy::cast_possible_truncation)] // range-checked when the config was read
    let small = |n: usize| n as u32;
    #[allow(clippy::cast_possible_truncation)] // of the bits of a hash
    let low = |hash: u64| hash as u32;
    Header {
        magic: MAGIC,
        version: VERSION,
        kv_format: plan.kv.id(),
        weights: model.shared.fingerprint,
        n_layers: small(plan.n_layers),
        n_kv_heads: small(plan.layout.n_kv_heads),
        head_dim: small(plan.layout.head_dim),
        vocab_size: small(model.config().vocab_size),
        n_tokens: 0,
        config: low(model.config().fingerprint()),
        tokenizer: model.tokenizer().map_or(0, |tokenizer| low(tokenizer.fingerprint())),
        flags: 0,
        n_points: 0,
    }
}

/// A count that is no more than `max`.
pub(super) fn at_most(field: &'static str, found: u64, max: u64) -> Result<usize, Error> {
    let refuse = || mismatch(field, found.to_string(), format!("at most {max}"));
    usize::try_from(found).ok().filter(|_| found <= max).ok_or_else(refuse)
}

/// A reader or writer that sums what passes through.
pub(super) struct Summed<T> {
    pub(super) inner: T,
    pub(super) sum: Xxh3,
}

impl Summed<&mut dyn Write> {
    pub(super) fn write(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.sum.update(bytes);
        self.inner.write_all(bytes).map_err(io_error)
    }
}

pub(super) fn read(
    from: &mut Summed<&mut dyn Read>,
    out: &mut [u8],
    field: &'static str,
) -> Result<(), Error> {
    match from.inner.read_exact(out) {
        Ok(()) => {
            from.sum.update(out);
            Ok(())
        }
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => {
            Err(mismatch(field, "the end of the data".into(), format!("{} more bytes", out.len())))
        }
        Err(e) => Err(io_error(e)),
    }
}

pub(super) fn read_pod<T: bytemuck::Pod>(
    from: &mut Summed<&mut dyn Read>,
    field: &'static str,
) -> Result<T, Error> {
    let mut value = T::zeroed();
    read(from, bytemuck::bytes_of_mut(&mut value), field)?;
    Ok(value)
}

pub(super) fn mismatch(field: &'static str, found: String, expected: String) -> Error {
    Error::SavedState { field, found, expected }
}

pub(super) fn io_error(source: io::Error) -> Error {
    Error::Io { path: "saved session".into(), source }
}
