//! Host memory whose size comes from an input or an option: an error where there is none, never an abort.
//!
//! As in [`loris_loader::memory`]: lists that grow with a session are asked for one by one where a call makes
//! them ([`zeros`], [`copy`]), and where many small ones come and go, as in a pass, room for all of them is asked for first
//! ([`room_for`]). Slack for what has a fixed size is left either way.

use bytemuck::{NoUninit, Zeroable};
pub(crate) use loris_loader::memory::{has_room, has_space};

use crate::error::Error;

/// `n` zeros, committed as they are touched.
pub(crate) fn zeros<T: Zeroable>(n: usize, what: &'static str) -> Result<Vec<T>, Error> {
    let refused = || Error::OutOfMemory { what, bytes: n.saturating_mul(size_of::<T>()) };
    let zeros = bytemuck::allocation::try_zeroed_vec(n).map_err(|()| refused())?;
    if has_room(0) { Ok(zeros) } else { Err(refused()) }
}

/// A copy of `values`.
pub(crate) fn copy<T: NoUninit>(values: &[T], what: &'static str) -> Result<Vec<T>, Error> {
    let mut copied = empty(values.len(), what)?;
    copied.extend_from_slice(values);
    Ok(copied)
}

/// An empty list with room for `n` values, committed as they come.
pub(crate) fn empty<T>(n: usize, what: &'static str) -> Result<Vec<T>, Error> {
    let mut list = Vec::new();
    match list.try_reserve_exact(n).is_ok() && has_room(0) {
        true => Ok(list),
        false => Err(Error::OutOfMemory { what, bytes: n.saturating_mul(size_of::<T>()) }),
    }
}

/// Adds a value to the end of a list.
pub(crate) fn push<T>(list: &mut Vec<T>, value: T, what: &'static str) -> Result<(), Error> {
    if list.len() == list.capacity() && !(list.try_reserve(1).is_ok() && has_room(0)) {
        let bytes = (list.len() + 1).saturating_mul(size_of::<T>());
        return Err(Error::OutOfMemory { what, bytes });
    }
    list.push(value);
    Ok(())
}

/// Fails unless `bytes` could be had now; `what` names what they are for.
pub(crate) fn room_for(bytes: usize, what: &'static str) -> Result<(), Error> {
    if has_room(bytes) { Ok(()) } else { Err(Error::OutOfMemory { what, bytes }) }
}
