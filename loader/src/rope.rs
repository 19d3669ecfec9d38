//! Rotary embeddings: the inverse frequencies of every scaling that the supported models use.
//!
//! All in `f64`, so that an angle at position 4,000,000 is as exact as one at 4. The formulas are those that the
//! models were trained and are evaluated with: plain RoPE, linear position interpolation, NTK scaling that follows the
//! sequence's length ("dynamic"), YaRN (arXiv 2309.00071), and the frequency-dependent scaling of Llama 3.

use std::f64::consts::PI;

use serde_json::{Map, Value};

use crate::error::Error;
use crate::keys::{Accept, Keys};

/// The longest context.
pub(crate) const MAX_CTX: usize = 1 << 28;

/// How positions become angles.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeConfig {
    /// The base of the geometric series of wavelengths.
    pub theta: f64,
    /// How the series is changed for contexts longer than those of pre-training.
    pub scaling: RopeScaling,
}

/// A change to the series of wavelengths. `original_ctx` is the context length of pre-training.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)] // fields carry the names and meanings of config.json
pub enum RopeScaling {
    /// None.
    None,
    /// All positions divided by `factor`.
    Linear { factor: f64 },
    /// The base grows with the sequence once it is longer than `original_ctx`.
    Dynamic { factor: f64, original_ctx: usize },
    /// Short wavelengths are kept, long ones divided by `factor`, with a ramp between.
    Yarn {
        factor: f64,
        original_ctx: usize,
        beta_fast: f64,
        beta_slow: f64,
        attention_factor: Option<f64>,
        mscale: Option<f64>,
        mscale_all_dim: Option<f64>,
        truncate: bool,
    },
    /// Llama 3's: like YaRN's with the ramp in terms of wavelengths.
    Llama3 { factor: f64, low_freq_factor: f64, high_freq_factor: f64, original_ctx: usize },
}

impl RopeConfig {
    /// The `head_dim / 2` inverse frequencies for a sequence of `seq_len` tokens, and the factor by which cosine and
    /// sine are multiplied. Only [`RopeScaling::Dynamic`] looks at `seq_len`.
    ///
    /// ```
    /// use loris_loader::{RopeConfig, RopeScaling};
    /// let rope = RopeConfig { theta: 10_000.0, scaling: RopeScaling::None };
    /// let (inv_freq, factor) = rope.inv_freq(4, 1);
    /// assert_eq!((inv_freq, factor), (vec![1.0, 0.01], 1.0));
    /// ```
    pub fn inv_freq(&self, head_dim: usize, seq_len: usize) -> (Vec<f64>, f64) {
        let plain = |theta: f64| -> Vec<f64> {
            (0..head_dim / 2).map(|i| theta.powf(-((2 * i) as f64) / head_dim as f64)).collect()
        };
        let mut inv_freq = plain(self.theta);
        match &self.scaling {
            RopeScaling::None => (inv_freq, 1.0),
            RopeScaling::Linear { factor } => {
                inv_freq.iter_mut().for_each(|f| *f /= factor);
                (inv_freq, 1.0)
            }
            RopeScaling::Dynamic { factor, original_ctx } => {
                let stretch = seq_len.max(*original_ctx) as f64 / *original_ctx as f64;
                let growth = factor * stretch - (factor - 1.0);
                let dim = head_dim as f64;
                // A head of two dimensions has one frequency, 1, whatever the base.
                let exponent = if head_dim > 2 { dim / (dim - 2.0) } else { 0.0 };
                (plain(self.theta * growth.powf(exponent)), 1.0)
            }
            RopeScaling::Yarn { factor, .. } => {
                let ramp = self.yarn_ramp(head_dim);
                for (f, ramp) in inv_freq.iter_mut().zip(ramp) {
                    *f = *f / factor * ramp + *f * (1.0 - ramp);
                }
                (inv_freq, self.yarn_attention_factor())
            }
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_ctx } => {
                for f in &mut inv_freq {
                    let turns = *original_ctx as f64 * *f / (2.0 * PI);
                    let keep = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
                    let keep = keep.clamp(0.0, 1.0);
                    *f = *f / factor * (1.0 - keep) + *f * keep;
                }
                (inv_freq, 1.0)
            }
        }
    }

    /// All of it as numbers, for [`ModelConfig::fingerprint`](crate::ModelConfig::fingerprint).
    pub(crate) fn facts(&self) -> Vec<u64> {
        // Field by field, so that a new one has to be placed here.
        let RopeConfig { theta, scaling } = self;
        let number = |x: &f64| x.to_bits();
        let option = |x: &Option<f64>| x.map_or(u64::MAX, f64::to_bits); // the bits of no number
        let count = |n: &usize| *n as u64;
        let mut facts = vec![number(theta)];
        facts.extend(match scaling {
            RopeScaling::None => vec![0],
            RopeScaling::Linear { factor } => vec![1, number(factor)],
            RopeScaling::Dynamic { factor, original_ctx } => {
                vec![2, number(factor), count(original_ctx)]
            }
            RopeScaling::Yarn {
                factor,
                original_ctx,
                beta_fast,
                beta_slow,
                attention_factor,
                mscale,
                mscale_all_dim,
                truncate,
            } => vec![
                3,
                number(factor),
                count(original_ctx),
                number(beta_fast),
                number(beta_slow),
                option(attention_factor),
                option(mscale),
                option(mscale_all_dim),
                u64::from(*truncate),
            ],
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_ctx } => {
                vec![
                    4,
                    number(factor),
                    number(low_freq_factor),
                    number(high_freq_factor),
                    count(original_ctx),
                ]
            }
        });
        facts
    }

    /// For each frequency, how far it goes from being kept (0) to being divided by the factor (1).
    fn yarn_ramp(&self, head_dim: usize) -> Vec<f64> {
        let RopeScaling::Yarn { original_ctx, beta_fast, beta_slow, truncate, .. } = self.scaling
        else {
            return Vec::new();
        };
        let dim = head_dim as f64;
        // The dimension whose wavelength fits `rotations` times into the original context.
        let dim_of = |rotations: f64| {
            dim * (original_ctx as f64 / (rotations * 2.0 * PI)).ln() / (2.0 * self.theta.ln())
        };
        let (low, high) = (dim_of(beta_fast), dim_of(beta_slow));
        let (low, high) = if truncate { (low.floor(), high.ceil()) } else { (low, high) };
        let (low, high) = (low.max(0.0), high.min(dim - 1.0));
        let width = if low == high { 0.001 } else { high - low };
        (0..head_dim / 2).map(|i| ((i as f64 - low) / width).clamp(0.0, 1.0)).collect()
    }

    fn yarn_attention_factor(&self) -> f64 {
        let RopeScaling::Yarn { factor, attention_factor, mscale, mscale_all_dim, .. } =
            self.scaling
        else {
            return 1.0;
        };
        let scale = |m: f64| if factor <= 1.0 { 1.0 } else { 0.1 * m * factor.ln() + 1.0 };
        match (attention_factor, mscale, mscale_all_dim) {
            (Some(given), _, _) => given,
            (None, Some(m), Some(all)) if m != 0.0 && all != 0.0 => scale(m) / scale(all),
            _ => scale(1.0),
        }
    }
}

