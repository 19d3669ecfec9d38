//! The values of a template, with the meaning that Python gives them.

use std::cell::Cell;
use std::cmp::Ordering;
use std::rc::Rc;

use super::fault::{Fault, fault};
use super::text::{Builder, Meter, Str};

/// How deep lists and the like may nest.
pub(crate) const MAX_DEPTH: usize = 128;
/// What an entry of a list weighs.
pub(crate) const ENTRY_BYTES: usize = size_of::<Value>();

/// A value.
#[derive(Clone, Debug)]
pub(crate) enum Value {
    /// What is not there, with what to say of it.
    Undefined(Rc<str>),
    None,
    Bool(bool),
    Int(i128),
    Float(f64),
    Str(Str),
    List(Rc<Items>),
    Tuple(Rc<Items>),
    /// A pair of `groupby`.
    Group(Rc<Items>),
    Dict(Rc<Dict>),
    /// `items()`, `keys()` or `values()` of a dict.
    View(View, Rc<Items>),
    Range(Box<[i128; 3]>),
    /// What can be walked through once.
    Once(Rc<Once>),
    /// Their state lies in the rendering, so that no value can hold itself.
    Namespace(usize),
    Loop(usize),
    Cycler(usize),
    Joiner(usize),
    /// A macro with the scope that it was defined in.
    Macro(usize, usize),
    /// A method with its object.
    Method(Rc<Value>, &'static str),
    Function(&'static str),
}

/// The kinds of views.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum View {
    Keys,
    Values,
    Items,
}

/// A list's entries.
#[derive(Debug)]
pub(crate) struct Items {
    pub(crate) list: Vec<Value>,
    depth: usize,
}

/// A dict, in the order of insertion.
#[derive(Debug, Default)]
pub(crate) struct Dict {
    pub(crate) entries: Vec<(Value, Value)>,
    depth: usize,
}

/// Entries, and how many were taken.
#[derive(Debug)]
pub(crate) struct Once {
    pub(crate) items: Rc<Items>,
    pub(crate) taken: Cell<usize>,
}

impl Items {
    /// Entries, within the budget.
    pub(crate) fn new(list: Vec<Value>, meter: &Meter) -> Result<Rc<Items>, Fault> {
        meter.take(list.len().saturating_mul(ENTRY_BYTES) + 32)?;
        Items::charged(list, meter)
    }

    /// Entries whose memory was charged before they were made.
    fn charged(list: Vec<Value>, meter: &Meter) -> Result<Rc<Items>, Fault> {
        meter.work(list.len())?;
        let depth = 1 + list.iter().map(Value::depth).max().unwrap_or(0);
        if depth > MAX_DEPTH {
            return Err(fault(format!("lists nest more than {MAX_DEPTH} deep")));
        }
        Ok(Rc::new(Items { list, depth }))
    }
}

impl Dict {
    /// Entries with keys that differ, within the budget.
    pub(crate) fn new(entries: Vec<(Value, Value)>, meter: &Meter) -> Result<Rc<Dict>, Fault> {
        meter.work(entries.len())?;
        meter.take(entries.len().saturating_mul(2 * ENTRY_BYTES) + 32)?;
        let depth = 1 + entries.iter().map(|(_, value)| value.depth()).max().unwrap_or(0);
        if depth > MAX_DEPTH {
            return Err(fault(format!("dicts nest more than {MAX_DEPTH} deep")));
        }
        Ok(Rc::new(Dict { entries, depth }))
    }

    pub(crate) fn get(&self, key: &Value, meter: &Meter) -> Result<Option<&Value>, Fault> {
        for (have, value) in &self.entries {
            if have.eq(key, meter)? {
                return Ok(Some(value));
            }
        }
        Ok(None)
    }

