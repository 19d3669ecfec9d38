//! The sampler against arithmetic that can be done by hand.
#![allow(clippy::unwrap_used)]

use loris::{Error, History, Sampler, SamplerParams};

fn sampler(params: SamplerParams) -> Sampler {
    Sampler::with_mask(params, &[]).unwrap()
}

/// How often each id comes out of `n` draws.
fn counts(params: SamplerParams, logits: &[f32], n: usize) -> Vec<usize> {
    let mut sampler = sampler(params);
    let mut counts = vec![0; logits.len()];
    for _ in 0..n {
        counts[sampler.sample(logits, &[]) as usize] += 1;
    }
    counts
}

fn warm() -> SamplerParams {
    SamplerParams { temperature: 1.0, seed: Some(42), ..SamplerParams::default() }
}

/// Logits of these probabilities.
fn logits(p: &[f32]) -> Vec<f32> {
    p.iter().map(|p| p.ln() + 3.0).collect()
}

#[test]
fn greedy_takes_the_first_of_the_largest() {
    let mut s = sampler(SamplerParams::default());
    assert_eq!(s.sample(&[0.0, 2.0, -1.0, 2.0], &[]), 1);
    assert_eq!(s.sample(&[-5.0], &[]), 0);
}

#[test]
fn draws_follow_the_probabilities() {
    let p = [0.5, 0.3, 0.15, 0.05];
    let n = 20_000;
    for (count, p) in counts(warm(), &logits(&p), n).into_iter().zip(p) {
        let expected = n as f32 * p;
        // Four standard deviations of a binomial.
        let bound = 4.0 * (expected * (1.0 - p)).sqrt();
        assert!((count as f32 - expected).abs() < bound, "{count} for {expected}");
    }
}

#[test]
fn temperature_sharpens_and_flattens() {
    let l = logits(&[0.6, 0.4]);
    let share = |temperature| {
        counts(SamplerParams { temperature, ..warm() }, &l, 10_000)[0] as f32 / 10_000.0
    };
    // p^(1/t), normalised.
    let expected = |t: f32| 0.6_f32.powf(1.0 / t) / (0.6_f32.powf(1.0 / t) + 0.4_f32.powf(1.0 / t));
    for t in [0.25, 1.0, 4.0] {
        assert!((share(t) - expected(t)).abs() < 0.02, "{t}");
    }
}

#[test]
fn filters_keep_what_they_say() {
    let l = logits(&[0.05, 0.5, 0.15, 0.3]);
    let kept = |params| -> Vec<usize> {
        let counts = counts(params, &l, 2_000);
        (0..l.len()).filter(|&i| counts[i] > 0).collect()
    };
    assert_eq!(kept(SamplerParams { top_k: 1, ..warm() }), [1]);
    assert_eq!(kept(SamplerParams { top_k: 2, ..warm() }), [1, 3]);
    assert_eq!(kept(SamplerParams { top_k: 9, ..warm() }), [0, 1, 2, 3]);
    assert_eq!(kept(SamplerParams { top_p: 0.4, ..warm() }), [1]);
    assert_eq!(kept(SamplerParams { top_p: 0.6, ..warm() }), [1, 3]);
    assert_eq!(kept(SamplerParams { top_p: 0.9, ..warm() }), [1, 2, 3]);
    assert_eq!(kept(SamplerParams { min_p: 0.5, ..warm() }), [1, 3]);
    assert_eq!(kept(SamplerParams { min_p: 1.0, ..warm() }), [1]);
    assert_eq!(kept(SamplerParams { top_k: 3, min_p: 0.2, top_p: 0.7, ..warm() }), [1, 3]);
}

#[test]
fn repetition_is_penalised_on_both_sides_of_zero() {
    let mut s = sampler(SamplerParams { repetition_penalty: 2.0, ..SamplerParams::default() });
    assert_eq!(s.sample(&[3.0, 2.0, 1.0], &[]), 0);
    assert_eq!(s.sample(&[3.0, 2.0, 1.0], &[0]), 1);
    assert_eq!(s.sample(&[3.0, 2.0, 1.6], &[0, 1]), 2);
    assert_eq!(s.sample(&[-1.0, -1.5], &[0]), 1);
    assert_eq!(s.sample(&[3.0, 1.0], &[7]), 0, "an id that the model lacks");
}

#[test]
fn masked_ids_never_come_out() {
    let mask = vec![false, true, false];
    let mut greedy = Sampler::with_mask(SamplerParams::default(), &mask).unwrap();
    assert_eq!(greedy.sample(&[1.0, 9.0, 2.0], &[]), 2);
    let mut drawn = Sampler::with_mask(warm(), &mask).unwrap();
    assert!((0..500).all(|_| drawn.sample(&[0.0, 9.0, 0.0], &[]) != 1));
}

