// How much the score rows of a sequence look at each of its slots.
//
//   scores[slot] = mean over query heads and score rows of exp(q . k * scale - lse)
//
// A slot that a row does not see gets 0 from it.
//
// A warp owns 16 slots: they are the rows of an mma, packed query rows (row * group_size + head,
// eight at a time) its columns, and each lane sums over its columns in order. K is read once, from
// global memory into fragments, 16 bytes at a time: inside each 32 dimensions, lane % 4 takes the
// eight that follow one another where the fragment map has four pairs. Q is read in the same way,
// and a dot product does not mind the order of its terms. Codes become bf16 on the way; scale and
// zero come in behind the products. Memory-bound: the bytes of a slot and kv head, 2 * head_dim in
// bf16.
#include "kv_format.cuh"
#include "softmax_state.cuh"

constexpr int N_WARPS = 4, WARP_SLOTS = 16;

// Two mma operands' worth of a row: x, y are k pairs of the first, z, w of the second.
template <int D>
DEV void load_row(uint4 (&to)[D / 32], const uint16_t *row_gmem, bool is_valid) {
    for (int k = 0; k < D / 32; k++)
        to[k] =
            is_valid ? prim::ld16(row_gmem + k * 32 + (prim::lane() & 3) * 8) : uint4{0, 0, 0, 0};
}

// The same of a row of codes.
template <int D, uint32_t K>
DEV void load_codes(uint4 (&to)[D / 32], const unsigned char *codes_gmem, bool is_valid) {
    const int t = prim::lane() & 3;
    for (int k = 0; k < D / 32; k++) {
        to[k] = {};
        if (!is_valid) continue;
        uint2 codes;
        if constexpr (K == INT4) {  // eight bytes have 8 t .. below or above
            codes = *reinterpret_cast<const uint2 *>(codes_gmem + k * 16 + (t & 1) * 8);
            codes.x >>= t / 2 * 4, codes.y >>= t / 2 * 4;
        } else {
            codes = *reinterpret_cast<const uint2 *>(codes_gmem + k * 32 + t * 8);
        }
        const uint2 first = four<K>(codes.x), second = four<K>(codes.y);
        to[k] = {first.x, first.y, second.x, second.y};
    }
}

// Keys of format K, IS_CODED if they lie in pages of which the first has bf16 rows.
template <int D, uint32_t K, bool IS_CODED>
DEV void body(const TokenScoreArgs &args) {
    constexpr uint32_t SKEW = IS_CODED ? LORIS_KV_SKEW : 0;
    constexpr int GROUPS = N_GROUPS<K, D>, GROUP_STEPS = D / 32 / GROUPS;
    const LorisSeq seq = args.batch.seqs[args.seq_idx];
    const PagedKv<SKEW> kv(args.pages, args.batch, seq, args.layer);
    const uint32_t group_size = args.n_q_heads / args.pages.n_kv_heads;
    const uint32_t n_packed = args.n_score_rows * group_size;
    const uint32_t first_slot = (blockIdx.x * N_WARPS + prim::warp()) * WARP_SLOTS;
    if (first_slot >= kv.end()) return;
    const int lane = prim::lane();
    const uint32_t slots[2] = {first_slot + lane / 4, first_slot + lane / 4 + 8};
    const float scale = args.scale * LOG2_E;

    // Where the warp's slots lie: in one page.
    const bool is_wide = kv.is_wide(first_slot);
    const uint32_t len = is_wide ? LORIS_KV_WIDE : 1u << kv.page_len_log2;
    const uint32_t in_page = is_wide ? -SKEW : kv.in_page(first_slot);
    const uint32_t format = is_wide ? BF16 : K;
    const unsigned char *page = kv.base + kv.page(first_slot) * kv.page_bytes;

    float sum[2] = {};
    for (uint32_t kv_head = 0; kv_head < kv.n_kv_heads; kv_head++) {
        uint4 a[2][D / 32];
        Params of[2][GROUPS];
        for (int i = 0; i < 2; i++) {
            const bool is_used = kv.is_used(slots[i]);
            const HeadPlace place = head_place<D>(format, format, kv.n_kv_heads, len, 0, kv_head,
                                                  in_page + slots[i] - first_slot);
            const unsigned char *codes = page + place.codes;
            for (int g = 0; g < GROUPS; g++) of[i][g] = {1.0f, 0.0f};
            if (K == BF16 || is_wide) {
                load_row<D>(a[i], reinterpret_cast<const uint16_t *>(codes), is_used);
            } else if constexpr (K != BF16) {
                load_codes<D, K>(a[i], codes, is_used);
                for (int g = 0; g < GROUPS && is_used; g++)
                    of[i][g] = params_of<K, D>(page + place.params, 0, g);
            }
        }
        for (uint32_t first = 0; first < n_packed; first += 8) {
            const uint32_t mine =
                first + lane / 4;  // the packed row that this lane loads for the warp
            const uint32_t row = args.row_start + mine / group_size;
            const uint32_t row_head =
                row * args.n_q_heads + kv_head * group_size + mine % group_size;
            uint4 b[D / 32];
            load_row<D>(b, args.q + static_cast<uint64_t>(row_head) * D, mine < n_packed);
            float s[4] = {};
#pragma unroll
            for (int g = 0; g < GROUPS; g++) {
                float dot[4] = {}, q_sum[4] = {};  // q_sum: of each column, in every row
#pragma unroll
                for (int k = g * GROUP_STEPS; k < (g + 1) * GROUP_STEPS; k++) {
                    prim::mma_bf16(dot, {a[0][k].x, a[1][k].x, a[0][k].y, a[1][k].y}, b[k].x,
                                   b[k].y);
                    prim::mma_bf16(dot, {a[0][k].z, a[1][k].z, a[0][k].w, a[1][k].w}, b[k].z,
                                   b[k].w);
                    if constexpr (K == INT4) {
                        constexpr uint32_t ONE = BF16_ONES;
                        prim::mma_bf16(q_sum, {ONE, ONE, ONE, ONE}, b[k].x, b[k].y);
                        prim::mma_bf16(q_sum, {ONE, ONE, ONE, ONE}, b[k].z, b[k].w);
                    }
                }
                for (int e = 0; e < 4; e++) {
                    if constexpr (K == BF16) {
                        s[e] = dot[e];
                    } else {
                        s[e] = fmaf(dot[e], of[e / 2][g].scale, s[e]);
                        if (K == INT4) s[e] = fmaf(q_sum[e], of[e / 2][g].zero, s[e]);
                    }
                }
            }
            for (int e = 0; e < 2; e++) {
                const uint32_t packed = first + (lane & 3) * 2 + e;
                if (packed >= n_packed) continue;
                const uint32_t r = args.row_start + packed / group_size;
                const float lse =
                    args.lse[r * args.n_q_heads + kv_head * group_size + packed % group_size];
                const Range seen =
                    seen_by(seq, Meets::WINDOW, args.batch.positions[r], args.window);
                for (int i = 0; i < 2; i++)
                    if (kv.is_seen(slots[i], seen))
                        sum[i] += prim::exp2_fast(fmaf(s[i * 2 + e], scale, -lse * LOG2_E));
            }
        }
    }

    for (int i = 0; i < 2; i++) {
        sum[i] += prim::shfl_xor(sum[i], 1);
        sum[i] += prim::shfl_xor(sum[i], 2);
        if ((lane & 3) == 0 && kv.is_used(slots[i]))
            args.scores[slots[i] - SKEW] =
                sum[i] / static_cast<float>(args.n_score_rows * args.n_q_heads);
    }
}

