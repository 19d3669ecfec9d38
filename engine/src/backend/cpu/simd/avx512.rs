//! AVX-512 F, BW, DQ and VL, with or without the bf16 dot product: sixteen lanes.

use std::arch::x86_64::*;
use std::mem::transmute;

use super::vector::{Dot, Kernel, MAX_LANES, Simd, instructions};

/// Vectors of 512 bits.
#[derive(Clone, Copy)]
pub(in super::super) struct Avx512;

pub(super) fn available() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c")
}

/// # Safety
/// The machine has the instructions; the kernel's arguments are right.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
unsafe fn entry<D: Dot, K: Kernel>(kernel: K) {
    // SAFETY: passed on.
    unsafe { kernel.run::<Avx512, D>() }
}

/// # Safety
/// As [`entry`], with the bf16 dot product.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
unsafe fn entry_bf16<D: Dot, K: Kernel>(kernel: K) {
    // SAFETY: passed on.
    unsafe { kernel.run::<Avx512, D>() }
}

// SAFETY of the blocks below: the trait's callers vouch for the instructions and for the pointers.
#[allow(clippy::undocumented_unsafe_blocks)]
impl Simd for Avx512 {
    const LANES: usize = 16;
    const TILE_ROWS: usize = 14;
    type V = __m512;

