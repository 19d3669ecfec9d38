//! Sequences without end: what a stream sees is in `tests/ops.rs`; here, that nothing depends on when its pages
//! go, that its memory is constant, and what it is refused.
#![allow(clippy::unwrap_used)]

mod support;

use std::ops::ControlFlow;

use loris::loader::{Checkpoint, Dtype};
use loris::policy::{Lazy, PrunePoint};
use loris::{Error, KvFormat, Model, ModelOptions, Session, SessionOptions, StreamOptions};
use support::{bits, open_cuda, open_with, options, rounded};

const STREAM: StreamOptions = StreamOptions { sink: 4, window: 60 };

fn checkpoint(name: &str) -> Checkpoint {
    rounded(name, Dtype::BF16)
}

fn open(threads: usize, options: &ModelOptions) -> Model {
    open_with(threads, checkpoint("llama-tied"), options)
}

fn stream_options(stream: StreamOptions) -> SessionOptions {
    SessionOptions { stream: Some(stream), ..SessionOptions::default() }
}

fn session(model: &Model, stream: StreamOptions) -> Session {
    model.session(&stream_options(stream)).unwrap()
}

#[allow(clippy::cast_possible_truncation)]
fn prompt(seed: usize, n: usize) -> Vec<u32> {
    (0..n).map(|i| ((i * 31 + seed * 17 + i * i * (seed + 3)) % 128) as u32).collect()
}

fn logits(session: &Session) -> Vec<u32> {
    bits(session.logits().unwrap())
}

