//! Opening a model: checkpoint in, sessions out.
//!
//! An [`Engine`] is a choice of device and threads, a [`Model`] is weights and a page pool on it, and a
//! [`Session`] is one sequence in that pool. Models and sessions are handles: clones are cheap, the last one frees, and any order of dropping is safe.

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use loris_loader::{ChatTemplate, Checkpoint, Message, ModelConfig, OpenOptions, Tokenizer};

use crate::backend::cpu::{CpuBackend, CpuOptions, Isa};
use crate::cache::Pool;
use crate::error::Error;
use crate::forward::{Execute, Executor};
use crate::model;
use crate::plan::{ModelOptions, Plan};
use crate::session::{Session, SessionOptions};

/// Where a model runs.
#[derive(Clone, Debug, Default)]
pub struct EngineOptions {
    /// Threads of the CPU backend; `None`: as many as the process may use.
    pub threads: Option<usize>,
    /// Instruction set of the CPU backend; `None`: the fastest that the machine has.
    pub isa: Option<Isa>,
}

/// A device to open models on.
#[derive(Clone, Debug)]
pub struct Engine {
    cpu: CpuOptions,
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

/// What the sessions of a model share. Locks are taken in the order `exec`, `pool`.
pub(crate) struct Shared {
    pub(crate) config: ModelConfig,
    pub(crate) plan: Plan,
    pub(crate) fingerprint: u64,
    pub(crate) exec: Mutex<Box<dyn Execute>>,
    pub(crate) pool: Mutex<Pool>,
    tokenizer: Option<Tokenizer>,
    chat: Option<ChatTemplate>,
}

impl Engine {
    /// An engine on the CPU.
    pub fn new(options: &EngineOptions) -> Result<Self, Error> {
        let mut cpu = CpuOptions { isa: options.isa, ..CpuOptions::default() };
        if let Some(threads) = options.threads {
            if !(1..=1024).contains(&threads) {
                return Err(Error::option("threads", threads, "1 to 1024"));
            }
            cpu.threads = threads;
        }
        Ok(Self { cpu })
    }

    /// Opens a model folder. `progress` is called as weights come in.
    pub fn open(
        &self,
        dir: &Path,
        options: &ModelOptions,
        progress: &mut dyn FnMut(LoadProgress),
    ) -> Result<Model, Error> {
        let checkpoint = loris_loader::open(dir, &OpenOptions { load: options.load })?;
        self.open_checkpoint(checkpoint, options, progress)
    }

    /// Opens a checkpoint that is in memory already.
    pub fn open_checkpoint(
        &self,
        checkpoint: Checkpoint,
        options: &ModelOptions,
        progress: &mut dyn FnMut(LoadProgress),
    ) -> Result<Model, Error> {
        let Checkpoint { config, weights, tokenizer, chat, .. } = checkpoint;
        model::check(&config, &weights)?;
        let plan = Plan::new(&config, weights.total_bytes(), options)?;
        let backend = CpuBackend::new(self.cpu)?;
        let mut done = 0_u64;
        let mut report = |bytes: usize| {
            done += bytes as u64;
            progress(LoadProgress { done, total: plan.weight_bytes });
        };
        let executor = Executor::new(backend, &config, &weights, &plan, &mut report)?;
        Ok(Model {
            shared: Arc::new(Shared {
                fingerprint: weights.fingerprint(),
                exec: Mutex::new(Box::new(executor)),
                pool: Mutex::new(Pool::new(plan.n_pages)),
                config,
                plan,
                tokenizer,
                chat,
            }),
        })
    }
}

impl Model {
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

    /// The ids of a chat, ready for [`Session::prefill`]: the template's special tokens are parsed, those
    /// that a message's text happens to spell are not. `None` if the folder lacks a template or tokenizer.
    pub fn encode_chat(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
    ) -> Result<Option<Vec<u32>>, Error> {
        let (Some(chat), Some(tokenizer)) = (self.chat_template(), self.tokenizer()) else {
            return Ok(None);
        };
        Ok(Some(chat.encode(tokenizer, messages, add_generation_prompt)?))
    }

    /// Opens an empty session.
    pub fn session(&self, options: &SessionOptions) -> Result<Session, Error> {
        Session::new(self.clone(), options)
    }

    /// Pages of the pool that are free, in use, and the most that ever were in use.
    pub fn pool_usage(&self) -> PoolUsage {
        let pool = self.shared.pool();
        PoolUsage {
            n_pages: pool.pages.n_pages(),
            n_used: pool.pages.n_used(),
            n_peak: pool.pages.peak(),
            page_bytes: self.shared.plan.layout.bytes(),
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
}

impl Shared {
    /// The page pool. Its invariants hold between calls, so a panic elsewhere does not spoil it.
    pub(crate) fn pool(&self) -> MutexGuard<'_, Pool> {
        self.pool.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The device. A pass that panicked wrote only rows and pages that nobody reads.
    pub(crate) fn exec(&self) -> MutexGuard<'_, Box<dyn Execute>> {
        self.exec.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
