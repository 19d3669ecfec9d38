//! CUDA side of loris. No kernels are built yet: the engine runs on the CPU.
