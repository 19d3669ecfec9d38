//! What a launch is, and what it costs.

use std::fmt;

use crate::cuda::CUfunction;

/// Which kernel runs on how many threads.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Launch {
    /// The kernel's plain name.
    pub kernel: &'static str,
    /// Blocks in x, y and z. Nothing is launched where one is 0.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: u32,
    /// Bytes of shared memory of a block beside what the kernel itself says.
    pub extra_smem: u32,
}

impl fmt::Display for Launch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kernel, grid: [x, y, z], block, .. } = self;
        write!(f, "{kernel} (grid {x}x{y}x{z}, block {block})")
    }
}

/// A kernel of a loaded module.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Function {
    pub(crate) raw: CUfunction,
    /// Bytes of shared memory that each launch has, and may have beside others up to 48 KiB.
    pub(crate) smem: u32,
}

/// What a launch must do at least: for benchmarks.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Cost {
    /// Fewest bytes to and from device memory.
    pub bytes: u64,
    /// Floating point operations, a multiply-add being two.
    pub flops: u64,
}

impl Cost {
    /// A product of `n_rows` rows of `k` numbers with `n` rows of weights in bf16, all matrices together: each once, and `row_bytes`
    /// of each number of the rows that go in and that come out.
    pub fn product(n_rows: usize, n: usize, k: usize, row_bytes: [usize; 2]) -> Self {
        let bytes = n * k * 2 + n_rows * (k * row_bytes[0] + n * row_bytes[1]);
        Self { bytes: bytes as u64, flops: (2 * n_rows * n * k) as u64 }
    }
}
