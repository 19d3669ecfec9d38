//! The filters of a template.

use std::cmp::Ordering;

use super::fault::fault;
use super::methods::{capitalize, int_or, lower, pad, replace, split_lines, strip, upper};
use super::run::{CallArgs, R, Run, char_offset};
use super::text::{Builder, Str, is_space};
use super::value::{ENTRY_BYTES, Items, Value};
use super::{format, json, tests};

type Filter = for<'t> fn(&mut Run<'t>, Value, CallArgs) -> R<Value>;

/// Every filter.
const FILTERS: &[(&str, Filter)] = &[
    ("abs", abs),
    ("batch", batch),
    ("capitalize", |run, value, args| {
        args.none("capitalize")?;
        capitalize(&value.text(run.meter)?, run.meter).map(Value::Str)
    }),
    ("center", |run, value, args| {
        let [width] = args.bind("center", ["width"])?;
        let width = int_or(width.as_ref(), 80, "center")?;
        pad(&value.text(run.meter)?, width, &Str::own(" "), "both", run.meter).map(Value::Str)
    }),
    ("count", length),
    ("d", default),
    ("default", default),
    ("dictsort", dict_sort),
    ("e", escape),
    ("escape", escape),
    ("first", first),
    ("float", to_float),
    ("forceescape", force_escape),
    ("format", |run, value, args| {
        let text = value.text(run.meter)?;
        let values = match (&args.pos[..], &args.named[..]) {
            (_, []) => Value::tuple(args.pos, run.meter)?,
            ([], _) => {
                let named = args.named.into_iter().map(|(key, value)| (Value::Str(key), value));
                Value::Dict(super::Dict::new(named.collect(), run.meter)?)
            }
            _ => return Err(fault("format: takes arguments with names or without, not both")),
        };
        format::percent(run, &text, &values).map(Value::Str)
    }),
    ("groupby", group_by),
    ("indent", indent),
    ("int", to_int),
    ("items", |run, value, args| {
        args.none("items")?;
        match &value {
            Value::Undefined(_) => Value::once(Vec::new(), run.meter),
            Value::Dict(dict) => {
                let items = super::run::view(super::value::View::Items, dict, run.meter)?;
                Value::once(items.iterate(run.meter)?.list.clone(), run.meter)
            }
            _ => Err(fault("items: can only get item pairs from a mapping")),
        }
    }),
    ("join", join),
    ("last", last),
    ("length", length),
    ("list", |run, value, args| {
        args.none("list")?;
        match value {
            Value::List(items) => Ok(Value::List(items)),
            value => Ok(Value::List(value.iterate(run.meter)?)),
        }
    }),
    ("lower", |run, value, args| {
        args.none("lower")?;
        lower(&value.text(run.meter)?, run.meter).map(Value::Str)
    }),
    ("map", map),
    ("max", |run, value, args| extreme(run, &value, args, Ordering::Greater)),
    ("min", |run, value, args| extreme(run, &value, args, Ordering::Less)),
    ("reject", |run, value, args| select(run, &value, args, false, false)),
    ("rejectattr", |run, value, args| select(run, &value, args, true, false)),
    ("replace", |run, value, args| {
        let [from, to, count] = args.bind("replace", ["old", "new", "count"])?;
        let (Some(from), Some(to)) = (from, to) else {
            return Err(fault("replace: takes two texts"));
        };
        let (from, to) = (from.text(run.meter)?, to.text(run.meter)?);
        let count = match count {
            None | Some(Value::None) => -1,
            some => int_or(some.as_ref(), -1, "replace")?,
        };
        replace(&value.text(run.meter)?, &from, &to, count, run.meter).map(Value::Str)
    }),
    ("reverse", reverse),
    ("round", round),
    ("safe", |run, value, args| {
        args.none("safe")?;
        Ok(Value::Str(value.text(run.meter)?.with_markup(true)))
    }),
    ("select", |run, value, args| select(run, &value, args, false, true)),
    ("selectattr", |run, value, args| select(run, &value, args, true, true)),
    ("slice", slices),
    ("sort", sort),
    ("string", |run, value, args| {
        args.none("string")?;
        value.text(run.meter).map(Value::Str)
    }),
    ("sum", sum),
    ("title", title),
    ("tojson", |run, value, args| json::to_json(run, &value, args)),
    ("trim", |run, value, args| {
        let [chars] = args.bind("trim", ["chars"])?;
        let chars = match chars {
            None | Some(Value::None) => None,
            Some(Value::Str(chars)) => Some(chars),
            Some(_) => return Err(fault("trim: takes a str")),
        };
        strip(&value.text(run.meter)?, chars.as_ref(), true, true, run.meter).map(Value::Str)
    }),
    ("truncate", truncate),
    ("unique", unique),
    ("upper", |run, value, args| {
        args.none("upper")?;
        upper(&value.text(run.meter)?, run.meter).map(Value::Str)
    }),
    ("wordcount", |run, value, args| {
        args.none("wordcount")?;
        let text = value.text(run.meter)?;
        run.meter.scan(text.len())?;
        let words = text.as_str().split(|c: char| !c.is_alphanumeric() && c != '_');
        Ok(Value::Int(words.filter(|word| !word.is_empty()).count() as i128))
    }),
];

