//! The tables: one row for each format, one for each pair of codings that attention is compiled for.
//!
//! | code | is | params |
//! |---|---|---|
//! | e4m3 | 4 exponent and 3 mantissa bits | scale = max / 448 |
//! | i8 | -127 ..= 127 | scale = max / 127 |
//! | u4 | 0 ..= 15 | scale = (max - min) / 15, and min |
//! | u2 | 0 ..= 3 | the same in thirds, of a range that may be narrower |
//!
//! Whoever adds a row gives it an id that no row ever had: it stands in saved state.

use crate::{Coding, Held};

/// A number format of the cache, of both sides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Format {
    /// Its number in saved state; never used again for another.
    pub id: u8,
    /// As users name it.
    pub name: &'static str,
    /// How keys are held.
    pub k: Held,
    /// How values are.
    pub v: Held,
}

impl Format {
    const fn new(id: u8, name: &'static str, k: Held, v: Held) -> Self {
        Self { id, name, k, v }
    }
}

const fn held(coding: Coding) -> Held {
    Held::new(coding)
}

/// Of all formats; the first is the default.
pub const FORMATS: [Format; 8] = [
    // Rounded to nearest even when a token is appended.
    Format::new(0, "bf16", held(Coding::BF16), held(Coding::BF16)),
    // Exact, for checking; twice the memory.
    Format::new(1, "f32", held(Coding::F32), held(Coding::F32)),
    Format::new(2, "fp8", held(Coding::FP8).rotated(), held(Coding::FP8)),
    Format::new(3, "int8", held(Coding::INT8).rotated(), held(Coding::INT8)),
    Format::new(4, "int4", held(Coding::INT4).rotated(), held(Coding::INT4).rotated()),
    // To see what the rotation is worth.
    Format::new(5, "int4-plain", held(Coding::INT4), held(Coding::INT4)),
    // Keys by channel (KIVI, section 3): their channels differ more than their tokens do.
    Format::new(
        6,
        "int4-channel",
        held(Coding::INT4_CHANNEL).sealed(),
        held(Coding::INT4).sealed(),
    ),
    Format::new(
        7,
        "int2",
        held(Coding::INT2_CHANNEL).sealed(),
        held(Coding::INT2).rotated().sealed(),
    ),
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
