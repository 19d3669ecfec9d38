//! Saving and restoring a session.
//!
//! A blob ([`blob`]) is parsed as untrusted: every field is checked against the opened model before memory is taken,
//! and a session exists only if all of it was sound. The checksum finds damage, not malice: a forged cache gives
//! wrong text, never a wrong access.
//!
//! What a blob says holds for its own session alone. Nothing can tell whether its KV is what its tokens lead to, so
//! neither restored pages nor those computed behind them are offered to other sessions (`n_shareable` stays 0).

mod blob;
mod contents;
mod old;

use std::fs::File;
use std::io::{self, BufRead, BufReader, BufWriter, Read, Write};
use std::path::Path;

use xxhash_rust::xxh3::Xxh3;

use self::blob::{
    Blob, Counts, Head, Header, Summed, VERSION, at_most, expected_header, io_error, mismatch,
};
use self::contents::runs;
use crate::compute::Lazy;
use crate::engine::Model;
use crate::error::Error;
use crate::file::NewFile;
use crate::keep::Evict;
use crate::memory;
use crate::recipe::{Recipe, SessionOptions, StreamOptions};
use crate::sequence::{EMPTY, Pending, Saved, Segment};
use crate::session::Session;

/// A part of a blob.
struct Section {
    name: &'static str,
    /// Its length; `None`: the session has no such part.
    n_bytes: fn(&Session) -> Option<usize>,
    write: fn(&Session, &mut Out<'_>) -> Result<(), Error>,
}

type Out<'a> = Summed<&'a mut dyn Write>;

/// All of them, in their order; see [`blob`].
const SECTIONS: [Section; 9] = [
    Section {
        name: "recipe",
        n_bytes: |s| Some(s.recipe_text().len()),
        write: |s, out| out.write(s.recipe_text().as_bytes()),
    },
    Section {
        name: "counts",
        n_bytes: |s| Some(size_of::<Counts>() + s.n_sealed().count() * size_of::<u64>()),
        write: |s, out| {
            out.write(bytemuck::bytes_of(&s.counts()))?;
            s.n_sealed().try_for_each(|n| out.write(&n.to_le_bytes()))
        },
    },
    Section {
        name: "mass",
        n_bytes: |s| match s.seq.measured.sums() {
            [] => None,
            sums => Some(sums.iter().map(Vec::len).sum::<usize>() * size_of::<f32>()),
        },
        write: |s, out| {
            let mut sums = s.seq.measured.sums().iter();
            sums.try_for_each(|sums| out.write(bytemuck::cast_slice(sums)))
        },
    },
    Section {
        name: "tokens",
        n_bytes: |s| Some(s.seq.tokens.len() * size_of::<u32>()),
        write: |s, out| out.write(bytemuck::cast_slice(&s.seq.tokens)),
    },
    Section {
        name: "logits",
        n_bytes: |s| s.seq.logits_ready.then_some(s.logits.len() * size_of::<f32>()),
        write: |s, out| out.write(bytemuck::cast_slice(&s.logits)),
    },
    Section {
        name: "depths",
        n_bytes: |s| s.seq.recipe.lazy.as_ref().map(|_| s.len()),
        write: |s, out| out.write(&s.seq.waiting.depths),
    },
    Section {
        name: "slots",
        n_bytes: |s| match s.segments_with_slots() {
            [] => None,
            segments => {
                let of = |s: &Segment| size_of::<u64>() + s.len() * size_of::<u32>();
                Some(segments.iter().map(of).sum())
            }
        },
        write: |s, out| {
            s.segments_with_slots().iter().try_for_each(|segment| {
                out.write(&(segment.len() as u64).to_le_bytes())?;
                out.write(bytemuck::cast_slice(segment.slots.positions()))
            })
        },
    },
    Section {
        name: "pages",
        n_bytes: |s| {
            let layout = s.model.plan().layout;
            let of = |s: &Segment| {
                s.n_layers * runs(s.layout(&layout), s.len()).map(|run| run.len()).sum::<usize>()
            };
            Some(s.seq.segments.iter().map(of).sum())
        },
        write: |s, out| s.seq.segments.iter().try_for_each(|segment| s.write_pages(out, segment)),
    },
    Section {
        name: "waiting",
        n_bytes: |s| {
            let is_there = s.seq.recipe.lazy.is_some();
            is_there.then(|| s.seq.waiting.len() * s.model.hidden_bytes())
        },
        write: Session::write_waiting,
    },
];

/// Bytes of a recipe's text at most: sixteen points and some options.
const MAX_RECIPE: u64 = 4_096;

impl Session {
    /// Writes the session so that [`Model::restore`] can continue it, also in another process.
    pub fn save(&self, out: &mut dyn Write) -> Result<(), Error> {
        self.check_savable()?;
        self.seq.room_for_lists(self.model.plan(), 0)?;
        let mut out = Summed { inner: out, sum: Xxh3::new() };
        self.write(&mut out).and_then(|()| {
            let sum = out.sum.digest();
            out.inner.write_all(&sum.to_le_bytes()).map_err(io_error)
        })
    }

