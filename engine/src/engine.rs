//! Opening a model: checkpoint in, sessions out.
//!
//! An [`Engine`] is a choice of device and threads, a [`Model`] is weights and a page pool on it, and a
//! [`Session`](crate::Session) is one sequence in that pool. Models and sessions are handles: clones are cheap, the last one frees, and any order of dropping is safe.

use std::ops::{ControlFlow, Deref, DerefMut, RangeInclusive};
use std::path::{Path, PathBuf};

use loris_loader::{Chat, ChatTemplate, Checkpoint, ModelConfig, OpenOptions, Storage, Tokenizer};

use crate::backend::cpu::{CpuBackend, CpuOptions, Isa};
use crate::backend::cuda::{self, CudaBackend, CudaOptions, Passes};
use crate::backend::{Backend, Stop};
use crate::device::{DeviceChoice, Found, Placement};
use crate::error::Error;
use crate::forward::{Execute, Executor};
use crate::gate::{Gate, Turn};
use crate::log::{Level, Log};
use crate::memory;
use crate::model::{self, Source};
use crate::plan::{ModelOptions, Plan};
use crate::pool::{AuxPool, Pool};
use crate::sampler::{Sampler, SamplerParams};
use crate::sync::{Arc, Mutex, MutexGuard, lock};

/// Where models run.
#[derive(Clone, Debug, Default)]
pub struct EngineOptions {
    /// The device.
    pub device: DeviceChoice,
    /// Threads of the CPU backend; `None`: as many as the process may use.
    pub threads: Option<usize>,
    /// Instruction set of the CPU backend; `None`: the fastest that the machine has.
    pub isa: Option<Isa>,
    /// The CUDA driver's library; `None`: `libcuda.so.1`.
    pub driver: Option<PathBuf>,
    /// How the CUDA backend runs the passes of decode.
    pub passes: Passes,
    /// Who is told what happens besides results and errors.
    pub log: Log,
}

impl EngineOptions {
    /// Threads that can be asked for.
    pub const THREADS: RangeInclusive<usize> = 1..=1024;
}

/// A device to open models on.
#[derive(Clone, Debug)]
pub struct Engine {
    cpu: CpuOptions,
    device: DeviceChoice,
    found: Found,
    log: Log,
}

/// How far the opening of a model has come.
#[derive(Clone, Copy, Debug)]
pub struct LoadProgress {
    /// Bytes of weights that are in place.
    pub done: u64,
    /// Bytes of weights in all.
    pub total: u64,
}

/// An opened model: immutable weights, a page pool, and a tokenizer if the folder has one.
#[derive(Clone)]
pub struct Model {
    pub(crate) shared: Arc<Shared>,
}

/// What the sessions of a model share. Locks are taken in the order `gate`, `exec`, `pool`.
pub(crate) struct Shared {
    pub(crate) config: ModelConfig,
    pub(crate) plan: Plan,
    pub(crate) fingerprint: u64,
    /// Weight files that passes read where they are mapped.
    mapped: Vec<std::sync::Arc<Storage>>,
    placement: Placement,
    /// Who may lock `exec`.
    pub(crate) gate: Arc<Gate>,
    pub(crate) exec: Mutex<Box<dyn Execute>>,
    pub(crate) pool: Mutex<Pool>,
    tokenizer: Option<Tokenizer>,
    chat: Option<ChatTemplate>,
}

impl Engine {
    /// An engine on the device that the options choose.
    pub fn new(options: &EngineOptions) -> Result<Self, Error> {
        let mut cpu = CpuOptions { isa: options.isa, ..CpuOptions::default() };
        if let Some(threads) = options.threads {
            if !EngineOptions::THREADS.contains(&threads) {
                let (least, most) = EngineOptions::THREADS.into_inner();
                return Err(Error::option("threads", threads, format!("{least} to {most}")));
            }
            cpu.threads = threads;
        }
        memory::room_for(0, "the device")?;
        let cuda = CudaOptions { index: 0, driver: options.driver.clone(), passes: options.passes };
        let found = Found::new(options.device, cuda)?;
        if let Found::Cpu { why_not_cuda: Some(reason) } = &found {
            options.log.say(Level::Info, format_args!("models will be on the CPU: {reason}"));
        }
        Ok(Self { cpu, device: options.device, found, log: options.log.clone() })
    }

    /// True if the choice of device led to a CUDA device. A model may still be placed on the CPU if the choice
    /// was left to loris: see [`Model::placement`].
    pub fn has_cuda(&self) -> bool {
        matches!(self.found, Found::Cuda(_))
    }

    /// Opens a model folder.
    pub fn open(&self, dir: &Path, options: &ModelOptions) -> Result<Model, Error> {
        self.open_with(dir, options, &mut |_| ControlFlow::Continue(()))
    }

