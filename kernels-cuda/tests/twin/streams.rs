//! Streams, events, capture, memory and handles behave as the driver's, or stricter: nothing asynchronous has
//! happened before a call needs it.

use std::ptr;

use crate::cu;
use crate::driver::{
    Handle, INVALID_HANDLE, INVALID_VALUE, NOT_FOUND, NOT_READY, OUT_OF_MEMORY, Twin, leaks,
    set_seed, text,
};

const NON_BLOCKING: u32 = 1;
const CAPTURE_UNSUPPORTED: i32 = 900;
const CAPTURE_INVALIDATED: i32 = 901;

/// out = out * multiply + add, 32 words: work whose order shows.
#[repr(C)]
struct StepArgs {
    output: u64,
    multiply: u32,
    add: u32,
}

fn stream(flags: u32) -> Handle {
    let mut stream: Handle = ptr::null_mut();
    assert_eq!(cu!(cuStreamCreate(&mut stream => *mut Handle, flags => u32)), 0);
    stream
}

fn event() -> Handle {
    let mut event: Handle = ptr::null_mut();
    assert_eq!(cu!(cuEventCreate(&mut event => *mut Handle, 0 => u32)), 0);
    event
}

fn step(twin: &Twin, stream: Handle, output: u64, multiply: u32, add: u32) -> i32 {
    twin.launch_in(stream, "twin_step", [1, 1, 1], [32, 0], &StepArgs { output, multiply, add })
}

fn copy_back(to: &mut [u32], from: u64, stream: Handle) -> i32 {
    let n_bytes = size_of_val(to);
    cu!(cuMemcpyDtoHAsync_v2(to.as_mut_ptr() => *mut u32, from => u64, n_bytes => usize, stream => Handle))
}

#[test]
fn asynchronous_work_waits_for_a_synchronising_call() {
    let twin = Twin::open();
    let s = stream(NON_BLOCKING);
    let output = twin.upload(&[1; 32]);
    let mut back = [77u32; 32];
    assert_eq!(step(&twin, s, output, 10, 2), 0);
    assert_eq!(step(&twin, s, output, 10, 3), 0);
    assert_eq!(copy_back(&mut back, output, s), 0);
    assert_eq!(back, [77; 32], "nothing has synchronised");
    assert_eq!(cu!(cuStreamSynchronize(s => Handle)), 0);
    assert_eq!(back, [123; 32]);
    cu!(cuStreamDestroy_v2(s => Handle));
}

/// A host buffer that is reused before the copy has run shows its new contents on the device.
#[test]
fn host_buffers_are_read_when_the_copy_runs() {
    let twin = Twin::open();
    let s = stream(NON_BLOCKING);
    let output = twin.alloc(32);
    let mut words = [5u32; 32];
    let from = words.as_mut_ptr();
    assert_eq!(
        cu!(cuMemcpyHtoDAsync_v2(output => u64, from => *mut u32, 128 => usize, s => Handle)),
        0
    );
    words.fill(6);
    assert_eq!(cu!(cuStreamSynchronize(s => Handle)), 0);
    assert_eq!(twin.read(output, 32), [6; 32]);
    cu!(cuStreamDestroy_v2(s => Handle));
}

/// The null stream waits for blocking streams and they for it; a non-blocking stream is left alone.
#[test]
fn the_null_stream_orders_blocking_streams_only() {
    let twin = Twin::open();
    for (flags, want) in [(0, 12), (NON_BLOCKING, 1)] {
        let s = stream(flags);
        let output = twin.upload(&[1; 32]);
        assert_eq!(step(&twin, s, output, 10, 2), 0);
        assert_eq!(twin.read(output, 32), [want; 32]);
        assert_eq!(cu!(cuStreamDestroy_v2(s => Handle)), 0);
        assert_eq!(twin.read(output, 32), [12; 32]);
    }
    let s = stream(0);
    let output = twin.upload(&[1; 32]);
    assert_eq!(step(&twin, ptr::null_mut(), output, 10, 2), 0);
    assert_eq!(step(&twin, s, output, 10, 3), 0);
    assert_eq!(step(&twin, ptr::null_mut(), output, 10, 4), 0);
    assert_eq!(cu!(cuStreamSynchronize(s => Handle)), 0);
    assert_eq!(cu!(cuStreamSynchronize(ptr::null_mut() => Handle)), 0);
    assert_eq!(twin.read(output, 32), [1234; 32]);
    cu!(cuStreamDestroy_v2(s => Handle));
}

