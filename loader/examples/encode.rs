//! Encodes texts: `encode FOLDER < TEXTS`, where each line of TEXTS is a text in JSON.
//!
//! For each it prints the ids as a prompt, with control tokens parsed, and as a user's text, and what the latter decode to,
//! in one line of JSON. `benches/peers/tokenizers` compares that with other tokenizers.

use std::error::Error;
use std::io::{BufRead, BufWriter, Write, stdin, stdout};
use std::path::PathBuf;

use loris_loader::{Special, Tokenizer};
use serde_json::json;

fn main() -> Result<(), Box<dyn Error>> {
    let dir = std::env::args().nth(1).map(PathBuf::from).ok_or("which folder?")?;
    let tokenizer = Tokenizer::open(&dir)?.ok_or("the folder has no tokenizer.json")?;
    let mut out = BufWriter::new(stdout());
    for line in stdin().lock().lines() {
        let text: String = serde_json::from_str(&line?)?;
        let prompt = tokenizer.encode_prompt(&text, Special::Parse).map_err(|err| err.to_string());
        let plain = tokenizer.encode(&text, Special::Plain).map_err(|err| err.to_string());
        let back =
            plain.as_ref().ok().map(|ids| tokenizer.decode(ids, Special::Plain)).transpose()?;
        writeln!(out, "{}", json!({"prompt": prompt, "plain": plain, "text": back}))?;
    }
    Ok(out.flush()?)
}
