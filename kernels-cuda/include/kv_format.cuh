// The number formats of the KV cache: where a head is in a page, and how codes become numbers.
//
//   format  codes                                     a number is
//   BF16    bf16                                      the code
//   FP8     e4m3                                      code * scale                of a slot
//   INT8    -127 .. 127                               code * scale                of a slot
//   INT4    0 .. 15: in 32 numbers byte i has         code * scale + zero         of a group
//           number i below and number 16 + i above
//
// Params are f16: {scale}, or {scale, zero} for each group of 64 numbers, of 32 in heads of 32.
// Every code is exact in bf16. So attention multiplies codes on the tensor cores, and brings in
// scale and zero in f32: where they are the same for a dot product with a key, to the score; for
// values, with the weight of the slot.
#pragma once

#include "paged_kv.cuh"

constexpr uint32_t BF16 = LORIS_KV_BF16, FP8 = LORIS_KV_FP8, INT8 = LORIS_KV_INT8,
                   INT4 = LORIS_KV_INT4;

template <uint32_t FORMAT>
constexpr int CODE_BITS = FORMAT == BF16   ? 16
                          : FORMAT == INT4 ? 4
                                           : 8;
// Bytes of the codes of a head of D numbers.
template <uint32_t FORMAT, int D>
constexpr int CODE_BYTES = D * CODE_BITS<FORMAT> / 8;
// Groups of numbers with params of their own.
template <uint32_t FORMAT, int D>
constexpr int N_GROUPS = FORMAT == INT4 && D == 128 ? 2 : 1;
template <uint32_t FORMAT, int D>
constexpr int PARAM_BYTES = FORMAT == BF16   ? 0
                            : FORMAT == INT4 ? 4 * N_GROUPS<FORMAT, D>
                                             : 2;

// What attention counts slots from.
template <uint32_t K, uint32_t V>
constexpr uint32_t SKEW = K == BF16 && V == BF16 ? 0 : LORIS_KV_SKEW;

constexpr uint32_t BF16_ONES = 0x3f803f80;  // 1, 1
constexpr uint16_t F16_ONE = 0x3c00;

// The sizes of a format that is known at run time.
struct CodeBytes {
    uint32_t codes, params;
};
template <int D>
DEV CodeBytes code_bytes(uint32_t format) {
    if (format == BF16) return {CODE_BYTES<BF16, D>, PARAM_BYTES<BF16, D>};
    if (format == INT4) return {CODE_BYTES<INT4, D>, PARAM_BYTES<INT4, D>};
    return {CODE_BYTES<INT8, D>, PARAM_BYTES<INT8, D>};
}

// First byte in a page of the codes of a head's slot, and of its params.
struct HeadPlace {
    uint32_t codes, params;
};
// In a page of `len` slots with keys of `k_format`; side 0 is K, 1 is V, of `format`.
template <int D>
DEV HeadPlace head_place(uint32_t k_format, uint32_t format, uint32_t n_kv_heads, uint32_t len,
                         uint32_t side, uint32_t kv_head, uint32_t slot) {
    const CodeBytes k = code_bytes<D>(k_format), own = code_bytes<D>(format);
    const uint32_t before = side * n_kv_heads * len * (k.codes + k.params);
    const uint32_t run = before + kv_head * len * (own.codes + own.params);
    return {run + slot * own.codes, run + len * own.codes + slot * own.params};
}

DEV bool is_coded(const LorisPages &pages) {
    return pages.k_format != BF16 || pages.v_format != BF16;
}

// A slot of a table: where it is.
struct PageSlot {
    unsigned char *page;
    uint32_t idx;  // in the page, and FIRST in a first page of bf16 where others are coded
    static constexpr uint32_t FIRST = 1u << 31;

    DEV bool is_first() const { return (idx & FIRST) != 0; }
};
DEV PageSlot page_slot(const LorisPages &pages, const LorisTable &table, uint32_t layer,
                       uint32_t slot) {
    const uint32_t page_len = 1u << pages.page_len_log2;
    uint32_t idx = slot & (page_len - 1);
    if (is_coded(pages)) {
        const bool is_first = slot < LORIS_KV_WIDE;
        idx = is_first ? slot | PageSlot::FIRST : (slot - LORIS_KV_WIDE) & (page_len - 1);
        slot += page_len - LORIS_KV_WIDE;
    }
    const uint64_t page = table.pages[(slot >> pages.page_len_log2) * table.n_layers + layer];
    return {static_cast<unsigned char *>(pages.base) + page * pages.page_bytes, idx};
}