    fn check_savable(&self) -> Result<(), Error> {
        let refuse = |reason: &str| Err(Error::State { call: "save", reason: reason.into() });
        if self.seq.pending != Pending::Nothing {
            return refuse("tokens are queued; step or clear them first");
        }
        Ok(())
    }

    /// Bytes that [`save`](Self::save) writes now.
    pub fn saved_bytes(&self) -> Result<usize, Error> {
        self.check_savable()?;
        let of = |n_bytes: usize| size_of::<Head>() + n_bytes;
        let sections = SECTIONS.iter().filter_map(|section| (section.n_bytes)(self)).map(of);
        Ok(size_of::<Header>() + sections.sum::<usize>() + of(size_of::<u64>()))
    }

    /// A line for each choice, as [`recipe_of`] reads them.
    fn recipe_text(&self) -> String {
        let recipe = &self.seq.recipe;
        let mut text = String::new();
        if let Some(lazy) = &recipe.lazy {
            text += &format!("lazy {lazy}\n");
        }
        if recipe.rule.rolls() {
            text += &format!("stream {}+{}\n", recipe.rule.sinks, recipe.rule.window);
        }
        if let Some(evict) = recipe.evict {
            text += &format!("evict {evict}\n");
        }
        text
    }

    fn counts(&self) -> Counts {
        let layout = self.model.plan().layout;
        let is_by_page = layout.kv.are_sealed() || self.seq.recipe.rule.rolls();
        Counts {
            page_len: if is_by_page { layout.page_len as u64 } else { 0 },
            n_gone: self.n_gone() as u64,
            since: self.seq.measured.since as u64,
            n_slots: self.seq.recipe.evict.map_or(0, |_| self.seq.segments[0].len() as u64),
            n_answer: self.answer().len() as u64,
        }
    }

    /// How many pages of each segment are sealed, where there are such.
    fn n_sealed(&self) -> impl Iterator<Item = u64> {
        let layout = self.model.plan().layout;
        let segments: &[Segment] = if layout.kv.are_sealed() { &self.seq.segments } else { &[] };
        segments.iter().map(move |segment| segment.n_sealed(&layout) as u64)
    }

    /// Segments whose slots do not follow from the number of tokens.
    fn segments_with_slots(&self) -> &[Segment] {
        let first = usize::from(!self.model.plan().layout.kv.are_sealed());
        &self.seq.segments[first..]
    }

    /// Saves to a [`NewFile`]: after an error, a crash or beside other writers, the path leads to the old file or to a whole
    /// new one, which only its owner may read.
    pub fn save_file(&self, path: &Path) -> Result<(), Error> {
        let io = |source: io::Error| Error::Io { path: path.display().to_string(), source };
        let mut out = BufWriter::new(NewFile::create(path).map_err(io)?);
        self.save(&mut out).map_err(|e| match e {
            Error::Io { source, .. } => io(source),
            e => e,
        })?;
        let file = out.into_inner().map_err(|e| io(e.into_error()))?;
        file.commit().map(drop).map_err(io)
    }

