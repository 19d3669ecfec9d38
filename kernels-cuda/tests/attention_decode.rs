//! Split decode attention against the textbook, and bit for bit against itself.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod common;
#[path = "common/kv.rs"]
mod kv;

use kv::{CODED, Given, LAYER, Part, Positions, Sequence, check, formats, shape, upload};
use loris_kernels::abi::LorisSeq;
use loris_kernels::ops::attention::{Partial, attention_decode, n_splits};
use loris_kernels::ops::batch::kv_len;
use loris_kernels::{Device, Error};

fn run(device: &Device, parts: &[Part<'_>], page_len: usize, window: Option<u32>) -> Given {
    let mut up = upload(device, parts, page_len);
    let shape = parts[0].seq.shape;
    let n_splits = n_splits(up.pages.kv, up.batch.max_kv_len());
    let mut partial = Partial::new(device, shape, up.batch.n_rows(), n_splits).unwrap();
    for buffer in [&mut partial.out, &mut partial.ml] {
        let poison = vec![f32::NAN; buffer.len()];
        buffer.upload(device, 0, &poison).unwrap();
    }
    let (q, pages, partial, out) = (&up.q, &up.pages, &mut partial, &mut up.out);
    let lse = Some(&mut up.lse);
    attention_decode(device, shape, &up.batch, LAYER, window, q, pages, partial, out, lse).unwrap();
    device.synchronize().unwrap();
    Given::read(device, &up)
}

#[track_caller]
fn run_and_check(
    device: &Device,
    parts: &[Part<'_>],
    page_len: usize,
    window: Option<u32>,
) -> Given {
    check(parts, page_len, window, run(device, parts, page_len, window))
}

#[test]
fn lengths_around_page_and_split_edges() {
    let device = common::device();
    let lens = [1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 513];
    let seqs: Vec<_> = (0..)
        .zip(lens)
        .map(|(i, len)| Sequence::new(shape(2, 1, 32), len, Positions::Dense, 6.0, i))
        .collect();
    let mut parts: Vec<_> = seqs.iter().map(|seq| Part::last(seq, 1)).collect();
    parts.insert(3, Part { n_rows: 0, kv_start: 40, seq: &seqs[5] });
    for page_len in [16, 64, 256] {
        run_and_check(&device, &parts, page_len, None);
    }
}

#[test]
fn heads_and_groups() {
    let device = common::device();
    for group_size in [1, 2, 3, 4, 5, 7, 8, 16] {
        let seq = Sequence::new(shape(2 * group_size, 2, 32), 300, Positions::Dense, 6.0, 1);
        run_and_check(&device, &[Part::last(&seq, 1)], 64, None);
    }
    for head_dim in [64, 128] {
        let seq = Sequence::new(shape(8, 2, head_dim), 300, Positions::Dense, 6.0, 2);
        run_and_check(&device, &[Part::last(&seq, 1)], 64, None);
    }
}

#[test]
fn several_rows_of_a_sequence() {
    let device = common::device();
    let seq = Sequence::new(shape(3, 1, 64), 260, Positions::Permuted, 6.0, 3);
    for n_rows in [2, 17] {
        run_and_check(&device, &[Part::last(&seq, n_rows)], 64, None);
    }
}

#[test]
fn windows_and_positions() {
    let device = common::device();
    for kind in [
        Positions::Dense,
        Positions::From(4_000_000),
        Positions::Sparse,
        Positions::Descending,
        Positions::Permuted,
    ] {
        let seq = Sequence::new(shape(2, 1, 32), 600, kind, 6.0, 4);
        for window in [None, Some(0), Some(1), Some(9), Some(70)] {
            run_and_check(&device, &[Part::last(&seq, 2)], 64, window);
        }
    }
}

/// Lengths around the bf16 slots, the runs of 16 behind them, pages and splits; every format and width.
#[test]
fn coded_pages() {
    let device = common::device();
    let lens = [1, 3, 4, 5, 19, 20, 21, 67, 68, 69, 243, 244, 245, 260, 501];
    for (kv, d) in CODED.into_iter().flat_map(|kv| [32, 64, 128].map(|d| (kv, d))) {
        let shape = shape(4, 2, d);
        let seqs: Vec<_> = (0..)
            .zip(lens)
            .map(|(i, len)| Sequence::coded(kv, shape, len, Positions::Dense, 6.0, i))
            .collect();
        let mut parts: Vec<_> = seqs.iter().map(|seq| Part::last(seq, 1)).collect();
        parts.insert(3, Part { n_rows: 0, kv_start: 40, seq: &seqs[9] });
        let given = [16, 256].map(|page_len| run_and_check(&device, &parts, page_len, None));
        assert!(given[0] == given[1], "{kv:?}: pages change bits");
    }
}

#[test]
fn coded_pages_with_windows_positions_and_groups() {
    let device = common::device();
    for kv in CODED {
        for kind in [Positions::Dense, Positions::Sparse, Positions::Permuted] {
            let seq = Sequence::coded(kv, shape(7, 1, 64), 300, kind, 6.0, 4);
            for window in [None, Some(0), Some(1), Some(70)] {
                run_and_check(&device, &[Part::last(&seq, 2)], 64, window);
            }
        }
        let shape = shape(6, 2, 32);
        let seq = Sequence::coded(kv, shape, 300, Positions::Dense, 6.0, 6);
        let other = Sequence::coded(kv, shape, 20, Positions::Sparse, 6.0, 7);
        let alone = run(&device, &[Part::last(&seq, 1)], 64, Some(70));
        let parts = [Part::last(&other, 2), Part::last(&seq, 1)];
        assert_eq!(run(&device, &parts, 16, Some(70)).rows(2..3, shape), alone);
        let stored = Sequence { is_dense: false, ..seq.clone() };
        assert_eq!(run(&device, &[Part::last(&stored, 1)], 64, Some(70)), alone);
    }
}

/// Streams, some splits long: sinks and windows of all sizes, every format and width, whatever was given back.
#[test]
fn streams() {
    let device = common::device();
    let widths = [shape(3, 1, 32), shape(2, 1, 64), shape(16, 1, 128)];
    for (kv, shape) in formats().flat_map(|kv| widths.map(|width| (kv, width))) {
        let plain = Sequence::coded(kv, shape, 1100, Positions::Dense, 6.0, 9);
        for (sink, window) in [(0, 1), (4, 300)] {
            let seq = plain.streaming(sink, window, 0);
            let whole = run_and_check(&device, &[Part::last(&seq, 2)], 16, None);
            for page_len in [16, 256] {
                let most = seq.most_gone(1098, page_len);
                for n_gone in [512, most] {
                    let gone = seq.streaming(sink, window, n_gone.min(most));
                    let given = run(&device, &[Part::last(&gone, 2)], page_len, None);
                    assert_eq!(given, whole, "{kv:?}, {n_gone} gone of pages of {page_len}");
                }
            }
        }
        // One that is not full is as any other.
        let seq = plain.streaming(4, 1096, 0);
        let [seq, plain] = [&seq, &plain].map(|seq| run(&device, &[Part::last(seq, 1)], 16, None));
        assert_eq!(seq, plain);
    }
}

/// As many sinks as there may be, positions that are stored, a layer with a window, and others in the batch.
#[test]
fn streams_beside_others() {
    let device = common::device();
    let shape = shape(6, 2, 32);
    let seq = Sequence::new(shape, 900, Positions::Dense, 6.0, 10);
    for (sink, window) in [(64, 20), (63, 700)] {
        let seq = seq.streaming(sink, window, 0);
        let whole = run_and_check(&device, &[Part::last(&seq, 1)], 64, None);
        run_and_check(&device, &[Part::last(&seq, 1)], 256, Some(window - 9));
        let other = Sequence::new(shape, 600, Positions::Sparse, 6.0, 11);
        let gone =
            Sequence { is_dense: false, ..seq.streaming(sink, window, seq.most_gone(899, 64)) };
        let parts = [Part::last(&other, 1), Part::last(&gone, 1), Part::last(&other, 1)];
        assert_eq!(run(&device, &parts, 64, None).rows(1..2, shape), whole);
    }
}

/// What a stream has left behind takes no blocks: a launch has as many splits however long it goes on.
#[test]
fn splits_do_not_grow_with_what_is_gone() {
    let seq = |n_gone, kv_start| LorisSeq { n_gone, kv_start, n_rows: 1, ..LorisSeq::default() };
    for n_gone in (0..20_000).step_by(16).chain([3_999_984]) {
        let len = kv_len(&seq(n_gone, 299));
        assert!((300..300 + 512).contains(&len), "{n_gone}: {len}");
    }
    assert_eq!(kv_len(&seq(496, 299)), 796);
    assert_eq!(kv_len(&seq(512, 299)), 556);
}

#[test]
fn sharp_attention() {
    let device = common::device();
    let seq = Sequence::new(shape(2, 1, 64), 520, Positions::Dense, 60.0, 5);
    run_and_check(&device, &[Part::last(&seq, 1)], 64, None);
}

/// A row's bits do not depend on pages, the rest of the batch, or the number of splits of the launch.
#[test]
fn bits_are_those_of_the_row_alone() {
    let device = common::device();
    let shape = shape(6, 2, 32);
    let seq = Sequence::new(shape, 300, Positions::Dense, 6.0, 6);
    let longer = Sequence::new(shape, 1100, Positions::Sparse, 6.0, 7);
    for window in [None, Some(70)] {
        let alone = run(&device, &[Part::last(&seq, 1)], 64, window);
        for page_len in [16, 256] {
            assert_eq!(run(&device, &[Part::last(&seq, 1)], page_len, window), alone);
        }
        let together = run(&device, &[Part::last(&longer, 2), Part::last(&seq, 1)], 64, window);
        assert_eq!(together.rows(2..3, shape), alone);
        let stored = Sequence { is_dense: false, ..seq.clone() };
        assert_eq!(run(&device, &[Part::last(&stored, 1)], 64, window), alone);
        let rows = run(&device, &[Part::last(&seq, 3)], 64, window);
        assert_eq!(rows.rows(2..3, shape), alone);
    }
}

#[test]
fn refuses_what_does_not_fit() {
    let device = common::device();
    let seq = Sequence::new(shape(17, 1, 32), 20, Positions::Dense, 1.0, 8);
    let mut up = upload(&device, &[Part::last(&seq, 1)], 16);
    let mut partial = Partial::new(&device, shape(16, 1, 32), 1, 1).unwrap();
    let mut attempt = |shape, partial: &mut Partial| {
        let (q, pages, out) = (&up.q, &up.pages, &mut up.out);
        attention_decode(&device, shape, &up.batch, LAYER, None, q, pages, partial, out, None)
    };
    let error = attempt(shape(17, 1, 32), &mut partial).unwrap_err();
    assert!(matches!(error, Error::Unsupported { .. }) && error.to_string().contains("group_size"));

    let seq = Sequence::new(shape(2, 1, 32), 300, Positions::Dense, 1.0, 8);
    up = upload(&device, &[Part::last(&seq, 1)], 16);
    partial = Partial::new(&device, shape(2, 1, 32), 1, 1).unwrap();
    let (q, pages, out) = (&up.q, &up.pages, &mut up.out);
    let shape = shape(2, 1, 32);
    let error =
        attention_decode(&device, shape, &up.batch, LAYER, None, q, pages, &mut partial, out, None);
    assert!(matches!(error.unwrap_err(), Error::Size { expected: 128, .. }));
}
