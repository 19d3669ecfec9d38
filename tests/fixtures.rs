//! Every architecture against `transformers`: logits of every position, by prefill and by decode.
#![allow(clippy::unwrap_used)]

mod support;

use loris::backend::cpu::Isa;
use loris::loader::{Checkpoint, Dtype};
use loris::{KvFormat, Model, ModelOptions, SessionOptions};
use support::{
    FIXTURES, argmax, checkpoint, open_cpu, open_cuda, open_on, options, reference, rounded,
};

/// How far logits are from those of `transformers`.
struct Distance {
    /// Over all positions: the norm of the difference to the norm of the reference.
    overall: f64,
    /// Over the worst position: the largest difference to the largest logit of the reference.
    worst: f64,
}

/// Logits of every position: the first `n_prefill` by prefill, the others by decode.
fn logits(model: &Model, tokens: &[u32], n_prefill: usize) -> Vec<Vec<f32>> {
    let options = SessionOptions { ctx_len: Some(tokens.len()), ..SessionOptions::default() };
    let mut session = model.session(&options).unwrap();
    let mut rows = Vec::new();
    session.logits_of(&tokens[..n_prefill], &mut |_, logits| rows.push(logits.to_vec())).unwrap();
    for &token in &tokens[n_prefill..] {
        session.decode(token).unwrap();
        rows.push(session.logits().unwrap().to_vec());
    }
    rows
}

/// Runs a checkpoint over a fixture's tokens. Where the two best tokens of the reference are further apart
/// than the error can explain, ours must be the same.
fn distance(
    name: &str,
    isa: Isa,
    checkpoint: Checkpoint,
    kv: KvFormat,
    reference_logits: &[f32],
    n_prefill: usize,
) -> Distance {
    let model = open_on(isa, checkpoint, &ModelOptions { kv: kv.into(), ..options(192) });
    let rows = logits(&model, &reference(name).tokens, n_prefill);
    compare(name, &rows, reference_logits)
}

fn compare(name: &str, rows: &[Vec<f32>], reference_logits: &[f32]) -> Distance {
    let vocab_size = rows[0].len();
    assert_eq!(rows.len() * vocab_size, reference_logits.len());
    let (mut difference, mut norm, mut worst) = (0.0, 0.0, 0.0_f64);
    for (pos, (ours, theirs)) in
        rows.iter().zip(reference_logits.chunks_exact(vocab_size)).enumerate()
    {
        let errors: Vec<f64> = ours.iter().zip(theirs).map(|(a, b)| f64::from(a - b)).collect();
        difference += errors.iter().map(|e| e * e).sum::<f64>();
        norm += theirs.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>();
        let error = errors.iter().fold(0.0_f64, |max, e| max.max(e.abs()));
        let scale = theirs.iter().fold(0.0_f64, |max, &x| max.max(f64::from(x).abs()));
        worst = worst.max(error / scale);
        let (best, our_best) = (argmax(theirs), argmax(ours));
        let gap = f64::from(theirs[best] - theirs[our_best]);
        assert!(gap <= 2.0 * error, "{name}: another token is best at position {pos}");
    }
    let overall = (difference / norm).sqrt();
    assert!(overall.is_finite() && worst.is_finite(), "{name}");
    Distance { overall, worst }
}

/// By one prefill, and by a prefill of 70 tokens with decode steps after it.
fn splits(name: &str, n_tokens: usize) -> Vec<usize> {
    match name {
        "llama-dynamic" => vec![n_tokens], // its base depends on the length of the whole prompt
        _ => vec![n_tokens, 70],
    }
}

#[test]
fn float32_weights_agree_with_transformers() {
    for (name, isa) in on_every_isa() {
        let r = reference(name);
        for n in splits(name, r.tokens.len()) {
            let d = distance(name, isa, checkpoint(name), KvFormat::F32, &r.logits_f32, n);
            assert!(d.worst <= 1e-4, "{name} on {isa:?}: {:e} (prefill {n})", d.worst);
        }
    }
}

