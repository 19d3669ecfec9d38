//! The sampler against arithmetic that can be done by hand.
#![allow(clippy::unwrap_used)]

use loris::{Error, Sampler, SamplerParams};

fn sampler(params: SamplerParams) -> Sampler {
    Sampler::with_mask(params, Vec::new()).unwrap()
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
    let mut greedy = Sampler::with_mask(SamplerParams::default(), mask.clone()).unwrap();
    assert_eq!(greedy.sample(&[1.0, 9.0, 2.0], &[]), 2);
    let mut drawn = Sampler::with_mask(warm(), mask).unwrap();
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
        assert!(matches!(Sampler::with_mask(params, Vec::new()), Err(Error::Option { .. })));
    }
}
