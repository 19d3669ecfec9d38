//! A layer on a backend: random weights, sequences over a pool of pages, and the comparison of every op
//! with the reference. Generic over the backend; `tests/ops.rs` says on which ones it runs.

mod targets;

use std::slice::from_ref;

use loris::backend::{Backend, Batch, LayerWeights, MassRows, Phase, RowUse, Seq, Slots, Table};
use loris::read::Rule;
use loris::store::{
    AttentionShape, Coding, Held, KvFormat, KvFormats, PageId, PageLayout, Seal, Side, When,
};
use loris_loader::{Dtype, TensorView, Weights};

use super::reference::{self, compare, compare_to};
use targets::{Bounds, Numbers};
pub(crate) use targets::{Target, assert_refused, cpus, cudas};

/// Random numbers that are the same everywhere (splitmix64).
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in -1..1.
    pub(crate) fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }
}

/// A tensor as the backend gets it and as the reference sees it.
pub(crate) struct Both {
    pub(crate) view: TensorView,
    pub(crate) values: Vec<f64>,
}

pub(crate) fn tensor(
    random: &mut Random,
    dtype: Dtype,
    shape: &[usize],
    scale: f32,
    offset: f32,
) -> Both {
    let n: usize = shape.iter().product();
    let mut bytes = Vec::new();
    let mut values = Vec::new();
    for _ in 0..n {
        let x = random.unit() * scale + offset;
        match dtype {
            Dtype::BF16 => {
                let x = half::bf16::from_f32(x);
                bytes.extend(x.to_le_bytes());
                values.push(x.to_f64());
            }
            Dtype::F16 => {
                let x = half::f16::from_f32(x);
                bytes.extend(x.to_le_bytes());
                values.push(x.to_f64());
            }
            _ => {
                bytes.extend(x.to_le_bytes());
                values.push(f64::from(x));
            }
        }
    }
    let weights = Weights::from_memory(vec![("t".into(), dtype, shape.to_vec(), bytes)]).unwrap();
    Both { view: weights.get("t").unwrap(), values }
}

/// What varies between worlds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Case {
    pub(crate) shape: AttentionShape,
    pub(crate) hidden: usize,
    pub(crate) ffn: usize,
    pub(crate) vocab: usize,
    pub(crate) dtype: Dtype,
    pub(crate) kv: KvFormats,
    pub(crate) page_len: usize,
    pub(crate) window: Option<usize>,
    pub(crate) rule: Rule,
    pub(crate) extras: bool,
}

pub(crate) const BF16: KvFormats = KvFormats { k: KvFormat::BF16, v: KvFormat::BF16 };
pub(crate) const F32: KvFormats = KvFormats { k: KvFormat::F32, v: KvFormat::F32 };

pub(crate) const BASE: Case = Case {
    shape: AttentionShape { n_q_heads: 6, n_kv_heads: 2, head_dim: 32 },
    hidden: 96,
    ffn: 160,
    vocab: 75,
    dtype: Dtype::BF16,
    kv: BF16,
    page_len: 64,
    window: None,
    rule: Rule::ALL,
    extras: false,
};

pub(crate) const EPS: f32 = 1e-5;
pub(crate) const N_LAYERS: usize = 2;
pub(crate) const LAYER: usize = 1;

/// Weights of the one layer, in the order of `LayerWeights`, then embedding, final norm and head.
pub(crate) struct Model {
    pub(crate) case: Case,
    pub(crate) attn_norm: Both,
    pub(crate) qkv: [Both; 3],
    pub(crate) bias: [Both; 3],
    pub(crate) qk_norm: [Both; 2],
    pub(crate) o: Both,
    pub(crate) mlp_norm: Both,
    pub(crate) gate: Both,
    pub(crate) up: Both,
    pub(crate) down: Both,
    pub(crate) embed: Both,
    pub(crate) norm: Both,
    pub(crate) head: Both,
    pub(crate) inv_freq: Vec<f64>,
}

