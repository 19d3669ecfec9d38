//! Build script of `kernels-cuda`: kernels to images, and the twin.
//!
//! **Kernels.** A row of a kernel file, `KERNEL(name, ..)`, is a kernel. A row `FAMILY(name, ..)` is
//! one for each head width and each pair of formats that attention is compiled for, a row
//! `KEY_FAMILY(name, ..)` one for each format of keys: their lists are `codings.h`, which this
//! script writes. The library gets a table of kernels, and one of names for each family.
//!
//! **Images.** nvcc, if there is one, makes of each kernel file a cubin for each architecture, and
//! PTX; what is embedded is compressed. What ptxas says about registers is held against the comment
//! on the row, `// <= 168, d32 128 registers`: more registers, a spill or a stack frame fail the
//! build. The shared memory of a kernel is a constant beside it in the image. Without nvcc the build
//! goes on and the library has no images.
//!
//! **The twin.** With the feature `twin` the same kernel files and the driver in `twin/` become a
//! shared library, by the host's C++ compiler.
//!
//! What was compiled is kept in `target/kernels` under the hash of all that went into it, so that a
//! change of one kernel compiles one kernel.
//!
//! Environment: `NVCC`, `CUDA_HOME`; `LORIS_CUDA_ARCHS` is `none` or a list like `sm_80,compute_80`
//! of what to build instead of all; with `LORIS_LINEINFO=1` images say which line of the source an
//! instruction is of, for profilers, and are three times as large.

use std::collections::hash_map::DefaultHasher;
use std::fmt::Write as _;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::{env, fs};

use loris_formats::{Family, HEAD_DIMS, PAIRS};

type Result<T> = std::result::Result<T, String>;

/// PTX is for devices newer than the toolkit.
const ARCHS: [&str; 4] = ["sm_80", "sm_89", "sm_90a", "compute_80"];
const NVCC_FLAGS: [&str; 4] = ["-std=c++17", "-O3", "-Iinclude", "-Xptxas=-v"];
const TWIN_FLAGS: [&str; 6] =
    ["-std=c++17", "-g1", "-fPIC", "-fvisibility=hidden", "-Iinclude", "-c"];
const TWIN_CORE_FLAGS: [&str; 3] = ["-O3", "-Wall", "-Wextra"];
/// Memory accesses of kernels become calls that `twin/checks.cpp` implements; no sanitizer's
/// runtime is linked.
const TWIN_KERNEL_FLAGS: [&str; 9] = [
    "-O2",
    "-DLORIS_TWIN",
    "-fsanitize=thread,alignment",
    "-fno-tree-vectorize",
    "-fno-strict-aliasing",
    "-ffp-contract=off",
    "-Wno-unknown-pragmas",
    "-x",
    "c++",
];

fn main() {
    if let Err(message) = run() {
        for line in message.lines() {
            println!("cargo::error={line}");
        }
        std::process::exit(1);
    }
}

