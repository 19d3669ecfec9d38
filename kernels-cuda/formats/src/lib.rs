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

pub use header::{Family, HEAD_DIMS, codings, header};
pub use layout::{PageForm, PageLayout, Part, Run, Runs};
pub use table::{CODINGS, Code, Coding, FORMATS, Format, PAIRS, SKEW, STRIP, Share, WIDE};

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

/// Head counts and widths of the attention block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttentionShape {
    /// Query heads.
    pub n_q_heads: usize,
    /// Key and value heads; `n_q_heads` is a multiple.
    pub n_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
}

impl AttentionShape {
    /// Query heads that share a key head.
    pub fn group_size(&self) -> usize {
        self.n_q_heads / self.n_kv_heads.max(1)
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