const ROPE_TYPES: &str = "default, linear, dynamic, yarn, llama3";
const ABOVE_ONE: Accept = Accept { expected: "a number above 1", test: |x| x > 1.0 && x < 1e15 };
const WHOLE: Accept =
    Accept { expected: "1: partial rotary embeddings are not supported", test: |x| x == 1.0 };

impl RopeConfig {
    /// The longest context that a model can use whose configuration says `max_position_embeddings`. Cards leave that at
    /// what it was before scaling, or set it to what it is then: for YaRN and Llama 3's scaling the length of
    /// pre-training is said besides, so that both can be told apart.
    pub(crate) fn usable_ctx(&self, max_positions: usize) -> usize {
        let times = |ctx: usize, factor: f64| {
            let scaled = (ctx as f64 * factor).min(MAX_CTX as f64) as usize;
            scaled.max(max_positions)
        };
        match self.scaling {
            RopeScaling::None => max_positions,
            RopeScaling::Linear { factor } | RopeScaling::Dynamic { factor, .. } => {
                times(max_positions, factor)
            }
            RopeScaling::Yarn { factor, original_ctx, .. } => times(original_ctx, factor),
            // Its factor is one of frequencies: 32, where the context is 16 times as long.
            RopeScaling::Llama3 { original_ctx, .. } if original_ctx < max_positions => {
                max_positions
            }
            RopeScaling::Llama3 { factor, original_ctx, .. } => times(original_ctx, factor),
        }
    }

    /// Reads `rope_parameters` (newer configurations, with theta inside) and `rope_theta` and `rope_scaling` (older),
    /// which may both be there where they say the same.
    pub(crate) fn read(keys: &Keys<'_>, ctx_len: usize) -> Result<RopeConfig, Error> {
        keys.float("partial_rotary_factor", &WHOLE)?;
        let top_theta = keys.float("rope_theta", &ABOVE_ONE)?;

        let mut read = None;
        for key in ["rope_parameters", "rope_scaling"] {
            let Some(map) = rope_object(keys, key)? else { continue };
            let one = RopeConfig::read_object(keys, key, map, top_theta, ctx_len)?;
            if read.is_some_and(|other| other != one) {
                return Err(keys.wrong(key, "nothing, or the same as rope_parameters"));
            }
            read = Some(one);
        }
        match read {
            Some(read) => Ok(read),
            None => {
                Ok(RopeConfig { theta: theta(keys, None, top_theta)?, scaling: RopeScaling::None })
            }
        }
    }

