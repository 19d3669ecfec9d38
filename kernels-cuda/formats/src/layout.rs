//! Which slots are in which page of a table, and where the bytes of a page are.
//!
//! A page is a fixed number of bytes: K and V of some slots for all kv heads of one layer. It is head-major,
//! `[K|V][kv_head]`, and a head's part is one contiguous run: the codes of all slots, `[slot][head_dim]`, and
//! behind them what the codes are multiplied with, `[slot][params]`, or of all channels the scales and then the zeros.
//!
//! The first page of a table whose pages are coded holds [`WIDE`] slots in 16 bits in the same number of bytes.
//! Where pages are *sealed*, that is coded as a whole, tokens wait in 16 bits until theirs is full, and longer, because
//! the last tokens matter most: such a table is its first page, its body of sealed pages, and a tail of pages that
//! hold few slots each, in 16 bits. [`PageLayout::n_due`] says when a page is sealed.

use std::ops::Range;

use crate::{Coding, Held, Side, Sides, WIDE};

/// Full pages that stay in 16 bits in front of the one that a row is appended to, where pages are sealed.
const N_OPEN: usize = 2;

/// Shape of the pages of a pool, and which slots are in which page of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageLayout {
    /// Key and value heads.
    pub n_kv_heads: usize,
    /// Tokens a page holds, but for the first of a table where the others are coded, and for those of its tail.
    pub page_len: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// How they are held.
    pub kv: Sides,
    /// Pages of the table between its first and its tail; `usize::MAX` where no page is sealed and none has a tail.
    n_sealed: usize,
}

/// The parts of a table, whose pages look alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Its first page.
    First,
    /// The pages behind that: all the others, unless pages are sealed.
    Body,
    /// Those that are not sealed yet.
    Tail,
}

/// Slots that lie next to each other in one page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    /// Which page of the table.
    pub page_idx: usize,
    /// What it looks like.
    pub part: Part,
    /// The first of them, in the page.
    pub first: usize,
    /// All of them, in the table.
    pub slots: Range<usize>,
}

/// [`PageLayout::runs`].
#[derive(Clone, Debug)]
pub struct Runs {
    layout: PageLayout,
    page_idx: usize,
    first: usize,
    slots: Range<usize>,
}

impl Iterator for Runs {
    type Item = Run;

    #[inline(always)] // attention asks for a run or two a tile
    fn next(&mut self) -> Option<Run> {
        let Self { layout, page_idx, first, slots } = self;
        if slots.start >= slots.end {
            return None;
        }
        let part = layout.part(*page_idx);
        let end = slots.end.min(slots.start + (layout.len_of(part) - *first));
        let run = Run { page_idx: *page_idx, part, first: *first, slots: slots.start..end };
        (*page_idx, *first, slots.start) = (*page_idx + 1, 0, end);
        Some(run)
    }
}

impl PageLayout {
    /// The layout of an empty table.
    pub fn new(n_kv_heads: usize, page_len: usize, head_dim: usize, kv: impl Into<Sides>) -> Self {
        let kv = kv.into();
        let n_sealed = if kv.are_sealed() { 0 } else { usize::MAX };
        Self { n_kv_heads, page_len, head_dim, kv, n_sealed }
    }

    /// The layout of a table with so many sealed pages; all are the same where none is sealed.
    pub fn with_sealed(self, n_sealed: usize) -> Self {
        match self.kv.are_sealed() {
            true => Self { n_sealed, ..self },
            false => self,
        }
    }

    /// Bytes a page takes.
    pub fn bytes(&self) -> usize {
        self.coded().bytes().max(self.form_of(Part::First).bytes()).next_multiple_of(16)
    }

    /// Slots of the first page of a table.
    pub fn first_len(&self) -> usize {
        if self.kv.are_coded() { WIDE } else { self.page_len }
    }

    /// How many slots fewer than the others the first page has. Counted from this number on instead of from 0,
    /// slot `s` is in page `s / page_len`, if that is no page of the tail.
    pub fn skew(&self) -> usize {
        self.page_len - self.first_len()
    }

