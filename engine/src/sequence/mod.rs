//! A sequence: the tokens of one conversation, and what is held of them.
//!
//! It is a plain value that knows no model, no lock and no device; whoever has the page pool hands it in.
//!
//! A token goes through the segments of the layers in order, each at most once, so one number says all about it: how many it
//! has gone through. Its KV is in those, and its hidden state is kept behind the last of them, unless that was the end: in
//! transit until the next tokens are chosen, and from the pass that follows it waits if it is not among them.

mod grow;
mod journal;
mod measured;
mod pending;
mod room;
mod segment;
mod stage;
mod waiting;

pub(crate) use grow::{Places, Saved};
pub(crate) use journal::Mark;
pub(crate) use measured::Measured;
pub(crate) use pending::{Drawn, Pending, Stage, Turn, Work};
pub(crate) use room::Lists;
pub(crate) use segment::{EMPTY, Segment};
pub(crate) use waiting::Waiting;

use std::ops::Range;

use crate::backend::Draw;
use crate::error::Error;
use crate::memory;
use crate::plan::Plan;
use crate::pool::{Pool, Store};
use crate::receipt::Receipt;
use crate::recipe::Recipe;
use crate::sampler::History;
use crate::store::PageLayout;
use journal::Journal;
use segment::Ends;

/// Tokens, their slots in the page pool, and what is queued.
#[derive(Debug)]
pub(crate) struct Sequence {
    pub(crate) recipe: Recipe,
    /// Its tokens, but for those that a stream has rolled off.
    pub(crate) tokens: Vec<u32>,
    /// Tokens behind those of the first page that a stream has rolled off.
    pub(crate) n_gone: usize,
    /// First to last layer; one segment where nothing is pruned.
    pub(crate) segments: Vec<Segment>,
    /// Tokens that are between two segments.
    pub(crate) waiting: Waiting,
    pub(crate) measured: Measured,
    pub(crate) pending: Pending,
    /// How far what is pending has come through the segments.
    pub(crate) stage: Stage,
    pub(crate) turn: Turn,
    /// The choice that the device is to make after the token that is queued.
    pub(crate) draw: Option<Draw>,
    /// The choice that it made: the logits are still there, and `logits_ready` is false.
    pub(crate) drawn: Option<Drawn>,
    /// Whoever holds the logits has those after the last token.
    pub(crate) logits_ready: bool,
    /// Leading tokens that prefill wrote from the very first on: their full pages can be shared. 0 where a blob is at
    /// the bottom: what is computed behind KV from elsewhere depends on it.
    pub(crate) n_shareable: usize,
    /// The length behind the last prompt, where an answer begins.
    pub(crate) answer_start: usize,
    /// What it has cost; what it holds is counted when it is asked for.
    pub(crate) receipt: Receipt,
    journal: Journal,
}

impl Sequence {
    /// An empty one.
    pub(crate) fn new(recipe: Recipe, n_layers: usize, layout: &PageLayout) -> Self {
        let points = recipe.lazy.iter().flat_map(|lazy| &lazy.points).map(|point| point.layer);
        let bounds: Vec<usize> = [0].into_iter().chain(points).chain([n_layers]).collect();
        let counts_all = recipe.evict.is_some_and(|evict| evict.counts_all());
        Self {
            tokens: Vec::new(),
            n_gone: 0,
            segments: bounds.windows(2).map(|two| Segment::new(two[0]..two[1], layout)).collect(),
            waiting: Waiting::default(),
            measured: Measured::new(if counts_all { n_layers } else { 0 }),
            pending: Pending::Nothing,
            stage: Stage::default(),
            turn: Turn::default(),
            draw: None,
            drawn: None,
            logits_ready: false,
            n_shareable: 0,
            answer_start: 0,
            receipt: Receipt::default(),
            journal: Journal::default(),
            recipe,
        }
    }

    /// Tokens that it has taken in and not cut off since; a stream has rolled some off.
    pub(crate) fn len(&self) -> usize {
        self.tokens.len() + self.n_gone
    }

    /// The tokens that were generated since the last prompt, as far as they are there without a gap.
    pub(crate) fn answer(&self, layout: &PageLayout) -> &[u32] {
        let n = self.len().saturating_sub(self.answer_start);
        let n_held = match self.n_gone {
            0 => self.tokens.len(),
            _ => self.tokens.len() - layout.n_slots(1),
        };
        &self.tokens[self.tokens.len() - n.min(n_held)..]
    }

