//! Chat templates: equal to what `transformers` renders, and bounded in what they can do.
#![allow(clippy::unwrap_used)]

mod common;

use std::path::Path;

use loris_loader::{Chat, ChatTemplate, Error, Message};
use serde_json::Value;

fn template(source: &str) -> Result<ChatTemplate, Error> {
    let tokens = vec![("bos_token", "<s>".to_owned()), ("eos_token", "</s>".to_owned())];
    ChatTemplate::parse(source, Path::new("chat_template.jinja"), tokens)
}

fn render(source: &str, content: &str) -> Result<String, Error> {
    template(source)?.render(&Chat::new([Message::new("user", content)]))
}

fn messages(value: &Value) -> Vec<Message> {
    let text = |m: &Value, key: &str| m[key].as_str().unwrap().to_owned();
    value
        .as_array()
        .unwrap()
        .iter()
        .map(|m| Message::new(text(m, "role"), text(m, "content")))
        .collect()
}

#[test]
fn templates_render_as_transformers_renders_them() {
    let all: Value = serde_json::from_str(include_str!("fixtures/templates.json")).unwrap();
    for case in all["cases"].as_array().unwrap() {
        let name = case["name"].as_str().unwrap();
        let source = all["templates"][name].as_str().unwrap();
        let template = template(source).unwrap_or_else(|err| panic!("{name}: {err}"));
        let add_generation_prompt = case["add_generation_prompt"].as_bool().unwrap();
        let chat = Chat { add_generation_prompt, ..Chat::new(messages(&case["messages"])) };
        let rendered = template.render(&chat);
        match (case["text"].as_str(), rendered) {
            (Some(text), Ok(rendered)) => assert_eq!(rendered, text, "{name}"),
            (None, Err(Error::TemplateRefused { why, .. })) => {
                assert_eq!(why.0, case["error"], "{name}");
            }
            (expected, found) => panic!("{name}: {expected:?} {found:?}"),
        }
    }
}

#[test]
fn the_jinja_file_wins_and_lists_have_a_default() {
    let folder = common::Folder::tiny();
    assert!(ChatTemplate::open(folder.path()).unwrap().is_none());
    let list = r#"{"bos_token": {"__type": "AddedToken", "content": "<B>"}, "chat_template":
        [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "{{ bos_token }}list"}]}"#;
    folder.write("tokenizer_config.json", list);
    let chat = Chat::new([Message::new("user", "")]);
    let render = || ChatTemplate::open(folder.path()).unwrap().unwrap().render(&chat).unwrap();
    assert_eq!(render(), "<B>list");
    folder.write("chat_template.jinja", "{{ bos_token }}file");
    assert_eq!(render(), "<B>file");
}

#[test]
fn dates_can_be_formatted() {
    let date = render("{{ strftime_now('%d %b %Y') }}", "").unwrap();
    assert_eq!(date.len(), 11, "{date}");
    assert!(date[7..].parse::<u32>().unwrap() >= 2025);
    assert!(render("{{ strftime_now('%Q') }}", "").is_err());
}

