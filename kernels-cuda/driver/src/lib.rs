//! What the build scripts of `cust` and `cust_raw` ask for CUDA.
//!
//! The crate of this name demands a CUDA installation and links libcuda, so that a binary does not start
//! where there is no driver. This one, put in its place by `[patch.crates-io]`, compiles `libcuda.c` into
//! `cust_raw` instead: functions of the same names that look the driver up at their first call.
#![allow(clippy::print_stdout)] // build scripts talk to cargo so

use std::path::Path;

/// Called by the build scripts of `cust` and `cust_raw`.
pub fn include_cuda() {
    if std::env::var("CARGO_PKG_NAME").as_deref() != Ok("cust_raw") {
        return;
    }
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    for file in ["libcuda.c", "trampolines.h"] {
        println!("cargo::rerun-if-changed={}", folder.join(file).display());
    }
    cc::Build::new()
        .file(folder.join("libcuda.c"))
        .flag("-fvisibility=hidden")
        .warnings_into_errors(true)
        .compile("loris_libcuda");
    println!("cargo::rustc-link-lib=dylib=dl");
}
