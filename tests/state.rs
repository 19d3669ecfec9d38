//! Saved sessions: they go on where they stopped, and a damaged one is refused.
#![allow(clippy::unwrap_used)]

#[path = "state/config.rs"]
mod config;
#[path = "state/files.rs"]
mod files;
#[path = "state/old.rs"]
mod old;
mod support;

use loris::compute::{Lazy, PrunePoint};
use std::ops::Range;

use loris::keep::Evict;
use loris::loader::Dtype;
use loris::{
    Error, KvFormat, KvFormats, Model, ModelOptions, Session, SessionOptions, StreamOptions,
};
use old::{old, section};
use support::{bits, deep, open, open_cpu, open_cuda, open_with, options, prompt, rounded, turn};
use xxhash_rust::xxh3::xxh3_64;

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
    for kv in KvFormat::ALL.map(KvFormats::from) {
        for n in [1, 15, 16, 17, 64, 65, 100] {
            let (mut session, blob) =
                saved(&model(&ModelOptions { kv, page_len: 16, ..options(256) }), n, 3);
            // Another model, another page length: as a new process would.
            let page_len = if kv.are_sealed() { 16 } else { 64 };
            let other = model(&ModelOptions { kv, page_len, ..options(512) });
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
    session.truncate(11).unwrap();
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
    assert!(refusal(&model, &with(8, 8)).contains("version"));
    assert!(refusal(&model, &with(12, 1)).contains("KV format"));
    assert!(refusal(&model, &with(16, 1)).contains("fingerprint"));
    assert!(refusal(&model, &with(24, 1)).contains("layers"));
    assert!(refusal(&model, &with(28, 1)).contains("kv heads"));
    assert!(refusal(&model, &with(32, 1)).contains("head width"));
    assert!(refusal(&model, &with(36, 1)).contains("vocabulary"));
    assert!(refusal(&model, &with(47, 0x80)).contains("tokens"));
    assert!(refusal(&model, &with(48, 1)).contains("the model's config"));
    assert!(refusal(&model, &with(56, 32)).contains("flags"));
    assert!(refusal(&model, &with(60, 0x80)).contains("prune points"));
    assert!(
        refusal(&model, &with(section(&blob, "tokens").start + 3, 0xff)).contains("ids below 128")
    );
    assert!(refusal(&model, &with(section(&blob, "pages").end - 1, 1)).contains("checksum"));
    assert!(refusal(&model, &blob[..blob.len() - 1]).contains("checksum"));
    assert!(refusal(&model, &[]).contains("header"));

    let other_weights = open(rounded("llama-linear", Dtype::BF16), &options);
    assert!(refusal(&other_weights, &blob).contains("fingerprint"));
    let f32_cache = ModelOptions { kv: KvFormat::F32.into(), ..options };
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

/// Whole numbers below a bound, the same in every run.
fn random() -> impl FnMut(usize) -> usize {
    let mut state = 7_u64;
    move |below: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 33) as usize % below.max(1)
    }
}

/// Flips, cuts, splices or extends; flips are mostly in the first `front` bytes.
fn mutate(blob: &[u8], front: usize, random: &mut impl FnMut(usize) -> usize) -> Vec<u8> {
    let mut bad = blob.to_vec();
    match random(5) {
        0 => bad.truncate(random(blob.len())),
        1 => {
            let (from, to, n) = (random(bad.len()), random(bad.len()), random(64));
            let piece: Vec<u8> = bad[from..(from + n).min(bad.len())].to_vec();
            bad.splice(to..to, piece);
        }
        2 => drop(bad.drain(..random(80))),
        _ => {
            for _ in 0..=random(3) {
                let below = if random(4) == 0 { blob.len() } else { front };
                bad[random(below)] ^= 1 << random(8);
            }
        }
    }
    bad
}

/// Whatever comes out is refused or is the session itself.
#[test]
fn mutated_blobs_are_refused() {
    let model = model(&ModelOptions { page_len: 16, ..options(256) });
    let (session, blob) = saved(&model, 33, 2);
    let n_used = model.pool_usage().n_used;
    let mut random = random();
    let mut n_refused = 0;
    for _ in 0..4_000 {
        // Mostly the header and the tokens: the rest only changes the checksum.
        let bad = mutate(&blob, 200, &mut random);
        match restore(&model, &bad) {
            Ok(restored) => assert_eq!(restored.tokens(), session.tokens()),
            Err(_) => n_refused += 1,
        }
        assert_eq!(model.pool_usage().n_used, n_used);
    }
    assert!(n_refused > 3_900, "{n_refused}");
}