/// Filters of Jinja that make HTML, layouts for people, or chance.
const REFUSED: [&str; 8] = [
    "filesizeformat",
    "pprint",
    "random",
    "striptags",
    "urlencode",
    "urlize",
    "wordwrap",
    "xmlattr",
];

/// Filters that make markup of markup.
const KEEP_MARKUP: [&str; 7] =
    ["capitalize", "center", "indent", "lower", "reverse", "trim", "upper"];

/// Whether there is a filter of this name.
pub(crate) fn exists(name: &str) -> bool {
    FILTERS.iter().any(|(have, _)| *have == name)
}

/// Runs a filter.
pub(crate) fn apply(run: &mut Run<'_>, name: &str, value: Value, args: CallArgs) -> R<Value> {
    let stays =
        KEEP_MARKUP.contains(&name) && matches!(&value, Value::Str(text) if text.is_markup());
    match FILTERS.iter().find(|(have, _)| *have == name) {
        Some((_, filter)) => Ok(match filter(run, value, args)? {
            Value::Str(text) if stays => Value::Str(text.with_markup(true)),
            other => other,
        }),
        None if REFUSED.contains(&name) => {
            Err(fault(format!("filter '{name}' has no use in a prompt and is not supported")))
        }
        None => Err(fault(format!("no filter named '{name}'"))),
    }
}

fn is_set(value: Option<Value>) -> bool {
    value.is_some_and(|value| value.is_true())
}

/// How an item's value to compare by is found: a path of attributes.
struct Path(Vec<Value>);

impl Path {
    fn of(attribute: Option<&Value>) -> R<Path> {
        match attribute {
            None | Some(Value::None) => Ok(Path(Vec::new())),
            Some(Value::Str(path)) => {
                let part = |part: &str| match part.parse::<i128>() {
                    Ok(n) if part.bytes().all(|b| b.is_ascii_digit()) => Value::Int(n),
                    _ => Value::Str(path.part(part)),
                };
                Ok(Path(path.as_str().split('.').map(part).collect()))
            }
            Some(Value::Int(n)) => Ok(Path(vec![Value::Int(*n)])),
            Some(other) => Err(fault(format!("an attribute is a str, not {}", other.type_name()))),
        }
    }

    fn get(&self, run: &mut Run<'_>, item: &Value, default: Option<&Value>) -> R<Value> {
        let mut item = item.clone();
        for part in &self.0 {
            item = run.item(&item, part)?;
            if let (Value::Undefined(_), Some(default)) = (&item, default) {
                item = default.clone();
            }
        }
        Ok(item)
    }
}

/// Upper and lower case alike, unless it matters.
fn folded(run: &Run<'_>, value: Value, case_sensitive: bool) -> R<Value> {
    match &value {
        Value::Str(text) if !case_sensitive => lower(text, run.meter).map(Value::Str),
        _ => Ok(value),
    }
}