fn run() -> Result<()> {
    for input in ["../build.rs", "include", "kernels", "twin"] {
        println!("cargo::rerun-if-changed={input}");
    }
    for variable in ["NVCC", "CUDA_HOME", "LORIS_CUDA_ARCHS", "LORIS_LINEINFO", "CXX"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);
    // OUT_DIR is <target>/<profile>/build/<package>/out.
    let target = out.ancestors().nth(4).ok_or("OUT_DIR is too short")?;
    let headers = [loris_formats::header(), loris_formats::codings()];
    for (name, header) in ["formats.h", "codings.h"].iter().zip(&headers) {
        fs::write(out.join(name), header).map_err(text)?;
    }
    let cache = Cache::new(target.join("kernels"), &out, &headers)?;

    let (mut rows, families) = kernel_rows()?;
    let (images, resources, why_none) = build_images(&cache, &mut rows)?;
    let mut code = format!("pub(crate) const NO_IMAGES: &str = {why_none:?};\n");
    if env::var_os("CARGO_FEATURE_TWIN").is_some() {
        let twin = build_twin(&cache, &out, &mut rows)?;
        writeln!(code, "pub(crate) const TWIN: &str = {twin:?};").map_err(text)?;
    }
    writeln!(code, "pub(crate) static KERNELS: &[Kernel] = &[").map_err(text)?;
    for Row { kernel, file, smem, .. } in &rows {
        let smem = smem.unwrap_or(0); // nothing is built
        writeln!(code, "    Kernel {{ name: {kernel:?}, file: {file:?}, smem: {smem} }},")
            .map_err(text)?;
    }
    code += "];\n";
    code += &families;
    writeln!(code, "pub(crate) static IMAGES: &[Image] = &[").map_err(text)?;
    for (file, arch, path) in images {
        let data = format!("include_bytes!({path:?})");
        writeln!(code, "    Image {{ file: {file:?}, arch: {arch:?}, data: {data} }},")
            .map_err(text)?;
    }
    code += "];\n";
    fs::write(out.join("images.rs"), code).map_err(text)?;
    fs::write(out.join("resources.csv"), resources).map_err(text)
}

/// A kernel.
struct Row {
    kernel: String,
    file: String,
    max_registers: u32,
    /// Bytes of shared memory, once something that was built has said it.
    smem: Option<u32>,
}

/// All kernels, and tables of those of each family: `[pair of codings][width of heads]`.
fn kernel_rows() -> Result<(Vec<Row>, String)> {
    let (mut rows, mut tables) = (Vec::<Row>::new(), String::new());
    for path in sources("kernels", "cu") {
        let source = fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        let file = stem(&path);
        let mut add = |row: &str, variant: &str| {
            let name = row.split([',', ')']).next().unwrap_or("").trim();
            let kernel = format!("{name}{}{variant}", if variant.is_empty() { "" } else { "_" });
            let limits =
                row.split("// <= ").nth(1).and_then(|rest| rest.split(" registers").next());
            let max_registers = max_registers(limits, variant).ok_or_else(|| {
                format!("{file}.cu: the row of {name} lacks its comment `// <= N registers`")
            })?;
            if !rows.iter().any(|row| row.kernel == kernel) {
                let (kernel, file) = (kernel.clone(), file.clone());
                rows.push(Row { kernel, file, max_registers, smem: None });
            }
            Ok::<String, String>(kernel)
        };
        for row in source.split("\nKERNEL(").skip(1) {
            add(row, "")?;
        }
        for (of, family) in [("\nFAMILY(", Family::Pairs), ("\nKEY_FAMILY(", Family::Keys)] {
            for row in source.split(of).skip(1) {
                let mut table = Vec::new();
                for pair in PAIRS {
                    let kernel =
                        |d| family.variant(pair, d).map_or(Ok(String::new()), |v| add(row, &v));
                    table.push(HEAD_DIMS.map(kernel).into_iter().collect::<Result<Vec<_>>>()?);
                }
                let name = row.split(',').next().unwrap_or("").to_uppercase();
                let (n, m) = (PAIRS.len(), HEAD_DIMS.len());
                tables += &format!("pub(crate) const {name}: [[&str; {m}]; {n}] = {table:?};\n");
            }
        }
    }
    Ok((rows, tables))
}

/// Of `168, d32 128, d64_kvint8 160`: a number for all, then others for a width, for one kernel.
fn max_registers(limits: Option<&str>, variant: &str) -> Option<u32> {
    let mut limits = limits?.split(", ");
    let all = limits.next();
    let is_own = |of: &str| {
        variant.strip_prefix(of).is_some_and(|rest| rest.is_empty() || !of.contains('_'))
    };
    let own = limits.filter_map(|limit| limit.split_once(' ')).filter(|(of, _)| is_own(of));
    own.map(|(_, n)| n).last().or(all)?.parse().ok()
}

/// (file, architecture, path of the image), the table of resources, and why there are no images.
type Images = (Vec<(String, String, PathBuf)>, String, String);