/// How much of the tokens is an answer that may go on is part of a blob, and no more than there is.
#[test]
fn an_answer_is_saved_with_its_length() {
    let model = model(&options(256));
    let (session, mut blob) = saved(&model, 20, 3);
    let trusting = SessionOptions { trust_old_state: true, ..SessionOptions::default() };
    assert_eq!(session.answer().len(), 3);
    let at = section(&blob, "counts").start + 32;
    assert_eq!(blob[at..at + 8], 3_u64.to_le_bytes());
    for (n, is_sound) in [(0, true), (23, true), (24, false), (u64::MAX, false)] {
        blob[at..at + 8].copy_from_slice(&u64::to_le_bytes(n));
        seal(&mut blob);
        match model.restore(&mut &*blob, &SessionOptions::default()) {
            Ok(restored) => assert_eq!((restored.answer().len() as u64, is_sound), (n, true)),
            Err(Error::SavedState { field: "tokens of the answer", .. }) => assert!(!is_sound),
            Err(e) => panic!("{n}: {e}"),
        }
    }
    let mut blob = old(&save(&session));
    blob[8] = 3; // which did not have it
    blob[48..56].fill(0);
    seal(&mut blob);
    let old = model.restore(&mut &*blob, &trusting);
    assert!(matches!(old, Err(Error::SavedState { field: "flags", .. })));
}

#[test]
fn blobs_of_earlier_versions_are_read() {
    let model = model(&ModelOptions { page_len: 16, ..options(256) });
    let (session, blob) = saved(&model, 20, 0);
    let mut blob = old(&blob);
    blob[48..56].copy_from_slice(&20_u64.to_le_bytes());
    let trusting = SessionOptions { trust_old_state: true, ..SessionOptions::default() };
    let restore = |model: &Model, blob: &[u8]| model.restore(&mut &*blob, &trusting);
    for version in [1, 2] {
        blob[8] = version;
        seal(&mut blob);
        let restored = restore(&model, &blob).unwrap();
        assert_eq!(restored.tokens(), session.tokens());
        assert!(bits(restored.logits().unwrap()) == bits(session.logits().unwrap()));
        blob[56] = 3;
        assert!(matches!(restore(&model, &blob), Err(Error::SavedState { field: "flags", .. })));
        blob[56] = 1;
    }
    blob[8] = 1;
    blob[60] = 1;
    assert!(matches!(restore(&model, &blob), Err(Error::SavedState { field: "prune points", .. })));
}

/// What is wrong with the length of pages.
const BY_PAGE: &str = "page length of a stream or of sealed pages";

