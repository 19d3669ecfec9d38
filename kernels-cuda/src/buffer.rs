//! Device memory.

use std::marker::PhantomData;
use std::sync::{Arc, PoisonError};

pub use bytemuck::Pod;
use cust::memory::{AsyncCopyDestination, DeviceBuffer};

use crate::device::Shared;
use crate::driver_ext::fail;
use crate::{Device, Error};

/// Some elements in device memory.
///
/// It belongs to the device that it was made on; using it with another is an error of the driver.
/// It may be dropped while kernels use it: the memory goes when they are done.
#[derive(Debug)]
pub struct Buffer<T: Pod> {
    memory: Option<DeviceBuffer<u8>>,
    len: usize,
    what: &'static str,
    shared: Arc<Shared>,
    element: PhantomData<T>,
}

impl<T: Pod> Buffer<T> {
    /// Memory with anything in it. `what` is its name in errors.
    pub fn new(device: &Device, len: usize, what: &'static str) -> Result<Self, Error> {
        device.set_current()?;
        let bytes = len.checked_mul(size_of::<T>()).filter(|&bytes| bytes <= isize::MAX as usize);
        let bytes = bytes.ok_or(Error::OutOfMemory { what, bytes: u64::MAX, free: 0, total: 0 })?;
        // SAFETY: any bytes are elements, and nothing on the host sees them before they are copied
        // back.
        let memory = unsafe { DeviceBuffer::uninitialized(bytes) }.map_err(|_| {
            match fail("cuMemAlloc", format!("{what} ({bytes} bytes)")) {
                Error::Driver { code: 2, .. } => {
                    let (free, total) = device.memory().unwrap_or_default();
                    Error::OutOfMemory { what, bytes: bytes as u64, free, total }
                }
                other => other,
            }
        })?;
        let shared = Arc::clone(&device.shared);
        Ok(Self { memory: Some(memory), len, what, shared, element: PhantomData })
    }

    /// Memory with `data` in it.
    pub fn from_slice(device: &Device, data: &[T], what: &'static str) -> Result<Self, Error> {
        let mut buffer = Self::new(device, data.len(), what)?;
        buffer.upload(device, 0, data)?;
        Ok(buffer)
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Device address of element 0.
    pub fn ptr(&self) -> u64 {
        self.memory.as_ref().map_or(0, |memory| memory.as_device_ptr().as_raw())
    }

    /// Writes `data` from element `first` on, after all work that was queued before. Complete on
    /// return.
    pub fn upload(&mut self, device: &Device, first: usize, data: &[T]) -> Result<(), Error> {
        // SAFETY: `data` is borrowed until the copy is waited for.
        unsafe { self.upload_async(device, first, data)? };
        device.wait(|| self.copy_text(first, data.len()))
    }

    /// Queues a copy of `data` to element `first` and those behind it.
    ///
    /// # Safety
    /// `data` stays as it is until the copy is done.
    pub(crate) unsafe fn upload_async(
        &mut self,
        device: &Device,
        first: usize,
        data: &[T],
    ) -> Result<(), Error> {
        self.check(first, data.len())?;
        device.set_current()?;
        let bytes = first * size_of::<T>()..(first + data.len()) * size_of::<T>();
        let mut part = match &self.memory {
            Some(memory) if !data.is_empty() => memory.index(bytes),
            _ => return Ok(()),
        };
        // SAFETY: the range lies within the buffer; `data` is the caller's.
        unsafe { part.async_copy_from(bytemuck::cast_slice::<T, u8>(data), device.stream()) }
            .map_err(|_| fail("cuMemcpyHtoDAsync", self.copy_text(first, data.len())))
    }

    /// Reads elements from `first` on, once all work that was queued before is done.
    pub fn download(&self, device: &Device, first: usize, out: &mut [T]) -> Result<(), Error> {
        self.check(first, out.len())?;
        device.set_current()?;
        let n = out.len();
        let bytes = first * size_of::<T>()..(first + n) * size_of::<T>();
        if let (Some(memory), true) = (&self.memory, n > 0) {
            let out = bytemuck::cast_slice_mut::<T, u8>(out);
            // SAFETY: the range lies within the buffer; `out` is borrowed until the copy is waited
            // for.
            unsafe { memory.index(bytes).async_copy_to(out, device.stream()) }
                .map_err(|_| fail("cuMemcpyDtoHAsync", self.copy_text(first, n)))?;
        }
        device.wait(|| self.copy_text(first, n))
    }

    /// Queues a copy of all of `from`, which is as long.
    pub fn copy_from(&mut self, device: &Device, from: &Self) -> Result<(), Error> {
        Error::check_size(self.what, from.len, self.len)?;
        device.set_current()?;
        if let (Some(to), Some(from), true) = (&mut self.memory, &from.memory, from.len > 0) {
            // SAFETY: buffers outlive the work that is queued on them.
            unsafe { to.async_copy_from(from, device.stream()) }
                .map_err(|_| fail("cuMemcpyDtoDAsync", self.copy_text(0, self.len)))?;
        }
        Ok(())
    }

    /// Reads all elements.
    pub fn to_vec(&self, device: &Device) -> Result<Vec<T>, Error> {
        let mut out = vec![T::zeroed(); self.len];
        self.download(device, 0, &mut out)?;
        Ok(out)
    }

    pub(crate) fn copy_text(&self, first: usize, len: usize) -> String {
        format!("{} (elements {first}..{} of {})", self.what, first + len, self.len)
    }

    pub(crate) fn check(&self, first: usize, len: usize) -> Result<(), Error> {
        let end = first.saturating_add(len);
        if end <= self.len {
            return Ok(());
        }
        Err(Error::size(self.what, end, self.len))
    }
}

impl<T: Pod> Drop for Buffer<T> {
    fn drop(&mut self) {
        let Some(memory) = self.memory.take() else { return };
        let mut freed = self.shared.freed.lock().unwrap_or_else(PoisonError::into_inner);
        if freed.n_graphs > 0 {
            return freed.memory.push(memory);
        }
        self.shared.settle();
        drop(memory);
    }
}

/// A weight matrix.
#[derive(Debug)]
pub struct Matrix {
    /// bf16 `[n][k]`
    pub data: Buffer<u16>,
    /// Rows: outputs.
    pub n: usize,
    /// Columns: inputs.
    pub k: usize,
}

impl Matrix {
    /// A matrix with anything in it.
    pub fn new(device: &Device, n: usize, k: usize, what: &'static str) -> Result<Self, Error> {
        Ok(Self { data: Buffer::new(device, n.saturating_mul(k), what)?, n, k })
    }
}

/// Rows of a batch.
#[derive(Debug)]
pub struct Rows<T: Pod> {
    /// `[n_rows][width]`
    pub data: Buffer<T>,
    /// How many rows there is room for.
    pub n_rows: usize,
    /// Elements of a row.
    pub width: usize,
}

impl<T: Pod> Rows<T> {
    /// Rows with anything in them.
    pub fn new(
        device: &Device,
        n_rows: usize,
        width: usize,
        what: &'static str,
    ) -> Result<Self, Error> {
        Ok(Self { data: Buffer::new(device, n_rows.saturating_mul(width), what)?, n_rows, width })
    }
}
