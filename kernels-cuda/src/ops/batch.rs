//! A batch on the device: what kernels read about rows, sequences and pages.

use std::ops::Range;

use crate::abi::{LORIS_DENSE, LORIS_SPLIT_LEN, LorisBatch, LorisQTile, LorisSeq};
use crate::{Buffer, Device, Error, Staging, to_u32};

/// A batch as the host has it; slices may be empty where no kernel reads them.
#[derive(Clone, Copy, Debug, Default)]
pub struct HostBatch<'a> {
    /// `[n_seqs]`
    pub seqs: &'a [LorisSeq],
    /// `[n_rows]`: index into `seqs`
    pub row_seq: &'a [u32],
    /// `[n_rows]`: absolute position
    pub positions: &'a [u32],
    /// Positions of the slots of sequences that are not dense, with those that were given back: no row sees theirs.
    pub slot_positions: &'a [u32],
    /// Page ids, for each sequence `[page_idx][n_layers]`.
    pub page_tables: &'a [u32],
    /// Layers of the segment: the stride of page tables.
    pub n_layers: usize,
    /// `[n_rows]`
    pub tokens: &'a [u32],
    /// `[n_rows][head_dim / 2][2]`
    pub cos_sin: &'a [f32],
    /// `[n_rows][head_dim / 2][2]`: from each row's position to where its query meets the sinks of its stream
    pub sink_cos_sin: &'a [f32],
    /// Work list of prefill attention.
    pub tiles: &'a [LorisQTile],
    /// Rows whose logits are wanted.
    pub logit_rows: &'a [u32],
}

/// A batch on the device. Addresses stay what they are until a part outgrows its room, so that
/// graphs may name them: [`generation`](Self::generation) says when they changed.
#[derive(Debug)]
pub struct DeviceBatch {
    /// All parts, one behind the other.
    memory: Buffer<u32>,
    /// As large as `memory`, so that an upload waits for the one before the last at most.
    staging: Staging,
    parts: [Part; N_PARTS],
    head_dim: usize,
    n_layers: u32,
    max_kv_len: usize,
    n_pages: usize,
    generation: u64,
}

/// One array of the batch, in words of 4 bytes.
#[derive(Clone, Copy, Debug, Default)]
struct Part {
    start: usize,
    room: usize,
    len: usize,
}

// Those that a decode step fills lie together, but for the rest of the rooms for angles.
const SEQS: usize = 0;
const ROW_SEQ: usize = 1;
const POSITIONS: usize = 2;
const TOKENS: usize = 3;
const LOGIT_ROWS: usize = 4;
const SLOT_POSITIONS: usize = 5;
const PAGE_TABLES: usize = 6;
const COS_SIN: usize = 7;
const SINK_COS_SIN: usize = 8;
const TILES: usize = 9;
const N_PARTS: usize = 10;

/// Unused words that are copied along rather than left out by a copy more.
const MAX_GAP: usize = 16 << 10;

/// Words of a sequence and of a tile.
const SEQ_LEN: usize = size_of::<LorisSeq>() / 4;
const TILE_LEN: usize = size_of::<LorisQTile>() / 4;
/// Parts begin at multiples of as many words: 256 bytes.
const ALIGNMENT: usize = 64;

impl DeviceBatch {
    /// Room for `max_rows` rows (more can be uploaded, at new addresses) of heads of `head_dim`
    /// elements.
    pub fn new(device: &Device, max_rows: usize, head_dim: usize) -> Result<Self, Error> {
        let mut rooms = [max_rows.max(1); N_PARTS];
        rooms[SEQS] *= SEQ_LEN;
        rooms[COS_SIN] *= head_dim;
        rooms[SINK_COS_SIN] = 0; // until there is a stream
        rooms[TILES] *= TILE_LEN;
        let (parts, memory, staging) = allocate(device, &rooms)?;
        let (n_layers, max_kv_len, n_pages, generation) = (0, 0, 0, 0);
        Ok(Self { memory, staging, parts, head_dim, n_layers, max_kv_len, n_pages, generation })
    }

    /// Replaces the batch, for kernels that are launched from now on. On return `host` has been
    /// read.
    pub fn upload(&mut self, device: &Device, host: &HostBatch<'_>) -> Result<(), Error> {
        self.check(host)?;
        let words: [&[u32]; N_PARTS] = [
            bytemuck::cast_slice(host.seqs),
            host.row_seq,
            host.positions,
            host.tokens,
            host.logit_rows,
            host.slot_positions,
            host.page_tables,
            bytemuck::cast_slice(host.cos_sin),
            bytemuck::cast_slice(host.sink_cos_sin),
            bytemuck::cast_slice(host.tiles),
        ];
        if words.iter().zip(&self.parts).any(|(words, part)| words.len() > part.room) {
            let mut rooms = self.parts.map(|part| part.room);
            for (room, words) in rooms.iter_mut().zip(words) {
                *room = words.len().checked_next_power_of_two().unwrap_or(usize::MAX).max(*room);
            }
            (self.parts, self.memory, self.staging) = allocate(device, &rooms)?;
            self.generation += 1;
        }
        let half = self.staging.next_half(device)?;
        for (part, words) in self.parts.iter_mut().zip(words) {
            part.len = words.len();
            half.words()[part.start..][..part.len].copy_from_slice(words);
        }
        for run in runs(&self.parts) {
            let pinned = &half.words()[run.clone()];
            // SAFETY: this half is written again only when its copies are done.
            unsafe { self.memory.upload_async(device, run.start, pinned)? };
        }
        half.record(device)?;
        self.n_layers = to_u32(host.n_layers);
        self.max_kv_len = host.seqs.iter().map(kv_len).max().unwrap_or(0);
        self.n_pages = host.page_tables.iter().max().map_or(0, |&page| page as usize + 1);
        Ok(())
    }

