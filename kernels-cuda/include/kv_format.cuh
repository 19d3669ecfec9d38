// The number formats of the KV cache: where a head is in a page, and how codes become numbers.
//
//   format  codes                                     a number is
//   BF16    bf16                                      the code
//   FP8     e4m3                                      code * scale                of a slot
//   INT8    -127 .. 127                               code * scale                of a slot
//   INT4    0 .. 15: in 32 numbers byte i has         code * scale + zero         of a group
//           number i below and number 16 + i above
//   INT2    0 .. 3: in 64 numbers byte i has          code * scale + zero         of a group
//           numbers i, 16 + i, 32 + i and 48 + i from below
//   INT4_CHANNEL, INT2_CHANNEL                        code * scale + zero         of a channel
//           keys with the codes of INT4, of INT2
//
// Params are f16: {scale}, or {scale, zero} for each group of 64 numbers, of 32 in heads of 32. A
// channel shares them in all slots of a page: behind the codes of a head are D scales and D zeros.
// Every code is exact in bf16. So attention multiplies codes on the tensor cores, and brings in
// scale and zero in f32: where they are the same for a dot product with a key, to the score; for
// values, with the weight of the slot. Where they are a channel's, keys are decoded before they are
// multiplied with, and rounded to bf16.
//
// Pages of keys by channel are sealed: a table has pages of bf16 behind them (paged_kv.cuh).
#pragma once

#include "formats.h"
#include "paged_kv.cuh"

constexpr uint32_t BF16 = LORIS_KV_BF16, FP8 = LORIS_KV_FP8, INT8 = LORIS_KV_INT8,
                   INT4 = LORIS_KV_INT4, INT2 = LORIS_KV_INT2, INT4_CHANNEL = LORIS_KV_INT4_CHANNEL,
                   INT2_CHANNEL = LORIS_KV_INT2_CHANNEL;

// Params are those of channels.
template <uint32_t FORMAT>
constexpr bool IS_BY_CHANNEL = FORMAT == INT4_CHANNEL || FORMAT == INT2_CHANNEL;
// Params are a scale and a zero for each group.
template <uint32_t FORMAT>
constexpr bool IS_BY_GROUP = FORMAT == INT4 || FORMAT == INT2;

template <uint32_t FORMAT>
constexpr int CODE_BITS = FORMAT == BF16                             ? 16
                          : FORMAT == INT4 || FORMAT == INT4_CHANNEL ? 4
                          : FORMAT == INT2 || FORMAT == INT2_CHANNEL ? 2
                                                                     : 8;
// Bytes of the codes of a head of D numbers.
template <uint32_t FORMAT, int D>
constexpr int CODE_BYTES = D * CODE_BITS<FORMAT> / 8;
// Groups of numbers with params of their own.
template <uint32_t FORMAT, int D>
constexpr int N_GROUPS = IS_BY_GROUP<FORMAT> && D == 128 ? 2 : 1;
// Bytes of the params of a slot, and of those that a page's slots have in common.
template <uint32_t FORMAT, int D>
constexpr int PARAM_BYTES = FORMAT == BF16 || IS_BY_CHANNEL<FORMAT> ? 0
                            : IS_BY_GROUP<FORMAT>                   ? 4 * N_GROUPS<FORMAT, D>
                                                                    : 2;
template <uint32_t FORMAT, int D>
constexpr int CHANNEL_BYTES = IS_BY_CHANNEL<FORMAT> ? 4 * D : 0;

// What attention counts slots from.
template <uint32_t K, uint32_t V>
constexpr uint32_t SKEW = K == BF16 && V == BF16 ? 0 : LORIS_KV_SKEW;

constexpr uint32_t BF16_ONES = 0x3f803f80;  // 1, 1
constexpr uint16_t F16_ONE = 0x3c00;

// Kernels of `body<D, K, V>` with `smem<D, K, V>` bytes of shared memory: for each pair of formats
// and each width of heads, or for each format of keys. The build reads these rows as it does
// KERNEL.
#define FAMILY(name, Args, n_threads, min_blocks, smem) \
    KV_PAIRS(FAMILY_ROW, name, Args, n_threads, min_blocks, smem)
#define KEY_FAMILY(name, Args, n_threads, min_blocks, smem) \
    KV_KEYS(FAMILY_ROW, name, Args, n_threads, min_blocks, smem)
