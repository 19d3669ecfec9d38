//! Sequences without end: what a stream sees is in `tests/ops.rs`; here, that nothing depends on when its pages
//! go, that its memory and its time are constant, and what it is refused. Most bodies run on the CPU and on CUDA, which is
//! the twin, or with `LORIS_TEST_DRIVER=cuda` a GPU.
#![allow(clippy::unwrap_used)]

mod support;

use std::ops::ControlFlow;

use loris::compute::{Lazy, PrunePoint};
use loris::loader::{Checkpoint, Dtype};
use loris::store::Sides;
use loris::{
    Error, KvFormat, KvFormats, Model, ModelOptions, Progress, Session, SessionOptions,
    StreamOptions,
};
use support::{bits, logits, open_cpu, open_cuda, open_with, options, prompt, rounded, run_turns};

const STREAM: StreamOptions = StreamOptions { sink: 4, window: 60 };

fn checkpoint(name: &str) -> Checkpoint {
    rounded(name, Dtype::BF16)
}

fn open(threads: usize, options: &ModelOptions) -> Model {
    open_with(threads, checkpoint("llama-tied"), options)
}

/// Where streams run.
struct Place {
    open: fn(usize, &ModelOptions) -> Model,
    formats: Vec<KvFormats>,
    /// It is slow: short runs have to do.
    is_slow: bool,
}

fn cpu() -> Place {
    let formats = KvFormat::ALL.into_iter().filter(|kv| !Sides::from(*kv).are_sealed());
    Place { open, formats: formats.map(KvFormats::from).collect(), is_slow: false }
}

fn cuda() -> Place {
    let formats = ["bf16", "fp8", "int8", "int4", "int4-plain", "int8:int4", "bf16:int4"];
    Place {
        open: |_, options| open_cuda(checkpoint("llama-tied"), options),
        formats: formats.map(|kv| kv.parse().unwrap()).into(),
        is_slow: std::env::var_os("LORIS_TEST_DRIVER").is_none(),
    }
}

/// A test of each place.
macro_rules! everywhere {
    ($($name:ident),* $(,)?) => {
        mod on_the_cpu {
            $(#[test]
            fn $name() {
                super::$name(&super::cpu());
            })*
        }
        mod on_cuda {
            $(#[test]
            fn $name() {
                super::$name(&super::cuda());
            })*
        }
    };
}

everywhere! {
    a_stream_that_is_not_full_is_a_sequence_as_any,
    as_many_sinks_as_there_may_be,
    bits_do_not_depend_on_when_pages_go,
    memory_is_constant,
    a_call_that_is_stopped_changes_nothing,
    a_fork_goes_on_as_the_stream_does,
    truncation_goes_back_as_far_as_the_window_is_there,
    the_beginning_is_shared,
    company_changes_nothing,
}

fn stream_options(stream: StreamOptions) -> SessionOptions {
    SessionOptions { stream: Some(stream), ..SessionOptions::default() }
}

fn session(model: &Model, stream: StreamOptions) -> Session {
    model.session(&stream_options(stream)).unwrap()
}

fn a_stream_that_is_not_full_is_a_sequence_as_any(place: &Place) {
    for &kv in &place.formats {
        let model = (place.open)(2, &ModelOptions { kv, page_len: 16, ..options(1_024) });
        let turns = [(40, 10), (10, 4)];
        let want = run_turns(&mut model.session(&SessionOptions::default()).unwrap(), &turns);
        let mut s = session(&model, STREAM);
        assert!(run_turns(&mut s, &turns) == want, "{kv}");
        assert_eq!(s.n_gone(), 0);
        // One more sees no longer everything.
        let mut dense = model.session(&SessionOptions::default()).unwrap();
        run_turns(&mut dense, &turns);
        for s in [&mut s, &mut dense] {
            s.decode(5).unwrap();
        }
        assert!(logits(&s) != logits(&dense), "{kv}");
    }
}

fn as_many_sinks_as_there_may_be(place: &Place) {
    for sink in [0, 1, 64] {
        let stream = StreamOptions { sink, window: 40 };
        let run_at = |page_len, chunk| {
            let model = (place.open)(2, &ModelOptions { page_len, chunk, ..options(2_048) });
            run_turns(&mut session(&model, stream), &[(150, 9), (60, 3)])
        };
        assert!(run_at(64, 512) == run_at(256, 11), "{sink} sinks");
    }
}

