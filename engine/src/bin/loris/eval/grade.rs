//! RULER's string match: how many of the expected strings an answer holds, upper and lower case alike.

/// The share of `expected` that occurs in `answer`; 0 of nothing.
pub(crate) fn grade(answer: &str, expected: &[String]) -> f64 {
    let answer = answer.to_lowercase();
    let n_found = expected.iter().filter(|text| answer.contains(&text.to_lowercase())).count();
    #[allow(clippy::cast_precision_loss)] // a few strings
    match expected.len() {
        0 => 0.0,
        n => n_found as f64 / n as f64,
    }
}
