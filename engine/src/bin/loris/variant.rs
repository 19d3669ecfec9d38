//! The policies that are compared: a name, and the options of the model and of the session that it means.
//!
//! This is the one place that knows them. `dense` is always first, as everything is compared with it; a
//! policy that comes to the engine is one more arm of [`parse`] and one more line of [`KNOWN`].

use loris::compute::Lazy;
use loris::keep::Evict;
use loris::{Error, KvFormats, ModelOptions, SessionOptions};

use crate::exit::{Failure, USAGE};

/// One way to run the model.
#[derive(Clone, Debug)]
pub(crate) struct Variant {
    /// As the user wrote it.
    pub(crate) name: String,
    pub(crate) model: ModelOptions,
    pub(crate) session: SessionOptions,
    /// The schedule, as text until it is known how many layers there are.
    pub(crate) lazy: Option<String>,
}

impl Variant {
    /// True if some layers lack some tokens, so that not every position is scored.
    pub(crate) fn prunes(&self) -> bool {
        self.lazy.is_some() || self.session.evict.is_some()
    }

    /// Makes the schedule one for a model of `n_layers`.
    pub(crate) fn fit(&mut self, n_layers: usize) -> Result<(), Failure> {
        if let Some(spec) = &self.lazy {
            let lazy = Lazy::parse(spec, n_layers).map_err(|e| refused(&self.name, e))?;
            self.session.lazy = Some(lazy);
        }
        Ok(())
    }
}

pub(crate) const DENSE: &str = "dense";

/// What can be asked for, for messages.
const KNOWN: &str = "dense, kv=FORMAT, lazy=SPEC, evict=SPEC (as --kv, --lazy and --evict of `run`), or kv=FORMAT+ before one of these";

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

/// For each variant the index of the first whose model is opened alike.
pub(crate) fn same_models(variants: &[Variant]) -> Vec<usize> {
    // Options have no equality of their own, but they show every field.
    let keys: Vec<String> = variants.iter().map(|v| format!("{:?}", v.model)).collect();
    let first = |idx: usize| keys.iter().position(|key| *key == keys[idx]).unwrap_or(idx);
    (0..keys.len()).map(first).collect()
}

/// `NAME=SPEC`, or several of them with `+` between.
fn parse(policy: &str, dense: &Variant) -> Result<Variant, Failure> {
    let mut variant = Variant { name: policy.into(), ..dense.clone() };
    for part in policy.split('+') {
        match part.split_once('=') {
            Some(("kv", format)) => {
                variant.model.kv =
                    format.parse::<KvFormats>().map_err(|e| refused(policy, e.into()))?;
            }
            Some(("lazy", spec)) => variant.lazy = Some(spec.into()),
            Some(("evict", spec)) => {
                let evict = Evict::parse(spec).map_err(|e| refused(policy, e))?;
                variant.session.evict = Some(evict);
            }
            _ => {
                let message = format!("--policy {policy}: expected one of {KNOWN}");
                return Err(Failure::new(USAGE, message));
            }
        }
    }
    Ok(variant)
}

/// Why the library refuses a part of a policy.
fn refused(policy: &str, e: Error) -> Failure {
    match e {
        Error::Option { value, expected, .. } => {
            Failure::new(USAGE, format!("--policy {policy}: {value}: expected {expected}"))
        }
        e => e.into(),
    }
}
