//! Text from a file in a message.

use std::fmt;

/// Text from a file, shown in quotes with control characters escaped and shortened to 120 characters.
#[derive(Clone, PartialEq, Eq)]
pub struct Text(pub String);

impl Text {
    const MAX_CHARS: usize = 120;
}

impl<T: Into<String>> From<T> for Text {
    fn from(text: T) -> Text {
        Text(text.into())
    }
}

impl fmt::Display for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plain = |c: char| {
            !c.is_control() && !matches!(c, '\u{200e}'..='\u{200f}' | '\u{202a}'..='\u{202e}')
        };
        let short: String = self.0.chars().take(Text::MAX_CHARS).collect();
        let rest = self.0.chars().nth(Text::MAX_CHARS).is_some();
        for c in short.chars() {
            if plain(c) { write!(f, "{c}")? } else { write!(f, "{}", c.escape_unicode())? }
        }
        if rest { write!(f, "... ({} bytes)", self.0.len()) } else { Ok(()) }
    }
}

impl fmt::Debug for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
