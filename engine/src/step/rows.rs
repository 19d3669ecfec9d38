//! Who gets which rows of a chunk.
//!
//! Prompts that are stepped together share the rows of one chunk, max-min fairly: each gets what it has left or an equal
//! share, whichever is less, and what the short ones leave goes to the long ones. So all that are served advance in every
//! step, whoever came first, and one that is shorter than its share is through at once. Where there are more
//! of them than a pass takes, or fewer rows than they need, those that have waited longest come first.

use std::cmp::Reverse;

use crate::plan::Plan;
use crate::sequence::Sequence;

/// What a prompt asks of a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Wish {
    /// With fewer rows it cannot go on: at most a chunk.
    pub(crate) least: usize,
    /// Rows come in multiples of this, unless they are all that it asks for.
    pub(crate) unit: usize,
    /// Rows that it can use.
    pub(crate) most: usize,
    /// Steps in a row that it has got none.
    pub(crate) waited: usize,
}

impl Wish {
    /// That of a sequence with a prompt.
    pub(crate) fn of(seq: &Sequence, plan: &Plan) -> Self {
        let n_left = seq.n_left();
        let most = n_left.min(seq.n_together(&plan.layout)).min(plan.chunk);
        // Hidden states are shared by the page.
        let is_kept = seq.recipe.lazy.is_some() && plan.keep_prefixes && seq.stage.segment == 0;
        let unit = if is_kept { plan.layout.page_len.min(plan.chunk) } else { 1 };
        let least = if n_left == seq.n_mass_rows().min(n_left) { most } else { unit.min(most) };
        Self { least, unit, most, waited: seq.turn.waited }
    }
}

/// The rows that each gets of `n_rows`; at most `n_served` get any.
pub(crate) fn share_out(wishes: &[Wish], n_rows: usize, n_served: usize) -> Vec<usize> {
    let mut by_turn: Vec<usize> = (0..wishes.len()).collect();
    by_turn.sort_by_key(|&i| Reverse(wishes[i].waited));
    let (mut served, mut n_least) = (Vec::new(), 0);
    for i in by_turn {
        let least = wishes[i].least;
        if served.len() < n_served && n_least + least <= n_rows {
            served.push(i);
            n_least += least;
        }
    }
    served.sort_by_key(|&i| wishes[i].most);
    let mut shares = vec![0; wishes.len()];
    let mut n_free = n_rows;
    for (n_before, &i) in served.iter().enumerate() {
        let Wish { least, unit, most, .. } = wishes[i];
        n_least -= least; // the others are to get theirs
        let fair = (n_free / (served.len() - n_before)).min(n_free - n_least);
        let share = if most <= fair { most } else { (fair - fair % unit).max(least) };
        shares[i] = share;
        n_free -= share;
    }
    shares
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wish(most: usize) -> Wish {
        Wish { least: 1, unit: 1, most, waited: 0 }
    }

    #[test]
    fn what_short_prompts_leave_goes_to_long_ones() {
        for (most, want) in [
            (&[8000][..], &[512][..]),
            (&[8000, 64], &[448, 64]),
            (&[64, 8000], &[64, 448]),
            (&[8000, 300, 20, 8000], &[164, 164, 20, 164]),
            (&[8000, 8000, 8000], &[170, 171, 171]),
            (&[100, 100], &[100, 100]),
            (&[], &[]),
        ] {
            let wishes: Vec<Wish> = most.iter().map(|&most| wish(most)).collect();
            assert_eq!(share_out(&wishes, 512, 16), want, "{most:?}");
        }
    }

    #[test]
    fn shares_come_in_units_and_the_least_is_kept_for_everyone() {
        let paged = Wish { least: 64, unit: 64, ..wish(8000) };
        assert_eq!(share_out(&[paged; 3], 512, 16), [128, 192, 192]);
        let last_rows = Wish { least: 60, most: 60, ..wish(60) };
        assert_eq!(share_out(&[wish(8000), last_rows, wish(8000)], 64, 16), [2, 60, 2]);
    }

    /// Any wishes at all: nobody gets less than the least, more than the most or a broken unit, no row is given twice,
    /// and everybody is served before anybody has waited for more steps than there are others.
    #[test]
    fn nobody_waits_for_long() {
        let mut state = 1_u64;
        let mut random = |n: usize| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 33) as usize % n
        };
        for _ in 0..2_000 {
            let (n_rows, n_served) = (1 + random(64), 1 + random(5));
            let mut wishes: Vec<Wish> = (0..1 + random(12))
                .map(|_| {
                    let unit = [1, 1, 16][random(3)].min(n_rows);
                    let most = 1 + random(n_rows);
                    let least = if random(3) == 0 { most } else { unit.min(most) };
                    Wish { least, unit, most, waited: 0 }
                })
                .collect();
            for _ in 0..30 {
                let shares = share_out(&wishes, n_rows, n_served);
                assert!(shares.iter().sum::<usize>() <= n_rows);
                assert!(shares.iter().filter(|&&n| n > 0).count() <= n_served);
                let n_wishes = wishes.len();
                for (wish, share) in wishes.iter_mut().zip(shares) {
                    wish.waited = if share == 0 { wish.waited + 1 } else { 0 };
                    assert!(share == 0 || (wish.least..=wish.most).contains(&share));
                    assert!(
                        share.is_multiple_of(wish.unit)
                            || share == wish.most
                            || share == wish.least
                    );
                    assert!(wish.waited < n_wishes, "{wish:?}");
                }
            }
        }
    }
}
