//! Blobs without sections, and what stands in one with them. Files that version 4 wrote, of every kind of session: `version-4/`, written before version 5 was there. Their sessions are
//! made anew here, and go on as the restored ones do.

use std::ops::Range;

use loris::backend::cpu::Isa;
use loris::compute::{Lazy, Order, PrunePoint};
use loris::keep::{Evict, Keep};
use loris::loader::Dtype;
use loris::{KvFormat, Model, ModelOptions, Session, SessionOptions, StreamOptions};

use crate::support::{deep, open_on, options, prompt, root, rounded};
use crate::{restore, save, seal};

/// The kinds of sessions, by the names of their files.
fn kinds() -> [(&'static str, KvFormat, SessionOptions); 5] {
    let dense = SessionOptions::default;
    let lazy = |window| {
        let points = vec![PrunePoint { layer: 1, keep_rate: 0.5 }];
        Some(Lazy { min_len: 1, window, pool: 3, max_revived: 2, ..Lazy::new(points) })
    };
    let stream = Some(StreamOptions { sink: 2, window: 20 });
    let evict = Some(Evict::parse("h2o:30%,sinks=3").unwrap());
    [
        ("dense", KvFormat::INT4, dense()),
        ("lazy", KvFormat::BF16, SessionOptions { lazy: lazy(2), ..dense() }),
        ("sealed", KvFormat::INT2, SessionOptions { lazy: lazy(1), ..dense() }),
        ("stream", KvFormat::INT8, SessionOptions { stream, ..dense() }),
        ("evict", KvFormat::BF16, SessionOptions { evict, ..dense() }),
    ]
}

/// A session as it was when its file was written.
fn session(kv: KvFormat, options_of: &SessionOptions) -> (Model, Session) {
    let sizes =
        ModelOptions { kv: kv.into(), page_len: 16, chunk: 32, aux_tokens: 256, ..options(512) };
    let checkpoint = deep(rounded("llama-tied", Dtype::BF16), 2);
    let model = open_on(Isa::Portable, checkpoint, &sizes);
    let mut session = model.session(options_of).unwrap();
    session.prefill(&prompt(1, 66)).unwrap();
    for token in [5, 9] {
        session.decode(token).unwrap();
    }
    (model, session)
}

/// What stands in a section.
pub(crate) fn section(blob: &[u8], name: &str) -> Range<usize> {
    sections(blob).find(|(found, _)| found == name).unwrap_or_else(|| panic!("no {name}")).1
}

fn sections(blob: &[u8]) -> impl Iterator<Item = (String, Range<usize>)> {
    let mut at = 64;
    std::iter::from_fn(move || {
        let name = String::from_utf8(blob.get(at..at + 8)?.to_vec()).unwrap();
        let n_bytes = u64::from_le_bytes(blob[at + 8..at + 16].try_into().unwrap());
        let range = at + 16..at + 16 + usize::try_from(n_bytes).unwrap();
        at = range.end;
        Some((name.trim_end().to_owned(), range))
    })
}

/// A blob as version 4 would have written it.
pub(crate) fn old(blob: &[u8]) -> Vec<u8> {
    let of = |name: &str| {
        let found = sections(blob).find(|(found, _)| found == name);
        found.map_or(&[][..], |(_, range)| &blob[range])
    };
    let counts: Vec<u64> = bytemuck::pod_collect_to_vec(of("counts"));
    let [page_len, n_gone, since, n_slots, n_answer] = counts[..5].try_into().unwrap();
    let long = |n: usize| (n as u64).to_le_bytes();
    let short = |n: usize| u32::try_from(n).unwrap().to_le_bytes();
    let (mut out, mut flags, mut n_points) = (blob[..64].to_vec(), 0, 0);
    for line in std::str::from_utf8(of("recipe")).unwrap().lines() {
        let (choice, spec) = line.split_once(' ').unwrap();
        match choice {
            "lazy" => {
                let lazy = Lazy::parse(spec, 64).unwrap();
                n_points = lazy.points.len();
                out.extend([lazy.sinks, lazy.min_len, lazy.max_revived].map(long).concat());
                let (order, seed) = match lazy.order {
                    Order::Attention => (0, 0),
                    Order::Random { seed } => (1, seed as usize),
                };
                let words = [lazy.window, lazy.revives.into(), order, seed, lazy.pool, 0];
                out.extend(words.map(short).concat());
                for PrunePoint { layer, keep_rate } in lazy.points {
                    out.extend(keep_rate.to_le_bytes());
                    out.extend(long(layer));
                }
            }
            "stream" => {
                flags |= 2;
                let (sink, window) = spec.split_once('+').unwrap();
                out.extend([sink, window].map(|n| short(n.parse().unwrap())).concat());
                out.extend([n_gone, page_len].map(u64::to_le_bytes).concat());
            }
            _ => {
                flags |= 4;
                let evict = Evict::parse(spec).unwrap();
                let (is_share, tokens, share) = match evict.keep {
                    Keep::Tokens(tokens) => (0, tokens, 0.0),
                    Keep::Share(share) => (1, 0, share),
                };
                out.extend([evict.rank.idx(), is_share].map(short).concat());
                out.extend(long(tokens));
                out.extend(f64::to_le_bytes(share));
                out.extend(long(evict.sinks));
                out.extend([evict.window, evict.pool].map(short).concat());
                out.extend([since, n_slots].map(u64::to_le_bytes).concat());
                out.extend(of("mass"));
            }
        }
    }
    if counts.len() > 5 {
        flags |= 8;
        out.extend(page_len.to_le_bytes());
        counts[5..].iter().for_each(|n| out.extend(n.to_le_bytes()));
    }
    if n_answer > 0 {
        flags |= 16;
        out.extend(n_answer.to_le_bytes());
    }
    if !of("logits").is_empty() {
        flags |= 1;
    }
    for name in ["tokens", "logits", "depths", "slots", "pages", "waiting"] {
        out.extend(of(name));
    }
    out[8] = 4;
    out[56..64].copy_from_slice(&[short(flags), short(n_points)].concat());
    out.extend([0; 8]);
    seal(&mut out);
    out
}

#[test]
fn files_of_version_4_go_on_as_their_sessions_do() {
    for (name, kv, options) in kinds() {
        let file = root().join("tests/state/version-4").join(name).with_extension("bin");
        let file = std::fs::read(file).unwrap();
        let (model, mut here) = session(kv, &options);
        let mut restored = restore(&model, &file).unwrap();
        let again = old(&save(&restored));
        let differs = again.iter().zip(&file).position(|(a, b)| a != b);
        assert_eq!((again.len(), differs), (file.len(), None), "{name}");
        for token in [3, 8, 2] {
            for session in [&mut here, &mut restored] {
                session.decode(token).unwrap();
            }
            let (here, there) = (here.logits().unwrap(), restored.logits().unwrap());
            let far = here.iter().zip(there).fold(0.0_f32, |far, (a, b)| far.max((a - b).abs()));
            let scale = here.iter().fold(0.0_f32, |most, x| most.max(x.abs()));
            // Kernels may have come to round otherwise since then.
            assert!(far <= 2e-2 * scale, "{name}: {far} of {scale}");
        }
        assert_eq!(restored.receipt().n_waiting, here.receipt().n_waiting, "{name}");
    }
}