fn build_images(cache: &Cache, rows: &mut [Row]) -> Result<Images> {
    let mut resources = String::from("kernel,arch,registers,smem,stack,spills\n");
    let none = |resources, why: &str| Ok((Vec::new(), resources, why.to_string()));
    let chosen = env::var("LORIS_CUDA_ARCHS").unwrap_or_default();
    let archs: Vec<&str> = match chosen.as_str() {
        "none" => return none(resources, "it was built with LORIS_CUDA_ARCHS=none"),
        "" => ARCHS.to_vec(),
        list => list.split(',').collect(),
    };
    if let Some(unknown) = archs.iter().find(|arch| !ARCHS.contains(arch)) {
        return Err(format!("LORIS_CUDA_ARCHS: {unknown} is not one of {}", ARCHS.join(", ")));
    }
    let Some(nvcc) = find_nvcc() else {
        println!(
            "cargo::warning=no nvcc (NVCC, CUDA_HOME, PATH, .venv): building without CUDA kernels"
        );
        return none(resources, "it was built without nvcc");
    };
    let version = output(Command::new(&nvcc).arg("--version"))?;
    let lines = env::var("LORIS_LINEINFO").is_ok_and(|v| v == "1").then_some("-lineinfo");

    let mut jobs = Vec::new();
    for path in sources("kernels", "cu") {
        for arch in &archs {
            let kind = if arch.starts_with("sm_") { "-cubin" } else { "-ptx" };
            let mut command = Command::new(&nvcc);
            command.args(NVCC_FLAGS).args(lines).arg(format!("-arch={arch}")).arg(kind).arg(&path);
            let extension = if kind == "-ptx" { "ptx" } else { "cubin" };
            jobs.push(cache.job(command, &version, &path, &format!("{}.{extension}", arch)));
        }
    }
    let made = cache.run(jobs)?;
    let mut images = Vec::new();
    let mut problems = String::new();
    for (i, made) in made.into_iter().enumerate() {
        let arch = archs[i % archs.len()];
        if arch.starts_with("sm_") {
            check_resources(&made, arch, rows, &mut resources, &mut problems);
        }
        note_smem(&made, rows)?;
        let image = compressed(&made.path, arch, &nvcc)?;
        images.push((made.file, arch.to_string(), image));
    }
    if problems.is_empty() { Ok((images, resources, String::new())) } else { Err(problems) }
}

/// The image as a compressed fatbin, which the driver takes too and which is a fifth as large; as it
/// is where there is no `fatbinary` beside nvcc.
fn compressed(image: &Path, arch: &str, nvcc: &Path) -> Result<PathBuf> {
    let fatbinary = nvcc.with_file_name("fatbinary");
    let made = PathBuf::from(format!("{}.fatbin", image.display()));
    if !fatbinary.is_file() {
        return Ok(image.to_owned());
    }
    if !made.is_file() {
        let part = format!("{}.part", made.display());
        let (kind, sm) = arch.split_once('_').unwrap_or_default();
        let kind = if kind == "sm" { "elf" } else { "ptx" };
        let mut command = Command::new(fatbinary);
        command.args(["-64", "--compress-all"]).arg(format!("--create={part}"));
        command.arg(format!("--image3=kind={kind},sm={sm},file={}", image.display()));
        output(&mut command)?;
        fs::rename(part, &made).map_err(text)?;
    }
    Ok(made)
}

