//! Sessions: what comes out does not depend on who else is in the batch, and a call that fails changes
//! nothing.
#![allow(clippy::unwrap_used)]

mod support;

use std::fs::File;
use std::io::Write;
use std::ops::ControlFlow;
use std::path::Path;
use std::time::SystemTime;

use loris::loader::{Dtype, LoadMode};
use loris::{Engine, Error, Model, ModelOptions, Progress, Session, SessionOptions};
use support::{
    argmax, best, bits, check_company, open, open_with, options, prompt, reference, rounded, run,
    session,
};

const NAME: &str = "llama3-rope";

fn model(options: &ModelOptions) -> Model {
    open(rounded(NAME, Dtype::BF16), options)
}

/// A prompt looks at the weight files first; a token does not.
#[test]
fn a_mapped_weight_file_that_changes_is_an_error_of_the_next_prompt() {
    let change = |path: &Path, how: &str| {
        let file = || File::options().append(true).open(path).unwrap();
        match how {
            "grows" => file().write_all(&[0]).unwrap(),
            "is touched" => file().set_modified(SystemTime::UNIX_EPOCH).unwrap(),
            "is replaced" => {
                let new = path.with_extension("new");
                std::fs::write(&new, "other weights").unwrap();
                std::fs::rename(new, path).unwrap();
            }
            _ => std::fs::remove_file(path).unwrap(),
        }
    };
    let open = |on: Engine, load, how: &str| {
        let folder = tempfile::tempdir().unwrap();
        // The last shard only.
        let last = "model-00005-of-00005.safetensors";
        for file in support::fixture("llama-sharded").read_dir().unwrap() {
            let from = file.unwrap().path();
            std::fs::copy(&from, folder.path().join(from.file_name().unwrap())).unwrap();
        }
        let model = on.open(folder.path(), &ModelOptions { load, ..options(256) }).unwrap();
        let mut s = session(&model);
        s.prefill(&prompt(1, 20)).unwrap();
        change(&folder.path().join(last), how);
        (model, s, folder)
    };
    let cpu = || support::on(support::isa(), 2);
    for how in ["grows", "is touched"] {
        let (model, mut s, _folder) = open(cpu(), LoadMode::Mmap, how);
        let (before, receipt) = (bits(s.logits().unwrap()), format!("{:?}", s.receipt()));
        let changed =
            |e: &Error| matches!(e, Error::Load(loris::loader::Error::FileChanged { .. }));
        assert!(changed(&s.prefill(&prompt(2, 9)).unwrap_err()), "{how}");
        assert!(changed(&s.logits_of(&prompt(2, 9), &mut |_, _| {}).unwrap_err()), "{how}");
        assert!(changed(&s.feed(&prompt(2, 9)).unwrap_err()), "{how}");
        assert!(changed(&session(&model).prefill(&prompt(2, 9)).unwrap_err()), "{how}");
        assert_eq!(model.step(&mut [&mut s]).pop().unwrap().unwrap(), Progress::Idle);
        assert_eq!((s.len(), format!("{:?}", s.receipt())), (20, receipt), "{how}");
        assert!(bits(s.logits().unwrap()) == before, "{how}");
        s.decode(best(&s)).unwrap();
    }
    // The map keeps a file that has lost its name, and what was copied knows no file.
    for how in ["is replaced", "is removed"] {
        let (_, mut s, _folder) = open(cpu(), LoadMode::Mmap, how);
        s.prefill(&prompt(2, 9)).unwrap();
    }
    let cuda = || Engine::new(&support::cuda_options()).unwrap();
    for (on, load) in [(cpu(), LoadMode::Read), (cuda(), LoadMode::Mmap)] {
        let (_, mut s, _folder) = open(on, load, "grows");
        s.prefill(&prompt(2, 9)).unwrap();
    }
}

