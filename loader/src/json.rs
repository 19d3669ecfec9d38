//! Small JSON files, read with a size limit and without repeated keys.
//!
//! JSON leaves open what a repeated key means, and readers differ; here it is an error.

use std::fmt;
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::Path;

use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

use crate::error::Error;
use crate::memory;
use crate::quoted::Text;

/// Memory that reading JSON takes at most, for each byte and for each value of it: a string is there twice
/// while it is read, and an object of one key takes a node with room for eleven.
const BYTES: usize = 3;
const BYTES_OF_VALUE: usize = 416;

/// How many values JSON holds at most: each but the first follows one of three characters.
pub(crate) fn n_values(json: &[u8]) -> usize {
    1 + json.iter().filter(|byte| matches!(byte, b',' | b'[' | b'{')).count()
}

/// Fails unless there is memory to read JSON.
pub(crate) fn room_to_read(json: &[u8]) -> Result<(), Error> {
    let bytes = BYTES.saturating_mul(json.len());
    let values = BYTES_OF_VALUE.saturating_mul(n_values(json));
    memory::room_for(bytes.saturating_add(values), "reading JSON")
}

/// Whether a folder has a file of this name. A link to nothing, a folder in the file's place, and what may not be looked
/// at are errors, and so is what is no file: opening a pipe would wait.
pub(crate) fn is_there(path: &Path) -> Result<bool, Error> {
    let refuse = |source| Err(Error::Io { file: path.into(), action: "open", source });
    match std::fs::metadata(path) {
        Ok(meta) if meta.is_file() => Ok(true),
        Ok(meta) if meta.is_dir() => refuse(ErrorKind::IsADirectory.into()),
        Ok(_) => refuse(std::io::Error::other("not a regular file")),
        Err(err) if err.kind() != ErrorKind::NotFound => refuse(err),
        Err(err) => match std::fs::read_link(path) {
            Ok(target) => {
                let why = format!("a link to {}, which does not exist", target.display());
                refuse(std::io::Error::new(ErrorKind::NotFound, why))
            }
            // A folder that is not there has no files either; that is for who needs one of them to say.
            Err(_) if err.kind() == ErrorKind::NotFound => Ok(false),
            Err(err) => refuse(err),
        },
    }
}

/// Fails where the first bytes of a file show that something else was stored under its name.
pub(crate) fn refuse_foreign(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    let start = &bytes[..bytes.len().min(512)];
    let text = String::from_utf8_lossy(start).to_ascii_lowercase();
    let text = text.trim_start_matches('\u{feff}').trim_start();
    let foreign = [
        (
            "version https://git-lfs",
            "a Git LFS pointer",
            "fetch the file itself, as with git lfs pull",
        ),
        ("<!doctype html", "an HTML page", "download the file again, with access to it"),
        ("<html", "an HTML page", "download the file again, with access to it"),
        ("<?xml", "an XML page", "download the file again, with access to it"),
        ("entry not found", "a server's answer", "download the file again"),
        (
            "invalid username or password",
            "a server's answer",
            "download the file again, with access to it",
        ),
    ];
    match foreign.iter().find(|(sign, ..)| text.starts_with(sign)) {
        Some(&(_, what, remedy)) => Err(Error::Foreign { file: path.into(), what, remedy }),
        None => Ok(()),
    }
}

/// The bytes of a file that may not exist and may not be longer than `limit`.
pub(crate) fn read_file(path: &Path, limit: u64) -> Result<Option<Vec<u8>>, Error> {
    let io = |action| move |source| Error::Io { file: path.into(), action, source };
    if !is_there(path)? {
        return Ok(None);
    }
    let file = File::open(path).map_err(io("open"))?;
    let actual = file.metadata().map_err(io("stat"))?.len();
    if actual > limit {
        return Err(Error::TooLarge { file: path.into(), actual, limit });
    }
    memory::room_for(usize::try_from(actual).unwrap_or(usize::MAX), "reading a file")?;
    let mut bytes = Vec::new();
    // One byte more than allowed shows a file that grew, and special files whose length is said to be 0.
    file.take(limit + 1).read_to_end(&mut bytes).map_err(io("read"))?;
    if bytes.len() as u64 > limit {
        return Err(Error::TooLarge { file: path.into(), actual: bytes.len() as u64, limit });
    }
    refuse_foreign(path, &bytes)?;
    Ok(Some(bytes))
}

/// The object in a JSON file, or `None` where there is no file.
pub(crate) fn read_object(path: &Path, limit: u64) -> Result<Option<Map<String, Value>>, Error> {
    read_file(path, limit)?.map(|bytes| parse_object(&bytes, path)).transpose()
}

/// Reads a JSON object; `path` is for the message.
pub(crate) fn parse_object(bytes: &[u8], path: &Path) -> Result<Map<String, Value>, Error> {
    let invalid = |why: String| Error::Json { file: path.into(), why };
    room_to_read(bytes)?;
    match serde_json::from_slice::<Strict>(bytes) {
        Ok(Strict(Value::Object(map))) => Ok(map),
        Ok(Strict(other)) => {
            Err(invalid(format!("expected an object, found {}", describe(&other))))
        }
        Err(err) => Err(invalid(err.to_string())),
    }
}

/// A value as messages show it.
pub(crate) fn describe(value: &Value) -> Text {
    match value {
        Value::Array(list) if list.len() > 8 => format!("a list of {}", list.len()).into(),
        Value::Object(_) => "an object".into(),
        other => other.to_string().into(),
    }
}

/// A [`Value`] without repeated keys.
struct Strict(Value);

impl<'de> Deserialize<'de> for Strict {
    fn deserialize<D: Deserializer<'de>>(de: D) -> Result<Strict, D::Error> {
        de.deserialize_any(StrictVisitor).map(Strict)
    }
}

struct StrictVisitor;

impl<'de> Visitor<'de> for StrictVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }
    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }
    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }
    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(Value::Number(value.into()))
    }
    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::Number(value.into()))
    }
    fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<Value, E> {
        Number::from_f64(value).map(Value::Number).ok_or_else(|| E::custom("number is not finite"))
    }
    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::String(value.to_owned()))
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(Strict(item)) = seq.next_element()? {
            list.push(item);
        }
        Ok(Value::Array(list))
    }
    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let mut map = Map::new();
        while let Some(key) = entries.next_key::<String>()? {
            if map.contains_key(&key) {
                return Err(A::Error::custom(format!("key {} is given twice", Text(key))));
            }
            let Strict(value) = entries.next_value()?;
            map.insert(key, value);
        }
        Ok(Value::Object(map))
    }
}
