// Four or two bits a number, with a scale and a zero for each group of a slot: INT4 and, of values,
// INT2.
#pragma once

#include "strip.cuh"

template <int D, int N_BITS>
struct Group : Coding<D, N_BITS == 4 ? INT4 : INT2> {
    using Base = Coding<D, N_BITS == 4 ? INT4 : INT2>;
    static constexpr int BITS = N_BITS;
    static constexpr bool HAS_ZERO = true;
    static constexpr int GROUPS = Base::PARAM_BYTES / 4;

    DEV static uint32_t pair(uint32_t codes) { return low_pair<BITS>(codes); }

    // Params of a group of a slot; those of slot 0 are at `params`.
    DEV static Params params_of(const unsigned char *params, int slot, int group) {
        const unsigned char *at = params + slot * Base::PARAM_BYTES + group * 4;
        const uint32_t word = *reinterpret_cast<const uint32_t *>(at);
        return {f16_lo(word), f16_hi(word)};
    }

    template <bool AS_VALUES>
    DEV static uint4 numbers(uint32_t w0, uint32_t w1, Params of, const unsigned char *, int) {
        return eight<Group, AS_VALUES>(w0, w1, of);
    }

    // (warp) S = Q K^T of a strip; q_sum are the sums of each group of Q's rows lane / 4 and lane /
    // 4
    // + 8.
    DEV static void scores(float (&s)[2][4], const uint32_t (&q)[D / 16][4],
                           const float (&q_sum)[GROUPS][2], const unsigned char *k_smem) {
        static_assert(BITS == 4, "keys of two bits are coded by channel");
        constexpr int ROW_BYTES = Base::CODE_BYTES, N_CHUNKS = ROW_BYTES / 16;
        float sum[GROUPS][2][4] = {};
#pragma unroll
        for (int c = 0; c < N_CHUNKS; c += 2) {
            uint32_t codes[4];  // [slots 0.., 8..][chunk c, c + 1]
            prim::ldsm_x4(codes, k_smem + (row_offset_nk<ROW_BYTES>() ^ c << 4));
#pragma unroll
            for (int i = 0; i < (N_CHUNKS == 1 ? 1 : 2); i++) {
#pragma unroll
                for (int n = 0; n < 2; n++) {
                    const uint32_t w = codes[2 * n + i];
                    const int k = 2 * (c + i);
                    float (&to)[4] = sum[k * 16 / (D / GROUPS)][n];
                    prim::mma_bf16(to, q[k], pair(w), pair(w >> 8));
                    prim::mma_bf16(to, q[k + 1], pair(w >> 4), pair(w >> 12));
                }
            }
        }
#pragma unroll
        for (int n = 0; n < 2; n++)
            for (int e = 0; e < 2; e++)
                for (int g = 0; g < GROUPS; g++) {
                    const int slot = n * 8 + (prim::lane() & 3) * 2 + e;
                    const Params of = params_of(k_smem + Base::PARAMS, slot, g);
                    for (int r = 0; r < 2; r++) {
                        float &to = s[n][r * 2 + e];
                        to = fmaf(sum[g][n][r * 2 + e], of.scale, to);
                        to = fmaf(q_sum[g][r], of.zero, to);
                    }
                }
    }

    // (warp) O += P V of the slots of a strip that are seen: `seen` is a bit for each, from this
    // lane's first. The params of others may be anything. To `zero` goes what the zeros add to all
    // dimensions of a group, of rows lane / 4 and lane / 4 + 8.
    DEV static void add(float (&o)[D / 8][4], float (&zero)[GROUPS][2], const float (&p)[2][4],
                        uint32_t seen, const unsigned char *v_smem) {
        constexpr int CENTRE = 1 << (BITS - 1);
        constexpr float centre = CENTRE;
        uint32_t a[GROUPS][4];
#pragma unroll
        for (int g = 0; g < GROUPS; g++)
            for (int n = 0; n < 2; n++) {
                Params of[2];
                for (int e = 0; e < 2; e++) {
                    const int slot = n * 8 + (prim::lane() & 3) * 2 + e;
                    of[e] = params_of(v_smem + Base::PARAMS, slot, g);
                    if ((seen >> (n * 8 + e) & 1) == 0) of[e] = {0.0f, 0.0f};
                }
                for (int r = 0; r < 2; r++) {
                    const float p0 = p[n][r * 2], p1 = p[n][r * 2 + 1];
                    a[g][2 * n + r] = prim::pack_bf16(p0 * of[0].scale, p1 * of[1].scale);
                    zero[g][r] = fmaf(p0, fmaf(of[0].scale, centre, of[0].zero), zero[g][r]);
                    zero[g][r] = fmaf(p1, fmaf(of[1].scale, centre, of[1].zero), zero[g][r]);
                }
            }
        add_codes<Group, D>(o, a, v_smem,
                            [](uint32_t codes) { return low_pair<BITS, CENTRE>(codes); });
    }
};

// A lane's part of a head in INT4. The numbers 0 .. 15 of 32 and those behind them share bytes,
// and, where a half of the head is longer than that, those behind them are four lanes further.
template <int D>
struct Int4Head {
    Scale scale[2];
    uint16_t zero[2];
    uint32_t bytes, offset;

    // (warp) `extent` is that of the two halves of the head, where they are two groups.
    DEV Int4Head(const Extent (&extent)[2], const float (&lo)[4], const float (&hi)[4])
        : scale{Scale((extent[0].largest - extent[0].least) / 15.0f + extent[0].poison),
                Scale((extent[1].largest - extent[1].least) / 15.0f + extent[1].poison)},
          zero{prim::to_f16(extent[0].least), prim::to_f16(extent[1].least)} {
        const int l = prim::lane() % (D / 8);
        uint32_t nibbles[2];
        for (int half = 0; half < 2; half++) {
            const float at_zero = prim::f16_to_float(zero[half]);
            nibbles[half] = four_codes(half == 0 ? lo : hi, [&](float x) {
                const float code = rintf((x - at_zero) * scale[half].inverse);
                return static_cast<uint32_t>(fminf(fmaxf(code, 0.0f), 15.0f));
            });
        }
        bytes = nibbles[0] | nibbles[1] << 4;
        offset = 4 * l;
        if (D != 32) {
            const bool is_upper = (l & 4) != 0;  // stores the second half of the head
            const uint32_t other = prim::shfl_xor(is_upper ? nibbles[0] : nibbles[1], 4);
            bytes = is_upper ? other | nibbles[1] << 4 : nibbles[0] | other << 4;
            offset = (is_upper ? D / 4 : 0) + l / 8 * 16 + l % 4 * 4;
        }
    }

    DEV void store(unsigned char *codes, unsigned char *params) const {
        *reinterpret_cast<uint32_t *>(codes + offset) = bytes;
        if (prim::lane() % (D / 8) == 0) {
            uint32_t *to = reinterpret_cast<uint32_t *>(params);
            to[0] = scale[0].bits | static_cast<uint32_t>(zero[0]) << 16;
            if (D == 128) to[1] = scale[1].bits | static_cast<uint32_t>(zero[1]) << 16;
        }
    }
};
