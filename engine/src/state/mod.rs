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

use std::fs::File;
use std::io::{self, BufRead, BufReader, BufWriter, Read, Write};
use std::path::Path;

use xxhash_rust::xxh3::Xxh3;

use self::blob::{
    EVICTS, Evicted, HAS_ANSWER, HAS_LOGITS, Header, IS_SEALED, IS_STREAM, Point, Schedule, Sealed,
    Streamed, Summed, VERSION, at_most, evicted_of, expected_header, io_error, mismatch, policy_of,
    read, read_pod, read_schedule, schedule_of,
};
use self::contents::runs;
use crate::compute::lazy::MAX_POINTS;
use crate::engine::Model;
use crate::error::Error;
use crate::file::NewFile;
use crate::memory;
use crate::read::Rule;
use crate::recipe::{SessionOptions, StreamOptions};
use crate::sequence::{GIVEN_UP, Pending, Segment, Slots};
use crate::session::Session;

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
        let plan = self.model.plan();
        let logits = if self.seq.logits_ready { self.logits.len() * size_of::<f32>() } else { 0 };
        let kv_bytes = |s: &Segment| {
            s.n_layers * runs(s.layout(&plan.layout), s.len()).map(|run| run.len()).sum::<usize>()
        };
        let kv: usize = self.seq.segments.iter().map(kv_bytes).sum();
        let tokens = self.seq.tokens.len() * size_of::<u32>();
        let pruned = match &self.seq.recipe.lazy {
            None => 0,
            Some(lazy) => {
                size_of::<Schedule>()
                    + lazy.points.len() * size_of::<Point>()
                    + self.len()
                    + self.seq.waiting.len() * self.model.hidden_bytes()
            }
        };
        let slots = |s: &Segment| size_of::<u64>() + s.len() * size_of::<u32>();
        let slots: usize = self.segments_with_slots().iter().map(slots).sum();
        let sealed = match plan.layout.kv.are_sealed() {
            true => size_of::<Sealed>() + self.seq.segments.len() * size_of::<u64>(),
            false => 0,
        };
        let streamed = if self.seq.recipe.rule.rolls() { size_of::<Streamed>() } else { 0 };
        let evicted = self.seq.recipe.evict.map_or(0, |_| {
            let sums = self.seq.measured.sums().iter().map(Vec::len).sum::<usize>();
            size_of::<Evicted>() + sums * size_of::<f32>()
        });
        let policies = pruned + slots + streamed + evicted + sealed;
        let answer = if self.answer().is_empty() { 0 } else { size_of::<u64>() };
        Ok(size_of::<Header>() + answer + tokens + logits + policies + kv + size_of::<u64>())
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

    fn write(&self, out: &mut Summed<&mut dyn Write>) -> Result<(), Error> {
        let header = Header {
            n_tokens: self.seq.tokens.len() as u64,
            flags: [
                (self.seq.logits_ready, HAS_LOGITS),
                (self.seq.recipe.rule.rolls(), IS_STREAM),
                (self.seq.recipe.evict.is_some(), EVICTS),
                (self.model.plan().layout.kv.are_sealed(), IS_SEALED),
                (!self.answer().is_empty(), HAS_ANSWER),
            ]
            .into_iter()
            .fold(0, |flags, (is_set, flag)| if is_set { flags | flag } else { flags }),
            n_points: self.seq.recipe.lazy.as_ref().map_or(0, |lazy| lazy.points.len() as u32),
            ..expected_header(&self.model)
        };
        out.write(bytemuck::bytes_of(&header))?;
        if let Some(lazy) = &self.seq.recipe.lazy {
            let (schedule, points) = schedule_of(lazy);
            out.write(bytemuck::bytes_of(&schedule))?;
            out.write(bytemuck::cast_slice(&points))?;
        }
        let Rule { sinks: sink, window } = self.seq.recipe.rule;
        if self.seq.recipe.rule.rolls() {
            let (n_gone, page_len) =
                (self.n_gone() as u64, self.model.plan().layout.page_len as u64);
            let streamed = Streamed { sink, window, n_gone, page_len };
            out.write(bytemuck::bytes_of(&streamed))?;
        }
        if let Some(evict) = self.seq.recipe.evict {
            let evicted = evicted_of(evict, self.seq.measured.since, self.seq.segments[0].len());
            out.write(bytemuck::bytes_of(&evicted))?;
            for sums in self.seq.measured.sums() {
                out.write(bytemuck::cast_slice(sums))?;
            }
        }
        if header.flags & IS_SEALED != 0 {
            let sealed = Sealed { page_len: self.model.plan().layout.page_len as u64 };
            out.write(bytemuck::bytes_of(&sealed))?;
            for segment in &self.seq.segments {
                let n_sealed = segment.n_sealed(&self.model.plan().layout) as u64;
                out.write(&n_sealed.to_le_bytes())?;
            }
        }
        if header.flags & HAS_ANSWER != 0 {
            out.write(&(self.answer().len() as u64).to_le_bytes())?;
        }
        out.write(bytemuck::cast_slice(&self.seq.tokens))?;
        if self.seq.logits_ready {
            out.write(bytemuck::cast_slice(&self.logits))?;
        }
        if self.seq.recipe.lazy.is_some() {
            out.write(&self.seq.waiting.depths)?;
        }
        for segment in self.segments_with_slots() {
            out.write(&(segment.len() as u64).to_le_bytes())?;
            out.write(bytemuck::cast_slice(&segment.positions))?;
        }
        for segment in &self.seq.segments {
            self.write_pages(out, segment)?;
        }
        self.write_waiting(out)
    }
}