    /// As [`open`](Self::open); `progress` is called as weights come in, and may stop it.
    pub fn open_with(
        &self,
        dir: &Path,
        options: &ModelOptions,
        progress: &mut dyn FnMut(LoadProgress) -> ControlFlow<()>,
    ) -> Result<Model, Error> {
        let checkpoint = loris_loader::open(dir, &OpenOptions { load: options.load })?;
        self.open_checkpoint_with(checkpoint, options, progress)
    }

    /// Opens a checkpoint that is in memory already.
    pub fn open_checkpoint(
        &self,
        checkpoint: Checkpoint,
        options: &ModelOptions,
    ) -> Result<Model, Error> {
        self.open_checkpoint_with(checkpoint, options, &mut |_| ControlFlow::Continue(()))
    }

    /// As [`open_with`](Self::open_with), of a checkpoint that is in memory already.
    pub fn open_checkpoint_with(
        &self,
        checkpoint: Checkpoint,
        options: &ModelOptions,
        progress: &mut dyn FnMut(LoadProgress) -> ControlFlow<()>,
    ) -> Result<Model, Error> {
        memory::room_for(0, "the model")?;
        let Checkpoint { config, weights, tokenizer, chat, warnings, .. } = checkpoint;
        warnings.iter().for_each(|warning| self.log.say(Level::Warn, format_args!("{warning}")));
        model::check(&config, &weights)?;
        let plan = Plan::new(&config, weights.total_bytes(), options)?;
        let (source, fingerprint) = (Source::Checkpoint(&weights), weights.fingerprint());
        let shared = self.shared(config, plan, source, fingerprint, progress)?;
        let mut mapped: Vec<_> =
            weights.files().iter().filter(|file| file.is_mapped()).cloned().collect();
        drop(weights);
        // A backend that copied its weights holds none.
        mapped.retain(|file| std::sync::Arc::strong_count(file) > 1);
        Ok(self.opened(Shared { mapped, tokenizer, chat, ..shared }))
    }

    /// A model with the shape of a published one and random weights, which are made on the device:
    /// [`synthetic::NAMES`](model::synthetic::NAMES).
    pub fn open_synthetic(&self, name: &str, options: &ModelOptions) -> Result<Model, Error> {
        let config = model::synthetic::config(name)?;
        let plan = Plan::new(&config, model::synthetic::weight_bytes(&config), options)?;
        let fingerprint = xxhash_rust::xxh3::xxh3_64(name.as_bytes());
        let progress = &mut |_| ControlFlow::Continue(());
        Ok(self.opened(self.shared(config, plan, Source::Random, fingerprint, progress)?))
    }

    /// Puts the weights on the device, and makes what sessions share.
    fn shared(
        &self,
        config: ModelConfig,
        plan: Plan,
        source: Source<'_>,
        fingerprint: u64,
        progress: &mut dyn FnMut(LoadProgress) -> ControlFlow<()>,
    ) -> Result<Shared, Error> {
        let (exec, placement) = self.executor(&config, source, &plan, progress)?;
        let aux = AuxPool::new(plan.n_transit_pages, plan.n_aux_pages, plan.layout.page_len)?;
        Ok(Shared {
            fingerprint,
            mapped: Vec::new(),
            placement,
            gate: Arc::default(),
            exec: Mutex::new(exec),
            pool: Mutex::new(Pool::new(plan.n_pages, aux)?),
            config,
            plan,
            tokenizer: None,
            chat: None,
        })
    }

    fn opened(&self, shared: Shared) -> Model {
        let Shared { plan, placement, .. } = &shared;
        if let (true, Some(reason)) = (self.has_cuda(), &placement.why_not_cuda) {
            self.log.say(Level::Warn, format_args!("the model is on the CPU: {reason}"));
        }
        let (weights, kv) = (plan.weight_bytes, plan.kv_bytes);
        self.log.say(
            Level::Info,
            format_args!(
                "model of {} layers on {}: {weights} bytes of weights, {kv} bytes of KV pages at most",
                plan.n_layers, placement.device
            ),
        );
        Model { shared: Arc::new(shared) }
    }

    /// Puts the weights on the device.
    fn executor(
        &self,
        config: &ModelConfig,
        source: Source<'_>,
        plan: &Plan,
        progress: &mut dyn FnMut(LoadProgress) -> ControlFlow<()>,
    ) -> Result<(Box<dyn Execute>, Placement), Error> {
        let mut done = 0_u64;
        let mut report = |bytes: usize| {
            done += bytes as u64;
            match progress(LoadProgress { done, total: plan.weight_bytes }) {
                ControlFlow::Continue(()) => Ok(()),
                ControlFlow::Break(()) => Err(Error::Cancelled),
            }
        };
        let why_not_cuda = match (&self.found, self.device) {
            (Found::Cpu { why_not_cuda }, _) => why_not_cuda.clone(),
            (Found::Cuda(options), choice) => match cuda::check(plan, config) {
                Ok(()) => {
                    let backend = CudaBackend::new(options)?;
                    let device = format!("cuda:{}", options.index);
                    let exec = boxed(backend, config, source, plan, &mut report)?;
                    return Ok((exec, Placement { device, why_not_cuda: None }));
                }
                Err(e) if choice == DeviceChoice::Auto => Some(e.to_string()),
                Err(e) => return Err(e),
            },
        };
        let exec = boxed(CpuBackend::new(self.cpu)?, config, source, plan, &mut report)?;
        Ok((exec, Placement { device: "cpu".into(), why_not_cuda }))
    }
}