/// Sorts by keys; of equal ones the first stays first. A merge sort of its own, because comparing can fail.
fn sorted<T>(run: &Run<'_>, mut list: Vec<(Value, T)>, reverse: bool) -> R<Vec<(Value, T)>> {
    let mut failed = None;
    let mut by = |a: &Value, b: &Value| {
        if failed.is_some() {
            return Ordering::Equal;
        }
        match a.cmp(b, run.meter) {
            Ok(order) => order.unwrap_or(Ordering::Equal),
            Err(fault) => {
                failed = Some(fault);
                Ordering::Equal
            }
        }
    };
    list.sort_by(|(a, _), (b, _)| if reverse { by(b, a) } else { by(a, b) });
    failed.map_or(Ok(list), Err)
}

fn abs(_: &mut Run<'_>, value: Value, args: CallArgs) -> R<Value> {
    args.none("abs")?;
    match value {
        Value::Float(n) => Ok(Value::Float(n.abs())),
        value => {
            let n = value.as_int().and_then(i128::checked_abs);
            n.map(Value::Int).ok_or_else(|| {
                fault(format!("bad operand type for abs(): '{}'", value.type_name()))
            })
        }
    }
}

fn batch(run: &mut Run<'_>, value: Value, args: CallArgs) -> R<Value> {
    let [size, fill] = args.bind("batch", ["linecount", "fill_with"])?;
    let size = usize::try_from(int_or(size.as_ref(), 0, "batch")?).unwrap_or(0);
    if size == 0 {
        return Err(fault("batch: takes the size of a batch"));
    }
    let items = value.iterate(run.meter)?;
    let mut batches = Vec::new();
    for chunk in items.list.chunks(size) {
        let mut chunk = chunk.to_vec();
        if let Some(fill) = fill.as_ref().filter(|fill| !matches!(fill, Value::None)) {
            run.meter.take((size - chunk.len()).saturating_mul(ENTRY_BYTES))?;
            chunk.resize(size, fill.clone());
        }
        batches.push(Value::list(chunk, run.meter)?);
    }
    Value::once(batches, run.meter)
}

fn slices(run: &mut Run<'_>, value: Value, args: CallArgs) -> R<Value> {
    let [n, fill] = args.bind("slice", ["slices", "fill_with"])?;
    let n = usize::try_from(int_or(n.as_ref(), 0, "slice")?).unwrap_or(0);
    if n == 0 {
        return Err(fault("slice: takes the number of slices"));
    }
    run.meter.take(n.saturating_mul(ENTRY_BYTES))?;
    let items = value.iterate(run.meter)?;
    let (each, extra) = (items.list.len() / n, items.list.len() % n);
    let (mut slices, mut start) = (Vec::new(), 0);
    for at in 0..n {
        let end = start + each + usize::from(at < extra);
        let mut slice = items.list.get(start..end).unwrap_or_default().to_vec();
        start = end;
        if let Some(fill) = fill.as_ref().filter(|fill| at >= extra && !matches!(fill, Value::None))
        {
            slice.push(fill.clone());
        }
        slices.push(Value::list(slice, run.meter)?);
    }
    Value::once(slices, run.meter)
}

fn default(_: &mut Run<'_>, value: Value, args: CallArgs) -> R<Value> {
    let [default, boolean] = args.bind("default", ["default_value", "boolean"])?;
    let missing = matches!(value, Value::Undefined(_)) || (is_set(boolean) && !value.is_true());
    Ok(if missing { default.unwrap_or_else(|| Value::own("")) } else { value })
}

