//! Sessions on the CUDA backend: replayed passes, shared pages, states that move between devices, and what
//! happens where the driver fails.
//!
//! Everything runs on the twin, the CUDA driver that runs kernels on the CPU; what does not depend on its
//! controls also runs with `LORIS_TEST_DRIVER=cuda` on a GPU. The twin's controls, contexts and counts belong to the
//! calling thread, so tests do not disturb each other.
#![allow(clippy::unwrap_used)]

mod support;
#[path = "../kernels-cuda/tests/common/twin.rs"]
mod twin;

use std::ffi::c_int;
use std::ops::ControlFlow;

use loris::backend::cuda::{self, CudaBytes};
use loris::compute::{Lazy, PrunePoint};
use loris::keep::Evict;
use loris::loader::Dtype;
use loris::{
    DeviceChoice, Engine, EngineOptions, Error, GenerateOptions, KvFormat, Model, ModelOptions,
    Passes, Plan, Progress, Sampler, SamplerParams, Session, SessionOptions, StreamOptions,
    generate,
};
use support::{
    argmax, best, bits, check_company, checkpoint, cuda_options, logits, open_cpu, open_cuda,
    options, prompt, rounded, run, session,
};
use twin::Twin;

const NAME: &str = "llama-tied";

fn small() -> ModelOptions {
    ModelOptions { page_len: 16, chunk: 64, batch: 4, ..options(256) }
}

/// With room for tokens that wait.
fn lazy_options() -> ModelOptions {
    ModelOptions { aux_tokens: 256, ..small() }
}

fn model() -> Model {
    open_cuda(rounded(NAME, Dtype::BF16), &small())
}

/// A session that prunes after the layers of `points`; short sequences too.
fn lazy_session(model: &Model, points: &[(usize, f64)]) -> Session {
    let points = points.iter().map(|&(layer, keep_rate)| PrunePoint { layer, keep_rate }).collect();
    let lazy = Lazy { min_len: 0, sinks: 1, max_revived: 3, ..Lazy::new(points) };
    model.session(&SessionOptions { lazy: Some(lazy), ..SessionOptions::default() }).unwrap()
}

/// `None` where tests run on a GPU.
fn twin() -> Option<Twin> {
    let is_real = std::env::var("LORIS_TEST_DRIVER").is_ok_and(|name| name == "cuda");
    (!is_real).then(Twin::get)
}

#[test]
fn the_order_of_threads_changes_no_bit() {
    let Some(twin) = twin() else { return };
    let base = run(&model(), &prompt(1, 21), 2);
    for seed in 1..=10 {
        twin.set_seed(seed);
        assert!(run(&model(), &prompt(1, 21), 2) == base, "seed {seed}");
    }
}

#[test]
fn replayed_passes_give_the_bits_of_launched_ones() {
    let options = ModelOptions { chunk: 256, ..options(512) };
    let answer = |passes| {
        let engine = Engine::new(&EngineOptions { passes, ..cuda_options() }).unwrap();
        let checkpoint = rounded("llama-dynamic", Dtype::BF16);
        let model = engine.open_checkpoint(checkpoint, &options).unwrap();
        let mut s = model
            .session(&SessionOptions { ctx_len: Some(300), ..SessionOptions::default() })
            .unwrap();
        s.prefill(&prompt(1, 252)).unwrap();
        let mut seen = vec![logits(&s)];
        for _ in 0..8 {
            s.decode(best(&s)).unwrap();
            seen.push(logits(&s));
        }
        (seen, s.receipt().n_replayed)
    };
    let (launched, none) = answer(Passes::Launched);
    let (replayed, some) = answer(Passes::Replayed);
    assert!(launched == replayed);
    // Slot 256 begins a second split, which is another recording.
    assert_eq!((none, some), (0, 6));
}

#[test]
fn a_replayed_step_is_an_upload_a_launch_and_a_read() {
    let Some(twin) = twin() else { return };
    let model = model();
    let mut s = session(&model);
    s.prefill(&prompt(1, 20)).unwrap();
    s.decode(1).unwrap(); // recorded
    s.decode(2).unwrap();
    let n_calls = twin.calls_of(|| s.decode(3).unwrap());
    assert_eq!(s.receipt().n_replayed, 2);
    // Two copies, a launch, a wait, the event of the pinned memory, and the context made current before each.
    assert!(n_calls <= 10, "{n_calls}");
}

