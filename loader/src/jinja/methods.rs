//! The methods that strings, lists and dicts have in Python, as far as the sandbox gives them out.

use super::fault::fault;
use super::format;
use super::run::{CallArgs, R, Run, char_offset, view};
use super::text::{Builder, Meter, Str, is_space};
use super::value::{Dict, Value, View, is_printable};

const STR: &[&str] = &[
    "capitalize",
    "casefold",
    "center",
    "count",
    "endswith",
    "expandtabs",
    "find",
    "format",
    "format_map",
    "index",
    "isalnum",
    "isalpha",
    "isascii",
    "isdecimal",
    "isdigit",
    "isidentifier",
    "islower",
    "isnumeric",
    "isprintable",
    "isspace",
    "istitle",
    "isupper",
    "join",
    "ljust",
    "lower",
    "lstrip",
    "partition",
    "removeprefix",
    "removesuffix",
    "replace",
    "rfind",
    "rindex",
    "rjust",
    "rpartition",
    "rsplit",
    "rstrip",
    "split",
    "splitlines",
    "startswith",
    "strip",
    "swapcase",
    "title",
    "upper",
    "zfill",
];
const LIST: &[&str] = &["copy", "count", "index"];
const TUPLE: &[&str] = &["count", "index"];
const DICT: &[&str] = &["copy", "fromkeys", "get", "items", "keys", "values"];
const CYCLER: &[&str] = &["next", "reset"];
/// What would change a value.
const UNSAFE_LIST: &[&str] =
    &["append", "clear", "extend", "insert", "pop", "remove", "reverse", "sort"];
const UNSAFE_DICT: &[&str] = &["clear", "pop", "popitem", "setdefault", "update"];

/// The method of this name.
pub(crate) fn find(value: &Value, name: &str) -> Option<&'static str> {
    let methods = match value {
        Value::Str(_) => STR,
        Value::List(_) => LIST,
        Value::Tuple(_) | Value::Group(_) | Value::Range(..) => TUPLE,
        Value::Dict(_) => DICT,
        Value::Cycler(_) => CYCLER,
        Value::Function("dict") => &["fromkeys"],
        _ => &[],
    };
    methods.iter().find(|method| **method == name).copied()
}

/// Whether Python has the method and the sandbox keeps it.
pub(crate) fn is_unsafe(value: &Value, name: &str) -> bool {
    match value {
        Value::List(_) => UNSAFE_LIST.contains(&name),
        Value::Dict(_) => UNSAFE_DICT.contains(&name),
        _ => false,
    }
}

/// Calls a method.
pub(crate) fn call(
    run: &mut Run<'_>,
    object: &Value,
    name: &'static str,
    args: CallArgs,
) -> R<Value> {
    match object {
        Value::Str(text) if text.is_markup() => match name {
            "format" | "format_map" | "join" | "replace" => {
                Err(fault(format!("{name} of escaped text is not supported")))
            }
            _ => Ok(match of_str(run, text, name, args)? {
                Value::Str(text) => Value::Str(text.with_markup(true)),
                other => other,
            }),
        },
        Value::Str(text) => of_str(run, text, name, args),
        Value::Dict(dict) => of_dict(run, dict, name, args),
        Value::Loop(id) => of_loop(run, *id, name, args),
        Value::Cycler(id) => {
            args.none(name)?;
            let Some((items, at)) = run.cyclers.get_mut(*id) else { return Ok(Value::None) };
            if name == "reset" {
                *at = 0;
                return Ok(Value::None);
            }
            let item = items.list.get(*at).cloned().unwrap_or(Value::None);
            *at = (*at + 1) % items.list.len().max(1);
            Ok(item)
        }
        Value::Function(_) => from_keys(run, args),
        _ => of_list(run, object, name, args),
    }
}

