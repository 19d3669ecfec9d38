//! From adjusted logits to one token, with a close look at the likely ones only.
//!
//! A vocabulary has 30,000 to 250,000 tokens, of which a choice needs a few hundred. So two plain passes find the
//! largest logit and, where a filter asks for it, the weight of all tokens together; then tokens are taken as far down as
//! the filters or the draw itself ask for. They are never sorted: what counts is where a sum along their order reaches
//! a bound, and [`reach`] finds that in linear time.
//!
//! Filters follow each other as in `transformers`: top-k, top-p, min-p, typical (Meister et al. 2022, arXiv 2202.00666).
//! Each sees the distribution that the one before it left. Of equal logits the lower id comes first.

use std::cmp::Ordering;

use super::exp::{exp32, exp64};

/// What is left of a distribution. The defaults leave all of it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Filters {
    pub(super) temperature: f32,
    /// 0: all.
    pub(super) top_k: usize,
    /// 1: all.
    pub(super) top_p: f32,
    /// 0: all.
    pub(super) min_p: f32,
    /// 1: all.
    pub(super) typical_p: f32,
}

/// A token, and how likely it is beside the likeliest.
#[derive(Clone, Copy, Debug)]
pub(super) struct Candidate {
    id: u32,
    /// Its logit less the largest one, divided by the temperature: 0 or less.
    depth: f32,
    /// `exp(depth)`.
    weight: f64,
}

/// How far down tokens are looked for, until that is enough. The next depth has some three times as many.
const DEPTHS: [f32; 6] = [-4.0, -8.0, -16.0, -32.0, -64.0, f32::NEG_INFINITY];
/// The same for how far a token's surprise may be from the expected one.
const DEVIATIONS: [f32; 6] = [0.5, 1.0, 2.0, 4.0, 8.0, f32::INFINITY];

/// The first of the largest; 0 where there is no number.
pub(super) fn likeliest(logits: &[f32]) -> u32 {
    let top = largest(logits);
    let first = (0..).zip(logits).find(|&(_, &logit)| logit == top);
    first.map_or(0, |(id, _)| id)
}

/// A token by one number in [0, 1). `candidates` is room to work in.
pub(super) fn draw(
    logits: &[f32],
    filters: &Filters,
    uniform: f64,
    candidates: &mut Vec<Candidate>,
) -> u32 {
    let top_k = if filters.top_k < logits.len() { filters.top_k } else { 0 };
    let filters = &Filters { top_k, ..*filters };
    let all = All { logits, top: largest(logits), temperature: filters.temperature };
    let no_filter = filters.top_k == 0 && filters.top_p >= 1.0 && filters.min_p <= 0.0;
    let needs_total = filters.top_k == 0 && (filters.top_p < 1.0 || no_filter);
    let total = if needs_total { all.weight() } else { 0.0 };
    if no_filter && filters.typical_p < 1.0 {
        all.typical(filters.typical_p, candidates);
        return pick_of(candidates, uniform);
    }
    for depth in DEPTHS {
        all.between(depth, 0.0, candidates);
        let is_all = depth == f32::NEG_INFINITY;
        if no_filter {
            // Of an untouched distribution the draw itself says how far down to look.
            let target = uniform * if is_all { sum(candidates) } else { total };
            if let Some(at) = reach(candidates, likelier, |sum| sum > target) {
                return candidates[at].id;
            }
            continue;
        }
        if !keep(candidates, filters, total, f64::from(depth.exp()), is_all) {
            continue;
        }
        if filters.typical_p < 1.0 {
            keep_typical(candidates, filters.typical_p);
        }
        return pick_of(candidates, uniform);
    }
    candidates.iter().max_by(|a, b| likelier(a, b)).map_or(0, |last| last.id)
}

/// Keeps what top-k, top-p and min-p leave; false: that may be more than is here. All tokens at least as heavy as `least`
/// are here.
fn keep(
    candidates: &mut Vec<Candidate>,
    filters: &Filters,
    total: f64,
    least: f64,
    is_all: bool,
) -> bool {
    let mut is_enough = is_all;
    let (top_k, min_p) = (filters.top_k, f64::from(filters.min_p));
    if (1..=candidates.len()).contains(&top_k) {
        candidates.select_nth_unstable_by(top_k - 1, likelier);
        candidates.truncate(top_k);
        is_enough = true;
    }
    if filters.top_p < 1.0 {
        if top_k > 0 && !is_enough {
            return false; // its share is one of what top-k leaves
        }
        let total = if top_k > 0 { sum(candidates) } else { total };
        let wanted = f64::from(filters.top_p) * total;
        if let Some(last) = reach(candidates, likelier, |sum| sum >= wanted) {
            candidates.truncate(last + 1);
            is_enough = true;
        }
    }
    if min_p > 0.0 {
        // The likeliest has weight 1, so this is a threshold on the weight itself.
        candidates.retain(|c| c.weight >= min_p);
        is_enough |= least < min_p;
    }
    is_enough
}

/// Keeps the tokens whose surprise is nearest to the expected one, until they reach `share` together.
fn keep_typical(candidates: &mut Vec<Candidate>, share: f32) {
    let total = sum(candidates);
    let mean = candidates.iter().map(|c| c.weight * f64::from(c.depth)).sum::<f64>() / total;
    nearest(candidates, mean, f64::from(share) * total);
}

/// Keeps those nearest to `mean` that reach `wanted` together; false where all do not.
fn nearest(candidates: &mut Vec<Candidate>, mean: f64, wanted: f64) -> bool {
    let deviation = |c: &Candidate| (f64::from(c.depth) - mean).abs();
    let nearer = |a: &Candidate, b: &Candidate| {
        deviation(a).total_cmp(&deviation(b)).then(a.id.cmp(&b.id)) // the order is total
    };
    let last = reach(candidates, nearer, |sum| sum >= wanted);
    if let Some(last) = last {
        // Those that deviate as much as the last one stay too.
        let bound = deviation(&candidates[last]);
        candidates.retain(|c| deviation(c) <= bound);
    }
    last.is_some()
}