/// Segments have as many layers, and rows of all kinds: embedded, waiting, taken up again.
#[test]
fn replayed_segments_give_the_bits_of_launched_ones() {
    let answer = |passes| {
        let engine = Engine::new(&EngineOptions { passes, ..cuda_options() }).unwrap();
        let checkpoint = rounded("llama-sharded", Dtype::BF16);
        let model = engine.open_checkpoint(checkpoint, &lazy_options()).unwrap();
        let mut s = lazy_session(&model, &[(1, 0.4), (2, 0.5)]);
        let mut seen = Vec::new();
        for turn in [1, 2] {
            s.prefill(&prompt(turn, 24)).unwrap();
            seen.push(logits(&s));
            for _ in 0..7 {
                s.decode(best(&s)).unwrap();
                seen.push(logits(&s));
            }
        }
        (seen, s.receipt())
    };
    let (launched, none) = answer(Passes::Launched);
    let (replayed, some) = answer(Passes::Replayed);
    assert!(launched == replayed);
    assert_eq!((none.n_replayed, none.n_revived), (0, some.n_revived));
    assert!(some.n_revived > 20 && some.n_waiting > 0, "{some:?}");
    // Of three passes a token, all but the first of each number of rows in each segment.
    assert!(some.n_replayed > 21, "{some:?}");
}

#[test]
fn sessions_that_prune_do_not_depend_on_company() {
    let open = || open_cuda(rounded("llama-sharded", Dtype::BF16), &lazy_options());
    let schedules: [&[(usize, f64)]; 4] =
        [&[(1, 0.5)], &[], &[(1, 0.4), (2, 0.7)], &[(1, 0.7), (2, 0.5)]];
    let start = |model: &Model, idx: usize| {
        let mut s = match schedules[idx] {
            [] => session(model),
            points => lazy_session(model, points),
        };
        s.prefill(&prompt(idx, 15 + 4 * idx)).unwrap();
        s
    };
    let alone: Vec<Vec<Vec<u32>>> = (0..4)
        .map(|idx| {
            let mut s = start(&open(), idx);
            let step = |_| {
                s.decode(best(&s)).unwrap();
                logits(&s)
            };
            (0..4).map(step).collect()
        })
        .collect();
    let model = open();
    let mut sessions: Vec<Session> = (0..4).map(|idx| start(&model, idx)).collect();
    let mut seen: Vec<Vec<Vec<u32>>> = vec![Vec::new(); 4];
    for _ in 0..4 {
        for s in &mut sessions {
            let token = best(s);
            s.push(token).unwrap();
        }
        let mut refs: Vec<&mut Session> = sessions.iter_mut().collect();
        let results = model.step(&mut refs);
        assert!(results.iter().all(|r| matches!(r, Ok(Progress::Ready))), "{results:?}");
        seen.iter_mut().zip(&sessions).for_each(|(seen, s)| seen.push(logits(s)));
    }
    for (idx, (seen, alone)) in seen.iter().zip(&alone).enumerate() {
        assert!(seen == alone, "session {idx}");
    }
    assert!(sessions.iter().map(|s| s.receipt().n_revived).sum::<usize>() > 3);
}

/// A segment more costs a replayed step a batch, its rows' two ways, the scores and their read.
#[test]
fn a_replayed_step_of_two_segments_stays_short() {
    let Some(twin) = twin() else { return };
    let model = open_cuda(rounded(NAME, Dtype::BF16), &lazy_options());
    let mut s = lazy_session(&model, &[(1, 1.0)]);
    s.prefill(&prompt(1, 20)).unwrap();
    s.decode(1).unwrap(); // both are recorded
    let n_calls = twin.calls_of(|| s.decode(2).unwrap());
    assert_eq!(s.receipt().n_replayed, 2);
    assert!(n_calls <= 26, "{n_calls}");
}

#[test]
fn bits_do_not_depend_on_the_batch() {
    check_company(&model(), &[1, 16, 17, 40], 3);
}

