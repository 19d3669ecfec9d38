//! The norm, `linear` and `gate_up` of prefill against naive f64 references.
#![allow(clippy::unwrap_used)]

mod common;

use std::ops::Range;

use common::product::{BF16, EPS, SUMS, download, product, rows, same_bits, widen};
use common::{Random, compare, from_bf16s};
use loris_kernels::abi::{GateUpPrefillArgs, LinearPrefillArgs};
use loris_kernels::ops::{linear, mlp_gate, rmsnorm};
use loris_kernels::{Buffer, Device, Error, Launch, Matrix, Rows};

#[test]
fn rmsnorm_of_each_row() {
    let device = common::device();
    // Around a step of 2048 columns, and beyond the 8192 that are held in registers.
    for (n_rows, width) in
        [(0, 96), (1, 8), (7, 96), (3, 576), (2, 2048), (2, 2056), (1, 8192), (2, 8200), (1, 12296)]
    {
        let mut random = Random::new(width as u64);
        let (x, weight) = (random.f32(n_rows * width, 3.0), random.f32(width, 2.0));
        let got = run_rmsnorm(&device, &x, &weight);
        let want = x.chunks(width).flat_map(|row| {
            let squares = row.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>();
            let rms = (squares / width as f64 + f64::from(EPS)).sqrt();
            row.iter().zip(&weight).map(move |(&x, &w)| f64::from(x) / rms * f64::from(w))
        });
        compare(
            &format!("rmsnorm {width}"),
            &from_bf16s(&got),
            &want.collect::<Vec<_>>(),
            width,
            0.0,
            BF16,
        );
        if n_rows > 1 {
            let last = run_rmsnorm(&device, &x[(n_rows - 1) * width..], &weight);
            assert_eq!(last, got[(n_rows - 1) * width..], "the last row alone");
        }
    }
}

#[test]
fn rmsnorm_of_zeros_is_zero() {
    let device = common::device();
    assert!(run_rmsnorm(&device, &[0.0; 96], &[1.0; 96]).iter().all(|&y| y == 0));
}

/// Rows around the tiles of 128, and tails of n (a tile of 128 or 256) and k (a stage of 64).
const PRODUCTS: &[(usize, usize, usize)] = &[
    // (n_rows, n, k)
    (0, 96, 96),
    (1, 8, 8),
    (7, 96, 576),
    (127, 136, 72),
    (128, 128, 128),
    (129, 264, 56),
    (200, 96, 200),
];

#[test]
fn linear_adds_the_product() {
    let device = common::device();
    for &(n_rows, n, k) in PRODUCTS {
        let case = Product::new(n_rows, n, k);
        let sums = product(&widen(&case.a), &widen(&case.w[0]), k);
        let want = sums.iter().zip(&case.x).map(|(sum, &x)| sum + f64::from(x));
        let want = want.collect::<Vec<_>>();
        let what = format!("linear {n_rows} x {n} x {k}");
        let got = case.linear(&device, 0..n_rows);
        compare(&what, &got, &want, n, SUMS, 0.0);
        for variant in ["linear_prefill_n128", "linear_prefill_n256"] {
            assert!(same_bits(&case.linear_variant(&device, variant), &got), "{what}: {variant}");
        }
    }
}

#[test]
fn gate_up_is_silu_of_gate_times_up() {
    let device = common::device();
    for &(n_rows, n, k) in PRODUCTS {
        let case = Product::new(n_rows, n, k);
        let [gate, up] = [0, 1].map(|i| product(&widen(&case.a), &widen(&case.w[i]), k));
        let want = gate.iter().zip(&up).map(|(g, u)| g / (1.0 + (-g).exp()) * u);
        let want = want.collect::<Vec<_>>();
        let what = format!("gate_up {n_rows} x {n} x {k}");
        let got = case.gate_up(&device, 0..n_rows);
        compare(&what, &from_bf16s(&got), &want, n, SUMS, BF16);
        for variant in ["gate_up_prefill_n128", "gate_up_prefill_n256"] {
            assert_eq!(case.gate_up_variant(&device, variant), got, "{what}: {variant}");
        }
    }
}

#[test]
fn silu_has_no_extremes() {
    // Products of +-2^7 and more: exp overflows, silu does not.
    let device = common::device();
    let (a, up) = (vec![0x4380; 8], vec![0x3f80; 8 * 8]); // 256, 1
    let gate = [0xbf80, 0x3f80].iter().flat_map(|&w| vec![w; 32]).collect::<Vec<_>>(); // -1, 1
    let case = Product { n_rows: 1, n: 8, k: 8, a, w: [gate, up], x: vec![] };
    let want = [0.0, 2048.0 * 2048.0].map(|y| vec![y; 4]).concat();
    assert_eq!(widen(&case.gate_up(&device, 0..1)), want);
}

#[test]
fn bits_of_a_row_are_its_own() {
    let device = common::device();
    let case = Product::new(150, 40, 72);
    let (linear, gate_up) = (case.linear(&device, 0..150), case.gate_up(&device, 0..150));
    for rows in [0..1, 63..64, 149..150, 1..130, 120..150] {
        let values = rows.start * case.n..rows.end * case.n;
        let part = case.linear(&device, rows.clone());
        assert!(same_bits(&part, &linear[values.clone()]), "linear, rows {rows:?}");
        assert_eq!(case.gate_up(&device, rows.clone()), gate_up[values], "gate_up, rows {rows:?}");
    }
}

