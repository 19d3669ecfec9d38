//! The order of the code: which file uses which, from its `use` lines and the paths in its bodies.
//!
//! There are no circles among files, and no arrows from a lower floor to a higher one.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// Rooms, the modules at the top, by floors from the bottom.
const FLOORS: [&[&str]; 12] = [
    &["error", "log", "sync", "evidence", "receipt"],
    &["store", "share", "memory", "gate", "file"],
    &["compute", "keep", "read", "pool"],
    &["plan", "recipe"],
    &["backend"],
    &["model", "device", "sampler", "logprobs", "sequence"],
    &["forward"],
    &["engine"],
    &["step"],
    &["session"],
    &["generate", "state"],
    &["capi"],
];

/// Crates: where they are, and the file that is their root.
const CRATES: [(&str, &str); 4] = [
    ("engine/src", "lib"),
    ("engine/src/bin/loris", "main"),
    ("kernels-cuda/src", "lib"),
    ("loader/src", "lib"),
];

/// Module by module, what it uses; a module is its path, `""` the root.
type Graph = BTreeMap<String, BTreeSet<String>>;

/// The sources of a crate: module and text.
fn sources(dir: &str, root: &str) -> BTreeMap<String, String> {
    let dir = &Path::new(env!("CARGO_MANIFEST_DIR")).join(dir);
    let mut found = BTreeMap::new();
    let mut folders = vec![dir.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.strip_prefix(dir).unwrap().to_str().unwrap().to_owned();
            if path.is_dir() {
                if name != "bin" {
                    folders.push(path);
                }
            } else if let Some(name) = name.strip_suffix(".rs") {
                let name =
                    if name == root { "" } else { name.strip_suffix("/mod").unwrap_or(name) };
                found.insert(name.replace('/', "::"), std::fs::read_to_string(&path).unwrap());
            }
        }
    }
    found
}

/// Words and signs without comments, texts, attributes' texts and tests.
fn tokens(text: &str) -> Vec<String> {
    let text = text.split("#[cfg(test)]\nmod tests").next().unwrap();
    let mut tokens: Vec<String> = Vec::new();
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        let len = match c {
            _ if rest.starts_with("//") => rest.find('\n').unwrap_or(rest.len()),
            _ if rest.starts_with("/*") => rest.find("*/").unwrap() + 2,
            '"' => {
                let mut escaped = false;
                let end = rest[1..].find(|c| {
                    let is_end = c == '"' && !escaped;
                    escaped = c == '\\' && !escaped;
                    is_end
                });
                end.unwrap() + 2
            }
            '\'' if rest.starts_with("'\\") => 2 + rest[2..].find('\'').unwrap().max(1) + 1,
            '\'' if rest.chars().nth(2) == Some('\'') => {
                2 + rest.chars().nth(1).unwrap().len_utf8()
            }
            c if c.is_alphanumeric() || c == '_' => {
                let end = rest.find(|c: char| !(c.is_alphanumeric() || c == '_'));
                tokens.push(rest[..end.unwrap_or(rest.len())].into());
                end.unwrap_or(rest.len())
            }
            _ if rest.starts_with("::") => {
                tokens.push("::".into());
                2
            }
            c => {
                if !c.is_whitespace() {
                    tokens.push(c.into());
                }
                c.len_utf8()
            }
        };
        rest = &rest[len..];
    }
    tokens
}

/// The paths that a path with braces stands for, and where it ends.
fn tree(tokens: &[String], mut at: usize, prefix: &[String], out: &mut Vec<Vec<String>>) -> usize {
    let mut path = prefix.to_vec();
    loop {
        match tokens.get(at).map(String::as_str) {
            Some("{") => {
                at += 1;
                while tokens.get(at).is_some_and(|token| token != "}") {
                    at = tree(tokens, at, &path, out);
                    at += usize::from(tokens.get(at).is_some_and(|token| token == ","));
                }
                return at + 1;
            }
            Some(word) => path.push(word.into()),
            None => return at,
        }
        at += 1;
        if tokens.get(at).is_none_or(|token| token != "::") {
            break;
        }
        at += 1;
    }
    out.push(path);
    if tokens.get(at).is_some_and(|token| token == "as") { at + 2 } else { at }
}

/// The paths of a module that it uses, and those that it only hands on.
type Paths = (Vec<Vec<String>>, Vec<Vec<String>>);

fn paths(text: &str) -> Paths {
    let tokens = tokens(text);
    let (mut used, mut handed_on) = (Vec::new(), Vec::new());
    let mut at = 0;
    while at < tokens.len() {
        let before = |n: usize| at.checked_sub(n).map_or("", |i| tokens[i].as_str());
        let begins = before(1) == "use"
            || (tokens.get(at + 1).is_some_and(|t| t == "::") && before(1) != "::");
        let is_scope = before(1) == "in" && before(2) == "("; // who may see a thing
        if !begins || is_scope || !tokens[at].starts_with(|c: char| c.is_alphabetic()) {
            at += 1;
            continue;
        }
        let is_handed_on = before(1) == "use" && (before(2) == "pub" || before(2) == ")");
        let out = if is_handed_on { &mut handed_on } else { &mut used };
        at = tree(&tokens, at, &[], out);
    }
    (used, handed_on)
}

