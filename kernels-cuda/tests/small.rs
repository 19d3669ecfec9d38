//! `embed`, `page_copy`, `aux_gather` and `fill_random`, bit for bit.

#![allow(clippy::unwrap_used)]

mod common;

use common::Random;
use loris_kernels::abi::{LORIS_DENSE, LorisSeq};
use loris_kernels::ops::batch::{DeviceBatch, HostBatch};
use loris_kernels::ops::{aux_gather, embed, fill_random, page_copy};
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
        let mut pages = KvPages { data, n_pages: 6, n_kv_heads, page_len, head_dim };
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

#[test]
fn gather_takes_rows_by_index() {
    let device = common::device();
    let mut random = Random::new(3);
    for (n_from, width, n_rows) in [(1, 4, 1), (5, 576, 0), (40, 576, 33), (9, 2052, 20)] {
        let data: Vec<f32> = (0..n_from * width).map(|_| random.uniform(-1.0, 1.0)).collect();
        let mut from = Rows::new(&device, n_from, width, "from").unwrap();
        from.data.upload(&device, 0, &data).unwrap();
        let idx: Vec<usize> = (0..n_rows).map(|_| random.below(n_from)).collect();
        let idx32: Vec<u32> = idx.iter().map(|&i| u32::try_from(i).unwrap()).collect();
        let idx32 = Buffer::from_slice(&device, &idx32, "idx").unwrap();
        let mut to = Rows::new(&device, n_rows, width, "to").unwrap();
        aux_gather::gather_rows(&device, &from, &idx32, n_rows, &mut to).unwrap();

        let mut got = vec![0.0; n_rows * width];
        to.data.download(&device, 0, &mut got).unwrap();
        let want: Vec<f32> =
            idx.iter().flat_map(|&i| &data[i * width..][..width]).copied().collect();
        assert!(got == want, "{n_rows} of {n_from} rows of {width}");
    }
    let from = Rows::<f32>::new(&device, 1, 3, "from").unwrap(); // 12 bytes a row
    let mut to = Rows::new(&device, 1, 3, "to").unwrap();
    let idx = Buffer::from_slice(&device, &[0], "idx").unwrap();
    assert!(aux_gather::gather_rows(&device, &from, &idx, 1, &mut to).is_err());
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
