//! Python's two ways to put values into a text: `'%s' % value` and `'{}'.format(value)`.

use super::fault::fault;
use super::run::{CallArgs, R, Run};
use super::text::{Builder, Meter, Str};
use super::value::{Value, float_repr, write_str_repr};

/// The widest field.
const MAX_WIDTH: usize = 1 << 20;

/// How a field is written.
#[derive(Default, Clone)]
struct Spec {
    fill: Option<(char, bool)>,
    /// `<`, `>`, `^` or `=`.
    align: Option<char>,
    /// `+` or a space.
    sign: Option<char>,
    alternate: bool,
    zero: bool,
    width: usize,
    /// `,` or `_` between thousands.
    group: Option<char>,
    precision: Option<usize>,
    kind: Option<char>,
}

/// A reader of characters, each with whether it is foreign.
struct Chars<'a> {
    text: &'a Str,
    at: usize,
}

impl Chars<'_> {
    fn peek(&self) -> Option<char> {
        self.text.as_str().get(self.at..)?.chars().next()
    }

    fn next(&mut self) -> Option<char> {
        let c = self.peek()?;
        self.at += c.len_utf8();
        Some(c)
    }

    fn skip(&mut self, c: char) -> bool {
        let is = self.peek() == Some(c);
        self.at += if is { c.len_utf8() } else { 0 };
        is
    }

    fn number(&mut self) -> R<Option<usize>> {
        let mut number = None;
        while let Some(digit) = self.peek().and_then(|c| c.to_digit(10)) {
            let n = number.unwrap_or(0usize) * 10 + digit as usize;
            if n > MAX_WIDTH {
                return Err(fault(format!("a field is wider than {MAX_WIDTH}")));
            }
            number = Some(n);
            self.at += 1;
        }
        Ok(number)
    }

    /// The text up to one of these characters.
    fn until(&mut self, stops: &[char]) -> Str {
        let rest = self.text.as_str().get(self.at..).unwrap_or_default();
        let end = self.at + rest.find(stops).unwrap_or(rest.len());
        let part = self.text.slice(self.at..end);
        self.at = end;
        part
    }
}

/// `text % values`.
pub(crate) fn percent(run: &mut Run<'_>, text: &Str, values: &Value) -> R<Str> {
    let meter = run.meter;
    let single = [values.clone()];
    let list = match values {
        Value::Tuple(items) | Value::Group(items) => &items.list[..],
        _ => &single,
    };
    let mut list = list.iter();
    let mut next =
        || list.next().cloned().ok_or_else(|| fault("not enough arguments for format string"));
    let mut out = Builder::new(meter);
    let mut chars = Chars { text, at: 0 };
    let mut by_name = false;
    loop {
        out.push(&chars.until(&['%']))?;
        if !chars.skip('%') {
            break;
        }
        let mut spec = Spec::default();
        let mut key = None;
        if chars.skip('(') {
            key = Some(chars.until(&[')']));
            chars.skip(')');
            by_name = true;
        }
        while let Some(flag) = chars.peek().filter(|c| "-+ #0".contains(*c)) {
            chars.next();
            match flag {
                '-' => spec.align = Some('<'),
                '+' => spec.sign = Some('+'),
                ' ' => spec.sign = spec.sign.or(Some(' ')),
                '#' => spec.alternate = true,
                _ => spec.zero = true,
            }
        }
        let number = |chars: &mut Chars<'_>, next: &mut dyn FnMut() -> R<Value>| {
            if !chars.skip('*') {
                return chars.number();
            }
            let n = next()?.as_int().and_then(|n| usize::try_from(n).ok());
            n.filter(|n| *n <= MAX_WIDTH).map(Some).ok_or_else(|| fault("* wants int"))
        };
        spec.width = number(&mut chars, &mut next)?.unwrap_or(0);
        if chars.skip('.') {
            spec.precision = Some(number(&mut chars, &mut next)?.unwrap_or(0));
        }
        while chars.peek().is_some_and(|c| matches!(c, 'h' | 'l' | 'L')) {
            chars.next();
        }
        let kind = chars.next().ok_or_else(|| fault("incomplete format"))?;
        if kind == '%' {
            out.own("%")?;
            continue;
        }
        let value = match &key {
            None => next()?,
            Some(key) => {
                let Value::Dict(dict) = values else {
                    return Err(fault("format requires a mapping"));
                };
                let found = dict.get_str(key.as_str(), meter)?.cloned();
                found.ok_or_else(|| fault(format!("no key '{}'", key.as_str())))?
            }
        };
        spec.kind = Some(kind);
        write_percent(&value, spec, &mut out, meter)?;
    }
    let is_whole = matches!(values, Value::Dict(_) | Value::List(_));
    if !by_name && !is_whole && list.next().is_some() {
        return Err(fault("not all arguments converted during string formatting"));
    }
    Ok(out.finish())
}

