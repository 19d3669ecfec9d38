//! What sessions of one `Model::step` wait for each other.
//!
//! `cargo bench --bench step [-- MODEL] [--threads N] [--rounds N] [--csv]` steps 8 sessions that decode, each
//! from 128 tokens on, and measures in each round:
//!
//! - *alone*: each chunk of a prompt of 8,000 tokens with nothing beside it, and the decode of the 8 sessions;
//! - *between tokens*: from one token of the 8 sessions to the next, while such a prompt goes through;
//! - *first token behind*: of a prompt of 64 tokens that is queued when such a prompt has had two steps;
//! - *8 alike*: until 8 prompts of 1,024 tokens that were queued at once are through, of which the first 960 are
//!   the same, and how many rows that took.
//!
//! `chunk` is the prompt's slowest chunk alone, which is its last whole one, and `decode` the median of decode alone;
//! `ratio` is p99 over their sum, and `own_ratio` p99 of each gap over the sum of decode and the very chunk that
//! was in its step. `--csv` adds the rows to `benches/record/cpu/step.csv`.

#![allow(clippy::print_stdout, clippy::unwrap_used)]
#![allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss)]

use std::time::{Duration, Instant};

use loris::{Engine, EngineOptions, Model, ModelOptions, Progress, Session, SessionOptions};

use machine::{Machine, Options, ms};

mod machine;

/// Sessions that decode, and prompts that begin alike.
const N_SESSIONS: usize = 8;
/// Tokens that each of them goes on from.
const RUNNING: usize = 128;
/// Tokens of the long prompt, and of the short one behind it.
const LONG: usize = 8_000;
const SHORT: usize = 64;
/// Tokens of prompts that begin alike, and how many of these are the same.
const ALIKE: usize = 1_024;
const SAME: usize = 960;

/// First line of the record.
const HEADER: &str = "date,commit,cpu,features,threads,load,busy_elsewhere,model,measure,rows,n,p50,p99,max,chunk,decode,ratio,own_ratio\n";

fn main() {
    let options = Options::parse("--rounds", 3_usize);
    assert!(options.count > 0, "--rounds 0 measures nothing");
    let machine = Machine::at_rest();
    let threads = options.threads;
    let engine = Engine::new(&EngineOptions { threads: Some(threads), ..EngineOptions::default() });
    let kv_tokens = Some(LONG + N_SESSIONS * (ALIKE + RUNNING + 256));
    let sizes = ModelOptions { kv_tokens, ..ModelOptions::default() };
    let model = engine.unwrap().open(&options.model, &sizes).unwrap();
    println!("{threads} threads, {machine}, chunk {}", model.plan().chunk);
    let mut bench = Bench { model, random: 1 };

    let mut running: Vec<Session> = (0..N_SESSIONS).map(|_| bench.ready(RUNNING)).collect();
    let (mut chunks, mut decodes): (Vec<Vec<Duration>>, _) = (Vec::new(), Vec::new());
    let (mut gaps, mut firsts, mut alike, mut n_rows) = (Vec::new(), Vec::new(), Vec::new(), 0);
    for round in 0..options.count {
        chunks.push(bench.chunks_alone());
        decodes.extend((0..30).map(|_| bench.step(&mut running, &mut []).0));
        gaps.push(bench.between_tokens(&mut running));
        firsts.push(bench.first_token_behind(&mut running));
        let (time, n) = bench.alike();
        alike.push(time);
        n_rows = n;
        println!("round {} of {}", round + 1, options.count);
    }

    let decode = median(decodes);
    let own = |idx: usize| median(chunks.iter().filter_map(|of| of.get(idx)).copied().collect());
    let own: Vec<Duration> = (0..chunks[0].len()).map(own).collect();
    let slowest = own.iter().max().copied().unwrap();
    let name = options.model.file_name().unwrap().to_string_lossy().to_lowercase();
    let machine = format!("{},{name}", machine.columns(threads));
    println!(
        "| {:<24} | {:>6} | {:>4} | {:>9} | {:>9} | {:>9} | {:>8} | {:>9} | {:>6} | {:>9} |",
        "ms", "rows", "n", "p50", "p99", "max", "chunk", "decode", "ratio", "own ratio"
    );
    let over =
        |time: Duration, chunk: Duration| time.as_secs_f64() / (chunk + decode).as_secs_f64();
    let own_ratios = gaps.iter().flat_map(|gaps| gaps.iter().zip(&own).map(|(&g, &c)| over(g, c)));
    let mut own_ratios: Vec<f64> = own_ratios.collect();
    own_ratios.sort_by(f64::total_cmp);
    let rows = [
        ("between tokens", LONG, gaps.concat(), format!("{:.3}", at(&own_ratios, 0.99))),
        ("first token behind", LONG + SHORT, firsts, String::new()),
        ("8 alike", n_rows, alike, String::new()),
    ];
    for (what, n_rows, mut times, own_ratio) in rows {
        times.sort();
        let [p50, p99, max] = [0.5, 0.99, 1.0].map(|share| at(&times, share));
        let ratio = over(p99, slowest);
        println!(
            "| {what:<24} | {n_rows:>6} | {:>4} | {:>9.1} | {:>9.1} | {:>9.1} | {:>8.1} | {:>9.2} | {ratio:>6.2} | {own_ratio:>9} |",
            times.len(),
            ms(p50),
            ms(p99),
            ms(max),
            ms(slowest),
            ms(decode)
        );
        if options.csv {
            let columns = format!(
                "{machine},{what},{n_rows},{},{:.1},{:.1},{:.1},{:.1},{:.2},{ratio:.3},{own_ratio}",
                times.len(),
                ms(p50),
                ms(p99),
                ms(max),
                ms(slowest),
                ms(decode)
            );
            machine::add_row("step.csv", HEADER, &columns);
        }
    }
}

