//! What threads share, under a model checker: every lock, atomic and wake-up is a point where another
//! thread may go on, and shuttle tries out many orders (`scripts/model-check`; nothing without it).
//!
//! The gate and the team are private to the engine, so their sources are compiled in here; the engine
//! itself is the real one, on a tiny checkpoint.
#![cfg(shuttle)]
#![allow(clippy::unwrap_used)]

#[path = "../engine/src/gate.rs"]
mod gate;
#[path = "../engine/src/backend/cpu/mem.rs"]
#[allow(dead_code)]
mod mem;
mod support;
#[path = "../engine/src/sync.rs"]
#[allow(unused_imports)]
mod sync;
#[path = "../engine/src/backend/cpu/team.rs"]
#[allow(dead_code)]
mod team;

mod backend {
    pub(crate) use loris::backend::Stop;
}
mod error {
    pub(crate) use loris::Error;
}
mod memory {
    pub(crate) use loris::loader::memory::{has_room, has_space};
}

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
// Not shuttle's: what only the checks use is no point to switch threads at.
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use loris::{Error, Model, ModelOptions, Progress, Session, SessionOptions};
use shuttle::scheduler::{PctScheduler, RandomScheduler};
use shuttle::sync::atomic::AtomicBool as Flag;
use shuttle::thread;
use shuttle::{Config, Runner};

use crate::backend::Stop;
use crate::gate::Gate;
use crate::support::{argmax, bits, checkpoint, open_with, options};
use crate::team::{Tasks, Team};

const SEED: u64 = 0x6c6f_7269;

/// Runs `body` in `n` random orders, and in `n` where threads have priorities that change 3 times.
fn explore(name: &str, n: usize, body: impl Fn() + Send + Sync + 'static) {
    let mut config = Config::new();
    config.stack_size = 1 << 20;
    config.silence_warnings = true; // that orderings weaker than SeqCst are not modelled
    let (start, body) = (Instant::now(), Arc::new(body));
    let again = body.clone();
    Runner::new(RandomScheduler::new_from_seed(SEED, n), config.clone()).run(move || again());
    Runner::new(PctScheduler::new_from_seed(SEED, 3, n), config).run(move || body());
    println!("{name}: {n} random orders and {n} by priorities in {:.1?}", start.elapsed());
}

/// Something that one thread at a time may use.
#[derive(Default)]
struct Exclusive(AtomicBool);

impl Exclusive {
    fn with(&self, what: &str) {
        assert!(!self.0.swap(true, SeqCst), "{what} is used by two threads at once");
        thread::yield_now();
        self.0.store(false, SeqCst);
    }
}

fn yield_until(is_so: impl Fn() -> bool) {
    while !is_so() {
        thread::yield_now();
    }
}

#[test]
fn the_gate_lets_one_in_at_a_time_in_the_order_of_arrival() {
    explore("gate, order", 4000, || {
        let gate = Arc::new(Gate::default());
        let (order, device) = (Arc::new(Mutex::new(Vec::new())), Arc::new(Exclusive::default()));
        let first = gate.enter();
        let threads: Vec<_> = (0..3)
            .map(|i| {
                let (gate, order, device) = (gate.clone(), order.clone(), device.clone());
                let line_len = gate.len();
                let own = gate.clone();
                let thread = thread::spawn(move || {
                    let turn = gate.enter();
                    order.lock().unwrap().push(i);
                    device.with("the device");
                    drop(turn);
                    let _turn = gate.enter();
                    device.with("the device");
                });
                yield_until(|| own.len() > line_len);
                thread
            })
            .collect();
        drop(first);
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        assert_eq!(*order.lock().unwrap(), [0, 1, 2]);
        assert_eq!(gate.len(), 0);
    });
}

#[test]
fn a_cancel_reaches_who_waits_whatever_the_holder_does() {
    explore("gate, cancel", 4000, || {
        let (gate, flag) = (Arc::new(Gate::default()), Arc::new(Flag::new(false)));
        let turn = gate.enter();
        let waiting = {
            let (gate, flag) = (gate.clone(), flag.clone());
            thread::spawn(move || gate.enter_unless(|| flag.load(SeqCst)).is_none())
        };
        let patient = {
            let gate = gate.clone();
            thread::spawn(move || drop(gate.enter()))
        };
        let canceller = {
            let gate = gate.clone();
            thread::spawn(move || {
                flag.store(true, SeqCst);
                gate.wake();
            })
        };
        // The turn is not given up before: only the cancel can end this.
        assert!(waiting.join().unwrap());
        drop(turn);
        patient.join().unwrap();
        canceller.join().unwrap();
        assert_eq!(gate.len(), 0);
    });
}

