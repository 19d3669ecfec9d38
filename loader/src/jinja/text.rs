//! Text that knows which of its bytes came from outside.
//!
//! Every string of a rendering is a [`Str`]: what the template wrote is its own, what came in with the chat is foreign. A
//! part of a text keeps its marks and so does what is built of texts ([`Builder`]), through every filter and method. So
//! of the rendered prompt it is known byte by byte who wrote it.

use std::cell::Cell;
use std::ops::Range;
use std::rc::Rc;

use super::fault::Fault;

/// What a rendering may still use. Work is counted in steps, memory in bytes that were ever asked for.
pub(crate) struct Meter {
    steps: Cell<u64>,
    bytes: Cell<u64>,
}

impl Meter {
    pub(crate) fn new(steps: u64, bytes: u64) -> Meter {
        Meter { steps: Cell::new(steps), bytes: Cell::new(bytes) }
    }

    /// Charges work.
    pub(crate) fn work(&self, steps: usize) -> Result<(), Fault> {
        let left = self.steps.get().checked_sub(steps as u64);
        self.steps.set(left.ok_or(Fault::Budget("instructions"))?);
        Ok(())
    }

    /// Charges the reading of a text, of which many bytes are one step.
    pub(crate) fn scan(&self, bytes: usize) -> Result<(), Fault> {
        self.work(bytes / 32 + 1)
    }

    /// Charges memory.
    pub(crate) fn take(&self, bytes: usize) -> Result<(), Fault> {
        let left = self.bytes.get().checked_sub(bytes as u64);
        self.bytes.set(left.ok_or(Fault::Budget("bytes copied or written"))?);
        Ok(())
    }
}

/// Which bytes are foreign.
#[derive(Debug)]
enum Foreign {
    Nowhere,
    Everywhere,
    /// Sorted, apart, not empty.
    At(Vec<Range<usize>>),
}

#[derive(Debug)]
struct Shared {
    text: String,
    foreign: Foreign,
}

/// A text, or a part of one; parts share it.
#[derive(Clone, Debug)]
pub(crate) struct Str {
    shared: Rc<Shared>,
    start: usize,
    end: usize,
    /// Whether it is what Jinja calls markup (`|safe`, `|escape`): text that is added to it is escaped.
    markup: bool,
}

impl Str {
    /// A text of the template, or of a number.
    pub(crate) fn own(text: impl Into<String>) -> Str {
        Str::of(text.into(), Foreign::Nowhere)
    }

    /// A text that came from outside.
    pub(crate) fn foreign(text: impl Into<String>) -> Str {
        Str::of(text.into(), Foreign::Everywhere)
    }

    fn of(text: String, foreign: Foreign) -> Str {
        let end = text.len();
        Str { shared: Rc::new(Shared { text, foreign }), start: 0, end, markup: false }
    }

    pub(crate) fn is_markup(&self) -> bool {
        self.markup
    }

    pub(crate) fn with_markup(mut self, markup: bool) -> Str {
        self.markup = markup;
        self
    }

    pub(crate) fn as_str(&self) -> &str {
        self.shared.text.get(self.start..self.end).unwrap_or_default()
    }

    pub(crate) fn len(&self) -> usize {
        self.end - self.start
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// The part between two bytes.
    pub(crate) fn slice(&self, range: Range<usize>) -> Str {
        let at = |byte: usize| self.start + byte.min(self.len());
        let (start, end) = (at(range.start), at(range.end));
        Str { shared: self.shared.clone(), start, end: end.max(start), markup: self.markup }
    }

    /// A part that a method of `str` found in [`as_str`](Self::as_str).
    pub(crate) fn part(&self, part: &str) -> Str {
        let start = (part.as_ptr() as usize).wrapping_sub(self.as_str().as_ptr() as usize);
        self.slice(start..start.saturating_add(part.len()))
    }

    /// The text in runs of one kind, each with whether it is foreign.
    pub(crate) fn runs(&self) -> impl Iterator<Item = (&str, bool)> {
        let text = &self.shared.text;
        let (all, list): (bool, &[Range<usize>]) = match &self.shared.foreign {
            Foreign::Nowhere => (false, &[]),
            Foreign::Everywhere => (true, &[]),
            Foreign::At(list) => (false, list),
        };
        let first = list.partition_point(|range| range.end <= self.start);
        let mut marked = list.get(first..).unwrap_or_default().iter().peekable();
        let (mut at, end) = (self.start, self.end);
        std::iter::from_fn(move || {
            if at >= end {
                return None;
            }
            let (stop, foreign) = match marked.peek() {
                Some(range) if range.start <= at => (range.end.min(end), true),
                Some(range) => (range.start.min(end), false),
                None => (end, all),
            };
            if foreign && stop < end {
                marked.next();
            }
            let run = text.get(at..stop).unwrap_or_default();
            at = stop;
            Some((run, foreign))
        })
    }

    /// The characters, each with whether it is foreign.
    pub(crate) fn marked_chars(&self) -> impl Iterator<Item = (char, bool)> {
        self.runs().flat_map(|(run, foreign)| run.chars().map(move |c| (c, foreign)))
    }
}

/// A text that is being written, within the budget.
pub(crate) struct Builder<'m> {
    meter: &'m Meter,
    text: String,
    foreign: Vec<Range<usize>>,
}

impl<'m> Builder<'m> {
    pub(crate) fn new(meter: &'m Meter) -> Builder<'m> {
        Builder { meter, text: String::new(), foreign: Vec::new() }
    }

    /// Adds a text with its marks.
    pub(crate) fn push(&mut self, text: &Str) -> Result<(), Fault> {
        text.runs().try_for_each(|(run, foreign)| self.put(run, foreign))
    }

    /// Adds what the template wrote.
    pub(crate) fn own(&mut self, text: &str) -> Result<(), Fault> {
        self.put(text, false)
    }

    /// Adds a piece of one kind.
    pub(crate) fn put(&mut self, piece: &str, foreign: bool) -> Result<(), Fault> {
        self.meter.scan(piece.len())?;
        self.meter.take(piece.len())?;
        let start = self.text.len();
        self.text.push_str(piece);
        if foreign && !piece.is_empty() {
            let end = self.text.len();
            match self.foreign.last_mut() {
                Some(last) if last.end == start => last.end = end,
                _ => {
                    self.meter.take(size_of::<Range<usize>>())?;
                    self.foreign.push(start..end);
                }
            }
        }
        Ok(())
    }

    /// Adds a character.
    pub(crate) fn char(&mut self, c: char, foreign: bool) -> Result<(), Fault> {
        self.put(c.encode_utf8(&mut [0; 4]), foreign)
    }

    pub(crate) fn finish(self) -> Str {
        let foreign = match &self.foreign[..] {
            [] => Foreign::Nowhere,
            [all] if *all == (0..self.text.len()) => Foreign::Everywhere,
            _ => Foreign::At(self.foreign),
        };
        Str::of(self.text, foreign)
    }

    /// The text, and where it is foreign.
    pub(crate) fn into_parts(self) -> (String, Vec<Range<usize>>) {
        (self.text, self.foreign)
    }
}

/// What Python takes for white space.
pub(crate) fn is_space(c: char) -> bool {
    c.is_whitespace() || matches!(c, '\u{1c}'..='\u{1f}')
}
