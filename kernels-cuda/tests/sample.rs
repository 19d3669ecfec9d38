//! `sample` against the engine's definition: sort, cut, add up in f64.

#![allow(clippy::unwrap_used)]

mod common;

use common::Random;
use loris_kernels::abi::{LorisLogitChange, LorisSampling};
use loris_kernels::ops::logit_adjust::logit_adjust;
use loris_kernels::ops::sample::sample;
use loris_kernels::{Buffer, Device, Rows};

/// Tokens from the likeliest on, and which of them the engine's sampler draws, with both cuts by weight moved by
/// a share of all weights.
fn reference(
    logits: &[f32],
    masked: &[u32],
    s: &LorisSampling,
    moved: [f64; 2],
) -> (Vec<u32>, usize) {
    let none = (vec![u32::MAX], 0);
    if logits.iter().any(|l| !l.is_finite()) {
        return none;
    }
    let is_masked = |id: usize| masked.get(id / 32).is_some_and(|word| word >> (id % 32) & 1 == 1);
    let ids = (0..logits.len()).filter(|&id| !is_masked(id));
    let token = |id: usize| u32::try_from(id).unwrap();
    if s.temperature == 0.0 {
        let first = |best: Option<usize>, id| match best {
            Some(b) if logits[b] >= logits[id] => Some(b),
            _ => Some(id),
        };
        return ids.fold(None, first).map_or(none, |id| (vec![token(id)], 0));
    }
    let mut all: Vec<(usize, f32)> = ids.map(|id| (id, logits[id] / s.temperature)).collect();
    if all.is_empty() {
        return none;
    }
    all.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    if s.top_k > 0 {
        all.truncate(s.top_k as usize);
    }
    let top = all[0].1;
    let mut weights: Vec<f64> = all.iter().map(|c| f64::from(c.1 - top).exp()).collect();
    if s.top_p < 1.0 {
        let total: f64 = weights.iter().sum();
        let enough = (f64::from(s.top_p) + moved[0]) * total;
        let mut reached = 0.0;
        let n = weights.iter().take_while(|&&w| {
            let below = reached < enough;
            reached += w;
            below
        });
        let n = n.count().max(1);
        weights.truncate(n);
    }
    weights.truncate(weights.partition_point(|&w| w >= f64::from(s.min_p)).max(1));
    let mut left = (s.uniform + moved[1]) * weights.iter().sum::<f64>();
    let taken = weights.iter().take_while(|&w| {
        left -= w;
        left >= 0.0
    });
    let drawn = taken.count().min(weights.len() - 1);
    (all.iter().map(|c| token(c.0)).collect(), drawn)
}

/// Rows of logits, each with its own sampling; `masked` is for all of them.
struct Table {
    vocab_size: usize,
    logits: Vec<f32>,
    sampling: Vec<LorisSampling>,
    masked: Vec<u32>,
}

impl Table {
    fn run(&self, device: &Device) -> Vec<u32> {
        let n_rows = self.sampling.len();
        let mut logits = Rows::new(device, n_rows, self.vocab_size, "logits").unwrap();
        logits.data.upload(device, 0, &self.logits).unwrap();
        let sampling = Buffer::from_slice(device, &self.sampling, "sampling").unwrap();
        let masked = Buffer::from_slice(device, &self.masked, "masked").unwrap();
        let masked = (!self.masked.is_empty()).then_some(&masked);
        let mut tokens = Buffer::new(device, n_rows, "tokens").unwrap();
        sample(device, &logits, &sampling, masked, n_rows, &mut tokens).unwrap();
        let mut got = vec![0; n_rows];
        tokens.download(device, 0, &mut got).unwrap();
        got
    }

    fn check(&self, device: &Device) {
        let rows = self.logits.chunks(self.vocab_size).zip(&self.sampling);
        for ((logits, sampling), got) in rows.zip(self.run(device)) {
            let draw = |p, u| reference(logits, &self.masked, sampling, [p, u]);
            let (ids, drawn) = draw(0.0, 0.0);
            let (mut first, mut last) = (drawn, drawn); // near a boundary, either side will do
            for (p, u) in [(-1e-9, -1e-9), (-1e-9, 1e-9), (1e-9, -1e-9), (1e-9, 1e-9)] {
                let (_, drawn) = draw(p, u);
                (first, last) = (first.min(drawn), last.max(drawn));
            }
            let (wanted, vocab_size) = (&ids[first..=last], self.vocab_size);
            assert!(wanted.contains(&got), "{got}, not {wanted:?}: {sampling:?} of {vocab_size}");
        }
    }
}

