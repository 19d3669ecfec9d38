//! LazyLLM: which tokens go on beyond a prune point (Fu et al. 2024, arXiv 2407.14057).
//!
//! The layers between two prune points are a segment. At the end of each the latest queries score every
//! token that the segment holds: the mean, over query heads and over the last [`window`](Lazy::window) rows, of
//! the attention probability that the token gets (equation 1, where the window is 1). The
//! [`keep_rate`](PrunePoint::keep_rate) share with the highest scores goes on; the rest waits at the point, and is taken
//! up again when a later query wants it. The first tokens ([`sinks`](Lazy::sinks)) and the last always go on.
//!
//! The share is of the tokens that the segment *holds*, so rates multiply along the layers. The paper's
//! figure 7 has three points, after 9, 19 and 28 of 32 layers, with 0.7 each; the layers and rates behind its tables are not
//! published.

use std::fmt;

use crate::error::Error;
use crate::share;

/// A schedule of prune points, and what is never pruned.
#[derive(Clone, Debug, PartialEq)]
pub struct Lazy {
    /// In the order of layers.
    pub points: Vec<PrunePoint>,
    /// Rows at the end of a prompt whose queries score, and tokens at the end that always go on.
    pub window: usize,
    /// Tokens at the start that always go on.
    pub sinks: usize,
    /// A token ranks by the highest score among the `pool` positions around it, an odd number, so that words and
    /// numbers of several tokens go on whole (SnapKV, Li et al. 2024, arXiv 2404.14469, section 3); 1: by its own, as in the paper.
    pub pool: usize,
    /// A sequence shorter than this goes on whole: scoring would cost more than it saves. (Where a longer one was cut back to
    /// such a length, what waits goes on with the next prompt, or step by step.)
    pub min_len: usize,
    /// Tokens that a decode step revives at one point, at most; a prompt is not limited.
    pub max_revived: usize,
    /// False: what waits stays there (one-shot pruning), to see what revival is worth.
    pub revives: bool,
    /// What decides between tokens.
    pub order: Order,
}

/// What the tokens that go on are chosen by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Order {
    /// The attention that they get.
    #[default]
    Attention,
    /// A number drawn for each position, to see what attention is worth.
    Random {
        /// Another draw for each.
        seed: u32,
    },
}

/// A layer boundary at which tokens are pruned.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PrunePoint {
    /// Layers before the point.
    pub layer: usize,
    /// Share of the tokens that goes on, above 0 and at most 1.
    pub keep_rate: f64,
}

/// A schedule by name, for a model of 32 layers.
#[derive(Clone, Copy, Debug)]
pub struct Preset {
    /// As users name it.
    pub name: &'static str,
    points: &'static [(usize, f64)],
    pool: usize,
}

/// `paper` is the paper's figure 7. The other two come from where the last query of a question finds its answer: hardly
/// before the middle of the layers, and then at once and within a tenth of the tokens (`loris eval` measures
/// what that costs). So `gentle` prunes once and late, and `hard` begins early, but with little.
pub const PRESETS: [Preset; 3] = [
    Preset { name: "gentle", points: &[(19, 0.1)], pool: 7 },
    Preset { name: "paper", points: &[(9, 0.7), (19, 0.7), (28, 0.7)], pool: 1 },
    Preset { name: "hard", points: &[(7, 0.6), (16, 0.2)], pool: 7 },
];

impl Lazy {
    /// A schedule with the defaults for the rest.
    pub fn new(points: Vec<PrunePoint>) -> Self {
        Self {
            points,
            window: 1,
            sinks: 4,
            pool: 1,
            min_len: 512,
            max_revived: 1,
            revives: true,
            order: Order::Attention,
        }
    }