fn dict_sort(run: &mut Run<'_>, value: Value, args: CallArgs) -> R<Value> {
    let [case, by, reverse] = args.bind("dictsort", ["case_sensitive", "by", "reverse"])?;
    let Value::Dict(dict) = &value else { return Err(fault("dictsort: takes a dict")) };
    let by_value = match by {
        None => false,
        Some(Value::Str(by)) if by.as_str() == "key" => false,
        Some(Value::Str(by)) if by.as_str() == "value" => true,
        _ => return Err(fault("dictsort: by is 'key' or 'value'")),
    };
    let case = is_set(case);
    let mut list = Vec::new();
    for (key, value) in &dict.entries {
        let by = folded(run, if by_value { value } else { key }.clone(), case)?;
        list.push((by, Value::tuple(vec![key.clone(), value.clone()], run.meter)?));
    }
    let list = sorted(run, list, is_set(reverse))?;
    Value::list(list.into_iter().map(|(_, pair)| pair).collect(), run.meter)
}

/// Writes a text as HTML has it.
pub(crate) fn write_escaped(text: &Str, out: &mut Builder<'_>) -> R<()> {
    for (c, foreign) in text.marked_chars() {
        match c {
            '&' => out.put("&amp;", foreign)?,
            '<' => out.put("&lt;", foreign)?,
            '>' => out.put("&gt;", foreign)?,
            '\'' => out.put("&#39;", foreign)?,
            '"' => out.put("&#34;", foreign)?,
            c => out.char(c, foreign)?,
        }
    }
    Ok(())
}

fn escape(run: &mut Run<'_>, value: Value, args: CallArgs) -> R<Value> {
    match &value {
        Value::Str(text) if text.is_markup() => args.none("escape").map(|()| value),
        _ => force_escape(run, value, args),
    }
}

fn force_escape(run: &mut Run<'_>, value: Value, args: CallArgs) -> R<Value> {
    args.none("escape")?;
    let mut out = Builder::new(run.meter);
    write_escaped(&value.text(run.meter)?, &mut out)?;
    Ok(Value::Str(out.finish().with_markup(true)))
}

fn first(run: &mut Run<'_>, value: Value, args: CallArgs) -> R<Value> {
    args.none("first")?;
    let first = match &value {
        Value::Str(text) => {
            let end = char_offset(text, 1);
            (end > 0).then(|| Value::Str(text.slice(0..end).with_markup(false)))
        }
        // Only the one that is looked at is taken.
        Value::Once(once) => {
            let at = once.taken.get();
            once.taken.set((at + 1).min(once.items.list.len()));
            once.items.list.get(at).cloned()
        }
        value => value.iterate(run.meter)?.list.first().cloned(),
    };
    Ok(first.unwrap_or_else(|| Value::undefined("No first item, sequence was empty.")))
}

fn last(run: &mut Run<'_>, value: Value, args: CallArgs) -> R<Value> {
    args.none("last")?;
    let last = match &value {
        Value::Str(text) => {
            let start = text.as_str().char_indices().next_back().map(|(at, _)| at);
            start.map(|start| Value::Str(text.slice(start..text.len()).with_markup(false)))
        }
        Value::Once(_) => return Err(fault("'generator' object is not reversible")),
        value => value.iterate(run.meter)?.list.last().cloned(),
    };
    Ok(last.unwrap_or_else(|| Value::undefined("No last item, sequence was empty.")))
}

fn length(run: &mut Run<'_>, value: Value, args: CallArgs) -> R<Value> {
    args.none("length")?;
    Ok(Value::Int(value.len(run.meter)? as i128))
}

fn join(run: &mut Run<'_>, value: Value, args: CallArgs) -> R<Value> {
    let [separator, attribute] = args.bind("join", ["d", "attribute"])?;
    let separator = separator.map_or_else(|| Ok(Str::own("")), |text| text.text(run.meter))?;
    let path = Path::of(attribute.as_ref())?;
    let mut out = Builder::new(run.meter);
    for (at, item) in value.iterate(run.meter)?.list.iter().enumerate() {
        if at > 0 {
            out.push(&separator)?;
        }
        path.get(run, item, None)?.write(&mut out)?;
    }
    Ok(Value::Str(out.finish()))
}

