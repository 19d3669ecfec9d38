// One split of decode attention: a row's query against LORIS_SPLIT_LEN slots of its sequence.
//
//   partial_out[row][h][split] = sum over the split's slots of 2^(x - row_max) v
//   partial_ml [row][h][split] = row_max, row_sum
//
// A block is (split, kv head, row). The query heads of a group are the 16 rows of an mma, so that K
// and V are read once for all of them; rows beyond the group are zero. Splits begin at multiples of
// LORIS_SPLIT_LEN, each warp takes every fourth strip, and the warps' parts are put
// together in order: what a split gives depends on nothing but its slots.
//
//   slots of a split:  | w0 | w1 | w2 | w3 | w0 | w1 | w2 | w3 | ...    step 0, step 1, ...
//
// In a stream that is full the block of the first split goes over its slots twice: with the query
// turned it meets the sinks, and as it is what the window has there.
//
// Memory-bound: the bytes of K and V of a slot and kv head, 4 * head_dim in bf16. Each warp has
// N_STAGES strips of K and V on the way, 64 KiB a block at head_dim 128, and three blocks an SM.
// Only strips in which the row sees something are read.
//
// Codes are read as they are, and become bf16 on their way from shared memory into fragments: the
// four dimensions 4 t + i of each 16 that lane % 4 = t finds in a word of codes are its four places
// in the fragment of K, and Q is read in that order. In the transposed codes of V a lane finds two
// slots of dimensions 2 c and 2 c + 1, c = lane / 4: even dimensions of each 16 are one tile of O,
// odd ones the next.
//
// Where pages are sealed a strip is either codes, with what the channels of its page stand for
// behind those of K, or 16 rows of bf16, of the first page or the tail: a stage has room for those.
#include "kv/coding.cuh"
#include "rotation.cuh"
#include "softmax_state.cuh"

constexpr int N_WARPS = 4, N_THREADS = N_WARPS * 32;
constexpr int N_HEADS = 16;  // rows of an mma
constexpr int STEP_SLOTS = N_WARPS * STRIP_SLOTS;
constexpr int N_STEPS = LORIS_SPLIT_LEN / STEP_SLOTS;
static_assert(N_STEPS == 4 && STRIP_SLOTS * 2 == 32, "visibility is two words a warp");

// Strips of K and V on the way; afterwards the warps' sums, their rows padded against bank
// conflicts.
template <int D, class K>
constexpr int K_STAGE_BYTES = K::BY_CHANNEL ? Bf16<D>::BYTES : K::BYTES;
template <int D, class K, class V>
constexpr int STAGE_BYTES = K_STAGE_BYTES<D, K> + (K::BY_CHANNEL ? Bf16<D>::BYTES : V::BYTES);
template <int D, class K, class V>
constexpr int N_STAGES = N_WARPS * 4 * STAGE_BYTES<D, K, V> <= 68 * 1024 ? 4 : 2;
template <int D, class K, class V>
constexpr int RING_BYTES = N_WARPS * N_STAGES<D, K, V> * STAGE_BYTES<D, K, V>;
template <int D>
constexpr int SUM_STRIDE = D + 8;
static_assert(N_WARPS * N_HEADS * SUM_STRIDE<32> * 4 <= RING_BYTES<32, Int4<32>, Int4<32>>,
              "they fit");
static_assert(N_WARPS * N_HEADS * SUM_STRIDE<64> * 4 <= RING_BYTES<64, Int4<64>, Int4<64>>,
              "they fit");
static_assert(N_WARPS * N_HEADS * SUM_STRIDE<128> * 4 <= RING_BYTES<128, Int4<128>, Int4<128>>,
              "they fit");
// Q, the ring, and row_max and row_sum of each warp.
template <int D, class K, class V>
constexpr int SMEM_BYTES = N_HEADS * D * 2 + RING_BYTES<D, K, V> + N_WARPS * N_HEADS * 8;

// What a warp has summed: O, in the order of dimensions of V's fragments, and what V's zeros add to
// all dimensions of a group, of rows lane / 4 and lane / 4 + 8.
template <int D, class V>
struct Sums {
    float o[D / 8][4] = {};
    float zero[V::GROUPS][2] = {};

