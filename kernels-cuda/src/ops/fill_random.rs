//! Launcher of `fill_random`: weights for benchmarks and tests, the same on every device.

use crate::abi::FillRandomArgs;
use crate::{Device, Error, Launch, Matrix};

const N_THREADS: u64 = 256;

/// Fills a matrix with values uniform in `-scale .. scale`: element i depends on `seed + i` alone.
pub fn fill_random(device: &Device, out: &mut Matrix, seed: u64, scale: f32) -> Result<(), Error> {
    Error::check_size("fill_random matrix", out.data.len(), out.n * out.k)?;
    let n = out.data.len() as u64;
    let launch = Launch {
        kernel: "fill_random",
        grid: [n.div_ceil(8 * N_THREADS) as u32, 1, 1],
        block: N_THREADS as u32,
        extra_smem: 0,
    };
    let args = FillRandomArgs { out: out.data.ptr() as *mut u16, n, seed, scale };
    // SAFETY: the matrix has n elements.
    unsafe { device.launch(&launch, &args) }
}

/// Element `i` of a matrix filled with `seed` and `scale`, as bf16 bits.
pub fn value(seed: u64, i: u64, scale: f32) -> u16 {
    let mut z = seed.wrapping_add(i).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^= z >> 31;
    let centred = (z >> 40) as i32 - (1 << 23); // 24 bits
    let bits = (centred as f32 / (1 << 23) as f32 * scale).to_bits();
    ((bits + 0x7fff + (bits >> 16 & 1)) >> 16) as u16 // nearest even
}
