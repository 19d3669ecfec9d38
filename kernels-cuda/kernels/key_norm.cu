// How long each slot's key is: norms[slot] = mean over kv heads of sqrt(sum of k^2). The rotations
// of keys keep their length.
//
// D / 8 lanes share a slot and take eight numbers of a head each; they sum over these in order,
// over the lanes by a tree, and over the heads in order. Memory-bound: the keys, read once.
#include "heads.cuh"

constexpr int N_WARPS = 4;

// Eight numbers of a head as pairs of bf16: those of lane `l` of the D / 8, in any order.
template <class K>
DEV uint4 eight(const unsigned char *codes, int l) {
    if constexpr (!K::IS_CODED) {
        return prim::ld16(codes + l * 16);
    } else if constexpr (K::BITS == 4) {  // of four bytes, the numbers below and those above
        const uint32_t word = *reinterpret_cast<const uint32_t *>(codes + l * 4);
        const uint2 below = four<K>(word), above = four<K>(word >> 4);
        return {below.x, below.y, above.x, above.y};
    } else {
        const uint2 words = *reinterpret_cast<const uint2 *>(codes + l * 8);
        const uint2 first = four<K>(words.x), second = four<K>(words.y);
        return {first.x, first.y, second.x, second.y};
    }
}

// The sum of their squares.
template <int D, class K>
DEV float squares(const SlotHead &key, int l) {
    Params of = {1.0f, 0.0f};
    if constexpr (K::HAS_PARAMS) of = K::params_of(key.params, 0, l * K::GROUPS / (D / 8));
    const uint4 v = eight<K>(key.codes, l);
    const uint32_t pairs[4] = {v.x, v.y, v.z, v.w};
    float sum = 0.0f;
    for (uint32_t pair : pairs) {
        const float lo = fmaf(prim::bf16_lo(pair), of.scale, of.zero);
        const float hi = fmaf(prim::bf16_hi(pair), of.scale, of.zero);
        sum = fmaf(lo, lo, sum);
        sum = fmaf(hi, hi, sum);
    }
    return sum;
}

template <int D>
DEV void body(const KeyNormArgs &args) {
    constexpr int LANES = HeadGroup<D>::LANES, SLOTS = HeadGroup<D>::HEADS;
    const LorisPages &pages = args.pages;
    const uint32_t slot = (blockIdx.x * N_WARPS + prim::warp()) * SLOTS + HeadGroup<D>::idx();
    const bool is_used = slot < args.n_slots;
    const int l = prim::lane() % LANES;
    PageSlot at = {};
    if (is_used) at = page_slot(pages, args.table, args.layer, slot);

    float norm = 0.0f;
    for (uint32_t kv_head = 0; kv_head < pages.n_kv_heads; kv_head++) {
        float sum = 0.0f;
        if (is_used) {
            const SlotHead key = slot_head<D>(pages, at, 0, kv_head);
            if (key.coding == BF16) sum = squares<D, Bf16<D>>(key, l);
            if (key.coding == FP8) sum = squares<D, Fp8<D>>(key, l);
            if (key.coding == INT8) sum = squares<D, Int8<D>>(key, l);
            if (key.coding == INT4) sum = squares<D, Int4<D>>(key, l);
        }
        for (int mask = LANES / 2; mask > 0; mask /= 2) sum += prim::shfl_xor(sum, mask);
        norm += sqrtf(sum);
    }
    if (is_used && l == 0) args.norms[slot] = norm / static_cast<float>(pages.n_kv_heads);
}

KERNEL(key_norm_d32, KeyNormArgs, 32 * N_WARPS, 1, 0) { body<32>(args); }    // <= 40 registers
KERNEL(key_norm_d64, KeyNormArgs, 32 * N_WARPS, 1, 0) { body<64>(args); }    // <= 40 registers
KERNEL(key_norm_d128, KeyNormArgs, 32 * N_WARPS, 1, 0) { body<128>(args); }  // <= 40 registers
