//! `loris inspect`: what a folder holds and what a run of it takes, without reading its weights.

use std::collections::BTreeMap;

use loris::backend::cuda;
use loris::loader::{Checkpoint, ModelConfig, OpenOptions, RopeScaling, TOKENIZER};
use loris::{CudaBytes, Plan};
use serde_json::{Value, json};

use crate::args::InspectArgs;
use crate::exit::Failure;
use crate::open::{check_context, check_dir};
use crate::report::{Report, bytes};

/// What is said, in both forms.
struct Facts<'a> {
    checkpoint: &'a Checkpoint,
    plan: Plan,
    /// Device memory on CUDA, or why the model does not run there.
    cuda: Result<CudaBytes, String>,
    /// Memory of the tokenizer: its tables take about eight times its file.
    tokenizer_bytes: usize,
    /// Tokens of the context that the memory is for.
    ctx: usize,
    n_params: u64,
    /// Parameters of each element type.
    dtypes: BTreeMap<String, u64>,
}

pub(crate) fn inspect(args: &InspectArgs, report: &Report) -> Result<(), Failure> {
    check_dir(&args.dir)?;
    let checkpoint = loris::loader::open(&args.dir, &OpenOptions::default())?;
    let config = &checkpoint.config;
    loris::model::check(config, &checkpoint.weights)?;
    check_context(&args.context, config)?;
    let options = args.context.model_options();
    let plan = Plan::new(config, checkpoint.weights.total_bytes(), &options)?;
    let mut dtypes = BTreeMap::new();
    for tensor in checkpoint.weights.tensors() {
        let n = tensor.shape.iter().product::<usize>() as u64;
        *dtypes.entry(tensor.dtype.to_string().to_lowercase()).or_insert(0) += n;
    }
    let pool = plan.layout.capacity(plan.n_pages / plan.n_layers);
    let tokenizer_file = std::fs::metadata(args.dir.join(TOKENIZER)).map_or(0, |file| file.len());
    let facts = Facts {
        tokenizer_bytes: usize::try_from(tokenizer_file).unwrap_or(0).saturating_mul(8),
        ctx: args.context.ctx.unwrap_or(config.ctx_len.min(pool)),
        cuda: match cuda::check(&plan, config) {
            Ok(()) => Ok(CudaBytes::new(&plan, config, dtypes.values().sum())),
            Err(e) => Err(e.to_string()),
        },
        n_params: dtypes.values().sum(),
        checkpoint: &checkpoint,
        plan,
        dtypes,
    };
    match report.is_json() {
        true => report.print(&format!("{}\n", facts.json())),
        false => report.print(&facts.text()),
    }
}

