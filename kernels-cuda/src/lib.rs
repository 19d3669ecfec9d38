//! CUDA kernels of loris and the only code that talks to the driver.

pub mod ops;
