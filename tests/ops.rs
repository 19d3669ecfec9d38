//! Every backend op against the naive f64 reference, and bit-for-bit invariance of the results.
//!
//! One body, generic over a [`Target`], runs for every instruction set of the machine (bf16 products
//! included, emulated where the CPU lacks them) and for the CUDA kernels, on the twin or with
//! `LORIS_TEST_DRIVER=cuda` on a GPU. A *world* is one layer with random weights and some
//! sequences over a pool of pages in which everything that no token was written to is NaN.
//!
//! Bounds: a result of f32 kernels is compared at 1e-5 of the largest magnitude in its row (chains of some
//! hundred additions, each off by 2^-24). Where a backend multiplies in bf16 each factor is off by up to
//! 2^-9, which random signs keep near 2^-9 of the row: 1e-2 of the largest magnitude. Where it stores in
//! bf16 each result is off by 2^-9 of itself. Inputs of each op are what the op before really gave, so
//! errors do not add up.

#![allow(clippy::unwrap_used)]

mod reference;
mod world;

use loris::backend::cpu::{CpuBackend, CpuOptions, Isa};
use loris::backend::{Backend, Batch, Phase, RowUse, Seq, Slots, Table};
use loris::read::Rule;
use loris::store::{AttentionShape, Coding, KvFormats, PageId, PageLayout, Part, Seal, Side};
use loris_loader::{Dtype, Weights};

use world::{
    BASE, BF16, Both, Case, F32, LAYER, Model, Random, Row, Sequence, Target, World,
    assert_refused, cpus, cudas,
};

/// Runs a check that is generic over the backend on every target.
macro_rules! on_every_target {
    ($check:ident) => {
        cpus().iter().for_each($check);
        cudas().iter().for_each($check);
    };
}

