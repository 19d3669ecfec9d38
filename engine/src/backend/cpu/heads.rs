//! What follows the Q, K and V projections: bias, norm of q and k, rotation to the position, rotation for the
//! codes of the cache where its format has one, and the way to `q` or to the pages. Prefill calls it with one head of many rows, decode with all heads of few.

use super::kv::{self, Place, Writer};
use super::mem::Shared;
use super::norm::{Norm, Rotation, rms_norm};
use super::simd::Simd;
use crate::store::{AttentionShape, Side};

/// Where heads go and what is done to them on the way.
pub(super) struct Heads<'a> {
    pub(super) shape: AttentionShape,
    /// Bias of q, then k, then v.
    pub(super) bias: Option<&'a [f32]>,
    /// Norm of q and k.
    pub(super) norm: Option<[Norm<'a>; 2]>,
    pub(super) rotation: &'a Rotation,
    /// `[row][n_q_heads * head_dim]`
    pub(super) q: Shared<'a, f32>,
    pub(super) places: &'a [Place],
    pub(super) pages: Writer<'a>,
}

/// A head of the concatenation Q, K, V.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Head {
    Q(usize),
    K(usize),
    V(usize),
}

impl Heads<'_> {
    /// Heads of Q, K and V together.
    pub(super) fn count(shape: AttentionShape) -> usize {
        shape.n_q_heads + 2 * shape.n_kv_heads
    }

    /// The head with index `i` of the concatenation.
    #[inline(always)]
    pub(super) fn head(shape: AttentionShape, i: usize) -> Head {
        let AttentionShape { n_q_heads, n_kv_heads, .. } = shape;
        if i < n_q_heads {
            Head::Q(i)
        } else if i < n_q_heads + n_kv_heads {
            Head::K(i - n_q_heads)
        } else {
            Head::V(i - n_q_heads - n_kv_heads)
        }
    }

    /// Finishes one head of one row, in place, and stores it.
    ///
    /// # Safety
    /// As [`Simd`]; `values` has `head_dim` elements, `row` is a row of the batch, and no other thread
    /// has this head of this row.
    #[inline(always)]
    pub(super) unsafe fn finish<S: Simd>(&self, head: Head, row: usize, values: *mut f32) {
        let d = self.shape.head_dim;
        let AttentionShape { n_q_heads, n_kv_heads, .. } = self.shape;
        let (kind, at, idx) = match head {
            Head::Q(idx) => (0, idx, idx),
            Head::K(idx) => (1, n_q_heads + idx, idx),
            Head::V(idx) => (2, n_q_heads + n_kv_heads + idx, idx),
        };
        // SAFETY: the caller's.
        unsafe {
            if let Some(bias) = self.bias {
                for (i, b) in bias[at * d..][..d].iter().enumerate() {
                    *values.add(i) += b;
                }
            }
            if let (Some(norm), true) = (self.norm, kind < 2) {
                rms_norm::<S>(norm[kind], values, values);
            }
            if kind < 2 {
                self.rotation.rotate(row, values);
            }
            // Queries as the keys that they meet.
            let held = if kind < 2 { self.pages.kv.k } else { self.pages.kv.v };
            if held.rotated {
                kv::rotate(std::slice::from_raw_parts_mut(values, d));
            }
            match head {
                Head::Q(_) => {
                    let to = self.q.get().add((row * n_q_heads + idx) * d);
                    std::ptr::copy_nonoverlapping(values, to, d);
                }
                Head::K(_) => self.pages.write(self.places[row], Side::K, idx, values),
                Head::V(_) => self.pages.write(self.places[row], Side::V, idx, values),
            }
        }
    }
}
