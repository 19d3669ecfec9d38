//! Every backend op against the naive f64 reference, and bit-for-bit invariance of the results.
//!
//! One body, generic over a [`Target`], runs for every instruction set of the machine (bf16 products
//! included, emulated where the CPU lacks them). A *world* is one layer with random weights and some
//! sequences over a pool of pages in which everything that no token was written to is NaN.
//!
//! Bounds: a result of f32 kernels is compared at 1e-5 of the largest magnitude in its row (chains of some
//! hundred additions, each off by 2^-24). Where a backend multiplies in bf16 each factor is off by up to
//! 2^-9, which random signs keep near 2^-9 of the row: 1e-2 of the largest magnitude. Inputs of each op
//! are what the op before really gave, so errors do not add up.

#![allow(clippy::unwrap_used)]

mod reference;

use loris::backend::cpu::{CpuBackend, CpuOptions, Isa};
use loris::backend::{AttentionShape, Backend, Batch, LayerWeights, Phase, Seq};
use loris::cache::{KvFormat, PageId, PageLayout, Side};
use loris_loader::{Dtype, TensorView, Weights};

/// A backend under test.
struct Target<B> {
    name: String,
    make: Box<dyn Fn(usize) -> B>,
    /// Products of prefill with bf16 weights or pages are taken in bf16.
    multiplies_bf16: bool,
}

fn targets() -> Vec<Target<CpuBackend>> {
    let target = |isa: Isa| Target {
        name: format!("cpu {isa:?}"),
        make: Box::new(move |threads| {
            CpuBackend::new(CpuOptions { threads, isa: Some(isa) }).unwrap()
        }),
        multiplies_bf16: format!("{isa:?}").contains("Bf16"),
    };
    Isa::available().into_iter().map(target).collect()
}

/// Random numbers that are the same everywhere (splitmix64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in -1..1.
    fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }
}

/// A tensor as the backend gets it and as the reference sees it.
struct Both {
    view: TensorView,
    values: Vec<f64>,
}