fn of_loop(run: &mut Run<'_>, id: usize, name: &str, args: CallArgs) -> R<Value> {
    let meter = run.meter;
    let Some(state) = run.loops.get_mut(id) else { return Ok(Value::None) };
    if name == "cycle" {
        let at = state
            .index
            .checked_rem(args.pos.len())
            .ok_or_else(|| fault("no items for cycling given"))?;
        return Ok(args.pos.get(at).cloned().unwrap_or(Value::None));
    }
    let same = match &state.last_changed {
        Some(last) if last.len() == args.pos.len() => {
            let mut same = true;
            for (a, b) in last.iter().zip(&args.pos) {
                same = same && a.eq(b, meter)?;
            }
            same
        }
        _ => false,
    };
    state.last_changed = Some(args.pos);
    Ok(Value::Bool(!same))
}

fn of_list(run: &mut Run<'_>, object: &Value, name: &str, args: CallArgs) -> R<Value> {
    if name == "copy" {
        args.none(name)?;
        return Ok(object.clone());
    }
    let [wanted, start, end] = args.bind(name, ["value", "start", "stop"])?;
    let wanted = wanted.ok_or_else(|| fault(format!("{name}: takes a value")))?;
    let items = object.iterate(run.meter)?;
    let place = |bound: Option<Value>, default: usize| match bound.and_then(|n| n.as_int()) {
        Some(n) if n < 0 => usize::try_from(n + items.list.len() as i128).unwrap_or(0),
        Some(n) => usize::try_from(n).unwrap_or(usize::MAX),
        None => default,
    };
    let (start, end) = (place(start, 0), place(end, usize::MAX));
    let mut count = 0;
    for (at, item) in items.list.iter().enumerate() {
        if item.eq(&wanted, run.meter)? {
            if name == "index" && (start..end).contains(&at) {
                return Ok(Value::Int(at as i128));
            }
            count += 1;
        }
    }
    match name {
        "count" => Ok(Value::Int(count)),
        _ => Err(fault("the value is not in the list")),
    }
}

fn of_dict(run: &mut Run<'_>, dict: &std::rc::Rc<Dict>, name: &str, args: CallArgs) -> R<Value> {
    match name {
        "get" => {
            let [key, default] = args.bind(name, ["key", "default"])?;
            let key = key.ok_or_else(|| fault("get: takes a key"))?;
            if matches!(key, Value::List(_) | Value::Dict(_)) {
                return Err(fault(format!("unhashable type: '{}'", key.type_name())));
            }
            let found = match &key {
                Value::Str(key) => dict.get_str(key.as_str(), run.meter)?,
                key => dict.get(key, run.meter)?,
            };
            Ok(found.cloned().or(default).unwrap_or(Value::None))
        }
        "fromkeys" => from_keys(run, args),
        _ => {
            args.none(name)?;
            match name {
                "items" => view(View::Items, dict, run.meter),
                "keys" => view(View::Keys, dict, run.meter),
                "values" => view(View::Values, dict, run.meter),
                _ => Ok(Value::Dict(dict.clone())),
            }
        }
    }
}

fn from_keys(run: &mut Run<'_>, args: CallArgs) -> R<Value> {
    let [keys, value] = args.bind("fromkeys", ["iterable", "value"])?;
    let value = value.unwrap_or(Value::None);
    let mut entries = Vec::new();
    for key in &keys.unwrap_or(Value::None).iterate(run.meter)?.list {
        super::value::insert(&mut entries, key.clone(), value.clone(), run.meter)?;
    }
    Ok(Value::Dict(Dict::new(entries, run.meter)?))
}

/// A string argument.
fn text(value: Option<&Value>, what: &str) -> R<Str> {
    match value {
        Some(Value::Str(text)) => Ok(text.clone()),
        Some(other) => Err(fault(format!("{what}: takes a str, not {}", other.type_name()))),
        None => Err(fault(format!("{what}: an argument is missing"))),
    }
}

fn optional_text(value: Option<&Value>, what: &str) -> R<Option<Str>> {
    match value {
        None | Some(Value::None) => Ok(None),
        some => text(some, what).map(Some),
    }
}

