//! Timing and recording of kernels, and the random inputs that they get.

use std::fmt::Write as _;
use std::fs::OpenOptions;
use std::io::Write as _;
use std::time::{Duration, Instant};

use loris_formats::{PageLayout, Sides};
use loris_kernels::abi::{LORIS_DENSE, LorisSeq};
use loris_kernels::ops::attention::{AttentionShape, q_tiles};
use loris_kernels::ops::batch::{DeviceBatch, HostBatch};
use loris_kernels::ops::{fill_random, page_copy};
use loris_kernels::{Buffer, Cost, Device, DeviceOptions, Error, KvPages, Matrix, Rows};

/// Slots of a page, as the engine has them.
pub const PAGE_LEN: usize = 64;

/// No further set of inputs beyond this.
const MAX_SETS_BYTES: u64 = 32 << 30;

const COLUMNS: &str =
    "peer,kernel,variant,shape,us,gb_s,tflops,copy_share,matrix_share,device,driver,rev";

/// What the command line says.
#[derive(Debug, Default)]
pub struct Options {
    pub quick: bool,
    pub twin: bool,
    pub filter: String,
    pub rev: String,
    pub csv: Option<String>,
}

impl Options {
    /// `cargo bench` says `--bench`; `cargo test` does not, and gets tiny shapes on what tests run on.
    pub fn parse() -> Self {
        let mut options = Self::default();
        let args: Vec<String> = std::env::args().skip(1).collect();
        if !args.iter().any(|arg| arg == "--bench") {
            let on_gpu = std::env::var("LORIS_TEST_DRIVER").is_ok_and(|driver| driver == "cuda");
            return Self { quick: true, twin: !on_gpu, ..options };
        }
        let mut args = args.into_iter();
        while let Some(arg) = args.next() {
            let mut value = || args.next().unwrap_or_else(|| panic!("{arg} needs a value"));
            match arg.as_str() {
                "--bench" => {}
                "--quick" => options.quick = true,
                "--twin" => options.twin = true,
                "--rev" => options.rev = value(),
                "--csv" => options.csv = Some(value()),
                filter if !filter.starts_with("--") => options.filter = filter.to_string(),
                other => panic!("{other} is not one of --quick --twin --rev REV --csv FILE FILTER"),
            }
        }
        options
    }

    pub fn device(&self) -> Result<Device, Error> {
        let driver = self.twin.then(|| loris_kernels::TWIN.into());
        Device::open(&DeviceOptions { index: 0, driver })
    }
}

/// Measures kernels and writes a row for each.
#[derive(Debug)]
pub struct Bench {
    pub device: Device,
    pub options: Options,
    /// Measured ceilings: bytes and operations a second.
    copy_rate: f64,
    matrix_rate: f64,
}

impl Bench {
    pub fn new(options: Options) -> Result<Self, Error> {
        let device = options.device()?;
        Ok(Self { device, options, copy_rate: f64::NAN, matrix_rate: f64::NAN })
    }

    /// Measures what rates are compared with: a large copy, and a kernel that multiplies large matrices.
    pub fn ceilings(&mut self, multiply: impl Fn(&mut Self) -> Option<f64>) -> Result<(), Error> {
        let len = if self.options.quick { 1 << 12 } else { 1 << 30 };
        let cost = Cost { bytes: 2 * len as u64, flops: 0 };
        let make = |device: &Device, seed| {
            let from = random_matrix(device, 1, len / 2, seed)?.data;
            Ok((from, Buffer::new(device, len / 2, "a copy")?))
        };
        let seconds = self.measure(&cost, make, |device, (from, to)| to.copy_from(device, from))?;
        self.copy_rate = cost.bytes as f64 / seconds;
        self.record("copy", "driver", &format!("{len} bytes"), &cost, seconds);
        let filter = std::mem::take(&mut self.options.filter);
        self.matrix_rate = multiply(self).unwrap_or(f64::NAN);
        self.options.filter = filter;
        Ok(())
    }

    /// Times `run` on inputs of `make`, and writes the row; operations a second. `None` if the filter leaves it out
    /// or there is not enough memory.
    pub fn case<S>(
        &mut self,
        [kernel, variant]: [&str; 2],
        shape: &str,
        cost: Cost,
        make: impl Fn(&Device, u64) -> Result<S, Error>,
        run: impl Fn(&Device, &mut S) -> Result<(), Error>,
    ) -> Option<f64> {
        if !format!("{kernel} {variant} {shape}").contains(&self.options.filter) {
            return None;
        }
        match self.measure(&cost, make, run) {
            Ok(seconds) => {
                self.record(kernel, variant, shape, &cost, seconds);
                Some(cost.flops as f64 / seconds)
            }
            Err(Error::OutOfMemory { .. }) => {
                println!("| {:<64} | no memory", format!("{kernel} {variant} {shape}"));
                None
            }
            Err(error) => panic!("{kernel} {variant} {shape}: {error}"),
        }
    }

