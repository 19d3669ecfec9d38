//! What chat templates expect of Python: functions, filters and methods, each within the rendering's budget.

use std::fmt::{self, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Environment, Error, ErrorKind, State, Value};
use minijinja_contrib::pycompat;

use crate::metered::{METER, TEXT};

/// What a list or map entry is taken to weigh.
const ENTRY_BYTES: u64 = 32;

/// The bytes that a rendering may copy, and why it stopped.
#[derive(Debug)]
pub(crate) struct Budget {
    limit: u64,
    left: AtomicU64,
    spent: AtomicU64,
    refused: Mutex<Option<String>>,
}

impl Budget {
    pub(crate) fn new(limit: u64) -> Budget {
        Budget {
            limit,
            left: AtomicU64::new(limit),
            spent: AtomicU64::new(0),
            refused: Mutex::new(None),
        }
    }

    pub(crate) fn limit(&self) -> u64 {
        self.limit
    }

    pub(crate) fn is_spent(&self) -> bool {
        self.spent.load(Ordering::Relaxed) != 0
    }

    /// What the template said through `raise_exception`.
    pub(crate) fn refused(&self) -> Option<String> {
        self.refused.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn charge(&self, bytes: u64) -> Result<(), Error> {
        let take = |left: u64| left.checked_sub(bytes);
        match self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take) {
            Ok(_) => Ok(()),
            Err(_) => {
                self.spent.store(1, Ordering::Relaxed);
                Err(Error::new(ErrorKind::InvalidOperation, "the template copies too much"))
            }
        }
    }

    /// Charges a value by what it holds itself: a string its bytes, a list its entries.
    fn charge_value(&self, value: &Value) -> Result<(), Error> {
        let bytes = match (value.as_str(), value.kind()) {
            (Some(text), _) => text.len() as u64,
            (None, ValueKind::Seq | ValueKind::Map | ValueKind::Iterable) => {
                value.len().unwrap_or(0) as u64 * ENTRY_BYTES
            }
            _ => 0,
        };
        self.charge(bytes)
    }

    /// A value's text, written within the budget.
    fn text(&self, value: &Value) -> Result<String, Error> {
        let mut out = Charged { budget: self, text: String::new() };
        match write!(out, "{value}") {
            Ok(()) => Ok(out.text),
            Err(fmt::Error) => {
                Err(Error::new(ErrorKind::InvalidOperation, "the template copies too much"))
            }
        }
    }
}

/// A string that charges what is written to it.
struct Charged<'a> {
    budget: &'a Budget,
    text: String,
}

impl Write for Charged<'_> {
    fn write_str(&mut self, part: &str) -> fmt::Result {
        // Writing costs time even where it adds little: a deep list is mostly brackets.
        self.budget.charge(part.len().max(8) as u64).map_err(|_| fmt::Error)?;
        self.text.push_str(part);
        Ok(())
    }
}

fn invalid(why: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::InvalidOperation, why)
}

/// Adds everything to an environment.
pub(crate) fn install(env: &mut Environment<'_>, budget: &Arc<Budget>) {
    // Filters that make long values of short ones and that Python's Jinja or chat templates do not have.
    for name in
        ["format", "pprint", "batch", "slice", "chain", "zip", "sum", "escape", "e", "urlencode"]
    {
        env.remove_filter(name);
    }
    install_meter(env, budget);
    install_filters(env, budget);
    install_functions(env, budget);
}

fn install_meter(env: &mut Environment<'_>, budget: &Arc<Budget>) {
    let b = budget.clone();
    env.add_filter(METER, move |value: Value| b.charge_value(&value).map(|()| value));
    let b = budget.clone();
    env.add_filter(TEXT, move |value: Value| match value.as_str() {
        Some(_) => Ok(value),
        None => b.text(&value).map(Value::from),
    });
    let b = budget.clone();
    env.set_formatter(move |out, state, value| match value.as_str() {
        Some(text) => {
            b.charge(text.len() as u64)?;
            minijinja::escape_formatter(out, state, value)
        }
        None if value.is_none() => Ok(out.write_str("None")?),
        None => Ok(out.write_str(&b.text(value)?)?),
    });
    let b = budget.clone();
    env.set_unknown_method_callback(move |state, value, method, args| {
        b.charge_value(value)?;
        match (method, value.as_str()) {
            ("format", Some(_)) => Err(invalid("str.format is not supported in chat templates")),
            ("join", Some(separator)) => match args {
                [items] => join(&b, items, separator).map(Value::from),
                _ => Err(invalid("join takes one argument")),
            },
            ("replace", Some(text)) => match args {
                [from, to, rest @ ..] => {
                    let count = rest.first().and_then(|n| n.as_usize()).unwrap_or(usize::MAX);
                    replace(&b, text, from, to, count)
                }
                _ => Err(invalid("replace takes two or three arguments")),
            },
            _ => pycompat::unknown_method_callback(state, value, method, args),
        }
    });
}