#[test]
fn sizes_that_do_not_fit_are_refused() {
    let device = common::device();
    let matrix = |n, k| Matrix { data: Buffer::new(&device, n * k, "w").unwrap(), n, k };
    let a = |width| Rows::<u16>::new(&device, 2, width, "a").unwrap();
    let mut x = Rows::<f32>::new(&device, 2, 16, "x").unwrap();
    let mut linear =
        |w: &Matrix, a: &Rows<u16>, n_rows| linear::linear_prefill(&device, w, a, n_rows, &mut x);
    assert!(matches!(linear(&matrix(16, 32), &a(40), 2), Err(Error::Size { .. })));
    assert!(matches!(linear(&matrix(16, 32), &a(32), 3), Err(Error::Size { .. })));
    assert!(matches!(linear(&matrix(24, 32), &a(32), 2), Err(Error::Size { .. })));
    assert!(matches!(linear(&matrix(16, 12), &a(12), 2), Err(Error::Size { .. })));
    let mut h = Rows::<u16>::new(&device, 2, 16, "h").unwrap();
    let (gate, up) = (matrix(16, 32), matrix(24, 32));
    let gate_up = mlp_gate::gate_up_prefill(&device, &gate, &up, &a(32), 2, &mut h);
    assert!(matches!(gate_up, Err(Error::Size { .. })));
}

// What runs on the device.

fn run_rmsnorm(device: &Device, x: &[f32], weight: &[f32]) -> Vec<u16> {
    let (n, width) = (x.len(), weight.len());
    let x = rows(device, x, width);
    let weight = Buffer::from_slice(device, weight, "weight").unwrap();
    let mut out = rows(device, &vec![0xffff; n], width);
    rmsnorm::rmsnorm(device, &x, &weight, EPS, n / width, &mut out).unwrap();
    download(device, &out.data, n)
}

/// Rows, two matrices, and what `linear` adds to.
struct Product {
    n_rows: usize,
    n: usize,
    k: usize,
    a: Vec<u16>,
    w: [Vec<u16>; 2],
    x: Vec<f32>,
}

impl Product {
    fn new(n_rows: usize, n: usize, k: usize) -> Self {
        let mut random = Random::new((n_rows * 1000 + k) as u64);
        let scale = 2.0 / (k as f32).sqrt();
        let a = random.bf16(n_rows * k, 1.0);
        let w = [(); 2].map(|()| random.bf16(n * k, scale));
        let x = random.f32(n_rows * n, 1.0);
        Self { n_rows, n, k, a, w, x }
    }

    fn matrix(&self, device: &Device, i: usize) -> Matrix {
        let data = Buffer::from_slice(device, &self.w[i], "w").unwrap();
        Matrix { data, n: self.n, k: self.k }
    }

    /// Some of the rows as a launch of their own.
    fn linear(&self, device: &Device, part: Range<usize>) -> Vec<f32> {
        let a = rows(device, &self.a[part.start * self.k..part.end * self.k], self.k);
        let mut x = rows(device, &self.x[part.start * self.n..part.end * self.n], self.n);
        let w = self.matrix(device, 0);
        linear::linear_prefill(device, &w, &a, part.len(), &mut x).unwrap();
        download(device, &x.data, part.len() * self.n)
    }

    fn gate_up(&self, device: &Device, part: Range<usize>) -> Vec<u16> {
        let a = rows(device, &self.a[part.start * self.k..part.end * self.k], self.k);
        let mut h = rows(device, &vec![0xffff; part.len() * self.n], self.n);
        let [gate, up] = [0, 1].map(|i| self.matrix(device, i));
        mlp_gate::gate_up_prefill(device, &gate, &up, &a, part.len(), &mut h).unwrap();
        download(device, &h.data, part.len() * self.n)
    }

    /// All rows by a kernel of this name.
    fn linear_variant(&self, device: &Device, kernel: &'static str) -> Vec<f32> {
        let (a, x) = (rows(device, &self.a, self.k), rows(device, &self.x, self.n));
        let w = self.matrix(device, 0);
        let args = LinearPrefillArgs {
            a: a.data.ptr() as *const u16,
            w: w.data.ptr() as *const u16,
            x: x.data.ptr() as *mut f32,
            n_rows: self.n_rows as u32,
            n: self.n as u32,
            k: self.k as u32,
        };
        self.launch(device, kernel, 1, &args);
        download(device, &x.data, self.n_rows * self.n)
    }

    fn gate_up_variant(&self, device: &Device, kernel: &'static str) -> Vec<u16> {
        let a = rows(device, &self.a, self.k);
        let h = rows(device, &vec![0xffff; self.n_rows * self.n], self.n);
        let [gate, up] = [0, 1].map(|i| self.matrix(device, i));
        let args = GateUpPrefillArgs {
            a: a.data.ptr() as *const u16,
            gate: gate.data.ptr() as *const u16,
            up: up.data.ptr() as *const u16,
            h: h.data.ptr() as *mut u16,
            n_rows: self.n_rows as u32,
            n: self.n as u32,
            k: self.k as u32,
        };
        self.launch(device, kernel, 2, &args);
        download(device, &h.data, self.n_rows * self.n)
    }

    fn launch<A: Copy>(&self, device: &Device, kernel: &'static str, n_w: usize, args: &A) {
        let block_n = if kernel.ends_with("n256") { 256 } else { 128 };
        let n_tiles = self.n_rows.div_ceil(128) * (n_w * self.n).div_ceil(block_n);
        let launch =
            Launch { kernel, grid: [n_tiles as u32, 1, 1], block: block_n as u32, extra_smem: 0 };
        if n_tiles > 0 {
            // SAFETY: the arguments are of this product's sizes.
            unsafe { device.launch(&launch, args).unwrap() };
        }
    }
}
