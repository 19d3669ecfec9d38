//! What the choice of a token costs beside the decode step before it.
//!
//! `cargo bench --bench sample [-- MODEL] [--threads N] [--n N] [--csv]` decodes an answer of `n` tokens behind a prompt, and
//! makes every token's choice by each of the settings in turn, on the same logits and history; the first one's is the token
//! that the answer goes on with. `share` is the median of the choice over the median of the decode step.
//! `--csv` adds the rows to `benches/record/cpu/sample.csv`.

#![allow(clippy::print_stdout, clippy::unwrap_used)]
#![allow(clippy::cast_precision_loss, clippy::cast_possible_truncation)]

use std::hint::black_box;
use std::time::{Duration, Instant};

use loris::loader::Special;
use loris::{Engine, EngineOptions, ModelOptions, Sampler, SamplerParams, SessionOptions};

use machine::{Machine, Options, ms};

mod machine;

/// What the prompt repeats.
const TEXT: &str = "A loris sat in a tree and told the others what the night had been like. ";
/// Tokens of the prompt.
const PROMPT: usize = 512;
/// Of the likeliest tokens.
const N_TOP: usize = 5;

/// First line of the record.
const HEADER: &str = "date,commit,cpu,features,threads,load,busy_elsewhere,model,choice,n,decode_ms,choice_ms,choice_p99_ms,share\n";

/// The settings that are measured.
fn settings() -> Vec<(&'static str, SamplerParams)> {
    let greedy = SamplerParams { seed: Some(1), ..SamplerParams::default() };
    let drawn = SamplerParams { temperature: 0.8, ..greedy.clone() };
    let top_p = SamplerParams { top_p: 0.95, ..drawn.clone() };
    let penalty = SamplerParams { repetition_penalty: 1.1, ..top_p.clone() };
    let all = SamplerParams {
        top_k: 50,
        min_p: 0.02,
        typical_p: 0.95,
        presence_penalty: 0.2,
        frequency_penalty: 0.2,
        logit_bias: (0..100).map(|id| (100 * id, -1.0)).collect(),
        ..penalty.clone()
    };
    let typical = SamplerParams { typical_p: 0.9, ..drawn.clone() };
    let hot = SamplerParams { temperature: 1.5, typical_p: 0.9, ..greedy.clone() };
    vec![
        ("temp 0.8 top-p 0.95 repeat-penalty 1.1", penalty),
        ("greedy", greedy),
        ("temp 0.8", drawn),
        ("temp 0.8 top-p 0.95", top_p),
        ("temp 0.8 typical-p 0.9", typical),
        ("temp 1.5 typical-p 0.9", hot),
        ("everything", all),
    ]
}

fn main() {
    let options = Options::parse("--n", 300_usize);
    let machine = Machine::at_rest();
    let threads = options.threads;
    let engine = Engine::new(&EngineOptions { threads: Some(threads), ..EngineOptions::default() });
    let model = engine.unwrap().open(&options.model, &ModelOptions::default()).unwrap();
    println!("{threads} threads, {machine}");
    let tokenizer = model.tokenizer().unwrap();
    let mut prompt = tokenizer.encode(&TEXT.repeat(PROMPT / 8), Special::Plain).unwrap();
    prompt.truncate(PROMPT);
    let mut session = model.session(&SessionOptions::default()).unwrap();
    session.prefill(&prompt).unwrap();

    let settings = settings();
    let mut samplers: Vec<Sampler> =
        settings.iter().map(|(_, params)| model.sampler(params.clone()).unwrap()).collect();
    let vocab_size = model.config().vocab_size;
    let allowed = vec![0x7fff_ffff_u32; vocab_size.div_ceil(32)];
    let mut times = vec![Vec::new(); settings.len() + 2];
    let mut decodes = Vec::new();
    for _ in 0..options.count {
        let mut next = 0;
        let logits = session.logits().unwrap();
        for (idx, sampler) in samplers.iter_mut().enumerate() {
            let begun = Instant::now();
            let id = black_box(sampler.sample(logits, session.history()));
            times[idx].push(begun.elapsed());
            next = if idx == 0 { id } else { next };
        }
        let begun = Instant::now();
        black_box(samplers[0].sample_masked(logits, session.history(), &allowed).unwrap());
        times[settings.len()].push(begun.elapsed());
        let begun = Instant::now();
        black_box(session.log_softmax().unwrap().logprobs(next, N_TOP).unwrap());
        times[settings.len() + 1].push(begun.elapsed());
        let begun = Instant::now();
        session.decode(next).unwrap();
        decodes.push(begun.elapsed());
    }
    let decode = quantile(&mut decodes, 0.5);
    let name = options.model.file_name().unwrap().to_string_lossy().to_lowercase();
    let names = settings.iter().map(|(name, _)| (*name).to_owned());
    let masked = format!("{}, masked", settings[0].0);
    for (name_of, times) in
        names.chain([masked, format!("log-softmax, {N_TOP} likeliest")]).zip(&mut times)
    {
        let (p50, p99) = (quantile(times, 0.5), quantile(times, 0.99));
        let share = p50.as_secs_f64() / decode.as_secs_f64();
        println!(
            "{name_of:<48} p50 {:>7.4} ms, p99 {:>7.4} ms, {:>5.2} % of a step of {:.3} ms",
            ms(p50),
            ms(p99),
            100.0 * share,
            ms(decode)
        );
        if options.csv {
            let row = format!(
                "{},{name},{name_of:?},{},{:.3},{:.4},{:.4},{share:.4}",
                machine.columns(threads),
                options.count,
                ms(decode),
                ms(p50),
                ms(p99)
            );
            machine::add_row("sample.csv", HEADER, &row);
        }
    }
}

fn quantile(times: &mut [Duration], q: f64) -> Duration {
    times.sort();
    times[((times.len() - 1) as f64 * q).round() as usize]
}
