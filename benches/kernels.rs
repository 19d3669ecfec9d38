//! Microbenchmarks of the CPU backend's kernels, against what the machine can do.
//!
//! `cargo bench --bench kernels [-- FILTER] [--threads N] [--isa NAME]` prints one row per kernel: time
//! (least and median of the runs), rate, and the share of a ceiling measured in the same run with the same
//! threads: multiply-adds in registers for products, reading a buffer larger than the caches for the rest.
//! `--cpu-time` counts the time that the threads ran, not the time that passed: the only figure that means
//! something on a machine that others use, exact with one thread.
//! Inputs are random, never zero: a multiplier that is fed zeros runs cool and fast.

#![allow(clippy::print_stdout, clippy::unwrap_used)]

use std::hint::black_box;

use loris::backend::cpu::{CpuBackend, CpuOptions, CpuPages, CpuRows, Isa};
use loris::backend::{Backend, Batch, LayerWeights, Phase, RowUse, Seq, Slots, Table};
use loris::read::Rule;
use loris::store::{AttentionShape, KvFormat, PageId, PageLayout};
use loris_loader::{Dtype, TensorView, Weights};

fn main() {
    let options = Options::parse();
    let isa = options.isa.unwrap_or_else(Isa::detect);
    let clock = Clock::new(options.cpu_time);
    let mut bench = Bench {
        backend: CpuBackend::new(CpuOptions { threads: options.threads, isa: Some(isa) }).unwrap(),
        random: Random(1),
        filter: options.filter,
        clock,
        peak_gflops: 0.0,
        peak_gbs: 0.0,
    };
    let threads = bench.backend.n_threads();
    bench.peak_gflops = peak::multiply_add(threads, clock);
    bench.peak_gbs = peak::read(threads, clock);
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    println!("{isa}, {threads} threads, load {}", load.split(' ').next().unwrap_or("?"));
    println!("f32 multiply-add {:.1} GFLOP/s, read {:.1} GB/s", bench.peak_gflops, bench.peak_gbs);
    println!(
        "| {:<38} | {:>9} | {:>9} | {:>9} | {:>6} |",
        "kernel", "least us", "median us", "rate", "share"
    );
    println!("|{:-<40}|{:->11}|{:->11}|{:->11}|{:->8}|", "", ":", ":", ":", ":");
    bench.region();
    for (m, n, k) in [
        (512, 1536, 576),
        (512, 576, 1536),
        (512, 576, 576),
        (64, 1536, 576),
        (256, 8192, 2048),
        (256, 2048, 8192),
        (512, 2048, 2048),
    ] {
        bench.gemm(m, n, k);
    }
    for (m, n, k) in [(512, 1536, 576), (256, 8192, 2048)] {
        bench.gate_up(m, n, k);
    }
    for (m, n, k) in [
        (1, 576, 576),
        (1, 576, 1536),
        (1, 49152, 576),
        (4, 49152, 576),
        (64, 49152, 576),
        (4, 576, 576),
        (8, 576, 576),
        (4, 576, 1536),
        (8, 576, 1536),
        (8, 49152, 576),
        (1, 2048, 8192),
        (4, 2048, 8192),
        (8, 2048, 8192),
        (1, 8192, 2048),
        (4, 8192, 2048),
        (8, 8192, 2048),
        (1, 128_256, 2048),
    ] {
        bench.gemv(m, n, k);
    }
    let small = AttentionShape { n_q_heads: 9, n_kv_heads: 3, head_dim: 64 };
    let large = AttentionShape { n_q_heads: 32, n_kv_heads: 8, head_dim: 64 };
    for (shape, n) in [(small, 512), (small, 2048), (large, 512)] {
        bench.attention(Phase::Prefill, shape, n, KvFormat::BF16);
    }
    for (shape, n) in [(small, 256), (small, 2048), (small, 8192), (large, 2048)] {
        for kv in [KvFormat::BF16, KvFormat::FP8, KvFormat::INT8, KvFormat::INT4] {
            bench.attention(Phase::Decode, shape, n, kv);
        }
    }
}

struct Options {
    threads: usize,
    isa: Option<Isa>,
    filter: String,
    cpu_time: bool,
}

impl Options {
    fn parse() -> Self {
        let mut options = Self { threads: 0, isa: None, filter: String::new(), cpu_time: false };
        let mut args = std::env::args().skip(1);
        while let Some(arg) = args.next() {
            match arg.as_str() {
                "--threads" => options.threads = args.next().unwrap().parse().unwrap(),
                "--isa" => options.isa = Some(args.next().unwrap().parse().unwrap()),
                "--cpu-time" => options.cpu_time = true,
                "--bench" => {}
                _ => options.filter = arg,
            }
        }
        options
    }
}

