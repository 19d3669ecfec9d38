//! Launchers of `qkv_*`: projections that end in attention's q and in the pages.

use crate::abi::{LorisHeads, QkvPrefillArgs};
use crate::ops::batch::DeviceBatch;
use crate::ops::{at_least, equal, linear};
use crate::{Buffer, Device, Error, KvPages, Matrix, Rows};

const OP: &str = "qkv";

/// The weights of one layer's projections.
#[derive(Clone, Copy, Debug)]
pub struct QkvWeights<'a> {
    /// `[n_q_heads * head_dim][k]`
    pub q: &'a Matrix,
    /// `[n_kv_heads * head_dim][k]`
    pub k: &'a Matrix,
    /// `[n_kv_heads * head_dim][k]`
    pub v: &'a Matrix,
    /// Of q, k and v: `[(n_q_heads + 2 n_kv_heads) * head_dim]`.
    pub bias: Option<&'a Buffer<f32>>,
    /// Of q and of k: `[head_dim]` each.
    pub qk_norm: Option<[&'a Buffer<f32>; 2]>,
    /// Heads of q.
    pub n_q_heads: usize,
    /// Heads of k, and of v.
    pub n_kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Of the q/k norm.
    pub eps: f32,
}

impl QkvWeights<'_> {
    /// Where the heads of `batch` go, once everything fits.
    pub(super) fn heads(
        &self,
        batch: &DeviceBatch,
        layer: usize,
        q: &mut Rows<u16>,
        pages: &mut KvPages,
    ) -> Result<LorisHeads, Error> {
        let (d, page_len) = (self.head_dim, pages.page_len);
        Error::check_supported("qkv head_dim", d, matches!(d, 32 | 64 | 128), "32, 64 or 128")?;
        Error::check_supported(
            "qkv page_len",
            page_len,
            page_len.is_power_of_two() && (16..=256).contains(&page_len),
            "a power of two from 16 to 256",
        )?;
        for (what, matrix, n_heads) in [
            ("q", self.q, self.n_q_heads),
            ("k", self.k, self.n_kv_heads),
            ("v", self.v, self.n_kv_heads),
        ] {
            linear::check_matrix(OP, what, matrix)?;
            equal(OP, &format!("k of {what}"), matrix.k, self.q.k)?;
            equal(OP, &format!("n of {what}"), matrix.n, n_heads * d)?;
        }
        if let Some(bias) = self.bias {
            equal(OP, "bias", bias.len(), (self.n_q_heads + 2 * self.n_kv_heads) * d)?;
        }
        for norm in self.qk_norm.into_iter().flatten() {
            equal(OP, "q/k norm", norm.len(), d)?;
        }
        linear::check_rows(OP, "q", q, batch.n_rows(), self.n_q_heads * d)?;
        equal(OP, "kv heads of the pages", pages.n_kv_heads, self.n_kv_heads)?;
        equal(OP, "head_dim of the pages", pages.head_dim, d)?;
        equal(OP, "head_dim of the batch", batch.head_dim(), d)?;
        at_least(OP, "pages", pages.n_pages, batch.n_pages())?;
        at_least(OP, "layers of the page tables", batch.n_layers(), layer + 1)?;
        let ptr = |buffer: Option<&Buffer<f32>>| {
            buffer.map_or(std::ptr::null(), |buffer| buffer.ptr() as *const f32)
        };
        Ok(LorisHeads {
            bias: ptr(self.bias),
            q_norm: ptr(self.qk_norm.map(|norm| norm[0])),
            k_norm: ptr(self.qk_norm.map(|norm| norm[1])),
            cos_sin: batch.cos_sin() as *const f32,
            q: q.data.ptr() as *mut u16,
            pages: pages.abi(),
            batch: batch.abi(),
            layer: layer as u32,
            n_q_heads: self.n_q_heads as u32,
            head_dim: d as u32,
            eps: self.eps,
        })
    }
}

/// Q of the batch's rows to `q`, K and V to their slots of `pages`: many rows `a`, normalised.
pub fn qkv_prefill(
    device: &Device,
    weights: &QkvWeights<'_>,
    a: &Rows<u16>,
    batch: &DeviceBatch,
    layer: usize,
    q: &mut Rows<u16>,
    pages: &mut KvPages,
) -> Result<(), Error> {
    let n_rows = batch.n_rows();
    let heads = weights.heads(batch, layer, q, pages)?;
    linear::check_rows(OP, "a", a, n_rows, weights.q.k)?;
    if n_rows == 0 {
        return Ok(());
    }
    let args = QkvPrefillArgs {
        a: a.data.ptr() as *const u16,
        wq: weights.q.data.ptr() as *const u16,
        wk: weights.k.data.ptr() as *const u16,
        wv: weights.v.data.ptr() as *const u16,
        heads,
        k: weights.q.k as u32,
    };
    let n_cols = weights.q.n + 2 * weights.k.n;
    let block_n = linear::prefill_block_n(device.info(), n_rows, n_cols);
    let kernel = match (weights.head_dim, block_n) {
        (32, 128) => "qkv_prefill_d32_n128",
        (64, 128) => "qkv_prefill_d64_n128",
        (128, 128) => "qkv_prefill_d128_n128",
        (32, _) => "qkv_prefill_d32_n256",
        (64, _) => "qkv_prefill_d64_n256",
        _ => "qkv_prefill_d128_n256",
    };
    // The tiles of a matrix are its own.
    let n_col_tiles = weights.q.n.div_ceil(block_n) + 2 * weights.k.n.div_ceil(block_n);
    let launch = linear::prefill_launch(kernel, block_n, n_rows, n_col_tiles);
    // SAFETY: the pointers are to buffers of the sizes just checked, and the batch names pages of
    // the pool.
    unsafe { device.launch(&launch, &args) }
}
