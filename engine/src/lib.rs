//! loris: an in-process LLM inference engine for long prompts.
//!
//! A Hugging Face model folder is mapped into memory and runs as it is. Three handles lead to text: an
//! [`Engine`] is a device, a [`Model`] is weights and a pool of KV pages on it, and a [`Session`] is one
//! sequence. The forward pass, the caches' bookkeeping and the sampling are written once above a small
//! set of fused ops, [`backend::Backend`], that every device implements.
//!
//! ```no_run
//! use loris::{Engine, EngineOptions, GenerateOptions, ModelOptions, SamplerParams, SessionOptions};
//! use std::ops::ControlFlow;
//!
//! # fn main() -> Result<(), loris::Error> {
//! let engine = Engine::new(&EngineOptions::default())?;
//! let dir = std::path::Path::new("models/SmolLM2-135M-Instruct");
//! let model = engine.open(dir, &ModelOptions::default())?;
//! let mut session = model.session(&SessionOptions::default())?;
//! session.prefill(&[1, 2, 3])?;
//! let mut sampler = model.sampler(SamplerParams::default())?;
//! loris::generate(&mut session, &mut sampler, &GenerateOptions::default(), &mut |token| {
//!     let _text = token.text;
//!     ControlFlow::Continue(())
//! })?;
//! # Ok(())
//! # }
//! ```

pub mod backend;
pub mod capi;
pub mod compute;
mod device;
mod engine;
mod error;
pub mod evidence;
#[cfg(test)]
mod faults;
mod file;
mod forward;
mod gate;
mod generate;
pub mod keep;
mod log;
mod logprobs;
mod memory;
pub mod model;
mod plan;
pub mod pool;
pub mod read;
mod receipt;
pub mod recipe;
mod sampler;
mod sequence;
mod session;
pub mod share;
mod state;
mod step;
pub mod store;
mod sync;

pub use backend::cuda::{CudaBytes, CudaDevice, Passes};
pub use device::{DeviceChoice, Placement, cuda_devices};
pub use engine::{Engine, EngineOptions, LoadProgress, Model, PoolUsage};
pub use error::Error;
pub use file::NewFile;
pub use generate::{Finish, GenerateOptions, Token, TokenMask, generate, generate_masked};
pub use log::{Level, Log};
pub use logprobs::{LogSoftmax, Logprob, Logprobs};
pub use loris_loader as loader;
pub use plan::{ModelOptions, Plan};
pub use receipt::Receipt;
pub use recipe::{SessionOptions, StreamOptions};
pub use sampler::{History, Sampler, SamplerParams};
pub use session::{Canceller, Session};
pub use step::Progress;
pub use store::{KvFormat, KvFormats};
