//! Answers by a schema or a grammar, and how likely tokens were. What an answer should be is decided here by a small validator of
//! JSON schemas and a matcher of grammars that know nothing of masks.

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};

use super::support::{Done, Folder, done, done_with_stdin, named, text};

/// SplitMix64.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ z >> 31) % n as u64) as usize
    }

    fn pick<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        &of[self.below(of.len())]
    }
}

/// A folder with a file of a schema or a grammar, and what a run with it gave.
fn by(folder: &Folder, flag: &str, file: &str, more: &[&str]) -> Done {
    let path = folder.write("constraint", file);
    let fixed = ["--raw", "-p", "begin", "--json", flag, path.to_str().unwrap()];
    folder.run(&[&fixed[..], more].concat())
}

fn finish(events: &[Value]) -> &str {
    named(events, "done")[0]["finish"].as_str().unwrap()
}

/// What an answer may be: greedy, and drawn.
const CHOICES: [&[&str]; 2] = [&["--temp", "0"], &["--temp", "1", "--seed", "11"]];

/// A value that a schema is about.
fn value(random: &mut Random) -> Value {
    const TEXTS: [&str; 6] = ["", "a", "two words", "quote \" and \\", "line\nbreak", "{\"a\": 1}"];
    match random.below(5) {
        0 => json!(*random.pick(&TEXTS)),
        1 => json!(random.below(2_000) as i64 - 1_000),
        2 => json!(random.below(2) == 0),
        3 => json!([1, "b", null]),
        _ => json!({ "k": random.below(9), "": [] }),
    }
}

const PATTERNS: [&str; 3] = ["^[a-c]{1,4}$", "^x+y?$", "^(ab|cd)*$"];

fn fits_pattern(pattern: &str, text: &str) -> bool {
    match pattern {
        "^[a-c]{1,4}$" => {
            (1..=4).contains(&text.len()) && text.bytes().all(|b| matches!(b, b'a'..=b'c'))
        }
        "^x+y?$" => {
            let rest = text.trim_start_matches('x');
            rest.len() < text.len() && matches!(rest, "" | "y")
        }
        _ => {
            text.len().is_multiple_of(2)
                && text.as_bytes().chunks(2).all(|pair| matches!(pair, b"ab" | b"cd"))
        }
    }
}

/// A schema whose values are not long.
fn schema(random: &mut Random, depth: usize) -> Value {
    let range = |random: &mut Random, most: usize| {
        let (a, b) = (random.below(most), random.below(most));
        (a.min(b), a.max(b))
    };
    match random.below(if depth == 0 { 7 } else { 11 }) {
        0 => json!({ "enum": (0..=random.below(3)).map(|_| value(random)).collect::<Vec<_>>() }),
        1 => json!({ "const": value(random) }),
        2 => json!({ "type": *random.pick(&["boolean", "null"]) }),
        3 => {
            let (low, high) = range(random, 3_000);
            json!({ "type": "integer", "minimum": low as i64 - 1_500, "maximum": high as i64 - 1_500 })
        }
        4 => json!({ "type": "string", "pattern": *random.pick(&PATTERNS) }),
        5 | 6 => {
            let (low, high) = range(random, 9);
            json!({ "type": "string", "minLength": low, "maxLength": high })
        }
        7 => {
            let (low, high) = range(random, 4);
            json!({ "type": "array", "items": schema(random, depth - 1), "minItems": low, "maxItems": high })
        }
        8 => json!({ "anyOf": [schema(random, depth - 1), schema(random, depth - 1)] }),
        9 => json!({ "$ref": "#/$defs/shared" }),
        _ => {
            let names = ["a", "b", "long name", "q\"uote"];
            let n = random.below(names.len() + 1);
            let properties: Map<String, Value> =
                names[..n].iter().map(|&name| (name.into(), schema(random, depth - 1))).collect();
            let required: Vec<_> = names[..n].iter().filter(|_| random.below(2) == 0).collect();
            json!({ "type": "object", "properties": properties, "required": required, "additionalProperties": false })
        }
    }
}

