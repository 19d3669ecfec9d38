//! Where an answer ends, and its text across calls: on a model whose next token follows from the last by a list.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::Path;

use loris::loader::{Checkpoint, Dtype, ModelConfig, Tokenizer, Weights};
use loris::{
    Error, Finish, GenerateOptions, Model, ModelOptions, Sampler, SamplerParams, Session,
    SessionOptions, StreamOptions, generate, generate_masked,
};
use serde_json::json;

mod support;

const SPECIAL: [&str; 4] = ["<unk>", "<s>", "</s>", "<|im_end|>"];
const EOS: u32 = 2;
const IM_END: u32 = 3;

/// The id of a byte.
fn id(byte: u8) -> u32 {
    SPECIAL.len() as u32 + u32::from(byte)
}

/// The character that byte-level tokenizers write a byte as.
fn symbol(byte: u8) -> char {
    let is_plain = |b: u8| matches!(b, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    let n_before = (0..byte).filter(|&b| !is_plain(b)).count() as u32;
    let code = if is_plain(byte) { u32::from(byte) } else { 256 + n_before };
    char::from_u32(code).unwrap()
}

/// One token a byte, and special ones.
fn tokenizer() -> Tokenizer {
    let special = (0..).zip(SPECIAL).map(|(id, text): (u32, _)| (text.to_owned(), id));
    let bytes = (0..=255).map(|byte| (symbol(byte).to_string(), id(byte)));
    let vocab: BTreeMap<String, u32> = special.chain(bytes).collect();
    let added: Vec<_> = (0..SPECIAL.len())
        .map(|id| {
            json!({ "id": id, "content": SPECIAL[id], "special": true, "single_word": false,
            "lstrip": false, "rstrip": false, "normalized": false })
        })
        .collect();
    let level = json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true });
    let file = json!({
        "version": "1.0", "added_tokens": added, "pre_tokenizer": level, "decoder": level,
        "model": { "type": "BPE", "vocab": vocab, "merges": [] },
    });
    Tokenizer::parse(file.to_string().as_bytes(), Path::new("tokenizer.json")).unwrap()
}

/// A model that goes from each token of the script to the next, whatever came before, and from others to EOS. (A residual
/// stream that nothing adds to, and a head that maps one unit vector to another.)
fn scripted(script: &[u32], options: &ModelOptions) -> Model {
    const VOCAB: usize = 260;
    const WIDTH: usize = 288;
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "hidden_size": WIDTH, "intermediate_size": 32,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32,
        "vocab_size": VOCAB, "max_position_embeddings": 512, "eos_token_id": EOS,
    });
    let config =
        ModelConfig::parse(config.to_string().as_bytes(), Path::new("config.json")).unwrap();
    let mut embedding = vec![0_f32; VOCAB * WIDTH];
    (0..VOCAB).for_each(|id| embedding[id * WIDTH + id] = 1.0);
    let mut next = vec![EOS; VOCAB];
    script.windows(2).for_each(|pair| next[pair[0] as usize] = pair[1]);
    let mut head = vec![0_f32; VOCAB * WIDTH];
    (0..VOCAB).for_each(|id| head[next[id] as usize * WIDTH + id] = 10.0);
    let small = |n: usize| vec![0.01_f32; n];
    let (ones, zeros) = (|n: usize| vec![1_f32; n], |n: usize| vec![0_f32; n]);
    let tensors = [
        ("embed_tokens.weight", vec![VOCAB, WIDTH], embedding),
        ("lm_head.weight", vec![VOCAB, WIDTH], head),
        ("norm.weight", vec![WIDTH], ones(WIDTH)),
        ("layers.0.input_layernorm.weight", vec![WIDTH], ones(WIDTH)),
        ("layers.0.post_attention_layernorm.weight", vec![WIDTH], ones(WIDTH)),
        ("layers.0.self_attn.q_proj.weight", vec![64, WIDTH], small(64 * WIDTH)),
        ("layers.0.self_attn.k_proj.weight", vec![32, WIDTH], small(32 * WIDTH)),
        ("layers.0.self_attn.v_proj.weight", vec![32, WIDTH], small(32 * WIDTH)),
        ("layers.0.self_attn.o_proj.weight", vec![WIDTH, 64], zeros(WIDTH * 64)),
        ("layers.0.mlp.gate_proj.weight", vec![32, WIDTH], small(32 * WIDTH)),
        ("layers.0.mlp.up_proj.weight", vec![32, WIDTH], small(32 * WIDTH)),
        ("layers.0.mlp.down_proj.weight", vec![WIDTH, 32], zeros(WIDTH * 32)),
    ]
    .into_iter()
    .map(|(name, shape, floats)| {
        let bytes: Vec<u8> = floats.into_iter().flat_map(f32::to_le_bytes).collect();
        (name.to_owned(), Dtype::F32, shape, bytes)
    });
    let checkpoint = Checkpoint {
        dir: "scripted".into(),
        config,
        weights: Weights::from_memory(tensors.collect()).unwrap(),
        tokenizer: Some(tokenizer()),
        chat: None,
        warnings: Vec::new(),
    };
    support::open(checkpoint, options)
}