#[test]
fn pages_are_shared_copied_and_cut() {
    let model = model();
    let long = prompt(3, 40);
    let want = run(&model, &long, 2);

    let mut first = session(&model);
    first.prefill(&long).unwrap();
    let mut second = session(&model);
    second.prefill(&long).unwrap();
    assert_eq!(second.receipt().n_shared, 32);
    let mut fork = second.fork().unwrap();
    for s in [&mut first, &mut second, &mut fork] {
        for row in &want[1..] {
            s.decode(best(s)).unwrap();
            assert!(logits(s) == *row);
        }
    }
    // Two that share a tail write different tokens to it.
    let mut other = first.fork().unwrap();
    other.decode(3).unwrap();
    first.decode(4).unwrap();
    assert!(logits(&other) != logits(&first));
    first.truncate(40).unwrap();
    #[allow(clippy::cast_possible_truncation)]
    let token = argmax(&want[0].iter().map(|&b| f32::from_bits(b)).collect::<Vec<_>>()) as u32;
    first.decode(token).unwrap();
    assert!(logits(&first) == want[1]);
    first.canceller().cancel();
    assert!(matches!(first.decode(1), Err(Error::Cancelled)));
    assert!(logits(&first) == want[1]);
}

#[test]
fn a_saved_session_goes_on_on_another_device() {
    let restore = |model: &Model, blob: &Vec<u8>| {
        model.restore(&mut blob.as_slice(), &SessionOptions::default()).unwrap()
    };
    let saved = |session: &Session| {
        let mut blob = Vec::new();
        session.save(&mut blob).unwrap();
        blob
    };
    // Where pages are sealed some are.
    for (kv, n) in [("bf16", 37), ("int8", 37), ("int4", 37), ("int4-channel", 99), ("int2", 99)] {
        let options = ModelOptions { kv: kv.parse().unwrap(), ..small() };
        let on_cpu = open_cpu(rounded(NAME, Dtype::BF16), &options);
        let on_cuda = open_cuda(rounded(NAME, Dtype::BF16), &options);
        for (from, to) in [(&on_cpu, &on_cuda), (&on_cuda, &on_cpu)] {
            let mut first = session(from);
            first.prefill(&prompt(1, n)).unwrap();
            let blob = saved(&first);
            let mut moved = restore(to, &blob);
            assert!(saved(&moved) == blob, "the bytes are the same wherever they are");
            let close = |first: &Session, moved: &Session| {
                let pairs = first.logits().unwrap().iter().zip(moved.logits().unwrap());
                let sums = |(d, n), (a, b): (&f32, &f32)| (d + (a - b).powi(2), n + a * a);
                let (d, n) = pairs.fold((0.0, 0.0), sums);
                assert!((d / n).sqrt() < 2e-2, "{kv}: {}", (d / n).sqrt());
            };
            first.decode(5).unwrap();
            moved.decode(5).unwrap();
            close(&first, &moved);
            if n > 64 {
                // A page more is sealed, out of bytes that came along.
                first.prefill(&prompt(2, 20)).unwrap();
                moved.prefill(&prompt(2, 20)).unwrap();
                close(&first, &moved);
            }
        }
    }
}

/// In coded pages too a row's bits do not depend on chunks, pages, company, replays or what was there before.
#[test]
fn coded_pages_in_sessions() {
    for kv in ["int8", "int4", "int8:int4"] {
        let options = ModelOptions { kv: kv.parse().unwrap(), ..small() };
        let open = |options: &ModelOptions| open_cuda(rounded(NAME, Dtype::BF16), options);
        let model = open(&options);
        let want = run(&model, &prompt(1, 40), 6);
        let others = ModelOptions { chunk: 7, page_len: 64, ..options.clone() };
        assert!(run(&open(&others), &prompt(1, 40), 6) == want, "{kv}: chunks and pages");
        let mut first = session(&model);
        first.prefill(&prompt(1, 38)).unwrap();
        let mut fork = first.fork().unwrap();
        first.decode(3).unwrap();
        for s in [&mut first, &mut fork] {
            s.truncate(21).unwrap();
            s.prefill(&prompt(1, 40)[21..]).unwrap();
            assert!(logits(s) == want[0], "{kv}: forked, cut and continued");
        }
    }
}