#[test]
fn a_seed_gives_the_same_tokens_again() {
    let l = logits(&[0.25; 4]);
    let draw = |seed| {
        let mut s = sampler(SamplerParams { seed: Some(seed), ..warm() });
        (0..50).map(|_| s.sample(&l, &[])).collect::<Vec<_>>()
    };
    assert_eq!(draw(1), draw(1));
    assert_ne!(draw(1), draw(2));
}

fn draw(s: &mut Sampler, n: usize) -> Vec<u32> {
    let l = logits(&[0.25; 4]);
    (0..n).map(|_| s.sample(&l, &[])).collect()
}

#[test]
fn without_a_seed_everybody_draws_numbers_of_their_own_that_can_be_repeated() {
    let random = || sampler(SamplerParams { seed: None, ..warm() });
    let mut seeds = std::collections::HashSet::new();
    for _ in 0..100 {
        let mut s = random();
        assert!(s.seed() < 1 << 53 && seeds.insert(s.seed()));
        let drawn = draw(&mut s, 40);
        let mut again = sampler(SamplerParams { seed: Some(s.seed()), ..warm() });
        assert_eq!(draw(&mut again, 40), drawn);
    }
    // Other threads, too.
    let of_a_thread = || std::thread::spawn(|| sampler(warm_without_seed()).seed());
    let threads: Vec<_> = (0..8).map(|_| of_a_thread()).collect();
    assert!(threads.into_iter().all(|thread| seeds.insert(thread.join().unwrap())));
    assert_eq!(sampler(SamplerParams { seed: Some(0), ..warm() }).seed(), 0, "0 is a seed");
    assert_ne!(draw(&mut random(), 50), draw(&mut random(), 50));
}

fn warm_without_seed() -> SamplerParams {
    SamplerParams { seed: None, ..warm() }
}

#[test]
fn a_fork_draws_what_its_stated_seed_says() {
    let stated = |seed: u64, n_before: u64| {
        let bytes = [seed.to_le_bytes(), n_before.to_le_bytes()].concat();
        xxhash_rust::xxh3::xxh3_64(&bytes) >> 11
    };
    let mut parent = sampler(warm());
    let mut undisturbed = sampler(warm());
    draw(&mut parent, 3);
    let mut first = parent.fork().unwrap();
    let mut grandchild = first.fork().unwrap();
    let mut second = parent.fork().unwrap();
    assert_eq!((first.seed(), second.seed()), (stated(42, 0), stated(42, 1)));
    assert_eq!(grandchild.seed(), stated(first.seed(), 0));
    let mut all = vec![draw(&mut first, 50), draw(&mut second, 50), draw(&mut grandchild, 50)];
    draw(&mut undisturbed, 3);
    all.push(draw(&mut undisturbed, 50));
    assert_eq!(draw(&mut parent, 50), all[3], "forking is no draw");
    for (i, a) in all.iter().enumerate() {
        assert!(all[..i].iter().all(|b| a != b));
    }
    let mut again = sampler(SamplerParams { seed: Some(stated(42, 1)), ..warm() });
    assert_eq!(draw(&mut again, 50), all[1]);
    // The likeliest token is what it is.
    let mut greedy = sampler(SamplerParams::default());
    assert_eq!(
        greedy.fork().unwrap().sample(&[0.0, 2.0, 1.0], &[]),
        greedy.sample(&[0.0, 2.0, 1.0], &[])
    );
}

#[test]
fn meaningless_parameters_are_refused() {
    for params in [
        SamplerParams { temperature: -0.1, ..warm() },
        SamplerParams { temperature: f32::NAN, ..warm() },
        SamplerParams { top_p: 0.0, ..warm() },
        SamplerParams { top_p: 1.1, ..warm() },
        SamplerParams { min_p: -0.1, ..warm() },
        SamplerParams { min_p: f32::NAN, ..warm() },
        SamplerParams { repetition_penalty: 0.0, ..warm() },
        SamplerParams { repetition_penalty: f32::INFINITY, ..warm() },
    ] {
        assert!(matches!(Sampler::with_mask(params, &[]), Err(Error::Option { .. })));
    }
}

