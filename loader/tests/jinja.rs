//! Templates mean what they mean in Jinja 3 with the environment of `transformers`: fixtures/jinja.json has what that renders.
#![allow(clippy::unwrap_used)]

use std::path::Path;

use loris_loader::{Chat, ChatTemplate, Error, Json, Message};

fn objects(value: &Json) -> &[(String, Json)] {
    match value {
        Json::Object(entries) => entries,
        other => panic!("{other:?}"),
    }
}

fn list(value: &Json) -> &[Json] {
    match value {
        Json::List(list) => list,
        other => panic!("{other:?}"),
    }
}

fn fixture() -> (Json, Chat) {
    let all = Json::parse(include_str!("fixtures/jinja.json")).unwrap();
    let context = all.get("context").unwrap();
    let messages = list(context.get("messages").unwrap()).iter();
    let now = match all.get("clock") {
        Some(Json::Int(now)) => u64::try_from(*now).unwrap(),
        other => panic!("{other:?}"),
    };
    let chat = Chat {
        tools: Some(list(context.get("tools").unwrap()).to_vec()),
        variables: objects(context.get("variables").unwrap()).to_vec(),
        now: Some(now),
        ..Chat::new(messages.map(|m| Message { fields: objects(m).to_vec() }).collect::<Vec<_>>())
    };
    (all, chat)
}

fn render(source: &str, chat: &Chat) -> Result<String, Error> {
    ChatTemplate::parse(source, Path::new("template"), Vec::new())?.render(chat)
}

#[test]
fn expressions_and_statements_render_as_in_jinja() {
    let (all, chat) = fixture();
    let cases = list(all.get("cases").unwrap());
    assert!(cases.len() > 900);
    let mut wrong = Vec::new();
    for case in cases {
        let [Json::Text(source), expected] = list(case) else { panic!("{case:?}") };
        let found = render(source, &chat);
        match (expected, &found) {
            (Json::Text(text), Ok(found)) if text == found => {}
            (Json::Null, Err(Error::Template { .. } | Error::TemplateRefused { .. })) => {}
            _ => wrong.push(format!("{source:?}: expected {expected:?}, found {found:?}")),
        }
    }
    assert!(wrong.is_empty(), "{} differ:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn what_chat_templates_have_no_use_for_is_refused_by_name() {
    let (all, chat) = fixture();
    for (source, name) in objects(all.get("refused").unwrap()) {
        let why = render(source, &chat).unwrap_err().to_string();
        assert!(why.contains(name.as_str().unwrap()), "{source}: {why}");
    }
}

/// What is long or deep, on a thread whose stack is small: refused or rendered, and never the end of the process.
#[test]
fn depth_and_length_are_bounded() {
    let (_, chat) = fixture();
    let n = 10_000;
    let deep = |open: &str, inner: &str, close: &str| {
        format!("{{{{ {}{inner}{} }}}}", open.repeat(n), close.repeat(n))
    };
    let nest = |n: usize, step: &str| {
        format!(
            "{{% set ns = namespace(x=1) %}}{{% for i in range({n}) %}}{{% set ns.x = {step} %}}{{% endfor %}}"
        )
    };
    let renders = [
        (format!("{{{{ {} }}}}", vec!["1"; n].join(" + ")), "10000"),
        (format!("{{{{ {} }}}}", vec!["1"; n].join(" ~ ")).replace(" ~ ", "~"), ""),
        (format!("{{{{ ({})|length }}}}", vec!["'a'"; n].join(" + ")), "10000"),
        (format!("{{{{ {} }}}}", vec!["true"; n].join(" and ")), "True"),
        (format!("{{{{ {} }}}}", vec!["1"; n].join(" < 2 and ")), "1"),
        (format!("{{{{ 'a'{} }}}}", "|trim".repeat(n)), "a"),
        (format!("{{% if false %}}{}{{% endif %}}", "{% elif false %}".repeat(n)), ""),
        (nest(100, "[ns.x]") + "{{ ns.x|string|length }}", "201"),
    ];
    let refused = [
        deep("(", "1", ")"),
        deep("[", "1", "]"),
        deep("{1:", "1", "}"),
        deep("not ", "1", ""),
        deep("-", "1", ""),
        deep("x[", "1", "]"),
        deep("x(", "1", ")"),
        deep("1 if 1 else ", "1", ""),
        deep("", "1", " if 1"),
        deep("1|default(", "1", ")"),
        "{% if 1 %}".repeat(n) + &"{% endif %}".repeat(n),
        "{% for x in y %}".repeat(n),
        nest(200, "[ns.x]"),
        nest(200, "{1: ns.x}"),
        nest(200, "(ns.x,)"),
        "{% set ns = namespace() %}{% set ns.x = ns %}{{ ns }}".into(),
        "{% set ns = namespace() %}{% set ns.x = [ns] %}{{ ns.x }}{{ ns.x == ns.x }}{{ ns.x|tojson }}".into(),
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}".into(),
        "{% macro m() %}{% call m() %}{% endcall %}{% endmacro %}{{ m() }}".into(),
        "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}".into(),
        "{% macro a(f) %}{{ f(f) }}{% endmacro %}{{ a(a) }}".into(),
        format!("{{{{ '{}'.format(1) }}}}", "{:".repeat(n)),
    ];
    let check = move || {
        for (source, text) in &renders {
            let found = render(source, &chat);
            match text.is_empty() {
                true => assert!(found.is_ok(), "{found:?}"),
                false => assert_eq!(found.unwrap(), *text),
            }
        }
        for source in &refused {
            let shown: String = source.chars().take(60).collect();
            assert!(render(source, &chat).is_err(), "{shown}");
        }
    };
    std::thread::Builder::new().stack_size(128 << 10).spawn(check).unwrap().join().unwrap();
}
