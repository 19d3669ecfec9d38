//! What the tests of the whole share: fixtures, reference logits, models opened in every variant.
#![allow(dead_code)] // each test binary uses its part
#![allow(clippy::unwrap_used, unreachable_pub)]

use std::path::PathBuf;

use loris::backend::cpu::Isa;
use loris::loader::{Checkpoint, Dtype, ModelConfig, OpenOptions, Weights};
use loris::{
    DeviceChoice, Engine, EngineOptions, Model, ModelOptions, Progress, Session, SessionOptions,
};
use safetensors::SafeTensors;

/// Every fixture, with the context that its tokens need.
pub const FIXTURES: [&str; 10] = [
    "llama-tied",
    "llama-untied",
    "llama-sharded",
    "llama3-rope",
    "llama-linear",
    "llama-yarn",
    "llama-dynamic",
    "mistral-window",
    "qwen2",
    "qwen3",
];

/// What `transformers` makes of a fixture.
pub struct Reference {
    pub tokens: Vec<u32>,
    pub vocab_size: usize,
    /// `[tokens][vocab_size]`, float32 weights.
    pub logits_f32: Vec<f32>,
    /// The same run with every weight rounded to bfloat16.
    pub logits_bf16_weights: Vec<f32>,
}

/// The repository: `LORIS_ROOT` where tests run on another machine than they were built on.
pub fn root() -> PathBuf {
    std::env::var_os("LORIS_ROOT").map_or(env!("CARGO_MANIFEST_DIR").into(), PathBuf::from)
}

pub fn fixture(name: &str) -> PathBuf {
    root().join("tests/fixtures").join(name)
}

pub fn reference(name: &str) -> Reference {
    let bytes = std::fs::read(fixture(name).join("reference.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let floats = |name: &str| -> Vec<f32> {
        let tensor = file.tensor(name).unwrap();
        tensor.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
    };
    let tokens = file.tensor("tokens").unwrap();
    let tokens: Vec<u32> =
        tokens.data().chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().unwrap())).collect();
    let logits_f32 = floats("logits_f32");
    Reference {
        vocab_size: logits_f32.len() / tokens.len(),
        tokens,
        logits_f32,
        logits_bf16_weights: floats("logits_bf16_weights"),
    }
}

/// A fixture as it is on disk, in float32.
pub fn checkpoint(name: &str) -> Checkpoint {
    loris::loader::open(&fixture(name), &OpenOptions::default()).unwrap()
}

/// A fixture with every weight rounded to a narrower type.
pub fn rounded(name: &str, dtype: Dtype) -> Checkpoint {
    let checkpoint = checkpoint(name);
    let round = |x: f32| -> [u8; 2] {
        match dtype {
            Dtype::BF16 => half::bf16::from_f32(x).to_le_bytes(),
            Dtype::F16 => half::f16::from_f32(x).to_le_bytes(),
            _ => panic!("{dtype} is not a 16-bit weight type"),
        }
    };
    let tensors = checkpoint.weights.tensors().map(|tensor| {
        let floats =
            tensor.bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()));
        let bytes: Vec<u8> = floats.flat_map(round).collect();
        (tensor.name.clone(), dtype, tensor.shape.clone(), bytes)
    });
    Checkpoint { weights: Weights::from_memory(tensors.collect()).unwrap(), ..checkpoint }
}

/// The instruction set of the CPU that tests run on: the fastest that the machine has, or `LORIS_TEST_ISA`.
pub fn isa() -> Isa {
    let Some(name) = std::env::var_os("LORIS_TEST_ISA") else { return Isa::detect() };
    let isa: Isa = name.to_str().unwrap().parse().unwrap();
    assert!(isa.is_available(), "LORIS_TEST_ISA: this machine has no {isa}");
    isa
}

/// The CPU, or with `LORIS_TEST_DRIVER` set to `twin` or `cuda` the CUDA kernels.
pub fn engine(threads: usize) -> Engine {
    if std::env::var_os("LORIS_TEST_DRIVER").is_some() {
        return Engine::new(&cuda_options()).unwrap();
    }
    on(isa(), threads)
}

/// Options for the CUDA kernels: on the twin, or with `LORIS_TEST_DRIVER=cuda` on a GPU.
pub fn cuda_options() -> EngineOptions {
    let is_real = std::env::var("LORIS_TEST_DRIVER").is_ok_and(|name| name == "cuda");
    let driver = (!is_real).then(|| loris_kernels::TWIN.into());
    EngineOptions { device: DeviceChoice::Cuda(0), driver, ..EngineOptions::default() }
}

pub fn open_cuda(checkpoint: Checkpoint, options: &ModelOptions) -> Model {
    let engine = Engine::new(&cuda_options()).unwrap();
    engine.open_checkpoint(checkpoint, options).unwrap()
}

pub fn open(checkpoint: Checkpoint, options: &ModelOptions) -> Model {
    open_with(2, checkpoint, options)
}

pub fn open_cpu(checkpoint: Checkpoint, options: &ModelOptions) -> Model {
    open_on(isa(), checkpoint, options)
}

pub fn on(isa: Isa, threads: usize) -> Engine {
    let options = EngineOptions {
        device: DeviceChoice::Cpu,
        threads: Some(threads),
        isa: Some(isa),
        ..EngineOptions::default()
    };
    Engine::new(&options).unwrap()
}

