//! The tensors of a checkpoint, from one file or from shards.
//!
//! The folder's weights are `model.safetensors`, where there is one, as in `transformers`; that an index names other files
//! then is a warning. Otherwise `model.safetensors.index.json` is the authority: every shard that it names must be
//! there, every tensor that it lists must be in the shard that it says, and a shard may hold no tensor besides. Files
//! under other names (`consolidated.safetensors`, `model.fp16.safetensors`) are not looked at.
//!
//! Names are normalised once: the prefixes `language_model.` and `model.`, which some exporters write and some leave
//! out, are dropped, so that `model.layers.0.mlp.up_proj.weight` is `layers.0.mlp.up_proj.weight`. Look-ups accept
//! either spelling.
//!
//! Tensors are read where they lie. One that begins at an odd byte is copied to where its elements are aligned, and
//! tensors that are multiplied together but differ in element type are widened to F32, which loses nothing.
//!
//! [`Weights::check_exactly`] is the rule that every tensor which the architecture needs is there once, in its shape,
//! and no other.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;
use xxhash_rust::xxh3::Xxh3;

use crate::dtype::Dtype;
use crate::error::Error;
use crate::json;
use crate::mapping::{AlignedBytes, LoadMode, Storage, TensorBytes};
use crate::memory;
use crate::quoted::Text;
use crate::safetensors::{self, MAX_TENSORS, TensorInfo};

/// The index's file name.
pub const INDEX: &str = "model.safetensors.index.json";
/// The file name of weights that are not sharded.
pub const SINGLE: &str = "model.safetensors";

const MAX_INDEX_BYTES: u64 = 64 << 20;

/// The tensors of a checkpoint, by normalised name.
#[derive(Debug, Clone)]
pub struct Weights {
    tensors: BTreeMap<String, TensorView>,
    files: Vec<Arc<Storage>>,
    origin: PathBuf,
    warnings: Vec<String>,
}

/// One tensor. It holds its bytes' file open, so that it has no lifetime.
#[derive(Debug, Clone)]
pub struct TensorView {
    /// Name without `model.` and `language_model.`.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Dimensions, slowest first.
    pub shape: Vec<usize>,
    /// The elements, little-endian, aligned to the element size.
    pub bytes: TensorBytes,
}

/// A tensor that an architecture needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Expected {
    /// Its name, with or without `model.`.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
}

/// The name without the prefixes that exporters disagree about.
pub fn normalise(name: &str) -> &str {
    let name = name.strip_prefix("language_model.").unwrap_or(name);
    name.strip_prefix("model.").unwrap_or(name)
}

