//! KV formats of less than 16 bits in sessions: what they take, and that nothing about a session depends on
//! how its tokens came. What the codes are is in `tests/ops.rs`, what they cost in quality `loris eval` measures.
#![allow(clippy::unwrap_used)]

mod support;

use loris::loader::{Checkpoint, Dtype};
use loris::policy::{Lazy, PrunePoint};
use loris::{Error, KvFormat, KvFormats, Model, ModelOptions, Session, SessionOptions};
use support::{bits, cuda_options, deep, open_with, options, rounded};

const N_TOKENS: usize = 300;

fn coded() -> Vec<KvFormats> {
    let mut formats: Vec<KvFormats> = KvFormat::ALL.map(KvFormats::from).into();
    formats.retain(|formats| formats.k.is_coded());
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

fn session(model: &Model) -> Session {
    model.session(&SessionOptions::default()).unwrap()
}

#[allow(clippy::cast_possible_truncation)]
fn prompt(seed: usize, n: usize) -> Vec<u32> {
    (0..n).map(|i| ((i * 31 + seed * 17 + i * i * (seed + 3)) % 128) as u32).collect()
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
        let options = ModelOptions { kv, ..options(1_024) };
        let want = run(&mut session(&open(2, 2, &options)), &prompt(1, N_TOKENS));
        for (chunk, page_len, threads) in
            [(1, 64, 2), (5, 16, 1), (64, 64, 3), (100, 256, 2), (3, 32, 2)]
        {
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
        let long = prompt(2, 40);
        let mut whole = session(&model);
        let mut want = Vec::new();
        whole.score(&long, &mut |_, logits| want.push(bits(logits))).unwrap();
        for n in [1, 3, 4, 5, 19, 20, 21, 36, 37] {
            let mut s = session(&model);
            s.prefill(&long[..n]).unwrap();
            assert!(bits(s.logits().unwrap()) == want[n - 1], "{kv}: {n} tokens");
            assert_eq!(s.receipt().kv_bytes, model.plan().kv_bytes_of(n));
            // And back again: what is forgotten leaves no trace.
            s.truncate(n - 1);
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
        assert_eq!(second.receipt().n_shared, 4 + 5 * 16, "{kv}");
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
    let wide = bytes(KvFormat::Bf16.into());
    for (kv, least) in [("fp8", 1.9), ("int8", 1.9), ("int4", 3.4), ("int8:int4", 2.45)] {
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
        assert!(some != dense && some_bytes * 10 < all_bytes * 7, "{kv}: {some_bytes} bytes");
        let (other, _) = open_lazy(&ModelOptions { chunk: 7, page_len: 64, ..options }, 0.3);
        assert!(other == some, "{kv}: chunks and pages");
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
    for text in ["int3", "", "int8:", ":int8", "int8:int8:int8", "INT8"] {
        let error = text.parse::<KvFormats>().unwrap_err().to_string();
        assert!(error.contains("int4-plain") && error.contains("KEYS:VALUES"), "{error}");
    }
    let error = KvFormats::from(KvFormat::Int4).check(16).unwrap_err().to_string();
    assert!(error.contains("16 wide"), "{error}");
    // The CUDA kernels do not have them yet, and say so before anything is loaded.
    let engine = loris::Engine::new(&cuda_options()).unwrap();
    for format in coded() {
        let options = ModelOptions { kv: format, ..options(64) };
        let error = engine.open_checkpoint(checkpoint(2), &options).unwrap_err();
        let is_named =
            matches!(&error, Error::Unsupported { found, .. } if *found == format.to_string());
        assert!(is_named, "{error}");
    }
}