pub fn open_on(isa: Isa, checkpoint: Checkpoint, options: &ModelOptions) -> Model {
    on(isa, 2).open_checkpoint(checkpoint, options).unwrap()
}

pub fn open_with(threads: usize, checkpoint: Checkpoint, options: &ModelOptions) -> Model {
    engine(threads).open_checkpoint(checkpoint, options).unwrap()
}

/// Options with a pool for `kv_tokens` tokens.
pub fn options(kv_tokens: usize) -> ModelOptions {
    ModelOptions { kv_tokens: Some(kv_tokens), ..ModelOptions::default() }
}

/// The demo model's folder, which `scripts/fetch-model` makes.
pub fn smollm2() -> PathBuf {
    let dir = root().join("models/SmolLM2-135M-Instruct");
    assert!(dir.is_dir(), "{} is missing: run scripts/fetch-model first", dir.display());
    dir
}

pub fn argmax(logits: &[f32]) -> usize {
    (0..logits.len()).fold(0, |best, i| if logits[i] > logits[best] { i } else { best })
}

pub fn bits(logits: &[f32]) -> Vec<u32> {
    logits.iter().map(|x| x.to_bits()).collect()
}

pub fn session(model: &Model) -> Session {
    model.session(&SessionOptions::default()).unwrap()
}

/// A prompt of `n` tokens, another for each `seed`.
#[allow(clippy::cast_possible_truncation)]
pub fn prompt(seed: usize, n: usize) -> Vec<u32> {
    (0..n).map(|i| ((i * 31 + seed * 17 + i * i * (seed + 3)) % 128) as u32).collect()
}

/// Bits of the logits after the last token.
pub fn logits(session: &Session) -> Vec<u32> {
    bits(session.logits().unwrap())
}

#[allow(clippy::cast_possible_truncation)]
pub fn best(session: &Session) -> u32 {
    argmax(session.logits().unwrap()) as u32
}

/// The logits after a prompt and after each of `n` greedy tokens.
pub fn turn(s: &mut Session, prompt: &[u32], n: usize) -> Vec<Vec<u32>> {
    s.prefill(prompt).unwrap();
    let mut out = vec![logits(s)];
    for _ in 0..n {
        s.decode(best(s)).unwrap();
        out.push(logits(s));
    }
    out
}

/// The same of a new session.
pub fn run(model: &Model, prompt: &[u32], n: usize) -> Vec<Vec<u32>> {
    turn(&mut session(model), prompt, n)
}

/// The logits after turns of a prompt and some tokens each, whatever the model thinks of them.
#[allow(clippy::cast_possible_truncation)]
pub fn run_turns(s: &mut Session, turns: &[(usize, usize)]) -> Vec<Vec<u32>> {
    let mut out = Vec::new();
    for &(n, n_decoded) in turns {
        s.prefill(&prompt(n, n)).unwrap();
        out.push(logits(s));
        for token in 0..n_decoded {
            s.decode(token as u32 % 128).unwrap();
            out.push(logits(s));
        }
    }
    out
}

/// Sessions of prompts of these lengths, and of `n_tokens` greedy tokens each, that join a batch one by one have the bits
/// that each has alone: passes hold prompts of some and tokens of others.
pub fn check_company(model: &Model, lens: &[usize], n_tokens: usize) {
    let alone: Vec<_> = lens.iter().map(|&n| run(model, &prompt(n, n), n_tokens)).collect();
    let mut sessions: Vec<Session> = lens.iter().map(|_| session(model)).collect();
    let mut seen: Vec<Vec<Vec<u32>>> = vec![Vec::new(); lens.len()];
    for round in 0.. {
        if let Some(&n) = lens.get(round) {
            sessions[round].feed(&prompt(n, n)).unwrap();
        }
        let mut refs: Vec<&mut Session> = sessions.iter_mut().collect();
        let results = model.step(&mut refs);
        for (i, result) in results.iter().enumerate() {
            if *result.as_ref().unwrap() == Progress::Ready {
                seen[i].push(logits(&sessions[i]));
                if seen[i].len() <= n_tokens {
                    let token = best(&sessions[i]);
                    sessions[i].push(token).unwrap();
                }
            }
        }
        if round > lens.len() && results.iter().all(|r| matches!(r, Ok(Progress::Idle))) {
            break;
        }
    }
    for (i, n) in lens.iter().enumerate() {
        assert!(seen[i] == alone[i], "the session of {n} tokens");
    }
}

/// A checkpoint of `n_layers` layers: those of a fixture again and again.
pub fn deep(checkpoint: Checkpoint, n_layers: usize) -> Checkpoint {
    let n_own = checkpoint.config.n_layers;
    let mut tensors = Vec::new();
    for tensor in checkpoint.weights.tensors() {
        let mut add = |name| {
            tensors.push((name, tensor.dtype, tensor.shape.clone(), tensor.bytes.to_vec()));
        };
        match tensor.name.strip_prefix("layers.").and_then(|rest| rest.split_once('.')) {
            None => add(tensor.name.clone()),
            Some((own, part)) => {
                let copies = (own.parse().unwrap()..n_layers).step_by(n_own);
                copies.for_each(|l| add(format!("layers.{l}.{part}")));
            }
        }
    }
    let weights = Weights::from_memory(tensors).unwrap();
    let windows = (0..n_layers).map(|l| checkpoint.config.windows[l % n_own]).collect();
    let config = ModelConfig { n_layers, windows, ..checkpoint.config };
    Checkpoint { config, weights, ..checkpoint }
}