impl Model {
    pub(crate) fn new(case: Case) -> Self {
        let r = &mut Random(7);
        let AttentionShape { n_q_heads, n_kv_heads, head_dim } = case.shape;
        let (q, kv, h) = (n_q_heads * head_dim, n_kv_heads * head_dim, case.hidden);
        let mut matrix =
            |n: usize, k: usize| tensor(r, case.dtype, &[n, k], 2.5 / (k as f32).sqrt(), 0.0);
        let qkv = [matrix(q, h), matrix(kv, h), matrix(kv, h)];
        let (o, gate, up) = (matrix(h, q), matrix(case.ffn, h), matrix(case.ffn, h));
        let (down, head, embed) =
            (matrix(h, case.ffn), matrix(case.vocab, h), matrix(case.vocab, h));
        let mut vector = |n: usize, offset| tensor(r, case.dtype, &[n], 0.5, offset);
        Self {
            case,
            attn_norm: vector(h, 1.0),
            qkv,
            bias: [vector(q, 0.0), vector(kv, 0.0), vector(kv, 0.0)],
            qk_norm: [vector(head_dim, 1.0), vector(head_dim, 1.0)],
            o,
            mlp_norm: vector(h, 1.0),
            gate,
            up,
            down,
            embed,
            norm: vector(h, 1.0),
            head,
            inv_freq: (0..head_dim / 2).map(|i| 0.8_f64.powi(i as i32)).collect(),
        }
    }

    pub(crate) fn rope_scale(&self) -> f64 {
        if self.case.extras { 1.2 } else { 1.0 }
    }
}

/// A model and a pool on a backend.
pub(crate) struct World<'a, B: Backend> {
    pub(crate) model: &'a Model,
    pub(crate) target: &'a str,
    pub(crate) backend: B,
    pub(crate) numbers: Numbers,
    pub(crate) weights: LayerWeights<B::Matrix, B::Vector>,
    pub(crate) embed: B::Matrix,
    pub(crate) norm: B::Vector,
    pub(crate) head: B::Matrix,
    pub(crate) pages: B::Pages,
    pub(crate) layout: PageLayout,
    pub(crate) next_page: PageId,
}

/// One sequence: its future tokens and positions, and its pages so far.
#[derive(Clone)]
pub(crate) struct Sequence {
    pub(crate) tokens: Vec<u32>,
    pub(crate) positions: Vec<u32>,
    pub(crate) len: usize,
    pub(crate) table: Vec<PageId>,
    /// Slots behind the first page that were given back.
    pub(crate) n_gone: usize,
    pub(crate) n_sealed: usize,
}

impl Sequence {
    /// `n` tokens that depend on `seed` alone, at the positions that `position` gives.
    pub(crate) fn new(seed: u64, n: usize, position: impl Fn(usize) -> u32) -> Self {
        let mut random = Random(seed);
        let tokens = (0..n).map(|_| (random.next() % BASE.vocab as u64) as u32).collect();
        Self {
            tokens,
            positions: (0..n).map(position).collect(),
            len: 0,
            table: Vec::new(),
            n_gone: 0,
            n_sealed: 0,
        }
    }
}

/// Everything that the ops gave for one row.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Row {
    pub(crate) q: Vec<f32>,
    pub(crate) attn: Vec<f32>,
    pub(crate) x1: Vec<f32>,
    pub(crate) h: Vec<f32>,
    pub(crate) x2: Vec<f32>,
    pub(crate) logits: Vec<f32>,
}

impl Row {
    pub(crate) fn bits(&self) -> Vec<u32> {
        let parts = [&self.q, &self.attn, &self.x1, &self.h, &self.x2, &self.logits];
        parts.into_iter().flatten().map(|x| x.to_bits()).collect()
    }
}

/// Pages of a pool: where they are sealed, many hold few tokens.
fn n_pages(case: &Case) -> usize {
    if case.kv.are_sealed() { 1_600 } else { 400 }
}

