//! Kernel launches by name.

use std::fmt;

use crate::{Device, Error, driver_ext};

/// Dynamic shared memory that a kernel may use without being allowed to.
const PLAIN_SMEM: u32 = 48 << 10;

/// Which kernel runs on how many threads.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Launch {
    /// The kernel's plain name.
    pub kernel: &'static str,
    /// Blocks in x, y and z. Nothing is launched where one is 0.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: u32,
    /// Dynamic shared memory of a block.
    pub smem_bytes: u32,
}

impl fmt::Display for Launch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kernel, grid: [x, y, z], block, smem_bytes } = self;
        write!(f, "{kernel} (grid {x}x{y}x{z}, block {block}, {smem_bytes} bytes of shared memory)")
    }
}

/// What a launch must do at least: for benchmarks.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Cost {
    /// Fewest bytes to and from device memory.
    pub bytes: u64,
    /// Floating point operations, a multiply-add being two.
    pub flops: u64,
}

impl Device {
    /// Queues a kernel in the device's stream.
    ///
    /// Errors of the kernel itself come back from a later call, in most cases the one that waits for it; with the
    /// environment variable `LORIS_CUDA_SYNC` set, from this one.
    ///
    /// # Safety
    /// `A` is the argument struct of the kernel, and the pointers in `args` are valid for what it does until it
    /// has run.
    pub unsafe fn launch<A: Copy>(&self, launch: &Launch, args: &A) -> Result<(), Error> {
        if launch.grid.contains(&0) {
            return Ok(());
        }
        self.set_current()?;
        let function = self.function(launch.kernel)?;
        if launch.smem_bytes > PLAIN_SMEM && launch.smem_bytes > function.allowed_smem.get() {
            // SAFETY: the function belongs to a module of this device.
            unsafe { driver_ext::allow_smem(function.raw, launch)? };
            function.allowed_smem.set(launch.smem_bytes);
        }
        let args = (&raw const *args).cast();
        // SAFETY: the function belongs to a module of this device, the rest is the caller's.
        unsafe { driver_ext::launch(function.raw, launch, self.stream(), args)? };
        if self.synchronous { self.wait(|| launch.to_string()) } else { Ok(()) }
    }
}
