//! What can be wrong with a model folder: one variant a cause.
//!
//! Every message names the file, the tensor or key, what was expected and what was there, and where it helps what to
//! do. Text that comes from a file is quoted and shortened, so that a hostile name cannot flood a log or move a
//! terminal's cursor.

use std::io;
use std::path::PathBuf;

use crate::dtype::Dtype;
use crate::quoted::Text;
use crate::safetensors::Fault;

/// Why a model folder was refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused a file.
    #[error("{}: cannot {action}: {source}", file.display())]
    Io {
        /// The file or folder.
        file: PathBuf,
        /// What was tried.
        action: &'static str,
        /// The system's answer.
        source: io::Error,
    },
    /// A file is larger than its kind may be.
    #[error("{}: {actual} bytes, expected at most {limit}", file.display())]
    TooLarge {
        /// The file.
        file: PathBuf,
        /// Its length.
        actual: u64,
        /// The largest accepted length.
        limit: u64,
    },
    /// The machine has no memory for the weights.
    #[error("{}: no memory for {bytes} bytes; use the mmap load mode, or a machine with more memory", file.display())]
    OutOfMemory {
        /// The file that was read.
        file: PathBuf,
        /// Bytes asked for.
        bytes: usize,
    },
    /// The machine has no memory for what an input needs.
    #[error("out of memory: {what} needs {bytes} bytes")]
    NoMemory {
        /// What the memory was for.
        what: &'static str,
        /// Bytes that it takes at most.
        bytes: usize,
    },
    /// A weight file was written to after it was opened.
    #[error("{}: changed while in use (was {was}, is {now}); write new weights beside it and rename", file.display())]
    FileChanged {
        /// The file.
        file: PathBuf,
        /// Its facts when opened.
        was: String,
        /// Its facts now.
        now: String,
    },
    /// A file that must be JSON is not, or repeats a key.
    #[error("{}: not valid JSON: {why}", file.display())]
    Json {
        /// The file.
        file: PathBuf,
        /// What and where.
        why: String,
    },
    /// A safetensors file breaks the format.
    #[error("{}: {fault}", file.display())]
    Safetensors {
        /// The file.
        file: PathBuf,
        /// The rule that it breaks.
        fault: Fault,
    },
    /// The folder has no weights.
    #[error(
        "{}: neither model.safetensors nor model.safetensors.index.json is here{}",
        dir.display(),
        others(found)
    )]
    NoWeights {
        /// The folder.
        dir: PathBuf,
        /// Files in it that look like weights of other kinds, or under other names.
        found: Vec<Text>,
    },
    /// The index is JSON, but not a shard index.
    #[error("{}: {key}: expected {expected}, found {actual}", file.display())]
    Index {
        /// The index file.
        file: PathBuf,
        /// The key at fault.
        key: String,
        /// What belongs there.
        expected: &'static str,
        /// What is there.
        actual: String,
    },
    /// A shard's name is not a plain file name.
    #[error(
        "{}: tensor {tensor}: shard name {shard}: expected a plain file name that ends in .safetensors",
        file.display()
    )]
    ShardName {
        /// The index file.
        file: PathBuf,
        /// The tensor that names the shard.
        tensor: Text,
        /// The name.
        shard: Text,
    },
    /// The index names a shard that the folder lacks.
    #[error("{}: names shard {shard}, which is not in the folder; fetch it again", file.display())]
    ShardMissing {
        /// The index file.
        file: PathBuf,
        /// The shard.
        shard: Text,
    },
    /// The index promises a tensor that its shard lacks.
    #[error("{}: tensor {tensor}: the index says it is here, the file has no such tensor", shard.display())]
    TensorNotInShard {
        /// The shard.
        shard: PathBuf,
        /// The tensor.
        tensor: Text,
    },
    /// A shard holds a tensor that the index places elsewhere.
    #[error("{}: tensor {tensor}: expected only in {expected}, as the index says, but it is also here", shard.display())]
    TensorTwice {
        /// The shard that should not hold it.
        shard: PathBuf,
        /// The tensor.
        tensor: Text,
        /// The shard that the index names.
        expected: Text,
    },
    /// A shard holds a tensor that the index does not list.
    #[error("{}: tensor {tensor}: the index does not list it", shard.display())]
    TensorNotInIndex {
        /// The shard.
        shard: PathBuf,
        /// The tensor.
        tensor: Text,
    },
    /// Two tensors have one name once prefixes are dropped.
    #[error("{}: tensors {first} and {second} are both {name}; expected one of them", file.display())]
    NameCollision {
        /// The file of the second.
        file: PathBuf,
        /// The first, as the file spells it.
        first: Text,
        /// The second, as the file spells it.
        second: Text,
        /// The common name.
        name: Text,
    },
    /// Data handed in from memory does not fit its shape.
    #[error(
        "tensor {tensor}: {dtype} of shape {shape:?}: expected {expected}, found {actual} bytes"
    )]
    TensorData {
        /// The tensor.
        tensor: Text,
        /// Its element type.
        dtype: Dtype,
        /// Its shape.
        shape: Vec<usize>,
        /// The length that the shape asks for.
        expected: String,
        /// The length of the data.
        actual: usize,
    },
    /// The architecture needs a tensor that the weights lack.
    #[error("{}: tensor {tensor}: missing, expected with shape {shape:?}", file.display())]
    TensorMissing {
        /// The file or folder of the weights.
        file: PathBuf,
        /// The tensor.
        tensor: Text,
        /// The shape that it should have.
        shape: Vec<usize>,
    },
    /// The weights hold a tensor that the architecture has no use for.
    #[error("{}: tensor {tensor} of shape {shape:?}: unexpected, this architecture has no such tensor", file.display())]
    TensorUnexpected {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: Text,
        /// Its shape.
        shape: Vec<usize>,
    },
    /// A tensor's shape is not what config.json implies.
    #[error("{}: tensor {tensor}: expected shape {expected:?}, as config.json implies, found {actual:?}", file.display())]
    TensorShape {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: Text,
        /// The shape that config.json implies.
        expected: Vec<usize>,
        /// The shape in the file.
        actual: Vec<usize>,
    },
    /// A weight's element type is none that the engine computes with.
    #[error("{}: tensor {tensor}: expected BF16, F16 or F32, found {actual}", file.display())]
    TensorDtype {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: Text,
        /// Its element type.
        actual: Dtype,
    },
    /// The checkpoint holds quantised weights.
    #[error("{}: {what}: quantised checkpoints are not supported; use the BF16 one", file.display())]
    Quantised {
        /// The file.
        file: PathBuf,
        /// The tensor or key that shows it.
        what: Text,
    },
    /// A key of a JSON file is missing, of the wrong type or out of range.
    #[error("{}: {key}: expected {expected}, found {actual}", file.display())]
    Value {
        /// The file.
        file: PathBuf,
        /// The key, with its parents.
        key: String,
        /// What belongs there.
        expected: String,
        /// What is there.
        actual: Text,
    },
    /// The model asks for something that the engine does not do.
    #[error("{}: {key} = {actual}: not supported; supported: {supported}", file.display())]
    Unsupported {
        /// The file.
        file: PathBuf,
        /// The key.
        key: String,
        /// Its value.
        actual: Text,
        /// The values that are.
        supported: &'static str,
    },
    /// tokenizer.json is not one that the tokenizer understands.
    #[error("{}: {why}", file.display())]
    Tokenizer {
        /// The file.
        file: PathBuf,
        /// The reason.
        why: Text,
    },
    /// A text is too long to be tokenised.
    #[error("text of {actual} bytes: expected at most {limit}")]
    TextTooLong {
        /// Its length.
        actual: usize,
        /// The largest accepted length.
        limit: usize,
    },
    /// A text could not be turned into tokens or back.
    #[error("cannot {action}: {why}")]
    Text {
        /// What was tried.
        action: &'static str,
        /// The reason.
        why: Text,
    },
    /// The chat template is malformed, or failed on these messages.
    #[error("{}: chat template: {why}", file.display())]
    Template {
        /// The file.
        file: PathBuf,
        /// The reason.
        why: Text,
    },
    /// The chat template refused the messages through `raise_exception`.
    #[error("{}: the chat template refuses these messages: {why}", file.display())]
    TemplateRefused {
        /// The file.
        file: PathBuf,
        /// The template's own words.
        why: Text,
    },
    /// The chat template asked for more than its budget.
    #[error("{}: chat template: more than {limit} {what}", file.display())]
    TemplateBudget {
        /// The file.
        file: PathBuf,
        /// What ran out.
        what: &'static str,
        /// The budget.
        limit: u64,
    },
    /// Something else was stored under a file's name.
    #[error("{}: this is {what}, not the file; {remedy}", file.display())]
    Foreign {
        /// The file.
        file: PathBuf,
        /// What it is.
        what: &'static str,
        /// What to do.
        remedy: &'static str,
    },
    /// The folder holds an adapter for another model.
    #[error("{}: adapters are not supported; merge it into its base model and open the result", file.display())]
    Adapter {
        /// The adapter's file.
        file: PathBuf,
    },
    /// A chat is not one that can be rendered.
    #[error("chat: {why}")]
    Chat {
        /// What, and what is expected.
        why: Text,
    },
}

impl Error {
    /// Whether memory could not be had, from the allocator or from the system.
    pub fn is_out_of_memory(&self) -> bool {
        match self {
            Error::OutOfMemory { .. } | Error::NoMemory { .. } => true,
            Error::Io { source, .. } => source.kind() == io::ErrorKind::OutOfMemory,
            _ => false,
        }
    }
}

fn others(found: &[Text]) -> String {
    match found {
        [] => String::new(),
        found => {
            let names: Vec<String> = found.iter().map(Text::to_string).collect();
            format!("; {} cannot be used: save the model as model.safetensors", names.join(", "))
        }
    }
}
