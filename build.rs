//! Build script of `kernels-cuda`: kernels to images, and the twin.
//!
//! **Images.** nvcc, if there is one, makes of each kernel file a cubin for each architecture, and
//! PTX. What ptxas says about registers is held against the comment on the kernel's row, `// <= N
//! registers`: more registers, a spill or a stack frame fail the build. Without nvcc the build goes
//! on and the library has no images.
//!
//! **The twin.** With the feature `twin` the same kernel files and the driver in `twin/` become a
//! shared library, by the host's C++ compiler.
//!
//! What was compiled is kept in `target/kernels` under the hash of all that went into it, so that a
//! change of one kernel compiles one kernel.
//!
//! Environment: `NVCC`, `CUDA_HOME`; `LORIS_CUDA_ARCHS` is `none` or a list like `sm_80,compute_80`
//! of what to build instead of all.

use std::collections::hash_map::DefaultHasher;
use std::fmt::Write as _;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::{env, fs};

type Result<T> = std::result::Result<T, String>;

/// PTX is for devices newer than the toolkit.
const ARCHS: [&str; 4] = ["sm_80", "sm_89", "sm_90a", "compute_80"];
const NVCC_FLAGS: [&str; 5] = ["-std=c++17", "-O3", "-lineinfo", "-Iinclude", "-Xptxas=-v"];
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
    for variable in ["NVCC", "CUDA_HOME", "LORIS_CUDA_ARCHS", "CXX"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);
    // OUT_DIR is <target>/<profile>/build/<package>/out.
    let target = out.ancestors().nth(4).ok_or("OUT_DIR is too short")?;
    let cache = Cache::new(target.join("kernels"))?;

    let rows = kernel_rows()?;
    let (images, resources, why_none) = build_images(&cache, &rows)?;
    let mut code = format!("pub(crate) const NO_IMAGES: &str = {why_none:?};\n");
    if env::var_os("CARGO_FEATURE_TWIN").is_some() {
        let twin = build_twin(&cache, &out)?;
        writeln!(code, "pub(crate) const TWIN: &str = {twin:?};").map_err(text)?;
    }
    writeln!(code, "pub(crate) static KERNELS: &[(&str, &str)] = &[").map_err(text)?;
    for row in &rows {
        writeln!(code, "    ({:?}, {:?}),", row.kernel, row.file).map_err(text)?;
    }
    writeln!(code, "];\npub(crate) static IMAGES: &[Image] = &[").map_err(text)?;
    for (file, arch, path) in images {
        let data = format!("include_bytes!({path:?})");
        writeln!(code, "    Image {{ file: {file:?}, arch: {arch:?}, data: {data} }},")
            .map_err(text)?;
    }
    code += "];\n";
    fs::write(out.join("images.rs"), code).map_err(text)?;
    fs::write(out.join("resources.csv"), resources).map_err(text)
}

/// A `KERNEL(...)` row of a kernel file.
struct Row {
    kernel: String,
    file: String,
    max_registers: u32,
}

fn kernel_rows() -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for path in sources("kernels", "cu") {
        let source = fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        let file = stem(&path);
        for row in source.split("\nKERNEL(").skip(1) {
            let kernel = row.split([',', ')']).next().unwrap_or("").trim().to_string();
            let comment = row.split("// <= ").nth(1).and_then(|rest| rest.split(' ').next());
            let max_registers = comment.and_then(|n| n.parse().ok()).ok_or_else(|| {
                format!("{file}.cu: the row of {kernel} lacks its comment `// <= N registers`")
            })?;
            rows.push(Row { kernel, file: file.clone(), max_registers });
        }
    }
    Ok(rows)
}

/// (file, architecture, path of the image), the table of resources, and why there are no images.
type Images = (Vec<(String, String, PathBuf)>, String, String);

fn build_images(cache: &Cache, rows: &[Row]) -> Result<Images> {
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

    let mut jobs = Vec::new();
    for path in sources("kernels", "cu") {
        for arch in &archs {
            let kind = if arch.starts_with("sm_") { "-cubin" } else { "-ptx" };
            let mut command = Command::new(&nvcc);
            command.args(NVCC_FLAGS).arg(format!("-arch={arch}")).arg(kind).arg(&path);
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
        images.push((made.file, arch.to_string(), made.path));
    }
    if problems.is_empty() { Ok((images, resources, String::new())) } else { Err(problems) }
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

fn build_twin(cache: &Cache, out: &Path) -> Result<PathBuf> {
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
    fn new(folder: PathBuf) -> Result<Self> {
        fs::create_dir_all(&folder).map_err(|e| format!("{}: {e}", folder.display()))?;
        let mut hasher = DefaultHasher::new();
        for (folder, extension) in [("include", "h"), ("include", "cuh"), ("twin", "hpp")] {
            for path in sources(folder, extension) {
                (&path, fs::read(&path).ok()).hash(&mut hasher);
            }
        }
        Ok(Self { folder, headers: hasher.finish() })
    }

    fn job(&self, command: Command, compiler: &str, source: &Path, extension: &str) -> Job {
        let mut hasher = DefaultHasher::new();
        (self.headers, compiler, format!("{command:?}"), fs::read(source).ok()).hash(&mut hasher);
        let place = source.with_extension("").display().to_string().replace('/', ".");
        let (prefix, suffix) = (format!("{place}-"), format!(".{extension}"));
        let name = format!("{prefix}{:016x}{suffix}", hasher.finish());
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
        let file = file.strip_suffix(".log").unwrap_or(file);
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
