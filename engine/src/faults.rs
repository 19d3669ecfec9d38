//! Tests of what is left of sessions when a pass fails: errors, panics and halts planted between the
//! sessions and the device.
#![allow(clippy::unwrap_used)]

use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::PathBuf;
use std::sync::mpsc;

use loris_loader::{Checkpoint, ModelConfig, OpenOptions, Tokenizer, Weights};

use crate::backend::{Draw, Stop, Table};
use crate::compute::{Lazy, PrunePoint};
use crate::forward::{Done, Execute, Pass};
use crate::keep::Evict;
use crate::pool::AuxRow;
use crate::recipe::SessionOptions;
use crate::sequence::{Pending, Stage};
use crate::store::PageId;
use crate::sync::{Arc, Mutex, lock, thread};
use crate::{
    DeviceChoice, Engine, EngineOptions, Error, Finish, GenerateOptions, Model, ModelOptions,
    Progress, Receipt, Sampler, SamplerParams, Session,
};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Call {
    Run,
    Sample,
    ReadLogits,
    KeepSlots,
}

/// Called before each call of the device.
type Hook = Box<dyn FnMut(Call) -> Result<(), Error> + Send>;

/// The real device behind a hook. It draws tokens if it is told to, as a GPU does.
struct Hooked {
    /// `None` while it takes its place.
    real: Option<Box<dyn Execute>>,
    hook: Arc<Mutex<Hook>>,
    draws: bool,
}

impl Hooked {
    fn real(&mut self) -> &mut dyn Execute {
        &mut **self.real.as_mut().unwrap()
    }
}

impl Execute for Hooked {
    fn run(&mut self, pass: &Pass<'_>, stop: &Stop) -> Result<Done, Error> {
        lock(&self.hook)(Call::Run)?;
        self.real().run(pass, stop)
    }

    fn n_runs(&self) -> u64 {
        self.real.as_ref().unwrap().n_runs()
    }

    fn sample(&mut self, idx: usize, _draw: &Draw) -> Result<Option<u32>, Error> {
        lock(&self.hook)(Call::Sample)?;
        let mut logits = vec![0.0; N_VOCAB];
        self.real().read_logits(idx, &mut logits)?;
        Ok(self.draws.then(|| best(&logits)))
    }

    fn read_logits(&mut self, idx: usize, out: &mut [f32]) -> Result<(), Error> {
        lock(&self.hook)(Call::ReadLogits)?;
        self.real().read_logits(idx, out)
    }

    fn read_page(&mut self, page: PageId, out: &mut [u8]) -> Result<(), Error> {
        self.real().read_page(page, out)
    }

    fn write_page(&mut self, page: PageId, bytes: &[u8]) -> Result<(), Error> {
        self.real().write_page(page, bytes)
    }

    fn read_aux(&mut self, row: AuxRow, out: &mut [f32]) -> Result<(), Error> {
        self.real().read_aux(row, out)
    }

    fn write_aux(&mut self, row: AuxRow, from: &[f32]) -> Result<(), Error> {
        self.real().write_aux(row, from)
    }

    fn key_norms(&mut self, table: Table<'_>, layer: usize, out: &mut [f32]) -> Result<(), Error> {
        self.real().key_norms(table, layer, out)
    }

    fn keep_slots(
        &mut self,
        copies: &[(PageId, PageId)],
        table: Table<'_>,
        keep: &[Vec<u32>],
    ) -> Result<(), Error> {
        let outcome = lock(&self.hook)(Call::KeepSlots);
        let n = if outcome.is_ok() { keep.len() } else { 1 }; // part of it is done when it fails
        self.real().keep_slots(copies, table, &keep[..n])?;
        outcome
    }
}

const N_VOCAB: usize = 128;
const PAGE_LEN: usize = 16;

/// A small model, and the hook of its device.
fn model(draws: bool) -> (Model, Arc<Mutex<Hook>>) {
    model_of(checkpoint(), draws)
}

fn checkpoint() -> Checkpoint {
    let root = std::env::var_os("LORIS_ROOT").unwrap_or(env!("CARGO_MANIFEST_DIR").into());
    let dir = PathBuf::from(root).join("tests/fixtures/llama-tied");
    loris_loader::open(&dir, &OpenOptions::default()).unwrap()
}

fn model_of(checkpoint: Checkpoint, draws: bool) -> (Model, Arc<Mutex<Hook>>) {
    // As `isa` of `tests/support`: what the machine lacks is refused when the model is opened.
    let isa = std::env::var_os("LORIS_TEST_ISA").map(|isa| isa.to_str().unwrap().parse().unwrap());
    let options = EngineOptions {
        device: DeviceChoice::Cpu,
        threads: Some(2),
        isa,
        ..EngineOptions::default()
    };
    let sizes = ModelOptions {
        page_len: PAGE_LEN,
        kv_tokens: Some(1024),
        aux_tokens: 256,
        chunk: 16,
        batch: 4,
        ..ModelOptions::default()
    };
    let mut model = Engine::new(&options).unwrap().open_checkpoint(checkpoint, &sizes).unwrap();
    let hook: Arc<Mutex<Hook>> = Arc::new(Mutex::new(Box::new(|_| Ok(()))));
    let shared = Arc::get_mut(&mut model.shared).unwrap();
    let exec = shared.exec.get_mut().unwrap();
    let hooked = |real| Box::new(Hooked { real, hook: hook.clone(), draws });
    let real = std::mem::replace(exec, hooked(None));
    *exec = hooked(Some(real));
    (model, hook)
}

