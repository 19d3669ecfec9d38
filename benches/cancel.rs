//! How long a cancelled call takes to return.
//!
//! `cargo bench --bench cancel [-- MODEL] [--threads N] [--n FACTOR] [--csv]` cancels calls at uniformly
//! random times: a prefill of one chunk, a decode, and a prefill that waits while another session's runs.
//! It prints the time from `cancel()` to the return of the call beside the time of one layer: a pass that
//! nobody cancels, its median in the same run, divided by the number of layers. A call that ended before
//! its cancel is not counted. Last comes the time of a look at the mapped weight files, which every prompt begins with.
//! `--csv` adds the rows to `benches/record/cpu/cancel.csv`; `--n 0.1` takes a
//! tenth of the samples.

#![allow(clippy::print_stdout, clippy::unwrap_used)]
#![allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]

use std::path::Path;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use loris::loader::{LoadMode, Weights};
use loris::{Engine, EngineOptions, Error, Model, ModelOptions, Session, SessionOptions};

use machine::{Machine, Options, ms};

mod machine;

/// Prompt tokens of a pass.
const CHUNK: usize = 512;

/// First line of the record.
const HEADER: &str = "date,commit,cpu,features,threads,load,busy_elsewhere,model,measure,n,pass,layer,p50,p99,max,ratio\n";

fn main() {
    let options = Options::parse("--n", 1.0_f64);
    let machine = Machine::at_rest();
    let threads = options.threads;
    let engine = Engine::new(&EngineOptions { threads: Some(threads), ..EngineOptions::default() });
    let sizes =
        ModelOptions { chunk: CHUNK, kv_tokens: Some(4 * CHUNK), ..ModelOptions::default() };
    let model = engine.unwrap().open(&options.model, &sizes).unwrap();
    let record = options.csv.then(|| {
        let name = options.model.file_name().unwrap().to_string_lossy().to_lowercase();
        format!("{},{name}", machine.columns(threads))
    });
    let mut bench = Bench { model, random: 1, n: options.count, record };
    println!("{threads} threads, {machine}");
    println!(
        "| {:<24} | {:>5} | {:>9} | {:>9} | {:>8} | {:>8} | {:>8} | {:>9} |",
        "cancelled", "n", "pass ms", "layer ms", "p50 ms", "p99 ms", "max ms", "p99/layer"
    );
    println!("|{:-<26}|{0:->7}|{0:->11}|{0:->11}|{0:->10}|{0:->10}|{0:->10}|{0:->11}|", "");
    bench.prefill();
    bench.decode();
    bench.waiting();
    bench.weights(&options.model);
}

/// What was measured of one kind of call.
struct Row {
    what: &'static str,
    pass: Duration,
    layer: Duration,
    /// Ascending.
    latencies: Vec<Duration>,
}

struct Bench {
    model: Model,
    random: u64,
    n: f64,
    /// The machine, if rows are to be recorded.
    record: Option<String>,
}

