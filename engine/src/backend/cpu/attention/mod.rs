//! Attention over pages, flash style: no matrix of all scores is ever held.
//!
//! A *task* is a sequence, a key head and a run of tokens whose query heads share that key head: the
//! heads of a token are packed as rows of one product, so K and V are read once for all of them. It walks
//! the slots in tiles of 64, counted from [`Sides::skew`](crate::store::Sides::skew) whatever the page length; a running
//! maximum and sum turn scores into weights.
//!
//! In prefill ([`flash`]) K is packed like a weight panel (a slot is a weight row), scores come from the
//! micro-kernel of the matrix products, and the same micro-kernel adds the weighted V. In decode ([`few`])
//! packing would cost more than the few rows: they take K and V as they lie. A task of decode also has a *split*: 512 slots whose partial result (unnormalised output, maximum,
//! sum) goes to memory, to be merged in order of splits by [`Merge`].
//!
//! Masks compare positions, never the order of slots. A tile that no row of a task sees is skipped, one
//! that all rows of a micro tile see needs no mask. For a row that sees nothing of a tile the update is
//! exact: the maximum stays, the weights are 0, the scale is 1. Slots that are not in use are not read.

mod few;
mod flash;
mod mass;
mod work;

use super::micro::ROW_STRIDE;
use super::simd::Fma;
use crate::backend::TILE;

pub(super) use self::flash::{Attention, scratch_len};
pub(super) use self::mass::{AttentionMass, KeyNorms, Part, runs};
pub(super) use self::work::{Merge, Work};

const _: () = assert!(TILE == ROW_STRIDE, "a tile of scores is a row of the micro-kernel");

/// Numbers that a partial row takes: output, maximum, sum.
pub(super) fn partial_len(head_dim: usize) -> usize {
    head_dim + 2
}