    pub(crate) fn get_str(&self, key: &str, meter: &Meter) -> Result<Option<&Value>, Fault> {
        meter.work(self.entries.len() / 8 + 1)?;
        let is =
            |(have, _): &&(Value, Value)| matches!(have, Value::Str(have) if have.as_str() == key);
        Ok(self.entries.iter().find(is).map(|(_, value)| value))
    }
}

/// Adds an entry, or changes the value of one that has this key.
pub(crate) fn insert(
    entries: &mut Vec<(Value, Value)>,
    key: Value,
    value: Value,
    meter: &Meter,
) -> Result<(), Fault> {
    if matches!(key, Value::List(_) | Value::Dict(_) | Value::View(..)) {
        return Err(fault(format!("a {} cannot be the key of a dict", key.type_name())));
    }
    for (have, old) in entries.iter_mut() {
        if have.eq(&key, meter)? {
            *old = value;
            return Ok(());
        }
    }
    entries.push((key, value));
    Ok(())
}

impl Value {
    pub(crate) fn undefined(why: impl AsRef<str>) -> Value {
        Value::Undefined(why.as_ref().into())
    }

    pub(crate) fn own(text: impl Into<String>) -> Value {
        Value::Str(Str::own(text))
    }

    pub(crate) fn list(list: Vec<Value>, meter: &Meter) -> Result<Value, Fault> {
        Ok(Value::List(Items::new(list, meter)?))
    }

    pub(crate) fn tuple(list: Vec<Value>, meter: &Meter) -> Result<Value, Fault> {
        Ok(Value::Tuple(Items::new(list, meter)?))
    }

    /// What is walked through once.
    pub(crate) fn once(list: Vec<Value>, meter: &Meter) -> Result<Value, Fault> {
        Ok(Value::Once(Rc::new(Once { items: Items::new(list, meter)?, taken: Cell::new(0) })))
    }

    fn depth(&self) -> usize {
        match self {
            Value::List(items) | Value::Tuple(items) | Value::Group(items) => items.depth,
            Value::View(_, items) => items.depth,
            Value::Once(once) => once.items.depth,
            Value::Dict(dict) => dict.depth,
            Value::Method(object, _) => 1 + object.depth(),
            _ => 0,
        }
    }

    /// The name of the type, as Python has it.
    pub(crate) fn type_name(&self) -> &'static str {
        match self {
            Value::Undefined(_) => "Undefined",
            Value::None => "NoneType",
            Value::Bool(_) => "bool",
            Value::Int(_) => "int",
            Value::Float(_) => "float",
            Value::Str(_) => "str",
            Value::List(_) => "list",
            Value::Tuple(_) | Value::Group(_) => "tuple",
            Value::Dict(_) => "dict",
            Value::View(View::Keys, _) => "dict_keys",
            Value::View(View::Values, _) => "dict_values",
            Value::View(View::Items, _) => "dict_items",
            Value::Range(..) => "range",
            Value::Once(_) => "generator",
            Value::Namespace(_) => "Namespace",
            Value::Loop(_) => "LoopContext",
            Value::Cycler(_) => "Cycler",
            Value::Joiner(_) => "Joiner",
            Value::Macro(..) => "Macro",
            Value::Method(..) => "method",
            Value::Function(_) => "function",
        }
    }

    pub(crate) fn is_true(&self) -> bool {
        match self {
            Value::Undefined(_) | Value::None => false,
            Value::Bool(is) => *is,
            Value::Int(n) => *n != 0,
            Value::Float(n) => *n != 0.0,
            Value::Str(text) => !text.is_empty(),
            Value::List(items)
            | Value::Tuple(items)
            | Value::Group(items)
            | Value::View(_, items) => !items.list.is_empty(),
            Value::Dict(dict) => !dict.entries.is_empty(),
            Value::Range(..) => self.range_len() != 0,
            _ => true,
        }
    }

    fn range_len(&self) -> i128 {
        let Value::Range(range) = self else { return 0 };
        let [start, stop, step] = **range;
        let span = if step > 0 { stop - start } else { start - stop };
        if span <= 0 { 0 } else { (span - 1) / step.abs() + 1 }
    }

