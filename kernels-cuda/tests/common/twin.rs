//! What the twin lets tests switch and see, beside its driver functions: of the calling thread.
#![allow(dead_code, unreachable_pub)] // each test uses its part

use std::ffi::{CStr, c_char, c_int};

/// The twin, loaded already or not.
#[derive(Debug)]
pub struct Twin(libloading::Library);

impl Twin {
    pub fn get() -> Self {
        // SAFETY: the twin's initialisers do nothing but set variables.
        Self(unsafe { libloading::Library::new(loris_kernels::TWIN) }.expect("the twin is built"))
    }

    fn function<F: Copy>(&self, name: &str) -> F {
        // SAFETY: the types are those of `twin/state.cpp`.
        *unsafe { self.0.get::<F>(name.as_bytes()) }.expect("the twin has it")
    }

    /// Driver calls so far.
    pub fn calls(&self) -> u64 {
        self.function::<extern "C" fn() -> u64>("loris_twin_calls")()
    }

    /// Driver calls that `work` makes.
    pub fn calls_of<T>(&self, work: impl FnOnce() -> T) -> i64 {
        let before = self.calls();
        work();
        (self.calls() - before).try_into().expect("few")
    }

    /// Makes the `n`th call from now on (0: the next) return `code`, instead of doing anything.
    pub fn fail_call(&self, n: i64, code: c_int) {
        self.function::<extern "C" fn(i64, c_int)>("loris_twin_fail_call")(n, code);
    }

    /// Runs `work` with its `n`th call failing.
    pub fn failing<T>(&self, n: i64, code: c_int, work: impl FnOnce() -> T) -> T {
        self.fail_call(n, code);
        let out = work();
        self.fail_call(-1, 0);
        out
    }

    /// Device memory of contexts that are made from now on.
    pub fn set_memory(&self, n_bytes: usize) {
        self.function::<extern "C" fn(usize)>("loris_twin_set_memory")(n_bytes);
    }

    /// The order in which threads of kernels run.
    pub fn set_seed(&self, seed: u64) {
        self.function::<extern "C" fn(u64)>("loris_twin_set_seed")(seed);
    }

    /// What was made and has not ended: contexts, memory, streams, modules, events, graphs.
    pub fn leaks(&self) -> String {
        let leaks: extern "C" fn(*mut *const c_char) -> usize = self.function("loris_twin_leaks");
        let mut text = std::ptr::null();
        leaks(&mut text);
        if text.is_null() {
            return String::new();
        }
        // SAFETY: the text ends in zero and stays until the next call.
        unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
    }
}
