//! A template's text as tokens, by the rules of Jinja 3 with `trim_blocks` and `lstrip_blocks`.

use super::text::is_space;

/// A piece of a template.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Tok {
    /// Text between tags.
    Data(String),
    /// `{{`.
    PrintBegin,
    /// `}}`.
    PrintEnd,
    /// `{%`.
    BlockBegin,
    /// `%}`.
    BlockEnd,
    Name(String),
    Str(String),
    Int(i128),
    Float(f64),
    Op(&'static str),
}

/// A token and the line that it is on.
#[derive(Debug, Clone)]
pub(crate) struct Token {
    pub(crate) tok: Tok,
    pub(crate) line: u32,
}

/// Longest first.
const OPERATORS: [&str; 26] = [
    "//", "**", "==", "!=", ">=", "<=", "+", "-", "/", "*", "%", "~", "[", "]", "(", ")", "{", "}",
    ">", "<", "=", ".", ":", "|", ",", ";",
];

/// Splits a template.
pub(crate) fn lex(source: &str) -> Result<Vec<Token>, String> {
    // As Jinja reads it: one kind of line end, and none at the end of the file.
    let source = source.replace("\r\n", "\n").replace('\r', "\n");
    let source = source.strip_suffix('\n').unwrap_or(&source);
    let mut lexer = Lexer { source, at: 0, line: 1, counted: 0, at_line_start: true, out: vec![] };
    lexer.root().map_err(|why| format!("line {}: {why}", lexer.line))?;
    Ok(lexer.out)
}

struct Lexer<'a> {
    source: &'a str,
    at: usize,
    line: u32,
    /// Up to where lines were counted.
    counted: usize,
    /// Whether the last thing that was read ended a line.
    at_line_start: bool,
    out: Vec<Token>,
}

impl<'a> Lexer<'a> {
    fn rest(&self) -> &'a str {
        self.source.get(self.at..).unwrap_or_default()
    }

    fn push(&mut self, tok: Tok) {
        let passed = self.source.get(self.counted..self.at).unwrap_or_default();
        self.line = self
            .line
            .saturating_add(u32::try_from(passed.matches('\n').count()).unwrap_or(u32::MAX));
        self.counted = self.counted.max(self.at);
        self.out.push(Token { tok, line: self.line });
    }

    fn root(&mut self) -> Result<(), String> {
        loop {
            let rest = self.rest();
            let opens =
                |at: &usize| matches!(rest.as_bytes().get(at + 1), Some(b'{' | b'%' | b'#'));
            let Some(start) = rest.match_indices('{').map(|(at, _)| at).find(opens) else {
                self.data(rest, "+", false);
                return Ok(());
            };
            let (text, tag) = rest.split_at(start);
            let kind = tag.get(..2).unwrap_or_default();
            let body = tag.get(2..).unwrap_or_default();
            let sign = sign_of(body);
            self.data(text, sign, kind == "{{");
            self.at += start + 2 + sign.len();
            self.at_line_start = false;
            match kind {
                "{{" => self.tag(Tok::PrintBegin)?,
                "{#" => self.comment()?,
                _ => match raw_tag(body, "raw", false) {
                    Some(len) => {
                        self.advance_from(len - sign.len());
                        self.raw()?;
                    }
                    None => self.tag(Tok::BlockBegin)?,
                },
            }
        }
    }

    /// Moves on by so many bytes, which were the end of something.
    fn advance_from(&mut self, len: usize) {
        let passed = self.rest().get(..len).unwrap_or_default();
        self.at_line_start = passed.ends_with('\n');
        self.at += len;
    }

    /// Text before a tag, without the white space that the tag takes.
    fn data(&mut self, text: &str, sign: &str, is_print: bool) {
        let kept = match sign {
            "-" => text.trim_end_matches(is_space),
            "+" => text,
            _ if is_print => text,
            _ => {
                let line = text.rfind('\n').map_or(0, |at| at + 1);
                let (before, last) = text.split_at(line);
                let strips = (line > 0 || self.at_line_start) && last.chars().all(is_space);
                if strips { before } else { text }
            }
        };
        if !kept.is_empty() {
            self.push(Tok::Data(kept.to_owned()));
        }
    }

    fn comment(&mut self) -> Result<(), String> {
        let rest = self.rest();
        let end = rest.find("#}").ok_or("a comment without its end #}")?;
        let sign = rest.get(..end).and_then(|text| text.chars().next_back());
        let after = rest.get(end + 2..).unwrap_or_default();
        let taken = match sign {
            Some('-') => after.len() - after.trim_start_matches(is_space).len(),
            Some('+') => 0,
            _ => usize::from(after.starts_with('\n')),
        };
        self.advance_from(end + 2 + taken);
        Ok(())
    }

    fn raw(&mut self) -> Result<(), String> {
        let rest = self.rest();
        for (start, _) in rest.match_indices("{%") {
            let body = rest.get(start + 2..).unwrap_or_default();
            if let Some(len) = raw_tag(body, "endraw", true) {
                self.data(rest.get(..start).unwrap_or_default(), sign_of(body), false);
                self.advance_from(start + 2 + len);
                return Ok(());
            }
        }
        Err("a raw block without its end".into())
    }

    /// The inside of `{{ }}` or `{% %}`.
    fn tag(&mut self, begin: Tok) -> Result<(), String> {
        let is_print = begin == Tok::PrintBegin;
        self.push(begin);
        let mut open: Vec<&str> = Vec::new();
        loop {
            let rest = self.rest();
            if rest.is_empty() {
                return Err("a tag without its end".into());
            }
            if open.is_empty()
                && let Some(len) = tag_end(rest, is_print)
            {
                self.push(if is_print { Tok::PrintEnd } else { Tok::BlockEnd });
                self.advance_from(len);
                return Ok(());
            }
            let space = rest.len() - rest.trim_start_matches(is_space).len();
            if space > 0 {
                self.at += space;
                continue;
            }
            let after_dot = self.source.as_bytes().get(self.at.wrapping_sub(1)) == Some(&b'.');
            let (tok, len) = token(rest, after_dot)?;
            if let Tok::Op(op) = tok {
                match op {
                    "(" => open.push(")"),
                    "[" => open.push("]"),
                    "{" => open.push("}"),
                    ")" | "]" | "}" if open.pop() != Some(op) => {
                        return Err(format!("unexpected {op}"));
                    }
                    _ => {}
                }
            }
            self.push(tok);
            self.at += len;
        }
    }
}