/// Sections that are not what they should be.
#[test]
fn sections_that_contradict_themselves_are_refused_by_name() {
    let model = lazy_model(&ModelOptions { page_len: 16, aux_tokens: 256, ..options(256) });
    let lazy = Some(schedule(&[(1, 0.5), (4, 0.5)]));
    let mut s = model.session(&SessionOptions { lazy, ..SessionOptions::default() }).unwrap();
    turn(&mut s, &prompt(1, 41), 5);
    let blob = save(&s);
    drop(s);
    let forged = |at: Range<usize>, bytes: &[u8]| {
        let mut blob = blob.clone();
        blob.splice(at, bytes.iter().copied());
        seal(&mut blob);
        match restore(&model, &blob) {
            Err(Error::SavedState { field, .. }) => field,
            other => panic!("{other:?}"),
        }
    };
    let names =
        ["recipe", "counts", "tokens", "logits", "depths", "slots", "pages", "waiting", "end"];
    for name in names {
        let Range { start, end } = section(&blob, name);
        let is_left_out = if name == "logits" { "depths" } else { "section" };
        let found = forged(start - 16..start - 8, b"unknown ");
        assert!(["section", is_left_out].contains(&found), "{name}: {found}");
        for n_bytes in [0, end - start - 1, end - start + 1, 1 << 62] {
            let found = forged(start - 8..start, &(n_bytes as u64).to_le_bytes());
            assert_ne!(found, "checksum", "{name}, {n_bytes} bytes");
        }
    }
    let recipe = section(&blob, "recipe");
    for (text, field) in [
        ("", "depths"),
        ("lazy 1:0.5,4:0.5,window=0\n", "schedule"),
        ("lazy 1:0.5,9:0.5\n", "schedule"),
        ("stream 4\n", "recipe"),
        ("merge all\n", "recipe"),
        ("lazy\n", "recipe"),
        ("evict h2o:1\n", "eviction policy"),
        ("\u{0}", "recipe"),
    ] {
        let head = [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat();
        let found = forged(recipe.start - 8..recipe.end, &head);
        assert!(found == field || (text.is_empty() && found == "section"), "{text}: {found}");
    }
    let (n_refused, n_restored) = restore_mutated(&model, &blob, section(&blob, "pages").start);
    assert!(n_refused > 500 && n_restored > 200, "{n_refused} refused, {n_restored} restored");
    let counts = section(&blob, "counts").start;
    for (idx, field) in
        [(0, BY_PAGE), (1, "tokens that a stream has left behind"), (4, "tokens of the answer")]
    {
        let at = counts + 8 * idx;
        assert_eq!(forged(at..at + 8, &48_u64.to_le_bytes()), field);
    }
    assert_eq!((model.pool_usage().n_used, model.pool_usage().n_aux_used), (0, 0));
}

/// Gives a forged blob the checksum of its contents.
fn seal(blob: &mut [u8]) {
    let end = blob.len() - 8;
    let sum = xxh3_64(&blob[..end]);
    blob[end..].copy_from_slice(&sum.to_le_bytes());
}

const N_LAYERS: usize = 6;

fn lazy_model(options: &ModelOptions) -> Model {
    open(deep(rounded("llama-tied", Dtype::BF16), N_LAYERS), options)
}

fn schedule(points: &[(usize, f64)]) -> Lazy {
    let points = points.iter().map(|&(layer, keep_rate)| PrunePoint { layer, keep_rate }).collect();
    Lazy { min_len: 0, sinks: 2, max_revived: 1, ..Lazy::new(points) }
}

fn save(session: &Session) -> Vec<u8> {
    let mut blob = Vec::new();
    session.save(&mut blob).unwrap();
    assert_eq!(blob.len(), session.saved_bytes().unwrap());
    blob
}

#[test]
fn a_restored_session_that_prunes_gives_the_same_bits() {
    let schedules = [
        schedule(&[(1, 0.5), (3, 0.5), (4, 0.7)]),
        Lazy { window: 4, max_revived: 2, ..schedule(&[(2, 0.3)]) },
        Lazy { revives: false, max_revived: usize::MAX, ..schedule(&[(5, 0.4)]) },
        schedule(&[(3, 1.0)]),
    ];
    let sizes = ModelOptions { aux_tokens: 512, ..options(512) };
    let mut n_with_holes = 0;
    for kv in KvFormat::ALL.map(KvFormats::from) {
        let model = lazy_model(&ModelOptions { kv, page_len: 16, ..sizes.clone() });
        let schedules =
            schedules.iter().enumerate().filter(|(_, s)| s.window == 1 || !kv.are_sealed());
        // Other pages and other chunks: as a new process might have.
        let other = lazy_model(&ModelOptions {
            kv,
            page_len: if kv.are_sealed() { 16 } else { 64 },
            chunk: 9,
            aux_tokens: 200,
            ..sizes.clone()
        });
        for (i, lazy) in schedules {
            // Between tokens that are forgotten others were taken up again: some slots hold nothing then.
            for n_forgotten in [0, 3, 13] {
                let what = format!("{kv}, schedule {i}, {n_forgotten} forgotten");
                let options =
                    SessionOptions { lazy: Some(lazy.clone()), ..SessionOptions::default() };
                let mut s = model.session(&options).unwrap();
                turn(&mut s, &prompt(1, 70), 5);
                turn(&mut s, &prompt(2, 9), 5);
                s.truncate(s.len() - n_forgotten).unwrap();
                let blob = save(&s);
                let mut restored = restore(&other, &blob).unwrap();
                assert!(save(&restored) == blob, "{what}: saving is stable");
                assert_eq!(restored.tokens(), s.tokens(), "{what}");
                assert_eq!(restored.receipt().n_waiting, s.receipt().n_waiting, "{what}");
                assert!(s.receipt().n_waiting > 0 || i == 3, "{what}");
                let positions = blob[200..blob.len() - 8].windows(4);
                n_with_holes += usize::from(positions.into_iter().any(|bytes| bytes == [0xff; 4]));
                if n_forgotten == 0 {
                    assert!(
                        bits(restored.logits().unwrap()) == bits(s.logits().unwrap()),
                        "{what}"
                    );
                } else {
                    assert!(restored.logits().is_none(), "{what}");
                }
                for seed in [3, 4] {
                    let want = turn(&mut s, &prompt(seed, 11), 5);
                    assert!(
                        turn(&mut restored, &prompt(seed, 11), 5) == want,
                        "{what}, turn {seed}"
                    );
                }
                assert_eq!(restored.receipt().n_waiting, s.receipt().n_waiting, "{what}");
                drop((s, restored));
                for model in [&model, &other] {
                    let usage = model.pool_usage();
                    assert_eq!((usage.n_used, usage.n_aux_used), (0, 0), "{what}");
                }
            }
        }
    }
    assert!(n_with_holes > 4, "{n_with_holes}");
}

#[test]
fn a_session_that_prunes_is_restored_on_cuda_and_on_another_device() {
    let checkpoint = || deep(rounded("llama-tied", Dtype::BF16), 4);
    let sizes = ModelOptions { page_len: 16, aux_tokens: 128, ..options(128) };
    let model = open_cuda(checkpoint(), &sizes);
    let lazy = Some(schedule(&[(1, 0.5), (2, 0.5)]));
    let mut s = model.session(&SessionOptions { lazy, ..SessionOptions::default() }).unwrap();
    s.prefill(&prompt(1, 24)).unwrap();
    s.decode(7).unwrap();
    let blob = save(&s);
    assert!(s.receipt().n_waiting > 10, "{:?}", s.receipt());
    let other = open_cuda(checkpoint(), &ModelOptions { page_len: 32, ..sizes.clone() });
    let mut restored = restore(&other, &blob).unwrap();
    let mut on_cpu = restore(&open_cpu(checkpoint(), &sizes), &blob).unwrap();
    assert!(save(&restored) == blob && save(&on_cpu) == blob);
    for token in [3, 9] {
        for s in [&mut s, &mut restored, &mut on_cpu] {
            s.decode(token).unwrap();
        }
        assert!(bits(restored.logits().unwrap()) == bits(s.logits().unwrap()));
    }
    assert!(restored.receipt().n_revived > 0, "hidden states came back");
}

#[test]
fn a_restored_session_prunes_as_the_saved_one_did_or_is_refused() {
    let sizes = ModelOptions { page_len: 16, aux_tokens: 256, ..options(256) };
    let model = lazy_model(&sizes);
    let lazy = schedule(&[(1, 0.5), (4, 0.5)]);
    let with = |lazy: &Lazy| SessionOptions { lazy: Some(lazy.clone()), ..Default::default() };
    let mut s = model.session(&with(&lazy)).unwrap();
    turn(&mut s, &prompt(1, 40), 5);
    let blob = save(&s);
    assert!(model.restore(&mut &*blob, &with(&lazy)).is_ok());
    for other in [
        schedule(&[(1, 0.5)]),
        schedule(&[(1, 0.5), (4, 0.6)]),
        Lazy { window: 2, ..lazy.clone() },
        Lazy { sinks: 3, ..lazy.clone() },
        Lazy { pool: 3, ..lazy.clone() },
        Lazy { min_len: 1, ..lazy.clone() },
        Lazy { max_revived: 3, ..lazy.clone() },
        Lazy { revives: false, ..lazy.clone() },
    ] {
        let refused = model.restore(&mut &*blob, &with(&other));
        assert!(matches!(refused, Err(Error::SavedState { field: "schedule", .. })), "{other:?}");
    }
    let dense = model.session(&SessionOptions::default()).unwrap();
    let refused = model.restore(&mut &*save(&dense), &with(&lazy));
    assert!(matches!(refused, Err(Error::SavedState { field: "schedule", .. })));

    let no_room = lazy_model(&ModelOptions { aux_tokens: 0, ..sizes.clone() });
    assert!(matches!(restore(&no_room, &blob), Err(Error::Option { name: "lazy", .. })));
    let little_room = lazy_model(&ModelOptions { aux_tokens: 16, ..sizes.clone() });
    assert!(matches!(restore(&little_room, &blob), Err(Error::AuxFull { .. })));
    let few_pages = lazy_model(&ModelOptions { kv_tokens: Some(32), ..sizes });
    assert!(matches!(restore(&few_pages, &blob), Err(Error::KvFull { .. })));
    for model in [no_room, little_room, few_pages] {
        assert_eq!((model.pool_usage().n_used, model.pool_usage().n_aux_used), (0, 0));
    }
}

/// A pruned session of 46 tokens in three segments, and where in its blob things are.
struct Forged {
    model: Model,
    blob: Vec<u8>,
    points: usize,
    depths: usize,
    /// The number of slots of the second segment, then their positions.
    slots: usize,
    n_slots: usize,
    /// Where KV begins.
    kv: usize,
}

fn forged() -> Forged {
    let model = lazy_model(&ModelOptions { page_len: 16, aux_tokens: 256, ..options(256) });
    let lazy = Some(schedule(&[(1, 0.5), (4, 0.5)]));
    let mut s = model.session(&SessionOptions { lazy, ..SessionOptions::default() }).unwrap();
    turn(&mut s, &prompt(1, 41), 5);
    let blob = old(&save(&s));
    let points = 64 + 48;
    let answer = 8; // how many of the tokens it has
    let depths = points + 2 * 16 + answer + 46 * 4 + 128 * 4;
    let slots = depths + 46;
    let count = |at: usize| u64::from_le_bytes(blob[at..at + 8].try_into().unwrap()) as usize;
    let n_slots = count(slots);
    let third = slots + 8 + 4 * n_slots;
    let kv = third + 8 + 4 * count(third);
    Forged { model, points, depths, slots, n_slots, kv, blob }
}

/// The blob with these bytes there, sealed anew.
fn forge(blob: &[u8], at: usize, bytes: &[u8]) -> Vec<u8> {
    let mut blob = blob.to_vec();
    assert!(blob[at..at + bytes.len()] != *bytes, "at {at}: forged nothing");
    blob[at..at + bytes.len()].copy_from_slice(bytes);
    seal(&mut blob);
    blob
}

/// What is wrong with it.
fn refusal(model: &Model, blob: &[u8], at: usize, bytes: &[u8]) -> &'static str {
    match restore(model, &forge(blob, at, bytes)) {
        Err(Error::SavedState { field, .. }) => field,
        other => panic!("at {at}: {other:?}"),
    }
}