fn map(run: &mut Run<'_>, value: Value, mut args: CallArgs) -> R<Value> {
    if !value.is_true() {
        return Value::once(Vec::new(), run.meter);
    }
    let items = value.iterate(run.meter)?;
    let mut list = Vec::new();
    if args.pos.is_empty() {
        let [attribute, default] = args.bind("map", ["attribute", "default"])?;
        if attribute.is_none() {
            return Err(fault("map: takes the name of a filter, or an attribute"));
        }
        let path = Path::of(attribute.as_ref())?;
        let default = default.filter(|default| !matches!(default, Value::None));
        for item in &items.list {
            list.push(path.get(run, item, default.as_ref())?);
        }
        return Value::once(list, run.meter);
    }
    let Value::Str(name) = args.pos.remove(0) else {
        return Err(fault("map: takes the name of a filter"));
    };
    for item in &items.list {
        run.meter.work(1 + args.pos.len() + args.named.len())?;
        let args = CallArgs { pos: args.pos.clone(), named: args.named.clone() };
        list.push(apply(run, name.as_str(), item.clone(), args)?);
    }
    Value::once(list, run.meter)
}

fn select(
    run: &mut Run<'_>,
    value: &Value,
    mut args: CallArgs,
    by_attribute: bool,
    keep: bool,
) -> R<Value> {
    if !value.is_true() {
        return Value::once(Vec::new(), run.meter);
    }
    let items = value.iterate(run.meter)?;
    let path = match by_attribute {
        false => Path(Vec::new()),
        true if args.pos.is_empty() => return Err(fault("selectattr: takes an attribute")),
        true => Path::of(Some(&args.pos.remove(0)))?,
    };
    let test = if args.pos.is_empty() { None } else { Some(args.pos.remove(0)) };
    let mut list = Vec::new();
    for item in &items.list {
        run.meter.work(1 + args.pos.len() + args.named.len())?;
        let value = path.get(run, item, None)?;
        let is = match &test {
            None => value.is_true(),
            Some(Value::Str(name)) => {
                let args = CallArgs { pos: args.pos.clone(), named: args.named.clone() };
                tests::apply(run, name.as_str(), &value, args)?
            }
            Some(_) => return Err(fault("select: takes the name of a test")),
        };
        if is == keep {
            list.push(item.clone());
        }
    }
    Value::once(list, run.meter)
}

fn extreme(run: &mut Run<'_>, value: &Value, args: CallArgs, wanted: Ordering) -> R<Value> {
    let [case, attribute] = args.bind("min or max", ["case_sensitive", "attribute"])?;
    let (case, path) = (is_set(case), Path::of(attribute.as_ref())?);
    let mut best: Option<(Value, Value)> = None;
    for item in &value.iterate(run.meter)?.list {
        let by = path.get(run, item, None)?;
        let by = folded(run, by, case)?;
        let better = match &best {
            None => true,
            Some((have, _)) => by.cmp(have, run.meter)? == Some(wanted),
        };
        if better {
            best = Some((by, item.clone()));
        }
    }
    let empty = || Value::undefined("No aggregated item, sequence was empty.");
    Ok(best.map_or_else(empty, |(_, item)| item))
}

fn reverse(run: &mut Run<'_>, value: Value, args: CallArgs) -> R<Value> {
    args.none("reverse")?;
    if let Value::Str(text) = &value {
        let mut out = Builder::new(run.meter);
        run.meter.take(text.len().saturating_mul(8))?;
        let chars: Vec<(char, bool)> = text.marked_chars().collect();
        chars.into_iter().rev().try_for_each(|(c, foreign)| out.char(c, foreign))?;
        return Ok(Value::Str(out.finish()));
    }
    let list = value.iterate(run.meter)?.list.iter().rev().cloned().collect();
    match value {
        Value::Once(_) => Value::list(list, run.meter),
        _ => Value::once(list, run.meter),
    }
}