pub(super) fn int_or(value: Option<&Value>, default: i128, what: &str) -> R<i128> {
    match value {
        None => Ok(default),
        Some(value) => value
            .as_int()
            .ok_or_else(|| fault(format!("{what}: takes an int, not {}", value.type_name()))),
    }
}

/// A text with every run of it changed.
fn map_runs(text: &Str, meter: &Meter, map: impl Fn(&str) -> String) -> R<Str> {
    let mut out = Builder::new(meter);
    for (run, foreign) in text.runs() {
        meter.take(run.len())?;
        out.put(&map(run), foreign)?;
    }
    Ok(out.finish())
}

pub(crate) fn lower(text: &Str, meter: &Meter) -> R<Str> {
    map_runs(text, meter, str::to_lowercase)
}

pub(crate) fn upper(text: &Str, meter: &Meter) -> R<Str> {
    map_runs(text, meter, str::to_uppercase)
}

/// `str.capitalize`.
pub(crate) fn capitalize(text: &Str, meter: &Meter) -> R<Str> {
    let first = char_offset(text, 1);
    let mut out = Builder::new(meter);
    for (c, foreign) in text.slice(0..first).marked_chars() {
        to_title(c).chars().try_for_each(|c| out.char(c, foreign))?;
    }
    out.push(&lower(&text.slice(first..text.len()), meter)?)?;
    Ok(out.finish())
}

/// `str.strip` and its one-sided kin.
pub(crate) fn strip(
    text: &Str,
    chars: Option<&Str>,
    left: bool,
    right: bool,
    meter: &Meter,
) -> R<Str> {
    let chars = chars.map(Str::as_str);
    meter.work(text.len().saturating_mul(chars.map_or(1, str::len).max(1)) / 32)?;
    let goes = |c: char| chars.map_or_else(|| is_space(c), |chars| chars.contains(c));
    let mut part = text.as_str();
    if left {
        part = part.trim_start_matches(goes);
    }
    if right {
        part = part.trim_end_matches(goes);
    }
    Ok(text.part(part))
}

/// `str.center` and its kin: where the room goes is `left` of `left + right` parts.
pub(crate) fn pad(text: &Str, width: i128, fill: &Str, side: &str, meter: &Meter) -> R<Str> {
    if fill.as_str().chars().count() != 1 {
        return Err(fault("the fill character must be exactly one character long"));
    }
    let len = text.as_str().chars().count() as i128;
    let room = (width - len).max(0);
    // As CPython halves what is left over.
    let before = match side {
        "left" => 0,
        "right" => room,
        _ => room / 2 + (room & width & 1),
    };
    let mut out = Builder::new(meter);
    for _ in 0..before {
        out.push(fill)?;
    }
    out.push(text)?;
    for _ in before..room {
        out.push(fill)?;
    }
    Ok(out.finish())
}

/// `str.replace`; less than 0 is without bound.
pub(crate) fn replace(text: &Str, from: &Str, to: &Str, count: i128, meter: &Meter) -> R<Str> {
    meter.scan(text.len())?;
    let most = usize::try_from(count).unwrap_or(usize::MAX);
    let mut out = Builder::new(meter);
    let mut done = 0;
    for (at, found) in text.as_str().match_indices(from.as_str()).take(most) {
        out.push(&text.slice(done..at))?;
        out.push(to)?;
        done = at + found.len();
    }
    out.push(&text.slice(done..text.len()))?;
    Ok(out.finish())
}

/// `str.splitlines`.
pub(crate) fn split_lines(text: &Str, keep_ends: bool) -> Vec<Str> {
    let plain = text.as_str();
    let (mut lines, mut start) = (Vec::new(), 0);
    let mut chars = plain.char_indices().peekable();
    while let Some((at, c)) = chars.next() {
        if !matches!(
            c,
            '\n' | '\r' | '\x0b' | '\x0c' | '\x1c'..='\x1e' | '\u{85}' | '\u{2028}' | '\u{2029}'
        ) {
            continue;
        }
        let mut end = at + c.len_utf8();
        if c == '\r' && chars.next_if(|(_, c)| *c == '\n').is_some() {
            end += 1;
        }
        lines.push(text.slice(start..if keep_ends { end } else { at }));
        start = end;
    }
    if start < plain.len() {
        lines.push(text.slice(start..plain.len()));
    }
    lines
}

