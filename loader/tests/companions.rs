//! The files beside tokenizer.json, as `transformers` reads them.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Folder, byte_tokenizer, llama_tokenizer};
use loris_loader::{Chat, ChatTemplate, Error, Message, Special, Tokenizer};
use serde_json::{Value, json};

/// Shows the named tokens that the fixture knows.
const NAMES: &str =
    "{{ bos_token }}|{{ eos_token }}|{{ unk_token }}|{{ pad_token }}|{{ image_token }}";

/// A folder with this tokenizer and these files beside it.
fn folder(tokenizer: &Value, files: &Value) -> Folder {
    let folder = Folder::tiny();
    folder.write("tokenizer.json", tokenizer.to_string());
    folder.write("chat_template.jinja", NAMES);
    for (name, content) in files.as_object().unwrap() {
        folder.write(name, content.to_string());
    }
    folder
}

fn open(folder: &Folder) -> Result<Tokenizer, Error> {
    Tokenizer::open(folder.path()).map(Option::unwrap)
}

fn names(folder: &Folder) -> Result<String, Error> {
    ChatTemplate::open(folder.path())
        .unwrap()
        .unwrap()
        .render(&Chat::new([Message::new("user", "")]))
}

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap()
}

#[test]
fn companions_are_read_as_in_transformers() {
    let file: Value = serde_json::from_str(include_str!("fixtures/companions.json")).unwrap();
    let cases = file["cases"].as_array().unwrap();
    let mut refused = 0;
    for case in cases {
        let folder = folder(&file["tokenizer"], &case["files"]);
        let tokenizer = open(&folder);
        let moved = case["moved"].as_array().is_some_and(|moved| !moved.is_empty());
        if case["error"].is_string() || moved {
            let error = tokenizer.map(|_| ()).expect_err(&case["name"].to_string());
            assert!(matches!(error, Error::Value { .. }), "{}: {error}", case["name"]);
            refused += 1;
            continue;
        }
        let tokenizer = tokenizer.unwrap_or_else(|error| panic!("{case}: {error}"));
        for (text, expected) in
            file["texts"].as_array().unwrap().iter().zip(case["ids"].as_array().unwrap())
        {
            let found = tokenizer.encode(text.as_str().unwrap(), Special::Parse).unwrap();
            assert_eq!(found, ids(expected), "{text}: {}", case);
        }
        assert_eq!(
            tokenizer.encode_prompt("hi", Special::Parse).unwrap(),
            ids(&case["prompt"]),
            "{case}"
        );
        let text = |name: &str| case["named"][name].as_str().unwrap_or("");
        let expected =
            ["bos_token", "eos_token", "unk_token", "pad_token", "image_token"].map(text);
        assert_eq!(names(&folder).unwrap(), expected.join("|"), "{case}");
    }
    assert!(cases.len() > 150 && refused > 10 && refused < 40, "{refused} of {}", cases.len());
}

fn with_config(tokenizer: &Value, config: Value) -> Folder {
    folder(tokenizer, &json!({"tokenizer_config.json": config}))
}

#[test]
fn what_changes_prompts_and_is_not_done_is_refused_by_name() {
    for (key, value) in [
        ("split_special_tokens", json!(true)),
        ("fix_mistral_regex", json!(true)),
        ("post_processor", json!({"type": "ByteLevel"})),
        ("tokenizer_object", json!({"version": "1.0"})),
        ("gguf_file", json!("model.gguf")),
        ("cls", json!("<s>")),
        ("clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", json!(1)),
        ("fast_tokenizer_files", json!(["tokenizer.4.0.0.json"])),
    ] {
        let mut config = json!({});
        config[key] = value;
        let error = open(&with_config(&byte_tokenizer(), config)).map(|_| ()).unwrap_err();
        assert!(matches!(error, Error::Unsupported { .. }), "{error}");
        let message = error.to_string();
        assert!(message.contains(key) && message.contains("tokenizer_config.json"), "{message}");
        let absent = [Value::Null, if key.ends_with("_files") { json!([]) } else { json!(false) }];
        for off in absent {
            let mut config = json!({});
            config[key] = off;
            open(&with_config(&byte_tokenizer(), config)).unwrap();
        }
    }
    let words = json!({"version": "1.0", "added_tokens": [], "model": {
        "type": "WordLevel", "unk_token": "a", "vocab": {"a": 0}}});
    let clean = json!({"clean_up_tokenization_spaces": true});
    assert!(open(&with_config(&words, clean.clone())).is_err());
    open(&with_config(&byte_tokenizer(), clean)).unwrap();
}

