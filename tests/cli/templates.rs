//! What goes into a chat template besides a prompt, and templates of one's own.

use super::support::{Folder, named};

/// Tokens of the prompt that a run makes; of the folder's tokenizer each character is one, and so is each special token.
fn n_tokens(folder: &Folder, args: &[&str]) -> u64 {
    let run = folder.run(&[args, &["-n", "1", "--ignore-eos", "--json"]].concat());
    named(&run.ok().events(), "done")[0]["prompt_tokens"].as_u64().unwrap()
}

const USER: &str = r#"{"role": "user", "content": "hello"}"#;

#[test]
fn a_conversation_comes_from_a_file() {
    let folder = Folder::new();
    let list = folder.write("list.json", &format!("[{USER}]"));
    let object = folder.write("object.json", &format!("\u{feff}{{\"messages\": [{USER}]}}"));
    let by_prompt = n_tokens(&folder, &["-p", "hello"]);
    for path in [&list, &object] {
        assert_eq!(n_tokens(&folder, &["--messages", path.to_str().unwrap()]), by_prompt);
    }
    // <|im_start|>assistant\n has eleven tokens.
    let whole = format!("{{\"messages\": [{USER}], \"add_generation_prompt\": false}}");
    let whole = folder.write("whole.json", &whole);
    assert_eq!(n_tokens(&folder, &["--messages", whole.to_str().unwrap()]), by_prompt - 11);
    for (name, text, what) in [
        ("odd.json", r#"{"messages": [], "mesages": []}"#, "mesages"),
        ("none.json", "{", "JSON"),
        ("empty.json", "[]", "messages"),
    ] {
        let path = folder.write(name, text);
        let run = folder.run(&["--messages", path.to_str().unwrap()]);
        assert_ne!(run.code, Some(0), "{name}");
        assert!(run.err.contains(what) && !run.err.contains("panicked"), "{name}: {}", run.err);
    }
}

#[test]
fn an_answer_can_be_begun() {
    let folder = Folder::new();
    let open = n_tokens(&folder, &["-p", "hello"]);
    assert_eq!(n_tokens(&folder, &["-p", "hello", "--assistant", "Well,"]), open + 5);
    let request = format!(
        r#"{{"messages": [{USER}, {{"role": "assistant", "content": "Well,"}}], "continue_final_message": true}}"#
    );
    let path = folder.write("begun.json", &request);
    assert_eq!(n_tokens(&folder, &["--messages", path.to_str().unwrap()]), open + 5);
}

#[test]
fn templates_are_told_of_tools_and_variables() {
    let folder = Folder::new();
    folder.write(
        "chat_template.jinja",
        "{% for t in tools or [] %}[{{ t.name }}]{% endfor %}{{ 'x' * n if n is defined else '' }}{{ 'off' if thinking is false }}{{ messages[-1].content }}",
    );
    let tools = folder.write("tools.json", r#"[{"name": "add"}, {"name": "sub"}]"#);
    let tools = tools.to_str().unwrap();
    assert_eq!(n_tokens(&folder, &["-p", "hello"]), 5);
    assert_eq!(n_tokens(&folder, &["-p", "hello", "--tools", tools]), 15);
    let variables = ["-p", "hello", "--template-var", "n=7", "--template-var", "thinking=false"];
    assert_eq!(n_tokens(&folder, &variables), 15);
    assert_eq!(n_tokens(&folder, &["-p", "hello", "--template-var", "thinking=no"]), 5, "a text");
    for (args, what) in [
        (["--template-var", "n"], "expected NAME=VALUE"),
        (["--tools", "nowhere.json"], "nowhere.json: cannot read"),
        (["--template-var", "messages=1"], "messages"),
    ] {
        let run = folder.run(&[&args[..], &["-p", "hello"]].concat());
        assert_ne!(run.code, Some(0));
        assert!(run.err.contains(what), "{what}: {}", run.err);
    }
}

#[test]
fn a_template_of_ones_own() {
    let folder = Folder::without_template();
    let path = folder.write("own.jinja", "{% for m in messages %}<{{ m.content }}>{% endfor %}");
    let own = ["-p", "hello", "--chat-template", path.to_str().unwrap()];
    assert_eq!(n_tokens(&folder, &own), 7);
    assert_eq!(n_tokens(&folder, &[&own[..], &["--system", "be"]].concat()), 11);
    let run = folder.run(&["-p", "hello", "--system", "be"]);
    assert_eq!(run.code, Some(2));
    assert!(run.err.contains("--chat-template"), "{}", run.err);

    // Of several, by name.
    folder.write(
        "tokenizer_config.json",
        r#"{"chat_template": {"default": "{{ messages[0].content }}", "twice": "{{ messages[0].content * 2 }}"}}"#,
    );
    assert_eq!(n_tokens(&folder, &["-p", "hello"]), 5);
    assert_eq!(n_tokens(&folder, &["-p", "hello", "--chat-template", "twice"]), 10);
    let run = folder.run(&["-p", "hello", "--chat-template", "{{ nonsense"]);
    assert_ne!(run.code, Some(0));
}
