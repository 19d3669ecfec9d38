//! The project's fixtures: checkpoints that `transformers` wrote, chats that it rendered, and the demo model's tokens
//! where the demo model has been fetched.
#![allow(clippy::unwrap_used, clippy::print_stderr)]

use std::path::{Path, PathBuf};

use loris_loader::{
    Chat, ChatTemplate, Error, LoadMode, Message, OpenOptions, RopeScaling, Special, TextStream,
    open,
};
use serde_json::Value;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures")
}

#[test]
fn checkpoints_of_transformers_open() {
    let names = [
        "llama-tied",
        "llama-untied",
        "llama-sharded",
        "llama3-rope",
        "llama-linear",
        "llama-yarn",
        "llama-dynamic",
        "mistral-window",
        "qwen2",
        "qwen3",
    ];
    for name in names {
        for load in [LoadMode::Mmap, LoadMode::Read] {
            let checkpoint = open(&fixtures().join(name), &OpenOptions { load }).unwrap();
            let (config, weights) = (&checkpoint.config, &checkpoint.weights);
            let embedding = weights
                .expect("model.embed_tokens.weight", &[config.vocab_size, config.hidden_dim]);
            assert_eq!(
                embedding.unwrap().bytes.len(),
                4 * config.vocab_size * config.hidden_dim,
                "{name}"
            );
            assert_eq!(weights.get("lm_head.weight").is_some(), !config.tied_embeddings, "{name}");
            let q = [config.n_q_heads * config.head_dim, config.hidden_dim];
            weights.expect("layers.0.self_attn.q_proj.weight", &q).unwrap();
            assert_eq!(
                weights.get("layers.0.self_attn.q_proj.bias").is_some(),
                config.qkv_bias,
                "{name}"
            );
            assert_eq!(
                weights.get("layers.0.self_attn.q_norm.weight").is_some(),
                config.qk_norm,
                "{name}"
            );
            assert_eq!(
                config.rope.scaling == RopeScaling::None,
                !name.contains("-rope")
                    && !name.contains("-linear")
                    && !name.contains("-yarn")
                    && !name.contains("-dynamic"),
                "{name}"
            );
            assert_eq!(
                config.windows.iter().all(Option::is_some),
                name == "mistral-window",
                "{name}"
            );
            assert!(checkpoint.tokenizer.is_none() && checkpoint.chat.is_none());
        }
    }
}

/// What the chat template of a row makes of its messages.
fn render(row: &Value) -> Result<String, Error> {
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let tokens =
        vec![("bos_token", text(&row["bos_token"])), ("eos_token", text(&row["eos_token"]))];
    let template =
        ChatTemplate::parse(row["template"].as_str().unwrap(), Path::new("template"), tokens)?;
    let messages = row["messages"].as_array().unwrap().iter();
    let messages: Vec<_> =
        messages.map(|m| Message::new(text(&m["role"]), text(&m["content"]))).collect();
    let add_generation_prompt = row["add_generation_prompt"].as_bool().unwrap();
    template.render(&Chat { add_generation_prompt, ..Chat::new(messages) })
}

#[test]
fn chats_render_as_in_transformers() {
    let file = std::fs::read(fixtures().join("smollm2/chat.json")).unwrap();
    let rows: Vec<Value> = serde_json::from_slice(&file).unwrap();
    let rows: Vec<_> = rows.iter().filter(|row| !row["template"].is_null()).collect();
    assert!(rows.len() > 50);
    for row in rows {
        match (render(row), row["text"].as_str()) {
            (Ok(rendered), Some(text)) => assert_eq!(rendered, text, "{row}"),
            (Err(err), None) => {
                assert!(err.to_string().contains(row["error"].as_str().unwrap()), "{err}");
            }
            (found, _) => panic!("{found:?}: {row}"),
        }
    }
}

#[test]
fn the_demo_model_gives_the_reference_tokens() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/SmolLM2-135M-Instruct");
    assert!(dir.is_dir(), "{} is missing: run scripts/fetch-model first", dir.display());
    let read = |name: &str| std::fs::read(fixtures().join("smollm2").join(name)).unwrap();
    let rows = |name: &str| serde_json::from_slice::<Vec<Value>>(&read(name)).unwrap();
    let ids = |value: &Value| -> Vec<u32> { serde_json::from_value(value.clone()).unwrap() };

    let checkpoint = open(&dir, &OpenOptions::default()).unwrap();
    let tokenizer = checkpoint.tokenizer.as_ref().unwrap();
    assert!(checkpoint.config.eos_ids.contains(&tokenizer.token_to_id("<|im_end|>").unwrap()));
    for row in rows("tokens.json") {
        let text = row["text"].as_str().unwrap();
        let parsed = tokenizer.encode(text, Special::Parse).unwrap();
        assert_eq!(parsed, ids(&row["ids"]), "{text:?}");
        assert_eq!(
            tokenizer.encode(text, Special::Plain).unwrap(),
            ids(&row["plain_ids"]),
            "{text:?}"
        );
        assert_eq!(tokenizer.decode(&parsed, Special::Plain).unwrap(), row["decoded"], "{text:?}");
        let mut stream = TextStream::new(tokenizer, Special::Parse);
        let mut streamed: String = parsed.iter().map(|&id| stream.push(id).unwrap()).collect();
        streamed.push_str(&stream.finish().unwrap());
        assert_eq!(streamed, row["decoded_skipping_special"], "{text:?}");
    }
    let chat = checkpoint.chat.as_ref().unwrap();
    for row in rows("chat.json").iter().filter(|row| row["template"].is_null()) {
        let messages: Vec<Message> = row["messages"]
            .as_array()
            .unwrap()
            .iter()
            .map(|m| Message::new(m["role"].as_str().unwrap(), m["content"].as_str().unwrap()))
            .collect();
        let prompt = row["add_generation_prompt"].as_bool().unwrap();
        let data = Chat { add_generation_prompt: prompt, ..Chat::new(messages) };
        assert_eq!(chat.render(&data).unwrap(), row["text"]);
        let encoded = chat.encode(tokenizer, &data).unwrap();
        let contents = data.messages.iter().filter_map(|m| m.get("content")?.as_str());
        let mut texts =
            contents.flat_map(|text| tokenizer.special_texts().iter().map(move |t| (text, t)));
        let hostile = texts.any(|(text, special)| text.contains(special.as_str()));
        let parsed = tokenizer.encode(row["text"].as_str().unwrap(), Special::Parse).unwrap();
        assert_eq!(encoded == parsed, !hostile, "{row}");
    }
}
