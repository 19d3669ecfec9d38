//! The threads of the CPU backend.
//!
//! A *region* runs one closure on all threads of a [`Team`] and returns when all are done; inside, the
//! threads share out numbered tasks through a [`Tasks`] counter. A decode step of a small model is some
//! 150 regions of 10-50 microseconds, so what a region costs decides the speed of decode.
//!
//! Workers wait for a region by spinning for [`SPIN`] and then park; the caller waits the same way. A
//! region never waits for a worker that has not begun: the caller takes part, and once it finds no more
//! tasks it closes the region, so on an oversubscribed machine a worker that the scheduler has not run
//! costs nothing. That is safe because results do not depend on which thread runs a task.
//!
//! Why not rayon: measured on two cores, ten tasks that keep both threads busy for 20 us take 21.1 us in a
//! region of a team and 44 us in `rayon::ThreadPool::broadcast`, whose workers have gone to sleep by then;
//! empty, 1 us against 4.5 us.

use std::any::Any;
use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::time::{Duration, Instant};

use super::mem::Buf;
use crate::backend::Stop;
use crate::error::Error;
use crate::memory;
use crate::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst};
use crate::sync::thread::{self, JoinHandle, Thread};
use crate::sync::{Arc, Mutex, lock};

/// How long a thread spins before it parks.
const SPIN: Duration = Duration::from_micros(50);

/// What a thread's stack takes, in bytes, unless the host has set `RUST_MIN_STACK`.
const STACK: usize = 2 << 20;

/// The closure of a region: thread index and that thread's scratch memory.
type Region<'a> = dyn Fn(usize, &mut [f32]) + Sync + 'a;

/// A set of threads, the caller's own among them.
#[derive(Debug)]
pub(super) struct Team {
    shared: Arc<State>,
    workers: Vec<JoinHandle<()>>,
}

/// `epoch << 32 | open << 31 | workers inside`.
const OPEN: u64 = 1 << 31;
const INSIDE: u64 = OPEN - 1;

struct State {
    phase: AtomicU64,
    quit: AtomicBool,
    /// The region of the current epoch; valid while it is open or someone is inside.
    region: UnsafeCell<Option<&'static Region<'static>>>,
    scratch: Vec<UnsafeCell<Buf<f32>>>,
    parked: Vec<AtomicBool>,
    /// The caller, once it has parked to wait for workers inside.
    waiter: Mutex<Option<Thread>>,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

// SAFETY: `region` is written only while no region is open and nobody is inside; `scratch[i]` is used
// only by thread i inside a region, and by the caller (who holds the team exclusively) between regions.
unsafe impl Sync for State {}

impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("State").field("phase", &self.phase).finish_non_exhaustive()
    }
}

impl Team {
    /// A team of `n_threads`, the caller included: 1 starts no thread.
    pub(super) fn new(n_threads: usize) -> Result<Self, Error> {
        let shared = Arc::new(State {
            phase: AtomicU64::new(0),
            quit: AtomicBool::new(false),
            region: UnsafeCell::new(None),
            scratch: (0..n_threads).map(|_| UnsafeCell::new(Buf::empty())).collect(),
            parked: (0..n_threads).map(|_| AtomicBool::new(false)).collect(),
            waiter: Mutex::new(None),
            panic: Mutex::new(None),
        });
        let mut team = Self { shared, workers: Vec::new() };
        for idx in 1..n_threads {
            if !memory::has_space(STACK) {
                return Err(Error::OutOfMemory { what: "the stack of a thread", bytes: STACK });
            }
            let state = Arc::clone(&team.shared);
            let worker = thread::Builder::new()
                .name(format!("loris-{idx}"))
                .spawn(move || state.work(idx))
                .map_err(|e| Error::NoDevice {
                    device: "cpu".into(),
                    reason: format!("thread {idx} of {n_threads} could not be started: {e}"),
                })?;
            team.workers.push(worker);
        }
        Ok(team)
    }

    /// Threads, the caller's included.
    pub(super) fn n_threads(&self) -> usize {
        self.shared.scratch.len()
    }

    /// Gives every thread at least `len` numbers of scratch.
    pub(super) fn reserve_scratch(&mut self, len: usize) -> Result<(), Error> {
        for cell in &self.shared.scratch {
            // SAFETY: the team is borrowed exclusively, so no region runs.
            unsafe { &mut *cell.get() }.reserve(len, "scratch of a thread")?;
        }
        Ok(())
    }

    /// Runs `region` on the caller and on every worker that is awake before the caller is done.
    pub(super) fn run(&mut self, region: &Region<'_>) {
        let state = &*self.shared;
        if self.workers.is_empty() {
            // SAFETY: there is no other thread.
            return region(0, unsafe { &mut *state.scratch[0].get() });
        }
        // SAFETY: only the lifetime changes; `Closer` waits for everyone inside before `run` returns or
        // unwinds, and nobody enters a closed region.
        let region: &'static Region<'static> = unsafe { std::mem::transmute(region) };
        // SAFETY: nobody is inside: the last region was closed and left.
        unsafe { *state.region.get() = Some(region) };
        let epoch = (state.phase.load(SeqCst) >> 32).wrapping_add(1) & 0xffff_ffff;
        state.phase.store(epoch << 32 | OPEN, SeqCst);
        let closer = Closer(state);
        for (idx, worker) in self.workers.iter().enumerate() {
            if state.parked[idx + 1].load(SeqCst) {
                worker.thread().unpark();
            }
        }
        // SAFETY: thread 0 is the caller.
        region(0, unsafe { &mut *state.scratch[0].get() });
        drop(closer);
        let panicked = lock(&state.panic).take();
        if let Some(payload) = panicked {
            resume_unwind(payload);
        }
    }
}