#[derive(Clone, Copy, Debug)]
enum Fault {
    Error,
    Panic,
}

/// Plants a fault in call `nth` of its kind; says whether it has been met.
fn plant(hook: &Mutex<Hook>, fault: Fault, at: Call, nth: usize) -> Arc<Mutex<bool>> {
    let met = Arc::new(Mutex::new(false));
    let (mut n_before, is_met) = (nth, met.clone());
    *lock(hook) = Box::new(move |call| {
        if call != at || *lock(&is_met) {
            return Ok(());
        }
        if n_before > 0 {
            n_before -= 1;
            return Ok(());
        }
        *lock(&is_met) = true;
        match fault {
            Fault::Error => Err(Error::Device { reason: "planted".into() }),
            Fault::Panic => resume_unwind(Box::new("planted")), // no message on the way
        }
    });
    met
}

/// How often a call that succeeds comes to each kind of call of the device.
fn count(hook: &Mutex<Hook>, call: impl FnOnce()) -> [usize; 4] {
    let counts = Arc::new(Mutex::new([0; 4]));
    let seen = counts.clone();
    *lock(hook) = Box::new(move |call| {
        lock(&seen)[call as usize] += 1;
        Ok(())
    });
    call();
    unplant(hook);
    *lock(&counts)
}

fn unplant(hook: &Mutex<Hook>) {
    *lock(hook) = Box::new(|_| Ok(()));
}

#[allow(clippy::cast_possible_truncation)]
fn best(logits: &[f32]) -> u32 {
    (0..logits.len()).fold(0, |best, i| if logits[i] > logits[best] { i } else { best }) as u32
}

#[allow(clippy::cast_possible_truncation)]
fn prompt(seed: usize, n: usize) -> Vec<u32> {
    (0..n).map(|i| ((i * 31 + seed * 17 + i * i * (seed + 3)) % N_VOCAB) as u32).collect()
}

fn session(model: &Model, n: usize) -> Session {
    let mut s = model.session(&SessionOptions::default()).unwrap();
    if n > 0 {
        s.prefill(&prompt(n, n)).unwrap();
    }
    s
}

fn bits(s: &Session) -> Option<Vec<u32>> {
    s.logits().map(|logits| logits.iter().map(|l| l.to_bits()).collect())
}

/// All that a failed call must leave as it was.
#[derive(Debug, PartialEq)]
struct Snapshot {
    tokens: Vec<u32>,
    pending: Pending,
    positions: Vec<u32>,
    page_table: Vec<PageId>,
    n_shareable: usize,
    logits: Option<Vec<u32>>,
    n_used: usize,
}

fn snapshot(s: &Session) -> Snapshot {
    Snapshot {
        tokens: s.seq.tokens.clone(),
        pending: s.seq.pending.clone(),
        positions: s.seq.segments[0].slots.positions().to_vec(),
        page_table: s.seq.segments[0].body.clone(),
        n_shareable: s.seq.n_shareable,
        logits: bits(s),
        n_used: s.model().pool_usage().n_used,
    }
}

type Act<'a> = &'a dyn Fn(&mut Session) -> Result<(), Error>;

#[test]
fn a_call_that_fails_or_panics_leaves_the_session_as_it_was() {
    let (model, hook) = model(false);
    let generate = |s: &mut Session| {
        let params = SamplerParams { temperature: 0.0, ..SamplerParams::default() };
        let mut sampler = s.model().sampler(params).unwrap();
        let options = GenerateOptions { max_tokens: 1, ignore_eos: true, ..Default::default() };
        crate::generate(s, &mut sampler, &options, &mut |_| std::ops::ControlFlow::Continue(()))
            .map(drop)
    };
    let calls: [(&str, Act<'_>, usize); 4] = [
        ("prefill", &|s| s.prefill(&prompt(1, 40)), 3),
        ("decode", &|s| s.decode(5), 1),
        ("score", &|s| s.logits_of(&prompt(2, 10), &mut |_, _| ()), 3),
        ("generate", &generate, 1),
    ];
    for (name, call, n_runs) in calls {
        let mut s = session(&model, 20);
        call(&mut s).unwrap();
        let (want, want_tokens) = (bits(&s), s.seq.tokens.clone());
        drop(s);
        let (mut n_faults, mut n_met) = (0, [0; 3]);
        for fault in [Fault::Error, Fault::Panic] {
            for at in [Call::Run, Call::Sample, Call::ReadLogits] {
                for nth in 0.. {
                    // The last page is shared, so that the call copies it.
                    let mut s = session(&model, 20);
                    let other = s.fork().unwrap();
                    let before = snapshot(&s);
                    let met = plant(&hook, fault, at, nth);
                    let outcome = catch_unwind(AssertUnwindSafe(|| call(&mut s)));
                    unplant(&hook);
                    if !*lock(&met) {
                        assert!(matches!(outcome, Ok(Ok(()))), "{name}");
                        break;
                    }
                    let what = format!("{name}, {fault:?} in {at:?} {nth}");
                    assert!(!matches!(outcome, Ok(Ok(()))), "{what}");
                    let mut after = snapshot(&s);
                    if n_runs > 1 && after.page_table[2..] != before.page_table[2..] {
                        // A pass of the call succeeded: the session has its own copy of the last page.
                        after.page_table[2..].copy_from_slice(&before.page_table[2..]);
                        after.n_used -= 2;
                    }
                    assert_eq!(after, before, "{what}");
                    call(&mut s).unwrap();
                    assert!(bits(&s) == want && s.seq.tokens == want_tokens, "{what}");
                    assert_eq!(bits(&other), before.logits, "{what}");
                    drop((s, other));
                    assert_eq!(model.pool_usage().n_used, 0, "{what}");
                    n_faults += 1;
                    n_met[at as usize] += 1;
                }
            }
        }
        assert_eq!(n_met[Call::Run as usize], 2 * n_runs, "{name}");
        assert!(n_faults > 2 * n_runs, "{name}");
    }
}

#[test]
fn a_visitor_that_panics_leaves_the_session_as_it_was() {
    let (model, _) = model(false);
    for at in 0..10 {
        let mut s = session(&model, 20);
        let before = snapshot(&s);
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            s.logits_of(&prompt(2, 10), &mut |i, _| {
                if i == at {
                    resume_unwind(Box::new("planted"));
                }
            })
        }));
        assert!(outcome.is_err());
        assert_eq!(snapshot(&s), before, "token {at}");
    }
}

