//! `tojson`: JSON as Python's `json.dumps` writes it.

use super::fault::fault;
use super::run::{CallArgs, R, Run};
use super::text::{Builder, Str};
use super::value::{Value, float_repr};

/// The filter.
pub(crate) fn to_json(run: &mut Run<'_>, value: &Value, args: CallArgs) -> R<Value> {
    let [ascii, indent, separators, sorted] =
        args.bind("tojson", ["ensure_ascii", "indent", "separators", "sort_keys"])?;
    let is = |flag: Option<Value>| flag.is_some_and(|flag| flag.is_true());
    let indent = match indent {
        None | Some(Value::None) => None,
        Some(Value::Str(text)) => Some(text),
        Some(n) => {
            let n = n.as_int().ok_or_else(|| fault("tojson: indent takes an int or a str"))?;
            Some(Str::own(" ".repeat(usize::try_from(n).unwrap_or(0).min(1 << 10))))
        }
    };
    let [item, key] = match separators {
        None | Some(Value::None) => {
            [Str::own(if indent.is_some() { "," } else { ", " }), Str::own(": ")]
        }
        Some(pair) => {
            let pair = pair.iterate(run.meter)?;
            match &pair.list[..] {
                [Value::Str(item), Value::Str(key)] => [item.clone(), key.clone()],
                _ => return Err(fault("tojson: separators takes two strings")),
            }
        }
    };
    let mut out = Builder::new(run.meter);
    Writer { out: &mut out, ascii: is(ascii), indent, item, key, sorted: is(sorted) }
        .value(value, 0)?;
    Ok(Value::Str(out.finish()))
}

struct Writer<'a, 'm> {
    out: &'a mut Builder<'m>,
    ascii: bool,
    indent: Option<Str>,
    /// Between entries, and after keys.
    item: Str,
    key: Str,
    sorted: bool,
}

impl Writer<'_, '_> {
    fn value(&mut self, value: &Value, depth: usize) -> R<()> {
        match value {
            Value::None => self.out.own("null"),
            Value::Bool(is) => self.out.own(if *is { "true" } else { "false" }),
            Value::Int(n) => self.out.own(&n.to_string()),
            Value::Float(n) => self.out.own(&float(*n)),
            Value::Str(text) => self.string(text),
            Value::List(items) | Value::Tuple(items) | Value::Group(items) => {
                self.out.own("[")?;
                for (at, item) in items.list.iter().enumerate() {
                    self.begin(at, depth)?;
                    self.value(item, depth + 1)?;
                }
                self.end(items.list.len(), depth)?;
                self.out.own("]")
            }
            Value::Dict(dict) => {
                let mut entries: Vec<(Str, &Value)> = Vec::new();
                for (key, value) in &dict.entries {
                    entries.push((key_text(key)?, value));
                }
                if self.sorted {
                    entries.sort_by(|(a, _), (b, _)| a.as_str().cmp(b.as_str()));
                }
                self.out.own("{")?;
                for (at, (key, value)) in entries.iter().enumerate() {
                    self.begin(at, depth)?;
                    self.string(key)?;
                    let colon = self.key.clone();
                    self.out.push(&colon)?;
                    self.value(value, depth + 1)?;
                }
                self.end(entries.len(), depth)?;
                self.out.own("}")
            }
            other => {
                Err(fault(format!("object of type {} is not JSON serializable", other.type_name())))
            }
        }
    }

    fn begin(&mut self, at: usize, depth: usize) -> R<()> {
        if at > 0 {
            let separator = self.item.clone();
            self.out.push(&separator)?;
        }
        self.line(depth + 1)
    }

    fn end(&mut self, n: usize, depth: usize) -> R<()> {
        if n > 0 { self.line(depth) } else { Ok(()) }
    }

    fn line(&mut self, depth: usize) -> R<()> {
        let Some(indent) = self.indent.clone() else { return Ok(()) };
        self.out.own("\n")?;
        (0..depth).try_for_each(|_| self.out.push(&indent))
    }

    fn string(&mut self, text: &Str) -> R<()> {
        self.out.own("\"")?;
        for (run, foreign) in text.runs() {
            let mut rest = run;
            // What needs no escape goes at once.
            while let Some(at) = rest.find(|c: char| self.escapes(c)) {
                let (plain, after) = rest.split_at(at);
                self.out.put(plain, foreign)?;
                let Some(c) = after.chars().next() else { break };
                self.escape(c, foreign)?;
                rest = after.get(c.len_utf8()..).unwrap_or_default();
            }
            self.out.put(rest, foreign)?;
        }
        self.out.own("\"")
    }

    fn escapes(&self, c: char) -> bool {
        c < ' ' || c == '"' || c == '\\' || (self.ascii && !(' '..='~').contains(&c))
    }

    fn escape(&mut self, c: char, foreign: bool) -> R<()> {
        let short = match c {
            '"' => "\\\"",
            '\\' => "\\\\",
            '\n' => "\\n",
            '\r' => "\\r",
            '\t' => "\\t",
            '\x08' => "\\b",
            '\x0c' => "\\f",
            c => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    self.out.put(&format!("\\u{unit:04x}"), foreign)?;
                }
                return Ok(());
            }
        };
        self.out.put(short, foreign)
    }
}

fn key_text(key: &Value) -> R<Str> {
    Ok(match key {
        Value::Str(text) => text.clone(),
        Value::None => Str::own("null"),
        Value::Bool(is) => Str::own(if *is { "true" } else { "false" }),
        Value::Int(n) => Str::own(n.to_string()),
        Value::Float(n) => Str::own(float(*n)),
        other => {
            return Err(fault(format!(
                "keys must be str, int, float, bool or None, not {}",
                other.type_name()
            )));
        }
    })
}

fn float(n: f64) -> String {
    if n.is_nan() {
        "NaN".into()
    } else if n.is_infinite() {
        if n > 0.0 { "Infinity" } else { "-Infinity" }.into()
    } else {
        float_repr(n)
    }
}