    /// Slots of a page of the tail: a power of two, so that a page has been filled when the last of its tail's is.
    pub fn tail_len(&self) -> usize {
        let wide = PageForm { len: 1, kv: self.wide(), ..self.coded() };
        let n = (self.bytes() / wide.bytes()).clamp(1, self.page_len);
        1 << n.ilog2()
    }

    /// Pages of a tail that make one when they are sealed.
    pub fn n_to_seal(&self) -> usize {
        self.page_len / self.tail_len()
    }

    /// Slots in front of the tail.
    pub fn n_before_tail(&self) -> usize {
        self.first_len().saturating_add(self.n_sealed.saturating_mul(self.page_len))
    }

    /// Pages that are to be sealed in all before a row is appended to `slot`: a row of page `p`, counted as if none had
    /// a tail, sees those in front of page `p - 2` coded, whatever it came with.
    pub fn n_due(&self, slot: usize) -> usize {
        ((slot + self.skew()) / self.page_len).saturating_sub(N_OPEN + 1)
    }

    /// Rows from `slot` on that see the same pages sealed.
    pub fn n_alike(&self, slot: usize) -> usize {
        match self.kv.are_sealed() {
            true => self.page_len - (slot + self.skew()) % self.page_len,
            false => usize::MAX,
        }
    }

    /// Rows from `slot` on that can be appended together: what any of them sees sealed was there before the first.
    pub fn n_together(&self, slot: usize) -> usize {
        self.n_alike(slot).saturating_add(N_OPEN * self.page_len)
    }

    /// The page of a slot, and the slot's index in that page.
    #[inline]
    pub fn place(&self, slot: usize) -> (usize, usize) {
        let skewed = slot + self.skew();
        match skewed / self.page_len {
            0 => (0, slot),
            page_idx if page_idx <= self.n_sealed => (page_idx, skewed % self.page_len),
            _ => {
                let in_tail = slot - self.n_before_tail();
                (1 + self.n_sealed + in_tail / self.tail_len(), in_tail % self.tail_len())
            }
        }
    }

    /// Slots of a table by the pages that hold them: the only walk over pages.
    #[inline]
    pub fn runs(&self, slots: Range<usize>) -> Runs {
        let (page_idx, first) = self.place(slots.start);
        Runs { layout: *self, page_idx, first, slots }
    }

    /// Slots of a page of a part.
    #[inline]
    fn len_of(&self, part: Part) -> usize {
        match part {
            Part::First => self.first_len(),
            Part::Body => self.page_len,
            Part::Tail => self.tail_len(),
        }
    }

    /// Pages that hold `n_slots` slots of one layer.
    pub fn n_pages(&self, n_slots: usize) -> usize {
        match n_slots.checked_sub(1) {
            None => 0,
            Some(last) => self.place(last).0 + 1,
        }
    }

    /// Slots that `n_pages` pages of one layer hold.
    pub fn n_slots(&self, n_pages: usize) -> usize {
        match n_pages.saturating_sub(1).checked_sub(self.n_sealed) {
            Some(n) if n > 0 => self.n_before_tail() + n * self.tail_len(),
            _ => (n_pages * self.page_len).saturating_sub(self.skew()),
        }
    }

    /// Pages of one layer that a session of `n_slots` tokens needs at most, wherever its calls begin and end.
    pub fn n_pages_at_most(&self, n_slots: usize) -> usize {
        if !self.kv.are_sealed() {
            return self.n_pages(n_slots);
        }
        // The tail with the rows of a pass, and what a call keeps of the tail that it found.
        let n_wide = 2 * (N_OPEN + 1) + (N_OPEN + 1);
        let in_tail = n_slots.div_ceil(self.tail_len()).min(n_wide * self.n_to_seal());
        self.with_sealed(usize::MAX).n_pages(n_slots) + in_tail
    }

    /// Tokens that a session can hold in so many pages of one layer.
    pub fn capacity(&self, n_pages: usize) -> usize {
        let (mut least, mut most) = (0, n_pages.saturating_mul(self.page_len) + 1);
        while most - least > 1 {
            let middle = least + (most - least) / 2;
            match self.n_pages_at_most(middle) <= n_pages {
                true => least = middle,
                false => most = middle,
            }
        }
        least
    }

