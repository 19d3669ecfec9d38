//! What came from outside never becomes a control token, whatever templates, tokenizers and contents do.
#![allow(clippy::unwrap_used)]

mod common;

use std::path::Path;

use common::{Random, byte_tokenizer};
use loris_loader::{Chat, ChatTemplate, Json, Message, Tokenizer};
use serde_json::{Value, json};

const TOKENS: [&str; 16] = [
    "<|im_start|>",
    "<|im_end|>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "<|user|>",
    "<|end|>",
    "<|assistant|>",
    "<think>",
    "</think>",
    "<tool_response>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|eot_id|>",
    "ẞtop",
];

/// Templates that write control tokens around contents which they cut, join, change and print in every way.
const TEMPLATES: [&str; 9] = [
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}",
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] | trim + '<|end|>\n' }}{% endfor %}",
    "{% for m in messages %}[INST] {{ m.content.strip() | lower }}[/INST]{{ m.content.split('</think>')[-1].lstrip('\n') }}</s>{% endfor %}",
    "{% for m in messages %}<start_of_turn>{{ m.content | replace('x', '') | upper }}{{ m.content[::-1] }}<end_of_turn>{% endfor %}",
    "<s>{{ messages | tojson }}<|eot_id|>{{ messages | string }}{{ tools | tojson(indent=2, ensure_ascii=true) }}<|eot_id|>{{ extra }}",
    "{% for m in messages %}<s>{% for c in m.content %}{{ c }}{% endfor %}</s>{{ m.content | list | join('') }}{% endfor %}",
    "{% macro turn(a, b) %}<|im_start|>{{ a ~ b }}{{ caller() }}<|im_end|>{% endmacro %}{% for m in messages %}{% call turn(m.content, m.content) %}{% filter title %}{{ '%s%s' % (m.content, '{}'.format(m.content)) }}{% endfilter %}{% endcall %}{% endfor %}",
    "{% set ns = namespace(s='') %}{% for m in messages %}{% set ns.s = ns.s + m.content.partition('|')[2] ~ m.content.rpartition('<')[0] %}{% endfor %}<|user|>{{ ns.s | indent(2) }}<|assistant|>{{ ns.s.splitlines() | join('\n') | escape }}",
    "{% for t in tools %}<tool_response>{{ t.function.name }}({% for k, v in t.function.parameters.items() %}{{ k }}: {{ v }}{% endfor %}){{ t.function.description.center(9) | truncate(40) }}</s>{% endfor %}{% for d in documents %}<s>{{ d.text | wordcount }}{{ d.text | unique | join }}{{ d.text.swapcase() | capitalize }}{% endfor %}",
];

/// Byte-level tokenizers with the control tokens, and with what can bring foreign text near to them.
fn tokenizers() -> Vec<Tokenizer> {
    let make = |normalizer: Value, flags: &[&str]| {
        let mut file = byte_tokenizer();
        let added = |(at, token): (usize, &&str)| {
            let is = |flag: &str| flags.contains(&flag);
            json!({"id": 300 + at, "content": token, "single_word": false, "lstrip": is("lstrip"),
                   "rstrip": is("rstrip"), "normalized": is("normalized"), "special": true})
        };
        file["added_tokens"] = TOKENS.iter().enumerate().map(added).collect();
        file["post_processor"] = Value::Null;
        file["normalizer"] = normalizer;
        Tokenizer::parse(file.to_string().as_bytes(), Path::new("tokenizer.json")).unwrap()
    };
    let replace = json!({"type": "Replace", "pattern": {"String": "~"}, "content": "|"});
    vec![
        make(Value::Null, &[]),
        make(Value::Null, &["lstrip", "rstrip"]),
        make(json!({"type": "NFKC"}), &["normalized"]),
        make(json!({"type": "Lowercase"}), &["normalized", "lstrip"]),
        make(
            json!({"type": "Sequence", "normalizers": [{"type": "NFKC"}, replace]}),
            &["normalized", "rstrip"],
        ),
        make(json!({"type": "Strip", "strip_left": true, "strip_right": true}), &[]),
    ]
}