#[test]
fn bits_do_not_depend_on_chunk_page_length_or_threads() {
    let want = run(&model(&options(256)), &prompt(1, 130), 6);
    for (chunk, page_len, threads) in [
        (1, 16, 1),
        (7, 16, 2),
        (64, 32, 3),
        (63, 64, 1),
        (65, 64, 2),
        (100, 128, 2),
        (512, 256, 3),
        (130, 16, 2),
    ] {
        let options = ModelOptions { chunk, page_len, ..options(256) };
        let model = open_with(threads, rounded(NAME, Dtype::BF16), &options);
        let got = run(&model, &prompt(1, 130), 6);
        assert!(got == want, "chunk {chunk}, page {page_len}, {threads} threads");
    }
}

#[test]
fn bits_do_not_depend_on_the_batch() {
    let model = model(&ModelOptions { chunk: 40, batch: 4, ..options(4096) });
    check_company(&model, &[1, 2, 15, 16, 17, 63, 64, 65, 100], 5);
}

#[test]
fn a_shared_prefix_changes_no_bit_and_takes_no_page() {
    let model = model(&ModelOptions { page_len: 16, ..options(1024) });
    let long = prompt(3, 90);
    let mut other = long.clone();
    other[70] = (other[70] + 1) % 128;
    let want = [run(&model, &long, 4), run(&model, &other, 4)];

    let mut first = session(&model);
    first.prefill(&long).unwrap();
    let n_used = model.pool_usage().n_used;
    for (tokens, want, n_shared) in [(&long, &want[0], 80), (&other, &want[1], 64)] {
        let mut second = session(&model);
        second.prefill(tokens).unwrap();
        assert_eq!(second.receipt().n_shared, n_shared);
        assert_eq!(second.receipt().n_prefilled, tokens.len() - n_shared);
        let n_own = (90_usize.div_ceil(16) - n_shared / 16) * model.plan().n_layers;
        assert_eq!(model.pool_usage().n_used, n_used + n_own);
        assert!(bits(second.logits().unwrap()) == want[0]);
        for row in &want[1..] {
            second.decode(best(&second)).unwrap();
            assert!(bits(second.logits().unwrap()) == *row);
        }
    }
    drop(first);
    assert_eq!(model.pool_usage().n_used, 0);
    // Nobody holds the prefix any more: it is computed again.
    let mut third = session(&model);
    third.prefill(&long).unwrap();
    assert_eq!(third.receipt().n_shared, 0);
}

#[test]
fn generated_tokens_are_never_shared_as_a_prefix() {
    // Decode and prefill kernels round differently, so a prompt that repeats an answer is computed.
    let model = model(&ModelOptions { page_len: 16, ..options(1024) });
    let mut first = session(&model);
    first.prefill(&prompt(4, 10)).unwrap();
    for _ in 0..30 {
        first.decode(best(&first)).unwrap();
    }
    let mut second = session(&model);
    second.prefill(first.tokens()).unwrap();
    assert_eq!(second.receipt().n_shared, 0);
}

#[test]
fn a_truncated_page_that_is_written_again_is_not_shared() {
    let model = model(&ModelOptions { page_len: 16, ..options(1024) });
    let tokens = prompt(5, 33);
    let mut first = session(&model);
    first.prefill(&tokens).unwrap();
    first.truncate(20).unwrap();
    first.prefill(&prompt(6, 30)).unwrap();
    let mut second = session(&model);
    second.prefill(&tokens).unwrap();
    assert_eq!(second.receipt().n_shared, 16);
    assert!(bits(second.logits().unwrap()) == run(&model, &tokens, 0)[0]);
}

#[test]
fn forks_go_their_own_ways() {
    let model = model(&ModelOptions { page_len: 16, ..options(1024) });
    for len in [1, 15, 16, 17, 40] {
        let mut a = session(&model);
        a.prefill(&prompt(len, len)).unwrap();
        let mut b = a.fork().unwrap();
        let n_used = model.pool_usage().n_used;
        assert_eq!(n_used, len.div_ceil(16) * model.plan().n_layers, "a fork takes no page");
        let (x, y) = (7, 9);
        a.decode(x).unwrap();
        b.decode(y).unwrap();
        let mut want_x = session(&model);
        want_x.prefill(&prompt(len, len)).unwrap();
        let mut want_y = want_x.fork().unwrap();
        want_x.decode(x).unwrap();
        want_y.decode(y).unwrap();
        assert!(bits(a.logits().unwrap()) == bits(want_x.logits().unwrap()), "length {len}");
        assert!(bits(b.logits().unwrap()) == bits(want_y.logits().unwrap()), "length {len}");
        assert!(bits(a.logits().unwrap()) != bits(b.logits().unwrap()));
        drop((a, b, want_x, want_y));
        assert_eq!(model.pool_usage().n_used, 0);
    }
}

