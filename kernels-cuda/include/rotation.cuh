// How heads are rotated: to positions, and by the Hadamard matrix of the caches that have it.
//
// A head of D elements belongs to D / 8 lanes: lane l of them holds the rotation pairs (i, i + D/2)
// of i = 4 l .. 4 l + 3, so that the rotation stays inside a lane, projections are read 16 bytes at
// a time, and each half of the head is written in one run. A warp finishes 256 / D heads at once:
// 2, 4 or 8.
#pragma once

#include "swizzle.cuh"

template <int D>
struct HeadGroup {
    static_assert(D == 32 || D == 64 || D == 128, "head_dim");
    static constexpr int LANES = D / 8;                    // that share a head
    static constexpr int HEADS = 32 / LANES;               // that a warp finishes at once
    DEV static int idx() { return prim::lane() / LANES; }  // which of them is this lane's
};

// Four consecutive floats, 16-byte aligned.
DEV void load4(float (&to)[4], const float *from) {
    uint4 v = prim::ld16(from);
    to[0] = prim::as_float(v.x), to[1] = prim::as_float(v.y);
    to[2] = prim::as_float(v.z), to[3] = prim::as_float(v.w);
}

// Cosine and sine of this lane's four pairs.
template <int D>
struct Rotation {
    float cos[4], sin[4];

    // `angles` are those of the head's row: [D / 2][2].
    DEV void load(const float *angles) {
        const float *from = angles + 8 * (prim::lane() % HeadGroup<D>::LANES);
        float lo[4], hi[4];
        load4(lo, from);
        load4(hi, from + 4);
        cos[0] = lo[0], sin[0] = lo[1], cos[1] = lo[2], sin[1] = lo[3];
        cos[2] = hi[0], sin[2] = hi[1], cos[3] = hi[2], sin[3] = hi[3];
    }

    DEV void turn(float (&lo)[4], float (&hi)[4]) const {
        for (int i = 0; i < 4; i++) {
            float x = lo[i], y = hi[i];
            lo[i] = x * cos[i] - y * sin[i];
            hi[i] = y * cos[i] + x * sin[i];
        }
    }
};

// (warp) Multiplies heads with the Hadamard matrix over sqrt(D): neighbours first, halves last.
template <int D>
DEV void rotate(float (&lo)[4], float (&hi)[4]) {
    auto in_lane = [](float (&x)[4]) {
        for (int i = 0; i < 4; i += 2) {
            const float a = x[i], b = x[i + 1];
            x[i] = a + b, x[i + 1] = a - b;
        }
        for (int i = 0; i < 2; i++) {
            const float a = x[i], b = x[i + 2];
            x[i] = a + b, x[i + 2] = a - b;
        }
    };
    in_lane(lo);
    in_lane(hi);
#pragma unroll
    for (int mask = 1; mask < D / 8; mask *= 2) {
        const bool is_upper = (prim::lane() & mask) != 0;
        for (int i = 0; i < 4; i++) {
            const float other_lo = prim::shfl_xor(lo[i], mask);
            const float other_hi = prim::shfl_xor(hi[i], mask);
            lo[i] = is_upper ? other_lo - lo[i] : lo[i] + other_lo;
            hi[i] = is_upper ? other_hi - hi[i] : hi[i] + other_hi;
        }
    }
    const float factor = 1.0f / sqrtf(static_cast<float>(D));
    for (int i = 0; i < 4; i++) {
        const float a = lo[i], b = hi[i];
        lo[i] = prim::mul_rn(a + b, factor), hi[i] = prim::mul_rn(a - b, factor);
    }
}

// (warp) Turns queries in a swizzled tile of rows, row `row` in the lanes of a HeadGroup, from
// their positions to where they meet the sinks of a stream, by the angles of LorisBatch. A query
// that has been multiplied with the Hadamard matrix as the keys are is so again afterwards.
template <int D>
DEV void turn_queries(unsigned char *q_smem, int row, const float *angles, bool is_rotated) {
    const int first = 4 * (prim::lane() % HeadGroup<D>::LANES);
    auto four_at = [&](int i) {
        return reinterpret_cast<uint2 *>(q_smem + swizzle<D * 2>(row, i / 8) + i % 8 * 2);
    };
    uint2 *const at[2] = {four_at(first), four_at(first + D / 2)};
    float x[2][4];
    for (int half = 0; half < 2; half++) {
        const uint2 pairs = *at[half];
        x[half][0] = prim::bf16_lo(pairs.x), x[half][1] = prim::bf16_hi(pairs.x);
        x[half][2] = prim::bf16_lo(pairs.y), x[half][3] = prim::bf16_hi(pairs.y);
    }
    Rotation<D> rotation;
    rotation.load(angles);
    if (is_rotated) rotate<D>(x[0], x[1]);  // the matrix is its own inverse
    rotation.turn(x[0], x[1]);
    if (is_rotated) rotate<D>(x[0], x[1]);
    for (int half = 0; half < 2; half++)
        *at[half] = make_uint2(prim::pack_bf16(x[half][0], x[half][1]),
                               prim::pack_bf16(x[half][2], x[half][3]));
}