// A head of a slot: its format, and where its codes and params are. Side 0 is K, 1 is V.
struct SlotHead {
    uint32_t format;
    unsigned char *codes, *params;
};
template <int D>
DEV SlotHead slot_head(const LorisPages &pages, const PageSlot &slot, uint32_t side,
                       uint32_t kv_head) {
    const bool is_first = slot.is_first();
    const uint32_t k_format = is_first ? BF16 : pages.k_format;
    const uint32_t format = is_first ? BF16 : side == 0 ? pages.k_format : pages.v_format;
    const uint32_t len = is_first ? LORIS_KV_WIDE : 1u << pages.page_len_log2;
    const HeadPlace place = head_place<D>(k_format, format, pages.n_kv_heads, len, side, kv_head,
                                          slot.idx & ~PageSlot::FIRST);
    return {format, slot.page + place.codes, slot.page + place.params};
}

// Codes in bits 0 .. 7 and 16 .. 23 of a word (INT4: 0 .. 3 and 16 .. 19; other bits do not matter)
// as two bf16, exactly; INT4 less CENTRE.
template <uint32_t FORMAT, int CENTRE = 0>
DEV uint32_t pair(uint32_t codes) {
    static_assert(CENTRE == 0 || (FORMAT == INT4 && CENTRE == 8), "the middle of 16 codes");
    if constexpr (FORMAT == INT4) {  // the bits of 128 + code; less 128 or 136
        const uint32_t less = CENTRE == 0 ? 0xc300c300 : 0xc308c308;
        return prim::fma_bf16x2((codes & 0x000f000f) | 0x43004300, BF16_ONES, less);
    } else if constexpr (FORMAT == INT8) {  // 128 + seven bits; less 128, or 256 below zero
        return prim::fma_bf16x2((codes & 0x007f007f) | 0x43004300, BF16_ONES,
                                (codes & 0x00800080) | 0xc300c300);
    } else {  // an exponent of bias 7 where bf16 has 127: too small by 2^120
        return prim::fma_bf16x2((codes & 0x00800080) << 8 | (codes & 0x007f007f) << 4, 0x7b807b80,
                                0);
    }
}

// Four codes, a byte each, as bf16 in their order.
template <uint32_t FORMAT>
DEV uint2 four(uint32_t codes) {
    return make_uint2(pair<FORMAT>(prim::byte_perm(codes, 0, 0x4140)),
                      pair<FORMAT>(prim::byte_perm(codes, 0, 0x4342)));
}

// Pairs of equal halves of two words: {lo, lo} and {hi, hi}.
DEV uint32_t low_halves(uint32_t a, uint32_t b) { return prim::byte_perm(a, b, 0x5410); }
DEV uint32_t high_halves(uint32_t a, uint32_t b) { return prim::byte_perm(a, b, 0x7632); }

// The two f16 of a word.
DEV float f16_lo(uint32_t word) { return prim::f16_to_float(static_cast<uint16_t>(word)); }
DEV float f16_hi(uint32_t word) { return prim::f16_to_float(static_cast<uint16_t>(word >> 16)); }

// What the codes of a group stand for.
struct Params {
    float scale, zero;
};
// Those of group `group` of slot `slot`, whose params begin at params + slot * PARAM_BYTES.
template <uint32_t FORMAT, int D>
DEV Params params_of(const unsigned char *params, int slot, int group) {
    if constexpr (FORMAT == INT4) {
        const unsigned char *at = params + slot * PARAM_BYTES<INT4, D> + group * 4;
        const uint32_t word = *reinterpret_cast<const uint32_t *>(at);
        return {f16_lo(word), f16_hi(word)};
    } else {
        return {prim::f16_to_float(reinterpret_cast<const uint16_t *>(params)[slot]), 0.0f};
    }
}
