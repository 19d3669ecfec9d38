//! The policies that are compared: a name, and the options of the model and of the session that it means.
//!
//! This is the one place that knows them. `dense` is always first, as everything is compared with it; a
//! policy that comes to the engine is one more arm of [`parse`] and one more line of [`KNOWN`].

use loris::{KvFormat, ModelOptions, SessionOptions};

use crate::exit::{Failure, USAGE};

/// One way to run the model.
#[derive(Clone, Debug)]
pub(crate) struct Variant {
    /// As the user wrote it.
    pub(crate) name: String,
    pub(crate) model: ModelOptions,
    pub(crate) session: SessionOptions,
}

pub(crate) const DENSE: &str = "dense";

/// What can be asked for, for messages.
const KNOWN: &str = "dense, kv=bf16, kv=f32";

/// The variants of the flags, `dense` first, with `base` where they say nothing else.
pub(crate) fn variants(
    policies: &[String],
    base: &ModelOptions,
    session: &SessionOptions,
) -> Result<Vec<Variant>, Failure> {
    let dense = Variant { name: DENSE.into(), model: base.clone(), session: session.clone() };
    let mut variants = vec![dense.clone()];
    for policy in policies.iter().filter(|policy| *policy != DENSE) {
        if variants.iter().any(|variant| variant.name == *policy) {
            let message = format!("--policy {policy}: given twice");
            return Err(Failure::new(USAGE, message));
        }
        variants.push(parse(policy, &dense)?);
    }
    Ok(variants)
}

/// `NAME` or `NAME=SPEC`.
fn parse(policy: &str, dense: &Variant) -> Result<Variant, Failure> {
    let (name, spec) = match policy.split_once('=') {
        Some((name, spec)) => (name, Some(spec)),
        None => (policy, None),
    };
    let dense = Variant { name: policy.into(), ..dense.clone() };
    match (name, spec) {
        ("kv", Some("bf16")) => Ok(with_kv(dense, KvFormat::Bf16)),
        ("kv", Some("f32")) => Ok(with_kv(dense, KvFormat::F32)),
        _ => {
            let message = format!("--policy {policy}: expected one of {KNOWN}");
            Err(Failure::new(USAGE, message))
        }
    }
}

fn with_kv(variant: Variant, kv: KvFormat) -> Variant {
    Variant { model: ModelOptions { kv, ..variant.model }, ..variant }
}
