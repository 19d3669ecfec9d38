//! Every architecture against `transformers`: logits of every position, by prefill and by decode.
#![allow(clippy::unwrap_used)]

mod support;

use loris::backend::cpu::Isa;
use loris::loader::{Checkpoint, Dtype};
use loris::{KvFormat, Model, ModelOptions, SessionOptions};
use support::{FIXTURES, argmax, checkpoint, open, options, reference, rounded};

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
    session.score(&tokens[..n_prefill], &mut |_, logits| rows.push(logits.to_vec())).unwrap();
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
    checkpoint: Checkpoint,
    kv: KvFormat,
    reference_logits: &[f32],
    n_prefill: usize,
) -> Distance {
    let reference = reference(name);
    let model = open(checkpoint, &ModelOptions { kv, ..options(192) });
    let rows = logits(&model, &reference.tokens, n_prefill);
    assert_eq!(rows.concat().len(), reference_logits.len());
    let (mut difference, mut norm, mut worst) = (0.0, 0.0, 0.0_f64);
    for (pos, (ours, theirs)) in
        rows.iter().zip(reference_logits.chunks_exact(reference.vocab_size)).enumerate()
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
    for name in FIXTURES {
        let r = reference(name);
        for n in splits(name, r.tokens.len()) {
            let d = distance(name, checkpoint(name), KvFormat::F32, &r.logits_f32, n);
            assert!(d.worst <= 1e-4, "{name}: {:e} (prefill {n})", d.worst);
        }
    }
}

#[test]
fn bfloat16_weights_agree_with_transformers() {
    for name in FIXTURES {
        let r = reference(name);
        for n in splits(name, r.tokens.len()) {
            let weights = || rounded(name, Dtype::BF16);
            let d = distance(name, weights(), KvFormat::Bf16, &r.logits_bf16_weights, n);
            assert!(d.overall <= 2e-2, "{name}: {:e} (prefill {n})", d.overall);
            // What is left is the rounding of the cache, nothing else: without it the error is that of f32.
            let d = distance(name, weights(), KvFormat::F32, &r.logits_bf16_weights, n);
            assert!(d.worst <= prefill_bound(), "{name}: {:e} (prefill {n})", d.worst);
        }
    }
}

/// Where the machine has bf16 dot products, prefill rounds activations too.
fn prefill_bound() -> f64 {
    if Isa::detect().pairs() { 4e-2 } else { 1e-4 }
}

#[test]
fn float16_weights_are_accepted() {
    // Rounding to 11 bits costs less than rounding to 8: the bound of bfloat16 holds against float32.
    for name in ["llama-tied", "qwen2"] {
        let r = reference(name);
        let weights = rounded(name, Dtype::F16);
        let d = distance(name, weights, KvFormat::F32, &r.logits_f32, r.tokens.len());
        assert!(d.overall <= 2e-2, "{name}: {:e}", d.overall);
    }
}
