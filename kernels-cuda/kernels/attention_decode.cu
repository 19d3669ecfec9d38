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
// In a stream that is full the block of the first split goes over its slots twice: with the query
// turned it meets the sinks, and as it is what the window has there.
//
// Memory-bound: the bytes of K and V of a slot and kv head, 4 * head_dim in bf16. Each warp has
// N_STAGES runs of K and V on the way, 64 KiB a block at head_dim 128, and three blocks an SM. Only
// runs in which the row sees something are read.
//
// Codes are read as they are, and become bf16 on their way from shared memory into fragments: the
// four dimensions 4 t + i of each 16 that lane % 4 = t finds in a word of codes are its four places
// in the fragment of K, and Q is read in that order. In the transposed codes of V a lane finds two
// slots of dimensions 2 c and 2 c + 1, c = lane / 4: even dimensions of each 16 are one tile of O,
// odd ones the next.
//
// Where pages are sealed a run is either codes, with what the channels of its page stand for behind
// those of K, or 16 rows of bf16, of the first page or the tail: a stage has room for those.
#include "kv_tile.cuh"
#include "rotation.cuh"
#include "softmax_state.cuh"

constexpr int N_WARPS = 4, N_THREADS = N_WARPS * 32;
constexpr int N_HEADS = 16;  // rows of an mma
constexpr int STEP_SLOTS = N_WARPS * RUN_SLOTS;
constexpr int N_STEPS = LORIS_SPLIT_LEN / STEP_SLOTS;
static_assert(N_STEPS == 4 && RUN_SLOTS * 2 == 32, "visibility is two words a warp");

// Runs of K and V on the way; afterwards the warps' sums, their rows padded against bank conflicts.
template <int D, uint32_t K>
constexpr int K_STAGE_BYTES = RUN_BYTES < IS_BY_CHANNEL<K> ? BF16 : K,
              D > ;
template <int D, uint32_t K, uint32_t V>
constexpr int STAGE_BYTES = K_STAGE_BYTES<D, K> + RUN_BYTES < IS_BY_CHANNEL<K> ? BF16 : V,
              D > ;
template <int D, uint32_t K, uint32_t V>
constexpr int N_STAGES = N_WARPS * 4 * STAGE_BYTES<D, K, V> <= 68 * 1024 ? 4 : 2;
template <int D, uint32_t K, uint32_t V>
constexpr int RING_BYTES = N_WARPS * N_STAGES<D, K, V> * STAGE_BYTES<D, K, V>;
template <int D>
constexpr int SUM_STRIDE = D + 8;
static_assert(N_WARPS * N_HEADS * SUM_STRIDE<32> * 4 <= RING_BYTES<32, INT4, INT4>, "they fit");
static_assert(N_WARPS * N_HEADS * SUM_STRIDE<64> * 4 <= RING_BYTES<64, INT4, INT4>, "they fit");
static_assert(N_WARPS * N_HEADS * SUM_STRIDE<128> * 4 <= RING_BYTES<128, INT4, INT4>, "they fit");
// Q, the ring, and row_max and row_sum of each warp.
template <int D, uint32_t K, uint32_t V>
constexpr int SMEM_BYTES = N_HEADS * D * 2 + RING_BYTES<D, K, V> + N_WARPS * N_HEADS * 8;

// Q as fragments: in the order of dimensions of K's fragments.
template <int D, uint32_t K>
DEV void load_q(uint32_t (&q)[D / 16][4], const unsigned char *q_smem) {
    const int lane = prim::lane();
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
        if constexpr (K == BF16) {
            prim::ldsm_x4(q[k], q_smem + (lane_offset_mk<D>() ^ k << 5));
        } else {
            for (int r = 0; r < 2; r++) {  // rows lane / 4 and 8 further
                const int at = swizzle<D * 2>(lane / 4 + r * 8, 2 * k + (lane & 3) / 2);
                const uint2 dims = *reinterpret_cast<const uint2 *>(q_smem + at + (lane & 1) * 8);
                q[k][r] = low_halves(dims.x, dims.y);
                q[k][r + 2] = high_halves(dims.x, dims.y);
            }
        }
    }
}

