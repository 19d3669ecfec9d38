//! loris: an in-process LLM inference engine for long prompts.

pub mod backend;
pub mod cache;
pub mod error;

pub use error::Error;
