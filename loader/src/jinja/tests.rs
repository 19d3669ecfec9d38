//! The tests of a template: what stands after `is`.

use super::fault::fault;
use super::parser::Cmp;
use super::run::{CallArgs, R, Run};
use super::value::Value;

/// Runs a test.
pub(crate) fn apply(run: &mut Run<'_>, name: &str, value: &Value, args: CallArgs) -> R<bool> {
    let compared = match name {
        "==" | "eq" | "equalto" => Some(Cmp::Eq),
        "!=" | "ne" => Some(Cmp::Ne),
        ">" | "gt" | "greaterthan" => Some(Cmp::Gt),
        ">=" | "ge" => Some(Cmp::Ge),
        "<" | "lt" | "lessthan" => Some(Cmp::Lt),
        "<=" | "le" => Some(Cmp::Le),
        "in" => Some(Cmp::In),
        _ => None,
    };
    let one = |args: CallArgs| {
        let [other] = args.bind(name, ["other"])?;
        other.ok_or_else(|| fault(format!("test {name}: an argument is missing")))
    };
    if let Some(op) = compared {
        let other = one(args)?;
        return run.compare(op, value, &other);
    }
    let is_number = matches!(value, Value::Bool(_) | Value::Int(_) | Value::Float(_));
    let int = |value: &Value| match value {
        Value::Float(n) if n.fract() == 0.0 && n.abs() < 1e18 =>
        {
            #[allow(clippy::cast_possible_truncation)]
            Some(*n as i128)
        }
        value => value.as_int(),
    };
    let remainder = |by: &Value| match (int(value), int(by)) {
        (_, Some(0)) => Err(fault("division by zero")),
        (Some(n), Some(by)) => Ok(n % by == 0),
        _ if is_number => Ok(false),
        _ => Err(fault(format!("test {name}: takes a number, not {}", value.type_name()))),
    };
    match name {
        "divisibleby" => return remainder(&one(args)?),
        "sameas" => return is_same(run, value, &one(args)?),
        _ => args.none(name)?,
    }
    let has_len = matches!(
        value,
        Value::Undefined(_)
            | Value::Str(_)
            | Value::List(_)
            | Value::Tuple(_)
            | Value::Group(_)
            | Value::Dict(_)
            | Value::Range(..)
    );
    Ok(match name {
        "defined" => !matches!(value, Value::Undefined(_)),
        "undefined" => matches!(value, Value::Undefined(_)),
        "none" => matches!(value, Value::None),
        "boolean" => matches!(value, Value::Bool(_)),
        "true" => matches!(value, Value::Bool(true)),
        "false" => matches!(value, Value::Bool(false)),
        "integer" => matches!(value, Value::Int(_)),
        "float" => matches!(value, Value::Float(_)),
        "number" => is_number,
        "string" => matches!(value, Value::Str(_)),
        "mapping" => matches!(value, Value::Dict(_)),
        "sequence" => has_len,
        "iterable" => has_len || matches!(value, Value::View(..) | Value::Once(_) | Value::Loop(_)),
        "callable" => matches!(
            value,
            Value::Undefined(_)
                | Value::Macro(..)
                | Value::Method(..)
                | Value::Function(_)
                | Value::Loop(_)
                | Value::Joiner(_)
        ),
        "odd" => !remainder(&Value::Int(2))?,
        "even" => remainder(&Value::Int(2))?,
        "lower" | "upper" => {
            let text = value.text(run.meter)?;
            run.meter.scan(text.len())?;
            let (lower, upper) = (
                text.as_str().chars().any(char::is_lowercase),
                text.as_str().chars().any(char::is_uppercase),
            );
            if name == "lower" { lower && !upper } else { upper && !lower }
        }
        "filter" => matches!(value, Value::Str(name) if (run.is_filter)(name.as_str())),
        "test" => matches!(value, Value::Str(name) if exists(name.as_str())),
        "escaped" => matches!(value, Value::Str(text) if text.is_markup()),
        _ => return Err(fault(format!("no test named '{name}'"))),
    })
}

/// Whether there is a test of this name.
fn exists(name: &str) -> bool {
    const NAMES: &str = "!= < <= == > >= boolean callable defined divisibleby eq equalto escaped \
        even false filter float ge greaterthan gt in integer iterable le lessthan lower lt \
        mapping ne none number odd sameas sequence string test true undefined upper";
    NAMES.split(' ').any(|have| have == name)
}

/// `is` of Python, as far as it does not hang on where values lie.
fn is_same(run: &mut Run<'_>, a: &Value, b: &Value) -> R<bool> {
    use std::rc::Rc;
    Ok(match (a, b) {
        (Value::List(a), Value::List(b)) | (Value::Tuple(a), Value::Tuple(b)) => Rc::ptr_eq(a, b),
        (Value::Dict(a), Value::Dict(b)) => Rc::ptr_eq(a, b),
        _ => a.type_name() == b.type_name() && a.eq(b, run.meter)?,
    })
}
