// One split of decode attention: a row's query against LORIS_SPLIT_LEN slots of its sequence.
//
//   partial_out[row][h][split] = sum over the split's slots of 2^(x - row_max) v
//   partial_ml [row][h][split] = row_max, row_sum
//
// A block is (split, kv head, row). The query heads of a group are the 16 rows of an mma, so that K
// and V are read once for all of them; rows beyond the group are zero. Splits begin at multiples of
// LORIS_SPLIT_LEN, each warp takes every fourth run of 16 slots, and the warps' parts are put
// together in order: what a split gives depends on nothing but its slots.
//
//   slots of a split:  | w0 | w1 | w2 | w3 | w0 | w1 | w2 | w3 | ...    step 0, step 1, ...
//
// Memory-bound: 4 * head_dim bytes a slot and kv head. Each warp has N_STAGES runs of K and V on
// the way, 64 KiB a block at head_dim 128, and three blocks an SM. Only runs in which the row sees
// something are read.
#include "kv_tile.cuh"
#include "softmax_state.cuh"

constexpr int N_WARPS = 4, N_THREADS = N_WARPS * 32;
constexpr int N_HEADS = 16;  // rows of an mma
constexpr int STEP_SLOTS = N_WARPS * RUN_SLOTS;
constexpr int N_STEPS = LORIS_SPLIT_LEN / STEP_SLOTS;
static_assert(N_STEPS == 4 && RUN_SLOTS * 2 == 32, "visibility is two words a warp");

template <int D>
constexpr int N_STAGES = D == 128 ? 2 : 4;
template <int D>
constexpr int RUN_BYTES = RUN_SLOTS * D * 2;
// Runs of K and V on the way; afterwards the warps' sums, their rows padded against bank conflicts.
template <int D>
constexpr int RING_BYTES = N_WARPS * N_STAGES<D> * 2 * RUN_BYTES<D>;
template <int D>
constexpr int SUM_STRIDE = D + 8;
static_assert(N_WARPS * N_HEADS * SUM_STRIDE<32> * 4 <= RING_BYTES<32>, "the sums fit");
static_assert(N_WARPS * N_HEADS * SUM_STRIDE<128> * 4 <= RING_BYTES<128>, "the sums fit");
// Q, the ring, and row_max and row_sum of each warp: mirrored by `ops/attention.rs`.
template <int D>
constexpr int SMEM_BYTES = N_HEADS * D * 2 + RING_BYTES<D> + N_WARPS * N_HEADS * 8;

// All warps' sums, in order, to global memory: [head][max_splits][D] and [head][max_splits][2].
template <int D>
DEV void store_sums(const AttentionDecodeArgs &args, const float *sum_smem, const float *ml_smem,
                    float *out_gmem, float *ml_gmem) {
    const int group_size = args.n_q_heads / args.pages.n_kv_heads;
    for (int i = threadIdx.x; i < group_size * (D / 4); i += N_THREADS) {
        const int head = i / (D / 4), dim = i % (D / 4) * 4;
        SoftmaxState part[N_WARPS], whole;
        for (int w = 0; w < N_WARPS; w++) {
            part[w].row_max = ml_smem[(w * N_HEADS + head) * 2];
            part[w].row_sum = ml_smem[(w * N_HEADS + head) * 2 + 1];
            whole.row_max = fmaxf(whole.row_max, part[w].row_max);
        }
        float4 sum = {};
        for (int w = 0; w < N_WARPS; w++) {
            const float weight = part[w].weight_in(whole.row_max);
            const float4 x = *reinterpret_cast<const float4 *>(
                sum_smem + (w * N_HEADS + head) * SUM_STRIDE<D> + dim);
            whole.row_sum = fmaf(part[w].row_sum, weight, whole.row_sum);
            sum = {fmaf(x.x, weight, sum.x), fmaf(x.y, weight, sum.y), fmaf(x.z, weight, sum.z),
                   fmaf(x.w, weight, sum.w)};
        }
        *reinterpret_cast<float4 *>(out_gmem + static_cast<uint64_t>(head) * args.max_splits * D +
                                    dim) = sum;
        if (dim == 0) {
            ml_gmem[head * args.max_splits * 2] = whole.row_max;
            ml_gmem[head * args.max_splits * 2 + 1] = whole.row_sum;
        }
    }
}