// (warp) S = Q K^T of a run; q_sum are the sums of each group of Q's rows lane / 4 and lane / 4
// + 8.
template <int D, uint32_t K>
DEV void scores(float (&s)[2][4], const uint32_t (&q)[D / 16][4],
                const float (&q_sum)[N_GROUPS<K, D>][2], const unsigned char *k_smem) {
    constexpr int ROW_BYTES = CODE_BYTES<K, D>;
    if constexpr (K == BF16) {
#pragma unroll
        for (int k = 0; k < D / 16; k++) {
            uint32_t b[4];
            prim::ldsm_x4(b, k_smem + (lane_offset_nk<D>() ^ k << 5));
            prim::mma_bf16(s[0], q[k], b[0], b[1]);
            prim::mma_bf16(s[1], q[k], b[2], b[3]);
        }
    } else if constexpr (IS_BY_CHANNEL<K>) {
        constexpr int N_CHUNKS = ROW_BYTES / 16, BITS = CODE_BITS<K>, N_PARTS = 8 / BITS;
        const unsigned char *channels = k_smem + RUN_SLOTS * ROW_BYTES + (prim::lane() & 3) * 8;
#pragma unroll
        for (int c = 0; c < N_CHUNKS; c += 2) {
            uint32_t codes[4];  // [slots 0.., 8..][chunk c, c + 1]
            prim::ldsm_x4(codes, k_smem + (row_offset_nk<ROW_BYTES>() ^ c << 4));
#pragma unroll
            for (int i = 0; i < (N_CHUNKS == 1 ? 1 : 2) * N_PARTS; i++) {
                const int k = c * N_PARTS + i, shift = i % N_PARTS * BITS;
                const uint2 scales = *reinterpret_cast<const uint2 *>(channels + k * 32);
                const uint2 zeros = *reinterpret_cast<const uint2 *>(channels + D * 2 + k * 32);
#pragma unroll
                for (int n = 0; n < 2; n++) {
                    const uint32_t w = codes[2 * n + i / N_PARTS] >> shift;
                    prim::mma_bf16(s[n], q[k],
                                   two_values(pair<K>(w), low_halves(scales.x, scales.y),
                                              low_halves(zeros.x, zeros.y)),
                                   two_values(pair<K>(w >> 8), high_halves(scales.x, scales.y),
                                              high_halves(zeros.x, zeros.y)));
                }
            }
        }
    } else {
        constexpr int N_CHUNKS = ROW_BYTES / 16, GROUP = D / N_GROUPS<K, D>;
        float sum[N_GROUPS<K, D>][2][4] = {};
#pragma unroll
        for (int c = 0; c < N_CHUNKS; c += 2) {
            uint32_t codes[4];  // [slots 0.., 8..][chunk c, c + 1]
            prim::ldsm_x4(codes, k_smem + (row_offset_nk<ROW_BYTES>() ^ c << 4));
#pragma unroll
            for (int i = 0; i < (N_CHUNKS == 1 ? 1 : 2); i++) {
#pragma unroll
                for (int n = 0; n < 2; n++) {
                    const uint32_t w = codes[2 * n + i];
                    if constexpr (K == INT4) {
                        const int k = 2 * (c + i);
                        float (&to)[4] = sum[k * 16 / GROUP][n];
                        prim::mma_bf16(to, q[k], pair<K>(w), pair<K>(w >> 8));
                        prim::mma_bf16(to, q[k + 1], pair<K>(w >> 4), pair<K>(w >> 12));
                    } else {
                        prim::mma_bf16(sum[0][n], q[c + i], pair<K>(w), pair<K>(w >> 8));
                    }
                }
            }
        }
        const unsigned char *params = k_smem + RUN_SLOTS * ROW_BYTES;
#pragma unroll
        for (int n = 0; n < 2; n++)
            for (int e = 0; e < 2; e++)
                for (int g = 0; g < N_GROUPS<K, D>; g++) {
                    const Params p = params_of<K, D>(params, n * 8 + (prim::lane() & 3) * 2 + e, g);
                    for (int r = 0; r < 2; r++) {
                        float &to = s[n][r * 2 + e];
                        to = fmaf(sum[g][n][r * 2 + e], p.scale, to);
                        if (K == INT4) to = fmaf(q_sum[g][r], p.zero, to);
                    }
                }
    }
}

