//! `src/abi.rs` and `src/cuda.rs` of loris-kernels are what bindgen makes of `include/abi.h` and of
//! CUDA's `cuda.h`. The test is here so that tests of kernels are built without bindgen.
//!
//! `LORIS_BLESS=1` writes them. Skipped where there is no libclang or no `cuda.h`:
//! `scripts/cuda-tools` puts both into `.venv`.

#![allow(clippy::print_stderr)] // says that it was skipped

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What `src/driver_ext.rs` and `src/graph.rs` call beyond cust.
const FUNCTIONS: &str = "cu(DeviceGetAttribute|FuncSetAttribute|GetErrorName|GetErrorString|GraphDestroy|\
    GraphExecDestroy|GraphInstantiateWithFlags|GraphLaunch|LaunchKernel|StreamBeginCapture_v2|StreamCreate|\
    StreamEndCapture)";
/// Structs of `abi.h` without padding, which buffers hold.
const POD: [&str; 4] = ["LorisSeq", "LorisQTile", "LorisSampling", "LorisLogitChange"];

/// The enumerators that are used.
const ENUMERATORS: [&str; 3] = [
    "CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN",
    "CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES",
    "CU_STREAM_CAPTURE_MODE_THREAD_LOCAL",
];

/// Gives the structs of [`POD`] what `Buffer` asks of an element and leaves out enumerators.
#[derive(Debug)]
struct Choices;

impl bindgen::callbacks::ParseCallbacks for Choices {
    fn enum_variant_behavior(
        &self,
        _: Option<&str>,
        name: &str,
        _: bindgen::callbacks::EnumVariantValue,
    ) -> Option<bindgen::callbacks::EnumVariantCustomBehavior> {
        let used = ENUMERATORS.contains(&name);
        (!used).then_some(bindgen::callbacks::EnumVariantCustomBehavior::Hide)
    }

    fn add_derives(&self, info: &bindgen::callbacks::DeriveInfo<'_>) -> Vec<String> {
        let derives = ["Default", "PartialEq", "bytemuck::Pod", "bytemuck::Zeroable"];
        if POD.contains(&info.name) { derives.map(String::from).to_vec() } else { Vec::new() }
    }
}

/// The folder of loris-kernels.
fn package() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

/// The first existing `relative` path below a Python environment's packages or the folder of an
/// environment variable.
fn find(variable: &str, relative: &[&str]) -> Option<PathBuf> {
    let environments =
        [env::var_os("VIRTUAL_ENV").map(PathBuf::from), Some(package().join("../.venv"))];
    let versions = environments.into_iter().flatten().filter_map(|e| e.join("lib").read_dir().ok());
    let packages = versions.flatten().flatten().map(|python| python.path().join("site-packages"));
    let roots: Vec<PathBuf> =
        env::var_os(variable).map(PathBuf::from).into_iter().chain(packages).collect();
    roots
        .iter()
        .flat_map(|root| relative.iter().map(move |r| root.join(r)))
        .find(|path| path.exists())
}

/// A builder that knows where headers are, or `None` without libclang.
fn builder(header: &Path) -> Option<bindgen::Builder> {
    let library = find("LIBCLANG_PATH", &["libclang.so", "clang/native/libclang.so"]);
    let Some(folder) = library.as_deref().and_then(Path::parent) else {
        eprintln!("skipped: no libclang; see scripts/cuda-tools");
        return None;
    };
    // SAFETY: the tests of this file hold a lock here, and nothing else reads the environment
    // meanwhile.
    unsafe { env::set_var("LIBCLANG_PATH", folder) };
    let include =
        Command::new("cc").arg("-print-file-name=include").output().expect("cc runs").stdout;
    let include = String::from_utf8(include).expect("a path");
    Some(
        bindgen::Builder::default()
            .header(header.to_str().expect("a path in UTF-8"))
            .clang_arg(format!("-I{}", include.trim()))
            .layout_tests(false)
            .formatter(bindgen::Formatter::Prettyplease)
            .disable_header_comment(),
    )
}

fn check(name: &str, head: &str, bindings: bindgen::Builder) {
    let path = package().join("src").join(name);
    let fresh = format!("{head}\n{}", bindings.generate().expect("bindgen understands the header"));
    if env::var_os("LORIS_BLESS").is_some() {
        std::fs::write(&path, fresh).expect("the file is writable");
    } else {
        let committed = std::fs::read_to_string(&path).expect("the file is committed");
        assert!(committed == fresh, "{name} is out of date: run this test with LORIS_BLESS=1");
    }
}

#[test]
fn bindings_are_fresh() {
    if let Some(builder) = builder(&package().join("include/abi.h")) {
        let head = "//! What the host passes to kernels: `include/abi.h`, written by `driver/tests/bindings.rs`.\n";
        let bindings = builder
            .allowlist_file(".*/abi\\.h")
            .clang_arg("-fparse-all-comments")
            .parse_callbacks(Box::new(Choices));
        check("abi.rs", head, bindings);
    }
    let headers = ["include/cuda.h", "nvidia/cu13/include/cuda.h"];
    let Some(cuda_h) = find("CUDA_HOME", &headers) else {
        eprintln!("skipped: no cuda.h; see scripts/cuda-tools");
        return;
    };
    if let Some(builder) = builder(&cuda_h) {
        let head =
            "//! The part of `cuda.h` that cust lacks, written by `driver/tests/bindings.rs`.\n";
        let bindings = builder
            .allowlist_function(FUNCTIONS)
            .blocklist_type("CUresult|cudaError_enum")
            .raw_line("pub type CUresult = u32;")
            .prepend_enum_name(false)
            .parse_callbacks(Box::new(Choices))
            .generate_comments(false);
        check("cuda.rs", head, bindings);
    }
}
