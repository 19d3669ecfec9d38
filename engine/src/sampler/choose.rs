//! From adjusted logits to one token, with a close look at the likely ones only.
//!
//! A vocabulary has 30,000 to 250,000 tokens, of which a choice needs a few hundred in order. So two plain passes find the
//! largest logit and, where a filter asks for it, the weight of all tokens together; then tokens are taken in
//! order of likeliness as far down as the filters or the draw itself ask for.
//!
//! Filters follow each other as in `transformers`: top-k, top-p, min-p, typical (Meister et al. 2022, arXiv 2202.00666).
//! Each sees the distribution that the one before it left. Of equal logits the lower id comes first.

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
        all.down_to(depth, candidates);
        let is_all = depth == f32::NEG_INFINITY;
        if no_filter {
            // Of an untouched distribution the draw itself says how far down to look.
            let target = uniform * if is_all { sum(candidates) } else { total };
            if let Some(id) = pick(candidates, target) {
                return id;
            }
            continue;
        }
        let Some(n) = n_kept(candidates, filters, total, f64::from(depth.exp()), is_all) else {
            continue;
        };
        candidates.truncate(n.max(1));
        if filters.typical_p < 1.0 {
            keep_typical(candidates, filters.typical_p);
        }
        return pick_of(candidates, uniform);
    }
    candidates.last().map_or(0, |last| last.id)
}

/// How many of the likeliest tokens top-k, top-p and min-p leave; `None`: more than are here. All tokens at least as
/// heavy as `least` are here.
fn n_kept(
    candidates: &[Candidate],
    filters: &Filters,
    total: f64,
    least: f64,
    is_all: bool,
) -> Option<usize> {
    let enough = |n: usize| (n <= candidates.len() || is_all).then_some(n.min(candidates.len()));
    let mut n = if filters.top_k > 0 { enough(filters.top_k) } else { enough(usize::MAX) };
    if filters.top_p < 1.0 {
        if filters.top_k > 0 {
            n?; // its share is one of what top-k leaves
        }
        let among = &candidates[..n.unwrap_or(candidates.len())];
        let total = if filters.top_k > 0 { sum(among) } else { total };
        let wanted = f64::from(filters.top_p) * total;
        let mut reached = 0.0;
        let first_enough = among.iter().position(|c| {
            reached += c.weight;
            reached >= wanted
        });
        n = first_enough.map(|last| last + 1).or(n);
    }
    if filters.min_p > 0.0 {
        // The likeliest has weight 1, so this is a threshold on the weight itself.
        let min_p = f64::from(filters.min_p);
        let n_heavy = candidates.partition_point(|c| c.weight >= min_p);
        n = match n {
            Some(n) => Some(n.min(n_heavy)),
            None => (least < min_p).then_some(n_heavy),
        };
    }
    n
}

/// Keeps the tokens whose surprise is nearest to the expected one, until they reach `share` together.
fn keep_typical(candidates: &mut Vec<Candidate>, share: f32) {
    let total = sum(candidates);
    let mean = candidates.iter().map(|c| c.weight * f64::from(c.depth)).sum::<f64>() / total;
    nearest(candidates, mean, f64::from(share) * total);
}

/// Keeps those nearest to `mean` that reach `wanted` together, in order of likeliness again; false where all do not.
fn nearest(candidates: &mut Vec<Candidate>, mean: f64, wanted: f64) -> bool {
    let deviation = |c: &Candidate| (f64::from(c.depth) - mean).abs();
    candidates.sort_unstable_by(|a, b| {
        deviation(a).total_cmp(&deviation(b)).then(a.id.cmp(&b.id)) // the order is total
    });
    let mut reached = 0.0;
    let last = candidates.iter().position(|c| {
        reached += c.weight;
        reached >= wanted
    });
    if let Some(last) = last {
        // Those that deviate as much as the last one stay too.
        let bound = deviation(&candidates[last]);
        candidates.truncate(candidates.partition_point(|c| deviation(c) <= bound));
    }
    sort(candidates);
    last.is_some()
}

/// All tokens of a vocabulary.
struct All<'a> {
    logits: &'a [f32],
    top: f32,
    temperature: f32,
}

impl All<'_> {
    /// Takes those at most so far down, likeliest first.
    fn down_to(&self, depth: f32, candidates: &mut Vec<Candidate>) {
        self.between(depth, 0.0, candidates);
        sort(candidates);
    }

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
                    candidates.push(Candidate { id, depth, weight: f64::from(depth).exp() });
                }
            }
        }
    }

    /// The weights of all, added up.
    fn weight(&self) -> f64 {
        const LANES: usize = 16;
        let weight = |logit: f32| exp(((logit - self.top) / self.temperature).max(LEAST));
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
        let (mut total, mut depths) = (0.0, 0.0);
        for logit in self.logits {
            let depth = f64::from((logit - self.top) / self.temperature).max(f64::from(LEAST));
            total += depth.exp();
            depths += depth.exp() * depth;
        }
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

/// e to the power of a number from [`LEAST`] to 0, within 2e-7 of it: as good as the logits, and many at a time.
#[inline(always)]
fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding it leaves no digits behind the point
    let n = (x * std::f32::consts::LOG2_E + ROUND) - ROUND;
    let r = (x - n * 0.693_359_4) + n * 2.121_944_4e-4; // n ln 2 in two parts
    let mut p = 1.0 / 720.0;
    for c in [1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        p = p * r + c;
    }
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // -126 to 0
    let exponent = (n as i32 + 127) as u32;
    p * f32::from_bits(exponent << 23)
}

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

fn sort(candidates: &mut [Candidate]) {
    candidates.sort_unstable_by(|a, b| b.depth.total_cmp(&a.depth).then(a.id.cmp(&b.id)));
}

fn sum(candidates: &[Candidate]) -> f64 {
    candidates.iter().map(|c| c.weight).sum()
}

/// One of these; 0 where there is none.
fn pick_of(candidates: &[Candidate], uniform: f64) -> u32 {
    let last = || candidates.last().map_or(0, |last| last.id); // where sums were rounded up
    pick(candidates, uniform * sum(candidates)).unwrap_or_else(last)
}

/// The token at which the weights, added up, pass `target`.
fn pick(candidates: &[Candidate], target: f64) -> Option<u32> {
    let mut left = target;
    for c in candidates {
        left -= c.weight;
        if left < 0.0 {
            return Some(c.id);
        }
    }
    None
}