/// What time is measured with, in seconds.
#[derive(Clone, Copy)]
enum Clock {
    Wall(std::time::Instant),
    /// Time that the threads of the process ran, all added up.
    Cpu,
}

impl Clock {
    fn new(cpu_time: bool) -> Self {
        if cpu_time { Self::Cpu } else { Self::Wall(std::time::Instant::now()) }
    }

    fn now(self) -> f64 {
        if let Self::Wall(start) = self {
            return start.elapsed().as_secs_f64();
        }
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: `time` is there to be written.
        unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut time) };
        time.tv_sec as f64 + 1e-9 * time.tv_nsec as f64
    }
}

/// Random numbers that are the same everywhere (splitmix64).
struct Random(u64);

impl Random {
    fn unit(&mut self) -> f32 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }
}

struct Bench {
    backend: CpuBackend,
    random: Random,
    filter: String,
    clock: Clock,
    peak_gflops: f64,
    peak_gbs: f64,
}

/// What a kernel does in one run.
enum Work {
    Flops(f64),
    Bytes(f64),
    None,
}

impl Bench {
    fn wants(&self, name: &str) -> bool {
        name.contains(&self.filter)
    }

    /// Times `run` for at least 0.3 seconds and prints its row.
    fn time(&mut self, name: &str, work: Work, mut run: impl FnMut(&mut CpuBackend)) {
        run(&mut self.backend);
        let (clock, mut times) = (self.clock, Vec::new());
        let start = clock.now();
        while clock.now() - start < 0.3 || times.len() < 5 {
            let start = clock.now();
            run(&mut self.backend);
            times.push(clock.now() - start);
        }
        times.sort_by(f64::total_cmp);
        let (least, median) = (times[0], times[times.len() / 2]);
        let (rate, share) = match work {
            Work::Flops(n) => {
                (format!("{:.1} GF/s", n / least / 1e9), n / least / 1e9 / self.peak_gflops)
            }
            Work::Bytes(n) => {
                (format!("{:.1} GB/s", n / least / 1e9), n / least / 1e9 / self.peak_gbs)
            }
            Work::None => (String::new(), 0.0),
        };
        let share = if share > 0.0 { format!("{:.0}%", 100.0 * share) } else { String::new() };
        println!(
            "| {name:<38} | {:>9.2} | {:>9.2} | {rate:>9} | {share:>6} |",
            1e6 * least,
            1e6 * median
        );
    }

    fn tensor(&mut self, shape: &[usize]) -> TensorView {
        let n: usize = shape.iter().product();
        let scale = 1.0 / (shape[shape.len() - 1] as f32).sqrt();
        // A short period saves time on matrices of hundreds of megabytes and is as good here.
        let values: Vec<[u8; 2]> = (0..8191)
            .map(|_| half::bf16::from_f32(self.random.unit() * scale).to_le_bytes())
            .collect();
        let bytes: Vec<u8> = (0..n).flat_map(|i| values[i % values.len()]).collect();
        let tensors = vec![("t".to_owned(), Dtype::BF16, shape.to_vec(), bytes)];
        Weights::from_memory(tensors).unwrap().get("t").unwrap()
    }

    /// Rows of random numbers, by way of an embedding.
    fn rows(&mut self, n: usize, width: usize) -> CpuRows {
        let table = self.tensor(&[64, width]);
        let table = self.backend.matrix(&table).unwrap();
        let mut rows = self.backend.rows(n, width, RowUse::Operand).unwrap();
        let batch = batch(Phase::Prefill, n);
        self.backend.embed(&table, &batch, &mut rows).unwrap();
        rows
    }

    fn region(&mut self) {
        if self.wants("region") {
            self.time("region x 100", Work::None, |backend| {
                (0..100).for_each(|_| backend.empty_region());
            });
        }
    }

    fn gemm(&mut self, m: usize, n: usize, k: usize) {
        let name = format!("gemm {m} x {n} x {k}");
        if !self.wants(&name) {
            return;
        }
        let (w, a, mut x) = (self.tensor(&[n, k]), self.rows(m, k), self.rows(m, n));
        let w = self.backend.matrix(&w).unwrap();
        let batch = batch(Phase::Prefill, m);
        self.time(&name, Work::Flops(2.0 * (m * n * k) as f64), |backend| {
            backend.linear_residual(&w, &batch, &a, &mut x).unwrap();
        });
    }