#[test]
fn a_session_without_pages_is_told_and_stays_as_it_was() {
    let model = model(&ModelOptions { page_len: 16, ..options(64) });
    let mut a = session(&model);
    a.prefill(&prompt(1, 40)).unwrap(); // three of four columns
    let before = bits(a.logits().unwrap());

    let mut b = session(&model);
    assert!(matches!(b.prefill(&prompt(2, 17)), Err(Error::KvFull { .. })));
    assert!(b.is_empty() && b.logits().is_none());
    b.prefill(&prompt(2, 16)).unwrap();
    let b_logits = bits(b.logits().unwrap());
    assert!(matches!(b.decode(3), Err(Error::KvFull { .. })));
    assert_eq!(b.len(), 16);
    assert!(bits(b.logits().unwrap()) == b_logits);

    // In one step, the session that fits goes on and the other keeps its token.
    a.push(5).unwrap();
    b.push(6).unwrap();
    let results = model.step(&mut [&mut b, &mut a]);
    assert!(matches!(results[0], Err(Error::KvFull { .. })));
    assert!(matches!(results[1], Ok(Progress::Ready)));
    assert!(bits(a.logits().unwrap()) != before);
    drop(a);
    assert!(matches!(model.step(&mut [&mut b])[0], Ok(Progress::Ready)));
    assert_eq!(b.len(), 17);
}

#[test]
fn a_failed_prefill_in_the_middle_is_undone() {
    let model = model(&ModelOptions { page_len: 16, chunk: 16, ..options(128) });
    let mut a = session(&model);
    a.prefill(&prompt(1, 20)).unwrap();
    let (before, n_used) = (bits(a.logits().unwrap()), model.pool_usage().n_used);
    let outcome = a.prefill_with(&prompt(2, 50), &mut |done, _| match done {
        0..40 => ControlFlow::Continue(()),
        _ => ControlFlow::Break(()),
    });
    assert!(matches!(outcome, Err(Error::Cancelled)));
    assert_eq!((a.len(), model.pool_usage().n_used), (20, n_used));
    assert!(bits(a.logits().unwrap()) == before);

    a.canceller().cancel();
    assert!(matches!(a.decode(1), Err(Error::Cancelled)));
    assert_eq!((a.len(), model.pool_usage().n_used), (20, n_used));
    a.decode(1).unwrap(); // a cancel stops one call

    assert!(matches!(a.prefill(&prompt(3, 120)), Err(Error::KvFull { .. })));
    assert_eq!(a.len(), 21);
}

#[test]
fn calls_of_many_threads_can_be_cancelled_at_any_moment() {
    let model = model(&ModelOptions { page_len: 16, chunk: 16, ..options(1024) });
    let n_threads = 4;
    let want: Vec<_> = (0..n_threads).map(|seed| run(&model, &prompt(seed, 60), 1)).collect();
    let work = &|seed: usize| {
        for round in 0..60 {
            let mut s = session(&model);
            let canceller = s.canceller();
            std::thread::scope(|scope| {
                // From at once to after the call: how far it gets is the scheduler's choice.
                scope.spawn(move || {
                    (0..round).for_each(|_| std::thread::yield_now());
                    canceller.cancel();
                });
                match s.prefill(&prompt(seed, 60)) {
                    Ok(()) => assert!(bits(s.logits().unwrap()) == want[seed][0]),
                    Err(Error::Cancelled) => assert!(s.is_empty() && s.logits().is_none()),
                    Err(e) => panic!("{e}"),
                }
            });
            // A cancel that came too late ends the next call and no other.
            if s.is_empty() && s.prefill(&prompt(seed, 60)).is_err() {
                s.prefill(&prompt(seed, 60)).unwrap();
            }
            if s.decode(best(&s)).is_err() {
                s.decode(best(&s)).unwrap();
            }
            assert!(bits(s.logits().unwrap()) == want[seed][1]);
        }
    };
    std::thread::scope(|scope| {
        for seed in 0..n_threads {
            scope.spawn(move || work(seed));
        }
    });
    assert_eq!(model.pool_usage().n_used, 0);
}

