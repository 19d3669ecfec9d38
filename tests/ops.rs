//! Every backend op against the naive f64 reference, and bit-for-bit invariance of the results.
//!
//! One body, generic over a [`Target`], runs for every instruction set of the machine (bf16 products
//! included, emulated where the CPU lacks them). A *world* is one layer with random weights and some
//! sequences over a pool of pages in which everything that no token was written to is NaN.
//!
//! Bounds: a result of f32 kernels is compared at 1e-5 of the largest magnitude in its row (chains of some
//! hundred additions, each off by 2^-24). Where a backend multiplies in bf16 each factor is off by up to
//! 2^-9, which random signs keep near 2^-9 of the row: 1e-2 of the largest magnitude. Inputs of each op
//! are what the op before really gave, so errors do not add up.

#![allow(clippy::unwrap_used)]

mod reference;
mod world;

use loris::backend::cpu::{CpuBackend, CpuOptions, Isa};
use loris::backend::{AttentionShape, Backend, Batch, Phase};
use loris::cache::KvFormat;
use loris_loader::Dtype;

use world::{BASE, Case, LAYER, Model, Row, Sequence, Target, World, targets};

/// The shapes, formats and models that every op is checked at.
fn cases() -> Vec<Case> {
    let shape =
        |n_q_heads, n_kv_heads, head_dim| AttentionShape { n_q_heads, n_kv_heads, head_dim };
    let mut cases = vec![
        BASE,
        Case { extras: true, ..BASE },
        Case { dtype: Dtype::F32, kv: KvFormat::F32, extras: true, ..BASE },
        Case { dtype: Dtype::F16, ..BASE },
        Case { window: Some(1), ..BASE },
        Case { window: Some(20), ..BASE },
        Case { window: Some(70), kv: KvFormat::F32, ..BASE },
        // Widths that are no multiple of anything.
        Case { hidden: 77, ffn: 131, ..BASE },
        Case { hidden: 77, ffn: 131, dtype: Dtype::F16, ..BASE },
        Case { hidden: 77, ffn: 131, dtype: Dtype::F32, ..BASE },
        // More than one block of k.
        Case { hidden: 700, ffn: 1300, ..BASE },
        Case { hidden: 700, ffn: 37, dtype: Dtype::F32, ..BASE },
    ];
    for page_len in [16, 32, 128, 5] {
        cases.push(Case { page_len, ..BASE });
    }
    for (n_q, n_kv, d) in [
        (1, 1, 64),
        (4, 4, 64),
        (4, 1, 128),
        (8, 1, 80),
        (5, 1, 64),
        (7, 1, 6),
        (16, 1, 34),
        (2, 1, 256),
    ] {
        cases.push(Case { shape: shape(n_q, n_kv, d), ..BASE });
    }
    cases.push(Case { shape: shape(8, 1, 80), kv: KvFormat::F32, dtype: Dtype::F32, ..BASE });
    cases
}

#[test]
fn ops_agree_with_the_reference() {
    for target in &targets() {
        for case in cases() {
            let model = Model::new(case);
            let mut world = World::new(&model, target, 2);
            let mut a = Sequence::new(1, 300, |i| i as u32);
            let mut b = Sequence::new(2, 300, |i| i as u32 + 4_000_000);
            let mut c = Sequence::new(3, 300, |i| i as u32 / 2);
            use Phase::{Decode, Prefill};
            world.forward(Prefill, &mut [(&mut a, 1)], true);
            world.forward(Prefill, &mut [(&mut b, 63)], true);
            world.forward(Prefill, &mut [(&mut a, 90), (&mut b, 1), (&mut c, 129)], true);
            world.forward(Decode, &mut [(&mut a, 1)], true);
            world.forward(Decode, &mut [(&mut c, 1), (&mut a, 1)], true);
            world.forward(Decode, &mut [(&mut a, 1), (&mut b, 1), (&mut c, 1)], true);
            world.forward(Prefill, &mut [(&mut b, 2), (&mut a, 35)], true);
            world.forward(Decode, &mut [(&mut b, 3), (&mut a, 2)], true);
        }
    }
}

/// Positions that go down and up again, rows that see few slots or none.
#[test]
fn masks_follow_positions() {
    for target in &targets() {
        for window in [None, Some(9), Some(0)] {
            let model = Model::new(Case { window, ..BASE });
            let mut world = World::new(&model, target, 2);
            let mut down = Sequence::new(4, 260, |i| 1000 - i as u32);
            let mut mixed = Sequence::new(5, 260, |i| (i as u32 * 37) % 256);
            for n in [70, 66] {
                world.forward(Phase::Prefill, &mut [(&mut down, n), (&mut mixed, n)], true);
            }
            world.forward(Phase::Decode, &mut [(&mut down, 1), (&mut mixed, 1)], true);
            let rows = world.forward(Phase::Decode, &mut [(&mut down, 1)], true);
            if window == Some(0) {
                assert!(rows[0].attn.iter().all(|&x| x == 0.0), "a row that sees nothing");
            }
        }
    }
}

/// More than one split in decode, and long enough for several tasks in prefill.
#[test]
fn long_sequences_agree_with_the_reference() {
    for target in &targets() {
        for (kv, window) in [(KvFormat::Bf16, None), (KvFormat::F32, Some(600))] {
            let model = Model::new(Case { kv, window, dtype: Dtype::F32, ..BASE });
            let mut world = World::new(&model, target, 2);
            let mut a = Sequence::new(1, 1300, |i| i as u32);
            world.forward(Phase::Prefill, &mut [(&mut a, 1000)], false);
            world.forward(Phase::Prefill, &mut [(&mut a, 24)], true);
            for _ in 0..2 {
                world.forward(Phase::Decode, &mut [(&mut a, 1)], true);
            }
        }
    }
}

