// out = the splits of a row put together.
//
//   out[row][h] = sum over splits of w_s partial_out[row][h][s] / sum over splits of w_s row_sum_s,
//   w_s = 2^(row_max_s - max over splits of row_max)
//
// A block is (query head, row). Warp w adds up splits w, w + 8, ... in order, a lane D / 32
// dimensions of each; then the warps' sums are added in order. How many splits there are is the
// row's affair: `max_splits` is a stride. Splits are counted with those that were left out because
// their slots were given back, of which there would be nothing to add.
#include "kv/page.cuh"
#include "reduce.cuh"
#include "softmax_state.cuh"

constexpr int N_WARPS = 8;

// The sums of each warp and its row_sum.
template <int D>
constexpr int SMEM_BYTES = N_WARPS * (D + 1) * 4;

template <int D>
DEV void body(const AttentionMergeArgs &args) {
    constexpr int N_DIMS = D / 32;
    const int lane = prim::lane(), warp = prim::warp();
    const uint32_t row = blockIdx.y, row_head = row * args.n_q_heads + blockIdx.x;
    const LorisSeq seq = args.batch.seqs[args.batch.row_seq[row]];
    const uint32_t end = seq.n_gone + seq.kv_start + seq.n_rows + args.skew;
    const uint32_t n_skipped = n_skipped_splits(seq);
    const uint32_t n_splits = (end + LORIS_SPLIT_LEN - 1) / LORIS_SPLIT_LEN - n_skipped;
    const float *ml = args.partial_ml + static_cast<uint64_t>(row_head) * args.max_splits * 2;
    const float *part = args.partial_out + static_cast<uint64_t>(row_head) * args.max_splits * D;

    SoftmaxState whole;
    for (uint32_t s = lane; s < n_splits; s += 32) whole.row_max = fmaxf(whole.row_max, ml[s * 2]);
    whole.row_max = warp_max(whole.row_max);

    // This warp's splits: the first is there, those behind it from `second` on. What a split that
    // saw nothing has in partial_out is not defined: it is left out.
    const uint32_t second = 1 + (warp - 1 - n_skipped) % N_WARPS;
    float sum[N_DIMS] = {};
#pragma unroll 4
    for (uint32_t s = warp == 0 ? 0 : second; s < n_splits; s = s == 0 ? second : s + N_WARPS) {
        const SoftmaxState state = {ml[s * 2], ml[s * 2 + 1]};
        const float weight = state.weight_in(whole.row_max);
        whole.row_sum = fmaf(state.row_sum, weight, whole.row_sum);
        for (int i = 0; i < N_DIMS; i++) {
            const float x = part[static_cast<uint64_t>(s) * D + i * 32 + lane];
            sum[i] = fmaf(state.row_sum > 0.0f ? x : 0.0f, weight, sum[i]);
        }
    }

    // All warps' sums.
    float *sum_smem = prim::smem<float>();  // [warp][D]
    float *row_sum_smem = sum_smem + N_WARPS * D;
    for (int i = 0; i < N_DIMS; i++) sum_smem[warp * D + i * 32 + lane] = sum[i];
    if (lane == 0) row_sum_smem[warp] = whole.row_sum;
    prim::block_sync();
    if (threadIdx.x < D) {
        float total = 0.0f;
        whole.row_sum = 0.0f;
        for (int w = 0; w < N_WARPS; w++) {
            total += sum_smem[w * D + threadIdx.x];
            whole.row_sum += row_sum_smem[w];
        }
        total *= whole.normaliser();
        if (args.rotated) {
            sum_smem[threadIdx.x] = total;  // nobody else reads this column
        } else {
            args.out[static_cast<uint64_t>(row_head) * D + threadIdx.x] = prim::to_bf16(total);
        }
        if (args.lse != nullptr && threadIdx.x == 0) args.lse[row_head] = whole.lse();
    }

    // Values were multiplied with a Hadamard matrix over sqrt(D), which is its own inverse.
    if (!args.rotated) return;
    prim::block_sync();
    if (warp != 0) return;
    float x[N_DIMS];
    for (int i = 0; i < N_DIMS; i++) x[i] = sum_smem[i * 32 + lane];
#pragma unroll
    for (int mask = 1; mask < D; mask *= 2) {
        for (int i = 0; i < N_DIMS; i++) {
            if (mask < 32) {
                const float other = prim::shfl_xor(x[i], mask);
                x[i] = (lane & mask) != 0 ? other - x[i] : x[i] + other;
            } else if ((i & mask / 32) == 0) {
                const float a = x[i], b = x[i + mask / 32];
                x[i] = a + b, x[i + mask / 32] = a - b;
            }
        }
    }
    const float factor = 1.0f / sqrtf(static_cast<float>(D));
    for (int i = 0; i < N_DIMS; i++)
        args.out[static_cast<uint64_t>(row_head) * D + i * 32 + lane] =
            prim::to_bf16(x[i] * factor);
}

KERNEL(attention_merge_d32, AttentionMergeArgs, 256, 4, SMEM_BYTES<32>) {  // <= 64 registers
    body<32>(args);
}
KERNEL(attention_merge_d64, AttentionMergeArgs, 256, 4, SMEM_BYTES<64>) {  // <= 64 registers
    body<64>(args);
}
KERNEL(attention_merge_d128, AttentionMergeArgs, 256, 4, SMEM_BYTES<128>) {  // <= 64 registers
    body<128>(args);
}