#[test]
fn dynamic_rope_follows_the_tokens_that_are_there() {
    let dynamic = || {
        let options = ModelOptions { page_len: 16, chunk: 32, ..options(512) };
        open(rounded("llama-dynamic", Dtype::BF16), &options)
    };
    let options = SessionOptions { ctx_len: Some(256), ..SessionOptions::default() };
    let start = |model: &Model| {
        let mut s = model.session(&options).unwrap();
        s.prefill(&prompt(1, 70)).unwrap(); // the model was trained for 64
        s
    };
    let model = dynamic();
    let mut plain = start(&model);
    plain.decode(5).unwrap();
    let want = bits(plain.logits().unwrap());

    let mut cleared = start(&model);
    cleared.feed(&prompt(2, 90)).unwrap();
    cleared.clear_pending();
    let mut failed = start(&model);
    let stop =
        &mut |done, _| if done < 60 { ControlFlow::Continue(()) } else { ControlFlow::Break(()) };
    assert!(failed.prefill_with(&prompt(2, 90), stop).is_err());
    let mut truncated = start(&model);
    truncated.prefill(&prompt(2, 90)).unwrap();
    truncated.truncate(70).unwrap();
    let mut blob = Vec::new();
    truncated.save(&mut blob).unwrap();
    let restored = model.restore(&mut &*blob, &options).unwrap();
    for (mut s, what) in
        [(cleared, "cleared"), (failed, "failed"), (truncated, "truncated"), (restored, "restored")]
    {
        s.decode(5).unwrap();
        assert!(bits(s.logits().unwrap()) == want, "{what}");
    }
}

#[test]
fn a_visitor_of_scores_may_run_other_sessions() {
    let model = model(&ModelOptions { batch: 4, page_len: 16, ..options(64) });
    let tokens = prompt(2, 10);
    let mut seen = Vec::new();
    let mut scored = session(&model);
    scored
        .logits_of(&tokens, &mut |i, logits| {
            let mut other = session(&model);
            other.prefill(&tokens[..=i]).unwrap();
            assert!(bits(other.logits().unwrap()) == bits(logits), "token {i}");
            seen.push(i);
        })
        .unwrap();
    assert_eq!(seen, (0..10).collect::<Vec<_>>());
    assert_eq!((scored.len(), scored.logits().is_some()), (10, true));

    let before = bits(scored.logits().unwrap());
    assert!(matches!(scored.logits_of(&prompt(3, 100), &mut |_, _| ()), Err(Error::KvFull { .. })));
    assert_eq!(scored.len(), 10);
    assert!(bits(scored.logits().unwrap()) == before);
}

#[test]
fn input_is_checked() {
    let model = model(&options(256));
    let options = SessionOptions { ctx_len: Some(8), ..SessionOptions::default() };
    let mut s = model.session(&options).unwrap();
    assert!(matches!(s.prefill(&[]), Err(Error::State { .. })));
    assert!(matches!(s.decode(1), Err(Error::State { .. })));
    assert!(matches!(s.prefill(&[1, 128]), Err(Error::TokenOutOfRange { id: 128, .. })));
    assert!(matches!(s.prefill(&[1; 9]), Err(Error::CtxFull { needed: 9, ctx_len: 8 })));
    s.prefill(&[1; 8]).unwrap();
    assert!(matches!(s.decode(1), Err(Error::CtxFull { needed: 9, ctx_len: 8 })));
    s.truncate(3).unwrap();
    assert!(s.logits().is_none());
    s.push(1).unwrap();
    assert!(matches!(s.push(1), Err(Error::State { .. })));
    assert!(matches!(s.fork(), Err(Error::State { .. })));
    assert_eq!(s.clear_pending(), 1);
    let long = SessionOptions { ctx_len: Some(1 << 20), ..SessionOptions::default() };
    assert!(matches!(model.session(&long), Err(Error::Option { name: "ctx", .. })));
    let other = support::open(rounded(NAME, Dtype::BF16), &support::options(64));
    assert!(matches!(other.step(&mut [&mut s])[0], Err(Error::State { .. })));
}

