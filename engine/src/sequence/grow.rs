//! How passes and calls change a sequence, and how that is undone.
//!
//! A pass sets a mark ([`Sequence::mark`]) and takes room for its rows ([`Sequence::take`]), in place; if it fails, all is undone
//! to the mark ([`Sequence::undo`]), and otherwise what no call needs is given back ([`Sequence::pass_done`]). A call of many
//! passes is undone as a whole ([`Sequence::roll_back`]) or is final ([`Sequence::settle`]).

use std::ops::Range;

use super::journal::{Delta, Mark, Notes};
use super::segment::{Added, Segment};
use super::{Pending, Sequence, Stage, Turn};
use crate::backend::Phase;
use crate::error::Error;
use crate::pool::{AuxRow, Found, Pool, Store};
use crate::store::PageLayout;

/// Where the rows of a pass go: what was taken for tokens that are about to go through a segment.
#[derive(Debug)]
pub(crate) struct Places {
    /// The segment.
    pub(crate) segment: usize,
    /// KV pages and slots.
    pub(crate) added: Added,
    /// Rows that the tokens' hidden states are in; none in front of the first segment.
    pub(crate) from: Vec<AuxRow>,
    /// Rows for what comes out; none behind the last segment.
    pub(crate) to: Vec<AuxRow>,
    /// Hidden states that begin to wait: from where they are in transit to where they do.
    pub(crate) waits: Vec<(AuxRow, AuxRow)>,
}

/// The slots of a segment that is restored.
#[derive(Debug, Default)]
pub(crate) struct Saved {
    pub(crate) positions: Vec<u32>,
    /// How many of their pages are sealed.
    pub(crate) n_sealed: usize,
}

impl Sequence {
    /// Here and now.
    pub(crate) fn mark(&self) -> Mark {
        let Self { receipt, answer_start, n_shareable, logits_ready, drawn, .. } = *self;
        Mark {
            at: self.journal.log.len(),
            ends: self.segments.iter().map(Segment::ends).collect(),
            n_tokens: self.tokens.len(),
            notes: Notes { receipt, answer_start, n_shareable, logits_ready, drawn },
        }
    }

    /// Takes what the tokens at `positions` need to go through a segment, and those that are pruned to wait in
    /// front of it: all or nothing. From here on they are where the pass brings them.
    pub(crate) fn take(
        &mut self,
        segment: usize,
        positions: &[u32],
        layout: &PageLayout,
        pool: &mut Pool,
    ) -> Result<Places, Error> {
        let is_last = segment + 1 == self.segments.len();
        let n_rows = if is_last { 0 } else { positions.len() };
        let n_pruned = self.stage.pruned.len();
        let mut rows = self.waiting.take(Store::Waiting, n_pruned, &mut pool.aux)?;
        let mut to = self.waiting.take(Store::Transit, n_rows, &mut pool.aux);
        if to.is_err() && pool.free_hidden() {
            to = self.waiting.take(Store::Transit, n_rows, &mut pool.aux);
        }
        let grown = to.and_then(|to| {
            rows.extend(to);
            self.segments[segment].grow(positions, layout, pool)
        });
        let (added, swapped) = grown.inspect_err(|_| self.waiting.give(&rows, &mut pool.aux))?;
        let log = &mut self.journal.log;
        log.extend(swapped.map(|column| Delta::Swapped { segment, column }));
        let to = rows.split_off(n_pruned);
        if self.segments.len() == 1 {
            return Ok(Places { segment, added, from: Vec::new(), to, waits: Vec::new() });
        }
        #[allow(clippy::cast_possible_truncation)] // schedules have at most 16 points
        let now = segment as u8;
        let mut waits = Vec::with_capacity(n_pruned);
        for (&position, row) in self.stage.pruned.iter().zip(rows) {
            if let Some(was) = self.waiting.put(position, row) {
                log.push(Delta::Moved { position, row: was, depth: now });
                waits.push((was, row));
            }
        }
        let mut from = Vec::with_capacity(if segment == 0 { 0 } else { positions.len() });
        for (i, &position) in positions.iter().enumerate() {
            let was = match to.get(i) {
                Some(&row) => self.waiting.put(position, row),
                None => self.waiting.remove(position),
            };
            debug_assert_eq!(self.waiting.depth(position), segment, "{position} skips a segment");
            if let Some(row) = was {
                log.push(Delta::Moved { position, row, depth: now });
                from.push(row);
            }
            match self.waiting.depths.get_mut(position as usize) {
                Some(depth) => *depth = now + 1,
                None => self.waiting.depths.push(now + 1),
            }
        }
        Ok(Places { segment, added, from, to, waits })
    }

