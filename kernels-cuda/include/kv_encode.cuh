// How a head becomes codes: scale, rounding. Plain f32 arithmetic in the order of
// `engine/src/backend/cpu/codec.rs`: the same numbers become the same bytes on every device.
//
// A head lies in D / 8 lanes as `rotation.cuh` says: lane l has numbers 4 l + i and D / 2 + 4 l +
// i.
#pragma once

#include "kv_format.cuh"

// The smallest and the largest of some numbers; `poison` is NaN if one is not finite, else 0.
struct Extent {
    float least = INFINITY, largest = -INFINITY, poison = 0.0f;

    DEV void add(const float (&x)[4]) {
        for (int i = 0; i < 4; i++) {
            least = fminf(least, x[i]);
            largest = fmaxf(largest, x[i]);
            poison += x[i] * 0.0f;
        }
    }
    // (warp) That of all lanes whose numbers differ in the bits below `lanes`.
    DEV void reduce(int lanes) {
        for (int mask = lanes / 2; mask > 0; mask /= 2) {
            least = fminf(least, prim::shfl_xor(least, mask));
            largest = fmaxf(largest, prim::shfl_xor(largest, mask));
            poison += prim::shfl_xor(poison, mask);
        }
    }
    DEV Extent with(const Extent &other) const {
        return {fminf(least, other.least), fmaxf(largest, other.largest), poison + other.poison};
    }
    DEV float magnitude() const { return fmaxf(fmaxf(-least, largest), 0.0f) + poison; }
};

// A scale as it is stored, and the inverse of that: 0 where there is none.
struct Scale {
    uint16_t bits;
    float inverse;

    DEV explicit Scale(float scale) : bits(prim::to_f16(scale)) {
        const float stored = prim::f16_to_float(bits);
        inverse = stored > 0.0f ? 1.0f / stored : 0.0f;
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

// Four codes, a byte each.
template <class Code>
DEV uint32_t four_codes(const float (&x)[4], Code code) {
    return code(x[0]) | code(x[1]) << 8 | code(x[2]) << 16 | code(x[3]) << 24;
}

// (warp) Stores a head where `codes` and `params` are. The format is not BF16 in lanes that are
// `active`; the others only keep the warp together.
template <int D>
DEV void encode(uint32_t format, const float (&lo)[4], const float (&hi)[4], unsigned char *codes,
                unsigned char *params, bool active) {
    constexpr int LANES = D / 8;
    const int l = prim::lane() % LANES;
    Extent extent[2];
    extent[0].add(lo);
    extent[1].add(hi);
    extent[0].reduce(LANES);
    extent[1].reduce(LANES);
    const Extent whole = extent[0].with(extent[1]);
    if (D != 128) extent[0] = extent[1] = whole;  // one group, else one in each half

    // INT4. The numbers 0 .. 15 of a run of 32 and those behind them share bytes, and, where a half
    // of the head is longer than that, those behind them are four lanes further.
    const Scale scale[2] = {
        Scale((extent[0].largest - extent[0].least) / 15.0f + extent[0].poison),
        Scale((extent[1].largest - extent[1].least) / 15.0f + extent[1].poison)};
    const uint16_t zero[2] = {prim::to_f16(extent[0].least), prim::to_f16(extent[1].least)};
    uint32_t nibbles[2];
    for (int half = 0; half < 2; half++) {
        const float at_zero = prim::f16_to_float(zero[half]);
        nibbles[half] = four_codes(half == 0 ? lo : hi, [&](float x) {
            const float code = rintf((x - at_zero) * scale[half].inverse);
            return static_cast<uint32_t>(fminf(fmaxf(code, 0.0f), 15.0f));
        });
    }
    uint32_t bytes = nibbles[0] | nibbles[1] << 4;
    uint32_t offset = 4 * l;
    if (D != 32) {
        const bool is_upper = (l & 4) != 0;  // stores the second half of the head
        const uint32_t other = prim::shfl_xor(is_upper ? nibbles[0] : nibbles[1], 4);
        bytes = is_upper ? other | nibbles[1] << 4 : nibbles[0] | other << 4;
        offset = (is_upper ? D / 4 : 0) + l / 8 * 16 + l % 4 * 4;
    }
    if (!active) return;

    if (format == INT4) {
        *reinterpret_cast<uint32_t *>(codes + offset) = bytes;
        if (l == 0) {
            uint32_t *to = reinterpret_cast<uint32_t *>(params);
            to[0] = scale[0].bits | static_cast<uint32_t>(zero[0]) << 16;
            if (D == 128) to[1] = scale[1].bits | static_cast<uint32_t>(zero[1]) << 16;
        }
        return;
    }
    const Scale of_slot(whole.magnitude() / (format == INT8 ? 127.0f : 448.0f));
    auto code = [&](float x) {
        x *= of_slot.inverse;
        if (format != INT8) return e4m3(x);
        const float nearest = fminf(fmaxf(rintf(x), -127.0f), 127.0f);
        return static_cast<uint32_t>(static_cast<int32_t>(nearest)) & 0xff;
    };
    *reinterpret_cast<uint32_t *>(codes + 4 * l) = four_codes(lo, code);
    *reinterpret_cast<uint32_t *>(codes + D / 2 + 4 * l) = four_codes(hi, code);
    if (l == 0) *reinterpret_cast<uint16_t *>(params) = of_slot.bits;
}