#[test]
fn a_batch_larger_than_one_pass_is_served_whole() {
    let model = model(&ModelOptions { batch: 2, chunk: 8, ..options(2048) });
    let mut sessions: Vec<Session> = (0..5).map(|_| session(&model)).collect();
    for (i, s) in sessions.iter_mut().enumerate() {
        s.feed(&prompt(i, 11)).unwrap();
    }
    let mut n_steps = 0;
    while sessions.iter().any(|s| s.len() < 11) {
        let mut refs: Vec<&mut Session> = sessions.iter_mut().collect();
        assert!(model.step(&mut refs).iter().all(Result::is_ok));
        n_steps += 1;
    }
    assert_eq!(n_steps, 7, "55 rows in chunks of 8");
    for s in &mut sessions {
        s.push(1).unwrap();
    }
    let mut refs: Vec<&mut Session> = sessions.iter_mut().collect();
    let results = model.step(&mut refs);
    assert!(results.iter().all(|r| matches!(r, Ok(Progress::Ready))));
    assert!(sessions.iter().all(|s| s.len() == 12));
}

/// Steps all of them, those in `order` first to last.
fn step_in(model: &Model, sessions: &mut [Session], order: &[usize]) -> Vec<Progress> {
    let mut slots: Vec<Option<&mut Session>> = sessions.iter_mut().map(Some).collect();
    let mut refs: Vec<&mut Session> = order.iter().map(|&i| slots[i].take().unwrap()).collect();
    let results = model.step(&mut refs);
    let mut all = vec![Progress::Idle; order.len()];
    order.iter().zip(results).for_each(|(&i, result)| all[i] = result.unwrap());
    all
}

#[test]
fn a_long_prompt_keeps_nobody_waiting() {
    let model = model(&ModelOptions { chunk: 16, ..options(4096) });
    let (long, short) = (prompt(1, 250), prompt(2, 60));
    let alone = [run(&model, &long, 0), run(&model, &short, 0)];
    let alone_running: Vec<_> = (0..8).map(|i| run(&model, &prompt(10 + i, 12), 30)).collect();
    let orders: [Vec<usize>; 3] =
        [(0..10).collect(), (0..10).rev().collect(), [4, 9, 0, 8, 1, 2, 3, 5, 7, 6].to_vec()];
    for order in orders {
        // 0 to 7 decode; 8 is the long prompt, 9 the short one that comes later.
        let mut all: Vec<Session> = (0..10).map(|_| session(&model)).collect();
        for (i, s) in all.iter_mut().enumerate().take(8) {
            s.prefill(&prompt(10 + i, 12)).unwrap();
        }
        all[8].feed(&long).unwrap();
        let mut n_behind = None;
        for step in 0.. {
            if step == 3 {
                all[9].feed(&short).unwrap();
                n_behind = Some(0);
            }
            all[..8].iter_mut().for_each(|s| s.push(best(s)).unwrap());
            let before = [all[8].len(), all[9].len()];
            let progress = step_in(&model, &mut all, &order);
            for (i, s) in all[..8].iter().enumerate() {
                assert_eq!(progress[i], Progress::Ready, "step {step}");
                assert!(bits(s.logits().unwrap()) == alone_running[i][step + 1]);
            }
            let n_rows = (all[8].len() - before[0]) + (all[9].len() - before[1]);
            if progress[8] == Progress::Ready {
                break;
            }
            assert_eq!(n_rows, 16, "a step computes a chunk");
            assert!(all[8].len() > before[0], "the long prompt goes on");
            n_behind = n_behind.map(|n| n + usize::from(all[9].len() > before[1]));
        }
        // 60 rows, 8 in each step.
        assert_eq!(n_behind, Some(8));
        for (s, alone) in all[8..].iter().zip(&alone) {
            assert!(bits(s.logits().unwrap()) == alone[0]);
        }
    }
}

