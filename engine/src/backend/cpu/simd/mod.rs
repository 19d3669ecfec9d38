//! The vector instructions that the kernels are written in.
//!
//! A kernel is a struct that implements [`Kernel`]: one generic body over a [`Simd`] type (how wide a
//! vector is, how it is loaded) and a [`Dot`] type (what one step of a matrix product does).
//! [`Isa::run`] enters the body through a function compiled for the instructions at hand, so one
//! binary runs everywhere and every instruction set that a machine has can be tested in one run.
//!
//! Three sets of vectors exist: AVX-512, AVX2 with FMA and F16C, and eight-lane arrays for everything
//! else. Two kinds of step exist: an f32 multiply-add, and the pairwise bf16 dot product of AVX512_BF16,
//! as one instruction where the CPU has it and emulated elsewhere. The emulation is there for the tests:
//! packing, layouts and tails of the bf16 path run on every machine.
//!
//! Generic bodies and everything they call are `#[inline(always)]`: an intrinsic can only be inlined
//! into a function compiled with its feature, which is the entry.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;

use std::fmt;
use std::str::FromStr;

use portable::Portable;

use crate::error::Error;

/// The most lanes that a vector has.
pub(super) const MAX_LANES: usize = 16;

/// The instructions that kernels are compiled for; chosen once, at run time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Isa {
    /// Eight-lane arrays that the compiler maps to what the target has.
    Portable,
    /// AVX2, FMA and F16C.
    Avx2,
    /// `Avx2`, with bf16 matrices multiplied as AVX512_BF16 would: for tests.
    Avx2EmulatedBf16,
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
    /// `Avx512`, with bf16 matrices multiplied as AVX512_BF16 would: for tests.
    Avx512EmulatedBf16,
    /// AVX-512 with the bf16 dot product.
    Avx512Bf16,
}

impl Isa {
    /// All of them, and how they are spelled.
    const ALL: [(Self, &str); 6] = [
        (Self::Portable, "portable"),
        (Self::Avx2, "avx2"),
        (Self::Avx2EmulatedBf16, "avx2-emulated-bf16"),
        (Self::Avx512, "avx512"),
        (Self::Avx512EmulatedBf16, "avx512-emulated-bf16"),
        (Self::Avx512Bf16, "avx512-bf16"),
    ];

    /// Whether this machine runs it.
    pub fn is_available(self) -> bool {
        match self {
            Self::Portable => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 | Self::Avx2EmulatedBf16 => avx2::available(),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 | Self::Avx512EmulatedBf16 => avx512::available(),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16 => avx512::available() && is_x86_feature_detected!("avx512bf16"),
            #[cfg(not(target_arch = "x86_64"))]
            _ => false,
        }
    }

    /// Everything that this machine runs, the emulations included.
    pub fn available() -> Vec<Self> {
        Self::ALL.into_iter().map(|(isa, _)| isa).filter(|isa| isa.is_available()).collect()
    }

    /// True for those that are there for tests alone.
    pub fn is_emulated(self) -> bool {
        matches!(self, Self::Avx2EmulatedBf16 | Self::Avx512EmulatedBf16)
    }

    /// The fastest that this machine runs.
    pub fn detect() -> Self {
        [Self::Avx512Bf16, Self::Avx512, Self::Avx2]
            .into_iter()
            .find(|isa| isa.is_available())
            .unwrap_or(Self::Portable)
    }

    /// The same vectors with f32 products: for matrices that are not bf16.
    pub(super) fn f32(self) -> Self {
        match self {
            Self::Avx2EmulatedBf16 => Self::Avx2,
            Self::Avx512EmulatedBf16 | Self::Avx512Bf16 => Self::Avx512,
            other => other,
        }
    }

    /// Whether products of bf16 matrices are taken pairwise in bf16.
    pub fn pairs(self) -> bool {
        self != self.f32()
    }

    /// Lanes of a vector.
    pub(super) fn lanes(self) -> usize {
        match self.f32() {
            Self::Avx512 => 16,
            _ => 8,
        }
    }

    /// The most rows that a micro tile of a matrix product has.
    pub(super) fn tile_rows(self) -> usize {
        match self.f32() {
            Self::Avx512 => 14,
            Self::Avx2 => 6,
            _ => 4,
        }
    }