// The bf16 rows of a run of coded pages: the slots of a first page, which are the run's last, as
// they lie; where pages are sealed all 16, swizzled.
template <bool SEALED>
constexpr int FIRST_ROW = SEALED ? 0 : WIDE_ROW;
template <int D, bool SEALED>
DEV int wide_offset(int row, int byte) {
    return SEALED ? swizzle<D * 2>(row, byte / 16) + byte % 16 : row * D * 2 + byte;
}

// (warp) The same of the bf16 rows of a run.
template <int D, uint32_t K>
DEV void wide_scores(float (&s)[2][4], const uint32_t (&q)[D / 16][4],
                     const unsigned char *k_smem) {
    constexpr bool SEALED = IS_BY_CHANNEL<K>;
    const int t = prim::lane() & 3;
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
#pragma unroll
        for (int n = FIRST_ROW<SEALED> / 8; n < 2; n++) {
            const int row = n * 8 + prim::lane() / 4 - FIRST_ROW<SEALED>;
            uint32_t b[2] = {};
            if (row >= 0) {
                if constexpr (K == BF16) {
                    const unsigned char *dims = k_smem + wide_offset<D, SEALED>(row, k * 32);
                    b[0] = *reinterpret_cast<const uint32_t *>(dims + t * 4);
                    b[1] = *reinterpret_cast<const uint32_t *>(dims + t * 4 + 16);
                } else {
                    const int at = wide_offset<D, SEALED>(row, k * 32 + t * 8);
                    const uint2 four = *reinterpret_cast<const uint2 *>(k_smem + at);
                    b[0] = low_halves(four.x, four.y);
                    b[1] = high_halves(four.x, four.y);
                }
            }
            prim::mma_bf16(s[n], q[k], b[0], b[1]);
        }
    }
}

// What a warp has summed: O, in the order of dimensions of V's fragments, and what V's zeros add to
// all dimensions of a group, of rows lane / 4 and lane / 4 + 8.
template <int D, uint32_t V>
struct Sums {
    float o[D / 8][4] = {};
    float zero[N_GROUPS<V, D>][2] = {};

    DEV void scale(int r, float factor) {
        for (int n = 0; n < D / 8; n++)
            for (int e = 0; e < 2; e++) o[n][r * 2 + e] *= factor;
        if (IS_BY_GROUP<V>)
            for (int g = 0; g < N_GROUPS<V, D>; g++) zero[g][r] *= factor;
    }

    // (warp) O += P V with the bf16 slots of a run.
    DEV void add(const float (&p)[2][4], const unsigned char *v_smem) {
        uint32_t a[4];
        for (int i = 0; i < 4; i++)
            a[i] = prim::pack_bf16(p[i / 2][i % 2 * 2], p[i / 2][i % 2 * 2 + 1]);
#pragma unroll
        for (int n = 0; n < D / 8; n += 2) {
            uint32_t b[4];
            prim::ldsm_x4_t(b, v_smem + (lane_offset_mk<D>() ^ n << 4));
            prim::mma_bf16(o[n], a, b[0], b[1]);
            prim::mma_bf16(o[n + 1], a, b[2], b[3]);
        }
    }

    // (warp) The same of the bf16 rows of a run of coded pages.
    template <bool SEALED>
    DEV void add_wide(const float (&p)[2][4], const unsigned char *v_smem) {
        uint32_t a[4];
        for (int i = 0; i < 4; i++)
            a[i] = prim::pack_bf16(p[i / 2][i % 2 * 2], p[i / 2][i % 2 * 2 + 1]);
#pragma unroll
        for (int n = 0; n < D / 8; n += 2) {
            uint32_t even[2] = {}, odd[2] = {};  // of slots 0.. and 8..
#pragma unroll
            for (int h = FIRST_ROW<SEALED> / 8; h < 2; h++) {
                const int row = h * 8 + (prim::lane() & 3) * 2 - FIRST_ROW<SEALED>;
                uint32_t w[2] = {};
                for (int i = 0; i < 2 && row >= 0; i++) {
                    const int at = wide_offset<D, SEALED>(row + i, n * 16 + prim::lane() / 4 * 4);
                    w[i] = *reinterpret_cast<const uint32_t *>(v_smem + at);
                }
                even[h] = low_halves(w[0], w[1]);
                odd[h] = high_halves(w[0], w[1]);
            }
            prim::mma_bf16(o[n], a, even[0], even[1]);
            prim::mma_bf16(o[n + 1], a, odd[0], odd[1]);
        }
    }

