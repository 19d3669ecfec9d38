// Four or two bits a number, with a scale and a zero for each group of a slot: INT4 and, of values,
// INT2.
#pragma once

#include "strip.cuh"

// What prefill keeps of keys while scores are made. Where there are two groups, scores of the first
// are multiplied with `ratio`, so that those of the second can be added and both be multiplied with
// `scale`; a group of scale 0 has codes 0. The zeros add sum(q of a group) * zero: one more step of
// the product, whose factors are split into bf16, [slot][16] and [row of Q][16]:
//
//   zero = high + low             high low high low high low   the other group's   0 0 0 0
//   sum  = high + middle + low    high high mid mid  low low
struct SlotScales {
    float scale, ratio;
};
constexpr int SPLIT_BYTES = 32;

// Three bf16 that add up to a float, each in both halves of a word.
struct ThreeParts {
    uint32_t x, y, z;
};
DEV ThreeParts split_sum(float x) {
    const uint32_t high = prim::pack_bf16(x, x);
    x -= prim::bf16_lo(high);
    const uint32_t middle = prim::pack_bf16(x, x);
    x -= prim::bf16_lo(middle);
    return {high, middle, prim::pack_bf16(x, x)};
}

template <int D, int N_BITS>
struct Group : Coding<D, N_BITS == 4 ? INT4 : INT2> {
    using Base = Coding<D, N_BITS == 4 ? INT4 : INT2>;
    static constexpr int BITS = N_BITS;
    static constexpr bool HAS_ZERO = true;
    static constexpr int GROUPS = Base::PARAM_BYTES / 4;
    static constexpr int KEPT_BYTES = sizeof(SlotScales) + SPLIT_BYTES, ROW_SUM_BYTES = SPLIT_BYTES;

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

    // (warp) The params of a strip of K, slots `first` and on of a tile, to where the scores find
    // them; those of bf16 rows are 1 and 0.
    template <int BLOCK_KV>
    DEV static void keep(unsigned char *kept_smem, int first, const unsigned char *strip_smem,
                         bool is_wide) {
        const unsigned char *params = strip_smem + Base::PARAMS;
        const int slot = prim::lane();
        if (slot >= STRIP_SLOTS) return;
        Params of[2] = {{1.0f, 0.0f}, {1.0f, 0.0f}};
        uint32_t zeros[2] = {};
        for (int g = 0; g < GROUPS; g++) {
            if (!is_wide) of[g] = params_of(params, slot, g);
            const float low = of[g].zero - prim::bf16_to_float(prim::to_bf16(of[g].zero));
            zeros[g] = prim::pack_bf16(of[g].zero, low);
        }
        SlotScales kept = {of[0].scale, 1.0f};
        if (GROUPS == 2 && of[1].scale != 0.0f) kept = {of[1].scale, of[0].scale / of[1].scale};
        reinterpret_cast<SlotScales *>(kept_smem)[first + slot] = kept;
        unsigned char *split_smem = kept_smem + BLOCK_KV * sizeof(SlotScales);
        prim::st16(split_smem + swizzle<SPLIT_BYTES>(first + slot, 0),
                   {zeros[0], zeros[0], zeros[0], zeros[1]});
        prim::st16(split_smem + swizzle<SPLIT_BYTES>(first + slot, 1), {zeros[1], zeros[1], 0, 0});
    }

    // (warp) Sums of the groups of each row of Q, split; a thread has the row that it stands for.
    DEV static void sum_rows(const unsigned char *q_smem, unsigned char *split_smem) {
        constexpr int CHUNKS = D / 8 / GROUPS;
        ThreeParts parts[2] = {};
        for (int g = 0; g < GROUPS; g++) {
            float sum = 0.0f;
            for (int c = 0; c < CHUNKS; c++) {
                const uint4 x = prim::ld16(q_smem + swizzle<D * 2>(prim::lane(), g * CHUNKS + c));
                sum += prim::bf16_lo(x.x) + prim::bf16_hi(x.x) + prim::bf16_lo(x.y) +
                       prim::bf16_hi(x.y) + prim::bf16_lo(x.z) + prim::bf16_hi(x.z) +
                       prim::bf16_lo(x.w) + prim::bf16_hi(x.w);
            }
            parts[g] = split_sum(sum);
        }
        prim::st16(split_smem + swizzle<SPLIT_BYTES>(threadIdx.x, 0),
                   {parts[0].x, parts[0].y, parts[0].z, parts[1].x});
        prim::st16(split_smem + swizzle<SPLIT_BYTES>(threadIdx.x, 1),
                   {parts[1].y, parts[1].z, 0, 0});
    }

    // Multiplies the scores of the first of two groups with their ratio.
    template <int N_M, int N_KV>
    DEV static void scale_first_group(float (&s)[N_M][N_KV][4], const unsigned char *kept_smem) {
        const auto *kept = reinterpret_cast<const SlotScales *>(kept_smem);
#pragma unroll
        for (int n = 0; n < N_KV; n++)
            for (int e = 0; e < 2; e++) {
                const float ratio = kept[n * 8 + (prim::lane() & 3) * 2 + e].ratio;
                for (int r = 0; r < 2 * N_M; r++) s[r / 2][n][r % 2 * 2 + e] *= ratio;
            }
    }

    // (warp) Products with codes of a tile become scores.
    template <int N_M, int N_KV>
    DEV static void scale_scores(float (&s)[N_M][N_KV][4], const unsigned char *kept_smem,
                                 const unsigned char *q_sums_smem) {
#pragma unroll
        for (int n = 0; n < N_KV; n++)
            for (int e = 0; e < 2; e++) {
                const int slot = n * 8 + (prim::lane() & 3) * 2 + e;
                const float scale = reinterpret_cast<const SlotScales *>(kept_smem)[slot].scale;
                for (int r = 0; r < 2 * N_M; r++) s[r / 2][n][r % 2 * 2 + e] *= scale;
                // Or the compiler reads more than it has registers for before it uses any of it.
                if (e == 1) prim::warp_sync();
            }
        const unsigned char *zeros_smem = kept_smem + N_KV * 8 * sizeof(SlotScales);
        const unsigned char *sums_smem = q_sums_smem + prim::warp() * N_M * 16 * SPLIT_BYTES;
        uint32_t a[N_M][4];
        for (int m = 0; m < N_M; m++)
            prim::ldsm_x4(a[m], sums_smem + m * 16 * SPLIT_BYTES + row_offset_mk<SPLIT_BYTES>());
#pragma unroll
        for (int n = 0; n < N_KV; n += 2) {
            uint32_t b[4];
            prim::ldsm_x4(b, zeros_smem + n * 8 * SPLIT_BYTES + row_offset_nk<SPLIT_BYTES>());
#pragma unroll
            for (int m = 0; m < N_M; m++) {
                prim::mma_bf16(s[m][n], a[m], b[0], b[1]);
                prim::mma_bf16(s[m][n + 1], a[m], b[2], b[3]);
            }
        }
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