    /// The pass that took this is done: gives back what no call needs to go back.
    pub(crate) fn pass_done(
        &mut self,
        places: &Places,
        from: &Mark,
        layout: &PageLayout,
        pool: &mut Pool,
    ) {
        let Places { segment, added, .. } = places;
        let call = self.journal.ends(*segment);
        let Self { segments, waiting, journal, .. } = self;
        let log = &mut journal.log;
        let of_segment = &mut segments[*segment];
        for delta in log.split_off(from.at) {
            match delta {
                Delta::Swapped { column, .. } => pool.release(&column, of_segment.n_layers),
                // Who is in transit was moved there by this call.
                Delta::Moved { row, .. } if row.store == Store::Transit => {
                    waiting.give(&[row], &mut pool.aux);
                }
                delta => log.push(delta),
            }
        }
        let n_kept = of_segment.n_older(call, added, layout) * of_segment.n_layers;
        let mut columns = of_segment.leave_tail(added, layout);
        let released = columns.split_off(n_kept.min(columns.len()));
        pool.release(&released, of_segment.n_layers);
        if !columns.is_empty() {
            log.push(Delta::Sealed { segment: *segment, columns });
        }
        self.stage.pruned.clear();
    }

    /// All is as it was at the mark, which is the youngest, but for what is pending.
    pub(crate) fn undo(&mut self, to: &Mark, layout: &PageLayout, pool: &mut Pool) {
        for delta in self.journal.log.split_off(to.at).into_iter().rev() {
            match delta {
                Delta::Swapped { segment, column } => {
                    let of_segment = &mut self.segments[segment];
                    let last = of_segment.last_column(to.ends[segment]);
                    pool.pages.release(last);
                    last.copy_from_slice(&column);
                }
                Delta::Sealed { segment, columns } => {
                    self.segments[segment].tail.splice(..0, columns);
                }
                Delta::Rolled { positions, column } => {
                    self.segments[0].unroll(positions, column, layout);
                }
                Delta::Moved { position, row, depth } => {
                    if let Some(now) = self.waiting.put(position, row) {
                        self.waiting.give(&[now], &mut pool.aux);
                    }
                    self.waiting.depths[position as usize] = depth;
                }
                Delta::Measured { sums } => *self.measured.sums_mut() = sums,
            }
        }
        for (segment, &ends) in self.segments.iter_mut().zip(&to.ends) {
            segment.cut(ends, pool);
        }
        let n_new = self.tokens.len() - to.n_tokens;
        self.tokens.truncate(to.n_tokens);
        if let Pending::Prompt { done, .. } = &mut self.pending {
            *done -= n_new;
        }
        self.waiting.truncate(self.len(), &mut pool.aux);
        let Notes { receipt, answer_start, n_shareable, logits_ready, drawn } = to.notes;
        (self.receipt, self.answer_start, self.n_shareable) = (receipt, answer_start, n_shareable);
        (self.logits_ready, self.drawn) = (logits_ready, drawn);
    }

    /// New tokens have gone through the first segment.
    pub(crate) fn take_in(&mut self, phase: Phase, new: &[u32]) {
        if phase == Phase::Prefill && self.n_shareable == self.len() {
            self.n_shareable =
                (self.n_shareable + new.len()).min(self.recipe.rule.capacity() as usize);
        }
        self.tokens.extend_from_slice(new);
        match &mut self.pending {
            Pending::Prompt { done, .. } => {
                *done += new.len();
                self.receipt.n_prefilled += new.len();
            }
            Pending::Nothing | Pending::Token(_) => self.receipt.n_decoded += new.len(),
        }
    }

