//! Memory: what a prompt takes is what the plan says, and a long prompt takes no more activations than a
//! short one. One test, because it measures the process.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used)]

mod support;

use loris::SessionOptions;
use support::{engine, options, smollm2};

/// Resident memory that is no file's, in bytes.
fn anonymous() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("RssAnon:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() * 1024
}

#[test]
fn a_prompt_takes_what_the_plan_says() {
    let start = anonymous();
    let model = engine(2).open(&smollm2(), &options(4_608)).unwrap();
    let plan = model.plan().clone();
    // A tokenizer is some eight times its file; weights stay where they are mapped.
    let opened = anonymous() - start;
    assert!(
        opened < 48 << 20,
        "opening took {opened} bytes; the weights are {}",
        plan.weight_bytes
    );

    let idle = anonymous();
    let mut grown = Vec::new();
    // With the token that is decoded, these fill their last page, so every byte of KV is touched.
    for (seed, n) in [(1, 511), (3, 4_031)] {
        let prompt: Vec<u32> = (0..n).map(|i| (i * 7_919 * seed + i / 3) % 49_152).collect();
        let mut session = model.session(&SessionOptions::default()).unwrap();
        session.prefill(&prompt).unwrap();
        session.decode(1).unwrap();
        let kv = plan.kv_bytes_of(session.len());
        assert_eq!(kv, session.receipt().kv_bytes);
        let predicted = kv + plan.activation_bytes + plan.logits_bytes;
        let taken = anonymous() - idle;
        assert!(taken <= predicted * 6 / 5, "{n} tokens: {taken} bytes, {predicted} predicted");
        grown.push(taken - kv.min(taken));
    }
    // The first session's pages were free for the second, so what is left is activations and scratch.
    let activations = plan.activation_bytes + plan.logits_bytes;
    assert!(grown[1] <= grown[0] + activations / 20, "{grown:?} bytes besides the KV");
}
