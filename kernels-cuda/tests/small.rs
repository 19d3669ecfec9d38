//! `embed`, `page_copy`, `row_copy` and `fill_random`, bit for bit.

#![allow(clippy::unwrap_used)]

mod common;

use common::Random;
use loris_formats::Sides;
use loris_kernels::abi::{LORIS_DENSE, LorisSeq};
use loris_kernels::ops::batch::{DeviceBatch, HostBatch};
use loris_kernels::ops::row_copy::{self, Element};
use loris_kernels::ops::{embed, fill_random, page_copy};
use loris_kernels::{Buffer, Device, KvPages, Matrix, Rows};

fn random_words(random: &mut Random, n: usize) -> Vec<u16> {
    (0..n).map(|_| u16::try_from(random.below(1 << 16)).unwrap()).collect()
}

/// A batch that has tokens and nothing else worth naming.
fn token_batch(device: &Device, tokens: &[u32]) -> DeviceBatch {
    let n_rows = u32::try_from(tokens.len()).unwrap();
    let seqs = [LorisSeq {
        row_start: 0,
        n_rows,
        kv_start: 0,
        page_table_start: 0,
        positions_start: LORIS_DENSE,
        ..LorisSeq::default()
    }];
    let row_seq = vec![0; tokens.len()];
    let positions: Vec<u32> = (0..n_rows).collect();
    let mut batch = DeviceBatch::new(device, tokens.len(), 32).unwrap();
    let (row_seq, positions) = (&row_seq[..], &positions[..]);
    let host = HostBatch { seqs: &seqs, row_seq, positions, tokens, ..HostBatch::default() };
    batch.upload(device, &host).unwrap();
    batch
}

#[test]
fn embed_takes_rows_of_the_table() {
    let device = common::device();
    let mut random = Random::new(1);
    for (vocab_size, hidden_dim, n_rows) in [(1, 8, 1), (7, 576, 0), (100, 576, 3), (50, 2048, 17)]
    {
        let bits = random_words(&mut random, vocab_size * hidden_dim);
        let data = Buffer::from_slice(&device, &bits, "table").unwrap();
        let table = Matrix { data, n: vocab_size, k: hidden_dim };
        let tokens: Vec<usize> = (0..n_rows).map(|_| random.below(vocab_size)).collect();
        let ids: Vec<u32> = tokens.iter().map(|&t| u32::try_from(t).unwrap()).collect();
        let batch = token_batch(&device, &ids);
        let mut x = Rows::new(&device, n_rows, hidden_dim, "x").unwrap();
        embed::embed(&device, &table, &batch, &mut x).unwrap();

        let mut got = vec![0.0_f32; n_rows * hidden_dim];
        x.data.download(&device, 0, &mut got).unwrap();
        let rows = tokens.iter().flat_map(|&t| &bits[t * hidden_dim..][..hidden_dim]);
        for (got, &want) in got.iter().zip(rows) {
            assert_eq!(got.to_bits(), u32::from(want) << 16);
        }
    }
}

#[test]
fn page_copy_copies_whole_pages() {
    let device = common::device();
    let mut random = Random::new(2);
    // Pages below, at and above the 16 KB that a block copies.
    for (n_kv_heads, page_len, head_dim) in [(1, 16, 32), (2, 64, 32), (3, 64, 64), (1, 256, 128)] {
        let page_words = 2 * n_kv_heads * page_len * head_dim;
        let words = random_words(&mut random, 6 * page_words);
        let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
        let data = Buffer::from_slice(&device, &bytes, "pages").unwrap();
        let mut pages =
            KvPages { data, n_pages: 6, n_kv_heads, page_len, head_dim, kv: Sides::default() };
        let pairs = Buffer::from_slice(&device, &[0_u32, 5, 3, 1, 0, 2], "pairs").unwrap();
        for (n_pairs, from_of) in [(0, [0, 1, 2, 3, 4, 5]), (3, [0, 3, 0, 3, 4, 0])] {
            page_copy::page_copy(&device, &mut pages, &pairs, n_pairs).unwrap();
            let mut got = vec![0; bytes.len()];
            pages.data.download(&device, 0, &mut got).unwrap();
            for (page, from) in from_of.into_iter().enumerate() {
                let n = 2 * page_words;
                assert!(got[page * n..][..n] == bytes[from * n..][..n], "page {page}");
            }
        }
        assert!(page_copy::page_copy(&device, &mut pages, &pairs, 4).is_err());
    }
}

/// An element by the bits of an f32.
fn element<T: Element>(bits: u32) -> T {
    let bf16 = half::bf16::from_f32(f32::from_bits(bits)).to_bits();
    if T::IS_BF16 { bytemuck::cast_slice(&[bf16])[0] } else { bytemuck::cast_slice(&[bits])[0] }
}