#[test]
fn events_order_streams() {
    for seed in 0..10 {
        set_seed(seed);
        let twin = Twin::open();
        let (first, second) = (stream(NON_BLOCKING), stream(NON_BLOCKING));
        let (e, output) = (event(), twin.upload(&[1; 32]));
        assert_eq!(step(&twin, first, output, 10, 2), 0);
        assert_eq!(cu!(cuEventRecord(e => Handle, first => Handle)), 0);
        assert_eq!(cu!(cuStreamWaitEvent(second => Handle, e => Handle, 0 => u32)), 0);
        assert_eq!(step(&twin, second, output, 10, 3), 0);
        assert_eq!(step(&twin, first, output, 1, 0), 0);
        assert_eq!(cu!(cuStreamSynchronize(second => Handle)), 0);
        assert_eq!(cu!(cuCtxSynchronize()), 0);
        assert_eq!(twin.read(output, 32), [123; 32], "seed {seed}");
        cu!(cuEventDestroy_v2(e => Handle));
        cu!(cuStreamDestroy_v2(first => Handle));
        cu!(cuStreamDestroy_v2(second => Handle));
    }
}

#[test]
fn events_tell_time_and_progress() {
    let twin = Twin::open();
    let s = stream(NON_BLOCKING);
    let (from, to, output) = (event(), event(), twin.upload(&[1; 32]));
    let mut elapsed = -1.0f32;
    let mut ask =
        || cu!(cuEventElapsedTime(&mut elapsed => *mut f32, from => Handle, to => Handle));
    assert_eq!(ask(), INVALID_HANDLE, "neither is recorded");
    assert_eq!(cu!(cuEventQuery(to => Handle)), 0, "nothing to wait for");
    cu!(cuEventRecord(from => Handle, s => Handle));
    step(&twin, s, output, 1, 1);
    cu!(cuEventRecord(to => Handle, s => Handle));
    assert_eq!(ask(), NOT_READY);
    assert_eq!(cu!(cuEventQuery(to => Handle)), NOT_READY);
    assert_eq!(cu!(cuEventQuery(to => Handle)), 0);
    assert_eq!(ask(), 0);
    assert!(elapsed >= 0.0);
    cu!(cuEventDestroy_v2(from => Handle));
    assert_eq!(cu!(cuEventDestroy_v2(to => Handle)), 0);
    assert_eq!(cu!(cuEventDestroy_v2(to => Handle)), INVALID_HANDLE, "destroyed twice");
    assert_eq!(cu!(cuEventSynchronize(to => Handle)), INVALID_HANDLE, "used when destroyed");
    cu!(cuStreamDestroy_v2(s => Handle));
}

fn begin(s: Handle) {
    assert_eq!(cu!(cuStreamBeginCapture_v2(s => Handle, 1 => u32)), 0);
}

fn end(s: Handle) -> Result<Handle, i32> {
    let mut graph: Handle = ptr::null_mut();
    match cu!(cuStreamEndCapture(s => Handle, &mut graph => *mut Handle)) {
        0 => Ok(graph),
        code => Err(code),
    }
}

