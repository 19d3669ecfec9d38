//! What is in a value: its attributes, its items, a slice of it.

use std::rc::Rc;

use super::fault::fault;
use super::methods;
use super::run::{Loop, R, Run, char_offset};
use super::text::Builder;
use super::value::Value;

impl Run<'_> {
    /// `value.name`.
    pub(super) fn attr(&mut self, value: &Value, name: &str) -> R<Value> {
        if let Some(attr) = self.own_attr(value, name)? {
            return Ok(attr);
        }
        match value {
            Value::Undefined(why) => Err(fault(&**why)),
            Value::Dict(dict) => match dict.get_str(name, self.meter)? {
                Some(found) => Ok(found.clone()),
                None => Ok(missing(value, name)),
            },
            _ => Ok(missing(value, name)),
        }
    }

    /// What Python's `getattr` finds.
    fn own_attr(&self, value: &Value, name: &str) -> R<Option<Value>> {
        match value {
            Value::Namespace(id) => {
                let space = self.namespaces.get(*id).map_or(&[][..], Vec::as_slice);
                self.meter.work(space.len())?;
                let is = |(key, _): &&(Value, Value)| matches!(key, Value::Str(key) if key.as_str() == name);
                Ok(space.iter().find(is).map(|(_, value)| value.clone()))
            }
            Value::Loop(id) => {
                Ok(self.loops.get(*id).and_then(|state| loop_attr(state, value, name)))
            }
            Value::Group(items) => Ok(match name {
                "grouper" => items.list.first().cloned(),
                "list" => items.list.get(1).cloned(),
                _ => None,
            }),
            Value::Cycler(id) if name == "current" => {
                Ok(self.cyclers.get(*id).and_then(|(items, at)| items.list.get(*at).cloned()))
            }
            Value::Macro(id, _) if name == "name" => {
                Ok(self.program.macros.get(*id).map(|definition| Value::own(&definition.name)))
            }
            _ => Ok(match methods::find(value, name) {
                Some(method) => Some(Value::Method(Rc::new(value.clone()), method)),
                // The sandbox has these and gives none of them out.
                None => methods::is_unsafe(value, name).then(|| {
                    let kind = value.type_name();
                    Value::undefined(format!(
                        "access to attribute '{name}' of '{kind}' object is unsafe."
                    ))
                }),
            }),
        }
    }

    /// `value[key]`.
    pub(crate) fn item(&mut self, value: &Value, key: &Value) -> R<Value> {
        let found = match (value, key) {
            (Value::Undefined(why), _) => return Err(fault(&**why)),
            (Value::Dict(dict), Value::Str(key)) => {
                dict.get_str(key.as_str(), self.meter)?.cloned()
            }
            (Value::Dict(dict), key) => dict.get(key, self.meter)?.cloned(),
            (
                Value::Str(_)
                | Value::List(_)
                | Value::Tuple(_)
                | Value::Group(_)
                | Value::Range(..),
                key,
            ) => match key.as_int() {
                Some(index) => self.index(value, index)?,
                None => None,
            },
            _ => None,
        };
        match (found, key) {
            (Some(found), _) => Ok(found),
            (None, Value::Str(key)) => match self.own_attr(value, key.as_str())? {
                Some(attr) => Ok(attr),
                None => Ok(missing(value, key.as_str())),
            },
            (None, Value::Int(index)) => Ok(missing(value, &index.to_string())),
            (None, key) => Ok(missing(value, key.type_name())),
        }
    }

    fn index(&self, value: &Value, index: i128) -> R<Option<Value>> {
        let len = value.len(self.meter)? as i128;
        let at = if index < 0 { index + len } else { index };
        let Some(at) = usize::try_from(at).ok().filter(|at| (*at as i128) < len) else {
            return Ok(None);
        };
        Ok(match value {
            Value::Str(text) => {
                let at = char_offset(text, at);
                let len = text
                    .as_str()
                    .get(at..)
                    .and_then(|rest| rest.chars().next())
                    .map_or(0, char::len_utf8);
                Some(Value::Str(text.slice(at..at + len)))
            }
            Value::List(items) | Value::Tuple(items) | Value::Group(items) => {
                items.list.get(at).cloned()
            }
            Value::Range(range) => Some(Value::Int(range[0] + at as i128 * range[2])),
            _ => None,
        })
    }

    pub(super) fn slice(&self, value: &Value, bounds: [Option<i128>; 3]) -> R<Value> {
        if let Value::Undefined(why) = value {
            return Err(fault(&**why));
        }
        if !matches!(
            value,
            Value::Str(_) | Value::List(_) | Value::Tuple(_) | Value::Group(_) | Value::Range(..)
        ) {
            return Err(fault(format!("'{}' object has no slices", value.type_name())));
        }
        let len = value.len(self.meter)? as i128;
        let step = bounds[2].unwrap_or(1);
        if step == 0 {
            return Err(fault("slice step cannot be zero"));
        }
        let (lowest, highest) = if step > 0 { (0, len) } else { (-1, len - 1) };
        let place = |bound: Option<i128>, default: i128| match bound {
            None => default,
            Some(n) if n < 0 => n.saturating_add(len).max(lowest),
            Some(n) => n.min(highest),
        };
        let (from, to) = if step > 0 { (0, len) } else { (len - 1, -1) };
        let (start, stop) = (place(bounds[0], from), place(bounds[1], to));
        let span = if step > 0 { stop - start } else { start - stop };
        let n = if span <= 0 { 0 } else { (span - 1) / step.saturating_abs() + 1 };
        let at = |i: i128| usize::try_from(start + i * step).unwrap_or(0);
        match value {
            Value::Range(range) => {
                let [first, _, stride] = **range;
                let ends = [first + start * stride, first + stop * stride, stride * step];
                Ok(Value::Range(Box::new(ends)))
            }
            Value::Str(text) if step == 1 || n == 0 => {
                let from = char_offset(text, at(0));
                let part = text.slice(from..text.len());
                Ok(Value::Str(part.slice(0..char_offset(&part, usize::try_from(n).unwrap_or(0)))))
            }
            Value::Str(text) => {
                let list: Vec<(char, bool)> = {
                    self.meter.take(text.len().saturating_mul(8))?;
                    text.marked_chars().collect()
                };
                let mut out = Builder::new(self.meter);
                for i in 0..n {
                    if let Some(&(c, foreign)) = list.get(at(i)) {
                        out.char(c, foreign)?;
                    }
                }
                Ok(Value::Str(out.finish()))
            }
            Value::List(items) | Value::Tuple(items) | Value::Group(items) => {
                let list = (0..n).filter_map(|i| items.list.get(at(i)).cloned()).collect();
                match value {
                    Value::List(_) => Value::list(list, self.meter),
                    _ => Value::tuple(list, self.meter),
                }
            }
            _ => Ok(Value::None),
        }
    }
}