    fn gate_up(&mut self, m: usize, n: usize, k: usize) {
        let name = format!("gemm gate-up {m} x 2 x {n} x {k}");
        if !self.wants(&name) {
            return;
        }
        let shape = AttentionShape { n_q_heads: 1, n_kv_heads: 1, head_dim: 2 };
        let weights = self.layer(shape, k, n);
        let (x, mut h) = (self.rows(m, k), self.rows(m, n));
        let batch = batch(Phase::Prefill, m);
        self.time(&name, Work::Flops(4.0 * (m * n * k) as f64), |backend| {
            backend.norm_gate_up_silu(&weights, 1e-5, &batch, &x, &mut h).unwrap();
        });
    }

    /// Decode reads weights that are not in the caches: copies of the matrix take turns.
    fn gemv(&mut self, m: usize, n: usize, k: usize) {
        let name = format!("gemv {m} x {n} x {k}");
        if !self.wants(&name) {
            return;
        }
        let copies = (256_usize << 20).div_ceil(2 * n * k).min(400);
        let w: Vec<_> = (0..copies)
            .map(|_| {
                let w = self.tensor(&[n, k]);
                self.backend.matrix(&w).unwrap()
            })
            .collect();
        let (a, mut x) = (self.rows(m, k), self.rows(m, n));
        let batch = batch(Phase::Decode, m);
        let mut i = 0;
        self.time(&name, Work::Bytes(2.0 * (n * k) as f64), |backend| {
            backend.linear_residual(&w[i % copies], &batch, &a, &mut x).unwrap();
            i += 1;
        });
    }

    fn layer(
        &mut self,
        shape: AttentionShape,
        hidden: usize,
        ffn: usize,
    ) -> LayerWeights<<CpuBackend as Backend>::Matrix, <CpuBackend as Backend>::Vector> {
        let (q, kv) = (shape.n_q_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim);
        let mut matrix = |n, k| {
            let tensor = self.tensor(&[n, k]);
            self.backend.matrix(&tensor).unwrap()
        };
        let (q, k, v) = (matrix(q, hidden), matrix(kv, hidden), matrix(kv, hidden));
        let (o, gate, up) = (matrix(hidden, 2), matrix(ffn, hidden), matrix(ffn, hidden));
        let down = matrix(hidden, 2);
        let mut vector = |n| {
            let tensor = self.tensor(&[n]);
            self.backend.vector(&[tensor]).unwrap()
        };
        let (attn_norm, mlp_norm) = (vector(hidden), vector(hidden));
        LayerWeights {
            attn_norm,
            q,
            k,
            v,
            qkv_bias: None,
            qk_norm: None,
            o,
            mlp_norm,
            gate,
            up,
            down,
        }
    }

    /// Prefill of `n` tokens, or one token after `n` others.
    fn attention(&mut self, phase: Phase, shape: AttentionShape, n: usize, kv: KvFormat) {
        let AttentionShape { n_q_heads, n_kv_heads, head_dim } = shape;
        let name = format!("{phase:?} attention {n_q_heads}/{n_kv_heads}x{head_dim}, {n}, {kv}");
        if !self.wants(&name.to_lowercase()) {
            return;
        }
        let layout = PageLayout::new(n_kv_heads, 64, head_dim, kv);
        let n_pages = layout.n_pages(n + 1);
        let mut pages: CpuPages = self.backend.pages(layout, n_pages).unwrap();
        for page in 0..n_pages {
            let bytes = self.tensor(&[layout.bytes() / 2]);
            self.backend.write_page(&mut pages, page as PageId, &bytes.bytes).unwrap();
        }
        let (table, freq): (Vec<_>, _) =
            ((0..n_pages as PageId).collect(), vec![1.0; head_dim / 2]);
        let positions: Vec<u32> = (0..=n as u32).collect();
        let (n_rows, kv_start) = if phase == Phase::Prefill { (n, 0) } else { (1, n) };
        let slots = Slots::new(&layout, 0, positions.clone());
        let mut batch = batch(phase, n_rows);
        batch.positions = positions[kv_start..kv_start + n_rows].to_vec();
        batch.seqs.push(Seq {
            rows: 0..n_rows,
            kv_start,
            slots: &slots,
            table: Table { body: &table, tail: &[], n_layers: 1 },
            inv_freq: &freq,
            rope_scale: 1.0,
            n_sealed: 0,
            rule: Rule::ALL,
        });
        let width = n_q_heads * head_dim;
        let (q, mut out) = (self.rows(n_rows, width), self.rows(n_rows, width));
        self.backend.begin(&batch, shape).unwrap();
        let work = match phase {
            Phase::Prefill => Work::Flops(4.0 * (width * n * (n + 1) / 2) as f64),
            Phase::Decode => Work::Bytes((layout.form(1).slot_bytes() * n) as f64),
        };
        self.time(&name, work, |backend| {
            backend.attention(&batch, 0, None, &q, &pages, &mut out).unwrap();
        });
    }
}