    /// The part of a table that the page with this index is in.
    #[inline]
    pub fn part(&self, page_idx: usize) -> Part {
        match page_idx {
            0 => Part::First,
            _ if page_idx <= self.n_sealed => Part::Body,
            _ => Part::Tail,
        }
    }

    /// What the page with this index in a table looks like.
    #[inline]
    pub fn form(&self, page_idx: usize) -> PageForm {
        self.form_of(self.part(page_idx))
    }

    /// What the pages of a part look like.
    pub fn form_of(&self, part: Part) -> PageForm {
        match part {
            Part::First if self.skew() > 0 => {
                PageForm { len: self.first_len(), kv: self.wide(), ..self.coded() }
            }
            Part::First | Part::Body => self.coded(),
            Part::Tail => PageForm { len: self.tail_len(), kv: self.wide(), ..self.coded() },
        }
    }

    fn wide(&self) -> Sides {
        Sides::both(Held::new(self.kv.wide()))
    }

    fn coded(&self) -> PageForm {
        let Self { n_kv_heads, page_len, head_dim, kv, .. } = *self;
        PageForm { n_kv_heads, len: page_len, head_dim, kv }
    }

    /// `tokens` page by page, full pages only.
    pub fn full_pages<'t>(&self, tokens: &'t [u32]) -> impl Iterator<Item = &'t [u32]> {
        let (first, rest) = tokens.split_at_checked(self.first_len()).unwrap_or_default();
        let first = (!first.is_empty()).then_some(first);
        first.into_iter().chain(rest.chunks_exact(self.page_len))
    }
}

/// Where the numbers of a page are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageForm {
    /// Key and value heads.
    pub n_kv_heads: usize,
    /// Slots.
    pub len: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// How they are held.
    pub kv: Sides,
}

impl PageForm {
    /// What the numbers of a side are.
    #[inline]
    pub fn coding(&self, side: Side) -> Coding {
        self.kv.of(side).coding
    }

    /// Bytes of a head's run.
    #[inline]
    fn run_bytes(&self, side: Side) -> usize {
        self.len * self.coding(side).code_bytes(self.head_dim) + self.params_before(side, self.len)
    }

    /// Bytes of the params of a head in front of those of a slot; all of them, where they are the channels'.
    #[inline]
    fn params_before(&self, side: Side, slot: usize) -> usize {
        let coding = self.coding(side);
        match coding.is_by_channel() {
            true if slot < self.len => 0,
            true => coding.channel_bytes(self.head_dim),
            false => slot * coding.param_bytes(self.head_dim),
        }
    }

    /// Bytes of a token, its share of what all tokens of a page have in common counted.
    pub fn slot_bytes(&self) -> usize {
        self.bytes().div_ceil(self.len)
    }

    fn bytes(&self) -> usize {
        self.n_kv_heads * (self.run_bytes(Side::K) + self.run_bytes(Side::V))
    }

    /// First byte of the codes of a head's slot.
    #[inline]
    pub fn codes(&self, side: Side, kv_head: usize, slot: usize) -> usize {
        let before = side as usize * self.n_kv_heads * self.run_bytes(Side::K);
        let code_bytes = self.coding(side).code_bytes(self.head_dim);
        before + kv_head * self.run_bytes(side) + slot * code_bytes
    }

