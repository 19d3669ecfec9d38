//! KV formats of less than 16 bits in sessions: what they take, and that nothing about a session depends on
//! how its tokens came. What the codes are is in `tests/ops.rs`, what they cost in quality `loris eval` measures.
#![allow(clippy::unwrap_used)]

mod support;

use std::ops::ControlFlow;

use loris::compute::{Lazy, PrunePoint};
use loris::keep::Evict;
use loris::loader::{Checkpoint, Dtype};
use loris::store::{FORMATS, Format, Sides};
use loris::{
    Error, KvFormat, KvFormats, Model, ModelOptions, Session, SessionOptions, StreamOptions,
};
use support::{bits, cuda_options, deep, open_with, options, prompt, rounded, session};

const N_TOKENS: usize = 300;

fn coded() -> Vec<KvFormats> {
    let mut formats: Vec<KvFormats> = KvFormat::ALL.map(KvFormats::from).into();
    formats.retain(|formats| formats.k.row().k.coding.is_coded());
    formats.extend(
        ["int8:int4", "bf16:fp8", "int4:bf16"].map(|text| text.parse::<KvFormats>().unwrap()),
    );
    formats
}

/// A small model that can hold some thousand tokens.
fn checkpoint(n_layers: usize) -> Checkpoint {
    let mut checkpoint = deep(rounded("llama-tied", Dtype::BF16), n_layers);
    checkpoint.config.ctx_len = 8_192;
    checkpoint
}

fn open(n_layers: usize, threads: usize, options: &ModelOptions) -> Model {
    open_with(threads, checkpoint(n_layers), options)
}

/// Logits after a prompt and after some tokens more.
fn run(s: &mut Session, prompt: &[u32]) -> Vec<Vec<u32>> {
    s.prefill(prompt).unwrap();
    let mut out = vec![bits(s.logits().unwrap())];
    for token in 0..5 {
        s.decode(token * 9).unwrap();
        out.push(bits(s.logits().unwrap()));
    }
    out
}

#[test]
fn token_by_token_is_as_in_chunks() {
    for kv in coded() {
        let options = ModelOptions { kv, page_len: 32, ..options(1_024) };
        let want = run(&mut session(&open(2, 2, &options)), &prompt(1, N_TOKENS));
        for (chunk, page_len, threads) in
            [(1, 64, 2), (5, 16, 1), (64, 64, 3), (100, 256, 2), (3, 32, 2)]
        {
            // What is sealed, and when, is a matter of pages.
            let page_len = if kv.are_sealed() { options.page_len } else { page_len };
            let model = open(2, threads, &ModelOptions { chunk, page_len, ..options.clone() });
            let got = run(&mut session(&model), &prompt(1, N_TOKENS));
            assert!(got == want, "{kv}: chunk {chunk}, page {page_len}, {threads} threads");
        }
    }
}

#[test]
fn lengths_around_the_first_pages() {
    for kv in coded() {
        let model = open(2, 2, &ModelOptions { kv, page_len: 16, ..options(1_024) });
        let long = prompt(2, 90);
        let mut whole = session(&model);
        let mut want = Vec::new();
        whole.logits_of(&long, &mut |_, logits| want.push(bits(logits))).unwrap();
        // From 52 on there is a page to seal, and from 68 on two.
        for n in [1, 3, 4, 5, 19, 20, 21, 36, 37, 51, 52, 53, 54, 67, 68, 69, 70, 85] {
            let mut s = session(&model);
            s.prefill(&long[..n]).unwrap();
            assert!(bits(s.logits().unwrap()) == want[n - 1], "{kv}: {n} tokens");
            assert_eq!(s.receipt().kv_bytes, model.plan().kv_bytes_of(n));
            // And back again: what is forgotten leaves no trace.
            s.truncate(n - 1).unwrap();
            s.prefill(&long[n - 1..n + 2]).unwrap();
            assert!(bits(s.logits().unwrap()) == want[n + 1], "{kv}: {n} tokens, one again");
        }
        drop(whole);
        assert_eq!(model.pool_usage().n_used, 0);
    }
}

