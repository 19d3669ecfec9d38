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
// and a dot product does not mind the order of its terms. Memory-bound: 2 * head_dim bytes a slot
// and kv head.
#include "paged_kv.cuh"
#include "softmax_state.cuh"

constexpr int N_WARPS = 4, WARP_SLOTS = 16;

// Two mma operands' worth of a row: x, y are k pairs of the first, z, w of the second.
template <int D>
DEV void load_row(uint4 (&to)[D / 32], const uint16_t *row_gmem, bool is_valid) {
    for (int k = 0; k < D / 32; k++)
        to[k] =
            is_valid ? prim::ld16(row_gmem + k * 32 + (prim::lane() & 3) * 8) : uint4{0, 0, 0, 0};
}

template <int D>
DEV void body(const TokenScoreArgs &args) {
    const LorisSeq seq = args.batch.seqs[args.seq_idx];
    const PagedKv kv(args.pages, args.batch, seq, args.layer);
    const uint32_t group_size = args.n_q_heads / args.pages.n_kv_heads;
    const uint32_t n_packed = args.n_score_rows * group_size;
    const uint32_t first_slot = (blockIdx.x * N_WARPS + prim::warp()) * WARP_SLOTS;
    if (first_slot >= kv.kv_len) return;
    const int lane = prim::lane();
    const uint32_t slots[2] = {first_slot + lane / 4, first_slot + lane / 4 + 8};
    const float scale = args.scale * LOG2_E;

    float sum[2] = {};
    for (uint32_t kv_head = 0; kv_head < kv.n_kv_heads; kv_head++) {
        uint4 a[2][D / 32];
        for (int i = 0; i < 2; i++) {
            const bool is_used = slots[i] < kv.kv_len;
            load_row<D>(a[i], kv.at(0, kv_head, is_used ? slots[i] : first_slot, D), is_used);
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
            for (int k = 0; k < D / 32; k++) {
                prim::mma_bf16(s, {a[0][k].x, a[1][k].x, a[0][k].y, a[1][k].y}, b[k].x, b[k].y);
                prim::mma_bf16(s, {a[0][k].z, a[1][k].z, a[0][k].w, a[1][k].w}, b[k].z, b[k].w);
            }
            for (int e = 0; e < 2; e++) {
                const uint32_t packed = first + (lane & 3) * 2 + e;
                if (packed >= n_packed) continue;
                const uint32_t r = args.row_start + packed / group_size;
                const float lse =
                    args.lse[r * args.n_q_heads + kv_head * group_size + packed % group_size];
                const uint32_t position = args.batch.positions[r];
                for (int i = 0; i < 2; i++)
                    if (kv.sees(position, slots[i], args.window))
                        sum[i] += prim::exp2_fast(fmaf(s[i * 2 + e], scale, -lse * LOG2_E));
            }
        }
    }

    for (int i = 0; i < 2; i++) {
        sum[i] += prim::shfl_xor(sum[i], 1);
        sum[i] += prim::shfl_xor(sum[i], 2);
        if ((lane & 3) == 0 && slots[i] < kv.kv_len)
            args.scores[slots[i]] = sum[i] / static_cast<float>(args.n_score_rows * args.n_q_heads);
    }
}

KERNEL(token_score_d32, TokenScoreArgs, 128, 4) { body<32>(args); }    // <= 128 registers
KERNEL(token_score_d64, TokenScoreArgs, 128, 4) { body<64>(args); }    // <= 128 registers
KERNEL(token_score_d128, TokenScoreArgs, 128, 4) { body<128>(args); }  // <= 128 registers
