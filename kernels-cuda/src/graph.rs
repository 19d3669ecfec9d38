//! Graphs: work that is recorded once and queued again as a whole.
//!
//! A graph names device memory by address. Memory of buffers that are dropped while there are
//! graphs is therefore kept until the last graph is gone.

use std::ptr;
use std::sync::{Arc, PoisonError};

use cust::stream::Stream;

use crate::cuda::{self, CUgraph, CUgraphExec};
use crate::device::Shared;
use crate::driver_ext::check;
use crate::{Device, Error};

/// Recorded work.
#[derive(Debug)]
pub struct Graph {
    exec: Option<GraphExec>,
    shared: Arc<Shared>,
}

/// Work that is being recorded. Dropped, it ends the recording and leaves nothing.
#[derive(Debug)]
pub struct Recording {
    // Ends before the graph, which waits for the stream when it goes.
    capture: Capture,
    graph: Graph,
}

impl Device {
    /// From now on what this thread launches is recorded instead of run. Memory cannot be
    /// allocated, copied to or from, or waited for until the recording ends: that is an error, and
    /// nothing is recorded.
    pub fn record(&self) -> Result<Recording, Error> {
        self.set_current()?;
        let capture = Capture::begin(Arc::clone(&self.shared))?;
        // Counted before the first address is recorded.
        self.shared.freed.lock().unwrap_or_else(PoisonError::into_inner).n_graphs += 1;
        Ok(Recording { capture, graph: Graph { exec: None, shared: Arc::clone(&self.shared) } })
    }

    /// Records what `work` launches.
    pub fn capture(&self, work: impl FnOnce(&Device) -> Result<(), Error>) -> Result<Graph, Error> {
        let recording = self.record()?;
        work(self)?;
        recording.end()
    }

    /// Whether every launch is waited for, as the environment asks: such a device cannot record.
    pub fn is_synchronous(&self) -> bool {
        self.synchronous
    }
}

impl Recording {
    /// What was recorded, ready to run.
    pub fn end(self) -> Result<Graph, Error> {
        let Self { capture, mut graph } = self;
        graph.exec = Some(capture.end()?);
        Ok(graph)
    }
}

impl Graph {
    /// Queues the work in the stream of the device that recorded it.
    pub fn launch(&self, device: &Device) -> Result<(), Error> {
        if !Arc::ptr_eq(&self.shared, &device.shared) {
            let (what, found) = ("graph".into(), "another device".into());
            return Err(Error::Unsupported {
                what,
                found,
                expected: "the device that recorded it",
            });
        }
        device.set_current()?;
        let Some(exec) = &self.exec else { return Ok(()) };
        // SAFETY: buffers leave their memory alone while there are graphs.
        unsafe { exec.launch(device.stream()) }
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        self.shared.settle();
        self.exec = None;
        let mut freed = self.shared.freed.lock().unwrap_or_else(PoisonError::into_inner);
        freed.n_graphs -= 1;
        if freed.n_graphs == 0 {
            freed.memory.clear();
        }
    }
}

/// A stream whose work is being recorded; ends the recording when dropped.
#[derive(Debug)]
struct Capture(Option<Arc<Shared>>);

impl Capture {
    /// Begins to record, for calls of this thread.
    fn begin(shared: Arc<Shared>) -> Result<Self, Error> {
        let stream = &shared.stream;
        let mode = cuda::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is alive.
        let code = unsafe { cuda::cuStreamBeginCapture_v2(stream.as_inner().cast(), mode) };
        check(code, "cuStreamBeginCapture", || "a graph".into())?;
        Ok(Self(Some(shared)))
    }

    /// What was recorded, ready to run.
    fn end(mut self) -> Result<GraphExec, Error> {
        let graph = self.take()?;
        let mut exec: CUgraphExec = ptr::null_mut();
        // SAFETY: the graph is alive; the driver writes a handle.
        let code = unsafe { cuda::cuGraphInstantiateWithFlags(&mut exec, graph, 0) };
        let result = check(code, "cuGraphInstantiate", || "a graph".into());
        // SAFETY: an executable graph does not need the graph it was made of.
        unsafe { cuda::cuGraphDestroy(graph) };
        result.map(|()| GraphExec(exec))
    }

    /// Ends the recording; null if it has ended before or failed.
    fn take(&mut self) -> Result<CUgraph, Error> {
        let mut graph: CUgraph = ptr::null_mut();
        let Some(shared) = self.0.take() else { return Ok(graph) };
        let stream = shared.stream.as_inner().cast();
        // SAFETY: the stream is alive; the driver writes a handle, or null where recording failed.
        let code = unsafe { cuda::cuStreamEndCapture(stream, &mut graph) };
        let ended = check(code, "cuStreamEndCapture", || "a graph".into());
        if ended.is_err() {
            // A call that was refused may have left the stream recording.
            // SAFETY: as before; what the driver made before it failed is ours.
            if unsafe { cuda::cuStreamEndCapture(stream, &mut graph) } == 0 && !graph.is_null() {
                // SAFETY: the graph is ours.
                unsafe { cuda::cuGraphDestroy(graph) };
            }
        }
        ended.map(|()| graph)
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        if let Ok(graph) = self.take()
            && !graph.is_null()
        {
            // SAFETY: the graph is ours.
            unsafe { cuda::cuGraphDestroy(graph) };
        }
    }
}

/// An executable graph.
#[derive(Debug)]
struct GraphExec(CUgraphExec);

// SAFETY: the driver lets any thread use a handle.
unsafe impl Send for GraphExec {}

impl GraphExec {
    /// Queues the whole graph.
    ///
    /// # Safety
    /// All memory that its kernels use is alive until they have run.
    unsafe fn launch(&self, stream: &Stream) -> Result<(), Error> {
        // SAFETY: handles are alive; the rest is the caller's.
        let code = unsafe { cuda::cuGraphLaunch(self.0, stream.as_inner().cast()) };
        check(code, "cuGraphLaunch", || "a graph".into())
    }
}

impl Drop for GraphExec {
    fn drop(&mut self) {
        // SAFETY: the handle is ours; the driver waits for launches that are under way.
        unsafe { cuda::cuGraphExecDestroy(self.0) };
    }
}
