// Four or two bits a number of keys, with a scale and a zero for each channel of a page, which is
// sealed: coded as a whole, from bf16 (page_seal.cu).
#pragma once

#include "strip.cuh"

// Two codes, as bf16, of two channels: the numbers that they stand for, rounded to bf16.
DEV uint32_t two_values(uint32_t codes, uint32_t scales, uint32_t zeros) {
    return prim::pack_bf16(fmaf(prim::bf16_lo(codes), f16_lo(scales), f16_lo(zeros)),
                           fmaf(prim::bf16_hi(codes), f16_hi(scales), f16_hi(zeros)));
}

template <int D, int N_BITS>
struct Channel : Coding<D, N_BITS == 4 ? INT4_CHANNEL : INT2_CHANNEL> {
    using Base = Coding<D, N_BITS == 4 ? INT4_CHANNEL : INT2_CHANNEL>;
    static constexpr int BITS = N_BITS;

    DEV static uint32_t pair(uint32_t codes) { return low_pair<BITS>(codes); }

    // What eight codes, a byte each, of channels `first` and on stand for.
    template <bool AS_VALUES>
    DEV static uint4 numbers(uint32_t w0, uint32_t w1, Params, const unsigned char *channels,
                             int first) {
        static_assert(AS_VALUES, "channels have no params in common that could come later");
        const uint4 scales = prim::ld16(channels + first * 2);
        const uint4 zeros = prim::ld16(channels + (D + first) * 2);
        const uint2 a = four<Channel>(w0), b = four<Channel>(w1);
        return {two_values(a.x, scales.x, zeros.x), two_values(a.y, scales.y, zeros.y),
                two_values(b.x, scales.z, zeros.z), two_values(b.y, scales.w, zeros.w)};
    }

    // (warp) S = Q K^T of a strip.
    DEV static void scores(float (&s)[2][4], const uint32_t (&q)[D / 16][4], const float (&)[1][2],
                           const unsigned char *k_smem) {
        constexpr int ROW_BYTES = Base::CODE_BYTES, N_CHUNKS = ROW_BYTES / 16, N_PARTS = 8 / BITS;
        const unsigned char *channels = k_smem + Base::PARAMS + (prim::lane() & 3) * 8;
#pragma unroll
        for (int c = 0; c < N_CHUNKS; c += 2) {
            uint32_t codes[4];  // [slots 0.., 8..][chunk c, c + 1]
            prim::ldsm_x4(codes, k_smem + (row_offset_nk<ROW_BYTES>() ^ c << 4));
#pragma unroll
            for (int i = 0; i < (N_CHUNKS == 1 ? 1 : 2) * N_PARTS; i++) {
                const int k = c * N_PARTS + i, shift = i % N_PARTS * BITS;
                const uint2 scales = *reinterpret_cast<const uint2 *>(channels + k * 32);
                const uint2 zeros = *reinterpret_cast<const uint2 *>(channels + D * 2 + k * 32);
#pragma unroll
                for (int n = 0; n < 2; n++) {
                    const uint32_t w = codes[2 * n + i / N_PARTS] >> shift;
                    prim::mma_bf16(s[n], q[k],
                                   two_values(pair(w), low_halves(scales.x, scales.y),
                                              low_halves(zeros.x, zeros.y)),
                                   two_values(pair(w >> 8), high_halves(scales.x, scales.y),
                                              high_halves(zeros.x, zeros.y)));
                }
            }
        }
    }
};