fn sign_of(body: &str) -> &'static str {
    match body.as_bytes().first() {
        Some(b'-') => "-",
        Some(b'+') => "+",
        _ => "",
    }
}

/// The length of the rest of a `{% raw %}` or `{% endraw %}` after its `{%`.
fn raw_tag(body: &str, name: &str, is_end: bool) -> Option<usize> {
    let after = body.get(sign_of(body).len()..)?.trim_start_matches(is_space);
    let after = after.strip_prefix(name)?.trim_start_matches(is_space);
    let rest = if let Some(rest) = after.strip_prefix("-%}") {
        rest.trim_start_matches(is_space)
    } else if let Some(rest) = after.strip_prefix("%}") {
        if is_end { rest.strip_prefix('\n').unwrap_or(rest) } else { rest }
    } else if is_end {
        after.strip_prefix("+%}")?
    } else {
        return None;
    };
    Some(body.len() - rest.len())
}

/// The length of the end of a tag, with the white space that it takes.
fn tag_end(rest: &str, is_print: bool) -> Option<usize> {
    let end = if is_print { "}}" } else { "%}" };
    if let Some(after) = rest.strip_prefix('-').and_then(|rest| rest.strip_prefix(end)) {
        return Some(rest.len() - after.trim_start_matches(is_space).len());
    }
    if let Some(after) = rest.strip_prefix(end) {
        let newline = usize::from(!is_print && after.starts_with('\n'));
        return Some(2 + newline);
    }
    let plus = !is_print && rest.strip_prefix('+').is_some_and(|rest| rest.starts_with(end));
    plus.then_some(3)
}

/// The token at the beginning, and its length.
fn token(rest: &str, after_dot: bool) -> Result<(Tok, usize), String> {
    let first = rest.chars().next().unwrap_or_default();
    if first.is_ascii_digit() {
        return number(rest, after_dot);
    }
    if first == '\'' || first == '"' {
        return string(rest, first);
    }
    let word: usize =
        rest.chars().take_while(|c| c.is_alphanumeric() || *c == '_').map(char::len_utf8).sum();
    if word > 0 {
        return Ok((Tok::Name(rest.get(..word).unwrap_or_default().to_owned()), word));
    }
    match OPERATORS.into_iter().find(|op| rest.starts_with(op)) {
        Some(op) => Ok((Tok::Op(op), op.len())),
        None => Err(format!("unexpected character {first:?}")),
    }
}