#[test]
fn bfloat16_weights_agree_with_transformers() {
    for (name, isa) in on_every_isa() {
        let r = reference(name);
        for n in splits(name, r.tokens.len()) {
            let run =
                |kv| distance(name, isa, rounded(name, Dtype::BF16), kv, &r.logits_bf16_weights, n);
            let d = run(KvFormat::BF16);
            assert!(d.overall <= 2e-2, "{name} on {isa:?}: {:e} (prefill {n})", d.overall);
            // Without bf16 dot products the only thing rounded is the cache: the rest is exact to f32.
            if !isa.pairs() {
                let d = run(KvFormat::F32);
                assert!(d.worst <= 1e-4, "{name} on {isa:?}: {:e} (prefill {n})", d.worst);
            }
        }
    }
}

/// The CUDA kernels, against `transformers` and against the CPU.
#[test]
fn cuda_agrees_with_transformers_and_with_the_cpu() {
    for name in FIXTURES {
        let r = reference(name);
        let options = ModelOptions { batch: 150, ..options(192) };
        let on_cuda = open_cuda(rounded(name, Dtype::BF16), &options);
        let on_cpu = open_cpu(rounded(name, Dtype::BF16), &options);
        for n in splits(name, r.tokens.len()) {
            let rows = logits(&on_cuda, &r.tokens, n);
            let d = compare(name, &rows, &r.logits_bf16_weights);
            assert!(d.overall <= 2e-2, "{name} on CUDA: {:e} (prefill {n})", d.overall);
            let d = compare(name, &rows, &logits(&on_cpu, &r.tokens, n).concat());
            assert!(d.overall <= 2e-2, "{name}: CUDA and CPU: {:e} (prefill {n})", d.overall);
        }
    }
}

/// With a coded cache the kernels follow the CPU. Their keys and values are a rounding to bf16 apart, which makes some codes
/// fall to the other side: that is off by one step, where coding is by half of one, so it costs no more than coding does.
#[test]
fn cuda_agrees_with_the_cpu_where_the_cache_is_coded() {
    for (name, kv) in [
        ("llama3-rope", "int8"),
        ("qwen3", "int4"),
        ("mistral-window", "int8"),
        ("mistral-window", "fp8"),
    ] {
        let r = reference(name);
        let coded = ModelOptions { kv: kv.parse().unwrap(), batch: 150, ..options(192) };
        let dense = ModelOptions { batch: 150, ..options(192) };
        let run = |model: Model| logits(&model, &r.tokens, 70);
        let on_cpu = run(open_cpu(rounded(name, Dtype::BF16), &coded));
        let exact = run(open_cpu(rounded(name, Dtype::BF16), &dense)).concat();
        let cost = compare(name, &on_cpu, &exact).overall;
        let on_cuda = run(open_cuda(rounded(name, Dtype::BF16), &coded));
        let from_cpu = compare(name, &on_cuda, &on_cpu.concat()).overall;
        let from_reference = compare(name, &on_cuda, &r.logits_bf16_weights).overall;
        let what = format!("{name} {kv}: coding costs {cost:e}");
        assert!(from_cpu <= 2e-2 + cost, "{what}, CUDA and CPU: {from_cpu:e}");
        assert!(from_reference <= 2e-2 + cost, "{what}, CUDA: {from_reference:e}");
    }
}

#[test]
fn float16_weights_are_accepted() {
    // Rounding to 11 bits costs less than rounding to 8: the bound of bfloat16 holds against float32.
    for (name, isa) in on_every_isa().filter(|(name, _)| ["llama-tied", "qwen2"].contains(name)) {
        let r = reference(name);
        let weights = rounded(name, Dtype::F16);
        let d = distance(name, isa, weights, KvFormat::F32, &r.logits_f32, r.tokens.len());
        assert!(d.overall <= 2e-2, "{name} on {isa:?}: {:e}", d.overall);
    }
    for dtype in [Dtype::F16, Dtype::F32] {
        let r = reference("qwen2");
        let weights = match dtype {
            Dtype::F32 => checkpoint("qwen2"),
            _ => rounded("qwen2", dtype),
        };
        let model = open_cuda(weights, &ModelOptions { batch: 150, ..options(192) });
        let d = compare("qwen2", &logits(&model, &r.tokens, 150), &r.logits_f32);
        assert!(d.overall <= 2e-2, "{dtype:?} on CUDA: {:e}", d.overall);
    }
}

fn on_every_isa() -> impl Iterator<Item = (&'static str, Isa)> {
    FIXTURES.into_iter().flat_map(|name| Isa::available().into_iter().map(move |isa| (name, isa)))
}
