//! The table of policies: a row for each.
//!
//! | policy | rank of a slot | source |
//! |---|---|---|
//! | `window` | how late it is | StreamingLLM's cache without its positions, Xiao et al. 2023 |
//! | `h2o` | the attention that all rows since have paid it; half the budget is for the last ones | Zhang et al. 2023, arXiv 2306.14048, algorithm 1 |
//! | `snapkv` | the attention of the prompt's last rows, pooled | Li et al. 2024, arXiv 2404.14469, section 4 |
//! | `tova` | the attention of the last row | Oren et al. 2024, arXiv 2401.06104, section 3 |
//! | `knorm` | how short its key is | Devoto et al. 2024, arXiv 2406.11430 |
//! | `random` | a number drawn for it, to see what the others are worth | |
//!
//! A row's place is its number in saved state, so rows are added at the end.

use crate::compute::lazy::draw;
use crate::evidence::{Mass, Needs, Shown};

/// What ranks slots.
#[derive(Clone, Copy, Debug)]
pub struct Policy {
    /// As users name it.
    pub name: &'static str,
    /// What it has to be shown, with a window of so many rows.
    pub needs: fn(usize) -> Needs,
    /// With a window of so many and room for so many besides the sinks, how many last slots stay whatever their rank.
    pub n_last: fn(usize, usize) -> usize,
    /// A slot ranks by the highest among so many around it, unless options say otherwise; 1: by its own, and there is no
    /// such option.
    pub pool: usize,
    /// How much each slot is worth; ties go to the earlier.
    pub rank: fn(&Shown<'_>) -> Vec<f32>,
}

/// All of them.
pub const TABLE: [Policy; 6] = [
    Policy {
        name: "window",
        needs: |_| Needs::NONE,
        n_last: |_, room| room,
        pool: 1,
        rank: |shown| vec![0.0; shown.n_slots],
    },
    Policy {
        name: "h2o",
        needs: |_| Needs { mass: Mass::All, ..Needs::NONE },
        n_last: |_, room| room / 2,
        pool: 1,
        rank: |shown| shown.mass.to_vec(),
    },
    Policy {
        name: "snapkv",
        needs: |window| Needs { mass: Mass::Last(window), ..Needs::NONE },
        n_last: |window, _| window,
        pool: 7,
        rank: |shown| shown.mass.to_vec(),
    },
    Policy {
        name: "tova",
        needs: |_| Needs { mass: Mass::Last(1), ..Needs::NONE },
        n_last: |_, _| 1,
        pool: 1,
        rank: |shown| shown.mass.to_vec(),
    },
    Policy {
        name: "knorm",
        needs: |_| Needs { norms: true, ..Needs::NONE },
        n_last: |window, _| window,
        pool: 1,
        rank: |shown| shown.norms.iter().map(|norm| -norm).collect(),
    },
    Policy {
        name: "random",
        needs: |_| Needs::NONE,
        n_last: |window, _| window,
        pool: 1,
        rank: |shown| by_chance(shown.layer, shown.n_slots),
    },
];

/// A row of [`TABLE`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rank(u8);

#[allow(missing_docs)] // the rows say what they are
impl Rank {
    pub const WINDOW: Self = Self(0);
    pub const H2O: Self = Self(1);
    pub const SNAPKV: Self = Self(2);
    pub const TOVA: Self = Self(3);
    pub const KNORM: Self = Self(4);
    pub const RANDOM: Self = Self(5);
}

impl Rank {
    /// The row.
    pub fn row(self) -> &'static Policy {
        const ROWS: &[Policy] = &TABLE;
        &ROWS[usize::from(self.0)]
    }

    /// The row of this name.
    pub fn of(name: &str) -> Option<Self> {
        Self::at(TABLE.iter().position(|row| row.name == name)?)
    }

    /// The row at this place.
    pub fn at(idx: usize) -> Option<Self> {
        u8::try_from(idx).ok().filter(|_| idx < TABLE.len()).map(Self)
    }

    /// Its place.
    pub fn idx(self) -> usize {
        self.0.into()
    }
}

/// Ranks by chance of `n` slots of a layer.
pub(super) fn by_chance(layer: usize, n: usize) -> Vec<f32> {
    #[allow(clippy::cast_possible_truncation)] // a model's layers, a context's tokens
    (0..n).map(|slot| draw(layer as u32, slot as u32)).collect()
}
