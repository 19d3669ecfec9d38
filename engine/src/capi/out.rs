//! What goes from C to Rust and back: slices, strings, buffers.

use std::ffi::{CStr, c_char};

use super::status::{Failure, LORIS_BUFFER_TOO_SMALL, LORIS_OK};
use crate::memory;

/// A caller's array; NULL is an empty one if `n` is 0.
///
/// # Safety
/// `ptr` is NULL or points to `n` values that nobody changes as long as `'a`.
pub(super) unsafe fn slice<'a, T>(name: &str, ptr: *const T, n: usize) -> Result<&'a [T], Failure> {
    if n == 0 {
        return Ok(&[]);
    }
    check(name, ptr, n)?;
    // SAFETY: checked above, and the caller's promise.
    Ok(unsafe { std::slice::from_raw_parts(ptr, n) })
}

fn check<T>(name: &str, ptr: *const T, n: usize) -> Result<(), Failure> {
    if ptr.is_null() {
        return Err(Failure::invalid(format!("{name}: is NULL")));
    }
    if !ptr.is_aligned() {
        return Err(Failure::invalid(format!("{name}: is not aligned")));
    }
    match n.checked_mul(size_of::<T>()).is_some_and(|bytes| isize::try_from(bytes).is_ok()) {
        true => Ok(()),
        false => Err(Failure::invalid(format!("{name}: {n} elements are more than memory holds"))),
    }
}

/// A text with a length.
///
/// # Safety
/// As [`slice`].
pub(super) unsafe fn text<'a>(
    name: &str,
    ptr: *const c_char,
    n: usize,
) -> Result<&'a str, Failure> {
    // SAFETY: passed on.
    let bytes = unsafe { slice(name, ptr.cast::<u8>(), n) }?;
    utf8(name, bytes)
}

/// A text that ends with a NUL.
///
/// # Safety
/// `ptr` is NULL or points to bytes that end with a NUL and that nobody changes as long as `'a`.
pub(super) unsafe fn c_text<'a>(name: &str, ptr: *const c_char) -> Result<&'a str, Failure> {
    if ptr.is_null() {
        return Err(Failure::invalid(format!("{name}: is NULL")));
    }
    // SAFETY: the caller's promise.
    utf8(name, unsafe { CStr::from_ptr(ptr) }.to_bytes())
}

/// As [`c_text`]; NULL is `None`.
///
/// # Safety
/// As [`c_text`].
pub(super) unsafe fn optional<'a>(
    name: &str,
    ptr: *const c_char,
) -> Result<Option<&'a str>, Failure> {
    // SAFETY: passed on.
    (!ptr.is_null()).then(|| unsafe { c_text(name, ptr) }).transpose()
}

fn utf8<'a>(name: &str, bytes: &'a [u8]) -> Result<&'a str, Failure> {
    std::str::from_utf8(bytes)
        .map_err(|e| Failure::invalid(format!("{name}: is not UTF-8 at byte {}", e.valid_up_to())))
}

/// A caller's text, to keep.
pub(super) fn owned(text: &str) -> Result<String, Failure> {
    memory::room_for(text.len(), "a text")?;
    Ok(text.to_owned())
}

/// Writes a value through a pointer that must not be NULL.
///
/// # Safety
/// `ptr` is NULL or may be written to.
pub(super) unsafe fn write<T>(name: &str, ptr: *mut T, value: T) -> Result<(), Failure> {
    check(name, ptr, 1)?;
    // SAFETY: checked above, and the caller's promise.
    unsafe { ptr.write(value) };
    Ok(())
}

/// Copies values into a caller's buffer of `cap`, and says in `n` how many there are. Without a buffer it
/// only says that.
///
/// # Safety
/// `buf` is NULL or has room for `cap` values; `n` is NULL or may be written to.
pub(super) unsafe fn copy<T: Copy>(
    values: &[T],
    buf: *mut T,
    cap: usize,
    n: *mut usize,
) -> Result<i32, Failure> {
    // SAFETY: passed on.
    unsafe { write("n", n, values.len()) }?;
    if buf.is_null() && cap == 0 {
        return Ok(LORIS_OK);
    }
    check("buf", buf, cap)?;
    if cap < values.len() {
        return Ok(LORIS_BUFFER_TOO_SMALL);
    }
    // SAFETY: the buffer has room for `cap`, which is enough.
    unsafe { std::ptr::copy_nonoverlapping(values.as_ptr(), buf, values.len()) };
    Ok(LORIS_OK)
}

/// Writes values to where the caller has room for them; NULL is fine where there are none.
///
/// # Safety
/// `ptr` is NULL or has room for all values.
pub(super) unsafe fn give<T>(
    name: &str,
    ptr: *mut T,
    values: impl ExactSizeIterator<Item = T>,
) -> Result<(), Failure> {
    if values.len() > 0 {
        check(name, ptr, values.len())?;
    }
    for (idx, value) in values.enumerate() {
        // SAFETY: checked above, and the caller's promise.
        unsafe { ptr.add(idx).write(value) };
    }
    Ok(())
}

/// As [`copy`] for a text and a NUL; `n` does not count the NUL.
///
/// # Safety
/// As [`copy`].
pub(super) unsafe fn copy_text(
    text: &str,
    buf: *mut c_char,
    cap: usize,
    n: *mut usize,
) -> Result<i32, Failure> {
    // SAFETY: passed on.
    unsafe { write("n", n, text.len()) }?;
    if buf.is_null() && cap == 0 {
        return Ok(LORIS_OK);
    }
    check("buf", buf, cap)?;
    if cap <= text.len() {
        return Ok(LORIS_BUFFER_TOO_SMALL);
    }
    // SAFETY: the buffer has room for the text and a NUL.
    unsafe {
        std::ptr::copy_nonoverlapping(text.as_ptr(), buf.cast(), text.len());
        *buf.add(text.len()) = 0;
    }
    Ok(LORIS_OK)
}