/// All tokens of a vocabulary.
struct All<'a> {
    logits: &'a [f32],
    top: f32,
    temperature: f32,
}

impl All<'_> {
    /// Takes those that are so far down.
    fn between(&self, low: f32, high: f32, candidates: &mut Vec<Candidate>) {
        candidates.clear();
        for (ids, logits) in (0..).step_by(BLOCK).zip(self.logits.chunks(BLOCK)) {
            // Most blocks have none, and the largest of a block is quickly found.
            if (largest(logits) - self.top) / self.temperature < low {
                continue;
            }
            for (id, logit) in (ids..).zip(logits) {
                let depth = (logit - self.top) / self.temperature;
                if (low..=high).contains(&depth) && depth > f32::NEG_INFINITY {
                    candidates.push(Candidate { id, depth, weight: exp64(f64::from(depth)) });
                }
            }
        }
    }

    /// The weights of all, added up.
    fn weight(&self) -> f64 {
        const LANES: usize = 16;
        let weight = |logit: f32| exp32(((logit - self.top) / self.temperature).max(LEAST));
        let mut sum = 0.0;
        for logits in self.logits.chunks(64 * LANES) {
            let mut part = [0.0_f32; LANES];
            let (lanes, rest) = logits.as_chunks::<LANES>();
            for lane in lanes {
                for i in 0..LANES {
                    part[i] += weight(lane[i]);
                }
            }
            rest.iter().for_each(|&logit| part[0] += weight(logit));
            sum += part.iter().map(|&w| f64::from(w)).sum::<f64>();
        }
        sum
    }

    /// The typical tokens of all.
    fn typical(&self, share: f32, candidates: &mut Vec<Candidate>) {
        // In f64: who is nearer to the mean is a matter of its last digits.
        const LANES: usize = 8;
        let (mut totals, mut sums) = ([0.0_f64; LANES], [0.0_f64; LANES]);
        let mut add = |lane: usize, logit: f32| {
            let depth = f64::from(((logit - self.top) / self.temperature).max(LEAST));
            let weight = exp64(depth);
            totals[lane] += weight;
            sums[lane] += weight * depth;
        };
        let (lanes, rest) = self.logits.as_chunks::<LANES>();
        lanes.iter().for_each(|logits| (0..LANES).for_each(|i| add(i, logits[i])));
        rest.iter().for_each(|&logit| add(0, logit));
        let (total, depths): (f64, f64) = (totals.iter().sum(), sums.iter().sum());
        let mean = depths / total;
        for deviation in DEVIATIONS {
            #[allow(clippy::cast_possible_truncation)] // to what depths are
            let middle = mean as f32;
            self.between(middle - deviation, middle + deviation, candidates);
            if nearest(candidates, mean, f64::from(share) * total) {
                return;
            }
        }
    }
}

/// Logits that are passed over together.
const BLOCK: usize = 64;
/// A depth whose weight is nothing beside any other.
const LEAST: f32 = -87.0;

/// The largest logit.
fn largest(logits: &[f32]) -> f32 {
    const LANES: usize = 16;
    let (lanes, rest) = logits.as_chunks::<LANES>();
    let mut top = [f32::NEG_INFINITY; LANES];
    for lane in lanes {
        for i in 0..LANES {
            top[i] = if lane[i] > top[i] { lane[i] } else { top[i] };
        }
    }
    top.iter().chain(rest).copied().fold(f32::NEG_INFINITY, f32::max)
}

/// Likelier tokens first, of equal ones the lower id.
fn likelier(a: &Candidate, b: &Candidate) -> Ordering {
    b.depth.total_cmp(&a.depth).then(a.id.cmp(&b.id))
}

fn sum(candidates: &[Candidate]) -> f64 {
    candidates.iter().map(|c| c.weight).sum()
}

/// One of these; 0 where there is none.
fn pick_of(candidates: &mut [Candidate], uniform: f64) -> u32 {
    let target = uniform * sum(candidates);
    if let Some(at) = reach(candidates, likelier, |sum| sum > target) {
        return candidates[at].id;
    }
    candidates.iter().max_by(|a, b| likelier(a, b)).map_or(0, |last| last.id) // sums were rounded up
}

/// Where, in this order, the sum of weights is enough; those before it then stand in front of it, in some order.
/// `is_enough` stays true once it is.
fn reach(
    candidates: &mut [Candidate],
    order: impl Fn(&Candidate, &Candidate) -> Ordering,
    is_enough: impl Fn(f64) -> bool,
) -> Option<usize> {
    let (mut start, mut end, mut before) = (0, candidates.len(), 0.0);
    if !is_enough(sum(candidates)) {
        return None;
    }
    // By halves: each is either before it as a whole, or not needed.
    while end - start > FEW {
        let half = (end - start) / 2;
        candidates[start..end].select_nth_unstable_by(half, &order);
        let of_half = before + sum(&candidates[start..start + half]);
        match is_enough(of_half) {
            true => end = start + half,
            false => (start, before) = (start + half, of_half),
        }
    }
    candidates[start..end].sort_unstable_by(&order);
    let is_last = |c: &Candidate| {
        before += c.weight;
        is_enough(before)
    };
    let at = candidates[start..end].iter().position(is_last);
    Some(at.map_or(end - 1, |at| start + at)) // sums in another order were less
}

/// So many are sorted.
const FEW: usize = 32;
