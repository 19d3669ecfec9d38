//! Host memory whose size comes from an input or an option: an error where there is none, never an abort.

use bytemuck::{NoUninit, Zeroable};

use crate::error::Error;

/// `n` zeros, committed as they are touched.
pub(crate) fn zeros<T: Zeroable>(n: usize, what: &'static str) -> Result<Vec<T>, Error> {
    let bytes = n.saturating_mul(size_of::<T>());
    bytemuck::allocation::try_zeroed_vec(n).map_err(|()| Error::OutOfMemory { what, bytes })
}

/// A copy of `values`.
pub(crate) fn copy<T: NoUninit>(values: &[T], what: &'static str) -> Result<Vec<T>, Error> {
    let mut copied = Vec::new();
    copied
        .try_reserve_exact(values.len())
        .map_err(|_| Error::OutOfMemory { what, bytes: size_of_val(values) })?;
    copied.extend_from_slice(values);
    Ok(copied)
}
