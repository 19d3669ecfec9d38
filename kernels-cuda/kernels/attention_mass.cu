// How much the score rows of a sequence look at each of its slots.
//
//   scores[slot] += sum over score rows of the mean over query heads of exp(q . k * scale - lse)
//
// A slot that a row does not see gets 0 from it.
//
// A warp owns 16 slots: they are the rows of an mma, and queries its eight columns. The heads of a
// row that share a kv head stand side by side and take a power of two of columns, some of them
// empty where the heads are fewer. K is read once, from global memory into fragments, 16 bytes at a
// time: inside each 32 dimensions, lane % 4 takes the eight that follow one another where the
// fragment map has four pairs. Q is read in the same way, and a dot product does not mind the order
// of its terms. Codes become bf16 on the way; scale and zero come in behind the products, those of
// channels with the codes.
//
// What a row pays a slot is summed over a group of heads by a tree, and in shared memory over the
// groups; then rows are added to the score one after another. So a score does not depend on which
// rows come in one launch. Memory-bound: the bytes of a slot and kv head, 2 * head_dim in bf16.
#include "kv/coding.cuh"
#include "softmax_state.cuh"

constexpr int N_WARPS = 4, WARP_SLOTS = 16;

// Two mma operands' worth of a row: x, y are k pairs of the first, z, w of the second.
template <int D>
DEV void load_row(uint4 (&to)[D / 32], const uint16_t *row_gmem, bool is_valid) {
    for (int k = 0; k < D / 32; k++)
        to[k] =
            is_valid ? prim::ld16(row_gmem + k * 32 + (prim::lane() & 3) * 8) : uint4{0, 0, 0, 0};
}

// The same of a row of codes, whose channels may have params.
template <int D, class K>
DEV void load_codes(uint4 (&to)[D / 32], const unsigned char *codes_gmem,
                    const unsigned char *params_gmem, bool is_valid) {
    const int t = prim::lane() & 3;
#pragma unroll
    for (int k = 0; k < D / 32; k++) {
        to[k] = {};
        if (!is_valid) continue;
        uint2 codes;
        if constexpr (K::BITS < 8) {  // eight bytes have 8 t .. in some of their bits
            constexpr int BITS = K::BITS, N_PARTS = 8 / BITS;
            const int part = k * 2 + t / 2;  // 16 numbers of the row
            const unsigned char *at = codes_gmem + part / N_PARTS * 16 + (t & 1) * 8;
            codes = *reinterpret_cast<const uint2 *>(at);
            codes.x >>= part % N_PARTS * BITS, codes.y >>= part % N_PARTS * BITS;
        } else {
            codes = *reinterpret_cast<const uint2 *>(codes_gmem + k * 32 + t * 8);
        }
        to[k] =
            K::template numbers<K::BY_CHANNEL>(codes.x, codes.y, {}, params_gmem, k * 32 + t * 8);
    }
}

