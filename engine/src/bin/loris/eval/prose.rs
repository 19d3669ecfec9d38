//! How each variant predicts a long text, beside dense: likelihood, divergence, agreement.
//!
//! All variants go through a window together, a few tokens at a time: dense's logits of these tokens are
//! kept, each other variant is compared with them, and they are overwritten. So memory does not grow with
//! the window. The text is given and not generated, so that every position is compared on the same past.
//!
//! A policy that prunes has logits of a prompt's last token only. Where one is among the variants, all of a
//! window but its last tokens is a prompt, and these are compared as the steps of decode give them.

use loris::{Model, Session, SessionOptions};

use crate::exit::Failure;
use crate::interrupt::Guard;

/// Rows of logits that are kept: a pass gives as many.
pub(crate) const ROWS: usize = 64;

/// Tokens at the end of a window that are compared one by one where a variant prunes.
const TAIL: usize = 64;

/// Means over the positions of one window.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Measures {
    /// Negative log likelihood of the next token, in nats.
    pub(crate) nll: f64,
    /// Kullback-Leibler divergence of the variant from dense, in nats.
    pub(crate) kl: f64,
    /// Share of positions whose likeliest token is that of dense.
    pub(crate) top1: f64,
}

/// Runs a window on every variant, of which the first is dense. The last token is context for nothing and
/// counts only for what precedes it.
pub(crate) fn window(
    variants: &[(&Model, &SessionOptions)],
    guard: &Guard,
    tokens: &[u32],
    progress: &mut dyn FnMut(usize),
) -> Result<Vec<Measures>, Failure> {
    let sessions: Result<Vec<Session>, _> =
        variants.iter().map(|(model, options)| model.session(options)).collect();
    let mut sessions = sessions?;
    let mut sums = vec![Measures::default(); sessions.len()];
    let mut dense: Vec<f32> = Vec::new();
    let n_scored = tokens.len().saturating_sub(1);
    for start in (0..n_scored).step_by(ROWS) {
        let chunk = &tokens[start..(start + ROWS).min(n_scored)];
        for (idx, (session, sum)) in sessions.iter_mut().zip(&mut sums).enumerate() {
            guard.turn_to(session);
            if idx == 0 {
                dense.clear();
            }
            session.logits_of(chunk, &mut |row, logits| {
                if idx == 0 {
                    dense.extend_from_slice(logits);
                }
                let next = tokens[start + row + 1];
                let n = logits.len();
                add(sum, &dense[row * n..(row + 1) * n], logits, next);
            })?;
            progress(chunk.len());
        }
    }
    Ok(sums.into_iter().map(|sum| sum.over(n_scored)).collect())
}

/// The same of the last tokens of a window, the others being a prompt.
pub(crate) fn tail(
    variants: &[(&Model, &SessionOptions)],
    guard: &Guard,
    tokens: &[u32],
    progress: &mut dyn FnMut(usize),
) -> Result<Vec<Measures>, Failure> {
    let (prompt, tail) = tokens.split_at(tokens.len() - TAIL.min(tokens.len() / 2));
    let mut all = Vec::new();
    let mut dense: Vec<Vec<f32>> = Vec::new();
    for (idx, (model, options)) in variants.iter().enumerate() {
        let mut session = model.session(options)?;
        guard.turn_to(&session);
        session.prefill(prompt)?;
        let mut sum = Measures::default();
        for (row, &next) in tail.iter().enumerate() {
            let logits = session.logits().unwrap_or_default();
            if idx == 0 {
                dense.push(logits.to_vec());
            }
            add(&mut sum, &dense[row], logits, next);
            session.decode(next)?;
        }
        all.push(sum.over(tail.len()));
        progress(tokens.len());
    }
    Ok(all)
}

impl Measures {
    /// The means, of sums over `n` positions.
    fn over(self, n: usize) -> Self {
        #[allow(clippy::cast_precision_loss)] // a count of tokens
        let n = n.max(1) as f64;
        Self { nll: self.nll / n, kl: self.kl / n, top1: self.top1 / n }
    }
}

fn add(sum: &mut Measures, dense: &[f32], logits: &[f32], next: u32) {
    let log_z = log_sum_exp(logits);
    sum.nll += log_z - f64::from(logits[next as usize]);
    if dense == logits {
        sum.top1 += 1.0;
        return;
    }
    sum.kl += divergence(dense, logits, log_z);
    sum.top1 += f64::from(u8::from(likeliest(dense) == likeliest(logits)));
}

/// KL(dense || variant), of logits.
fn divergence(dense: &[f32], logits: &[f32], log_z: f64) -> f64 {
    let dense_log_z = log_sum_exp(dense);
    let terms = dense.iter().zip(logits).map(|(&d, &l)| {
        let log_p = f64::from(d) - dense_log_z;
        log_p.exp() * (log_p - (f64::from(l) - log_z))
    });
    terms.sum::<f64>().max(0.0) // rounding can leave a little less
}

fn log_sum_exp(logits: &[f32]) -> f64 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    logits.iter().map(|&l| f64::from(l - max).exp()).sum::<f64>().ln() + f64::from(max)
}

fn likeliest(logits: &[f32]) -> usize {
    (0..logits.len()).fold(0, |best, i| if logits[i] > logits[best] { i } else { best })
}