    instructions! {
        splat(x: f32) -> __m512 = _mm512_set1_ps(x);
        load(p: *const f32) -> __m512 = _mm512_loadu_ps(p);
        store(p: *mut f32, v: __m512) -> () = _mm512_storeu_ps(p, v);
        load_f16(p: *const u16) -> __m512 = _mm512_cvtph_ps(_mm256_loadu_si256(p.cast()));
        f16(bits: u16) -> f32 = _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(bits))));
        load_i8(p: *const u8) -> __m512 = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(p.cast())));
        add(a: __m512, b: __m512) -> __m512 = _mm512_add_ps(a, b);
        sub(a: __m512, b: __m512) -> __m512 = _mm512_sub_ps(a, b);
        mul(a: __m512, b: __m512) -> __m512 = _mm512_mul_ps(a, b);
        div(a: __m512, b: __m512) -> __m512 = _mm512_div_ps(a, b);
        fma(a: __m512, b: __m512, c: __m512) -> __m512 = _mm512_fmadd_ps(a, b, c);
        max(a: __m512, b: __m512) -> __m512 = _mm512_max_ps(a, b);
        min(a: __m512, b: __m512) -> __m512 = _mm512_min_ps(a, b);
        // Scale 0: to an integer; then round to nearest even, no exceptions.
        round(a: __m512) -> __m512 = _mm512_roundscale_ps::<0x08>(a);
        largest(a: __m512) -> f32 = _mm512_reduce_max_ps(a);
        even_bf16(pairs: __m512) -> __m512 = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_castps_si512(pairs)));
        prefetch(p: *const u8) -> () = _mm_prefetch::<_MM_HINT_T0>(p.cast());
    }

    #[inline(always)]
    unsafe fn enter<D: Dot, K: Kernel>(kernel: K) {
        unsafe {
            if D::NATIVE {
                entry_bf16::<D, K>(kernel);
            } else {
                entry::<D, K>(kernel);
            }
        }
    }

    #[inline(always)]
    unsafe fn store_first(p: *mut f32, v: __m512, n: usize) {
        unsafe {
            let mask = ((1u32 << n) - 1) as __mmask16;
            _mm512_mask_storeu_ps(p, mask, v);
        }
    }

    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> __m512 {
        unsafe {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
        }
    }

    #[inline(always)]
    unsafe fn load_e4m3(p: *const u8) -> __m512 {
        unsafe {
            // The sign to bit 15, and away from bit 14, where its extension is too.
            let wide = _mm256_cvtepi8_epi16(_mm_loadu_si128(p.cast()));
            let mask = _mm256_set1_epi16(0xbf80_u16 as i16);
            _mm512_cvtph_ps(_mm256_and_si256(_mm256_slli_epi16::<7>(wide), mask))
        }
    }

    #[inline(always)]
    unsafe fn load_codes<const SHIFT: i32, const MASK: i32>(p: *const u8) -> __m512 {
        unsafe {
            let wide = _mm512_cvtepu8_epi32(_mm_loadu_si128(p.cast()));
            let code = _mm512_srlv_epi32(wide, _mm512_set1_epi32(SHIFT));
            _mm512_cvtepi32_ps(_mm512_and_si512(code, _mm512_set1_epi32(MASK)))
        }
    }

    #[inline(always)]
    unsafe fn scale_by_pow2(a: __m512, n: __m512) -> __m512 {
        unsafe {
            // Below the normal numbers the instruction would give subnormals; the contract says zero.
            let normal = _mm512_cmp_ps_mask::<_CMP_NEQ_UQ>(n, _mm512_set1_ps(-127.0));
            _mm512_maskz_scalef_ps(normal, a, n)
        }
    }

    #[inline(always)]
    unsafe fn sum(a: __m512) -> f32 {
        unsafe {
            let low = _mm512_castps512_ps256(a);
            let b = _mm256_add_ps(low, _mm512_extractf32x8_ps::<1>(a));
            let c = _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps::<1>(b));
            let d = _mm_add_ps(c, _mm_movehl_ps(c, c));
            _mm_cvtss_f32(_mm_add_ss(d, _mm_movehdup_ps(d)))
        }
    }

    #[inline(always)]
    unsafe fn odd_bf16(pairs: __m512) -> __m512 {
        unsafe {
            let high = _mm512_set1_epi32(0xffff_0000_u32 as i32);
            _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(pairs), high))
        }
    }

    #[inline(always)]
    unsafe fn dot_bf16(a: __m512, b: __m512, c: __m512) -> __m512 {
        unsafe {
            let (a, b) = (transmute::<__m512, __m512bh>(a), transmute::<__m512, __m512bh>(b));
            _mm512_dpbf16_ps(c, a, b)
        }
    }

    #[inline(always)]
    unsafe fn transpose(v: &mut [__m512; MAX_LANES]) {
        unsafe {
            let mut t = *v;
            for i in 0..8 {
                t[2 * i] = _mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]);
                t[2 * i + 1] = _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]);
            }
            for i in 0..4 {
                let b = 4 * i;
                v[b] = _mm512_shuffle_ps::<0x44>(t[b], t[b + 2]);
                v[b + 1] = _mm512_shuffle_ps::<0xee>(t[b], t[b + 2]);
                v[b + 2] = _mm512_shuffle_ps::<0x44>(t[b + 1], t[b + 3]);
                v[b + 3] = _mm512_shuffle_ps::<0xee>(t[b + 1], t[b + 3]);
            }
            // v[4 r + c] now holds, in 128-bit lane l, column 4 l + c of rows 4 r .. 4 r + 4.
            for c in 0..4 {
                t[c] = _mm512_shuffle_f32x4::<0x88>(v[c], v[4 + c]);
                t[4 + c] = _mm512_shuffle_f32x4::<0xdd>(v[c], v[4 + c]);
                t[8 + c] = _mm512_shuffle_f32x4::<0x88>(v[8 + c], v[12 + c]);
                t[12 + c] = _mm512_shuffle_f32x4::<0xdd>(v[8 + c], v[12 + c]);
            }
            for c in 0..4 {
                v[c] = _mm512_shuffle_f32x4::<0x88>(t[c], t[8 + c]);
                v[8 + c] = _mm512_shuffle_f32x4::<0xdd>(t[c], t[8 + c]);
                v[4 + c] = _mm512_shuffle_f32x4::<0x88>(t[4 + c], t[12 + c]);
                v[12 + c] = _mm512_shuffle_f32x4::<0xdd>(t[4 + c], t[12 + c]);
            }
        }
    }
}
