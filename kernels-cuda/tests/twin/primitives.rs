//! Primitives against plain arithmetic. Fragments are laid out here by the words of the PTX manual, not by `frag.h`:
//! group = lane / 4, within = lane % 4.

use std::ptr;

use crate::driver::{Twin, set_seed};

#[repr(C)]
struct MmaArgs {
    a: u64,
    b: u64,
    c: u64,
    d: u64,
}

#[repr(C)]
struct PrimArgs {
    input: u64,
    output: u64,
}

/// A small generator: the tests' numbers are the same in each run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) as u32
    }
    /// Uniform in -1 .. 1, with 8 bits: exact in bf16 and f16.
    fn unit(&mut self) -> f32 {
        (self.next() % 256) as f32 / 128.0 - 1.0
    }
}

/// Elements of a 16 x k and a k x 8 matrix as the registers of 32 lanes, `per` elements of `32 / per` bits in each.
/// The manual: A's registers go rows group, group + 8, and then the same of the second half of k;
/// in a half, a lane holds the `per` columns from `per * within`. B alike, with columns group.
fn fragments(a: &[u32], b: &[u32], k: usize, per: usize) -> (Vec<u32>, Vec<u32>) {
    let bits = 32 / per;
    let half = k / 2;
    let pack =
        |element: &dyn Fn(usize) -> u32| (0..per).map(|e| element(e) << (bits * e)).sum::<u32>();
    let (mut a_words, mut b_words) = (vec![], vec![]);
    for lane in 0..32 {
        let (group, within) = (lane / 4, lane % 4);
        for (row, first) in [(group, 0), (group + 8, 0), (group, half), (group + 8, half)] {
            a_words.push(pack(&|e| a[row * k + first + per * within + e]));
        }
        for first in [0, half] {
            b_words.push(pack(&|e| b[(first + per * within + e) * 8 + group]));
        }
    }
    (a_words, b_words)
}

/// A 16 x 8 matrix of 32-bit elements as registers: rows group and group + 8, columns 2 within and the next.
fn accumulator_at(lane: usize, i: usize) -> usize {
    (lane / 4 + 8 * (i / 2)) * 8 + 2 * (lane % 4) + i % 2
}

/// Runs `kernel` on elements given by their bits; d as a 16 x 8 matrix.
fn multiply(kernel: &str, a: &[u32], b: &[u32], c: &[u32], k: usize, per: usize) -> Vec<u32> {
    let twin = Twin::open();
    let (a, b) = fragments(a, b, k, per);
    let c: Vec<u32> = (0..128).map(|i| c[accumulator_at(i / 4, i % 4)]).collect();
    let args =
        MmaArgs { a: twin.upload(&a), b: twin.upload(&b), c: twin.upload(&c), d: twin.alloc(128) };
    twin.run(kernel, 1, [32, 0], &args).unwrap();
    let words = twin.read(args.d, 128);
    let mut d = vec![0; 128];
    (0..128).for_each(|i| d[accumulator_at(i / 4, i % 4)] = words[i]);
    d
}

fn check_float(kernel: &str, to_bits: impl Fn(f32) -> u32) {
    let mut random = Random(7);
    let mut matrix = |n: usize| (0..n).map(|_| random.unit()).collect::<Vec<f32>>();
    let (a, b, c) = (matrix(256), matrix(128), matrix(128));
    let bits = |m: &[f32]| m.iter().map(|&x| to_bits(x)).collect::<Vec<u32>>();
    let c_bits: Vec<u32> = c.iter().map(|x| x.to_bits()).collect();
    let d = multiply(kernel, &bits(&a), &bits(&b), &c_bits, 16, 2);
    for (i, got) in d.iter().map(|&x| f32::from_bits(x)).enumerate() {
        let (row, col) = (i / 8, i % 8);
        let want = c[i] + (0..16).map(|k| a[row * 16 + k] * b[k * 8 + col]).sum::<f32>();
        assert!((got - want).abs() < 1e-5, "{kernel} [{row}][{col}]: {got}, expected {want}");
    }
}