    /// `len()`.
    pub(crate) fn len(&self, meter: &Meter) -> Result<usize, Fault> {
        match self {
            Value::Undefined(_) => Ok(0),
            Value::Str(text) => {
                meter.scan(text.len())?;
                Ok(text.as_str().chars().count())
            }
            Value::List(items)
            | Value::Tuple(items)
            | Value::Group(items)
            | Value::View(_, items) => Ok(items.list.len()),
            Value::Dict(dict) => Ok(dict.entries.len()),
            Value::Range(..) => Ok(usize::try_from(self.range_len()).unwrap_or(usize::MAX)),
            other => Err(fault(format!("object of type '{}' has no len()", other.type_name()))),
        }
    }

    /// The entries of what can be walked through.
    pub(crate) fn iterate(&self, meter: &Meter) -> Result<Rc<Items>, Fault> {
        match self {
            Value::List(items)
            | Value::Tuple(items)
            | Value::Group(items)
            | Value::View(_, items) => Ok(items.clone()),
            Value::Undefined(_) => Items::new(Vec::new(), meter),
            Value::Str(text) => {
                meter.take(self.len(meter)?.saturating_mul(ENTRY_BYTES))?;
                let text = text.clone().with_markup(false);
                let chars = text.as_str().char_indices();
                let chars = chars.map(|(at, c)| Value::Str(text.slice(at..at + c.len_utf8())));
                Items::charged(chars.collect(), meter)
            }
            Value::Dict(dict) => {
                Items::new(dict.entries.iter().map(|(key, _)| key.clone()).collect(), meter)
            }
            Value::Range(range) => {
                let [start, _, step] = **range;
                let n = self.len(meter)?;
                meter.take(n.saturating_mul(ENTRY_BYTES))?;
                Items::charged(
                    (0..n as i128).map(|i| Value::Int(start + i * step)).collect(),
                    meter,
                )
            }
            Value::Once(once) => {
                let taken = once.taken.replace(once.items.list.len());
                match taken {
                    0 => Ok(once.items.clone()),
                    _ => {
                        Items::new(once.items.list.get(taken..).unwrap_or_default().to_vec(), meter)
                    }
                }
            }
            other => Err(fault(format!("'{}' object is not iterable", other.type_name()))),
        }
    }

    /// The number, where it is one; `True` is 1.
    pub(crate) fn as_int(&self) -> Option<i128> {
        match self {
            Value::Int(n) => Some(*n),
            Value::Bool(is) => Some(i128::from(*is)),
            _ => None,
        }
    }

    pub(crate) fn as_float(&self) -> Option<f64> {
        match self {
            Value::Float(n) => Some(*n),
            #[allow(clippy::cast_precision_loss)]
            other => other.as_int().map(|n| n as f64),
        }
    }

    /// `==`.
    pub(crate) fn eq(&self, other: &Value, meter: &Meter) -> Result<bool, Fault> {
        meter.work(1)?;
        Ok(match (self, other) {
            (Value::Str(a), Value::Str(b)) => {
                meter.work(if a.len() == b.len() { a.len() / 32 } else { 0 })?;
                a.as_str() == b.as_str()
            }
            (Value::Undefined(_), Value::Undefined(_)) | (Value::None, Value::None) => true,
            (Value::List(a), Value::List(b)) | (Value::View(_, a), Value::View(_, b)) => {
                eq_lists(a, b, meter)?
            }
            (Value::Tuple(a) | Value::Group(a), Value::Tuple(b) | Value::Group(b)) => {
                eq_lists(a, b, meter)?
            }
            (Value::Dict(a), Value::Dict(b)) => {
                if a.entries.len() != b.entries.len() {
                    return Ok(false);
                }
                for (key, value) in &a.entries {
                    match b.get(key, meter)? {
                        Some(other) if value.eq(other, meter)? => {}
                        _ => return Ok(false),
                    }
                }
                true
            }
            (Value::Range(..), Value::Range(..)) => {
                eq_lists(&*self.iterate(meter)?, &*other.iterate(meter)?, meter)?
            }
            (Value::Namespace(a), Value::Namespace(b)) | (Value::Loop(a), Value::Loop(b)) => a == b,
            (Value::Macro(a, s), Value::Macro(b, t)) => (a, s) == (b, t),
            (Value::Function(a), Value::Function(b)) => a == b,
            _ => match (self.as_int(), other.as_int(), self.as_float(), other.as_float()) {
                (Some(a), Some(b), _, _) => a == b,
                (_, _, Some(a), Some(b)) => a == b,
                _ => false,
            },
        })
    }