    // (warp) The same with codes, of slots that are seen: `seen` is a bit for each, from this
    // lane's first. The params of others may be anything.
    DEV void add_coded(const float (&p)[2][4], uint32_t seen, const unsigned char *v_smem) {
        constexpr int ROW_BYTES = CODE_BYTES<V, D>, N_CHUNKS = ROW_BYTES / 16;
        constexpr int CENTRE = IS_BY_GROUP<V> ? 1 << (CODE_BITS<V> - 1) : 0;
        constexpr float centre = CENTRE;
        const unsigned char *params = v_smem + RUN_SLOTS * ROW_BYTES;
        uint32_t a[N_GROUPS<V, D>][4];
#pragma unroll
        for (int g = 0; g < N_GROUPS<V, D>; g++)
            for (int n = 0; n < 2; n++) {
                Params of[2];
                for (int e = 0; e < 2; e++) {
                    of[e] = params_of<V, D>(params, n * 8 + (prim::lane() & 3) * 2 + e, g);
                    if ((seen >> (n * 8 + e) & 1) == 0) of[e] = {0.0f, 0.0f};
                }
                for (int r = 0; r < 2; r++) {
                    const float p0 = p[n][r * 2], p1 = p[n][r * 2 + 1];
                    a[g][2 * n + r] = prim::pack_bf16(p0 * of[0].scale, p1 * of[1].scale);
                    if (IS_BY_GROUP<V>) {
                        zero[g][r] = fmaf(p0, fmaf(of[0].scale, centre, of[0].zero), zero[g][r]);
                        zero[g][r] = fmaf(p1, fmaf(of[1].scale, centre, of[1].zero), zero[g][r]);
                    }
                }
            }
#pragma unroll
        for (int c = 0; c < N_CHUNKS; c += 2) {
            uint32_t codes[4];  // [chunk c, c + 1][slots 0.., 8..]
            prim::ldsm_x4_t(codes, v_smem + (row_offset_mk<ROW_BYTES>() ^ c << 4));
#pragma unroll
            for (int i = 0; i < (N_CHUNKS == 1 ? 1 : 2); i++) {
                const uint32_t w0 = codes[2 * i], w1 = codes[2 * i + 1];
                constexpr int N_TILES = 16 / CODE_BITS<V>;  // of 16 bytes
#pragma unroll
                for (int j = 0; j < N_TILES; j++) {
                    const int n = (c + i) * N_TILES + j, shift = j % 2 * 8 + j / 2 * CODE_BITS<V>;
                    prim::mma_bf16(o[n], a[n * 8 / (D / N_GROUPS<V, D>)],
                                   pair<V, CENTRE>(w0 >> shift), pair<V, CENTRE>(w1 >> shift));
                }
            }
        }
    }