fn write_percent(value: &Value, mut spec: Spec, out: &mut Builder<'_>, meter: &Meter) -> R<()> {
    let kind = spec.kind.unwrap_or('s');
    let text = match kind {
        's' => Some(value.text(meter)?),
        'r' | 'a' => Some(repr(value, kind == 'a', meter)?),
        'c' => Some(match value {
            Value::Str(text) if text.as_str().chars().count() == 1 => text.clone(),
            value => {
                let c = value.as_int().and_then(|n| u32::try_from(n).ok()).and_then(char::from_u32);
                Str::own(c.ok_or_else(|| fault("%c requires int or char"))?)
            }
        }),
        _ => None,
    };
    if let Some(text) = text {
        spec.align = spec.align.or(Some('>'));
        spec.zero = false;
        return write_text(&text, &spec, out, meter);
    }
    spec.kind = Some(match kind {
        'i' | 'u' => 'd',
        'd' | 'o' | 'x' | 'X' | 'e' | 'E' | 'f' | 'F' | 'g' | 'G' => kind,
        other => return Err(fault(format!("unsupported format character '{other}'"))),
    });
    let number = match (value, kind) {
        (Value::Float(n), 'd' | 'i' | 'u') => {
            if !n.is_finite() {
                return Err(fault("cannot convert float to an integer"));
            }
            #[allow(clippy::cast_possible_truncation)]
            Value::Int(n.trunc() as i128)
        }
        (Value::Int(_) | Value::Bool(_) | Value::Float(_), _) => value.clone(),
        _ => {
            return Err(fault(format!(
                "%{kind} format: a real number is required, not {}",
                value.type_name()
            )));
        }
    };
    if spec.align == Some('<') {
        spec.zero = false;
    }
    // A precision of integers is the least number of digits.
    let digits = match (&number, spec.kind) {
        (Value::Int(_) | Value::Bool(_), Some('d' | 'o' | 'x' | 'X')) => spec.precision.take(),
        _ => None,
    };
    write_number(&number, &spec, digits.unwrap_or(0), out)
}

fn repr(value: &Value, ascii: bool, meter: &Meter) -> R<Str> {
    let mut out = Builder::new(meter);
    match value {
        Value::Str(text) => write_str_repr(text, ascii, &mut out)?,
        value => value.write_repr(&mut out)?,
    }
    Ok(out.finish())
}

fn write_text(text: &Str, spec: &Spec, out: &mut Builder<'_>, meter: &Meter) -> R<()> {
    meter.scan(text.len())?;
    let cut = match spec.precision {
        Some(n) => text.slice(0..super::run::char_offset(text, n)),
        None => text.clone(),
    };
    let room = spec.width.saturating_sub(cut.as_str().chars().count());
    let before = match spec.align {
        Some('>') => room,
        Some('^') => room / 2,
        _ => 0,
    };
    let fill = spec.fill.unwrap_or((if spec.zero { '0' } else { ' ' }, false));
    for _ in 0..before {
        out.char(fill.0, fill.1)?;
    }
    out.push(&cut)?;
    for _ in before..room {
        out.char(fill.0, fill.1)?;
    }
    Ok(())
}