/// The length of digits in groups that single underscores part.
fn digits(text: &str, is_digit: impl Fn(char) -> bool) -> usize {
    let mut len = 0;
    let mut underscore = false;
    for (at, c) in text.char_indices() {
        if is_digit(c) {
            (len, underscore) = (at + 1, false);
        } else if c == '_' && !underscore && at > 0 {
            underscore = true;
        } else {
            break;
        }
    }
    len
}

fn number(rest: &str, after_dot: bool) -> Result<(Tok, usize), String> {
    let decimal = |text: &str| digits(text, |c| c.is_ascii_digit());
    let whole = decimal(rest);
    if !after_dot {
        let after = rest.get(whole..).unwrap_or_default();
        let fraction = after.strip_prefix('.').map_or(0, decimal);
        let mut len = whole + if fraction > 0 { 1 + fraction } else { 0 };
        let after = rest.get(len..).unwrap_or_default();
        if let Some(exponent) = after.strip_prefix(['e', 'E']) {
            let signed = exponent.strip_prefix(['+', '-']).unwrap_or(exponent);
            let n = decimal(signed);
            if n > 0 {
                len += 1 + (exponent.len() - signed.len()) + n;
            }
        }
        if len > whole {
            let text = rest.get(..len).unwrap_or_default().replace('_', "");
            let value = text.parse().map_err(|_| format!("not a number: {text}"))?;
            return Ok((Tok::Float(value), len));
        }
    }
    let prefixed = |prefix: [&str; 2], radix: u32| {
        let body = rest.strip_prefix(prefix[0]).or_else(|| rest.strip_prefix(prefix[1]))?;
        let skip = usize::from(body.starts_with('_'));
        let n = digits(body.get(skip..)?, |c| c.is_digit(radix));
        (n > 0).then_some((radix, 2, skip + n))
    };
    let found = prefixed(["0x", "0X"], 16)
        .or_else(|| prefixed(["0o", "0O"], 8))
        .or_else(|| prefixed(["0b", "0B"], 2));
    let zeros = digits(rest, |c| c == '0');
    let (radix, skip, n) = match found {
        Some(found) => found,
        None if zeros > 0 => (10, 0, zeros),
        None => (10, 0, whole),
    };
    let text = rest.get(skip..skip + n).unwrap_or_default().replace('_', "");
    let value = i128::from_str_radix(&text, radix)
        .map_err(|_| format!("number {text}: expected at most 127 bits"))?;
    Ok((Tok::Int(value), skip + n))
}

fn string(rest: &str, quote: char) -> Result<(Tok, usize), String> {
    let mut out = String::new();
    let mut chars = rest.char_indices().skip(1);
    while let Some((at, c)) = chars.next() {
        if c == quote {
            return Ok((Tok::Str(out), at + 1));
        }
        if c != '\\' {
            out.push(c);
            continue;
        }
        let Some((at, c)) = chars.next() else { break };
        let mut code = |n: usize| {
            let digits = rest.get(at + 1..at + 1 + n).unwrap_or_default();
            let code = u32::from_str_radix(digits, 16).ok().and_then(char::from_u32);
            for _ in 0..n {
                chars.next();
            }
            code.ok_or_else(|| format!("escape \\{c}{digits} is no character"))
        };
        match c {
            '\n' => {}
            'a' => out.push('\x07'),
            'b' => out.push('\x08'),
            'f' => out.push('\x0c'),
            'n' => out.push('\n'),
            'r' => out.push('\r'),
            't' => out.push('\t'),
            'v' => out.push('\x0b'),
            'x' => out.push(code(2)?),
            'u' => out.push(code(4)?),
            'U' => out.push(code(8)?),
            '0'..='7' => {
                let octal: String = rest
                    .get(at..)
                    .unwrap_or_default()
                    .chars()
                    .take(3)
                    .take_while(|c| c.is_digit(8))
                    .collect();
                out.extend(u32::from_str_radix(&octal, 8).ok().and_then(char::from_u32));
                for _ in 1..octal.len() {
                    chars.next();
                }
            }
            '\\' | '\'' | '"' => out.push(c),
            'N' => return Err("escapes by name (\\N) are not supported".into()),
            other => out.extend(['\\', other]),
        }
    }
    Err("a string without its end".into())
}
