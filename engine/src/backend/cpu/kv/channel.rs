//! Codes of 4 and 2 bits with a scale and a zero for each channel of a head, in all slots of a page.

use super::super::simd::Simd;
use super::family::{Family, Row, params};
use super::fit::fit;
use super::numbers::{CHUNK, Numbers};
use super::packed::{Packed, PackedChunk, pack, unpack};

/// Codes of `BITS` bits.
#[derive(Clone, Copy)]
pub(super) struct Channel<const BITS: usize>;

impl<const BITS: usize> Family for Channel<BITS> {
    type Numbers = Channels<BITS>;

    fn encode(_values: &[f32], _codes: &mut [u8], _params: &mut [u8]) {
        unreachable!("a slot has no params of its own");
    }

    #[inline(always)]
    fn encode_page(values: &[f32], n: usize, codes: &mut [u8], params: &mut [u8]) {
        let steps = fit(BITS, values, n);
        let (scales, zeros) = params.split_at_mut(2 * n);
        let params = scales.chunks_exact_mut(2).zip(zeros.chunks_exact_mut(2));
        for (steps, (scale, zero)) in steps.iter().zip(params) {
            scale.copy_from_slice(&steps.scale.to_le_bytes());
            zero.copy_from_slice(&steps.zero.to_le_bytes());
        }
        for (row, codes) in values.chunks_exact(n).zip(codes.chunks_exact_mut(n * BITS / 8)) {
            pack(BITS, codes, |i| steps[i].code(row[i]));
        }
    }

    #[inline(always)]
    unsafe fn read<S: Simd>(row: Row, n_rows: usize, n: usize, to: *mut f32, stride: usize) {
        let Row { codes, params, .. } = row;
        let (n_parts, code_bytes) = (8 / BITS, n * BITS / 8);
        // SAFETY: blocks of 16 bytes make up the codes of n numbers; params are 2 n of 16 bits.
        unsafe {
            let (scales, zeros) = (params.cast::<u16>(), params.cast::<u16>().add(n));
            for block in (0..code_bytes).step_by(16) {
                for part in 0..n_parts {
                    for j in (0..16).step_by(S::LANES) {
                        let channel = block * n_parts + part * 16 + j;
                        let scale = S::load_f16(scales.add(channel));
                        let zero = S::load_f16(zeros.add(channel));
                        for row in 0..n_rows {
                            let codes =
                                unpack::<S, BITS>(codes.add(row * code_bytes + block + j), part);
                            S::store(to.add(row * stride + channel), S::fma(codes, scale, zero));
                        }
                    }
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn numbers<S: Simd>(row: Row, _n: usize, d: usize, scratch: *mut f32) -> Channels<BITS> {
        let packed = Packed { codes: row.codes, row_bytes: d * BITS / 8 };
        // SAFETY: two params of each channel, and room for them.
        unsafe { params::<S>(row.params, 2 * d, 1.0, scratch) };
        Channels { packed, params: scratch, d }
    }
}

/// Codes of which a channel of a page has a scale and a zero.
#[derive(Clone, Copy)]
pub(in super::super) struct Channels<const BITS: usize> {
    packed: Packed<BITS>,
    /// `[scale, zero][channel]`
    params: *const f32,
    d: usize,
}

impl<const BITS: usize> Numbers for Channels<BITS> {
    type Chunk<S: Simd> = (PackedChunk<BITS>, *const f32, *const f32);

    #[inline(always)]
    unsafe fn chunk<S: Simd>(self, slot: usize, idx: usize) -> Self::Chunk<S> {
        // SAFETY: inside the run, and inside the channels.
        unsafe {
            let scales = self.params.add(idx * CHUNK);
            (self.packed.chunk(slot, idx), scales, scales.add(self.d))
        }
    }

    #[inline(always)]
    unsafe fn load<S: Simd>((chunk, scales, zeros): Self::Chunk<S>, v: usize) -> S::V {
        // SAFETY: inside the chunk.
        unsafe {
            let at = v * S::LANES;
            S::fma(chunk.load::<S>(v), S::load(scales.add(at)), S::load(zeros.add(at)))
        }
    }
}
