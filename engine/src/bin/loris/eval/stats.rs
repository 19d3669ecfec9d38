//! Means, and how far they can be trusted: 95 % intervals.
//!
//! A mean of 0/1 grades has Wilson's interval, a difference of paired 0/1 grades that of Bonett and Price
//! (2012): both keep a width where every grade is the same, so thirty equal answers do not look like
//! certainty. Everything else has Student's t. Which one was used is part of the result.

/// The 97.5 % point of the normal distribution.
const Z: f64 = 1.959_963_984_540_054;

/// A mean with its interval.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Estimate {
    pub(crate) n: usize,
    pub(crate) mean: f64,
    pub(crate) lo: f64,
    pub(crate) hi: f64,
    pub(crate) method: &'static str,
}

/// The mean of grades from 0 to 1: with Wilson's interval where each is 0 or 1 (shares may be, and vary no
/// more than those do), else with Student's, cut to the same range; `None` of nothing.
pub(crate) fn grades(values: &[f64]) -> Option<Estimate> {
    if values.iter().all(|&x| x == 0.0 || x == 1.0) {
        return wilson(values);
    }
    let estimate = student(values)?;
    Some(Estimate { lo: estimate.lo.max(0.0), hi: estimate.hi.min(1.0), ..estimate })
}

/// What `values` have more than `baseline`, pair by pair; `None` of nothing.
pub(crate) fn paired(values: &[f64], baseline: &[f64]) -> Option<Estimate> {
    let is_binary = values.iter().chain(baseline).all(|&x| x == 0.0 || x == 1.0);
    let differences: Vec<f64> = values.iter().zip(baseline).map(|(x, y)| x - y).collect();
    match is_binary {
        true => bonett_price(&differences),
        false => student(&differences),
    }
}

fn wilson(values: &[f64]) -> Option<Estimate> {
    let (n, mean) = mean(values)?;
    let z2 = Z * Z;
    let centre = (mean + z2 / (2.0 * n)) / (1.0 + z2 / n);
    let half = Z / (1.0 + z2 / n) * (mean * (1.0 - mean) / n + z2 / (4.0 * n * n)).sqrt();
    let (lo, hi) = ((centre - half).max(0.0), (centre + half).min(1.0));
    Some(Estimate { n: values.len(), mean, lo, hi, method: "wilson" })
}

/// Differences that are -1, 0 or 1. One more pair of either sign is added before the interval is taken.
fn bonett_price(differences: &[f64]) -> Option<Estimate> {
    let (n, mean) = mean(differences)?;
    #[allow(clippy::cast_precision_loss)] // a count of samples
    let share = |sign: f64| {
        let count = differences.iter().filter(|&&d| d == sign).count();
        (count as f64 + 1.0) / (n + 2.0)
    };
    let (gained, lost) = (share(1.0), share(-1.0));
    let centre = gained - lost;
    let half = Z * ((gained + lost - centre * centre) / (n + 2.0)).sqrt();
    let (lo, hi) = ((centre - half).max(-1.0), (centre + half).min(1.0));
    Some(Estimate { n: differences.len(), mean, lo, hi, method: "bonett-price" })
}

/// Student's interval; of one value alone it is unknown, and NaN.
pub(crate) fn student(values: &[f64]) -> Option<Estimate> {
    let (n, mean) = mean(values)?;
    let squares: f64 = values.iter().map(|x| (x - mean) * (x - mean)).sum();
    let half = match values.len() {
        1 => f64::NAN,
        len => t_point(len - 1) * (squares / (n - 1.0) / n).sqrt(),
    };
    Some(Estimate { n: values.len(), mean, lo: mean - half, hi: mean + half, method: "t" })
}

fn mean(values: &[f64]) -> Option<(f64, f64)> {
    #[allow(clippy::cast_precision_loss)] // a count of samples
    let n = values.len() as f64;
    (n > 0.0).then(|| (n, values.iter().sum::<f64>() / n))
}

/// The 97.5 % point of Student's distribution: a table for few degrees of freedom, beyond it the expansion
/// around the normal point (Abramowitz and Stegun 26.7.5), which is right to four decimals there.
pub(crate) fn t_point(df: usize) -> f64 {
    const TABLE: [f64; 10] =
        [12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281];
    if let Some(&t) = df.checked_sub(1).and_then(|at| TABLE.get(at)) {
        return t;
    }
    #[allow(clippy::cast_precision_loss)] // a count of samples
    let v = df as f64;
    let z2 = Z * Z;
    let first = Z * (z2 + 1.0) / 4.0;
    let second = Z * ((5.0 * z2 + 16.0) * z2 + 3.0) / 96.0;
    let third = Z * (((3.0 * z2 + 19.0) * z2 + 17.0) * z2 - 15.0) / 384.0;
    let fourth = Z * ((((79.0 * z2 + 776.0) * z2 + 1482.0) * z2 - 1920.0) * z2 - 945.0) / 92_160.0;
    Z + (first + (second + (third + fourth / v) / v) / v) / v
}