/// Its value; what is not a number is one value.
fn value<T: Element>(x: T) -> f32 {
    let bits = if T::IS_BF16 {
        u32::from(bytemuck::cast_slice::<_, u16>(&[x])[0]) << 16
    } else {
        bytemuck::cast_slice::<_, u32>(&[x])[0]
    };
    f32::from_bits(bits)
}

fn copies_rows<A: Element, B: Element>(device: &Device) {
    let mut random = Random::new(3);
    // Widths below, at and above the 2048 columns of a block; pairs below and above those of a launch.
    for (n_from, width, n_to, n_pairs) in
        [(1, 8, 1, 1), (5, 576, 3, 0), (40, 576, 50, 33), (9, 2056, 20, 20), (3, 16, 700, 600)]
    {
        // Any bits: those that lie between two bf16, infinities, the largest numbers.
        let bits = (0..n_from * width).map(|i| match i % 5 {
            0 => 0x3f80_8000 + (random.below(4) << 15) as u32,
            1 => 0x7f7f_ffff,
            2 => 0xff80_0000,
            _ => random.uniform(-1.0, 1.0).to_bits(),
        });
        let data: Vec<A> = bits.map(element).collect();
        let mut from = Rows::new(device, n_from, width, "from").unwrap();
        from.data.upload(device, 0, &data).unwrap();
        let before: Vec<B> = (0..n_to * width).map(|i| element((i as f32).to_bits())).collect();
        let mut to = Rows::new(device, n_to, width, "to").unwrap();
        to.data.upload(device, 0, &before).unwrap();
        // Targets are spread and not in order; each is one pair's.
        let stride = (n_to / 2..).find(|s| n_to == 1 || gcd(*s, n_to) == 1).unwrap();
        let pairs: Vec<(usize, usize)> =
            (0..n_pairs).map(|i| (random.below(n_from), i * stride % n_to)).collect();
        let pairs32: Vec<(u32, u32)> = pairs.iter().map(|&(a, b)| (a as u32, b as u32)).collect();
        row_copy::row_copy(device, &from, &mut to, &pairs32).unwrap();

        let mut want: Vec<f32> = before.into_iter().map(value).collect();
        for (from, to) in pairs {
            for column in 0..width {
                let x = value(data[from * width + column]);
                want[to * width + column] = value(element::<B>(x.to_bits()));
            }
        }
        let got: Vec<f32> = to.data.to_vec(device).unwrap().into_iter().map(value).collect();
        assert!(got == want, "{n_pairs} of {n_from} rows of {width}");
    }
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[test]
fn rows_are_copied_by_index_and_rounded_to_nearest_even() {
    let device = common::device();
    copies_rows::<f32, f32>(&device);
    copies_rows::<f32, u16>(&device);
    copies_rows::<u16, f32>(&device);
    copies_rows::<u16, u16>(&device);
}

#[test]
fn rows_that_are_not_there_are_refused() {
    let device = common::device();
    let rows = |n, width| Rows::<f32>::new(&device, n, width, "rows").unwrap();
    let copy = |from: &Rows<f32>, mut to: Rows<f32>, pair| {
        row_copy::row_copy(&device, from, &mut to, &[(0, 0), pair]).is_ok()
    };
    assert!(copy(&rows(2, 8), rows(3, 8), (1, 2)));
    assert!(!copy(&rows(2, 8), rows(3, 8), (2, 2)));
    assert!(!copy(&rows(2, 8), rows(3, 8), (1, 3)));
    assert!(!copy(&rows(2, 8), rows(3, 16), (1, 2)));
    assert!(!copy(&rows(2, 12), rows(3, 12), (1, 2)));
}

#[test]
fn fill_random_is_the_same_on_the_host() {
    let device = common::device();
    for (n, k, seed, scale) in [(1, 8, 0, 1.0), (33, 72, 7, 0.02), (3, 7, u64::MAX - 3, 3e-5)] {
        let data = Buffer::new(&device, n * k, "matrix").unwrap();
        let mut matrix = Matrix { data, n, k };
        fill_random::fill_random(&device, &mut matrix, seed, scale).unwrap();
        let mut got = vec![0; n * k];
        matrix.data.download(&device, 0, &mut got).unwrap();
        let want: Vec<u16> =
            (0..(n * k) as u64).map(|i| fill_random::value(seed, i, scale)).collect();
        assert_eq!(got, want);
        assert!(n * k < 100 || got.iter().any(|bits| bits >> 15 == 1), "both signs");
    }
}