fn batch<'a>(phase: Phase, n: usize) -> Batch<'a> {
    Batch {
        phase,
        tokens: (0..n as u32).map(|i| i % 64).collect(),
        positions: (0..n as u32).collect(),
        seqs: Vec::new(),
        logit_rows: Vec::new(),
    }
}

/// What the machine can do.
mod peak {
    use super::{Clock, black_box};

    /// Runs `work` on all threads at once, a few times; the best total rate per second.
    fn best(threads: usize, clock: Clock, units: f64, work: impl Fn(usize) + Sync) -> f64 {
        let mut best = 0.0_f64;
        for _ in 0..7 {
            let start = clock.now();
            std::thread::scope(|scope| {
                for i in 1..threads {
                    let work = &work;
                    scope.spawn(move || work(i));
                }
                work(0);
            });
            best = best.max(units * threads as f64 / (clock.now() - start));
        }
        best / 1e9
    }

    /// GFLOP/s of f32 multiply-adds, nothing loaded.
    pub(super) fn multiply_add(threads: usize, clock: Clock) -> f64 {
        const STEPS: usize = 4_000_000;
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx512f") {
                // SAFETY: the instructions are there.
                return best(threads, clock, (STEPS * 24 * 16 * 2) as f64, |_| unsafe {
                    wide(STEPS);
                });
            }
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                // SAFETY: the instructions are there.
                return best(threads, clock, (STEPS * 12 * 8 * 2) as f64, |_| unsafe {
                    narrow(STEPS);
                });
            }
        }
        best(threads, clock, (STEPS * 16 * 2) as f64, |_| {
            let mut acc = black_box([0.7_f32; 16]);
            let (a, b) = (black_box(0.999_f32), black_box(0.001_f32));
            for _ in 0..STEPS {
                acc.iter_mut().for_each(|x| *x = *x * a + b);
            }
            black_box(acc);
        })
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f")]
    unsafe fn wide(steps: usize) {
        use std::arch::x86_64::{_mm512_fmadd_ps, _mm512_set1_ps};
        let (a, b) = (_mm512_set1_ps(black_box(0.999)), _mm512_set1_ps(black_box(0.001)));
        let mut acc: [_; 24] = std::array::from_fn(|i| _mm512_set1_ps(black_box(i as f32)));
        for _ in 0..steps {
            for x in &mut acc {
                *x = _mm512_fmadd_ps(*x, a, b);
            }
        }
        black_box(acc);
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn narrow(steps: usize) {
        use std::arch::x86_64::{_mm256_fmadd_ps, _mm256_set1_ps};
        let (a, b) = (_mm256_set1_ps(black_box(0.999)), _mm256_set1_ps(black_box(0.001)));
        let mut acc: [_; 12] = std::array::from_fn(|i| _mm256_set1_ps(black_box(i as f32)));
        for _ in 0..steps {
            for x in &mut acc {
                *x = _mm256_fmadd_ps(*x, a, b);
            }
        }
        black_box(acc);
    }

    /// GB/s of reading 128 MiB a thread, once through each time.
    pub(super) fn read(threads: usize, clock: Clock) -> f64 {
        const WORDS: usize = 16 << 20;
        let buffers: Vec<Vec<u64>> =
            (0..threads as u64).map(|t| (0..WORDS as u64).map(|i| i ^ t).collect()).collect();
        best(threads, clock, (WORDS * 8) as f64, |thread| {
            let sum = |words: &[u64]| {
                let mut acc = [0_u64; 32];
                for chunk in words.chunks_exact(32) {
                    acc.iter_mut().zip(chunk).for_each(|(a, c)| *a = a.wrapping_add(*c));
                }
                acc.iter().fold(0, |s, x| x ^ s)
            };
            // Four streams at once: one alone does not fill the memory's queue.
            let quarter = WORDS / 4;
            let parts: [&[u64]; 4] =
                std::array::from_fn(|i| &buffers[thread][i * quarter..][..quarter]);
            let mut total = 0_u64;
            for block in 0..quarter / 512 {
                for part in parts {
                    total ^= sum(&part[block * 512..][..512]);
                }
            }
            black_box(total);
        })
    }
}