struct Bench {
    model: Model,
    random: u64,
}

impl Bench {
    /// Tokens at random (splitmix64).
    fn prompt(&mut self, n: usize) -> Vec<u32> {
        let vocab_size = self.model.config().vocab_size as u64;
        let mut token = || {
            self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = self.random;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            ((z ^ (z >> 31)) % vocab_size) as u32
        };
        (0..n).map(|_| token()).collect()
    }

    /// A session that has `n` tokens.
    fn ready(&mut self, n: usize) -> Session {
        let mut s = self.queued(n);
        while self.step(&mut [], &mut [&mut s]).1 != [Progress::Ready] {}
        s
    }

    /// A session with a prompt of `n` tokens to compute.
    fn queued(&mut self, n: usize) -> Session {
        let mut s = self.model.session(&SessionOptions::default()).unwrap();
        s.feed(&self.prompt(n)).unwrap();
        s
    }

    /// A token for each that runs, and a step of all with these first in line: how long it took, and how far they are.
    fn step(
        &self,
        running: &mut [Session],
        prompts: &mut [&mut Session],
    ) -> (Duration, Vec<Progress>) {
        let start = Instant::now();
        running.iter_mut().for_each(|s| s.push(1).unwrap());
        let mut refs: Vec<&mut Session> = prompts.iter_mut().map(|s| &mut **s).collect();
        let n_prompts = refs.len();
        refs.extend(running.iter_mut());
        let mut all: Vec<Progress> =
            self.model.step(&mut refs).into_iter().map(Result::unwrap).collect();
        assert!(all[n_prompts..].iter().all(|p| *p == Progress::Ready), "each gets its token");
        all.truncate(n_prompts);
        let time = start.elapsed();
        running
            .iter_mut()
            .filter(|s| s.len() > RUNNING + 256)
            .for_each(|s| s.truncate(RUNNING).unwrap());
        (time, all)
    }

    /// Each chunk of a long prompt.
    fn chunks_alone(&mut self) -> Vec<Duration> {
        let mut long = self.queued(LONG);
        let mut times = Vec::new();
        while long.logits().is_none() {
            times.push(self.step(&mut [], &mut [&mut long]).0);
        }
        times
    }

    /// Each step that serves those that run and a long prompt.
    fn between_tokens(&mut self, running: &mut [Session]) -> Vec<Duration> {
        let mut long = self.queued(LONG);
        let mut times = Vec::new();
        while long.logits().is_none() {
            times.push(self.step(running, &mut [&mut long]).0);
        }
        times
    }

    /// Until a short prompt that comes while a long one is at work is through.
    fn first_token_behind(&mut self, running: &mut [Session]) -> Duration {
        let mut long = self.queued(LONG);
        for _ in 0..2 {
            self.step(running, &mut [&mut long]);
        }
        let mut short = self.queued(SHORT);
        let start = Instant::now();
        while short.logits().is_none() {
            self.step(running, &mut [&mut long, &mut short]);
        }
        start.elapsed()
    }

    /// Until prompts that begin alike are through, and how many of their tokens were computed.
    fn alike(&mut self) -> (Duration, usize) {
        let same = self.prompt(SAME);
        let mut all: Vec<Session> = (0..N_SESSIONS)
            .map(|_| {
                let mut s = self.model.session(&SessionOptions::default()).unwrap();
                s.feed(&[same.clone(), self.prompt(ALIKE - SAME)].concat()).unwrap();
                s
            })
            .collect();
        let start = Instant::now();
        while all.iter().any(|s| s.logits().is_none()) {
            let mut refs: Vec<&mut Session> = all.iter_mut().collect();
            self.step(&mut [], &mut refs);
        }
        (start.elapsed(), all.iter().map(|s| s.receipt().n_prefilled).sum())
    }
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    at(&times, 0.5)
}

/// Of ascending values, the one that a share of them does not exceed.
fn at<T: Copy>(sorted: &[T], share: f64) -> T {
    let n = sorted.len();
    sorted[((share * n as f64).ceil() as usize).clamp(1, n) - 1]
}
