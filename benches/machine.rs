//! What a row of a record says of its machine and commit.

use std::fmt;
use std::fmt::Debug;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::str::FromStr;
use std::thread;
use std::time::{Duration, Instant};

/// What the command line of a benchmark says: `[MODEL] [--threads N] [--COUNT N] [--csv]`.
pub(crate) struct Options<T> {
    pub(crate) model: PathBuf,
    pub(crate) threads: usize,
    /// How much is measured.
    pub(crate) count: T,
    pub(crate) csv: bool,
}

impl<T: FromStr<Err: Debug>> Options<T> {
    /// `flag` sets the count.
    pub(crate) fn parse(flag: &str, count: T) -> Self {
        let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/SmolLM2-135M-Instruct");
        let threads = thread::available_parallelism().unwrap().get();
        let mut options = Self { model, threads, count, csv: false };
        let mut args = std::env::args().skip(1);
        while let Some(arg) = args.next() {
            match arg.as_str() {
                "--threads" => options.threads = args.next().unwrap().parse().unwrap(),
                "--csv" => options.csv = true,
                "--bench" => {}
                _ if arg == flag => options.count = args.next().unwrap().parse().unwrap(),
                _ => options.model = arg.into(),
            }
        }
        options
    }
}

/// What else the machine does when a run begins.
pub(crate) struct Machine {
    /// Load average of the last minute.
    load: String,
    /// CPUs in use while this program rests: the load average counts what ran a minute ago.
    busy_elsewhere: f64,
}

impl Machine {
    /// Looks for two seconds.
    pub(crate) fn at_rest() -> Self {
        let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
        let load = load.split(' ').next().unwrap_or("?").to_owned();
        Self { load, busy_elsewhere: busy_elsewhere() }
    }

    /// The columns `cpu,features,threads,load,busy_elsewhere`.
    pub(crate) fn columns(&self, threads: usize) -> String {
        format!("{},{threads},{},{:.2}", cpu(), self.load, self.busy_elsewhere)
    }
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "load {}, busy elsewhere {:.2} CPUs", self.load, self.busy_elsewhere)
    }
}

/// Adds `date,commit` and the columns of a row to a record.
pub(crate) fn add_row(record: &str, header: &str, columns: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/record/cpu").join(record);
    let mut text = std::fs::read_to_string(&path).unwrap_or_else(|_| header.into());
    let date = output("date", &["-u", "+%Y-%m-%dT%H:%MZ"]);
    let git = ["-C", env!("CARGO_MANIFEST_DIR")];
    let head = output("git", &[&git[..], &["rev-parse", "--short", "HEAD"]].concat());
    // The record itself may have changed: its rows come one by one.
    let status = ["status", "--porcelain", "-uno", ".", ":!benches/record"];
    let changed = output("git", &[&git[..], &status].concat());
    let plus = if changed.is_empty() { "" } else { "+" };
    text += &format!("{date},{head}{plus},{columns}\n");
    std::fs::write(&path, text).unwrap();
}

/// Milliseconds.
pub(crate) fn ms(time: Duration) -> f64 {
    1e3 * time.as_secs_f64()
}

fn output(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().unwrap();
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

fn busy_elsewhere() -> f64 {
    let idle = || -> f64 {
        let stat = std::fs::read_to_string("/proc/stat").unwrap_or_default();
        let fields: Vec<f64> =
            stat.lines().next().unwrap_or("").split(' ').filter_map(|f| f.parse().ok()).collect();
        fields.get(3..5).map_or(0.0, |idle| idle.iter().sum::<f64>() / 100.0)
    };
    let (start, before) = (Instant::now(), idle());
    thread::sleep(Duration::from_secs(2));
    let n_cpus = thread::available_parallelism().unwrap().get() as f64;
    (n_cpus - (idle() - before) / start.elapsed().as_secs_f64()).max(0.0)
}

/// The CPU and what kernels it can run, as the other records have it.
fn cpu() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |name: &str| {
        let line = info.lines().find(|line| line.split(':').next().unwrap_or("").trim() == name);
        line.and_then(|line| line.split_once(':')).map_or("?", |(_, value)| value.trim())
    };
    let (family, model, stepping) = (field("cpu family"), field("model"), field("stepping"));
    let known = ["avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16"];
    let features = known.into_iter().filter(|&f| field("flags").split(' ').any(|flag| flag == f));
    let features = features.collect::<Vec<_>>().join(" ");
    format!(
        "\"{} (family {family}, model {model}, stepping {stepping})\",{features}",
        field("model name")
    )
}
