//! The tables: one row for each format, one for each pair of codings that attention is compiled for; and what a coding is.
//!
//! | code | is | params |
//! |---|---|---|
//! | e4m3 | 4 exponent and 3 mantissa bits | scale = max / 448 |
//! | i8 | -127 ..= 127 | scale = max / 127 |
//! | u4 | 0 ..= 15 | scale = (max - min) / 15, and min |
//! | u2 | 0 ..= 3 | the same in thirds, of a range that may be narrower |
//!
//! Whoever adds a row gives it an id that no row ever had: it stands in saved state.

use std::fmt;

use crate::Held;

/// One number of a head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    /// float32.
    F32,
    /// bfloat16, rounded to nearest even.
    Bf16,
    /// 8-bit floats, 4 bits of exponent and 3 of mantissa (OCP 8-bit floating point, section 5).
    E4m3,
    /// Integers from -127 to 127.
    I8,
    /// Integers from 0 to 15.
    U4,
    /// Integers from 0 to 3.
    U2,
}

/// Which numbers have what their codes are multiplied with, f16, in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Share {
    /// None: codes are the numbers.
    Nothing,
    /// Those of a head of a slot: a scale, the largest magnitude over the largest code.
    Slot,
    /// Those of a group of a head of a slot: a scale and a zero, the least number.
    Group,
    /// Those of a channel of a head in all slots of a page: a scale and a zero (KIVI, Liu et al. 2024, section 3).
    Channel,
}

/// How the numbers of one side of a page are coded: what kernels are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Coding {
    /// One number.
    pub code: Code,
    /// What others have in common with it.
    pub share: Share,
}

#[allow(missing_docs)] // named as they are made
impl Coding {
    pub const F32: Self = Self::new(Code::F32, Share::Nothing);
    pub const BF16: Self = Self::new(Code::Bf16, Share::Nothing);
    pub const FP8: Self = Self::new(Code::E4m3, Share::Slot);
    pub const INT8: Self = Self::new(Code::I8, Share::Slot);
    pub const INT4: Self = Self::new(Code::U4, Share::Group);
    pub const INT2: Self = Self::new(Code::U2, Share::Group);
    pub const INT4_CHANNEL: Self = Self::new(Code::U4, Share::Channel);
    pub const INT2_CHANNEL: Self = Self::new(Code::U2, Share::Channel);

    pub const fn new(code: Code, share: Share) -> Self {
        Self { code, share }
    }
}

impl Coding {
    /// Bits of a code.
    pub const fn bits(self) -> usize {
        match self.code {
            Code::F32 => 32,
            Code::Bf16 => 16,
            Code::E4m3 | Code::I8 => 8,
            Code::U4 => 4,
            Code::U2 => 2,
        }
    }

    /// Numbers are kept as codes that params belong to.
    pub const fn is_coded(self) -> bool {
        !matches!(self.share, Share::Nothing)
    }

    /// The numbers of a channel share their params, in all slots of a page.
    pub const fn is_by_channel(self) -> bool {
        matches!(self.share, Share::Channel)
    }

    /// What codes a head of `D` numbers in kernels, and its file in `include/kv/`.
    pub(crate) fn kernel(self) -> (&'static str, String) {
        match self.share {
            Share::Nothing => ("wide", "Wide<D>".into()),
            Share::Slot => ("byte", format!("Byte<D, {}>", self.to_string().to_uppercase())),
            Share::Group => ("group", format!("Group<D, {}>", self.bits())),
            Share::Channel => ("channel", format!("Channel<D, {}>", self.bits())),
        }
    }

    /// So many numbers have their codes in the same bytes, and the width of a head is a multiple of it.
    pub const fn unit(self) -> usize {
        match self.bits() {
            bits @ 1..8 => 16 * 8 / bits, // packed in 16 bytes
            _ => 1,
        }
    }

    /// Numbers of a group, in a head of this width.
    pub const fn group(self, head_dim: usize) -> usize {
        match self.share {
            Share::Group | Share::Channel if head_dim.is_multiple_of(64) => 64,
            Share::Group | Share::Channel => 32,
            Share::Nothing | Share::Slot => head_dim,
        }
    }

    /// Bytes of the codes of a head of one slot.
    #[inline]
    pub const fn code_bytes(self, head_dim: usize) -> usize {
        head_dim * self.bits() / 8
    }