fn is_valid(schema: &Value, value: &Value, root: &Value) -> bool {
    if let Some(all) = schema["enum"].as_array() {
        return all.contains(value);
    }
    if let Some(only) = schema.get("const") {
        return only == value;
    }
    if let Some(any) = schema["anyOf"].as_array() {
        return any.iter().any(|schema| is_valid(schema, value, root));
    }
    if schema.get("$ref").is_some() {
        return is_valid(&root["$defs"]["shared"], value, root);
    }
    let within = |n: f64, low: &str, high: &str| {
        schema[low].as_f64().is_none_or(|low| n >= low)
            && schema[high].as_f64().is_none_or(|high| n <= high)
    };
    match schema["type"].as_str().unwrap() {
        "null" => value.is_null(),
        "boolean" => value.is_boolean(),
        "integer" => {
            value.as_f64().is_some_and(|n| n.fract() == 0.0 && within(n, "minimum", "maximum"))
        }
        "string" => value.as_str().is_some_and(|text| {
            within(text.chars().count() as f64, "minLength", "maxLength")
                && schema["pattern"].as_str().is_none_or(|pattern| fits_pattern(pattern, text))
        }),
        "array" => value.as_array().is_some_and(|items| {
            within(items.len() as f64, "minItems", "maxItems")
                && items.iter().all(|item| is_valid(&schema["items"], item, root))
        }),
        _ => value.as_object().is_some_and(|fields| {
            let required = schema["required"].as_array().unwrap();
            required.iter().all(|name| fields.contains_key(name.as_str().unwrap()))
                && fields.iter().all(|(name, field)| {
                    schema["properties"]
                        .get(name)
                        .is_some_and(|schema| is_valid(schema, field, root))
                })
        }),
    }
}

/// Every answer that is finished is JSON that its schema allows; few are not finished, which -n alone ends.
#[test]
fn answers_by_random_schemas_are_valid() {
    let folder = Folder::with_ctx(1024);
    let (mut random, mut n_finished, mut n_runs) = (Random(18), 0, 0);
    for idx in 0..500 {
        let mut root = schema(&mut random, 3);
        root["$defs"] = json!({ "shared": schema(&mut random, 0) });
        let text_of_schema = root.to_string();
        for choice in CHOICES {
            let run =
                by(&folder, "--json-schema", &text_of_schema, &[choice, &["-n", "600"]].concat());
            let events = run.ok().events();
            n_runs += 1;
            if finish(&events) == "length" {
                continue;
            }
            assert_eq!(finish(&events), "eos", "{idx}: {root}");
            n_finished += 1;
            let answer = text(&events);
            let parsed: Value = serde_json::from_str(&answer)
                .unwrap_or_else(|e| panic!("{idx}: {e}: {answer} by {root}"));
            assert!(is_valid(&root, &parsed, &root), "{idx}: {answer} by {root}");
        }
    }
    assert!(n_finished * 10 >= n_runs * 9, "{n_finished} of {n_runs} are finished");
}

