//! The policies that are compared: a name, and the options of the model and of the session that it means.
//!
//! This is the one place that knows them. `dense` is always first, as everything is compared with it; a
//! policy that comes to the engine is one more arm of [`parse`] and one more line of [`KNOWN`].

use loris::policy::Lazy;
use loris::{KvFormat, ModelOptions, SessionOptions};

use crate::exit::{Failure, USAGE};

/// One way to run the model.
#[derive(Clone, Debug)]
pub(crate) struct Variant {
    /// As the user wrote it.
    pub(crate) name: String,
    pub(crate) model: ModelOptions,
    pub(crate) session: SessionOptions,
    /// The schedule, as text until it is known how many layers there are.
    lazy: Option<String>,
}

impl Variant {
    /// True if tokens are left behind, so that not every position has logits.
    pub(crate) fn prunes(&self) -> bool {
        self.lazy.is_some()
    }

    /// Makes the schedule one for a model of `n_layers`.
    pub(crate) fn fit(&mut self, n_layers: usize) -> Result<(), Failure> {
        if let Some(spec) = &self.lazy {
            self.session.lazy = Some(Lazy::parse(spec, n_layers)?);
        }
        Ok(())
    }
}

pub(crate) const DENSE: &str = "dense";

/// What can be asked for, for messages.
const KNOWN: &str = "dense, kv=bf16, kv=f32, lazy=SPEC (as --lazy of `run`)";

/// The variants of the flags, `dense` first, with `base` where they say nothing else.
pub(crate) fn variants(
    policies: &[String],
    base: &ModelOptions,
    session: &SessionOptions,
) -> Result<Vec<Variant>, Failure> {
    let (model, session) = (base.clone(), session.clone());
    let dense = Variant { name: DENSE.into(), model, session, lazy: None };
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
        ("lazy", Some(spec)) => Ok(Variant { lazy: Some(spec.into()), ..dense }),
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
