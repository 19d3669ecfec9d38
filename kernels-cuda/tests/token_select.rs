//! `token_select` against a sort.

#![allow(clippy::unwrap_used)]

mod common;

use common::Random;
use loris_kernels::ops::token_select::token_select;
use loris_kernels::{Buffer, Device};

struct Case {
    n: usize,
    n_keep: usize,
    n_head: usize,
    n_tail: usize,
}

/// Head and tail, then the best of the others: by score, then by index.
fn reference(scores: &[f32], case: &Case) -> (Vec<u32>, Vec<u32>) {
    let last = case.n - case.n_tail;
    let mut middle: Vec<usize> = (case.n_head..last).collect();
    middle.sort_by(|&a, &b| scores[b].partial_cmp(&scores[a]).unwrap().then(a.cmp(&b)));
    middle.truncate(case.n_keep - case.n_head - case.n_tail);
    let is_kept = |i: &u32| {
        let i = *i as usize;
        i < case.n_head || i >= last || middle.contains(&i)
    };
    (0..u32::try_from(case.n).unwrap()).partition(is_kept)
}

fn check(device: &Device, scores: &[f32], case: &Case) {
    let Case { n, n_keep, n_head, n_tail } = *case;
    let what = format!("{n_keep} of {n}, head {n_head}, tail {n_tail}");
    let on_device = Buffer::from_slice(device, scores, "scores").unwrap();
    let mut keep = Buffer::<u32>::new(device, n_keep, "keep").unwrap();
    let mut drop = Buffer::<u32>::new(device, n - n_keep, "drop").unwrap();
    let (want_keep, want_drop) = reference(scores, case);
    for with_drop in [true, false] {
        let drop = with_drop.then_some(&mut drop);
        token_select(device, &on_device, n, n_keep, n_head, n_tail, &mut keep, drop).unwrap();
        let mut got = vec![0; n_keep];
        keep.download(device, 0, &mut got).unwrap();
        assert_eq!(got, want_keep, "kept, {what}");
    }
    let mut got = vec![0; n - n_keep];
    drop.download(device, 0, &mut got).unwrap();
    assert_eq!(got, want_drop, "dropped, {what}");
}

const CASES: &[Case] = &[
    Case { n: 0, n_keep: 0, n_head: 0, n_tail: 0 },
    Case { n: 1, n_keep: 0, n_head: 0, n_tail: 0 },
    Case { n: 1, n_keep: 1, n_head: 0, n_tail: 0 },
    Case { n: 1, n_keep: 1, n_head: 0, n_tail: 1 },
    Case { n: 31, n_keep: 7, n_head: 0, n_tail: 0 },
    Case { n: 32, n_keep: 32, n_head: 4, n_tail: 1 },
    Case { n: 33, n_keep: 20, n_head: 4, n_tail: 16 },
    Case { n: 1000, n_keep: 0, n_head: 0, n_tail: 0 },
    Case { n: 1000, n_keep: 1, n_head: 0, n_tail: 0 },
    Case { n: 1000, n_keep: 700, n_head: 4, n_tail: 16 },
    Case { n: 1000, n_keep: 999, n_head: 1, n_tail: 1 },
    Case { n: 8191, n_keep: 4000, n_head: 0, n_tail: 1 },
    Case { n: 8192, n_keep: 20, n_head: 4, n_tail: 16 },
    Case { n: 8193, n_keep: 21, n_head: 4, n_tail: 16 },
    Case { n: 20_000, n_keep: 10_000, n_head: 4, n_tail: 1 },
];

#[test]
fn keeps_what_a_sort_keeps() {
    let device = common::device();
    let mut random = Random::new(1);
    let values = [0.0, -0.0, 1.0, -1.0, f32::INFINITY, f32::NEG_INFINITY, 1e-40, f32::MAX];
    for case in CASES {
        let mut fill = |next: &mut dyn FnMut(&mut Random) -> f32| -> Vec<f32> {
            (0..case.n).map(|_| next(&mut random)).collect()
        };
        let spread = fill(&mut |r| r.uniform(-1.0, 1.0) * r.uniform(-20.0, 0.0).exp2());
        let close = fill(&mut |r| 1.0 + r.uniform(0.0, 1e-6)); // few values, last digits differ
        let special = fill(&mut |r| values[r.below(values.len())]);
        let equal = vec![0.25; case.n];
        for scores in [spread, close, special, equal] {
            check(&device, &scores, case);
        }
    }
}

#[test]
fn refuses_what_does_not_fit() {
    let device = common::device();
    let scores = Buffer::<f32>::from_slice(&device, &[0.0; 8], "scores").unwrap();
    let mut keep = Buffer::<u32>::new(&device, 4, "keep").unwrap();
    for (n, n_keep, n_head, n_tail) in [(9, 4, 0, 0), (8, 5, 0, 0), (3, 4, 0, 0), (8, 4, 3, 2)] {
        let result = token_select(&device, &scores, n, n_keep, n_head, n_tail, &mut keep, None);
        assert!(result.is_err(), "{n_keep} of {n}, head {n_head}, tail {n_tail}");
    }
}
