//! Graphs: work that is recorded once and queued again as a whole.
//!
//! A graph names device memory by address. Memory of buffers that are dropped while there are
//! graphs is therefore kept until the last graph is gone.

use std::sync::{Arc, PoisonError};

use crate::device::Shared;
use crate::driver_ext::{Capture, GraphExec};
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