#[test]
fn layers_that_contradict_each_other_are_refused_by_name() {
    let Forged { model, blob, points, depths, slots, n_slots, .. } = forged();
    let n_segments = 3;
    let refusal = |at: usize, bytes: &[u8]| refusal(&model, &blob, at, bytes);
    let through_two = (0..46).find(|&i| blob[depths + i] == 2).unwrap();
    let through_one = (0..46).find(|&i| blob[depths + i] == 1).unwrap();
    assert_eq!(refusal(60, &17_u32.to_le_bytes()), "prune points");
    assert_eq!(refusal(64 + 24, &0_u32.to_le_bytes()), "schedule", "a window of none");
    assert_eq!(refusal(64 + 28, &2_u32.to_le_bytes()), "revival of a schedule");
    assert_eq!(refusal(64 + 32, &2_u32.to_le_bytes()), "order of a schedule");
    assert_eq!(refusal(64 + 36, &2_u32.to_le_bytes()), "seed");
    assert_eq!(refusal(64 + 40, &2_u32.to_le_bytes()), "schedule", "a pool of two");
    assert_eq!(refusal(64 + 44, &1_u32.to_le_bytes()), "reserved word");
    for rate in [0.0, -1.0, 1.5, f64::NAN, f64::INFINITY] {
        assert_eq!(refusal(points, &rate.to_le_bytes()), "schedule", "{rate}");
    }
    for layer in [0, 4, 6, u64::MAX] {
        assert_eq!(refusal(points + 8, &layer.to_le_bytes()), "schedule", "{layer}");
    }
    assert_eq!(refusal(depths, &[0]), "depths");
    assert_eq!(refusal(depths, &[n_segments + 1]), "depths");
    assert_eq!(refusal(depths + through_one, &[2]), "positions", "a token without a slot");
    assert_eq!(refusal(depths + through_two, &[1]), "positions", "a slot too many");
    assert_eq!(refusal(depths + through_two, &[3]), "positions", "of the last segment");
    let position = |i: usize| slots + 8 + 4 * i;
    let second = &blob[position(1)..position(2)];
    assert_eq!(refusal(position(0), second), "positions", "one twice");
    assert_eq!(refusal(position(0), &46_u32.to_le_bytes()), "positions", "none of the tokens");
    assert_eq!(refusal(position(0), &u32::MAX.to_le_bytes()), "positions", "one is missing");
    assert_eq!(refusal(position(n_slots - 1), &u32::MAX.to_le_bytes()), "positions");
    // A slot that was given up is none of the tokens', and the last is one's.
    let with_slot = |i: usize| {
        let mut blob = blob.clone();
        blob.splice(position(i)..position(i), u32::MAX.to_le_bytes());
        blob[slots..slots + 8].copy_from_slice(&(n_slots as u64 + 1).to_le_bytes());
        seal(&mut blob);
        restore(&model, &blob)
    };
    assert!(matches!(with_slot(n_slots), Err(Error::SavedState { field: "positions", .. })));
    // In between it is sound, but then KV is too short.
    assert!(matches!(
        with_slot(3),
        Err(Error::SavedState { field: "checksum" | "hidden states", .. })
    ));
    for n in [u64::MAX, u64::MAX / 4, 1 << 40, 5_000] {
        let mut blob = blob.clone();
        blob[slots..slots + 8].copy_from_slice(&n.to_le_bytes());
        assert!(matches!(restore(&model, &blob), Err(Error::KvFull { .. })), "{n} slots");
    }
    assert_eq!((model.pool_usage().n_used, model.pool_usage().n_aux_used), (0, 0));
}