impl<'a, B: Backend> World<'a, B> {
    pub(crate) fn new(model: &'a Model, target: &'a Target<B>, threads: usize) -> Self {
        let (mut backend, case) = ((target.make)(threads), model.case);
        let b = &mut backend;
        let AttentionShape { n_kv_heads, head_dim, .. } = case.shape;
        let layout = PageLayout::new(n_kv_heads, case.page_len, head_dim, case.kv);
        let mut pages = b.pages(layout, n_pages(&case)).unwrap();
        for page in 0..n_pages(&case) as PageId {
            b.write_page(&mut pages, page, &vec![0xff; layout.bytes()]).unwrap();
        }
        let weights = LayerWeights {
            attn_norm: b.vector(from_ref(&model.attn_norm.view)).unwrap(),
            q: b.matrix(&model.qkv[0].view).unwrap(),
            k: b.matrix(&model.qkv[1].view).unwrap(),
            v: b.matrix(&model.qkv[2].view).unwrap(),
            qkv_bias: case
                .extras
                .then(|| b.vector(&model.bias.each_ref().map(|t| t.view.clone())).unwrap()),
            qk_norm: case
                .extras
                .then(|| model.qk_norm.each_ref().map(|t| b.vector(from_ref(&t.view)).unwrap())),
            o: b.matrix(&model.o.view).unwrap(),
            mlp_norm: b.vector(from_ref(&model.mlp_norm.view)).unwrap(),
            gate: b.matrix(&model.gate.view).unwrap(),
            up: b.matrix(&model.up.view).unwrap(),
            down: b.matrix(&model.down.view).unwrap(),
        };
        Self {
            model,
            target: &target.name,
            numbers: target.numbers,
            weights,
            embed: b.matrix(&model.embed.view).unwrap(),
            norm: b.vector(from_ref(&model.norm.view)).unwrap(),
            head: b.matrix(&model.head.view).unwrap(),
            pages,
            layout,
            next_page: 0,
            backend,
        }
    }

    /// Pages for `n` more tokens, out of order and with gaps: page ids must not matter.
    pub(crate) fn grow(&mut self, seq: &mut Sequence, n: usize) {
        let needed = self.layout_of(seq.n_sealed).n_pages(seq.len + n) * N_LAYERS;
        while seq.table.len() < needed {
            let page = self.take_page();
            seq.table.push(page);
        }
    }

    fn take_page(&mut self) -> PageId {
        let n_pages = n_pages(&self.model.case) as PageId;
        self.next_page += 1;
        assert!(self.next_page < n_pages, "the test needs a larger pool");
        ((self.next_page - 1) * 7 + 3) % n_pages
    }

    fn layout_of(&self, n_sealed: usize) -> PageLayout {
        self.layout.with_sealed(n_sealed)
    }

    /// Seals the pages that are due before the next row, and compares what they hold then with what it was made from.
    fn seal(&mut self, seq: &mut Sequence) {
        while self.layout.kv.are_sealed() && seq.n_sealed < self.layout.n_due(seq.len) {
            let layout = self.layout_of(seq.n_sealed);
            let slots = layout.n_before_tail()..layout.n_before_tail() + layout.page_len;
            let columns = 1 + seq.n_sealed..1 + seq.n_sealed + layout.n_to_seal();
            let before = self.slots(seq, LAYER);
            let mut seals = Vec::new();
            for layer in 0..N_LAYERS {
                let from = columns.clone().map(|c| seq.table[c * N_LAYERS + layer]).collect();
                seals.push(Seal { from, to: self.take_page() });
            }
            self.backend.seal_pages(&mut self.pages, &seals).unwrap();
            let column = seals.iter().map(|seal| seal.to);
            seq.table.splice(columns.start * N_LAYERS..columns.end * N_LAYERS, column);
            seq.n_sealed += 1;
            let after = self.slots(seq, LAYER);
            for (slot, (before, after)) in before.iter().zip(&after).enumerate() {
                assert!(before == after || slots.contains(&slot), "slot {slot} is another's");
            }
            self.check_sealed(&before[slots.clone()], &after[slots]);
        }
    }

    /// Numbers of a sealed page, `[slot][side][kv head]`, beside those that they stand for.
    fn check_sealed(&self, before: &[[Vec<Vec<f64>>; 2]], after: &[[Vec<Vec<f64>>; 2]]) {
        let d = self.layout.head_dim;
        for (side, held) in [self.layout.kv.k, self.layout.kv.v].into_iter().enumerate() {
            let Held { coding, when, .. } = held;
            for head in 0..self.layout.n_kv_heads {
                let number =
                    |of: &[[Vec<Vec<f64>>; 2]], slot: usize, i: usize| of[slot][side][head][i];
                let group = if d.is_multiple_of(64) { 64 } else { 32 };
                // Numbers that share a scale and a zero.
                let series: Vec<Vec<(usize, usize)>> = match coding.is_by_channel() {
                    true => {
                        (0..d).map(|i| (0..before.len()).map(|slot| (slot, i)).collect()).collect()
                    }
                    false => (0..before.len())
                        .flat_map(|slot| {
                            (0..d).step_by(group).map(move |first| {
                                (first..first + group).map(|i| (slot, i)).collect()
                            })
                        })
                        .collect(),
                };
                for series in series {
                    let of = |of| {
                        series.iter().map(|&(slot, i)| number(of, slot, i)).collect::<Vec<f64>>()
                    };
                    let what = format!("{} {coding} side {side} head {head}", self.target);
                    match coding {
                        _ if when == When::Sealed => {
                            let most = f64::from((1 << coding.bits()) - 1);
                            check_series(&of(before), &of(after), most, &what);
                        }
                        Coding::BF16 => assert_eq!(of(before), of(after), "{what}"),
                        _ => {
                            let largest =
                                of(before).iter().fold(0.0_f64, |max, x| max.max(x.abs()));
                            for (x, y) in of(before).iter().zip(of(after)) {
                                assert!((x - y).abs() <= largest / 25.0, "{what}: {x} {y}");
                            }
                        }
                    }
                }
            }
        }
    }

