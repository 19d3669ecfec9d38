//! What users type.
//!
//! Names follow llama.cpp and mlx-lm where those agree. A value that was not given is an `Option`, so that
//! "not said" and "said, and equal to the default" stay apart: the model's own advice on sampling fills
//! only what was not said.

use std::fmt::Display;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::str::FromStr;

use crate::eval::tasks::{ANSWERS, LENS, SAMPLES, TASKS, Task};
use clap::{Args, Parser, Subcommand, ValueEnum};
use loris::backend::cpu::Isa;
use loris::loader::{Json, LoadMode};
use loris::read::MAX_SINKS;
use loris::store::FORMATS;
use loris::{DeviceChoice, EngineOptions, KvFormats, ModelOptions, StreamOptions, share};

/// Counts of tokens, where nothing else limits them before the model is known.
const TOKENS: RangeInclusive<usize> = ModelOptions::KV_TOKENS;

/// Counts that may be any.
const ANY: RangeInclusive<usize> = 0..=usize::MAX;

/// Measurements.
const ROUNDS: RangeInclusive<usize> = 1..=1_000_000;

/// Reads a number of a range; what is none is refused with the range.
fn within<T>(
    range: RangeInclusive<T>,
) -> impl Fn(&str) -> Result<T, String> + Clone + Send + Sync + 'static
where
    T: FromStr + PartialOrd + Display + Clone + Send + Sync + 'static,
{
    move |text| {
        let found = text.parse().ok().filter(|n| range.contains(n));
        found.ok_or_else(|| format!("expected {} to {}", range.start(), range.end()))
    }
}

/// Reads a count of which -1 means as many as there can be.
fn or_unlimited(text: &str) -> Result<usize, String> {
    if text == "-1" { Ok(usize::MAX) } else { within(ANY)(text) }
}

/// A seed, where one was said to be wanted: `None` is a random one.
pub(crate) type Seed = Option<u64>;

fn or_random(text: &str) -> Result<Seed, String> {
    if text == "-1" { Ok(None) } else { within(0..=u64::MAX)(text).map(Some) }
}

fn bias(text: &str) -> Result<(u32, f32), String> {
    let parts = text.split_once(':').and_then(|(id, x)| Some((id.parse().ok()?, x.parse().ok()?)));
    parts.ok_or("expected ID:X, a token's id and a number".into())
}

/// Reads a share; the option whose it is says what range it takes.
#[allow(clippy::cast_possible_truncation)] // to the precision that samplers have
fn share(text: &str) -> Result<f32, String> {
    share::parse(text).map(|share| share as f32).ok_or(format!("expected {}", share::EXPECTED))
}

/// In-process LLM inference for long prompts: a model folder in, streamed text out.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 100, after_help = EXIT_CODES)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