/// A number: its sign, its prefix, its digits and the room around them.
fn write_number(value: &Value, spec: &Spec, least: usize, out: &mut Builder<'_>) -> R<()> {
    let kind = spec.kind;
    let integer =
        value.as_int().filter(|_| !matches!(kind, Some('e' | 'E' | 'f' | 'F' | 'g' | 'G' | '%')));
    let (negative, prefix, mut digits) = match integer {
        Some(n) => {
            let magnitude = n.unsigned_abs();
            let (prefix, digits) = match kind {
                Some('x') => ("0x", format!("{magnitude:x}")),
                Some('X') => ("0X", format!("{magnitude:X}")),
                Some('o') => ("0o", format!("{magnitude:o}")),
                Some('b') => ("0b", format!("{magnitude:b}")),
                _ => ("", magnitude.to_string()),
            };
            (n < 0, prefix, digits)
        }
        None => {
            let n = value.as_float().unwrap_or(f64::NAN);
            (n.is_sign_negative() && !n.is_nan(), "", float_digits(n.abs(), spec))
        }
    };
    if digits.len() < least {
        digits.insert_str(0, &"0".repeat(least - digits.len()));
    }
    if let Some(group) = spec.group {
        let size = if matches!(kind, Some('x' | 'X' | 'o' | 'b')) { 4 } else { 3 };
        digits = grouped(&digits, group, size);
    }
    let sign = match (negative, spec.sign) {
        (true, _) => "-",
        (false, Some('+')) => "+",
        (false, Some(' ')) => " ",
        _ => "",
    };
    let prefix = if spec.alternate { prefix } else { "" };
    let room = spec.width.saturating_sub(sign.len() + prefix.len() + digits.chars().count());
    let align = spec.align.unwrap_or(if spec.zero { '=' } else { '>' });
    let fill = spec.fill.unwrap_or((if spec.zero { '0' } else { ' ' }, false));
    let (before, inside) = match align {
        '<' => (0, 0),
        '^' => (room / 2, 0),
        '=' => (0, room),
        _ => (room, 0),
    };
    let pad = |out: &mut Builder<'_>, n: usize| (0..n).try_for_each(|_| out.char(fill.0, fill.1));
    pad(out, before)?;
    out.own(sign)?;
    out.own(prefix)?;
    pad(out, inside)?;
    out.own(&digits)?;
    pad(out, room - before - inside)
}

/// Digits with a mark between groups of them.
fn grouped(digits: &str, mark: char, size: usize) -> String {
    let whole = digits.find(|c: char| !c.is_ascii_alphanumeric()).unwrap_or(digits.len());
    let (whole, rest) = digits.split_at(whole);
    let mut out = String::new();
    for (at, c) in whole.chars().enumerate() {
        if at > 0 && (whole.len() - at).is_multiple_of(size) {
            out.push(mark);
        }
        out.push(c);
    }
    out + rest
}

/// A float that is not negative.
fn float_digits(n: f64, spec: &Spec) -> String {
    let kind = spec.kind.unwrap_or(' ');
    let upper = kind.is_ascii_uppercase();
    if !n.is_finite() {
        let text = if n.is_nan() { "nan" } else { "inf" };
        return if upper { text.to_uppercase() } else { text.into() }
            + if kind == '%' { "%" } else { "" };
    }
    let precision = spec.precision.unwrap_or(6).min(400);
    let text = match kind.to_ascii_lowercase() {
        'f' => point(format!("{n:.precision$}"), spec.alternate),
        'e' => exponent(n, precision, spec.alternate),
        '%' => format!("{:.precision$}%", n * 100.0),
        'g' => general(n, precision, spec.alternate),
        // Without a kind: as `repr`, or with a precision as `g` with a digit after the point.
        _ => match spec.precision {
            None => float_repr(n),
            Some(_) => {
                let text = general(n, precision, false);
                if text.contains(['.', 'e']) { text } else { text + ".0" }
            }
        },
    };
    if upper { text.to_uppercase() } else { text }
}

