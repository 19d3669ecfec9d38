//! Which devices there are, without opening one.

use std::path::PathBuf;

use loris_kernels::DeviceInfo;

use super::CudaOptions;
use crate::device::CudaDevice;
use crate::error::Error;

/// `Ok` if the device can be used, else why not.
pub(crate) fn probe(options: &CudaOptions) -> Result<(), String> {
    let devices = list(options.driver.clone())?;
    let index = options.index;
    match devices.iter().find(|device| device.index == index) {
        Some(CudaDevice { why_not: None, .. }) => Ok(()),
        Some(CudaDevice { why_not: Some(why), name, .. }) => Err(format!("{name}: {why}")),
        None => Err(format!("the driver has {} devices", devices.len())),
    }
}

/// All devices, usable or not.
pub(crate) fn list(driver: Option<PathBuf>) -> Result<Vec<CudaDevice>, String> {
    let found = loris_kernels::probe(driver.as_deref()).map_err(|e| e.to_string())?;
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
