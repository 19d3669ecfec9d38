// What asks which coding it is. codings.h (the build makes it) has the codings by name.
#pragma once

#include "codings.h"

// Kernels of `body<D, K, V>` with `smem<D, K, V>` bytes of shared memory: for each pair of codings
// and each width of heads, or for each coding of keys. The build reads these rows as it does
// KERNEL.
#define FAMILY(name, Args, n_threads, min_blocks, smem) \
    KV_PAIRS(FAMILY_ROW, name, Args, n_threads, min_blocks, smem)
#define KEY_FAMILY(name, Args, n_threads, min_blocks, smem) \
    KV_KEYS(FAMILY_ROW, name, Args, n_threads, min_blocks, smem)
#define FAMILY_ROW(D, K, V, variant, name, Args, n_threads, min_blocks, smem)    \
    KERNEL(name##_##variant, Args, n_threads, min_blocks, smem<D, K<D>, V<D>>) { \
        body<D, K<D>, V<D>>(args);                                               \
    }

static_assert(WIDE_SLOTS * 32 * 2 <= Int4<32>::BYTES, "a strip has room for a first page's rows");

// What attention counts slots from.
template <class K, class V>
constexpr uint32_t SKEW = K::IS_CODED || V::IS_CODED ? CODED_SKEW : 0;

// Where a strip of coded pages begins: codes and params of keys and of values. Strips of bf16 of a
// table with sealed pages are none: WideRows.
struct CodedStrip {
    const unsigned char *page;
    HeadPlace k, v;
    bool is_wide;  // the bf16 slots of a first page: row WIDE_ROW.. of the strip
};

template <int D, class K, class V, class Kv>
DEV CodedStrip coded_strip(const Kv &kv, uint32_t page, uint32_t kv_head, uint32_t first_slot) {
    const bool is_wide = !K::BY_CHANNEL && kv.is_wide(first_slot);
    const uint32_t len = is_wide ? WIDE_SLOTS : 1u << kv.page_len_log2;
    const uint32_t slot = is_wide ? 0 : kv.in_page(first_slot);
    const uint32_t k = is_wide ? BF16 : K::ID, v = is_wide ? BF16 : V::ID;
    return {kv.base + page * kv.page_bytes,
            head_place<D>(k, k, kv.n_kv_heads, len, 0, kv_head, slot),
            head_place<D>(k, v, kv.n_kv_heads, len, 1, kv_head, slot), is_wide};
}

// (warp) Stores a head where `codes` and `params` are. It is coded, a slot at a time, in lanes that
// are `active`; the others only keep the warp together.
template <int D>
DEV void encode(uint32_t coding, const float (&lo)[4], const float (&hi)[4], unsigned char *codes,
                unsigned char *params, bool active) {
    constexpr int LANES = D / 8;
    Extent extent[2];
    extent[0].add(lo);
    extent[1].add(hi);
    extent[0].reduce(LANES);
    extent[1].reduce(LANES);
    const Extent whole = extent[0].with(extent[1]);
    if (D != 128) extent[0] = extent[1] = whole;  // one group, else one in each half
    const Int4Head<D> head(extent, lo, hi);
    if (!active) return;
    if (coding == INT4) {
        head.store(codes, params);
    } else {
        encode_bytes<D>(coding, whole, lo, hi, codes, params);
    }
}