/// What a forger can get past the checks is another session, which runs or says that it cannot.
#[test]
fn forged_blobs_of_a_session_that_prunes_are_refused_or_run() {
    let Forged { model, blob, kv, .. } = forged();
    let mut random = random();
    let (mut n_refused, mut n_restored) = (0, 0);
    for i in 0..3_000 {
        let mut bad = mutate(&blob, if i % 2 == 0 { kv } else { blob.len() }, &mut random);
        if bad.len() >= 8 {
            seal(&mut bad);
        }
        match restore(&model, &bad) {
            Ok(mut s) => {
                let len = s.len();
                assert_eq!(old(&save(&s)).len(), bad.len());
                // A damaged number may be none.
                if s.prefill(&prompt(2, 3)).is_err() {
                    assert_eq!(s.len(), len);
                }
                assert!(s.truncate(len / 2).is_ok() || s.least_len() > len / 2);
                n_restored += 1;
            }
            Err(_) => n_refused += 1,
        }
        assert_eq!((model.pool_usage().n_used, model.pool_usage().n_aux_used), (0, 0));
    }
    assert!(n_refused > 1_000 && n_restored > 500, "{n_refused} refused, {n_restored} restored");
}

fn evicting(spec: &str) -> SessionOptions {
    SessionOptions { evict: Some(Evict::parse(spec).unwrap()), ..SessionOptions::default() }
}