    /// Advances each sequence by some tokens in one batch. Returns the rows in batch order.
    pub(crate) fn forward(
        &mut self,
        phase: Phase,
        seqs: &mut [(&mut Sequence, usize)],
        check: bool,
    ) -> Vec<Row> {
        let model = self.model;
        let case = model.case;
        for (seq, n) in seqs.iter_mut() {
            self.seal(seq);
            self.grow(seq, *n);
        }
        let (mut tokens, mut positions, mut parts) = (Vec::new(), Vec::new(), Vec::new());
        let slots_of = |(seq, n): &(&mut Sequence, usize)| {
            Slots::new(&self.layout, seq.n_gone, seq.positions[..seq.len + n].to_vec())
        };
        let slots: Vec<Slots> = seqs.iter().map(slots_of).collect();
        for ((seq, n), slots) in seqs.iter().zip(&slots) {
            let new = seq.len..seq.len + n;
            parts.push(Seq {
                rows: tokens.len()..tokens.len() + n,
                kv_start: seq.len,
                slots,
                table: Table { body: &seq.table, tail: &[], n_layers: N_LAYERS },
                inv_freq: &model.inv_freq,
                rope_scale: model.rope_scale(),
                n_sealed: seq.n_sealed,
                rule: case.rule,
            });
            tokens.extend(&seq.tokens[new.clone()]);
            positions.extend(&seq.positions[new]);
        }
        let n = tokens.len();
        let batch = Batch { phase, tokens, positions, seqs: parts, logit_rows: (0..n).collect() };
        let b = &mut self.backend;
        let width = case.shape.n_q_heads * case.shape.head_dim;
        let mut x = b.rows(n, case.hidden, RowUse::Residual).unwrap();
        let mut q = b.rows(n, width, RowUse::Operand).unwrap();
        let mut attn = b.rows(n, width, RowUse::Operand).unwrap();
        let mut h = b.rows(n, case.ffn, RowUse::Operand).unwrap();
        let mut logits = b.rows(n, case.vocab, RowUse::Logits).unwrap();
        let (w, pages) = (&self.weights, &mut self.pages);
        b.begin(&batch, case.shape).unwrap();
        b.embed(&self.embed, &batch, &mut x).unwrap();
        let x0 = read(b, &x, n, case.hidden);
        b.norm_qkv_rope_append(w, EPS, &batch, LAYER, &x, &mut q, pages).unwrap();
        let q_rows = read(b, &q, n, width);
        b.attention(&batch, LAYER, case.window, &q, pages, &mut attn).unwrap();
        let attn_rows = read(b, &attn, n, width);
        let mut mass = Vec::new();
        let is_wanted = check && !case.rule.rolls();
        for (seq_idx, seq) in batch.seqs.iter().enumerate().filter(|_| is_wanted) {
            let n_rows = seq.rows.len().min(3);
            let of = MassRows { seq_idx, first_row: seq.rows.end - n_rows, n_rows };
            let mut of_slots = Vec::new();
            b.attention_mass(&batch, of, LAYER, case.window, &q, pages, &mut of_slots).unwrap();
            of_slots.iter_mut().for_each(|sum| *sum /= n_rows as f32);
            mass.push(of_slots);
        }
        b.linear_residual(&w.o, &batch, &attn, &mut x).unwrap();
        let x1 = read(b, &x, n, case.hidden);
        b.norm_gate_up_silu(w, EPS, &batch, &x, &mut h).unwrap();
        let h_rows = read(b, &h, n, case.ffn);
        b.linear_residual(&w.down, &batch, &h, &mut x).unwrap();
        let x2 = read(b, &x, n, case.hidden);
        b.norm_lm_head(&self.norm, EPS, &self.head, &batch, &x, &mut logits).unwrap();
        let logits = read(b, &logits, n, case.vocab);
        let rows: Vec<Row> = (0..n)
            .map(|r| Row {
                q: q_rows[r].clone(),
                attn: attn_rows[r].clone(),
                x1: x1[r].clone(),
                h: h_rows[r].clone(),
                x2: x2[r].clone(),
                logits: logits[r].clone(),
            })
            .collect();
        if check {
            self.check(&batch, &x0, &rows);
            self.check_mass(&batch, &rows, &mass);
        }
        drop(batch);
        for (seq, n) in seqs.iter_mut() {
            seq.len += *n;
        }
        rows
    }

