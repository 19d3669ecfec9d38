//! The boundary: panics stop here, and failures become a status and a message.

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::ffi::c_char;
use std::panic::{self, AssertUnwindSafe, catch_unwind};
use std::sync::Once;

use super::status::{Failure, LORIS_E_PANIC, LORIS_OK};

thread_local! {
    static LAST: RefCell<Failure> = const { RefCell::new(Failure { status: LORIS_OK, message: String::new() }) };
    /// Calls of the library that this thread is inside of.
    static DEPTH: Cell<u32> = const { Cell::new(0) };
}

/// Runs the body of an exported function.
pub(super) fn call(body: impl FnOnce() -> Result<i32, Failure>) -> i32 {
    silence_panics();
    DEPTH.set(DEPTH.get() + 1);
    let outcome = catch_unwind(AssertUnwindSafe(body));
    DEPTH.set(DEPTH.get() - 1);
    match outcome {
        Ok(Ok(status)) => status,
        Ok(Err(failure)) => remember(failure),
        Err(payload) => {
            let what = panic_text(&*payload);
            remember(Failure::new(LORIS_E_PANIC, format!("panic: {what}; please report this")))
        }
    }
}

/// Stores the failure for [`loris_last_error`], which takes no memory, and gives its status.
pub(super) fn remember(mut failure: Failure) -> i32 {
    if failure.message.contains('\0') {
        failure.message = failure.message.replace('\0', "\u{fffd}");
    }
    let status = failure.status;
    LAST.set(failure);
    status
}

fn panic_text(payload: &(dyn Any + Send)) -> &str {
    let text = payload.downcast_ref::<&str>().copied();
    text.or(payload.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message")
}

/// Rust's runtime prints panics to stderr before they can be caught. A shared library has a runtime of its
/// own, so what is set here concerns nobody else; a Rust program that links the crate keeps its hook
/// for all but the calls made through this interface.
fn silence_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            let is_worker = std::thread::current().name().is_some_and(|n| n.starts_with("loris-"));
            if DEPTH.get() == 0 && !is_worker {
                before(info);
            }
        }));
    });
}

/// Copies the message of this thread's last failure, with a NUL, into a buffer of cap bytes (cut at a
/// character if it is too small; buf may be NULL if cap is 0). Returns the message's length in bytes without the NUL.
///
/// The message stays until the thread's next failure: success does not clear it. Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn loris_last_error(buf: *mut c_char, cap: usize) -> usize {
    LAST.with_borrow(|last| {
        let message = &last.message;
        if !buf.is_null() && cap > 0 {
            let n = message.floor_char_boundary(cap - 1);
            // SAFETY: the caller promises `cap` bytes, and n < cap.
            unsafe {
                std::ptr::copy_nonoverlapping(message.as_ptr(), buf.cast(), n);
                *buf.add(n) = 0;
            }
        }
        message.len()
    })
}

/// Returns the status of this thread's last failure, LORIS_OK if there was none. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn loris_last_error_status() -> i32 {
    LAST.with_borrow(|last| last.status)
}