/// Logits after turns of a prompt and some tokens each.
fn run(s: &mut Session, turns: &[(usize, usize)]) -> Vec<Vec<u32>> {
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

#[test]
fn a_stream_that_is_not_full_is_a_sequence_as_any() {
    for kv in KvFormat::ALL.into_iter().filter(|kv| !kv.is_sealed()) {
        let model = open(2, &ModelOptions { kv: kv.into(), page_len: 16, ..options(1_024) });
        let turns = [(40, 10), (10, 4)];
        let want = run(&mut model.session(&SessionOptions::default()).unwrap(), &turns);
        let mut s = session(&model, STREAM);
        assert!(run(&mut s, &turns) == want, "{kv}");
        assert_eq!(s.n_gone(), 0);
        // One more sees no longer everything.
        let mut dense = model.session(&SessionOptions::default()).unwrap();
        run(&mut dense, &turns);
        for s in [&mut s, &mut dense] {
            s.decode(5).unwrap();
        }
        assert!(logits(&s) != logits(&dense), "{kv}");
    }
}

#[test]
fn as_many_sinks_as_there_may_be() {
    let stream = StreamOptions { sink: 64, window: 40 };
    let run_at = |page_len, chunk| {
        let model = open(2, &ModelOptions { page_len, chunk, ..options(2_048) });
        run(&mut session(&model, stream), &[(150, 9), (60, 3)])
    };
    assert!(run_at(64, 512) == run_at(256, 11));
}

#[test]
fn bits_do_not_depend_on_when_pages_go() {
    let turns = [(300, 90), (1, 3), (170, 140)];
    for kv in KvFormat::ALL.into_iter().filter(|kv| !kv.is_sealed()) {
        let options = ModelOptions { kv: kv.into(), ..options(2_048) };
        let want = run(&mut session(&open(2, &options), STREAM), &turns);
        for (chunk, page_len, threads) in
            [(1, 16, 2), (7, 16, 1), (64, 64, 3), (100, 32, 2), (33, 128, 2), (512, 16, 2)]
        {
            let model = open(threads, &ModelOptions { chunk, page_len, ..options.clone() });
            let mut s = session(&model, STREAM);
            let got = run(&mut s, &turns);
            assert!(got == want, "{kv}: chunk {chunk}, page {page_len}, {threads} threads");
            assert_eq!(s.len(), 704);
            assert!(s.n_gone() > 704 - 64 - 2 * page_len.max(16), "{}", s.n_gone());
            assert_eq!(s.tokens().len(), s.len() - s.n_gone());
        }
    }
}

/// A hundred thousand tokens hold no more than the first thousand did.
#[test]
fn memory_is_constant() {
    for kv in [KvFormat::Bf16, KvFormat::Int4] {
        let model =
            open(2, &ModelOptions { kv: kv.into(), page_len: 16, chunk: 256, ..options(600) });
        let mut s = session(&model, STREAM);
        s.prefill(&prompt(1, 1_000)).unwrap();
        let (held, peak) = (s.receipt().kv_bytes, model.pool_usage().n_peak);
        for turn in 0..10 {
            s.prefill(&prompt(turn, 9_990)).unwrap();
            for token in 0..10 {
                s.decode(token).unwrap();
            }
            assert!(s.receipt().kv_bytes <= held + 2 * 2 * model.plan().layout.bytes());
            assert!(s.tokens().len() <= 64 + 2 * 16, "{} tokens", s.tokens().len());
        }
        assert_eq!(s.len(), 101_000);
        // What a call began with stays until it is done.
        let window = model.plan().kv_bytes_of(64 + 16) / model.plan().layout.bytes();
        assert!(model.pool_usage().n_peak <= peak + window + 4, "{kv}");
        drop(s);
        assert_eq!(model.pool_usage().n_used, 0);
    }
}

#[test]
fn a_call_that_is_stopped_changes_nothing() {
    let model = open(2, &ModelOptions { page_len: 16, chunk: 32, ..options(1_024) });
    for n_before in [0, 5, 40, 64, 65, 100, 333] {
        let before = |s: &mut Session| {
            if n_before > 0 {
                s.prefill(&prompt(3, n_before)).unwrap();
                s.decode(9).unwrap();
            }
        };
        let mut whole = session(&model, STREAM);
        before(&mut whole);
        whole.prefill(&prompt(4, 400)).unwrap();
        for n_chunks in 1..13 {
            let mut s = session(&model, STREAM);
            before(&mut s);
            let left = |s: &Session| {
                let bytes = s.receipt().kv_bytes;
                (s.tokens().to_vec(), s.n_gone(), bytes, s.logits().map(bits))
            };
            let was = left(&s);
            let mut n = 0;
            let stopped = s.prefill_with(&prompt(4, 400), &mut |_, _| {
                n += 1;
                if n == n_chunks { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            });
            assert!(matches!(stopped, Err(Error::Cancelled)), "{n_before} + {n_chunks} chunks");
            assert!(left(&s) == was, "{n_before} + {n_chunks} chunks");
            s.prefill(&prompt(4, 400)).unwrap();
            assert!(logits(&s) == logits(&whole), "{n_before} + {n_chunks} chunks");
        }
    }
    assert_eq!(model.pool_usage().n_used, 0);
}

#[test]
fn forks_and_truncations() {
    let model = open(2, &ModelOptions { page_len: 16, chunk: 50, ..options(2_048) });
    let mut s = session(&model, STREAM);
    run(&mut s, &[(200, 30)]);
    let mut fork = s.fork().unwrap();
    let (a, b) = (run(&mut s, &[(100, 50)]), run(&mut fork, &[(100, 50)]));
    assert!(a == b, "a fork goes on as the stream does");

    // Back by a little: as if the tokens had never been.
    let mut short = session(&model, STREAM);
    run(&mut short, &[(196, 0)]);
    let mut long = session(&model, STREAM);
    run(&mut long, &[(196, 4)]);
    long.truncate(196);
    assert_eq!((long.len(), long.logits()), (196, None));
    for s in [&mut short, &mut long] {
        s.decode(7).unwrap();
    }
    assert!(logits(&short) == logits(&long));

    // Back to where what it saw is gone: all is.
    long.truncate(100);
    assert_eq!((long.len(), long.n_gone(), long.receipt().kv_bytes), (0, 0, 0));
    assert!(run(&mut long, &[(90, 5)]) == run(&mut session(&model, STREAM), &[(90, 5)]));
}

#[test]
fn the_beginning_is_shared() {
    let model = open(2, &ModelOptions { page_len: 16, ..options(2_048) });
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
    let alone = open(2, &options(2_048));
    let mut s = session(&alone, STREAM);
    s.prefill(&long).unwrap();
    assert!(logits(&s) == logits(&first));
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

    let coded = open(2, &ModelOptions { kv: KvFormat::Int8.into(), ..options(1_024) });
    let error = coded.session(&with(5, 60)).unwrap_err().to_string();
    assert!(error.contains("at most 4"), "{error}");
    let small = open(2, &options(256));
    assert!(matches!(small.session(&with(4, 60)), Err(Error::KvFull { .. })));
    for (name, what) in [("llama-dynamic", "dynamic"), ("mistral-window", "own window")] {
        let model = open_with(1, checkpoint(name), &options(1_024));
        let error = model.session(&with(4, 50)).unwrap_err().to_string();
        assert!(error.contains(what), "{error}");
    }
    let on_cuda = open_cuda(checkpoint("llama-tied"), &options(1_024));
    let error = on_cuda.session(&with(4, 60)).unwrap_err().to_string();
    assert!(error.contains("CUDA"), "{error}");

    let mut dense = model.session(&SessionOptions::default()).unwrap();
    dense.prefill(&prompt(1, 10)).unwrap();
    let mut blob = Vec::new();
    dense.save(&mut blob).unwrap();
    let error = model.restore(&mut &*blob, &with(4, 60)).unwrap_err().to_string();
    assert!(error.contains("stream"), "{error}");
}