#[test]
fn a_cancel_that_meets_the_turn_loses_nobody() {
    explore("gate, cancel and turn", 4000, || {
        let gate = Arc::new(Gate::default());
        let flags: [Arc<Flag>; 2] = std::array::from_fn(|_| Arc::new(Flag::new(false)));
        let device = Arc::new(Exclusive::default());
        let threads: Vec<_> = (0..4)
            .map(|i| {
                let (gate, device) = (gate.clone(), device.clone());
                let flag = flags.get(i).cloned();
                thread::spawn(move || {
                    let stopped = || flag.as_ref().is_some_and(|flag| flag.load(SeqCst));
                    let turn = gate.enter_unless(stopped);
                    assert!(turn.is_some() || stopped());
                    if turn.is_some() {
                        device.with("the device");
                    }
                })
            })
            .collect();
        for flag in flags {
            flag.store(true, SeqCst);
            gate.wake();
        }
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        assert_eq!(gate.len(), 0);
    });
}

#[test]
fn a_holder_that_panics_gives_up_its_turn() {
    explore("gate, panic", 2000, || {
        let gate = Arc::new(Gate::default());
        let threads: Vec<_> = (0..3)
            .map(|i| {
                let gate = gate.clone();
                thread::spawn(move || {
                    let outcome = catch_unwind(AssertUnwindSafe(|| {
                        let _turn = gate.enter();
                        if i < 2 {
                            resume_unwind(Box::new("planted")); // without a report of the order
                        }
                    }));
                    assert_eq!(outcome.is_err(), i < 2);
                })
            })
            .collect();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        assert_eq!(gate.len(), 0);
    });
}

/// Runs regions of numbered tasks, and checks that each task runs once, in its region, on data of its own.
fn regions(team: &mut Team, n_regions: usize, n_tasks: usize) {
    let n_threads = team.n_threads();
    let scratch: Vec<Exclusive> = (0..n_threads).map(|_| Exclusive::default()).collect();
    let now = AtomicUsize::new(0);
    for region in 1..=n_regions {
        let tasks =
            Tasks::new(n_tasks, if region % 2 == 0 { 1 } else { n_threads }, &Stop::default());
        let runs: Vec<AtomicUsize> = (0..n_tasks).map(|_| AtomicUsize::new(0)).collect();
        let inside = AtomicUsize::new(0);
        let came: Vec<AtomicBool> = (0..n_threads).map(|_| AtomicBool::new(false)).collect();
        now.store(region, SeqCst);
        team.run(&|thread_idx, _| {
            inside.fetch_add(1, SeqCst);
            assert_eq!(now.load(SeqCst), region, "a thread is in a region that has ended");
            assert!(!came[thread_idx].swap(true, SeqCst), "a thread comes to a region twice");
            scratch[thread_idx].with("scratch");
            while let Some(task) = tasks.next(thread_idx) {
                runs[task].fetch_add(1, SeqCst);
                thread::yield_now();
                assert_eq!(now.load(SeqCst), region, "a region ended before its tasks");
            }
            inside.fetch_sub(1, SeqCst);
        });
        assert_eq!(inside.load(SeqCst), 0, "a thread is still inside");
        assert!(runs.iter().all(|n| n.load(SeqCst) == 1), "each task once");
    }
    now.store(0, SeqCst);
}

#[test]
fn a_team_runs_each_task_once_and_regions_do_not_overlap() {
    for n_threads in [2, 3] {
        explore(&format!("team of {n_threads}"), 6000, move || {
            let mut team = Team::new(n_threads).unwrap();
            regions(&mut team, 3, 4);
        });
    }
}

#[test]
fn every_worker_comes_to_a_region_that_waits_for_it() {
    for n_threads in [2, 3] {
        explore(&format!("team of {n_threads}, all come"), 3000, move || {
            let mut team = Team::new(n_threads).unwrap();
            for _ in 0..2 {
                let barrier = shuttle::sync::Barrier::new(n_threads);
                team.run(&|_, _| {
                    barrier.wait();
                });
            }
        });
    }
}

#[test]
fn a_panic_in_a_region_reaches_the_caller_once_everyone_is_out() {
    for (n_threads, culprit) in [(2, 0), (2, 1), (3, 0), (3, 2)] {
        explore(&format!("team of {n_threads}, {culprit} panics"), 2000, move || {
            let mut team = Team::new(n_threads).unwrap();
            let (inside, thrown) = (AtomicUsize::new(0), AtomicBool::new(false));
            let outcome = catch_unwind(AssertUnwindSafe(|| {
                team.run(&|thread_idx, _| {
                    inside.fetch_add(1, SeqCst);
                    thread::yield_now();
                    inside.fetch_sub(1, SeqCst);
                    if thread_idx == culprit {
                        thrown.store(true, SeqCst);
                        resume_unwind(Box::new("planted"));
                    }
                });
            }));
            assert_eq!(inside.load(SeqCst), 0, "a thread is still inside");
            assert_eq!(outcome.is_err(), thrown.load(SeqCst));
            regions(&mut team, 1, 3);
        });
    }
}