    /// Takes over pages that hold the next tokens in the first segment, and their hidden states if
    /// there is another.
    pub(crate) fn adopt(&mut self, found: Found, tokens: Range<usize>, page_len: usize) {
        #[allow(clippy::cast_possible_truncation)] // bounded by the context length
        let positions = tokens.start as u32..tokens.end as u32;
        self.waiting.adopt(&found.hidden, positions.start, page_len);
        let segment = &mut self.segments[0];
        segment.body.extend(found.columns);
        segment.slots.edit(segment.len(), |all, _| all.extend(positions));
        if self.segments.len() > 1 {
            self.waiting.depths.resize(tokens.end, 1);
        }
    }

    /// Takes what a saved session held, all of it waiting between calls: its tokens, how many segments each has
    /// gone through, where there is more than one, and each segment's slots.
    /// What was taken before an error is released with the rest.
    pub(crate) fn restore(
        &mut self,
        tokens: Vec<u32>,
        depths: Vec<u8>,
        slots: &[Saved],
        layout: &PageLayout,
        pool: &mut Pool,
    ) -> Result<(), Error> {
        self.tokens = tokens;
        for (segment, Saved { positions, n_sealed }) in self.segments.iter_mut().zip(slots) {
            segment.restore(positions, *n_sealed, layout, pool)?;
        }
        let waits = |&(_, &depth): &(u32, &u8)| usize::from(depth) < self.segments.len();
        let waiting: Vec<u32> =
            (0..).zip(&depths).filter(waits).map(|(position, _)| position).collect();
        let rows = self.waiting.take(Store::Waiting, waiting.len(), &mut pool.aux)?;
        for (position, row) in waiting.into_iter().zip(rows) {
            self.waiting.put(position, row);
        }
        self.waiting.depths = depths;
        Ok(())
    }

    /// A call begins that can be undone: something is queued.
    pub(crate) fn begin(&mut self, pending: Pending) {
        self.journal.call = Some(self.mark());
        self.pending = pending;
        self.turn = Turn::default();
        if matches!(self.pending, Pending::Prompt { .. }) {
            self.answer_start = self.len() + self.pending.len();
        }
    }

    /// True if rows of the prompt that is pending have been computed.
    pub(crate) fn has_begun(&self) -> bool {
        let before = self.journal.call.as_ref().map(|call| call.notes.receipt.n_prefilled);
        before.is_some_and(|before| self.receipt.n_prefilled > before)
    }

    /// Takes in the attention that slots have got. One that adds a token does so only when nothing can fail any more.
    pub(crate) fn measure(&mut self, sums: Vec<Vec<f32>>) {
        let old = std::mem::replace(self.measured.sums_mut(), sums);
        let log = &mut self.journal.log;
        let is_logged = log.iter().any(|delta| matches!(delta, Delta::Measured { .. }));
        if matches!(self.pending, Pending::Prompt { .. }) && !is_logged {
            log.push(Delta::Measured { sums: old });
        }
    }

    /// What was pending is done with: nothing can be undone any more.
    pub(crate) fn settle(&mut self, layout: &PageLayout, pool: &mut Pool) {
        self.drop_journal(pool);
        // The last token may be computed once more.
        self.roll(self.len().saturating_sub(1), layout, pool);
        let n_gone = self.segments[0].slots.n_gone();
        let first = layout.n_slots(1);
        if n_gone > self.n_gone {
            self.tokens.drain(first..first + n_gone - self.n_gone);
            self.n_gone = n_gone;
        }
    }

    pub(super) fn drop_journal(&mut self, pool: &mut Pool) {
        for delta in std::mem::take(&mut self.journal).log {
            match delta {
                Delta::Swapped { segment, column: columns }
                | Delta::Sealed { segment, columns } => {
                    pool.release(&columns, self.segments[segment].n_layers);
                }
                Delta::Rolled { column, .. } => pool.release(&column, self.segments[0].n_layers),
                Delta::Moved { row, .. } => self.waiting.give(&[row], &mut pool.aux),
                Delta::Measured { .. } => {}
            }
        }
    }

