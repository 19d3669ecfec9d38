//! What kernels are written against: vectors, and steps of a matrix product.

/// The most lanes that a vector has.
pub(in super::super) const MAX_LANES: usize = 16;

/// A kernel: arguments as fields, one body for every instruction set.
pub(in super::super) trait Kernel {
    /// The body.
    ///
    /// # Safety
    /// As the kernel's own documentation says; and only through [`Isa::run`](super::Isa::run) or [`Simd::enter`].
    unsafe fn run<S: Simd, D: Dot>(self);
}

/// Vectors of f32 and what the kernels do with them.
///
/// # Safety
/// All functions need the instructions of the type; loads and stores need `LANES` elements (or as many
/// as they name) behind their pointer, at any alignment.
pub(in super::super) trait Simd: Copy + 'static {
    /// Elements of a vector.
    const LANES: usize;
    /// Rows of the largest micro tile: accumulators of two vectors each that fit the registers.
    const TILE_ROWS: usize;
    /// The vector.
    type V: Copy;

    /// Runs a kernel in a function compiled for these instructions.
    unsafe fn enter<D: Dot, K: Kernel>(kernel: K);

    unsafe fn splat(x: f32) -> Self::V;
    unsafe fn load(p: *const f32) -> Self::V;
    unsafe fn store(p: *mut f32, v: Self::V);
    /// Stores the first `n <= LANES` elements.
    unsafe fn store_first(p: *mut f32, v: Self::V, n: usize);
    /// `LANES` bf16 numbers.
    unsafe fn load_bf16(p: *const u16) -> Self::V;
    /// `LANES` f16 numbers.
    unsafe fn load_f16(p: *const u16) -> Self::V;
    /// What f16 bits stand for.
    unsafe fn f16(bits: u16) -> f32;
    /// `LANES` signed bytes.
    unsafe fn load_i8(p: *const u8) -> Self::V;
    /// `LANES` e4m3 numbers, divided by 256.
    unsafe fn load_e4m3(p: *const u8) -> Self::V;
    /// `(byte >> SHIFT) & MASK` of `LANES` bytes.
    unsafe fn load_codes<const SHIFT: i32, const MASK: i32>(p: *const u8) -> Self::V;

    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn div(a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`; rounded once where the machine can.
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// The larger; `b` where one is NaN.
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V;
    /// The smaller; `b` where one is NaN.
    unsafe fn min(a: Self::V, b: Self::V) -> Self::V;
    /// Nearest integer.
    unsafe fn round(a: Self::V) -> Self::V;
    /// `a * 2^n` for integral `n` in -127..=127; exactly 0 for n = -127 and |a| < 2.
    unsafe fn scale_by_pow2(a: Self::V, n: Self::V) -> Self::V;
    /// Sum of the elements, by halves: lane i with lane i + LANES/2, and so on.
    unsafe fn sum(a: Self::V) -> f32;
    /// Largest element.
    unsafe fn largest(a: Self::V) -> f32;

    /// Of `LANES` pairs of bf16 in 32 bits each: the first of each pair, as f32.
    unsafe fn even_bf16(pairs: Self::V) -> Self::V;
    /// Of `LANES` pairs of bf16 in 32 bits each: the second of each pair, as f32.
    unsafe fn odd_bf16(pairs: Self::V) -> Self::V;
    /// `c + a.odd * b.odd + a.even * b.even` by one instruction; only behind [`Bf16Native`].
    unsafe fn dot_bf16(a: Self::V, b: Self::V, c: Self::V) -> Self::V;

    /// Transposes the `LANES x LANES` block of 32-bit elements in the first `LANES` vectors.
    unsafe fn transpose(block: &mut [Self::V; MAX_LANES]);
    /// Asks for the cache line at `p`, which need not be a valid address.
    unsafe fn prefetch(p: *const u8);
}

/// Functions of [`Simd`] that are an expression each.
macro_rules! instructions {
    ($($name:ident($($arg:ident: $of:ty),*) -> $out:ty = $is:expr;)*) => {
        $(#[inline(always)]
        #[allow(unused_unsafe, clippy::undocumented_unsafe_blocks)] // where the impl says
        unsafe fn $name($($arg: $of),*) -> $out {
            unsafe { $is }
        })*
    };
}
pub(super) use instructions;

/// One step of a matrix product: what a 32-bit unit of A and of B holds and how it is accumulated.
pub(in super::super) trait Dot: 'static {
    /// A unit is a pair of bf16 numbers (even index in the low half), not an f32.
    const PAIRS: bool;
    /// Needs the CPU's bf16 dot product.
    const NATIVE: bool;
    /// `c + a . b` in each lane.
    ///
    /// # Safety
    /// As [`Simd`].
    unsafe fn madd<S: Simd>(a: S::V, b: S::V, c: S::V) -> S::V;
}

/// f32 multiply-add.
pub(in super::super) struct Fma;

impl Dot for Fma {
    const PAIRS: bool = false;
    const NATIVE: bool = false;

    #[inline(always)]
    unsafe fn madd<S: Simd>(a: S::V, b: S::V, c: S::V) -> S::V {
        // SAFETY: passed on.
        unsafe { S::fma(a, b, c) }
    }
}

/// `VDPBF16PS`.
pub(in super::super) struct Bf16Native;

impl Dot for Bf16Native {
    const PAIRS: bool = true;
    const NATIVE: bool = true;

    #[inline(always)]
    unsafe fn madd<S: Simd>(a: S::V, b: S::V, c: S::V) -> S::V {
        // SAFETY: passed on.
        unsafe { S::dot_bf16(a, b, c) }
    }
}

/// `VDPBF16PS` in other words: two multiply-adds, the odd elements first. Products of bf16 numbers are
/// exact in f32, so all that rounds is the two additions. (The instruction also takes and gives subnormal
/// numbers as zero, which this does not: they are below anything that a sum of products notices.)
pub(in super::super) struct Bf16Emulated;

impl Dot for Bf16Emulated {
    const PAIRS: bool = true;
    const NATIVE: bool = false;

    #[inline(always)]
    unsafe fn madd<S: Simd>(a: S::V, b: S::V, c: S::V) -> S::V {
        // SAFETY: passed on.
        unsafe {
            let c = S::fma(S::odd_bf16(a), S::odd_bf16(b), c);
            S::fma(S::even_bf16(a), S::even_bf16(b), c)
        }
    }
}

/// `2^x` within 2 units in the last place; exactly 0 below -126.5, so that a masked score of minus
/// infinity weighs nothing; NaN stays NaN.
///
/// # Safety
/// As [`Simd`].
#[inline(always)]
pub(in super::super) unsafe fn exp2<S: Simd>(x: S::V) -> S::V {
    // SAFETY: arithmetic only.
    unsafe {
        // The bound comes first: max and min give their second argument where one is NaN.
        let x = S::min(S::splat(126.0), S::max(S::splat(-127.0), x));
        let n = S::round(x);
        let f = S::sub(x, n);
        // 2^f on [-1/2, 1/2], the polynomial of Cephes' exp2f.
        let mut p = S::splat(1.535_336_2e-4);
        for c in [1.339_887_4e-3, 9.618_437e-3, 5.550_332_5e-2, 2.402_264_8e-1, 6.931_472e-1, 1.0] {
            p = S::fma(p, f, S::splat(c));
        }
        S::scale_by_pow2(p, n)
    }
}

/// `2^x` of every element.
///
/// # Safety
/// As [`Simd`].
#[inline(always)]
pub(in super::super) unsafe fn exp2_each<S: Simd>(x: &mut [f32; MAX_LANES]) {
    for part in x.chunks_exact_mut(S::LANES) {
        // SAFETY: a part has LANES elements.
        unsafe { S::store(part.as_mut_ptr(), exp2::<S>(S::load(part.as_ptr()))) };
    }
}
