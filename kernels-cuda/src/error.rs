//! What can go wrong between the host and the device.

use std::path::PathBuf;

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// There is no driver, or it is not the one that this process already uses.
    #[error("the CUDA driver {} cannot be used: {why}", path.display())]
    NoDriver {
        /// The library that was asked for.
        path: PathBuf,
        /// What the loader said.
        why: String,
    },
    /// The driver has no device of this index.
    #[error("there is no CUDA device {index}: the driver has {count}")]
    NoDevice {
        /// The device that was asked for.
        index: u32,
        /// How many there are.
        count: u32,
    },
    /// This build holds no kernels for the device.
    #[error("this build holds no kernels for compute capability {}.{}: {why}", compute.0, compute.1)]
    NoImages {
        /// Major and minor number of the device.
        compute: (u32, u32),
        /// Why not.
        why: String,
    },
    /// The driver refused a call or reports that earlier work failed.
    #[error("{call} failed for {what}: {text} (CUDA error {code})")]
    Driver {
        /// The driver's function.
        call: &'static str,
        /// What it was called for: kernel and dimensions, or buffer and size.
        what: String,
        /// The driver's result code.
        code: u32,
        /// The driver's name and text of the code.
        text: String,
    },
    /// Device memory ran out.
    #[error(
        "no device memory for {what}: {bytes} bytes wanted, {free} of {total} free; a smaller context, \
        a smaller batch or fewer sessions need less"
    )]
    OutOfMemory {
        /// What the memory is for.
        what: &'static str,
        /// How much was asked for.
        bytes: u64,
        /// What the device had free.
        free: u64,
        /// What the device has.
        total: u64,
    },
    /// The kernels do not do this.
    #[error("{what}: {found} is not supported, only {expected}")]
    Unsupported {
        /// Operation and quantity, as `attention_decode head_dim`.
        what: String,
        /// What was asked for.
        found: String,
        /// What there is.
        expected: &'static str,
    },
    /// A size does not fit the others.
    #[error("{what}: {found} instead of {expected}")]
    Size {
        /// Operation, operand and dimension, as `rmsnorm out width`.
        what: String,
        /// What it is.
        found: usize,
        /// What it should be (at least, where `what` says so).
        expected: usize,
    },
}

impl Error {
    /// `Ok` if `found` is `expected`.
    pub fn check_size(what: &str, found: usize, expected: usize) -> Result<(), Error> {
        if found == expected { Ok(()) } else { Err(Self::size(what, found, expected)) }
    }

    /// `Ok` if `found` is `at_least`.
    pub fn check_room(what: &str, found: usize, at_least: usize) -> Result<(), Error> {
        if found >= at_least { Ok(()) } else { Err(Self::size(what, found, at_least)) }
    }

    /// `Ok` if `condition` holds of `found`.
    pub fn check_supported(
        what: &str,
        found: usize,
        condition: bool,
        expected: &'static str,
    ) -> Result<(), Error> {
        let error = || Error::Unsupported { what: what.into(), found: found.to_string(), expected };
        if condition { Ok(()) } else { Err(error()) }
    }

    pub(crate) fn size(what: &str, found: usize, expected: usize) -> Error {
        Error::Size { what: what.into(), found, expected }
    }
}