#[test]
fn a_captured_graph_runs_as_often_as_it_is_launched() {
    let twin = Twin::open();
    let s = stream(NON_BLOCKING);
    let output = twin.upload(&[0; 32]);
    let mut status = 0;
    begin(s);
    assert_eq!(cu!(cuStreamIsCapturing(s => Handle, &mut status => *mut i32)), 0);
    assert_eq!(status, 1);
    {
        let mut args = StepArgs { output, multiply: 10, add: 1 };
        assert_eq!(twin.launch_in(s, "twin_step", [1, 1, 1], [32, 0], &args), 0);
        args.add = 2;
        assert_eq!(twin.launch_in(s, "twin_step", [1, 1, 1], [32, 0], &args), 0);
        args.output = 0;
        std::hint::black_box(&args); // what was captured keeps its arguments
    }
    let graph = end(s).unwrap();
    assert_eq!(cu!(cuStreamSynchronize(s => Handle)), 0);
    assert_eq!(twin.read(output, 32), [0; 32], "captured work has not run");
    let mut exec: Handle = ptr::null_mut();
    assert_eq!(
        cu!(cuGraphInstantiateWithFlags(&mut exec => *mut Handle, graph => Handle, 0 => u64)),
        0
    );
    assert_eq!(cu!(cuGraphDestroy(graph => Handle)), 0);
    for want in [12, 1212, 121212] {
        assert_eq!(cu!(cuGraphLaunch(exec => Handle, s => Handle)), 0);
        assert_eq!(cu!(cuStreamSynchronize(s => Handle)), 0);
        assert_eq!(twin.read(output, 32), [want; 32]);
    }
    assert_eq!(cu!(cuGraphExecDestroy(exec => Handle)), 0);
    assert_eq!(
        cu!(cuGraphLaunch(exec => Handle, s => Handle)),
        INVALID_VALUE,
        "used when destroyed"
    );
    cu!(cuStreamDestroy_v2(s => Handle));
}

/// Calls that would wait, allocate or copy at once end a capture; so does a copy to memory that may move.
#[test]
fn what_cannot_be_captured_ends_the_capture() {
    let twin = Twin::open();
    let s = stream(NON_BLOCKING);
    let output = twin.upload(&[0; 32]);
    let calls: [(&str, &dyn Fn() -> i32); 5] = [
        ("synchronise", &|| cu!(cuStreamSynchronize(s => Handle))),
        ("wait for all", &|| cu!(cuCtxSynchronize())),
        ("allocate", &|| cu!(cuMemAlloc_v2(&mut 0u64 => *mut u64, 64 => usize))),
        ("copy", &|| twin.write(output, &[1])),
        ("pageable copy", &|| copy_back(&mut [0], output, s)),
    ];
    for (what, call) in calls {
        begin(s);
        assert_eq!(call(), CAPTURE_UNSUPPORTED, "{what}");
        assert_eq!(step(&twin, s, output, 1, 1), CAPTURE_INVALIDATED, "{what}");
        assert_eq!(end(s), Err(CAPTURE_INVALIDATED), "{what}");
    }
    begin(s);
    let mut pinned: Handle = ptr::null_mut();
    assert_eq!(end(s).map(|graph| cu!(cuGraphDestroy(graph => Handle))), Ok(0));
    assert_eq!(cu!(cuMemAllocHost_v2(&mut pinned => *mut Handle, 128 => usize)), 0);
    begin(s);
    assert_eq!(
        cu!(cuMemcpyHtoDAsync_v2(output => u64, pinned => Handle, 128 => usize, s => Handle)),
        0
    );
    assert_eq!(end(s).map(|graph| cu!(cuGraphDestroy(graph => Handle))), Ok(0));
    assert_eq!(cu!(cuMemFreeHost(pinned => Handle)), 0);
    cu!(cuStreamDestroy_v2(s => Handle));
}

#[test]
fn launches_are_checked() {
    let twin = Twin::open();
    let output = twin.upload(&[0; 32]);
    let args = StepArgs { output, multiply: 1, add: 1 };
    let launch = |grid, shape| twin.launch_in(ptr::null_mut(), "twin_step", grid, shape, &args);
    assert_eq!(launch([1, 1, 1], [64, 0]), INVALID_VALUE, "not the kernel's threads");
    assert_eq!(launch([1, 1, 0], [32, 0]), INVALID_VALUE, "an empty grid");
    assert_eq!(launch([1, 65536, 1], [32, 0]), INVALID_VALUE, "too many blocks");
    assert_eq!(launch([1, 1, 1], [32, 49153]), INVALID_VALUE, "more shared memory than allowed");
    let function = twin.function("twin_step").unwrap();
    let allow = |n: i32| cu!(cuFuncSetAttribute(function => Handle, 8 => i32, n => i32));
    assert_eq!(allow(227 * 1024 + 1), INVALID_VALUE);
    assert_eq!(allow(227 * 1024), 0);
    assert_eq!(launch([1, 1, 1], [32, 227 * 1024]), 0);
    assert_eq!(twin.read(output, 32), [1; 32]);
    assert_eq!(twin.function("no_such_kernel"), Err(NOT_FOUND));
}