fn install_filters(env: &mut Environment<'_>, budget: &Arc<Budget>) {
    let b = budget.clone();
    env.add_filter("join", move |items: &Value, separator: Option<&str>| {
        join(&b, items, separator.unwrap_or(""))
    });
    let b = budget.clone();
    env.add_filter("replace", move |text: &Value, from: &Value, to: &Value| {
        replace(&b, &b.text(text)?, from, to, usize::MAX)
    });
    let b = budget.clone();
    env.add_filter("string", move |value: &Value| b.text(value));
    let b = budget.clone();
    env.add_filter(
        "indent",
        move |text: &str, width: Option<usize>, first: Option<bool>, blank: Option<bool>| {
            let width = width.unwrap_or(4).min(1024);
            let lines = text.lines().count() as u64;
            b.charge(text.len() as u64 + lines * width as u64)?;
            Ok::<_, Error>(indent(text, width, first.unwrap_or(false), blank.unwrap_or(false)))
        },
    );
    let b = budget.clone();
    env.add_filter("tojson", move |value: &Value, indent: Option<usize>, kwargs: Kwargs| {
        let indent = indent.or(kwargs.get::<Option<usize>>("indent")?).map(|n| n.min(64));
        let ascii = kwargs.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false);
        let sorted = kwargs.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
        // Templates pass separators only to ask for the default ones.
        let _: Option<Value> = kwargs.get("separators")?;
        kwargs.assert_all_used()?;
        let mut writer =
            JsonWriter { out: Charged { budget: &b, text: String::new() }, indent, ascii, sorted };
        writer.value(value, 0)?;
        Ok::<_, Error>(Value::from(writer.out.text))
    });
}

fn install_functions(env: &mut Environment<'_>, budget: &Arc<Budget>) {
    let b = budget.clone();
    env.add_function("raise_exception", move |why: &Value| -> Result<Value, Error> {
        let why = b.text(why)?;
        *b.refused.lock().unwrap_or_else(PoisonError::into_inner) = Some(why);
        Err(invalid("raise_exception"))
    });
    env.add_function("strftime_now", |_: &State<'_, '_>, format: &str| {
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        strftime(format, since.as_secs()).map_err(invalid)
    });
}

fn join(budget: &Budget, items: &Value, separator: &str) -> Result<String, Error> {
    let mut out = Charged { budget, text: String::new() };
    for (index, item) in items.try_iter()?.enumerate() {
        let separator = if index == 0 { "" } else { separator };
        write!(out, "{separator}{item}").map_err(|_| invalid("the template copies too much"))?;
    }
    Ok(out.text)
}

fn replace(
    budget: &Budget,
    text: &str,
    from: &Value,
    to: &Value,
    count: usize,
) -> Result<Value, Error> {
    let (Some(from), Some(to)) = (from.as_str(), to.as_str()) else {
        return Err(invalid("replace takes strings"));
    };
    let found = if from.is_empty() { text.chars().count() + 1 } else { text.matches(from).count() };
    let grown = (found.min(count) as u64).saturating_mul(to.len() as u64);
    budget.charge(grown.saturating_add(text.len() as u64))?;
    Ok(Value::from(text.replacen(from, to, count)))
}

fn indent(text: &str, width: usize, first: bool, blank: bool) -> String {
    let pad = " ".repeat(width);
    let mut out = String::new();
    for (index, line) in text.split('\n').enumerate() {
        if index > 0 {
            out.push('\n');
        }
        if (index > 0 || first) && (blank || !line.is_empty()) {
            out.push_str(&pad);
        }
        out.push_str(line);
    }
    out
}

/// JSON as Python's `json.dumps` writes it.
struct JsonWriter<'a> {
    out: Charged<'a>,
    indent: Option<usize>,
    ascii: bool,
    sorted: bool,
}