    /// A head of K or V of every slot in use, as stored: rotated, where the format says so.
    fn as_stored(&mut self, seq: &Seq<'_>, side: Side, kv_head: usize) -> Vec<Stored> {
        let layout = self.layout_of(seq.n_sealed);
        let mut bytes = vec![0; layout.bytes()];
        let mut slots = Vec::new();
        for slot in 0..seq.kv_len() {
            let (page_idx, slot) = layout.place(slot);
            let (page, form) = (seq.page(page_idx, LAYER), layout.form(page_idx));
            if slot == 0 {
                self.backend.read_page(&self.pages, page, &mut bytes).unwrap();
            }
            let codes = &bytes[form.codes(side, kv_head, slot)..];
            let params = &bytes[form.params(side, kv_head, slot)..];
            slots.push(stored(form.coding(side), codes, params, layout.head_dim));
        }
        slots
    }

    /// The same as it was before it was rotated, and as the target multiplies with it: CUDA decodes keys by channel to
    /// bf16, before that to f32.
    pub(crate) fn stored(&mut self, seq: &Seq<'_>, side: Side, kv_head: usize) -> Vec<Vec<f64>> {
        let held = self.layout.kv.of(side);
        let is_rounded = self.numbers == Numbers::Bf16 && held.coding.is_by_channel();
        let rounded = |x: f64| if is_rounded { half::bf16::from_f32(x as f32).to_f64() } else { x };
        let slots = self.as_stored(seq, side, kv_head).into_iter();
        let plain = slots.map(|slot| plain(&slot.values, held.rotated));
        plain.map(|head| head.into_iter().map(rounded).collect()).collect()
    }

    /// What all slots of a layer hold, `[slot][side][kv head]`.
    pub(crate) fn slots(&mut self, seq: &Sequence, layer: usize) -> Vec<[Vec<Vec<f64>>; 2]> {
        let d = self.model.case.shape.head_dim;
        let layout = self.layout_of(seq.n_sealed);
        let mut bytes = vec![0; layout.bytes()];
        let mut slots = Vec::new();
        for slot in 0..seq.len {
            let (page_idx, place) = layout.place(slot);
            if place == 0 {
                let page = seq.table[page_idx * N_LAYERS + layer];
                self.backend.read_page(&self.pages, page, &mut bytes).unwrap();
            }
            let form = layout.form(page_idx);
            let head = |side, head| {
                let (codes, params) =
                    (form.codes(side, head, place), form.params(side, head, place));
                stored(form.coding(side), &bytes[codes..], &bytes[params..], d).values
            };
            slots.push(
                [Side::K, Side::V]
                    .map(|side| (0..self.layout.n_kv_heads).map(|h| head(side, h)).collect()),
            );
        }
        slots
    }