    /// Gives back what no token from `position` on sees; pages that were there when the call began stay until it is
    /// settled.
    pub(crate) fn roll(&mut self, position: usize, layout: &PageLayout, pool: &mut Pool) {
        let Ok(position) = u32::try_from(position) else { return };
        let (segment, call) = (&mut self.segments[0], self.journal.ends(0));
        let first_seen = self.recipe.rule.first_seen(position);
        let mut slot = layout.n_slots(1) + segment.slots.n_gone() - call.n_gone; // as the call counts them
        while let Some((positions, column)) = segment.roll(first_seen, layout) {
            let n_slots = positions.len();
            match slot < call.n_slots {
                true => self.journal.log.push(Delta::Rolled { positions, column }),
                false => pool.release(&column, segment.n_layers),
            }
            slot += n_slots;
        }
    }

    /// Takes back what has been computed of what is pending, which stays pending.
    pub(crate) fn roll_back(&mut self, layout: &PageLayout, pool: &mut Pool) {
        let Some(call) = self.journal.call.take() else { return };
        self.undo(&call, layout, pool);
        (self.journal.call, self.stage) = (Some(call), Stage::default());
    }

    /// A generated token goes through all segments or through none.
    pub(crate) fn undo_token(&mut self, layout: &PageLayout, pool: &mut Pool) {
        if matches!(self.pending, Pending::Token(_)) && self.stage != Stage::default() {
            self.roll_back(layout, pool);
        }
    }

