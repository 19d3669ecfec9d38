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

use crate::error::Error;

/// A schedule of prune points, and what is never pruned.
#[derive(Clone, Debug, PartialEq)]
pub struct Lazy {
    /// In the order of layers.
    pub points: Vec<PrunePoint>,
    /// Rows at the end of a prompt whose queries score, and tokens at the end that always go on.
    pub window: usize,
    /// Tokens at the start that always go on.
    pub sinks: usize,
    /// A sequence shorter than this goes on whole: scoring would cost more than it saves.
    pub min_len: usize,
    /// Tokens that a decode step takes up again at one point, at most; a prompt is not limited.
    pub max_revived: usize,
}

/// A layer boundary at which tokens are left behind.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PrunePoint {
    /// Layers before the point.
    pub layer: usize,
    /// Share of the tokens that goes on, above 0 and at most 1.
    pub keep_rate: f64,
}

/// Schedules by name, for a model of 32 layers.
const PRESETS: [(&str, &[(usize, f64)]); 3] = [
    ("gentle", &[(16, 0.7), (24, 0.7)]),
    ("paper", &[(9, 0.7), (19, 0.7), (28, 0.7)]),
    ("hard", &[(8, 0.5), (16, 0.5), (24, 0.5)]),
];

impl Lazy {
    /// A schedule with the defaults for the rest.
    pub fn new(points: Vec<PrunePoint>) -> Self {
        Self { points, window: 1, sinks: 4, min_len: 512, max_revived: 16 }
    }

    /// Reads `gentle`, `paper`, `hard`, or points as `8:0.7,16:0.5`, for a model of `n_layers`.
    pub fn parse(spec: &str, n_layers: usize) -> Result<Self, Error> {
        let refuse = || {
            let expected = format!(
                "gentle, paper, hard, or LAYER:KEEP_RATE,... with layers rising from 1 to {} and rates above 0, at most 1",
                n_layers.saturating_sub(1)
            );
            Error::option("lazy", spec, expected)
        };
        let points = match PRESETS.iter().find(|(name, _)| *name == spec) {
            Some((_, points)) => scaled(points, n_layers),
            None => {
                let point = |text: &str| {
                    let (layer, rate) = text.split_once(':')?;
                    let (layer, keep_rate) =
                        (layer.trim().parse().ok()?, rate.trim().parse().ok()?);
                    Some(PrunePoint { layer, keep_rate })
                };
                spec.split(',').map(point).collect::<Option<_>>().ok_or_else(refuse)?
            }
        };
        let lazy = Self::new(points);
        lazy.check(n_layers).map_err(|_| refuse())?;
        Ok(lazy)
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
        Ok(())
    }

    /// The positions that go on from point `point_idx`, ascending: of the tokens in `positions` (a slot that
    /// was given up has none) with these `scores`, in a sequence of `len` tokens.
    ///
    /// Ties go to the earlier token, so that the choice does not depend on the order of slots.
    pub fn select(
        &self,
        point_idx: usize,
        positions: &[Option<u32>],
        scores: &[f32],
        len: usize,
    ) -> Vec<u32> {
        let mut live: Vec<(u32, f32)> = positions
            .iter()
            .zip(scores)
            .filter_map(|(position, &score)| Some(((*position)?, score)))
            .collect();
        let is_kept = |position: u32| {
            let position = position as usize;
            position < self.sinks || position + self.window >= len
        };
        let n_keep = self.n_keep(point_idx, live.len());
        let rank = |&(position, score): &(u32, f32)| (is_kept(position), score, position);
        live.sort_unstable_by(|a, b| {
            let (a, b) = (rank(a), rank(b));
            b.0.cmp(&a.0).then(b.1.total_cmp(&a.1)).then(a.2.cmp(&b.2))
        });
        let n_forced = live.iter().take_while(|(position, _)| is_kept(*position)).count();
        live.truncate(n_keep.max(n_forced));
        let mut selected: Vec<u32> = live.into_iter().map(|(position, _)| position).collect();
        selected.sort_unstable();
        selected
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

/// Points of a schedule at most.
pub const MAX_POINTS: usize = 16;
/// Rows that score at most.
pub const MAX_WINDOW: usize = 64;

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
