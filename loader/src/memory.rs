//! Host memory whose size comes from an input: an error where there is none, never the end of the process.
//!
//! Rust ends the process where an allocation that cannot be asked for fails, and libraries allocate as they go. So what
//! grows with an input is asked for where it grows (`extend`); and before code runs that does not ask (a library,
//! or the small pieces of a tree), room for all that it may take is asked for at once and let go ([`room_for`]). Either way
//! [`SLACK`] is left for the small things of a call whose number does not depend on the input: the text of an
//! error, a handle, a list of the call's ops.

use memmap2::MmapMut;

use crate::error::Error;

/// Address space that must be left, in bytes, for allocations of a fixed size and for the caller's stack, which grows as it
/// is used. An allocator may take a whole arena for one of them, which is 1 MiB with glibc.
pub const SLACK: usize = 2 << 20;

/// Whether `bytes` could be had now, and the slack besides.
#[must_use]
pub fn has_room(bytes: usize) -> bool {
    // In whole steps: an allocator that has given memory of a size back is quick to give as much again.
    let wanted = bytes.checked_next_multiple_of(SLACK).unwrap_or(usize::MAX);
    let mut room = Vec::<u8>::new();
    let is_there = room.try_reserve_exact(wanted).is_ok();
    std::hint::black_box(&room); // an allocation that nobody looks at may be left out
    is_there && has_space(0)
}

/// Whether address space for `bytes` could be had from the system now, whatever the allocator holds, and the slack
/// besides. A thread's stack needs that.
#[must_use]
pub fn has_space(bytes: usize) -> bool {
    MmapMut::map_anon(bytes.saturating_add(SLACK)).is_ok()
}

/// Fails unless `bytes` could be had now; `what` names what they are for.
pub fn room_for(bytes: usize, what: &'static str) -> Result<(), Error> {
    match has_room(bytes) {
        true => Ok(()),
        false => Err(Error::NoMemory { what, bytes }),
    }
}

/// Adds values to the end of a list.
pub(crate) fn extend<T: Copy>(
    list: &mut Vec<T>,
    values: &[T],
    what: &'static str,
) -> Result<(), Error> {
    // Room that is there already was asked for.
    if values.len() <= list.capacity() - list.len() {
        list.extend_from_slice(values);
        return Ok(());
    }
    let bytes = size_of::<T>().saturating_mul(list.len() + values.len());
    match list.try_reserve(values.len()).is_ok() && has_room(0) {
        true => list.extend_from_slice(values),
        false => return Err(Error::NoMemory { what, bytes }),
    }
    Ok(())
}