template <int D>
DEV void body(const AttentionDecodeArgs &args) {
    constexpr int ROW_BYTES = D * 2, CHUNKS = D / 8, N_K = D / 16;
    const int lane = prim::lane(), warp = prim::warp();

    // What the block works on.
    const uint32_t split = blockIdx.x, kv_head = blockIdx.y, row = blockIdx.z;
    const LorisSeq seq = args.batch.seqs[args.batch.row_seq[row]];
    const PagedKv kv(args.pages, args.batch, seq, args.layer);
    const uint32_t first_slot = split * LORIS_SPLIT_LEN;
    if (first_slot >= kv.kv_len) return;
    const uint32_t position = args.batch.positions[row];
    const int group_size = args.n_q_heads / args.pages.n_kv_heads;
    const uint32_t row_head = row * args.n_q_heads + kv_head * group_size;
    float *ml_gmem =
        args.partial_ml + (static_cast<uint64_t>(row_head) * args.max_splits + split) * 2;
    float *out_gmem =
        args.partial_out + (static_cast<uint64_t>(row_head) * args.max_splits + split) * D;

    // Where slots are positions, a split behind the row or before its window is known at once.
    if (kv.slot_positions == nullptr &&
        (first_slot > position ||
         position - min(first_slot + LORIS_SPLIT_LEN - 1, position) >= args.window)) {
        if (threadIdx.x < group_size) {
            ml_gmem[threadIdx.x * args.max_splits * 2] = SoftmaxState::NOTHING;
            ml_gmem[threadIdx.x * args.max_splits * 2 + 1] = 0.0f;
        }
        return;
    }

    unsigned char *q_smem = prim::smem();
    unsigned char *ring_smem = q_smem + N_HEADS * ROW_BYTES;
    unsigned char *warp_smem = ring_smem + warp * N_STAGES<D> * 2 * RUN_BYTES<D>;
    float *sum_smem =
        reinterpret_cast<float *>(ring_smem);  // [warp][head][SUM_STRIDE], once the ring is done
    float *ml_smem = reinterpret_cast<float *>(ring_smem + RING_BYTES<D>);  // [warp][head][2]

    for (int i = threadIdx.x; i < N_HEADS * CHUNKS; i += N_THREADS) {
        int head = i / CHUNKS, chunk = i % CHUNKS;
        const uint16_t *from = args.q + static_cast<uint64_t>(row_head) * D + i * 8;
        prim::cp_async16_or_zero(q_smem + swizzle<ROW_BYTES>(head, chunk),
                                 head < group_size ? from : args.q, head < group_size);
    }
    prim::cp_commit();

    // Which of the warp's slots the row sees, one bit each, and the pages of its runs, one a lane.
    auto run_slot = [&](int step) { return first_slot + step * STEP_SLOTS + warp * RUN_SLOTS; };
    const uint32_t page =
        run_slot(lane % N_STEPS) < kv.kv_len ? kv.page(run_slot(lane % N_STEPS)) : 0;
    uint32_t visible[N_STEPS / 2];
    for (int i = 0; i < N_STEPS / 2; i++) {
        uint32_t slot = run_slot(2 * i + lane / RUN_SLOTS) + lane % RUN_SLOTS;
        visible[i] = prim::ballot(kv.sees(position, slot, args.window));
    }
    auto seen = [&](int step) { return visible[step / 2] >> (step % 2 * RUN_SLOTS) & 0xffffu; };
    const uint32_t k_to_v = (kv.n_kv_heads << kv.page_len_log2) * D;
    auto copy = [&](int step) {
        if (step < N_STEPS && seen(step) != 0) {
            unsigned char *stage_smem = warp_smem + step % N_STAGES<D> * 2 * RUN_BYTES<D>;
            const int n_valid = kv.kv_len - run_slot(step);
            const uint16_t *from = reinterpret_cast<const uint16_t *>(
                                       kv.base + prim::shfl(page, step) * kv.page_bytes) +
                                   kv.offset(0, kv_head, run_slot(step), D);
            copy_run<D>(stage_smem, 0, from, n_valid);
            copy_run<D>(stage_smem + RUN_BYTES<D>, 0, from + k_to_v, n_valid);
        }
        prim::cp_commit();
    };
#pragma unroll
    for (int step = 0; step < N_STAGES<D>; step++) copy(step);

    prim::cp_wait<N_STAGES<D>>();
    prim::block_sync();
    uint32_t q[N_K][4];
#pragma unroll
    for (int k = 0; k < N_K; k++) prim::ldsm_x4(q[k], q_smem + (lane_offset_mk<D>() ^ k << 5));

    const float scale = args.scale * LOG2_E;
    SoftmaxState state[2];  // of rows lane / 4 and lane / 4 + 8
    float o[D / 8][4] = {};
#pragma unroll
    for (int step = 0; step < N_STEPS; step++) {
        prim::cp_wait<N_STAGES<D> - 1>();
        prim::warp_sync();
        const unsigned char *k_smem = warp_smem + step % N_STAGES<D> * 2 * RUN_BYTES<D>;
        const unsigned char *v_smem = k_smem + RUN_BYTES<D>;
        if (seen(step) != 0) {
            // S = Q K^T, and -inf for slots that the row does not see.
            float s[2][4] = {};
#pragma unroll
            for (int k = 0; k < N_K; k++) {
                uint32_t b[4];
                prim::ldsm_x4(b, k_smem + (lane_offset_nk<D>() ^ k << 5));
                prim::mma_bf16(s[0], q[k], b[0], b[1]);
                prim::mma_bf16(s[1], q[k], b[2], b[3]);
            }
            const uint32_t mine = seen(step) >> (lane & 3) * 2;
            float tile_max[2] = {-INFINITY, -INFINITY};
            for (int n = 0; n < 2; n++)
                for (int e = 0; e < 4; e++) {
                    s[n][e] = mine >> (n * 8 + e % 2) & 1 ? s[n][e] * scale : -INFINITY;
                    tile_max[e / 2] = fmaxf(tile_max[e / 2], s[n][e]);
                }

            // Where a row grows beyond what it is measured from, what it has summed is scaled down.
            if (prim::any(state[0].is_raised_by(tile_max[0]) |
                          state[1].is_raised_by(tile_max[1]))) {
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    tile_max[r] = fmaxf(tile_max[r], prim::shfl_xor(tile_max[r], 1));
                    tile_max[r] = fmaxf(tile_max[r], prim::shfl_xor(tile_max[r], 2));
                    const float factor = state[r].raise(tile_max[r]);
                    for (int n = 0; n < D / 8; n++)
                        for (int e = 0; e < 2; e++) o[n][r * 2 + e] *= factor;
                }
            }

            // O += P V
            uint32_t p[4];
            for (int i = 0; i < 4; i++) {
                const int n = i / 2, r = i % 2;
                const float p0 = prim::exp2_fast(s[n][r * 2] - state[r].row_max);
                const float p1 = prim::exp2_fast(s[n][r * 2 + 1] - state[r].row_max);
                state[r].row_sum += p0 + p1;
                p[i] = prim::pack_bf16(p0, p1);
            }
#pragma unroll
            for (int n = 0; n < D / 8; n += 2) {
                uint32_t b[4];
                prim::ldsm_x4_t(b, v_smem + (lane_offset_mk<D>() ^ n << 4));
                prim::mma_bf16(o[n], p, b[0], b[1]);
                prim::mma_bf16(o[n + 1], p, b[2], b[3]);
            }
        }
        prim::warp_sync();
        copy(step + N_STAGES<D>);
    }
    prim::cp_wait<0>();
    prim::block_sync();

    // Each warp's sums to shared memory.
