//! Codes of less than a byte, packed so that vectors of 8 and of 16 lanes find neighbours side by side.

use super::super::simd::Simd;
use super::numbers::CHUNK;

/// Packs codes: 16 bytes hold 16 codes in their lowest
/// bits, the next 16 in the bits above these, and so on.
#[inline(always)]
pub(super) fn pack(bits: usize, codes: &mut [u8], code: impl Fn(usize) -> u8) {
    let n_parts = 8 / bits;
    for (block, codes) in codes.chunks_exact_mut(16).enumerate() {
        for (j, byte) in codes.iter_mut().enumerate() {
            let of = |part: usize| code((block * n_parts + part) * 16 + j) << (part * bits);
            *byte = (0..n_parts).map(of).fold(0, |byte, code| byte | code);
        }
    }
}

/// The codes of part `part` of some of the 16 bytes of [`pack`].
///
/// # Safety
/// As [`Simd`]: `LANES` bytes at `p`.
#[inline(always)]
pub(super) unsafe fn unpack<S: Simd, const BITS: usize>(p: *const u8, part: usize) -> S::V {
    // SAFETY: the caller's.
    unsafe {
        match (BITS, part) {
            (4, 0) => S::load_codes::<0, 15>(p),
            (4, _) => S::load_codes::<4, 15>(p),
            (_, 0) => S::load_codes::<0, 3>(p),
            (_, 1) => S::load_codes::<2, 3>(p),
            (_, 2) => S::load_codes::<4, 3>(p),
            _ => S::load_codes::<6, 3>(p),
        }
    }
}

/// Codes of `BITS` bits, packed as [`pack`] says.
#[derive(Clone, Copy)]
pub(super) struct Packed<const BITS: usize> {
    pub(super) codes: *const u8,
    pub(super) row_bytes: usize,
}

/// A chunk of them: 16 bytes, or half of the bits of 16.
#[derive(Clone, Copy)]
pub(in super::super) struct PackedChunk<const BITS: usize> {
    bytes: *const u8,
    is_upper: bool,
}

impl<const BITS: usize> Packed<BITS> {
    #[inline(always)]
    pub(super) unsafe fn chunk(self, slot: usize, idx: usize) -> PackedChunk<BITS> {
        let per_block = 16 * 8 / BITS / CHUNK;
        // SAFETY: inside the run.
        let bytes = unsafe { self.codes.add(slot * self.row_bytes + idx / per_block * 16) };
        PackedChunk { bytes, is_upper: idx % per_block == 1 }
    }
}

impl<const BITS: usize> PackedChunk<BITS> {
    #[inline(always)]
    pub(super) unsafe fn load<S: Simd>(self, v: usize) -> S::V {
        let (part, at) = (v * S::LANES / 16, v * S::LANES % 16);
        // SAFETY: inside the 16 bytes.
        unsafe {
            let bytes = self.bytes.add(at);
            match self.is_upper {
                false => unpack::<S, BITS>(bytes, part),
                true => unpack::<S, BITS>(bytes, part + 2),
            }
        }
    }
}