const EXIT_CODES: &str = "Exit codes: 0 done, 1 run-time error, 2 usage, 3 bad model folder, \
4 out of memory, 5 device asked for and absent or unfit, 130 interrupted.";

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Answer one prompt
    Run(Box<RunArgs>),
    /// Talk, turn by turn
    Chat(Box<ChatArgs>),
    /// Say what a model folder holds and how much memory a run takes
    Inspect(InspectArgs),
    /// Measure prompt and decode speed
    Bench(BenchArgs),
    /// Measure how well a model predicts a text
    Perplexity(PerplexityArgs),
    /// Measure how well a model answers from long contexts, and how policies change that
    Eval(Box<EvalArgs>),
    /// List the devices
    Devices,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct OutputArgs {
    /// Only the answer and errors: no bars, notes or statistics
    #[arg(short, long, global = true)]
    pub(crate) quiet: bool,
    /// JSON on stdout. run and chat: one event a line, `load`, `prefill`, `token` (`id` is null for text
    /// that was held back to the end), `done`, `error`; eval: `load`, `sample`, `row`, `done`, `error`.
    /// Others: one object
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// Colour on stderr; NO_COLOR and CLICOLOR_FORCE are heeded
    #[arg(long, global = true, value_name = "WHEN", default_value = "auto")]
    pub(crate) color: When,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum When {
    Auto,
    On,
    Off,
}

#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    /// Folder of a Hugging Face model (config.json, *.safetensors, tokenizer.json)
    #[arg(short, long, value_name = "DIR")]
    pub(crate) model: PathBuf,
    /// The prompt; `-` reads stdin. Through the model's chat template it is one user turn, in which the
    /// text of a special token such as <|im_end|> is plain text
    #[arg(short, long, value_name = "TEXT", conflicts_with = "file", allow_hyphen_values = true)]
    pub(crate) prompt: Option<String>,
    /// Read the prompt from a file, less one newline at its end; `-` is stdin, which is also read if it
    /// is not a terminal and neither -p nor -f is given
    #[arg(short, long, value_name = "FILE")]
    pub(crate) file: Option<PathBuf>,
    /// A whole conversation for the chat template, JSON: a list of messages, or an object with `messages` and, if wanted,
    /// `tools`, `documents`, `variables`, `continue_final_message`; `-` is stdin
    #[arg(long, value_name = "FILE", conflicts_with_all = ["prompt", "file", "system", "assistant", "raw"])]
    pub(crate) messages: Option<PathBuf>,
    /// Tools that the template tells the model of: a JSON list
    #[arg(long, value_name = "FILE", conflicts_with = "raw")]
    pub(crate) tools: Option<PathBuf>,
    /// System message for the chat template
    #[arg(long, value_name = "TEXT", conflicts_with = "raw")]
    pub(crate) system: Option<String>,
    /// Beginning of the answer, which the model goes on with
    #[arg(long, value_name = "TEXT", conflicts_with = "raw", allow_hyphen_values = true)]
    pub(crate) assistant: Option<String>,
    #[command(flatten)]
    pub(crate) template: TemplateArgs,
    /// No chat template: the model goes on with the text as it is, in which the text of a special token
    /// is that token
    #[arg(long, conflicts_with_all = ["chat_template", "template_var"])]
    pub(crate) raw: bool,
    /// With --json: the same as --logprobs for the tokens of the prompt, an event `prompt` each
    #[arg(long, value_name = "N", value_parser = within(ANY), allow_negative_numbers = true, conflicts_with_all = ["lazy", "evict"])]
    pub(crate) prompt_logprobs: Option<usize>,
    /// Write the session to a file after the answer, also one that Ctrl-C ends
    #[arg(long, value_name = "FILE")]
    pub(crate) save_state: Option<PathBuf>,
    /// Start from a saved session: what the prompt has in common with it is not computed again; without
    /// a prompt, the saved answer goes on
    #[arg(long, value_name = "FILE")]
    pub(crate) load_state: Option<PathBuf>,
    /// With --load-state: take a file of an older loris, which does not say with which config.json and tokenizer it was
    /// made; with others than the model's the answer is nonsense
    #[arg(long, requires = "load_state")]
    pub(crate) trust_old_state: bool,
    #[command(flatten)]
    pub(crate) generate: GenerateArgs,
    #[command(flatten)]
    pub(crate) context: ContextArgs,
    #[command(flatten)]
    pub(crate) engine: EngineArgs,
}

