//! Eviction: which tokens of each layer stay in the cache when it is to hold a part of them only.
//!
//! After a prompt, and while an answer grows beyond the budget, every layer keeps the slots that rank highest in it, and
//! the others leave for good; their pages are free. What ranks a slot is a row of [`TABLE`].
//!
//! Attention is the mean over all query heads of a layer: a page holds all heads of its tokens, so that these are
//! chosen for all heads alike, where SnapKV chooses for each. Slots leave in runs of a page
//! while decoding, not one by one as in H2O and TOVA: only a page that is empty frees memory.

mod table;

pub use table::{Policy, Rank, TABLE};

use crate::compute::lazy::{MAX_POOL, MAX_WINDOW, first};
use std::fmt;

use crate::error::Error;
use crate::evidence::{Mass, Needs, Shown};
use crate::share;

/// A policy and its budget.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Evict {
    /// What ranks tokens.
    pub rank: Rank,
    /// How many stay.
    pub keep: Keep,
    /// Tokens at the start that always stay.
    pub sinks: usize,
    /// Rows at the end of a prompt whose attention counts in `snapkv`, and tokens at the end that always stay, except
    /// with `tova` and `h2o`.
    pub window: usize,
    /// A token ranks by the highest attention among the `pool` slots around it, an odd number; 1: by its own. `snapkv` only.
    pub pool: usize,
}

/// How many tokens of a layer stay.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Keep {
    /// So many, of prompts and answers: the cache does not grow beyond them by more than a page, but
    /// for a prompt that is under way.
    Tokens(usize),
    /// This share of each prompt; of answers everything.
    Share(f64),
}

/// The fewest tokens that may be kept.
pub const MIN_KEEP: usize = 16;

impl Evict {
    /// A policy with the defaults for the rest.
    pub fn new(rank: Rank, keep: Keep) -> Self {
        Self { rank, keep, sinks: 4, window: 32, pool: rank.row().pool }
    }

    /// Reads `snapkv:1024` (tokens a layer keeps) or `snapkv:25%` (of each prompt); then, behind commas, `window=N`,
    /// `pool=N` and `sinks=N`.
    pub fn parse(spec: &str) -> Result<Self, Error> {
        let refuse = || {
            let names = TABLE.each_ref().map(|policy| policy.name).join(", ");
            let expected = format!(
                "POLICY:TOKENS or POLICY:SHARE, with one of {names}, at least {MIN_KEEP} tokens, or {}, of 1% to 100%; then, \
                 if wanted, window=N (1 to {MAX_WINDOW}), pool=N (odd, 1 to {MAX_POOL}; snapkv), sinks=N",
                share::EXPECTED
            );
            Error::option("evict", spec, expected)
        };
        let mut words = spec.split(',').map(str::trim);
        let (name, keep) = words.next().and_then(|word| word.split_once(':')).ok_or_else(refuse)?;
        let rank = Rank::of(name).ok_or_else(refuse)?;
        let keep = match keep.parse() {
            Ok(n_tokens) => Keep::Tokens(n_tokens),
            Err(_) => Keep::Share(share::parse(keep).ok_or_else(refuse)?),
        };
        let mut evict = Self::new(rank, keep);
        for word in words {
            let (option, value) = word.split_once('=').ok_or_else(refuse)?;
            let value = value.parse().map_err(|_| refuse())?;
            match option {
                "window" => evict.window = value,
                "pool" if rank.row().pool > 1 => evict.pool = value,
                "sinks" => evict.sinks = value,
                _ => return Err(refuse()),
            }
        }
        evict.check().map_err(|_| refuse())?;
        Ok(evict)
    }