/// A text of control tokens, halves of them, what normalisers make of others, and what templates look for.
fn content(random: &mut Random) -> String {
    const REST: [&str; 33] = [
        "<|",
        "|>",
        "im_end",
        "im_",
        "end|>",
        "<|im_start",
        "start|>",
        "[/",
        "INST]",
        "/s>",
        "<",
        ">",
        "|",
        "\u{fdd0}",
        "\u{fffe}",
        "\u{feff}",
        "\u{200b}",
        "＜｜ｉｍ＿ｅｎｄ｜＞",
        "＜/s＞",
        "<~im_end~>",
        "<|IM_END|>",
        "</S>",
        "<\u{2f}s>",
        "\n",
        " ",
        "\\n",
        "\"",
        "{{ eos_token }}",
        "{% raw %}",
        "x",
        "ﬁ",
        "ss",
        "CONTINUE_FINAL_MESSAGE_TAG ",
    ];
    let mut text = String::new();
    for _ in 0..1 + random.below(6) {
        match random.below(3) {
            0 => text.push_str(TOKENS[random.below(TOKENS.len())]),
            1 => {
                let token = TOKENS[random.below(TOKENS.len())];
                let chars: Vec<char> = token.chars().collect();
                let cut = random.below(chars.len());
                let half = if random.below(2) == 0 { &chars[..cut] } else { &chars[cut..] };
                text.extend(half);
            }
            _ => text.push_str(REST[random.below(REST.len())]),
        }
    }
    text
}

/// A chat with these texts in every place that takes one.
fn chat(texts: &[String]) -> Chat {
    let text = |at: usize| Json::Text(texts[at % texts.len()].clone());
    let object = |list: Vec<(&str, Json)>| {
        Json::Object(list.into_iter().map(|(key, value)| (key.to_owned(), value)).collect())
    };
    let parameters =
        Json::Object(vec![(texts[1].clone(), text(2)), (format!("{}2", texts[0]), text(0))]);
    let function =
        object(vec![("name", text(0)), ("description", text(1)), ("parameters", parameters)]);
    let mut named = Message::new("user", texts[2].clone());
    named.fields.push(("name".into(), text(0)));
    Chat {
        tools: Some(vec![object(vec![("function", function)])]),
        documents: Some(vec![object(vec![("text", text(2))])]),
        variables: vec![("extra".into(), text(1))],
        ..Chat::new([
            Message::new("system", texts[0].clone()),
            Message::new("user", texts[1].clone()),
            Message::new("assistant", texts[0].clone()),
            named,
        ])
    }
}

#[test]
fn contents_add_no_control_token() {
    let special = vec![("bos_token", "<s>".to_owned()), ("eos_token", "</s>".to_owned())];
    let templates = TEMPLATES
        .map(|source| ChatTemplate::parse(source, Path::new("template"), special.clone()).unwrap());
    let tokenizers = tokenizers();
    let count = |template: &ChatTemplate, tokenizer: &Tokenizer, chat: &Chat| {
        let ids = template.encode(tokenizer, chat).unwrap_or_else(|err| panic!("{err}: {chat:?}"));
        ids.iter().filter(|id| tokenizer.is_special(**id)).count()
    };
    let harmless = chat(&["a".to_owned(), "b".to_owned(), "c".to_owned()]);
    let own: Vec<Vec<usize>> = templates
        .iter()
        .map(|template| {
            tokenizers.iter().map(|tokenizer| count(template, tokenizer, &harmless)).collect()
        })
        .collect();
    assert!(own.iter().all(|counts| counts[0] >= 2), "{own:?}");

    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let mut n_contents = 0;
    while n_contents < 10_002 {
        let texts = [content(&mut random), content(&mut random), content(&mut random)];
        n_contents += texts.len();
        let hostile = chat(&texts);
        let (a, b) = (random.below(templates.len()), random.below(tokenizers.len()));
        let found = count(&templates[a], &tokenizers[b], &hostile);
        assert_eq!(found, own[a][b], "template {a}, tokenizer {b}: {texts:?}");
    }
}