    /// Seconds of one run: the median of graphs of many runs, each on another of several sets of inputs
    /// that are larger than the cache together.
    fn measure<S>(
        &self,
        cost: &Cost,
        make: impl Fn(&Device, u64) -> Result<S, Error>,
        run: impl Fn(&Device, &mut S) -> Result<(), Error>,
    ) -> Result<f64, Error> {
        let (device, quick) = (&self.device, self.options.quick);
        let wanted = 4 * u64::from(device.info().l2) / cost.bytes.max(1) + 1;
        let n_sets = if quick { 2 } else { wanted.clamp(2, 256) };
        let (free, _) = device.memory()?;
        let mut sets = vec![make(device, 1)?];
        for seed in 2..=n_sets {
            if free - device.memory()?.0 > MAX_SETS_BYTES {
                break;
            }
            match make(device, seed << 40) {
                Ok(set) => sets.push(set),
                Err(Error::OutOfMemory { .. }) => break,
                Err(error) => return Err(error),
            }
        }
        // Warm up, and see how long it takes.
        let mut all = |device: &Device| sets.iter_mut().try_for_each(|set| run(device, set));
        all(device)?;
        let once = device.time(&mut all)?.as_secs_f64().max(1e-6);
        let n_rounds = if quick { 1 } else { (2e-3 / once).ceil() as usize };
        let graph = device.capture(|d| (0..n_rounds).try_for_each(|_| all(d)))?;
        let n_runs = n_rounds * sets.len();

        let budget = Duration::from_millis(if quick { 0 } else { 1000 });
        let (start, mut seconds) = (Instant::now(), vec![]);
        graph.launch(device)?;
        while seconds.len() < if quick { 1 } else { 5 }
            || start.elapsed() < budget && seconds.len() < 50
        {
            let time = device.time(|d| graph.launch(d))?;
            seconds.push(time.as_secs_f64() / n_runs as f64);
        }
        seconds.sort_by(f64::total_cmp);
        Ok(seconds[seconds.len() / 2])
    }

    fn record(&self, kernel: &str, variant: &str, shape: &str, cost: &Cost, seconds: f64) {
        let info = self.device.info();
        let (bytes, flops) = (cost.bytes as f64 / seconds, cost.flops as f64 / seconds);
        let [us, gb_s, tflops] = [seconds * 1e6, bytes / 1e9, flops / 1e12];
        let (copy, matrix) = (bytes / self.copy_rate, flops / self.matrix_rate);
        println!(
            "| {:<64} | {us:>10.2} | {gb_s:>8.0} | {tflops:>7.1} | {copy:>6.2} | {matrix:>6.2} |",
            format!("{kernel} {variant} {shape}"),
        );
        let Some(path) = &self.options.csv else { return };
        let (major, minor) = info.driver_version;
        let mut row = String::new();
        let _ = write!(row, "loris,{kernel},{variant},{shape},{us:.3},{gb_s:.1},{tflops:.2},");
        let _ =
            write!(row, "{copy:.3},{matrix:.3},{},{major}.{minor},{}", info.name, self.options.rev);
        let is_new = !std::path::Path::new(path).exists();
        let mut file = OpenOptions::new().create(true).append(true).open(path).unwrap();
        if is_new {
            writeln!(file, "{COLUMNS}").unwrap();
        }
        writeln!(file, "{row}").unwrap();
    }
}

pub fn print_header(device: &Device) {
    let info = device.info();
    println!("{}, {} SMs, driver for CUDA {:?}", info.name, info.n_sms, info.driver_version);
    println!(
        "| {:<64} | {:>10} | {:>8} | {:>7} | {:>6} | {:>6} |",
        "kernel variant shape", "us", "GB/s", "TFLOPS", "copy", "matrix"
    );
    println!("|{:-<66}|{:->12}|{:->10}|{:->9}|{:->8}|{:->8}|", "", ":", ":", ":", ":", ":");
}

/// Weights of the size that they have in models.
pub fn random_matrix(device: &Device, n: usize, k: usize, seed: u64) -> Result<Matrix, Error> {
    let mut matrix = Matrix::new(device, n, k, "a matrix")?;
    fill_random::fill_random(device, &mut matrix, seed, 0.05)?;
    Ok(matrix)
}

/// bf16 rows.
pub fn random_rows(device: &Device, n: usize, width: usize, seed: u64) -> Result<Rows<u16>, Error> {
    let mut matrix = Matrix::new(device, n, width, "rows")?;
    fill_random::fill_random(device, &mut matrix, seed, 1.0)?;
    Ok(Rows { data: matrix.data, n_rows: n, width })
}