    /// Refuses numbers that mean nothing.
    pub fn check(&self) -> Result<(), Error> {
        let refuse = |value: String, expected: String| Err(Error::option("evict", value, expected));
        match self.keep {
            Keep::Tokens(n) if n < MIN_KEEP || n <= self.sinks => {
                return refuse(
                    n.to_string(),
                    format!("at least {MIN_KEEP} tokens, and more than sinks"),
                );
            }
            Keep::Share(share) if !(0.01..=1.0).contains(&share) => {
                return refuse(format!("{}%", share * 100.0), "1% to 100%".into());
            }
            _ => {}
        }
        if !(1..=MAX_WINDOW).contains(&self.window) {
            return refuse(format!("window={}", self.window), format!("1 to {MAX_WINDOW}"));
        }
        if self.rank.row().pool == 1 && self.pool != 1 {
            return refuse(format!("pool={}", self.pool), "none, but for snapkv".into());
        }
        if !(1..=MAX_POOL).contains(&self.pool) || self.pool.is_multiple_of(2) {
            return refuse(format!("pool={}", self.pool), format!("odd, 1 to {MAX_POOL}"));
        }
        Ok(())
    }

    /// Of the `n_held` slots that a layer holds after a prompt of `n_new` tokens (`None`: after a generated one), how many
    /// are to stay; `None`: all.
    pub fn n_keep(&self, n_held: usize, n_new: Option<usize>, page_len: usize) -> Option<usize> {
        let n_keep = match (self.keep, n_new) {
            (Keep::Tokens(n), Some(_)) => n,
            (Keep::Tokens(n), None) if n_held >= n.saturating_add(page_len) => n,
            (Keep::Share(share), Some(n_new)) => {
                #[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation)]
                #[allow(clippy::cast_sign_loss)] // counts of tokens, far below 2^52
                let n_kept = (n_new as f64 * share).ceil() as usize;
                (n_held - n_new + n_kept).max(MIN_KEEP).max(self.sinks.saturating_add(1))
            }
            _ => return None,
        };
        (n_keep < n_held).then_some(n_keep)
    }

    /// What it has to be shown.
    pub fn needs(&self) -> Needs {
        (self.rank.row().needs)(self.window)
    }

    /// True if every row's attention counts.
    pub fn counts_all(&self) -> bool {
        self.needs().mass == Mass::All
    }

    /// Rows at the end of a call whose attention counts, where only the last ones' does.
    pub fn n_mass_rows(&self) -> usize {
        match self.needs().mass {
            Mass::Last(n) => n,
            Mass::None | Mass::All => 0,
        }
    }

    /// How much each slot of a layer is worth: the higher stays.
    pub fn ranks(&self, shown: &Shown<'_>) -> Vec<f32> {
        (self.rank.row().rank)(shown)
    }

    /// The slots of a layer that stay, `n_keep` of them, ascending; `ranks` says for each slot how much it is worth.
    /// Ties go to the earlier slot.
    pub fn select(&self, ranks: &[f32], n_keep: usize) -> Vec<u32> {
        let n = ranks.len();
        let room = n_keep.saturating_sub(self.sinks);
        let n_last = (self.rank.row().n_last)(self.window, room);
        let last = n.saturating_sub(n_last.min(room)).max(self.sinks.min(n));
        let between = self.sinks.min(n)..last;
        let pooled = |slot: usize| {
            let reach = self.pool / 2;
            let around = &ranks[slot.saturating_sub(reach)..(slot + reach + 1).min(n)];
            around.iter().copied().fold(f32::NEG_INFINITY, f32::max)
        };
        #[allow(clippy::cast_possible_truncation)] // bounded by the context length
        let mut others: Vec<(f32, u32)> =
            between.clone().map(|slot| (pooled(slot), slot as u32)).collect();
        first(&mut others, n_keep.saturating_sub(n - between.len()));
        #[allow(clippy::cast_possible_truncation)]
        let always = (0..between.start).chain(between.end..n).map(|slot| slot as u32);
        let mut keep: Vec<u32> = always.chain(others.into_iter().map(|(_, slot)| slot)).collect();
        keep.sort_unstable();
        keep
    }
}