/// `Q`, the bytes of a text with special tokens as `\u{1}` (`<|im_end|>`), and the end.
fn script(text: &str) -> Vec<u32> {
    let bytes = text.bytes().map(|byte| if byte == 1 { IM_END } else { id(byte) });
    std::iter::once(id(b'Q')).chain(bytes).chain([EOS]).collect()
}

fn session(model: &Model) -> Session {
    let mut session = model.session(&SessionOptions::default()).unwrap();
    session.prefill(&[id(b'Q')]).unwrap();
    session
}

fn greedy(model: &Model) -> Sampler {
    model.sampler(SamplerParams::default()).unwrap()
}

/// What is shown of an answer, and why it ended.
fn answer(session: &mut Session, options: &GenerateOptions) -> (String, Finish) {
    let mut sampler = greedy(session.model());
    let mut text = String::new();
    let finish = generate(session, &mut sampler, options, &mut |token| {
        text.push_str(token.text);
        ControlFlow::Continue(())
    });
    (text, finish.unwrap())
}

fn stops(texts: &[&str]) -> GenerateOptions {
    let stop = texts.iter().map(|&text| text.to_owned()).collect();
    GenerateOptions { stop, ..GenerateOptions::default() }
}

#[test]
fn stop_texts_may_hold_special_tokens_which_are_not_shown() {
    let model = scripted(&script("hi\u{1}xy"), &support::options(512));
    let all = |options: &GenerateOptions| answer(&mut session(&model), options);
    assert_eq!(all(&stops(&[])), ("hixy".into(), Finish::Eos));
    assert_eq!(all(&stops(&["<|im_end|>"])), ("hi".into(), Finish::Stop));
    assert_eq!(all(&stops(&["i<|im_end|>x"])), ("h".into(), Finish::Stop));
    assert_eq!(all(&stops(&["end|>x"])), ("hi".into(), Finish::Stop));
    assert_eq!(all(&stops(&["ix"])), ("hixy".into(), Finish::Eos), "the special token is between");
    assert_eq!(all(&stops(&["<|im_start|>", "y"])), ("hix".into(), Finish::Stop));
    let keeps = GenerateOptions { keep_stop: true, ..stops(&["i<|im_end|>x"]) };
    assert_eq!(all(&keeps), ("hix".into(), Finish::Stop), "and stay silent");
}

#[test]
fn a_kept_stop_text_is_the_end_of_the_answer() {
    let model = scripted(&script("abcd"), &support::options(512));
    for (stop, without, with) in [
        (&["bc"][..], "a", "abc"),
        (&["bcd", "bc"], "a", "abc"),
        (&["c", "bc"], "a", "abc"),
        (&["d"], "abc", "abcd"),
    ] {
        assert_eq!(answer(&mut session(&model), &stops(stop)), (without.into(), Finish::Stop));
        let keeps = GenerateOptions { keep_stop: true, ..stops(stop) };
        assert_eq!(answer(&mut session(&model), &keeps), (with.into(), Finish::Stop), "{stop:?}");
    }
}