/// What is not there, and what to say of it.
fn missing(value: &Value, name: &str) -> Value {
    let name: String = name.chars().take(64).collect();
    Value::undefined(format!("'{} object' has no attribute '{name}'", value.type_name()))
}

fn loop_attr(state: &Loop<'_>, value: &Value, name: &str) -> Option<Value> {
    let len = state.len;
    let int = |n: usize| Some(Value::Int(n as i128));
    match name {
        "index" => int(state.index + 1),
        "index0" => int(state.index),
        "revindex" => int(len - state.index),
        "revindex0" => int(len - state.index - 1),
        "first" => Some(Value::Bool(state.index == 0)),
        "last" => Some(Value::Bool(state.index + 1 == len)),
        "length" => int(len),
        "depth" => int(state.depth),
        "depth0" => int(state.depth - 1),
        "previtem" => {
            let missing = || Value::undefined("there is no previous item");
            Some(state.walk.get(state.index, -1).unwrap_or_else(missing))
        }
        "nextitem" => {
            let missing = || Value::undefined("there is no next item");
            Some(state.walk.get(state.index, 1).unwrap_or_else(missing))
        }
        "cycle" | "changed" => {
            let name = if name == "cycle" { "cycle" } else { "changed" };
            Some(Value::Method(Rc::new(value.clone()), name))
        }
        _ => None,
    }
}