/// Reads what ptxas says of each kernel, as
/// ```text
/// ptxas info    : Compiling entry function 'embed' for 'sm_80'
/// ptxas info    : Function properties for embed
///     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
/// ptxas info    : Used 18 registers, used 1 barriers, 32 bytes smem, 392 bytes cmem[0]
/// ```
fn check_resources(made: &Made, arch: &str, rows: &[Row], csv: &mut String, problems: &mut String) {
    let before = |line: &str, unit: &str| -> u32 {
        let number = line.split(unit).next().and_then(|s| s.rsplit([' ', ',']).next());
        if line.contains(unit) { number.and_then(|n| n.parse().ok()).unwrap_or(0) } else { 0 }
    };
    let mut kernel = "";
    let (mut stack, mut spills) = (0, 0);
    for line in made.log.lines() {
        if let Some(rest) = line.split("Compiling entry function '").nth(1) {
            kernel = rest.split('\'').next().unwrap_or("");
        } else if line.contains("bytes stack frame") {
            stack = before(line, " bytes stack frame");
            spills = before(line, " bytes spill stores") + before(line, " bytes spill loads");
        } else if line.contains(": Used ") {
            let registers = before(line, " registers");
            let smem = before(line, " bytes smem");
            let row = format!("{kernel},{arch},{registers},{smem},{stack},{spills}");
            let limit = rows.iter().find(|row| row.kernel == kernel).map(|row| row.max_registers);
            let at = format!("{}.cu: {kernel} for {arch}", made.file);
            let problem = match limit {
                None => format!("{at} has no KERNEL row of its own"),
                Some(n) if registers > n => format!("{at} uses {registers} registers, {n} allowed"),
                _ if spills > 0 => format!("{at} spills {spills} bytes"),
                _ if stack > 0 => format!("{at} has a stack frame of {stack} bytes"),
                _ => String::new(),
            };
            csv.push_str(&row);
            csv.push('\n');
            if !problem.is_empty() {
                problems.push_str(&problem);
                problems.push('\n');
            }
        }
    }
}

/// Takes what KERNEL puts beside each kernel, the number `<kernel>_smem`, out of an image or an
/// object of the twin.
fn note_smem(made: &Made, rows: &mut [Row]) -> Result<()> {
    let image = fs::read(&made.path).map_err(text)?;
    let found =
        if image.starts_with(b"\x7fELF") { elf_numbers(&image) } else { ptx_numbers(&image) };
    for row in rows.iter_mut().filter(|row| row.file == made.file) {
        let name = format!("{}_smem", row.kernel);
        let number = found.iter().find(|(found, _)| *found == name).map(|&(_, number)| number);
        if number.is_none() || row.smem.is_some_and(|before| Some(before) != number) {
            let (at, before) = (made.path.display(), row.smem);
            return Err(format!("{at}: {name} is {number:?}, elsewhere {before:?}"));
        }
        row.smem = number;
    }
    Ok(())
}

/// The symbols of an ELF file of 64 bits, little-endian, with the four bytes that they name.
fn elf_numbers(elf: &[u8]) -> Vec<(String, u32)> {
    let number = |at: usize, n: usize| {
        let bytes = elf.get(at..at + n).unwrap_or(&[]);
        bytes.iter().rev().fold(0usize, |number, &byte| number << 8 | usize::from(byte))
    };
    const SECTION: usize = 64;
    let (sections, n_sections) = (number(40, 8), number(60, 2));
    let section = |i: usize| sections + i * SECTION;
    let (kind, offset) = (|at| number(at + 4, 4), |at| number(at + 24, 8));
    let mut found = Vec::new();
    for table in (0..n_sections).map(section).filter(|&at| kind(at) == 2) {
        let names = offset(section(number(table + 40, 4)));
        for symbol in (0..number(table + 32, 8)).step_by(24).map(|at| offset(table) + at) {
            let name = elf.get(names + number(symbol, 4)..).unwrap_or(&[]);
            let name = name.split(|&byte| byte == 0).next().unwrap_or(&[]);
            let home = section(number(symbol + 6, 2));
            let is_zeros = kind(home) == 8; // without bytes in the file
            let value = if is_zeros { 0 } else { number(offset(home) + number(symbol + 8, 8), 4) };
            found.push((String::from_utf8_lossy(name).into_owned(), value as u32));
        }
    }
    found
}