fn split(text: &Str, separator: Option<&Str>, most: i128, from_right: bool) -> R<Vec<Str>> {
    let most = usize::try_from(most).map_or(usize::MAX, |n| n.saturating_add(1));
    let plain = text.as_str();
    let Some(separator) = separator else {
        return Ok(split_spaces(text, most, from_right));
    };
    if separator.is_empty() {
        return Err(fault("empty separator"));
    }
    let separator = separator.as_str();
    if from_right {
        let mut list: Vec<Str> =
            plain.rsplitn(most, separator).map(|part| text.part(part)).collect();
        list.reverse();
        return Ok(list);
    }
    Ok(plain.splitn(most, separator).map(|part| text.part(part)).collect())
}

fn split_spaces(text: &Str, most: usize, from_right: bool) -> Vec<Str> {
    let mut list = Vec::new();
    let mut rest = text.as_str().trim_matches(is_space);
    while !rest.is_empty() && list.len() + 1 < most {
        let cut = if from_right { rest.rfind(is_space) } else { rest.find(is_space) };
        let Some(at) = cut else { break };
        let (before, after) = rest.split_at(at);
        if from_right {
            list.push(text.part(after.trim_start_matches(is_space)));
            rest = before.trim_end_matches(is_space);
        } else {
            list.push(text.part(before));
            rest = after.trim_start_matches(is_space);
        }
    }
    // What is left over keeps the white space at its far end.
    if !rest.is_empty() {
        let whole = text.as_str();
        let start = (rest.as_ptr() as usize) - (whole.as_ptr() as usize);
        let at_limit = list.len() + 1 == most;
        list.push(match (at_limit, from_right) {
            (true, false) => text.slice(start..whole.len()),
            (true, true) => text.slice(0..start + rest.len()),
            _ => text.part(rest),
        });
    }
    if from_right {
        list.reverse();
    }
    list
}

/// The part that `start` and `end` of a method choose, and the byte where it begins; nothing where it begins past the end.
fn bounded(
    text: &Str,
    start: Option<&Value>,
    end: Option<&Value>,
    what: &str,
) -> R<Option<(usize, Str)>> {
    let len = text.as_str().chars().count() as i128;
    let place = |value: Option<&Value>, default: i128| match value {
        None | Some(Value::None) => Ok(default),
        some => int_or(some, 0, what).map(|n| if n < 0 { (n + len).max(0) } else { n }),
    };
    let (start, end) = (place(start, 0)?, place(end, len)?.min(len));
    if start > end {
        return Ok(None);
    }
    let at = |n: i128| char_offset(text, usize::try_from(n).unwrap_or(0));
    Ok(Some((at(start), text.slice(at(start)..at(end)))))
}

