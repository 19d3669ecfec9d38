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
mod narrow;
mod portable;
mod vector;

use std::fmt;
use std::str::FromStr;

use self::portable::Portable;
use self::vector::Bf16Native;
use crate::error::Error;

pub(super) use self::narrow::{bf16_bits, bf16_value, e4m3_value, f16_value};
pub(super) use self::vector::{Bf16Emulated, Dot, Fma, Kernel, MAX_LANES, Simd, exp2, exp2_each};

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