fn tensor(random: &mut Random, dtype: Dtype, shape: &[usize], scale: f32, offset: f32) -> Both {
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
struct Case {
    shape: AttentionShape,
    hidden: usize,
    ffn: usize,
    vocab: usize,
    dtype: Dtype,
    kv: KvFormat,
    page_len: usize,
    window: Option<usize>,
    extras: bool,
}

const BASE: Case = Case {
    shape: AttentionShape { n_q_heads: 6, n_kv_heads: 2, head_dim: 32 },
    hidden: 96,
    ffn: 160,
    vocab: 75,
    dtype: Dtype::BF16,
    kv: KvFormat::Bf16,
    page_len: 64,
    window: None,
    extras: false,
};

const EPS: f32 = 1e-5;
const N_LAYERS: usize = 2;
const LAYER: usize = 1;

/// Weights of the one layer, in the order of `LayerWeights`, then embedding, final norm and head.
struct Model {
    case: Case,
    attn_norm: Both,
    qkv: [Both; 3],
    bias: [Both; 3],
    qk_norm: [Both; 2],
    o: Both,
    mlp_norm: Both,
    gate: Both,
    up: Both,
    down: Both,
    embed: Both,
    norm: Both,
    head: Both,
    inv_freq: Vec<f64>,
}

impl Model {
    fn new(case: Case) -> Self {
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

    fn rope_scale(&self) -> f64 {
        if self.case.extras { 1.2 } else { 1.0 }
    }
}

/// A model and a pool on a backend.
struct World<'a, B: Backend> {
    model: &'a Model,
    target: &'a str,
    backend: B,
    multiplies_bf16: bool,
    weights: LayerWeights<B::Matrix, B::Vector>,
    embed: B::Matrix,
    norm: B::Vector,
    head: B::Matrix,
    pages: B::Pages,
    layout: PageLayout,
    next_page: PageId,
}

/// One sequence: its future tokens and positions, and its pages so far.
#[derive(Clone)]
struct Sequence {
    tokens: Vec<u32>,
    positions: Vec<u32>,
    len: usize,
    table: Vec<PageId>,
}

impl Sequence {
    /// `n` tokens that depend on `seed` alone, at the positions that `position` gives.
    fn new(seed: u64, n: usize, position: impl Fn(usize) -> u32) -> Self {
        let mut random = Random(seed);
        let tokens = (0..n).map(|_| (random.next() % BASE.vocab as u64) as u32).collect();
        Self { tokens, positions: (0..n).map(position).collect(), len: 0, table: Vec::new() }
    }
}

/// Everything that the ops gave for one row.
#[derive(Clone, Debug, PartialEq)]
struct Row {
    q: Vec<f32>,
    attn: Vec<f32>,
    x1: Vec<f32>,
    h: Vec<f32>,
    x2: Vec<f32>,
    logits: Vec<f32>,
}

impl Row {
    fn bits(&self) -> Vec<u32> {
        let parts = [&self.q, &self.attn, &self.x1, &self.h, &self.x2, &self.logits];
        parts.into_iter().flatten().map(|x| x.to_bits()).collect()
    }
}

const N_PAGES: usize = 400;

impl<'a, B: Backend> World<'a, B> {
    fn new(model: &'a Model, target: &'a Target<B>, threads: usize) -> Self {
        let (mut backend, case) = ((target.make)(threads), model.case);
        let b = &mut backend;
        let AttentionShape { n_kv_heads, head_dim, .. } = case.shape;
        let layout = PageLayout { n_kv_heads, page_len: case.page_len, head_dim, format: case.kv };
        let mut pages = b.pages(layout, N_PAGES).unwrap();
        for page in 0..N_PAGES as PageId {
            b.write_page(&mut pages, page, &vec![0xff; layout.bytes()]).unwrap();
        }
        let weights = LayerWeights {
            attn_norm: b.vector(&model.attn_norm.view).unwrap(),
            q: b.matrix(&model.qkv[0].view).unwrap(),
            k: b.matrix(&model.qkv[1].view).unwrap(),
            v: b.matrix(&model.qkv[2].view).unwrap(),
            qkv_bias: case
                .extras
                .then(|| model.bias.each_ref().map(|t| b.vector(&t.view).unwrap())),
            qk_norm: case
                .extras
                .then(|| model.qk_norm.each_ref().map(|t| b.vector(&t.view).unwrap())),
            o: b.matrix(&model.o.view).unwrap(),
            mlp_norm: b.vector(&model.mlp_norm.view).unwrap(),
            gate: b.matrix(&model.gate.view).unwrap(),
            up: b.matrix(&model.up.view).unwrap(),
            down: b.matrix(&model.down.view).unwrap(),
        };
        Self {
            model,
            target: &target.name,
            multiplies_bf16: target.multiplies_bf16,
            weights,
            embed: b.matrix(&model.embed.view).unwrap(),
            norm: b.vector(&model.norm.view).unwrap(),
            head: b.matrix(&model.head.view).unwrap(),
            pages,
            layout,
            next_page: 0,
            backend,
        }
    }

    /// Pages for `n` more tokens, out of order and with gaps: page ids must not matter.
    fn grow(&mut self, seq: &mut Sequence, n: usize) {
        let needed = (seq.len + n).div_ceil(self.layout.page_len) * N_LAYERS;
        while seq.table.len() < needed {
            seq.table.push((self.next_page * 7 + 3) % N_PAGES as PageId);
            self.next_page += 1;
            assert!((self.next_page as usize) < N_PAGES, "the test needs a larger pool");
        }
    }

    /// Advances each sequence by some tokens in one batch. Returns the rows in batch order.
    fn forward(
        &mut self,
        phase: Phase,
        seqs: &mut [(&mut Sequence, usize)],
        check: bool,
    ) -> Vec<Row> {
        let model = self.model;
        let case = model.case;
        for (seq, n) in seqs.iter_mut() {
            self.grow(seq, *n);
        }
        let (mut tokens, mut positions, mut parts) = (Vec::new(), Vec::new(), Vec::new());
        for (seq, n) in seqs.iter() {
            let new = seq.len..seq.len + n;
            parts.push(Seq {
                rows: tokens.len()..tokens.len() + n,
                kv_start: seq.len,
                slot_positions: &seq.positions[..new.end],
                page_table: &seq.table,
                n_layers: N_LAYERS,
                inv_freq: &model.inv_freq,
                rope_scale: model.rope_scale(),
            });
            tokens.extend(&seq.tokens[new.clone()]);
            positions.extend(&seq.positions[new]);
        }
        let n = tokens.len();
        let batch = Batch { phase, tokens, positions, seqs: parts, logit_rows: (0..n).collect() };
        let b = &mut self.backend;
        let width = case.shape.n_q_heads * case.shape.head_dim;
        let mut x = b.rows(n, case.hidden).unwrap();
        let mut q = b.rows(n, width).unwrap();
        let mut attn = b.rows(n, width).unwrap();
        let mut h = b.rows(n, case.ffn).unwrap();
        let mut logits = b.rows(n, case.vocab).unwrap();
        let (w, pages) = (&self.weights, &mut self.pages);
        b.begin(&batch, case.shape).unwrap();
        b.embed(&self.embed, &batch, &mut x).unwrap();
        let x0 = read(b, &x, n, case.hidden);
        b.norm_qkv_rope_append(w, EPS, &batch, LAYER, &x, &mut q, pages).unwrap();
        let q_rows = read(b, &q, n, width);
        b.attention(&batch, LAYER, case.window, &q, pages, &mut attn).unwrap();
        let attn_rows = read(b, &attn, n, width);
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
        }
        drop(batch);
        for (seq, n) in seqs.iter_mut() {
            seq.len += *n;
        }
        rows
    }

    /// A head of K or V of every slot in use, as stored.
    fn stored(&mut self, seq: &Seq<'_>, side: Side, kv_head: usize) -> Vec<Vec<f64>> {
        let (layout, d) = (self.layout, self.layout.head_dim);
        let mut bytes = vec![0; layout.bytes()];
        let mut slots = Vec::new();
        for slot in 0..seq.kv_len() {
            let page = seq.page(slot / layout.page_len, LAYER);
            if slot % layout.page_len == 0 {
                self.backend.read_page(&self.pages, page, &mut bytes).unwrap();
            }
            let first = layout.head(side, kv_head) + slot % layout.page_len * d;
            let element = |i: usize| match layout.format {
                KvFormat::Bf16 => {
                    half::bf16::from_le_bytes([bytes[2 * i], bytes[2 * i + 1]]).to_f64()
                }
                KvFormat::F32 => {
                    f64::from(f32::from_le_bytes(bytes[4 * i..4 * i + 4].try_into().unwrap()))
                }
            };
            slots.push((first..first + d).map(element).collect());
        }
        slots
    }

    /// Compares what the ops gave with the reference.
    fn check(&mut self, batch: &Batch<'_>, x0: &[Vec<f32>], rows: &[Row]) {
        let (model, case) = (self.model, self.model.case);
        let in_bf16 = self.multiplies_bf16 && batch.phase == Phase::Prefill;
        let linear = if in_bf16 && case.dtype == Dtype::BF16 { 1e-2 } else { 1e-5 };
        let attention = if in_bf16 && case.kv == KvFormat::Bf16 { 1e-2 } else { 1e-5 };
        let fail = |op: &str, row: usize| format!("{} {op} row {row} of {case:?}", self.target);
        let eps = f64::from(EPS);
        for (r, row) in rows.iter().enumerate() {
            let token = batch.tokens[r] as usize;
            let embedded = &model.embed.values[token * case.hidden..][..case.hidden];
            assert_eq!(f64s(&x0[r]), embedded, "{}", fail("embed", r));
            let mut x1 = reference::matvec(&model.o.values, &f64s(&row.attn));
            add(&mut x1, &x0[r]);
            compare(&row.x1, &x1, linear, 0.0, &fail("linear_residual", r));
            let normed = reference::rms_norm(&f64s(&row.x1), &model.mlp_norm.values, eps);
            let gate = reference::matvec(&model.gate.values, &normed);
            let up = reference::matvec(&model.up.values, &normed);
            let h: Vec<f64> = gate.iter().zip(&up).map(|(g, u)| reference::silu(*g) * u).collect();
            compare(&row.h, &h, linear, 0.0, &fail("norm_gate_up_silu", r));
            let mut x2 = reference::matvec(&model.down.values, &f64s(&row.h));
            add(&mut x2, &row.x1);
            compare(&row.x2, &x2, linear, 0.0, &fail("linear_residual (down)", r));
            let normed = reference::rms_norm(&f64s(&row.x2), &model.norm.values, eps);
            let logits = reference::matvec(&model.head.values, &normed);
            compare(&row.logits, &logits, 1e-5, 0.0, &fail("norm_lm_head", r));
        }
        for seq in &batch.seqs {
            self.check_qkv(seq, batch, x0, rows, linear);
            self.check_attention(seq, batch, rows, attention);
        }
    }

    fn check_qkv(
        &mut self,
        seq: &Seq<'_>,
        batch: &Batch<'_>,
        x0: &[Vec<f32>],
        rows: &[Row],
        bound: f64,
    ) {
        let (model, case) = (self.model, self.model.case);
        let d = case.shape.head_dim;
        let stored = [Side::K, Side::V].map(|side| {
            (0..case.shape.n_kv_heads).map(|head| self.stored(seq, side, head)).collect::<Vec<_>>()
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
                let want: Vec<f64> = out.chunks_exact(d).flat_map(finish).collect();
                let what =
                    format!("{} {} of row {r}, {case:?}", self.target, ["q", "k", "v"][kind]);
                if kind == 0 {
                    compare(&rows[r].q, &want, bound, 0.0, &what);
                    continue;
                }
                let slot = seq.kv_start + r - seq.rows.start;
                let got: Vec<f32> =
                    stored[kind - 1].iter().flat_map(|h| &h[slot]).map(|&x| x as f32).collect();
                // The rounding to bf16 is half a unit in the last of 8 bits.
                let rounding = if case.kv == KvFormat::Bf16 { 1.0 / 256.0 } else { 0.0 };
                compare(&got, &want, bound, rounding, &what);
            }
        }
    }

    fn check_attention(&mut self, seq: &Seq<'_>, batch: &Batch<'_>, rows: &[Row], bound: f64) {
        let AttentionShape { n_q_heads, head_dim: d, .. } = self.model.case.shape;
        let case = self.model.case;
        for head in 0..n_q_heads {
            let kv_head = head / case.shape.group_size();
            let keys = self.stored(seq, Side::K, kv_head);
            let values = self.stored(seq, Side::V, kv_head);
            for r in seq.rows.clone() {
                let position = i64::from(batch.positions[r]);
                let sees = |slot: &usize| {
                    let at = i64::from(seq.slot_positions[*slot]);
                    at <= position && case.window.is_none_or(|w| at > position - w as i64)
                };
                let visible: Vec<usize> = (0..seq.kv_len()).filter(sees).collect();
                let k: Vec<&[f64]> = visible.iter().map(|&s| &*keys[s]).collect();
                let v: Vec<&[f64]> = visible.iter().map(|&s| &*values[s]).collect();
                let q = f64s(&rows[r].q[head * d..][..d]);
                let want = reference::attend(&q, &k, &v);
                let what = format!("{} attention head {head} row {r} of {case:?}", self.target);
                // The result is an average of values: their magnitude is the scale.
                let scale = v.iter().flat_map(|v| v.iter()).fold(0.0_f64, |m, x| m.max(x.abs()));
                let got = &rows[r].attn[head * d..][..d];
                compare_to(got, &want, bound * scale, 0.0, &what);
            }
        }
    }
}

