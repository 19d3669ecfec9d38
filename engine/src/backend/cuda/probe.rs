//! Which devices there are, without opening one.

use std::path::Path;

use loris_kernels::DeviceInfo;

use crate::error::Error;

/// A CUDA device of this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CudaDevice {
    /// Its index: `cuda:N`.
    pub index: u32,
    /// What its maker calls it.
    pub name: String,
    /// Compute capability.
    pub compute: (u32, u32),
    /// Bytes of its memory.
    pub memory: u64,
    /// Why it cannot be used, if it cannot.
    pub why_not: Option<String>,
}

/// `Ok` if the device can be used, else why not.
pub(crate) fn probe(index: u32, driver: Option<&Path>) -> Result<(), String> {
    let devices = list(driver)?;
    match devices.iter().find(|device| device.index == index) {
        Some(CudaDevice { why_not: None, .. }) => Ok(()),
        Some(CudaDevice { why_not: Some(why), name, .. }) => Err(format!("{name}: {why}")),
        None => Err(format!("the driver has {} devices", devices.len())),
    }
}

/// All devices, usable or not.
pub(crate) fn list(driver: Option<&Path>) -> Result<Vec<CudaDevice>, String> {
    let found = loris_kernels::probe(driver).map_err(|e| e.to_string())?;
    let device = |info: DeviceInfo| CudaDevice {
        index: info.index,
        name: info.name,
        compute: info.compute,
        memory: info.memory,
        why_not: info.kernels.err(),
    };
    Ok(found.into_iter().map(device).collect())
}

/// The error of a device that could not be opened.
pub(super) fn no_device(index: u32, e: &loris_kernels::Error) -> Error {
    Error::NoDevice { device: format!("cuda:{index}"), reason: e.to_string() }
}