#[test]
fn prefixes_and_forks_share_pages() {
    for kv in coded() {
        let model = open(2, 2, &ModelOptions { kv, page_len: 16, ..options(2_048) });
        let long = prompt(3, 90);
        let want = run(&mut session(&model), &long);
        let mut first = session(&model);
        first.prefill(&long).unwrap();
        let mut second = session(&model);
        let got = run(&mut second, &long);
        assert!(got == want, "{kv}: shared");
        // The sinks, five pages of 16, and the rest of the prompt on its own.
        let n_shared = if kv.are_sealed() { 0 } else { 4 + 5 * 16 };
        assert_eq!(second.receipt().n_shared, n_shared, "{kv}");
        let mut fork = first.fork().unwrap();
        for s in [&mut first, &mut fork] {
            s.decode(0).unwrap();
            assert!(bits(s.logits().unwrap()) == want[1], "{kv}: a fork");
        }
        drop((first, second, fork));
        assert_eq!(model.pool_usage().n_used, 0);
    }
}

/// Bytes of 8,192 tokens beside those of 16 bits, as the allocator has them.
#[test]
fn a_cache_of_fewer_bits_holds_more() {
    let bytes = |kv: KvFormats| {
        let model = open(2, 2, &ModelOptions { kv, ..options(8_192) });
        let mut s = session(&model);
        s.prefill(&prompt(4, 8_192)).unwrap();
        let used = model.pool_usage().n_used * model.plan().layout.bytes();
        assert_eq!(s.receipt().kv_bytes, used, "{kv}");
        used as f64
    };
    let wide = bytes(KvFormat::BF16.into());
    for (kv, least) in [
        ("fp8", 1.9),
        ("int8", 1.9),
        ("int4", 3.4),
        ("int4-channel", 3.25),
        ("int8:int4", 2.45),
        ("int2", 5.0),
    ] {
        let held = wide / bytes(kv.parse().unwrap());
        assert!(held >= least, "{kv}: {held}");
    }
}

#[test]
fn pruning_goes_with_every_format() {
    let lazy =
        |keep_rate| Lazy { min_len: 1, ..Lazy::new(vec![PrunePoint { layer: 2, keep_rate }]) };
    for kv in coded() {
        let options = ModelOptions { kv, aux_tokens: 512, page_len: 16, ..options(1_024) };
        let open_lazy = |options: &ModelOptions, keep_rate| {
            let model = open(4, 2, options);
            let options =
                SessionOptions { lazy: Some(lazy(keep_rate)), ..SessionOptions::default() };
            let mut s = model.session(&options).unwrap();
            let out = run(&mut s, &prompt(5, N_TOKENS));
            (out, s.receipt().kv_bytes)
        };
        let dense = run(&mut session(&open(4, 2, &options)), &prompt(5, N_TOKENS));
        let (all, all_bytes) = open_lazy(&options, 1.0);
        assert!(all == dense, "{kv}: keeping all is dense");
        let (some, some_bytes) = open_lazy(&options, 0.3);
        // Of a short prompt much is not sealed yet.
        let most = if kv.are_sealed() { 8 } else { 7 };
        assert!(some != dense && some_bytes * 10 < all_bytes * most, "{kv}: {some_bytes} bytes");
        let page_len = if kv.are_sealed() { options.page_len } else { 64 };
        let (other, _) = open_lazy(&ModelOptions { chunk: 7, page_len, ..options }, 0.3);
        assert!(other == some, "{kv}: chunks and pages");
    }
}

/// Formats whose pages are sealed.
fn sealed() -> impl Iterator<Item = KvFormats> {
    ["int4-channel", "int2", "int2:int8", "bf16:int2"].into_iter().map(|text| text.parse().unwrap())
}