fn read<B: Backend>(backend: &mut B, rows: &B::Rows, n: usize, width: usize) -> Vec<Vec<f32>> {
    let mut out = vec![0.0; n * width];
    backend.read_rows(rows, 0, &mut out).unwrap();
    out.chunks_exact(width).map(<[f32]>::to_vec).collect()
}

fn f64s(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| x.into()).collect()
}

fn add(x: &mut [f64], y: &[f32]) {
    x.iter_mut().zip(y).for_each(|(x, &y)| *x += f64::from(y));
}

/// `|got - want| <= bound * largest(want) + relative * |want|`
fn compare(got: &[f32], want: &[f64], bound: f64, relative: f64, what: &str) {
    let scale = want.iter().fold(0.0_f64, |m, x| m.max(x.abs()));
    compare_to(got, want, bound * scale, relative, what);
}

fn compare_to(got: &[f32], want: &[f64], absolute: f64, relative: f64, what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (&got, want)) in got.iter().zip(want).enumerate() {
        let (error, allowed) = ((f64::from(got) - want).abs(), absolute + relative * want.abs());
        assert!(error <= allowed, "{what}, element {i}: {got} for {want}, allowed {allowed:e}");
    }
}

/// The shapes, formats and models that every op is checked at.
fn cases() -> Vec<Case> {
    let shape =
        |n_q_heads, n_kv_heads, head_dim| AttentionShape { n_q_heads, n_kv_heads, head_dim };
    let mut cases = vec![
        BASE,
        Case { extras: true, ..BASE },
        Case { dtype: Dtype::F32, kv: KvFormat::F32, extras: true, ..BASE },
        Case { dtype: Dtype::F16, ..BASE },
        Case { window: Some(1), ..BASE },
        Case { window: Some(20), ..BASE },
        Case { window: Some(70), kv: KvFormat::F32, ..BASE },
        // Widths that are no multiple of anything.
        Case { hidden: 77, ffn: 131, ..BASE },
        Case { hidden: 77, ffn: 131, dtype: Dtype::F16, ..BASE },
        Case { hidden: 77, ffn: 131, dtype: Dtype::F32, ..BASE },
        // More than one block of k.
        Case { hidden: 700, ffn: 1300, ..BASE },
        Case { hidden: 700, ffn: 37, dtype: Dtype::F32, ..BASE },
    ];
    for page_len in [16, 32, 128, 5] {
        cases.push(Case { page_len, ..BASE });
    }
    for (n_q, n_kv, d) in [
        (1, 1, 64),
        (4, 4, 64),
        (4, 1, 128),
        (8, 1, 80),
        (5, 1, 64),
        (7, 1, 6),
        (16, 1, 34),
        (2, 1, 256),
    ] {
        cases.push(Case { shape: shape(n_q, n_kv, d), ..BASE });
    }
    cases.push(Case { shape: shape(8, 1, 80), kv: KvFormat::F32, dtype: Dtype::F32, ..BASE });
    cases
}

