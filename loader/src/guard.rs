//! Where panics of the tokenizer library end.

use std::panic::{AssertUnwindSafe, catch_unwind};

/// Runs code of the tokenizer library, which was not written for hostile files and texts: a panic there is an error here.
pub(crate) fn guard<T>(call: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(result) => result.map_err(|err| err.to_string()),
        Err(_) => Err("the tokenizer library failed on it".into()),
    }
}
