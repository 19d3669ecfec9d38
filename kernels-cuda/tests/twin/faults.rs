//! Each planted fault is found under its own name, and the same kernel without it passes, in every order.

use crate::cu;
use crate::driver::{ILLEGAL_ADDRESS, LAUNCH_FAILED, Twin, set_seed, text};

#[repr(C)]
struct FaultArgs {
    input: u64,
    output: u64,
    n: u32,
    broken: u32,
}

const N_INPUT: u32 = 512;
const N_OUTPUT: usize = 1024;
const SMEM_BYTES: u32 = 4096;
const N_SEEDS: u64 = 10;

/// Kernel, blocks, code, and what the text must say.
#[rustfmt::skip]
const FAULTS: &[(&str, u32, i32, &str)] = &[
    ("cp_wait",          1, LAUNCH_FAILED,   "into which a copy of thread"),
    ("cp_sync",          1, LAUNCH_FAILED,   "with no barrier between"),
    ("raw",              1, LAUNCH_FAILED,   "with no barrier between"),
    ("raw_warp",         1, LAUNCH_FAILED,   "with no barrier between"),
    ("war",              1, LAUNCH_FAILED,   "with no barrier between"),
    ("waw",              1, LAUNCH_FAILED,   "wrote with no barrier between"),
    ("named_race",       1, LAUNCH_FAILED,   "with no barrier between"),
    ("named_counts",     1, LAUNCH_FAILED,   "barrier 3: waits for"),
    ("deadlock",         1, LAUNCH_FAILED,   "deadlock:"),
    ("divergent",        1, LAUNCH_FAILED,   "divergent collective"),
    ("early_exit",       1, LAUNCH_FAILED,   "divergent collective"),
    ("unwritten",        1, ILLEGAL_ADDRESS, "reads shared byte 20, which nobody has written"),
    ("unwritten_ldsm",   1, ILLEGAL_ADDRESS, "which nobody has written"),
    ("bounds_smem",      1, ILLEGAL_ADDRESS, "writes 4 bytes at byte 4096 of 4096 bytes of shared memory"),
    ("bounds_read",      1, ILLEGAL_ADDRESS, "0 bytes past the end of the 2048 bytes at"),
    ("bounds_write",     1, ILLEGAL_ADDRESS, "out of bounds: writes 4 bytes"),
    ("bounds_copy",      1, ILLEGAL_ADDRESS, "out of bounds: copies 16 bytes"),
    ("bounds_memcpy",    1, ILLEGAL_ADDRESS, "out of bounds: reads 2052 bytes"),
    ("misaligned",       1, ILLEGAL_ADDRESS, "misaligned: reads 16 bytes"),
    ("misaligned_plain", 1, ILLEGAL_ADDRESS, "is no multiple of 16"),
    ("static",           1, ILLEGAL_ADDRESS, "out of bounds: writes 4 bytes"),
    ("blocks_waw",       2, LAUNCH_FAILED,   "which block number"),
    ("trap",             1, LAUNCH_FAILED,   "thread 77: trap"),
];

#[test]
fn planted_faults_are_found_in_every_order() {
    for seed in 0..N_SEEDS {
        set_seed(seed);
        for &(name, grid, code, words) in FAULTS {
            let (found, text) = run(name, grid, 1).expect_err(name);
            assert!(found == code && text.contains(words), "{name}, seed {seed}: {found}, {text}");
            assert!(text.contains(&format!("kernel twin_fault_{name}, block (")), "{text}");
        }
    }
}

#[test]
fn the_same_kernels_without_the_fault_pass() {
    for seed in 0..N_SEEDS {
        set_seed(seed);
        for &(name, grid, ..) in FAULTS {
            run(name, grid, 0).unwrap_or_else(|e| panic!("{name}, seed {seed}: {e:?}"));
        }
        run("blocks_raw", 2, 0).unwrap();
    }
}

/// Blocks run one after another: a read before the other block's write goes unseen, in another order it is seen.
#[test]
fn a_race_between_blocks_shows_in_some_order() {
    let is_found = |seed| {
        set_seed(seed);
        run("blocks_raw", 2, 1).is_err_and(|(_, text)| text.contains("which block number"))
    };
    assert!((0..N_SEEDS).any(is_found));
}

#[test]
fn freed_memory_is_out_of_bounds() {
    let twin = Twin::open();
    let input = twin.upload(&[1; N_INPUT as usize]);
    let output = twin.alloc(N_OUTPUT);
    assert_eq!(cu!(cuMemFree_v2(input => u64)), 0);
    let args = FaultArgs { input, output, n: N_INPUT, broken: 0 };
    let (code, text) = twin.run("twin_fault_trap", 1, [128, SMEM_BYTES], &args).unwrap_err();
    assert!(
        code == ILLEGAL_ADDRESS && text.contains("0 bytes into 2048 bytes that have been freed"),
        "{text}"
    );
}

/// As on a device: once a kernel has failed, everything fails until the context is gone.
#[test]
fn a_fault_stays_with_its_context() {
    let twin = Twin::open();
    let input = twin.upload(&[1; N_INPUT as usize]);
    let output = twin.alloc(N_OUTPUT);
    let args = FaultArgs { input, output, n: N_INPUT, broken: 1 };
    let (code, first) = twin.run("twin_fault_trap", 1, [128, SMEM_BYTES], &args).unwrap_err();
    assert_eq!(twin.write(input, &[0]), code);
    assert_eq!(cu!(cuCtxSynchronize()), code);
    assert_eq!(text(code), first);
    assert_eq!(cu!(cuMemFree_v2(input => u64)), code);
    drop(twin);
    assert!(Twin::open().function("twin_fault_trap").is_ok());
}

/// Runs one kernel in a context of its own.
fn run(name: &str, grid: u32, broken: u32) -> Result<(), (i32, String)> {
    let twin = Twin::open();
    let words: Vec<u32> = (0..N_INPUT).collect();
    let input = twin.upload(&words);
    let output = twin.upload(&[0; N_OUTPUT]);
    let args = FaultArgs { input, output, n: N_INPUT, broken };
    twin.run(&format!("twin_fault_{name}"), grid, [128, SMEM_BYTES], &args)
}