/// Templates that ask for more than any chat needs. Each must be refused, quickly and without much memory.
#[test]
fn bombs_are_refused() {
    let doubling = "{% set ns = namespace(s='xxxxxxxxxxxxxxxx') %}{% for i in range(60) %}";
    let bombs = [
        format!("{doubling}{{% set ns.s = ns.s + ns.s %}}{{% endfor %}}{{{{ ns.s | length }}}}"),
        format!("{doubling}{{% set ns.s = ns.s ~ ns.s %}}{{% endfor %}}"),
        format!("{doubling}{{% set ns.s = (ns.s) ~ (ns.s) ~ (ns.s) %}}{{% endfor %}}"),
        format!("{doubling}{{% set ns.s = ns.s | replace('x', 'xxxx') %}}{{% endfor %}}"),
        format!("{doubling}{{% set ns.s = ns.s.replace('x', 'xxxx') %}}{{% endfor %}}"),
        format!("{doubling}{{% set ns.s = [ns.s, ns.s] | join(ns.s) %}}{{% endfor %}}"),
        format!("{doubling}{{% set ns.s = ns.s.join([ns.s, ns.s]) %}}{{% endfor %}}"),
        format!("{doubling}{{% set ns.s = [ns.s, ns.s] | string %}}{{% endfor %}}"),
        format!("{doubling}{{% set ns.s = ns.s | tojson | tojson %}}{{% endfor %}}"),
        format!("{doubling}{{% set ns.s = ns.s * 9 %}}{{% endfor %}}"),
        format!("{doubling}{{% set t %}}{{{{ ns.s }}}}{{{{ ns.s }}}}{{% endset %}}{{% set ns.s = t %}}{{% endfor %}}"),
        format!("{{% macro m(s) %}}{{{{ s }}}}{{{{ s }}}}{{% endmacro %}}{doubling}{{% set ns.s = m(ns.s) %}}{{% endfor %}}"),
        "{% set ns = namespace(l=[1]) %}{% for i in range(60) %}{% set ns.l = ns.l + ns.l %}{% endfor %}{{ ns.l }}".into(),
        "{% set ns = namespace(l=[1]) %}{% for i in range(60) %}{% set ns.l = ns.l * 9 %}{% endfor %}{{ ns.l }}".into(),
        "{% set ns = namespace(l='x') %}{% for i in range(60) %}{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l }}".into(),
        "{% set ns = namespace(l='x') %}{% for i in range(60) %}{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l ~ 1 }}".into(),
        "{% set ns = namespace(l='x') %}{% for i in range(60) %}{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l | tojson }}".into(),
        "{{ 'x' * 1000000000000 }}".into(),
        "{% set l = [] %}{% for i in range(9999) %}{{ 'x' * 90000000 }}{% endfor %}".into(),
        "{{ '%1000000000d' | format(1) }}".into(),
        "{{ '{:>1000000000}'.format(1) }}".into(),
        "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}".into(),
        format!("{{% for i in range(9999) %}}{}{{% endfor %}}", "x".repeat(200_000)),
        format!("{{% set s %}}{{% for i in range(9999) %}}{}{{% endfor %}}{{% endset %}}", "x".repeat(200_000)),
        format!("{{{{ {}1{} }}}}", "(".repeat(5000), ")".repeat(5000)),
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}".into(),
        "{% for x in messages recursive %}{{ loop([x, x]) }}{% endfor %}".into(),
    ];
    for bomb in &bombs {
        let shown: String = bomb.chars().take(160).collect();
        match render(bomb, "x") {
            Ok(text) => panic!("rendered {} bytes: {shown}", text.len()),
            Err(Error::Template { .. } | Error::TemplateBudget { .. }) => {}
            Err(err) => panic!("{err}: {shown}"),
        }
    }
}

#[test]
fn slices_are_counted_too() {
    let hoard = "{% set ns = namespace(l=[]) %}{% for i in range(3000) %}\
                 {% set ns.l = ns.l + [messages[0].content[1:]] %}{% endfor %}";
    let error = render(hoard, &"x".repeat(1 << 20)).unwrap_err();
    assert!(matches!(error, Error::TemplateBudget { .. }), "{error}");
}

#[test]
fn long_chats_have_the_budget_that_they_need() {
    let source = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}";
    let messages: Vec<Message> =
        (0..2000).map(|_| Message::new("user", "x".repeat(1000))).collect();
    assert_eq!(
        template(source).unwrap().render(&Chat::new(messages)).unwrap().len(),
        2000 * (1000 + 12 + 4 + 1 + 11)
    );
    let long = render("{{ messages[0].content | trim }}", &"x".repeat(8 << 20)).unwrap();
    assert_eq!(long.len(), 8 << 20);
}
