//! Logarithms of probabilities against those of `transformers`' logits, and against a sort of the whole vocabulary.
#![allow(clippy::unwrap_used)]

mod support;

use std::ops::ControlFlow;

use loris::{
    GenerateOptions, LogSoftmax, Logprobs, ModelOptions, SamplerParams, SessionOptions, generate,
};
use support::{FIXTURES, checkpoint, open, options, reference};

/// A row's log-softmax, in f64.
fn naive(logits: &[f32]) -> Vec<f64> {
    let max = logits.iter().map(|&x| f64::from(x)).fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = logits.iter().map(|&x| (f64::from(x) - max).exp()).sum();
    logits.iter().map(|&x| f64::from(x) - max - sum.ln()).collect()
}

/// Ids and values, likeliest first, of equal ones the lower id first.
fn sorted(logprobs: &[f64]) -> Vec<(u32, f64)> {
    let mut all: Vec<(u32, f64)> = (0..).zip(logprobs.iter().copied()).collect();
    all.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    all
}

#[test]
fn every_position_agrees_with_transformers() {
    for name in FIXTURES {
        let reference = reference(name);
        let f32_cache = ModelOptions { kv: loris::KvFormat::F32.into(), ..options(192) };
        let model = open(checkpoint(name), &f32_cache);
        let ctx_len = Some(reference.tokens.len());
        let mut session =
            model.session(&SessionOptions { ctx_len, ..SessionOptions::default() }).unwrap();
        let mut theirs = reference.logits_f32.chunks_exact(model.config().vocab_size);
        session
            .logits_of(&reference.tokens, &mut |idx, logits| {
                let (ours, theirs) = (LogSoftmax::new(logits), naive(theirs.next().unwrap()));
                for (id, want) in (0..).zip(&theirs) {
                    let off = (f64::from(ours.of(id)) - want).abs();
                    assert!(off < 1e-4, "{name}: {id} at {idx} is off by {off}");
                }
            })
            .unwrap();
        assert!(theirs.next().is_none());
        let last = naive(session.logits().unwrap());
        assert!((f64::from(session.log_softmax().unwrap().of(3)) - last[3]).abs() < 1e-6);
    }
}

#[test]
fn the_likeliest_come_in_order_and_of_equal_ones_the_lower_id_first() {
    let mut logits: Vec<f32> = (0..1000_u32).map(|id| ((id * 7919) % 37) as f32 - 20.0).collect();
    (logits[500], logits[40]) = (0.0, -0.0); // neither is likelier
    logits[700] = 90.0; // and all others nothing beside it
    let all = LogSoftmax::new(&logits);
    let want = sorted(&naive(&logits));
    for n in [0, 1, 2, 5, 36, 37, 38, 999, 1000, 1001, usize::MAX] {
        let top = all.top(n).unwrap();
        assert_eq!(top.len(), n.min(1000));
        for (got, want) in top.iter().zip(&want) {
            assert_eq!(got.id, want.0, "{n}");
            assert!((f64::from(got.logprob) - want.1).abs() < 1e-5, "{n}");
        }
    }
    assert_eq!(all.of(1000), f32::NEG_INFINITY, "there is no such token");
    let one = LogSoftmax::new(&[-3.5]);
    assert_eq!((one.of(0), one.top(9).unwrap().len()), (0.0, 1));
    for logits in [[f32::MAX, f32::MIN], [1e30, 1e30]] {
        let all = LogSoftmax::new(&logits);
        assert!(all.of(0) <= 0.0 && all.of(0) > -1.0, "{logits:?}");
    }
}

/// They are those of the model, whatever the sampler does with its logits, and to ask for them changes no token.
#[test]
fn answers_tell_how_likely_their_tokens_were() {
    let model = open(checkpoint("llama-tied"), &options(192));
    let drawn = SamplerParams { temperature: 1.3, seed: Some(5), ..SamplerParams::default() };
    for params in [
        SamplerParams::default(),
        drawn.clone(),
        SamplerParams { repetition_penalty: 1.5, logit_bias: vec![(7, 30.0)], top_k: 9, ..drawn },
    ] {
        let run = |logprobs: Option<usize>| {
            let mut session = model.session(&SessionOptions::default()).unwrap();
            session.prefill(&[5, 6, 7]).unwrap();
            let mut sampler = model.sampler(params.clone()).unwrap();
            let options = GenerateOptions {
                max_tokens: 12,
                ignore_eos: true,
                logprobs,
                ..GenerateOptions::default()
            };
            let mut told = Vec::<(u32, Option<Logprobs>)>::new();
            generate(&mut session, &mut sampler, &options, &mut |token| {
                if !token.is_rest {
                    told.push((token.id, token.logprobs.cloned()));
                }
                ControlFlow::Continue(())
            })
            .unwrap();
            told
        };
        let plain: Vec<u32> = run(None).into_iter().map(|(id, _)| id).collect();
        let told = run(Some(4));
        assert_eq!(told.iter().map(|(id, _)| *id).collect::<Vec<_>>(), plain, "{params:?}");
        let mut session = model.session(&SessionOptions::default()).unwrap();
        session.prefill(&[5, 6, 7]).unwrap();
        for (id, logprobs) in told {
            let logprobs = logprobs.unwrap();
            let want = naive(session.logits().unwrap());
            assert!((f64::from(logprobs.logprob) - want[id as usize]).abs() < 1e-5);
            let top: Vec<u32> = logprobs.top.iter().map(|next| next.id).collect();
            let likeliest: Vec<u32> = sorted(&want)[..4].iter().map(|(id, _)| *id).collect();
            assert_eq!(top, likeliest, "{params:?}");
            session.decode(id).unwrap();
        }
        assert!(run(None).iter().all(|(_, logprobs)| logprobs.is_none()));
        assert!(run(Some(0)).iter().all(|(_, logprobs)| logprobs.as_ref().unwrap().top.is_empty()));
    }
}
