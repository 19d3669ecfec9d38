//! Chats of many shapes through templates of many families, equal to what `transformers` renders (fixtures/families.json).
#![allow(clippy::unwrap_used)]

use std::path::Path;

use loris_loader::{Chat, ChatTemplate, Error, Json};

fn entries(value: Option<&Json>) -> &[(String, Json)] {
    match value {
        Some(Json::Object(entries)) => entries,
        other => panic!("{other:?}"),
    }
}

#[test]
fn families_render_as_in_transformers() {
    let all = Json::parse(include_str!("fixtures/families.json")).unwrap();
    let (templates, chats) = (entries(all.get("templates")), entries(all.get("chats")));
    assert!(templates.len() >= 60 && chats.len() >= 15);
    let Some(Json::Int(now)) = all.get("clock") else { panic!("no clock") };
    let now = u64::try_from(*now).ok();
    let tokens = || vec![("bos_token", "<s>".to_owned()), ("eos_token", "</s>".to_owned())];
    let mut wrong = Vec::new();
    for (name, source) in templates {
        let source = source.as_str().unwrap();
        let template = ChatTemplate::parse(source, Path::new(name), tokens()).unwrap();
        for (shape, chat) in chats {
            let chat = Chat { now, ..Chat::from_value(chat.clone()).unwrap() };
            let expected = all.get("texts").unwrap().get(name).unwrap().get(shape).unwrap();
            let found = template.render(&chat);
            match (expected, &found) {
                (Json::Text(text), Ok(found)) if text == found => {}
                (
                    Json::Null,
                    Err(
                        Error::Template { .. } | Error::TemplateRefused { .. } | Error::Chat { .. },
                    ),
                ) => {}
                _ => wrong.push(format!("{name}, {shape}: expected {expected:?}, found {found:?}")),
            }
        }
    }
    assert!(wrong.is_empty(), "{} differ:\n{}", wrong.len(), wrong.join("\n"));
}
