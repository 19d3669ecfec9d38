//! Slots that move to the front of their layer, byte for byte, and how long keys are.
#![allow(clippy::unwrap_used)]

mod common;
#[path = "common/kv.rs"]
mod kv;

use common::Random;
use kv::{CODED, LAYER, Part, Positions, Sequence, head_at, pair, shape, upload};
use loris_formats::{Coding, PageLayout, Sides};
use loris_kernels::ops::key_norm::key_norm;
use loris_kernels::ops::slot_move::slot_move;
use loris_kernels::{Buffer, Device, KvPages, PageTable};

const N_LAYERS: usize = 2;

/// A pool of random bytes, and a table of pages all over it for `n_pages` pages a layer.
struct Pool {
    device: Device,
    pages: KvPages,
    table: PageTable,
    host_table: Vec<u32>,
}

impl Pool {
    fn new(kv: Sides, n_kv_heads: usize, head_dim: usize, page_len: usize, n: usize) -> Self {
        let device = common::device();
        let n_pages = n * N_LAYERS + 3;
        let mut random = Random::new(7);
        let n_bytes = n_pages * PageLayout::new(n_kv_heads, page_len, head_dim, kv).bytes();
        let bytes: Vec<u8> = (0..n_bytes).map(|_| random.below(256) as u8).collect();
        let data = Buffer::from_slice(&device, &bytes, "pages").unwrap();
        let mut host_table: Vec<u32> = (0..n_pages as u32).collect();
        (1..n_pages).for_each(|i| host_table.swap(i, random.below(i + 1)));
        host_table.truncate(n * N_LAYERS);
        let table = PageTable::new(&device, &host_table, N_LAYERS).unwrap();
        let pages = KvPages { data, n_pages, n_kv_heads, page_len, head_dim, kv };
        Self { device, pages, table, host_table }
    }

    fn bytes(&self) -> Vec<u8> {
        self.pages.data.to_vec(&self.device).unwrap()
    }

    /// Moves slots by the kernel, and one after another.
    fn check(&mut self, keep: &[Vec<u32>; N_LAYERS]) {
        let mut want = self.bytes();
        let page_bytes = self.pages.page_bytes();
        let KvPages { n_kv_heads, page_len, head_dim, kv, .. } = self.pages;
        for (layer, keep) in keep.iter().enumerate() {
            for (to, &from) in keep.iter().enumerate() {
                for (side, head) in (0..2).flat_map(|s| (0..n_kv_heads).map(move |h| (s, h))) {
                    let place = |slot| {
                        let at = head_at(kv, n_kv_heads, head_dim, page_len, slot, side, head);
                        let page = self.host_table[at.page_idx * N_LAYERS + layer] as usize;
                        [at.codes, at.params]
                            .map(|r| page * page_bytes + r.start..page * page_bytes + r.end)
                    };
                    for (from, to) in place(from as usize).into_iter().zip(place(to)) {
                        want.copy_within(from, to.start);
                    }
                }
            }
        }
        let buffer = Buffer::from_slice(&self.device, &keep.concat(), "keep").unwrap();
        let n_keep = keep[0].len();
        slot_move(&self.device, &mut self.pages, &self.table, &buffer, n_keep).unwrap();
        let first = self.bytes().iter().zip(&want).position(|(a, b)| a != b);
        let tail = &keep[1][n_keep.saturating_sub(9)..];
        assert!(first.is_none(), "{kv:?} d {head_dim} page {page_len}: byte {first:?}, ..{tail:?}");
    }
}

/// Lists of slots below `n` that stay, the first `fixed` always: edges of lists and of pages.
fn lists(n: u32, fixed: u32, page_len: u32) -> Vec<Vec<u32>> {
    let with = |rest: &dyn Fn(u32) -> bool| (0..n).filter(|&s| s < fixed || rest(s)).collect();
    let from_edge = |s: u32| (s + page_len - fixed) % page_len;
    vec![
        vec![],
        (0..fixed.max(1)).collect(),
        with(&|s| s + 1 == n),
        with(&|_| true),
        with(&|s| s > fixed),
        with(&|s| s % 3 == 1 || s > 40),
        with(&|s| [page_len - 1, 0, 1].contains(&from_edge(s))),
    ]
}

#[test]
fn slots_move_byte_for_byte() {
    for (i, kv) in [Sides::default()].into_iter().chain(CODED).enumerate() {
        let fixed = if kv.are_coded() { 4 } else { 0 };
        for (head_dim, page_len) in [(32, 16), (64, 64), (128, 16)] {
            let n = 90 + i as u32;
            let mut pool = Pool::new(kv, 1 + i % 2, head_dim, page_len, 8);
            for keep in lists(n, fixed, page_len as u32) {
                // Of the other layer as many stay, the last ones.
                let n_late = (keep.len() as u32).saturating_sub(fixed);
                let late = (0..fixed.min(keep.len() as u32)).chain(n - n_late..n).collect();
                pool.check(&[late, keep]);
            }
        }
    }
}