fn round(_: &mut Run<'_>, value: Value, args: CallArgs) -> R<Value> {
    let [precision, method] = args.bind("round", ["precision", "method"])?;
    let precision =
        i32::try_from(int_or(precision.as_ref(), 0, "round")?.clamp(-400, 400)).unwrap_or(0);
    let method = match &method {
        None => "common",
        Some(Value::Str(method)) => method.as_str(),
        Some(_) => "",
    };
    let Some(n) = value.as_float() else {
        return Err(fault(format!("round: takes a number, not {}", value.type_name())));
    };
    let power = 10f64.powi(precision);
    match (method, value.as_int()) {
        ("common", Some(n)) => Ok(Value::Int(round_int(n, precision))),
        ("common", None) => {
            // Python rounds the exact value, and halves to the even digit; so does `format`.
            let decimals = usize::try_from(precision).unwrap_or(0);
            let rounded = match precision {
                0.. => format!("{n:.decimals$}").parse().unwrap_or(n),
                _ => (n * power).round_ties_even() / power,
            };
            Ok(Value::Float(rounded))
        }
        ("ceil", _) => Ok(Value::Float((n * power).ceil() / power)),
        ("floor", _) => Ok(Value::Float((n * power).floor() / power)),
        _ => Err(fault("round: method must be common, ceil or floor")),
    }
}

/// To so many digits before the point, halves to the even one.
fn round_int(n: i128, precision: i32) -> i128 {
    let Some(unit) = 10i128.checked_pow(precision.min(0).unsigned_abs()) else { return 0 };
    let (quotient, rest) = (n.div_euclid(unit), n.rem_euclid(unit));
    let up = match (rest.saturating_mul(2)).cmp(&unit) {
        Ordering::Less => false,
        Ordering::Equal => quotient % 2 != 0,
        Ordering::Greater => true,
    };
    quotient.saturating_add(i128::from(up && unit > 1)).saturating_mul(unit)
}

fn sort(run: &mut Run<'_>, value: Value, args: CallArgs) -> R<Value> {
    let [reverse, case, attribute] =
        args.bind("sort", ["reverse", "case_sensitive", "attribute"])?;
    let case = is_set(case);
    let paths = match &attribute {
        Some(Value::Str(all)) => {
            let parts =
                all.as_str().split(',').map(|path| Path::of(Some(&Value::Str(all.part(path)))));
            parts.collect::<R<Vec<Path>>>()?
        }
        other => vec![Path::of(other.as_ref())?],
    };
    let mut list = Vec::new();
    for item in &value.iterate(run.meter)?.list {
        let mut key = Vec::new();
        for path in &paths {
            let value = path.get(run, item, None)?;
            key.push(folded(run, value, case)?);
        }
        list.push((Value::list(key, run.meter)?, item.clone()));
    }
    let list = sorted(run, list, is_set(reverse))?;
    Value::list(list.into_iter().map(|(_, item)| item).collect(), run.meter)
}

fn group_by(run: &mut Run<'_>, value: Value, args: CallArgs) -> R<Value> {
    let [attribute, default, case] =
        args.bind("groupby", ["attribute", "default", "case_sensitive"])?;
    let (path, case) = (Path::of(attribute.as_ref())?, is_set(case));
    let default = default.filter(|default| !matches!(default, Value::None));
    let mut list = Vec::new();
    for item in &value.iterate(run.meter)?.list {
        let key = path.get(run, item, default.as_ref())?;
        list.push((folded(run, key.clone(), case)?, (key, item.clone())));
    }
    let mut groups: Vec<(Value, Value, Vec<Value>)> = Vec::new();
    for (by, (key, item)) in sorted(run, list, false)? {
        match groups.last_mut() {
            Some((last, _, items)) if last.eq(&by, run.meter)? => items.push(item),
            _ => groups.push((by, key, vec![item])),
        }
    }
    let mut out = Vec::new();
    for (_, key, items) in groups {
        let items = Value::list(items, run.meter)?;
        out.push(Value::Group(Items::new(vec![key, items], run.meter)?));
    }
    Value::list(out, run.meter)
}