fn bits_do_not_depend_on_when_pages_go(place: &Place) {
    let turns = match place.is_slow {
        true => [(150, 50), (1, 3), (70, 30)],
        false => [(300, 90), (1, 3), (170, 140)],
    };
    let len: usize = turns.iter().map(|(n, n_decoded)| n + n_decoded).sum();
    let mut sizes = vec![(7, 16, 1), (64, 64, 3), (512, 32, 2)];
    if !place.is_slow {
        sizes.extend([(1, 16, 2), (100, 32, 2), (33, 128, 2), (512, 16, 2)]);
    }
    for &kv in &place.formats {
        let options = ModelOptions { kv, ..options(2_048) };
        let want = run_turns(&mut session(&(place.open)(2, &options), STREAM), &turns);
        for &(chunk, page_len, threads) in &sizes {
            let options = ModelOptions { chunk, page_len, ..options.clone() };
            let model = (place.open)(threads, &options);
            let mut s = session(&model, STREAM);
            let got = run_turns(&mut s, &turns);
            assert!(got == want, "{kv}: chunk {chunk}, page {page_len}, {threads} threads");
            assert_eq!(s.len(), len);
            assert!(s.n_gone() > len - 64 - 2 * page_len.max(16), "{}", s.n_gone());
            assert_eq!(s.tokens().len(), s.len() - s.n_gone());
        }
    }
}

/// A hundred thousand tokens hold no more than the first thousand did.
fn memory_is_constant(place: &Place) {
    let (first, n_turns, turn_len) = if place.is_slow { (300, 3, 390) } else { (1_000, 10, 9_990) };
    for kv in [KvFormat::BF16, KvFormat::INT4] {
        let options = ModelOptions { kv: kv.into(), page_len: 16, chunk: 256, ..options(600) };
        let model = (place.open)(2, &options);
        let mut s = session(&model, STREAM);
        s.prefill(&prompt(1, first)).unwrap();
        let (held, peak) = (s.receipt().kv_bytes, model.pool_usage().n_peak);
        for turn in 0..n_turns {
            s.prefill(&prompt(turn, turn_len)).unwrap();
            for token in 0..10 {
                s.decode(token).unwrap();
            }
            assert!(s.receipt().kv_bytes <= held + 2 * 2 * model.plan().layout.bytes());
            assert!(s.tokens().len() <= 64 + 2 * 16, "{} tokens", s.tokens().len());
        }
        assert_eq!(s.len(), first + n_turns * (turn_len + 10));
        // What a call began with stays until it is done.
        let window = model.plan().kv_bytes_of(64 + 16) / model.plan().layout.bytes();
        assert!(model.pool_usage().n_peak <= peak + window + 4, "{kv}");
        drop(s);
        assert_eq!(model.pool_usage().n_used, 0);
    }
}