#[test]
fn more_prompts_than_a_step_has_room_for_go_on_in_turn() {
    for (chunk, batch, n_steps_at_most) in [(8, 2, 4), (3, 16, 3), (1, 1, 7), (16, 16, 1)] {
        let model = model(&ModelOptions { chunk, batch, ..options(2048) });
        let mut all: Vec<Session> = (0..7).map(|_| session(&model)).collect();
        all.iter_mut().enumerate().for_each(|(i, s)| s.feed(&prompt(i, 30)).unwrap());
        let order: Vec<usize> = (0..7).collect();
        let (mut len, mut since) = ([0; 7], [0; 7]);
        while all.iter().any(|s| s.logits().is_none()) {
            step_in(&model, &mut all, &order);
            for (i, s) in all.iter().enumerate() {
                since[i] = if s.len() > len[i] || s.len() == 30 { 0 } else { since[i] + 1 };
                assert!(since[i] < n_steps_at_most, "session {i}, chunk {chunk}, batch {batch}");
                len[i] = s.len();
            }
        }
        for (i, s) in all.iter().enumerate() {
            assert!(bits(s.logits().unwrap()) == run(&model, &prompt(i, 30), 0)[0]);
        }
    }
}

#[test]
fn prompts_of_one_step_that_begin_alike_are_computed_once() {
    let begin = prompt(3, 100);
    // Pages of 16: 96 tokens can be shared, whatever comes behind them.
    let alike = |i: usize| [&begin[..], &prompt(20 + i, 10)].concat();
    for chunk in [7, 16, 40, 512] {
        let sizes = ModelOptions { page_len: 16, chunk, ..options(4096) };
        let alone = model(&sizes);
        for is_same in [false, true] {
            let prompts: Vec<_> = (0..8).map(|i| alike(if is_same { 0 } else { i })).collect();
            let model = model(&sizes);
            let mut all: Vec<Session> = (0..8).map(|_| session(&model)).collect();
            all.iter_mut().zip(&prompts).for_each(|(s, tokens)| s.feed(tokens).unwrap());
            let order: Vec<usize> = (0..8).rev().collect();
            while all.iter().any(|s| s.logits().is_none()) {
                step_in(&model, &mut all, &order);
            }
            let mut computed: Vec<usize> = all.iter().map(|s| s.receipt().n_prefilled).collect();
            computed.sort_unstable();
            assert_eq!(computed, [14, 14, 14, 14, 14, 14, 14, 110], "chunk {chunk}");
            for (s, tokens) in all.iter_mut().zip(&prompts) {
                let receipt = s.receipt();
                assert_eq!(receipt.n_shared + receipt.n_prefilled, 110);
                assert_eq!(receipt.token_layers, receipt.n_prefilled * model.plan().n_layers);
                let want = run(&alone, tokens, 2);
                assert!(bits(s.logits().unwrap()) == want[0]);
                for want in &want[1..] {
                    s.decode(best(s)).unwrap();
                    assert!(bits(s.logits().unwrap()) == *want);
                }
            }
            drop(all);
            assert_eq!(model.pool_usage().n_used, 0);
        }
    }
}