#pragma unroll
    for (int r = 0; r < 2; r++) {
        state[r].row_sum += prim::shfl_xor(state[r].row_sum, 1);
        state[r].row_sum += prim::shfl_xor(state[r].row_sum, 2);
        const int head = lane / 4 + r * 8;
        if (head < group_size) {
            float *to = sum_smem + (warp * N_HEADS + head) * SUM_STRIDE<D> + (lane & 3) * 2;
            for (int n = 0; n < D / 8; n++)
                *reinterpret_cast<float2 *>(to + n * 8) = float2{o[n][r * 2], o[n][r * 2 + 1]};
            if ((lane & 3) == 0) {
                ml_smem[(warp * N_HEADS + head) * 2] = state[r].row_max;
                ml_smem[(warp * N_HEADS + head) * 2 + 1] = state[r].row_sum;
            }
        }
    }
    prim::block_sync();

    store_sums<D>(args, sum_smem, ml_smem, out_gmem, ml_gmem);
}

KERNEL(attention_decode_d32, AttentionDecodeArgs, 128, 3) { body<32>(args); }    // <= 128 registers
KERNEL(attention_decode_d64, AttentionDecodeArgs, 128, 3) { body<64>(args); }    // <= 168 registers
KERNEL(attention_decode_d128, AttentionDecodeArgs, 128, 3) { body<128>(args); }  // <= 168 registers