template <int D, class K, class V>
DEV void body(const AttentionMassArgs &args) {
    constexpr uint32_t SKEW = ::SKEW<K, V>;
    constexpr int GROUPS = K::GROUPS, GROUP_STEPS = D / 32 / GROUPS;
    const LorisSeq seq = args.batch.seqs[args.seq_idx];
    const PagedKv<SKEW, K::BY_CHANNEL> kv(args.pages, args.batch, seq, args.layer);
    const uint32_t group_size = args.n_q_heads / args.pages.n_kv_heads;
    uint32_t columns_log2 = 0;  // of a row
    while (1u << columns_log2 < group_size) columns_log2++;
    const uint32_t first_slot = (blockIdx.x * N_WARPS + prim::warp()) * WARP_SLOTS;
    if (first_slot >= kv.end()) return;
    const int lane = prim::lane();
    const uint32_t slots[2] = {first_slot + lane / 4, first_slot + lane / 4 + 8};
    const float scale = args.scale * LOG2_E;

    // What each row pays the warp's slots: [n_mass_rows][WARP_SLOTS]. A place is one lane's until
    // all kv heads are done.
    float *paid_smem = prim::smem<float>() + prim::warp() * args.n_mass_rows * WARP_SLOTS;
    for (uint32_t i = lane; i < args.n_mass_rows * WARP_SLOTS; i += 32) paid_smem[i] = 0.0f;
    prim::warp_sync();

    // Where the warp's slots lie: in one page, but for those of a tail.
    const bool is_wide = kv.is_wide(first_slot);
    const uint32_t len = is_wide ? WIDE_SLOTS : 1u << kv.page_len_log2;
    const uint32_t in_page = is_wide ? -SKEW : kv.in_page(first_slot);
    const uint32_t coding = is_wide ? BF16 : K::ID;
    const unsigned char *page = kv.base + kv.page(first_slot) * kv.page_bytes;

    for (uint32_t kv_head = 0; kv_head < kv.n_kv_heads; kv_head++) {
        uint4 a[2][D / 32];
        Params of[2][GROUPS];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const bool is_used = kv.is_used(slots[i]);
            const HeadPlace place = head_place<D>(coding, coding, kv.n_kv_heads, len, 0, kv_head,
                                                  in_page + slots[i] - first_slot);
            const unsigned char *codes = page + place.codes;
            if (K::BY_CHANNEL && is_wide && is_used) codes = wide_row<D>(kv, slots[i], kv_head, 0);
            for (int g = 0; g < GROUPS; g++) of[i][g] = {1.0f, 0.0f};
            if (!K::IS_CODED || is_wide) {
                load_row<D>(a[i], reinterpret_cast<const uint16_t *>(codes), is_used);
            } else if constexpr (K::IS_CODED) {
                const unsigned char *params = page + place.params;
                load_codes<D, K>(a[i], codes, params, is_used);
                if constexpr (K::HAS_PARAMS)
                    for (int g = 0; g < GROUPS && is_used; g++)
                        of[i][g] = K::params_of(params, 0, g);
            }
        }
        for (uint32_t first = 0; first < args.n_mass_rows << columns_log2; first += 8) {
            // The row and head of a column, and whether they are there.
            auto row_of = [&](uint32_t column) { return column >> columns_log2; };
            auto head_of = [&](uint32_t column) { return column & ((1u << columns_log2) - 1); };
            auto is_there = [&](uint32_t column) {
                return row_of(column) < args.n_mass_rows && head_of(column) < group_size;
            };
            auto row_head = [&](uint32_t column) {
                return (args.row_start + row_of(column)) * args.n_q_heads + kv_head * group_size +
                       head_of(column);
            };
            const uint32_t mine = first + lane / 4;  // the column that this lane loads for the warp
            uint4 b[D / 32];
            load_row<D>(b, args.q + static_cast<uint64_t>(row_head(mine)) * D, is_there(mine));
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
                    if constexpr (K::HAS_ZERO) {
                        constexpr uint32_t ONE = BF16_ONES;
                        prim::mma_bf16(q_sum, {ONE, ONE, ONE, ONE}, b[k].x, b[k].y);
                        prim::mma_bf16(q_sum, {ONE, ONE, ONE, ONE}, b[k].z, b[k].w);
                    }
                }
                for (int e = 0; e < 4; e++) {
                    if constexpr (!K::HAS_PARAMS) {
                        s[e] = dot[e];
                    } else {
                        s[e] = fmaf(dot[e], of[e / 2][g].scale, s[e]);
                        if (K::HAS_ZERO) s[e] = fmaf(q_sum[e], of[e / 2][g].zero, s[e]);
                    }
                }
            }
            float paid[2][2] = {};  // by the slots of this lane and its two columns
            const uint32_t column = first + (lane & 3) * 2;
            for (int e = 0; e < 2; e++) {
                if (!is_there(column + e)) continue;
                const float lse = args.lse[row_head(column + e)];
                const uint32_t position = args.batch.positions[args.row_start + row_of(column + e)];
                const Range seen = seen_by(seq, Meets::WINDOW, position, args.window);
                for (int i = 0; i < 2; i++)
                    if (kv.is_seen(slots[i], seen))
                        paid[i][e] = prim::exp2_fast(fmaf(s[i * 2 + e], scale, -lse * LOG2_E));
            }
            for (int i = 0; i < 2; i++) {
                if (columns_log2 > 0) paid[i][0] += paid[i][1];
                if (columns_log2 > 1) paid[i][0] += prim::shfl_xor(paid[i][0], 1);
                if (columns_log2 > 2) paid[i][0] += prim::shfl_xor(paid[i][0], 2);
                float *to = paid_smem + row_of(column) * WARP_SLOTS + lane / 4 + i * 8;
                const bool begins_row = columns_log2 < 3 ? head_of(column) == 0 : (lane & 3) == 0;
                if (begins_row && row_of(column) < args.n_mass_rows) *to += paid[i][0];
                if (columns_log2 == 0 && row_of(column) + 1 < args.n_mass_rows)
                    to[WARP_SLOTS] += paid[i][1];
            }
        }
    }

    prim::warp_sync();
    const uint32_t slot = first_slot + lane;
    if (lane >= WARP_SLOTS || !kv.is_used(slot)) return;
    float score = slot - SKEW < args.n_so_far ? args.scores[slot - SKEW] : 0.0f;
    const float share = 1.0f / static_cast<float>(args.n_q_heads);
    for (uint32_t row = 0; row < args.n_mass_rows; row++)
        score = fmaf(paid_smem[row * WARP_SLOTS + lane], share, score);
    args.scores[slot - SKEW] = score;
}

// What rows pay slots: as many as the launch has.
template <int D, class K, class V>
constexpr int SMEM_BYTES = 0;

KEY_FAMILY(attention_mass, AttentionMassArgs, 128, 4, SMEM_BYTES)  // <= 128 registers