#[test]
fn mma_bf16_multiplies_matrices() {
    check_float("twin_mma_bf16", |x| u32::from(half::bf16::from_f32(x).to_bits()));
}

#[test]
fn mma_f16_multiplies_matrices() {
    check_float("twin_mma_f16", |x| u32::from(half::f16::from_f32(x).to_bits()));
}

#[test]
fn mma_s8_multiplies_matrices() {
    let mut random = Random(3);
    let mut matrix = |n: usize| (0..n).map(|_| random.next() as i8).collect::<Vec<i8>>();
    let (a, b) = (matrix(512), matrix(256));
    let c: Vec<i32> = (0..128).map(|i| i * 1000 - 64000).collect();
    let bits = |m: &[i8]| m.iter().map(|&x| u32::from(x as u8)).collect::<Vec<u32>>();
    let c_bits: Vec<u32> = c.iter().map(|&x| x as u32).collect();
    let d = multiply("twin_mma_s8", &bits(&a), &bits(&b), &c_bits, 32, 4);
    for (i, &got) in d.iter().enumerate() {
        let dot = |k: usize| i32::from(a[i / 8 * 32 + k]) * i32::from(b[k * 8 + i % 8]);
        assert_eq!(got as i32, c[i] + (0..32).map(dot).sum::<i32>());
    }
}

/// One NaN in A reaches its whole row and nothing else: 0 * NaN is NaN.
#[test]
fn mma_keeps_nan() {
    let mut a = vec![0u32; 256];
    a[5 * 16 + 9] = 0x7fc0;
    let d = multiply("twin_mma_bf16", &a, &[0; 128], &[0; 128], 16, 2);
    for (i, &x) in d.iter().enumerate() {
        assert_eq!(f32::from_bits(x).is_nan(), i / 8 == 5, "[{}][{}]", i / 8, i % 8);
    }
}

#[test]
fn ldmatrix_loads_rows_and_columns() {
    let twin = Twin::open();
    let halves: Vec<u32> = (0..256).map(|i| i * 37 + 5).collect();
    let words: Vec<u32> = halves.chunks(2).map(|pair| pair[0] | pair[1] << 16).collect();
    let args = PrimArgs { input: twin.upload(&words), output: twin.alloc(256) };
    twin.run("twin_ldsm", 1, [32, 512], &args).unwrap();
    let out = twin.read(args.output, 256);
    for lane in 0..32 {
        for i in 0..4 {
            let element = |row: usize, col: usize| halves[64 * i + 8 * row + col];
            let (group, within) = (lane / 4, 2 * (lane % 4));
            let plain = element(group, within) | element(group, within + 1) << 16;
            let transposed = element(within, group) | element(within + 1, group) << 16;
            assert_eq!(out[8 * lane + i], plain, "lane {lane}, matrix {i}");
            assert_eq!(out[8 * lane + 4 + i], transposed, "lane {lane}, matrix {i}, transposed");
        }
    }
}

#[test]
fn lanes_exchange_and_vote() {
    let twin = Twin::open();
    let input: Vec<u32> = (0..64).map(|t| t * 7 % 64).collect();
    let args = PrimArgs { input: twin.upload(&input), output: twin.alloc(512) };
    twin.run("twin_lanes", 1, [64, 0], &args).unwrap();
    let out = twin.read(args.output, 512);
    for t in 0..64 {
        let (lane, warp) = (t % 32, &input[t / 32 * 32..][..32]);
        let votes = (0..32).map(|l| (warp[l] % 2) << l).sum::<u32>();
        let want = [
            warp[5],
            warp[lane ^ 3],
            warp[if lane < 4 { lane } else { lane - 4 }],
            votes,
            u32::from(warp.contains(&40)),
            u32::from(warp.iter().all(|&x| x < 32)),
            warp[7],
            warp[lane ^ 1],
        ];
        assert_eq!(out[8 * t..][..8], want, "thread {t}");
    }
}