#[test]
fn ops_agree_with_the_reference() {
    for target in &targets() {
        for case in cases() {
            let model = Model::new(case);
            let mut world = World::new(&model, target, 2);
            let mut a = Sequence::new(1, 300, |i| i as u32);
            let mut b = Sequence::new(2, 300, |i| i as u32 + 4_000_000);
            let mut c = Sequence::new(3, 300, |i| i as u32 / 2);
            use Phase::{Decode, Prefill};
            world.forward(Prefill, &mut [(&mut a, 1)], true);
            world.forward(Prefill, &mut [(&mut b, 63)], true);
            world.forward(Prefill, &mut [(&mut a, 90), (&mut b, 1), (&mut c, 129)], true);
            world.forward(Decode, &mut [(&mut a, 1)], true);
            world.forward(Decode, &mut [(&mut c, 1), (&mut a, 1)], true);
            world.forward(Decode, &mut [(&mut a, 1), (&mut b, 1), (&mut c, 1)], true);
            world.forward(Prefill, &mut [(&mut b, 2), (&mut a, 35)], true);
            world.forward(Decode, &mut [(&mut b, 3), (&mut a, 2)], true);
        }
    }
}

/// Positions that go down and up again, rows that see few slots or none.
#[test]
fn masks_follow_positions() {
    for target in &targets() {
        for window in [None, Some(9), Some(0)] {
            let model = Model::new(Case { window, ..BASE });
            let mut world = World::new(&model, target, 2);
            let mut down = Sequence::new(4, 260, |i| 1000 - i as u32);
            let mut mixed = Sequence::new(5, 260, |i| (i as u32 * 37) % 256);
            for n in [70, 66] {
                world.forward(Phase::Prefill, &mut [(&mut down, n), (&mut mixed, n)], true);
            }
            world.forward(Phase::Decode, &mut [(&mut down, 1), (&mut mixed, 1)], true);
            let rows = world.forward(Phase::Decode, &mut [(&mut down, 1)], true);
            if window == Some(0) {
                assert!(rows[0].attn.iter().all(|&x| x == 0.0), "a row that sees nothing");
            }
        }
    }
}