/// The same of PTX: `.global .align 4 .u32 sample_smem = 18968;`, and without a number for 0.
fn ptx_numbers(ptx: &[u8]) -> Vec<(String, u32)> {
    let ptx = String::from_utf8_lossy(ptx);
    let numbers = ptx.lines().filter_map(|line| line.strip_prefix(".global .align 4 .u32 "));
    let number = |line: &str| {
        let (name, value) = line.trim_end_matches(';').split_once(" = ").unwrap_or((line, "0"));
        (name.trim_end_matches(';').to_string(), value.parse().unwrap_or(0))
    };
    numbers.map(number).collect()
}

fn find_nvcc() -> Option<PathBuf> {
    if let Some(nvcc) = env::var_os("NVCC") {
        return Some(nvcc.into());
    }
    let home = env::var_os("CUDA_HOME").map(|home| Path::new(&home).join("bin"));
    let path = env::var_os("PATH").unwrap_or_default();
    let mut folders: Vec<PathBuf> = home.into_iter().chain(env::split_paths(&path)).collect();
    folders.push("/usr/local/cuda/bin".into());
    for python in fs::read_dir("../.venv/lib").into_iter().flatten().flatten() {
        folders.push(python.path().join("site-packages/nvidia/cu13/bin"));
    }
    folders.into_iter().map(|folder| folder.join("nvcc")).find(|nvcc| nvcc.is_file())
}

fn build_twin(cache: &Cache, out: &Path, rows: &mut [Row]) -> Result<PathBuf> {
    let compiler = cc::Build::new().cpp(true).cargo_metadata(false).opt_level(2).get_compiler();
    let version = output(Command::new(compiler.path()).arg("--version"))?;
    let mut jobs = Vec::new();
    let kernels = ["kernels", "twin/faults"].into_iter().flat_map(|folder| sources(folder, "cu"));
    for path in kernels.chain(sources("twin", "cpp")) {
        let mut command = Command::new(compiler.path());
        let is_kernel = path.extension().is_some_and(|e| e == "cu");
        let flags: &[&str] = if is_kernel { &TWIN_KERNEL_FLAGS } else { &TWIN_CORE_FLAGS };
        command.args(TWIN_FLAGS).args(flags).arg(&path);
        jobs.push(cache.job(command, &version, &path, "o"));
    }
    let objects = cache.run(jobs)?;
    for made in &objects {
        note_smem(made, rows)?;
    }
    let library = out.join("libloris_twin.so");
    // Programs that run the old one keep it.
    let new = out.join("libloris_twin.so.new");
    let mut link = Command::new(compiler.path());
    link.args(["-shared", "-pthread", "-Wl,-z,defs", "-o"])
        .arg(&new)
        .args(objects.iter().map(|made| &made.path));
    output(link.arg("-ldl"))?;
    fs::rename(&new, &library).map_err(text)?;
    Ok(library)
}

/// Compiled files by the hash of what went into them.
struct Cache {
    folder: PathBuf,
    /// Where headers are that this script writes. It is no part of any hash, so that checkouts can
    /// share a folder.
    made_headers: PathBuf,
    /// Hash of all headers: any of them may be included anywhere.
    headers: u64,
}

/// One file to compile.
struct Job {
    command: Command,
    /// Stem of the source.
    file: String,
    /// What it becomes: `name` is `prefix`, a hash, `suffix`.
    path: PathBuf,
    name: String,
    prefix: String,
    suffix: String,
}

/// What came of it: the file and what the compiler said.
struct Made {
    file: String,
    path: PathBuf,
    log: String,
}

impl Cache {
    fn new(folder: PathBuf, made_headers: &Path, made: &[String]) -> Result<Self> {
        fs::create_dir_all(&folder).map_err(|e| format!("{}: {e}", folder.display()))?;
        let mut hasher = DefaultHasher::new();
        made.hash(&mut hasher);
        for (folder, extension) in
            [("include", "h"), ("include", "cuh"), ("include/kv", "cuh"), ("twin", "hpp")]
        {
            for path in sources(folder, extension) {
                (&path, fs::read(&path).ok()).hash(&mut hasher);
            }
        }
        let made_headers = made_headers.to_owned();
        Ok(Self { folder, made_headers, headers: hasher.finish() })
    }

