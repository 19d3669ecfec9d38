// A byte a number, with a scale for each slot and head: FP8 and INT8.
#pragma once

#include "strip.cuh"

template <int D, uint32_t CODING>
struct Byte : Coding<D, CODING> {
    using Base = Coding<D, CODING>;
    static constexpr int BITS = 8;

    // Codes in bits 0 .. 7 and 16 .. 23 of a word as two bf16, exactly.
    DEV static uint32_t pair(uint32_t codes) {
        if constexpr (CODING == INT8)  // 128 + seven bits; less 128, or 256 below zero
            return prim::fma_bf16x2((codes & 0x007f007f) | 0x43004300, BF16_ONES,
                                    (codes & 0x00800080) | 0xc300c300);
        // An exponent of bias 7 where bf16 has 127: too small by 2^120.
        return prim::fma_bf16x2((codes & 0x00800080) << 8 | (codes & 0x007f007f) << 4, 0x7b807b80,
                                0);
    }

    // Params of a slot; those of slot 0 are at `params`.
    DEV static Params params_of(const unsigned char *params, int slot, int) {
        return {prim::f16_to_float(reinterpret_cast<const uint16_t *>(params)[slot]), 0.0f};
    }

    template <bool AS_VALUES>
    DEV static uint4 numbers(uint32_t w0, uint32_t w1, Params of, const unsigned char *, int) {
        return eight<Byte, AS_VALUES>(w0, w1, of);
    }

    // (warp) S = Q K^T of a strip.
    DEV static void scores(float (&s)[2][4], const uint32_t (&q)[D / 16][4], const float (&)[1][2],
                           const unsigned char *k_smem) {
        float sum[2][4] = {};
#pragma unroll
        for (int c = 0; c < D / 16; c += 2) {
            uint32_t codes[4];  // [slots 0.., 8..][chunk c, c + 1]
            prim::ldsm_x4(codes, k_smem + (row_offset_nk<D>() ^ c << 4));
#pragma unroll
            for (int i = 0; i < 2; i++) {
#pragma unroll
                for (int n = 0; n < 2; n++) {
                    const uint32_t w = codes[2 * n + i];
                    prim::mma_bf16(sum[n], q[c + i], pair(w), pair(w >> 8));
                }
            }
        }
#pragma unroll
        for (int n = 0; n < 2; n++)
            for (int e = 0; e < 2; e++) {
                const int slot = n * 8 + (prim::lane() & 3) * 2 + e;
                const Params of = params_of(k_smem + Base::PARAMS, slot, 0);
                for (int r = 0; r < 2; r++)
                    s[n][r * 2 + e] = fmaf(sum[n][r * 2 + e], of.scale, s[n][r * 2 + e]);
            }
    }

    // (warp) O += P V of the slots of a strip that are seen: `seen` is a bit for each, from this
    // lane's first. The params of others may be anything.
    DEV static void add(float (&o)[D / 8][4], float (&)[1][2], const float (&p)[2][4],
                        uint32_t seen, const unsigned char *v_smem) {
        uint32_t a[1][4];
#pragma unroll
        for (int n = 0; n < 2; n++) {
            Params of[2];
            for (int e = 0; e < 2; e++) {
                const int slot = n * 8 + (prim::lane() & 3) * 2 + e;
                of[e] = params_of(v_smem + Base::PARAMS, slot, 0);
                if ((seen >> (n * 8 + e) & 1) == 0) of[e] = {0.0f, 0.0f};
            }
            for (int r = 0; r < 2; r++)
                a[0][2 * n + r] =
                    prim::pack_bf16(p[n][r * 2] * of[0].scale, p[n][r * 2 + 1] * of[1].scale);
        }
        add_codes<Byte, D>(o, a, v_smem, [](uint32_t codes) { return pair(codes); });
    }

    // (warp) The params of a strip of K, slots `first` and on of a tile, to where the scores find
    // them; those of bf16 rows are 1.
    template <int BLOCK_KV>
    DEV static void keep(unsigned char *kept_smem, int first, const unsigned char *strip_smem,
                         bool is_wide) {
        const unsigned char *params = strip_smem + Base::PARAMS;
        const int slot = prim::lane();
        if (slot >= STRIP_SLOTS) return;
        reinterpret_cast<uint16_t *>(kept_smem)[first + slot] =
            is_wide ? F16_ONE : reinterpret_cast<const uint16_t *>(params)[slot];
    }

    // (warp) Products with codes of a tile become scores.
    template <int N_M, int N_KV>
    DEV static void scale_scores(float (&s)[N_M][N_KV][4], const unsigned char *kept_smem,
                                 const unsigned char *) {
#pragma unroll
        for (int n = 0; n < N_KV; n++)
            for (int e = 0; e < 2; e++) {
                const int slot = n * 8 + (prim::lane() & 3) * 2 + e;
                const float scale = params_of(kept_smem, slot, 0).scale;
                for (int r = 0; r < 2 * N_M; r++) s[r / 2][n][r % 2 * 2 + e] *= scale;
            }
    }
};

// The nearest e4m3 number, ties to even, at most 448 (OCP 8-bit floating point, section 5).
DEV uint32_t e4m3(float x) {
    const uint32_t sign = prim::as_bits(x) >> 24 & 0x80;
    const float magnitude = fminf(fabsf(x), 448.0f);
    if (magnitude < 1.0f / 64.0f) return sign | static_cast<uint32_t>(rintf(magnitude * 512.0f));
    const uint32_t bits = prim::as_bits(magnitude);
    const uint32_t rounded = bits + 0x7ffff + (bits >> 20 & 1);
    return sign | ((rounded >> 20) - ((127 - 7) << 3));
}

// Stores a lane's part of a head, in INT8 or FP8. `whole` is the extent of the head.
template <int D>
DEV void encode_bytes(uint32_t coding, const Extent &whole, const float (&lo)[4],
                      const float (&hi)[4], unsigned char *codes, unsigned char *params) {
    const int l = prim::lane() % (D / 8);
    const Scale of_slot(whole.magnitude() / (coding == INT8 ? 127.0f : 448.0f));
    auto code = [&](float x) {
        x *= of_slot.inverse;
        if (coding != INT8) return e4m3(x);
        const float nearest = fminf(fmaxf(rintf(x), -127.0f), 127.0f);
        return static_cast<uint32_t>(static_cast<int32_t>(nearest)) & 0xff;
    };
    *reinterpret_cast<uint32_t *>(codes + 4 * l) = four_codes(lo, code);
    *reinterpret_cast<uint32_t *>(codes + D / 2 + 4 * l) = four_codes(hi, code);
    if (l == 0) *reinterpret_cast<uint16_t *>(params) = of_slot.bits;
}