    fn write(&self, out: &mut Out<'_>) -> Result<(), Error> {
        let n_tokens = self.seq.tokens.len() as u64;
        out.write(bytemuck::bytes_of(&Header { n_tokens, ..expected_header(&self.model) }))?;
        for Section { name, n_bytes, write } in &SECTIONS {
            if let Some(n_bytes) = n_bytes(self) {
                out.write(bytemuck::bytes_of(&Head::new(name, n_bytes)))?;
                write(self, out)?;
            }
        }
        out.write(bytemuck::bytes_of(&Head::new("end", size_of::<u64>())))
    }
}

impl Model {
    /// Opens a session from what [`Session::save`] wrote for the same weights, config, tokenizer and KV format.
    ///
    /// It prunes, streams or evicts as the saved one did. What `options` say of that must be the same; without, it is
    /// taken from the blob. A stream takes a page length as that of the model that saved it.
    pub fn restore(&self, from: &mut dyn Read, options: &SessionOptions) -> Result<Session, Error> {
        let mut blob = Blob::new(from);
        let header = self.read_header(&mut blob, options.trust_old_state)?;
        let is_old = header.is_old();
        let (saved, mut counts) = match is_old {
            true => old::recipe(&mut blob, &header)?,
            false => (self.read_recipe(&mut blob)?, Counts::default()),
        };
        agree("schedule", &saved.lazy, &options.lazy)?;
        agree("stream", &saved.stream, &options.stream)?;
        agree("eviction", &saved.evict, &options.evict)?;
        if let Some(lazy) = &saved.lazy {
            lazy.check(self.plan().n_layers).map_err(|e| unsound("schedule", &e))?;
        }
        let (stream, evict) = (saved.stream, saved.evict);
        // A stream has no end, whatever the others are opened with.
        let ctx_len = options.ctx_len.filter(|_| stream.is_none());
        let (recipe, ctx_len) = SessionOptions { ctx_len, ..saved }
            .check(&self.plan().facts(self.config()))
            .map_err(|e| match (stream, evict) {
                (None, None) => e,
                _ => unsound("policy", &e),
            })?;
        let mut session = Session::new(self.clone(), recipe, ctx_len)?;
        let n_tokens = at_most(
            "tokens (the session's context length)",
            header.n_tokens,
            session.ctx_len as u64,
        )?;
        let mut n_sealed = Vec::new();
        if !is_old {
            (counts, n_sealed) = self.read_counts(&mut blob, session.seq.segments.len())?;
        }
        let positions = self.positions(&counts, &mut session, n_tokens)?;
        self.read_mass(&mut blob, &mut session, positions.n_slots)?;
        if is_old {
            n_sealed = old::counts(&mut blob, &header, session.seq.segments.len(), &mut counts)?;
        }
        let by_page = stream.is_some() || self.plan().layout.kv.are_sealed();
        let page_len = if by_page { self.plan().layout.page_len as u64 } else { 0 };
        if counts.page_len != page_len {
            let found = counts.page_len.to_string();
            return Err(mismatch(
                "page length of a stream or of sealed pages",
                found,
                page_len.to_string(),
            ));
        }
        let n_answer = at_most("tokens of the answer", counts.n_answer, n_tokens as u64)?;

        let mut slots: Vec<Saved> = session.seq.segments.iter().map(|_| Saved::default()).collect();
        for (slots, n_sealed) in slots.iter_mut().zip(n_sealed) {
            slots.n_sealed = at_most("sealed pages", n_sealed, self.plan().n_pages as u64)?;
        }
        // Before memory is taken for as many tokens as a header may claim.
        self.check_room(session.seq.segments[0].n_layers, slots[0].n_sealed, positions.n_slots)?;
        session.seq.room_for_lists(self.plan(), n_tokens)?;
        let mut tokens = memory::zeros::<u32>(n_tokens, "the saved tokens")?;
        blob.begin("tokens")?;
        blob.read(bytemuck::cast_slice_mut(&mut tokens), "tokens")?;
        let vocab_size = self.config().vocab_size;
        if let Some(&id) = tokens.iter().find(|&&id| id as usize >= vocab_size) {
            return Err(mismatch("tokens", format!("id {id}"), format!("ids below {vocab_size}")));
        }
        let has_logits = match is_old {
            true => header.flags & old::HAS_LOGITS != 0,
            false => blob.begins("logits")?.is_some(),
        };
        if has_logits && n_tokens == 0 {
            return Err(mismatch("tokens", "0".into(), "1 or more, as there are logits".into()));
        }
        if has_logits {
            blob.read(bytemuck::cast_slice_mut(&mut session.logits), "logits")?;
            if session.logits.iter().any(|l| !l.is_finite()) {
                let expected = "finite values".into();
                return Err(mismatch("logits", "a non-finite value".into(), expected));
            }
        }
        self.read_layers(&mut blob, &mut session, tokens, &positions, slots)?;
        blob.begin("pages")?;
        for segment in &session.seq.segments {
            self.read_pages(&mut blob, segment)?;
        }
        if session.seq.recipe.lazy.is_some() {
            blob.begin("waiting")?;
            self.read_waiting(&mut blob, &session)?;
        }
        blob.end()?;
        session.seq.logits_ready = has_logits;
        session.seq.set_answer(n_answer);
        Ok(session)
    }