/// Whoever computes what several prompts begin with may be cancelled, dropped or left out of a step: the others go on
/// from where it was.
#[test]
fn prompts_go_on_without_the_one_that_was_ahead() {
    let sizes = ModelOptions { page_len: 16, chunk: 16, ..options(4096) };
    let tokens = prompt(3, 100);
    let want = run(&model(&sizes), &tokens, 3);
    for how in 0..4 {
        let model = model(&sizes);
        let mut ahead = session(&model);
        let mut others = [session(&model), session(&model)];
        ahead.feed(&tokens).unwrap();
        others.iter_mut().for_each(|s| s.feed(&tokens).unwrap());
        for _ in 0..2 {
            let [a, b] = &mut others;
            let results = model.step(&mut [&mut ahead, a, b]);
            assert!(results.iter().all(|r| matches!(r, Ok(Progress::Pending { .. }))));
        }
        assert_eq!((ahead.len(), others[0].len(), others[1].len()), (32, 16, 16));
        let mut ahead = Some(ahead);
        match how {
            0 => ahead.as_ref().unwrap().canceller().cancel(),
            1 => ahead = None,
            2 => drop(ahead.as_mut().map(Session::clear_pending)),
            _ => {}
        }
        for n in 1.. {
            let [a, b] = &mut others;
            let mut refs = vec![a, b];
            refs.extend(ahead.as_mut().filter(|_| n == 1 && how < 3));
            let results = model.step(&mut refs);
            assert!(results[..2].iter().all(Result::is_ok));
            if how == 0 && n == 1 {
                assert!(matches!(results[2], Err(Error::Cancelled)));
            }
            if others.iter().all(|s| s.logits().is_some()) {
                break;
            }
            assert!(n < 10, "way {how}");
        }
        // Without the session its last page is gone, if nobody had taken that over.
        let n_prefilled: usize = others.iter().map(|s| s.receipt().n_prefilled).sum();
        assert_eq!(n_prefilled, if how == 1 { 84 + 4 } else { 68 + 4 }, "way {how}");
        for s in &mut others {
            for want in &want {
                assert!(bits(s.logits().unwrap()) == *want, "way {how}");
                s.decode(best(s)).unwrap();
            }
        }
    }
}

#[test]
fn what_a_call_has_computed_is_shared_before_its_end_and_survives_it() {
    let model = model(&ModelOptions { page_len: 16, chunk: 8, ..options(1024) });
    let (tokens, other) = (prompt(3, 100), prompt(4, 100));
    let want = [run(&model, &tokens, 3), run(&model, &other, 3)];
    for stop_at in (8..96).step_by(8) {
        let mut b = session(&model);
        let mut a = session(&model);
        let outcome = a.prefill_with(&tokens, &mut |done, _| match done == stop_at {
            true => {
                b.prefill(&tokens).unwrap();
                assert_eq!(b.receipt().n_shared, stop_at / 16 * 16);
                ControlFlow::Break(())
            }
            false => ControlFlow::Continue(()),
        });
        assert!(matches!(outcome, Err(Error::Cancelled)) && a.is_empty());
        a.prefill(&other).unwrap();
        for (s, want) in [(&mut b, &want[0]), (&mut a, &want[1])] {
            for want in want {
                assert!(bits(s.logits().unwrap()) == *want, "stopped at {stop_at}");
                s.decode(best(s)).unwrap();
            }
        }
        drop((a, b));
        assert_eq!(model.pool_usage().n_used, 0);
    }
}

/// A page that was full when it was offered, and is not any more since its call was taken back.
#[test]
fn a_page_that_is_taken_back_and_written_again_is_not_shared() {
    let model = model(&ModelOptions { page_len: 16, chunk: 8, ..options(1024) });
    let (first, second, third) = (prompt(5, 20), prompt(6, 40), prompt(7, 40));
    let (taken_back, written) = ([&first[..], &second].concat(), [&first[..], &third].concat());
    let mut a = session(&model);
    a.prefill(&first).unwrap();
    let stop =
        &mut |done, _| if done < 30 { ControlFlow::Continue(()) } else { ControlFlow::Break(()) };
    assert!(matches!(a.prefill_with(&second, stop), Err(Error::Cancelled)));
    a.prefill(&third).unwrap();
    for (tokens, n_shared) in [(&taken_back, 16), (&written, 48)] {
        let mut s = session(&model);
        s.prefill(tokens).unwrap();
        assert_eq!(s.receipt().n_shared, n_shared);
        let alone = run(&open(rounded(NAME, Dtype::BF16), &options(1024)), tokens, 0);
        assert!(bits(s.logits().unwrap()) == alone[0]);
    }
}