/// Wherever a call ends that is taken back, pages that it sealed are as they were.
#[test]
fn what_is_taken_back_is_not_sealed() {
    for (kv, n) in sealed().flat_map(|kv| [10, 60, 70, 84, 100].map(|n| (kv, n))) {
        let sizes = ModelOptions { kv, page_len: 16, aux_tokens: 512, chunk: 16, ..options(512) };
        let model = open(4, 2, &sizes);
        let lazy = Lazy { min_len: 1, ..Lazy::new(vec![PrunePoint { layer: 2, keep_rate: 0.5 }]) };
        for lazy in [None, Some(lazy)] {
            let options = SessionOptions { lazy, ..SessionOptions::default() };
            let mut s = model.session(&options).unwrap();
            s.prefill(&prompt(1, n)).unwrap();
            let mut fork = s.fork().unwrap();
            let want = run(&mut fork, &prompt(2, 90));
            drop(fork);
            let held = (s.receipt().kv_bytes, model.pool_usage().n_used);
            let mut n_stopped = 0;
            for stop_after in 0.. {
                let mut left = stop_after;
                let stopped = s.prefill_with(&prompt(2, 90), &mut |_, _| {
                    left -= 1;
                    if left < 0 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
                });
                if stopped.is_ok() {
                    break;
                }
                n_stopped += 1;
                assert_eq!((s.receipt().kv_bytes, model.pool_usage().n_used), held, "{kv} {n}");
                assert_eq!(s.len(), n);
            }
            assert!(n_stopped > 4, "{n_stopped}");
            s.truncate(n).unwrap();
            let mut again = model.session(&options).unwrap();
            again.prefill(&prompt(1, n)).unwrap();
            let stopped = again.prefill_with(&prompt(2, 90), &mut |done, _| {
                if done > 30 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            });
            assert!(matches!(stopped, Err(Error::Cancelled)));
            assert!(run(&mut again, &prompt(2, 90)) == want, "{kv}: {n} tokens, taken back");
            drop((s, again));
            assert_eq!((model.pool_usage().n_used, model.pool_usage().n_aux_used), (0, 0));
        }
    }
}

/// A pool for so many tokens holds them, in calls and chunks of any length.
#[test]
fn a_pool_holds_what_it_was_made_for() {
    for (kv, n_tokens) in sealed().flat_map(|kv| [1, 20, 70, 150, 300].map(|n| (kv, n))) {
        for (call, chunk) in [(1, 16), (29, 7), (64, 512), (100, 16), (300, 512)] {
            let sizes = ModelOptions { kv, page_len: 16, chunk, ..options(n_tokens) };
            let model = open(2, 1, &sizes);
            let mut s = session(&model);
            for tokens in prompt(8, n_tokens).chunks(call) {
                s.prefill(tokens).unwrap_or_else(|e| panic!("{kv} {n_tokens} {call} {chunk}: {e}"));
            }
            assert_eq!(s.len(), n_tokens);
            let capacity = model.plan().layout.capacity(model.plan().n_pages / 2);
            assert!((n_tokens..n_tokens + 16).contains(&capacity), "{kv} {n_tokens}: {capacity}");
        }
    }
}

/// What is coded stays so: a session that goes back goes on from there, as its fork and its copy from a file do.
#[test]
fn sessions_go_back_to_where_pages_are_sealed() {
    for kv in sealed() {
        let model = open(2, 2, &ModelOptions { kv, page_len: 16, ..options(1_024) });
        for n in [0, 1, 4, 5, 19, 20, 21, 60, 100, 131, 132, 133, 170] {
            let mut s = session(&model);
            s.prefill(&prompt(6, 180)).unwrap();
            s.truncate(n).unwrap();
            assert_eq!((s.len(), s.tokens()), (n, &prompt(6, 180)[..n]), "{kv}");
            let mut saved = Vec::new();
            s.save(&mut saved).unwrap();
            assert_eq!(saved.len(), s.saved_bytes().unwrap());
            let mut restored = model.restore(&mut &*saved, &SessionOptions::default()).unwrap();
            let mut fork = s.fork().unwrap();
            let want = run(&mut s, &prompt(7, 50));
            assert!(run(&mut fork, &prompt(7, 50)) == want, "{kv}: a fork of {n}");
            assert!(run(&mut restored, &prompt(7, 50)) == want, "{kv}: {n} from a file");
            if n <= 4 {
                let mut fresh = session(&model);
                if n > 0 {
                    fresh.prefill(&prompt(6, n)).unwrap();
                }
                assert!(run(&mut fresh, &prompt(7, 50)) == want, "{kv}: nothing is sealed");
            }
        }
        assert_eq!(model.pool_usage().n_used, 0);
    }
}