const SEALED: [&str; 2] = ["int4-channel", "int2"];

/// Where pages are sealed: those of 16 tokens behind the first four, once a row comes three pages further.
fn sealed(kv: &str) -> ModelOptions {
    ModelOptions { kv: kv.parse().unwrap(), kv_tokens: Some(1_024), ..small() }
}

/// A tail of pages in 16 bits, which are coded one by one, changes no bit with chunks, company, replays or forks.
#[test]
fn sealed_pages_in_sessions() {
    for kv in SEALED {
        let open = |options: &ModelOptions| open_cuda(rounded(NAME, Dtype::BF16), options);
        let model = open(&sealed(kv));
        let tokens = prompt(1, 95);
        let want = run(&model, &tokens, 30);
        for chunk in [1, 7, 256] {
            let others = ModelOptions { chunk, ..sealed(kv) };
            assert!(run(&open(&others), &tokens, 2) == want[..3], "{kv}: chunks of {chunk}");
        }
        let mut first = session(&model);
        first.prefill(&tokens[..93]).unwrap();
        let mut fork = first.fork().unwrap();
        first.decode(3).unwrap();
        for s in [&mut first, &mut fork] {
            s.truncate(90).unwrap(); // as many pages were sealed for it
            s.prefill(&tokens[90..]).unwrap();
            assert!(logits(s) == want[0], "{kv}: forked, cut and continued");
        }
        // Two that go on from the same tail, one of them in another's company.
        let mut other = session(&model);
        other.prefill(&prompt(2, 41)).unwrap();
        for want in &want[1..] {
            first.decode(best(&first)).unwrap();
            assert!(logits(&first) == *want, "{kv}: alone, at {}", first.len());
            let token = best(&fork);
            fork.push(token).unwrap();
            other.push(best(&other)).unwrap();
            let results = model.step(&mut [&mut fork, &mut other]);
            assert!(results.iter().all(|r| matches!(r, Ok(Progress::Ready))), "{results:?}");
            assert!(logits(&fork) == *want, "{kv}: in company, at {}", fork.len());
        }
        let mut alone = session(&model);
        alone.prefill(&prompt(2, 41)).unwrap();
        for _ in 1..want.len() {
            alone.decode(best(&alone)).unwrap();
        }
        assert!(logits(&alone) == logits(&other), "{kv}: the other");
        drop((first, fork, other, alone));
        assert_eq!(model.pool_usage().n_used, 0);
    }
}

/// Steps that seal a page are replayed like any other.
#[test]
fn replayed_passes_see_what_was_sealed_between_them() {
    for kv in SEALED {
        let answer = |passes| {
            let engine = Engine::new(&EngineOptions { passes, ..cuda_options() }).unwrap();
            let model = engine.open_checkpoint(rounded(NAME, Dtype::BF16), &sealed(kv)).unwrap();
            let mut s = session(&model);
            s.prefill(&prompt(1, 45)).unwrap();
            let mut seen = Vec::new();
            for _ in 0..40 {
                s.decode(best(&s)).unwrap();
                seen.push(logits(&s));
            }
            (seen, s.receipt().n_replayed)
        };
        let (launched, none) = answer(Passes::Launched);
        let (replayed, some) = answer(Passes::Replayed);
        assert!(launched == replayed, "{kv}");
        assert_eq!((none, some), (0, 39), "{kv}: one form");
    }
}

/// Choices that hang on coded slots do not depend on chunks; where all tokens stay there is nothing to choose.
#[test]
fn sealed_pages_go_with_pruning() {
    for kv in SEALED {
        let answer = |chunk, points: &[(usize, f64)]| {
            let options = ModelOptions { aux_tokens: 256, chunk, ..sealed(kv) };
            let model = open_cuda(rounded(NAME, Dtype::BF16), &options);
            let mut s = match points {
                [] => session(&model),
                points => lazy_session(&model, points),
            };
            s.prefill(&prompt(1, 100)).unwrap();
            let mut seen = vec![logits(&s)];
            for _ in 0..6 {
                s.decode(best(&s)).unwrap();
                seen.push(logits(&s));
            }
            seen
        };
        let dense = answer(64, &[]);
        assert!(answer(64, &[(1, 1.0)]) == dense, "{kv}: keeping all is dense");
        let pruned = answer(64, &[(1, 0.6)]);
        assert!(pruned != dense, "{kv}");
        assert!(answer(9, &[(1, 0.6)]) == pruned, "{kv}: chunks");
    }
}