fn unique(run: &mut Run<'_>, value: Value, args: CallArgs) -> R<Value> {
    let [case, attribute] = args.bind("unique", ["case_sensitive", "attribute"])?;
    let (case, path) = (is_set(case), Path::of(attribute.as_ref())?);
    let (mut seen, mut list): (Vec<Value>, Vec<Value>) = (Vec::new(), Vec::new());
    for item in &value.iterate(run.meter)?.list {
        let by = path.get(run, item, None)?;
        let by = folded(run, by, case)?;
        if matches!(by, Value::List(_) | Value::Dict(_)) {
            return Err(fault(format!("unhashable type: '{}'", by.type_name())));
        }
        let mut is_new = true;
        for have in &seen {
            is_new = is_new && !have.eq(&by, run.meter)?;
        }
        if is_new {
            seen.push(by);
            list.push(item.clone());
        }
    }
    Value::once(list, run.meter)
}

fn sum(run: &mut Run<'_>, value: Value, args: CallArgs) -> R<Value> {
    let [attribute, start] = args.bind("sum", ["attribute", "start"])?;
    let path = Path::of(attribute.as_ref())?;
    let mut total = start.unwrap_or(Value::Int(0));
    if matches!(total, Value::Str(_)) {
        return Err(fault("sum() can't sum strings"));
    }
    for item in &value.iterate(run.meter)?.list {
        let item = path.get(run, item, None)?;
        total = run.add(&total, &item)?;
    }
    Ok(total)
}

fn title(run: &mut Run<'_>, value: Value, args: CallArgs) -> R<Value> {
    args.none("title")?;
    let text = value.text(run.meter)?;
    let mut out = Builder::new(run.meter);
    let mut in_word = false;
    for (c, foreign) in text.marked_chars() {
        let separates = is_space(c) || matches!(c, '-' | '(' | '{' | '[' | '<');
        if in_word {
            c.to_lowercase().try_for_each(|c| out.char(c, foreign))?;
        } else {
            c.to_uppercase().try_for_each(|c| out.char(c, foreign))?;
        }
        in_word = !separates;
    }
    Ok(Value::Str(out.finish()))
}

fn truncate(run: &mut Run<'_>, value: Value, args: CallArgs) -> R<Value> {
    let [length, kill, end, leeway] =
        args.bind("truncate", ["length", "killwords", "end", "leeway"])?;
    let Value::Str(text) = &value else {
        // Jinja asks for the length of what it is; one that is short stays as it is.
        return match value.len(run.meter)? <= 255 && length.is_none() && leeway.is_none() {
            true => Ok(value),
            false => Err(fault(format!("truncate: takes a str, not {}", value.type_name()))),
        };
    };
    let text = text.clone();
    let end = end.map_or_else(|| Ok(Str::own("...")), |end| end.text(run.meter))?;
    let leeway = match leeway {
        None | Some(Value::None) => 5,
        some => int_or(some.as_ref(), 5, "truncate")?,
    };
    let (length, n) =
        (int_or(length.as_ref(), 255, "truncate")?, text.as_str().chars().count() as i128);
    let end_len = end.as_str().chars().count() as i128;
    if length < end_len || leeway < 0 {
        return Err(fault(format!(
            "truncate: expected a length of at least {end_len}, found {length}"
        )));
    }
    if n <= length.saturating_add(leeway) {
        return Ok(Value::Str(text));
    }
    let cut = text.slice(0..char_offset(&text, usize::try_from(length - end_len).unwrap_or(0)));
    let words = if is_set(kill) { None } else { cut.as_str().rfind(' ') };
    let mut out = Builder::new(run.meter);
    out.push(&cut.slice(0..words.unwrap_or(cut.len())))?;
    out.push(&end)?;
    Ok(Value::Str(out.finish()))
}