#[test]
fn what_does_not_go_together_is_refused() {
    let refusal = |checkpoint: Checkpoint, options: ModelOptions| {
        let engine = support::engine(1);
        engine.open_checkpoint(checkpoint, &options).unwrap_err().to_string()
    };
    let kv = |text: &str| ModelOptions { kv: text.parse().unwrap(), ..options(64) };
    let mixed = refusal(checkpoint(2), kv("f32:int8"));
    assert!(mixed.contains("f32:int8") && mixed.contains("neither"), "{mixed}");
    let kept = ModelOptions { keep_prefixes: true, aux_tokens: 64, ..kv("int8") };
    assert!(refusal(checkpoint(2), kept).contains("keep-prefixes"));
    let model = open(2, 1, &ModelOptions { aux_tokens: 64, ..kv("int2") });
    let stream = Some(StreamOptions { sink: 4, window: 32 });
    let lazy = Some(Lazy { window: 2, ..Lazy::new(vec![PrunePoint { layer: 1, keep_rate: 0.5 }]) });
    let evict = Some(Evict::parse("snapkv:16").unwrap());
    for options in [
        SessionOptions { stream, ..SessionOptions::default() },
        SessionOptions { lazy, ..SessionOptions::default() },
        SessionOptions { evict, ..SessionOptions::default() },
    ] {
        let error = model.session(&options).unwrap_err().to_string();
        assert!(error.contains("sealed pages"), "{error}");
    }
    for text in ["int3", "", "int8:", ":int8", "int8:int8:int8", "INT8"] {
        let error = text.parse::<KvFormats>().unwrap_err().to_string();
        assert!(error.contains("int4-plain") && error.contains("KEYS:VALUES"), "{error}");
    }
    let error = KvFormats::from(KvFormat::INT4).check(16).unwrap_err().to_string();
    assert!(error.contains("16 wide"), "{error}");
    let error = KvFormats::from(KvFormat::INT2).check(96).unwrap_err().to_string();
    assert!(error.contains("4 bits") && error.contains("96 wide"), "{error}");
    // CUDA has kernels for some, and says so of the others before anything is loaded.
    let engine = loris::Engine::new(&cuda_options()).unwrap();
    for format in coded().into_iter().chain(sealed()) {
        let options = ModelOptions { kv: format, ..options(64) };
        let opened = engine.open_checkpoint(checkpoint(2), &options);
        if loris_kernels::has_kernels(format.into()) {
            assert_eq!(opened.unwrap().plan().kv, format);
            continue;
        }
        let error = opened.unwrap_err();
        let Error::Unsupported { found, expected, .. } = error else { panic!("{error}") };
        assert_eq!(found, format.to_string());
        for row in FORMATS {
            let is_named = expected.split(", ").any(|name| name == row.name);
            assert_eq!(is_named, has_kernels(&row), "{}: {expected}", row.name);
        }
    }
}

fn has_kernels(row: &Format) -> bool {
    loris_kernels::has_kernels(Sides { k: row.k, v: row.v })
}

/// The table of formats in the documents is that of the code.
#[test]
fn formats_are_documented() {
    let rows = FORMATS.map(|row| {
        let devices = if has_kernels(&row) { "CPU, CUDA" } else { "CPU" };
        format!("| `{}` | {} | {devices} |\n", row.name, row.says)
    });
    let rows = rows.concat();
    assert!(include_str!("../engine/docs/limits.md").contains(&rows), "limits.md lacks\n{rows}");
}