    /// [`Session::clear_pending`](crate::Session::clear_pending).
    pub(crate) fn clear_pending(&mut self, layout: &PageLayout, pool: &mut Pool) -> usize {
        if self.recipe.lazy.is_some() {
            self.roll_back(layout, pool);
        }
        let n = self.pending.len();
        self.pending = Pending::Nothing;
        self.stage = Stage::default();
        self.settle(layout, pool);
        n
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::collections::BTreeMap;

    use super::*;
    use crate::backend::TILE;
    use crate::pool::AuxPool;
    use crate::read::Rule;
    use crate::recipe::Recipe;
    use crate::store::KvFormats;

    const N_LAYERS: usize = 2;

    /// What is known of a segment's slots beside what is counted anew.
    fn check(seq: &Sequence, layout: &PageLayout) {
        let slots = &seq.segments[0].slots;
        let positions = slots.positions();
        let index =
            |slot: usize| if slot < layout.first_len() { slot } else { slot + slots.n_gone() };
        let mut tiles: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        for slot in 0..positions.len() {
            tiles.entry((layout.kv.skew() + index(slot)) / TILE).or_default().push(slot);
        }
        assert!(slots.lots(0..positions.len(), TILE).flatten().eq(0..positions.len()));
        assert!(
            slots.lots(0..positions.len(), TILE).map(Vec::from_iter).eq(tiles.values().cloned())
        );
        for tile in tiles.values() {
            let of = || tile.iter().map(|&slot| positions[slot]);
            let bounds = [of().min().unwrap(), of().max().unwrap()];
            assert!(tile.iter().all(|&slot| slots.bounds(slot) == bounds), "{tile:?}");
        }
        let is_other = |slot: &usize| positions[*slot] as usize != index(*slot);
        let n_dense = (0..positions.len()).find(is_other).unwrap_or(positions.len());
        assert!(slots.are_dense(n_dense) && !slots.are_dense(n_dense + 1));
    }

    /// Bounds of tiles follow positions on every way that these change.
    #[test]
    fn bounds_follow_positions() {
        let stream = |sinks, window| Rule { sinks, window };
        for (kv, page_len, rule) in [
            ("bf16", 16, stream(4, 150)),
            ("bf16", 256, stream(4, 400)),
            ("int8", 16, stream(4, 90)),
            ("int8", 64, stream(2, 300)),
            ("bf16", 32, Rule::ALL),
            ("int4", 64, Rule::ALL),
            ("int2", 16, Rule::ALL),
        ] {
            let layout = PageLayout::new(1, page_len, 64, kv.parse::<KvFormats>().unwrap());
            play(rule, &layout);
        }
    }

    fn play(rule: Rule, layout: &PageLayout) {
        let mut seed = 1_u64;
        let mut random = |n: usize| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (seed >> 33) as usize % n
        };
        let recipe = Recipe {
            lazy: None,
            evict: None,
            rule,
            takes_prefix: true,
            offers_prefix: true,
            no_logits: None,
        };
        let new = || Sequence::new(recipe.clone(), N_LAYERS, layout);
        let mut pool = Pool::new(20_000, AuxPool::new(0, 0, layout.page_len).unwrap()).unwrap();
        let (pool, are_sealed) = (&mut pool, layout.kv.are_sealed());
        let mut seq = new();
        for _ in 0..400 {
            let before = seq.segments[0].slots.positions().to_vec();
            seq.begin(Pending::Prompt { tokens: vec![0; 1 + random(200)], done: 0 });
            while seq.pending.len() > 0 {
                let (len, n_slots) = (seq.len(), seq.segments[0].len());
                let n_pages = layout.n_pages(n_slots);
                let is_full = n_slots == layout.n_slots(n_pages) && !are_sealed;
                let n = layout.n_slots(n_pages + 1) - layout.n_slots(n_pages);
                if is_full && seq.pending.len() > n {
                    let columns = pool.pages.take(N_LAYERS).unwrap();
                    let found = Found { columns, hidden: Vec::new() };
                    seq.adopt(found, len..len + n, layout.page_len);
                    seq.take_in(Phase::Prefill, &vec![0; n]);
                    check(&seq, layout);
                    continue;
                }
                let n = (1 + random(90)).min(seq.pending.len()).min(layout.n_together(n_slots));
                seq.roll(len, layout, pool);
                check(&seq, layout);
                let by = if rule.rolls() || random(3) > 0 { 0 } else { random(40) };
                let positions: Vec<u32> = (0..n).map(|i| (len + i).abs_diff(by) as u32).collect();
                let mark = seq.mark();
                let places = seq.take(0, &positions, layout, pool).unwrap();
                check(&seq, layout);
                match random(4) {
                    0 => seq.undo(&mark, layout, pool),
                    _ => {
                        seq.pass_done(&places, &mark, layout, pool);
                        seq.take_in(Phase::Prefill, &vec![0; n]);
                    }
                }
                check(&seq, layout);
            }
            if random(3) == 0 {
                seq.roll_back(layout, pool);
                check(&seq, layout);
                assert_eq!(seq.segments[0].slots.positions(), before);
            }
            seq.clear_pending(layout, pool);
            check(&seq, layout);
            let n_slots = seq.segments[0].len();
            match random(6) {
                0 => {
                    let least = seq.least_len(layout);
                    let len = least + random(seq.len().saturating_sub(least) + 1);
                    seq.cut(if random(9) == 0 { 0 } else { len }, layout, pool);
                }
                1 if !rule.rolls() && !are_sealed => {
                    seq.segments[0].renumber(random(n_slots + 1), layout, pool);
                }
                2 => {
                    let fork = seq.fork(pool).unwrap();
                    std::mem::replace(&mut seq, fork).release(pool);
                }
                3 => {
                    let positions = seq.segments[0].slots.positions().to_vec();
                    let saved = Saved { positions, n_sealed: seq.segments[0].n_sealed(layout) };
                    seq.release(pool);
                    let old = std::mem::replace(&mut seq, new());
                    seq.set_gone(old.n_gone);
                    seq.restore(old.tokens, Vec::new(), &[saved], layout, pool).unwrap();
                }
                _ => {}
            }
            check(&seq, layout);
            if seq.len() > 3_000 {
                seq.cut(0, layout, pool);
            }
        }
        seq.release(pool);
        assert_eq!(pool.pages.n_used(), 0);
    }
}