/// The rows of three sequences, prefilled in the given chunks and then decoded for two steps.
fn rows_of(
    model: &Model,
    target: &Target<CpuBackend>,
    threads: usize,
    chunks: &[usize],
    together: bool,
) -> Vec<Vec<u32>> {
    let mut world = World::new(model, target, threads);
    let mut seqs = [
        Sequence::new(1, 300, |i| i as u32),
        Sequence::new(2, 300, |i| 3 * i as u32 + 70_000),
        Sequence::new(3, 300, |i| 2 * i as u32),
    ];
    let steps = chunks.iter().map(|&n| (Phase::Prefill, n)).chain([(Phase::Decode, 1); 2]);
    let mut rows = vec![Vec::new(); 3];
    for (phase, n) in steps {
        if together {
            let mut parts: Vec<_> = seqs.iter_mut().map(|s| (s, n)).collect();
            let out = world.forward(phase, &mut parts, false);
            for (rows, out) in rows.iter_mut().zip(out.chunks_exact(n)) {
                rows.extend(out.iter().flat_map(Row::bits));
            }
        } else {
            for (rows, seq) in rows.iter_mut().zip(&mut seqs) {
                let out = world.forward(phase, &mut [(seq, n)], false);
                rows.extend(out.iter().flat_map(Row::bits));
            }
        }
    }
    rows
}

#[test]
fn bits_do_not_depend_on_batch_chunks_threads_or_pages() {
    let wide = AttentionShape { n_q_heads: 3, n_kv_heads: 1, head_dim: 64 };
    for target in &targets() {
        for case in [
            BASE,
            Case { extras: true, window: Some(50), hidden: 77, ..BASE },
            Case { kv: KvFormat::F32, dtype: Dtype::F32, hidden: 700, shape: wide, ..BASE },
        ] {
            let model = Model::new(case);
            let base = rows_of(&model, target, 2, &[150], true);
            let width = base[0].len() / 152;
            let same = |other: Vec<Vec<u32>>, what: &str| {
                for (seq, (base, other)) in base.iter().zip(&other).enumerate() {
                    let first = base.iter().zip(other).position(|(a, b)| a != b);
                    let at = first.map(|i| (i / width, i % width, base[i], other[i]));
                    assert!(first.is_none(), "{} {what}: seq {seq} {at:x?} {case:?}", target.name);
                }
            };
            same(rows_of(&model, target, 2, &[150], false), "being alone");
            same(rows_of(&model, target, 2, &[64, 86], true), "chunks of 64 and 86");
            same(rows_of(&model, target, 2, &[1, 62, 2, 85], false), "uneven chunks");
            same(rows_of(&model, target, 1, &[150], true), "one thread");
            same(rows_of(&model, target, 3, &[100, 50], true), "three threads");
            for page_len in [16, 32, 128] {
                let model = Model::new(Case { page_len, ..case });
                same(rows_of(&model, target, 2, &[150], true), "page length");
            }
        }
    }
}

/// Unused pages and slots are NaN in every test above; this shows that the poison is there.
#[test]
fn unused_slots_are_poisoned() {
    let target = &targets()[0];
    let model = Model::new(BASE);
    let mut world = World::new(&model, target, 1);
    let mut seq = Sequence::new(1, 10, |i| i as u32);
    world.forward(Phase::Prefill, &mut [(&mut seq, 3)], true);
    let mut bytes = vec![0; world.layout.bytes()];
    world.backend.read_page(&world.pages, seq.table[LAYER], &mut bytes).unwrap();
    assert!(bytes.ends_with(&[0xff; 64]), "slots behind the last are as they were");
}

#[test]
fn pages_are_copied_whole() {
    for target in &targets() {
        let model = Model::new(BASE);
        let mut world = World::new(&model, target, 1);
        let bytes: Vec<u8> = (0..world.layout.bytes()).map(|i| i as u8).collect();
        let (backend, pages) = (&mut world.backend, &mut world.pages);
        backend.write_page(pages, 5, &bytes).unwrap();
        backend.copy_page(pages, 5, 2).unwrap();
        let mut out = vec![0; bytes.len()];
        backend.read_page(pages, 2, &mut out).unwrap();
        assert_eq!(out, bytes);
    }
}

#[test]
fn an_absent_instruction_set_is_refused() {
    for isa in [Isa::Avx2, Isa::Avx512, Isa::Avx512Bf16] {
        let made = CpuBackend::new(CpuOptions { threads: 1, isa: Some(isa) });
        assert_eq!(made.is_ok(), isa.is_available(), "{isa:?}");
    }
}

#[test]
fn a_token_out_of_range_is_an_error() {
    let target = &targets()[0];
    let model = Model::new(BASE);
    let mut world = World::new(&model, target, 1);
    let batch = Batch {
        phase: Phase::Prefill,
        tokens: vec![75],
        positions: vec![0],
        seqs: Vec::new(),
        logit_rows: Vec::new(),
    };
    let mut x = world.backend.rows(1, BASE.hidden).unwrap();
    let error = world.backend.embed(&world.embed, &batch, &mut x).unwrap_err();
    assert!(matches!(error, loris::Error::TokenOutOfRange { id: 75, vocab_size: 75 }), "{error}");
}