#define FAMILY_ROW(D, K, V, suffix, name, Args, n_threads, min_blocks, smem) \
    KERNEL(name##_d##D##suffix, Args, n_threads, min_blocks, smem<D, K, V>) { body<D, K, V>(args); }

// The sizes of a format that is known at run time.
struct CodeBytes {
    uint32_t codes, params, channels;

    // Of a head in a page.
    DEV uint32_t run(uint32_t len) const { return len * (codes + params) + channels; }
};
template <uint32_t FORMAT, int D>
DEV CodeBytes code_bytes_of() {
    return {CODE_BYTES<FORMAT, D>, PARAM_BYTES<FORMAT, D>, CHANNEL_BYTES<FORMAT, D>};
}
template <int D>
DEV CodeBytes code_bytes(uint32_t format) {
    if (format == BF16) return code_bytes_of<BF16, D>();
    if (format == INT4) return code_bytes_of<INT4, D>();
    if (format == INT2) return code_bytes_of<INT2, D>();
    if (format == INT4_CHANNEL) return code_bytes_of<INT4_CHANNEL, D>();
    if (format == INT2_CHANNEL) return code_bytes_of<INT2_CHANNEL, D>();
    return code_bytes_of<INT8, D>();
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
    const uint32_t before = side * n_kv_heads * k.run(len);
    const uint32_t run = before + kv_head * own.run(len);
    return {run + slot * own.codes, run + len * own.codes + slot * own.params};
}

DEV bool is_coded(const LorisPages &pages) {
    return pages.k_format != BF16 || pages.v_format != BF16;
}

DEV bool is_sealed(const LorisPages &pages) {
    return pages.k_format == INT4_CHANNEL || pages.k_format == INT2_CHANNEL;
}

// A slot of a table: where it is.
struct PageSlot {
    unsigned char *page;
    uint32_t idx;  // in the page; and FIRST or TAIL in one of bf16 where others are coded
    static constexpr uint32_t FIRST = 1u << 31, TAIL = 1u << 30;

    DEV bool is_wide() const { return (idx & (FIRST | TAIL)) != 0; }
    // Slots of the page.
    DEV uint32_t len(const LorisPages &pages) const {
        if ((idx & FIRST) != 0) return LORIS_KV_WIDE;
        return 1u << ((idx & TAIL) != 0 ? pages.tail_len_log2 : pages.page_len_log2);
    }
    DEV uint32_t in_page() const { return idx & ~(FIRST | TAIL); }
};
// Of a table with sealed pages: a slot behind those.
DEV PageSlot page_slot(const LorisPages &pages, const LorisTable &table, uint32_t layer,
                       uint32_t slot, uint32_t n_sealed = 0) {
    const uint32_t page_len = 1u << pages.page_len_log2;
    uint32_t idx = slot & (page_len - 1), page_idx = slot >> pages.page_len_log2;
    if (is_coded(pages)) {
        const bool is_first = slot < LORIS_KV_WIDE;
        idx = is_first ? slot | PageSlot::FIRST : (slot - LORIS_KV_WIDE) & (page_len - 1);
        page_idx = (slot + page_len - LORIS_KV_WIDE) >> pages.page_len_log2;
        if (is_sealed(pages) && !is_first) {
            slot -= LORIS_KV_WIDE + (n_sealed << pages.page_len_log2);
            idx = (slot & ((1u << pages.tail_len_log2) - 1)) | PageSlot::TAIL;
            page_idx = 1 + n_sealed + (slot >> pages.tail_len_log2);
        }
    }
    const uint64_t page = table.pages[page_idx * table.n_layers + layer];
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
    const bool is_wide = slot.is_wide();
    const uint32_t k_format = is_wide ? BF16 : pages.k_format;
    const uint32_t format = is_wide ? BF16 : side == 0 ? pages.k_format : pages.v_format;
    const HeadPlace place = head_place<D>(k_format, format, pages.n_kv_heads, slot.len(pages), side,
                                          kv_head, slot.in_page());
    return {format, slot.page + place.codes, slot.page + place.params};
}

// A bf16 row of a table with sealed pages: in its first page or in its tail.
template <int D, class Kv>
DEV const unsigned char *wide_row(const Kv &kv, uint32_t slot, uint32_t kv_head, uint32_t side) {
    const WidePlace at = kv.wide_place(slot);
    return kv.base + at.page * kv.page_bytes +
           head_place<D>(BF16, BF16, kv.n_kv_heads, at.len, side, kv_head, at.idx).codes;
}

// Codes in bits 0 .. 7 and 16 .. 23 of a word (of four bits: 0 .. 3 and 16 .. 19, of two: 0 .. 1
// and 16 .. 17; other bits do not matter) as two bf16, exactly; those of less than eight bits less
// CENTRE.
template <uint32_t FORMAT, int CENTRE = 0>
DEV uint32_t pair(uint32_t codes) {
    static_assert(CENTRE == 0 || CENTRE == 1 << (CODE_BITS<FORMAT> - 1), "the middle of the codes");
    if constexpr (CODE_BITS<FORMAT> < 8) {  // the bits of 128 + code; less 128 + CENTRE
        const uint32_t mask = ((1 << CODE_BITS<FORMAT>)-1) * 0x00010001;
        const uint32_t less = 0xc300c300 + CENTRE * 0x00010001;
        return prim::fma_bf16x2((codes & mask) | 0x43004300, BF16_ONES, less);
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

// Two codes, as bf16, of two channels: the numbers that they stand for, rounded to bf16.
DEV uint32_t two_values(uint32_t codes, uint32_t scales, uint32_t zeros) {
    return prim::pack_bf16(fmaf(prim::bf16_lo(codes), f16_lo(scales), f16_lo(zeros)),
                           fmaf(prim::bf16_hi(codes), f16_hi(scales), f16_hi(zeros)));
}

// What eight codes, a byte each, of channels `first` and on stand for.
template <uint32_t FORMAT, int D>
DEV uint4 eight_values(uint32_t w0, uint32_t w1, const unsigned char *channels, int first) {
    const uint4 scales = prim::ld16(channels + first * 2);
    const uint4 zeros = prim::ld16(channels + (D + first) * 2);
    const uint2 a = four<FORMAT>(w0), b = four<FORMAT>(w1);
    return {two_values(a.x, scales.x, zeros.x), two_values(a.y, scales.y, zeros.y),
            two_values(b.x, scales.z, zeros.z), two_values(b.y, scales.w, zeros.w)};
}

// What the codes of a group stand for.
struct Params {
    float scale, zero;
};
// Those of group `group` of slot `slot`, whose params begin at params + slot * PARAM_BYTES.
template <uint32_t FORMAT, int D>
DEV Params params_of(const unsigned char *params, int slot, int group) {
    if constexpr (IS_BY_GROUP<FORMAT>) {
        const unsigned char *at = params + slot * PARAM_BYTES<FORMAT, D> + group * 4;
        const uint32_t word = *reinterpret_cast<const uint32_t *>(at);
        return {f16_lo(word), f16_hi(word)};
    } else {
        return {prim::f16_to_float(reinterpret_cast<const uint16_t *>(params)[slot]), 0.0f};
    }
}
