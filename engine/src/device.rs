//! Which device a model runs on, and what there is to choose from.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use crate::backend::cuda::{self, CudaDevice, CudaOptions};
use crate::error::Error;

/// Where models are to run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeviceChoice {
    /// CUDA where a driver and a device work and the model fits the kernels, else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// The CUDA device with this index, or an error.
    Cuda(u32),
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(index) => write!(f, "cuda:{index}"),
        }
    }
}

impl FromStr for DeviceChoice {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self, Error> {
        let index = s.strip_prefix("cuda:").and_then(|index| index.parse().ok());
        match (s, index) {
            ("auto", _) => Ok(Self::Auto),
            ("cpu", _) => Ok(Self::Cpu),
            ("cuda", _) => Ok(Self::Cuda(0)),
            (_, Some(index)) => Ok(Self::Cuda(index)),
            _ => Err(Error::option("device", s, "auto, cpu, cuda or cuda:N")),
        }
    }
}

/// Where a model runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    /// `cpu` or `cuda:N`.
    pub device: String,
    /// Why [`DeviceChoice::Auto`] did not take CUDA.
    pub why_not_cuda: Option<String>,
}

/// A choice that was looked into: CUDA and how, or the CPU and why.
#[derive(Clone, Debug)]
pub(crate) enum Found {
    Cpu { why_not_cuda: Option<String> },
    Cuda(CudaOptions),
}

impl Found {
    /// Looks for the device; only a CUDA device that was asked for by name and is absent is an error.
    pub(crate) fn new(choice: DeviceChoice, options: CudaOptions) -> Result<Self, Error> {
        let options = match choice {
            DeviceChoice::Cpu => return Ok(Self::Cpu { why_not_cuda: None }),
            DeviceChoice::Auto => options,
            DeviceChoice::Cuda(index) => CudaOptions { index, ..options },
        };
        match cuda::probe(options.index, options.driver.as_deref()) {
            Ok(()) => Ok(Self::Cuda(options)),
            Err(reason) if choice == DeviceChoice::Auto => {
                Ok(Self::Cpu { why_not_cuda: Some(reason) })
            }
            Err(reason) => {
                let reason = format!("{reason}; use --device cpu");
                Err(Error::NoDevice { device: choice.to_string(), reason })
            }
        }
    }
}

/// The CUDA devices of this machine, or why there are none. `driver` names another library than
/// `libcuda.so.1`.
pub fn cuda_devices(driver: Option<PathBuf>) -> Result<Vec<CudaDevice>, Error> {
    cuda::list(driver.as_deref())
        .map_err(|reason| Error::NoDevice { device: "cuda".into(), reason })
}