#[test]
fn stop_ids_end_an_answer_and_are_not_held() {
    let model = scripted(&script("abc\u{1}d"), &support::options(512));
    for (stop_ids, text) in
        [(vec![IM_END], "abc"), (vec![id(b'z'), id(b'b')], "a"), (vec![id(b'a')], "")]
    {
        let mut session = session(&model);
        let options = GenerateOptions { stop_ids, ..GenerateOptions::default() };
        assert_eq!(answer(&mut session, &options), (text.into(), Finish::Stop));
        assert_eq!(session.answer(), text.bytes().map(id).collect::<Vec<_>>());
    }
}

/// Before `min_tokens` nothing ends an answer: the likeliest token that would not is taken, and stop texts go by.
#[test]
fn an_answer_has_its_least_length() {
    let model = scripted(&script("abcd"), &support::options(512));
    for min_tokens in 0..=4 {
        let options = GenerateOptions { min_tokens, ..stops(&["b", "d"]) };
        let text = ["a", "a", "abc", "abc", "abcd"][min_tokens];
        let finish = if min_tokens < 4 { Finish::Stop } else { Finish::Eos };
        assert_eq!(answer(&mut session(&model), &options), (text.into(), finish), "{min_tokens}");
    }
    let ends = [EOS, id(b'b')];
    for (min_tokens, max_tokens) in [(0, 9), (1, 9), (3, 9), (7, 7)] {
        let mut session = session(&model);
        let options = GenerateOptions {
            min_tokens,
            max_tokens,
            stop_ids: ends.to_vec(),
            ..GenerateOptions::default()
        };
        answer(&mut session, &options);
        let held = session.answer();
        assert!(held.len() >= min_tokens, "{min_tokens}: {held:?}");
        assert!(held[..min_tokens].iter().all(|id| !ends.contains(id)), "{min_tokens}: {held:?}");
    }
    let options = GenerateOptions { min_tokens: 8, max_tokens: 7, ..GenerateOptions::default() };
    let refused = generate(&mut session(&model), &mut greedy(&model), &options, &mut |_| {
        ControlFlow::Continue(())
    });
    assert!(matches!(refused, Err(Error::Option { name: "min-tokens", .. })), "{refused:?}");
}

/// An answer in two calls, with the session saved between them or not, has the text that it has in one.
#[test]
fn an_answer_that_goes_on_continues_its_text() {
    let whole = "a\u{1f600}b \u{e9}\u{4e2d}";
    let model = scripted(&script(whole), &support::options(4096));
    for n in 0..whole.len() {
        for is_saved in [false, true] {
            let mut session = session(&model);
            let options = GenerateOptions { max_tokens: n, ..GenerateOptions::default() };
            let (first, finish) = answer(&mut session, &options);
            assert_eq!(finish, Finish::Length);
            assert_eq!(session.answer().len(), n);
            if is_saved {
                let mut state = Vec::new();
                session.save(&mut state).unwrap();
                assert_eq!(state.len(), session.saved_bytes().unwrap());
                session = model.restore(&mut &state[..], &SessionOptions::default()).unwrap();
            }
            let (rest, finish) = answer(&mut session, &GenerateOptions::default());
            assert_eq!((first + &rest, finish), (whole.to_owned(), Finish::Eos), "{n}");
        }
    }
    // A prompt ends it: what comes behind is another answer.
    let mut session = session(&model);
    let options = GenerateOptions { max_tokens: 2, ..GenerateOptions::default() };
    assert_eq!(answer(&mut session, &options).0, "a");
    session.prefill(&[id(b'b')]).unwrap();
    assert!(session.answer().is_empty());
    assert_eq!(answer(&mut session, &GenerateOptions::default()).0, &whole[6..]);
    session.truncate(2).unwrap();
    assert!(session.answer().is_empty());
}