/// More than one split in decode, and long enough for several tasks in prefill.
#[test]
fn long_sequences_agree_with_the_reference() {
    for target in &targets() {
        for (kv, window) in [(KvFormat::Bf16, None), (KvFormat::F32, Some(600))] {
            let model = Model::new(Case { kv, window, dtype: Dtype::F32, ..BASE });
            let mut world = World::new(&model, target, 2);
            let mut a = Sequence::new(1, 1300, |i| i as u32);
            world.forward(Phase::Prefill, &mut [(&mut a, 1000)], false);
            world.forward(Phase::Prefill, &mut [(&mut a, 24)], true);
            for _ in 0..2 {
                world.forward(Phase::Decode, &mut [(&mut a, 1)], true);
            }
        }
    }
}

/// The rows of three sequences, prefilled in the given chunks and then decoded for two steps.
fn rows_of(
    model: &Model,
    target: &Target<CpuBackend>,
    threads: usize,
    chunks: &[usize],
    together: bool,
) -> Vec<Vec<u32>> {
    let mut world = World::new(model, target, threads);
    let mut seqs = [
        Sequence::new(1, 300, |i| i as u32),
        Sequence::new(2, 300, |i| 3 * i as u32 + 70_000),
        Sequence::new(3, 300, |i| 2 * i as u32),
    ];
    let steps = chunks.iter().map(|&n| (Phase::Prefill, n)).chain([(Phase::Decode, 1); 2]);
    let mut rows = vec![Vec::new(); 3];
    for (phase, n) in steps {
        if together {
            let mut parts: Vec<_> = seqs.iter_mut().map(|s| (s, n)).collect();
            let out = world.forward(phase, &mut parts, false);
            for (rows, out) in rows.iter_mut().zip(out.chunks_exact(n)) {
                rows.extend(out.iter().flat_map(Row::bits));
            }
        } else {
            for (rows, seq) in rows.iter_mut().zip(&mut seqs) {
                let out = world.forward(phase, &mut [(seq, n)], false);
                rows.extend(out.iter().flat_map(Row::bits));
            }
        }
    }
    rows
}

