//! The walk over the slots: one task of attention.

use std::ops::Range;

use super::super::kv::{self, CHUNK, CpuPages, Row};
use super::super::matrix::Format;
use super::super::mem::Shared;
use super::super::micro::{Out, Product};
use super::super::norm::Rotation;
use super::super::pack::{Dest, Pack, RowPtrs, Tiles, pack_tile, pair, steps, to_pairs};
use super::super::simd::{Dot, Fma, Kernel, MAX_LANES, Simd, bf16_bits, exp2, exp2_each};
use super::super::team::Tasks;
use super::work::{Task, Work};
use super::{TILE, partial_len};
use crate::backend::{Batch, Phase, Seq};
use crate::store::{AttentionShape, Run, Side};

/// Attention of a batch in one layer.
pub(in super::super) struct Attention<'a> {
    pub(in super::super) batch: &'a Batch<'a>,
    pub(in super::super) work: &'a Work,
    pub(in super::super) shape: AttentionShape,
    pub(in super::super) layer: usize,
    pub(in super::super) window: Option<usize>,
    /// Of queries that meet the sinks of a sequence that rolls.
    pub(in super::super) sink_rotation: &'a Rotation,
    pub(in super::super) q: &'a [f32],
    pub(in super::super) pages: &'a CpuPages,
    pub(in super::super) out: Shared<'a, f32>,
    /// `[partial row][partial_len]`
    pub(in super::super) partial: Shared<'a, f32>,
    pub(in super::super) tasks: &'a Tasks,
    pub(in super::super) thread_idx: usize,
    /// [`scratch_len`] numbers.
    pub(in super::super) scratch: *mut f32,
}

/// Numbers of scratch a thread needs for tasks of at most `max_rows` rows.
pub(in super::super) fn scratch_len(max_rows: usize, head_dim: usize) -> usize {
    let d = head_dim.next_multiple_of(2 * MAX_LANES);
    // Queries and output; maximum and sum; K and V; a tile of queries before packing; scores.
    2 * max_rows * d + 2 * max_rows + 2 * TILE * d + MAX_LANES * (d + TILE)
}

/// A task's scratch.
#[derive(Clone, Copy)]
pub(super) struct Parts {
    /// Packed tiles, `[step][rows]` each; `[row][d]` in decode.
    pub(super) q: *mut f32,
    /// `[row][d]`, `d` padded to whole panels.
    pub(super) out: *mut f32,
    pub(super) row_max: *mut f32,
    pub(super) row_sum: *mut f32,
    /// Panels of `[step][2 * LANES]` slots; `[slot][d]` in decode.
    pub(super) k: *mut f32,
    /// Panels of `[slot or pair][2 * LANES]` columns; `[slot][d]` in decode.
    pub(super) v: *mut f32,
    /// `[TILE_ROWS][head_dim]`
    rows: *mut f32,
    /// `[TILE_ROWS][TILE]`
    pub(super) scores: *mut f32,
}

impl Parts {
    #[inline(always)]
    unsafe fn new(scratch: *mut f32, n_rows: usize, d: usize) -> Self {
        // SAFETY: the parts add up to at most scratch_len.
        unsafe {
            let out = scratch.add(n_rows * d);
            let row_max = out.add(n_rows * d);
            let k = row_max.add(2 * n_rows);
            let v = k.add(TILE * d);
            let rows = v.add(TILE * d);
            let scores = rows.add(MAX_LANES * d);
            Self { q: scratch, out, row_max, row_sum: row_max.add(n_rows), k, v, rows, scores }
        }
    }
}

impl Kernel for Attention<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd, D: Dot>(self) {
        while let Some(i) = self.tasks.next(self.thread_idx) {
            let task = &self.work.tasks[i];
            let padded = match self.batch.phase {
                Phase::Prefill => 2 * S::LANES,
                Phase::Decode => CHUNK,
            };
            let d = self.shape.head_dim.next_multiple_of(padded);
            let n_rows = task.tokens.len() * self.shape.group_size();
            // SAFETY: the scratch fits the largest task; results go to this task's rows and heads.
            unsafe {
                let parts = Parts::new(self.scratch, n_rows, d);
                for r in 0..n_rows {
                    parts.row_max.add(r).write(f32::NEG_INFINITY);
                    parts.row_sum.add(r).write(0.0);
                }
                std::ptr::write_bytes(parts.out, 0, n_rows * d);
                match self.batch.phase {
                    Phase::Prefill => self.many_rows::<S, D>(task, parts, n_rows, d),
                    Phase::Decode => self.few_rows::<S>(task, parts, n_rows, d),
                }
                self.store::<S>(task, parts, n_rows, d);
            }
        }
    }
}