fn a_call_that_is_stopped_changes_nothing(place: &Place) {
    let model = (place.open)(2, &ModelOptions { page_len: 16, chunk: 32, ..options(1_024) });
    let (befores, n_new, stops) = match place.is_slow {
        true => (vec![0, 65, 130], 150, 1..3),
        false => (vec![0, 5, 40, 64, 65, 100, 333], 400, 1..13),
    };
    for n_before in befores {
        let before = |s: &mut Session| {
            if n_before > 0 {
                s.prefill(&prompt(3, n_before)).unwrap();
                s.decode(9).unwrap();
            }
        };
        let mut whole = session(&model, STREAM);
        before(&mut whole);
        whole.prefill(&prompt(4, n_new)).unwrap();
        for n_chunks in stops.clone() {
            let mut s = session(&model, STREAM);
            before(&mut s);
            let left = |s: &Session| {
                let bytes = s.receipt().kv_bytes;
                (s.tokens().to_vec(), s.n_gone(), bytes, s.logits().map(bits))
            };
            let was = left(&s);
            let mut n = 0;
            let stopped = s.prefill_with(&prompt(4, n_new), &mut |_, _| {
                n += 1;
                if n == n_chunks { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            });
            assert!(matches!(stopped, Err(Error::Cancelled)), "{n_before} + {n_chunks} chunks");
            assert!(left(&s) == was, "{n_before} + {n_chunks} chunks");
            s.prefill(&prompt(4, n_new)).unwrap();
            assert!(logits(&s) == logits(&whole), "{n_before} + {n_chunks} chunks");
        }
    }
    assert_eq!(model.pool_usage().n_used, 0);
}

fn a_fork_goes_on_as_the_stream_does(place: &Place) {
    let model = (place.open)(2, &ModelOptions { page_len: 16, chunk: 50, ..options(2_048) });
    let mut s = session(&model, STREAM);
    run_turns(&mut s, &[(200, 30)]);
    let mut fork = s.fork().unwrap();
    let turns = if place.is_slow { [(50, 10)] } else { [(100, 50)] };
    let (a, b) = (run_turns(&mut s, &turns), run_turns(&mut fork, &turns));
    assert!(a == b);
}

/// Back by as much as leaves all that the next tokens see, a stream is as if the tokens had never been; further back it is
/// refused and is what it was.
fn truncation_goes_back_as_far_as_the_window_is_there(place: &Place) {
    let formats = if place.is_slow { &place.formats[..2] } else { &place.formats[..] };
    for &kv in formats {
        let options = ModelOptions { kv, page_len: 16, chunk: 50, ..options(2_048) };
        let model = (place.open)(2, &options);
        let (n, window) = (if place.is_slow { 130 } else { 230 }, STREAM.window);
        let mut whole = session(&model, STREAM);
        whole.prefill(&prompt(5, n)).unwrap();
        let least = whole.least_len();
        let first_held = model.plan().layout.n_slots(1) + whole.n_gone();
        assert_eq!(least, first_held + window - 1);
        assert!((n - 16..n).contains(&least), "{kv}: {least}");
        let step = if place.is_slow { 7 } else { 1 };
        for len in (least..=n).step_by(step) {
            let mut cut = whole.fork().unwrap();
            cut.truncate(len).unwrap();
            assert_eq!((cut.len(), cut.logits().is_some()), (len, len == n));
            let mut short = session(&model, STREAM);
            short.prefill(&prompt(5, len)).unwrap();
            for s in [&mut short, &mut cut] {
                s.decode(7).unwrap();
            }
            assert!(logits(&short) == logits(&cut), "{kv}: cut to {len}");
            assert!(
                run_turns(&mut short, &[(20, 2)]) == run_turns(&mut cut, &[(20, 2)]),
                "{kv}: cut to {len}"
            );
        }
        let left = |s: &Session| {
            let bytes = s.receipt().kv_bytes;
            (s.tokens().to_vec(), s.len(), s.n_gone(), bytes, s.logits().map(bits))
        };
        for len in [1, 4, 64, least - 1] {
            let was = left(&whole);
            let error = whole.truncate(len).unwrap_err();
            assert!(matches!(error, Error::State { call: "truncate", .. }), "{error}");
            assert!(error.to_string().contains(&least.to_string()), "{error}");
            assert!(left(&whole) == was, "{kv}: {len}");
        }

        // With a prompt on its way, which is dropped if the session is cut and else stays.
        let (on_its_way, steps) = (prompt(6, 150), if place.is_slow { 1..2 } else { 0..3 });
        for n_steps in steps {
            let mut s = whole.fork().unwrap();
            s.feed(&on_its_way).unwrap();
            for _ in 0..n_steps {
                model.step(&mut [&mut s]).remove(0).unwrap();
            }
            let (was, least) = (left(&s), s.least_len());
            assert!(s.truncate(least - 1).is_err() && left(&s) == was, "{kv}");
            assert!(
                matches!(s.push(1), Err(Error::State { .. })),
                "{kv}: the prompt is still queued"
            );
            s.truncate(least).unwrap();
            assert_eq!((s.len(), s.least_len()), (least, least), "{kv}");
            let mut short = session(&model, STREAM);
            short.prefill(&[&prompt(5, n)[..], &on_its_way].concat()[..least]).unwrap();
            assert!(
                run_turns(&mut short, &[(20, 2)]) == run_turns(&mut s, &[(20, 2)]),
                "{kv}: {n_steps} steps"
            );
        }

        whole.truncate(0).unwrap();
        assert_eq!(left(&whole), (vec![], 0, 0, 0, None));
        assert!(
            run_turns(&mut whole, &[(90, 5)])
                == run_turns(&mut session(&model, STREAM), &[(90, 5)])
        );
    }
}

fn the_beginning_is_shared(place: &Place) {
    let model = (place.open)(2, &ModelOptions { page_len: 16, ..options(2_048) });
    let long = prompt(8, 150);
    let mut dense = model.session(&SessionOptions::default()).unwrap();
    dense.prefill(&long).unwrap();
    let mut first = session(&model, STREAM);
    first.prefill(&long).unwrap();
    assert_eq!(first.receipt().n_shared, 64, "what a stream sees as a dense session does");
    drop(dense);
    let mut second = session(&model, STREAM);
    second.prefill(&long).unwrap();
    assert!(logits(&first) == logits(&second));
    let alone = (place.open)(2, &options(2_048));
    let mut s = session(&alone, STREAM);
    s.prefill(&long).unwrap();
    assert!(logits(&s) == logits(&first));
}

/// A stream's bits are its own beside others, that see all or other windows, and theirs are as without it.
fn company_changes_nothing(place: &Place) {
    let streams = [
        Some(STREAM),
        None,
        Some(StreamOptions { sink: 0, window: 20 }),
        Some(StreamOptions { sink: 2, window: 33 }),
    ];
    let lens = [110, 70, 90, 30];
    let open = || (place.open)(2, &ModelOptions { page_len: 16, chunk: 64, ..options(2_048) });
    let start = |model: &Model, idx: usize| {
        let options = SessionOptions { stream: streams[idx], ..SessionOptions::default() };
        model.session(&options).unwrap()
    };
    let model = open();
    let alone: Vec<_> =
        (0..4).map(|idx| run_turns(&mut start(&model, idx), &[(lens[idx], 20)])).collect();
    let model = open();
    let mut sessions: Vec<_> = (0..4).map(|idx| start(&model, idx)).collect();
    for (s, n) in sessions.iter_mut().zip(lens) {
        s.feed(&prompt(n, n)).unwrap();
    }
    let mut seen = vec![Vec::new(); 4];
    while seen.iter().any(|seen| seen.len() < 21) {
        let mut refs: Vec<&mut Session> = sessions.iter_mut().collect();
        let results = model.step(&mut refs);
        for ((s, seen), result) in sessions.iter_mut().zip(&mut seen).zip(results) {
            if result.unwrap() == Progress::Ready {
                seen.push(logits(s));
                if seen.len() < 21 {
                    s.push((seen.len() as u32 - 1) % 128).unwrap();
                }
            }
        }
    }
    for (idx, (seen, alone)) in seen.iter().zip(&alone).enumerate() {
        assert!(seen == alone, "session {idx}");
    }
}

/// What a stream holds is the same bytes everywhere, and goes on near enough on another device: codes fall to another
/// side there, which costs no more than coding does (`fixtures.rs`).
#[test]
fn a_saved_stream_goes_on_on_another_device() {
    let saved = |s: &Session| {
        let mut blob = Vec::new();
        s.save(&mut blob).unwrap();
        blob
    };
    let distance = |a: &[f32], b: &[f32]| {
        let pairs = a.iter().zip(b);
        let (d, n) = pairs.fold((0.0, 0.0), |(d, n), (a, b)| (d + (a - b).powi(2), n + a * a));
        (d / n).sqrt()
    };
    let as_it_was = SessionOptions::default();
    let mut exact = Vec::new(); // what the CPU gives without codes
    for kv in ["bf16", "int8", "int4"] {
        let options = ModelOptions { kv: kv.parse().unwrap(), page_len: 16, ..options(1_024) };
        let on_cpu = open_cpu(checkpoint("llama-tied"), &options);
        let on_cuda = open_cuda(checkpoint("llama-tied"), &options);
        for (from, to) in [(&on_cpu, &on_cuda), (&on_cuda, &on_cpu)] {
            let mut first = session(from, STREAM);
            first.prefill(&prompt(1, 137)).unwrap();
            assert!(first.n_gone() > 0);
            let blob = saved(&first);
            let mut moved = to.restore(&mut &*blob, &as_it_was).unwrap();
            let mut back = from.restore(&mut &*blob, &as_it_was).unwrap();
            assert!(saved(&moved) == blob, "{kv}: the bytes are the same wherever they are");
            let mut seen = [vec![], vec![]];
            for token in 0..20 {
                for s in [&mut first, &mut moved, &mut back] {
                    s.decode(token).unwrap();
                }
                assert!(logits(&back) == logits(&first), "{kv}");
                for (seen, s) in seen.iter_mut().zip([&first, &moved]) {
                    seen.extend_from_slice(s.logits().unwrap());
                }
            }
            if exact.is_empty() {
                exact.clone_from(&seen[0]);
            }
            let (d, cost) = (distance(&seen[0], &seen[1]), distance(&exact, &seen[0]));
            assert!(d <= 2e-2 + cost, "{kv}: {d:e}, and coding costs {cost:e}");
        }
    }
}

/// Once its pages come and go, a step of a stream is one that was recorded: there are no more kinds of them however long it
/// goes on.
#[test]
fn steps_are_replayed_however_long_a_stream_is() {
    let model = open_cuda(checkpoint("llama-tied"), &ModelOptions { page_len: 16, ..options(900) });
    let mut s = session(&model, STREAM);
    s.prefill(&prompt(1, 60)).unwrap();
    let mut launched = Vec::new();
    for len in 60..760 {
        let before = s.receipt().n_replayed;
        s.decode(len % 128).unwrap();
        if s.receipt().n_replayed == before {
            launched.push(len);
        }
    }
    assert_eq!(s.n_gone(), 672);
    // One split, two, with as much as may be gone before splits are left out four, and two again, as there was more
    // memory to be taken for four.
    assert_eq!(launched.len(), 4, "{launched:?}");
}

#[test]
fn what_does_not_go_together_is_refused_by_name() {
    let model = open(2, &ModelOptions { aux_tokens: 64, ..options(1_024) });
    let refusal = |options: SessionOptions| match model.session(&options) {
        Err(Error::Option { name, .. }) => name,
        other => panic!("{:?}", other.map(|_| ())),
    };
    let with = |sink, window| stream_options(StreamOptions { sink, window });
    assert_eq!(refusal(with(4, 0)), "window");
    assert_eq!(refusal(with(4, 253)), "window");
    assert_eq!(refusal(with(0, usize::MAX)), "window");
    assert_eq!(refusal(with(65, 10)), "sink");
    assert_eq!(refusal(with(usize::MAX, 1)), "sink");
    assert_eq!(refusal(SessionOptions { ctx_len: Some(64), ..with(4, 60) }), "ctx");
    let lazy = Lazy::new(vec![PrunePoint { layer: 1, keep_rate: 0.5 }]);
    assert_eq!(refusal(SessionOptions { lazy: Some(lazy), ..with(4, 60) }), "lazy");
    assert!(model.session(&with(4, 252)).is_ok());

    let long_pages = open(2, &ModelOptions { page_len: 256, ..options(2_048) });
    assert!(long_pages.session(&with(64, 60)).is_ok());
    let error = long_pages.session(&with(65, 60)).unwrap_err().to_string();
    assert!(error.contains("at most 64"), "{error}");

    let coded = open(2, &ModelOptions { kv: KvFormat::INT8.into(), ..options(1_024) });
    let error = coded.session(&with(5, 60)).unwrap_err().to_string();
    assert!(error.contains("at most 4"), "{error}");
    let small = open(2, &options(256));
    assert!(matches!(small.session(&with(4, 60)), Err(Error::KvFull { .. })));
    for (name, what) in [("llama-dynamic", "dynamic"), ("mistral-window", "own window")] {
        let model = open_with(1, checkpoint(name), &options(1_024));
        let error = model.session(&with(4, 50)).unwrap_err().to_string();
        assert!(error.contains(what), "{error}");
    }
    let mut dense = model.session(&SessionOptions::default()).unwrap();
    dense.prefill(&prompt(1, 10)).unwrap();
    let mut blob = Vec::new();
    dense.save(&mut blob).unwrap();
    let error = model.restore(&mut &*blob, &with(4, 60)).unwrap_err().to_string();
    assert!(error.contains("stream"), "{error}");
}