    /// As [`restore`](Self::restore), from a file.
    pub fn restore_file(&self, path: &Path, options: &SessionOptions) -> Result<Session, Error> {
        let io = |source: io::Error| Error::Io { path: path.display().to_string(), source };
        let mut file = BufReader::new(File::open(path).map_err(io)?);
        let session = self.restore(&mut file, options)?;
        match file.fill_buf().map_err(io)?.len() {
            0 => Ok(session),
            n => Err(mismatch("end", format!("{n} bytes or more"), "nothing".into())),
        }
    }

    fn read_header(&self, blob: &mut Blob<'_>, trusts_old: bool) -> Result<Header, Error> {
        let header: Header = blob.pod("header")?;
        let want = expected_header(self);
        let check = |field, found: u64, expected: u64| match found == expected {
            true => Ok(()),
            false => Err(mismatch(field, found.to_string(), expected.to_string())),
        };
        check("magic", u64::from_le_bytes(header.magic), u64::from_le_bytes(want.magic))?;
        let says_config = header.version >= 4;
        if !(1..VERSION).contains(&header.version) {
            check("version", header.version.into(), want.version.into())?;
        } else if !says_config && !trusts_old {
            let expected = format!(
                "4 to {VERSION}, as older files do not say with which config and tokenizer they were made; if it is this model's, restore it with trust_old_state (C: LORIS_TRUST_OLD_STATE, loris run: --trust-old-state)"
            );
            return Err(mismatch("version", header.version.to_string(), expected));
        }
        check(
            "KV format (0 = bf16, 1 = f32, 2 = fp8, ...)",
            header.kv_format.into(),
            want.kv_format.into(),
        )?;
        check("fingerprint of the weights", header.weights, want.weights)?;
        if says_config {
            let (found, expected) = (header.config, want.config);
            check("fingerprint of the model's config", found.into(), expected.into())?;
            let (found, expected) = (header.tokenizer, want.tokenizer);
            // Without a tokenizer ids mean what the embedder says.
            if header.n_tokens > 0 && found != 0 && expected != 0 {
                check("fingerprint of the tokenizer's ids", found.into(), expected.into())?;
            }
        } else {
            at_most("shareable tokens", header.n_shareable(), header.n_tokens)?;
        }
        check("layers", header.n_layers.into(), want.n_layers.into())?;
        check("kv heads", header.n_kv_heads.into(), want.n_kv_heads.into())?;
        check("head width", header.head_dim.into(), want.head_dim.into())?;
        check("vocabulary", header.vocab_size.into(), want.vocab_size.into())?;
        if header.is_old() {
            old::check(&header, self.plan().layout.kv.are_sealed())?;
        } else {
            check("flags", header.flags.into(), 0)?;
            check("prune points", header.n_points.into(), 0)?;
            blob.has_sections();
        }
        Ok(header)
    }

    /// What the session was opened with.
    fn read_recipe(&self, blob: &mut Blob<'_>) -> Result<SessionOptions, Error> {
        let n_bytes = at_most("bytes of the recipe", blob.begin("recipe")?, MAX_RECIPE)?;
        let mut text = vec![0; n_bytes];
        blob.read(&mut text, "recipe")?;
        let mut options = SessionOptions::default();
        for line in String::from_utf8_lossy(&text).lines() {
            let refuse = || {
                let expected = "lazy, stream or evict, and what the option takes".into();
                mismatch("recipe", line.to_owned(), expected)
            };
            let (choice, spec) = line.split_once(' ').ok_or_else(refuse)?;
            let count = |text: &str| text.parse().map_err(|_| refuse());
            match choice {
                "lazy" => {
                    let lazy = Lazy::parse(spec, self.plan().n_layers);
                    options.lazy = Some(lazy.map_err(|e| unsound("schedule", &e))?);
                }
                "stream" => {
                    let (sink, window) = spec.split_once('+').ok_or_else(refuse)?;
                    let (sink, window) = (count(sink)?, count(window)?);
                    options.stream = Some(StreamOptions { sink, window });
                }
                "evict" => {
                    let evict = Evict::parse(spec).map_err(|e| unsound("eviction policy", &e))?;
                    options.evict = Some(evict);
                }
                _ => return Err(refuse()),
            }
        }
        Ok(options)
    }

