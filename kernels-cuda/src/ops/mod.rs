//! One safe launcher for each kernel: checks sizes, chooses the variant, launches.

pub mod attention;
pub mod attention_mass;
pub mod batch;
pub mod embed;
pub mod fill_random;
pub mod fragments;
pub mod key_norm;
pub mod linear;
pub mod linear_decode;
pub mod lm_head;
pub mod logit_adjust;
pub mod mlp_gate;
pub mod mlp_gate_decode;
pub mod page_copy;
pub mod page_seal;
pub mod qkv;
pub mod qkv_decode;
pub mod rmsnorm;
pub mod row_copy;
pub mod sample;
pub mod slot_move;
pub mod token_select;

use loris_formats::HEAD_DIMS;

use crate::Error;

/// The kernel for heads of this width, of one for each of [`HEAD_DIMS`].
fn by_head_dim(
    head_dim: usize,
    kernels: [&'static str; HEAD_DIMS.len()],
) -> Result<&'static str, Error> {
    let idx = HEAD_DIMS.iter().position(|&d| d == head_dim);
    idx.map(|idx| kernels[idx]).ok_or_else(|| Error::Unsupported {
        what: "head_dim".into(),
        found: head_dim.to_string(),
        expected: "32, 64 or 128",
    })
}

/// `found` elements are enough.
fn at_least(op: &str, what: &str, found: usize, at_least: usize) -> Result<(), Error> {
    if found >= at_least {
        return Ok(());
    }
    Err(Error::size(&format!("{op}: {what}, at least"), found, at_least))
}

/// `found` is what goes with the other operands.
fn equal(op: &str, what: &str, found: usize, expected: usize) -> Result<(), Error> {
    if found == expected {
        return Ok(());
    }
    Err(Error::size(&format!("{op}: {what}"), found, expected))
}

/// `found` is a multiple of what vectors hold.
fn multiple(op: &str, what: &str, found: usize, of: usize) -> Result<(), Error> {
    if found.is_multiple_of(of) {
        return Ok(());
    }
    Err(Error::size(&format!("{op}: {what}, as a multiple"), found, found.next_multiple_of(of)))
}