/// Numbers in [0, 1) as the sampler takes them (splitmix64).
fn uniform(state: &mut u64) -> f64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (*state ^ (*state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((z ^ (z >> 31)) >> 11) as f64 / (1_u64 << 53) as f64
}

/// The definition: everything sorted, in f64. A token, and how far sums were from the bounds that they were compared with.
fn naive(p: &SamplerParams, logits: &[f32], history: &History<'_>, uniform: f64) -> (u32, f64) {
    let mut l: Vec<f64> = logits.iter().map(|&x| f64::from(x)).collect();
    for &(id, bias) in &p.logit_bias {
        l[id as usize] += f64::from(bias);
    }
    let (penalty, seen) = (f64::from(p.repetition_penalty), history.tokens.concat());
    let n = |id: usize, among: &[u32]| among.iter().filter(|&&x| x as usize == id).count() as f64;
    for (id, x) in l.iter_mut().enumerate() {
        if n(id, &seen) > 0.0 {
            *x = if *x > 0.0 { *x / penalty } else { *x * penalty };
        }
        let answered = n(id, history.answer);
        *x -= f64::from(p.frequency_penalty) * answered;
        *x -= if answered > 0.0 { f64::from(p.presence_penalty) } else { 0.0 };
    }
    let mut all: Vec<(usize, f64)> =
        l.iter().map(|x| x / f64::from(p.temperature)).enumerate().collect();
    all.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    if p.top_k > 0 {
        all.truncate(p.top_k);
    }
    let shares = |all: &[(usize, f64)]| -> Vec<f64> {
        let total: f64 = all.iter().map(|x| (x.1 - all[0].1).exp()).sum();
        all.iter().map(|x| (x.1 - all[0].1).exp() / total).collect()
    };
    let (mut margin, mut gap) = (f64::MAX, f64::MAX);
    let mut reach = |shares: &[f64], wanted: f64| {
        let mut reached = 0.0;
        let last = shares.iter().position(|x| {
            reached += x;
            margin = margin.min((reached - wanted).abs());
            reached >= wanted
        });
        last.map_or(shares.len(), |last| last + 1)
    };
    if p.top_p < 1.0 {
        all.truncate(reach(&shares(&all), f64::from(p.top_p)));
    }
    let heavy = shares(&all);
    all.truncate(heavy.iter().filter(|&&x| x >= f64::from(p.min_p) * heavy[0]).count());
    if p.typical_p < 1.0 {
        let shares = shares(&all);
        let entropy: f64 = shares.iter().map(|x| -x * x.ln()).sum();
        let mut by_surprise: Vec<usize> = (0..all.len()).collect();
        let deviation = |i: usize| (-shares[i].ln() - entropy).abs();
        by_surprise.sort_by(|&a, &b| deviation(a).total_cmp(&deviation(b)));
        let sorted: Vec<f64> = by_surprise.iter().map(|&i| shares[i]).collect();
        // Those that deviate as much as the last one stay too.
        let n = reach(&sorted, f64::from(p.typical_p));
        let last = deviation(by_surprise[n - 1]);
        let others = by_surprise.iter().map(|&i| (deviation(i) - last).abs());
        let nearest = others.filter(|&gap| gap > 0.0).min_by(f64::total_cmp);
        // Depths are f32 there: two that deviate alike can change places.
        gap = nearest.map_or(gap, |nearest| 10.0 * nearest);
        by_surprise.retain(|&i| deviation(i) <= last);
        by_surprise.sort_unstable();
        all = by_surprise.into_iter().map(|i| all[i]).collect();
    }
    let (mut reached, mut chosen) = (0.0, None);
    for (share, (id, _)) in shares(&all).into_iter().zip(&all) {
        reached += share;
        margin = margin.min((reached - uniform).abs());
        if reached > uniform && chosen.is_none() {
            chosen = Some(*id as u32);
        }
    }
    (chosen.unwrap_or(all[all.len() - 1].0 as u32), margin.min(gap))
}

/// Only likely tokens are looked at closely, and the choice is that of everything sorted.
#[test]
fn a_choice_is_that_of_the_definition() {
    let mut state = 7;
    let mut pick = |n: usize| (uniform(&mut state) * n as f64) as usize;
    let (mut n_same, mut n_near) = (0, 0);
    for case in 0..240 {
        let n_vocab = [3, 64, 65, 1000, 5000][pick(5)];
        let spread = [0.01, 1.0, 4.0, 20.0][pick(4)];
        let logits: Vec<f32> = (0..n_vocab)
            .map(|_| {
                (0..4).map(|_| pick(1 << 20) as f32 / (1 << 19) as f32 - 1.0).sum::<f32>() * spread
            })
            .collect();
        let history: Vec<u32> = (0..pick(40)).map(|_| pick(n_vocab) as u32).collect();
        let split = pick(history.len() + 1);
        let params = SamplerParams {
            temperature: [0.3, 0.8, 1.0, 1.7][pick(4)],
            top_k: [0, 0, 1, 5, 400, 9999][pick(6)],
            top_p: [1.0, 1.0, 0.95, 0.5, 0.01][pick(5)],
            min_p: [0.0, 0.0, 0.05, 0.5][pick(4)],
            typical_p: [1.0, 1.0, 0.9, 0.2][pick(4)],
            repetition_penalty: [1.0, 1.2, 0.7][pick(3)],
            presence_penalty: [0.0, 0.5, -1.5][pick(3)],
            frequency_penalty: [0.0, 0.4][pick(2)],
            logit_bias: [vec![], vec![(2, 3.0), (0, -50.0)]][pick(2)].clone(),
            seed: Some(case),
        };
        let history =
            History { tokens: [&history[..split], &history[split..]], answer: &history[split..] };
        let mut s = sampler(params.clone());
        let mut numbers = case;
        for _ in 0..40 {
            let (id, margin) = naive(&params, &logits, &history, uniform(&mut numbers));
            match s.sample(&logits, history) == id {
                true => n_same += 1,
                // Sums of f32 on one side of a bound, of f64 on the other.
                false if margin < 1e-5 => n_near += 1,
                false => panic!("{case}: {params:?} over {n_vocab}: not {id} ({margin})"),
            }
        }
    }
    assert!(n_near < n_same / 1000, "{n_near} of {n_same}");
}

/// Counting goes on from call to call, and begins anew where a history is not that of the call before.
#[test]
fn penalties_count_the_history_that_is_given() {
    let histories: [[&[u32]; 2]; 8] = [
        [&[], &[]],
        [&[0, 1, 1], &[]],
        [&[0, 1, 1, 2], &[]],
        [&[0, 1], &[1, 2, 0]],
        [&[2], &[]],
        [&[2], &[1, 1]],
        [&[3, 3, 3], &[9]],
        [&[], &[]],
    ];
    let params = SamplerParams {
        repetition_penalty: 1.5,
        frequency_penalty: 0.25,
        ..SamplerParams::default()
    };
    let mut lasting = sampler(params.clone());
    for tokens in histories {
        let history = History { tokens, answer: tokens[0] };
        let logits = [1.0, 1.1, 1.2, 0.9];
        let fresh = sampler(params.clone()).sample(&logits, history);
        assert_eq!(lasting.sample(&logits, history), fresh, "{tokens:?}");
    }
}

#[test]
fn a_temperature_too_small_to_divide_by_is_greedy() {
    for temperature in [0.0, 1e-45, 1e-40, 5e-38, 1e-37, 1e-30, 1e-9] {
        let mut s = sampler(SamplerParams { temperature, ..warm() });
        assert_eq!(s.sample(&[0.5, 30.0, -2.0, 29.0], &[]), 1, "{temperature}");
        assert_eq!(s.sample(&[-3e38, -1.0, 3e38], &[]), 2, "{temperature}");
    }
}

#[test]
fn options_out_of_range_are_refused() {
    let odd = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -1e30, 1e30];
    for x in odd {
        for params in [
            SamplerParams { temperature: x, ..warm() },
            SamplerParams { top_p: x, ..warm() },
            SamplerParams { min_p: x, ..warm() },
            SamplerParams { typical_p: x, ..warm() },
            SamplerParams { repetition_penalty: x, ..warm() },
            SamplerParams { presence_penalty: x, ..warm() },
            SamplerParams { frequency_penalty: x, ..warm() },
            SamplerParams { logit_bias: vec![(0, 1.0), (1, x)], ..warm() },
        ] {
            let refused = Sampler::with_mask(params.clone(), &[]);
            assert!(matches!(refused, Err(Error::Option { .. })), "{params:?}");
        }
    }
    // The smallest numbers mean what they say.
    let tiny = SamplerParams { top_p: 1e-45, min_p: 1e-45, typical_p: 1e-45, ..warm() };
    assert!(sampler(tiny).sample(&[1.0, 2.0], &[]) < 2);
}