#[test]
fn memory_is_poisoned_bounded_and_returned() {
    cu!(loris_twin_set_memory(1000 => usize) -> ());
    let twin = Twin::open();
    let first = twin.alloc(200);
    assert_eq!(first % 256, 0);
    assert_eq!(twin.read(first, 200), [u32::MAX; 200]);
    let alloc = || cu!(cuMemAlloc_v2(&mut 0u64 => *mut u64, 400 => usize));
    assert_eq!(alloc(), OUT_OF_MEMORY);
    let (mut unused, mut total) = (0usize, 0usize);
    cu!(cuMemGetInfo_v2(&mut unused => *mut usize, &mut total => *mut usize));
    assert_eq!((unused, total), (200, 1000));
    assert_eq!(twin.write(first + 796, &[1, 2]), INVALID_VALUE, "past the end");
    assert_eq!(cu!(cuMemsetD32_v2(first => u64, 9 => u32, 200 => usize)), 0);
    assert_eq!(twin.read(first, 200), [9; 200]);
    assert_eq!(cu!(cuMemFree_v2(first => u64)), 0);
    assert_eq!(cu!(cuMemFree_v2(first => u64)), INVALID_VALUE, "freed twice");
    assert_eq!(alloc(), 0);
}

#[test]
fn what_is_not_destroyed_is_counted() {
    assert_eq!(leaks(), "");
    let twin = Twin::open();
    let (s, e, address) = (stream(NON_BLOCKING), event(), twin.alloc(1));
    assert_eq!(leaks(), "1 context, 1 device allocation, 1 event, 1 module, 1 stream");
    cu!(cuStreamDestroy_v2(s => Handle));
    assert_eq!(cu!(cuStreamDestroy_v2(s => Handle)), INVALID_HANDLE, "destroyed twice");
    cu!(cuEventDestroy_v2(e => Handle));
    cu!(cuMemFree_v2(address => u64));
    assert_eq!(leaks(), "1 context, 1 module");
    drop(twin);
    assert_eq!(leaks(), "");
}

/// Each call of a sequence fails once, and the next attempt does what was asked.
#[test]
fn any_call_can_be_made_to_fail() {
    let twin = Twin::open();
    let work = || -> Result<(), i32> {
        let check = |code| if code == 0 { Ok(()) } else { Err(code) };
        let mut address = 0u64;
        check(cu!(cuMemAlloc_v2(&mut address => *mut u64, 128 => usize)))?;
        let done = check(cu!(cuMemsetD32_v2(address => u64, 0 => u32, 32 => usize)))
            .and_then(|()| check(cu!(cuCtxSynchronize())));
        check(cu!(cuMemFree_v2(address => u64)))?;
        done
    };
    let before = cu!(loris_twin_calls() -> u64);
    work().unwrap();
    let n_calls = cu!(loris_twin_calls() -> u64) - before;
    assert_eq!(n_calls, 4);
    for n in 0..n_calls {
        cu!(loris_twin_fail_call(n => u64, 999 => i32) -> ());
        assert_eq!(work(), Err(999), "call {n}");
        assert_eq!(work(), Ok(()));
    }
    assert_eq!(text(999), "code 999");
    drop(twin);
}

/// A launch that faults in one thread's context leaves another thread's alone.
#[test]
fn threads_have_contexts_of_their_own() {
    let twin = Twin::open();
    let output = twin.upload(&[1; 32]);
    std::thread::spawn(|| {
        let twin = Twin::open();
        assert!(
            twin.run("twin_step", 1, [32, 0], &StepArgs { output: 16, multiply: 1, add: 1 })
                .is_err()
        );
    })
    .join()
    .unwrap();
    assert!(twin.run("twin_step", 1, [32, 0], &StepArgs { output, multiply: 2, add: 1 }).is_ok());
    assert_eq!(twin.read(output, 32), [3; 32]);
}
