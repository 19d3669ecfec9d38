//! What a policy goes by, and what of it was seen.

/// Of which rows the attention is added up, slot by slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mass {
    /// Of none.
    None,
    /// Of so many at the end of a call.
    Last(usize),
    /// Of all.
    All,
}

/// What has to be measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Needs {
    /// The attention that slots get: the mean over all query heads, the sum over rows.
    pub mass: Mass,
    /// Lengths of keys, the mean over the key heads.
    pub norms: bool,
}

impl Needs {
    /// Nothing.
    pub const NONE: Self = Self { mass: Mass::None, norms: false };
}

/// What was measured of the slots of a layer; empty where it was not wanted.
#[derive(Clone, Copy, Debug)]
pub struct Shown<'a> {
    /// Which layer.
    pub layer: usize,
    /// Slots that it holds.
    pub n_slots: usize,
    /// `[slot]`
    pub mass: &'a [f32],
    /// `[slot]`
    pub norms: &'a [f32],
}