fn streaming(sink: usize, window: usize) -> SessionOptions {
    let stream = Some(StreamOptions { sink, window });
    SessionOptions { stream, ..SessionOptions::default() }
}

/// At every point of their lives: before and after the first page goes, before and after the first eviction.
#[test]
fn restored_streams_and_sessions_that_evict_give_the_same_bits() {
    for kv in ["bf16", "int8:int4"] {
        let sizes =
            ModelOptions { kv: kv.parse().unwrap(), page_len: 16, chunk: 32, ..options(512) };
        let model = lazy_model(&sizes);
        let other = lazy_model(&ModelOptions { chunk: 9, ..sizes });
        let policies =
            ["h2o:24", "h2o:40%", "snapkv:24,window=5", "tova:24", "knorm:50%", "random:24"];
        let policies = policies.into_iter().map(evicting);
        for options in policies.chain([streaming(4, 30), streaming(0, 17)]) {
            let mut s = model.session(&options).unwrap();
            for n in [0, 9, 45, 60, 3] {
                if n > 0 {
                    turn(&mut s, &prompt(n, n), 5);
                }
                let blob = save(&s);
                let mut restored = restore(&other, &blob).unwrap();
                assert!(other.restore(&mut &*blob, &options).is_ok());
                assert_eq!((restored.len(), restored.n_gone()), (s.len(), s.n_gone()));
                assert_eq!(restored.tokens(), s.tokens());
                assert_eq!(restored.receipt().kv_bytes, s.receipt().kv_bytes);
                assert_eq!(restored.logits().map(bits), s.logits().map(bits));
                assert!(save(&restored) == blob, "{kv} {options:?} after {n}");
                let mut fork = s.fork().unwrap();
                assert!(
                    turn(&mut restored, &prompt(7, 20), 5) == turn(&mut fork, &prompt(7, 20), 5),
                    "{options:?}, {n}"
                );
                // Cut back as far as either can be, to before it was saved where nothing was left behind, both know as much.
                assert_eq!(restored.least_len(), fork.least_len(), "{options:?}, {n}");
                let len = fork.least_len().max(8);
                for s in [&mut restored, &mut fork] {
                    s.truncate(len).unwrap();
                }
                assert_eq!(restored.len(), fork.len(), "{options:?}");
                assert!(
                    turn(&mut restored, &prompt(3, 9), 5) == turn(&mut fork, &prompt(3, 9), 5),
                    "{options:?}, {n}"
                );
            }
        }
        assert_eq!((model.pool_usage().n_used, other.pool_usage().n_used), (0, 0));
    }
}

/// The attention that its tokens got goes along, and they are as many on either device.
#[test]
fn a_session_that_evicts_moves_between_cuda_and_the_cpu() {
    for (kv, spec) in
        [("bf16", "h2o:20"), ("int8", "h2o:50%"), ("bf16", "knorm:20"), ("int8", "tova:20")]
    {
        let checkpoint = || rounded("llama-tied", Dtype::BF16);
        let sizes = ModelOptions { kv: kv.parse().unwrap(), page_len: 16, ..options(128) };
        let on_cuda = open_cuda(checkpoint(), &sizes);
        let other =
            open_cuda(checkpoint(), &ModelOptions { page_len: 32, chunk: 9, ..sizes.clone() });
        let on_cpu = open_cpu(checkpoint(), &sizes);
        for (from, to) in [(&on_cuda, &other), (&on_cuda, &on_cpu), (&on_cpu, &on_cuda)] {
            let mut s = from.session(&evicting(spec)).unwrap();
            s.prefill(&prompt(1, 40)).unwrap();
            s.decode(7).unwrap();
            assert_eq!(s.receipt().n_evicted, 20, "{kv} {spec}");
            let blob = save(&s);
            let mut restored = restore(to, &blob).unwrap();
            assert!(save(&restored) == blob, "{kv} {spec}");
            // Until the next choice, which may be a close one.
            for token in [3, 9, 4] {
                for s in [&mut s, &mut restored] {
                    s.decode(token).unwrap();
                }
                let pairs = s.logits().unwrap().iter().zip(restored.logits().unwrap());
                let (d, n) =
                    pairs.fold((0.0, 0.0), |(d, n), (a, b)| (d + (a - b).powi(2), n + a * a));
                let allowed = if std::ptr::eq(to, &other) { 0.0 } else { 2e-2 };
                assert!((d / n).sqrt() <= allowed, "{kv} {spec}: {}", (d / n).sqrt());
            }
            if std::ptr::eq(to, &other) {
                assert!(
                    turn(&mut s, &prompt(7, 20), 5) == turn(&mut restored, &prompt(7, 20), 5),
                    "{kv} {spec}"
                );
            }
        }
    }
}

