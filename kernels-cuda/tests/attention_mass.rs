//! Token scores against the textbook.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod common;
#[path = "common/kv.rs"]
mod kv;

use kv::{CODED, LAYER, Part, Positions, Sequence, shape, upload};
use loris_kernels::ops::attention_mass::attention_mass;
use loris_kernels::{Buffer, Device};

/// Scores by the last `n_mass_rows` rows of the last part.
fn run(
    device: &Device,
    parts: &[Part<'_>],
    n_mass_rows: usize,
    page_len: usize,
    window: Option<u32>,
) -> (Vec<f32>, Vec<f64>) {
    let mut up = upload(device, parts, page_len);
    let part = parts.last().unwrap();
    let (seq, kv_len) = (part.seq, part.kv_len());
    let (n_rows, n_q_heads) = (up.batch.n_rows(), seq.shape.n_q_heads);
    let rows = kv_len - n_mass_rows..kv_len;

    let mut lse = vec![f32::NAN; n_rows * n_q_heads];
    let mut want = vec![0.0; kv_len];
    for (i, row) in rows.enumerate() {
        for head in 0..n_q_heads {
            let (_, row_lse) = seq.attention(row, head, kv_len, window);
            lse[(n_rows - n_mass_rows + i) * n_q_heads + head] = row_lse as f32;
            for (slot, score) in seq.scores(row, head, kv_len, window) {
                want[slot] += (score - row_lse).exp() / (n_q_heads * n_mass_rows) as f64;
            }
        }
    }
    up.lse.upload(device, 0, &lse).unwrap();
    let n_slots = up.batch.max_kv_len() + 3;
    let mut scores = Buffer::from_slice(device, &vec![f32::NAN; n_slots], "scores").unwrap();
    let (batch, q, pages) = (&up.batch, &up.q, &up.pages);
    let (seq_idx, rows) = (parts.len() - 1, n_rows - n_mass_rows..n_rows);
    let mut score = |rows, n_so_far| {
        let (lse, scores) = (&up.lse, &mut scores);
        attention_mass(
            device, seq.shape, batch, seq_idx, rows, LAYER, window, q, lse, pages, n_so_far, scores,
        )
        .unwrap();
        let got = scores.to_vec(device).unwrap();
        assert!(got[kv_len..].iter().all(|x| x.is_nan()), "slots that are not in use");
        got[..kv_len].to_vec()
    };
    let all = score(rows.clone(), 0);
    // A row more and a few more, from what others have left.
    let (mut first, mut n_so_far) = (rows.start, 0);
    for n in [1, 3, 2, 70, rows.len()] {
        let next = (first + n).min(rows.end);
        if first < next {
            let got = score(first..next, n_so_far);
            (first, n_so_far) = (next, kv_len);
            assert!(
                first < rows.end || got == all,
                "the bits do not depend on which come together"
            );
        }
    }
    let got = all.iter().map(|x| x / n_mass_rows as f32).collect();
    (got, want)
}

#[track_caller]
fn run_and_check(
    device: &Device,
    parts: &[Part<'_>],
    n_mass_rows: usize,
    page_len: usize,
    window: Option<u32>,
) {
    let (got, want) = run(device, parts, n_mass_rows, page_len, window);
    let (shape, kv) = (parts[0].seq.shape, parts[0].seq.kv);
    let what = format!("{shape:?}, {kv:?}, {n_mass_rows} rows, window {window:?}");
    let worst = common::compare(&what, &got, &want, want.len(), 2e-5, 0.0);
    let sum: f32 = got.iter().sum();
    assert!(window == Some(0) || (sum - 1.0).abs() < 1e-4, "{what}: they sum to {sum}");
    println!("{what}: {worst:.1e}");
}

#[test]
fn lengths() {
    let device = common::device();
    for len in [1, 15, 16, 17, 63, 64, 65, 129] {
        let seq = Sequence::new(shape(2, 1, 32), len, Positions::Dense, 6.0, 1);
        for page_len in [16, 64, 256] {
            run_and_check(&device, &[Part::last(&seq, 1)], 1, page_len, None);
        }
    }
}

#[test]
fn heads_groups_and_rows() {
    let device = common::device();
    for group_size in [1, 2, 3, 5, 8] {
        let seq = Sequence::new(shape(2 * group_size, 2, 32), 70, Positions::Dense, 6.0, 2);
        for n_mass_rows in [1, 3, 17] {
            run_and_check(&device, &[Part::last(&seq, 20)], n_mass_rows, 64, None);
        }
    }
    // More rows than a launch takes, and more heads than a product has columns.
    let seq = Sequence::new(shape(12, 1, 32), 70, Positions::Dense, 6.0, 7);
    run_and_check(&device, &[Part::last(&seq, 69)], 68, 64, None);
    for head_dim in [64, 128] {
        let seq = Sequence::new(shape(4, 2, head_dim), 70, Positions::Dense, 6.0, 3);
        run_and_check(&device, &[Part::last(&seq, 2)], 2, 64, None);
    }
}

#[test]
fn windows_positions_and_other_sequences() {
    let device = common::device();
    let other = Sequence::new(shape(3, 1, 32), 200, Positions::Dense, 6.0, 4);
    for kind in [Positions::From(4_000_000), Positions::Descending, Positions::Permuted] {
        let seq = Sequence::new(shape(3, 1, 32), 100, kind, 6.0, 5);
        for window in [None, Some(0), Some(9)] {
            let parts = [Part::last(&other, 2), Part::last(&seq, 4)];
            run_and_check(&device, &parts, 3, 16, window);
        }
    }
}

#[test]
fn coded_pages() {
    let device = common::device();
    for (kv, d) in CODED.into_iter().flat_map(|kv| [32, 64, 128].map(|d| (kv, d))) {
        for len in [1, 3, 4, 5, 19, 20, 21, 68, 69] {
            let seq = Sequence::coded(kv, shape(4, 2, d), len, Positions::Dense, 6.0, 1);
            for page_len in [16, 64, 256] {
                run_and_check(&device, &[Part::last(&seq, 1)], 1, page_len, None);
            }
        }
        let seq = Sequence::coded(kv, shape(3, 1, d), 100, Positions::Permuted, 6.0, 5);
        for window in [None, Some(9)] {
            run_and_check(&device, &[Part::last(&seq, 4)], 3, 16, window);
        }
    }
}