    /// `<`, `<=` and the like.
    pub(crate) fn cmp(&self, other: &Value, meter: &Meter) -> Result<Option<Ordering>, Fault> {
        meter.work(1)?;
        match (self, other) {
            (Value::Undefined(why), _) | (_, Value::Undefined(why)) => return Err(fault(&**why)),
            (Value::Str(a), Value::Str(b)) => {
                meter.scan(a.len().min(b.len()))?;
                return Ok(Some(a.as_str().cmp(b.as_str())));
            }
            (Value::List(a), Value::List(b))
            | (Value::Tuple(a) | Value::Group(a), Value::Tuple(b) | Value::Group(b)) => {
                for (x, y) in a.list.iter().zip(&b.list) {
                    if !x.eq(y, meter)? {
                        return x.cmp(y, meter);
                    }
                }
                return Ok(Some(a.list.len().cmp(&b.list.len())));
            }
            _ => {}
        }
        match (self.as_int(), other.as_int(), self.as_float(), other.as_float()) {
            (Some(a), Some(b), _, _) => Ok(Some(a.cmp(&b))),
            (_, _, Some(a), Some(b)) => Ok(a.partial_cmp(&b)),
            _ => Err(fault(format!(
                "'{}' and '{}' have no order",
                self.type_name(),
                other.type_name()
            ))),
        }
    }

    /// `needle in self`.
    pub(crate) fn contains(&self, needle: &Value, meter: &Meter) -> Result<bool, Fault> {
        match self {
            Value::Str(text) => match needle {
                Value::Str(needle) => {
                    meter.scan(text.len())?;
                    Ok(text.as_str().contains(needle.as_str()))
                }
                Value::Undefined(why) => Err(fault(&**why)),
                other => Err(fault(format!(
                    "'in <string>' requires string as left operand, not {}",
                    other.type_name()
                ))),
            },
            Value::Dict(dict) => {
                if matches!(needle, Value::List(_) | Value::Dict(_)) {
                    return Err(fault(format!("unhashable type: '{}'", needle.type_name())));
                }
                Ok(dict.get(needle, meter)?.is_some())
            }
            other => {
                for item in &other.iterate(meter)?.list {
                    if item.eq(needle, meter)? {
                        return Ok(true);
                    }
                }
                Ok(false)
            }
        }
    }

    /// `str()`: how the value is printed.
    pub(crate) fn text(&self, meter: &Meter) -> Result<Str, Fault> {
        if let Value::Str(text) = self {
            return Ok(text.clone());
        }
        let mut out = Builder::new(meter);
        self.write(&mut out)?;
        Ok(out.finish())
    }

    /// Writes `str()` of the value.
    pub(crate) fn write(&self, out: &mut Builder<'_>) -> Result<(), Fault> {
        match self {
            Value::Str(text) => out.push(text),
            Value::Undefined(_) => Ok(()),
            other => other.write_repr(out),
        }
    }