KERNEL(token_score_d32, TokenScoreArgs, 128, 4) {  // <= 128 registers
    body<32, BF16, false>(args);
}
KERNEL(token_score_d64, TokenScoreArgs, 128, 4) {  // <= 128 registers
    body<64, BF16, false>(args);
}
KERNEL(token_score_d128, TokenScoreArgs, 128, 4) {  // <= 128 registers
    body<128, BF16, false>(args);
}
KERNEL(token_score_d32_kbf16, TokenScoreArgs, 128, 4) {  // <= 128 registers
    body<32, BF16, true>(args);
}
KERNEL(token_score_d64_kbf16, TokenScoreArgs, 128, 4) {  // <= 128 registers
    body<64, BF16, true>(args);
}
KERNEL(token_score_d128_kbf16, TokenScoreArgs, 128, 4) {  // <= 128 registers
    body<128, BF16, true>(args);
}
KERNEL(token_score_d32_kfp8, TokenScoreArgs, 128, 4) {  // <= 128 registers
    body<32, FP8, true>(args);
}
KERNEL(token_score_d64_kfp8, TokenScoreArgs, 128, 4) {  // <= 128 registers
    body<64, FP8, true>(args);
}
KERNEL(token_score_d128_kfp8, TokenScoreArgs, 128, 4) {  // <= 128 registers
    body<128, FP8, true>(args);
}
KERNEL(token_score_d32_kint8, TokenScoreArgs, 128, 4) {  // <= 128 registers
    body<32, INT8, true>(args);
}
KERNEL(token_score_d64_kint8, TokenScoreArgs, 128, 4) {  // <= 128 registers
    body<64, INT8, true>(args);
}
KERNEL(token_score_d128_kint8, TokenScoreArgs, 128, 4) {  // <= 128 registers
    body<128, INT8, true>(args);
}
KERNEL(token_score_d32_kint4, TokenScoreArgs, 128, 4) {  // <= 128 registers
    body<32, INT4, true>(args);
}
KERNEL(token_score_d64_kint4, TokenScoreArgs, 128, 4) {  // <= 128 registers
    body<64, INT4, true>(args);
}
KERNEL(token_score_d128_kint4, TokenScoreArgs, 128, 4) {  // <= 128 registers
    body<128, INT4, true>(args);
}