#[test]
fn a_prompt_that_shares_and_finds_no_room_stays_as_it_was() {
    let model = model(&ModelOptions { page_len: 16, chunk: 16, ..options(64) });
    let tokens = prompt(3, 33);
    let mut a = session(&model);
    a.prefill(&tokens).unwrap(); // three of four columns
    let n_used = model.pool_usage().n_used;
    let mut b = session(&model);
    b.feed(&[&tokens[..32], &prompt(4, 30)].concat()).unwrap();
    let step = |b: &mut Session| model.step(&mut [b]).remove(0);
    assert!(matches!(step(&mut b), Ok(Progress::Pending { done: 48, total: 62 })));
    for _ in 0..2 {
        assert!(matches!(step(&mut b), Err(Error::KvFull { .. })));
        assert_eq!((b.len(), b.receipt().n_shared), (48, 32));
    }
    b.clear_pending();
    b.truncate(0).unwrap();
    let mut c = session(&model);
    c.prefill(&prompt(8, 10)).unwrap(); // the last column
    b.feed(&tokens).unwrap();
    for _ in 0..2 {
        assert!(matches!(step(&mut b), Err(Error::KvFull { .. })));
        assert_eq!((b.len(), b.receipt().n_shared), (0, 32), "what it got from the first prompt");
        assert_eq!(model.pool_usage().n_used, n_used + model.plan().n_layers);
    }
    drop(c);
    assert!(matches!(step(&mut b), Ok(Progress::Ready)));
    assert!(bits(b.logits().unwrap()) == bits(a.logits().unwrap()));
}

/// Together they would fill the pool, and none would come to its end.
#[test]
fn prompts_that_do_not_fit_beside_each_other_go_one_after_the_other() {
    let model = model(&ModelOptions { page_len: 16, chunk: 16, ..options(64) });
    let mut all: Vec<Session> = (0..3).map(|_| session(&model)).collect();
    all.iter_mut().enumerate().for_each(|(i, s)| s.feed(&prompt(i, 40)).unwrap());
    for done in 0..3 {
        // Three of four columns; whoever is through gives them back.
        for n in 1..=3 {
            let order: Vec<usize> = (0..3).rev().collect();
            let progress = step_in(&model, &mut all, &order);
            let n_ready = progress.iter().filter(|&&p| p == Progress::Ready).count();
            assert_eq!(n_ready, usize::from(n == 3), "{done} were through before");
        }
        let through = all.iter_mut().find(|s| s.logits().is_some()).unwrap();
        through.truncate(0).unwrap();
    }
    assert_eq!(model.pool_usage().n_used, 0);
}

#[test]
fn weights_that_are_not_numbers_are_an_error() {
    let mut checkpoint = rounded(NAME, Dtype::BF16);
    let tensors = checkpoint.weights.tensors().map(|t| {
        let mut bytes = t.bytes.to_vec();
        if t.name == "norm.weight" {
            bytes[..2].copy_from_slice(&half::bf16::NAN.to_le_bytes());
        }
        (t.name.clone(), t.dtype, t.shape.clone(), bytes)
    });
    checkpoint.weights = loris::loader::Weights::from_memory(tensors.collect()).unwrap();
    let model = open(checkpoint, &options(256));
    let mut s = session(&model);
    assert!(matches!(s.prefill(&prompt(1, 5)), Err(Error::NonFinite { pos: 4, .. })));
    assert!(s.is_empty());
    assert_eq!(model.pool_usage().n_used, 0);
}

#[test]
fn the_fixture_answers_with_more_than_one_token() {
    // Guards the tests above: a model that always says the same would pass them all.
    let reference = reference(NAME);
    let mut s = session(&model(&options(256)));
    let mut bests = std::collections::BTreeSet::new();
    s.logits_of(&reference.tokens, &mut |_, logits| {
        bests.insert(argmax(logits));
    })
    .unwrap();
    assert!(bests.len() > 10, "{bests:?}");
}