    /// Bytes of the params of a head of one slot, where they are the slot's.
    #[inline]
    pub const fn param_bytes(self, head_dim: usize) -> usize {
        match self.share {
            Share::Nothing | Share::Channel => 0,
            Share::Slot => 2,
            Share::Group => 4 * (head_dim / self.group(head_dim)),
        }
    }

    /// Bytes of the params of a head that all slots of a page have in common: the scales of all channels, then their
    /// zeros.
    #[inline]
    pub const fn channel_bytes(self, head_dim: usize) -> usize {
        if self.is_by_channel() { 4 * head_dim } else { 0 }
    }
}

/// As in the names of kernels: `int4`, `int4_channel`.
impl fmt::Display for Coding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let code = match self.code {
            Code::F32 => "f32",
            Code::Bf16 => "bf16",
            Code::E4m3 => "fp8",
            Code::I8 => "int8",
            Code::U4 => "int4",
            Code::U2 => "int2",
        };
        let channel = if self.is_by_channel() { "_channel" } else { "" };
        write!(f, "{code}{channel}")
    }
}

/// A number format of the cache, of both sides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Format {
    /// Its number in saved state; never used again for another.
    pub id: u8,
    /// As users name it.
    pub name: &'static str,
    /// What users are told of it.
    pub says: &'static str,
    /// How keys are held.
    pub k: Held,
    /// How values are.
    pub v: Held,
}

impl Format {
    const fn new(id: u8, name: &'static str, k: Held, v: Held, says: &'static str) -> Self {
        Self { id, name, says, k, v }
    }
}

const fn held(coding: Coding) -> Held {
    Held::new(coding)
}

/// Of all formats; the first is the default.
#[rustfmt::skip] // a row a format
pub const FORMATS: [Format; 8] = [
    Format::new(0, "bf16", held(Coding::BF16), held(Coding::BF16), "rounded to nearest even"),
    Format::new(1, "f32", held(Coding::F32), held(Coding::F32), "exact, for checking; twice the memory"),
    Format::new(2, "fp8", held(Coding::FP8).rotated(), held(Coding::FP8), "floats of 8 bits, a scale a token and head"),
    Format::new(3, "int8", held(Coding::INT8).rotated(), held(Coding::INT8), "integers of 8 bits, a scale a token and head"),
    Format::new(4, "int4", held(Coding::INT4).rotated(), held(Coding::INT4).rotated(), "4 bits, a scale and a zero a group; rotated"),
    Format::new(5, "int4-plain", held(Coding::INT4), held(Coding::INT4), "int4 without rotation, to see what that is worth"),
    // Keys by channel (KIVI, section 3): their channels differ more than their tokens do.
    Format::new(6, "int4-channel", held(Coding::INT4_CHANNEL).sealed(), held(Coding::INT4).sealed(),
        "4 bits in whole pages, keys channel by channel; the last tokens stay in 16 bits"),
    Format::new(7, "int2", held(Coding::INT2_CHANNEL).sealed(), held(Coding::INT2).rotated().sealed(),
        "as int4-channel, with 2 bits"),
];

/// The codings of keys and values that attention is compiled for.
pub const PAIRS: [(Coding, Coding); 8] = [
    (Coding::BF16, Coding::BF16),
    (Coding::FP8, Coding::FP8),
    (Coding::INT8, Coding::INT8),
    (Coding::INT4, Coding::INT4),
    (Coding::INT8, Coding::INT4),
    (Coding::BF16, Coding::INT4),
    (Coding::INT4_CHANNEL, Coding::INT4),
    (Coding::INT2_CHANNEL, Coding::INT2),
];

/// The codings that kernels know; a coding's place is its number there.
pub const CODINGS: [Coding; 7] = [
    Coding::BF16,
    Coding::FP8,
    Coding::INT8,
    Coding::INT4,
    Coding::INT2,
    Coding::INT4_CHANNEL,
    Coding::INT2_CHANNEL,
];

/// Slots of the first page of a table whose other pages hold codes. These, the first tokens of a sequence, which attention sinks
/// into (StreamingLLM, section 3.1) and whose keys are unlike all others, are never coded.
pub const WIDE: usize = 4;

/// Slots that kernels load together; all of one page, counted from [`SKEW`] where pages hold codes.
pub const STRIP: usize = 16;

/// What slots are counted from where pages hold codes: the first strip ends with the slots that are not coded.
pub const SKEW: usize = STRIP - WIDE;
