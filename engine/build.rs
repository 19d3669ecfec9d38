//! Gives `libloris.so` its soname - the name that programs look for, which changes with the ABI's major version -
//! and keeps it in the process once it is loaded.

fn main() {
    println!("cargo::rerun-if-changed=engine/build.rs");
    println!("cargo::rerun-if-env-changed=LORIS_COMMIT");
    let os = std::env::var("CARGO_CFG_TARGET_OS").unwrap_or_default();
    if os == "linux" {
        println!("cargo::rustc-cdylib-link-arg=-Wl,-soname,libloris.so.0");
        // A Rust library has state a thread and a process that unloading would lose track of.
        println!("cargo::rustc-cdylib-link-arg=-Wl,-z,nodelete");
    }
}