#[test]
fn streams_and_evictions_that_contradict_themselves_are_refused_by_name() {
    let model = lazy_model(&ModelOptions { page_len: 16, chunk: 32, ..options(512) });
    let blob_of = |options: &SessionOptions| {
        let mut s = model.session(options).unwrap();
        turn(&mut s, &prompt(1, 60), 5);
        save(&s)
    };
    let blobs = [blob_of(&streaming(4, 20)), blob_of(&evicting("h2o:24"))];
    let [stream, evicted] = blobs.each_ref().map(|blob| old(blob));
    let refusal = |blob: &[u8], at: usize, bytes: &[u8]| refusal(&model, blob, at, bytes);
    let long = |n: u64| n.to_le_bytes();
    assert_eq!(refusal(&stream, 64, &65_u32.to_le_bytes()), "policy", "sinks");
    assert_eq!(refusal(&stream, 68, &0_u32.to_le_bytes()), "policy", "window");
    let gone = "tokens that a stream has left behind";
    // 65 tokens, the first page, and from 44 on what the last row but one sees: pages from 16 to 32 went.
    assert_eq!(stream[72..80], long(16));
    assert_eq!(
        refusal(&stream, 68, &40_u32.to_le_bytes()),
        gone,
        "a wider window would still see it"
    );
    for n in [8, 17, u64::MAX] {
        assert_eq!(refusal(&stream, 72, &long(n)), gone, "{n}");
    }
    assert_eq!(refusal(&stream, 80, &long(32)), BY_PAGE);
    assert_eq!(refusal(&stream, 56, &7_u32.to_le_bytes()), "flags", "and evicts");
    assert_eq!(refusal(&stream, 56, &11_u32.to_le_bytes()), "flags", "and seals");
    assert_eq!(refusal(&evicted, 64, &6_u32.to_le_bytes()), "eviction policy");
    assert_eq!(refusal(&evicted, 68, &2_u32.to_le_bytes()), "flag of a share");
    assert_eq!(refusal(&evicted, 72, &long(5)), "policy", "too few to keep");
    assert_eq!(refusal(&evicted, 96, &0_u32.to_le_bytes()), "policy", "no window");
    assert_eq!(refusal(&evicted, 104, &long(66)), "tokens at the last eviction");
    assert_eq!(refusal(&evicted, 104, &long(0)), "slots of a layer");
    assert_eq!(refusal(&evicted, 112, &long(66)), "slots of a layer");
    assert_eq!(refusal(&evicted, 112, &long(5)), "slots of a layer");
    assert_eq!(refusal(&evicted, 120, &f32::NAN.to_le_bytes()), "the attention of a slot");
    assert_eq!(refusal(&evicted, 120, &(-1_f32).to_le_bytes()), "the attention of a slot");

    // Asked for something else than was saved.
    for (blob, options) in [
        (&stream, streaming(4, 21)),
        (&stream, evicting("h2o:24")),
        (&evicted, evicting("h2o:25")),
        (&evicted, streaming(4, 20)),
    ] {
        assert!(matches!(
            model.restore(&mut &**blob, &options),
            Err(Error::SavedState { field: "stream" | "eviction", .. })
        ));
    }
    let other = lazy_model(&ModelOptions { page_len: 32, chunk: 32, ..options(512) });
    assert!(restore(&other, &evicted).is_ok(), "pages of another length hold the same slots");

    for blob in blobs {
        let (n_refused, n_restored) = restore_mutated(&model, &blob, 130);
        assert!(n_refused > 500 && n_restored > 200, "{n_refused} refused, {n_restored} restored");
    }
}

/// What a forger can get past the checks is another session, which runs or says that it cannot. Gives how many of 1,500
/// were refused and how many not.
fn restore_mutated(model: &Model, blob: &[u8], front: usize) -> (usize, usize) {
    let mut random = random();
    let (mut n_refused, mut n_restored) = (0, 0);
    for i in 0..1_500 {
        let mut bad = mutate(blob, if i % 2 == 0 { front } else { blob.len() }, &mut random);
        if bad.len() >= 8 {
            seal(&mut bad);
        }
        match restore(model, &bad) {
            Ok(mut s) => {
                assert_eq!(save(&s).len(), bad.len());
                let len = s.len();
                if s.prefill(&prompt(2, 30)).is_err() {
                    assert_eq!(s.len(), len); // a damaged number may be none
                }
                assert!(s.truncate(len / 2).is_ok() || s.least_len() > len / 2);
                n_restored += 1;
            }
            Err(_) => n_refused += 1,
        }
        assert_eq!(model.pool_usage().n_used, 0);
    }
    (n_refused, n_restored)
}