const PAGE_LEN: usize = 16;
const PREFIX: usize = 20;

fn model() -> Model {
    let sizes = ModelOptions { page_len: PAGE_LEN, chunk: 16, batch: 2, ..options(1024) };
    open_with(1, checkpoint("llama-tied"), &sizes)
}

fn session(model: &Model) -> Session {
    model.session(&SessionOptions::default()).unwrap()
}

/// Prompts that begin alike, by enough tokens to share a page.
#[allow(clippy::cast_possible_truncation)]
fn prompt(seed: usize) -> Vec<u32> {
    let prefix = (0..PREFIX).map(|i| i * 31 % 128);
    prefix.chain((0..6 + seed).map(|i| (i * 13 + seed * 17) % 128)).map(|id| id as u32).collect()
}

/// Decodes `n` of the likeliest tokens, and shows the logits that it ends with.
#[allow(clippy::cast_possible_truncation)]
fn answer(s: &mut Session, n: usize) -> Vec<u32> {
    for _ in 0..n {
        let id = argmax(s.logits().unwrap()) as u32;
        s.decode(id).unwrap();
    }
    bits(s.logits().unwrap())
}

/// What each prompt comes to in a model of its own: after the prompt, after one token and after two.
type Wanted = [[Vec<u32>; 3]; 5];

fn wanted() -> Arc<Wanted> {
    let out = Arc::new(Mutex::new(None));
    let found = out.clone();
    shuttle::check_random(
        move || {
            let all: Wanted = std::array::from_fn(|seed| {
                let model = model();
                let mut s = session(&model);
                s.prefill(&prompt(seed)).unwrap();
                std::array::from_fn(|n| answer(&mut s, n.min(1)))
            });
            *found.lock().unwrap() = Some(all);
        },
        1,
    );
    let all = out.lock().unwrap().take().unwrap();
    Arc::new(all)
}

/// Prefill, decode, fork, truncate.
fn alone(model: &Model, want: &Wanted) {
    let mut a = session(model);
    a.prefill(&prompt(0)).unwrap();
    assert!(answer(&mut a, 0) == want[0][0]);
    let mut b = a.fork().unwrap();
    assert!(answer(&mut a, 2) == want[0][2]);
    assert!(answer(&mut b, 1) == want[0][1]);
    b.truncate(PREFIX).unwrap();
    b.prefill(&prompt(1)[PREFIX..]).unwrap();
    assert!(answer(&mut b, 1) == want[1][1]);
}

/// Two sessions in one step.
#[allow(clippy::cast_possible_truncation)]
fn together(model: &Model, want: &Wanted) {
    let mut all = [session(model), session(model)];
    for (s, seed) in all.iter_mut().zip([2, 3]) {
        s.feed(&prompt(seed)).unwrap();
    }
    let mut n_ready = [0; 2];
    while n_ready != [2; 2] {
        let [a, b] = &mut all;
        for (i, result) in model.step(&mut [a, b]).into_iter().enumerate() {
            if result.unwrap() != Progress::Ready {
                continue;
            }
            let logits = all[i].logits().unwrap();
            assert!(bits(logits) == want[2 + i][n_ready[i]]);
            n_ready[i] += 1;
            if n_ready[i] == 1 {
                let id = argmax(logits) as u32;
                all[i].push(id).unwrap();
            }
        }
    }
}

/// A prompt that another thread cancels at some time or other; then save and restore.
fn cancelled(model: &Model, want: &Wanted) {
    let mut s = session(model);
    let canceller = s.canceller();
    let thread = thread::spawn(move || canceller.cancel());
    let mut n_cancelled = 0;
    while let Err(e) = s.prefill(&prompt(4)) {
        assert!(matches!(e, Error::Cancelled), "{e}");
        assert!(s.is_empty() && s.logits().is_none());
        n_cancelled += 1;
    }
    thread.join().unwrap();
    assert!(n_cancelled <= 1, "a cancel ends one call");
    let mut blob = Vec::new();
    s.save(&mut blob).unwrap();
    drop(s);
    let mut s = model.restore(&mut &*blob, &SessionOptions::default()).unwrap();
    while let Err(e) = s.decode(argmax(s.logits().unwrap()).try_into().unwrap()) {
        assert!(matches!(e, Error::Cancelled), "{e}");
    }
    assert!(bits(s.logits().unwrap()) == want[4][1]);
}

#[test]
fn sessions_of_many_threads_come_to_what_each_comes_to_alone() {
    let want = wanted();
    assert!(want[0] != want[1] && want[2] != want[3]);
    explore("engine", 500, move || {
        let model = model();
        let threads = [alone, together, cancelled].map(|run| {
            let (model, want) = (model.clone(), want.clone());
            thread::spawn(move || run(&model, &want))
        });
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        assert_eq!(model.pool_usage().n_used, 0);
    });
}