    // Row r of O to shared memory.
    DEV void store(int r, float *row_smem) {
        const int t = prim::lane() & 3;
        if constexpr (V == BF16) {
            for (int n = 0; n < D / 8; n++)
                *reinterpret_cast<float2 *>(row_smem + n * 8 + t * 2) =
                    float2{o[n][r * 2], o[n][r * 2 + 1]};
        } else {
#pragma unroll
            for (int n = 0; n < D / 8; n += 2) {
                const float z = zero[n * 8 / (D / N_GROUPS<V, D>)][r];
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
template <uint32_t K, uint32_t V>
struct Split {
    LorisSeq seq;
    PagedKv<SKEW<K, V>, IS_BY_CHANNEL<K>> kv;
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
template <int D, uint32_t K, uint32_t V>
DEV void add_slots(const AttentionDecodeArgs &args, Meets meets, SoftmaxState (&state)[2],
                   Sums<D, V> &sums) {
    constexpr int ROW_BYTES = D * 2, CHUNKS = D / 8, N_K = D / 16, STAGES = N_STAGES<D, K, V>;
    constexpr bool IS_CODED = SKEW<K, V> != 0, SEALED = IS_BY_CHANNEL<K>;
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

    // Which of the warp's slots the row sees, one bit each, and the pages of its runs, one a lane.
    auto run_slot = [&](int step) { return first_slot + step * STEP_SLOTS + warp * RUN_SLOTS; };
    const uint32_t page =
        run_slot(lane % N_STEPS) < kv.end() ? kv.page(run_slot(lane % N_STEPS)) : 0;
    uint32_t visible[N_STEPS / 2];
    for (int i = 0; i < N_STEPS / 2; i++) {
        uint32_t slot = run_slot(2 * i + lane / RUN_SLOTS) + lane % RUN_SLOTS;
        visible[i] = prim::ballot(kv.is_seen(slot, range));
    }
    auto seen = [&](int step) { return visible[step / 2] >> (step % 2 * RUN_SLOTS) & 0xffffu; };
    auto is_wide = [&](int step) {
        return IS_CODED && (SEALED || step == 0) && kv.is_wide(run_slot(step));
    };
    auto k_stage = [&](int step) { return warp_smem + step % STAGES * STAGE_BYTES<D, K, V>; };
    auto v_stage = [&](int step) { return k_stage(step) + K_STAGE_BYTES<D, K>; };
    auto copy = [&](int step) {
        if (SEALED && step < N_STEPS && seen(step) != 0 && is_wide(step)) {
            copy_wide_run<D>(k_stage(step), 0, kv, run_slot(step), kv_head, 0);
            copy_wide_run<D>(v_stage(step), 0, kv, run_slot(step), kv_head, 1);
        } else if (step < N_STEPS && seen(step) != 0) {
            const int n_valid = kv.end() - run_slot(step);
            const CodedRun run =
                coded_run<D, K, V>(kv, prim::shfl(page, step), kv_head, run_slot(step));
            if (!SEALED && is_wide(step)) {
                copy_rows<LORIS_KV_WIDE, ROW_BYTES>(k_stage(step), run.page + run.k.codes,
                                                    n_valid - WIDE_ROW);
                copy_rows<LORIS_KV_WIDE, ROW_BYTES>(v_stage(step), run.page + run.v.codes,
                                                    n_valid - WIDE_ROW);
            } else {
                constexpr int K_ROW = CODE_BYTES<K, D>, V_ROW = CODE_BYTES<V, D>;
                copy_run<K_ROW>(k_stage(step), 0, run.page + run.k.codes, n_valid);
                copy_params<K, D>(k_stage(step) + RUN_SLOTS * K_ROW, run.page + run.k.params);
                copy_run<V_ROW>(v_stage(step), 0, run.page + run.v.codes, n_valid);
                copy_params<V, D>(v_stage(step) + RUN_SLOTS * V_ROW, run.page + run.v.params);
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
    load_q<D, K>(q, q_smem);
    float q_sum[N_GROUPS<K, D>][2] = {};
    if (K == INT4) {
#pragma unroll
        for (int g = 0; g < N_GROUPS<K, D>; g++) {
            float sum[4] = {};
            for (int k = 0; k < N_K / N_GROUPS<K, D>; k++)
                prim::mma_bf16(sum, q[g * (N_K / N_GROUPS<K, D>)+k], BF16_ONES, BF16_ONES);
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
                wide_scores<D, K>(s, q, k_stage(step));
            } else {
                scores<D, K>(s, q, q_sum, k_stage(step));
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
                sums.template add_wide<SEALED>(s, v_stage(step));
            } else if constexpr (V == BF16) {
                sums.add(s, v_stage(step));
            } else {
                sums.add_coded(s, mine, v_stage(step));
            }
        }
        prim::warp_sync();
        copy(step + STAGES);
    }
    prim::cp_wait<0>();
    prim::block_sync();
}

template <int D, uint32_t K, uint32_t V>
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
    for (int i = IS_BY_CHANNEL<K> ? 1 : 0; i < 2; i++)
        add_slots<D, K, V>(args, i == 0 ? Meets::SINKS : Meets::WINDOW, state, sums);

    // Each warp's sums to shared memory.
    unsigned char *ring_smem = prim::smem() + N_HEADS * D * 2;
    float *sum_smem = reinterpret_cast<float *>(ring_smem);  // [warp][head][SUM_STRIDE]
    float *ml_smem = reinterpret_cast<float *>(ring_smem + RING_BYTES<D, K, V>);  // [warp][head][2]
#pragma unroll
    for (int r = 0; r < 2; r++) {
        state[r].row_sum += prim::shfl_xor(state[r].row_sum, 1);
        state[r].row_sum += prim::shfl_xor(state[r].row_sum, 2);
        if (IS_BY_GROUP<V>)
            for (int g = 0; g < N_GROUPS<V, D>; g++) {
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
