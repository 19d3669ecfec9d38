//! Chat templates: equal to what `transformers` renders, and bounded in what they can do.
#![allow(clippy::unwrap_used)]

mod common;

use std::path::Path;

use loris_loader::{Chat, ChatTemplate, Error, Json, Message};
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

#[test]
fn a_request_is_read_and_what_is_unknown_is_refused_by_name() {
    let source = "{{ tools[0].function.name }}{{ x }}{{ y.z[0] }}{{ messages[0].content[0].text }}{{ messages[1].n }}\
                  {{ documents[0].title }}{{ add_generation_prompt }}{{ messages|tojson }}";
    let chat = Chat::from_json(
        r#"{"messages": [{"role": "user", "content": [{"type": "text", "text": "T"}]}, {"z": null, "n": 1.50, "a": "b"}],
            "tools": [{"type": "function", "function": {"name": "f"}}], "documents": [{"title": "D"}],
            "chat_template_kwargs": {"x": true, "y": {"z": [-7]}}}"#,
    )
    .unwrap();
    let text = template(source).unwrap().render(&chat).unwrap();
    // Null keys go, and the others keep their order.
    let messages =
        r#"[{"role": "user", "content": [{"type": "text", "text": "T"}]}, {"n": 1.5, "a": "b"}]"#;
    assert_eq!(text, format!("fTrue-7T1.5DTrue{messages}"));

    for (request, named) in [
        (r#"{"messages": [], "temperature": 1}"#, "temperature"),
        (r#"{"messages": {}}"#, "messages"),
        (r#"{"messages": ["x"]}"#, "messages"),
        (r#"{"messages": [{"role": "a", "role": "b"}]}"#, "role"),
        (r#"{"tools": {}}"#, "tools"),
        (r#"{"variables": 1}"#, "variables"),
        (r#"{"add_generation_prompt": 1}"#, "add_generation_prompt"),
        (r#"{"continue_final_message": 1}"#, "continue_final_message"),
        (r#"{"chat_template": 1}"#, "chat_template"),
        ("[]", "object"),
        ("{", "JSON"),
    ] {
        let why = Chat::from_json(request).unwrap_err().to_string();
        assert!(why.contains(named), "{request}: {why}");
    }
    let data = |request: &str| template("x").unwrap().render(&Chat::from_json(request).unwrap());
    for (request, named) in [
        (r#"{"messages": []}"#, "messages"),
        (r#"{"messages": [{}], "tools": ["f"]}"#, "tools"),
        (r#"{"messages": [{}], "documents": [1]}"#, "documents"),
        (r#"{"messages": [{}], "variables": {"messages": []}}"#, "messages"),
        (
            r#"{"messages": [{}], "add_generation_prompt": true, "continue_final_message": true}"#,
            "continue_final_message",
        ),
    ] {
        let why = data(request).unwrap_err().to_string();
        assert!(why.contains(named), "{request}: {why}");
    }
}

#[test]
fn a_begun_answer_ends_where_its_text_does() {
    let chatml = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}";
    let trims = "{% for m in messages %}<{{ m.role }}>{{ m.content|trim }}<end>{% endfor %}";
    let begun = |source: &str, text: &str| {
        let messages = [Message::new("user", "hi"), Message::new("assistant", text)];
        let continue_final_message = Some("content".to_owned());
        let chat =
            Chat { add_generation_prompt: false, continue_final_message, ..Chat::new(messages) };
        template(source)?.render_marked(&chat)
    };
    let (text, foreign) = begun(chatml, "The answer ").unwrap();
    assert_eq!(
        (text.as_str(), &foreign[..]),
        ("<user>hi<end><assistant>The answer ", &[6..8, 24..35][..])
    );
    assert_eq!(begun(trims, " The answer \n").unwrap().0, "<user>hi<end><assistant>The answer");
    for (source, text) in [
        ("<end>", "x"),
        ("{{ messages[0].content }}", "x"),
        ("{{ messages[1].content|upper }}", "xy"),
    ] {
        let error = begun(source, text).unwrap_err();
        assert!(matches!(error, Error::Chat { .. }), "{source}: {error}");
    }
}

#[test]
fn templates_with_names_are_chosen_as_the_reference_does() {
    let folder = common::Folder::tiny();
    let chat = |tools: bool, name: Option<&str>| Chat {
        tools: tools.then(Vec::new),
        chat_template: name.map(str::to_owned),
        ..Chat::new([Message::new("user", "")])
    };
    let render = |chat: &Chat| ChatTemplate::open(folder.path()).unwrap().unwrap().render(chat);
    let object =
        r#"{"chat_template": {"default": "D", "tool_use": "T", "rag": "R", "broken": "{% if %}"}}"#;
    folder.write("tokenizer_config.json", object);
    assert_eq!(render(&chat(false, None)).unwrap(), "D");
    assert_eq!(render(&chat(true, None)).unwrap(), "T");
    assert_eq!(render(&chat(true, Some("rag"))).unwrap(), "R");
    assert_eq!(render(&chat(false, Some("{{ messages|length }} own"))).unwrap(), "1 own");
    assert!(
        render(&chat(false, Some("broken"))).is_err()
            && render(&chat(false, Some("{% if %}"))).is_err()
    );

    // Files win over the configuration, all of it.
    std::fs::create_dir(folder.file("additional_chat_templates")).unwrap();
    folder.write("additional_chat_templates/rag.jinja", "file R");
    let why = render(&chat(false, None)).unwrap_err().to_string();
    assert!(why.contains("rag") && why.contains("default"), "{why}");
    folder.write("chat_template.jinja", "file D");
    assert_eq!(render(&chat(true, None)).unwrap(), "file D");
    assert_eq!(render(&chat(true, Some("rag"))).unwrap(), "file R");
    folder.write("own.jinja", "{{ eos_token }}own");
    folder.write("tokenizer_config.json", r#"{"eos_token": "</e>"}"#);
    let own = ChatTemplate::open_file(folder.path(), &folder.file("own.jinja")).unwrap();
    assert_eq!(own.render(&chat(false, None)).unwrap(), "</e>own");
    assert!(ChatTemplate::open_file(folder.path(), &folder.file("none.jinja")).is_err());
}

#[test]
fn line_ends_and_marks_are_the_references() {
    // One line end at the end goes, others are one kind, and a byte order mark is a character.
    assert_eq!(
        render("\u{feff}a\r\nb\rc{{ 'd\r\ne' }}\r\n\r\n", "").unwrap(),
        "\u{feff}a\nb\ncd\ne\n"
    );
    // Contents keep theirs.
    assert_eq!(render("{{ messages[0].content }}", "a\r\nb\r").unwrap(), "a\r\nb\r");
}

#[test]
fn the_budget_follows_the_length() {
    let walk = "{% for m in messages %}{% for c in m.content %}{% if c.type == 'image' %}I{% endif %}{% endfor %}{{ m.content }}{% endfor %}";
    for n in [1_000, 50_000, 1_000_000] {
        assert_eq!(render(walk, &"x".repeat(n)).unwrap().len(), n);
    }
    // As many messages do not make a budget that one long one has not.
    let short = render(
        "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}",
        "x",
    );
    assert!(matches!(short, Err(Error::TemplateBudget { .. })), "{short:?}");
}

/// Numbers of a request are those that it says, to the last digit, as Python reads and prints them.
#[test]
fn numbers_are_exact() {
    let template = template("{{ x }} {{ x | tojson }}").unwrap();
    for number in [
        "0.10999999999999999",
        "0.30000000000000004",
        "5e-324",
        "1.7976931348623157e+308",
        "9007199254740993",
    ] {
        let request = format!(r#"{{"messages": [], "variables": {{"x": {number}}}}}"#);
        let request = request.replace("[]", r#"[{"role": "user", "content": ""}]"#);
        let text = template.render(&Chat::from_json(&request).unwrap()).unwrap();
        assert_eq!(text, format!("{number} {number}"));
    }
}

#[test]
fn variables_are_values_and_texts_of_parts_that_would_be_printed_show_as_in_the_reference() {
    let chat = Chat {
        variables: vec![
            ("enable_thinking".into(), false.into()),
            ("list".into(), Json::parse("[1, null, \"a\"]").unwrap()),
        ],
        ..Chat::new([Message {
            fields: vec![("content".into(), Json::parse(r#"[{"text": "a"}]"#).unwrap())],
        }])
    };
    let source = "{{ enable_thinking is false }}{{ list }}{{ messages[0].content }}";
    assert_eq!(
        template(source).unwrap().render(&chat).unwrap(),
        "True[1, None, 'a'][{'text': 'a'}]"
    );
}
