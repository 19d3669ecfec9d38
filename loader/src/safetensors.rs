//! The safetensors format, read strictly.
//!
//! A file is a little-endian `u64` N, N bytes of JSON, then data. The JSON maps each tensor's name to its element type,
//! shape and byte range in the data. [`parse`] is a pure function over the bytes of a file: it allocates no more than
//! the header's own size asks for and looks at no data.
//!
//! It is stricter than the format's reference crate, because two readers that disagree about a file are how a
//! checkpoint comes to mean two things: a name given twice, white space before the header, bytes that no tensor owns,
//! unknown keys, and dimensions or ranks that no model has are all faults. What `parse` accepts, the reference accepts
//! too, with the same meaning; a differential test holds it to that.
//!
//! Data may begin at any byte, also at one that is no multiple of its element size, as some writers leave it.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fmt;
use std::ops::Range;

use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

use crate::dtype::Dtype;
use crate::quoted::Text;

/// The longest header, in bytes.
pub const MAX_HEADER: usize = 100_000_000;
/// The most tensors in one file.
pub const MAX_TENSORS: usize = 200_000;
/// The longest name of a tensor, in bytes.
pub const MAX_NAME: usize = 512;
/// The most dimensions of a tensor.
pub const MAX_RANK: usize = 8;
/// The largest dimension of a tensor.
pub const MAX_DIM: u64 = 1 << 40;

const PREFIX: usize = 8;

/// The tensors of one file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// Name to what the header says of it.
    pub tensors: BTreeMap<String, TensorInfo>,
    /// Where the data begins, in bytes from the file's start.
    pub data_start: usize,
}

/// What a header says of one tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Element type.
    pub dtype: Dtype,
    /// Dimensions, slowest first.
    pub shape: Vec<usize>,
    /// The tensor's bytes, counted from the file's start.
    pub range: Range<usize>,
}

/// The rule that a file breaks.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs)] // each message is the documentation; the fields are what it names
pub enum Fault {
    #[error("file of {len} bytes: expected at least 8, for the header's length")]
    TooShort { len: usize },
    #[error("header length {header}: expected at most {limit} (the file has {len} bytes)")]
    HeaderTooLong { header: u64, limit: usize, len: usize },
    #[error("header starts with byte {found:?}: expected '{{'")]
    HeaderStart { found: Option<u8> },
    #[error("header ends with byte {found:#04x}: expected '}}' and then only spaces")]
    HeaderEnd { found: u8 },
    #[error("header is not valid: {why}")]
    Json { why: String },
    #[error("more than {MAX_TENSORS} tensors")]
    TooManyTensors,
    #[error("tensor name {name}: expected 1 to {MAX_NAME} bytes without control characters")]
    Name { name: Text },
    #[error("tensor {tensor}: the name is given twice")]
    DuplicateName { tensor: Text },
    #[error("tensor {tensor}: key {key} is given twice")]
    DuplicateKey { tensor: Text, key: Text },
    #[error("tensor {tensor}: unknown key {key}: expected dtype, shape and data_offsets")]
    UnknownKey { tensor: Text, key: Text },
    #[error("tensor {tensor}: key {key} is missing")]
    MissingKey { tensor: Text, key: &'static str },
    #[error("tensor {tensor}: unknown element type {dtype}")]
    UnknownDtype { tensor: Text, dtype: Text },
    #[error("tensor {tensor}: more than {MAX_RANK} dimensions")]
    Rank { tensor: Text },
    #[error("tensor {tensor}: dimension {dim}: expected at most 2^40")]
    Dim { tensor: Text, dim: u64 },
    #[error("tensor {tensor}: shape {shape:?} of {dtype} has more bytes than can be counted")]
    Overflow { tensor: Text, shape: Vec<usize>, dtype: Dtype },
    #[error(
        "tensor {tensor}: data_offsets [{begin}, {end}]: expected them within the {len} bytes of data"
    )]
    OffsetsOutside { tensor: Text, begin: u64, end: u64, len: usize },
    #[error(
        "tensor {tensor}: shape {shape:?} of {dtype} takes {expected} bytes, data_offsets give {actual}"
    )]
    Size { tensor: Text, shape: Vec<usize>, dtype: Dtype, expected: usize, actual: usize },
    #[error("tensor {tensor}: begins at {begin} of the data, expected {expected}: {}", gap(*.begin, *.expected))]
    NotContiguous { tensor: Text, begin: usize, expected: usize },
    #[error("{actual} bytes of data, expected {expected}: the file has bytes that no tensor owns")]
    TrailingBytes { expected: usize, actual: usize },
    #[error("__metadata__: {why}")]
    Metadata { why: String },
}

fn gap(begin: usize, expected: usize) -> &'static str {
    if begin < expected {
        "it overlaps the tensor before it"
    } else {
        "no tensor owns the bytes between"
    }
}