/// A session that a blob was restored to is its holder's alone: neither what it brought nor what it computes on top of it
/// reaches sessions that begin alike.
#[test]
fn a_thousand_forged_blobs_change_no_bit_of_another_session() {
    let sizes = ModelOptions {
        page_len: 16,
        chunk: 64,
        aux_tokens: 512,
        keep_prefixes: true,
        ..options(1024)
    };
    let model = open_with(1, deep(rounded("llama-tied", Dtype::BF16), 3), &sizes);
    let lazy = Some(schedule(&[(1, 0.5), (2, 0.5)]));
    let kinds = [
        SessionOptions::default(),
        SessionOptions { lazy, ..SessionOptions::default() },
        streaming(4, 100),
        evicting("h2o:24"),
    ];
    // Of each kind what a prompt leads to, undisturbed, and its blob.
    let tokens = prompt(1, 60);
    let other = |options: &SessionOptions| {
        let mut s = model.session(options).unwrap();
        s.prefill(&tokens).unwrap();
        s
    };
    let wanted: Vec<_> = kinds.iter().map(|kind| bits(other(kind).logits().unwrap())).collect();
    let blobs: Vec<_> = kinds.iter().map(|kind| save(&other(kind))).collect();
    let mut random = random();
    let mut n_restored = 0;
    for i in 0..1_000 {
        let kind = i % kinds.len();
        let mut bad = blobs[kind].clone();
        // KV; and every second blob is of when the header said how much others may share.
        let is_old = random(2) == 0;
        if is_old {
            bad = old(&bad);
        }
        for _ in 0..=random(20) {
            let at = bad.len() - 8 - 1 - random(bad.len() / 2);
            bad[at] ^= 1 << random(8);
        }
        if is_old {
            bad[8] = 3;
            bad[48..56].copy_from_slice(&(random(61) as u64).to_le_bytes());
        }
        if random(8) == 0 {
            bad = mutate(&bad, bad.len().min(200), &mut random);
        }
        if bad.len() < 64 {
            continue;
        }
        seal(&mut bad);
        let trusting = SessionOptions { trust_old_state: true, ..SessionOptions::default() };
        let Ok(mut forged) = model.restore(&mut &*bad, &trusting) else { continue };
        n_restored += 1;
        // Its pages could be offered when it goes on, also after it was cut back, and by a fork.
        match random(4) {
            0 => {}
            1 => drop(forged.truncate(random(60))),
            2 => forged = forged.fork().unwrap(),
            _ => drop(forged.decode(7)),
        }
        let rest = tokens.get(forged.len()..).filter(|rest| !rest.is_empty());
        drop(forged.prefill(rest.unwrap_or(&[5; 20])));
        // Of its own kind, then of the next, and so on.
        let kind = (i + i / kinds.len()) % kinds.len();
        let other = other(&kinds[kind]);
        assert!(bits(other.logits().unwrap()) == wanted[kind], "blob {i}, {:?}", kinds[kind]);
    }
    assert!(n_restored > 800, "{n_restored}");
}

#[test]
fn sealed_pages_that_contradict_themselves_are_refused_by_name() {
    let sizes = ModelOptions { kv: "int2".parse().unwrap(), page_len: 16, ..options(512) };
    let model = model(&sizes);
    let (s, whole) = saved(&model, 100, 0);
    drop(s);
    let blob = old(&whole);
    // The header, the page length and the number of sealed pages; 100 tokens and their logits.
    let slots = 64 + 8 + 8 + 400 + 512;
    assert_eq!(blob[slots..slots + 8], 100_u64.to_le_bytes());
    let restore_forged = |at: usize, bytes: &[u8]| restore(&model, &forge(&blob, at, bytes));
    let refusal = |at: usize, bytes: &[u8]| refusal(&model, &blob, at, bytes);
    let long = |n: u64| n.to_le_bytes();
    assert_eq!(blob[72..80], long(3), "pages in front of the last two and the row's own");
    assert_eq!(refusal(56, &1_u32.to_le_bytes()), "flags");
    assert_eq!(refusal(64, &long(64)), BY_PAGE);
    assert_eq!(refusal(72, &long(u64::MAX)), "sealed pages");
    for n in [2, 7] {
        assert_eq!(refusal(72, &long(n)), "sealed pages", "{n}");
    }
    assert_eq!(refusal(slots, &long(99)), "positions", "a token without a slot");
    assert!(matches!(restore_forged(slots, &long(1 << 40)), Err(Error::KvFull { .. })));
    assert_eq!(refusal(slots + 8, &7_u32.to_le_bytes()), "positions", "one twice");
    assert_eq!(refusal(slots + 8 + 4 * 99, &u32::MAX.to_le_bytes()), "positions");

    let (n_refused, n_restored) =
        restore_mutated(&model, &whole, section(&whole, "slots").start + 420);
    assert!(n_refused > 400 && n_restored > 300, "{n_refused} refused, {n_restored} restored");
}