    /// Reads `gentle`, `paper`, `hard`, or points as `8:0.7,16:0.5`, for a model of `n_layers`; then, also behind
    /// commas, `window=N`, `pool=N`, `sinks=N`, `min-len=N`, `revive=N` (the cap of a decode step), `no-revival` and `random`.
    pub fn parse(spec: &str, n_layers: usize) -> Result<Self, Error> {
        let refuse = || {
            let expected = format!(
                "gentle, paper, hard, or LAYER:KEEP_RATE,... with layers rising from 1 to {} and rates above 0, at \
                 most 1 ({}); then, if wanted, window=N (1 to {MAX_WINDOW}), pool=N (odd, 1 to {MAX_POOL}), sinks=N, min-len=N, revive=N, no-revival, random",
                n_layers.saturating_sub(1),
                share::EXPECTED
            );
            Error::option("lazy", spec, expected)
        };
        let mut lazy = Self::new(Vec::new());
        for (idx, word) in spec.split(',').map(str::trim).enumerate() {
            let preset = PRESETS.iter().find(|preset| idx == 0 && preset.name == word);
            if let Some(preset) = preset {
                (lazy.points, lazy.pool) = (scaled(preset.points, n_layers), preset.pool);
            } else if let Some((layer, rate)) = word.split_once(':') {
                let (Ok(layer), Some(keep_rate)) = (layer.parse(), share::parse(rate)) else {
                    return Err(refuse());
                };
                lazy.points.push(PrunePoint { layer, keep_rate });
            } else {
                lazy.set(word).ok_or_else(refuse)?;
            }
        }
        lazy.check(n_layers).map_err(|_| refuse())?;
        Ok(lazy)
    }

    /// One option of a schedule's text.
    fn set(&mut self, word: &str) -> Option<()> {
        match word.split_once('=') {
            Some(("window", n)) => self.window = n.parse().ok()?,
            Some(("sinks", n)) => self.sinks = n.parse().ok()?,
            Some(("pool", n)) => self.pool = n.parse().ok()?,
            Some(("min-len", n)) => self.min_len = n.parse().ok()?,
            Some(("revive", n)) => self.max_revived = n.parse().ok()?,
            None if word == "no-revival" => self.revives = false,
            Some(("random", seed)) => self.order = Order::Random { seed: seed.parse().ok()? },
            None if word == "random" => self.order = Order::Random { seed: 0 },
            _ => return None,
        }
        Some(())
    }

    /// Refuses schedules that a model of `n_layers` cannot follow.
    pub fn check(&self, n_layers: usize) -> Result<(), Error> {
        let mut before = 0;
        for &PrunePoint { layer, keep_rate } in &self.points {
            if layer <= before || layer >= n_layers {
                let expected = format!("layers that rise from 1 to {}", n_layers.saturating_sub(1));
                return Err(Error::option("lazy", layer, expected));
            }
            if !(keep_rate > 0.0 && keep_rate <= 1.0) {
                return Err(Error::option("lazy", keep_rate, "rates above 0, at most 1"));
            }
            before = layer;
        }
        if self.points.is_empty() || self.points.len() > MAX_POINTS {
            return Err(Error::option(
                "lazy",
                self.points.len(),
                format!("1 to {MAX_POINTS} points"),
            ));
        }
        if !(1..=MAX_WINDOW).contains(&self.window) {
            let expected = format!("1 to {MAX_WINDOW}");
            return Err(Error::option("lazy window", self.window, expected));
        }
        if !(1..=MAX_POOL).contains(&self.pool) || self.pool.is_multiple_of(2) {
            let expected = format!("an odd number from 1 to {MAX_POOL}");
            return Err(Error::option("lazy pool", self.pool, expected));
        }
        Ok(())
    }

    /// The positions that go on from point `point_idx`, ascending: of the tokens in `positions` (a slot that
    /// is empty has none) with these `scores`, in a sequence of `len` tokens.
    ///
    /// Ties go to the earlier token, so that the choice does not depend on the order of slots.
    pub fn select(
        &self,
        point_idx: usize,
        positions: &[Option<u32>],
        scores: &[f32],
        len: usize,
    ) -> Vec<u32> {
        let is_kept = |position: u32| {
            let position = position as usize;
            position < self.sinks || position + self.window >= len
        };
        let ranked = self.ranked(positions, scores);
        let (kept, mut others): (Vec<_>, Vec<_>) =
            ranked.into_iter().partition(|&(_, position)| is_kept(position));
        let n = self.n_keep(point_idx, kept.len() + others.len()).saturating_sub(kept.len());
        first(&mut others, n);
        let mut selected: Vec<u32> =
            kept.into_iter().chain(others).map(|(_, position)| position).collect();
        selected.sort_unstable();
        selected
    }

    /// Of tokens that are chosen and wait, the ones that a decode step revives, ascending.
    pub fn revive(&self, waiting: &[u32], positions: &[Option<u32>], scores: &[f32]) -> Vec<u32> {
        let mut wanted: Vec<_> = match waiting.len() > self.max_revived {
            true => self.ranked(positions, scores),
            false => return waiting.to_vec(),
        };
        wanted.retain(|(_, position)| waiting.binary_search(position).is_ok());
        first(&mut wanted, self.max_revived);
        let mut revived: Vec<u32> = wanted.into_iter().map(|(_, position)| position).collect();
        revived.sort_unstable();
        revived
    }