impl Drop for Team {
    fn drop(&mut self) {
        self.shared.quit.store(true, SeqCst);
        for worker in self.workers.drain(..) {
            worker.thread().unpark();
            // A worker's panics were caught and passed on when they happened.
            let _ = worker.join();
        }
    }
}

/// Closes the region when dropped and waits until nobody is inside.
struct Closer<'a>(&'a State);

impl Drop for Closer<'_> {
    fn drop(&mut self) {
        let state = self.0;
        let is_done = || state.phase.load(SeqCst) & INSIDE == 0;
        state.phase.fetch_and(!OPEN, SeqCst);
        if spin_until(is_done) {
            return;
        }
        *lock(&state.waiter) = Some(thread::current());
        while !is_done() {
            thread::park();
        }
        *lock(&state.waiter) = None;
    }
}

impl State {
    fn work(&self, idx: usize) {
        let mut seen = 0;
        while let Some(phase) = self.wait(idx, seen) {
            seen = phase >> 32;
            if !self.enter(seen) {
                continue;
            }
            // SAFETY: inside an open region, so the caller keeps it alive; scratch `idx` is this thread's.
            let (region, scratch) = unsafe { (*self.region.get(), &mut **self.scratch[idx].get()) };
            let run = || region.into_iter().for_each(|region| region(idx, scratch));
            if let Err(payload) = catch_unwind(AssertUnwindSafe(run)) {
                *lock(&self.panic) = Some(payload);
            }
            if (self.phase.fetch_sub(1, SeqCst) - 1) & (OPEN | INSIDE) == 0 {
                lock(&self.waiter).iter().for_each(Thread::unpark);
            }
        }
    }

    /// Waits for an open region later than `seen`; `None` to quit.
    fn wait(&self, idx: usize, seen: u64) -> Option<u64> {
        let ready = || {
            let phase = self.phase.load(SeqCst);
            (phase >> 32 != seen && phase & OPEN != 0) || self.quit.load(SeqCst)
        };
        if !spin_until(ready) {
            self.parked[idx].store(true, SeqCst);
            while !ready() {
                thread::park();
            }
            self.parked[idx].store(false, SeqCst);
        }
        (!self.quit.load(SeqCst)).then(|| self.phase.load(SeqCst))
    }

    /// Counts this worker in, unless the region has been closed.
    fn enter(&self, epoch: u64) -> bool {
        let count_in = |phase: u64| (phase >> 32 == epoch && phase & OPEN != 0).then(|| phase + 1);
        self.phase.fetch_update(SeqCst, SeqCst, count_in).is_ok()
    }
}

/// Spins for [`SPIN`]; true as soon as `ready`.
fn spin_until(ready: impl Fn() -> bool) -> bool {
    if cfg!(shuttle) {
        return ready(); // a model has no clock, and what comes after the spinning is the harder part
    }
    let mut start = None;
    loop {
        // The clock is read now and then: it costs as much as a few dozen spins.
        for _ in 0..64 {
            if ready() {
                return true;
            }
            std::hint::spin_loop();
        }
        if start.get_or_insert_with(Instant::now).elapsed() > SPIN {
            return false;
        }
    }
}

/// Numbered tasks, handed out one by one, in ranges of neighbours.
///
/// Each thread first takes the tasks of its own contiguous range, so that it streams one range of
/// addresses, and then helps the others. Once the pass is stopped there are no more.
#[derive(Debug)]
pub(super) struct Tasks {
    ranges: Vec<Range>,
    stop: Stop,
}

/// On a cache line of its own: each is hammered by one thread.
#[repr(align(128))]
#[derive(Debug)]
struct Range {
    next: AtomicUsize,
    end: usize,
}

impl Tasks {
    /// `n_tasks` tasks in `n_ranges`: as many as there are threads, or one where neighbours do not matter.
    pub(super) fn new(n_tasks: usize, n_ranges: usize, stop: &Stop) -> Self {
        let bound = |i: usize| n_tasks * i / n_ranges;
        let range = |i| Range { next: AtomicUsize::new(bound(i)), end: bound(i + 1) };
        Self { ranges: (0..n_ranges).map(range).collect(), stop: stop.clone() }
    }

    /// The next task for a thread, if any is left.
    #[inline]
    pub(super) fn next(&self, thread_idx: usize) -> Option<usize> {
        if self.stop.is_set() {
            return None;
        }
        let n = self.ranges.len();
        (0..n).find_map(|i| {
            let range = &self.ranges[(thread_idx + i) % n];
            let task = range.next.fetch_add(1, SeqCst);
            (task < range.end).then_some(task)
        })
    }
}