/// Generation draws where the logits are: the same tokens as the host's sampler gives for the same logits,
/// and afterwards the logits are there, though another session ran in between.
#[test]
fn generated_tokens_are_drawn_on_the_device() {
    let model = model();
    let start = {
        let mut s = session(&model);
        s.prefill(&prompt(1, 20)).unwrap();
        s
    };
    let drawn = SamplerParams { temperature: 0.9, seed: Some(7), ..SamplerParams::default() };
    for params in [
        SamplerParams::default(),
        SamplerParams { top_k: 5, ..drawn.clone() },
        SamplerParams { top_p: 0.8, min_p: 0.01, ..drawn.clone() },
        SamplerParams { repetition_penalty: 1.3, ..SamplerParams::default() },
        SamplerParams { repetition_penalty: 1.3, ..drawn.clone() },
        SamplerParams { presence_penalty: 0.5, frequency_penalty: 0.2, ..drawn.clone() },
        SamplerParams {
            logit_bias: vec![(4, 2.0), (1, -3.0), (4, 0.5), (70_000, 1.0)],
            repetition_penalty: 0.8,
            presence_penalty: -0.4,
            ..drawn.clone()
        },
        SamplerParams { typical_p: 0.9, ..drawn },
    ] {
        let masked: Vec<bool> = (0..128).map(|id| id % 3 == 0).collect();
        let sampler = || Sampler::with_mask(params.clone(), &masked).unwrap();
        let (mut host, mut on_host) = (start.fork().unwrap(), sampler());
        let mut want = Vec::new();
        for _ in 0..10 {
            want.push(on_host.sample(host.logits().unwrap(), host.history()));
            host.decode(want[want.len() - 1]).unwrap();
        }

        let (mut device, mut other, mut got) = (start.fork().unwrap(), session(&model), Vec::new());
        let options = GenerateOptions { max_tokens: 20, ignore_eos: true, ..Default::default() };
        generate(&mut device, &mut sampler(), &options, &mut |token| {
            got.push(token.id);
            if got.len() < 10 {
                return ControlFlow::Continue(());
            }
            other.prefill(&prompt(2, 3)).unwrap(); // overwrites the device's logits
            ControlFlow::Break(())
        })
        .unwrap();
        assert_eq!(got, want, "{params:?}");
        assert_eq!(logits(&device), logits(&host), "{params:?}");
        let n_drawn = device.receipt().n_drawn;
        assert_eq!(n_drawn, if params.typical_p == 1.0 { 10 } else { 0 }, "{params:?}");
    }
}

/// Penalties of a stream count what the last token saw, whoever draws: the device up to the length of the window, then the host.
#[test]
fn streams_draw_with_penalties_as_the_host_does() {
    let model = model();
    let stream = StreamOptions { sink: 4, window: 16 };
    let open = || {
        let options = SessionOptions { stream: Some(stream), ..SessionOptions::default() };
        let mut s = model.session(&options).unwrap();
        s.prefill(&prompt(1, 3)).unwrap();
        s
    };
    let params = SamplerParams {
        temperature: 0.9,
        repetition_penalty: 1.6,
        frequency_penalty: 0.4,
        seed: Some(7),
        ..SamplerParams::default()
    };
    let sampler = || Sampler::with_mask(params.clone(), &[]).unwrap();
    let (mut host, mut on_host, mut want) = (open(), sampler(), Vec::new());
    for _ in 0..40 {
        want.push(on_host.sample(host.logits().unwrap(), host.history()));
        host.decode(want[want.len() - 1]).unwrap();
    }
    let (mut device, mut got) = (open(), Vec::new());
    let options = GenerateOptions { max_tokens: 40, ignore_eos: true, ..Default::default() };
    generate(&mut device, &mut sampler(), &options, &mut |token| {
        got.push(token.id);
        ControlFlow::Continue(())
    })
    .unwrap();
    assert_eq!(got, want);
    assert_eq!(device.receipt().n_drawn, 13, "from 3 tokens up to the window");
}