    DEV void scale(int r, float factor) {
        for (int n = 0; n < D / 8; n++)
            for (int e = 0; e < 2; e++) o[n][r * 2 + e] *= factor;
        if (V::HAS_ZERO)
            for (int g = 0; g < V::GROUPS; g++) zero[g][r] *= factor;
    }

    // Row r of O to shared memory.
    DEV void store(int r, float *row_smem) {
        const int t = prim::lane() & 3;
        if constexpr (!V::IS_CODED) {
            for (int n = 0; n < D / 8; n++)
                *reinterpret_cast<float2 *>(row_smem + n * 8 + t * 2) =
                    float2{o[n][r * 2], o[n][r * 2 + 1]};
        } else {
#pragma unroll
            for (int n = 0; n < D / 8; n += 2) {
                const float z = zero[n * 8 / (D / V::GROUPS)][r];
                *reinterpret_cast<float4 *>(row_smem + n * 8 + t * 4) =
                    float4{o[n][r * 2] + z, o[n + 1][r * 2] + z, o[n][r * 2 + 1] + z,
                           o[n + 1][r * 2 + 1] + z};
            }
        }
    }
};

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

// What a block works on.
template <class K, class V>
struct Split {
    LorisSeq seq;
    PagedKv<SKEW<K, V>, K::BY_CHANNEL> kv;
    uint32_t position, first_slot;

    DEV explicit Split(const AttentionDecodeArgs &args)
        : seq(args.batch.seqs[args.batch.row_seq[blockIdx.z]]),
          kv(args.pages, args.batch, seq, args.layer),
          position(args.batch.positions[blockIdx.z]),
          first_slot(blockIdx.x * LORIS_SPLIT_LEN) {
        if (blockIdx.x > 0) first_slot += n_skipped_splits(seq) * LORIS_SPLIT_LEN;
    }

    // Where slots are positions, a split behind what a row sees or before it is known at once.
    DEV bool has_some(Range seen) const {
        if (seen.lo == seen.hi) return false;
        return kv.slot_positions != nullptr ||
               (first_slot < seen.hi + SKEW<K, V> &&
                first_slot + LORIS_SPLIT_LEN > seen.lo + SKEW<K, V>);
    }
};

