//! The functions of a template: Jinja's, and those that Hugging Face adds.

use super::fault::{Fault, fault};
use super::run::{CallArgs, R, Run};
use super::text::Str;
use super::time;
use super::value::{Dict, Items, Value, insert};

/// Their names.
pub(crate) const NAMES: [&str; 7] =
    ["range", "dict", "namespace", "cycler", "joiner", "raise_exception", "strftime_now"];

/// The longest range, as in Jinja's sandbox.
const MAX_RANGE: usize = 100_000;

pub(crate) fn call(run: &mut Run<'_>, name: &str, args: CallArgs) -> R<Value> {
    match name {
        "range" => range(run, args),
        "dict" => Ok(Value::Dict(Dict::new(pairs(run, args)?, run.meter)?)),
        "namespace" => {
            let pairs = pairs(run, args)?;
            let private = pairs
                .iter()
                .find(|(key, _)| matches!(key, Value::Str(key) if key.as_str().starts_with('_')));
            if private.is_some() {
                return Err(fault("a namespace cannot hold names that begin with an underscore"));
            }
            run.meter.take(pairs.len() * size_of::<(Value, Value)>() + 64)?;
            run.namespaces.push(pairs);
            Ok(Value::Namespace(run.namespaces.len() - 1))
        }
        "cycler" => {
            if args.pos.is_empty() {
                return Err(fault("cycler: at least one item has to be provided"));
            }
            run.meter.take(64)?;
            let items = Items::new(args.pos, run.meter)?;
            run.cyclers.push((items, 0));
            Ok(Value::Cycler(run.cyclers.len() - 1))
        }
        "joiner" => {
            let [separator] = args.bind(name, ["sep"])?;
            let separator = match separator {
                Some(separator) => separator.text(run.meter)?,
                None => Str::own(", "),
            };
            run.meter.take(64)?;
            run.joiners.push((separator, false));
            Ok(Value::Joiner(run.joiners.len() - 1))
        }
        "raise_exception" => {
            let [why] = args.bind(name, ["message"])?;
            let why = why.unwrap_or(Value::None).text(run.meter)?;
            Err(Fault::Refused(why.as_str().to_owned()))
        }
        _ => {
            let [format] = args.bind(name, ["format"])?;
            let Some(Value::Str(format)) = format else {
                return Err(fault("strftime_now: takes a format"));
            };
            run.meter.scan(format.len())?;
            run.meter.take(format.len().saturating_mul(16))?;
            Ok(Value::own(time::strftime(format.as_str(), run.now).map_err(fault)?))
        }
    }
}

/// The entries that `dict(mapping, key=value)` takes.
fn pairs(run: &mut Run<'_>, args: CallArgs) -> R<Vec<(Value, Value)>> {
    let mut entries = Vec::new();
    match &args.pos[..] {
        [] => {}
        [Value::Dict(dict)] => entries.extend(dict.entries.iter().cloned()),
        [list] => {
            for pair in &list.iterate(run.meter)?.list {
                let pair = pair.iterate(run.meter)?;
                let [key, value] = &pair.list[..] else {
                    return Err(fault("dict: takes a dict, or pairs of a key and a value"));
                };
                insert(&mut entries, key.clone(), value.clone(), run.meter)?;
            }
        }
        _ => return Err(fault("dict: takes one argument without a name")),
    }
    for (key, value) in args.named {
        insert(&mut entries, Value::Str(key), value, run.meter)?;
    }
    Ok(entries)
}

fn range(run: &mut Run<'_>, args: CallArgs) -> R<Value> {
    let [first, second, third] = args.bind("range", ["start", "stop", "step"])?;
    let int = |value: Option<Value>, default: i128| match value {
        None => Ok(default),
        Some(value) => match value.as_int() {
            Some(n) if n.unsigned_abs() < 1 << 64 => Ok(n),
            _ => Err(fault(format!("range: takes integers, not {}", value.type_name()))),
        },
    };
    let (start, stop) = match second {
        Some(stop) => (int(first, 0)?, int(Some(stop), 0)?),
        None => (0, int(Some(first.ok_or_else(|| fault("range: takes an end"))?), 0)?),
    };
    let step = int(third, 1)?;
    if step == 0 {
        return Err(fault("range: the step must not be zero"));
    }
    let range = Value::Range(Box::new([start, stop, step]));
    match range.len(run.meter)? > MAX_RANGE {
        true => Err(fault(format!("range: longer than {MAX_RANGE}"))),
        false => Ok(range),
    }
}