/// Peaked, flat, few values, all equal, far apart.
fn logits(random: &mut Random, kind: usize, vocab_size: usize) -> Vec<f32> {
    let mut draw = || {
        let x = random.uniform(-1.0, 1.0);
        match kind {
            0 => 12.0 * x * x * x,
            1 => 1e-3 * x,
            2 => (4.0 * x).round() / 2.0, // has -0 and 0
            3 => 2.5,
            _ => 1e3 * x,
        }
    };
    (0..vocab_size).map(|_| draw()).collect()
}

fn random_sampling(random: &mut Random, vocab_size: usize) -> LorisSampling {
    let of = |random: &mut Random, values: &[f32]| values[random.below(values.len())];
    let top_k = [0, 0, 1, 5, 40, u32::try_from(vocab_size).unwrap()];
    LorisSampling {
        temperature: of(random, &[0.0, 0.3, 1.0, 1.0, 5.0]),
        top_k: top_k[random.below(top_k.len())],
        top_p: of(random, &[1.0, 1.0, 0.9, 0.5, 0.1]),
        min_p: of(random, &[0.0, 0.0, 1e-3, 0.1, 1.0]),
        uniform: match random.below(8) {
            0 => 0.0,
            1 => 1.0 - f64::EPSILON / 2.0,
            _ => random.unit(),
        },
    }
}

fn random_table(random: &mut Random, vocab_size: usize, n_rows: usize, with_mask: bool) -> Table {
    let all = (0..n_rows).flat_map(|row| logits(random, row % 5, vocab_size)).collect();
    let sampling = (0..n_rows).map(|_| random_sampling(random, vocab_size)).collect();
    let word = |_| u32::try_from(random.below(1 << 32)).unwrap();
    let masked = if with_mask { (0..vocab_size.div_ceil(32)).map(word).collect() } else { vec![] };
    Table { vocab_size, logits: all, sampling, masked }
}

#[test]
fn draws_what_the_engine_draws() {
    let device = common::device();
    let mut random = Random::new(2);
    for (vocab_size, n_rows) in [(1, 3), (31, 30), (32, 15), (33, 30), (1000, 30)] {
        for with_mask in [false, true] {
            random_table(&mut random, vocab_size, n_rows, with_mask).check(&device);
        }
    }
}

#[test]
fn draws_from_a_large_vocabulary() {
    let device = common::device();
    let mut table = random_table(&mut Random::new(3), 49_152, 3, true);
    table.sampling[0] =
        LorisSampling { temperature: 1.0, top_k: 0, top_p: 0.9, min_p: 0.0, uniform: 0.7 };
    table.sampling[1] =
        LorisSampling { temperature: 0.7, top_k: 40, top_p: 1.0, min_p: 0.0, uniform: 0.3 };
    table.check(&device);
}

#[test]
fn frequencies_follow_the_weights() {
    let device = common::device();
    let n = 40_u32; // draws at evenly spaced uniforms: the count of an id is its share, within one
    let row = [1.0_f32, 3.0, 2.0, -5.0];
    let draw = |i: u32| LorisSampling {
        temperature: 1.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        uniform: (f64::from(i) + 0.5) / f64::from(n),
    };
    let table = Table {
        vocab_size: 4,
        logits: row.repeat(n as usize),
        sampling: (0..n).map(draw).collect(),
        masked: vec![],
    };
    let got = table.run(&device);
    let total: f64 = row.iter().map(|&l| f64::from(l).exp()).sum();
    for (id, &logit) in (0..).zip(&row) {
        let count = got.iter().filter(|&&t| t == id).count();
        let share = f64::from(logit).exp() / total * f64::from(n);
        assert!((count as f64 - share).abs() <= 1.0, "id {id}: {count} of {n}, expected {share}");
    }
}