    /// What kernels index with must lie within what they index.
    fn check(&self, host: &HostBatch<'_>) -> Result<(), Error> {
        let n_rows = host.row_seq.len();
        Error::check_size("batch positions", host.positions.len(), n_rows)?;
        if !host.tokens.is_empty() {
            Error::check_size("batch tokens", host.tokens.len(), n_rows)?;
        }
        if !host.cos_sin.is_empty() {
            Error::check_size("batch cos_sin", host.cos_sin.len(), n_rows * self.head_dim)?;
        }
        if !host.sink_cos_sin.is_empty() || host.seqs.iter().any(|seq| seq.sink > 0) {
            let n = n_rows * self.head_dim;
            Error::check_size("batch sink_cos_sin", host.sink_cos_sin.len(), n)?;
        }
        for seq in host.seqs {
            let rows = seq.row_start as usize + seq.n_rows as usize;
            let slots = seq.n_gone as usize + seq.kv_start as usize;
            Error::check_room("batch rows, at least", n_rows, rows)?;
            Error::check_room(
                "batch page_tables, at least",
                host.page_tables.len(),
                seq.page_table_start as usize,
            )?;
            if seq.positions_start != LORIS_DENSE {
                let end = seq.positions_start as usize + slots + seq.n_rows as usize;
                Error::check_room(
                    "batch slot_positions, at least",
                    host.slot_positions.len(),
                    end,
                )?;
            }
        }
        let below = |what, indices: &[u32], end: usize| match indices.iter().max() {
            Some(&last) => Error::check_room(what, end, last as usize + 1),
            None => Ok(()),
        };
        below("batch seqs, at least", host.row_seq, host.seqs.len())?;
        below("batch rows for logit_rows, at least", host.logit_rows, n_rows)
    }

    /// As kernels take it.
    pub fn abi(&self) -> LorisBatch {
        LorisBatch {
            seqs: self.at(SEQS) as *const _,
            row_seq: self.at(ROW_SEQ) as *const _,
            positions: self.at(POSITIONS) as *const _,
            slot_positions: self.at(SLOT_POSITIONS) as *const _,
            page_tables: self.at(PAGE_TABLES) as *const _,
            sink_cos_sin: self.at(SINK_COS_SIN) as *const _,
            n_rows: to_u32(self.n_rows()),
            n_seqs: to_u32(self.n_seqs()),
            n_layers: self.n_layers,
        }
    }

    /// Rows of the last upload.
    pub fn n_rows(&self) -> usize {
        self.parts[ROW_SEQ].len
    }

    /// Sequences of the last upload.
    pub fn n_seqs(&self) -> usize {
        self.parts[SEQS].len / SEQ_LEN
    }

    /// Layers of a page table of the last upload.
    pub fn n_layers(&self) -> usize {
        self.n_layers as usize
    }

    /// The largest [`kv_len`] of its sequences.
    pub fn max_kv_len(&self) -> usize {
        self.max_kv_len
    }

    /// How many pages a pool must have for the page tables: the largest page id and one.
    pub fn n_pages(&self) -> usize {
        self.n_pages
    }

    /// Elements of a head, for which angles are uploaded.
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// Device address of `[n_rows]` tokens.
    pub fn tokens(&self) -> u64 {
        self.at(TOKENS)
    }

    /// Device address of `[n_rows][head_dim / 2][2]` cosines and sines.
    pub fn cos_sin(&self) -> u64 {
        self.at(COS_SIN)
    }

    /// Device address of the work list.
    pub fn tiles(&self) -> u64 {
        self.at(TILES)
    }

    /// Tiles of the work list.
    pub fn n_tiles(&self) -> usize {
        self.parts[TILES].len / TILE_LEN
    }

    /// Device address of the rows whose logits are wanted.
    pub fn logit_rows(&self) -> u64 {
        self.at(LOGIT_ROWS)
    }

    /// How many rows that are.
    pub fn n_logit_rows(&self) -> usize {
        self.parts[LOGIT_ROWS].len
    }

    /// Changes when addresses do.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    fn at(&self, part: usize) -> u64 {
        self.memory.ptr() + 4 * self.parts[part].start as u64
    }
}

/// Slots of a sequence, the rows of the batch among them; of those that a stream has given back some count, fewer than in
/// two splits of attention, as in `n_skipped_splits` of `kv/page.cuh`.
pub fn kv_len(seq: &LorisSeq) -> usize {
    let n_skipped = (seq.n_gone / LORIS_SPLIT_LEN).max(1) - 1;
    let n_gone = seq.n_gone - n_skipped * LORIS_SPLIT_LEN;
    n_gone as usize + seq.kv_start as usize + seq.n_rows as usize
}

/// The words that are in use, with small gaps between them closed: what is copied at once.
fn runs(parts: &[Part; N_PARTS]) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    for part in parts.iter().filter(|part| part.len > 0) {
        let end = part.start + part.len;
        match runs.last_mut() {
            Some(run) if part.start - run.end <= MAX_GAP => run.end = end,
            _ => runs.push(part.start..end),
        }
    }
    runs
}

fn allocate(
    device: &Device,
    rooms: &[usize; N_PARTS],
) -> Result<([Part; N_PARTS], Buffer<u32>, Staging), Error> {
    let mut parts = [Part::default(); N_PARTS];
    let mut len = 0usize;
    for (part, &room) in parts.iter_mut().zip(rooms) {
        *part = Part { start: len, room, len: 0 };
        len = len.saturating_add(room.checked_next_multiple_of(ALIGNMENT).unwrap_or(usize::MAX));
    }
    let memory = Buffer::new(device, len, "the batch")?;
    Ok((parts, memory, Staging::new(device, 4 * len)?))
}