/// A mask that changes from token to token is one of the device's draws.
#[test]
fn masked_tokens_are_drawn_on_the_device() {
    let model = model();
    let start = {
        let mut s = session(&model);
        s.prefill(&prompt(1, 20)).unwrap();
        s
    };
    let drawn = SamplerParams { temperature: 0.9, seed: Some(7), ..SamplerParams::default() };
    for params in [SamplerParams::default(), SamplerParams { top_p: 0.9, ..drawn }] {
        let sampler = || Sampler::with_mask(params.clone(), &[]).unwrap();
        let mut mask = |answer: &[u32], allowed: &mut [u32]| {
            let rest = answer.len() as u32 % 5;
            (0..128_u32)
                .filter(|id| id % 5 == rest)
                .for_each(|id| allowed[id as usize / 32] |= 1 << (id % 32));
            Ok(())
        };
        let (mut host, mut on_host, mut want) = (start.fork().unwrap(), sampler(), Vec::new());
        for _ in 0..10 {
            let mut allowed = [0; 4];
            mask(&want, &mut allowed).unwrap();
            let id =
                on_host.sample_masked(host.logits().unwrap(), host.tokens(), &allowed).unwrap();
            want.push(id.unwrap());
            host.decode(want[want.len() - 1]).unwrap();
        }
        let (mut device, mut got) = (start.fork().unwrap(), Vec::new());
        let options = GenerateOptions { max_tokens: 10, ignore_eos: true, ..Default::default() };
        loris::generate_masked(&mut device, &mut sampler(), &options, &mut mask, &mut |token| {
            got.push(token.id);
            ControlFlow::Continue(())
        })
        .unwrap();
        assert_eq!(got, want, "{params:?}");
        assert_eq!(device.receipt().n_drawn, 9, "all but the first, whose logits were on the host");
    }
}

#[test]
fn what_the_kernels_lack_is_refused_by_name() {
    let f32_cache = ModelOptions { kv: KvFormat::F32.into(), ..small() };
    let engine = |device| Engine::new(&EngineOptions { device, ..cuda_options() });
    let open =
        |device| engine(device).unwrap().open_checkpoint(rounded(NAME, Dtype::BF16), &f32_cache);
    let refused = open(DeviceChoice::Cuda(0)).unwrap_err();
    assert!(matches!(&refused, Error::Unsupported { what, .. } if what == "--kv"), "{refused}");
    let placement = open(DeviceChoice::Auto).unwrap().placement().clone();
    assert_eq!(placement.device, "cpu");
    assert!(placement.why_not_cuda.is_some_and(|why| why.contains("--kv f32")));
    assert!(matches!(engine(DeviceChoice::Cuda(9)), Err(Error::NoDevice { .. })));

    let config = checkpoint(NAME).config;
    let check = |change: &dyn Fn(&mut loris::loader::ModelConfig)| {
        let mut config = config.clone();
        change(&mut config);
        let plan = Plan::new(&config, 0, &small()).unwrap();
        cuda::check(&plan, &config).map_err(|e| e.to_string())
    };
    check(&|_| ()).unwrap();
    assert!(check(&|c| c.head_dim = 80).unwrap_err().contains("head_dim 80"));
    assert!(check(&|c| c.hidden_dim = 77).unwrap_err().contains("hidden_dim 77"));
    assert!(check(&|c| c.ffn_dim = 91).unwrap_err().contains("ffn_dim 91"));
    assert!(check(&|c| c.n_q_heads = 17).unwrap_err().contains("17"));
}

#[test]
fn device_memory_counts_tokens_that_wait() {
    let config = checkpoint(NAME).config;
    let bytes = |options| CudaBytes::new(&Plan::new(&config, 0, &options).unwrap(), &config, 0);
    let (dense, lazy) = (bytes(small()), bytes(lazy_options()));
    // 256 that wait in bf16, and in f32 as many on their way and those that a pass writes.
    let (width, n_rows) = (config.hidden_dim, 64);
    let aux = 256 * 2 * width + (256 + n_rows) * 4 * width;
    assert_eq!((dense.aux, lazy.aux), (0, aux as u64));
    assert_eq!(lazy.total() - dense.total(), aux as u64);
}