/// Which module uses which.
fn graph(sources: &BTreeMap<String, String>) -> Graph {
    let paths: BTreeMap<_, _> =
        sources.iter().map(|(name, text)| (name.as_str(), paths(text))).collect();
    let child = |module: &str, word: &str| {
        let name = if module.is_empty() { word.to_owned() } else { format!("{module}::{word}") };
        sources.contains_key(&name).then_some(name)
    };
    let up = |module: &str| module.rsplit_once("::").map_or("", |(parent, _)| parent).to_owned();
    // The module that a path leads to, through what modules hand on; none: it leaves the crate.
    fn lead(
        paths: &BTreeMap<&str, Paths>,
        child: &dyn Fn(&str, &str) -> Option<String>,
        up: &dyn Fn(&str) -> String,
        from: &str,
        path: &[String],
        depth: usize,
    ) -> Option<String> {
        let mut words = path.iter().map(String::as_str).peekable();
        let mut now = match words.peek() {
            Some(&"crate") => words.next().map(|_| String::new())?,
            Some(&"self") => words.next().map(|_| from.to_owned())?,
            Some(&"super") => {
                let mut now = from.to_owned();
                while words.next_if_eq(&"super").is_some() {
                    now = up(&now);
                }
                now
            }
            Some(word) => {
                child(from, word)?;
                from.to_owned()
            }
            None => return None,
        };
        for word in words {
            if let Some(next) = child(&now, word) {
                now = next;
                continue;
            }
            let (_, handed_on) = &paths[now.as_str()];
            let same = handed_on.iter().find(|path| path.last().is_some_and(|last| last == word));
            return match same {
                Some(path) if depth < 9 => lead(paths, child, up, &now, path, depth + 1),
                _ => Some(now),
            };
        }
        Some(now)
    }
    let mut graph = Graph::new();
    for (name, (used, _)) in &paths {
        let targets = used.iter().filter_map(|path| lead(&paths, &child, &up, name, path, 0));
        graph.insert(
            (*name).to_owned(),
            targets.filter(|target| target != name && !target.is_empty()).collect(),
        );
    }
    graph
}

/// Sets of modules that use each other.
fn circles(graph: &Graph) -> BTreeSet<String> {
    let reached = |from: &str| {
        let (mut seen, mut left) = (BTreeSet::new(), vec![from.to_owned()]);
        while let Some(now) = left.pop() {
            for next in graph.get(&now).into_iter().flatten() {
                if seen.insert(next.clone()) {
                    left.push(next.clone());
                }
            }
        }
        seen
    };
    let all: BTreeMap<_, _> = graph.keys().map(|name| (name.clone(), reached(name))).collect();
    let mut found = BTreeSet::new();
    for (name, reach) in &all {
        if reach.contains(name) {
            let circle = reach
                .iter()
                .filter(|other| all.get(*other).is_some_and(|reach| reach.contains(name)));
            found.insert(circle.cloned().collect::<Vec<_>>().join(" "));
        }
    }
    found
}

/// Arrows of rooms that go up.
fn upward(graph: &Graph) -> BTreeSet<String> {
    let room = |module: &str| module.split("::").next().unwrap_or_default().to_owned();
    let floor = |room: &str| FLOORS.iter().position(|floor| floor.contains(&room));
    let mut found = BTreeSet::new();
    for (from, targets) in graph {
        for to in targets {
            let (a, b) = (room(from), room(to));
            if let (Some(low), Some(high)) = (floor(&a), floor(&b))
                && low < high
            {
                found.insert(format!("{from} -> {to}"));
            }
        }
    }
    found
}

fn engine() -> BTreeMap<String, String> {
    let mut sources = sources("engine/src", "lib");
    sources.remove("faults"); // tests
    sources
}

fn n_arrows(graph: &Graph) -> usize {
    graph.values().map(BTreeSet::len).sum()
}

#[test]
fn files_have_an_order() {
    for (dir, root) in CRATES {
        let sources = if dir == "engine/src" { engine() } else { sources(dir, root) };
        let graph = graph(&sources);
        assert!(n_arrows(&graph) > graph.len(), "{dir}: paths are found");
        assert_eq!(circles(&graph), BTreeSet::new(), "circles of {dir}");
    }
    let graph = graph(&engine());
    assert!(n_arrows(&graph) > 300, "paths are found");
    for room in
        graph.keys().filter(|name| !name.is_empty()).map(|name| name.split("::").next().unwrap())
    {
        assert!(FLOORS.iter().any(|floor| floor.contains(&room)), "{room} is on no floor");
    }
    assert_eq!(upward(&graph), BTreeSet::new(), "arrows up");
}

/// What is looked for is found where it is.
#[test]
fn planted_circles_and_arrows_are_found() {
    let mut sources = engine();
    let mut add = |name: &str, text: &str| *sources.get_mut(name).unwrap() += text;
    add("memory", "\nfn a() { crate::log::Level::b(); }\n");
    add("log", "\nfn b() { crate::memory::a(); }\n"); // a circle, and an arrow up
    add("receipt", "\nuse crate::Session;\n"); // which the root hands on
    let graph = graph(&sources);
    assert!(circles(&graph).iter().any(|circle| circle.split(' ').any(|name| name == "log")));
    let up = upward(&graph);
    assert!(up.contains("log -> memory") && up.contains("receipt -> session"), "{up:?}");
    let words = tokens(
        "a /* not this */ 'x' '\\'' \"crate::no \\\" crate::no\" // crate::no\nuse crate::{b, c::{self, D as E}};",
    );
    let text = words.join(" ");
    assert!(!text.contains("no") && text.contains("crate :: {"), "{text}");
    let (used, _) = paths("use crate::{b, c::{self, D as E}}; fn f() { super::g::h(); }");
    let joined: Vec<String> = used.iter().map(|path| path.join("::")).collect();
    assert_eq!(joined, ["crate::b", "crate::c::self", "crate::c::D", "super::g::h"]);
}