#[derive(Debug, Args)]
pub(crate) struct ChatArgs {
    /// Folder of a Hugging Face model with a chat template
    #[arg(short, long, value_name = "DIR")]
    pub(crate) model: PathBuf,
    /// System message
    #[arg(long, value_name = "TEXT")]
    pub(crate) system: Option<String>,
    #[command(flatten)]
    pub(crate) template: TemplateArgs,
    #[command(flatten)]
    pub(crate) generate: GenerateArgs,
    #[command(flatten)]
    pub(crate) context: ContextArgs,
    #[command(flatten)]
    pub(crate) engine: EngineArgs,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct TemplateArgs {
    /// Another chat template: a file, or the name of one of the folder's
    #[arg(long, value_name = "FILE")]
    pub(crate) chat_template: Option<PathBuf>,
    /// What the template asks for by name, as in enable_thinking=false: JSON, or a text where it is none; may be repeated
    #[arg(long, value_name = "NAME=VALUE", value_parser = variable)]
    pub(crate) template_var: Vec<(String, Json)>,
}

fn variable(text: &str) -> Result<(String, Json), String> {
    let (name, value) = text.split_once('=').ok_or("expected NAME=VALUE")?;
    let value = Json::parse(value).unwrap_or_else(|_| Json::Text(value.into()));
    Ok((name.into(), value))
}

/// Without any of these: greedy, unless the model's generation_config.json says `do_sample`, then as it
/// advises. A flag wins over the file. --top-k, --top-p, --min-p or --typical-p alone mean --temp 1.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Answer")]
pub(crate) struct GenerateArgs {
    /// Tokens at most; -1: until the context is full
    #[arg(short = 'n', long, value_name = "N", default_value = "512",
          value_parser = or_unlimited, allow_negative_numbers = true)]
    pub(crate) max_tokens: usize,
    /// Tokens at least: before, no token that would end the answer is chosen and no --stop looked for
    #[arg(long, value_name = "N", default_value_t = 0,
          value_parser = within(ANY), allow_negative_numbers = true)]
    pub(crate) min_tokens: usize,
    /// Temperature; 0 takes the likeliest token [default: the model's advice, else 0; 1 if --top-k, --top-p, --min-p or --typical-p is given]
    #[arg(long, value_name = "T", allow_negative_numbers = true)]
    pub(crate) temp: Option<f32>,
    /// Only the K likeliest tokens; 0: all
    #[arg(long, value_name = "K", value_parser = within(ANY), allow_negative_numbers = true)]
    pub(crate) top_k: Option<usize>,
    /// Only the likeliest tokens that reach probability P together
    #[arg(long, value_name = "P", value_parser = share, allow_negative_numbers = true)]
    pub(crate) top_p: Option<f32>,
    /// Only tokens at least P times as likely as the likeliest
    #[arg(long, value_name = "P", value_parser = share, allow_negative_numbers = true)]
    pub(crate) min_p: Option<f32>,
    /// Only tokens whose surprise is nearest to the expected one, until they reach P together
    #[arg(long, value_name = "P", value_parser = share, allow_negative_numbers = true)]
    pub(crate) typical_p: Option<f32>,
    /// Penalty on tokens that occurred in prompt or answer; 1: none
    #[arg(long, value_name = "R", allow_negative_numbers = true)]
    pub(crate) repeat_penalty: Option<f32>,
    /// Taken off the logits of tokens that occurred in the answer
    #[arg(long, value_name = "X", default_value_t = 0.0, allow_negative_numbers = true)]
    pub(crate) presence_penalty: f32,
    /// The same for each time that they occurred
    #[arg(long, value_name = "X", default_value_t = 0.0, allow_negative_numbers = true)]
    pub(crate) frequency_penalty: f32,
    /// Added to the logit of a token, as in 42:-5; may be repeated
    #[arg(long, value_name = "ID:X", value_parser = bias, value_delimiter = ',')]
    pub(crate) logit_bias: Vec<(u32, f32)>,
    /// Start of the random sequence; -1: a random one [default: -1; `load` and `done` events show it]
    #[arg(long, value_name = "N", value_parser = or_random, allow_negative_numbers = true)]
    pub(crate) seed: Option<Seed>,
    /// End the answer before this text, also that of a special token such as <|im_end|>; may be repeated
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub(crate) stop: Vec<String>,
    /// With --stop: the text that ended the answer is part of it
    #[arg(long, requires = "stop")]
    pub(crate) keep_stop: bool,
    /// End the answer before this token, by its id; may be repeated
    #[arg(long, value_name = "ID", value_delimiter = ',', value_parser = within(0..=u32::MAX),
          allow_negative_numbers = true)]
    pub(crate) stop_id: Vec<u32>,
    /// Go on after an end-of-sequence token
    #[arg(long)]
    pub(crate) ignore_eos: bool,
    /// The answer is JSON that this schema allows; it ends where that is complete, or before by -n or --stop
    #[arg(long, value_name = "FILE", conflicts_with_all = ["grammar", "ignore_eos", "min_tokens"])]
    pub(crate) json_schema: Option<PathBuf>,
    /// The answer follows a grammar, in the Lark format of llguidance; it ends where that allows it
    #[arg(long, value_name = "FILE", conflicts_with_all = ["ignore_eos", "min_tokens"])]
    pub(crate) grammar: Option<PathBuf>,
    /// With --json: how likely the model held each token, before temperature, penalties and the like, and the N likeliest in
    /// its place; `logprob` and `top` of `token` events
    #[arg(long, value_name = "N", value_parser = within(ANY), allow_negative_numbers = true)]
    pub(crate) logprobs: Option<usize>,
}

