//! What was changed of a sequence since a call began, and where to go back to.
//!
//! A pass changes the sequence in place. What grows is cut back to a mark; what was replaced or taken out is in the log, and is
//! put back from there, the last first. A call's mark is older than those of its passes, so one log serves both.

use super::pending::Drawn;
use super::segment::Ends;
use crate::pool::AuxRow;
use crate::receipt::Receipt;
use crate::store::PageId;

/// Changes since the call began; nothing between calls.
#[derive(Debug, Default)]
pub(crate) struct Journal {
    pub(crate) log: Vec<Delta>,
    pub(crate) call: Option<Mark>,
}

/// A point to go back to.
#[derive(Debug)]
pub(crate) struct Mark {
    /// The length of the log.
    pub(crate) at: usize,
    /// Of each segment.
    pub(crate) ends: Vec<Ends>,
    pub(crate) n_tokens: usize,
    pub(crate) notes: Notes,
}

/// What is noted of a sequence besides what it holds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Notes {
    pub(crate) receipt: Receipt,
    pub(crate) answer_start: usize,
    pub(crate) n_shareable: usize,
    pub(crate) logits_ready: bool, // logits change only where nothing can fail any more
    pub(crate) drawn: Option<Drawn>,
}

/// What was replaced or taken out. Pages in it are still held.
#[derive(Debug)]
pub(crate) enum Delta {
    /// A copy took the place of the segment's last column, which others hold too.
    Swapped { segment: usize, column: Vec<PageId> },
    /// Columns at the front of the segment's tail are sealed.
    Sealed { segment: usize, columns: Vec<PageId> },
    /// The column behind the first of the first segment left, and its slots.
    Rolled { positions: Vec<u32>, column: Vec<PageId> },
    /// A token's hidden state was in this row, and the token was so deep.
    Moved { position: u32, row: AuxRow, depth: u8 },
    /// The attention that slots had got.
    Measured { sums: Vec<Vec<f32>> },
}

impl Journal {
    /// KV pages that nothing but the log holds.
    pub(crate) fn n_pages(&self) -> usize {
        let of = |delta: &Delta| match delta {
            Delta::Swapped { column, .. } | Delta::Rolled { column, .. } => column.len(),
            Delta::Sealed { columns, .. } => columns.len(),
            Delta::Moved { .. } | Delta::Measured { .. } => 0,
        };
        self.log.iter().map(of).sum()
    }

