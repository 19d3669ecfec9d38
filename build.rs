//! Build script of `kernels-cuda`.
//!
//! The crate holds no kernel sources yet, so there is nothing to compile: the CPU backend is pure Rust.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
}