    fn read_object(
        keys: &Keys<'_>,
        key: &str,
        map: &Map<String, Value>,
        top_theta: Option<f64>,
        ctx_len: usize,
    ) -> Result<RopeConfig, Error> {
        let parent = format!("{key}.");
        let rope = Keys { file: keys.file, parent: &parent, map };
        rope.float("partial_rotary_factor", &WHOLE)?;
        let inner_theta = rope.float("rope_theta", &ABOVE_ONE)?;
        if let (Some(inner), Some(top)) = (inner_theta, top_theta)
            && inner != top
        {
            return Err(rope.wrong("rope_theta", format!("that of the top level, {top}")));
        }
        let theta = theta(keys, inner_theta, top_theta)?;
        Ok(RopeConfig { theta, scaling: scaling(keys, &rope, ctx_len)? })
    }
}

/// The base, which has a default where it is absent, but not where it is null.
fn theta(keys: &Keys<'_>, inner: Option<f64>, top: Option<f64>) -> Result<f64, Error> {
    match inner.or(top) {
        Some(theta) => Ok(theta),
        None if keys.map.contains_key("rope_theta") => {
            Err(keys.wrong("rope_theta", ABOVE_ONE.expected))
        }
        None => Ok(10_000.0),
    }
}

/// The object that describes the scaling. None of the families has one for each type of layer.
fn rope_object<'a>(
    keys: &Keys<'a>,
    key: &'static str,
) -> Result<Option<&'a Map<String, Value>>, Error> {
    let map = keys.object(key)?.filter(|map| !map.is_empty());
    match map.is_some_and(|map| map.values().any(Value::is_object)) {
        true => Err(keys.unsupported(key, "one set of parameters for all layers")),
        false => Ok(map),
    }
}

fn scaling(keys: &Keys<'_>, rope: &Keys<'_>, ctx_len: usize) -> Result<RopeScaling, Error> {
    let at_least_one = Accept { expected: "a number from 1", test: |x| (1.0..1e9).contains(&x) };
    let positive = Accept { expected: "a number above 0", test: |x| x > 0.0 && x < 1e9 };
    let not_negative = Accept { expected: "a number from 0", test: |x| (0.0..1e9).contains(&x) };
    // Some configurations keep the length of pre-training outside, which then counts; the default is the context's.
    let outside = keys.uint("original_max_position_embeddings", 1..=1 << 28)?;
    let inside = rope.uint("original_max_position_embeddings", 1..=1 << 28)?;
    let original_ctx = outside.or(inside).unwrap_or(ctx_len);

    let kind_key = if rope.map.contains_key("rope_type") { "rope_type" } else { "type" };
    match rope.map.get(kind_key).map_or(Some("default"), Value::as_str).unwrap_or_default() {
        "default" => Ok(RopeScaling::None),
        "linear" => Ok(RopeScaling::Linear { factor: rope.need_float("factor", &at_least_one)? }),
        "dynamic" => {
            let factor = rope.need_float("factor", &at_least_one)?;
            Ok(RopeScaling::Dynamic { factor, original_ctx: ctx_len })
        }
        "yarn" => {
            if !rope.map.contains_key("factor") {
                return Err(rope.wrong("factor", "a number from 1, or null"));
            }
            let ratio = ctx_len as f64 / original_ctx as f64;
            let beta = |key, default| -> Result<f64, Error> {
                Ok(rope.float(key, &not_negative)?.filter(|&beta| beta != 0.0).unwrap_or(default))
            };
            let (beta_fast, beta_slow) = (beta("beta_fast", 32.0)?, beta("beta_slow", 1.0)?);
            if beta_fast < beta_slow {
                return Err(rope.wrong("beta_fast", format!("at least beta_slow, {beta_slow}")));
            }
            Ok(RopeScaling::Yarn {
                factor: rope.float("factor", &at_least_one)?.unwrap_or(ratio),
                original_ctx,
                beta_fast,
                beta_slow,
                attention_factor: rope.float("attention_factor", &positive)?,
                mscale: rope.float("mscale", &not_negative)?,
                mscale_all_dim: rope.float("mscale_all_dim", &not_negative)?,
                truncate: rope.boolean("truncate")?.unwrap_or(true),
            })
        }
        "llama3" => {
            let low_freq_factor = rope.need_float("low_freq_factor", &positive)?;
            let high_freq_factor = rope.need_float("high_freq_factor", &positive)?;
            if high_freq_factor <= low_freq_factor {
                return Err(rope.wrong(
                    "high_freq_factor",
                    format!("more than low_freq_factor, {low_freq_factor}"),
                ));
            }
            let factor = rope.need_float("factor", &at_least_one)?;
            Ok(RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_ctx })
        }
        // With all of a head rotated, as is checked, it is the linear one.
        "proportional" => {
            let factor = rope.float("factor", &at_least_one)?.unwrap_or(1.0);
            Ok(RopeScaling::Linear { factor })
        }
        _ => Err(rope.unsupported(kind_key, ROPE_TYPES)),
    }
}
