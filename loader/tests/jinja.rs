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
