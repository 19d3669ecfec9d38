//! CUDA kernels of loris and the only code that talks to the driver.
//!
//! [`Device`] is one GPU: its primary context, one stream, the kernels. Memory is [`Buffer`]s; work
//! is the launchers in [`ops`], which check every size and queue a kernel in the device's stream.
//! The driver is found at run time, so this builds and starts on machines without one; [`probe`]
//! says what is there.
//!
//! ```no_run
//! use loris_kernels::{Buffer, Device, DeviceOptions};
//!
//! let device = Device::open(&DeviceOptions::default())?;
//! println!("{} with {} SMs", device.info().name, device.info().n_sms);
//! let buffer = Buffer::from_slice(&device, &[1.0f32, 2.0, 3.0], "numbers")?;
//! let mut back = [0.0; 3];
//! buffer.download(&device, 0, &mut back)?;
//! # Ok::<(), loris_kernels::Error>(())
//! ```

#[allow(missing_docs, rustdoc::broken_intra_doc_links)] // `[n]` is a shape
#[rustfmt::skip]
pub mod abi;
pub mod buffer;
#[allow(
    missing_docs,
    non_camel_case_types,
    non_upper_case_globals,
    non_snake_case,
    unreachable_pub
)]
#[rustfmt::skip]
mod cuda;
pub mod device;
mod driver_ext;
pub mod error;
pub mod graph;
pub mod images;
pub mod kv;
pub mod launch;
pub mod ops;
pub mod staging;

pub use buffer::{Buffer, Matrix, Pod, Rows};
pub use device::{Device, DeviceInfo, DeviceOptions, probe};
pub use error::Error;
pub use graph::{Graph, Recording};
pub use images::{Image, NO_IMAGES, RESOURCES, images};
pub use kv::{KvPages, PageTable, has_kernels};
pub use launch::{Cost, Launch};
pub use staging::Staging;

/// Path of the twin: a CUDA driver that runs the kernels on the CPU.
#[cfg(feature = "twin")]
pub const TWIN: &str = images::generated::TWIN;

/// Sizes that no device reaches saturate.
fn to_u32(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}