fn point(text: String, alternate: bool) -> String {
    if alternate && !text.contains('.') { text + "." } else { text }
}

fn exponent(n: f64, precision: usize, alternate: bool) -> String {
    let text = format!("{n:.precision$e}");
    let (digits, power) = text.split_once('e').unwrap_or((&text, "0"));
    let power: i32 = power.parse().unwrap_or(0);
    let sign = if power < 0 { '-' } else { '+' };
    format!("{}e{sign}{:02}", point(digits.into(), alternate), power.abs())
}

fn general(n: f64, precision: usize, alternate: bool) -> String {
    let precision = precision.max(1);
    let scientific = format!("{n:.*e}", precision - 1);
    let power: i32 =
        scientific.split_once('e').and_then(|(_, power)| power.parse().ok()).unwrap_or(0);
    let strip = |text: String| match text.contains('.') && !alternate {
        true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => text,
    };
    let places = i32::try_from(precision).unwrap_or(i32::MAX);
    if (-4..places).contains(&power) {
        let decimals = usize::try_from(places - 1 - power).unwrap_or(0);
        return strip(format!("{n:.decimals$}"));
    }
    let text = exponent(n, precision - 1, alternate);
    let (digits, power) = text.split_once('e').unwrap_or((&text, "+00"));
    format!("{}e{power}", strip(digits.into()))
}

/// `text.format(values)`.
pub(crate) fn braces(run: &mut Run<'_>, text: &Str, args: CallArgs) -> R<Str> {
    let mut out = Builder::new(run.meter);
    let mut counter = 0;
    fields(run, text, &args, &mut counter, 2, &mut out)?;
    Ok(out.finish())
}

fn fields(
    run: &mut Run<'_>,
    text: &Str,
    args: &CallArgs,
    counter: &mut usize,
    depth: usize,
    out: &mut Builder<'_>,
) -> R<()> {
    if depth == 0 {
        return Err(fault("Max string recursion exceeded"));
    }
    let mut chars = Chars { text, at: 0 };
    loop {
        out.push(&chars.until(&['{', '}']))?;
        match chars.next() {
            None => return Ok(()),
            Some(brace) if chars.skip(brace) => out.char(brace, false)?,
            Some('{') => {
                let body = field_body(&mut chars)?;
                field(run, &body, args, counter, depth, out)?;
            }
            Some(_) => return Err(fault("Single '}' encountered in format string")),
        }
    }
}

/// The text up to the brace that closes a field.
fn field_body(chars: &mut Chars<'_>) -> R<Str> {
    let start = chars.at;
    let mut open = 1;
    while let Some(c) = chars.next() {
        open += match c {
            '{' => 1,
            '}' => -1,
            _ => 0,
        };
        if open == 0 {
            return Ok(chars.text.slice(start..chars.at - 1));
        }
    }
    Err(fault("expected '}' before end of string"))
}

fn field(
    run: &mut Run<'_>,
    body: &Str,
    args: &CallArgs,
    counter: &mut usize,
    depth: usize,
    out: &mut Builder<'_>,
) -> R<()> {
    let mut chars = Chars { text: body, at: 0 };
    let name = chars.until(&['.', '[', '!', ':']);
    let mut value = match name.as_str() {
        "" => {
            *counter += 1;
            args.pos.get(*counter - 1).cloned()
        }
        name => match name.parse::<usize>() {
            Ok(at) => args.pos.get(at).cloned(),
            Err(_) => args
                .named
                .iter()
                .find(|(key, _)| key.as_str() == name)
                .map(|(_, value)| value.clone()),
        },
    }
    .ok_or_else(|| fault(format!("no argument for field {{{}}}", name.as_str())))?;
    let mut conversion = None;
    let mut spec = Str::own("");
    while let Some(c) = chars.next() {
        match c {
            '.' => {
                let name = chars.until(&['.', '[', '!', ':']);
                value = run.item(&value, &Value::Str(name))?;
            }
            '[' => {
                let key = chars.until(&[']']);
                chars.skip(']');
                let key = key.as_str().parse().map_or_else(|_| Value::Str(key.clone()), Value::Int);
                value = run.item(&value, &key)?;
            }
            '!' => conversion = chars.next(),
            _ => {
                let mut inner = Builder::new(run.meter);
                fields(
                    run,
                    &body.slice(chars.at..body.len()),
                    args,
                    counter,
                    depth - 1,
                    &mut inner,
                )?;
                spec = inner.finish();
                break;
            }
        }
    }
    let value = match conversion {
        None => value,
        Some('s') => Value::Str(value.text(run.meter)?),
        Some(c @ ('r' | 'a')) => Value::Str(repr(&value, c == 'a', run.meter)?),
        Some(c) => return Err(fault(format!("unknown conversion specifier '{c}'"))),
    };
    write_field(&value, &spec, out, run.meter)
}