    fn read_counts(
        &self,
        blob: &mut Blob<'_>,
        n_segments: usize,
    ) -> Result<(Counts, Vec<u64>), Error> {
        blob.begin("counts")?;
        let counts = blob.pod("counts")?;
        let n_segments = if self.plan().layout.kv.are_sealed() { n_segments } else { 0 };
        let n_sealed =
            (0..n_segments).map(|_| blob.pod("sealed pages")).collect::<Result<_, _>>()?;
        Ok((counts, n_sealed))
    }

    /// Which positions the slots of the first segment have, where they are not written.
    fn positions(
        &self,
        counts: &Counts,
        session: &mut Session,
        n_tokens: usize,
    ) -> Result<Positions, Error> {
        let Recipe { rule, evict, .. } = session.seq.recipe;
        let layout = &self.plan().layout;
        let first = layout.n_slots(1);
        // The last token may be computed once more.
        let len = counts.n_gone.saturating_add(n_tokens as u64);
        let seen = u32::try_from(len.saturating_sub(1)).map_or(0, |last| rule.first_seen(last));
        let most = u64::from(seen).saturating_sub(first as u64);
        let left_behind = "tokens that a stream has left behind";
        let n_gone = at_most(left_behind, counts.n_gone, most)?;
        if !n_gone.is_multiple_of(layout.page_len) || (n_gone > 0 && n_tokens < first) {
            let expected = "whole pages behind the first".into();
            return Err(mismatch(left_behind, n_gone.to_string(), expected));
        }
        let since = at_most("tokens at the last eviction", counts.since, n_tokens as u64)?;
        let (n_slots, n_new) = match evict {
            Some(_) => {
                (at_most("slots of a layer", counts.n_slots, n_tokens as u64)?, n_tokens - since)
            }
            None => (n_tokens, n_tokens),
        };
        if n_slots < n_new || (since > 0) != (n_slots > n_new) {
            let expected = format!("{n_new} and those that were kept, if any were");
            return Err(mismatch("slots of a layer", n_slots.to_string(), expected));
        }
        session.seq.set_gone(n_gone);
        session.seq.measured.since = since;
        Ok(match evict {
            Some(_) => Positions { first: n_slots - n_new, then: since, n_slots },
            None => Positions { first: first.min(n_tokens), then: first + n_gone, n_slots },
        })
    }

    /// The attention that slots have got, where the policy goes by all of it.
    fn read_mass(
        &self,
        blob: &mut Blob<'_>,
        session: &mut Session,
        n_slots: usize,
    ) -> Result<(), Error> {
        let n_layers = session.seq.segments[0].n_layers;
        let sums = session.seq.measured.sums_mut();
        if sums.is_empty() {
            return Ok(());
        }
        self.check_room(n_layers, 0, n_slots)?;
        blob.begin("mass")?;
        for sums in sums {
            *sums = memory::zeros(n_slots, "the attention of slots")?;
            blob.read(bytemuck::cast_slice_mut(sums), "the attention of slots")?;
            if let Some(sum) = sums.iter().find(|sum| !(**sum >= 0.0 && sum.is_finite())) {
                let expected = "0 or more".into();
                return Err(mismatch("the attention of a slot", sum.to_string(), expected));
            }
        }
        Ok(())
    }

    /// Refuses sealed pages that are not full, and fewer than are due.
    fn check_sealed(&self, n_sealed: usize, n_slots: usize) -> Result<(), Error> {
        let layout = self.plan().layout.with_sealed(n_sealed);
        let n_due = n_slots.checked_sub(1).map_or(0, |last| layout.n_due(last));
        let are_full = n_sealed == 0 || layout.n_before_tail() <= n_slots;
        match are_full && n_sealed >= n_due {
            true => Ok(()),
            false => {
                let expected = format!("{n_due} or more that {n_slots} slots fill");
                Err(mismatch("sealed pages", n_sealed.to_string(), expected))
            }
        }
    }

    /// Refuses more slots of a segment than the page pool has room for, free or not.
    fn check_room(&self, n_layers: usize, n_sealed: usize, n_slots: usize) -> Result<(), Error> {
        let plan = self.plan();
        let layout = plan.layout.with_sealed(n_sealed);
        let needed = layout.n_pages(n_slots).saturating_mul(n_layers);
        match needed <= plan.n_pages {
            true => Ok(()),
            false => Err(Error::KvFull { needed, free: self.shared.pool().pages.n_free() }),
        }
    }