impl Model {
    /// Opens a session from what [`Session::save`] wrote for the same weights, config, tokenizer and KV format.
    ///
    /// It prunes, streams or evicts as the saved one did. What `options` say of that must be the same; without, it is
    /// taken from the blob. A stream takes a page length as that of the model that saved it.
    pub fn restore(&self, from: &mut dyn Read, options: &SessionOptions) -> Result<Session, Error> {
        let mut from = Summed { inner: from, sum: Xxh3::new() };
        let header = self.read_header(&mut from, options.trust_old_state)?;
        let lazy = match header.n_points {
            0 => None,
            n => Some(read_schedule(&mut from, n as usize)?),
        };
        agree("schedule", &lazy, &options.lazy)?;
        if let Some(lazy) = &lazy {
            lazy.check(self.plan().n_layers).map_err(|e| unsound("schedule", &e))?;
        }
        let streamed = match header.flags & IS_STREAM {
            0 => None,
            _ => Some(read_pod::<Streamed>(&mut from, "stream")?),
        };
        let stream = streamed.map(|Streamed { sink, window, .. }| StreamOptions {
            sink: sink as usize,
            window: window as usize,
        });
        agree("stream", &stream, &options.stream)?;
        let evicted = match header.flags & EVICTS {
            0 => None,
            _ => Some(read_pod::<Evicted>(&mut from, "eviction")?),
        };
        let evict = evicted.as_ref().map(policy_of).transpose()?;
        agree("eviction", &evict, &options.evict)?;
        // A stream has no end, whatever the others are opened with.
        let ctx_len = options.ctx_len.filter(|_| stream.is_none());
        let saved = SessionOptions { ctx_len, lazy, stream, evict, trust_old_state: false };
        let (recipe, ctx_len) =
            saved.check(&self.plan().facts(self.config())).map_err(|e| match (stream, evict) {
                (None, None) => e,
                _ => unsound("policy", &e),
            })?;
        let mut session = Session::new(self.clone(), recipe, ctx_len)?;
        let n_tokens = at_most(
            "tokens (the session's context length)",
            header.n_tokens,
            session.ctx_len as u64,
        )?;
        let positions = match (streamed, evicted) {
            (Some(streamed), _) => self.positions_of_stream(&streamed, &mut session, n_tokens)?,
            (_, Some(evicted)) => self.read_evicted(&mut from, &evicted, &mut session, n_tokens)?,
            _ => Positions { first: n_tokens, then: n_tokens, n_slots: n_tokens },
        };

        let mut slots: Vec<Slots> = session.seq.segments.iter().map(|_| Slots::default()).collect();
        if header.flags & IS_SEALED != 0 {
            self.read_sealed(&mut from, &mut slots)?;
        }
        let mut n_answer = [0; 8];
        if header.flags & HAS_ANSWER != 0 {
            read(&mut from, &mut n_answer, "answer")?;
        }
        let n_answer = u64::from_le_bytes(n_answer);
        let n_answer = at_most("tokens of the answer", n_answer, n_tokens as u64)?;
        // Before memory is taken for as many tokens as a header may claim.
        self.check_room(session.seq.segments[0].n_layers, slots[0].n_sealed, positions.n_slots)?;
        session.seq.room_for_lists(self.plan(), n_tokens)?;
        let mut tokens = memory::zeros::<u32>(n_tokens, "the saved tokens")?;
        read(&mut from, bytemuck::cast_slice_mut(&mut tokens), "tokens")?;
        let vocab_size = self.config().vocab_size;
        if let Some(&id) = tokens.iter().find(|&&id| id as usize >= vocab_size) {
            return Err(mismatch("tokens", format!("id {id}"), format!("ids below {vocab_size}")));
        }
        if header.flags & HAS_LOGITS != 0 {
            read(&mut from, bytemuck::cast_slice_mut(&mut session.logits), "logits")?;
            if session.logits.iter().any(|l| !l.is_finite()) {
                return Err(mismatch(
                    "logits",
                    "a non-finite value".into(),
                    "finite values".into(),
                ));
            }
        }
        self.read_layers(&mut from, &mut session, tokens, &positions, slots)?;
        for segment in &session.seq.segments {
            self.read_pages(&mut from, segment)?;
        }
        self.read_waiting(&mut from, &session)?;
        let sum = from.sum.digest();
        let mut stored = [0; 8];
        read(&mut from, &mut stored, "checksum")?;
        if u64::from_le_bytes(stored) != sum {
            let stored = u64::from_le_bytes(stored);
            return Err(mismatch("checksum", format!("{stored:016x}"), format!("{sum:016x}")));
        }
        session.seq.logits_ready = header.flags & HAS_LOGITS != 0;
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

    fn read_header(
        &self,
        from: &mut Summed<&mut dyn Read>,
        trusts_old: bool,
    ) -> Result<Header, Error> {
        let header: Header = read_pod(from, "header")?;
        let want = expected_header(self);
        let check = |field, found: u64, expected: u64| match found == expected {
            true => Ok(()),
            false => Err(mismatch(field, found.to_string(), expected.to_string())),
        };
        check("magic", u64::from_le_bytes(header.magic), u64::from_le_bytes(want.magic))?;
        let is_old = (1..VERSION).contains(&header.version);
        if !is_old {
            check("version", header.version.into(), want.version.into())?;
        } else if !trusts_old {
            let expected = format!(
                "{VERSION}, as older files do not say with which config and tokenizer they were made; if it is this model's, restore it with trust_old_state (C: LORIS_TRUST_OLD_STATE, loris run: --trust-old-state)"
            );
            return Err(mismatch("version", header.version.to_string(), expected));
        }
        check(
            "KV format (0 = bf16, 1 = f32, 2 = fp8, ...)",
            header.kv_format.into(),
            want.kv_format.into(),
        )?;
        check("fingerprint of the weights", header.weights, want.weights)?;
        if is_old {
            at_most("shareable tokens", header.n_shareable(), header.n_tokens)?;
        } else {
            let (found, expected) = (header.config, want.config);
            check("fingerprint of the model's config", found.into(), expected.into())?;
            let (found, expected) = (header.tokenizer, want.tokenizer);
            // Without a tokenizer ids mean what the embedder says.
            if header.n_tokens > 0 && found != 0 && expected != 0 {
                check("fingerprint of the tokenizer's ids", found.into(), expected.into())?;
            }
        }
        check("layers", header.n_layers.into(), want.n_layers.into())?;
        check("kv heads", header.n_kv_heads.into(), want.n_kv_heads.into())?;
        check("head width", header.head_dim.into(), want.head_dim.into())?;
        check("vocabulary", header.vocab_size.into(), want.vocab_size.into())?;
        let flags = match header.version {
            1 | 2 => HAS_LOGITS,
            3 => HAS_LOGITS | IS_STREAM | EVICTS | IS_SEALED,
            _ => HAS_LOGITS | IS_STREAM | EVICTS | IS_SEALED | HAS_ANSWER,
        };
        if header.flags & !flags != 0 {
            return Err(mismatch("flags", header.flags.to_string(), format!("some of {flags}")));
        }
        if header.flags & HAS_LOGITS != 0 && header.n_tokens == 0 {
            return Err(mismatch("tokens", "0".into(), "1 or more, as there are logits".into()));
        }
        if (header.flags & IS_SEALED != 0) != self.plan().layout.kv.are_sealed() {
            let expected = "sealed pages where the KV format has them".into();
            return Err(mismatch("flags", header.flags.to_string(), expected));
        }
        if header.flags & IS_STREAM != 0 && header.flags & EVICTS != 0 {
            return Err(mismatch(
                "flags",
                header.flags.to_string(),
                "no stream that evicts".into(),
            ));
        }
        let most = if header.version == 1 { 0 } else { MAX_POINTS as u64 };
        at_most("prune points", header.n_points.into(), most)?;
        Ok(header)
    }

    /// The slots of a stream that has left behind what it may have.
    fn positions_of_stream(
        &self,
        streamed: &Streamed,
        session: &mut Session,
        n_tokens: usize,
    ) -> Result<Positions, Error> {
        let layout = &self.plan().layout;
        let &Streamed { n_gone, page_len, sink, window } = streamed;
        if page_len != layout.page_len as u64 {
            let expected = layout.page_len.to_string();
            return Err(mismatch("page length of a stream", page_len.to_string(), expected));
        }
        let first = layout.n_slots(1);
        let len = n_gone.saturating_add(n_tokens as u64);
        // The last token may be computed once more.
        let seen = u32::try_from(len.saturating_sub(1));
        let seen = seen.map(|position| Rule { sinks: sink, window }.first_seen(position));
        let most = seen.map_or(0, |seen| u64::from(seen).saturating_sub(first as u64));
        let n_gone = at_most("tokens that a stream has left behind", n_gone, most)?;
        if !n_gone.is_multiple_of(layout.page_len) || (n_gone > 0 && n_tokens < first) {
            let expected = "whole pages behind the first".into();
            return Err(mismatch(
                "tokens that a stream has left behind",
                n_gone.to_string(),
                expected,
            ));
        }
        session.seq.set_gone(n_gone);
        Ok(Positions { first: first.min(n_tokens), then: first + n_gone, n_slots: n_tokens })
    }

    /// The slots of a session that evicts, and the attention that they have got.
    fn read_evicted(
        &self,
        from: &mut Summed<&mut dyn Read>,
        evicted: &Evicted,
        session: &mut Session,
        n_tokens: usize,
    ) -> Result<Positions, Error> {
        let since = at_most("tokens at the last eviction", evicted.since, n_tokens as u64)?;
        let n_slots = at_most("slots of a layer", evicted.n_slots, n_tokens as u64)?;
        let n_new = n_tokens - since;
        if n_slots < n_new || (since > 0) != (n_slots > n_new) {
            let expected = format!("{n_new} and those that were kept, if any were");
            return Err(mismatch("slots of a layer", n_slots.to_string(), expected));
        }
        self.check_room(session.seq.segments[0].n_layers, 0, n_slots)?;
        let measured = &mut session.seq.measured;
        measured.since = since;
        for sums in measured.sums_mut() {
            *sums = memory::zeros(n_slots, "the attention of slots")?;
            read(from, bytemuck::cast_slice_mut(sums), "the attention of slots")?;
            if let Some(sum) = sums.iter().find(|sum| !(**sum >= 0.0 && sum.is_finite())) {
                let expected = "0 or more".into();
                return Err(mismatch("the attention of a slot", sum.to_string(), expected));
            }
        }
        Ok(Positions { first: n_slots - n_new, then: since, n_slots })
    }

    /// How many pages of each segment are sealed.
    fn read_sealed(
        &self,
        from: &mut Summed<&mut dyn Read>,
        slots: &mut [Slots],
    ) -> Result<(), Error> {
        let page_len = self.plan().layout.page_len;
        let sealed: Sealed = read_pod(from, "sealed pages")?;
        if sealed.page_len != page_len as u64 {
            let (found, expected) = (sealed.page_len.to_string(), page_len.to_string());
            return Err(mismatch("page length of sealed pages", found, expected));
        }
        for slots in slots {
            let n_sealed: u64 = read_pod(from, "sealed pages")?;
            slots.n_sealed = at_most("sealed pages", n_sealed, self.plan().n_pages as u64)?;
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
        from: &mut Summed<&mut dyn Read>,
        session: &mut Session,
        tokens: Vec<u32>,
        positions: &Positions,
        mut slots: Vec<Slots>,
    ) -> Result<(), Error> {
        let mut depth = Vec::new();
        if session.seq.recipe.lazy.is_some() {
            depth = memory::zeros::<u8>(tokens.len(), "the saved tokens")?;
            read(from, &mut depth, "depths")?;
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
        let of_segments = session.seq.segments.iter().zip(&mut slots);
        for (idx, (segment, slots)) in of_segments.enumerate().skip(n_known) {
            let n_slots: u64 = read_pod(from, "slots")?;
            let n_slots = usize::try_from(n_slots).unwrap_or(usize::MAX);
            self.check_room(segment.n_layers, slots.n_sealed, n_slots)?;
            let mut positions = memory::zeros::<u32>(n_slots, "the positions of slots")?;
            read(from, bytemuck::cast_slice_mut(&mut positions), "positions")?;
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
/// were given up may be among them, but not at the end, unless that is the one of the `n_coded` slots of sealed pages.
fn check_slots(
    idx: usize,
    positions: &[u32],
    depth: &[u8],
    n_coded: Option<usize>,
) -> Result<(), Error> {
    let mut is_missing: Vec<bool> = depth.iter().map(|&depth| usize::from(depth) > idx).collect();
    let unsound = |position: &u32| match is_missing.get_mut(*position as usize) {
        Some(is_missing) => !std::mem::take(is_missing),
        None => *position != GIVEN_UP,
    };
    if let Some(position) = positions.iter().copied().find(unsound) {
        let expected = "each token that has gone through the segment, once".into();
        return Err(mismatch("positions", position.to_string(), expected));
    }
    if let Some(position) = is_missing.iter().position(|&is_missing| is_missing) {
        return Err(mismatch("positions", "no slot".into(), format!("a slot of {position}")));
    }
    match positions.last() {
        Some(&GIVEN_UP) if n_coded != Some(positions.len()) => {
            let found = "a slot without a token at the end".into();
            Err(mismatch("positions", found, "a token".into()))
        }
        _ => Ok(()),
    }
}
