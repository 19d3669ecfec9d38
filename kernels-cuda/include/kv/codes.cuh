// From codes to numbers, and from numbers to codes: what the families of codings share.
//
//   BF16                  bf16                               the code
//   FP8, INT8  byte.cuh   e4m3; -127 .. 127                  code * scale          of a slot
//   INT4       group.cuh  0 .. 15: in 32 numbers byte i has  code * scale + zero   of a group
//                         number i below, number 16 + i above
//   INT2                  0 .. 3: in 64 numbers byte i has   code * scale + zero   of a group
//                         i, 16 + i, 32 + i, 48 + i from below
//   INT4_CHANNEL          the codes of INT4, of INT2         code * scale + zero   of a channel
//   INT2_CHANNEL          channel.cuh
//
// Params are f16: {scale}, or {scale, zero} for each group of 64 numbers, of 32 in heads of 32. A
// channel shares them in all slots of a page: behind the codes of a head are D scales and D zeros.
// Every code is exact in bf16. So attention multiplies codes on the tensor cores, and brings in
// scale and zero in f32: where they are the same for a dot product with a key, to the score; for
// values, with the weight of the slot. Where they are a channel's, keys are decoded before they are
// multiplied with, and rounded to bf16.
//
// Numbers become codes by plain f32 arithmetic in the order of `engine/src/backend/cpu/kv/`:
// the same numbers become the same bytes on every device. A head then lies in D / 8 lanes as
// `rotation.cuh` says: lane l has numbers 4 l + i and D / 2 + 4 l + i.
#pragma once

#include "prim.cuh"

constexpr uint32_t BF16_ONES = 0x3f803f80;  // 1, 1
constexpr uint16_t F16_ONE = 0x3c00;

// Codes of BITS bits, at bits 0 and 16 of a word, as two bf16, exactly, less CENTRE; other bits do
// not matter.
template <int BITS, int CENTRE = 0>
DEV uint32_t low_pair(uint32_t codes) {  // the bits of 128 + code; less 128 + CENTRE
    static_assert(CENTRE == 0 || CENTRE == 1 << (BITS - 1), "the middle of the codes");
    const uint32_t mask = ((1 << BITS) - 1) * 0x00010001;
    const uint32_t less = 0xc300c300 + CENTRE * 0x00010001;
    return prim::fma_bf16x2((codes & mask) | 0x43004300, BF16_ONES, less);
}

// Four codes, a byte each, as bf16 in their order.
template <class C>
DEV uint2 four(uint32_t codes) {
    return make_uint2(C::pair(prim::byte_perm(codes, 0, 0x4140)),
                      C::pair(prim::byte_perm(codes, 0, 0x4342)));
}

// Pairs of equal halves of two words: {lo, lo} and {hi, hi}.
DEV uint32_t low_halves(uint32_t a, uint32_t b) { return prim::byte_perm(a, b, 0x5410); }
DEV uint32_t high_halves(uint32_t a, uint32_t b) { return prim::byte_perm(a, b, 0x7632); }

// The two f16 of a word.
DEV float f16_lo(uint32_t word) { return prim::f16_to_float(static_cast<uint16_t>(word)); }
DEV float f16_hi(uint32_t word) { return prim::f16_to_float(static_cast<uint16_t>(word >> 16)); }

// What the codes of a slot or of a group stand for.
struct Params {
    float scale, zero;
};

// Four codes as the numbers they stand for, rounded to bf16.
template <class C>
DEV uint2 four_values(uint32_t codes, Params of) {
    uint2 x = four<C>(codes);
    auto value = [&](float code) { return fmaf(code, of.scale, of.zero); };
    return uint2{prim::pack_bf16(value(prim::bf16_lo(x.x)), value(prim::bf16_hi(x.x))),
                 prim::pack_bf16(value(prim::bf16_lo(x.y)), value(prim::bf16_hi(x.y)))};
}

// Eight codes, a byte each of two words, as bf16: themselves or, AS_VALUES, what they stand for.
template <class C, bool AS_VALUES>
DEV uint4 eight(uint32_t w0, uint32_t w1, Params of) {
    const uint2 a = AS_VALUES ? four_values<C>(w0, of) : four<C>(w0);
    const uint2 b = AS_VALUES ? four_values<C>(w1, of) : four<C>(w1);
    return uint4{a.x, a.y, b.x, b.y};
}

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

// Four codes, a byte each.
template <class Code>
DEV uint32_t four_codes(const float (&x)[4], Code code) {
    return code(x[0]) | code(x[1]) << 8 | code(x[2]) << 16 | code(x[3]) << 24;
}
