//! Big buffers of the CPU backend: aligned to cache lines, zeroed, committed as they are touched.
//!
//! `alloc_zeroed` with an alignment above 16 clears by writing, which would commit a page pool of
//! gigabytes at once; so a buffer asks for the default alignment and starts at the first cache line
//! inside. A buffer that cannot be had is an error, not an abort.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

use crate::error::Error;
use crate::memory;

const ALIGN: usize = 64;

/// Numbers for which all bytes zero is a value and that need no drop.
pub(super) trait Plain: Copy + Send + Sync + 'static {}
impl Plain for f32 {}
impl Plain for u8 {}
impl Plain for half::bf16 {}

/// A fixed run of numbers, zero at first.
#[derive(Debug)]
pub(super) struct Buf<T: Plain> {
    /// What the allocator gave; dangling where `layout` has no size.
    base: NonNull<u8>,
    layout: Layout,
    start: NonNull<T>,
    len: usize,
    owns: PhantomData<T>,
}

// SAFETY: the buffer owns its memory, and `T` is plain data.
unsafe impl<T: Plain> Send for Buf<T> {}
// SAFETY: as above; shared access only reads.
unsafe impl<T: Plain> Sync for Buf<T> {}

impl<T: Plain> Buf<T> {
    /// An empty buffer, without an allocation.
    pub(super) const fn empty() -> Self {
        Self {
            base: NonNull::dangling(),
            layout: Layout::new::<()>(),
            start: NonNull::dangling(),
            len: 0,
            owns: PhantomData,
        }
    }

    /// `len` zeros; `what` names them should they not be had.
    pub(super) fn zeroed(len: usize, what: &'static str) -> Result<Self, Error> {
        if len == 0 {
            return Ok(Self::empty());
        }
        let bytes = len.saturating_mul(size_of::<T>());
        let refused = || Error::OutOfMemory { what, bytes };
        let layout = Layout::from_size_align(bytes.saturating_add(ALIGN), align_of::<T>())
            .map_err(|_| refused())?;
        // SAFETY: the size is not zero.
        let base = NonNull::new(unsafe { alloc_zeroed(layout) }).ok_or_else(refused)?;
        let skip = base.as_ptr().align_offset(ALIGN);
        // SAFETY: skip < ALIGN, and the allocation has ALIGN bytes more than the elements need.
        let start = unsafe { base.add(skip) }.cast();
        let buf = Self { base, layout, start, len, owns: PhantomData };
        if memory::has_room(0) { Ok(buf) } else { Err(refused()) }
    }

    /// Makes the buffer at least `len` long; what it held is lost if it has to grow.
    pub(super) fn reserve(&mut self, len: usize, what: &'static str) -> Result<(), Error> {
        if len > self.len {
            *self = Self::empty();
            *self = Self::zeroed(len, what)?;
        }
        Ok(())
    }
}

impl<T: Plain> Drop for Buf<T> {
    fn drop(&mut self) {
        if self.layout.size() > 0 {
            // SAFETY: `base` came from the allocator with this layout.
            unsafe { dealloc(self.base.as_ptr(), self.layout) };
        }
    }
}

impl<T: Plain> Deref for Buf<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: `start` has `len` initialised elements (or dangles, aligned, with len 0).
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl<T: Plain> DerefMut for Buf<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as for `deref`, and the borrow is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

/// Memory that the threads of a region write, each a part that no other touches. It is made from an exclusive borrow and
/// keeps it, so that nobody else reads or writes there for as long; what kernels only read comes to them as a slice.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shared<'a, T> {
    start: *mut T,
    borrow: PhantomData<&'a mut [T]>,
}

// SAFETY: the kernels write disjoint parts; every dereference says which.
unsafe impl<T: Send> Send for Shared<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Shared<'_, T> {}

impl<'a, T> Shared<'a, T> {
    pub(super) fn new(memory: &'a mut [T]) -> Self {
        Self { start: memory.as_mut_ptr(), borrow: PhantomData }
    }

    /// The pointer. (A method, so that a closure captures the wrapper and not the bare pointer.)
    #[inline(always)]
    pub(super) fn get(self) -> *mut T {
        self.start
    }
}