#[test]
fn memory_that_does_not_suffice_is_named() {
    let Some(twin) = twin() else { return };
    // An earlier thread of the same id may have left something.
    let left = twin.leaks();
    twin.set_memory(1 << 20);
    let large = ModelOptions { kv_tokens: Some(1 << 16), ..small() };
    let engine = Engine::new(&cuda_options()).unwrap();
    let open = |options| engine.open_checkpoint(rounded(NAME, Dtype::BF16), options);
    let error = open(&large).unwrap_err();
    assert!(matches!(error, Error::OutOfDeviceMemory { what: "the KV page pool", .. }), "{error}");
    assert_eq!(twin.leaks(), left);
    twin.set_memory(1 << 30);
    run(&open(&small()).unwrap(), &prompt(1, 3), 1);
}

const CODES: [c_int; 2] = [2, 1]; // out of memory, invalid value

/// Whether an error is one of the device, with its reason, and not something that was made of it.
fn is_of_device(e: &Error) -> bool {
    matches!(e, Error::Device { .. } | Error::OutOfDeviceMemory { .. } | Error::NoDevice { .. })
}

#[test]
fn a_load_that_fails_anywhere_leaves_nothing() {
    let Some(twin) = twin() else { return };
    // An earlier thread of the same id may have left something.
    let left = twin.leaks();
    let open = || {
        let engine = Engine::new(&cuda_options())?;
        engine.open_checkpoint(rounded(NAME, Dtype::BF16), &small())
    };
    let mut opened = None;
    let n_calls = twin.calls_of(|| opened = Some(open().unwrap()));
    drop(opened);
    assert_eq!(twin.leaks(), left);
    let mut unheard = Vec::new();
    for n in 0..n_calls {
        match twin.failing(n, CODES[n as usize % 2], open) {
            Err(e) => assert!(is_of_device(&e), "call {n}: {e:?}"),
            Ok(_) => unheard.push(n),
        }
        assert_eq!(twin.leaks(), left, "call {n}");
    }
    // A context is made current when it is made and again before it is used.
    assert!(unheard.len() <= 1, "calls {unheard:?} of {n_calls} failed and nobody heard");
}

/// Step 0 is a prompt, the others decode. One of them meets a driver call that fails, each call in turn: the
/// step fails as a whole or not at all, and succeeds when it is tried again.
fn fail_in_step(failing: usize, tokens: &[u32], open: &dyn Fn() -> Session) {
    let Some(twin) = twin() else { return };
    let left = twin.leaks();
    let n_steps = 3.min(failing + 2);
    let step = |s: &mut Session, idx: usize| match idx {
        0 => s.prefill(tokens),
        _ => s.decode(best(s)),
    };
    let want: Vec<Vec<u32>> = {
        let mut s = open();
        let step = |idx| {
            step(&mut s, idx).unwrap();
            logits(&s)
        };
        (0..n_steps).map(step).collect()
    };
    let fresh = || {
        let mut s = open();
        (0..failing).for_each(|idx| step(&mut s, idx).unwrap());
        s
    };
    let mut healthy = fresh();
    let n_calls = twin.calls_of(|| step(&mut healthy, failing).unwrap());
    drop(healthy);
    assert_eq!(twin.leaks(), left);
    let mut n_failed = 0;
    for n in 0..n_calls {
        let mut s = fresh();
        let state = |s: &Session| {
            let receipt = s.receipt();
            let held = (receipt.kv_bytes, receipt.n_waiting, receipt.token_layers);
            (s.len(), s.logits().map(bits), s.model().pool_usage().n_used, held)
        };
        let before = state(&s);
        if let Err(e) = twin.failing(n, CODES[n as usize % 2], || step(&mut s, failing)) {
            n_failed += 1;
            assert!(is_of_device(&e), "call {n}: {e:?}");
            assert_eq!(state(&s), before, "call {n}: {e}");
            step(&mut s, failing).unwrap_or_else(|again| panic!("call {n}: {e}; then {again}"));
        }
        for (idx, want) in want.iter().enumerate().skip(failing) {
            assert!(logits(&s) == *want, "call {n}, step {idx}");
            if idx + 1 < n_steps {
                step(&mut s, idx + 1).unwrap();
            }
        }
    }
    assert!(2 * n_failed > n_calls, "{n_failed} of {n_calls} calls");
}

