//! Every architecture against `transformers`: logits of every position, by prefill and by decode.
#![allow(clippy::unwrap_used)]

mod support;

use loris::loader::{Checkpoint, Dtype};
use loris::{KvFormat, Model, ModelOptions, SessionOptions};
use support::{FIXTURES, argmax, checkpoint, open, reference, rounded};

/// Error of a row of logits relative to the largest of the reference.
fn relative_error(ours: &[f32], reference: &[f32]) -> f32 {
    assert_eq!(ours.len(), reference.len());
    let diffs = ours.iter().zip(reference).map(|(a, b)| (a - b).abs());
    let scale = reference.iter().fold(0.0_f32, |max, x| max.max(x.abs()));
    diffs.fold(0.0_f32, |max, d| if d.is_nan() { f32::INFINITY } else { max.max(d) }) / scale
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

/// Largest error over all positions; where the two best of the reference are further apart than the error
/// can explain, the best must be the same.
fn compare(
    name: &str,
    checkpoint: Checkpoint,
    kv: KvFormat,
    reference_logits: &[f32],
    n_prefill: usize,
) -> f32 {
    let reference = reference(name);
    let options = ModelOptions { kv, ..support::options(192) };
    let model = open(checkpoint, &options);
    let ours = logits(&model, &reference.tokens, n_prefill);
    let mut worst = 0.0_f32;
    for (pos, (ours, theirs)) in
        ours.iter().zip(reference_logits.chunks_exact(reference.vocab_size)).enumerate()
    {
        worst = worst.max(relative_error(ours, theirs));
        let best = argmax(theirs);
        if argmax(ours) != best {
            let gap = theirs[best] - theirs[argmax(ours)];
            let error = ours.iter().zip(theirs).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(gap <= 2.0 * error, "{name}: another token is best at position {pos}");
        }
    }
    worst
}

#[test]
fn float32_weights_agree_with_transformers() {
    for name in FIXTURES {
        let r = reference(name);
        for n_prefill in [r.tokens.len(), 70] {
            if name == "llama-dynamic" && n_prefill < r.tokens.len() {
                continue; // its base depends on the length of the whole prompt
            }
            let error = compare(name, checkpoint(name), KvFormat::F32, &r.logits_f32, n_prefill);
            assert!(error <= 1e-4, "{name}: relative error {error:e} (prefill {n_prefill})");
        }
    }
}

#[test]
fn bfloat16_weights_agree_with_transformers() {
    for name in FIXTURES {
        let r = reference(name);
        for n_prefill in [r.tokens.len(), 70] {
            if name == "llama-dynamic" && n_prefill < r.tokens.len() {
                continue;
            }
            let weights = rounded(name, Dtype::BF16);
            let error = compare(name, weights, KvFormat::Bf16, &r.logits_bf16_weights, n_prefill);
            assert!(error <= 2e-2, "{name}: relative error {error:e} (prefill {n_prefill})");
        }
    }
}

#[test]
fn float16_weights_are_accepted() {
    // Rounding to 11 bits costs less than rounding to 8: the bound of bfloat16 holds against float32.
    for name in ["llama-tied", "qwen2"] {
        let r = reference(name);
        let weights = rounded(name, Dtype::F16);
        let error = compare(name, weights, KvFormat::F32, &r.logits_f32, r.tokens.len());
        assert!(error <= 2e-2, "{name}: relative error {error:e}");
    }
}