/// Reads the header of a whole file's `bytes` and checks every rule that needs no data.
pub fn parse(bytes: &[u8]) -> Result<Header, Fault> {
    let json = header_bytes(bytes)?;
    let data_start = PREFIX + json.len();
    let data_len = bytes.len() - data_start;

    let mut draft =
        Draft { data_start, data_len, tensors: BTreeMap::new(), metadata_seen: false, fault: None };
    let mut de = serde_json::Deserializer::from_slice(json);
    let read = HeaderSeed(&mut draft).deserialize(&mut de).and_then(|()| de.end());
    match (draft.fault.take(), read) {
        (Some(fault), _) => return Err(fault),
        (None, Err(err)) => return Err(Fault::Json { why: err.to_string() }),
        (None, Ok(())) => {}
    }
    check_cover(&draft.tensors, data_start, data_len)?;
    Ok(Header { tensors: draft.tensors, data_start })
}

/// The header's JSON: it starts with `{` and ends with `}` and spaces.
pub(crate) fn header_bytes(bytes: &[u8]) -> Result<&[u8], Fault> {
    let len = bytes.len();
    let (prefix, rest) = bytes.split_first_chunk::<PREFIX>().ok_or(Fault::TooShort { len })?;
    let header = u64::from_le_bytes(*prefix);
    let limit = MAX_HEADER.min(rest.len());
    let json = usize::try_from(header)
        .ok()
        .filter(|&n| n <= limit)
        .and_then(|n| rest.get(..n))
        .ok_or(Fault::HeaderTooLong { header, limit, len })?;
    if json.first() != Some(&b'{') {
        return Err(Fault::HeaderStart { found: json.first().copied() });
    }
    match json.iter().rev().find(|&&byte| byte != b' ') {
        Some(b'}') | None => Ok(json),
        Some(&found) => Err(Fault::HeaderEnd { found }),
    }
}

/// Tensors must tile the data: each begins where the one before it ends, the last ends with the file.
fn check_cover(
    tensors: &BTreeMap<String, TensorInfo>,
    data_start: usize,
    data_len: usize,
) -> Result<(), Fault> {
    let mut order: Vec<(&String, &TensorInfo)> = tensors.iter().collect();
    order.sort_by_key(|(_, info)| (info.range.start, info.range.end));
    let mut end = data_start;
    for (name, info) in order {
        if info.range.start != end {
            return Err(Fault::NotContiguous {
                tensor: name.as_str().into(),
                begin: info.range.start - data_start,
                expected: end - data_start,
            });
        }
        end = info.range.end;
    }
    if end - data_start != data_len {
        return Err(Fault::TrailingBytes { expected: end - data_start, actual: data_len });
    }
    Ok(())
}

/// What has been read so far. A rule that breaks is kept in `fault`; the JSON reader is then stopped with an empty
/// error, since its own error type cannot carry ours.
struct Draft {
    data_start: usize,
    data_len: usize,
    tensors: BTreeMap<String, TensorInfo>,
    metadata_seen: bool,
    fault: Option<Fault>,
}

impl Draft {
    fn stop<E: serde::de::Error>(&mut self, fault: Fault) -> E {
        self.fault.get_or_insert(fault);
        E::custom("stopped")
    }

    fn add(&mut self, name: String, raw: RawInfo) -> Result<(), Fault> {
        let info = raw.check(&name, self.data_start, self.data_len)?;
        if self.tensors.len() >= MAX_TENSORS {
            return Err(Fault::TooManyTensors);
        }
        match self.tensors.entry(name) {
            Entry::Occupied(seen) => {
                Err(Fault::DuplicateName { tensor: seen.key().as_str().into() })
            }
            Entry::Vacant(free) => {
                free.insert(info);
                Ok(())
            }
        }
    }
}

/// A tensor's entry as it stands in the JSON.
#[derive(Default)]
struct RawInfo {
    dtype: Option<String>,
    shape: Option<Vec<u64>>,
    offsets: Option<(u64, u64)>,
}

impl RawInfo {
    fn check(self, name: &str, data_start: usize, data_len: usize) -> Result<TensorInfo, Fault> {
        let tensor = || Text::from(name);
        if name.is_empty() || name.len() > MAX_NAME || name.chars().any(char::is_control) {
            return Err(Fault::Name { name: tensor() });
        }
        let missing = |key| Fault::MissingKey { tensor: tensor(), key };
        let dtype = self.dtype.ok_or_else(|| missing("dtype"))?;
        let dims = self.shape.ok_or_else(|| missing("shape"))?;
        let (begin, end) = self.offsets.ok_or_else(|| missing("data_offsets"))?;

        let dtype = Dtype::from_name(&dtype)
            .ok_or_else(|| Fault::UnknownDtype { tensor: tensor(), dtype: dtype.into() })?;
        if let Some(&dim) = dims.iter().find(|&&dim| dim > MAX_DIM) {
            return Err(Fault::Dim { tensor: tensor(), dim });
        }
        let shape: Vec<usize> = dims
            .iter()
            .map(|&dim| usize::try_from(dim).map_err(|_| Fault::Dim { tensor: tensor(), dim }))
            .collect::<Result<_, _>>()?;
        let Some(size) = byte_len(dtype, &shape) else {
            return Err(Fault::Overflow { tensor: tensor(), shape, dtype });
        };
        let range = usize::try_from(begin)
            .ok()
            .zip(usize::try_from(end).ok())
            .filter(|&(begin, end)| begin <= end && end <= data_len)
            .map(|(begin, end)| data_start + begin..data_start + end)
            .ok_or_else(|| Fault::OffsetsOutside { tensor: tensor(), begin, end, len: data_len })?;
        if range.len() != size {
            let actual = range.len();
            return Err(Fault::Size { tensor: tensor(), shape, dtype, expected: size, actual });
        }
        Ok(TensorInfo { dtype, shape, range })
    }
}