#[test]
fn bits_do_not_depend_on_batch_chunks_threads_or_pages() {
    let wide = AttentionShape { n_q_heads: 3, n_kv_heads: 1, head_dim: 64 };
    for target in &targets() {
        for case in [
            BASE,
            Case { extras: true, window: Some(50), hidden: 77, ..BASE },
            Case { kv: KvFormat::F32, dtype: Dtype::F32, hidden: 700, shape: wide, ..BASE },
        ] {
            let model = Model::new(case);
            let base = rows_of(&model, target, 2, &[150], true);
            let width = base[0].len() / 152;
            let same = |other: Vec<Vec<u32>>, what: &str| {
                for (seq, (base, other)) in base.iter().zip(&other).enumerate() {
                    let first = base.iter().zip(other).position(|(a, b)| a != b);
                    let at = first.map(|i| (i / width, i % width, base[i], other[i]));
                    assert!(first.is_none(), "{} {what}: seq {seq} {at:x?} {case:?}", target.name);
                }
            };
            same(rows_of(&model, target, 2, &[150], false), "being alone");
            same(rows_of(&model, target, 2, &[64, 86], true), "chunks of 64 and 86");
            same(rows_of(&model, target, 2, &[1, 62, 2, 85], false), "uneven chunks");
            same(rows_of(&model, target, 1, &[150], true), "one thread");
            same(rows_of(&model, target, 3, &[100, 50], true), "three threads");
            for page_len in [16, 32, 128] {
                let model = Model::new(Case { page_len, ..case });
                same(rows_of(&model, target, 2, &[150], true), "page length");
            }
        }
    }
}

/// Unused pages and slots are NaN in every test above; this shows that the poison is there.
#[test]
fn unused_slots_are_poisoned() {
    let target = &targets()[0];
    let model = Model::new(BASE);
    let mut world = World::new(&model, target, 1);
    let mut seq = Sequence::new(1, 10, |i| i as u32);
    world.forward(Phase::Prefill, &mut [(&mut seq, 3)], true);
    let mut bytes = vec![0; world.layout.bytes()];
    world.backend.read_page(&world.pages, seq.table[LAYER], &mut bytes).unwrap();
    assert!(bytes.ends_with(&[0xff; 64]), "slots behind the last are as they were");
}

#[test]
fn pages_are_copied_whole() {
    for target in &targets() {
        let model = Model::new(BASE);
        let mut world = World::new(&model, target, 1);
        let bytes: Vec<u8> = (0..world.layout.bytes()).map(|i| i as u8).collect();
        let (backend, pages) = (&mut world.backend, &mut world.pages);
        backend.write_page(pages, 5, &bytes).unwrap();
        backend.copy_page(pages, 5, 2).unwrap();
        let mut out = vec![0; bytes.len()];
        backend.read_page(pages, 2, &mut out).unwrap();
        assert_eq!(out, bytes);
    }
}

#[test]
fn an_absent_instruction_set_is_refused() {
    for isa in [Isa::Avx2, Isa::Avx512, Isa::Avx512Bf16] {
        let made = CpuBackend::new(CpuOptions { threads: 1, isa: Some(isa) });
        assert_eq!(made.is_ok(), isa.is_available(), "{isa:?}");
    }
}

#[test]
fn a_token_out_of_range_is_an_error() {
    let target = &targets()[0];
    let model = Model::new(BASE);
    let mut world = World::new(&model, target, 1);
    let batch = Batch {
        phase: Phase::Prefill,
        tokens: vec![75],
        positions: vec![0],
        seqs: Vec::new(),
        logit_rows: Vec::new(),
    };
    let mut x = world.backend.rows(1, BASE.hidden).unwrap();
    let error = world.backend.embed(&world.embed, &batch, &mut x).unwrap_err();
    assert!(matches!(error, loris::Error::TokenOutOfRange { id: 75, vocab_size: 75 }), "{error}");
}