/// More than a block holds at once, in every order of its threads.
#[test]
fn long_lists_do_not_race() {
    let every_order = if common::on_twin() { 4 } else { 1 };
    for (kv, head_dim, n) in
        [(Sides::default(), 128, 200), (pair(Coding::INT8, Coding::INT4), 32, 1_300)]
    {
        let fixed = if kv.are_coded() { 4 } else { 0 };
        let mut pool = Pool::new(kv, 1, head_dim, 64, n as usize / 64 + 2);
        for seed in 0..every_order {
            if common::on_twin() {
                common::twin::Twin::get().set_seed(seed);
            }
            let keep: Vec<u32> = (0..n).filter(|&s| s < fixed || s % 40 != 9).collect();
            let late = (0..fixed).chain(n - (keep.len() as u32 - fixed)..n).collect();
            pool.check(&[keep, late]);
        }
    }
}

#[test]
fn lengths_of_keys() {
    let device = common::device();
    for kv in [Sides::default()].into_iter().chain(CODED) {
        for (head_dim, n_kv_heads) in [(32, 1), (64, 3), (128, 2)] {
            for (page_len, len) in [(16, 1), (16, 4), (16, 5), (16, 20), (16, 21), (64, 69)] {
                let shape = shape(n_kv_heads, n_kv_heads, head_dim);
                let seq = Sequence::coded(kv, shape, len, Positions::Dense, 1.0, 5);
                let up = upload(&device, &[Part::all(&seq)], page_len);
                let len = len as usize;
                let mut norms =
                    Buffer::from_slice(&device, &vec![f32::NAN; len + 2], "norms").unwrap();
                let table = PageTable::new(&device, &up.page_tables[5..], N_LAYERS).unwrap();
                key_norm(&device, &up.pages, &table, LAYER, len, &mut norms).unwrap();
                let got = norms.to_vec(&device).unwrap();
                for (slot, heads) in seq.heads[0].chunks_exact(n_kv_heads).enumerate() {
                    let length = |x: &[f64]| x.iter().map(|x| x * x).sum::<f64>().sqrt();
                    let sum: f64 = heads.iter().map(|head| length(&head.values)).sum();
                    let (got, want) = (f64::from(got[slot]), sum / n_kv_heads as f64);
                    let what = format!("{kv:?} d {head_dim} page {page_len} slot {slot} of {len}");
                    assert!((got - want).abs() <= 1e-6 * want, "{what}: {got}, not {want}");
                }
                assert!(got[len..].iter().all(|x| x.is_nan()), "slots that are not in use");
            }
        }
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let Pool { device, mut pages, table, .. } = Pool::new(CODED[0], 1, 32, 16, 3);
    let keep = |n: u32| {
        let slots: Vec<u32> = (0..n).map(|i| i % 36).collect();
        Buffer::from_slice(&device, &slots, "keep").unwrap()
    };
    let mut moved = |n, n_keep| slot_move(&device, &mut pages, &table, &keep(n), n_keep);
    assert!(moved(72, 36).is_ok() && moved(36, 36).is_ok() && moved(0, 0).is_ok());
    assert!(moved(37, 37).is_err(), "slots behind the table");
    assert!(moved(36, 12).is_err(), "three layers of two");
    assert!(moved(35, 16).is_err() && moved(35, 0).is_err() && moved(3, 4).is_err());
    let mut norms = Buffer::new(&device, 36, "norms").unwrap();
    let mut norm = |layer, n| key_norm(&device, &pages, &table, layer, n, &mut norms);
    assert!(norm(1, 36).is_ok() && norm(0, 0).is_ok());
    assert!(norm(2, 36).is_err() && norm(0, 37).is_err());
    let mut short = Buffer::new(&device, 35, "norms").unwrap();
    assert!(key_norm(&device, &pages, &table, 0, 36, &mut short).is_err());
    pages.head_dim = 80;
    assert!(slot_move(&device, &mut pages, &table, &keep(8), 8).is_err());
}

/// Pages that are coded as a whole have no slots that could be measured or moved one by one.
#[test]
fn sealed_pages_are_refused() {
    let kv = pair(Coding::INT4_CHANNEL, Coding::INT4);
    let mut pool = Pool::new(kv, 1, 32, 16, 4);
    let keep = Buffer::from_slice(&pool.device, &[0u32, 1, 2, 3], "keep").unwrap();
    let moved = slot_move(&pool.device, &mut pool.pages, &pool.table, &keep, 4).unwrap_err();
    let mut norms = Buffer::new(&pool.device, 4, "norms").unwrap();
    let measured = key_norm(&pool.device, &pool.pages, &pool.table, 0, 4, &mut norms).unwrap_err();
    for (op, error) in [("slot_move", moved), ("key_norm", measured)] {
        assert!(error.to_string().contains(op), "{error}");
    }
}