    /// Writes `repr()` of the value.
    pub(crate) fn write_repr(&self, out: &mut Builder<'_>) -> Result<(), Fault> {
        match self {
            Value::Undefined(_) => out.own("Undefined"),
            Value::None => out.own("None"),
            Value::Bool(true) => out.own("True"),
            Value::Bool(false) => out.own("False"),
            Value::Int(n) => out.own(&n.to_string()),
            Value::Float(n) => out.own(&float_repr(*n)),
            Value::Str(text) if text.is_markup() => {
                out.own("Markup(")?;
                write_str_repr(text, false, out)?;
                out.own(")")
            }
            Value::Str(text) => write_str_repr(text, false, out),
            Value::List(items) => write_items(&items.list, ["[", "]"], out),
            Value::Tuple(items) | Value::Group(items) => {
                let end = if items.list.len() == 1 { ",)" } else { ")" };
                write_items(&items.list, ["(", end], out)
            }
            Value::Dict(dict) => {
                out.own("{")?;
                for (at, (key, value)) in dict.entries.iter().enumerate() {
                    out.own(if at == 0 { "" } else { ", " })?;
                    key.write_repr(out)?;
                    out.own(": ")?;
                    value.write_repr(out)?;
                }
                out.own("}")
            }
            Value::View(_, items) => {
                out.own(self.type_name())?;
                write_items(&items.list, ["([", "])"], out)
            }
            Value::Range(range) => match **range {
                [start, stop, 1] => out.own(&format!("range({start}, {stop})")),
                [start, stop, step] => out.own(&format!("range({start}, {stop}, {step})")),
            },
            other => Err(fault(format!("a {} has no text", other.type_name()))),
        }
    }
}

fn eq_lists(a: &Items, b: &Items, meter: &Meter) -> Result<bool, Fault> {
    if a.list.len() != b.list.len() {
        return Ok(false);
    }
    for (x, y) in a.list.iter().zip(&b.list) {
        if !x.eq(y, meter)? {
            return Ok(false);
        }
    }
    Ok(true)
}

fn write_items(
    list: &[Value],
    [open, close]: [&str; 2],
    out: &mut Builder<'_>,
) -> Result<(), Fault> {
    out.own(open)?;
    for (at, item) in list.iter().enumerate() {
        out.own(if at == 0 { "" } else { ", " })?;
        item.write_repr(out)?;
    }
    out.own(close)
}

/// A string as Python's `repr` writes it, or with `ascii` as `ascii`.
pub(crate) fn write_str_repr(text: &Str, ascii: bool, out: &mut Builder<'_>) -> Result<(), Fault> {
    let plain = text.as_str();
    let quote = if plain.contains('\'') && !plain.contains('"') { '"' } else { '\'' };
    out.char(quote, false)?;
    for (c, foreign) in text.marked_chars() {
        match c {
            '\n' => out.put("\\n", foreign)?,
            '\r' => out.put("\\r", foreign)?,
            '\t' => out.put("\\t", foreign)?,
            '\\' => out.put("\\\\", foreign)?,
            c if c == quote => {
                out.put("\\", foreign)?;
                out.char(c, foreign)?;
            }
            c if is_printable(c) && (c.is_ascii() || !ascii) => out.char(c, foreign)?,
            c if (c as u32) < 0x100 => out.put(&format!("\\x{:02x}", c as u32), foreign)?,
            c if (c as u32) < 0x10000 => out.put(&format!("\\u{:04x}", c as u32), foreign)?,
            c => out.put(&format!("\\U{:08x}", c as u32), foreign)?,
        }
    }
    out.char(quote, false)
}

/// `str.isprintable` of one character. Rust's own table stands behind `escape_debug`, which treats the first
/// character of a text in a way of its own.
pub(crate) fn is_printable(c: char) -> bool {
    if matches!(c, '\'' | '"' | '\\') {
        return true;
    }
    let mut buffer = [b'a'; 5];
    let len = c.encode_utf8(&mut buffer[1..]).len();
    let pair = std::str::from_utf8(&buffer[..=len]).unwrap_or_default();
    pair.escape_debug().nth(1) == Some(c)
}

/// A float as Python prints it: the shortest digits that give it back.
pub(crate) fn float_repr(n: f64) -> String {
    if n.is_nan() {
        return "nan".into();
    }
    if n.is_infinite() {
        return if n > 0.0 { "inf" } else { "-inf" }.into();
    }
    let scientific = format!("{n:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if (-4..16).contains(&exponent) {
        let plain = n.to_string();
        return if plain.contains('.') { plain } else { plain + ".0" };
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{digits}e{sign}{:02}", exponent.abs())
}
