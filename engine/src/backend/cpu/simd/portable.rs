//! Eight-lane arrays: runs everywhere, and the compiler maps it to what the target has.

use super::narrow::{bf16_value, e4m3_value, f16_value};
use super::vector::{Dot, Kernel, MAX_LANES, Simd, instructions};

const N: usize = 8;

/// Vectors as arrays.
#[derive(Clone, Copy)]
pub(in super::super) struct Portable;

#[inline(always)]
fn map(a: [f32; N], b: [f32; N], f: impl Fn(f32, f32) -> f32) -> [f32; N] {
    std::array::from_fn(|i| f(a[i], b[i]))
}

impl Simd for Portable {
    const LANES: usize = N;
    const TILE_ROWS: usize = 4;
    type V = [f32; N];

    // SAFETY: the caller has N elements, or room for them, behind each pointer.
    instructions! {
        splat(x: f32) -> [f32; N] = [x; N];
        load(p: *const f32) -> [f32; N] = p.cast::<[f32; N]>().read_unaligned();
        store(p: *mut f32, v: [f32; N]) -> () = p.cast::<[f32; N]>().write_unaligned(v);
        f16(bits: u16) -> f32 = f16_value(bits);
        load_i8(p: *const u8) -> [f32; N] = p.cast::<[i8; N]>().read_unaligned().map(f32::from);
        load_e4m3(p: *const u8) -> [f32; N] = p.cast::<[u8; N]>().read_unaligned().map(e4m3_value);
        add(a: [f32; N], b: [f32; N]) -> [f32; N] = map(a, b, |a, b| a + b);
        sub(a: [f32; N], b: [f32; N]) -> [f32; N] = map(a, b, |a, b| a - b);
        mul(a: [f32; N], b: [f32; N]) -> [f32; N] = map(a, b, |a, b| a * b);
        div(a: [f32; N], b: [f32; N]) -> [f32; N] = map(a, b, |a, b| a / b);
        max(a: [f32; N], b: [f32; N]) -> [f32; N] = map(a, b, |a, b| if a > b { a } else { b });
        min(a: [f32; N], b: [f32; N]) -> [f32; N] = map(a, b, |a, b| if a < b { a } else { b });
        largest(a: [f32; N]) -> f32 = a.into_iter().fold(f32::NEG_INFINITY, |m, x| if x > m { x } else { m });
        even_bf16(pairs: [f32; N]) -> [f32; N] = pairs.map(|p| f32::from_bits(p.to_bits() << 16));
        odd_bf16(pairs: [f32; N]) -> [f32; N] = pairs.map(|p| f32::from_bits(p.to_bits() & 0xffff_0000));
        load_bf16(p: *const u16) -> [f32; N] = p.cast::<[u16; N]>().read_unaligned().map(bf16_value);
        load_f16(p: *const u16) -> [f32; N] = p.cast::<[u16; N]>().read_unaligned().map(f16_value);
    }

    #[inline(always)]
    unsafe fn enter<D: Dot, K: Kernel>(kernel: K) {
        // SAFETY: no instructions beyond the target's are used.
        unsafe { kernel.run::<Self, D>() }
    }

    #[inline(always)]
    unsafe fn store_first(p: *mut f32, v: [f32; N], n: usize) {
        for (i, x) in v.into_iter().enumerate().take(n) {
            // SAFETY: the caller has room for n elements there.
            unsafe { p.add(i).write_unaligned(x) };
        }
    }

    #[inline(always)]
    unsafe fn load_codes<const SHIFT: i32, const MASK: i32>(p: *const u8) -> [f32; N] {
        // SAFETY: the caller has N elements there.
        let bytes = unsafe { p.cast::<[u8; N]>().read_unaligned() };
        bytes.map(|byte| ((i32::from(byte) >> SHIFT) & MASK) as f32)
    }

    #[inline(always)]
    unsafe fn fma(a: [f32; N], b: [f32; N], c: [f32; N]) -> [f32; N] {
        // `mul_add` is a library call where the target has no such instruction.
        if cfg!(any(target_arch = "aarch64", target_feature = "fma")) {
            std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
        } else {
            std::array::from_fn(|i| a[i] * b[i] + c[i])
        }
    }

    #[inline(always)]
    unsafe fn round(a: [f32; N]) -> [f32; N] {
        // Adding 1.5 * 2^23 leaves no fraction bits; exact for |a| < 2^22.
        const SHIFT: f32 = 12_582_912.0;
        a.map(|a| (a + SHIFT) - SHIFT)
    }

    #[inline(always)]
    unsafe fn scale_by_pow2(a: [f32; N], n: [f32; N]) -> [f32; N] {
        map(a, n, |a, n| {
            // A NaN casts to 0 and stays in `a`.
            a * f32::from_bits(((n as i32 + 127) as u32) << 23)
        })
    }

    #[inline(always)]
    unsafe fn sum(a: [f32; N]) -> f32 {
        let b: [f32; 4] = std::array::from_fn(|i| a[i] + a[i + 4]);
        (b[0] + b[2]) + (b[1] + b[3])
    }

    #[inline(always)]
    unsafe fn dot_bf16(_: [f32; N], _: [f32; N], _: [f32; N]) -> [f32; N] {
        unreachable!("only an AVX512_BF16 machine multiplies bf16 natively")
    }

    #[inline(always)]
    unsafe fn transpose(block: &mut [[f32; N]; MAX_LANES]) {
        let from: [[f32; N]; N] = std::array::from_fn(|i| block[i]);
        for (i, row) in block.iter_mut().enumerate().take(N) {
            *row = std::array::from_fn(|j| from[j][i]);
        }
    }

    #[inline(always)]
    unsafe fn prefetch(_: *const u8) {}
}