/// `n` floats in -1 .. 1.
pub fn random_floats(device: &Device, n: usize, seed: u64) -> Result<Buffer<f32>, Error> {
    let value = |i| f32::from_bits(u32::from(fill_random::value(seed, i as u64, 1.0)) << 16);
    let block: Vec<f32> = (0..n.min(1 << 20)).map(value).collect();
    let mut buffer = Buffer::new(device, n, "floats")?;
    for first in (0..n).step_by(block.len().max(1)) {
        buffer.upload(device, first, &block[..block.len().min(n - first)])?;
    }
    Ok(buffer)
}

/// f32 rows.
pub fn random_x(device: &Device, n: usize, width: usize, seed: u64) -> Result<Rows<f32>, Error> {
    Ok(Rows { data: random_floats(device, n * width, seed)?, n_rows: n, width })
}

/// Sequences, each of `n_rows` rows behind `kv_start` slots.
pub fn seqs_of(seqs: &[(usize, usize)]) -> Vec<LorisSeq> {
    let (mut row_start, mut page_table_start) = (0, 0);
    let mut place = |&(kv_start, n_rows): &(usize, usize)| {
        let seq = LorisSeq {
            row_start,
            n_rows: n_rows as u32,
            kv_start: kv_start as u32,
            page_table_start,
            positions_start: LORIS_DENSE,
            // Where pages are sealed all of them are: a tail is short.
            n_sealed: (kv_start + n_rows).div_ceil(PAGE_LEN) as u32,
            ..LorisSeq::default()
        };
        row_start += n_rows as u32;
        page_table_start += (kv_start + n_rows).div_ceil(PAGE_LEN) as u32;
        seq
    };
    seqs.iter().map(&mut place).collect()
}

/// These sequences with pages in random order and of random contents.
pub fn sequences(
    device: &Device,
    shape: AttentionShape,
    kv: Sides,
    seqs: &[(usize, usize)],
    seed: u64,
) -> Result<(DeviceBatch, KvPages), Error> {
    let (mut row_seq, mut positions, mut n_pages) = (vec![], vec![], 0);
    for (seq_idx, &(kv_start, n_rows)) in seqs.iter().enumerate() {
        row_seq.extend(vec![seq_idx as u32; n_rows]);
        positions.extend(kv_start as u32..(kv_start + n_rows) as u32);
        n_pages += (kv_start + n_rows).div_ceil(PAGE_LEN) + usize::from(kv.are_coded());
    }
    let seqs = seqs_of(seqs);
    let page_tables = random_table(n_pages, seed);
    let n_rows = row_seq.len();
    let value = |i| f32::from_bits(u32::from(fill_random::value(seed, i, 1.0)) << 16);
    let cos_sin: Vec<f32> = (0..(n_rows * shape.head_dim) as u64).map(value).collect();
    let rows: Vec<u32> = (0..n_rows as u32).collect();
    let mut batch = DeviceBatch::new(device, n_rows, shape.head_dim)?;
    let host = HostBatch {
        seqs: &seqs,
        row_seq: &row_seq,
        positions: &positions,
        page_tables: &page_tables,
        n_layers: 1,
        tokens: &rows,
        cos_sin: &cos_sin,
        tiles: &q_tiles(shape, &seqs),
        logit_rows: &rows,
        ..HostBatch::default()
    };
    batch.upload(device, &host)?;
    Ok((batch, random_pages(device, shape, kv, n_pages, seed)?))
}

/// Pages in random order.
pub fn random_table(n_pages: usize, seed: u64) -> Vec<u32> {
    let mut table: Vec<u32> = (0..n_pages as u32).collect();
    table.sort_by_key(|&page| fill_random::value(seed, u64::from(page), 1.0));
    table
}

/// A pool of random contents: a few pages from the host, the others copies of them.
pub fn random_pages(
    device: &Device,
    shape: AttentionShape,
    kv: Sides,
    n_pages: usize,
    seed: u64,
) -> Result<KvPages, Error> {
    let AttentionShape { n_kv_heads, head_dim, .. } = shape;
    let page_bytes = PageLayout::new(n_kv_heads, PAGE_LEN, head_dim, kv).bytes();
    let data = Buffer::new(device, n_pages * page_bytes, "pages")?;
    let mut pages = KvPages { data, n_pages, n_kv_heads, page_len: PAGE_LEN, head_dim, kv };
    let n_first = n_pages.min(16);
    let words = (0..(n_first * page_bytes / 2) as u64).map(|i| fill_random::value(seed, i, 1.0));
    let bytes: Vec<u8> = words.flat_map(u16::to_le_bytes).collect();
    pages.data.upload(device, 0, &bytes)?;
    let pairs: Vec<u32> = (n_first..n_pages).flat_map(|p| [(p % 16) as u32, p as u32]).collect();
    let pairs = Buffer::from_slice(device, &pairs, "pairs")?;
    page_copy::page_copy(device, &mut pages, &pairs, n_pages - n_first)?;
    Ok(pages)
}
