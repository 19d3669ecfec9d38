//! The C ABI as C programs meet it.
#![allow(clippy::unwrap_used)]

#[path = "capi/abi.rs"]
mod abi;
#[path = "capi/programs.rs"]
mod programs;