/// Bytes of a tensor, or `None` where they cannot be counted.
pub(crate) fn byte_len(dtype: Dtype, shape: &[usize]) -> Option<usize> {
    shape.iter().try_fold(1usize, |n, &dim| n.checked_mul(dim))?.checked_mul(dtype.size())
}

/// The header's outer object.
struct HeaderSeed<'a>(&'a mut Draft);

impl<'de> DeserializeSeed<'de> for HeaderSeed<'_> {
    type Value = ();
    fn deserialize<D: Deserializer<'de>>(self, de: D) -> Result<(), D::Error> {
        de.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for HeaderSeed<'_> {
    type Value = ();
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors")
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let draft = self.0;
        while let Some(name) = map.next_key::<String>()? {
            if name == "__metadata__" {
                if std::mem::replace(&mut draft.metadata_seen, true) {
                    return Err(draft.stop(Fault::Metadata { why: "given twice".into() }));
                }
                map.next_value_seed(MetadataSeed(draft))?;
                continue;
            }
            let mut raw = RawInfo::default();
            map.next_value_seed(InfoSeed { name: &name, raw: &mut raw, draft })?;
            draft.add(name, raw).map_err(|fault| draft.stop(fault))?;
        }
        Ok(())
    }
}

/// `__metadata__`: strings to strings, each key once. Nothing in it is used.
struct MetadataSeed<'a>(&'a mut Draft);

impl<'de> DeserializeSeed<'de> for MetadataSeed<'_> {
    type Value = ();
    fn deserialize<D: Deserializer<'de>>(self, de: D) -> Result<(), D::Error> {
        de.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for MetadataSeed<'_> {
    type Value = ();
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("__metadata__ as an object of strings")
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let mut seen = std::collections::BTreeSet::new();
        while let Some((key, _)) = map.next_entry::<String, String>()? {
            if seen.contains(&key) {
                return Err(self
                    .0
                    .stop(Fault::Metadata { why: format!("key {} is given twice", Text(key)) }));
            }
            seen.insert(key);
        }
        Ok(())
    }
}

/// One tensor's object.
struct InfoSeed<'a> {
    name: &'a str,
    raw: &'a mut RawInfo,
    draft: &'a mut Draft,
}

impl<'de> DeserializeSeed<'de> for InfoSeed<'_> {
    type Value = ();
    fn deserialize<D: Deserializer<'de>>(self, de: D) -> Result<(), D::Error> {
        de.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for InfoSeed<'_> {
    type Value = ();
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "tensor {} as an object with dtype, shape and data_offsets",
            Text::from(self.name)
        )
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let InfoSeed { name, raw, draft } = self;
        while let Some(key) = map.next_key::<String>()? {
            let repeated = match key.as_str() {
                "dtype" => raw.dtype.replace(map.next_value()?).is_some(),
                "shape" => match map.next_value_seed(Dims)? {
                    Some(dims) => raw.shape.replace(dims).is_some(),
                    None => return Err(draft.stop(Fault::Rank { tensor: name.into() })),
                },
                "data_offsets" => raw.offsets.replace(map.next_value()?).is_some(),
                _ => {
                    return Err(
                        draft.stop(Fault::UnknownKey { tensor: name.into(), key: key.into() })
                    );
                }
            };
            if repeated {
                return Err(
                    draft.stop(Fault::DuplicateKey { tensor: name.into(), key: key.into() })
                );
            }
        }
        Ok(())
    }
}

/// A shape: `None` where it has too many dimensions. A long list is never collected.
struct Dims;

impl<'de> DeserializeSeed<'de> for Dims {
    type Value = Option<Vec<u64>>;
    fn deserialize<D: Deserializer<'de>>(self, de: D) -> Result<Self::Value, D::Error> {
        de.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for Dims {
    type Value = Option<Vec<u64>>;
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of dimensions")
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
        let mut dims = Vec::with_capacity(MAX_RANK);
        while let Some(dim) = seq.next_element::<u64>()? {
            if dims.len() == MAX_RANK {
                while seq.next_element::<IgnoredAny>()?.is_some() {}
                return Ok(None);
            }
            dims.push(dim);
        }
        Ok(Some(dims))
    }
}