/// The fixture's two layers twice.
fn four_layers() -> Checkpoint {
    let checkpoint = checkpoint();
    let mut tensors = Vec::new();
    for tensor in checkpoint.weights.tensors() {
        let mut add = |name: String| {
            tensors.push((name, tensor.dtype, tensor.shape.clone(), tensor.bytes.to_vec()));
        };
        add(tensor.name.clone());
        for (own, copy) in [("layers.0.", "layers.2."), ("layers.1.", "layers.3.")] {
            tensor.name.starts_with(own).then(|| add(tensor.name.replace(own, copy)));
        }
    }
    let weights = Weights::from_memory(tensors).unwrap();
    let config = ModelConfig { n_layers: 4, windows: vec![None; 4], ..checkpoint.config };
    Checkpoint { config, weights, ..checkpoint }
}

/// All that a failed call must leave of a session that prunes.
#[derive(PartialEq)]
struct Layers {
    tokens: Vec<u32>,
    pending: Pending,
    stage: Stage,
    depths: Vec<u8>,
    positions: Vec<Vec<u32>>,
    /// Where tokens wait, and the bits of their hidden states.
    waiting: Vec<(u32, Vec<u32>)>,
    logits: Option<Vec<u32>>,
    receipt: Receipt,
}

fn layers(s: &Session) -> Layers {
    let mut device = s.model.shared.device();
    let mut bits_of = |row| {
        let mut state = vec![0.0; s.model.config().hidden_dim];
        device.read_aux(row, &mut state).unwrap();
        state.iter().map(|x| x.to_bits()).collect()
    };
    Layers {
        tokens: s.seq.tokens.clone(),
        pending: s.seq.pending.clone(),
        stage: s.seq.stage.clone(),
        depths: s.seq.waiting.depths.to_vec(),
        positions: s
            .seq
            .segments
            .iter()
            .map(|segment| segment.slots.positions().to_vec())
            .collect(),
        waiting: s.seq.waiting.rows().map(|(position, row)| (position, bits_of(row))).collect(),
        logits: bits(s),
        // Beside a fork it needs pages of its own sooner: pages are counted by the pool.
        receipt: Receipt { aux_bytes: 0, ..s.receipt() },
    }
}

