//! No chat template panics, and none uses memory without bound (run with `-rss_limit_mb=1024`).
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use loris_loader::{ChatTemplate, Message};

fuzz_target!(|source: &str| {
    let tokens = vec![("eos_token", "</s>".to_owned())];
    let Ok(template) = ChatTemplate::parse(source, Path::new("chat_template.jinja"), tokens) else {
        return;
    };
    let messages = [Message::new("user", "x"), Message::new("assistant", "y")];
    if let Ok(text) = template.render(&messages, true) {
        assert!(text.len() < 64 << 20);
    }
});