#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Memory")]
pub(crate) struct ContextArgs {
    /// Tokens that prompt and answer may take together [default: the model's, at most 131072]
    #[arg(short, long, value_name = "N", conflicts_with = "window",
          value_parser = within(TOKENS), allow_negative_numbers = true)]
    pub(crate) ctx: Option<usize>,
    #[command(flatten)]
    pub(crate) stream: StreamArgs,
    /// Prune prompt tokens layer by layer by their attention scores: gentle, paper, hard, or the layers and
    /// the shares that go on, as 8:0.7,16:0.5; behind these, if wanted, window=N (rows that score), pool=N (positions
    /// around a token whose best score it gets), sinks=N
    /// (first tokens that are never pruned), min-len=N (shorter sequences are not pruned), revive=N (tokens
    /// that a step of decode takes up again at a point), no-revival, random
    #[arg(long, value_name = "SPEC", conflicts_with = "window")]
    pub(crate) lazy: Option<String>,
    /// Keep a part of the tokens in each layer's cache and forget the others for good: a policy (window, h2o, snapkv,
    /// tova, knorm, random) and what it keeps, tokens as in snapkv:1024 or a share of each prompt as in snapkv:25%;
    /// behind these, if wanted, window=N (last rows that score, and last tokens that stay), pool=N (snapkv: slots around a token whose
    /// best score it gets), sinks=N (first tokens that stay)
    #[arg(long, value_name = "SPEC", conflicts_with_all = ["window", "lazy"])]
    pub(crate) evict: Option<String>,
    #[command(flatten)]
    pub(crate) size: SizeArgs,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct StreamArgs {
    /// Go on without end: each token sees --sink tokens at the start and the last N, itself among them, and
    /// what no token sees any more is forgotten
    #[arg(long, value_name = "N", value_parser = within(TOKENS), allow_negative_numbers = true)]
    pub(crate) window: Option<usize>,
    /// With --window: tokens at the start that every token sees
    #[arg(long, value_name = "N", default_value_t = 4, requires = "window",
          value_parser = within(0..=MAX_SINKS), allow_negative_numbers = true)]
    pub(crate) sink: usize,
}

impl StreamArgs {
    pub(crate) fn options(&self) -> Option<StreamOptions> {
        self.window.map(|window| StreamOptions { sink: self.sink, window })
    }

    /// Room in the page pool: what a prompt sees and, until it is done, what was there before it.
    fn kv_tokens(&self, size: &SizeArgs) -> Option<usize> {
        let seen = self.window?.saturating_add(self.sink);
        let pages = size.page_len.saturating_mul(4);
        Some(seen.saturating_mul(2).saturating_add(size.chunk).saturating_add(pages))
    }
}

impl ContextArgs {
    /// Options for sessions that are used one at a time.
    pub(crate) fn model_options(&self) -> ModelOptions {
        let aux_tokens = self.lazy.is_some().then(|| self.ctx.unwrap_or(MAX_DEFAULT_CTX));
        let options = self.size.model_options(self.ctx.or(self.stream.kv_tokens(&self.size)));
        ModelOptions { aux_tokens: aux_tokens.unwrap_or_default(), ..options }
    }
}

/// The longest context that a session gets without being asked.
const MAX_DEFAULT_CTX: usize = 131_072;

fn kv_help() -> String {
    let formats = FORMATS.map(|format| format!("{} ({})", format.name, format.says)).join(", ");
    format!(
        "Number format of the KV cache: {formats}; or one for keys and one for values, as in int8:int4. Less than 16 \
         bits hold more context in the same memory"
    )
}

#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Memory")]
pub(crate) struct SizeArgs {
    #[arg(long, value_name = "FORMAT", default_value = "bf16", help = kv_help())]
    pub(crate) kv: KvFormats,
    /// Prompt tokens that go through the layers together
    #[arg(long, value_name = "N", default_value_t = ModelOptions::default().chunk,
          value_parser = within(ModelOptions::CHUNKS), allow_negative_numbers = true)]
    pub(crate) chunk: usize,
    /// Tokens that a page of the KV cache holds: a power of two from 16 to 256
    #[arg(long, value_name = "N", default_value_t = ModelOptions::default().page_len,
          value_parser = within(ModelOptions::PAGE_LENS), allow_negative_numbers = true)]
    pub(crate) page_len: usize,
}

impl SizeArgs {
    /// Options for sessions that together hold `kv_tokens` tokens, one at a time.
    pub(crate) fn model_options(&self, kv_tokens: Option<usize>) -> ModelOptions {
        ModelOptions {
            kv: self.kv,
            page_len: self.page_len,
            kv_tokens,
            chunk: self.chunk,
            batch: 1,
            ..ModelOptions::default()
        }
    }
}

