//! The ops of a layer in plain f64 loops: what every backend is checked against.
//!
//! Nothing here is fast or clever. Each function is the textbook definition, one row at a time.

/// `x / sqrt(mean(x^2) + eps) * weight`
pub(crate) fn rms_norm(x: &[f64], weight: &[f64], eps: f64) -> Vec<f64> {
    let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
    let scale = 1.0 / (mean + eps).sqrt();
    x.iter().zip(weight).map(|(x, w)| x * scale * w).collect()
}

/// `w x` for `w` of `x.len()` columns, row-major.
pub(crate) fn matvec(w: &[f64], x: &[f64]) -> Vec<f64> {
    w.chunks_exact(x.len()).map(|row| dot(row, x)).collect()
}

/// Inner product.
pub(crate) fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Rotates the pairs `(i, i + d / 2)` of a head by `position * inv_freq[i]`, times `scale`.
pub(crate) fn rotate(head: &[f64], position: u32, inv_freq: &[f64], scale: f64) -> Vec<f64> {
    let half = head.len() / 2;
    let mut out = vec![0.0; head.len()];
    for i in 0..half {
        let (sin, cos) = (f64::from(position) * inv_freq[i]).sin_cos();
        out[i] = (head[i] * cos - head[half + i] * sin) * scale;
        out[half + i] = (head[half + i] * cos + head[i] * sin) * scale;
    }
    out
}

/// `H head / sqrt(n)`, with the Hadamard matrix of the largest power of two that divides the width; its own
/// inverse.
pub(crate) fn hadamard(head: &[f64]) -> Vec<f64> {
    let n = 1 << head.len().trailing_zeros();
    let sign = |i: usize, j: usize| if (i & j).count_ones().is_multiple_of(2) { 1.0 } else { -1.0 };
    let row = |part: &[f64], i| (0..n).map(|j| sign(i, j) * part[j]).sum::<f64>();
    let rows = head.chunks_exact(n).flat_map(|part| (0..n).map(move |i| row(part, i)));
    rows.map(|x| x / (n as f64).sqrt()).collect()
}

/// `softmax(q . keys / sqrt(d)) values`; zeros where there are no keys.
pub(crate) fn attend(q: &[f64], keys: &[&[f64]], values: &[&[f64]]) -> Vec<f64> {
    let scores: Vec<f64> = keys.iter().map(|k| dot(q, k) / (q.len() as f64).sqrt()).collect();
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
    let sum: f64 = weights.iter().sum();
    let mut out = vec![0.0; q.len()];
    for (weight, value) in weights.iter().zip(values) {
        for (out, v) in out.iter_mut().zip(*value) {
            *out += weight / sum * v;
        }
    }
    out
}

/// `x / (1 + exp(-x))`
pub(crate) fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

/// `|got - want| <= bound * largest(want) + relative * |want|`
pub(crate) fn compare(got: &[f32], want: &[f64], bound: f64, relative: f64, what: &str) {
    let scale = want.iter().fold(0.0_f64, |m, x| m.max(x.abs()));
    compare_to(got, want, bound * scale, relative, what);
}

pub(crate) fn compare_to(got: &[f32], want: &[f64], absolute: f64, relative: f64, what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (&got, want)) in got.iter().zip(want).enumerate() {
        let (error, allowed) = ((f64::from(got) - want).abs(), absolute + relative * want.abs());
        assert!(error <= allowed, "{what}, element {i}: {got} for {want}, allowed {allowed:e}");
    }
}