/// Bounds are the numbers that a file says, to their last digit.
#[test]
fn bounds_are_exact() {
    let folder = Folder::new();
    for (low, high) in [
        ("0.05", "0.10999999999999999"),
        ("-0.30000000000000004", "-0.3"),
        ("9007199254740992", "9007199254740993"),
    ] {
        let schema = format!(r#"{{"type": "number", "minimum": {low}, "maximum": {high}}}"#);
        for seed in ["1", "2", "3", "4", "5", "6"] {
            let run =
                by(&folder, "--json-schema", &schema, &["--temp", "1", "--seed", seed, "-n", "30"]);
            let events = run.ok().events();
            if finish(&events) != "eos" {
                continue;
            }
            let answer = text(&events);
            let number: f64 = answer.trim().parse().unwrap();
            let (low, high): (f64, f64) = (low.parse().unwrap(), high.parse().unwrap());
            assert!((low..=high).contains(&number), "{answer} by {schema}");
        }
    }
}

/// A grammar as a tree.
enum Part {
    Text(String),
    /// One of these characters.
    Class(&'static str),
    All(Vec<Part>),
    Any(Vec<Part>),
    /// So often.
    Repeated(Box<Part>, usize, usize),
    /// What stands between brackets, itself in brackets or an `x`.
    Nested,
}

fn part(random: &mut Random, depth: usize) -> Part {
    const TEXTS: [&str; 6] = ["a", "ab", "let ", "\"", "\\n", "=>"];
    let parts =
        |random: &mut Random| (0..=random.below(3)).map(|_| part(random, depth - 1)).collect();
    match random.below(if depth == 0 { 3 } else { 8 }) {
        0 => Part::Text((*random.pick(&TEXTS)).into()),
        1 => Part::Class(["abc", "01", "xyz "][random.below(3)]),
        2 => Part::Nested,
        3 | 4 => Part::All(parts(random)),
        5 | 6 => Part::Any(parts(random)),
        _ => {
            let (low, more) = (random.below(3), random.below(3));
            Part::Repeated(Box::new(part(random, depth - 1)), low, low + more + 1)
        }
    }
}

impl Part {
    /// In Lark's way of writing.
    fn lark(&self) -> String {
        let joined = |parts: &[Part], by: &str| {
            let parts: Vec<_> = parts.iter().map(Part::lark).collect();
            format!("({})", parts.join(by))
        };
        match self {
            Self::Text(text) => json!(text).to_string(),
            Self::Class(of) => format!("/[{of}]/"),
            Self::All(parts) => joined(parts, " "),
            Self::Any(parts) => joined(parts, " | "),
            Self::Repeated(part, low, high) => format!("({}){{{low},{high}}}", part.lark()),
            Self::Nested => "nested".into(),
        }
    }

    /// Where what begins at `start` may end.
    fn ends(&self, text: &str, start: usize) -> BTreeSet<usize> {
        let rest = &text[start..];
        match self {
            Self::Text(own) => {
                rest.starts_with(own).then_some(start + own.len()).into_iter().collect()
            }
            Self::Class(of) => {
                let is_one = rest.starts_with(|c| of.contains(c));
                is_one.then_some(start + 1).into_iter().collect()
            }
            Self::All(parts) => {
                parts.iter().fold([start].into(), |starts: BTreeSet<usize>, part| {
                    starts.iter().flat_map(|&start| part.ends(text, start)).collect()
                })
            }
            Self::Any(parts) => parts.iter().flat_map(|part| part.ends(text, start)).collect(),
            Self::Repeated(part, low, high) => {
                let mut now = BTreeSet::from([start]);
                let mut all = BTreeSet::new();
                for n in 0..=*high {
                    if n >= *low {
                        all.extend(&now);
                    }
                    now = now.iter().flat_map(|&start| part.ends(text, start)).collect();
                }
                all
            }
            Self::Nested => {
                let n = rest.bytes().take_while(|&b| b == b'(').count();
                let is_one = rest[n..].starts_with(&format!("x{}", ")".repeat(n)));
                is_one.then_some(start + 2 * n + 1).into_iter().collect()
            }
        }
    }
}

#[test]
fn answers_by_random_grammars_are_in_them() {
    let folder = Folder::with_ctx(512);
    let (mut random, mut n_finished, mut n_runs) = (Random(5), 0, 0);
    for idx in 0..50 {
        let grammar = part(&mut random, 4);
        let lark = format!("start: {}\nnested: \"(\" nested \")\" | \"x\"\n", grammar.lark());
        for choice in CHOICES {
            let run = by(&folder, "--grammar", &lark, &[choice, &["-n", "300"]].concat());
            // The library's lexer takes the longest piece, so it may come to an end where the grammar has one.
            let events = run.events();
            n_runs += 1;
            if finish(&events) != "eos" {
                continue;
            }
            n_finished += 1;
            let answer = text(&events);
            assert!(
                grammar.ends(&answer, 0).contains(&answer.len()),
                "{idx}: {answer:?} by {lark}"
            );
        }
    }
    assert!(n_finished * 10 >= n_runs * 8, "{n_finished} of {n_runs} are finished");
}

/// As deep as so many bytes can go.
fn refs_of_refs() -> String {
    let mut all = String::from(r##"{"$ref":"#/$defs/0","$defs":{"x":true"##);
    for n in 0.. {
        if all.len() > 1_000_000 {
            return all + &format!(",\"{n}\":true}}}}");
        }
        let (open, close) = ("{\"items\":".repeat(58), "}".repeat(58));
        all += &format!(r##","{n}":{open}{{"$ref":"#/$defs/{}"}}{close}"##, n + 1);
    }
    all
}

/// Schemas and grammars that cost much more than they look like: refused, or with an answer, and in a GiB of memory.
#[test]
fn hostile_schemas_and_grammars_end_in_bounds() {
    let folder = Folder::new();
    let deep = |open: &str, close: &str, n: usize| open.repeat(n) + "true" + &close.repeat(n);
    let wide: Vec<_> = (0..20_000).map(|n| json!({ "const": format!("{n:05}") })).collect();
    let chain: Map<String, Value> = (0..4_000)
        .map(|n| (format!("d{n}"), json!({ "$ref": format!("#/$defs/d{}", n + 1) })))
        .collect();
    let doubled: Map<String, Value> = (0..60)
        .map(|n| {
            let next = json!({ "$ref": format!("#/$defs/d{}", n + 1) });
            (
                format!("d{n}"),
                json!({ "type": "array", "prefixItems": [next, next], "minItems": 2 }),
            )
        })
        .collect();
    let schemas = [
        json!({ "$ref": "#" }).to_string(),
        json!({ "$ref": "#/$defs/a", "$defs": { "a": { "$ref": "#/$defs/b" }, "b": { "$ref": "#/$defs/a" } } }).to_string(),
        json!({ "allOf": [{ "$ref": "#" }, { "$ref": "#" }] }).to_string(),
        json!({ "anyOf": [{ "$ref": "#" }, { "$ref": "#" }] }).to_string(),
        json!({ "$ref": "http://localhost/schema.json" }).to_string(),
        json!({ "$ref": "#/$defs/d0", "$defs": chain }).to_string(),
        json!({ "$ref": "#/$defs/d0", "$defs": doubled }).to_string(),
        json!({ "type": "string", "pattern": "^a{1,99999}$" }).to_string(),
        json!({ "type": "string", "pattern": "^(a{1,999}){1,999}$" }).to_string(),
        json!({ "type": "string", "pattern": "^(((a{1,99}){1,99}){1,99}){1,99}$" }).to_string(),
        json!({ "type": "string", "pattern": "^(?=.*a)(?=.*b).*(a|b|ab)*c\\1$" }).to_string(),
        json!({ "type": "string", "pattern": "(.*a){30}" }).to_string(),
        json!({ "type": "string", "minLength": 1_000_000_000 }).to_string(),
        json!({ "type": "string", "maxLength": u64::MAX }).to_string(),
        json!({ "type": "array", "minItems": 1_000_000_000, "items": {} }).to_string(),
        json!({ "type": "array", "items": { "$ref": "#" }, "minItems": 50 }).to_string(),
        json!({ "type": "object", "minProperties": 1_000_000 }).to_string(),
        json!({ "type": "integer", "multipleOf": 1_000_003, "minimum": 1 }).to_string(),
        json!({ "type": "number", "minimum": 1e308, "maximum": f64::MAX }).to_string(),
        json!({ "anyOf": wide }).to_string(),
        json!({ "allOf": (0..40).map(|n| json!({ "type": "string", "pattern": format!("a.{{{n}}}b") })).collect::<Vec<_>>() }).to_string(),
        deep("{\"items\":", "}", 60),
        refs_of_refs(),
        deep("{\"items\":", "}", 100_000),
        deep("[", "]", 100_000),
        "{\"type\": \"strange\"}".into(),
        "{".into(),
        "[]".into(),
        "null".into(),
        String::new(),
    ];
    let grammars = [
        "start: start start".to_owned(),
        "start: a\na: b\nb: a".into(),
        "start: a*\na: b*\nb: \"\"".into(),
        "start: (\"a\"? \"a\"? \"a\"? \"a\"?){1,1000}".into(),
        "start: /(a{1,999}){1,999}/".into(),
        "start: /a{1,99999}/".into(),
        "start: (((\"a\"{1,999}){1,999}){1,999}){1,999}".into(),
        "start: /(a|aa|aaa|b*)*c/ start?".into(),
        format!("start: {}\"a\"{}", "(".repeat(60), ")".repeat(60)),
        format!("start: {}\"a\"{}", "(".repeat(100_000), ")".repeat(100_000)),
        format!("start: /{}a{}/", "(".repeat(60), ")".repeat(60)),
        format!("start: {}", "\"a\" ".repeat(200_000)),
        format!("start: {}\"b\"", "\"a\" | ".repeat(100_000)),
        (0..20_000).map(|n| format!("r{n}: \"a\" r{}\n", n + 1)).collect::<String>()
            + "r20000: \"b\"\nstart: r0\n",
        "%import common.NOTHING\nstart: NOTHING".into(),
        "start: %json { \"$ref\": \"#\" }".into(),
        "start: %llguidance {}".into(),
        "start: <|im_end|>".into(),
        "start: <[99999999]>".into(),
        "start: @other".into(),
        "\u{0}".into(),
        "x".repeat((1 << 20) + 1),
        String::new(),
    ];
    let schemas = schemas.iter().map(|text| ("--json-schema", text));
    for (flag, text) in schemas.chain(grammars.iter().map(|text| ("--grammar", text))) {
        let run = by(&folder, flag, text, &["--temp", "1", "--seed", "1", "-n", "40"]);
        let short: String = text.chars().take(80).collect();
        assert!(matches!(run.code, Some(0..=2)), "{flag} {short}: {:?} {}", run.code, run.err);
        assert!(!run.err.contains("panicked"), "{flag} {short}: {}", run.err);
        if run.code != Some(0) {
            assert!(
                !run.err.trim().is_empty() && run.err.len() < 2_000,
                "{flag} {short}: {}",
                run.err
            );
        }
        let peak =
            named(&run.events(), "done").first().and_then(|done| done["peak_bytes"].as_u64());
        assert!(peak.is_none_or(|peak| peak < 1 << 30), "{flag} {short}: {peak:?} bytes");
    }
}

const YES_NO: &str = r#"{"enum": ["yes", "no", "maybe so"]}"#;

/// What ends an answer by a grammar besides the grammar.
#[test]
fn a_grammar_goes_together_with_what_else_ends_an_answer() {
    let folder = Folder::new();
    let run = |more: &[&str]| {
        let events = by(&folder, "--json-schema", YES_NO, more).ok().events();
        (text(&events), finish(&events).to_owned())
    };
    let (whole, finished) = run(&[]);
    assert!(["\"yes\"", "\"no\"", "\"maybe so\""].contains(&whole.as_str()), "{whole}");
    assert_eq!(finished, "eos");
    assert_eq!(run(&["-n", "2"]), (whole[..2].to_owned(), "length".into()));
    let stop = &whole[1..3];
    assert_eq!(run(&["--stop", stop]), ("\"".into(), "stop".into()));
    assert_eq!(run(&["--window", "64"]), (whole.clone(), "eos".into()), "a stream is as any other");
    // A bias moves choices among what is allowed, and not beyond.
    let ids = folder.path("tokenizer.json");
    let file: Value = serde_json::from_str(&std::fs::read_to_string(ids).unwrap()).unwrap();
    let id = |token: &str| file["model"]["vocab"][token].as_u64().unwrap();
    let bias = format!("{}:1000,{}:900", id("z"), id("m"));
    assert_eq!(run(&["--logit-bias", &bias]), ("\"maybe so\"".into(), "eos".into()));

    for (flag, value) in [("--ignore-eos", None), ("--min-tokens", Some("3"))] {
        let refused =
            by(&folder, "--json-schema", YES_NO, &[&[flag][..], value.as_slice()].concat());
        assert_eq!(refused.code, Some(2), "{flag}");
        assert!(refused.err.contains(flag), "{}", refused.err);
    }
    let two = folder.write("two", "start: \"a\"");
    let refused = by(&folder, "--json-schema", YES_NO, &["--grammar", two.to_str().unwrap()]);
    assert_eq!(refused.code, Some(2));
    let absent = folder.run(&["-p", "x", "--grammar", "/nowhere/grammar"]);
    assert!(absent.code == Some(1) && absent.err.contains("/nowhere/grammar"), "{}", absent.err);
}

/// No character of the grammar is in the vocabulary: an end with a reason, and never a free token.
#[test]
fn a_dead_end_is_said_and_nothing_is_made_up() {
    let folder = Folder::new();
    for (grammar, before) in [("start: \"\u{e9}\"", ""), ("start: \"ab\" \"\u{e9}\"", "ab")] {
        let run = by(&folder, "--grammar", grammar, &["--temp", "1"]);
        assert_eq!(run.code, Some(1));
        let events = run.events();
        assert_eq!((text(&events).as_str(), finish(&events)), (before, "dead_end"));
        assert!(named(&events, "error")[0]["message"].as_str().unwrap().contains("dead end"));
    }
}

/// Each answer of a conversation begins the grammar anew, and one that goes on goes on in it.
#[test]
fn each_answer_has_the_grammar_from_its_beginning() {
    let folder = Folder::new();
    let schema = folder.write("schema", YES_NO);
    let schema = schema.to_str().unwrap();
    let mut chat = folder.command("chat", &["--json", "--json-schema", schema, "--temp", "2"]);
    let chat = done_with_stdin(&mut chat, "one\ntwo\n/regen\nthree\n");
    let (mut answers, mut now) = (Vec::new(), String::new());
    for event in chat.ok().events() {
        match event["event"].as_str().unwrap() {
            "token" => now += event["text"].as_str().unwrap(),
            "done" => answers.push(std::mem::take(&mut now)),
            _ => {}
        }
    }
    assert_eq!(answers.len(), 4);
    for answer in &answers {
        assert!(["\"yes\"", "\"no\"", "\"maybe so\""].contains(&answer.as_str()), "{answer}");
    }

    let saved = folder.arg("saved");
    let fixed = ["--raw", "--json", "--json-schema", schema];
    let first = folder.run(&[&fixed[..], &["-p", "x", "-n", "2", "--save-state", &saved]].concat());
    let rest = folder.run(&[&fixed[..], &["--load-state", &saved]].concat());
    let answer = text(&first.ok().events()) + &text(&rest.ok().events());
    assert!(["\"yes\"", "\"no\"", "\"maybe so\""].contains(&answer.as_str()), "{answer}");
    // One that is not in the grammar cannot go on in it.
    let other = folder.write("other", "start: \"other\"");
    let run = folder.run(&["--raw", "--load-state", &saved, "--grammar", other.to_str().unwrap()]);
    assert_eq!(run.code, Some(1));
    assert!(run.err.contains("grammar cannot go on"), "{}", run.err);
}

#[test]
fn a_folder_that_a_grammar_cannot_be_over_is_refused() {
    let grammar = "start: \"a\"";
    let folder = Folder::new();
    let config = std::fs::read_to_string(folder.path("config.json")).unwrap();
    let mut without: Value = serde_json::from_str(&config).unwrap();
    without["eos_token_id"] = Value::Null;
    folder.write("config.json", &without.to_string());
    let run = by(&folder, "--grammar", grammar, &[]);
    assert_eq!(run.code, Some(3));
    assert!(run.err.contains("end-of-sequence"), "{}", run.err);

    let folder = Folder::new();
    let file = std::fs::read_to_string(folder.path("tokenizer.json")).unwrap();
    let mut pieces: Value = serde_json::from_str(&file).unwrap();
    pieces["decoder"] = json!({ "type": "WordPiece", "prefix": "##", "cleanup": true });
    folder.write("tokenizer.json", &pieces.to_string());
    let run = by(&folder, "--grammar", grammar, &[]);
    assert_eq!(run.code, Some(3));
    assert!(run.err.contains("several tokens together"), "{}", run.err);
}

#[test]
fn events_tell_how_likely_tokens_were() {
    let folder = Folder::new();
    let fixed = ["--raw", "-p", "begin", "--json", "-n", "5", "--ignore-eos"];
    let with = [&fixed[..], &["--logprobs", "3", "--prompt-logprobs", "2"]].concat();
    let run = folder.run(&with);
    let events = run.ok().events();
    let check = |event: &Value, n_top: usize| {
        let top = event["top"].as_array().unwrap();
        let logprob = |of: &Value| of["logprob"].as_f64().unwrap();
        assert_eq!(top.len(), n_top);
        assert!(top.windows(2).all(|pair| logprob(&pair[0]) >= logprob(&pair[1])), "{event}");
        assert!(logprob(event) <= logprob(&top[0]) && logprob(&top[0]) < 0.0, "{event}");
        let own: Vec<_> = top.iter().filter(|next| next["id"] == event["id"]).collect();
        assert!(own.iter().all(|own| own["logprob"] == event["logprob"]), "{event}");
    };
    let prompt = named(&events, "prompt");
    let said: String = prompt.iter().map(|event| event["text"].as_str().unwrap()).collect();
    assert_eq!(said, "begin");
    assert!(prompt[0]["logprob"].is_null() && prompt[0]["top"].is_null(), "nothing is before it");
    prompt[1..].iter().for_each(|event| check(event, 2));
    let tokens = named(&events, "token");
    assert_eq!(tokens.len(), 5);
    tokens.iter().for_each(|event| check(event, 3));
    // They change nothing else.
    let plain = folder.run(&fixed).ok().events();
    assert_eq!(text(&events), text(&plain));
    assert!(named(&plain, "prompt").is_empty() && named(&plain, "token")[0].get("top").is_none());

    for flag in ["--logprobs", "--prompt-logprobs"] {
        let refused = folder.run(&["-p", "x", flag, "1"]);
        assert!(refused.code == Some(2) && refused.err.contains("--json"), "{}", refused.err);
    }
    // The first token of a turn that follows another has one before it.
    let saved = folder.arg("saved");
    done(
        &mut folder
            .command("run", &["--raw", "-q", "-p", "beg", "-n", "0", "--save-state", &saved]),
    )
    .ok();
    let more = folder.run(&[&with[..], &["--load-state", &saved]].concat()).ok().events();
    let more = named(&more, "prompt");
    assert_eq!(more.len(), 2, "those that the session holds are not computed again");
    for (event, whole) in more.iter().zip(&prompt[3..]) {
        let (now, then) = (event["logprob"].as_f64().unwrap(), whole["logprob"].as_f64().unwrap());
        assert!((now - then).abs() < 1e-4, "{event} {whole}");
    }
}