impl Attention<'_> {
    /// One task of prefill.
    #[inline(always)]
    unsafe fn many_rows<S: Simd, D: Dot>(
        &self,
        task: &Task,
        parts: Parts,
        n_rows: usize,
        d: usize,
    ) {
        let tiles = Tiles::new(n_rows, S::TILE_ROWS);
        // SAFETY: the kernel's.
        unsafe {
            for step in self.steps(task) {
                if step.loads_queries {
                    self.pack_queries::<S, D>(task, step.meets, tiles, parts);
                }
                self.tile::<S, D>(task, &step, tiles, parts, d);
            }
        }
    }

    /// First element of row `r` of a task (token-major, then heads of the group) in `q` and `out`.
    #[inline(always)]
    pub(super) fn row(&self, task_head: usize, first_token: usize, r: usize) -> usize {
        let group = self.shape.group_size();
        let (token, head) = (first_token + r / group, task_head * group + r % group);
        (token * self.shape.n_q_heads + head) * self.shape.head_dim
    }

    /// What a task goes through: the sinks, where the sequence rolls, and then its tiles.
    #[inline(always)]
    pub(super) fn steps<'t>(&'t self, task: &'t Task) -> impl Iterator<Item = Step> + 't {
        let seq = &self.batch.seqs[task.seq];
        let n_sinks = seq.rule.sinks;
        let sinks = task.has_sinks.then(|| Step {
            slots: 0..seq.kv_len().min(n_sinks as usize),
            bounds: [0, n_sinks - 1],
            meets: Meets::Sinks,
            loads_queries: true,
        });
        let tiles = seq.slots.lots(task.slots.clone(), TILE).map(|slots| Step {
            bounds: seq.slots.bounds(slots.start),
            meets: Meets::Window,
            loads_queries: slots.start == task.slots.start,
            slots,
        });
        sinks.into_iter().chain(tiles)
    }

    /// Query `r` of a task at `to`, scaled so that scores are exponents of 2.
    ///
    /// # Safety
    /// The task has the row, and `to` room for a head.
    #[inline(always)]
    pub(super) unsafe fn query(&self, task: &Task, meets: Meets, r: usize, to: *mut f32) {
        let head_dim = self.shape.head_dim;
        let scale = std::f32::consts::LOG2_E / (head_dim as f32).sqrt();
        let at = self.row(task.kv_head, task.tokens.start, r);
        // SAFETY: the caller's.
        unsafe {
            let from = self.q.as_ptr().add(at);
            for i in 0..head_dim {
                to.add(i).write(*from.add(i) * scale);
            }
            if meets == Meets::Sinks {
                let is_rotated = self.pages.layout.kv.k.rotated;
                let head = std::slice::from_raw_parts_mut(to, head_dim);
                if is_rotated {
                    kv::rotate(head); // back to where positions rotate
                }
                let row = task.tokens.start + r / self.shape.group_size();
                self.sink_rotation.rotate(row, head.as_mut_ptr());
                if is_rotated {
                    kv::rotate(head);
                }
            }
        }
    }

    /// Packs the task's queries.
    #[inline(always)]
    unsafe fn pack_queries<S: Simd, D: Dot>(
        &self,
        task: &Task,
        meets: Meets,
        tiles: Tiles,
        parts: Parts,
    ) {
        let head_dim = self.shape.head_dim;
        let n_steps = steps::<D>(head_dim);
        for tile in 0..tiles.n {
            // SAFETY: the task's rows, and a tile of scratch.
            unsafe {
                for r in 0..tiles.rows(tile) {
                    let to = parts.rows.add(r * head_dim);
                    self.query(task, meets, tiles.start(tile) + r, to);
                    if D::PAIRS {
                        to_pairs(to, to, head_dim);
                    }
                }
                let to = parts.q.add(tiles.start(tile) * n_steps);
                pack_tile::<S>(parts.rows, head_dim, tiles.rows(tile), n_steps, to);
            }
        }
    }

    /// The first and the last position that a row sees; none where they are out of order.
    #[inline(always)]
    pub(super) fn seen(&self, seq: &Seq<'_>, meets: Meets, position: u32) -> (u32, u32) {
        let seen = match meets {
            Meets::Sinks => seq.rule.sinks(position),
            Meets::Window => seq.rule.seen(position, self.window),
        };
        if seen.is_empty() { (1, 0) } else { (seen.start, seen.end - 1) }
    }

    /// What rows at `positions` see of slots whose positions are within `bounds`.
    #[inline(always)]
    pub(super) fn view(
        &self,
        seq: &Seq<'_>,
        meets: Meets,
        [min, max]: [u32; 2],
        positions: &[u32],
    ) -> View {
        let (low, high) = min_max(positions);
        let (of_low, of_high) = (self.seen(seq, meets, low), self.seen(seq, meets, high));
        // With its position a row's first and last go up; only a sequence that rolls sees no sinks at first.
        if min > of_high.1 || (meets == Meets::Window && max < of_low.0) || of_high.0 > of_high.1 {
            View::Nothing
        } else if max <= of_low.1 && min >= of_high.0 && of_low.0 <= of_low.1 {
            View::All
        } else {
            View::Some
        }
    }

    /// Adds one tile of slots to all rows of a task.
    #[inline(always)]
    unsafe fn tile<S: Simd, D: Dot>(
        &self,
        task: &Task,
        step: &Step,
        tiles: Tiles,
        parts: Parts,
        d: usize,
    ) {
        let (seq, group) = (&self.batch.seqs[task.seq], self.shape.group_size());
        let (slots, meets, bounds) = (step.slots.clone(), step.meets, step.bounds);
        let positions = &self.batch.positions[task.tokens.clone()];
        if self.view(seq, meets, bounds, positions) == View::Nothing {
            return;
        }
        let (panel, n_steps) = (2 * S::LANES, steps::<D>(self.shape.head_dim));
        // SAFETY: K, V and scores fit their parts; rows are the task's.
        unsafe {
            let rows = |side| self.rows(task, slots.clone(), side);
            self.pack_keys::<S, D>(&rows(Side::K), slots.len(), parts);
            self.pack_values::<S, D>(&rows(Side::V), slots.len(), parts);
            for tile in 0..tiles.n {
                let (first, n_rows) = (tiles.start(tile), tiles.rows(tile));
                let positions = &positions[first / group..(first + n_rows - 1) / group + 1];
                let view = self.view(seq, meets, bounds, positions);
                if view == View::Nothing {
                    continue;
                }
                for column in (0..slots.len()).step_by(panel) {
                    let (a, b) = (parts.q.add(first * n_steps), parts.k.add(column * n_steps));
                    let c = parts.scores.add(column);
                    Product { a, b, steps: n_steps, c, ldc: TILE, out: Out::Set }
                        .run::<S, D, true>(n_rows);
                }
                let is_full = view == View::All && slots.len() == TILE;
                let mask = Mask { slots: &seq.positions()[slots.clone()], is_full };
                let (mut scale, mut sums) = ([0.0_f32; MAX_LANES], [0.0_f32; MAX_LANES]);
                for r in 0..n_rows {
                    let row = first + r;
                    let position = self.batch.positions[task.tokens.start + row / group];
                    let (scores, max) = (parts.scores.add(r * TILE), &mut *parts.row_max.add(row));
                    let seen = self.seen(seq, meets, position);
                    (scale[r], sums[r]) = weigh::<S, D>(scores, mask, seen, max);
                }
                exp2_each::<S>(&mut scale);
                for r in 0..n_rows {
                    let sum = parts.row_sum.add(first + r);
                    *sum = *sum * scale[r] + sums[r];
                }
                for column in (0..d).step_by(panel) {
                    let (a, b) = (parts.scores, parts.v.add(column * steps::<D>(TILE)));
                    let (c, out) = (parts.out.add(first * d + column), Out::Scale(scale.as_ptr()));
                    Product { a, b, steps: steps::<D>(slots.len()), c, ldc: d, out }
                        .run::<S, D, false>(n_rows);
                }
            }
        }
    }

    /// A side of a tile's slots; behind the last it again.
    #[inline(always)]
    fn rows(&self, task: &Task, slots: Range<usize>, side: Side) -> [Row; TILE] {
        let seq = &self.batch.seqs[task.seq];
        let runs = self.pages.layout.with_sealed(seq.n_sealed).runs(slots);
        let mut rows = runs.flat_map(|Run { page_idx, part, first, slots }| {
            let page = self.pages.page(seq.page(page_idx, self.layer)).as_ptr();
            let form = self.pages.form(part);
            (first..first + slots.len())
                .map(move |slot| Row::new(form, page, slot, side, task.kv_head))
        });
        let mut row = Row::NONE;
        std::array::from_fn(|_| {
            row = rows.next().unwrap_or(row);
            row
        })
    }

    /// K of a tile, as panels of slots. Lanes beyond the last slot repeat it: their scores are masked.
    #[inline(always)]
    unsafe fn pack_keys<S: Simd, D: Dot>(&self, slots: &[Row; TILE], n: usize, parts: Parts) {
        let (panel, head_dim) = (2 * S::LANES, self.shape.head_dim);
        let n_steps = steps::<D>(head_dim);
        for (i, slots) in slots[..n.next_multiple_of(S::LANES)].chunks(S::LANES).enumerate() {
            // SAFETY: the slots are in use; half panel i starts at the panel's half.
            unsafe {
                let to = parts.k.add((i / 2) * panel * n_steps + (i % 2) * S::LANES);
                let dest = Dest { to, stride: panel, n: S::LANES };
                let steps = 0..n_steps;
                // Between two slots that are not coded there is none that is: pages have as many slots as lanes.
                let ends = [slots[0], slots[S::LANES - 1]].map(|slot| Format::of(slot.coding));
                if let [Some(format), Some(_)] = ends {
                    let rows: RowPtrs = std::array::from_fn(|lane| slots[lane % S::LANES].codes);
                    S::enter::<D, _>(Pack { rows: &rows, format, k: head_dim, steps, dest });
                    continue;
                }
                for (lane, slot) in slots.iter().enumerate() {
                    let row = parts.rows.add(lane * head_dim);
                    slot.read::<S>(1, head_dim, row);
                    if D::PAIRS {
                        to_pairs(row, row, head_dim);
                    }
                }
                let rows: RowPtrs =
                    std::array::from_fn(|lane| parts.rows.add(lane * head_dim).cast_const().cast());
                let pack = Pack { rows: &rows, format: Format::F32, k: n_steps, steps, dest };
                S::enter::<Fma, _>(pack);
            }
        }
    }

    /// V of a tile, as panels of columns.
    #[inline(always)]
    unsafe fn pack_values<S: Simd, D: Dot>(&self, slots: &[Row; TILE], n: usize, parts: Parts) {
        let (panel, head_dim) = (2 * S::LANES, self.shape.head_dim);
        let per_step = if D::PAIRS { 2 } else { 1 };
        for first in (0..n).step_by(per_step) {
            // An odd last slot is paired with zeros: its partner's weight is 0, and 0 * NaN is not.
            let has_next = first + 1 < n;
            let mut rows = [slots[first], slots[(first + 1).min(n - 1)]];
            for (row, idx) in rows.iter_mut().zip(0..per_step) {
                if row.coding.is_coded() {
                    // SAFETY: a slot in use; the scratch has a row for each lane.
                    unsafe {
                        let to = parts.rows.add(idx * head_dim);
                        row.read::<S>(1, head_dim, to);
                        *row = row.decoded(to);
                    }
                }
            }
            let [(format, row), next] =
                rows.map(|row| (Format::of(row.coding).unwrap_or(Format::F32), row.codes));
            for column in (0..head_dim).step_by(panel) {
                let n = panel.min(head_dim - column);
                // SAFETY: n columns of slots in use; the panel has a row for every step.
                unsafe {
                    let from = row.add(column * format.bytes());
                    let to = parts.v.add(column * steps::<D>(TILE) + first / per_step * panel);
                    if D::PAIRS {
                        let next = (next.0, next.1.add(column * next.0.bytes()));
                        pair_rows((format, from), has_next.then_some(next), to, n);
                    } else if n == panel {
                        let half = S::LANES * format.bytes();
                        S::store(to, format.load::<S>(from));
                        S::store(to.add(S::LANES), format.load::<S>(from.add(half)));
                    } else {
                        format.convert::<S>(from, to, n);
                    }
                }
            }
        }
    }

    /// Writes a task's result: normalised to the output, or as it is to its partial rows.
    #[inline(always)]
    unsafe fn store<S: Simd>(&self, task: &Task, parts: Parts, n_rows: usize, d: usize) {
        let head_dim = self.shape.head_dim;
        for r in 0..n_rows {
            // SAFETY: row r of the task.
            unsafe {
                let (from, sum) = (parts.out.add(r * d), *parts.row_sum.add(r));
                if let Some(first) = task.partial {
                    let to = self.partial.get().add((first + r) * partial_len(head_dim));
                    std::ptr::copy_nonoverlapping(from, to, head_dim);
                    to.add(head_dim).write(*parts.row_max.add(r));
                    to.add(head_dim + 1).write(sum);
                    continue;
                }
                let to = self.out.get().add(self.row(task.kv_head, task.tokens.start, r));
                let factor = if sum == 0.0 { 0.0 } else { 1.0 / sum };
                for i in 0..head_dim {
                    to.add(i).write(*from.add(i) * factor);
                }
                if self.pages.layout.kv.v.rotated {
                    kv::rotate(std::slice::from_raw_parts_mut(to, head_dim));
                }
            }
        }
    }
}