    fn job(&self, mut command: Command, compiler: &str, source: &Path, extension: &str) -> Job {
        let mut hasher = DefaultHasher::new();
        (self.headers, compiler, format!("{command:?}"), fs::read(source).ok()).hash(&mut hasher);
        let place = source.with_extension("").display().to_string().replace('/', ".");
        let (prefix, suffix) = (format!("{place}-"), format!(".{extension}"));
        let name = format!("{prefix}{:016x}{suffix}", hasher.finish());
        command.arg("-I").arg(&self.made_headers);
        Job { command, file: stem(source), path: self.folder.join(&name), prefix, suffix, name }
    }

    /// Runs jobs side by side, then removes what earlier versions of their sources came to.
    fn run(&self, mut jobs: Vec<Job>) -> Result<Vec<Made>> {
        let n_workers = env::var("NUM_JOBS").ok().and_then(|n| n.parse().ok()).unwrap_or(1usize);
        let next = AtomicUsize::new(0);
        let queue: Vec<_> = jobs.iter_mut().map(std::sync::Mutex::new).collect();
        let mut problems = String::new();
        std::thread::scope(|scope| {
            let work = || {
                let mut problems = String::new();
                while let Some(job) = queue.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if let Err(problem) = job.lock().map_err(text).and_then(|mut job| job.make()) {
                        problems += &problem;
                    }
                }
                problems
            };
            let workers: Vec<_> = (0..n_workers).map(|_| scope.spawn(work)).collect();
            for worker in workers {
                problems += &worker.join().unwrap_or_else(|_| "a worker panicked".into());
            }
        });
        if !problems.is_empty() {
            return Err(problems);
        }
        for file in fs::read_dir(&self.folder).into_iter().flatten().flatten() {
            if jobs.iter().any(|job| job.replaces(&file.file_name().to_string_lossy())) {
                fs::remove_file(file.path()).map_err(text)?;
            }
        }
        let read = |job: Job| {
            let log = fs::read_to_string(job.log()).map_err(text)?;
            Ok(Made { file: job.file, path: job.path, log })
        };
        jobs.into_iter().map(read).collect()
    }
}

impl Job {
    fn make(&mut self) -> Result<()> {
        if self.path.is_file() {
            return Ok(());
        }
        let part = self.path.with_file_name(format!("{}.part", self.name));
        let log = output(self.command.arg("-o").arg(&part))?;
        fs::write(self.log(), log).map_err(text)?;
        fs::rename(&part, &self.path).map_err(text)
    }

    /// What the compiler said.
    fn log(&self) -> PathBuf {
        self.path.with_file_name(format!("{}.log", self.name))
    }

    /// Whether a file of the cache is of another version of this source.
    fn replaces(&self, file: &str) -> bool {
        let file = [".log", ".fatbin"].iter().find_map(|of| file.strip_suffix(of)).unwrap_or(file);
        file != self.name && file.starts_with(&self.prefix) && file.ends_with(&self.suffix)
    }
}

/// Runs a command; what it wrote, or an error with that.
fn output(command: &mut Command) -> Result<String> {
    let done = command.output().map_err(|e| format!("{command:?}: {e}\n"))?;
    let said = [done.stdout, done.stderr].concat();
    let said = String::from_utf8_lossy(&said).into_owned();
    if done.status.success() {
        Ok(said)
    } else {
        Err(format!("{command:?}: {}\n{said}\n", done.status))
    }
}

/// The files of a folder with this extension, sorted.
fn sources(folder: &str, extension: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let paths = entries.map(|entry| entry.path());
    let mut found: Vec<_> =
        paths.filter(|path| path.extension().is_some_and(|e| e == extension)).collect();
    found.sort();
    found
}

fn stem(path: &Path) -> String {
    path.file_stem().unwrap_or_default().to_string_lossy().into_owned()
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}