fn fail_in_dense_step(failing: usize) {
    fail_in_step(failing, &prompt(1, 3), &|| session(&model()));
}

#[test]
fn a_prompt_that_fails_anywhere_is_undone() {
    fail_in_dense_step(0);
}

#[test]
fn a_recorded_step_that_fails_anywhere_is_undone() {
    fail_in_dense_step(1);
}

#[test]
fn a_replayed_step_that_fails_anywhere_is_undone() {
    fail_in_dense_step(2);
}

/// A prompt that ends with an eviction meets a driver call that fails, each call in turn: it is undone, or, where slots
/// were about to move, the session is empty.
fn fail_in_eviction(spec: &str) {
    let Some(twin) = twin() else { return };
    let open = || {
        let evict = Some(Evict::parse(spec).unwrap());
        let options = SessionOptions { evict, ..SessionOptions::default() };
        let mut s = model().session(&options).unwrap();
        s.prefill(&prompt(2, 5)).unwrap();
        s
    };
    let step = |s: &mut Session| s.prefill(&prompt(1, 16));
    let state = |s: &Session| {
        let n_used = s.model().pool_usage().n_used;
        (s.tokens().to_vec(), s.logits().map(bits), n_used, s.receipt().kv_bytes)
    };
    let mut s = open();
    let before = state(&s);
    let n_calls = twin.calls_of(|| step(&mut s).unwrap());
    assert_eq!(s.receipt().n_evicted, 5);
    s.decode(7).unwrap();
    let want = logits(&s);
    drop(s);
    let (mut n_undone, mut n_emptied) = (0, 0);
    for n in 0..n_calls {
        let mut s = open();
        if let Err(e) = twin.failing(n, CODES[n as usize % 2], || step(&mut s)) {
            assert!(is_of_device(&e), "call {n}: {e:?}");
            if s.is_empty() {
                assert_eq!(state(&s), (vec![], None, 0, 0), "call {n}: {e}");
                s.prefill(&prompt(2, 5)).unwrap();
                n_emptied += 1;
            } else {
                n_undone += 1;
            }
            assert_eq!(state(&s), before, "call {n}: {e}");
            step(&mut s).unwrap_or_else(|again| panic!("call {n}: {e}; then {again}"));
        }
        s.decode(7).unwrap();
        assert!(logits(&s) == want, "call {n}");
    }
    assert!(n_emptied > 3 && n_undone > 10, "{n_undone} undone, {n_emptied} emptied of {n_calls}");
    assert!(2 * (n_emptied + n_undone) > n_calls, "{n_undone} + {n_emptied} of {n_calls}");
}

#[test]
fn an_eviction_by_attention_that_fails_anywhere_leaves_nothing_mixed() {
    fail_in_eviction("h2o:16,sinks=1");
}

#[test]
fn an_eviction_by_keys_that_fails_anywhere_leaves_nothing_mixed() {
    fail_in_eviction("knorm:16,sinks=1,window=4");
}

/// A step that seals pages: one of a prompt, and one that decodes.
#[test]
fn a_step_that_seals_and_fails_anywhere_is_undone() {
    let open = || session(&open_cuda(rounded(NAME, Dtype::BF16), &sealed("int2")));
    fail_in_step(0, &prompt(1, 60), &open);
    fail_in_step(1, &prompt(1, 52), &open);
}

/// In any of its segments.
fn fail_in_pruned_step(failing: usize) {
    let open = || {
        let model = open_cuda(rounded(NAME, Dtype::BF16), &lazy_options());
        lazy_session(&model, &[(1, 0.5)])
    };
    fail_in_step(failing, &prompt(1, 4), &open);
}

#[test]
fn a_pruned_prompt_that_fails_anywhere_is_undone() {
    fail_in_pruned_step(0);
}

#[test]
fn a_recorded_pruned_step_that_fails_anywhere_is_undone() {
    fail_in_pruned_step(1);
}

#[test]
fn a_replayed_pruned_step_that_fails_anywhere_is_undone() {
    fail_in_pruned_step(2);
}