#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Engine")]
pub(crate) struct EngineArgs {
    /// Where to run: auto (CUDA where it works, else the CPU), cpu, cuda or cuda:N; LORIS_CUDA_DRIVER names
    /// another driver library than libcuda.so.1
    #[arg(long, value_name = "DEVICE", default_value = "auto", value_parser = parse_device)]
    pub(crate) device: DeviceChoice,
    /// Threads of the CPU [default: as many as the process may use]
    #[arg(long, value_name = "N", value_parser = within(EngineOptions::THREADS), allow_negative_numbers = true)]
    pub(crate) threads: Option<usize>,
    /// Instruction set of the CPU: portable, avx2, avx512 or avx512-bf16 [default: the fastest that it has]
    #[arg(long, value_name = "NAME")]
    pub(crate) isa: Option<Isa>,
    /// Map the weight files, or read them (for files that others may truncate)
    #[arg(long, value_name = "MODE", default_value = "mmap")]
    pub(crate) load: Load,
}

fn parse_device(text: &str) -> Result<DeviceChoice, String> {
    text.parse().map_err(|_| "expected auto, cpu, cuda or cuda:N".into())
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum Load {
    Mmap,
    Read,
}

impl From<Load> for LoadMode {
    fn from(load: Load) -> Self {
        match load {
            Load::Mmap => Self::Mmap,
            Load::Read => Self::Read,
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct InspectArgs {
    /// Folder of a Hugging Face model
    #[arg(value_name = "DIR")]
    pub(crate) dir: PathBuf,
    #[command(flatten)]
    pub(crate) context: ContextArgs,
}

#[derive(Debug, Args)]
pub(crate) struct BenchArgs {
    #[command(flatten)]
    pub(crate) model: BenchModel,
    /// Prompt lengths to measure
    #[arg(long, value_name = "N,...", value_delimiter = ',', default_values_t = [512, 2048],
          value_parser = within(TOKENS), allow_negative_numbers = true)]
    pub(crate) prompt_lens: Vec<usize>,
    /// Tokens to decode
    #[arg(long, value_name = "N", default_value_t = 64,
          value_parser = within(0..=*TOKENS.end()), allow_negative_numbers = true)]
    pub(crate) decode: usize,
    /// Tokens in the context before decoding is measured
    #[arg(long, value_name = "N", default_value_t = 16,
          value_parser = within(TOKENS), allow_negative_numbers = true)]
    pub(crate) decode_ctx: usize,
    /// Measurements of each; the result is their median
    #[arg(long, value_name = "N", default_value_t = 1,
          value_parser = within(ROUNDS), allow_negative_numbers = true)]
    pub(crate) rounds: usize,
    /// Compare this with dense, as --policy of `eval` has it, on each prompt and --decode tokens behind it: `lazy=SPEC`,
    /// `kv=FORMAT`, `evict=SPEC`; may be repeated
    #[arg(long = "policy", value_name = "SPEC")]
    pub(crate) policies: Vec<String>,
    /// With --policy: write a row for each prompt length and policy
    #[arg(long, value_name = "FILE", requires = "policies")]
    pub(crate) csv: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) size: SizeArgs,
    #[command(flatten)]
    pub(crate) engine: EngineArgs,
}

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub(crate) struct BenchModel {
    /// Folder of a Hugging Face model
    #[arg(value_name = "DIR")]
    pub(crate) dir: Option<PathBuf>,
    /// A known shape with random weights
    #[arg(long, value_name = "NAME", value_parser = loris::model::synthetic::NAMES)]
    pub(crate) synthetic: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct PerplexityArgs {
    /// Folder of a Hugging Face model
    #[arg(value_name = "DIR")]
    pub(crate) dir: PathBuf,
    /// The text, UTF-8
    #[arg(short, long, value_name = "FILE")]
    pub(crate) file: PathBuf,
    /// Tokens of a window; each window is scored alone
    #[arg(short, long, value_name = "N", default_value_t = 2048,
          value_parser = within(2..=*TOKENS.end()), allow_negative_numbers = true)]
    pub(crate) ctx: usize,
    /// Windows at most [default: all; tokens that do not fill a last one are left out]
    #[arg(long, value_name = "N", value_parser = within(1..=usize::MAX), allow_negative_numbers = true)]
    pub(crate) windows: Option<usize>,
    /// Windows begin N tokens after one another, and of each only the last N tokens are scored: nearly all of the
    /// context is in front of them [default: --ctx, and all but the first are scored]
    #[arg(long, value_name = "N", value_parser = within(TOKENS), allow_negative_numbers = true)]
    pub(crate) stride: Option<usize>,
    /// Leave out the first N tokens of the text
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = within(ANY), allow_negative_numbers = true)]
    pub(crate) skip: usize,
    /// With --json: the mean and the seconds of each N tokens of a window, and the memory behind them
    #[arg(long, value_name = "N", value_parser = within(TOKENS), allow_negative_numbers = true)]
    pub(crate) spans: Option<usize>,
    #[command(flatten)]
    pub(crate) stream: StreamArgs,
    #[command(flatten)]
    pub(crate) size: SizeArgs,
    #[command(flatten)]
    pub(crate) engine: EngineArgs,
}