    /// Tokens with what decides between them, by position.
    fn ranked(&self, positions: &[Option<u32>], scores: &[f32]) -> Vec<(f32, u32)> {
        let slots = positions.iter().zip(scores);
        let mut live: Vec<(f32, u32)> = slots
            .filter_map(|(position, &score)| {
                let position = (*position)?;
                Some((self.order.rank(score, position), position))
            })
            .collect();
        if !live.is_sorted_by_key(|&(_, position)| position) {
            live.sort_unstable_by_key(|&(_, position)| position); // revived tokens come last
        }
        let reach = self.pool / 2;
        let highest = |i: usize| {
            let (_, position) = live[i];
            let around = &live[i.saturating_sub(reach)..(i + reach + 1).min(live.len())];
            let near = around.iter().filter(|(_, p)| p.abs_diff(position) as usize <= reach);
            near.map(|&(rank, _)| rank).fold(f32::NEG_INFINITY, f32::max)
        };
        match reach {
            0 => live,
            _ => (0..live.len()).map(|i| (highest(i), live[i].1)).collect(),
        }
    }

    /// Of `n` tokens, how many go on from a point.
    fn n_keep(&self, point_idx: usize, n: usize) -> usize {
        #[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation)]
        #[allow(clippy::cast_sign_loss)] // counts of tokens, far below 2^52
        let n_keep = (n as f64 * self.points[point_idx].keep_rate).ceil() as usize;
        n_keep.min(n)
    }

    /// True if a sequence of `len` tokens is pruned at all.
    pub fn prunes(&self, len: usize) -> bool {
        len >= self.min_len
    }
}

/// As [`Lazy::parse`] reads it.
impl fmt::Display for Lazy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // By name, so that none is forgotten.
        let Self { points, window, sinks, pool, min_len, max_revived, revives, order } = self;
        for PrunePoint { layer, keep_rate } in points {
            write!(f, "{layer}:{keep_rate:?},")?; // 1e-300, not 300 zeros
        }
        write!(
            f,
            "window={window},pool={pool},sinks={sinks},min-len={min_len},revive={max_revived}"
        )?;
        f.write_str(if *revives { "" } else { ",no-revival" })?;
        match order {
            Order::Attention => Ok(()),
            Order::Random { seed } => write!(f, ",random={seed}"),
        }
    }
}

impl Order {
    fn rank(self, score: f32, position: u32) -> f32 {
        match self {
            Self::Attention => score,
            Self::Random { seed } => draw(seed, position),
        }
    }
}

/// A number of 24 bits for a position: the mixing steps of splitmix64 (Steele et al. 2014, "Fast splittable pseudorandom
/// number generators").
pub(crate) fn draw(seed: u32, position: u32) -> f32 {
    let mut z = (u64::from(seed) << 32 | u64::from(position)) + 1;
    z = z.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    #[allow(clippy::cast_precision_loss)] // 24 bits
    let draw = ((z ^ (z >> 31)) >> 40) as f32;
    draw
}

/// Leaves the `n` that rank highest, the earlier position where two rank alike.
pub(crate) fn first(ranked: &mut Vec<(f32, u32)>, n: usize) {
    if n < ranked.len() {
        ranked.select_nth_unstable_by(n, |a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        ranked.truncate(n);
    }
}

/// Points of a schedule at most.
pub const MAX_POINTS: usize = 16;
/// Rows that score at most.
pub const MAX_WINDOW: usize = 64;
/// Positions that a score reaches at most.
pub const MAX_POOL: usize = 63;

/// A preset's points, moved to the same depth of a model of `n_layers`; points that fall together are one.
fn scaled(points: &[(usize, f64)], n_layers: usize) -> Vec<PrunePoint> {
    let mut scaled: Vec<PrunePoint> = Vec::new();
    for &(layer, keep_rate) in points {
        let layer = (layer * n_layers + 16) / 32;
        match scaled.last_mut() {
            Some(last) if last.layer == layer => last.keep_rate *= keep_rate,
            _ => scaled.push(PrunePoint { layer, keep_rate }),
        }
    }
    scaled.retain(|point| (1..n_layers).contains(&point.layer));
    scaled
}
