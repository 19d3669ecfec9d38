//! The device layer: memory, copies, launches, graphs, and every error on the way.
#![allow(clippy::unwrap_used)]

mod common;

use std::thread;

use common::twin::Twin;
use common::{Random, device, on_twin, options};
use loris_kernels::abi::{LORIS_DENSE, LorisQTile, LorisSeq};
use loris_kernels::ops::batch::{DeviceBatch, HostBatch};
use loris_kernels::ops::fill_random::fill_random;
use loris_kernels::{Buffer, Device, DeviceOptions, Error, Launch, Matrix, Rows, Staging, images};

/// Runs `test` in a thread of its own: the twin counts calls, leaks and memory for each thread.
fn on_a_thread(test: impl FnOnce() + Send + 'static) {
    let result = thread::spawn(test).join();
    if let Err(panic) = result {
        std::panic::resume_unwind(panic);
    }
}

#[test]
fn opens_and_describes() {
    let device = device();
    let info = device.info();
    assert!(!info.name.is_empty() && info.n_sms > 0 && info.memory > 0 && info.compute.0 >= 8);
    assert!(info.max_smem >= 99 << 10, "{info:?}");
    let (free, total) = device.memory().unwrap();
    assert!(free > 0 && free <= total);
    device.synchronize().unwrap();

    let error = Device::open(&DeviceOptions { index: 99, ..options() }).unwrap_err();
    assert!(matches!(error, Error::NoDevice { index: 99, .. }), "{error}");
}

#[test]
fn copies_what_was_asked_for() {
    let device = device();
    let mut random = Random::new(1);
    let data: Vec<u32> = (0..1000).map(|_| random.next() as u32).collect();
    let mut buffer = Buffer::from_slice(&device, &data, "numbers").unwrap();
    assert_eq!(buffer.to_vec(&device).unwrap(), data);
    buffer.upload(&device, 10, &[1, 2, 3]).unwrap();
    let mut part = [0; 5];
    buffer.download(&device, 9, &mut part).unwrap();
    assert_eq!(part, [data[9], 1, 2, 3, data[13]]);

    // Ranges are checked, empty ones are fine.
    buffer.upload(&device, 1000, &[]).unwrap();
    let error = buffer.upload(&device, 999, &[1, 2]).unwrap_err();
    assert_eq!(error.to_string(), "numbers: 1001 instead of 1000");
    assert!(buffer.download(&device, usize::MAX, &mut part).is_err());
    let empty = Buffer::<f32>::new(&device, 0, "nothing").unwrap();
    assert!(empty.is_empty() && empty.to_vec(&device).unwrap().is_empty());

    // A buffer may outlive its device and go on another thread.
    drop(device);
    thread::spawn(move || drop(buffer)).join().unwrap();
}

#[test]
fn a_device_moves_between_threads() {
    let device = device();
    let buffer = Buffer::from_slice(&device, &[1.0f32, 2.0], "numbers").unwrap();
    let (device, buffer) = thread::spawn(move || {
        assert_eq!(buffer.to_vec(&device).unwrap(), [1.0, 2.0]);
        (device, buffer)
    })
    .join()
    .unwrap();
    assert_eq!(buffer.to_vec(&device).unwrap(), [1.0, 2.0]);
}

#[test]
fn stages_large_uploads() {
    let device = device();
    let mut staging = Staging::new(&device, 5000).unwrap();
    assert_eq!(staging.half_bytes(), 8192);
    let data: Vec<u16> = (0..50_000).map(|i| i as u16).collect();
    let mut buffer = Buffer::new(&device, data.len() + 3, "weights").unwrap();
    let (mut calls, mut bytes) = (0, 0);
    let mut progress = |n| {
        calls += 1;
        bytes += n;
    };
    buffer.upload_staged(&device, &mut staging, 3, &data, &mut progress).unwrap();
    assert_eq!((calls, bytes), (100_000u64.div_ceil(8192), 100_000));
    assert_eq!(buffer.to_vec(&device).unwrap()[3..], data);
    let error = buffer.upload_staged(&device, &mut staging, 4, &data, &mut |_| ()).unwrap_err();
    assert!(matches!(error, Error::Size { .. }), "{error}");
}

fn matrix(device: &Device) -> Matrix {
    Matrix::new(device, 40, 80, "random").unwrap()
}

fn random(device: &Device, seed: u64) -> Vec<u16> {
    let mut out = matrix(device);
    fill_random(device, &mut out, seed, 1.0).unwrap();
    out.data.to_vec(device).unwrap()
}

