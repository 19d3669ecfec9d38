//! Decode passes that are recorded once and replayed.
//!
//! What a decode pass launches depends on its [`Form`] alone: layers, counts and addresses. Tokens, positions,
//! pages, how many are sealed, and lengths are read by the kernels from the uploaded batch. So the first pass of
//! a form is recorded as a CUDA graph, and the next ones are one upload, one launch and one read of the result.
//! Prefill is not recorded: its launches hide behind its work.
//!
//! In a session that prunes, each segment of the layers has forms of its own, one for each number of tokens that are
//! revived. Which rows of the aux cache come and go, and which rows score, changes from pass to pass: `forward`
//! does that around the recording.

use std::ops::Range;

use loris_kernels::ops::attention;
use loris_kernels::ops::batch::DeviceBatch;
use loris_kernels::{Device, Graph, Recording};

use super::batch::Arrays;
use crate::backend::{Batch, Phase};
use crate::error::Error;
use crate::store::Sides;

/// How the CUDA backend runs the passes of decode; the results are the same bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Passes {
    /// Recorded once a form, then replayed.
    #[default]
    Replayed,
    /// Launched op by op: for profilers, and to compare.
    Launched,
}

/// Forms that are kept; a batch of changing size goes through many, and a schedule of pruning through as many
/// for each of its segments.
const MAX_FORMS: usize = 256;

/// What the launches of a decode pass depend on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Form {
    pub(super) n_rows: usize,
    pub(super) n_seqs: usize,
    n_logit_rows: usize,
    /// First of the layers and the one behind the last: they say whether tokens are embedded and logits follow.
    layers: (usize, usize),
    /// Splits of the longest sequence, rounded up, so that a recording serves sequences that grow.
    pub(super) n_splits: usize,
    /// Of the uploaded batch's addresses.
    generation: u64,
}

impl Form {
    pub(super) fn new(batch: &Batch<'_>, arrays: &Arrays, kv: Sides) -> Self {
        Self {
            n_rows: batch.n_rows(),
            n_seqs: batch.seqs.len(),
            n_logit_rows: batch.logit_rows.len(),
            layers: (0, 0),
            n_splits: attention::n_splits(kv, arrays.max_kv_len),
            generation: 0,
        }
    }
}

/// The recordings, and the one that is being made.
#[derive(Debug)]
pub(super) struct Recorder {
    passes: Passes,
    recorded: Vec<(Form, Graph)>,
    /// Of the pass at hand, if it can be replayed.
    form: Option<Form>,
    recording: Option<Recording>,
}

impl Recorder {
    pub(super) fn new(passes: Passes, device: &Device) -> Self {
        // A device that waits for every launch cannot record.
        let passes = if device.is_synchronous() { Passes::Launched } else { passes };
        Self { passes, recorded: Vec::new(), form: None, recording: None }
    }

    /// Memory that recordings know is about to go.
    pub(super) fn forget(&mut self) {
        self.recorded.clear();
    }

    pub(super) fn begin(&mut self, phase: Phase, form: Form, batch: &DeviceBatch) {
        self.recording = None;
        let can_record = phase == Phase::Decode && self.passes == Passes::Replayed;
        self.form = can_record.then(|| Form { generation: batch.generation(), ..form });
    }

    /// True if the pass was replayed. Otherwise its ops follow, and are recorded if they can be.
    pub(super) fn replay_or_record(
        &mut self,
        device: &Device,
        layers: &Range<usize>,
    ) -> Result<bool, Error> {
        let Some(form) = &mut self.form else { return Ok(false) };
        form.layers = (layers.start, layers.end);
        if let Some((_, graph)) = self.recorded.iter().find(|(recorded, _)| recorded == form) {
            graph.launch(device)?;
            return Ok(true);
        }
        self.recording = Some(device.record()?);
        Ok(false)
    }

    pub(super) fn end(&mut self, device: &Device, outcome: Result<(), Error>) -> Result<(), Error> {
        let Some(recording) = self.recording.take() else { return outcome };
        outcome?; // what was recorded goes with the recording
        let graph = recording.end()?;
        graph.launch(device)?;
        let form = self.form.take().unwrap_or_default();
        self.recorded.retain(|(old, _)| old.generation == form.generation); // the others are of no use
        if self.recorded.len() == MAX_FORMS {
            self.recorded.remove(0);
        }
        self.recorded.push((form, graph));
        Ok(())
    }
}