#[test]
fn an_id_that_disagrees_is_refused_and_both_files_are_named() {
    let token = json!({"content": "<new>", "special": true});
    let folder = with_config(&byte_tokenizer(), json!({"added_tokens_decoder": {"300": token}}));
    let message = open(&folder).map(|_| ()).unwrap_err().to_string();
    for part in ["tokenizer_config.json", "added_tokens_decoder.300", "id 259", "tokenizer.json"] {
        assert!(message.contains(part), "{message}");
    }
}

fn encode(tokenizer: &Value, config: Value, text: &str) -> Vec<u32> {
    open(&with_config(tokenizer, config)).unwrap().encode(text, Special::Parse).unwrap()
}

#[test]
fn a_space_is_put_before_texts_where_the_class_does_that() {
    let space = 32; // in this vocabulary bytes have their own number
    let hi = [space, 104, 105];
    let yes = |class: &str| json!({"tokenizer_class": class, "add_prefix_space": true});
    for class in ["Qwen2Tokenizer", "Qwen2TokenizerFast", "GPT2Tokenizer"] {
        assert_eq!(encode(&byte_tokenizer(), yes(class), "hi"), hi);
        assert_eq!(encode(&byte_tokenizer(), json!({"tokenizer_class": class}), "hi"), hi[1..]);
    }
    // Classes that take tokenizer.json as it is, and byte-level tokenizers that are called Llama's.
    for class in ["PreTrainedTokenizerFast", "TokenizersBackend", "LlamaTokenizerFast"] {
        assert_eq!(encode(&byte_tokenizer(), yes(class), "hi"), hi[1..]);
    }
    // The family of model has a class of its own.
    let folder = with_config(&byte_tokenizer(), yes("PreTrainedTokenizerFast"));
    folder.write("config.json", r#"{"model_type": "qwen2"}"#);
    assert_eq!(open(&folder).unwrap().encode("hi", Special::Parse).unwrap(), hi);
    folder
        .write("config.json", r#"{"model_type": "mistral", "tokenizer_class": "Qwen2Tokenizer"}"#);
    assert_eq!(open(&folder).unwrap().encode("hi", Special::Parse).unwrap(), hi[1..]);
}

/// `transformers` 5 makes a Llama 2 tokenizer up anew: it gives [3, 4, 5, 1, 4, 5] for the second text, without the
/// space after the special token that the model was trained with. tokenizer.json is followed.
#[test]
fn llama_2_is_what_its_tokenizer_json_says() {
    let llama2 = llama_tokenizer("\u{2581}", &json!([]));
    let class = |more: Value| {
        let mut config = json!({"tokenizer_class": "LlamaTokenizer", "legacy": false});
        config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        config
    };
    for more in [json!({}), json!({"add_prefix_space": null}), json!({"add_prefix_space": true})] {
        assert_eq!(encode(&llama2, class(more.clone()), "hi"), [3, 4, 5]);
        assert_eq!(encode(&llama2, class(more), "hi<s>hi"), [3, 4, 5, 1, 3, 4, 5]);
    }
    // What is put around a prompt is tokenizer.json's too, as in the reference.
    let no_bos = class(json!({"add_bos_token": false, "add_eos_token": true}));
    let folder = with_config(&llama2, no_bos);
    let prompt = open(&folder).unwrap().encode_prompt("hi", Special::Parse).unwrap();
    assert_eq!(prompt, [1, 3, 4, 5]);
    // The class has names where no file says any, but null is something said.
    assert_eq!(names(&folder).unwrap(), "<s>|</s>|<unk>||");
    let folder = with_config(&llama2, class(json!({"bos_token": null})));
    assert_eq!(names(&folder).unwrap(), "|</s>|<unk>||");
    // No space where the file beside it says so; then none is taken from the answer either.
    let tokenizer = open(&with_config(&llama2, class(json!({"add_prefix_space": false})))).unwrap();
    assert_eq!(tokenizer.encode("hi", Special::Parse).unwrap(), [4, 5]);
    assert_eq!(tokenizer.decode(&[3, 4, 5], Special::Plain).unwrap(), " hi");
}