impl Facts<'_> {
    fn working_bytes(&self) -> usize {
        let Plan { kv_bytes, activation_bytes, logits_bytes, .. } = self.plan;
        let aux_bytes = self.plan.aux_bytes() + self.plan.transit_bytes();
        kv_bytes + aux_bytes + activation_bytes + logits_bytes + self.tokenizer_bytes
    }

    fn json(&self) -> Value {
        let Self { checkpoint, .. } = self;
        let c = &checkpoint.config;
        json!({
            "model": checkpoint.dir.display().to_string(),
            "architecture": architecture(c),
            "n_layers": c.n_layers, "n_q_heads": c.n_q_heads, "n_kv_heads": c.n_kv_heads,
            "head_dim": c.head_dim, "hidden_dim": c.hidden_dim, "ffn_dim": c.ffn_dim,
            "vocab_size": c.vocab_size, "ctx_len": c.ctx_len,
            "tied_embeddings": c.tied_embeddings, "qkv_bias": c.qkv_bias, "qk_norm": c.qk_norm,
            "n_params": self.n_params, "dtypes": self.dtypes,
            "rope": { "theta": c.rope.theta, "scaling": scaling_name(&c.rope.scaling) },
            "windows": c.windows, "bos_id": c.bos_id, "eos_ids": c.eos_ids,
            "tokenizer": checkpoint.tokenizer.is_some(),
            "chat_template": checkpoint.chat.is_some(),
            "memory": self.memory(),
        })
    }

    fn memory(&self) -> Value {
        let plan = &self.plan;
        json!({
            "ctx": self.ctx, "kv_format": plan.kv.to_string(),
            "chunk": plan.chunk, "page_len": plan.layout.page_len,
            "weight_bytes": plan.weight_bytes,
            "kv_bytes_per_token": plan.kv_bytes_per_token,
            "kv_bytes": plan.kv_bytes,
            "aux_bytes": plan.aux_bytes(),
            "transit_bytes": plan.transit_bytes(),
            "activation_bytes": plan.activation_bytes,
            "logits_bytes": plan.logits_bytes,
            "tokenizer_bytes": self.tokenizer_bytes,
            "beyond_weights_bytes": self.working_bytes(),
            "cuda": match &self.cuda {
                Ok(c) => json!({
                    "weight_bytes": c.weights, "kv_bytes": c.kv, "aux_bytes": c.aux,
                    "activation_bytes": c.activations, "logits_bytes": c.logits,
                    "total_bytes": c.total(),
                }),
                Err(reason) => json!({ "refused": reason }),
            },
        })
    }

    fn text(&self) -> String {
        let Self { plan, checkpoint, .. } = self;
        let c = &checkpoint.config;
        let yes_no = |b: bool| if b { "yes" } else { "no" };
        let size = |n: usize| bytes(n as u64);
        let dtypes: Vec<_> = self.dtypes.keys().map(String::as_str).collect();
        let mut extras = vec![if c.tied_embeddings { "tied head" } else { "untied head" }];
        extras.extend(c.qkv_bias.then_some("bias on q, k, v"));
        extras.extend(c.qk_norm.then_some("norm on q and k"));
        let on_cuda = match &self.cuda {
            Ok(c) => {
                let (all, weights) = (bytes(c.total()), bytes(c.weights));
                format!("{all} of device memory, {weights} of them weights")
            }
            Err(reason) => format!("no: {reason}"),
        };
        let rows = [
            ("model", checkpoint.dir.display().to_string()),
            ("architecture", format!("{}, {}", architecture(c), extras.join(", "))),
            ("layers", c.n_layers.to_string()),
            ("widths", format!("hidden {}, MLP {}", c.hidden_dim, c.ffn_dim)),
            (
                "heads",
                format!("{} query, {} key/value, of {}", c.n_q_heads, c.n_kv_heads, c.head_dim),
            ),
            ("vocabulary", c.vocab_size.to_string()),
            ("parameters", format!("{} in {}", millions(self.n_params), dtypes.join(", "))),
            ("RoPE", format!("theta {}, scaling {}", c.rope.theta, scaling_name(&c.rope.scaling))),
            ("context", format!("{} tokens", c.ctx_len)),
            ("window", windows(c)),
            ("eos ids", format!("{:?}", c.eos_ids)),
            ("has tokenizer", yes_no(checkpoint.tokenizer.is_some()).into()),
            ("chat template", yes_no(checkpoint.chat.is_some()).into()),
            ("", String::new()),
            ("weights", format!("{}, mapped", bytes(plan.weight_bytes))),
            ("KV a token", format!("{} in {}", size(plan.kv_bytes_per_token), plan.kv)),
            (
                "KV pool",
                format!("{} for --ctx {}, taken as it fills", size(plan.kv_bytes), self.ctx),
            ),
            ("hidden states", hidden_states(plan)),
            ("activations", format!("{} for --chunk {}", size(plan.activation_bytes), plan.chunk)),
            ("logits", size(plan.logits_bytes)),
            ("tokenizer", format!("about {}", size(self.tokenizer_bytes))),
            ("in all", format!("{} at most, beyond the weights", size(self.working_bytes()))),
            ("on CUDA", on_cuda),
        ];
        let line =
            |(name, value): (&str, String)| format!("{name:<14} {value}").trim_end().to_owned();
        rows.map(line).join("\n") + "\n"
    }
}

pub(crate) fn architecture(config: &ModelConfig) -> String {
    format!("{:?}", config.architecture).to_lowercase()
}

/// The stores of a model that is opened for sessions that prune.
fn hidden_states(plan: &Plan) -> String {
    match plan.n_aux_pages {
        0 => "none, without --lazy".into(),
        _ => format!(
            "{} that wait at prune points in {}, {} in transit in f32; taken as they fill",
            bytes(plan.aux_bytes() as u64),
            plan.kv,
            bytes(plan.transit_bytes() as u64)
        ),
    }
}

fn scaling_name(scaling: &RopeScaling) -> &'static str {
    match scaling {
        RopeScaling::None => "none",
        RopeScaling::Linear { .. } => "linear",
        RopeScaling::Dynamic { .. } => "dynamic",
        RopeScaling::Yarn { .. } => "yarn",
        RopeScaling::Llama3 { .. } => "llama3",
    }
}

fn windows(config: &ModelConfig) -> String {
    let mut lens: Vec<usize> = config.windows.iter().flatten().copied().collect();
    let n = lens.len();
    lens.sort_unstable();
    lens.dedup();
    let lens: Vec<_> = lens.iter().map(usize::to_string).collect();
    match n {
        0 => "none".into(),
        n if n == config.n_layers => format!("{} tokens", lens.join(", ")),
        n => format!("{} tokens in {n} of {} layers", lens.join(", "), config.n_layers),
    }
}

fn millions(n: u64) -> String {
    #[allow(clippy::cast_precision_loss)] // shown with four digits
    let n = n as f64;
    match n {
        n if n >= 1e9 => format!("{:.2} B", n / 1e9),
        n if n >= 1e6 => format!("{:.1} M", n / 1e6),
        n => format!("{:.1} K", n / 1e3),
    }
}