    /// Compares what the ops gave with the reference.
    pub(crate) fn check(&mut self, batch: &Batch<'_>, x0: &[Vec<f32>], rows: &[Row]) {
        let (model, case) = (self.model, self.model.case);
        let bounds = self.numbers.bounds(batch.phase, &case);
        let fail = |op: &str, row: usize| format!("{} {op} row {row} of {case:?}", self.target);
        let eps = f64::from(EPS);
        for (r, row) in rows.iter().enumerate() {
            let token = batch.tokens[r] as usize;
            let embedded = &model.embed.values[token * case.hidden..][..case.hidden];
            compare(&x0[r], embedded, 0.0, bounds.embed, &fail("embed", r));
            let mut x1 = reference::matvec(&model.o.values, &f64s(&row.attn));
            add(&mut x1, &x0[r]);
            compare(&row.x1, &x1, bounds.linear, 0.0, &fail("linear_residual", r));
            let normed = reference::rms_norm(&f64s(&row.x1), &model.mlp_norm.values, eps);
            let gate = reference::matvec(&model.gate.values, &normed);
            let up = reference::matvec(&model.up.values, &normed);
            let h: Vec<f64> = gate.iter().zip(&up).map(|(g, u)| reference::silu(*g) * u).collect();
            compare(&row.h, &h, bounds.normed, bounds.rounding, &fail("norm_gate_up_silu", r));
            let mut x2 = reference::matvec(&model.down.values, &f64s(&row.h));
            add(&mut x2, &row.x1);
            compare(&row.x2, &x2, bounds.linear, 0.0, &fail("linear_residual (down)", r));
            let normed = reference::rms_norm(&f64s(&row.x2), &model.norm.values, eps);
            let logits = reference::matvec(&model.head.values, &normed);
            compare(&row.logits, &logits, bounds.head, 0.0, &fail("norm_lm_head", r));
        }
        for seq in &batch.seqs {
            self.check_qkv(seq, batch, x0, rows, bounds);
            self.check_attention(seq, batch, rows, bounds);
        }
    }

    pub(crate) fn check_qkv(
        &mut self,
        seq: &Seq<'_>,
        batch: &Batch<'_>,
        x0: &[Vec<f32>],
        rows: &[Row],
        bounds: Bounds,
    ) {
        let (model, case) = (self.model, self.model.case);
        let d = case.shape.head_dim;
        let stored = [Side::K, Side::V].map(|side| {
            let heads = 0..case.shape.n_kv_heads;
            heads.map(|head| self.as_stored(seq, side, head)).collect::<Vec<_>>()
        });
        for r in seq.rows.clone() {
            let normed = reference::rms_norm(&f64s(&x0[r]), &model.attn_norm.values, EPS.into());
            for kind in 0..3 {
                let mut out = reference::matvec(&model.qkv[kind].values, &normed);
                if case.extras {
                    out.iter_mut().zip(&model.bias[kind].values).for_each(|(o, b)| *o += b);
                }
                let finish = |head: &[f64]| match kind {
                    2 => head.to_vec(),
                    _ => {
                        let norm = |h: &[f64]| {
                            reference::rms_norm(h, &model.qk_norm[kind].values, EPS.into())
                        };
                        let head = if case.extras { norm(head) } else { head.to_vec() };
                        let position = batch.positions[r];
                        reference::rotate(&head, position, &model.inv_freq, model.rope_scale())
                    }
                };
                let is_rotated = match kind {
                    2 => case.kv.v.row().v.rotated,
                    _ => case.kv.k.row().k.rotated,
                };
                let finish = |head: &[f64]| plain(&finish(head), is_rotated);
                let want: Vec<f64> = out.chunks_exact(d).flat_map(finish).collect();
                let what =
                    format!("{} {} of row {r}, {case:?}", self.target, ["q", "k", "v"][kind]);
                if kind == 0 {
                    compare(&rows[r].q, &want, bounds.normed, bounds.rounding, &what);
                    continue;
                }
                let slot = seq.kv_start + r - seq.rows.start;
                let largest = want.iter().fold(0.0_f64, |max, x| max.max(x.abs()));
                for (head, want) in stored[kind - 1].iter().zip(want.chunks_exact(d)) {
                    let Stored { values, step, rounding } = &head[slot];
                    let got: Vec<f32> = values.iter().map(|&x| x as f32).collect();
                    let allowed = step / 2.0 + bounds.normed * largest;
                    compare_to(&got, want, allowed, *rounding, &what);
                }
            }
        }
    }