// Adds the slots of the split that the row sees of those that it meets. What is known of the split
// is read anew, as there are registers for what is summed and little else.
template <int D, class K, class V>
DEV void add_slots(const AttentionDecodeArgs &args, Meets meets, SoftmaxState (&state)[2],
                   Sums<D, V> &sums) {
    constexpr int ROW_BYTES = D * 2, CHUNKS = D / 8, N_K = D / 16, STAGES = N_STAGES<D, K, V>;
    constexpr bool IS_CODED = SKEW<K, V> != 0, SEALED = K::BY_CHANNEL;
    using Rows = WideRows<D, SEALED>;
    const int lane = prim::lane(), warp = prim::warp();

    const Split<K, V> split(args);
    const auto &kv = split.kv;
    const Range range = seen_by(split.seq, meets, split.position, args.window);
    if (!split.has_some(range)) return;
    const uint32_t first_slot = split.first_slot, kv_head = blockIdx.y;
    const int group_size = args.n_q_heads / args.pages.n_kv_heads;
    const uint32_t row_head = blockIdx.z * args.n_q_heads + kv_head * group_size;

    unsigned char *q_smem = prim::smem();
    unsigned char *ring_smem = q_smem + N_HEADS * ROW_BYTES;
    unsigned char *warp_smem = ring_smem + warp * STAGES * STAGE_BYTES<D, K, V>;

    for (int i = threadIdx.x; i < N_HEADS * CHUNKS; i += N_THREADS) {
        int head = i / CHUNKS, chunk = i % CHUNKS;
        const uint16_t *from = args.q + static_cast<uint64_t>(row_head) * D + i * 8;
        prim::cp_async16_or_zero(q_smem + swizzle<ROW_BYTES>(head, chunk),
                                 head < group_size ? from : args.q, head < group_size);
    }
    prim::cp_commit();

    // Which of the warp's slots the row sees, one bit each, and the pages of its strips, one a
    // lane.
    auto strip_slot = [&](int step) { return first_slot + step * STEP_SLOTS + warp * STRIP_SLOTS; };
    const uint32_t page =
        strip_slot(lane % N_STEPS) < kv.end() ? kv.page(strip_slot(lane % N_STEPS)) : 0;
    uint32_t visible[N_STEPS / 2];
    for (int i = 0; i < N_STEPS / 2; i++) {
        uint32_t slot = strip_slot(2 * i + lane / STRIP_SLOTS) + lane % STRIP_SLOTS;
        visible[i] = prim::ballot(kv.is_seen(slot, range));
    }
    auto seen = [&](int step) { return visible[step / 2] >> (step % 2 * STRIP_SLOTS) & 0xffffu; };
    auto is_wide = [&](int step) {
        return IS_CODED && (SEALED || step == 0) && kv.is_wide(strip_slot(step));
    };
    auto k_stage = [&](int step) { return warp_smem + step % STAGES * STAGE_BYTES<D, K, V>; };
    auto v_stage = [&](int step) { return k_stage(step) + K_STAGE_BYTES<D, K>; };
    auto copy = [&](int step) {
        if (SEALED && step < N_STEPS && seen(step) != 0 && is_wide(step)) {
            Rows::copy(k_stage(step), 0, kv, strip_slot(step), kv_head, 0);
            Rows::copy(v_stage(step), 0, kv, strip_slot(step), kv_head, 1);
        } else if (step < N_STEPS && seen(step) != 0) {
            const int n_valid = kv.end() - strip_slot(step);
            const CodedStrip strip =
                coded_strip<D, K, V>(kv, prim::shfl(page, step), kv_head, strip_slot(step));
            if (!SEALED && is_wide(step)) {
                copy_rows<WIDE_SLOTS, ROW_BYTES>(k_stage(step), strip.page + strip.k.codes,
                                                 n_valid - WIDE_ROW);
                copy_rows<WIDE_SLOTS, ROW_BYTES>(v_stage(step), strip.page + strip.v.codes,
                                                 n_valid - WIDE_ROW);
            } else {
                K::copy(k_stage(step), strip.page, strip.k, n_valid);
                V::copy(v_stage(step), strip.page, strip.v, n_valid);
            }
        }
        prim::cp_commit();
    };
#pragma unroll
    for (int step = 0; step < STAGES; step++) copy(step);

    prim::cp_wait<STAGES>();
    prim::block_sync();
    if (meets == Meets::SINKS) {
        constexpr int HEADS = HeadGroup<D>::HEADS;
        const float *angles = args.batch.sink_cos_sin + static_cast<uint64_t>(blockIdx.z) * D;
        for (int head = warp * HEADS; head < N_HEADS; head += N_WARPS * HEADS)
            turn_queries<D>(q_smem, head + HeadGroup<D>::idx(), angles, args.pages.k_rotated);
        prim::block_sync();
    }
    uint32_t q[N_K][4];
    K::load_q(q, q_smem);
    float q_sum[K::GROUPS][2] = {};
    if (K::HAS_ZERO) {
#pragma unroll
        for (int g = 0; g < K::GROUPS; g++) {
            float sum[4] = {};
            for (int k = 0; k < N_K / K::GROUPS; k++)
                prim::mma_bf16(sum, q[g * (N_K / K::GROUPS) + k], BF16_ONES, BF16_ONES);
            q_sum[g][0] = sum[0], q_sum[g][1] = sum[2];
        }
    }

    const float scale = args.scale * LOG2_E;
#pragma unroll
    for (int step = 0; step < N_STEPS; step++) {
        prim::cp_wait<STAGES - 1>();
        prim::warp_sync();
        if (seen(step) != 0) {
            // S = Q K^T, and -inf for slots that the row does not see.
            float s[2][4] = {};
            if (is_wide(step)) {
                Rows::template scores<K::IS_CODED>(s, q, k_stage(step));
            } else {
                K::scores(s, q, q_sum, k_stage(step));
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
                    sums.scale(r, state[r].raise(tile_max[r]));
                }
            }

            // O += P V
            for (int i = 0; i < 4; i++) {
                const int r = i % 2;
                float *p = &s[i / 2][r * 2];
                p[0] = prim::exp2_fast(p[0] - state[r].row_max);
                p[1] = prim::exp2_fast(p[1] - state[r].row_max);
                state[r].row_sum += p[0] + p[1];
            }
            if (is_wide(step)) {
                Rows::add(sums.o, s, v_stage(step));
            } else {
                V::add(sums.o, sums.zero, s, mine, v_stage(step));
            }
        }
        prim::warp_sync();
        copy(step + STAGES);
    }
    prim::cp_wait<0>();
    prim::block_sync();
}

