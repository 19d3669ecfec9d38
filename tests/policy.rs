//! Policies alone: what they choose, and which texts they are read from.
#![allow(clippy::unwrap_used)]

use loris::compute::{Lazy, Order, PrunePoint};

fn lazy(keep_rate: f64) -> Lazy {
    Lazy::new(vec![PrunePoint { layer: 4, keep_rate }])
}

/// The definition: kept ones first, then by score, the earlier first among equals.
fn by_sorting(lazy: &Lazy, positions: &[Option<u32>], scores: &[f32], len: usize) -> Vec<u32> {
    let mut live: Vec<(bool, f32, u32)> = Vec::new();
    for (position, &score) in positions.iter().zip(scores) {
        let Some(position) = *position else { continue };
        let at = position as usize;
        let near = |&(p, _): &(&Option<u32>, &f32)| {
            p.is_some_and(|p| p.abs_diff(position) as usize <= lazy.pool / 2)
        };
        let around = positions.iter().zip(scores).filter(near);
        let rank = around.map(|(_, &s)| s).fold(score, f32::max);
        live.push((at < lazy.sinks || at + lazy.window >= len, rank, position));
    }
    live.sort_by(|a, b| b.0.cmp(&a.0).then(b.1.total_cmp(&a.1)).then(a.2.cmp(&b.2)));
    let n = (live.len() as f64 * lazy.points[0].keep_rate).ceil() as usize;
    let n_forced = live.iter().filter(|(forced, ..)| *forced).count();
    let mut chosen: Vec<u32> = live[..n.max(n_forced)].iter().map(|&(_, _, p)| p).collect();
    chosen.sort_unstable();
    chosen
}

#[test]
fn selection_is_the_best_share_whatever_the_order_of_slots() {
    let mut state = 7_u64;
    let mut draw = |below: u64| {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % below
    };
    for case in 0..400 {
        let len = draw(90) as usize + 1;
        let policy = Lazy {
            window: draw(6) as usize + 1,
            sinks: draw(6) as usize,
            pool: [1, 3, 7][draw(3) as usize],
            ..lazy([0.01, 0.3, 0.5, 0.7, 1.0][case % 5])
        };
        // Some slots were given up; few different scores, so that many tie.
        let mut slots: Vec<(Option<u32>, f32)> =
            (0..len as u32).map(|p| ((draw(8) > 0).then_some(p), draw(5) as f32 / 16.0)).collect();
        let chosen = |slots: &[(Option<u32>, f32)]| {
            let (positions, scores): (Vec<_>, Vec<_>) = slots.iter().copied().unzip();
            let chosen = policy.select(0, &positions, &scores, len);
            assert_eq!(chosen, by_sorting(&policy, &positions, &scores, len), "case {case}");
            chosen
        };
        let in_order = chosen(&slots);
        for i in (1..slots.len()).rev() {
            slots.swap(i, draw(i as u64 + 1) as usize);
        }
        assert_eq!(chosen(&slots), in_order);
    }
}

#[test]
fn edges_of_selection() {
    assert_eq!(lazy(0.5).select(0, &[], &[], 0), Vec::<u32>::new());
    assert_eq!(lazy(0.5).select(0, &[Some(0)], &[0.0], 1), vec![0]);
    assert_eq!(lazy(0.5).select(0, &[None, None], &[0.3, 0.7], 2), Vec::<u32>::new());
    // More tokens are always kept than the share has room for.
    let policy = Lazy { sinks: 2, window: 3, ..lazy(0.01) };
    let positions: Vec<_> = (0..10).map(Some).collect();
    assert_eq!(policy.select(0, &positions, &[0.1; 10], 10), vec![0, 1, 7, 8, 9]);
}

#[test]
fn a_step_takes_up_the_best_of_those_that_wait() {
    let policy = Lazy { max_revived: 2, ..lazy(0.5) };
    let positions = [Some(5), Some(1), None, Some(3), Some(9)];
    let scores = [0.2, 0.9, 1.0, 0.2, 0.1];
    assert_eq!(policy.revive(&[1, 3, 5, 9], &positions, &scores), vec![1, 3]);
    assert_eq!(policy.revive(&[3, 9], &positions, &scores), vec![3, 9]);
    let none = Lazy { max_revived: 0, ..policy };
    assert_eq!(none.revive(&[3, 9], &positions, &scores), Vec::<u32>::new());
}

