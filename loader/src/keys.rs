//! Typed, range-checked access to the keys of a JSON object.
//!
//! `null` is read as absent, as the writers of these files mean it. Every refusal names the file, the key with its
//! parents, what was expected and what was there.

use std::ops::RangeInclusive;
use std::path::Path;

use serde_json::{Map, Value};

use crate::error::Error;
use crate::json::describe;

/// An object of a JSON file.
#[derive(Clone, Copy)]
pub(crate) struct Keys<'a> {
    pub(crate) file: &'a Path,
    /// The path to this object inside the file, ending in a dot, or empty.
    pub(crate) parent: &'a str,
    pub(crate) map: &'a Map<String, Value>,
}

/// A test of a number and its description.
pub(crate) struct Accept {
    pub(crate) expected: &'static str,
    pub(crate) test: fn(f64) -> bool,
}

impl<'a> Keys<'a> {
    pub(crate) fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    pub(crate) fn wrong(&self, key: &str, expected: impl Into<String>) -> Error {
        Error::Value {
            file: self.file.into(),
            key: format!("{}{key}", self.parent),
            expected: expected.into(),
            actual: self.map.get(key).map_or_else(|| "nothing".into(), describe),
        }
    }

    pub(crate) fn unsupported(&self, key: &str, supported: &'static str) -> Error {
        Error::Unsupported {
            file: self.file.into(),
            key: format!("{}{key}", self.parent),
            actual: self.map.get(key).map_or_else(|| "nothing".into(), describe),
            supported,
        }
    }

    pub(crate) fn uint(
        &self,
        key: &str,
        range: RangeInclusive<usize>,
    ) -> Result<Option<usize>, Error> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let number =
            value.as_u64().and_then(|n| usize::try_from(n).ok()).filter(|n| range.contains(n));
        let expected = || format!("an integer from {} to {}", range.start(), range.end());
        number.map(Some).ok_or_else(|| self.wrong(key, expected()))
    }

    pub(crate) fn float(&self, key: &str, accept: &Accept) -> Result<Option<f64>, Error> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let number = value.as_f64().filter(|&n| n.is_finite() && (accept.test)(n));
        number.map(Some).ok_or_else(|| self.wrong(key, accept.expected))
    }

    pub(crate) fn need_float(&self, key: &str, accept: &Accept) -> Result<f64, Error> {
        self.float(key, accept)?.ok_or_else(|| self.wrong(key, accept.expected))
    }

    pub(crate) fn boolean(&self, key: &str) -> Result<Option<bool>, Error> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_bool().map(Some).ok_or_else(|| self.wrong(key, "true or false"))
    }

    /// Whether a value counts as true where any value may stand.
    pub(crate) fn truth(&self, key: &str) -> bool {
        match self.get(key) {
            None => false,
            Some(Value::Bool(is)) => *is,
            Some(Value::Number(number)) => number.as_f64() != Some(0.0),
            Some(Value::String(text)) => !text.is_empty(),
            Some(Value::Array(list)) => !list.is_empty(),
            Some(Value::Object(map)) => !map.is_empty(),
            Some(Value::Null) => false,
        }
    }

    pub(crate) fn text(&self, key: &str) -> Result<Option<&'a str>, Error> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_str().map(Some).ok_or_else(|| self.wrong(key, "a string"))
    }

    pub(crate) fn list(&self, key: &str) -> Result<Option<&'a [Value]>, Error> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_array().map(|list| Some(list.as_slice())).ok_or_else(|| self.wrong(key, "a list"))
    }

    pub(crate) fn object(&self, key: &str) -> Result<Option<&'a Map<String, Value>>, Error> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_object().map(Some).ok_or_else(|| self.wrong(key, "an object"))
    }

    /// Token ids: an integer, a list of them, or null. An id that no row of the model has, as -1 for none, never comes:
    /// it is left out.
    pub(crate) fn token_ids(&self, key: &str, vocab_size: usize) -> Result<Vec<u32>, Error> {
        let Some(value) = self.get(key) else { return Ok(Vec::new()) };
        let one = std::slice::from_ref(value);
        let list = value.as_array().map_or(one, Vec::as_slice);
        if !list.iter().all(|id| id.is_i64() || id.is_u64()) {
            return Err(self.wrong(key, "token ids"));
        }
        let has_row = |id: &u64| *id < vocab_size as u64;
        let id = |id: &Value| id.as_u64().filter(has_row).and_then(|id| u32::try_from(id).ok());
        Ok(list.iter().filter_map(id).collect())
    }

    /// One token id, or null.
    pub(crate) fn token_id(&self, key: &str, vocab_size: usize) -> Result<Option<u32>, Error> {
        match self.get(key) {
            Some(Value::Array(_)) => Err(self.wrong(key, "one token id or null")),
            _ => Ok(self.token_ids(key, vocab_size)?.first().copied()),
        }
    }
}
