//! What operators give.

use super::fault::{Fault, fault};
use super::parser::{Cmp, Op};
use super::run::{R, Run};
use super::text::Builder;
use super::value::Value;
use super::{filters, format};

impl Run<'_> {
    pub(crate) fn compare(&self, op: Cmp, left: &Value, right: &Value) -> R<bool> {
        use std::cmp::Ordering::{Equal, Greater, Less};
        let order = |allowed: &[_]| {
            Ok(left.cmp(right, self.meter)?.is_some_and(|order| allowed.contains(&order)))
        };
        match op {
            Cmp::Eq => left.eq(right, self.meter),
            Cmp::Ne => Ok(!left.eq(right, self.meter)?),
            Cmp::Lt => order(&[Less]),
            Cmp::Le => order(&[Less, Equal]),
            Cmp::Gt => order(&[Greater]),
            Cmp::Ge => order(&[Greater, Equal]),
            Cmp::In => right.contains(left, self.meter),
            Cmp::NotIn => Ok(!right.contains(left, self.meter)?),
        }
    }

    pub(crate) fn add(&mut self, left: &Value, right: &Value) -> R<Value> {
        self.binary(Op::Add, left, right)
    }

    pub(super) fn binary(&mut self, op: Op, left: &Value, right: &Value) -> R<Value> {
        let is_format = op == Op::Rem && matches!(left, Value::Str(_));
        if let (Value::Undefined(why), _) | (_, Value::Undefined(why)) = (left, right)
            && !is_format
        {
            return Err(fault(&**why));
        }
        match (op, left, right) {
            (Op::Rem, Value::Str(text), _) if text.is_markup() => {
                Err(fault("formatting of escaped text is not supported"))
            }
            (Op::Rem, Value::Str(text), _) => format::percent(self, text, right).map(Value::Str),
            (Op::Add, Value::List(a), Value::List(b)) => {
                self.meter.take((a.list.len() + b.list.len()) * size_of::<Value>())?;
                Value::list([&a.list[..], &b.list[..]].concat(), self.meter)
            }
            (Op::Add, Value::Tuple(a), Value::Tuple(b)) => {
                self.meter.take((a.list.len() + b.list.len()) * size_of::<Value>())?;
                Value::tuple([&a.list[..], &b.list[..]].concat(), self.meter)
            }
            (Op::Mul, Value::Str(text), n) | (Op::Mul, n, Value::Str(text))
                if n.as_int().is_some() =>
            {
                let mut out = Builder::new(self.meter);
                if !text.is_empty() {
                    for _ in 0..n.as_int().unwrap_or(0) {
                        out.push(text)?;
                    }
                }
                Ok(Value::Str(out.finish().with_markup(text.is_markup())))
            }
            (Op::Mul, list @ (Value::List(items) | Value::Tuple(items)), n)
            | (Op::Mul, n, list @ (Value::List(items) | Value::Tuple(items)))
                if n.as_int().is_some() =>
            {
                let n = usize::try_from(n.as_int().unwrap_or(0).max(0)).unwrap_or(usize::MAX);
                let bytes = n.saturating_mul(items.list.len()).saturating_mul(size_of::<Value>());
                self.meter.take(bytes)?;
                let n = if items.list.is_empty() { 0 } else { n };
                let repeated = (0..n).flat_map(|_| items.list.iter().cloned()).collect();
                match list {
                    Value::List(_) => Value::list(repeated, self.meter),
                    _ => Value::tuple(repeated, self.meter),
                }
            }
            (Op::Add, Value::Str(a), Value::Str(b)) => {
                let is_markup = a.is_markup() || b.is_markup();
                let mut out = Builder::new(self.meter);
                for part in [a, b] {
                    match is_markup && !part.is_markup() {
                        true => filters::write_escaped(part, &mut out)?,
                        false => out.push(part)?,
                    }
                }
                Ok(Value::Str(out.finish().with_markup(is_markup)))
            }
            _ => arithmetic(op, left, right),
        }
    }
}

fn too_large() -> Fault {
    fault("a number is too large: expected at most 127 bits")
}

pub(super) fn negate(value: &Value) -> R<Value> {
    match value {
        Value::Float(n) => Ok(Value::Float(-n)),
        Value::Undefined(why) => Err(fault(&**why)),
        other => match other.as_int() {
            Some(n) => Ok(Value::Int(n.checked_neg().ok_or_else(too_large)?)),
            None => Err(fault(format!("bad operand type for unary -: '{}'", other.type_name()))),
        },
    }
}

/// Operators on numbers.
fn arithmetic(op: Op, left: &Value, right: &Value) -> R<Value> {
    let zero = || fault("division by zero");
    if let (Some(a), Some(b)) = (left.as_int(), right.as_int()) {
        let value = match op {
            Op::Add => a.checked_add(b),
            Op::Sub => a.checked_sub(b),
            Op::Mul => a.checked_mul(b),
            Op::FloorDiv | Op::Rem if b == 0 => return Err(zero()),
            Op::FloorDiv => {
                let inexact = a.checked_rem(b).is_some_and(|rest| rest != 0) && (a < 0) != (b < 0);
                a.checked_div(b).map(|n| n - i128::from(inexact))
            }
            Op::Rem => {
                a.checked_rem(b).map(|n| if n != 0 && (n < 0) != (b < 0) { n + b } else { n })
            }
            Op::Pow if b >= 0 => match (a, u32::try_from(b)) {
                (0 | 1, _) => Some(if b == 0 { 1 } else { a }),
                (-1, _) => Some(if b % 2 == 0 { 1 } else { -1 }),
                (_, Ok(b)) => a.checked_pow(b),
                _ => None,
            },
            Op::Pow | Op::Div => return floats(op, left, right),
        };
        return value.map(Value::Int).ok_or_else(too_large);
    }
    floats(op, left, right)
}

fn floats(op: Op, left: &Value, right: &Value) -> R<Value> {
    let (Some(a), Some(b)) = (left.as_float(), right.as_float()) else {
        let (a, b) = (left.type_name(), right.type_name());
        return Err(fault(format!("unsupported operand types: '{a}' and '{b}'")));
    };
    let zero = matches!(op, Op::Div | Op::FloorDiv | Op::Rem) && b == 0.0;
    if zero || (op == Op::Pow && a == 0.0 && b < 0.0) {
        return Err(fault("division by zero"));
    }
    // As Python divides floats with a rest: the rest has the divisor's sign.
    let rest = || {
        let rest = a % b;
        if rest != 0.0 && (rest < 0.0) != (b < 0.0) { rest + b } else { rest }
    };
    Ok(Value::Float(match op {
        Op::Add => a + b,
        Op::Sub => a - b,
        Op::Mul => a * b,
        Op::Div => a / b,
        Op::Rem if rest() == 0.0 => 0f64.copysign(b),
        Op::Rem => rest(),
        Op::FloorDiv => {
            let quotient = (a - rest()) / b;
            let floor = quotient.floor();
            if quotient - floor > 0.5 { floor + 1.0 } else { floor }
        }
        Op::Pow => {
            let power = a.powf(b);
            if power.is_nan() && !a.is_nan() && !b.is_nan() {
                return Err(fault("a power that is no real number"));
            }
            if power.is_infinite() && a.is_finite() && b.is_finite() {
                return Err(fault("numerical result out of range"));
            }
            power
        }
    }))
}