#[test]
fn graphs_replay() {
    let device = device();
    let mut out = matrix(&device);
    let graph = device.capture(|d| fill_random(d, &mut out, 7, 1.0)).unwrap();
    let want = random(&device, 7);
    out.data.upload(&device, 0, &vec![0; want.len()]).unwrap();
    assert_ne!(out.data.to_vec(&device).unwrap(), want, "capturing runs nothing");
    for _ in 0..3 {
        out.data.upload(&device, 0, &vec![0; want.len()]).unwrap();
        graph.launch(&device).unwrap();
        assert_eq!(out.data.to_vec(&device).unwrap(), want);
    }
    assert!(graph.launch(&Device::open(&options()).unwrap()).is_err(), "another device");
    // Memory that the graph names stays.
    drop(out);
    graph.launch(&device).unwrap();
    device.synchronize().unwrap();
    drop(device);
    drop(graph);
}

#[test]
fn a_failed_capture_leaves_a_working_device() {
    let device = device();
    let mut out = matrix(&device);
    let error = device
        .capture(|d| {
            fill_random(d, &mut out, 7, 1.0)?;
            // Waits, which nothing recorded can.
            out.data.upload(d, 0, &[1])
        })
        .unwrap_err();
    assert!(matches!(error, Error::Driver { code: 900..=909, .. }), "{error}");
    assert!(device.capture(|_| Err(Error::NoDevice { index: 0, count: 0 })).is_err());
    // A buffer that goes during the recording.
    let mut other = Some(matrix(&device));
    let graph = device.capture(|d| {
        let mut other = other.take().unwrap();
        fill_random(d, &mut other, 7, 1.0)
    });
    graph.unwrap().launch(&device).unwrap();
    device.synchronize().unwrap();
    let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let _ = device.capture(|_| panic!("in a recording"));
    }));
    assert!(panicked.is_err());
    assert_eq!(random(&device, 7), random(&device, 7));
}

#[test]
fn times_work() {
    let device = device();
    let mut out = matrix(&device);
    device.time(|d| fill_random(d, &mut out, 1, 1.0)).unwrap();
}

#[test]
fn names_what_cannot_be_launched() {
    let device = device();
    let launch = Launch { kernel: "no_such_kernel", grid: [1; 3], block: 32, extra_smem: 0 };
    // SAFETY: there is no such kernel.
    let error = unsafe { device.launch(&launch, &0u64) }.unwrap_err();
    assert!(error.to_string().contains("no_such_kernel"), "{error}");
    let launch = Launch { kernel: "fill_random", block: 1 << 20, ..launch };
    // SAFETY: there are no blocks of that many threads.
    let error = unsafe { device.launch(&launch, &[0u64; 4]) }.unwrap_err();
    assert!(error.to_string().contains("fill_random (grid 1x1x1, block 1048576"), "{error}");
    let nothing = Launch { grid: [1, 0, 1], ..launch };
    // SAFETY: nothing runs.
    unsafe { device.launch(&nothing, &0u64) }.unwrap();
}

#[test]
fn running_out_of_memory_is_survived() {
    if on_twin() {
        on_a_thread(|| {
            Twin::get().set_memory(1 << 20);
            let device = device();
            let error = Buffer::<f32>::new(&device, 1 << 20, "keys and values").unwrap_err();
            let Error::OutOfMemory { what: "keys and values", bytes, free, total } = error else {
                panic!("{error}")
            };
            assert_eq!((bytes, total), (4 << 20, 1 << 20));
            assert!(free <= total);
            assert_eq!(random(&device, 1), random(&device, 1));
        });
    }
    let device = device();
    for len in [usize::MAX, usize::MAX / 8, 1 << 50] {
        let error = Rows::<f32>::new(&device, len, 1, "too much").unwrap_err();
        assert!(matches!(error, Error::OutOfMemory { .. }), "{error}");
    }
    assert_eq!(random(&device, 1), random(&device, 1));
}

/// Everything that the engine does with a device, once.
fn everything() -> Result<(), Error> {
    let device = Device::open(&options())?;
    let mut out = Matrix::new(&device, 8, 16, "random")?;
    let mut staging = Staging::new(&device, 4096)?;
    let data: Vec<u16> = (0..128).collect();
    out.data.upload_staged(&device, &mut staging, 0, &data, &mut |_| ())?;
    fill_random(&device, &mut out, 1, 1.0)?;
    let mut batch = DeviceBatch::new(&device, 2, 32)?;
    batch.upload(
        &device,
        &HostBatch { row_seq: &[0], positions: &[0], seqs: &[seq(0, 1)], ..HostBatch::default() },
    )?;
    let graph = device.capture(|d| fill_random(d, &mut out, 2, 1.0))?;
    graph.launch(&device)?;
    device.time(|d| fill_random(d, &mut out, 3, 1.0))?;
    device.memory()?;
    out.data.to_vec(&device)?;
    device.synchronize()
}

