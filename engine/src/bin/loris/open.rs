//! From the command line to an opened model, with a bar while weights come in.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use loris::compute::Lazy;
use loris::keep::Evict;
use loris::loader::{ModelConfig, OpenOptions, RopeScaling, Tokenizer};
use loris::read::MAX_SINKS;
use loris::{
    Engine, EngineOptions, LoadProgress, Model, ModelOptions, SessionOptions, StreamOptions,
};

use crate::args::{ContextArgs, EngineArgs};
use crate::exit::{BAD_MODEL, Failure, USAGE};
use crate::report::{Report, Unit};

/// A model and how long it took.
#[derive(Debug)]
pub(crate) struct Opened {
    pub(crate) model: Model,
    pub(crate) load: Duration,
}

/// The engine that the flags ask for.
pub(crate) fn engine(args: &EngineArgs) -> Result<Engine, Failure> {
    Ok(Engine::new(&EngineOptions {
        device: args.device,
        threads: args.threads,
        isa: args.isa,
        driver: driver(),
        ..EngineOptions::default()
    })?)
}

/// The CUDA driver's library, if another is to be used than the system's.
pub(crate) fn driver() -> Option<PathBuf> {
    std::env::var_os("LORIS_CUDA_DRIVER").filter(|path| !path.is_empty()).map(PathBuf::from)
}

/// Threads that the flags lead to.
pub(crate) fn n_threads(args: &EngineArgs) -> usize {
    let all = || std::thread::available_parallelism().map_or(1, usize::from);
    args.threads.unwrap_or_else(all)
}

/// Opens a folder. `check` refuses what the model is too small for, before memory is taken for it.
pub(crate) fn open(
    dir: &Path,
    args: &EngineArgs,
    options: ModelOptions,
    check: &dyn Fn(&ModelConfig) -> Result<(), Failure>,
    report: &Report,
) -> Result<Opened, Failure> {
    let engine = engine(args)?;
    check_dir(dir)?;
    let options = ModelOptions { load: args.load.into(), ..options };
    let started = Instant::now();
    let checkpoint = loris::loader::open(dir, &OpenOptions { load: options.load })?;
    check(&checkpoint.config)?;
    checkpoint.warnings.iter().for_each(|warning| report.note(format!("note: {warning}")));
    let bar = report.bar("loading", Unit::Bytes, 0);
    let mut progress = |LoadProgress { done, total }| {
        bar.set_length(total);
        bar.set_position(done);
        ControlFlow::Continue(())
    };
    let model = engine.open_checkpoint_with(checkpoint, &options, &mut progress);
    bar.finish_and_clear();
    let model = model?;
    let placement = model.placement();
    // Where there is no CUDA device nobody expects one; a model that a device cannot run is worth a word.
    if let (true, Some(reason)) = (engine.has_cuda(), &placement.why_not_cuda) {
        report.note(format!("note: on the CPU: {reason}"));
    }
    Ok(Opened { model, load: started.elapsed() })
}

/// Whether sessions of the model may hold so many tokens.
pub(crate) fn has_room(config: &ModelConfig, n_tokens: usize) -> bool {
    n_tokens <= config.ctx_len || matches!(config.rope.scaling, RopeScaling::Dynamic { .. })
}

/// Refuses an option's tokens where they are more than the model's context.
pub(crate) fn check_ctx(
    option: &str,
    n_tokens: usize,
    config: &ModelConfig,
) -> Result<(), Failure> {
    if has_room(config, n_tokens) {
        return Ok(());
    }
    let message =
        format!("{option} {n_tokens}: expected 1 to {}, the model's context", config.ctx_len);
    Err(Failure::new(USAGE, message))
}

/// Refuses a stream that sees more than the model's context. (A coded cache may have room for fewer sinks: that is known
/// when it is there.)
pub(crate) fn check_stream(stream: StreamOptions, config: &ModelConfig) -> Result<(), Failure> {
    stream.rule_within(config.ctx_len, MAX_SINKS)?;
    Ok(())
}

/// Refuses a context or a stream that the model is too small for.
pub(crate) fn check_context(args: &ContextArgs, config: &ModelConfig) -> Result<(), Failure> {
    match (args.stream.options(), args.ctx) {
        (Some(stream), _) => check_stream(stream, config),
        (None, Some(ctx)) => check_ctx("-c/--ctx", ctx, config),
        (None, None) => Ok(()),
    }
}

/// Fails where there is no folder, before anything is said about the files in it.
pub(crate) fn check_dir(dir: &Path) -> Result<(), Failure> {
    let what = match dir.metadata() {
        Ok(metadata) if metadata.is_dir() => return Ok(()),
        Ok(_) => "is not a folder".into(),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => "no such folder".into(),
        Err(e) => format!("cannot open: {e}"),
    };
    let message = format!(
        "{}: {what}; give the folder of a Hugging Face model (config.json, *.safetensors, tokenizer.json)",
        dir.display()
    );
    Err(Failure::new(BAD_MODEL, message))
}

/// A session's options: the context asked for, else all that the model and its page pool have.
pub(crate) fn session_options(
    model: &Model,
    args: &ContextArgs,
) -> Result<SessionOptions, Failure> {
    let plan = model.plan();
    let pool = plan.layout.capacity(plan.n_pages / plan.n_layers);
    let lazy = args.lazy.as_deref().map(|spec| Lazy::parse(spec, plan.n_layers)).transpose()?;
    let stream = args.stream.options();
    let ctx_len = args.ctx.unwrap_or(plan.ctx_len.min(pool));
    let evict = args.evict.as_deref().map(Evict::parse).transpose()?;
    let ctx_len = stream.is_none().then_some(ctx_len);
    Ok(SessionOptions { ctx_len, lazy, stream, evict, trust_old_state: false })
}

/// The tokenizer, which a folder may lack and text needs.
pub(crate) fn tokenizer<'m>(model: &'m Model, dir: &Path) -> Result<&'m Tokenizer, Failure> {
    model.tokenizer().ok_or_else(|| {
        let dir = dir.display();
        Failure::new(BAD_MODEL, format!("{dir}: has no tokenizer.json, which text needs; add it"))
    })
}