/// A penalty in a stream counts what the stream sees, which does not depend on its pages.
#[test]
fn a_penalty_in_a_stream_does_not_know_pages() {
    let answers: Vec<Vec<u32>> = [16, 64, 256]
        .into_iter()
        .map(|page_len| {
            let options = ModelOptions { page_len, ..support::options(9999) };
            let model = support::open(support::checkpoint("llama-tied"), &options);
            let n_vocab = model.config().vocab_size as u32;
            let stream = Some(StreamOptions { sink: 4, window: 60 });
            let mut session =
                model.session(&SessionOptions { stream, ..SessionOptions::default() }).unwrap();
            let prompt: Vec<u32> = (0..500).map(|i| i * 7919 % n_vocab).collect();
            session.prefill(&prompt).unwrap();
            assert_eq!(session.history().tokens, [&prompt[..4], &prompt[440..]]);
            let params = SamplerParams { repetition_penalty: 1.3, ..SamplerParams::default() };
            let mut sampler = model.sampler(params).unwrap();
            let options =
                GenerateOptions { max_tokens: 40, ignore_eos: true, ..GenerateOptions::default() };
            let mut ids = Vec::new();
            generate(&mut session, &mut sampler, &options, &mut |token| {
                ids.push(token.id);
                ControlFlow::Continue(())
            })
            .unwrap();
            ids
        })
        .collect();
    assert_eq!(answers[0].len(), 40);
    assert!(answers.iter().all(|ids| *ids == answers[0]), "{answers:?}");
}

/// A model opened with nothing said has room for the longest stream that it takes.
#[test]
fn the_default_pool_holds_a_stream() {
    let model = scripted(&script("abc"), &ModelOptions::default());
    let stream = Some(StreamOptions { sink: 4, window: 508 });
    let mut session =
        model.session(&SessionOptions { stream, ..SessionOptions::default() }).unwrap();
    session.prefill(&[id(b'Q'); 2000]).unwrap();
    assert_eq!(answer(&mut session, &GenerateOptions::default()), ("abc".into(), Finish::Eos));
}

/// Allows these tokens.
fn allow(allowed: &mut [u32], ids: impl IntoIterator<Item = u32>) {
    ids.into_iter().for_each(|id| allowed[id as usize / 32] |= 1 << (id % 32));
}

/// A mask's answer: what is shown, and why it ended.
fn masked(
    session: &mut Session,
    options: &GenerateOptions,
    mut mask: impl FnMut(&[u32], &mut [u32]) -> Result<(), String>,
) -> (String, Result<Finish, Error>) {
    let mut sampler = greedy(session.model());
    let mut text = String::new();
    let finish = generate_masked(session, &mut sampler, options, &mut mask, &mut |token| {
        text.push_str(token.text);
        ControlFlow::Continue(())
    });
    (text, finish)
}

fn fails(what: &str) -> Result<(), String> {
    Err(what.into())
}

#[test]
fn a_mask_is_asked_before_each_token_with_the_answer_so_far() {
    let model = scripted(&script("abcdef"), &support::options(512));
    let everything = |allowed: &mut [u32]| allowed.fill(u32::MAX);
    // The last word has 4 of 32 tokens; bits beyond the vocabulary mean nothing.
    let mut asked = Vec::new();
    let mut session = session(&model);
    let options = GenerateOptions { max_tokens: 3, ..GenerateOptions::default() };
    for (text, finish) in [("abc", Finish::Length), ("def", Finish::Length), ("", Finish::Eos)] {
        let got = masked(&mut session, &options, |answer, allowed| {
            assert!(allowed.len() == 9 && allowed.iter().all(|&word| word == 0));
            asked.push(answer.to_vec());
            everything(allowed);
            Ok(())
        });
        assert_eq!((got.0, got.1.unwrap()), (text.into(), finish));
    }
    let whole: Vec<u32> = "abcdef".bytes().map(id).collect();
    // An answer that goes on is asked for as a whole; behind the last token of a call nobody is asked.
    let lens = [0, 1, 2, 3, 4, 5, 6];
    assert_eq!(asked, lens.map(|n| whole[..n].to_vec()));

    // What it forbids is passed over for the likeliest that is left: here the first of equals.
    let mut other = self::session(&model);
    let got = masked(&mut other, &options, |answer, allowed| {
        match answer.len() {
            1 => allow(allowed, [id(b'x'), id(b'y')]),
            _ => everything(allowed),
        }
        Ok(())
    });
    assert_eq!((got.0.as_str(), got.1.unwrap()), ("ax", Finish::Eos));
    assert_eq!(other.answer(), [id(b'a'), id(b'x')]);
}