template <int D, class K, class V>
DEV void body(const AttentionDecodeArgs &args) {
    const int lane = prim::lane(), warp = prim::warp();
    const int group_size = args.n_q_heads / args.pages.n_kv_heads;
    const uint32_t row_head = blockIdx.z * args.n_q_heads + blockIdx.y * group_size;
    const uint64_t part = static_cast<uint64_t>(row_head) * args.max_splits + blockIdx.x;
    float *ml_gmem = args.partial_ml + part * 2, *out_gmem = args.partial_out + part * D;
    {
        const Split<K, V> split(args);
        if (split.first_slot >= split.kv.end()) return;
        auto has_some = [&](Meets meets) {
            return split.has_some(seen_by(split.seq, meets, split.position, args.window));
        };
        if (!has_some(Meets::SINKS) && !has_some(Meets::WINDOW)) {
            if (threadIdx.x < group_size) {
                ml_gmem[threadIdx.x * args.max_splits * 2] = SoftmaxState::NOTHING;
                ml_gmem[threadIdx.x * args.max_splits * 2 + 1] = 0.0f;
            }
            return;
        }
    }

    SoftmaxState state[2];  // of rows lane / 4 and lane / 4 + 8
    Sums<D, V> sums;
    // Tables with sealed pages are no stream's.
#pragma unroll 1
    for (int i = K::BY_CHANNEL ? 1 : 0; i < 2; i++)
        add_slots<D, K, V>(args, i == 0 ? Meets::SINKS : Meets::WINDOW, state, sums);

    // Each warp's sums to shared memory.
    unsigned char *ring_smem = prim::smem() + N_HEADS * D * 2;
    float *sum_smem = reinterpret_cast<float *>(ring_smem);  // [warp][head][SUM_STRIDE]
    float *ml_smem = reinterpret_cast<float *>(ring_smem + RING_BYTES<D, K, V>);  // [warp][head][2]
#pragma unroll
    for (int r = 0; r < 2; r++) {
        state[r].row_sum += prim::shfl_xor(state[r].row_sum, 1);
        state[r].row_sum += prim::shfl_xor(state[r].row_sum, 2);
        if (V::HAS_ZERO)
            for (int g = 0; g < V::GROUPS; g++) {
                sums.zero[g][r] += prim::shfl_xor(sums.zero[g][r], 1);
                sums.zero[g][r] += prim::shfl_xor(sums.zero[g][r], 2);
            }
        const int head = lane / 4 + r * 8;
        if (head < group_size) {
            sums.store(r, sum_smem + (warp * N_HEADS + head) * SUM_STRIDE<D>);
            if ((lane & 3) == 0) {
                ml_smem[(warp * N_HEADS + head) * 2] = state[r].row_max;
                ml_smem[(warp * N_HEADS + head) * 2 + 1] = state[r].row_sum;
            }
        }
    }
    prim::block_sync();

    store_sums<D>(args, sum_smem, ml_smem, out_gmem, ml_gmem);
}

FAMILY(attention_decode, AttentionDecodeArgs, 128, 3, SMEM_BYTES)  // <= 168, d32 128 registers