/// A prompt and a token go through three segments; the fault is planted in every pass of each, and in the
/// reading of logits. Beside the session a fork of it holds the same pages, or none does.
#[test]
fn a_call_that_fails_in_any_segment_leaves_the_session_as_it_was() {
    let (model, hook) = model_of(four_layers(), false);
    let points = [(1, 0.5), (3, 0.5)].map(|(layer, keep_rate)| PrunePoint { layer, keep_rate });
    let lazy = Lazy { min_len: 0, sinks: 2, max_revived: 5, ..Lazy::new(points.to_vec()) };
    let start = || {
        let lazy = Some(lazy.clone());
        let mut s = model.session(&SessionOptions { lazy, ..Default::default() }).unwrap();
        s.prefill(&prompt(3, 50)).unwrap();
        (0..3).for_each(|token| s.decode(token).unwrap());
        s
    };
    let n_used = || [model.pool_usage().n_used, model.pool_usage().n_aux_used];
    let step = |s: &mut Session, queue: &dyn Fn(&mut Session)| {
        if s.seq.pending == Pending::Nothing {
            queue(s);
        }
        while s.seq.pending != Pending::Nothing {
            s.model.clone().step(&mut [s]).remove(0)?;
        }
        Ok(())
    };
    // The first segment takes a prompt in three chunks of 16 rows. Behind it the rows are those that go on, and which do
    // is a matter of rounding: of the others only that there is a pass for each is true everywhere.
    let calls: [(&str, Act<'_>, usize); 4] = [
        ("prefill", &|s| s.prefill(&prompt(1, 40)), 5),
        ("decode", &|s| s.decode(5), 3),
        ("steps of a prompt", &|s| step(s, &|s| s.feed(&prompt(1, 40)).unwrap()), 5),
        ("steps of a token", &|s| step(s, &|s| s.push(5).unwrap()), 3),
    ];
    for (name, call, n_runs_min) in calls {
        let is_stepped = name.starts_with("steps");
        let mut s = start();
        assert!(s.receipt().n_waiting > 0, "{:?}", s.receipt());
        let n_calls = count(&hook, || call(&mut s).unwrap());
        assert!(n_calls[Call::Run as usize] >= n_runs_min, "{name}: {n_calls:?}");
        let want = layers(&s);
        assert!(want.receipt.n_revived > 0 && want.receipt.n_waiting > 0, "{:?}", want.receipt);
        drop(s);
        for (fault, has_fork) in
            [(Fault::Error, false), (Fault::Panic, false), (Fault::Error, true)]
        {
            let mut n_met = [0; 4];
            for at in [Call::Run, Call::ReadLogits] {
                for nth in 0.. {
                    let mut s = start();
                    let fork = has_fork.then(|| s.fork().unwrap());
                    let (before, held) = (layers(&s), n_used());
                    let met = plant(&hook, fault, at, nth);
                    let outcome = catch_unwind(AssertUnwindSafe(|| call(&mut s)));
                    unplant(&hook);
                    if !*lock(&met) {
                        assert!(matches!(outcome, Ok(Ok(()))), "{name}");
                        break;
                    }
                    n_met[at as usize] += 1;
                    let what = format!("{name}, {fault:?} in {at:?} {nth}, fork {has_fork}");
                    assert!(!matches!(outcome, Ok(Ok(()))), "{what}");
                    if !is_stepped {
                        assert!(layers(&s) == before, "{what}");
                        if !has_fork {
                            assert_eq!(n_used(), held, "{what}");
                        }
                    } else if name.ends_with("token") {
                        // It goes through all segments or none, and is still queued.
                        assert_eq!(
                            (s.seq.pending.len(), &s.seq.stage),
                            (1, &Stage::default()),
                            "{what}"
                        );
                        assert_eq!(layers(&s).depths, before.depths, "{what}");
                        assert!(layers(&s).waiting == before.waiting, "{what}");
                        assert_eq!(bits(&s), before.logits, "{what}");
                    }
                    call(&mut s).unwrap();
                    assert!(layers(&s) == want, "{what}: tried again");
                    if let Some(fork) = &fork {
                        let Layers { waiting, logits, .. } = layers(fork);
                        assert!(
                            waiting == before.waiting && logits == before.logits,
                            "{what}: the fork"
                        );
                    }
                    drop((s, fork));
                    assert_eq!(n_used(), [0, 0], "{what}");
                }
            }
            assert_eq!(n_met, n_calls, "{name}, {fault:?}, fork {has_fork}");
            assert_eq!(n_met[Call::ReadLogits as usize], 1, "{name}");
        }
    }
}

/// Steps two sessions that decode and one that has a prompt until none has anything queued; a step that
/// fails or panics is tried again. Bits of the logits of each.
fn step_all(model: &Model) -> Vec<Option<Vec<u32>>> {
    let mut all = [session(model, 20), session(model, 32), session(model, 0)];
    all[0].push(1).unwrap();
    all[1].push(2).unwrap();
    all[2].feed(&prompt(3, 40)).unwrap();
    while all.iter().any(|s| s.seq.pending != Pending::Nothing) {
        let len_before = all.each_ref().map(|s| s.len());
        let mut refs: Vec<&mut Session> = all.iter_mut().collect();
        let _ = catch_unwind(AssertUnwindSafe(|| model.step(&mut refs)));
        // Each has gone its whole step or none of it, and holds the pages that it needs and no other.
        for (s, before) in all.iter().zip(len_before) {
            let gone = s.len() - before;
            assert!(gone == 0 || gone == 1 || gone == 16 || s.len() == 40, "{gone} tokens");
            assert_eq!(s.seq.segments[0].len(), s.len());
            assert_eq!(s.seq.segments[0].body.len(), s.len().div_ceil(PAGE_LEN) * 2);
        }
        let held: usize = all.iter().map(|s| s.seq.segments[0].body.len()).sum();
        assert_eq!(model.pool_usage().n_used, held);
    }
    all.iter().map(bits).collect()
}

#[test]
fn a_step_that_panics_gives_back_pages_and_goes_on_when_tried_again() {
    let (model, hook) = model(false);
    let want = step_all(&model);
    for fault in [Fault::Error, Fault::Panic] {
        for (at, n_calls) in [(Call::Run, 7), (Call::ReadLogits, 5)] {
            for nth in 0..n_calls {
                let met = plant(&hook, fault, at, nth);
                // The prompts that set the scene are calls too: what fails there is not this test's.
                let outcome = catch_unwind(AssertUnwindSafe(|| step_all(&model)));
                unplant(&hook);
                assert!(*lock(&met), "{fault:?} in {at:?} {nth}");
                if let Ok(got) = outcome {
                    assert!(got == want, "{fault:?} in {at:?} {nth}");
                }
                assert_eq!(model.pool_usage().n_used, 0);
            }
        }
    }
}

#[test]
fn logits_that_cannot_be_recalled_cost_no_token() {
    let (model, hook) = model(true);
    let params = SamplerParams { temperature: 0.0, ..SamplerParams::default() };
    let mut sampler = model.sampler(params).unwrap();
    for fault in [Fault::Error, Fault::Panic] {
        let mut other = session(&model, 5);
        let mut s = session(&model, 20);
        let first = best(s.logits().unwrap());
        let second = s.decode_and_draw(first, &mut sampler).unwrap();
        assert!(s.seq.drawn.is_some() && s.logits().is_none());
        other.decode(1).unwrap(); // overwrites the logits
        let before = snapshot(&s);
        let met = plant(&hook, fault, Call::Run, 0);
        let outcome = catch_unwind(AssertUnwindSafe(|| s.recall_logits()));
        unplant(&hook);
        assert!(*lock(&met) && !matches!(outcome, Ok(Ok(()))));
        assert_eq!(snapshot(&s), before, "{fault:?}");

        // They can be asked for again, and the session goes on where it was.
        let mut want = session(&model, 20);
        want.decode(first).unwrap();
        assert_eq!(best(want.logits().unwrap()), second);
        let mut fork = s.fork().unwrap();
        for s in [&mut s, &mut fork] {
            s.recall_logits().unwrap();
            assert!(bits(s) == bits(&want), "{fault:?}");
        }
        want.decode(second).unwrap();
        s.decode(second).unwrap();
        assert!(bits(&s) == bits(&want));
    }
}

#[test]
fn a_drawn_answer_is_the_same_and_its_logits_come_back() {
    let (model, _) = model(true);
    let params = SamplerParams { temperature: 0.0, ..SamplerParams::default() };
    let mut sampler = model.sampler(params).unwrap();
    let options = GenerateOptions { max_tokens: 5, ignore_eos: true, ..Default::default() };
    let mut s = session(&model, 20);
    let mut other = session(&model, 5);
    let mut shown = Vec::new();
    let finish = crate::generate(&mut s, &mut sampler, &options, &mut |token| {
        shown.push(token.id);
        other.decode(token.id).unwrap();
        std::ops::ControlFlow::Continue(())
    });
    assert!(matches!(finish, Ok(Finish::Length)));
    assert_eq!((s.receipt().n_drawn, &s.tokens()[20..]), (4, &shown[..]));
    let mut want = session(&model, 20);
    for &token in &shown {
        assert_eq!(best(want.logits().unwrap()), token);
        want.decode(token).unwrap();
    }
    assert!(bits(&s) == bits(&want));
}

/// With a tokenizer: one character a token.
fn talking(eos_ids: Vec<u32>) -> Checkpoint {
    let checkpoint = checkpoint();
    let vocab: serde_json::Map<String, serde_json::Value> =
        (0..N_VOCAB).map(|id| (text_of(id as u32), id.into())).collect();
    let tokenizer = serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
        "normalizer": null, "pre_tokenizer": null, "post_processor": null,
        "decoder": { "type": "Fuse" },
        "model": { "type": "BPE", "dropout": null, "unk_token": null,
                   "continuing_subword_prefix": null, "end_of_word_suffix": null,
                   "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": [] },
    });
    let tokenizer = Tokenizer::parse(tokenizer.to_string().as_bytes(), "tokenizer.json".as_ref());
    let config = ModelConfig { eos_ids, ..checkpoint.config };
    Checkpoint { config, tokenizer: Some(tokenizer.unwrap()), ..checkpoint }
}

