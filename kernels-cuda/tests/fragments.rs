//! The maps of `frag.h` against the instructions: products of matrices that a warp places by the maps are
//! the plain sums. On a GPU (`LORIS_TEST_DRIVER=cuda`) this is what everything else rests on.
#![allow(clippy::unwrap_used)]

mod common;

use common::Random;
use loris_kernels::ops::fragments::fragments;

/// `a` `[16][k]` times `b` `[k][8]`.
fn product(a: &[f64], b: &[f64]) -> Vec<f64> {
    let k = a.len() / 16;
    let element = |i: usize| (0..k).map(|l| a[i / 8 * k + l] * b[l * 8 + i % 8]).sum();
    (0..128).map(element).collect()
}

#[test]
fn matrix_instructions_agree_with_the_maps() {
    let device = common::device();
    let mut random = Random::new(1);
    // Patterns between 0.5 and 1 as f16; as bf16 they are small and as good.
    let mut pattern = || 0x3800 + u16::try_from(random.below(0x400)).unwrap();
    let (a, b) = ([0; 256].map(|_: u16| pattern()), [0; 128].map(|_: u16| pattern()));
    let mut byte = || i8::try_from(random.below(256) as i32 - 128).unwrap();
    let (a8, b8) = ([0; 512].map(|_: i8| byte()), [0; 256].map(|_: i8| byte()));
    let got = fragments(&device, &a, &b, &a8, &b8).unwrap();

    let of = |values: &[u16], decode: fn(u16) -> f64| -> Vec<f64> {
        values.iter().map(|&bits| decode(bits)).collect()
    };
    for (got, decode) in [
        (&got.bf16, (|bits| half::bf16::from_bits(bits).to_f64()) as fn(u16) -> f64),
        (&got.f16, |bits| half::f16::from_bits(bits).to_f64()),
    ] {
        for (got, want) in got.iter().zip(product(&of(&a, decode), &of(&b, decode))) {
            assert!((f64::from(*got) - want).abs() <= 1e-5 * want, "{got} for {want}");
        }
    }
    let wide = |values: &[i8]| -> Vec<f64> { values.iter().map(|&v| f64::from(v)).collect() };
    let got_s8: Vec<f64> = got.s8.iter().map(|&v| f64::from(v)).collect();
    assert_eq!(got_s8, product(&wide(&a8), &wide(&b8)));
    assert_eq!(got.n_wrong, 0, "ldmatrix");
}
