//! Keys and values as they lie in pages, 32 numbers at a time: what decode multiplies with goes from the codes of a
//! page into registers and nowhere else.

use std::marker::PhantomData;

use super::super::codec::{self, unpack};
use super::super::pages::Row;
use super::super::simd::Simd;
use crate::store::Coding;

/// Numbers of a chunk.
pub(super) const CHUNK: usize = 32;

/// Heads of slots that follow one another, each as many chunks.
pub(super) trait Numbers: Copy {
    /// A chunk of a slot.
    type Chunk<S: Simd>: Copy;
    /// A chunk takes registers of its own.
    const HAS_PARAMS: bool = false;

    /// Chunk `idx` of a slot.
    ///
    /// # Safety
    /// As [`Simd`]; there is such a slot, and such a chunk of it.
    unsafe fn chunk<S: Simd>(self, slot: usize, idx: usize) -> Self::Chunk<S>;

    /// `LANES` numbers of a chunk, from number `LANES * v` on.
    ///
    /// # Safety
    /// As [`Simd`]; `v` is less than `CHUNK / LANES`.
    unsafe fn load<S: Simd>(chunk: Self::Chunk<S>, v: usize) -> S::V;
}

/// What is done with numbers, whatever they are.
pub(super) trait Walk: Copy {
    /// Does it with `n` slots; the first is number `first` of their tile.
    ///
    /// # Safety
    /// As [`Simd`]; there are as many.
    unsafe fn walk<S: Simd>(self, numbers: impl Numbers, first: usize, n: usize);
}

/// Walks over `n` slots of a page from `row` on, of heads of `d` numbers; `row` is number `first` of its tile, and
/// `scratch` has room for `n` times `d` numbers. What [`Row::scales`] says is left to do.
///
/// # Safety
/// As [`Simd`]; the page has the slots, `d` is a multiple of [`CHUNK`], and there is room.
#[inline(always)]
pub(super) unsafe fn walk<S: Simd>(
    row: Row,
    first: usize,
    n: usize,
    d: usize,
    scratch: *mut f32,
    job: impl Walk,
) {
    let Row { coding, codes, .. } = row;
    // SAFETY: the caller's. A slot's params are fewer than its numbers; those of channels are two of each.
    unsafe {
        match coding {
            Coding::F32 => job.walk::<S>(Plain::<F32>::new(codes, d), first, n),
            Coding::BF16 => job.walk::<S>(Plain::<Bf16>::new(codes, d), first, n),
            Coding::INT8 => job.walk::<S>(Plain::<Int8>::new(codes, d), first, n),
            Coding::FP8 => job.walk::<S>(Plain::<E4m3>::new(codes, d), first, n),
            Coding::INT2 => job.walk::<S>(Groups::<2>::new::<S>(row, n, d, scratch), first, n),
            Coding::INT2_CHANNEL => {
                job.walk::<S>(Channels::<2>::new::<S>(row, d, scratch), first, n);
            }
            Coding::INT4_CHANNEL => {
                job.walk::<S>(Channels::<4>::new::<S>(row, d, scratch), first, n);
            }
            _ => job.walk::<S>(Groups::<4>::new::<S>(row, n, d, scratch), first, n),
        }
    }
}

/// A number by itself.
trait Element: Copy {
    const BYTES: usize;
    /// # Safety
    /// As [`Simd`]: `LANES` of them at `p`.
    unsafe fn load<S: Simd>(p: *const u8) -> S::V;
}

macro_rules! element {
    ($name:ident, $bytes:literal, $load:ident) => {
        #[derive(Clone, Copy)]
        struct $name;

        impl Element for $name {
            const BYTES: usize = $bytes;
            #[inline(always)]
            unsafe fn load<S: Simd>(p: *const u8) -> S::V {
                // SAFETY: the caller's.
                unsafe { S::$load(p.cast()) }
            }
        }
    };
}

element!(F32, 4, load);
element!(Bf16, 2, load_bf16);
element!(Int8, 1, load_i8);
element!(E4m3, 1, load_e4m3);