fn boxed<B: Backend>(
    backend: B,
    config: &ModelConfig,
    source: Source<'_>,
    plan: &Plan,
    progress: &mut model::Progress<'_>,
) -> Result<Box<dyn Execute>, Error> {
    Ok(Box::new(Executor::new(backend, config, source, plan, progress)?))
}

impl Model {
    /// Where the model runs.
    pub fn placement(&self) -> &Placement {
        &self.shared.placement
    }

    /// Facts of the checkpoint.
    pub fn config(&self) -> &ModelConfig {
        &self.shared.config
    }

    /// Sizes that the model was opened with.
    pub fn plan(&self) -> &Plan {
        &self.shared.plan
    }

    /// The folder's tokenizer.
    pub fn tokenizer(&self) -> Option<&Tokenizer> {
        self.shared.tokenizer.as_ref()
    }

    /// The folder's chat template.
    pub fn chat_template(&self) -> Option<&ChatTemplate> {
        self.shared.chat.as_ref()
    }

    /// The ids of a chat, ready for [`Session::prefill`](crate::Session::prefill): the template's special tokens are parsed, those
    /// that the chat happens to spell are not. `None` if the folder lacks a template or tokenizer.
    pub fn encode_chat(&self, chat: &Chat) -> Result<Option<Vec<u32>>, Error> {
        let (Some(template), Some(tokenizer)) = (self.chat_template(), self.tokenizer()) else {
            return Ok(None);
        };
        Ok(Some(template.encode(tokenizer, chat)?))
    }

    /// A sampler for the model's logits: ids that its tokenizer does not have are never chosen.
    pub fn sampler(&self, params: SamplerParams) -> Result<Sampler, Error> {
        let vocab_size = self.config().vocab_size;
        let padding = self.tokenizer().into_iter().flat_map(|t| t.padded_ids(vocab_size));
        Sampler::new(params, vocab_size, padding)
    }

    /// Pages of the pool that are free, in use, and the most that ever were in use.
    pub fn pool_usage(&self) -> PoolUsage {
        let pool = self.shared.pool();
        PoolUsage {
            n_pages: pool.pages.n_pages(),
            n_used: pool.pages.n_used(),
            n_peak: pool.pages.peak(),
            page_bytes: self.shared.plan.layout.bytes(),
            n_aux_used: pool.aux.n_used(),
        }
    }
}

impl std::fmt::Debug for Model {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Model").field("config", &self.shared.config).finish_non_exhaustive()
    }
}

/// How full the page pool is.
#[derive(Clone, Copy, Debug)]
pub struct PoolUsage {
    /// Pages in the pool.
    pub n_pages: usize,
    /// Pages that some session holds; a shared page counts once.
    pub n_used: usize,
    /// The most pages that were in use at once.
    pub n_peak: usize,
    /// Bytes of a page.
    pub page_bytes: usize,
    /// Pages of hidden states that some session holds, a shared one once: none but those of waiting tokens
    /// where no call is under way, and those kept for
    /// prompts to come.
    pub n_aux_used: usize,
}

impl Shared {
    /// Fails where a weight file that passes read from was written to since it was opened: a file that became shorter
    /// would end the process.
    pub(crate) fn check_weights(&self) -> Result<(), Error> {
        self.mapped.iter().try_for_each(|file| Ok(file.check_unchanged()?))
    }

    /// The page pool.
    pub(crate) fn pool(&self) -> MutexGuard<'_, Pool> {
        lock(&self.pool)
    }

    /// The device, when it is this thread's turn. A pass that panicked wrote only rows and pages that
    /// nobody reads, so whoever comes next goes on.
    pub(crate) fn device(&self) -> Device<'_> {
        let turn = self.gate.enter();
        Device { exec: lock(&self.exec), _turn: turn }
    }

    /// The device, or `None` if the call is stopped while it waits.
    pub(crate) fn device_unless(&self, stop: &Stop) -> Option<Device<'_>> {
        let turn = self.gate.enter_unless(|| stop.is_set())?;
        Some(Device { exec: lock(&self.exec), _turn: turn })
    }
}

/// The device and the turn on it.
pub(crate) struct Device<'a> {
    // Dropped in this order: who has the turn finds the lock free.
    exec: MutexGuard<'a, Box<dyn Execute>>,
    _turn: Turn<'a>,
}

impl Deref for Device<'_> {
    type Target = dyn Execute;

    fn deref(&self) -> &Self::Target {
        &**self.exec
    }
}

impl DerefMut for Device<'_> {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut **self.exec
    }
}
