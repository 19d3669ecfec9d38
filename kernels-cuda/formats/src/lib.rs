//! Number formats of the KV cache, and what its pages look like: what the engine, the launchers of kernels and their
//! build script must agree on.
//!
//! A format is a row of [`FORMATS`]: how keys are held and how values are. One side of a page is [`Held`] in a
//! [`Coding`], from which every size follows, and that is what kernels are compiled for ([`PAIRS`]).
//! [`PageLayout`] says which slots are in which page of a table and where the bytes of a page are.

mod header;
mod layout;
mod table;

use std::fmt;
use std::str::FromStr;

pub use header::{Family, HEAD_DIMS, header};
pub use layout::{PageForm, PageLayout, Part, Run, Runs};
pub use table::{CODINGS, FORMATS, Format, PAIRS, SKEW, STRIP, WIDE};

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

/// When numbers are coded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    /// A slot when it is appended, from its own numbers alone.
    Append,
    /// A page as a whole, long after its slots were appended ([`PageLayout::n_due`]).
    Sealed,
}

/// How one side of a page is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    /// What its numbers are.
    pub coding: Coding,
    /// Heads are multiplied with a Hadamard matrix before they are coded (QuaRot, Ashkboos et al. 2024, section 4): keys
    /// have a few channels that are much larger than the others, and the rotation spreads them over all.
    pub rotated: bool,
    /// When they are coded.
    pub when: When,
}

impl Held {
    /// Coded slot by slot.
    pub const fn new(coding: Coding) -> Self {
        Self { coding, rotated: false, when: When::Append }
    }

    /// The same of rotated heads.
    pub const fn rotated(self) -> Self {
        Self { rotated: true, ..self }
    }

    /// The same, coded page by page.
    pub const fn sealed(self) -> Self {
        Self { when: When::Sealed, ..self }
    }
}

/// K or V: the outermost axis of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Keys, rotated to their absolute position.
    K = 0,
    /// Values.
    V = 1,
}

/// How both sides of a page are held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sides {
    /// Keys.
    pub k: Held,
    /// Values.
    pub v: Held,
}

impl Sides {
    /// Pages of bf16.
    pub const BF16: Self = Self::both(Held::new(Coding::BF16));

    /// Keys and values alike.
    pub const fn both(held: Held) -> Self {
        Self { k: held, v: held }
    }

    /// One of them.
    #[inline]
    pub const fn of(self, side: Side) -> Held {
        match side {
            Side::K => self.k,
            Side::V => self.v,
        }
    }

    /// Pages hold codes, but for the first of a table.
    pub const fn are_coded(self) -> bool {
        self.k.coding.is_coded() || self.v.coding.is_coded()
    }

    /// Pages are coded as a whole; behind them a table has a tail of pages that are not yet.
    pub const fn are_sealed(self) -> bool {
        matches!(self.k.when, When::Sealed) || matches!(self.v.when, When::Sealed)
    }

    /// Slots that are not coded, and hidden states that wait.
    pub const fn wide(self) -> Coding {
        if matches!(self.k.coding.code, Code::F32) { Coding::F32 } else { Coding::BF16 }
    }

    /// What attention counts slots from, so that a strip is in one page.
    pub const fn skew(self) -> usize {
        if self.are_coded() { SKEW } else { 0 }
    }

    /// Bytes of a slot, without what a page's slots have in common.
    pub const fn slot_bytes(self, n_kv_heads: usize, head_dim: usize) -> usize {
        let (k, v) = (self.k.coding, self.v.coding);
        let head = k.code_bytes(head_dim) + k.param_bytes(head_dim);
        n_kv_heads * (head + v.code_bytes(head_dim) + v.param_bytes(head_dim))
    }

    /// Which of [`PAIRS`] it is.
    pub fn pair(self) -> Option<usize> {
        PAIRS.iter().position(|&pair| pair == (self.k.coding, self.v.coding))
    }
}

/// bf16.
impl Default for Sides {
    fn default() -> Self {
        Self::BF16
    }
}

impl From<KvFormats> for Sides {
    fn from(KvFormats { k, v }: KvFormats) -> Self {
        Self { k: k.row().k, v: v.row().v }
    }
}

impl From<KvFormat> for Sides {
    fn from(format: KvFormat) -> Self {
        KvFormats::from(format).into()
    }
}

