//! Large uploads: through pinned memory in two halves, one being filled while the other is copied.

use std::sync::Arc;

use bytemuck::Pod;
use cust::event::{Event, EventFlags};
use cust::memory::LockedBuffer;

use crate::device::Shared;
use crate::driver_ext::fail;
use crate::{Buffer, Device, Error};

/// Pinned host memory that uploads go through.
#[derive(Debug)]
pub struct Staging {
    halves: [Half; 2],
    next: usize,
    // Last: the context outlives what is in it.
    shared: Arc<Shared>,
}

/// One half.
#[derive(Debug)]
pub(crate) struct Half {
    memory: LockedBuffer<u8>,
    /// Recorded behind the last copy out of `memory`.
    copied: Event,
}

impl Staging {
    /// Two halves of `half_bytes` bytes, rounded up to 4 KiB.
    pub fn new(device: &Device, half_bytes: usize) -> Result<Self, Error> {
        device.set_current()?;
        let bytes = half_bytes.max(1).next_multiple_of(4096);
        let half = || {
            // SAFETY: any bytes are bytes; they are written before they are copied.
            let memory = unsafe { LockedBuffer::uninitialized(bytes) }
                .map_err(|_| fail("cuMemAllocHost", format!("staging ({bytes} bytes)")))?;
            let copied = Event::new(EventFlags::DISABLE_TIMING)
                .map_err(|_| fail("cuEventCreate", "staging"))?;
            Ok(Half { memory, copied })
        };
        Ok(Self { halves: [half()?, half()?], next: 0, shared: Arc::clone(&device.shared) })
    }

    /// Bytes of a half.
    pub fn half_bytes(&self) -> usize {
        self.halves[0].memory.len()
    }

    /// The half that was used longest ago, once the copies out of it are done.
    pub(crate) fn next_half(&mut self, device: &Device) -> Result<&mut Half, Error> {
        device.set_current()?;
        self.next ^= 1;
        let half = &mut self.halves[self.next];
        half.copied.synchronize().map_err(|_| fail("cuEventSynchronize", "staging"))?;
        Ok(half)
    }
}

impl Half {
    /// Its memory.
    pub(crate) fn words<T: Pod>(&mut self) -> &mut [T] {
        let len = self.memory.len() / size_of::<T>() * size_of::<T>();
        bytemuck::cast_slice_mut(&mut self.memory[..len])
    }

    /// Says that all copies out of it are queued.
    pub(crate) fn record(&self, device: &Device) -> Result<(), Error> {
        self.copied.record(device.stream()).map_err(|_| fail("cuEventRecord", "staging"))
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // Copies out of the memory may be under way.
        self.shared.settle();
    }
}

impl<T: Pod> Buffer<T> {
    /// Writes `data` from element `first` on, after all work that was queued before. On return
    /// `data` has been read; the last copies may be under way. `progress` hears of the bytes that
    /// were queued, after each part.
    pub fn upload_staged(
        &mut self,
        device: &Device,
        staging: &mut Staging,
        first: usize,
        data: &[T],
        progress: &mut dyn FnMut(u64),
    ) -> Result<(), Error> {
        self.check(first, data.len())?;
        let part_len = staging.half_bytes() / size_of::<T>();
        for (i, part) in data.chunks(part_len).enumerate() {
            let half = staging.next_half(device)?;
            let pinned = &mut half.words()[..part.len()];
            pinned.copy_from_slice(part);
            // SAFETY: this half is written again only when its copies are done.
            unsafe { self.upload_async(device, first + i * part_len, pinned)? };
            half.record(device)?;
            progress(size_of_val(part) as u64);
        }
        Ok(())
    }
}