/// Slots that a task weighs together.
pub(super) struct Step {
    pub(super) slots: Range<usize>,
    /// Least and greatest position.
    pub(super) bounds: [u32; 2],
    pub(super) meets: Meets,
    /// The queries of these and the following slots are not there yet.
    pub(super) loads_queries: bool,
}

/// What queries are rotated for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Meets {
    /// The sinks of a sequence that rolls, right in front of its window.
    Sinks,
    /// Slots at their own positions.
    Window,
}

/// How much of a tile some rows see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum View {
    Nothing,
    Some,
    All,
}

/// Which slots of a tile count.
#[derive(Clone, Copy)]
pub(super) struct Mask<'a> {
    /// Positions of the slots in use.
    pub(super) slots: &'a [u32],
    /// Every slot counts for every row.
    pub(super) is_full: bool,
}

#[inline(always)]
fn min_max(positions: &[u32]) -> (u32, u32) {
    positions.iter().fold((u32::MAX, 0), |(min, max), &p| (min.min(p), max.max(p)))
}

/// Turns a row of scores into weights, in place, and updates its maximum. Returns the exponent of the
/// factor by which what the row has gathered so far shrinks, and the sum of the weights.
#[inline(always)]
pub(super) unsafe fn weigh<S: Simd, D: Dot>(
    scores: *mut f32,
    mask: Mask<'_>,
    (first, last): (u32, u32),
    row_max: &mut f32,
) -> (f32, f32) {
    // SAFETY: a row of scores has TILE elements.
    unsafe {
        if !mask.is_full {
            let (used, unused) =
                std::slice::from_raw_parts_mut(scores, TILE).split_at_mut(mask.slots.len());
            for (score, &slot) in used.iter_mut().zip(mask.slots) {
                let sees = (slot >= first) & (slot <= last);
                *score = if sees { *score } else { f32::NEG_INFINITY };
            }
            unused.fill(f32::NEG_INFINITY);
        }
        let mut largest = S::load(scores);
        for i in (S::LANES..TILE).step_by(S::LANES) {
            largest = S::max(largest, S::load(scores.add(i)));
        }
        let old = *row_max;
        let new = old.max(S::largest(largest));
        *row_max = new;
        // A row that has seen nothing yet: all exponents are minus infinity, all weights 0.
        let base = if new == f32::NEG_INFINITY { 0.0 } else { new };
        let mut sum = S::splat(0.0);
        for i in (0..TILE).step_by(S::LANES) {
            let p = exp2::<S>(S::sub(S::load(scores.add(i)), S::splat(base)));
            sum = S::add(sum, p);
            S::store(scores.add(i), p);
        }
        if D::PAIRS {
            to_pairs(scores, scores, TILE);
        }
        (old - base, S::sum(sum))
    }
}

/// `n` columns of two slots as pairs.
#[inline(always)]
unsafe fn pair_rows(
    even: (Format, *const u8),
    odd: Option<(Format, *const u8)>,
    to: *mut f32,
    n: usize,
) {
    // SAFETY: n elements behind each pointer.
    unsafe {
        match (even, odd) {
            ((Format::Bf16, even), Some((Format::Bf16, odd))) => {
                let (even, odd) = (even.cast::<u16>(), odd.cast::<u16>());
                for i in 0..n {
                    to.add(i)
                        .write(pair(even.add(i).read_unaligned(), odd.add(i).read_unaligned()));
                }
            }
            _ => {
                let bits = |(format, p): (Format, *const u8), i: usize| {
                    bf16_bits(format.read(p.add(i * format.bytes())))
                };
                for i in 0..n {
                    to.add(i).write(pair(bits(even, i), odd.map_or(0, |odd| bits(odd, i))));
                }
            }
        }
    }
}