#[test]
fn named_barriers_order_their_warps() {
    for seed in 0..10 {
        set_seed(seed);
        let twin = Twin::open();
        let input: Vec<u32> = (1..=128).collect();
        let args = PrimArgs { input: twin.upload(&input), output: twin.alloc(1) };
        twin.run("twin_chain", 1, [128, 64], &args).unwrap();
        assert_eq!(twin.read(args.output, 1), [128 * 129 / 2], "seed {seed}");
    }
}

#[test]
fn atomics_add_and_take_the_maximum() {
    let twin = Twin::open();
    let input: Vec<u32> = (0..128).map(|t| t * 5 % 97).collect();
    let args = PrimArgs { input: twin.upload(&input), output: twin.upload(&[0; 8]) };
    twin.run("twin_atomics", 3, [128, 16], &args).unwrap();
    let out = twin.read(args.output, 8);
    let sum = 3 * input.iter().map(|&x| u64::from(x) << 20).sum::<u64>();
    assert_eq!(out[..2], [3 * 128, *input.iter().max().unwrap()]);
    assert_eq!(u64::from(out[2]) | u64::from(out[3]) << 32, sum);
    for i in 0..4 {
        assert_eq!(out[4 + i], 3 * input.iter().filter(|&x| *x as usize % 4 == i).count() as u32);
    }
}

#[test]
fn background_copies_arrive_in_order() {
    for seed in 0..10 {
        set_seed(seed);
        let twin = Twin::open();
        let input: Vec<u32> = (0..2048).map(|i| i * 3).collect();
        let args = PrimArgs { input: twin.upload(&input), output: twin.alloc(2048) };
        twin.run("twin_pipeline", 1, [128, 3 * 2048], &args).unwrap();
        for (i, got) in twin.read(args.output, 2048).into_iter().enumerate() {
            let want = if i / 4 % 2 == 0 { input[i] + 1 } else { 1 };
            assert_eq!(got, want, "word {i}, seed {seed}");
        }
    }
}

#[test]
fn a_grid_has_three_dimensions() {
    for seed in 0..4 {
        set_seed(seed);
        let twin = Twin::open();
        let args = PrimArgs { input: 0, output: twin.alloc(24) };
        assert_eq!(twin.launch_in(ptr::null_mut(), "twin_grid", [4, 3, 2], [32, 0], &args), 0);
        let want: Vec<u32> = (0..24).map(|i| 100 * (i / 12) + 10 * (i / 4 % 3) + i % 4).collect();
        assert_eq!(twin.read(args.output, 24), want);
    }
}

#[test]
fn fast_functions_are_close_and_rounding_is_exact() {
    let twin = Twin::open();
    let mut input: Vec<f32> = (0..29).map(|i| i as f32 * 1.37 - 11.0).collect();
    input.extend([f32::NEG_INFINITY, -130.0, 1.003_906_3]);
    let bits: Vec<u32> = input.iter().map(|x| x.to_bits()).collect();
    let args = PrimArgs { input: twin.upload(&bits), output: twin.alloc(96) };
    twin.run("twin_math", 1, [32, 0], &args).unwrap();
    let out = twin.read(args.output, 96);
    for (x, got) in input.iter().zip(out.chunks(3)) {
        let [exp2, rsqrt] = [got[0], got[1]].map(f32::from_bits);
        let want = if *x < -126.0 { 0.0 } else { x.exp2() };
        assert!((exp2 - want).abs() <= 4e-7 * want, "2^{x}: {exp2}");
        if *x > 0.0 {
            assert!((rsqrt * x.sqrt() - 1.0).abs() < 4e-7, "1/sqrt({x}): {rsqrt}");
        }
        let halves = [*x, -*x].map(|x| u32::from(half::bf16::from_f32(x).to_bits()));
        assert_eq!(got[2], halves[0] | halves[1] << 16, "{x} as bf16");
    }
}