    pub(crate) fn check_attention(
        &mut self,
        seq: &Seq<'_>,
        batch: &Batch<'_>,
        rows: &[Row],
        bounds: Bounds,
    ) {
        let AttentionShape { n_q_heads, head_dim: d, .. } = self.model.case.shape;
        let case = self.model.case;
        for head in 0..n_q_heads {
            let kv_head = head / case.shape.group_size();
            let keys = self.stored(seq, Side::K, kv_head);
            let values = self.stored(seq, Side::V, kv_head);
            for r in seq.rows.clone() {
                let position = batch.positions[r];
                let visible = visible(seq, position, case.window);
                // Sinks that stand right in front of the window are so much later than they were.
                let Rule { sinks, window } = case.rule;
                let behind = (position + 1).saturating_sub(sinks.saturating_add(window));
                let place = |slot: usize| match seq.positions()[slot] < sinks {
                    true => behind,
                    false => 0,
                };
                let key = |&slot: &usize| {
                    reference::rotate(&keys[slot], place(slot), &self.model.inv_freq, 1.0)
                };
                let keys: Vec<Vec<f64>> = visible.iter().map(key).collect();
                let k: Vec<&[f64]> = keys.iter().map(|k| &**k).collect();
                let v: Vec<&[f64]> = visible.iter().map(|&s| &*values[s]).collect();
                let q = plain(&f64s(&rows[r].q[head * d..][..d]), case.kv.k.row().k.rotated);
                let want = reference::attend(&q, &k, &v);
                let what = format!("{} attention head {head} row {r} of {case:?}", self.target);
                // The result is an average of values: their magnitude is the scale.
                let scale = v.iter().flat_map(|v| v.iter()).fold(0.0_f64, |m, x| m.max(x.abs()));
                let got = &rows[r].attn[head * d..][..d];
                compare_to(got, &want, bounds.attention * scale, bounds.rounding, &what);
            }
        }
    }

    /// The last rows of each sequence, up to three, and what its slots get of their attention.
    pub(crate) fn check_mass(&mut self, batch: &Batch<'_>, rows: &[Row], mass: &[Vec<f32>]) {
        let case = self.model.case;
        let AttentionShape { n_q_heads, head_dim: d, .. } = case.shape;
        for (seq, got) in batch.seqs.iter().zip(mass) {
            let mut want = vec![0.0; seq.kv_len()];
            let mass_rows = seq.rows.end - seq.rows.len().min(3)..seq.rows.end;
            for head in 0..n_q_heads {
                let keys = self.stored(seq, Side::K, head / case.shape.group_size());
                for r in mass_rows.clone() {
                    let visible = visible(seq, batch.positions[r], case.window);
                    let q = plain(&f64s(&rows[r].q[head * d..][..d]), case.kv.k.row().k.rotated);
                    let logit = |&slot: &usize| reference::dot(&q, &keys[slot]) / (d as f64).sqrt();
                    let logits: Vec<f64> = visible.iter().map(logit).collect();
                    let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                    let sum: f64 = logits.iter().map(|s| (s - max).exp()).sum();
                    for (slot, s) in visible.into_iter().zip(logits) {
                        want[slot] += (s - max).exp() / sum / (n_q_heads * mass_rows.len()) as f64;
                    }
                }
            }
            let what = format!("{} mass of rows {mass_rows:?} of {case:?}", self.target);
            compare_to(got, &want, 2e-5, 0.0, &what);
        }
    }
}

/// A head of a slot.
struct Stored {
    values: Vec<f64>,
    /// Codes are so far apart at most.
    step: f64,
    /// Besides, each number is off by this of itself.
    rounding: f64,
}

/// What the bytes of a head stand for, by the definition of the format.
fn stored(coding: Coding, codes: &[u8], params: &[u8], d: usize) -> Stored {
    let f16 = |i: usize| half::f16::from_le_bytes([params[2 * i], params[2 * i + 1]]).to_f64();
    let bf16 = |i: usize| half::bf16::from_le_bytes([codes[2 * i], codes[2 * i + 1]]).to_f64();
    let f32 = |i: usize| f32::from_le_bytes(codes[4 * i..4 * i + 4].try_into().unwrap());
    let e4m3 = |code: u8| {
        let (exponent, mantissa) = (i32::from(code >> 3 & 15), f64::from(code & 7) / 8.0);
        let magnitude = match exponent {
            0 => mantissa / 64.0,
            _ => (1.0 + mantissa) * 2_f64.powi(exponent - 7),
        };
        if code & 0x80 == 0 { magnitude } else { -magnitude }
    };
    let group = if d.is_multiple_of(64) { 64 } else { 32 };
    let u4 = |i: usize| codes[i / 32 * 16 + i % 16] >> (i % 32 / 16 * 4) & 15;
    let u2 = |i: usize| codes[i / 64 * 16 + i % 16] >> (i % 64 / 16 * 2) & 3;
    let of = |value: &dyn Fn(usize) -> f64| (0..d).map(value).collect::<Vec<f64>>();
    // Scales are rounded to f16, 2^-12 of the largest number with 127 and 448 steps, of the range with 15.
    match coding {
        Coding::BF16 => Stored { values: of(&bf16), step: 0.0, rounding: 1.0 / 256.0 },
        Coding::F32 => Stored { values: of(&|i| f32(i).into()), step: 0.0, rounding: 0.0 },
        Coding::INT8 => {
            let values = of(&|i| f64::from(codes[i] as i8) * f16(0));
            Stored { values, step: f16(0) * 1.1, rounding: 0.0 }
        }
        Coding::FP8 => {
            let values = of(&|i| e4m3(codes[i]) * f16(0));
            Stored { values, step: f16(0) / 512.0, rounding: 1.01 / 16.0 }
        }
        Coding::INT4_CHANNEL | Coding::INT2_CHANNEL => {
            let code = |i| if coding.bits() == 2 { u2(i) } else { u4(i) };
            let values = of(&|i| f64::from(code(i)) * f16(i) + f16(d + i));
            Stored { values, step: f64::NAN, rounding: 0.0 }
        }
        Coding::INT2 => {
            let values = of(&|i| f64::from(u2(i)) * f16(i / group * 2) + f16(i / group * 2 + 1));
            Stored { values, step: f64::NAN, rounding: 0.0 }
        }
        _ => {
            let values = of(&|i| f64::from(u4(i)) * f16(i / group * 2) + f16(i / group * 2 + 1));
            let step = (0..d / group).map(|group| f16(2 * group)).fold(0.0, f64::max);
            Stored { values, step: step * 1.05, rounding: 0.0 }
        }
    }
}