fn of_str(run: &mut Run<'_>, this: &Str, name: &str, args: CallArgs) -> R<Value> {
    let meter = run.meter;
    meter.scan(this.len())?;
    let plain = this.as_str();
    let bool = |is: bool| Ok(Value::Bool(is));
    match name {
        "format" => return format::braces(run, this, args).map(Value::Str),
        "format_map" => {
            let [map] = args.bind(name, ["mapping"])?;
            let Some(Value::Dict(dict)) = map else {
                return Err(fault("format_map: takes a dict"));
            };
            let named = dict.entries.iter().filter_map(|(key, value)| match key {
                Value::Str(key) => Some((key.clone(), value.clone())),
                _ => None,
            });
            let args = CallArgs { pos: Vec::new(), named: named.collect() };
            return format::braces(run, this, args).map(Value::Str);
        }
        "join" => {
            let [items] = args.bind(name, ["iterable"])?;
            let items = items.unwrap_or(Value::None).iterate(meter)?;
            let mut out = Builder::new(meter);
            for (at, item) in items.list.iter().enumerate() {
                let Value::Str(item) = item else {
                    let kind = item.type_name();
                    return Err(fault(format!(
                        "sequence item {at}: expected str instance, {kind} found"
                    )));
                };
                if at > 0 {
                    out.push(this)?;
                }
                out.push(item)?;
            }
            return Ok(Value::Str(out.finish()));
        }
        "find" | "rfind" | "index" | "rindex" | "count" | "startswith" | "endswith" => {
            return search(run, this, name, args);
        }
        "split" | "rsplit" => {
            let [separator, most] = args.bind(name, ["sep", "maxsplit"])?;
            let separator = optional_text(separator.as_ref(), name)?;
            let most = int_or(most.as_ref(), -1, name)?;
            return list_of(split(this, separator.as_ref(), most, name == "rsplit")?, meter);
        }
        "splitlines" => {
            let [keep] = args.bind(name, ["keepends"])?;
            return list_of(split_lines(this, keep.is_some_and(|keep| keep.is_true())), meter);
        }
        "strip" | "lstrip" | "rstrip" => {
            let [chars] = args.bind(name, ["chars"])?;
            let chars = optional_text(chars.as_ref(), name)?;
            let part = strip(this, chars.as_ref(), name != "rstrip", name != "lstrip", meter)?;
            return Ok(Value::Str(part));
        }
        "removeprefix" | "removesuffix" => {
            let [affix] = args.bind(name, ["affix"])?;
            let affix = text(affix.as_ref(), name)?;
            let cut = match name {
                "removeprefix" => plain.strip_prefix(affix.as_str()),
                _ => plain.strip_suffix(affix.as_str()),
            };
            return Ok(Value::Str(cut.map_or_else(|| this.clone(), |part| this.part(part))));
        }
        "partition" | "rpartition" => {
            let [separator] = args.bind(name, ["sep"])?;
            let separator = text(separator.as_ref(), name)?;
            if separator.is_empty() {
                return Err(fault("empty separator"));
            }
            let len = separator.len();
            let empty = || this.slice(0..0);
            let parts = match name {
                "partition" => plain.find(separator.as_str()),
                _ => plain.rfind(separator.as_str()),
            };
            let parts = match (parts, name) {
                (Some(at), _) => {
                    [this.slice(0..at), this.slice(at..at + len), this.slice(at + len..plain.len())]
                }
                (None, "partition") => [this.clone(), empty(), empty()],
                (None, _) => [empty(), empty(), this.clone()],
            };
            return Value::tuple(parts.map(Value::Str).into(), meter);
        }
        "replace" => {
            let [from, to, count] = args.bind(name, ["old", "new", "count"])?;
            let (from, to) = (text(from.as_ref(), name)?, text(to.as_ref(), name)?);
            return replace(this, &from, &to, int_or(count.as_ref(), -1, name)?, meter)
                .map(Value::Str);
        }
        "center" | "ljust" | "rjust" => {
            let [width, fill] = args.bind(name, ["width", "fillchar"])?;
            let fill = optional_text(fill.as_ref(), name)?.unwrap_or_else(|| Str::own(" "));
            let width = width.ok_or_else(|| fault(format!("{name}: takes a width")))?;
            let side = match name {
                "ljust" => "left",
                "rjust" => "right",
                _ => "both",
            };
            return pad(this, int_or(Some(&width), 0, name)?, &fill, side, meter).map(Value::Str);
        }
        "zfill" => {
            let [width] = args.bind(name, ["width"])?;
            let width = int_or(width.as_ref(), 0, name)?;
            let sign = usize::from(plain.starts_with(['+', '-']));
            let digits = this.slice(sign..plain.len());
            let digits = pad(&digits, width - sign as i128, &Str::own("0"), "right", meter)?;
            let mut out = Builder::new(meter);
            out.push(&this.slice(0..sign))?;
            out.push(&digits)?;
            return Ok(Value::Str(out.finish()));
        }
        "expandtabs" => {
            let [size] = args.bind(name, ["tabsize"])?;
            return expand_tabs(this, int_or(size.as_ref(), 8, name)?, meter).map(Value::Str);
        }
        _ => args.none(name)?,
    }
    let all = |is: fn(char) -> bool| bool(!plain.is_empty() && plain.chars().all(is));
    let changed = match name {
        "lower" => lower(this, meter)?,
        "casefold" => casefold(this, meter)?,
        "upper" => upper(this, meter)?,
        "capitalize" => capitalize(this, meter)?,
        "title" => title(this, meter)?,
        "swapcase" => swap_case(this, meter)?,
        "isalpha" => return all(is_alpha),
        "isalnum" => return all(|c| is_alpha(c) || c.is_numeric()),
        "isascii" => return bool(plain.is_ascii()),
        "isdecimal" => return all(is_decimal),
        "isdigit" => return all(|c| is_decimal(c) || is_other_digit(c)),
        "isnumeric" => return all(char::is_numeric),
        "isspace" => return all(is_space),
        "isprintable" => return bool(plain.chars().all(is_printable)),
        "isidentifier" => {
            let mut chars = plain.chars();
            let first = chars.next().is_some_and(|c| c.is_alphabetic() || c == '_');
            return bool(first && chars.all(|c| c.is_alphanumeric() || c == '_'));
        }
        "islower" => {
            return bool(
                plain.chars().any(char::is_lowercase) && !plain.chars().any(char::is_uppercase),
            );
        }
        "isupper" => {
            return bool(
                plain.chars().any(char::is_uppercase) && !plain.chars().any(char::is_lowercase),
            );
        }
        "istitle" => return bool(is_title(plain)),
        _ => return Err(fault(format!("'str' object has no attribute '{name}'"))),
    };
    Ok(Value::Str(changed))
}

