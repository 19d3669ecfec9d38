//! Gives `libloris.so` its soname: the name that programs look for, which changes with the ABI's major version.

fn main() {
    println!("cargo::rerun-if-changed=engine/build.rs");
    println!("cargo::rerun-if-env-changed=LORIS_COMMIT");
    let os = std::env::var("CARGO_CFG_TARGET_OS").unwrap_or_default();
    if os == "linux" {
        println!("cargo::rustc-cdylib-link-arg=-Wl,-soname,libloris.so.0");
    }
}
