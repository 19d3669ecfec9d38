//! What tests of kernels share: a device, random numbers, bf16, a comparison.
#![allow(dead_code, unreachable_pub)] // each test uses its part

pub mod product;
pub mod qkv;
pub mod twin;

use std::path::PathBuf;

use loris_kernels::{Device, DeviceOptions, TWIN};

/// Options of the device under test: the twin, or with `LORIS_TEST_DRIVER=cuda` the real one.
pub fn options() -> DeviceOptions {
    let real = std::env::var("LORIS_TEST_DRIVER").is_ok_and(|driver| driver == "cuda");
    DeviceOptions { index: 0, driver: (!real).then(|| PathBuf::from(TWIN)) }
}

/// The device under test.
pub fn device() -> Device {
    Device::open(&options()).expect("a device")
}

/// Whether tests may ask the twin about faults, leaks and calls.
pub fn on_twin() -> bool {
    options().driver.is_some()
}

/// Random numbers (splitmix64): small, and the same everywhere.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number from 0 up to `end`.
    pub fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.next() % end as u64).expect("below a usize")
    }

    /// A number in 0 .. 1.
    pub fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// A number in `low` .. `high`.
    pub fn uniform(&mut self, low: f32, high: f32) -> f32 {
        (f64::from(low) + self.unit() * f64::from(high - low)) as f32
    }

    /// `n` numbers in -scale .. scale.
    pub fn f32(&mut self, n: usize, scale: f32) -> Vec<f32> {
        (0..n).map(|_| self.uniform(-scale, scale)).collect()
    }

    /// `n` bf16 in -scale .. scale.
    pub fn bf16(&mut self, n: usize, scale: f32) -> Vec<u16> {
        (0..n).map(|_| to_bf16(self.uniform(-scale, scale))).collect()
    }
}

/// Rounded to nearest even.
pub fn to_bf16(x: f32) -> u16 {
    half::bf16::from_f32(x).to_bits()
}

/// Exact.
pub fn from_bf16(bits: u16) -> f32 {
    half::bf16::from_bits(bits).to_f32()
}

/// All of them.
pub fn from_bf16s(bits: &[u16]) -> Vec<f32> {
    bits.iter().map(|&b| from_bf16(b)).collect()
}

/// Holds rows of `width` against a reference: each difference within `bound` of the row's largest
/// value, and within `relative` of the value itself beyond that (2^-8 where the output is bf16,
/// else 0). Not a number or infinite where the reference is finite fails. Returns the largest error
/// as a share of the row's largest value.
#[track_caller]
pub fn compare(
    what: &str,
    got: &[f32],
    want: &[f64],
    width: usize,
    bound: f64,
    relative: f64,
) -> f64 {
    assert_eq!(got.len(), want.len(), "{what}: lengths");
    let mut worst = 0.0f64;
    for (r, (got, want)) in got.chunks(width).zip(want.chunks(width)).enumerate() {
        let largest = want.iter().fold(0.0f64, |a, b| a.max(b.abs()));
        for (i, (&g, &w)) in got.iter().zip(want).enumerate() {
            let error = (f64::from(g) - w).abs();
            assert!(
                error <= bound * largest + relative * w.abs() || f64::from(g) == w,
                "{what}: row {r}, element {i}: {g} instead of {w} (largest of the row {largest})"
            );
            if largest > 0.0 && error.is_finite() {
                worst = worst.max(error / largest);
            }
        }
    }
    worst
}