/// What a mask does not give: the session is as it was before the token, and the answer goes on from there.
#[test]
fn a_mask_that_fails_or_allows_nothing_ends_the_answer_before_the_token() {
    let model = scripted(&script("abcdef"), &support::options(512));
    let options = GenerateOptions::default();
    for n in 0..6 {
        for dead_end in [false, true] {
            let mut session = session(&model);
            let (text, finish) = masked(&mut session, &options, |answer, allowed| {
                match (answer.len() == n, dead_end) {
                    (false, _) => allowed.fill(u32::MAX),
                    (true, false) => return fails("no more"),
                    (true, true) => allowed[8] = !0 << 4, // no token of the model
                }
                Ok(())
            });
            assert_eq!(text, "abcdef"[..n], "{n}");
            match (finish, dead_end) {
                (Ok(Finish::DeadEnd), true) => {}
                (Err(Error::TokenMask { reason }), false) => assert_eq!(reason, "no more"),
                other => panic!("{n}: {other:?}"),
            }
            assert_eq!(session.answer(), "abcdef"[..n].bytes().map(id).collect::<Vec<_>>());
            assert_eq!(answer(&mut session, &options), ("abcdef"[n..].into(), Finish::Eos), "{n}");
        }
    }
    // A stop text that the last token completes comes first.
    let (text, finish) = masked(&mut session(&model), &stops(&["bc"]), |answer, allowed| {
        allowed.fill(u32::MAX);
        if answer.len() < 3 { Ok(()) } else { fails("too late") }
    });
    assert_eq!((text.as_str(), finish.unwrap()), ("a", Finish::Stop));
}

/// A random answer that is interrupted by masks that fail is the one that would have come without.
#[test]
fn the_random_sequence_does_not_move_where_a_mask_fails() {
    let model = support::open(support::checkpoint("llama-tied"), &support::options(192));
    let params = SamplerParams { temperature: 1.0, seed: Some(3), ..SamplerParams::default() };
    let run = |fails_at: &[usize]| {
        let mut session = model.session(&SessionOptions::default()).unwrap();
        session.prefill(&[9, 8, 7]).unwrap();
        let mut sampler = model.sampler(params.clone()).unwrap();
        let mut left = fails_at.to_vec();
        while session.answer().len() < 20 {
            let options = GenerateOptions {
                max_tokens: 20 - session.answer().len(),
                ignore_eos: true,
                ..GenerateOptions::default()
            };
            let mut mask = |answer: &[u32], allowed: &mut [u32]| {
                allowed.fill(0x5555_5555);
                match left.iter().position(|&n| n == answer.len()) {
                    Some(at) => fails(&left.swap_remove(at).to_string()),
                    None => Ok(()),
                }
            };
            let mut go_on = |_: loris::Token<'_>| ControlFlow::Continue(());
            let _ = generate_masked(&mut session, &mut sampler, &options, &mut mask, &mut go_on);
        }
        session.answer().to_vec()
    };
    let whole = run(&[]);
    assert!(whole.iter().all(|id| id % 2 == 0), "{whole:?}");
    assert_eq!(run(&[0, 1, 7, 8, 19]), whole);
}

/// `min_tokens` and a mask together: what ends the answer waits, and where nothing else is allowed that is a dead end.
#[test]
fn masks_go_together_with_the_least_length() {
    let model = scripted(&script("ab"), &support::options(512));
    let options = GenerateOptions { min_tokens: 3, ..GenerateOptions::default() };
    let (text, finish) = masked(&mut session(&model), &options, |answer, allowed| {
        allow(allowed, [EOS, id(b'a') + answer.len() as u32]);
        Ok(())
    });
    assert_eq!((text.as_str(), finish.unwrap()), ("abc", Finish::Eos));
    let (text, finish) = masked(&mut session(&model), &options, |answer, allowed| {
        allow(allowed, if answer.is_empty() { vec![id(b'a')] } else { vec![EOS] });
        Ok(())
    });
    assert_eq!((text.as_str(), finish.unwrap()), ("a", Finish::DeadEnd));
}
