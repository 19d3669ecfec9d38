//! What tests of products share: sizes on the device, a naive f64 reference, bounds.
#![allow(dead_code, unreachable_pub)] // each test uses its part

use loris_kernels::abi::{LORIS_DENSE, LorisSeq};
use loris_kernels::{Buffer, Device, Matrix, Pod, Rows};

use super::from_bf16;

/// Bound of f32 sums of exact products, of the largest value of a row.
pub const SUMS: f64 = 1e-5;
/// What rounding to bf16 adds: relative.
pub const BF16: f64 = 1.0 / 256.0;
pub const EPS: f32 = 1e-5;

pub fn matrix(device: &Device, w: &[u16], n: usize) -> Matrix {
    Matrix { data: Buffer::from_slice(device, w, "w").unwrap(), n, k: w.len() / n }
}

/// Rows on the device; there is room for one where there are none.
pub fn rows<T: Pod>(device: &Device, data: &[T], width: usize) -> Rows<T> {
    let n_rows = data.len() / width;
    let mut rows = Rows::new(device, n_rows.max(1), width, "rows").unwrap();
    rows.data.upload(device, 0, data).unwrap();
    rows
}

pub fn download<T: Pod>(device: &Device, from: &Buffer<T>, len: usize) -> Vec<T> {
    let mut out = vec![T::zeroed(); len];
    from.download(device, 0, &mut out).unwrap();
    out
}

pub fn seq(row_start: usize, n_rows: usize, kv_start: usize, table_start: usize) -> LorisSeq {
    LorisSeq {
        row_start: row_start as u32,
        n_rows: n_rows as u32,
        kv_start: kv_start as u32,
        page_table_start: table_start as u32,
        positions_start: LORIS_DENSE,
        ..LorisSeq::default()
    }
}

/// `a w^T` in f64: a is `[..][k]`, w is `[n][k]`.
pub fn product(a: &[f64], w: &[f64], k: usize) -> Vec<f64> {
    let dot = |a: &[f64], w: &[f64]| a.iter().zip(w).map(|(a, w)| a * w).sum::<f64>();
    a.chunks(k).flat_map(|a| w.chunks(k).map(move |w| dot(a, w))).collect()
}

pub fn same_bits(a: &[f32], b: &[f32]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits())
}

pub fn widen(bits: &[u16]) -> Vec<f64> {
    bits.iter().map(|&bits| f64::from(from_bf16(bits))).collect()
}
