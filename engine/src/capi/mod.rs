//! The C ABI: `engine/include/loris.h` is made from this module, comments and all.
//!
//! Every exported function is a few lines: it checks its pointers, calls the Rust API, and turns the
//! outcome into a status. Whatever can fail goes through `guard::call`, which catches panics and
//! remembers the message of a failure for its thread. A handle is a boxed, tagged `Handle` around a clone
//! of the Rust handle, so any order of freeing is safe; a session's handle holds a mutex that is only ever
//! tried, so that a second thread is told so instead of waiting, and that a panic poisons.
//!
//! `unsafe` is at home in this folder: callers promise that pointers point to what the header says.

#![allow(non_camel_case_types)] // the names are C's
#![allow(unreachable_pub)] // exported by name
#![allow(clippy::missing_safety_doc)] // what a caller promises is what the comments say of each argument
#![allow(rustdoc::broken_intra_doc_links)] // comments are C's too, where brackets index arrays
#![allow(clippy::too_many_arguments)] // plain arguments suit foreign callers better than one more struct

mod engine;
mod guard;
mod handle;
mod model;
mod out;
mod params;
mod session;
mod status;
mod text;

pub use self::engine::*;
pub use self::guard::{loris_last_error, loris_last_error_status};
pub use self::handle::{loris_engine, loris_model, loris_session, loris_text_stream};
pub use self::model::*;
pub use self::params::*;
pub use self::session::*;
pub use self::status::*;
pub use self::text::*;