/// As [`Evict::parse`] reads it.
impl fmt::Display for Evict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // By name, so that none is forgotten.
        let Self { rank, keep, sinks, window, pool } = self;
        write!(f, "{}:", rank.row().name)?;
        match keep {
            Keep::Tokens(n) => write!(f, "{n}")?,
            Keep::Share(share) => write!(f, "{share:?}")?, // 1.0, not 1
        }
        write!(f, ",window={window},sinks={sinks}")?;
        if rank.row().pool > 1 { write!(f, ",pool={pool}") } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn evict(spec: &str) -> Evict {
        Evict::parse(spec).unwrap()
    }

    #[test]
    fn text_is_read() {
        let h2o = Evict { sinks: 8, ..Evict::new(Rank::H2O, Keep::Tokens(1024)) };
        assert_eq!(evict("h2o:1024,sinks=8"), h2o);
        let snapkv = Evict { window: 16, pool: 5, ..Evict::new(Rank::SNAPKV, Keep::Share(0.25)) };
        assert_eq!(evict("snapkv:25%, window=16,pool=5"), snapkv);
        assert_eq!([h2o, snapkv].map(|policy| evict(&policy.to_string())), [h2o, snapkv]);
        for spec in [
            "",
            "snapkv",
            "snapkv:",
            "lru:100",
            "h2o:15",
            "h2o:-1",
            "h2o:0%",
            "h2o:101%",
            "h2o:NaN%",
            "tova:64,pool=3",
            "snapkv:64,pool=4",
            "snapkv:64,window=0",
            "snapkv:64,window=65",
            "knorm:64,sinks=64",
            "knorm:64,",
            "knorm:64,what=1",
        ] {
            assert!(Evict::parse(spec).is_err(), "{spec}");
        }
    }

    #[test]
    fn budgets() {
        let tokens = evict("window:100");
        assert_eq!(tokens.n_keep(100, Some(100), 16), None);
        assert_eq!(tokens.n_keep(101, Some(1), 16), Some(100));
        assert_eq!(tokens.n_keep(115, None, 16), None);
        assert_eq!(tokens.n_keep(116, None, 16), Some(100));
        let share = evict("window:25%");
        assert_eq!(share.n_keep(100, Some(100), 16), Some(25));
        assert_eq!(share.n_keep(131, Some(101), 16), Some(30 + 26));
        assert_eq!(share.n_keep(131, None, 16), None);
        for all in ["window:25%,sinks=18446744073709551615", "window:18446744073709551615"] {
            assert_eq!(evict(all).n_keep(100, Some(100), 16), None, "{all}");
            assert_eq!(evict(all).n_keep(100, None, 16), None, "{all}");
        }
        assert_eq!(share.n_keep(17, Some(17), 16), Some(MIN_KEEP));
        assert_eq!(share.n_keep(MIN_KEEP, Some(MIN_KEEP), 16), None);
    }

    /// Against the definition: sort everything.
    #[test]
    fn the_best_stay() {
        for Policy { name, .. } in TABLE {
            for (n, n_keep, sinks, window) in [
                (100, 50, 4, 8),
                (100, 99, 0, 1),
                (40, 16, 10, 32),
                (17, 16, 0, 64),
                (33, 20, 15, 3),
            ] {
                let evict = evict(&format!("{name}:{n_keep},sinks={sinks},window={window}"));
                let ranks = table::by_chance(3, n);
                let keep = evict.select(&ranks, n_keep);
                assert_eq!(keep.len(), n_keep, "{evict:?}");
                assert!(keep.is_sorted_by(|a, b| a < b) && keep.iter().all(|&s| (s as usize) < n));
                let room = n_keep - sinks;
                let n_last = match evict.rank {
                    Rank::WINDOW => room,
                    Rank::H2O => room / 2,
                    Rank::TOVA => 1,
                    _ => window.min(room),
                };
                let is_fixed = |slot: usize| slot < sinks || slot >= n - n_last;
                let value = |slot: usize| {
                    let reach = evict.pool / 2;
                    (slot.saturating_sub(reach)..=(slot + reach).min(n - 1))
                        .map(|s| ranks[s])
                        .fold(f32::MIN, f32::max)
                };
                let mut order: Vec<usize> = (0..n).collect();
                order.sort_by(|&a, &b| {
                    let key = |slot| if is_fixed(slot) { f32::MAX } else { value(slot) };
                    key(b).total_cmp(&key(a)).then(a.cmp(&b))
                });
                let mut want: Vec<u32> = order[..n_keep].iter().map(|&slot| slot as u32).collect();
                want.sort_unstable();
                assert_eq!(keep, want, "{evict:?}");
            }
        }
    }
}