/// What numbers that share a scale and a zero have become: of all ranges that are tried, the one that loses least, and in
/// that the nearest.
fn check_series(before: &[f64], after: &[f64], most: f64, what: &str) {
    let (min, max) = before.iter().fold((f64::MAX, f64::MIN), |(a, b), &x| (a.min(x), b.max(x)));
    let nearest = |share: f64, x: f64| {
        let (middle, half) = ((min + max) / 2.0, (max - min) / 2.0 * share);
        let step = (2.0 * half / most).max(1e-30);
        middle - half + step * ((x - middle + half) / step).round().clamp(0.0, most)
    };
    let loss = |share: f64| before.iter().map(|&x| (x - nearest(share, x)).powi(2)).sum::<f64>();
    let shares: &[f64] = if most == 3.0 { &[1.0, 0.9, 0.8, 0.7] } else { &[1.0] };
    let best = shares.iter().map(|&share| loss(share)).fold(f64::MAX, f64::min);
    let got: f64 = before.iter().zip(after).map(|(x, y)| (x - y).powi(2)).sum();
    // Scales and zeros are rounded to f16.
    let rounding = 2_f64.powi(-10) * min.abs().max(max.abs());
    let n = before.len() as f64;
    let allowed = (best.sqrt() + n.sqrt() * rounding).powi(2);
    assert!(got <= allowed, "{what}: loses {got}, not {best}");
    // As many numbers as there are codes.
    let mut different: Vec<f64> = after.to_vec();
    different.sort_by(f64::total_cmp);
    different.dedup();
    assert!(different.len() <= most as usize + 1, "{what}: {different:?}");
}

/// Rotated back, or as it is.
fn plain(head: &[f64], is_rotated: bool) -> Vec<f64> {
    if is_rotated { reference::hadamard(head) } else { head.to_vec() }
}

/// The slots that a row at `position` sees.
fn visible(seq: &Seq<'_>, position: u32, window: Option<usize>) -> Vec<usize> {
    let position = i64::from(position);
    let sees = |slot: &usize| {
        let at = i64::from(seq.positions()[*slot]);
        let is_near = at <= position && window.is_none_or(|w| at > position - w as i64);
        let (sinks, window) = (i64::from(seq.rule.sinks), i64::from(seq.rule.window));
        is_near && (position < sinks + window || at < sinks || at > position - window)
    };
    (0..seq.kv_len()).filter(sees).collect()
}

pub(crate) fn read<B: Backend>(
    backend: &mut B,
    rows: &B::Rows,
    n: usize,
    width: usize,
) -> Vec<Vec<f32>> {
    let mut out = vec![0.0; n * width];
    backend.read_rows(rows, 0, &mut out).unwrap();
    out.chunks_exact(width).map(<[f32]>::to_vec).collect()
}

pub(crate) fn f64s(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| x.into()).collect()
}

pub(crate) fn add(x: &mut [f64], y: &[f32]) {
    x.iter_mut().zip(y).for_each(|(x, &y)| *x += f64::from(y));
}
