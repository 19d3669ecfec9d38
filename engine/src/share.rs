//! Shares as people write them.

/// The share that a text names: `25%`, `0.25` or `1/4`. `None`: it names none, or not a finite number.
pub fn parse(text: &str) -> Option<f64> {
    let number = |text: &str| text.trim().parse::<f64>().ok();
    let share = match (text.strip_suffix('%'), text.split_once('/')) {
        (Some(percent), None) => number(percent)? / 100.0,
        (None, Some((part, whole))) => number(part)? / number(whole)?,
        (None, None) => number(text)?,
        (Some(_), Some(_)) => return None,
    };
    share.is_finite().then_some(share)
}

/// What [`parse`] takes, for messages.
pub const EXPECTED: &str = "a share, as 25%, 0.25 or 1/4";

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn all_spellings_mean_the_same() {
        for (texts, share) in [
            (["25%", "0.25", "1/4", ".25", "25.0 %", " 1 / 4 "], 0.25),
            (["100%", "1", "1.0", "3/3", "1e0", "1e2%"], 1.0),
            (["0.7", "70%", "7/10", "14/20", "7e-1", "+0.7"], 0.7),
        ] {
            texts.iter().for_each(|text| assert_eq!(parse(text), Some(share), "{text}"));
        }
    }

    #[test]
    fn nothing_else_does() {
        for text in [
            "", "%", "/", "1/", "/4", "1/0", "0/0", "1/4%", "1/2/3", "nan", "inf%", "a", "1,5",
            "25%%",
        ] {
            assert_eq!(parse(text), None, "{text}");
        }
        assert_eq!(parse("-1/4"), Some(-0.25)); // whose option it is says what range it takes
    }
}