/// The shapes, formats and models that every op is checked at.
fn cases() -> Vec<Case> {
    let shape =
        |n_q_heads, n_kv_heads, head_dim| AttentionShape { n_q_heads, n_kv_heads, head_dim };
    let mut cases = vec![
        BASE,
        Case { extras: true, ..BASE },
        Case { dtype: Dtype::F32, kv: F32, extras: true, ..BASE },
        Case { dtype: Dtype::F16, ..BASE },
        Case { window: Some(1), ..BASE },
        Case { window: Some(20), ..BASE },
        Case { window: Some(70), kv: F32, ..BASE },
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
    cases.push(Case { shape: shape(8, 1, 80), kv: F32, dtype: Dtype::F32, ..BASE });
    for format in ["fp8", "int8", "int4", "int4-plain", "int8:int4", "int4:bf16", "bf16:fp8"] {
        cases.push(Case { kv: kv(format), ..BASE });
        cases.push(Case { kv: kv(format), shape: shape(3, 1, 64), extras: true, ..BASE });
    }
    for (format, page_len) in [("int8", 16), ("int4", 16), ("int4", 128), ("fp8", 256)] {
        cases.push(Case { kv: kv(format), page_len, window: Some(70), ..BASE });
    }
    for (format, page_len, shape) in [
        ("int4-channel", 16, BASE.shape),
        ("int2", 16, shape(3, 1, 64)),
        ("int2:int8", 32, shape(3, 1, 64)),
        ("bf16:int2", 16, shape(1, 1, 64)),
        ("int2:int4-channel", 16, shape(2, 1, 128)),
    ] {
        cases.push(Case { kv: kv(format), page_len, shape, extras: page_len == 32, ..BASE });
    }
    for (format, d) in [("int8", 6), ("fp8", 80), ("int4", 96), ("int4", 128), ("int8", 256)] {
        cases.push(Case { kv: kv(format), shape: shape(4, 2, d), ..BASE });
    }
    cases
}

fn kv(format: &str) -> KvFormats {
    format.parse().unwrap()
}

fn check_ops<B: Backend>(target: &Target<B>) {
    for case in cases() {
        if !(target.runs)(&case) {
            assert_refused(target, &case);
            continue;
        }
        let model = Model::new(case);
        let mut world = World::new(&model, target, 2);
        let mut a = Sequence::new(1, 300, |i| i as u32);
        let mut b = Sequence::new(2, 300, |i| i as u32 + 4_000_000);
        let mut c = Sequence::new(3, 300, |i| i as u32 / 2);
        use Phase::{Decode, Prefill};
        let [n_b, n_a, n_c] = if target.is_slow { [15, 18, 65] } else { [63, 90, 129] };
        world.forward(Prefill, &mut [(&mut a, 1)], true);
        world.forward(Prefill, &mut [(&mut b, n_b)], true);
        world.forward(Prefill, &mut [(&mut a, n_a), (&mut b, 1), (&mut c, n_c)], true);
        world.forward(Decode, &mut [(&mut a, 1)], true);
        world.forward(Decode, &mut [(&mut c, 1), (&mut a, 1)], true);
        world.forward(Decode, &mut [(&mut a, 1), (&mut b, 1), (&mut c, 1)], true);
        world.forward(Prefill, &mut [(&mut b, 2), (&mut a, n_b - 10)], true);
        world.forward(Decode, &mut [(&mut b, 3), (&mut a, 2)], true);
    }
}

#[test]
fn ops_agree_with_the_reference() {
    on_every_target!(check_ops);
}

fn check_masks<B: Backend>(target: &Target<B>) {
    for window in [None, Some(9), Some(0)] {
        let model = Model::new(Case { window, ..BASE });
        let mut world = World::new(&model, target, 2);
        let mut down = Sequence::new(4, 260, |i| 1000 - i as u32);
        let mut mixed = Sequence::new(5, 260, |i| (i as u32 * 37) % 256);
        for n in if target.is_slow { [40, 27] } else { [70, 66] } {
            world.forward(Phase::Prefill, &mut [(&mut down, n), (&mut mixed, n)], true);
        }
        world.forward(Phase::Decode, &mut [(&mut down, 1), (&mut mixed, 1)], true);
        let rows = world.forward(Phase::Decode, &mut [(&mut down, 1)], true);
        if window == Some(0) {
            assert!(rows[0].attn.iter().all(|&x| x == 0.0), "a row that sees nothing");
        }
    }
}

/// Positions that go down and up again, rows that see few slots or none.
#[test]
fn masks_follow_positions() {
    on_every_target!(check_masks);
}

fn check_long<B: Backend>(target: &Target<B>) {
    let wide = AttentionShape { n_q_heads: 3, n_kv_heads: 1, head_dim: 64 };
    for (kv, window, shape) in [
        (BF16, None, BASE.shape),
        (F32, Some(600), BASE.shape),
        (kv("int4"), None, BASE.shape),
        (kv("int8"), None, BASE.shape),
        (kv("int2"), None, wide),
        (kv("int4-channel"), Some(300), wide),
    ] {
        let case = Case { kv, window, shape, dtype: Dtype::F32, ..BASE };
        if !(target.runs)(&case) {
            continue;
        }
        let model = Model::new(case);
        let mut world = World::new(&model, target, 2);
        let mut a = Sequence::new(1, 1300, |i| i as u32);
        let n = if target.is_slow { 500 } else { 1000 };
        world.forward(Phase::Prefill, &mut [(&mut a, n)], false);
        world.forward(Phase::Prefill, &mut [(&mut a, 24)], true);
        for _ in 0..2 {
            world.forward(Phase::Decode, &mut [(&mut a, 1)], true);
        }
    }
}

fn check_streams<B: Backend>(target: &Target<B>) {
    use Phase::{Decode, Prefill};
    for (kv, sinks, window, head_dim) in [
        (BF16, 4, 50, 32),
        (BF16, 64, 30, 64),
        (BF16, 1, 40, 128),
        (F32, 1, 70, 32),
        (F32, 0, 20, 32),
        (kv("fp8"), 4, 30, 32),
        (kv("int8"), 2, 40, 128),
        (kv("int4"), 3, 33, 32),
        (kv("int4"), 4, 20, 64),
        (kv("int4-plain"), 0, 25, 128),
        (kv("int8:fp8"), 4, 1, 32),
        (kv("int8:int4"), 1, 1, 64),
        (kv("bf16:int4"), 4, 64, 32),
    ] {
        let rule = Rule { sinks, window };
        let shape = AttentionShape { head_dim, ..BASE.shape };
        let case = Case { kv, shape, rule, extras: sinks == 3, ..BASE };
        if !(target.runs)(&case) {
            continue;
        }
        let model = Model::new(case);
        let mut world = World::new(&model, target, 2);
        let mut a = Sequence::new(1, 300, |i| i as u32);
        let mut b = Sequence::new(2, 300, |i| i as u32);
        world.forward(Prefill, &mut [(&mut a, 2)], true);
        world.forward(Prefill, &mut [(&mut a, 47), (&mut b, 90)], true);
        world.forward(Decode, &mut [(&mut a, 1), (&mut b, 1)], true);
        for n in [5, 20, 70] {
            world.forward(Prefill, &mut [(&mut a, n)], true);
            world.forward(Decode, &mut [(&mut b, 1), (&mut a, 1)], true);
        }
    }
}

#[test]
fn streams_agree_with_the_reference() {
    on_every_target!(check_streams);
}

/// The same tokens near the start and four million tokens later.
fn check_far_streams<B: Backend>(target: &Target<B>) {
    let rule = Rule { sinks: 4, window: 40 };
    for case in [
        Case { kv: F32, dtype: Dtype::F32, rule, ..BASE },
        Case { rule, ..BASE },
        Case { kv: kv("int8"), rule, ..BASE },
    ] {
        if !(target.runs)(&case) {
            continue;
        }
        let model = Model::new(case);
        let rows = |offset: u32, phase: Phase| {
            let mut world = World::new(&model, target, 2);
            let position = move |i| if i < 4 { i as u32 } else { i as u32 + offset };
            let mut seq = Sequence::new(1, 200, position);
            world.forward(Phase::Prefill, &mut [(&mut seq, 60)], true);
            let n = if phase == Phase::Decode { 1 } else { 70 };
            world.forward(phase, &mut [(&mut seq, n)], true)
        };
        for phase in [Phase::Prefill, Phase::Decode] {
            // Keys and queries that are stored in few bits are so in other places of the circle.
            let is_exact = case.kv == F32;
            for (near, far) in rows(0, phase).iter().zip(&rows(3_999_900, phase)) {
                let largest = near.attn.iter().fold(0.0_f32, |max, x| max.max(x.abs()));
                for (x, y) in near.attn.iter().zip(&far.attn).filter(|_| is_exact) {
                    assert!((x - y).abs() <= 1e-5 * largest, "{} {phase:?}: {x} {y}", target.name);
                }
            }
        }
    }
}

#[test]
fn a_stream_is_the_same_millions_of_tokens_later() {
    on_every_target!(check_far_streams);
}

/// More than one split in decode, and long enough for several tasks in prefill.
#[test]
fn long_sequences_agree_with_the_reference() {
    on_every_target!(check_long);
}

/// Tables whose tails become coded pages one by one, in pages of all lengths: rows of both phases behind few pages and many.
fn check_sealed<B: Backend>(target: &Target<B>) {
    let shape =
        |n_q_heads, n_kv_heads, head_dim| AttentionShape { n_q_heads, n_kv_heads, head_dim };
    for (format, page_len, shape, window) in [
        ("int4-channel", 16, BASE.shape, None),
        ("int4-channel", 32, shape(2, 1, 128), Some(60)),
        ("int4-channel", 16, shape(4, 2, 64), None),
        ("int4-channel", 256, BASE.shape, None),
        ("int2", 16, shape(3, 3, 64), None),
        ("int2", 32, shape(4, 2, 64), Some(70)),
        ("int2", 16, shape(16, 1, 128), None),
    ] {
        let case = Case { kv: kv(format), page_len, shape, window, ..BASE };
        let model = Model::new(case);
        let mut world = World::new(&model, target, 2);
        let mut a = Sequence::new(1, 300, |i| i as u32);
        let mut b = Sequence::new(2, 300, |i| 4 * i as u32 + 70_000);
        use Phase::{Decode, Prefill};
        world.forward(Prefill, &mut [(&mut a, 3), (&mut b, 150)], false);
        world.forward(Prefill, &mut [(&mut a, 1)], true);
        world.forward(Decode, &mut [(&mut a, 1), (&mut b, 1)], true);
        // Of both, the first is the last row in front of a page to seal, and of its page.
        for n in [47, 16, 1, 63] {
            world.forward(Prefill, &mut [(&mut a, n)], n < 60);
            world.forward(Decode, &mut [(&mut b, 1), (&mut a, 1)], true);
        }
        world.forward(Prefill, &mut [(&mut b, 9), (&mut a, 20)], true);
        world.forward(Decode, &mut [(&mut b, 3), (&mut a, 2)], true);
        assert!(page_len == 256 || (a.n_sealed > 1 && b.n_sealed > 1), "{format} {page_len}");
    }
}

#[test]
fn sealed_tables_agree_with_the_reference() {
    on_every_target!(check_sealed);
}

/// The rows of three sequences, prefilled in the given chunks and then decoded for two steps.
fn rows_of<B: Backend>(
    model: &Model,
    target: &Target<B>,
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

fn check_bits<B: Backend>(target: &Target<B>) {
    let wide = AttentionShape { n_q_heads: 3, n_kv_heads: 1, head_dim: 64 };
    let normed = Case { extras: true, window: Some(50), ..BASE };
    for case in [
        BASE,
        Case {
            hidden: if (target.runs)(&Case { hidden: 77, ..BASE }) { 77 } else { 80 },
            ..normed
        },
        Case { kv: F32, dtype: Dtype::F32, hidden: 700, shape: wide, ..BASE },
        Case { kv: kv("int8"), ..BASE },
        Case { kv: kv("int4:fp8"), ..BASE },
    ] {
        if !(target.runs)(&case) {
            continue;
        }
        let n = if target.is_slow { 75 } else { 150 };
        let model = Model::new(case);
        let base = rows_of(&model, target, 2, &[n], true);
        let width = base[0].len() / (n + 2);
        let same = |other: Vec<Vec<u32>>, what: &str| {
            for (seq, (base, other)) in base.iter().zip(&other).enumerate() {
                let first = base.iter().zip(other).position(|(a, b)| a != b);
                let at = first.map(|i| (i / width, i % width, base[i], other[i]));
                assert!(first.is_none(), "{} {what}: seq {seq} {at:x?} {case:?}", target.name);
            }
        };
        same(rows_of(&model, target, 2, &[n], false), "being alone");
        same(rows_of(&model, target, 2, &[64, n - 64], true), "chunks of 64 and the rest");
        if !target.is_slow {
            same(rows_of(&model, target, 2, &[1, 62, 2, n - 65], false), "uneven chunks");
            same(rows_of(&model, target, 1, &[n], true), "one thread");
            same(rows_of(&model, target, 3, &[n - 50, 50], true), "three threads");
        }
        for page_len in [16, 32, 128] {
            let model = Model::new(Case { page_len, ..case });
            same(rows_of(&model, target, 2, &[n], true), "page length");
        }
    }
}

#[test]
fn bits_do_not_depend_on_batch_chunks_threads_or_pages() {
    on_every_target!(check_bits);
}

/// Unused pages and slots are NaN in every test above; this shows that the poison is there.
#[test]
fn unused_slots_are_poisoned() {
    let target = &cpus()[0];
    let model = Model::new(BASE);
    let mut world = World::new(&model, target, 1);
    let mut seq = Sequence::new(1, 10, |i| i as u32);
    world.forward(Phase::Prefill, &mut [(&mut seq, 3)], true);
    let mut bytes = vec![0; world.layout.bytes()];
    world.backend.read_page(&world.pages, seq.table[LAYER], &mut bytes).unwrap();
    assert!(bytes.ends_with(&[0xff; 64]), "slots behind the last are as they were");
}

fn check_pages<B: Backend>(target: &Target<B>) {
    let model = Model::new(BASE);
    let mut world = World::new(&model, target, 1);
    let bytes = |seed: usize| (0..world.layout.bytes()).map(|i| (i * seed) as u8).collect();
    let written: [Vec<u8>; 2] = [bytes(1), bytes(3)];
    let (backend, pages) = (&mut world.backend, &mut world.pages);
    backend.write_page(pages, 5, &written[0]).unwrap();
    backend.write_page(pages, 6, &written[1]).unwrap();
    backend.copy_pages(pages, &[(5, 2), (6, 9)]).unwrap();
    for (page, want) in [(2, &written[0]), (9, &written[1]), (5, &written[0])] {
        let mut out = vec![0; want.len()];
        backend.read_page(pages, page, &mut out).unwrap();
        assert!(out == *want, "{} page {page}", target.name);
    }
}

#[test]
fn pages_are_copied_whole() {
    on_every_target!(check_pages);
}

/// Lists of slots that stay of `n`, the first `fixed` of them always: edges of lists and of pages.
fn keeps(n: u32, fixed: u32, page_len: u32) -> Vec<Vec<u32>> {
    let with = |rest: &dyn Fn(u32) -> bool| (0..n).filter(|&s| s < fixed || rest(s)).collect();
    let in_page = |slot: u32| (slot + page_len - fixed) % page_len;
    vec![
        vec![],
        (0..fixed.max(1)).collect(),
        with(&|_| true),
        with(&|slot| slot > fixed),
        with(&|slot| slot + 1 == n),
        with(&|slot| [page_len - 1, 0, 1].contains(&in_page(slot))),
        with(&|slot| slot < 5 || slot % 3 == 1 || slot + 9 > n),
    ]
}

/// Slots move byte for byte, in each layer by its own list, and keys are as long as their numbers say.
fn check_kept<B: Backend>(target: &Target<B>) {
    for (format, page_len, d) in [
        ("bf16", 16, 64),
        ("f32", 16, 34),
        ("fp8", 16, 32),
        ("int8", 16, 64),
        ("int4", 32, 96),
        ("int4", 16, 128),
        ("int4-plain", 32, 32),
        ("fp8:int4", 64, 64),
        ("int8:int4", 32, 64),
        ("bf16:int4", 16, 128),
    ] {
        let shape = AttentionShape { n_q_heads: 4, n_kv_heads: 2, head_dim: d };
        let case = Case { kv: kv(format), page_len, shape, ..BASE };
        if !(target.runs)(&case) {
            continue;
        }
        let what = format!("{} {format} page {page_len}", target.name);
        let model = Model::new(case);
        let mut world = World::new(&model, target, 2);
        let n = if target.is_slow { 70 } else { 150 };
        let mut a = Sequence::new(1, 200, |i| i as u32);
        world.forward(Phase::Prefill, &mut [(&mut a, n)], false);
        let layout = world.layout;
        let table = Table { body: &a.table, tail: &[], n_layers: world::N_LAYERS };
        for n in [n, layout.first_len() + 1, layout.first_len(), 1, 0] {
            let mut norms = vec![0.0; n];
            world.backend.key_norms(&world.pages, table, LAYER, &mut norms).unwrap();
            for (slot, (heads, got)) in world.slots(&a, LAYER).iter().zip(norms).enumerate() {
                let length = |head: &Vec<f64>| head.iter().map(|x| x * x).sum::<f64>().sqrt();
                let want = heads[0].iter().map(length).sum::<f64>() / 2.0;
                reference::compare(&[got], &[want], 1e-5, 0.0, &format!("{what}: slot {slot}"));
            }
        }

        // Every page of the table, and some of another.
        let mut other = Sequence::new(2, 1, |i| i as u32);
        world.grow(&mut other, 1);
        let ids: Vec<_> = a.table.iter().chain(&other.table).copied().collect();
        let read = |world: &mut World<'_, B>| -> Vec<Vec<u8>> {
            let page = |&id| {
                let mut bytes = vec![0; layout.bytes()];
                world.backend.read_page(&world.pages, id, &mut bytes).unwrap();
                bytes
            };
            ids.iter().map(page).collect()
        };
        for (n, &id) in ids.iter().enumerate() {
            let bytes: Vec<u8> =
                (0..layout.bytes()).map(|i| (i * 7 + i / 251 + n * 31) as u8).collect();
            world.backend.write_page(&mut world.pages, id, &bytes).unwrap();
        }
        let fixed = if layout.skew() > 0 { layout.first_len() as u32 } else { 0 };
        for keep in keeps(n as u32, fixed, page_len as u32) {
            // Of the other layer as many stay, the last.
            let n_fixed = fixed.min(keep.len() as u32);
            let late = n as u32 - (keep.len() as u32 - n_fixed)..n as u32;
            let keep = [(0..n_fixed).chain(late).collect(), keep];
            let mut want = read(&mut world);
            for (layer, keep) in keep.iter().enumerate() {
                for (to, &from) in keep.iter().enumerate() {
                    move_slot(&mut want, layout, layer, from as usize, to);
                }
            }
            world.backend.keep_slots(&mut world.pages, table, &keep).unwrap();
            assert!(read(&mut world) == want, "{what}: {keep:?}");
        }
    }
}

/// What slot `from` holds of a layer goes to slot `to`, in the pages of a table.
fn move_slot(pages: &mut [Vec<u8>], layout: PageLayout, layer: usize, from: usize, to: usize) {
    let ((from_page, from), (to_page, to)) = (layout.place(from), layout.place(to));
    for (side, head) in [Side::K, Side::V]
        .into_iter()
        .flat_map(|side| (0..layout.n_kv_heads).map(move |head| (side, head)))
    {
        let parts = |page_idx: usize, slot: usize| {
            let form = layout.form(page_idx);
            let coding = form.coding(side);
            let (codes, params) = (form.codes(side, head, slot), form.params(side, head, slot));
            let (n_codes, n_params) =
                (coding.code_bytes(layout.head_dim), coding.param_bytes(layout.head_dim));
            [codes..codes + n_codes, params..params + n_params]
        };
        for (from, to) in parts(from_page, from).into_iter().zip(parts(to_page, to)) {
            let bytes = pages[from_page * world::N_LAYERS + layer][from].to_vec();
            pages[to_page * world::N_LAYERS + layer][to].copy_from_slice(&bytes);
        }
    }
}

#[test]
fn slots_that_stay_move_to_the_front() {
    on_every_target!(check_kept);
}

fn check_gather<B: Backend>(target: &Target<B>) {
    let model = Model::new(BASE);
    let mut world = World::new(&model, target, 1);
    let tokens: Vec<u32> = (0..40).collect();
    let slots = Slots::new(&world.layout, 0, tokens.clone());
    let seq = Seq {
        rows: 0..40,
        kv_start: 0,
        slots: &slots,
        table: Table { body: &[0, 1], tail: &[], n_layers: 2 },
        inv_freq: &model.inv_freq,
        rope_scale: 1.0,
        n_sealed: 0,
        rule: Rule::ALL,
    };
    let batch = Batch {
        phase: Phase::Prefill,
        positions: tokens.clone(),
        tokens: tokens.clone(),
        seqs: vec![seq],
        logit_rows: Vec::new(),
    };
    let mut x = world.backend.rows(40, BASE.hidden, RowUse::Residual).unwrap();
    let keep = [0, 1, 5, 6, 20, 39];
    let mut all = vec![0.0; 40 * BASE.hidden];
    let mut kept = vec![0.0; keep.len() * BASE.hidden];
    world.backend.begin(&batch, BASE.shape).unwrap();
    world.backend.embed(&world.embed, &batch, &mut x).unwrap();
    world.backend.read_rows(&x, 0, &mut all).unwrap();
    world.backend.gather_rows(&mut x, &keep).unwrap();
    world.backend.read_rows(&x, 0, &mut kept).unwrap();
    for (row, &from) in kept.chunks_exact(BASE.hidden).zip(&keep) {
        assert_eq!(row, &all[from * BASE.hidden..][..BASE.hidden], "{} row {from}", target.name);
    }
}

fn check_copies<B: Backend>(target: &Target<B>) {
    let model = Model::new(BASE);
    let mut world = World::new(&model, target, 1);
    let backend = &mut world.backend;
    let (n, n_waiting, width) = (300, 700, BASE.hidden);
    let tokens: Vec<u32> = (0..n).map(|i| i * 31 % BASE.vocab as u32).collect();
    let positions: Vec<u32> = (0..n).collect();
    let slots = Slots::new(&world.layout, 0, positions.clone());
    let seq = Seq {
        rows: 0..n as usize,
        kv_start: 0,
        slots: &slots,
        table: Table { body: &[0; 20], tail: &[], n_layers: 2 },
        inv_freq: &model.inv_freq,
        rope_scale: 1.0,
        n_sealed: 0,
        rule: Rule::ALL,
    };
    let (positions, logit_rows) = (positions.clone(), Vec::new());
    let batch = Batch { phase: Phase::Prefill, tokens, positions, seqs: vec![seq], logit_rows };
    let mut x = backend.rows(n as usize, width, RowUse::Residual).unwrap();
    backend.begin(&batch, BASE.shape).unwrap();
    backend.embed(&world.embed, &batch, &mut x).unwrap();
    let before = world::read(backend, &x, n as usize, width);
    // Each row to a place of its own, and back in another order.
    let away: Vec<(u32, u32)> = (0..n).map(|row| (row, row * 3 % n_waiting)).collect();
    let back: Vec<(u32, u32)> = away.iter().map(|&(row, at)| (at, n - 1 - row)).collect();
    // What is embedded is exact in bf16.
    for holds in [RowUse::Transit, RowUse::Waiting(Coding::F32), RowUse::Waiting(Coding::BF16)] {
        backend.embed(&world.embed, &batch, &mut x).unwrap();
        let mut waiting = backend.rows(n_waiting as usize, width, holds).unwrap();
        backend.copy_rows(&x, &mut waiting, &away).unwrap();
        backend.copy_rows(&waiting, &mut x, &[]).unwrap();
        backend.copy_rows(&waiting, &mut x, &back).unwrap();
        let after = world::read(backend, &x, n as usize, width);
        assert!(after.iter().rev().eq(&before), "{}, {holds:?}", target.name);
    }
}

#[test]
fn rows_wait_and_come_back() {
    on_every_target!(check_copies);
}

#[test]
fn rows_move_to_the_front() {
    on_every_target!(check_gather);
}

#[test]
fn an_absent_instruction_set_is_refused() {
    for isa in [Isa::Avx2, Isa::Avx512, Isa::Avx512Bf16] {
        let made = CpuBackend::new(CpuOptions { threads: 1, isa: Some(isa) });
        assert_eq!(made.is_ok(), isa.is_available(), "{isa:?}");
    }
}

#[test]
fn instruction_sets_are_named_and_found_by_name() {
    for isa in Isa::available() {
        assert_eq!(isa.to_string().parse::<Isa>().unwrap(), isa);
    }
    // Where a name is unknown nothing else is tested in its stead.
    for name in ["", "Avx2", "avx", "sse2"] {
        assert!(name.parse::<Isa>().unwrap_err().to_string().contains("portable, avx2"), "{name}");
    }
}

fn check_token<B: Backend>(target: &Target<B>) {
    let model = Model::new(BASE);
    let mut world = World::new(&model, target, 1);
    let batch = Batch {
        phase: Phase::Prefill,
        tokens: vec![75],
        positions: vec![0],
        seqs: Vec::new(),
        logit_rows: Vec::new(),
    };
    let mut x = world.backend.rows(1, BASE.hidden, RowUse::Residual).unwrap();
    let error = world.backend.embed(&world.embed, &batch, &mut x).unwrap_err();
    assert!(matches!(error, loris::Error::TokenOutOfRange { id: 75, vocab_size: 75 }), "{error}");
}

#[test]
fn a_token_out_of_range_is_an_error() {
    on_every_target!(check_token);
}

/// Weights of which each row has four numbers, of eight bits each, 2^-5 of one another; embeddings of 1 and -1. All
/// sums are exact in f32, in any order and with bf16 factors.
fn exact_model(case: Case) -> Model {
    let mut state = 11_u64;
    let mut random = || {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize
    };
    let mut model = Model::new(case);
    let both = |values: Vec<f32>, shape: Vec<usize>| {
        let bf16 = values.iter().map(|&x| half::bf16::from_f32(x));
        let bytes: Vec<u8> = bf16.clone().flat_map(|x| x.to_le_bytes()).collect();
        assert!(values.iter().zip(bf16).all(|(&x, y)| x == y.to_f32()));
        let tensor = vec![("t".into(), Dtype::BF16, shape, bytes)];
        let view = Weights::from_memory(tensor).unwrap().get("t").unwrap();
        Both { view, values: values.into_iter().map(f64::from).collect() }
    };
    let AttentionShape { n_q_heads, n_kv_heads, head_dim } = case.shape;
    for (i, n_heads) in [n_q_heads, n_kv_heads, n_kv_heads].into_iter().enumerate() {
        let n = n_heads * head_dim;
        let mut values = vec![0.0; n * case.hidden];
        for row in values.chunks_exact_mut(case.hidden) {
            for part in 0..4 {
                let bits = 128 + random() % 128;
                let column = random() % (case.hidden / 4) * 4 + part;
                row[column] = bits as f32 / 256.0 / (1 << (5 * part)) as f32;
            }
        }
        model.qkv[i] = both(values, vec![n, case.hidden]);
    }
    let signs = (0..case.vocab * case.hidden).map(|_| if random() % 2 == 0 { -1.0 } else { 1.0 });
    model.embed = both(signs.collect(), vec![case.vocab, case.hidden]);
    model.attn_norm = both(vec![1.0; case.hidden], vec![case.hidden]);
    model
}

/// The pages of a layer once some tokens are appended to them, all at position 0, where nothing is rotated.
fn appended<B: Backend>(target: &Target<B>, model: &Model, phase: Phase) -> Vec<u8> {
    const N: usize = 40;
    let mut world = World::new(model, target, 1);
    let mut seq = Sequence::new(1, N, |_| 0);
    world.grow(&mut seq, N);
    let slots = Slots::new(&world.layout, 0, seq.positions.clone());
    let seqs = vec![Seq {
        rows: 0..N,
        kv_start: 0,
        slots: &slots,
        table: Table { body: &seq.table, tail: &[], n_layers: world::N_LAYERS },
        inv_freq: &model.inv_freq,
        rope_scale: 1.0,
        rule: Rule::ALL,
        n_sealed: 0,
    }];
    let (tokens, positions) = (seq.tokens.clone(), seq.positions.clone());
    let batch = Batch { phase, tokens, positions, seqs, logit_rows: Vec::new() };
    let (b, shape) = (&mut world.backend, model.case.shape);
    let mut x = b.rows(N, model.case.hidden, RowUse::Residual).unwrap();
    let mut q = b.rows(N, shape.n_q_heads * shape.head_dim, RowUse::Operand).unwrap();
    b.begin(&batch, shape).unwrap();
    b.embed(&world.embed, &batch, &mut x).unwrap();
    let (weights, pages) = (&world.weights, &mut world.pages);
    b.norm_qkv_rope_append(weights, 0.0, &batch, LAYER, &x, &mut q, pages).unwrap();
    let mut bytes = Vec::new();
    for page in seq.table.chunks_exact(world::N_LAYERS) {
        let mut page_bytes = vec![0; world.layout.bytes()];
        b.read_page(&world.pages, page[LAYER], &mut page_bytes).unwrap();
        bytes.extend(page_bytes);
    }
    bytes
}

/// The same numbers become the same bytes on every device and instruction set.
#[test]
fn codes_are_the_same_on_every_target() {
    for (format, head_dim) in
        ["bf16", "fp8", "int8", "int4", "int4-plain", "int8:int4", "bf16:int4"]
            .into_iter()
            .flat_map(|format| [32, 64, 128].map(|d| (format, d)))
    {
        let shape = AttentionShape { n_q_heads: 2, n_kv_heads: 2, head_dim };
        let model = exact_model(Case { kv: kv(format), shape, page_len: 16, ..BASE });
        for phase in [Phase::Prefill, Phase::Decode] {
            let want = appended(&cpus()[0], &model, phase);
            let same = |name: &str, got: Vec<u8>| {
                let first = want.iter().zip(&got).position(|(a, b)| a != b);
                assert!(first.is_none(), "{name} {format} {head_dim} {phase:?}: byte {first:?}");
            };
            cpus().iter().for_each(|target| same(&target.name, appended(target, &model, phase)));
            cudas().iter().for_each(|target| same(&target.name, appended(target, &model, phase)));
        }
    }
}

/// A page that was sealed from a tail of random numbers, in both layers: channels of all kinds, the last of them `edge`.
fn sealed<B: Backend>(target: &Target<B>, model: &Model, edge: f32) -> Vec<u16> {
    let mut world = World::new(model, target, 2);
    let (layout, d) = (world.layout, model.case.shape.head_dim);
    let form = layout.form_of(Part::Tail);
    let mut random = Random::new(5);
    let mut number = |slot: usize, channel: usize| match channel {
        0 => 0.0,
        1 => 1.5,
        2 => 1e-7 * random.unit(),
        3 => 3e4 * random.unit(),
        4 if slot == 7 => 90.0,
        5 => random.unit() + 50.0,
        _ if channel + 1 == d => edge,
        _ => random.unit() * (1 + channel % 7) as f32,
    };
    let mut seals = Vec::new();
    for (first, to) in [(20, 3), (120, 2)] {
        let from: Vec<PageId> = (0..layout.n_to_seal() as PageId).map(|i| first + 3 * i).collect();
        for (idx, &page) in from.iter().enumerate() {
            let mut bytes = vec![0xff; layout.bytes()];
            for (side, head) in [Side::K, Side::V].map(|side| [(side, 0), (side, 1)]).concat() {
                for slot in 0..form.len {
                    let at = form.codes(side, head, slot);
                    for (channel, code) in bytes[at..at + 2 * d].chunks_exact_mut(2).enumerate() {
                        let x = number(idx * form.len + slot, channel);
                        code.copy_from_slice(&half::bf16::from_f32(x).to_le_bytes());
                    }
                }
            }
            world.backend.write_page(&mut world.pages, page, &bytes).unwrap();
        }
        seals.push(Seal { from, to });
    }
    world.backend.seal_pages(&mut world.pages, &seals).unwrap();
    let mut bytes = Vec::new();
    for page in [1, 2, 3, 4] {
        let mut page_bytes = vec![0; layout.bytes()];
        world.backend.read_page(&world.pages, page, &mut page_bytes).unwrap();
        bytes.extend(page_bytes);
    }
    bytes.chunks_exact(2).map(|word| u16::from_le_bytes([word[0], word[1]])).collect()
}

/// Scales that are not a number may be so in other bits.
#[test]
fn sealed_pages_are_the_same_on_every_target() {
    for (format, head_dim, page_len) in [
        ("int4-channel", 32, 16),
        ("int4-channel", 64, 64),
        ("int4-channel", 128, 256),
        ("int2", 64, 16),
        ("int2", 64, 256),
        ("int2", 128, 64),
    ] {
        let shape = AttentionShape { n_q_heads: 2, n_kv_heads: 2, head_dim };
        let model = Model::new(Case { kv: kv(format), shape, page_len, ..BASE });
        for edge in [-2.0, 6e4, f32::INFINITY, f32::NAN] {
            let want = sealed(&cpus()[0], &model, edge);
            let page = want.len() / 4;
            let is_poison = |page: &[u16]| page.iter().all(|&word| word == 0xffff);
            assert!(is_poison(&want[..page]) && is_poison(&want[3 * page..]));
            let is_nan = |word: u16| half::f16::from_bits(word).is_nan();
            let same = |name: &str, got: Vec<u16>| {
                let differs = |(&a, &b): (&u16, &u16)| a != b && !(is_nan(a) && is_nan(b));
                let first = want.iter().zip(&got).position(differs);
                let what = format!("{name} {format} {head_dim} {page_len} {edge}");
                assert!(first.is_none(), "{what}: word {first:?}, {page} a page");
            };
            cpus().iter().for_each(|target| same(&target.name, sealed(target, &model, edge)));
            cudas().iter().for_each(|target| same(&target.name, sealed(target, &model, edge)));
        }
    }
}
