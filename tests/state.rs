//! Saved sessions: they go on where they stopped, and a damaged one is refused.
#![allow(clippy::unwrap_used)]

mod support;

use loris::loader::Dtype;
use loris::{Error, KvFormat, Model, ModelOptions, Session, SessionOptions};
use support::{bits, open, options, rounded};

const NAME: &str = "llama3-rope";

fn model(options: &ModelOptions) -> Model {
    open(rounded(NAME, Dtype::BF16), options)
}

fn saved(model: &Model, n: u32, n_decoded: u32) -> (Session, Vec<u8>) {
    let mut session = model.session(&SessionOptions::default()).unwrap();
    let prompt: Vec<u32> = (0..n).map(|i| (i * 7 + 3) % 128).collect();
    session.prefill(&prompt).unwrap();
    for token in 0..n_decoded {
        session.decode(token).unwrap();
    }
    let mut blob = Vec::new();
    session.save(&mut blob).unwrap();
    (session, blob)
}

fn restore(model: &Model, blob: &[u8]) -> Result<Session, Error> {
    model.restore(&mut &*blob, &SessionOptions::default())
}

#[test]
fn a_restored_session_gives_the_same_bits() {
    for kv in [KvFormat::Bf16, KvFormat::F32] {
        for n in [1, 15, 16, 17, 64, 65, 100] {
            let (mut session, blob) =
                saved(&model(&ModelOptions { kv, page_len: 16, ..options(256) }), n, 3);
            // Another model, another page length: as a new process would.
            let other = model(&ModelOptions { kv, page_len: 64, ..options(256) });
            let mut restored = restore(&other, &blob).unwrap();
            assert_eq!(restored.tokens(), session.tokens());
            assert!(bits(restored.logits().unwrap()) == bits(session.logits().unwrap()));
            for token in [9, 8, 7] {
                session.decode(token).unwrap();
                restored.decode(token).unwrap();
                assert!(bits(restored.logits().unwrap()) == bits(session.logits().unwrap()));
            }
            let mut again = Vec::new();
            restore(&other, &blob).unwrap().save(&mut again).unwrap();
            assert!(again == blob, "saving is stable");
        }
    }
}

#[test]
fn an_empty_or_truncated_session_can_be_saved() {
    let model = model(&options(256));
    let empty = model.session(&SessionOptions::default()).unwrap();
    let mut blob = Vec::new();
    empty.save(&mut blob).unwrap();
    assert!(restore(&model, &blob).unwrap().is_empty());

    let (mut session, _) = saved(&model, 20, 0);
    session.truncate(11);
    let mut blob = Vec::new();
    session.save(&mut blob).unwrap();
    let restored = restore(&model, &blob).unwrap();
    assert_eq!((restored.len(), restored.logits()), (11, None));
}

#[test]
fn a_blob_of_something_else_is_refused_by_name() {
    let options = ModelOptions { page_len: 16, ..options(256) };
    let model = model(&options);
    let (_, blob) = saved(&model, 20, 0);
    let refusal = |model: &Model, blob: &[u8]| match restore(model, blob) {
        Err(e @ Error::SavedState { .. }) => e.to_string(),
        other => panic!("{other:?}"),
    };
    let with = |at: usize, byte: u8| {
        let mut blob = blob.clone();
        blob[at] ^= byte;
        blob
    };
    assert!(refusal(&model, &with(0, 1)).contains("magic"));
    assert!(refusal(&model, &with(8, 1)).contains("version"));
    assert!(refusal(&model, &with(12, 1)).contains("KV format"));
    assert!(refusal(&model, &with(16, 1)).contains("fingerprint"));
    assert!(refusal(&model, &with(24, 1)).contains("layers"));
    assert!(refusal(&model, &with(28, 1)).contains("kv heads"));
    assert!(refusal(&model, &with(32, 1)).contains("head width"));
    assert!(refusal(&model, &with(36, 1)).contains("vocabulary"));
    assert!(refusal(&model, &with(47, 0x80)).contains("tokens"));
    assert!(refusal(&model, &with(52, 0xff)).contains("shareable"));
    assert!(refusal(&model, &with(56, 2)).contains("logits flag"));
    assert!(refusal(&model, &with(60, 1)).contains("reserved"));
    assert!(refusal(&model, &with(67, 0xff)).contains("ids below 128"));
    assert!(refusal(&model, &with(blob.len() - 20, 1)).contains("checksum"));
    assert!(refusal(&model, &blob[..blob.len() - 1]).contains("checksum"));
    assert!(refusal(&model, &[]).contains("header"));

    let other_weights = open(rounded("llama-linear", Dtype::BF16), &options);
    assert!(refusal(&other_weights, &blob).contains("fingerprint"));
    let f32_cache = ModelOptions { kv: KvFormat::F32, ..options };
    let same = open(rounded(NAME, Dtype::BF16), &f32_cache);
    assert!(refusal(&same, &blob).contains("KV format"));
    assert_eq!(model.pool_usage().n_used, 0, "a refused blob leaves no page");
}

#[test]
fn a_blob_that_does_not_fit_is_refused_by_the_pool() {
    let (_, blob) = saved(&model(&ModelOptions { page_len: 16, ..options(256) }), 40, 0);
    let small = model(&ModelOptions { page_len: 16, ..options(32) });
    assert!(matches!(restore(&small, &blob), Err(Error::KvFull { .. })));
    assert_eq!(small.pool_usage().n_used, 0);
}

/// Flips, cuts, splices and extends a good blob; whatever comes out is refused or is the session itself.
#[test]
fn mutated_blobs_are_refused() {
    let model = model(&ModelOptions { page_len: 16, ..options(256) });
    let (session, blob) = saved(&model, 33, 2);
    let n_used = model.pool_usage().n_used;
    let mut state = 7_u64;
    let mut random = move |below: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 33) as usize % below.max(1)
    };
    let mut n_refused = 0;
    for _ in 0..4_000 {
        let mut bad = blob.clone();
        match random(5) {
            0 => bad.truncate(random(blob.len())),
            1 => {
                let (from, to, n) = (random(bad.len()), random(bad.len()), random(64));
                let piece: Vec<u8> = bad[from..(from + n).min(bad.len())].to_vec();
                bad.splice(to..to, piece);
            }
            2 => drop(bad.drain(..random(80))),
            _ => {
                // Mostly the header and the tokens: the rest only changes the checksum.
                for _ in 0..=random(3) {
                    let below = if random(4) == 0 { blob.len() } else { 200 };
                    bad[random(below)] ^= 1 << random(8);
                }
            }
        }
        match restore(&model, &bad) {
            Ok(restored) => assert_eq!(restored.tokens(), session.tokens()),
            Err(_) => n_refused += 1,
        }
        assert_eq!(model.pool_usage().n_used, n_used);
    }
    assert!(n_refused > 3_900, "{n_refused}");
}
