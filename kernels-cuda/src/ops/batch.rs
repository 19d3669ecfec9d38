//! A batch on the device: what kernels read about rows, sequences and pages.
