//! AVX2 with FMA and F16C: eight lanes.

use std::arch::x86_64::*;

use super::vector::{Dot, Kernel, MAX_LANES, Simd, instructions};

/// Vectors of 256 bits.
#[derive(Clone, Copy)]
pub(in super::super) struct Avx2;

pub(super) fn available() -> bool {
    is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c")
}

/// # Safety
/// The machine has the instructions; the kernel's arguments are right.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn entry<D: Dot, K: Kernel>(kernel: K) {
    // SAFETY: passed on.
    unsafe { kernel.run::<Avx2, D>() }
}

// SAFETY of the blocks below: the trait's callers vouch for the instructions and for the pointers.
#[allow(clippy::undocumented_unsafe_blocks)]
impl Simd for Avx2 {
    const LANES: usize = 8;
    const TILE_ROWS: usize = 6;
    type V = __m256;

    instructions! {
        splat(x: f32) -> __m256 = _mm256_set1_ps(x);
        load(p: *const f32) -> __m256 = _mm256_loadu_ps(p);
        store(p: *mut f32, v: __m256) -> () = _mm256_storeu_ps(p, v);
        load_f16(p: *const u16) -> __m256 = _mm256_cvtph_ps(_mm_loadu_si128(p.cast()));
        f16(bits: u16) -> f32 = _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(bits))));
        load_i8(p: *const u8) -> __m256 = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(p.cast())));
        add(a: __m256, b: __m256) -> __m256 = _mm256_add_ps(a, b);
        sub(a: __m256, b: __m256) -> __m256 = _mm256_sub_ps(a, b);
        mul(a: __m256, b: __m256) -> __m256 = _mm256_mul_ps(a, b);
        div(a: __m256, b: __m256) -> __m256 = _mm256_div_ps(a, b);
        fma(a: __m256, b: __m256, c: __m256) -> __m256 = _mm256_fmadd_ps(a, b, c);
        max(a: __m256, b: __m256) -> __m256 = _mm256_max_ps(a, b);
        min(a: __m256, b: __m256) -> __m256 = _mm256_min_ps(a, b);
        round(a: __m256) -> __m256 = _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a);
        even_bf16(pairs: __m256) -> __m256 = _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_castps_si256(pairs)));
        prefetch(p: *const u8) -> () = _mm_prefetch::<_MM_HINT_T0>(p.cast());
    }

    #[inline(always)]
    unsafe fn enter<D: Dot, K: Kernel>(kernel: K) {
        unsafe { entry::<D, K>(kernel) }
    }

    #[inline(always)]
    unsafe fn store_first(p: *mut f32, v: __m256, n: usize) {
        unsafe {
            let lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
            let mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(n as i32), lanes);
            _mm256_maskstore_ps(p, mask, v);
        }
    }

    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> __m256 {
        unsafe {
            let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
        }
    }

    #[inline(always)]
    unsafe fn load_e4m3(p: *const u8) -> __m256 {
        unsafe {
            let wide = _mm_cvtepi8_epi16(_mm_loadl_epi64(p.cast()));
            let mask = _mm_set1_epi16(0xbf80_u16 as i16);
            _mm256_cvtph_ps(_mm_and_si128(_mm_slli_epi16::<7>(wide), mask))
        }
    }

    #[inline(always)]
    unsafe fn load_codes<const SHIFT: i32, const MASK: i32>(p: *const u8) -> __m256 {
        unsafe {
            let wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64(p.cast()));
            let code = _mm256_srli_epi32::<SHIFT>(wide);
            _mm256_cvtepi32_ps(_mm256_and_si256(code, _mm256_set1_epi32(MASK)))
        }
    }

    #[inline(always)]
    unsafe fn scale_by_pow2(a: __m256, n: __m256) -> __m256 {
        unsafe {
            // A NaN in `n` makes some power of two and stays in `a`.
            let exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
            _mm256_mul_ps(a, _mm256_castsi256_ps(_mm256_slli_epi32::<23>(exponent)))
        }
    }

    #[inline(always)]
    unsafe fn sum(a: __m256) -> f32 {
        unsafe {
            let b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let c = _mm_add_ps(b, _mm_movehl_ps(b, b));
            _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)))
        }
    }

    #[inline(always)]
    unsafe fn largest(a: __m256) -> f32 {
        unsafe {
            let b = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let c = _mm_max_ps(b, _mm_movehl_ps(b, b));
            _mm_cvtss_f32(_mm_max_ss(c, _mm_movehdup_ps(c)))
        }
    }

    #[inline(always)]
    unsafe fn odd_bf16(pairs: __m256) -> __m256 {
        unsafe {
            let high = _mm256_set1_epi32(0xffff_0000_u32 as i32);
            _mm256_castsi256_ps(_mm256_and_si256(_mm256_castps_si256(pairs), high))
        }
    }

    #[inline(always)]
    unsafe fn dot_bf16(_: __m256, _: __m256, _: __m256) -> __m256 {
        unreachable!("only an AVX512_BF16 machine multiplies bf16 natively")
    }

    #[inline(always)]
    unsafe fn transpose(v: &mut [__m256; MAX_LANES]) {
        unsafe {
            let mut t = *v;
            for i in 0..4 {
                t[2 * i] = _mm256_unpacklo_ps(v[2 * i], v[2 * i + 1]);
                t[2 * i + 1] = _mm256_unpackhi_ps(v[2 * i], v[2 * i + 1]);
            }
            for i in 0..2 {
                let b = 4 * i;
                v[b] = _mm256_shuffle_ps::<0x44>(t[b], t[b + 2]);
                v[b + 1] = _mm256_shuffle_ps::<0xee>(t[b], t[b + 2]);
                v[b + 2] = _mm256_shuffle_ps::<0x44>(t[b + 1], t[b + 3]);
                v[b + 3] = _mm256_shuffle_ps::<0xee>(t[b + 1], t[b + 3]);
            }
            t = *v;
            for i in 0..4 {
                v[i] = _mm256_permute2f128_ps::<0x20>(t[i], t[i + 4]);
                v[i + 4] = _mm256_permute2f128_ps::<0x31>(t[i], t[i + 4]);
            }
        }
    }
}