    /// First byte of the params of a head's slot: for all slots the same one, where they are the channels'.
    #[inline]
    pub fn params(&self, side: Side, kv_head: usize, slot: usize) -> usize {
        self.codes(side, kv_head, self.len) + self.params_before(side, slot)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::{CODINGS, FORMATS, KvFormat, KvFormats, PAIRS};

    fn layout(kv: &str, page_len: usize, head_dim: usize) -> PageLayout {
        PageLayout::new(3, page_len, head_dim, kv.parse::<KvFormats>().unwrap())
    }

    /// Every byte of a page belongs to one number or param, and nothing lies outside.
    #[test]
    fn runs_fill_a_page() {
        let by_token =
            ["bf16", "f32", "fp8", "int8", "int4", "int8:int4", "bf16:int4", "int4:bf16"];
        let sealed = ["int4-channel", "int2", "int2:int8", "bf16:int2"];
        for kv in by_token.into_iter().chain(sealed) {
            for (page_len, head_dim) in [(16, 64), (64, 64), (64, 128), (256, 192)] {
                let layout = layout(kv, page_len, head_dim);
                for part in [Part::First, Part::Body, Part::Tail] {
                    let form = layout.form_of(part);
                    let mut used = vec![0; layout.bytes()];
                    for side in [Side::K, Side::V] {
                        let coding = form.coding(side);
                        for (head, slot) in (0..3).flat_map(|h| (0..form.len).map(move |s| (h, s)))
                        {
                            let codes = form.codes(side, head, slot);
                            let params = form.params(side, head, slot);
                            let code_bytes = coding.code_bytes(head_dim);
                            used[codes..codes + code_bytes].iter_mut().for_each(|n| *n += 1);
                            let param_bytes = match coding.is_by_channel() {
                                true if slot > 0 => 0,
                                true => coding.channel_bytes(head_dim),
                                false => coding.param_bytes(head_dim),
                            };
                            used[params..params + param_bytes].iter_mut().for_each(|n| *n += 1);
                        }
                    }
                    assert!(used.iter().all(|&n| n <= 1), "{kv} {page_len}: bytes used twice");
                    let n_used: usize = used.iter().sum();
                    let is_largest = form.bytes() + 16 > layout.bytes();
                    if part == Part::Body && is_largest {
                        assert!(layout.bytes() - n_used < 16, "{kv} {page_len}: {n_used} bytes");
                    }
                }
            }
        }
    }

    #[test]
    fn slots_fill_pages_in_order() {
        for kv in ["bf16", "int8", "int4", "int2"] {
            for page_len in [16, 64, 256] {
                // With all pages sealed a table is as that of any coded cache.
                let layout = layout(kv, page_len, 64).with_sealed(usize::MAX);
                let (mut page_idx, mut slot_in_page) = (0, 0);
                for slot in 0..3 * page_len {
                    if slot_in_page == layout.form(page_idx).len {
                        (page_idx, slot_in_page) = (page_idx + 1, 0);
                        assert_eq!(layout.n_slots(page_idx), slot, "full pages");
                    }
                    assert_eq!(layout.place(slot), (page_idx, slot_in_page), "{kv} slot {slot}");
                    assert_eq!(layout.n_pages(slot + 1), page_idx + 1, "{kv} {slot} slots");
                    slot_in_page += 1;
                }
                let tokens: Vec<u32> = (0..2 * page_len as u32).collect();
                let full: Vec<&[u32]> = layout.full_pages(&tokens).collect();
                assert_eq!(full.concat(), tokens[..layout.n_slots(full.len())]);
                assert_eq!(
                    full.len(),
                    layout.n_pages(tokens.len()) - usize::from(layout.skew() > 0)
                );
                assert_eq!(layout.full_pages(&tokens[..3]).count(), 0);
            }
        }
        assert_eq!(layout("bf16", 64, 64).n_pages(0), 0);
        assert_eq!(layout("int8", 64, 64).n_pages(0), 0);
    }
    /// Tables whose pages are sealed one after another, as tokens come.
    #[test]
    fn tails_are_sealed_page_by_page() {
        for (kv, page_len, head_dim) in
            [("int2", 64, 64), ("int4-channel", 64, 32), ("int2", 16, 128), ("bf16:int2", 256, 64)]
        {
            let empty = layout(kv, page_len, head_dim);
            assert_eq!(empty.tail_len() * empty.n_to_seal(), page_len);
            assert!(empty.form_of(Part::Tail).bytes() <= empty.bytes(), "{kv}");
            let (mut n_sealed, mut most) = (0, 0);
            for len in 0..8 * page_len {
                let is_first_of_page = (len + empty.skew()).is_multiple_of(page_len);
                assert_eq!(empty.n_alike(len) == page_len, is_first_of_page);
                assert_eq!(empty.n_due(len), empty.n_due(len + empty.n_alike(len) - 1));
                n_sealed = n_sealed.max(empty.n_due(len));
                let layout = empty.with_sealed(n_sealed);
                // The row and the two pages in front of its own are in the tail, and no page more.
                let n_wide = len + 1 - layout.n_before_tail().min(len + 1);
                let least = (2 * page_len + 1).min((len + 1).saturating_sub(WIDE));
                assert!((least..=3 * page_len).contains(&n_wide), "{kv} {len}: {n_wide}");
                let (mut slot, mut page_idx) = (0, 0);
                while slot <= len {
                    let form = layout.form(page_idx);
                    assert_eq!(layout.n_slots(page_idx), slot);
                    for (in_page, slot) in (slot..=len).take(form.len).enumerate() {
                        assert_eq!(layout.place(slot), (page_idx, in_page), "{kv} {slot}");
                    }
                    (slot, page_idx) = (slot + form.len, page_idx + 1);
                }
                assert_eq!(layout.n_pages(len + 1), page_idx);
                most = most.max(page_idx);
                assert!(empty.n_pages_at_most(len + 1) >= most, "{kv} {len}");
                // Rows that come together see nothing sealed that they bring along.
                let last = len + empty.n_together(len) - 1;
                assert!(empty.with_sealed(empty.n_due(last)).n_before_tail() <= len.max(WIDE));
            }
            for n_pages in [0, 1, 5, 20, 100] {
                let n = empty.capacity(n_pages);
                assert!(empty.n_pages_at_most(n) <= n_pages || n == 0, "{kv} {n_pages}");
                assert!(empty.n_pages_at_most(n + 1) > n_pages, "{kv} {n_pages}");
            }
        }
        let dense = layout("int8", 64, 64);
        assert_eq!(dense.capacity(3), dense.n_slots(3));
    }

    /// Runs are what `place` says of each slot, and as long as pages allow.
    #[test]
    fn runs_are_slots_side_by_side() {
        for (kv, n_sealed) in [("bf16", 0), ("int8", 0), ("int2", 0), ("int2", 1), ("int2", 3)] {
            let layout = layout(kv, 16, 64).with_sealed(n_sealed);
            for (start, end) in (0..70).flat_map(|a| [a, a + 1, a + 15, 70].map(|b| (a, b))) {
                let runs: Vec<Run> = layout.runs(start..end).collect();
                let places = runs
                    .iter()
                    .flat_map(|run| (0..run.slots.len()).map(|i| (run.page_idx, run.first + i)));
                assert!(
                    places.eq((start..end).map(|slot| layout.place(slot))),
                    "{kv} {start}..{end}"
                );
                assert!(runs.iter().all(|run| run.part == layout.part(run.page_idx)));
                let slots = runs.iter().flat_map(|run| run.slots.clone());
                assert!(slots.eq(start..end), "{kv} {start}..{end}");
                assert!(runs.windows(2).all(|two| two[0].page_idx < two[1].page_idx), "{kv}");
            }
        }
    }

    /// What saved state and kernels number is told apart.
    #[test]
    fn tables_are_sound() {
        for (idx, row) in FORMATS.iter().enumerate() {
            let others = &FORMATS[..idx];
            assert!(others.iter().all(|other| other.id != row.id && other.name != row.name));
            for held in [row.k, row.v] {
                let is_known = held.coding == Coding::F32 || CODINGS.contains(&held.coding);
                assert!(is_known, "{} is not in CODINGS", row.name);
            }
            assert!(!row.v.coding.is_by_channel(), "{}: only keys are coded by channel", row.name);
            assert_eq!(row.name.parse(), Ok(KvFormats::from(KvFormat::ALL[idx])));
        }
        let ids: Vec<u8> = FORMATS.iter().map(|row| row.id).take(8).collect();
        assert_eq!(ids, [0, 1, 2, 3, 4, 5, 6, 7], "saved state");
        for (k, v) in PAIRS {
            assert!(CODINGS.contains(&k) && CODINGS.contains(&v));
        }
    }
}
