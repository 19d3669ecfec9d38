//! The parser against the format's reference crate, on mutated headers: what we accept the reference accepts too, and
//! means the same by it. The mutations are seeded and counted, so that a run takes seconds and can be repeated.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Random, exact, raw, tiny_weights, weights};
use loris_loader::safetensors::parse;

/// Panics unless both agree in the way that is promised; returns whether we accept.
fn compare(bytes: &[u8]) -> bool {
    let Ok(ours) = parse(bytes) else { return false };
    let theirs = match safetensors::SafeTensors::read_metadata(bytes) {
        Ok((_, metadata)) => metadata,
        Err(err) => panic!(
            "accepted what the reference refuses ({err}): {:?}",
            String::from_utf8_lossy(bytes)
        ),
    };
    let all = theirs.tensors();
    assert_eq!(ours.tensors.len(), all.len());
    for (name, info) in &ours.tensors {
        let other = all[name];
        assert_eq!(info.dtype.name(), other.dtype.to_string(), "{name}");
        assert_eq!(info.shape, other.shape, "{name}");
        let range = other.data_offsets.0 + ours.data_start..other.data_offsets.1 + ours.data_start;
        assert_eq!(info.range, range, "{name}");
    }
    true
}

fn seeds() -> Vec<Vec<u8>> {
    let named =
        |name: &str, dtype: &'static str, shape: &[usize]| (name.to_owned(), dtype, shape.to_vec());
    vec![
        tiny_weights(),
        raw("{}", 0),
        weights(&[named("a", "F32", &[2]), named("b", "BF16", &[1, 3]), named("c", "U8", &[0])]),
        weights(&[
            named("scalar", "F64", &[]),
            named("empty", "F32", &[0, 4]),
            named("x", "I64", &[1]),
        ]),
        raw(
            r#"{"__metadata__":{"format":"pt"},"a":{"dtype":"F16","shape":[2],"data_offsets":[0,4]}}"#,
            4,
        ),
        exact(r#"{"a":{"shape":[2],"dtype":"U8","data_offsets":[0,2]}}"#, 2),
    ]
}

/// Bytes that headers are made of, so that a mutation often leaves JSON.
const TOKENS: &[&str] = &[
    "\"",
    "{",
    "}",
    "[",
    "]",
    ",",
    ":",
    "0",
    "1",
    "-1",
    "1.5",
    "1e3",
    "18446744073709551615",
    "18446744073709551616",
    "1099511627776",
    "null",
    "true",
    " ",
    "\n",
    "\\u0000",
    "\\ud800",
    "\"a\"",
    "\"shape\"",
    "\"dtype\"",
    "\"F32\"",
    "\"F4\"",
    "\"C64\"",
    "\"data_offsets\"",
    "\"__metadata__\":{},",
    "[0,4]",
    "[0,0]",
    "[]",
    "{}",
    "é",
    "\u{0}",
];

fn mutate(file: &mut Vec<u8>, other: &[u8], random: &mut Random) {
    let at = random.below(file.len());
    match random.below(8) {
        0 => file[at] ^= 1 << random.below(8),
        1 => file.truncate(at),
        2 => {
            let end = (at + random.below(16)).min(file.len());
            file.drain(at..end);
        }
        3 => {
            let from = random.below(other.len());
            let part = &other[from..(from + random.below(64)).min(other.len())];
            file.splice(at..at, part.iter().copied());
        }
        4 => file.extend(std::iter::repeat_n(0, random.below(9))),
        _ => {
            let token = TOKENS[random.below(TOKENS.len())].as_bytes();
            let end = (at + random.below(4)).min(file.len());
            file.splice(at..end, token.iter().copied());
        }
    }
}

/// Corrects the length in front, so that the mutation is seen as a header and not only as a wrong length.
fn repair_length(file: &mut [u8], data_len: usize) {
    if let Some(header) = file.len().checked_sub(8 + data_len) {
        file[..8].copy_from_slice(&(header as u64).to_le_bytes());
    }
}

#[test]
fn mutated_files_are_never_accepted_alone() {
    let seeds = seeds();
    let data_lens: Vec<usize> = seeds
        .iter()
        .map(|seed| seed.len() - parse(seed).expect("seeds are valid").data_start)
        .collect();
    assert!(seeds.iter().all(|seed| compare(seed)));
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let mut accepted = 0;
    for _ in 0..60_000 {
        let which = random.below(seeds.len());
        let mut file = seeds[which].clone();
        for _ in 0..=random.below(3) {
            let other = random.below(seeds.len());
            mutate(&mut file, &seeds[other], &mut random);
            if file.is_empty() {
                break;
            }
        }
        if random.below(4) != 0 && file.len() >= 8 {
            repair_length(&mut file, data_lens[which]);
        }
        accepted += usize::from(compare(&file));
    }
    // Some mutations (of a name, of a digit) leave valid files: the comparison was not idle.
    assert!(accepted > 100, "{accepted} accepted");
}

#[test]
fn made_up_headers_are_never_accepted_alone() {
    let mut random = Random(42);
    let dtypes = ["F32", "BF16", "U8", "BOOL", "F8_E8M0", "C64", "F4", "I64"];
    let mut accepted = 0;
    for _ in 0..40_000 {
        let n = random.below(4);
        let mut end = 0;
        let mut entries = Vec::new();
        for i in 0..n {
            let shape: Vec<usize> = (0..random.below(3)).map(|_| random.below(4)).collect();
            let dtype = dtypes[random.below(dtypes.len())];
            let bytes = shape.iter().product::<usize>() * [4, 2, 1, 1, 1, 8, 1, 8][i.min(7)];
            let begin = end + usize::from(random.below(20) == 0);
            end = begin + bytes;
            entries.push(format!(
                r#""{}":{{"dtype":"{dtype}","shape":{shape:?},"data_offsets":[{begin},{end}]}}"#,
                random.below(6)
            ));
        }
        let pad = " ".repeat(random.below(9));
        accepted += usize::from(compare(&exact(&format!("{{{}}}{pad}", entries.join(",")), end)));
    }
    assert!(accepted > 100, "{accepted} accepted");
}
