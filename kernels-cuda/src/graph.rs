//! Graphs: work that is recorded once and queued again as a whole.
//!
//! A graph names device memory by address. Memory of buffers that are dropped while there are graphs is therefore
//! kept until the last graph is gone.

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

impl Device {
    /// Records what `work` launches, instead of running it. Memory cannot be allocated, copied to or from, or
    /// waited for meanwhile: that is an error, and nothing is recorded.
    pub fn capture(&self, work: impl FnOnce(&Device) -> Result<(), Error>) -> Result<Graph, Error> {
        self.set_current()?;
        // Counted before the first address is recorded; of an error, recording ends before the graph does.
        self.shared.freed.lock().unwrap_or_else(PoisonError::into_inner).n_graphs += 1;
        let mut graph = Graph { exec: None, shared: Arc::clone(&self.shared) };
        let capture = Capture::begin(self.stream())?;
        work(self)?;
        graph.exec = Some(capture.end()?);
        Ok(graph)
    }
}

impl Graph {
    /// Queues the work in the stream of the device that recorded it.
    pub fn launch(&self, device: &Device) -> Result<(), Error> {
        if !Arc::ptr_eq(&self.shared, &device.shared) {
            let (what, found) = ("graph", "another device".to_string());
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
        // Errors here are those of earlier work, which its own callers hear of.
        let _ = self.shared.set_current();
        let _ = self.shared.stream.synchronize();
        self.exec = None;
        let mut freed = self.shared.freed.lock().unwrap_or_else(PoisonError::into_inner);
        freed.n_graphs -= 1;
        if freed.n_graphs == 0 {
            freed.memory.clear();
        }
    }
}