impl Weights {
    /// Opens the weights of a model folder. `progress` hears the number of files opened and of all files.
    pub fn open(
        dir: &Path,
        mode: LoadMode,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Weights, Error> {
        let (index_path, single) = (dir.join(INDEX), dir.join(SINGLE));
        let mut weights = Weights::empty(dir);
        if json::is_there(&single)? {
            let (storage, tensors) = open_file(&single, mode)?;
            weights.add_file(storage, tensors)?;
            if json::is_there(&index_path)? && !names_only_single(&index_path) {
                let (used, left) = (single.display(), index_path.display());
                weights.warnings.push(format!(
                    "{used} is used; {left} beside it names other files: remove one of the two"
                ));
            }
            progress(1, 1);
            return Ok(weights);
        }
        let Some(index) = read_index(&index_path)? else {
            return Err(Error::NoWeights { dir: dir.into(), found: foreign_weights(dir) });
        };
        let shards: BTreeSet<&str> = index.values().map(String::as_str).collect();
        for shard in &shards {
            if !json::is_there(&dir.join(shard))? {
                return Err(Error::ShardMissing { file: index_path, shard: (*shard).into() });
            }
        }
        for (done, shard) in shards.iter().enumerate() {
            let path = dir.join(shard);
            let (storage, tensors) = open_file(&path, mode)?;
            check_shard(&index, shard, &path, &tensors)?;
            weights.add_file(storage, tensors)?;
            progress(done + 1, shards.len());
        }
        Ok(weights)
    }

    /// Weights that were made in memory, for models without a folder.
    pub fn from_memory(
        tensors: Vec<(String, Dtype, Vec<usize>, impl Into<AlignedBytes>)>,
    ) -> Result<Weights, Error> {
        let mut weights = Weights::empty(Path::new("memory"));
        for (name, dtype, shape, bytes) in tensors {
            let storage = Arc::new(Storage::from_memory(&name, bytes.into()));
            let (expected, actual) = (safetensors::byte_len(dtype, &shape), storage.len());
            if expected != Some(actual) {
                let expected =
                    expected.map_or("a shape that can be counted".into(), |n| n.to_string());
                return Err(Error::TensorData {
                    tensor: name.into(),
                    dtype,
                    shape,
                    expected,
                    actual,
                });
            }
            let info = TensorInfo { dtype, shape, range: 0..actual };
            weights.add_file(storage, BTreeMap::from([(name, info)]))?;
        }
        Ok(weights)
    }

    fn empty(origin: &Path) -> Weights {
        let (tensors, files, warnings) = (BTreeMap::new(), Vec::new(), Vec::new());
        Weights { tensors, files, origin: origin.into(), warnings }
    }

    /// What is odd about the folder without being wrong.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// All names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// All tensors, sorted by name.
    pub fn tensors(&self) -> impl Iterator<Item = &TensorView> {
        self.tensors.values()
    }

    /// The files that the tensors lie in.
    pub fn files(&self) -> &[Arc<Storage>] {
        &self.files
    }

    /// The tensor of this name.
    pub fn get(&self, name: &str) -> Option<TensorView> {
        self.tensors.get(normalise(name)).cloned()
    }

    /// The tensor of this name, which must exist, have this shape and be BF16, F16 or F32.
    pub fn expect(&self, name: &str, shape: &[usize]) -> Result<TensorView, Error> {
        let tensor = self.tensors.get(normalise(name)).ok_or_else(|| Error::TensorMissing {
            file: self.origin.clone(),
            tensor: name.into(),
            shape: shape.into(),
        })?;
        check_weight(tensor, shape)?;
        Ok(tensor.clone())
    }

    /// Fails unless the weights are exactly the `expected` tensors, besides those whose name is one of the `ignored` or
    /// ends with it after a dot (such as `rotary_emb.inv_freq`, or `lm_head.weight` where the head is tied).
    pub fn check_exactly(&self, expected: &[Expected], ignored: &[&str]) -> Result<(), Error> {
        for tensor in self.tensors.values() {
            let sign_of_scales =
                [".weight_scale", ".weight_packed", ".qweight", ".qzeros", ".input_scale"];
            if tensor.dtype.is_quantised()
                || sign_of_scales.iter().any(|sign| tensor.name.contains(sign))
            {
                let what = format!("tensor {} of {}", tensor.name, tensor.dtype);
                return Err(Error::Quantised { file: tensor.file(), what: what.into() });
            }
        }
        let mut needed = BTreeSet::new();
        for Expected { name, shape } in expected {
            self.expect(name, shape)?;
            needed.insert(normalise(name));
        }
        for (name, tensor) in &self.tensors {
            let is_ignored = |text: &&str| {
                name.strip_suffix(text).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
            };
            if !needed.contains(name.as_str()) && !ignored.iter().any(is_ignored) {
                let shape = tensor.shape.clone();
                return Err(Error::TensorUnexpected {
                    file: tensor.file(),
                    tensor: name.as_str().into(),
                    shape,
                });
            }
        }
        Ok(())
    }

    /// Whether the output head is the embedding, where config.json says so. A head of its own, with other numbers,
    /// counts, as in `transformers`, with a warning; and where only the head is there, it is the embedding too.
    pub(crate) fn is_tied(&mut self) -> bool {
        const EMBED: &str = "embed_tokens.weight";
        const HEAD: &str = "lm_head.weight";
        let Some(head) = self.tensors.get(HEAD) else { return true };
        let Some(embed) = self.tensors.get(EMBED) else {
            let embed = TensorView { name: EMBED.into(), ..head.clone() };
            self.tensors.insert(EMBED.into(), embed);
            return true;
        };
        let is_same = head.shape == embed.shape && same_values(head, embed);
        if !is_same {
            self.warnings.push(format!(
                "{}: {HEAD} differs from {EMBED}, so that it is used, though config.json says tie_word_embeddings = true",
                head.file().display()
            ));
        }
        is_same
    }

    /// Gives the tensors of a layer that are multiplied together one element type: F32, where theirs differ.
    pub(crate) fn unify(&mut self, layer: usize) -> Result<(), Error> {
        for group in TOGETHER {
            let names = || group.iter().map(|name| format!("layers.{layer}.{name}.weight"));
            let first = names().find_map(|name| Some(self.tensors.get(&name)?.dtype));
            let differ = |name: String| {
                self.tensors.get(&name).is_some_and(|tensor| Some(tensor.dtype) != first)
            };
            if !names().any(differ) {
                continue;
            }
            for name in names() {
                if let Some(tensor) = self.tensors.get_mut(&name)
                    && tensor.dtype.is_weight()
                {
                    *tensor = widened(tensor)?;
                }
            }
        }
        Ok(())
    }

    /// Bytes of all tensors.
    pub fn total_bytes(&self) -> u64 {
        self.tensors.values().map(|tensor| tensor.bytes.len() as u64).sum()
    }

    /// A number that tells checkpoints apart without reading them whole: names, element types, shapes, the lengths of
    /// the files, and the first and last 4 KiB of every tensor. Not a proof against forgery.
    pub fn fingerprint(&self) -> u64 {
        let mut hash = Xxh3::new();
        let mut lengths: Vec<u64> = self.files.iter().map(|file| file.len() as u64).collect();
        lengths.sort_unstable();
        lengths.iter().for_each(|len| hash.update(&len.to_le_bytes()));
        for (name, tensor) in &self.tensors {
            hash.update(&(name.len() as u64).to_le_bytes());
            hash.update(name.as_bytes());
            hash.update(tensor.dtype.name().as_bytes());
            hash.update(&(tensor.shape.len() as u64).to_le_bytes());
            tensor.shape.iter().for_each(|&dim| hash.update(&(dim as u64).to_le_bytes()));
            let edge = tensor.bytes.len().min(4096);
            hash.update(&tensor.bytes[..edge]);
            hash.update(&tensor.bytes[tensor.bytes.len() - edge..]);
        }
        hash.digest()
    }

    fn add_file(
        &mut self,
        storage: Arc<Storage>,
        tensors: BTreeMap<String, TensorInfo>,
    ) -> Result<(), Error> {
        let mut spelling: BTreeMap<&str, &str> = BTreeMap::new();
        for (name, info) in &tensors {
            let normal = normalise(name);
            let collision = |first: &str| Error::NameCollision {
                file: storage.path.clone(),
                first: first.into(),
                second: name.as_str().into(),
                name: normal.into(),
            };
            if let Some(first) = spelling.insert(normal, name) {
                return Err(collision(first));
            }
            if let Some(first) = self.tensors.get(normal) {
                return Err(collision(&format!("{} of {}", first.name, first.file().display())));
            }
            let Some(mut bytes) = TensorBytes::new(storage.clone(), info.range.clone()) else {
                continue; // the parser has checked that every range lies within the file
            };
            if !info.range.start.is_multiple_of(info.dtype.size()) {
                bytes = aligned(&bytes)?;
            }
            let view = TensorView {
                name: normal.into(),
                dtype: info.dtype,
                shape: info.shape.clone(),
                bytes,
            };
            self.tensors.insert(normal.into(), view);
        }
        self.files.push(storage);
        Ok(())
    }
}

impl TensorView {
    /// The file that holds the tensor.
    pub fn file(&self) -> PathBuf {
        self.bytes.storage().path.clone()
    }
}

fn check_weight(tensor: &TensorView, shape: &[usize]) -> Result<(), Error> {
    let name = || Text::from(tensor.name.as_str());
    if tensor.shape != shape {
        let (expected, actual) = (shape.into(), tensor.shape.clone());
        return Err(Error::TensorShape { file: tensor.file(), tensor: name(), expected, actual });
    }
    if !tensor.dtype.is_weight() {
        return Err(Error::TensorDtype {
            file: tensor.file(),
            tensor: name(),
            actual: tensor.dtype,
        });
    }
    Ok(())
}

fn open_file(
    path: &Path,
    mode: LoadMode,
) -> Result<(Arc<Storage>, BTreeMap<String, TensorInfo>), Error> {
    let storage = Arc::new(Storage::open(path, mode)?);
    json::refuse_foreign(path, &storage)?;
    let refuse = |fault| Error::Safetensors { file: path.into(), fault };
    json::room_to_read(safetensors::header_bytes(&storage).map_err(refuse)?)?;
    let header = safetensors::parse(&storage).map_err(refuse)?;
    Ok((storage, header.tensors))
}

/// The tensors of a layer that one product reads.
const TOGETHER: [&[&str]; 2] = [
    &["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    &["mlp.gate_proj", "mlp.up_proj"],
];

/// A copy whose elements are aligned.
fn aligned(bytes: &TensorBytes) -> Result<TensorBytes, Error> {
    let path = &bytes.storage().path;
    let mut copy = room(path, bytes.len())?;
    copy.copy_from_slice(bytes);
    Ok(whole(path, copy))
}

/// The tensor in F32.
fn widened(tensor: &TensorView) -> Result<TensorView, Error> {
    let path = tensor.file();
    let n = tensor.bytes.len() / tensor.dtype.size();
    let mut copy = room(&path, n.saturating_mul(4))?;
    for (to, x) in copy.chunks_exact_mut(4).zip(values(tensor)) {
        to.copy_from_slice(&x.to_le_bytes());
    }
    Ok(TensorView { dtype: Dtype::F32, bytes: whole(&path, copy), ..tensor.clone() })
}

fn room(path: &Path, bytes: usize) -> Result<AlignedBytes, Error> {
    let none = || Error::OutOfMemory { file: path.into(), bytes };
    memory::has_room(bytes).then(|| AlignedBytes::zeroed(bytes)).flatten().ok_or_else(none)
}

fn whole(path: &Path, bytes: AlignedBytes) -> TensorBytes {
    TensorBytes::whole(Arc::new(Storage::made_of(path, bytes)))
}

/// The numbers of a weight.
fn values(tensor: &TensorView) -> impl Iterator<Item = f32> {
    let dtype = tensor.dtype;
    tensor.bytes.chunks_exact(dtype.size()).map(move |element| match (dtype, element) {
        (Dtype::BF16, &[a, b]) => half::bf16::from_le_bytes([a, b]).to_f32(),
        (Dtype::F16, &[a, b]) => half::f16::from_le_bytes([a, b]).to_f32(),
        (_, &[a, b, c, d]) => f32::from_le_bytes([a, b, c, d]),
        _ => f32::NAN,
    })
}

fn same_values(a: &TensorView, b: &TensorView) -> bool {
    if a.dtype == b.dtype {
        return a.bytes[..] == b.bytes[..];
    }
    a.dtype.is_weight() && b.dtype.is_weight() && values(a).eq(values(b))
}

/// Whether an index that is not used says no more than that the single file holds everything.
fn names_only_single(path: &Path) -> bool {
    let index = read_index(path);
    index.is_ok_and(|map| map.is_some_and(|map| map.values().all(|shard| shard == SINGLE)))
}

/// Files of a folder without usable weights that look like weights.
fn foreign_weights(dir: &Path) -> Vec<Text> {
    const ENDS: [&str; 8] =
        [".safetensors", ".bin", ".pth", ".pt", ".gguf", ".msgpack", ".h5", ".onnx"];
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
    let mut found: Vec<String> =
        names.filter(|name| ENDS.iter().any(|end| name.ends_with(end))).take(64).collect();
    found.sort();
    found.truncate(4);
    found.into_iter().map(Text).collect()
}

/// The index's map of tensor to shard, or `None` where the folder has no index.
fn read_index(path: &Path) -> Result<Option<BTreeMap<String, String>>, Error> {
    match json::read_file(path, MAX_INDEX_BYTES)? {
        Some(bytes) => parse_index(&bytes, path).map(Some),
        None => Ok(None),
    }
}

/// Reads an index's map of tensor to shard and checks the names; `path` is for messages.
pub fn parse_index(bytes: &[u8], path: &Path) -> Result<BTreeMap<String, String>, Error> {
    let wrong = |key: String, expected, actual: String| Error::Index {
        file: path.into(),
        key,
        expected,
        actual,
    };
    let mut object = json::parse_object(bytes, path)?;
    let map = match object.remove("weight_map") {
        Some(Value::Object(map)) => map,
        Some(other) => {
            return Err(wrong(
                "weight_map".into(),
                "an object",
                json::describe(&other).to_string(),
            ));
        }
        None => return Err(wrong("weight_map".into(), "an object", "nothing".into())),
    };
    if map.is_empty() || map.len() > MAX_TENSORS {
        return Err(wrong("weight_map".into(), "1 to 200000 tensors", map.len().to_string()));
    }
    let mut shards = BTreeMap::new();
    for (tensor, shard) in map {
        let Value::String(shard) = shard else {
            let key = format!("weight_map.{}", Text(tensor));
            return Err(wrong(key, "a shard's name", json::describe(&shard).to_string()));
        };
        if !is_shard_name(&shard) {
            return Err(Error::ShardName {
                file: path.into(),
                tensor: tensor.into(),
                shard: shard.into(),
            });
        }
        shards.insert(tensor, shard);
    }
    Ok(shards)
}

fn is_shard_name(name: &str) -> bool {
    let stem = name.strip_suffix(".safetensors").unwrap_or("");
    !stem.is_empty()
        && name.len() <= 255
        && !name.starts_with('.')
        && !name.contains("..")
        && !name.chars().any(|c| c.is_control() || matches!(c, '/' | '\\' | ':'))
}

/// A shard holds exactly the tensors that the index places in it.
fn check_shard(
    index: &BTreeMap<String, String>,
    shard: &str,
    path: &Path,
    tensors: &BTreeMap<String, TensorInfo>,
) -> Result<(), Error> {
    for name in tensors.keys() {
        let tensor = || Text::from(name.as_str());
        match index.get(name) {
            Some(owner) if owner == shard => {}
            Some(owner) => {
                let expected = owner.as_str().into();
                return Err(Error::TensorTwice { shard: path.into(), tensor: tensor(), expected });
            }
            None => return Err(Error::TensorNotInIndex { shard: path.into(), tensor: tensor() }),
        }
    }
    match index.iter().find(|(name, owner)| *owner == shard && !tensors.contains_key(*name)) {
        Some((name, _)) => {
            Err(Error::TensorNotInShard { shard: path.into(), tensor: name.as_str().into() })
        }
        None => Ok(()),
    }
}