/// A number format of keys or of values: a row of [`FORMATS`]. [`Default`] is bf16.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub struct KvFormat(u8);

#[allow(missing_docs)] // the rows say what they are
impl KvFormat {
    pub const BF16: Self = Self::named("bf16");
    pub const F32: Self = Self::named("f32");
    pub const FP8: Self = Self::named("fp8");
    pub const INT8: Self = Self::named("int8");
    pub const INT4: Self = Self::named("int4");
    pub const INT4_PLAIN: Self = Self::named("int4-plain");
    pub const INT4_CHANNEL: Self = Self::named("int4-channel");
    pub const INT2: Self = Self::named("int2");
}

impl KvFormat {
    /// All of them.
    pub const ALL: [Self; FORMATS.len()] = {
        let (mut all, mut idx) = ([Self(0); FORMATS.len()], 0);
        while idx < all.len() {
            all[idx] = Self(idx as u8);
            idx += 1;
        }
        all
    };

    /// What it is.
    pub const fn row(self) -> &'static Format {
        &FORMATS[self.0 as usize]
    }

    /// A row by its name; that of a constant above.
    const fn named(name: &str) -> Self {
        let mut idx = 0;
        while !is_same(FORMATS[idx].name.as_bytes(), name.as_bytes()) {
            idx += 1;
        }
        Self(idx as u8)
    }
}

const fn is_same(a: &[u8], b: &[u8]) -> bool {
    let mut idx = 0;
    while idx < a.len() && idx < b.len() && a[idx] == b[idx] {
        idx += 1;
    }
    a.len() == b.len() && idx == a.len()
}

impl fmt::Debug for KvFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for KvFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.row().name)
    }
}

/// The formats of keys and of values.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KvFormats {
    /// Of keys.
    pub k: KvFormat,
    /// Of values.
    pub v: KvFormat,
}

impl KvFormats {
    /// Fails where the two do not go together or heads of this width cannot be coded so.
    pub fn check(self, head_dim: usize) -> Result<(), Refusal> {
        let refuse = |expected| Err(Refusal { found: self.to_string(), expected });
        let Sides { k, v } = self.into();
        if (k.coding == Coding::F32) != (v.coding == Coding::F32) {
            return refuse("f32 for both keys and values, or for neither".into());
        }
        let unit = k.coding.unit().max(v.coding.unit());
        if !head_dim.is_multiple_of(unit) {
            let more = if unit == 64 { "4 bits" } else { "8 bits" };
            return refuse(format!(
                "{more} or more: heads are {head_dim} wide, no multiple of {unit}"
            ));
        }
        Ok(())
    }

    /// Pages are coded as a whole: [`Sides::are_sealed`].
    pub fn are_sealed(self) -> bool {
        Sides::from(self).are_sealed()
    }

    /// Names them in saved state: two bytes, one of them 0 where both sides are alike.
    pub fn id(self) -> u32 {
        let [k, v] = [self.k, self.v].map(|format| u32::from(format.row().id));
        k | (k ^ v) << 8
    }
}

impl From<KvFormat> for KvFormats {
    fn from(format: KvFormat) -> Self {
        Self { k: format, v: format }
    }
}

impl fmt::Display for KvFormats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.k == self.v {
            true => write!(f, "{}", self.k),
            false => write!(f, "{}:{}", self.k, self.v),
        }
    }
}

impl FromStr for KvFormats {
    type Err = Refusal;

    fn from_str(s: &str) -> Result<Self, Refusal> {
        let format = |name: &str| {
            KvFormat::ALL.into_iter().find(|format| format.row().name == name).ok_or_else(|| {
                let names = FORMATS.map(|row| row.name).join(", ");
                let expected = format!("one of {names}, or two of them, KEYS:VALUES");
                Refusal { found: s.to_owned(), expected }
            })
        };
        let (k, v) = s.split_once(':').unwrap_or((s, s));
        Ok(Self { k: format(k)?, v: format(v)? })
    }
}

/// Formats that cannot be had.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// What was asked for.
    pub found: String,
    /// What would do.
    pub expected: String,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "option kv: {} is not usable; expected {}", self.found, self.expected)
    }
}

impl std::error::Error for Refusal {}