    /// Which token is where, and the pages and rows for that.
    fn read_layers(
        &self,
        blob: &mut Blob<'_>,
        session: &mut Session,
        tokens: Vec<u32>,
        positions: &Positions,
        mut slots: Vec<Saved>,
    ) -> Result<(), Error> {
        let mut depth = Vec::new();
        if session.seq.recipe.lazy.is_some() {
            depth = memory::zeros::<u8>(tokens.len(), "the saved tokens")?;
            blob.begin("depths")?;
            blob.read(&mut depth, "depths")?;
        }
        let n_segments = session.seq.segments.len();
        let is_depth = |&depth: &u8| (1..=n_segments).contains(&depth.into());
        if let Some(found) = depth.iter().find(|depth| !is_depth(depth)) {
            return Err(mismatch("depths", found.to_string(), format!("1 to {n_segments}")));
        }
        let are_sealed = self.plan().layout.kv.are_sealed();
        let n_known = usize::from(!are_sealed); // segments whose slots are not written
        if n_known > 0 {
            slots[0].positions = positions.all();
        }
        let all = vec![1; if session.seq.recipe.lazy.is_some() { 0 } else { tokens.len() }];
        let of_tokens = if session.seq.recipe.lazy.is_some() { &depth } else { &all };
        if n_known < n_segments {
            blob.begin("slots")?;
        }
        let of_segments = session.seq.segments.iter().zip(&mut slots);
        for (idx, (segment, slots)) in of_segments.enumerate().skip(n_known) {
            let n_slots: u64 = blob.pod("slots")?;
            let n_slots = usize::try_from(n_slots).unwrap_or(usize::MAX);
            self.check_room(segment.n_layers, slots.n_sealed, n_slots)?;
            let mut positions = memory::zeros::<u32>(n_slots, "the positions of slots")?;
            blob.read(bytemuck::cast_slice_mut(&mut positions), "positions")?;
            let n_coded = self.plan().layout.with_sealed(slots.n_sealed).n_before_tail();
            if are_sealed {
                self.check_sealed(slots.n_sealed, n_slots)?;
            }
            check_slots(idx, &positions, of_tokens, are_sealed.then_some(n_coded))?;
            slots.positions = positions;
        }
        let mut pool = self.shared.pool();
        session.seq.restore(tokens, depth, &slots, &self.plan().layout, &mut pool)
    }
}

/// The positions of the slots of the first segment: 0, 1, ... of the first ones, then from another number on.
struct Positions {
    first: usize,
    then: usize,
    n_slots: usize,
}

impl Positions {
    #[allow(clippy::cast_possible_truncation)] // bounded by the context length, and that of a stream by 32 bits
    fn all(&self) -> Vec<u32> {
        let behind = self.then..self.then + self.n_slots - self.first;
        (0..self.first).chain(behind).map(|position| position as u32).collect()
    }
}

/// Fails where a caller asks for something else than was saved.
fn agree<T: PartialEq + std::fmt::Debug>(
    field: &'static str,
    saved: &Option<T>,
    asked: &Option<T>,
) -> Result<(), Error> {
    let show = |policy: &Option<T>| policy.as_ref().map_or("none".into(), |p| format!("{p:?}"));
    match asked.is_some() && asked != saved {
        true => Err(mismatch(field, show(saved), show(asked))),
        false => Ok(()),
    }
}

fn unsound(field: &'static str, e: &Error) -> Error {
    mismatch(field, e.to_string(), "one that the model can follow".into())
}

/// The slots of segment `idx` must hold each token that has gone through it once, and no other; slots that
/// are empty may be among them, but not at the end, unless that is the one of the `n_coded` slots of sealed pages.
fn check_slots(
    idx: usize,
    positions: &[u32],
    depth: &[u8],
    n_coded: Option<usize>,
) -> Result<(), Error> {
    let mut is_missing: Vec<bool> = depth.iter().map(|&depth| usize::from(depth) > idx).collect();
    let unsound = |position: &u32| match is_missing.get_mut(*position as usize) {
        Some(is_missing) => !std::mem::take(is_missing),
        None => *position != EMPTY,
    };
    if let Some(position) = positions.iter().copied().find(unsound) {
        let expected = "each token that has gone through the segment, once".into();
        return Err(mismatch("positions", position.to_string(), expected));
    }
    if let Some(position) = is_missing.iter().position(|&is_missing| is_missing) {
        return Err(mismatch("positions", "no slot".into(), format!("a slot of {position}")));
    }
    match positions.last() {
        Some(&EMPTY) if n_coded != Some(positions.len()) => {
            let found = "a slot without a token at the end".into();
            Err(mismatch("positions", found, "a token".into()))
        }
        _ => Ok(()),
    }
}