#[test]
fn rows_without_a_token_say_so() {
    let device = common::device();
    let greedy = LorisSampling { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, uniform: 0.0 };
    let warm = LorisSampling { temperature: 1.0, ..greedy };
    // Not finite, also under the mask; the other rows are not touched by it.
    let mut logits = vec![0.5; 40 * 8];
    for (row, bad) in [(0, f32::NAN), (1, f32::INFINITY), (2, f32::NEG_INFINITY), (3, f32::NAN)] {
        logits[row * 40 + 7 * row] = bad;
    }
    let sampling = vec![greedy, warm, warm, greedy, greedy, warm, greedy, warm];
    let masked = vec![1 | 1 << 21, 0];
    let table = Table { vocab_size: 40, logits, sampling, masked };
    assert_eq!(table.run(&device)[..4], [u32::MAX; 4]);
    table.check(&device);
    // Nothing may be drawn.
    let masked = vec![u32::MAX, u32::MAX];
    let table =
        Table { vocab_size: 40, logits: vec![0.5; 80], sampling: vec![greedy, warm], masked };
    assert_eq!(table.run(&device), [u32::MAX; 2]);
}

/// Biases and penalties, bit for bit, and the row that they are of stays as it is.
#[test]
fn logits_are_adjusted() {
    let device = common::device();
    let mut random = Random::new(18);
    for (vocab_size, n_changes) in
        [(1, 0), (1, 1), (7, 7), (2047, 3), (2048, 300), (2049, 2049), (5000, 1), (10_000, 700)]
    {
        let float = |random: &mut Random| (random.below(1 << 16) as f32 / 32_768.0 - 1.0) * 4.0;
        let logits: Vec<f32> = (0..3 * vocab_size).map(|_| float(&mut random)).collect();
        let mut ids: Vec<usize> = (0..vocab_size).collect();
        (0..n_changes).for_each(|i| ids.swap(i, i + random.below(vocab_size - i)));
        let mut changes: Vec<LorisLogitChange> = ids[..n_changes]
            .iter()
            .map(|&id| LorisLogitChange {
                id: u32::try_from(id).unwrap(),
                bias: [0.0, float(&mut random)][random.below(2)],
                factor: [1.0, 1.3, 0.7][random.below(3)],
                minus: [0.0, float(&mut random)][random.below(2)],
            })
            .collect();
        // Behind those that count, and of an id that there is not.
        changes.push(LorisLogitChange { id: 0, bias: 99.0, factor: 1.0, minus: 0.0 });
        let n_given = n_changes;
        if n_changes > 1 {
            changes[0].id = u32::MAX;
        }
        let on_device = Rows {
            data: Buffer::from_slice(&device, &logits, "logits").unwrap(),
            n_rows: 3,
            width: vocab_size,
        };
        let buffer = Buffer::from_slice(&device, &changes, "changes").unwrap();
        let mut out = Rows::new(&device, 1, vocab_size, "out").unwrap();
        for row in 0..3 {
            logit_adjust(&device, &on_device, row, &buffer, n_given, &mut out).unwrap();
            let mut want = logits[row * vocab_size..][..vocab_size].to_vec();
            for change in &changes[..n_given] {
                let Some(logit) = want.get_mut(change.id as usize) else { continue };
                *logit += change.bias;
                *logit = if *logit > 0.0 { *logit / change.factor } else { *logit * change.factor };
                *logit -= change.minus;
            }
            let mut got = vec![0.0_f32; vocab_size];
            out.data.download(&device, 0, &mut got).unwrap();
            let bits = |of: &[f32]| of.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&got), bits(&want), "{vocab_size} {n_changes}");
        }
        let mut same = vec![0.0_f32; 3 * vocab_size];
        on_device.data.download(&device, 0, &mut same).unwrap();
        assert!(same == logits);
        let too_many = logit_adjust(&device, &on_device, 3, &buffer, n_given, &mut out);
        assert!(too_many.is_err());
        assert!(
            logit_adjust(&device, &on_device, 0, &buffer, changes.len() + 1, &mut out).is_err()
        );
    }
}