#[test]
fn random_order_does_not_look_at_scores() {
    let positions: Vec<_> = (0..1000).map(Some).collect();
    let (rising, falling): (Vec<f32>, Vec<f32>) =
        (0..1000).map(|i| (i as f32, 1000.0 - i as f32)).unzip();
    let random = |seed| Lazy { order: Order::Random { seed }, ..lazy(0.5) };
    let chosen = random(0).select(0, &positions, &rising, 1000);
    assert_eq!(chosen, random(0).select(0, &positions, &falling, 1000));
    assert_ne!(chosen, random(1).select(0, &positions, &rising, 1000));
    assert_eq!(chosen.len(), 500);
    // As many of each quarter as a fair draw gives: 125, with a standard deviation below 10.
    for quarter in 0..4 {
        let n = chosen.iter().filter(|&&p| p / 250 == quarter).count();
        assert!((85..=165).contains(&n), "{n} of quarter {quarter}");
    }
}

#[test]
fn schedules_are_read_from_text() {
    let points = |lazy: &Lazy| -> Vec<(usize, f64)> {
        lazy.points.iter().map(|point| (point.layer, point.keep_rate)).collect()
    };
    assert_eq!(points(&Lazy::parse("paper", 32).unwrap()), [(9, 0.7), (19, 0.7), (28, 0.7)]);
    let spec = "8:0.7, 16:0.5,window=4,pool=5,sinks=2,min-len=0,revive=3,no-revival,random";
    let read = Lazy::parse(spec, 30).unwrap();
    assert_eq!(points(&read), [(8, 0.7), (16, 0.5)]);
    assert_eq!(
        (read.window, read.pool, read.sinks, read.min_len, read.max_revived),
        (4, 5, 2, 0, 3)
    );
    assert!(!read.revives);
    assert_eq!(read.order, Order::Random { seed: 0 });
    assert_eq!(Lazy::parse(&read.to_string(), 30).unwrap(), read);
    let least = Lazy::parse("8:1e-300,16:1", 30).unwrap();
    assert_eq!(Lazy::parse(&least.to_string(), 30).unwrap(), least);
    assert!(least.to_string().len() < 100, "{least}");
    assert_eq!(Lazy::parse("8:0.7,random=9", 30).unwrap().order, Order::Random { seed: 9 });
    // A preset keeps its depth in a model of any number of layers.
    for n_layers in 2..100 {
        for preset in ["gentle", "paper", "hard"] {
            let read = Lazy::parse(preset, n_layers).unwrap();
            let share = |lazy: &Lazy, n_layers: usize| -> f64 {
                let (mut rate, mut at, mut sum) = (1.0, 0, 0.0);
                for &(layer, keep_rate) in &points(lazy) {
                    sum += rate * (layer - at) as f64;
                    (rate, at) = (rate * keep_rate, layer);
                }
                (sum + rate * (n_layers - at) as f64) / n_layers as f64
            };
            let there = share(&Lazy::parse(preset, 32).unwrap(), 32);
            let off = (share(&read, n_layers) - there).abs();
            assert!(off <= 1.0 / n_layers as f64, "{preset} of {n_layers}: {off} off");
        }
    }
    for bad in [
        "",
        "mild",
        "8",
        "8:",
        ":0.5",
        "8:0",
        "8:1.1",
        "8:-1",
        "8:nan",
        "8:inf",
        "0:0.5",
        "30:0.5",
        "8:0.5,8:0.5",
        "16:0.5,8:0.5",
        "8:0.5,",
        "window=2",
        "8:0.5,window=0",
        "8:0.5,window=65",
        "8:0.5,window=x",
        "8:0.5,pool=0",
        "8:0.5,pool=4",
        "8:0.5,pool=65",
        "8:0.5,wide=2",
        "paper,random=x",
        "8:0.5,paper",
    ] {
        let refused = Lazy::parse(bad, 30).unwrap_err().to_string();
        assert!(refused.contains("gentle, paper, hard"), "{bad:?}: {refused}");
    }
}
