//! What a session holds on the device, into a blob and out of it: pages, and hidden states that wait.

use std::io::Write;
use std::ops::Range;

use half::bf16;
use half::slice::HalfFloatSliceExt;

use super::blob::{Blob, Summed};
use crate::engine::Model;
use crate::error::Error;
use crate::memory;
use crate::pool::AuxRow;
use crate::sequence::{EMPTY, Segment};
use crate::session::Session;
use crate::store::{Coding, PageLayout, Run, Side};

/// Hidden states that are read or written in one turn on the device.
const ROWS_A_TURN: usize = 256;

impl Session {
    pub(super) fn write_pages(
        &self,
        out: &mut Summed<&mut dyn Write>,
        segment: &Segment,
    ) -> Result<(), Error> {
        let shared = &*self.model.shared;
        let layout = segment.layout(&shared.plan.layout);
        // What they hold means nothing, unless it is about to be sealed with the others.
        let is_void = |&(_, &p): &(usize, &u32)| p == EMPTY && !layout.kv.are_sealed();
        let empty = || (0..).zip(segment.slots.positions()).filter(is_void);
        let mut pages = buffer(segment.n_pages() / segment.n_layers, layout.bytes())?;
        for layer in 0..segment.n_layers {
            let mut device = shared.device();
            let ids = segment.pages().skip(layer).step_by(segment.n_layers);
            for (page, id) in pages.chunks_exact_mut(layout.bytes()).zip(ids) {
                device.read_page(id, page)?;
            }
            drop(device);
            for (slot, _) in empty() {
                for run in layout.runs(slot..slot + 1) {
                    for range in heads(layout).flat_map(|head| slots_of(layout, head, &run)) {
                        pages[range].fill(0);
                    }
                }
            }
            for run in runs(layout, segment.len()) {
                out.write(&pages[run])?;
            }
        }
        Ok(())
    }

    pub(super) fn write_waiting(&self, out: &mut Summed<&mut dyn Write>) -> Result<(), Error> {
        let rows: Vec<AuxRow> = self.seq.waiting.rows().map(|(_, row)| row).collect();
        let hidden_dim = self.model.config().hidden_dim;
        let mut states: Vec<f32> = memory::zeros(ROWS_A_TURN * hidden_dim, "hidden states")?;
        for rows in rows.chunks(ROWS_A_TURN) {
            let states = &mut states[..rows.len() * hidden_dim];
            let mut device = self.model.shared.device();
            for (&row, state) in rows.iter().zip(states.chunks_exact_mut(hidden_dim)) {
                device.read_aux(row, state)?;
            }
            drop(device);
            match self.model.plan().layout.kv.wide() {
                Coding::F32 => out.write(bytemuck::cast_slice(states)),
                _ => {
                    let narrow: Vec<bf16> = states.iter().map(|&x| bf16::from_f32(x)).collect();
                    out.write(bytemuck::cast_slice(&narrow))
                }
            }?;
        }
        Ok(())
    }
}

impl Model {
    pub(super) fn read_pages(&self, blob: &mut Blob<'_>, segment: &Segment) -> Result<(), Error> {
        let layout = segment.layout(&self.plan().layout);
        let mut pages = buffer(segment.n_pages() / segment.n_layers, layout.bytes())?;
        for layer in 0..segment.n_layers {
            for run in runs(layout, segment.len()) {
                blob.read(&mut pages[run], "pages")?;
            }
            let mut device = self.shared.device();
            let ids = segment.pages().skip(layer).step_by(segment.n_layers);
            for (page, id) in pages.chunks_exact(layout.bytes()).zip(ids) {
                device.write_page(id, page)?;
            }
        }
        Ok(())
    }

    pub(super) fn read_waiting(&self, blob: &mut Blob<'_>, session: &Session) -> Result<(), Error> {
        let rows: Vec<AuxRow> = session.seq.waiting.rows().map(|(_, row)| row).collect();
        let hidden_dim = self.config().hidden_dim;
        let mut states: Vec<f32> = memory::zeros(ROWS_A_TURN * hidden_dim, "hidden states")?;
        let mut narrow: Vec<bf16> = memory::zeros(ROWS_A_TURN * hidden_dim, "hidden states")?;
        for rows in rows.chunks(ROWS_A_TURN) {
            let n = rows.len() * hidden_dim;
            match self.plan().layout.kv.wide() {
                Coding::F32 => {
                    blob.read(bytemuck::cast_slice_mut(&mut states[..n]), "hidden states")?;
                }
                _ => {
                    blob.read(bytemuck::cast_slice_mut(&mut narrow[..n]), "hidden states")?;
                    narrow[..n].convert_to_f32_slice(&mut states[..n]);
                }
            }
            let mut device = self.shared.device();
            for (&row, state) in rows.iter().zip(states.chunks_exact(hidden_dim)) {
                device.write_aux(row, state)?;
            }
        }
        Ok(())
    }

    /// Bytes of a hidden state that waits.
    pub(super) fn hidden_bytes(&self) -> usize {
        self.plan().layout.kv.wide().code_bytes(self.config().hidden_dim)
    }
}

/// K of every head, then V: the order of a blob.
fn heads(layout: PageLayout) -> impl Iterator<Item = (Side, usize)> {
    let of = move |side| (0..layout.n_kv_heads).map(move |head| (side, head));
    [Side::K, Side::V].into_iter().flat_map(of)
}

/// Bytes of the codes and of the params of a head's slots in a page, in pages laid end to end.
fn slots_of(layout: PageLayout, (side, head): (Side, usize), run: &Run) -> [Range<usize>; 2] {
    let (form, first, last) = (layout.form_of(run.part), run.first, run.first + run.slots.len());
    let base = run.page_idx * layout.bytes();
    let range = |at: &dyn Fn(usize) -> usize| base + at(first)..base + at(last);
    let params = |slot: usize| match form.coding(side).is_by_channel() && first > 0 {
        true => form.params(side, head, 0), // they come with the first slot
        false => form.params(side, head, slot),
    };
    [range(&|slot| form.codes(side, head, slot)), range(&params)]
}

/// Byte ranges of the used slots of one layer's pages laid end to end, in the order of a blob.
pub(super) fn runs(layout: PageLayout, n_slots: usize) -> impl Iterator<Item = Range<usize>> {
    heads(layout).flat_map(move |head| {
        let part = move |idx: usize| {
            layout.runs(0..n_slots).map(move |run| slots_of(layout, head, &run)[idx].clone())
        };
        part(0).chain(part(1))
    })
}

fn buffer(n: usize, bytes: usize) -> Result<Vec<u8>, Error> {
    memory::zeros(n * bytes, "one layer's pages") // no more than the page pool
}
