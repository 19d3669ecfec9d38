//! Flash attention of many rows against the textbook, and bit for bit against itself.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod common;
#[path = "common/kv.rs"]
mod kv;

use common::product::seq;
use kv::{CODED, Given, LAYER, Part, Positions, Sequence, both, check, formats, shape, upload};
use loris_formats::{Coding, Sides};
use loris_kernels::ops::attention::{attention_cost, attention_prefill, q_tiles};
use loris_kernels::{Device, Error};

fn run(device: &Device, parts: &[Part<'_>], page_len: usize, window: Option<u32>) -> Given {
    let mut up = upload(device, parts, page_len);
    let shape = parts[0].seq.shape;
    let (q, pages, out) = (&up.q, &up.pages, &mut up.out);
    attention_prefill(device, shape, &up.batch, LAYER, window, q, pages, out, Some(&mut up.lse))
        .unwrap();
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
fn lengths_around_page_and_tile_edges() {
    let device = common::device();
    let lens = [1, 3, 15, 16, 17, 63, 64, 65, 127, 128, 129, 257];
    let seqs: Vec<_> = (0..)
        .zip(lens)
        .map(|(i, len)| Sequence::new(shape(1, 1, 32), len, Positions::Dense, 6.0, i))
        .collect();
    let mut parts: Vec<_> =
        seqs.iter().map(|seq| Part::last(seq, seq.positions.len().min(3))).collect();
    parts.insert(4, Part { n_rows: 0, kv_start: 0, seq: &seqs[5] }); // nothing at all
    parts.push(Part { n_rows: 0, kv_start: 40, seq: &seqs[5] }); // slots, but no rows
    for page_len in [16, 64, 256] {
        run_and_check(&device, &parts, page_len, None);
    }
}

#[test]
fn heads_and_groups() {
    let device = common::device();
    for (group_size, n_rows) in
        [(1, 130), (2, 65), (3, 43), (4, 33), (5, 26), (7, 19), (8, 17), (16, 9)]
    {
        let seq = Sequence::new(shape(2 * group_size, 2, 32), 140, Positions::Dense, 6.0, 1);
        run_and_check(&device, &[Part::last(&seq, n_rows)], 64, None);
    }
    for head_dim in [64, 128] {
        let seq = Sequence::new(shape(4, 2, head_dim), 150, Positions::Dense, 6.0, 2);
        run_and_check(&device, &[Part::last(&seq, 70)], 64, None);
    }
}

#[test]
fn windows() {
    let device = common::device();
    for kind in [Positions::Dense, Positions::Sparse] {
        let seq = Sequence::new(shape(2, 1, 32), 200, kind, 6.0, 3);
        for window in [0, 1, 9, 70, u32::MAX - 1] {
            run_and_check(&device, &[Part::all(&seq)], 16, Some(window));
        }
    }
}

#[test]
fn positions_that_are_stored() {
    let device = common::device();
    for kind in [Positions::From(4_000_000), Positions::Descending, Positions::Permuted] {
        let seq = Sequence::new(shape(3, 1, 32), 150, kind, 6.0, 4);
        let dense = Sequence::new(shape(3, 1, 32), 70, Positions::Dense, 6.0, 5);
        for window in [None, Some(9)] {
            run_and_check(&device, &[Part::last(&dense, 5), Part::all(&seq)], 64, window);
        }
    }
}

/// Lengths around the bf16 slots, the runs of 16 behind them, pages and tiles; every format and width.
#[test]
fn coded_pages() {
    let device = common::device();
    let lens = [1, 3, 4, 5, 20, 21, 52, 53, 68, 117];
    for (kv, d) in CODED.into_iter().flat_map(|kv| [32, 64, 128].map(|d| (kv, d))) {
        let shape = shape(4, 2, d);
        let seqs: Vec<_> = (0..)
            .zip(lens)
            .map(|(i, len)| Sequence::coded(kv, shape, len, Positions::Dense, 6.0, i))
            .collect();
        let mut parts: Vec<_> =
            seqs.iter().map(|seq| Part::last(seq, seq.positions.len().min(3))).collect();
        parts.insert(3, Part { n_rows: 0, kv_start: 0, seq: &seqs[9] });
        parts.push(Part { n_rows: 0, kv_start: 40, seq: &seqs[9] });
        let given = [16, 256].map(|page_len| run_and_check(&device, &parts, page_len, None));
        assert!(given[0] == given[1], "{kv:?}: pages change bits");
    }
}

#[test]
fn coded_pages_with_windows_positions_and_groups() {
    let device = common::device();
    for kv in CODED {
        for kind in [Positions::Dense, Positions::Sparse, Positions::Permuted] {
            let seq = Sequence::coded(kv, shape(3, 1, 32), 150, kind, 6.0, 4);
            for window in [None, Some(0), Some(1), Some(70)] {
                run_and_check(&device, &[Part::all(&seq)], 16, window);
            }
        }
        let shape = shape(6, 2, 128);
        let seq = Sequence::coded(kv, shape, 90, Positions::Dense, 6.0, 6);
        let whole = run(&device, &[Part::all(&seq)], 64, Some(40));
        for (kv_start, n_rows) in [(0, 3), (3, 60), (63, 27)] {
            let part = Part { seq: &seq, kv_start, n_rows };
            let rows = kv_start..kv_start + n_rows;
            assert_eq!(run(&device, &[part], 64, Some(40)), whole.rows(rows, shape));
        }
    }
}

#[test]
fn sharp_and_flat_attention() {
    let device = common::device();
    for q_scale in [0.0, 0.1, 60.0, 3000.0] {
        let seq = Sequence::new(shape(1, 1, 64), 200, Positions::Dense, q_scale, 6);
        let given = run(&device, &[Part::last(&seq, 50)], 64, None);
        let parts = [Part::last(&seq, 50)];
        if q_scale < 100.0 {
            check(&parts, 64, None, given);
        } else {
            // Scores of hundreds: an f32 holds their logarithm to 1e-4 no more.
            assert!(given.lse.iter().all(|lse| lse.is_finite()));
            assert!(given.out.iter().all(|&x| common::from_bf16(x).abs() <= 1.0));
        }
    }
}

/// Streams, from their beginning and as many pages later as may have been given back: sinks and windows of all sizes,
/// every format and width.
#[test]
fn streams() {
    let device = common::device();
    let widths = [(shape(3, 1, 32), 150), (shape(2, 1, 64), 90), (shape(2, 1, 128), 90)];
    for (kv, (shape, len)) in formats().flat_map(|kv| widths.map(|width| (kv, width))) {
        let plain = Sequence::coded(kv, shape, len, Positions::Dense, 6.0, 10);
        for (sink, window) in [(0, 30), (1, 1), (4, 17), (3, 60)] {
            let seq = plain.streaming(sink, window, 0);
            let whole = run_and_check(&device, &[Part::all(&seq)], 16, None);
            let n_full = (sink + window) as usize;
            let start = Part { seq: &plain, kv_start: 0, n_rows: n_full };
            assert_eq!(run(&device, &[start], 16, None), whole.rows(0..n_full, shape));
            for (kv_start, page_len) in [(70, 16), (85, 16), (85, 32)] {
                let rows = kv_start..seq.positions.len();
                let most = seq.most_gone(kv_start, page_len);
                for n_gone in [0, page_len, most] {
                    let gone = seq.streaming(sink, window, n_gone.min(most));
                    let part = Part { seq: &gone, kv_start, n_rows: rows.len() };
                    let given = run(&device, &[part], page_len, None);
                    assert_eq!(given, whole.rows(rows.clone(), shape), "{kv:?}, {n_gone} gone");
                }
            }
        }
    }
}

/// As many sinks as there may be, a page that is longer than them, positions that are stored, a layer with a window, and
/// others in the batch.
#[test]
fn streams_beside_others() {
    let device = common::device();
    let shape = shape(6, 2, 32);
    let seq = Sequence::new(shape, 200, Positions::Dense, 6.0, 11);
    for (sink, window) in [(64, 20), (64, 64), (63, 100)] {
        let seq = seq.streaming(sink, window, 0);
        let whole = run_and_check(&device, &[Part::all(&seq)], 64, None);
        run_and_check(&device, &[Part::all(&seq)], 256, Some(window + 9));
        let other = Sequence::new(shape, 50, Positions::Sparse, 6.0, 12);
        let gone =
            Sequence { is_dense: false, ..seq.streaming(sink, window, seq.most_gone(170, 64)) };
        let parts = [Part::last(&other, 33), Part::last(&gone, 30), Part::last(&other, 1)];
        let given = run(&device, &parts, 64, None);
        assert_eq!(given.rows(33..63, shape), whole.rows(170..200, shape));
    }
}

/// A row's bits do not depend on chunks, pages, other sequences, or on how positions are stored.
#[test]
fn bits_are_those_of_the_row_alone() {
    let device = common::device();
    let shape = shape(6, 2, 32);
    let other = Sequence::new(shape, 90, Positions::Dense, 6.0, 8);
    for kind in [Positions::Dense, Positions::Sparse] {
        let seq = Sequence::new(shape, 200, kind, 6.0, 7);
        for window in [None, Some(70)] {
            let whole = run(&device, &[Part::all(&seq)], 64, window);
            for page_len in [16, 256] {
                assert_eq!(run(&device, &[Part::all(&seq)], page_len, window), whole);
            }
            for (kv_start, n_rows) in [(0, 70), (70, 1), (71, 129)] {
                let part = Part { seq: &seq, kv_start, n_rows };
                let given = run(&device, &[part], 64, window);
                assert_eq!(given, whole.rows(kv_start..kv_start + n_rows, shape));
                let given = run(&device, &[Part::last(&other, 33), part], 64, window);
                assert_eq!(
                    given.rows(33..33 + n_rows, shape),
                    whole.rows(kv_start..kv_start + n_rows, shape)
                );
            }
            if kind == Positions::Dense {
                let stored = Sequence { is_dense: false, ..seq.clone() };
                assert_eq!(run(&device, &[Part::all(&stored)], 64, window), whole);
            }
        }
    }
}

#[test]
fn work_list_covers_all_rows_longest_first() {
    let seq = |n_rows, kv_start| seq(0, n_rows, kv_start, 0);
    let tiles = q_tiles(shape(6, 2, 64), &[seq(100, 0), seq(0, 5), seq(1, 1000)]);
    let tiles: Vec<_> = tiles.iter().map(|t| (t.seq_idx, t.packed_start)).collect();
    assert_eq!(tiles, [(2, 0), (0, 128), (0, 256), (0, 0)]);
}

#[test]
fn cost_counts_the_triangle() {
    let seq = |n_rows, kv_start| seq(0, n_rows, kv_start, 0);
    let cost = attention_cost(shape(2, 1, 64), Sides::default(), &[seq(4, 0), seq(1, 9)], None);
    assert_eq!(cost.flops, (1 + 2 + 3 + 4 + 10) * 2 * 4 * 64);
    assert_eq!(cost.bytes, 5 * 2 * 64 * 4 + 14 * 64 * 4);
    let cost = attention_cost(shape(2, 1, 64), Sides::default(), &[seq(4, 0), seq(1, 9)], Some(2));
    assert_eq!(cost.flops, (1 + 2 + 2 + 2 + 2) * 2 * 4 * 64);
    assert_eq!(cost.bytes, 5 * 2 * 64 * 4 + (4 + 2) * 64 * 4);
    let cost = attention_cost(shape(2, 1, 64), both(Coding::INT8), &[seq(1, 9)], None);
    assert_eq!(cost.bytes, 2 * 64 * 4 + 10 * (64 + 2) * 2);
}

#[test]
fn refuses_what_does_not_fit() {
    let device = common::device();
    let seq = Sequence::new(shape(2, 1, 32), 20, Positions::Dense, 1.0, 9);
    let mut up = upload(&device, &[Part::all(&seq)], 16);
    let mut attempt = |shape, layer| {
        let (q, pages, out) = (&up.q, &up.pages, &mut up.out);
        attention_prefill(&device, shape, &up.batch, layer, None, q, pages, out, None).unwrap_err()
    };
    assert!(matches!(attempt(shape(2, 1, 48), 0), Error::Unsupported { .. }));
    assert!(matches!(attempt(shape(2, 0, 32), 0), Error::Unsupported { .. }));
    assert!(matches!(attempt(shape(3, 1, 32), 0), Error::Size { .. }));
    assert!(matches!(attempt(shape(2, 2, 32), 0), Error::Size { .. }));
    assert!(matches!(attempt(shape(2, 1, 32), 2), Error::Size { .. }));
}
