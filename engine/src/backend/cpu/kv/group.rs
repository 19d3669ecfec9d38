//! Codes of 4 and 2 bits with a scale and a zero for each group of a head.

use super::super::simd::Simd;
use super::family::{Family, Row, params};
use super::fit::{Steps, fit};
use super::numbers::{CHUNK, Numbers};
use super::packed::{Packed, PackedChunk, pack, unpack};
use crate::store::Coding;

/// Codes of `BITS` bits.
#[derive(Clone, Copy)]
pub(super) struct Group<const BITS: usize>;

#[inline(always)]
fn group(n: usize) -> usize {
    Coding::INT4.group(n) // of any number of bits
}

impl<const BITS: usize> Family for Group<BITS> {
    type Numbers = Groups<BITS>;

    #[inline(always)]
    fn encode(values: &[f32], codes: &mut [u8], params: &mut [u8]) {
        let group = group(values.len());
        let codes = codes.chunks_exact_mut(group * BITS / 8);
        for ((values, codes), params) in
            values.chunks_exact(group).zip(codes).zip(params.chunks_exact_mut(4))
        {
            let steps = Steps::whole(BITS, values);
            steps.store(params);
            pack(BITS, codes, |i| steps.code(values[i]));
        }
    }

    #[inline(always)]
    fn encode_page(values: &[f32], n: usize, codes: &mut [u8], params: &mut [u8]) {
        let (group, code_bytes) = (group(n), n * BITS / 8);
        let rows = || values.chunks_exact(n);
        // A slot's group as a column.
        let n_slots = values.len() / n;
        let mut turned = vec![0.0; group * n_slots];
        for (idx, first) in (0..n).step_by(group).enumerate() {
            for (slot, row) in rows().enumerate() {
                for (i, x) in row[first..first + group].iter().enumerate() {
                    turned[i * n_slots + slot] = *x;
                }
            }
            let steps = fit(BITS, &turned, n_slots);
            for (slot, (row, steps)) in rows().zip(&steps).enumerate() {
                let codes = &mut codes[slot * code_bytes + first * BITS / 8..][..group * BITS / 8];
                pack(BITS, codes, |i| steps.code(row[first + i]));
                steps.store(&mut params[4 * (slot * (n / group) + idx)..][..4]);
            }
        }
    }

    #[inline(always)]
    unsafe fn read<S: Simd>(row: Row, n_rows: usize, n: usize, to: *mut f32, stride: usize) {
        let Row { codes, params, .. } = row;
        let (n_parts, code_bytes, group) = (8 / BITS, n * BITS / 8, group(n));
        // SAFETY: blocks of 16 bytes make up the codes of a group; every group has a scale and a zero.
        unsafe {
            for row in 0..n_rows {
                let params = params.add(row * (n / group * 4)).cast::<u16>();
                for first in (0..n).step_by(group) {
                    let param = |idx| {
                        S::splat(S::f16(params.add(first / group * 2 + idx).read_unaligned()))
                    };
                    let (scale, zero) = (param(0), param(1));
                    for i in (first..first + group).step_by(16 * n_parts) {
                        for j in (0..16).step_by(S::LANES) {
                            let codes = codes.add(row * code_bytes + i * BITS / 8 + j);
                            let to = to.add(row * stride + i + j);
                            for part in 0..n_parts {
                                let codes = unpack::<S, BITS>(codes, part);
                                S::store(to.add(16 * part), S::fma(codes, scale, zero));
                            }
                        }
                    }
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn numbers<S: Simd>(row: Row, n: usize, d: usize, scratch: *mut f32) -> Groups<BITS> {
        let packed = Packed { codes: row.codes, row_bytes: d * BITS / 8 };
        let (group, n_groups) = (group(d), d / group(d));
        // SAFETY: two params of each group, and room for them.
        unsafe { params::<S>(row.params, n * n_groups * 2, 1.0, scratch) };
        Groups { packed, params: scratch, n_groups, group_log2: (group / CHUNK).ilog2() }
    }
}

/// Codes of which a group of a slot has a scale and a zero.
#[derive(Clone, Copy)]
pub(in super::super) struct Groups<const BITS: usize> {
    packed: Packed<BITS>,
    /// `[slot][group][scale, zero]`
    params: *const f32,
    n_groups: usize,
    /// Binary logarithm of the chunks of a group.
    group_log2: u32,
}

impl<const BITS: usize> Numbers for Groups<BITS> {
    type Chunk<S: Simd> = (PackedChunk<BITS>, S::V, S::V);
    const HAS_PARAMS: bool = true;

    #[inline(always)]
    unsafe fn chunk<S: Simd>(self, slot: usize, idx: usize) -> Self::Chunk<S> {
        // SAFETY: inside the run.
        unsafe {
            let group = slot * self.n_groups + (idx >> self.group_log2);
            let params = self.params.add(group * 2);
            (self.packed.chunk(slot, idx), S::splat(*params), S::splat(*params.add(1)))
        }
    }

    #[inline(always)]
    unsafe fn load<S: Simd>((chunk, scale, zero): Self::Chunk<S>, v: usize) -> S::V {
        // SAFETY: inside the chunk.
        unsafe { S::fma(chunk.load::<S>(v), scale, zero) }
    }
}