fn text_of(id: u32) -> String {
    char::from_u32(0x4e00 + id).unwrap().to_string()
}

/// An answer: how it ended, and what was shown; `stop` is told how much was.
fn answer(
    s: &mut Session,
    sampler: &mut Sampler,
    options: &GenerateOptions,
    stop: &mut dyn FnMut(usize) -> bool,
) -> (Result<Finish, Error>, Vec<u32>) {
    let mut shown = Vec::new();
    let finish = crate::generate(s, sampler, options, &mut |token| {
        if !token.is_rest {
            shown.push(token.id);
        }
        match stop(shown.len()) {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    });
    (finish, shown)
}

/// Every end of an answer: those with a reason, and faults of the device in each call of each kind.
#[derive(Clone, Copy, Debug)]
enum End {
    Length,
    Eos,
    Stop,
    Callback,
    CancelledBefore,
    CancelledInAPass,
    CtxFull,
    KvFull,
    Fault(Call),
}

#[test]
fn whatever_ends_an_answer_the_session_holds_what_was_shown_and_goes_on() {
    const N: usize = 24;
    let ends = [
        End::Length,
        End::Eos,
        End::Stop,
        End::Callback,
        End::CancelledBefore,
        End::CancelledInAPass,
        End::CtxFull,
        End::KvFull,
        End::Fault(Call::Run),
        End::Fault(Call::Sample),
        End::Fault(Call::ReadLogits),
    ];
    let never = &mut |_| false;
    let go_on = GenerateOptions { max_tokens: N, ignore_eos: true, ..GenerateOptions::default() };
    for (draws, temperature) in [(false, 0.0), (false, 1.0), (true, 0.0)] {
        let seed = Some(3);
        let params = SamplerParams { temperature, seed, ..SamplerParams::default() };
        let open = |eos_ids| model_of(talking(eos_ids), draws);
        let (model, _) = open(vec![]);
        let sampler = model.sampler(params).unwrap();
        let mut whole = session(&model, 20);
        let (finish, want) = answer(&mut whole, &mut sampler.clone(), &go_on, never);
        assert!(matches!(finish, Ok(Finish::Length)) && want.len() == N);
        // The token that is new as late as any, and where it is.
        let first = |id: u32| want.iter().position(|&other| other == id).unwrap();
        let last_new = want.iter().map(|&id| first(id)).max().unwrap();
        for end in ends {
            let what = format!("{end:?}, drawn by the device: {draws}, temperature {temperature}");
            let eos_ids = if matches!(end, End::Eos) { vec![want[last_new]] } else { vec![] };
            let (model, hook) = open(eos_ids);
            let ctx_len = matches!(end, End::CtxFull).then_some(25);
            let mut s =
                model.session(&SessionOptions { ctx_len, ..SessionOptions::default() }).unwrap();
            s.prefill(&prompt(20, 20)).unwrap();
            let mut sampler = sampler.clone();
            let mut options = GenerateOptions { ignore_eos: false, ..go_on.clone() };
            let (mut n_most, mut others) = (usize::MAX, Vec::new());
            let canceller = s.canceller();
            match end {
                End::Length => options.max_tokens = 5,
                End::Stop => options.stop = vec![text_of(want[last_new])],
                End::Callback => n_most = 5,
                End::CancelledBefore => canceller.cancel(),
                End::CancelledInAPass => {
                    let mut n_left = 5;
                    *lock(&hook) = Box::new(move |call| {
                        n_left -= i32::from(call == Call::Run);
                        if n_left == 0 {
                            canceller.cancel();
                        }
                        Ok(())
                    });
                }
                End::KvFull => {
                    for seed in 0.. {
                        let mut other = session(&model, 0);
                        match other.prefill(&prompt(seed, 16)) {
                            Ok(()) => others.push(other),
                            Err(_) => break,
                        }
                    }
                }
                End::Fault(call) => drop(plant(&hook, Fault::Error, call, 4)),
                End::Eos | End::CtxFull => {}
            }
            let (finish, shown) = answer(&mut s, &mut sampler, &options, &mut |n| n >= n_most);
            unplant(&hook);
            let (is_right, n_shown) = match end {
                End::Length => (matches!(finish, Ok(Finish::Length)), 5),
                End::Eos => (matches!(finish, Ok(Finish::Eos)), last_new),
                End::Stop => (matches!(finish, Ok(Finish::Stop)), last_new + 1),
                End::Callback => (matches!(finish, Ok(Finish::Cancelled)), 5),
                End::CancelledBefore => (matches!(finish, Ok(Finish::Cancelled)), 0),
                End::CancelledInAPass => (matches!(finish, Ok(Finish::Cancelled)), 4),
                End::CtxFull => (matches!(finish, Ok(Finish::CtxFull)), 5),
                End::KvFull => (matches!(finish, Err(Error::KvFull { .. })), 12),
                // Where the device draws, logits are read once, for the last token.
                End::Fault(Call::ReadLogits) if draws => (finish.is_ok(), N),
                End::Fault(_) => (matches!(finish, Err(Error::Device { .. })), 4),
            };
            assert!(is_right, "{what}: {finish:?}");
            assert_eq!(shown, want[..n_shown], "{what}");
            assert_eq!(s.tokens()[20..], shown, "{what}");
            drop(others);
            if matches!(end, End::CtxFull) {
                continue;
            }
            let options = GenerateOptions { max_tokens: N - n_shown, ..go_on.clone() };
            let (finish, rest) = answer(&mut s, &mut sampler, &options, never);
            assert!(matches!(finish, Ok(Finish::Length)), "{what}: {finish:?}");
            assert_eq!(rest, want[n_shown..], "{what}");
            assert!(bits(&s) == bits(&whole), "{what}");
        }
    }
}

/// What has been shown is an answer, whether its logits come back or not.
#[test]
fn an_answer_whose_logits_cannot_be_recalled_is_no_error() {
    #[derive(Clone, Copy, Debug)]
    enum Cause {
        Unreadable,
        Overwritten,
        NoPage,
    }
    let (model, _) = model_of(talking(vec![]), true);
    let params = SamplerParams { temperature: 0.0, ..SamplerParams::default() };
    let sampler = model.sampler(params).unwrap();
    let options = GenerateOptions { max_tokens: 24, ..GenerateOptions::default() };
    let (_, want) =
        answer(&mut session(&model, 20), &mut sampler.clone(), &options, &mut |_| false);
    let first = |id: u32| want.iter().position(|&other| other == id).unwrap();
    let n = want.iter().map(|&id| first(id)).max().unwrap();
    assert!(n > 0, "{want:?}");
    for cause in [Cause::Unreadable, Cause::Overwritten, Cause::NoPage] {
        let (model, hook) = model_of(talking(vec![want[n]]), true);
        let (mut s, mut other) = (session(&model, 20), session(&model, 5));
        let mut others = Vec::new();
        let (finish, shown) = answer(&mut s, &mut sampler.clone(), &options, &mut |n_shown| {
            if n_shown < n {
                return false;
            }
            match cause {
                Cause::Unreadable => drop(plant(&hook, Fault::Error, Call::ReadLogits, 0)),
                Cause::Overwritten => {
                    other.decode(1).unwrap();
                    drop(plant(&hook, Fault::Error, Call::Run, 0));
                }
                Cause::NoPage => {
                    for seed in 100.. {
                        let mut another = session(&model, 0);
                        match another.prefill(&prompt(seed, 16)) {
                            Ok(()) => others.push(another),
                            Err(_) => break,
                        }
                    }
                }
            }
            false
        });
        unplant(&hook);
        assert!(matches!(finish, Ok(Finish::Eos)), "{cause:?}: {finish:?}");
        assert_eq!((&shown[..], &s.tokens()[20..]), (&want[..n], &want[..n]), "{cause:?}");
        assert!(s.logits().is_none(), "{cause:?}");
        drop(others);
        s.recall_logits().unwrap();
        let mut plain = session(&model, 20);
        shown.iter().for_each(|&id| plain.decode(id).unwrap());
        assert!(bits(&s) == bits(&plain), "{cause:?}");
        s.truncate(20).unwrap();
        s.recall_logits().unwrap();
        assert!(s.logits().is_none(), "they went with the token");
    }
}

/// What a token has revived is there when it is decoded once more for its logits, and no more than that.
#[test]
fn logits_of_a_session_that_prunes_are_recalled_as_they_were() {
    let points = [(1, 0.5), (3, 0.5)].map(|(layer, keep_rate)| PrunePoint { layer, keep_rate });
    let lazy = Lazy { min_len: 0, sinks: 2, max_revived: 2, ..Lazy::new(points.to_vec()) };
    let options = SessionOptions { lazy: Some(lazy), ..SessionOptions::default() };
    let [drawn, plain] = [true, false].map(|draws| model_of(four_layers(), draws).0);
    let [mut s, mut want] = [&drawn, &plain].map(|model| {
        let mut s = model.session(&options).unwrap();
        s.prefill(&prompt(3, 50)).unwrap();
        s
    });
    let mut other = session(&drawn, 5);
    let params = SamplerParams { temperature: 0.0, ..SamplerParams::default() };
    let mut sampler = drawn.sampler(params).unwrap();
    for token in 0..6 {
        s.decode_and_draw(token, &mut sampler).unwrap();
        want.decode(token).unwrap();
        assert!(s.seq.drawn.is_some());
        other.decode(1).unwrap(); // overwrites the logits
        s.recall_logits().unwrap();
        assert!(bits(&s) == bits(&want), "token {token}");
        assert_eq!(s.receipt().n_revived, want.receipt().n_revived);
    }
    assert!(want.receipt().n_revived > 6 && want.receipt().n_waiting > 0);
}

/// Has the next pass wait until the sender is used or gone; the receiver hears when it has begun.
fn halt_next_run(hook: &Mutex<Hook>) -> (mpsc::Receiver<()>, mpsc::Sender<()>) {
    let (begin, begun) = mpsc::channel();
    let (go, gone) = mpsc::channel();
    let mut is_first = true;
    *lock(hook) = Box::new(move |call| {
        if call == Call::Run && std::mem::take(&mut is_first) {
            begin.send(()).unwrap();
            let _ = gone.recv();
        }
        Ok(())
    });
    (begun, go)
}

#[test]
fn a_call_that_waits_for_anothers_pass_is_cancelled_there() {
    let (model, hook) = model(false);
    let (begun, go) = halt_next_run(&hook);
    let mut waiting = model.session(&SessionOptions::default()).unwrap();
    let canceller = waiting.canceller();
    let gate = model.shared.gate.clone();
    thread::scope(|scope| {
        let running = scope.spawn(|| session(&model, 40));
        begun.recv().unwrap();
        let n_used = model.pool_usage().n_used;
        let outcome = scope.spawn(|| {
            let outcome = waiting.prefill(&prompt(1, 30));
            (outcome, snapshot(&waiting))
        });
        while gate.len() < 2 {
            thread::yield_now(); // until it is in the line
        }
        assert!(model.pool_usage().n_used > n_used, "it has taken its pages");
        canceller.cancel();
        let (outcome, after) = outcome.join().unwrap();
        assert!(matches!(outcome, Err(Error::Cancelled)));
        assert!(!running.is_finished(), "the pass that it waited for still runs");
        assert_eq!((after.tokens.len(), after.n_used), (0, n_used));
        assert_eq!(after.pending, Pending::Nothing);
        drop(go);
        assert_eq!(running.join().unwrap().len(), 40);
    });
    waiting.prefill(&prompt(1, 30)).unwrap(); // a cancel stops one call
}

#[test]
fn of_many_that_wait_one_is_cancelled_and_the_others_keep_what_was_queued() {
    let (model, hook) = model(false);
    let mut all = [session(&model, 20), session(&model, 5)];
    all[0].push(1).unwrap();
    all[1].push(2).unwrap();
    let before = all.each_ref().map(snapshot);
    let (begun, go) = halt_next_run(&hook);
    let canceller = all[1].canceller();
    thread::scope(|scope| {
        let running = scope.spawn(|| drop(session(&model, 10)));
        begun.recv().unwrap();
        let step = scope.spawn(|| {
            let [a, b] = &mut all;
            model.step(&mut [a, b])
        });
        while model.shared.gate.len() < 2 {
            thread::yield_now();
        }
        canceller.cancel();
        let results = step.join().unwrap();
        assert!(matches!(results[0], Ok(Progress::Pending { done: 0, total: 1 })));
        assert!(matches!(results[1], Err(Error::Cancelled)));
        drop(go);
        running.join().unwrap();
    });
    assert_eq!(all.each_ref().map(snapshot), before);
    let [a, b] = &mut all;
    assert!(model.step(&mut [a, b]).iter().all(|r| matches!(r, Ok(Progress::Ready))));
}

/// Whenever a pass of the prompt begins, the other thread has its token in the line: the next pass is that token's.
#[test]
fn a_token_waits_for_one_pass_of_another_threads_prompt() {
    let (model, hook) = model(false);
    let mut running = session(&model, 20);
    let n_left = Arc::new(Mutex::new(6));
    let order = Arc::new(Mutex::new(Vec::new()));
    let (begin, begun) = mpsc::channel();
    thread::scope(|scope| {
        let of_thread = &model;
        let prompt = scope.spawn(move || {
            begun.recv().unwrap();
            session(of_thread, 200).len()
        });
        let (gate, of_prompt) = (model.shared.gate.clone(), prompt.thread().id());
        let (n_to_come, passes) = (n_left.clone(), order.clone());
        *lock(&hook) = Box::new(move |call| {
            let is_prompt = thread::current().id() == of_prompt;
            if call == Call::Run {
                while is_prompt && *lock(&n_to_come) > 0 && gate.len() < 2 {
                    thread::yield_now();
                }
                lock(&passes).push((is_prompt, *lock(&n_to_come)));
            }
            Ok(())
        });
        begin.send(()).unwrap();
        for _ in 0..6 {
            running.decode(1).unwrap();
            *lock(&n_left) -= 1;
        }
        assert_eq!(prompt.join().unwrap(), 200);
    });
    let passes = lock(&order);
    let is_prompt: Vec<bool> = passes.iter().map(|&(is_prompt, _)| is_prompt).collect();
    assert_eq!(is_prompt.iter().filter(|&&is_prompt| is_prompt).count(), 13, "chunks of 16");
    let last = is_prompt.iter().rposition(|&is_prompt| !is_prompt).unwrap();
    assert!(is_prompt[..=last].windows(2).all(|pair| pair != [true, true]), "{passes:?}");
}

/// Two prompts begin alike, and the one that is ahead fails in every step.
#[test]
fn nobody_waits_for_a_prompt_that_fails() {
    let (model, hook) = model(false);
    let tokens = prompt(3, 60);
    let mut all = [session(&model, 0), session(&model, 0)];
    all[0].feed(&tokens[..32]).unwrap();
    all[1].feed(&tokens).unwrap();
    let step = |all: &mut [Session; 2]| {
        let [a, b] = all;
        model.step(&mut [a, b])
    };
    *lock(&hook) = Box::new(|call| match call {
        Call::ReadLogits => Err(Error::Device { reason: "planted".into() }),
        _ => Ok(()),
    });
    for (len, fails) in [([16, 0], false), ([16, 16], true), ([24, 24], false), ([24, 32], true)] {
        let results = step(&mut all);
        assert_eq!((all.each_ref().map(Session::len), results[0].is_err()), (len, fails));
        assert!(results[1].is_ok());
    }
    unplant(&hook);
    while all.iter().any(|s| s.seq.pending != Pending::Nothing) {
        assert!(step(&mut all).iter().all(Result::is_ok));
    }
    for (s, n) in all.iter().zip([32, 60]) {
        let mut alone = model.session(&SessionOptions::default()).unwrap();
        alone.prefill(&tokens[..n]).unwrap();
        assert_eq!(bits(s), bits(&alone));
    }
}

/// Slots that have moved in some layers and not in others are of no use.
#[test]
fn a_session_whose_eviction_fails_is_empty() {
    let (model, hook) = model(false);
    let options = SessionOptions {
        evict: Some(Evict::parse("tova:16,sinks=1").unwrap()),
        ..SessionOptions::default()
    };
    let run = |s: &mut Session| {
        s.prefill(&prompt(3, 40))?;
        s.decode(7)
    };
    let mut s = model.session(&options).unwrap();
    run(&mut s).unwrap();
    let want = bits(&s);
    assert_eq!(s.receipt().n_evicted, 24);
    drop(s);
    for fault in [Fault::Error, Fault::Panic] {
        let mut s = model.session(&options).unwrap();
        let met = plant(&hook, fault, Call::KeepSlots, 0);
        let outcome = catch_unwind(AssertUnwindSafe(|| run(&mut s)));
        unplant(&hook);
        assert!(*lock(&met) && !matches!(outcome, Ok(Ok(()))), "{fault:?}");
        assert!(s.is_empty() && s.logits().is_none(), "{fault:?}");
        assert_eq!(model.pool_usage().n_used, 0, "{fault:?}");
        run(&mut s).unwrap();
        assert_eq!(bits(&s), want, "{fault:?}");
    }
}