impl PerplexityArgs {
    pub(crate) fn model_options(&self) -> ModelOptions {
        self.size.model_options(self.stream.kv_tokens(&self.size).or(Some(self.ctx)))
    }
}

/// Samples are made from --seed and are the same for every policy. Scores of 0 or 1 have Wilson's 95 %
/// interval, other means Student's, differences to dense those of pairs of one sample.
#[derive(Debug, Args)]
pub(crate) struct EvalArgs {
    /// Folder of a Hugging Face model
    #[arg(value_name = "DIR")]
    pub(crate) dir: PathBuf,
    /// What to compare with `dense`: `lazy=SPEC` and `evict=SPEC` prune and evict as those options of `run` do,
    /// `kv=FORMAT` is dense with another cache format; may be repeated
    #[arg(long = "policy", value_name = "NAME[=SPEC]")]
    pub(crate) policies: Vec<String>,
    /// Tasks [default: all; `prose` only with --text]
    #[arg(long, value_name = "NAME,...", value_delimiter = ',', value_parser = Task::parse,
          help = format!("Tasks: {} [default: all; prose if there is --text]", task_names()))]
    pub(crate) tasks: Vec<Task>,
    /// Tokens of a prompt; samples are the longest that are not longer
    #[arg(long, value_name = "N,...", value_delimiter = ',', default_values_t = [1024],
          value_parser = within(LENS), allow_negative_numbers = true)]
    pub(crate) lens: Vec<usize>,
    /// Samples of each task and length
    #[arg(short = 'n', long, value_name = "N", default_value_t = 50,
          value_parser = within(SAMPLES), allow_negative_numbers = true)]
    pub(crate) samples_per_task: usize,
    /// Windows of `prose`, each of a length's tokens
    #[arg(long, value_name = "N", default_value_t = 8,
          value_parser = within(SAMPLES), allow_negative_numbers = true)]
    pub(crate) prose_windows: usize,
    /// Start of the random sequence that samples are made from
    #[arg(long, value_name = "N", default_value_t = 1,
          value_parser = within(0..=u64::MAX), allow_negative_numbers = true)]
    pub(crate) seed: u64,
    /// Tokens of an answer at most [default: what the task needs, 16 or 40]
    #[arg(long, value_name = "N", value_parser = within(ANSWERS), allow_negative_numbers = true)]
    pub(crate) max_tokens: Option<usize>,
    /// Prose between needles and for `prose`, UTF-8 [default: made-up sentences]
    #[arg(long, value_name = "FILE")]
    pub(crate) text: Option<PathBuf>,
    /// No chat template: prompts are texts to go on with
    #[arg(long)]
    pub(crate) raw: bool,
    /// Write a row for each policy, task and length
    #[arg(long, value_name = "FILE")]
    pub(crate) csv: Option<PathBuf>,
    /// Write a JSON line for each answer
    #[arg(long, value_name = "FILE")]
    pub(crate) samples: Option<PathBuf>,
    /// Go on with the run that --samples is of, which had the same options: answers that the file has are
    /// not asked for again
    #[arg(long, requires = "samples")]
    pub(crate) resume: bool,
    /// Write two plots: quality against share computed, time to first token against length
    #[arg(long, value_name = "DIR")]
    pub(crate) svg: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) size: SizeArgs,
    #[command(flatten)]
    pub(crate) engine: EngineArgs,
}

fn task_names() -> String {
    TASKS.map(|(_, name)| name).join(", ")
}