#[test]
fn a_mask_leaves_a_choice_among_its_tokens() {
    let logits: Vec<f32> = (0..70).map(|id| (id % 10) as f32).collect();
    let bits = |ids: &[u32]| {
        let mut words = [0; 3];
        ids.iter().for_each(|id| words[*id as usize / 32] |= 1 << (id % 32));
        words
    };
    let mut greedy = sampler(SamplerParams::default());
    for (ids, want) in [
        (&[69][..], Some(69)),
        (&[3, 13, 33], Some(3)),
        (&[64, 12, 31, 32], Some(64)),
        (&[], None),
        (&[70, 71, 95], None), // beyond the vocabulary
        (&[95, 0], Some(0)),
    ] {
        assert_eq!(greedy.sample_masked(&logits, &[], &bits(ids)).unwrap(), want, "{ids:?}");
    }
    assert_eq!(greedy.sample(&logits, &[]), 9, "it holds for one token");
    for len in [0, 2, 4] {
        let refused = greedy.sample_masked(&logits, &[], &vec![u32::MAX; len]);
        assert!(matches!(refused, Err(Error::Option { name: "allowed", .. })), "{len}");
    }

    // Tokens that are never chosen stay so.
    let never: Vec<bool> = (0..70).map(|id| id == 64).collect();
    let mut padded = Sampler::with_mask(SamplerParams::default(), &never).unwrap();
    assert_eq!(padded.sample_masked(&logits, &[], &bits(&[64, 12])).unwrap(), Some(12));
    assert_eq!(padded.sample_masked(&logits, &[], &bits(&[64])).unwrap(), None);

    // A draw is one among the allowed by what they weigh, and no draw takes no number of the sequence.
    let (mut drawn, mut alike) = (sampler(warm()), sampler(warm()));
    let allowed = bits(&[8, 18, 27, 36, 69]);
    let only: Vec<f32> =
        (0..70)
            .map(|id| {
                if allowed[id / 32] >> (id % 32) & 1 == 1 { logits[id] } else { f32::NEG_INFINITY }
            })
            .collect();
    for _ in 0..200 {
        assert_eq!(drawn.sample_masked(&logits, &[], &bits(&[])).unwrap(), None);
        let id = drawn.sample_masked(&logits, &[], &allowed).unwrap();
        assert_eq!(id, Some(alike.sample(&only, &[])));
    }
}

