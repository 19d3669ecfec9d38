//! Keys and values as they lie in pages, 32 numbers at a time: what decode multiplies with goes from the codes of a
//! page into registers and nowhere else.

use std::convert::identity;
use std::marker::PhantomData;

use super::super::simd::{Simd, bf16_value, e4m3_value};

/// Numbers of a chunk.
pub(in super::super) const CHUNK: usize = 32;

/// Heads of slots that follow one another, each as many chunks.
pub(in super::super) trait Numbers: Copy {
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
pub(in super::super) trait Walk: Copy {
    /// Does it with `n` slots; the first is number `first` of their tile.
    ///
    /// # Safety
    /// As [`Simd`]; there are as many.
    unsafe fn walk<S: Simd>(self, numbers: impl Numbers, first: usize, n: usize);
}

/// A number by itself.
pub(super) trait Element: Copy {
    const BYTES: usize;
    /// # Safety
    /// As [`Simd`]: `LANES` of them at `p`.
    unsafe fn load<S: Simd>(p: *const u8) -> S::V;
    /// The one at `p`, in the units of [`load`](Self::load).
    ///
    /// # Safety
    /// There is one.
    unsafe fn value(p: *const u8) -> f32;
}

macro_rules! element {
    ($name:ident, $bits:ty, $load:ident, $value:expr) => {
        #[derive(Clone, Copy)]
        pub(super) struct $name;

        impl Element for $name {
            const BYTES: usize = size_of::<$bits>();
            #[inline(always)]
            unsafe fn load<S: Simd>(p: *const u8) -> S::V {
                // SAFETY: the caller's.
                unsafe { S::$load(p.cast()) }
            }
            #[inline(always)]
            unsafe fn value(p: *const u8) -> f32 {
                // SAFETY: the caller's.
                $value(unsafe { p.cast::<$bits>().read_unaligned() })
            }
        }
    };
}

element!(F32, f32, load, identity);
element!(Bf16, u16, load_bf16, bf16_value);
element!(Int8, i8, load_i8, f32::from);
element!(E4m3, u8, load_e4m3, e4m3_value);

/// Numbers one after another.
#[derive(Clone, Copy)]
pub(in super::super) struct Plain<E> {
    base: *const u8,
    row_bytes: usize,
    element: PhantomData<E>,
}

impl<E: Element> Plain<E> {
    #[inline(always)]
    pub(super) fn new(base: *const u8, d: usize) -> Self {
        Self { base, row_bytes: d * E::BYTES, element: PhantomData }
    }

    /// `n_rows` heads of `n` such numbers as f32, `stride` apart.
    ///
    /// # Safety
    /// As [`Simd`]; there are as many, and there is room for them.
    #[inline(always)]
    pub(super) unsafe fn read<S: Simd>(
        codes: *const u8,
        n_rows: usize,
        n: usize,
        to: *mut f32,
        stride: usize,
    ) {
        let whole = n - n % S::LANES;
        // SAFETY: the caller's; vectors lie inside the n numbers of a row.
        unsafe {
            for r in 0..n_rows {
                let (from, to) = (codes.add(r * n * E::BYTES), to.add(r * stride));
                for i in (0..whole).step_by(S::LANES) {
                    S::store(to.add(i), E::load::<S>(from.add(i * E::BYTES)));
                }
                for i in whole..n {
                    *to.add(i) = E::value(from.add(i * E::BYTES));
                }
            }
        }
    }
}

/// Heads of `d` numbers that have been decoded.
#[inline(always)]
pub(in super::super) fn decoded(numbers: *const f32, d: usize) -> impl Numbers {
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