    /// [`Session::history`](crate::Session::history).
    pub(crate) fn history(&self, layout: &PageLayout) -> History<'_> {
        let all = self.tokens.as_slice();
        let rule = self.recipe.rule;
        let window = rule.window as usize;
        let tokens = match self.len() > rule.capacity() as usize {
            true => [&all[..rule.sinks as usize], &all[all.len() - window..]],
            false => [all, &[]],
        };
        let n = self.answer(layout).len();
        History { tokens, answer: &all[all.len() - n.min(window)..] }
    }

    /// What it has cost, and what it holds.
    pub(crate) fn receipt(&self, plan: &Plan) -> Receipt {
        let n_pages: usize = self.segments.iter().map(Segment::n_pages).sum();
        let n_pages = n_pages + self.journal.n_pages();
        Receipt {
            kv_bytes: n_pages * plan.layout.bytes(),
            aux_bytes: self.waiting.n_pages(Store::Waiting) * plan.aux_page_bytes
                + self.waiting.n_pages(Store::Transit) * plan.transit_page_bytes,
            n_waiting: self.waiting.len(),
            ..self.receipt
        }
    }

    /// [`Session::least_len`](crate::Session::least_len).
    pub(crate) fn least_len(&self, layout: &PageLayout) -> usize {
        let rule = self.recipe.rule;
        let (first, last) = (layout.n_slots(1), self.len().saturating_sub(1));
        let first_seen = u32::try_from(last).map_or(0, |last| rule.first_seen(last)) as usize;
        // Where something is queued: also what will be gone when it is dropped.
        let n_going = first_seen.saturating_sub(first) / layout.page_len * layout.page_len;
        let of_rule = match self.segments[0].slots.n_gone().max(n_going) {
            0 => 0,
            n_gone => first + n_gone + rule.window as usize - 1, // it sees nothing in front of what is there
        };
        self.measured.since.max(of_rule)
    }

    /// The layers that come next.
    pub(crate) fn layers(&self) -> Range<usize> {
        self.segments[self.stage.segment].layers()
    }

    /// An answer of so many tokens, or what is left of it, has begun.
    pub(crate) fn set_answer(&mut self, n_tokens: usize) {
        self.answer_start = self.len() - n_tokens;
    }

    /// An empty stream is about to hold what a saved one held.
    pub(crate) fn set_gone(&mut self, n_gone: usize) {
        self.n_gone = n_gone;
        self.segments[0].slots.edit(0, |_, gone| *gone = n_gone);
    }

    /// Cuts it back to a length that is possible, with nothing queued.
    pub(crate) fn cut(&mut self, len: usize, layout: &PageLayout, pool: &mut Pool) {
        self.cut_back(len, layout, pool);
        self.measured.truncate(self.segments[0].len());
        if len == 0 {
            self.n_gone = 0;
        }
        self.tokens.truncate(len - self.n_gone);
        self.n_shareable = self.n_shareable.min(len);
        self.answer_start = self.answer_start.min(len);
        (self.logits_ready, self.drawn) = (false, None);
    }

    /// Cuts off what is held of the tokens from position `len` on.
    pub(crate) fn cut_back(&mut self, len: usize, layout: &PageLayout, pool: &mut Pool) {
        for segment in &mut self.segments {
            segment.cut_back(len, layout, pool);
        }
        self.waiting.truncate(len, &mut pool.aux);
    }

    /// A second one with the same tokens, between calls. Pages have one more holder, until either is written to.
    pub(crate) fn fork(&self, pool: &mut Pool) -> Result<Self, Error> {
        let tokens = memory::copy(&self.tokens, "a fork's tokens")?;
        let measured = self.measured.copy()?;
        let depths = self.waiting.room_for_fork()?;
        let segments: Result<_, Error> = self.segments.iter().map(Segment::copy).collect();
        let segments: Vec<Segment> = segments?;
        // Nothing fails from here on: who holds the pages gives them back.
        for segment in &segments {
            pool.pages.share(&segment.body);
            pool.pages.share(&segment.tail);
        }
        Ok(Self {
            recipe: self.recipe.clone(),
            tokens,
            segments,
            waiting: self.waiting.fork(depths, &mut pool.aux),
            measured,
            pending: Pending::Nothing,
            stage: Stage::default(),
            turn: Turn::default(),
            draw: None,
            journal: Journal::default(),
            ..*self
        })
    }

    /// Gives everything back.
    pub(crate) fn release(&mut self, pool: &mut Pool) {
        self.drop_journal(pool);
        for segment in &mut self.segments {
            segment.cut(Ends::default(), pool);
        }
        self.waiting.clear(&mut pool.aux);
    }
}