    /// Slots of a segment, and slots gone from it, when the call began; no call: none.
    pub(crate) fn ends(&self, segment: usize) -> Ends {
        self.call.as_ref().map_or_else(Ends::default, |call| call.ends[segment])
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use crate::backend::Phase;
    use crate::compute::{Lazy, PrunePoint};
    use crate::pool::{AuxPool, Pool};
    use crate::recipe::{Facts, SessionOptions, StreamOptions};
    use crate::sequence::{Pending, Segment, Sequence, Stage};
    use crate::store::{KvFormat, PageLayout};

    /// All that is to be what it was, apart from pages, and those with their holders.
    fn digest(seq: &Sequence, pool: &Pool) -> [String; 2] {
        let slots: Vec<_> =
            seq.segments.iter().map(|s| (s.slots.n_gone(), s.slots.positions())).collect();
        let rows: Vec<_> = seq.waiting.rows().collect();
        let (tokens, depths, notes) = (&seq.tokens, &seq.waiting.depths, seq.mark().notes);
        let pages = seq.segments.iter().flat_map(Segment::pages);
        let pages: Vec<_> = pages.map(|page| (page, pool.pages.is_shared(page))).collect();
        let used = (pool.pages.n_used(), pool.aux.n_used());
        [
            format!("{slots:?} {rows:?} {tokens:?} {depths:?} {notes:?}"),
            format!("{pages:?} {used:?}"),
        ]
    }

    /// Calls of random lengths, whose passes and which themselves are undone at random.
    fn run(options: &SessionOptions, kv: KvFormat) {
        let layout = PageLayout::new(1, 16, 64, kv);
        let facts = Facts {
            layout,
            n_pages: 160,
            n_aux_pages: 20,
            n_layers: 4,
            chunk: 16,
            ctx_len: 4096,
            least_window: None,
            is_dynamic: false,
            keeps_prefixes: false,
        };
        let aux = AuxPool::new(20, facts.n_aux_pages, layout.page_len).unwrap();
        let mut pool = Pool::new(facts.n_pages, aux).unwrap();
        let mut seq = Sequence::new(options.check(&facts).unwrap().0, facts.n_layers, &layout);
        let mut state = 1u64;
        let mut random = move |n: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 33) % n
        };
        let mut n_undone = [0; 2];
        for _ in 0..400 {
            let mut fork = (random(3) == 0).then(|| seq.fork(&mut pool).unwrap());
            let before_call = digest(&seq, &pool);
            let (pending, phase) = match random(2) {
                0 => (Pending::Token(7), Phase::Decode),
                _ => {
                    let tokens = (0..=random(60)).map(|token| token as u32).collect();
                    (Pending::Prompt { tokens, done: 0 }, Phase::Prefill)
                }
            };
            seq.begin(pending);
            let is_done = loop {
                seq.roll(seq.len(), &layout, &mut pool);
                let work = seq.work(phase, facts.chunk, &layout).unwrap();
                let (mark, before) = (seq.mark(), digest(&seq, &pool));
                let places = seq.take(work.segment, &work.positions, &layout, &mut pool);
                let places = places.ok().filter(|_| random(4) > 0);
                let Some(places) = places else {
                    seq.undo(&mark, &layout, &mut pool);
                    assert_eq!(digest(&seq, &pool), before, "a pass");
                    n_undone[0] += 1;
                    if random(2) == 0 { break false } else { continue }
                };
                seq.pass_done(&places, &mark, &layout, &mut pool);
                match work.segment {
                    0 => seq.take_in(phase, &work.tokens),
                    _ => seq.stage.done += work.tokens.len(),
                }
                if work.is_last {
                    break true;
                }
                if work.ends_stage {
                    let n_slots = seq.segments[work.segment].len();
                    let mass: Vec<f32> = (0..n_slots).map(|_| random(1000) as f32).collect();
                    seq.choose(Some(&mass));
                }
            };
            if !is_done {
                seq.roll_back(&layout, &mut pool);
                let after = digest(&seq, &pool);
                assert_eq!(after[0], before_call[0], "a call");
                // Behind a fork it may keep its own copy of a page.
                assert!(after[1] == before_call[1] || fork.is_some(), "pages of a call");
                n_undone[1] += 1;
            }
            (seq.pending, seq.stage) = (Pending::Nothing, Stage::default());
            seq.settle(&layout, &mut pool);
            fork.iter_mut().for_each(|fork| fork.release(&mut pool));
            if pool.pages.n_free() < 40 || seq.waiting.len() > 200 {
                seq.cut(0, &layout, &mut pool);
            }
        }
        assert!(n_undone.iter().all(|&n| n > 30), "{n_undone:?}");
        seq.release(&mut pool);
        assert_eq!((pool.pages.n_used(), pool.aux.n_used()), (0, 0));
    }

    #[test]
    fn undone_all_is_what_it_was() {
        let points = [1, 2].map(|layer| PrunePoint { layer, keep_rate: 0.5 });
        let lazy = Some(Lazy { min_len: 0, ..Lazy::new(points.into()) });
        let lazy = SessionOptions { lazy, ..SessionOptions::default() };
        let stream = Some(StreamOptions { sink: 4, window: 40 });
        let stream = SessionOptions { stream, ..SessionOptions::default() };
        for kv in [KvFormat::BF16, KvFormat::INT8, KvFormat::INT2] {
            run(&SessionOptions::default(), kv);
            run(&lazy, kv);
            if !kv.row().k.coding.is_by_channel() {
                run(&stream, kv);
            }
        }
    }
}
