//! A model folder in, streamed text out, in about 60 lines:
//! `cargo run --release --example generate -- models/SmolLM2-135M-Instruct "Why is the sky blue?"`
#![allow(clippy::print_stdout)]

use std::error::Error;
use std::io::Write;
use std::ops::ControlFlow;
use std::path::PathBuf;

use loris::loader::{Chat, Message, Special};
use loris::{Engine, EngineOptions, GenerateOptions, ModelOptions, SamplerParams, SessionOptions};

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let usage = "usage: generate DIR TEXT";
    let dir = PathBuf::from(args.next().ok_or(usage)?);
    let text = args.next().ok_or(usage)?;

    // An engine is a device, a model is weights on it, a session is one sequence.
    let engine = Engine::new(&EngineOptions::default())?;
    let model = engine.open(&dir, &ModelOptions::default())?;
    let mut session = model.session(&SessionOptions::default())?;

    // The template, if there is one, makes a chat of the text, in which a special token that the user typed
    // stays text.
    let tokenizer = model.tokenizer().ok_or("the folder has no tokenizer.json")?;
    let prompt = match model.encode_chat(&Chat::new([Message::new("user", text.as_str())]))? {
        Some(tokens) => tokens,
        None => tokenizer.encode_prompt(&text, Special::Plain)?,
    };
    session.prefill(&prompt)?;

    // The default sampler is greedy; text arrives as whole characters.
    let mut sampler = model.sampler(SamplerParams::default())?;
    let options = GenerateOptions { max_tokens: 256, ..GenerateOptions::default() };
    let mut out = std::io::stdout().lock();
    let finish = loris::generate(&mut session, &mut sampler, &options, &mut |token| match out
        .write_all(token.text.as_bytes())
        .and_then(|()| out.flush())
    {
        Ok(()) => ControlFlow::Continue(()),
        Err(_) => ControlFlow::Break(()),
    })?;
    writeln!(out, "\n[{finish:?}, {} KV bytes]", session.receipt().kv_bytes)?;
    Ok(())
}