#[test]
fn a_role_is_the_templates_word_or_a_text() {
    let source = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% endfor %}{% if x == 'critic' %}{% endif %}";
    let template = ChatTemplate::parse(source, Path::new("template"), Vec::new()).unwrap();
    let tokenizer = &tokenizers()[0];
    let count = |role: &str| {
        let ids = template.encode(tokenizer, &Chat::new([Message::new(role, "x")])).unwrap();
        ids.iter().filter(|id| tokenizer.is_special(**id)).count()
    };
    assert_eq!((count("user"), count("assistant")), (1, 1));
    // A role of no use to the template cannot name another of its tokens, nor bring tokens of its own.
    for role in ["end", "im_end", "user|><|assistant", "<|end|>", "user|>\n<|end", "x<s>", ""] {
        assert_eq!(count(role), 0, "{role}");
    }
    let (text, foreign) =
        template.render_marked(&Chat::new([Message::new("critic", "x")])).unwrap();
    assert_eq!((text.as_str(), foreign.len()), ("<|critic|>x", 1), "the template has this word");
    assert_eq!(foreign[0], 10..11);
}

/// Every letter of a chat is replaced by one that no template has: each of them must be known as foreign, and nothing else.
#[test]
fn of_every_family_it_is_known_who_wrote_what() {
    fn masked(value: &mut Json) {
        match value {
            Json::Text(text) => {
                let mask = |c: char| if c.is_ascii_alphabetic() { '\u{e000}' } else { c };
                *text = text.chars().map(mask).collect();
            }
            Json::List(list) => list.iter_mut().for_each(masked),
            Json::Object(entries) => {
                let texts = [
                    "content",
                    "text",
                    "description",
                    "title",
                    "reasoning_content",
                    "thinking",
                    "reasoning",
                    "city",
                ];
                for (key, value) in entries {
                    if texts.contains(&key.as_str()) || !matches!(value, Json::Text(_)) {
                        masked(value);
                    }
                }
            }
            _ => {}
        }
    }
    let all = Json::parse(include_str!("fixtures/families.json")).unwrap();
    let (Some(Json::Object(templates)), Some(Json::Object(chats))) =
        (all.get("templates"), all.get("chats"))
    else {
        panic!("no templates");
    };
    let mut n_foreign = 0;
    for (name, source) in templates {
        let source = source.as_str().unwrap();
        let template =
            ChatTemplate::parse(source, Path::new(name), vec![("eos_token", "</s>".into())])
                .unwrap();
        for (shape, chat) in chats {
            let mut chat = Chat::from_value(chat.clone()).unwrap();
            for message in &mut chat.messages {
                let mut fields = Json::Object(std::mem::take(&mut message.fields));
                masked(&mut fields);
                let Json::Object(fields) = fields else { panic!("an object") };
                message.fields = fields;
            }
            chat.tools.iter_mut().chain(&mut chat.documents).flatten().for_each(masked);
            let Ok((text, foreign)) = template.render_marked(&chat) else { continue };
            for (at, c) in text.char_indices() {
                let is_foreign = foreign.iter().any(|range| range.contains(&at));
                assert!(c != '\u{e000}' || is_foreign, "{name}, {shape}: byte {at} of {text:?}");
            }
            let sorted = foreign.windows(2).all(|pair| pair[0].end < pair[1].start);
            assert!(
                sorted
                    && foreign
                        .iter()
                        .all(|range| text.get(range.clone()).is_some_and(|part| !part.is_empty()))
            );
            n_foreign += foreign.len();
        }
    }
    assert!(n_foreign > 3000, "{n_foreign}");
}