impl JsonWriter<'_> {
    fn put(&mut self, text: &str) -> Result<(), Error> {
        self.out.write_str(text).map_err(|_| invalid("the template copies too much"))
    }

    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > 64 {
            return Err(invalid("tojson: nested too deeply"));
        }
        match value.kind() {
            ValueKind::None => self.put("null"),
            ValueKind::Bool => self.put(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => self.put(&value.to_string()),
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.sorted {
                    keys.sort();
                }
                self.entries(depth, ('{', '}'), keys, |writer, key| {
                    writer.string(&key.to_string())?;
                    writer.put(": ")?;
                    writer.value(&value.get_item(key)?, depth + 1)
                })
            }
            ValueKind::Seq | ValueKind::Iterable => {
                let items = value.try_iter()?;
                self.entries(depth, ('[', ']'), items, |writer, item| writer.value(item, depth + 1))
            }
            kind => Err(invalid(format!("tojson: a value of type {kind} is not JSON"))),
        }
    }

    fn entries(
        &mut self,
        depth: usize,
        (open, close): (char, char),
        items: impl IntoIterator<Item = Value>,
        mut write: impl FnMut(&mut Self, &Value) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let line =
            |depth: usize| self.indent.map(|width| format!("\n{}", " ".repeat(width * depth)));
        let (inner, outer) = (line(depth + 1), line(depth));
        self.put(open.encode_utf8(&mut [0; 4]))?;
        let mut empty = true;
        for item in items {
            match &inner {
                Some(line) => {
                    self.put(if empty { "" } else { "," })?;
                    self.put(line)?;
                }
                None => self.put(if empty { "" } else { ", " })?,
            }
            write(self, &item)?;
            empty = false;
        }
        if !empty {
            self.put(outer.as_deref().unwrap_or(""))?;
        }
        self.put(close.encode_utf8(&mut [0; 4]))
    }

    fn string(&mut self, text: &str) -> Result<(), Error> {
        self.put("\"")?;
        for c in text.chars() {
            match c {
                '"' => self.put("\\\"")?,
                '\\' => self.put("\\\\")?,
                '\n' => self.put("\\n")?,
                '\r' => self.put("\\r")?,
                '\t' => self.put("\\t")?,
                '\u{8}' => self.put("\\b")?,
                '\u{c}' => self.put("\\f")?,
                c if c < ' ' || (self.ascii && !c.is_ascii()) => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        self.put(&format!("\\u{unit:04x}"))?;
                    }
                }
                c => self.put(c.encode_utf8(&mut [0; 4]))?,
            }
        }
        self.put("\"")
    }
}

/// The template with `{% generation %}` blocks, which only mark text, as blocks that are always taken.
pub(crate) fn without_generation_marks(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at + 2);
        out.push_str(before);
        let start = tag.len() - tag.trim_start_matches(['-', '+']).trim_start().len();
        let (lead, body) = tag.split_at(start);
        let name_len =
            body.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(body.len());
        let (name, after) = body.split_at(name_len);
        let closes = after.trim_start().trim_start_matches(['-', '+']).starts_with("%}");
        out.push_str(lead);
        out.push_str(match name {
            "generation" if closes => "if true",
            "endgeneration" if closes => "endif",
            other => other,
        });
        rest = after;
    }
    out.push_str(rest);
    out
}

/// `strftime` in English and UTC, for the conversions that templates use.
pub(crate) fn strftime(format: &str, unix_seconds: u64) -> Result<String, String> {
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    const DAYS: [&str; 7] =
        ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];
    let (days, seconds) = (unix_seconds / 86_400, unix_seconds % 86_400);
    let (year, day_of_year, leap) = year_of(days);
    let lengths = [31, 28 + u64::from(leap), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let (mut month, mut day) = (0, day_of_year);
    while month < 11 && day >= lengths[month] {
        day -= lengths[month];
        month += 1;
    }
    let (hour, minute, second) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    let weekday = DAYS[(days % 7) as usize];
    let hour12 = if hour % 12 == 0 { 12 } else { hour % 12 };

    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        match chars.next() {
            Some('Y') => out += &year.to_string(),
            Some('y') => out += &format!("{:02}", year % 100),
            Some('m') => out += &format!("{:02}", month + 1),
            Some('d') => out += &format!("{:02}", day + 1),
            Some('e') => out += &format!("{:2}", day + 1),
            Some('j') => out += &format!("{:03}", day_of_year + 1),
            Some('B') => out += MONTHS[month],
            Some('b' | 'h') => out += &MONTHS[month][..3],
            Some('A') => out += weekday,
            Some('a') => out += &weekday[..3],
            Some('H') => out += &format!("{hour:02}"),
            Some('I') => out += &format!("{hour12:02}"),
            Some('M') => out += &format!("{minute:02}"),
            Some('S') => out += &format!("{second:02}"),
            Some('p') => out += if hour < 12 { "AM" } else { "PM" },
            Some('Z') => out += "UTC",
            Some('%') => out.push('%'),
            other => {
                return Err(format!(
                    "strftime_now: conversion %{} is not supported",
                    other.unwrap_or(' ')
                ));
            }
        }
    }
    Ok(out)
}

/// The year that holds a day since 1970, the day's number in it, and whether it is a leap year.
fn year_of(mut days: u64) -> (u64, u64, bool) {
    let mut year = 1970;
    loop {
        let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
        let length = 365 + u64::from(leap);
        if days < length {
            return (year, days, leap);
        }
        days -= length;
        year += 1;
    }
}