fn indent(run: &mut Run<'_>, value: Value, args: CallArgs) -> R<Value> {
    let [width, first, blank] = args.bind("indent", ["width", "first", "blank"])?;
    let Value::Str(text) = &value else {
        return Err(fault(format!("indent: takes a str, not {}", value.type_name())));
    };
    let pad = match width {
        Some(Value::Str(pad)) => pad,
        other => {
            let n = usize::try_from(int_or(other.as_ref(), 4, "indent")?).unwrap_or(0).min(1 << 16);
            run.meter.take(n)?;
            Str::own(" ".repeat(n))
        }
    };
    let (first, blank) = (is_set(first), is_set(blank));
    run.meter.take(text.len() + 1)?;
    // As Jinja does: with a line end at the end, which `splitlines` then does not count.
    let mut ended = Builder::new(run.meter);
    ended.push(text)?;
    ended.own("\n")?;
    let mut out = Builder::new(run.meter);
    for (at, line) in split_lines(&ended.finish(), false).iter().enumerate() {
        if at > 0 {
            out.own("\n")?;
        }
        if if at == 0 { first } else { blank || !line.is_empty() } {
            out.push(&pad)?;
        }
        out.push(line)?;
    }
    Ok(Value::Str(out.finish()))
}

fn to_int(run: &mut Run<'_>, value: Value, args: CallArgs) -> R<Value> {
    let [default, base] = args.bind("int", ["default", "base"])?;
    let default = default.unwrap_or(Value::Int(0));
    let base = u32::try_from(int_or(base.as_ref(), 10, "int")?).unwrap_or(10);
    Ok(match &value {
        Value::Undefined(why) => return Err(fault(&**why)),
        Value::Str(text) => {
            run.meter.scan(text.len())?;
            let whole = parse_int(text.as_str(), base).map(Value::Int);
            whole.or_else(|| parse_float(text.as_str()).and_then(truncated)).unwrap_or(default)
        }
        Value::Float(n) => truncated(*n).unwrap_or(default),
        value => value.as_int().map_or(default, Value::Int),
    })
}

fn truncated(n: f64) -> Option<Value> {
    #[allow(clippy::cast_possible_truncation)]
    (n.is_finite() && n.abs() < 1.7e38).then(|| Value::Int(n.trunc() as i128))
}

fn to_float(run: &mut Run<'_>, value: Value, args: CallArgs) -> R<Value> {
    let [default] = args.bind("float", ["default"])?;
    let number = match &value {
        Value::Undefined(why) => return Err(fault(&**why)),
        Value::Str(text) => {
            run.meter.scan(text.len())?;
            parse_float(text.as_str())
        }
        value => value.as_float(),
    };
    Ok(number.map_or_else(|| default.unwrap_or(Value::Float(0.0)), Value::Float))
}

/// Python's `int(text, base)`.
fn parse_int(text: &str, base: u32) -> Option<i128> {
    let text = text.trim_matches(is_space);
    let (negative, digits) = match text.as_bytes().first()? {
        b'-' => (true, text.get(1..)?),
        b'+' => (false, text.get(1..)?),
        _ => (false, text),
    };
    let prefix = digits.get(..2).map(str::to_ascii_lowercase);
    let of_prefix = match prefix.as_deref() {
        Some("0x") => 16,
        Some("0o") => 8,
        Some("0b") => 2,
        _ => 0,
    };
    let (base, digits) = match (base, of_prefix) {
        (0, 0) => (10, digits),
        (0, of_prefix) => (of_prefix, digits.get(2..)?),
        (base, of_prefix) if base == of_prefix => (base, digits.get(2..)?.trim_start_matches('_')),
        (base, _) => (base, digits),
    };
    if !(2..=36).contains(&base) {
        return None;
    }
    let bare = without_underscores(digits)?;
    let n = i128::from_str_radix(&bare, base).ok().filter(|_| !bare.starts_with(['+', '-']))?;
    Some(if negative { -n } else { n })
}

fn parse_float(text: &str) -> Option<f64> {
    let bare = without_underscores(text.trim_matches(is_space))?;
    bare.parse().ok()
}

/// Digits without the single underscores between them.
fn without_underscores(text: &str) -> Option<String> {
    let wrong = text.starts_with('_') || text.ends_with('_') || text.contains("__");
    (!wrong).then(|| text.replace('_', ""))
}