/// Numbers one after another.
#[derive(Clone, Copy)]
struct Plain<E> {
    base: *const u8,
    row_bytes: usize,
    element: PhantomData<E>,
}

impl<E: Element> Plain<E> {
    #[inline(always)]
    fn new(base: *const u8, d: usize) -> Self {
        Self { base, row_bytes: d * E::BYTES, element: PhantomData }
    }
}

/// Heads of `d` numbers that have been decoded.
#[inline(always)]
pub(super) fn decoded(numbers: *const f32, d: usize) -> impl Numbers {
    Plain::<F32>::new(numbers.cast(), d)
}

impl<E: Element> Numbers for Plain<E> {
    type Chunk<S: Simd> = *const u8;

    #[inline(always)]
    unsafe fn chunk<S: Simd>(self, slot: usize, idx: usize) -> *const u8 {
        // SAFETY: inside the run.
        unsafe { self.base.add(slot * self.row_bytes + idx * CHUNK * E::BYTES) }
    }

    #[inline(always)]
    unsafe fn load<S: Simd>(chunk: *const u8, v: usize) -> S::V {
        // SAFETY: inside the chunk.
        unsafe { E::load::<S>(chunk.add(v * S::LANES * E::BYTES)) }
    }
}

/// Codes of `BITS` bits, packed as [`codec`] says.
#[derive(Clone, Copy)]
struct Packed<const BITS: usize> {
    codes: *const u8,
    row_bytes: usize,
}

/// A chunk of them: 16 bytes, or half of the bits of 16.
#[derive(Clone, Copy)]
struct PackedChunk<const BITS: usize> {
    bytes: *const u8,
    is_upper: bool,
}

impl<const BITS: usize> Packed<BITS> {
    #[inline(always)]
    unsafe fn chunk(self, slot: usize, idx: usize) -> PackedChunk<BITS> {
        let per_block = 16 * 8 / BITS / CHUNK;
        // SAFETY: inside the run.
        let bytes = unsafe { self.codes.add(slot * self.row_bytes + idx / per_block * 16) };
        PackedChunk { bytes, is_upper: idx % per_block == 1 }
    }
}

impl<const BITS: usize> PackedChunk<BITS> {
    #[inline(always)]
    unsafe fn load<S: Simd>(self, v: usize) -> S::V {
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

/// Codes of which a group of a slot has a scale and a zero.
#[derive(Clone, Copy)]
struct Groups<const BITS: usize> {
    packed: Packed<BITS>,
    /// `[slot][group][scale, zero]`
    params: *const f32,
    n_groups: usize,
    /// Binary logarithm of the chunks of a group.
    group_log2: u32,
}

impl<const BITS: usize> Groups<BITS> {
    #[inline(always)]
    unsafe fn new<S: Simd>(row: Row, n: usize, d: usize, scratch: *mut f32) -> Self {
        let group = row.coding.group(d);
        let packed = Packed { codes: row.codes, row_bytes: row.coding.code_bytes(d) };
        let n_groups = d / group;
        // SAFETY: two params of each group, and room for them.
        unsafe { codec::params::<S>(row.params, n * n_groups * 2, 1.0, scratch) };
        Self { packed, params: scratch, n_groups, group_log2: (group / CHUNK).ilog2() }
    }
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

/// Codes of which a channel of a page has a scale and a zero.
#[derive(Clone, Copy)]
struct Channels<const BITS: usize> {
    packed: Packed<BITS>,
    /// `[scale, zero][channel]`
    params: *const f32,
    d: usize,
}

impl<const BITS: usize> Channels<BITS> {
    #[inline(always)]
    unsafe fn new<S: Simd>(row: Row, d: usize, scratch: *mut f32) -> Self {
        let packed = Packed { codes: row.codes, row_bytes: row.coding.code_bytes(d) };
        // SAFETY: two params of each channel, and room for them.
        unsafe { codec::params::<S>(row.params, 2 * d, 1.0, scratch) };
        Self { packed, params: scratch, d }
    }
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