/// Draws follow what transformers' processors leave of the same logits: chi-squared over 20,000 of each case of `sampling.json`.
#[test]
fn draws_follow_what_transformers_leaves() {
    const N: usize = 20_000;
    let path =
        std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/sampling.json");
    let file: serde_json::Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let floats = |list: &serde_json::Value| -> Vec<f64> {
        list.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
    };
    for case in file["cases"].as_array().unwrap() {
        let options = &case["options"];
        let float = |name: &str, default: f32| options[name].as_f64().map_or(default, |x| x as f32);
        let bias = options["sequence_bias"].as_array().unwrap().iter();
        let params = SamplerParams {
            temperature: float("temperature", 1.0),
            top_k: options["top_k"].as_u64().unwrap_or(0) as usize,
            top_p: float("top_p", 1.0),
            min_p: float("min_p", 0.0),
            typical_p: float("typical_p", 1.0),
            repetition_penalty: float("repetition_penalty", 1.0),
            logit_bias: bias
                .map(|b| (b[0].as_u64().unwrap() as u32, b[1].as_f64().unwrap() as f32))
                .collect(),
            seed: Some(9),
            ..SamplerParams::default()
        };
        let logits: Vec<f32> = floats(&case["logits"]).into_iter().map(|x| x as f32).collect();
        let history: Vec<u32> = floats(&case["history"]).into_iter().map(|x| x as u32).collect();
        let shares = floats(&case["shares"]);
        let mut sampler = sampler(params);
        let mut counts = vec![0_usize; logits.len()];
        for _ in 0..N {
            counts[sampler.sample(&logits, history.as_slice()) as usize] += 1;
        }
        // Bins that expect few draws are one bin together.
        let (mut chi_squared, mut n_bins, mut rest) = (0.0, 0.0_f64, (0.0, 0.0));
        let mut bin = |expected: f64, count: f64| {
            chi_squared += (count - expected).powi(2) / expected;
            n_bins += 1.0;
        };
        for (id, (&share, &count)) in shares.iter().zip(&counts).enumerate() {
            assert!(share > 0.0 || count == 0, "{options}: {id} is left out");
            match (share * N as f64, count as f64) {
                (expected, count) if expected < 8.0 => rest = (rest.0 + expected, rest.1 + count),
                (expected, count) => bin(expected, count),
            }
        }
        if rest.0 > 0.0 {
            bin(rest.0.max(1.0), rest.1);
        }
        // The bound that one in 10^6 passes (Wilson and Hilferty).
        let k = (n_bins - 1.0).max(1.0);
        let bound = k * (1.0 - 2.0 / (9.0 * k) + 4.75 * (2.0 / (9.0 * k)).sqrt()).powi(3);
        assert!(chi_squared < bound, "{options}: {chi_squared:.1} of at most {bound:.1}");
    }
}