    /// Runs a kernel.
    ///
    /// # Safety
    /// The machine must have the instructions ([`Isa::is_available`]), and what the kernel asks of its
    /// caller must hold.
    pub(super) unsafe fn run<K: Kernel>(self, kernel: K) {
        // SAFETY: the caller vouches for the instructions and for the kernel's arguments.
        unsafe {
            match self {
                Self::Portable => Portable::enter::<Fma, K>(kernel),
                #[cfg(target_arch = "x86_64")]
                Self::Avx2 => avx2::Avx2::enter::<Fma, K>(kernel),
                #[cfg(target_arch = "x86_64")]
                Self::Avx2EmulatedBf16 => avx2::Avx2::enter::<Bf16Emulated, K>(kernel),
                #[cfg(target_arch = "x86_64")]
                Self::Avx512 => avx512::Avx512::enter::<Fma, K>(kernel),
                #[cfg(target_arch = "x86_64")]
                Self::Avx512EmulatedBf16 => avx512::Avx512::enter::<Bf16Emulated, K>(kernel),
                #[cfg(target_arch = "x86_64")]
                Self::Avx512Bf16 => avx512::Avx512::enter::<Bf16Native, K>(kernel),
                #[cfg(not(target_arch = "x86_64"))]
                _ => unreachable!("refused when the backend was made"),
            }
        }
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = Self::ALL.iter().find(|(isa, _)| isa == self).map_or("", |(_, name)| name);
        f.write_str(name)
    }
}

impl FromStr for Isa {
    type Err = Error;

    /// Knows all names, whatever this machine has.
    fn from_str(text: &str) -> Result<Self, Error> {
        let found = Self::ALL.into_iter().find(|(_, name)| *name == text);
        found.map(|(isa, _)| isa).ok_or_else(|| {
            let names = Self::ALL.map(|(_, name)| name).join(", ");
            Error::option("isa", text, format!("one of {names}"))
        })
    }
}

/// A kernel: arguments as fields, one body for every instruction set.
pub(super) trait Kernel {
    /// The body.
    ///
    /// # Safety
    /// As the kernel's own documentation says; and only through [`Isa::run`] or [`Simd::enter`].
    unsafe fn run<S: Simd, D: Dot>(self);
}

/// Vectors of f32 and what the kernels do with them.
///
/// # Safety
/// All functions need the instructions of the type; loads and stores need `LANES` elements (or as many
/// as they name) behind their pointer, at any alignment.
pub(super) trait Simd: Copy + 'static {
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

/// One step of a matrix product: what a 32-bit unit of A and of B holds and how it is accumulated.
pub(super) trait Dot: 'static {
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
pub(super) struct Fma;

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
pub(super) struct Bf16Native;

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
pub(super) struct Bf16Emulated;

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
pub(super) unsafe fn exp2<S: Simd>(x: S::V) -> S::V {
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

/// bf16 bits of `x`, rounded to nearest even; NaN stays a (quiet) NaN.
#[inline(always)]
pub(super) fn bf16_bits(x: f32) -> u16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    let quiet = (bits >> 16) | 0x40;
    (if x.is_nan() { quiet } else { rounded }) as u16
}

/// The f32 that bf16 bits stand for.
#[inline(always)]
pub(super) fn bf16_value(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// The f32 that f16 bits stand for: shifted into place, the exponent is 112 short, which a product sets
/// right for subnormals too; what was infinite or NaN is made so again.
#[inline(always)]
pub(super) fn f16_value(bits: u16) -> f32 {
    let magnitude = u32::from(bits & 0x7fff) << 13;
    let scaled = (f32::from_bits(magnitude) * f32::from_bits((127 + 112) << 23)).to_bits();
    let special = if bits & 0x7c00 == 0x7c00 { 0x7f80_0000 } else { 0 };
    f32::from_bits(scaled | special | u32::from(bits & 0x8000) << 16)
}

/// An e4m3 number, divided by 256: its bits are those of an f16 with a smaller exponent.
#[inline(always)]
pub(super) fn e4m3_value(code: u8) -> f32 {
    let code = u16::from(code);
    f16_value((code & 0x80) << 8 | (code & 0x7f) << 7)
}