fn write_field(value: &Value, text: &Str, out: &mut Builder<'_>, meter: &Meter) -> R<()> {
    if text.is_empty() {
        return value.write(out);
    }
    let spec = parse_spec(text)?;
    let invalid = |kind: char| {
        Err(fault(format!(
            "unknown format code '{kind}' for object of type '{}'",
            value.type_name()
        )))
    };
    match value {
        Value::Str(_) | Value::Undefined(_) => match spec.kind {
            None | Some('s') if spec.align != Some('=') && spec.sign.is_none() => {
                let mut spec = spec;
                if spec.zero && spec.fill.is_none() {
                    spec.fill = Some(('0', false));
                }
                write_text(&value.text(meter)?, &spec, out, meter)
            }
            kind => invalid(kind.unwrap_or('=')),
        },
        Value::Int(_) | Value::Bool(_) => match spec.kind {
            Some('c') => {
                let mut inner = Builder::new(meter);
                write_percent(
                    value,
                    Spec { kind: Some('c'), ..Spec::default() },
                    &mut inner,
                    meter,
                )?;
                write_text(&inner.finish(), &spec, out, meter)
            }
            None
            | Some('d' | 'x' | 'X' | 'o' | 'b' | 'n' | 'e' | 'E' | 'f' | 'F' | 'g' | 'G' | '%') => {
                write_number(value, &spec, 0, out)
            }
            Some(kind) => invalid(kind),
        },
        Value::Float(_) => match spec.kind {
            None | Some('e' | 'E' | 'f' | 'F' | 'g' | 'G' | 'n' | '%') => {
                write_number(value, &spec, 0, out)
            }
            Some(kind) => invalid(kind),
        },
        other => Err(fault(format!(
            "unsupported format string passed to {}.__format__",
            other.type_name()
        ))),
    }
}

fn parse_spec(text: &Str) -> R<Spec> {
    let mut spec = Spec::default();
    let marked: Vec<(char, bool)> = text.marked_chars().take(2).collect();
    let mut chars = Chars { text, at: 0 };
    let is_align = |c: char| matches!(c, '<' | '>' | '^' | '=');
    match marked[..] {
        [fill, (align, _)] if is_align(align) => {
            spec.fill = Some(fill);
            spec.align = Some(align);
            chars.at = fill.0.len_utf8() + 1;
        }
        [(align, _), ..] if is_align(align) => {
            spec.align = Some(align);
            chars.at = 1;
        }
        _ => {}
    }
    if let Some(sign) = chars.peek().filter(|c| matches!(c, '+' | '-' | ' ')) {
        spec.sign = Some(sign);
        chars.next();
    }
    spec.alternate = chars.skip('#');
    spec.zero = chars.skip('0');
    spec.width = chars.number()?.unwrap_or(0);
    if let Some(group) = chars.peek().filter(|c| matches!(c, ',' | '_')) {
        spec.group = Some(group);
        chars.next();
    }
    if chars.skip('.') {
        spec.precision =
            Some(chars.number()?.ok_or_else(|| fault("Format specifier missing precision"))?);
    }
    spec.kind = chars.next();
    match chars.next() {
        None => Ok(spec),
        Some(_) => Err(fault("Invalid format specifier")),
    }
}