fn list_of(parts: Vec<Str>, meter: &Meter) -> R<Value> {
    Value::list(parts.into_iter().map(Value::Str).collect(), meter)
}

fn search(run: &mut Run<'_>, this: &Str, name: &str, args: CallArgs) -> R<Value> {
    let [wanted, start, end] = args.bind(name, ["sub", "start", "end"])?;
    let part = bounded(this, start.as_ref(), end.as_ref(), name)?;
    if name == "startswith" || name == "endswith" {
        let wanted = match &wanted {
            Some(Value::Tuple(items)) => items.list.clone(),
            some => vec![Value::Str(text(some.as_ref(), name)?)],
        };
        for affix in &wanted {
            let affix = text(Some(affix), name)?;
            let is = part.as_ref().is_some_and(|(_, part)| match name {
                "startswith" => part.as_str().starts_with(affix.as_str()),
                _ => part.as_str().ends_with(affix.as_str()),
            });
            if is {
                return Ok(Value::Bool(true));
            }
        }
        return Ok(Value::Bool(false));
    }
    let wanted = text(wanted.as_ref(), name)?;
    run.meter.scan(this.len())?;
    let wanted = wanted.as_str();
    if name == "count" {
        let n = part.map_or(0, |(_, part)| match wanted {
            "" => part.as_str().chars().count() + 1,
            wanted => part.as_str().matches(wanted).count(),
        });
        return Ok(Value::Int(n as i128));
    }
    let found = part.and_then(|(from, part)| {
        let at = match name {
            "find" | "index" => part.as_str().find(wanted),
            _ => part.as_str().rfind(wanted),
        };
        at.map(|at| from + at)
    });
    match found {
        Some(at) => {
            Ok(Value::Int(this.as_str().get(..at).unwrap_or_default().chars().count() as i128))
        }
        None if name.ends_with("find") => Ok(Value::Int(-1)),
        None => Err(fault("substring not found")),
    }
}