impl Bench {
    /// A number in 0 .. 1 (splitmix64).
    fn unit(&mut self) -> f64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.random;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }

    fn session(&self) -> Session {
        self.model.session(&SessionOptions::default()).unwrap()
    }

    fn prompt(&mut self) -> Vec<u32> {
        let vocab_size = self.model.config().vocab_size as f64;
        (0..CHUNK).map(|_| (self.unit() * vocab_size) as u32).collect()
    }

    /// Cancels calls at random times of a pass until there are `n` that it ended.
    fn cancel(
        &mut self,
        what: &'static str,
        n: usize,
        pass: Duration,
        mut call: impl FnMut(&mut Self, Duration) -> Option<Duration>,
    ) {
        let n = ((n as f64 * self.n) as usize).max(1);
        let mut latencies = Vec::new();
        while latencies.len() < n {
            let after = pass.mul_f64(self.unit());
            latencies.extend(call(self, after));
        }
        self.show(what, pass, latencies);
    }

    fn show(&self, what: &'static str, pass: Duration, mut latencies: Vec<Duration>) {
        latencies.sort();
        let layer = pass / self.model.plan().n_layers as u32;
        let row = Row { what, pass, layer, latencies };
        row.print();
        if let Some(machine) = &self.record {
            row.record(machine);
        }
    }

    fn prefill(&mut self) {
        let prompt = self.prompt();
        let pass = self.prefill_pass(&prompt);
        self.cancel("prefill of 512", 300, pass, |bench, after| {
            cancel_after(&mut bench.session(), after, |s| s.prefill(&prompt))
        });
    }

    fn prefill_pass(&mut self, prompt: &[u32]) -> Duration {
        median(7, || self.session().prefill(prompt).unwrap())
    }

    fn decode(&mut self) {
        let mut s = self.session();
        s.prefill(&self.prompt()).unwrap();
        let pass = median(50, || {
            s.decode(1).unwrap();
            s.truncate(CHUNK).unwrap();
        });
        self.cancel("decode at 512", 1000, pass, |_, after| {
            let latency = cancel_after(&mut s, after, |s| s.decode(1));
            s.truncate(CHUNK).unwrap();
            latency
        });
    }

    /// No cancel, but what each prompt pays first: a look at the weight files that are mapped.
    fn weights(&mut self, dir: &Path) {
        let weights = Weights::open(dir, LoadMode::Mmap, &mut |_, _| {}).unwrap();
        let prompt = self.prompt();
        let pass = self.prefill_pass(&prompt);
        let look = || weights.files().iter().try_for_each(|file| file.check_unchanged()).unwrap();
        let n = ((10_000.0 * self.n) as usize).max(1);
        let latencies = (0..n).map(|_| median(1, look)).collect();
        self.show("look at weight files", pass, latencies);
    }

    /// The call waits for its turn while another session's prefill runs.
    fn waiting(&mut self) {
        let (prompt, other) = (self.prompt(), self.prompt());
        let pass = self.prefill_pass(&prompt);
        self.cancel("prefill that waits", 300, pass.mul_f64(0.9), |bench, after| {
            let mut running = bench.session();
            let canceller = running.canceller();
            thread::scope(|scope| {
                let thread = scope.spawn(|| drop(running.prefill(&other)));
                while bench.model.pool_usage().n_used == 0 {
                    thread::yield_now();
                }
                thread::sleep(Duration::from_millis(2)); // from its pages to its turn
                let latency = cancel_after(&mut bench.session(), after, |s| s.prefill(&prompt));
                let waited = !thread.is_finished();
                canceller.cancel();
                latency.filter(|_| waited)
            })
        });
    }
}

/// Makes a call and has another thread cancel it `after` a time; from `cancel()` to its return, if it was
/// the cancel that ended it.
fn cancel_after(
    session: &mut Session,
    after: Duration,
    call: impl Fn(&mut Session) -> Result<(), Error>,
) -> Option<Duration> {
    let canceller = session.canceller();
    let (begin, begun) = mpsc::channel::<Instant>();
    let thread = thread::spawn(move || {
        let at = begun.recv().unwrap() + after;
        thread::sleep(at.saturating_duration_since(Instant::now()));
        let now = Instant::now();
        canceller.cancel();
        now
    });
    thread::sleep(Duration::from_micros(200)); // until it waits
    begin.send(Instant::now()).unwrap();
    let outcome = call(session);
    let end = Instant::now();
    let cancelled = thread.join().unwrap();
    match outcome {
        Err(Error::Cancelled) => Some(end - cancelled),
        Err(e) => panic!("{e}"),
        Ok(()) => {
            // Too late: it is the next call that the cancel ends.
            assert!(matches!(session.decode(1), Err(Error::Cancelled)));
            None
        }
    }
}

fn median(n: usize, mut run: impl FnMut()) -> Duration {
    let mut times: Vec<Duration> = (0..n)
        .map(|_| {
            let start = Instant::now();
            run();
            start.elapsed()
        })
        .collect();
    times.sort();
    times[n / 2]
}

impl Row {
    /// The latency that a share of the calls did not exceed.
    fn at(&self, share: f64) -> Duration {
        let n = self.latencies.len();
        self.latencies[((share * n as f64).ceil() as usize).clamp(1, n) - 1]
    }

    fn ratio(&self) -> f64 {
        self.at(0.99).as_secs_f64() / self.layer.as_secs_f64()
    }

    /// A pass, a layer, and latencies: the median, the 99th percentile, the largest.
    fn times(&self) -> [f64; 5] {
        [self.pass, self.layer, self.at(0.5), self.at(0.99), self.at(1.0)].map(ms)
    }

    fn print(&self) {
        let [pass, layer, p50, p99, most] = self.times();
        println!(
            "| {:<24} | {:>5} | {pass:>9.3} | {layer:>9.3} | {p50:>8.4} | {p99:>8.4} | {most:>8.4} | {:>9.3} |",
            self.what,
            self.latencies.len(),
            self.ratio()
        );
    }

    /// Adds the row to the record.
    fn record(&self, machine: &str) {
        let [pass, layer, p50, p99, most] = self.times();
        let row = format!(
            "{machine},{},{},{pass:.3},{layer:.3},{p50:.4},{p99:.4},{most:.4},{:.3}",
            self.what,
            self.latencies.len(),
            self.ratio()
        );
        machine::add_row("cancel.csv", HEADER, &row);
    }
}