#[test]
fn nothing_leaks_whichever_call_fails() {
    if !on_twin() {
        return;
    }
    on_a_thread(|| {
        everything().unwrap();
        assert_eq!(Twin::get().leaks(), "");
    });
    // 721 is newer than cust: it comes through as it is.
    for code in [999, 721] {
        let (mut n, mut n_errors) = (0, 0);
        let mut done = false;
        while !done {
            (done, n_errors) = thread::spawn(move || {
                let twin = Twin::get();
                // A thread may have the name of an earlier one and inherit what that left.
                let left = twin.leaks();
                let before = twin.calls();
                twin.fail_call(n, code);
                let result = everything();
                let reached = twin.calls() - before > n as u64;
                twin.fail_call(-1, 0);
                match result {
                    // What failed was a call that ends something, or one that is made again.
                    Ok(()) => {}
                    Err(error) => {
                        let text = error.to_string();
                        assert!(text.contains(&format!("CUDA error {code}")), "call {n}: {text}");
                        assert_eq!(twin.leaks(), left, "call {n}: {text}");
                        everything().unwrap();
                        return (!reached, n_errors + 1);
                    }
                }
                (!reached, n_errors)
            })
            .join()
            .unwrap();
            n += 1;
        }
        assert!(n_errors > 40, "{n_errors} of {n} calls fail with an error");
    }
}

fn seq(kv_start: u32, n_rows: u32) -> LorisSeq {
    LorisSeq { n_rows, kv_start, positions_start: LORIS_DENSE, ..LorisSeq::default() }
}

#[test]
fn batches_keep_their_addresses_until_they_outgrow_them() {
    let device = device();
    let mut batch = DeviceBatch::new(&device, 4, 32).unwrap();
    let seqs = [seq(5, 2)];
    let cos_sin = [0.5; 64];
    let tiles = [LorisQTile { seq_idx: 0, packed_start: 0 }];
    let host = HostBatch {
        seqs: &seqs,
        row_seq: &[0, 0],
        positions: &[5, 6],
        slot_positions: &[],
        page_tables: &[3, 9, 4],
        n_layers: 3,
        tokens: &[11, 12],
        cos_sin: &cos_sin,
        sink_cos_sin: &[],
        tiles: &tiles,
        logit_rows: &[1],
    };
    batch.upload(&device, &host).unwrap();
    let first =
        (batch.abi().seqs, batch.tokens(), batch.cos_sin(), batch.tiles(), batch.logit_rows());
    assert_eq!(
        (batch.n_rows(), batch.n_seqs(), batch.n_layers(), batch.max_kv_len()),
        (2, 1, 3, 7)
    );
    assert_eq!((batch.n_tiles(), batch.n_logit_rows(), batch.n_pages()), (1, 1, 10));
    batch.upload(&device, &host).unwrap();
    assert_eq!(
        first,
        (batch.abi().seqs, batch.tokens(), batch.cos_sin(), batch.tiles(), batch.logit_rows())
    );
    assert_eq!(batch.generation(), 0);

    let long = vec![1; 1000];
    batch.upload(&device, &HostBatch { page_tables: &long, ..host }).unwrap();
    assert_eq!(batch.generation(), 1);

    // What kernels would index beyond the end of is refused.
    for wrong in [
        HostBatch { positions: &[5], ..host },
        HostBatch { tokens: &[11], ..host },
        HostBatch { cos_sin: &cos_sin[..32], ..host },
        HostBatch { sink_cos_sin: &cos_sin[..32], ..host },
        HostBatch { row_seq: &[0, 1], ..host },
        HostBatch { logit_rows: &[2], ..host },
        HostBatch { seqs: &[seq(5, 3)], ..host },
        HostBatch { seqs: &[LorisSeq { positions_start: 0, ..seqs[0] }], ..host },
        HostBatch { seqs: &[LorisSeq { sink: 1, window: 4, ..seqs[0] }], ..host },
        HostBatch { seqs: &[LorisSeq { page_table_start: 4, ..seqs[0] }], ..host },
    ] {
        assert!(matches!(batch.upload(&device, &wrong), Err(Error::Size { .. })), "{wrong:?}");
    }
}

#[test]
fn images_are_chosen_by_compute_capability() {
    let all = ["sm_80", "sm_89", "sm_90a", "compute_80"];
    for (compute, want) in [
        ((7, 5), None),
        ((8, 0), Some("sm_80")),
        ((8, 6), Some("sm_80")),
        ((8, 7), Some("sm_80")),
        ((8, 9), Some("sm_89")),
        ((9, 0), Some("sm_90a")),
        ((10, 0), Some("compute_80")),
        ((12, 1), Some("compute_80")),
    ] {
        assert_eq!(images::choose(compute, &all), want, "{compute:?}");
        assert_eq!(images::choose(compute, &[]), None);
    }
    assert_eq!(images::choose((8, 9), &["sm_80"]), Some("sm_80"));
    assert_eq!(images::choose((9, 0), &["sm_80", "compute_80"]), Some("compute_80"));
    assert_eq!(images::choose((9, 0), &["sm_80"]), None);
    assert_eq!(loris_kernels::images().is_empty(), !loris_kernels::NO_IMAGES.is_empty());
}