fn casefold(text: &Str, meter: &Meter) -> R<Str> {
    // Lower case, but for the letters that fold further.
    map_runs(text, meter, |run| {
        run.chars()
            .flat_map(|c| match c {
                'ß' | 'ẞ' => vec!['s', 's'],
                'ς' => vec!['σ'],
                'ſ' => vec!['s'],
                c => c.to_lowercase().collect(),
            })
            .collect()
    })
}

fn is_cased(c: char) -> bool {
    c.is_lowercase() || c.is_uppercase() || matches!(c, 'ǅ' | 'ǈ' | 'ǋ' | 'ǲ')
}

/// A letter as it begins a word: of letters that are two in one only the first is large.
fn to_title(c: char) -> String {
    match c {
        'Ǆ'..='ǆ' => "ǅ".into(),
        'Ǉ'..='ǉ' => "ǈ".into(),
        'Ǌ'..='ǌ' => "ǋ".into(),
        'Ǳ'..='ǳ' => "ǲ".into(),
        c => {
            let mut upper = c.to_uppercase();
            let first = upper.next();
            first.into_iter().chain(upper.flat_map(char::to_lowercase)).collect()
        }
    }
}

fn title(text: &Str, meter: &Meter) -> R<Str> {
    let mut out = Builder::new(meter);
    let mut in_word = false;
    for (c, foreign) in text.marked_chars() {
        if in_word {
            c.to_lowercase().try_for_each(|c| out.char(c, foreign))?;
        } else {
            to_title(c).chars().try_for_each(|c| out.char(c, foreign))?;
        }
        in_word = is_cased(c);
    }
    Ok(out.finish())
}

fn is_title(text: &str) -> bool {
    let (mut in_word, mut any) = (false, false);
    for c in text.chars() {
        if (c.is_uppercase() && in_word) || (c.is_lowercase() && !in_word) {
            return false;
        }
        in_word = is_cased(c);
        any |= in_word;
    }
    any
}

fn swap_case(text: &Str, meter: &Meter) -> R<Str> {
    let mut out = Builder::new(meter);
    for (c, foreign) in text.marked_chars() {
        if c.is_uppercase() {
            c.to_lowercase().try_for_each(|c| out.char(c, foreign))?;
        } else {
            c.to_uppercase().try_for_each(|c| out.char(c, foreign))?;
        }
    }
    Ok(out.finish())
}

fn expand_tabs(text: &Str, size: i128, meter: &Meter) -> R<Str> {
    let mut out = Builder::new(meter);
    let mut column = 0;
    for (c, foreign) in text.marked_chars() {
        match c {
            '\t' if size > 0 => {
                for _ in 0..size - column % size {
                    out.char(' ', foreign)?;
                }
                column += size - column % size;
            }
            '\t' => {}
            c => {
                out.char(c, foreign)?;
                column = if matches!(c, '\n' | '\r') { 0 } else { column + 1 };
            }
        }
    }
    Ok(out.finish())
}

fn is_alpha(c: char) -> bool {
    c.is_alphabetic() && !c.is_numeric()
}

/// Digits of the scripts that have ten of them in a row.
fn is_decimal(c: char) -> bool {
    const ZEROS: [u32; 24] = [
        0x30, 0x660, 0x6f0, 0x7c0, 0x966, 0x9e6, 0xa66, 0xae6, 0xb66, 0xbe6, 0xc66, 0xce6, 0xd66,
        0xde6, 0xe50, 0xed0, 0xf20, 0x1040, 0x1090, 0x17e0, 0x1810, 0x1946, 0xa8d0, 0xff10,
    ];
    ZEROS.iter().any(|zero| (*zero..zero + 10).contains(&(c as u32)))
}

/// Superscripts, subscripts and digits in circles.
fn is_other_digit(c: char) -> bool {
    matches!(c, '\u{b2}' | '\u{b3}' | '\u{b9}' | '\u{2070}' | '\u{2074}'..='\u{2079}' | '\u{2080}'..='\u{2089}'
        | '\u{2460}'..='\u{2468}')
}
