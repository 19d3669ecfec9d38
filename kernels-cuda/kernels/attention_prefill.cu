// Flash attention of many rows over pages.
//
//   out[row][h] = softmax(q[row][h] . K^T * scale) V   over the slots that the row sees
//
// A block takes BLOCK_Q packed rows of one sequence and one kv head (packed row m = row *
// group_size + head in the group: all heads of a group share the K and V that are loaded) and walks
// over the tiles of BLOCK_KV slots, counted from slot 0, that any of its rows sees:
//
//            BLOCK_KV slots                Q     [BLOCK_Q][D]   shared memory
//          +---------------+               K, V  [BLOCK_KV][D]  ring of N_STAGES: K V K V ..
//   warp 0 | 32 rows       |  S = Q K^T    S, O  registers, f32
//   warp 1 | 32 rows       |  P = 2^(..)   P     registers, bf16: the accumulators of S,
//   warp 2 | 32 rows       |  O += P V           packed, are the A operand of P V
//   warp 3 | 32 rows       |
//
// In a stream that has sinks it walks over theirs first, which are one tile, with the rows of Q
// turned to meet them, and then over the others.
//
// A row's bits do not depend on what else is in its tile: tiles begin at slot 0, and a tile that a
// row does not see leaves it as it is. Each K and V element is read ceil(n_rows * group_size /
// BLOCK_Q) times at most (causal: half of that), mostly from L2.
//
// Where pages hold codes, each warp copies the codes of its runs to a place of its own, K and V
// half a tile ahead, and spreads them into a tile of bf16 before everyone multiplies by it:
//
//   codes of K   codes of V   [warp][RUN_BYTES]      in place of the ring
//   tile of K    tile of V    [BLOCK_KV][D] bf16     V is finished; K is codes,
//   params of K               [BLOCK_KV]             whose scale and zero go into the scores in f32
//
// Where pages are sealed K is finished too, from codes and the params of channels that come with
// them; bf16 runs of the first page and the tail go to their place in a tile at once, as soon as
// everyone is done with what was there.
#include "kv_tile.cuh"
#include "rotation.cuh"
#include "softmax_state.cuh"

constexpr int BLOCK_Q = 128, BLOCK_KV = 64;
constexpr int N_WARPS = 4, WARP_Q = BLOCK_Q / N_WARPS;
constexpr int N_STAGES = 3;
constexpr int N_M = WARP_Q / 16;    // m16 tiles of a warp
constexpr int N_ROWS = 2 * N_M;     // rows that a lane has a part of
constexpr int N_KV = BLOCK_KV / 8;  // n8 tiles of S

static_assert(BLOCK_KV == N_WARPS * RUN_SLOTS, "each warp copies one run of a tile");
static_assert(WARP_Q == 32, "a lane stands for one row of its warp in the set-up");

// What a warp looks at. It waits in shared memory: registers are scarce.
struct View {
    Range block_any, warp_any;  // positions that some row of the block, of the warp sees
    Range warp_all;             // positions that all rows of the warp see
    uint32_t tile_start, tile_end;
};
constexpr uint32_t NO_TILE = UINT32_MAX - 1;  // and one more is still beyond the end

template <int D>
constexpr int STAGE_BYTES = BLOCK_KV * D * 2;
template <int D>
constexpr int Q_BYTES = BLOCK_Q * D * 2;

// What is kept of the params of INT4 keys while scores are made. Where there are two groups, scores
// of the first are multiplied with `ratio`, so that those of the second can be added and both be
// multiplied with `scale`; a group of scale 0 has codes 0. The zeros add sum(q of a group) * zero:
// one more step of the product, whose factors are split into bf16, [slot][16] and [row of Q][16]:
//
//   zero = high + low             high low high low high low   the other group's   0 0 0 0
//   sum  = high + middle + low    high high mid mid  low low
struct SlotScales {
    float scale, ratio;
};
constexpr int SPLIT_BYTES = 32;

// Bytes a slot of what the scores need of K.
template <uint32_t K, int D>
constexpr int KEPT_BYTES = K == INT4 ? sizeof(SlotScales) + SPLIT_BYTES : PARAM_BYTES<K, D>;

// Where things are behind Q: the ring, or tiles and codes; then params of K and sums of Q's groups.
template <int D, uint32_t K, uint32_t V>
struct Smem {
    static constexpr bool IS_CODED = SKEW<K, V> != 0;
    // Keys of bf16 go to their tile at once.
    static constexpr int K_RUN = K == BF16 ? 0 : RUN_BYTES<K, D>, V_RUN = RUN_BYTES<V, D>;
    static constexpr int V_TILE = STAGE_BYTES<D>;
    static constexpr int CODES = IS_CODED ? 2 * STAGE_BYTES<D> : N_STAGES * STAGE_BYTES<D>;
    static constexpr int K_PARAMS = CODES + (IS_CODED ? N_WARPS * (K_RUN + V_RUN) : 0);
    static constexpr int Q_SUMS = K_PARAMS + BLOCK_KV * KEPT_BYTES<K, D>;
    static constexpr int END = Q_SUMS + (K == INT4 ? BLOCK_Q * SPLIT_BYTES : 0);
    // Q, what is behind it, the position of each row, and the views.
    static constexpr int BYTES = Q_BYTES<D> + END + BLOCK_Q * 4 + N_WARPS * sizeof(View);
    static_assert(2 * (BYTES + 1024) <= 164 * 1024, "two blocks an SM on sm_80");
};

// The stage behind one in the ring, as byte offsets: the smaller of x and x - size, which wraps
// below zero.
template <int D>
DEV uint32_t next_stage(uint32_t stage) {
    return min(stage + STAGE_BYTES<D>, stage + STAGE_BYTES<D> - N_STAGES * STAGE_BYTES<D>);
}

DEV LorisSeq sequence(const AttentionPrefillArgs &args) {
    return args.batch.seqs[args.tiles[blockIdx.x].seq_idx];
}

DEV uint32_t warp_min(uint32_t v) {
    for (int mask = 16; mask > 0; mask >>= 1) v = min(v, prim::shfl_xor(v, mask));
    return v;
}
DEV uint32_t warp_max(uint32_t v) {
    for (int mask = 16; mask > 0; mask >>= 1) v = max(v, prim::shfl_xor(v, mask));
    return v;
}

// Position of a slot; none that a row could see where the slot is not in use.
template <class Kv>
DEV uint32_t position_or_none(const Kv &kv, uint32_t slot) {
    return kv.is_used(slot) ? kv.position(slot) : UINT32_MAX;
}

// (warp) Whether some slot, and whether every slot, of a tile has its position in a range.
template <class Kv>
DEV bool tile_has_any(const Kv &kv, uint32_t tile, Range range) {
    uint32_t slot = tile * BLOCK_KV + prim::lane();
    return prim::any(range.has(position_or_none(kv, slot)) |
                     range.has(position_or_none(kv, slot + 32)));
}
template <class Kv>
DEV bool tile_has_all(const Kv &kv, uint32_t tile, Range range) {
    uint32_t slot = tile * BLOCK_KV + prim::lane();
    return prim::all(range.has(position_or_none(kv, slot)) &
                     range.has(position_or_none(kv, slot + 32)));
}

// (warp) What the warp looks at, from what the rows at some positions see of what they meet. Where
// slots are positions, the tiles are those from the first that is seen to the last.
template <class Kv>
DEV void set_view(const Kv &kv, const AttentionPrefillArgs &args, Meets meets,
                  const uint32_t *position_smem, View *view) {
    const LorisSeq seq = sequence(args);
    auto seen = [&](int w) {
        return seen_by(seq, meets, position_smem[w * WARP_Q + prim::lane()], args.window);
    };
    const Range own = seen(prim::warp());
    Range block_any = own;
    for (int w = 0; w < N_WARPS; w++) {
        block_any.lo = min(block_any.lo, seen(w).lo);
        block_any.hi = max(block_any.hi, seen(w).hi);
    }
    block_any = {warp_min(block_any.lo), warp_max(block_any.hi)};
    const Range warp_any = {warp_min(own.lo), warp_max(own.hi)};
    const uint32_t last_lo = warp_max(own.lo);
    const Range warp_all = {last_lo, max(last_lo, warp_min(own.hi))};
    const bool is_dense = kv.slot_positions == nullptr;
    const uint32_t skew = kv.end() - kv.kv_len;
    const uint32_t slot_end = (is_dense ? min(block_any.hi, kv.kv_len) : kv.kv_len) + skew;
    const uint32_t tile_end = (slot_end + BLOCK_KV - 1) / BLOCK_KV;
    const uint32_t tile_start = is_dense ? (block_any.lo + skew) / BLOCK_KV : 0;
    if (prim::lane() == 0) *view = {block_any, warp_any, warp_all, tile_start, tile_end};
    prim::warp_sync();
}

// The row that this thread looks up and stores for its warp. Rows behind the last one repeat it and
// are not stored.
struct PackedRow {
    uint32_t row, row_head;  // of the batch; index into [n_rows][n_q_heads]
    bool is_real;

    DEV explicit PackedRow(const AttentionPrefillArgs &args) {
        const LorisSeq seq = sequence(args);
        const uint32_t group_size = args.n_q_heads / args.pages.n_kv_heads;
        const uint32_t packed = args.tiles[blockIdx.x].packed_start + threadIdx.x;
        const uint32_t last = seq.n_rows * group_size - 1;
        is_real = packed <= last;
        row = min(packed, last) / group_size;
        const uint32_t head = min(packed, last) - row * group_size;
        row += seq.row_start;
        row_head = row * args.n_q_heads + blockIdx.y * group_size + head;
    }
};

// (warp) Starts copying the warp's 32 rows of Q, and notes their positions.
template <int D>
DEV void load_rows(const AttentionPrefillArgs &args, unsigned char *q_smem,
                   uint32_t *position_smem) {
    constexpr int CHUNKS = D / 8, ROWS = 32 / CHUNKS;  // of a row; rows at once
    const PackedRow packed(args);
    position_smem[threadIdx.x] = args.batch.positions[packed.row];
    const int row = prim::lane() / CHUNKS, chunk = prim::lane() % CHUNKS;
#pragma unroll
    for (int i = 0; i < WARP_Q; i += ROWS) {
        const int r = i + row;
        const uint16_t *from = args.q + static_cast<uint64_t>(prim::shfl(packed.row_head, r)) * D;
        prim::cp_async16(q_smem + swizzle<D * 2>(r, chunk), from + chunk * 8);
    }
}

// (warp) Turns them to where they meet the sinks.
template <int D>
DEV void turn_rows(const AttentionPrefillArgs &args, unsigned char *q_smem) {
    const PackedRow packed(args);
#pragma unroll 1
    for (int i = 0; i < WARP_Q; i += HeadGroup<D>::HEADS) {
        const int r = i + HeadGroup<D>::idx();
        const uint64_t row = prim::shfl(packed.row, r);
        turn_queries<D>(q_smem, r, args.batch.sink_cos_sin + row * D, args.pages.k_rotated);
    }
}

// (warp) Stores the warp's rows, 16 bytes at a time, from where Q was, and their lse.
template <int D>
DEV void store_rows(const AttentionPrefillArgs &args, const unsigned char *q_smem,
                    const uint32_t *lse_smem) {
    constexpr int CHUNKS = D / 8, ROWS = 32 / CHUNKS;
    const PackedRow packed(args);
    const int row = prim::lane() / CHUNKS, chunk = prim::lane() % CHUNKS;
#pragma unroll 4  // all at once want more registers than there are
    for (int i = 0; i < WARP_Q; i += ROWS) {
        const int r = i + row;
        uint16_t *to = args.out + static_cast<uint64_t>(prim::shfl(packed.row_head, r)) * D;
        if (prim::shfl(packed.is_real, r))
            prim::st16(to + chunk * 8, prim::ld16(q_smem + swizzle<D * 2>(r, chunk)));
    }
    if (args.lse != nullptr && packed.is_real)
        args.lse[packed.row_head] = prim::as_float(lse_smem[threadIdx.x]);
}

// Eight numbers as bf16.
DEV uint4 eight(uint2 a, uint2 b) { return uint4{a.x, a.y, b.x, b.y}; }

// Four codes as the numbers they stand for, rounded to bf16.
template <uint32_t FORMAT>
DEV uint2 four_values(uint32_t codes, Params of) {
    uint2 x = four<FORMAT>(codes);
    auto value = [&](float code) { return fmaf(code, of.scale, of.zero); };
    return uint2{prim::pack_bf16(value(prim::bf16_lo(x.x)), value(prim::bf16_hi(x.x))),
                 prim::pack_bf16(value(prim::bf16_lo(x.y)), value(prim::bf16_hi(x.y)))};
}

// (warp) Spreads a run that has come to `run_smem` over 16 rows of a tile: codes as bf16, or what
// they stand for, IS_VALUE. Rows from n_valid on become zeros.
template <int D, uint32_t FORMAT, bool IS_VALUE>
DEV void spread_run(unsigned char *tile_smem, int row0, const unsigned char *run_smem,
                    int n_valid) {
    constexpr int CHUNKS = CODE_BYTES<FORMAT, D> / 16;  // of a row
    const unsigned char *params = run_smem + RUN_SLOTS * CODE_BYTES<FORMAT, D>;
#pragma unroll
    for (int i = 0; i < RUN_SLOTS * CHUNKS; i += 32) {
        const int row = (i + prim::lane()) / CHUNKS, c = (i + prim::lane()) % CHUNKS;
        if (row >= RUN_SLOTS) break;
        const uint4 codes = prim::ld16(run_smem + (i + prim::lane()) * 16);
        Params of = {};
        if constexpr (IS_VALUE && !IS_BY_CHANNEL<FORMAT>)
            of = params_of<FORMAT, D>(params, row, c * N_GROUPS<FORMAT, D> / CHUNKS);
        auto store = [&](int chunk, uint32_t w0, uint32_t w1) {
            uint4 x = {};
            if (row < n_valid) {
                if constexpr (IS_BY_CHANNEL<FORMAT>) {
                    x = eight_values<FORMAT, D>(w0, w1, params, chunk * 8);
                } else {
                    x = IS_VALUE ? eight(four_values<FORMAT>(w0, of), four_values<FORMAT>(w1, of))
                                 : eight(four<FORMAT>(w0), four<FORMAT>(w1));
                }
            }
            prim::st16(tile_smem + swizzle<D * 2>(row0 + row, chunk), x);
        };
        constexpr int BITS = CODE_BITS<FORMAT>, N_PARTS = 8 / BITS;
#pragma unroll
        for (int part = 0; part < N_PARTS; part++) {  // from the low bits of all bytes on
            const int chunk = 2 * (N_PARTS * c + part), shift = BITS * part;
            store(chunk, codes.x >> shift, codes.y >> shift);
            store(chunk + 1, codes.z >> shift, codes.w >> shift);
        }
    }
}

// (warp) The same with the bf16 rows of a first page, the last of 16 slots.
template <int D>
DEV void spread_wide_run(unsigned char *tile_smem, int row0, const unsigned char *run_smem) {
    constexpr int CHUNKS = D / 8;
    for (int i = prim::lane(); i < RUN_SLOTS * CHUNKS; i += 32) {
        const int row = i / CHUNKS;
        uint4 x = {};
        if (row >= WIDE_ROW) x = prim::ld16(run_smem + (i - WIDE_ROW * CHUNKS) * 16);
        prim::st16(tile_smem + swizzle<D * 2>(row0 + row, i % CHUNKS), x);
    }
}

// Three bf16 that add up to a float, each in both halves of a word.
struct Split {
    uint32_t x, y, z;
};
DEV Split split_sum(float x) {
    const uint32_t high = prim::pack_bf16(x, x);
    x -= prim::bf16_lo(high);
    const uint32_t middle = prim::pack_bf16(x, x);
    x -= prim::bf16_lo(middle);
    return {high, middle, prim::pack_bf16(x, x)};
}

// (warp) The params of a run of K, slots `first` and on of the tile, to where the scores find them;
// those of bf16 rows are 1 and 0.
template <int D, uint32_t K>
DEV void keep_params(unsigned char *kept_smem, int first, const unsigned char *run_smem,
                     bool is_wide) {
    const unsigned char *params = run_smem + RUN_SLOTS * CODE_BYTES<K, D>;
    const int slot = prim::lane();
    if (slot >= RUN_SLOTS) return;
    if constexpr (K == INT4) {
        constexpr int GROUPS = N_GROUPS<K, D>;
        Params of[2] = {{1.0f, 0.0f}, {1.0f, 0.0f}};
        uint32_t zeros[2] = {};
        for (int g = 0; g < GROUPS; g++) {
            if (!is_wide) of[g] = params_of<K, D>(params, slot, g);
            const float low = of[g].zero - prim::bf16_to_float(prim::to_bf16(of[g].zero));
            zeros[g] = prim::pack_bf16(of[g].zero, low);
        }
        SlotScales kept = {of[0].scale, 1.0f};
        if (GROUPS == 2 && of[1].scale != 0.0f) kept = {of[1].scale, of[0].scale / of[1].scale};
        reinterpret_cast<SlotScales *>(kept_smem)[first + slot] = kept;
        unsigned char *split_smem = kept_smem + BLOCK_KV * sizeof(SlotScales);
        prim::st16(split_smem + swizzle<SPLIT_BYTES>(first + slot, 0),
                   {zeros[0], zeros[0], zeros[0], zeros[1]});
        prim::st16(split_smem + swizzle<SPLIT_BYTES>(first + slot, 1), {zeros[1], zeros[1], 0, 0});
    } else {
        reinterpret_cast<uint16_t *>(kept_smem)[first + slot] =
            is_wide ? F16_ONE : reinterpret_cast<const uint16_t *>(params)[slot];
    }
}

// (warp) Sums of the groups of each row of Q, split; a thread has the row that it stands for.
template <int D>
DEV void sum_rows(const unsigned char *q_smem, unsigned char *split_smem) {
    constexpr int GROUPS = N_GROUPS<INT4, D>, CHUNKS = D / 8 / GROUPS;
    Split parts[2] = {};
    for (int g = 0; g < GROUPS; g++) {
        float sum = 0.0f;
        for (int c = 0; c < CHUNKS; c++) {
            const uint4 x = prim::ld16(q_smem + swizzle<D * 2>(prim::lane(), g * CHUNKS + c));
            sum += prim::bf16_lo(x.x) + prim::bf16_hi(x.x) + prim::bf16_lo(x.y) +
                   prim::bf16_hi(x.y) + prim::bf16_lo(x.z) + prim::bf16_hi(x.z) +
                   prim::bf16_lo(x.w) + prim::bf16_hi(x.w);
        }
        parts[g] = split_sum(sum);
    }
    prim::st16(split_smem + swizzle<SPLIT_BYTES>(threadIdx.x, 0),
               {parts[0].x, parts[0].y, parts[0].z, parts[1].x});
    prim::st16(split_smem + swizzle<SPLIT_BYTES>(threadIdx.x, 1), {parts[1].y, parts[1].z, 0, 0});
}

// Multiplies the scores of the first of two groups with their ratio.
DEV void scale_first_group(float (&s)[N_M][N_KV][4], const unsigned char *kept_smem) {
    const auto *kept = reinterpret_cast<const SlotScales *>(kept_smem);
#pragma unroll
    for (int n = 0; n < N_KV; n++)
        for (int e = 0; e < 2; e++) {
            const float ratio = kept[n * 8 + (prim::lane() & 3) * 2 + e].ratio;
            for (int r = 0; r < N_ROWS; r++) s[r / 2][n][r % 2 * 2 + e] *= ratio;
        }
}

// (warp) Products with codes become scores.
template <int D, uint32_t K>
DEV void scale_scores(float (&s)[N_M][N_KV][4], const unsigned char *kept_smem,
                      const unsigned char *q_sums_smem) {
#pragma unroll
    for (int n = 0; n < N_KV; n++)
        for (int e = 0; e < 2; e++) {
            const int slot = n * 8 + (prim::lane() & 3) * 2 + e;
            float scale;
            if constexpr (K == INT4) {
                scale = reinterpret_cast<const SlotScales *>(kept_smem)[slot].scale;
            } else {
                scale = params_of<K, D>(kept_smem, slot, 0).scale;
            }
            for (int r = 0; r < N_ROWS; r++) s[r / 2][n][r % 2 * 2 + e] *= scale;
            // Or the compiler reads more than it has registers for before it uses any of it.
            if (K == INT4 && e == 1) prim::warp_sync();
        }
    if constexpr (K == INT4) {
        const unsigned char *zeros_smem = kept_smem + BLOCK_KV * sizeof(SlotScales);
        const unsigned char *sums_smem = q_sums_smem + prim::warp() * WARP_Q * SPLIT_BYTES;
        uint32_t a[N_M][4];
        for (int m = 0; m < N_M; m++)
            prim::ldsm_x4(a[m], sums_smem + m * 16 * SPLIT_BYTES + row_offset_mk<SPLIT_BYTES>());
#pragma unroll
        for (int n = 0; n < N_KV; n += 2) {
            uint32_t b[4];
            prim::ldsm_x4(b, zeros_smem + n * 8 * SPLIT_BYTES + row_offset_nk<SPLIT_BYTES>());
#pragma unroll
            for (int m = 0; m < N_M; m++) {
                prim::mma_bf16(s[m][n], a[m], b[0], b[1]);
                prim::mma_bf16(s[m][n + 1], a[m], b[2], b[3]);
            }
        }
    }
}

// Multiplies the rows of O, a row in four lanes, with the Hadamard matrix over sqrt(D).
template <int D>
DEV void rotate_rows(float (&o)[N_M][D / 8][4]) {
    const float factor = 1.0f / sqrtf(static_cast<float>(D));
#pragma unroll
    for (int r = 0; r < N_ROWS; r++) {
        const int m = r / 2, first = r % 2 * 2;
#pragma unroll
        for (int n = 0; n < D / 8; n++) {
            const float a = o[m][n][first], b = o[m][n][first + 1];
            float pair[2] = {(a + b) * factor, (a - b) * factor};
            for (int e = 0; e < 2; e++) {
                for (int mask = 1; mask <= 2; mask++) {
                    const float other = prim::shfl_xor(pair[e], mask);
                    pair[e] = (prim::lane() & mask) != 0 ? other - pair[e] : pair[e] + other;
                }
                o[m][n][first + e] = pair[e];
            }
        }
#pragma unroll
        for (int step = 1; step < D / 8; step *= 2)
#pragma unroll
            for (int n = 0; n < D / 8; n++)
                for (int e = first; e < first + 2; e++)
                    if ((n & step) == 0) {
                        const float a = o[m][n][e], b = o[m][n + step][e];
                        o[m][n][e] = a + b, o[m][n + step][e] = a - b;
                    }
    }
}

// Adds the slots that the rows see of those that they meet to what the block has summed.
template <int D, uint32_t K, uint32_t V>
DEV void add_slots(const AttentionPrefillArgs &args, Meets meets, SoftmaxState (&state)[N_ROWS],
                   float (&o)[N_M][D / 8][4]) {
    using At = Smem<D, K, V>;
    constexpr int ROW_BYTES = D * 2, N_K = D / 16;
    constexpr bool SEALED = IS_BY_CHANNEL<K>;
    const int lane = prim::lane(), warp = prim::warp();

    // What the block works on.
    const PagedKv<SKEW<K, V>, SEALED> kv(args.pages, args.batch, sequence(args), args.layer);
    const uint32_t kv_head = blockIdx.y;

    unsigned char *q_smem = prim::smem() + warp * WARP_Q * ROW_BYTES;  // of this warp
    unsigned char *ring_smem = prim::smem() + Q_BYTES<D>;
    uint32_t *position_smem = reinterpret_cast<uint32_t *>(ring_smem + At::END);
    unsigned char *q_sums_smem = ring_smem + At::Q_SUMS;

    load_rows<D>(args, q_smem, position_smem);
    if (K == INT4 || meets == Meets::SINKS) {
        prim::cp_commit();
        prim::cp_wait<0>();
        prim::warp_sync();
    }
    if (meets == Meets::SINKS) {
        turn_rows<D>(args, q_smem);
        prim::warp_sync();
    }
    if constexpr (K == INT4) sum_rows<D>(q_smem, q_sums_smem);
    prim::block_sync();

    View *view = reinterpret_cast<View *>(position_smem + BLOCK_Q) + warp;
    set_view(kv, args, meets, position_smem, view);
    auto next_seen = [&](uint32_t tile) {
        for (; tile < view->tile_end; tile++)
            if (tile_has_any(kv, tile, view->block_any)) return tile;
        return NO_TILE;
    };

    // Each warp copies its run of the tile, K and V, and looks up the page of the next one well
    // before.
    auto run_slot = [&](uint32_t tile) { return tile * BLOCK_KV + warp * RUN_SLOTS; };
    auto run_page = [&](uint32_t tile) {
        return tile != NO_TILE && run_slot(tile) < kv.end() ? kv.page(run_slot(tile)) : 0;
    };
    auto n_valid = [&](uint32_t tile) { return kv.n_readable(run_slot(tile)); };
    auto is_wide_run = [&](uint32_t tile) { return kv.is_wide(run_slot(tile)); };
    auto copy_k = [&](uint32_t tile, uint32_t page, uint32_t stage) {
        if (tile != NO_TILE && !(SEALED && is_wide_run(tile))) {
            const CodedRun run = coded_run<D, K, V>(kv, page, kv_head, run_slot(tile));
            const unsigned char *from = run.page + run.k.codes;
            unsigned char *codes = ring_smem + At::CODES + warp * At::K_RUN;
            if constexpr (K == BF16) {
                const int row = run.is_wide ? WIDE_ROW : 0;
                copy_run<ROW_BYTES>(ring_smem + stage, warp * RUN_SLOTS, from - row * ROW_BYTES,
                                    n_valid(tile), row);
            } else if (run.is_wide) {
                copy_rows<LORIS_KV_WIDE, ROW_BYTES>(codes, from, n_valid(tile) - WIDE_ROW);
            } else {
                copy_rows<RUN_SLOTS, CODE_BYTES<K, D>>(codes, from, n_valid(tile));
                copy_params<K, D>(codes + RUN_SLOTS * CODE_BYTES<K, D>, run.page + run.k.params);
            }
        }
        prim::cp_commit();
    };
    auto copy_v = [&](uint32_t tile, uint32_t page, uint32_t stage) {
        if (tile != NO_TILE && !(SEALED && is_wide_run(tile))) {
            const CodedRun run = coded_run<D, K, V>(kv, page, kv_head, run_slot(tile));
            const unsigned char *from = run.page + run.v.codes;
            unsigned char *codes = ring_smem + At::CODES + N_WARPS * At::K_RUN + warp * At::V_RUN;
            if constexpr (V == BF16) {
                copy_run<ROW_BYTES>(ring_smem + stage, warp * RUN_SLOTS, from, n_valid(tile));
            } else if (run.is_wide) {
                copy_rows<LORIS_KV_WIDE, ROW_BYTES>(codes, from, n_valid(tile) - WIDE_ROW);
            } else {
                copy_rows<RUN_SLOTS, CODE_BYTES<V, D>>(codes, from, n_valid(tile));
                copy_params<V, D>(codes + RUN_SLOTS * CODE_BYTES<V, D>, run.page + run.v.params);
            }
        }
        prim::cp_commit();
    };

    // Where pages are sealed: the bf16 run of a tile, K or V, to where it is multiplied with.
    auto copy_wide = [&](uint32_t tile, uint32_t side, uint32_t to) {
        if (tile != NO_TILE && is_wide_run(tile))
            copy_wide_run<D>(ring_smem + to, warp * RUN_SLOTS, kv, run_slot(tile), kv_head, side);
        prim::cp_commit();
    };

    // Two half tiles ahead.
    uint32_t tile = next_seen(view->tile_start);
    uint32_t k_stage = 0, next_page = run_page(tile);
    if constexpr (SEALED) copy_wide(tile, 0, 0);
    copy_k(tile, next_page, 0);
    copy_v(tile, next_page, STAGE_BYTES<D>);
    uint32_t next = next_seen(tile + 1);
    next_page = run_page(next);

    // Makes K of this tile ready, and that of the next one come.
    auto take_k = [&](uint32_t v_stage) {
        prim::cp_wait<1>();
        if constexpr (!At::IS_CODED) {
            // K of the next tile takes the stage of the V that everyone is done with.
            prim::block_sync();
            copy_k(next, next_page, next_stage<D>(v_stage));
        } else if constexpr (SEALED) {
            prim::warp_sync();
            const unsigned char *codes = ring_smem + At::CODES + warp * At::K_RUN;
            if (!is_wide_run(tile))
                spread_run<D, K, true>(ring_smem, warp * RUN_SLOTS, codes, RUN_SLOTS);
            prim::block_sync();
            copy_wide(tile, 1, At::V_TILE);  // everyone is done with the last tile's V
            copy_k(next, next_page, 0);
        } else {
            if constexpr (K != BF16) {
                prim::warp_sync();
                const unsigned char *codes = ring_smem + At::CODES + warp * At::K_RUN;
                const bool is_wide = kv.is_wide(run_slot(tile));
                if (is_wide) {
                    spread_wide_run<D>(ring_smem, warp * RUN_SLOTS, codes);
                } else {
                    spread_run<D, K, false>(ring_smem, warp * RUN_SLOTS, codes, n_valid(tile));
                }
                keep_params<D, K>(ring_smem + At::K_PARAMS, warp * RUN_SLOTS, codes, is_wide);
                prim::warp_sync();
                copy_k(next, next_page, 0);
            }
            prim::block_sync();
        }
    };
    // The same of V.
    auto take_v = [&] {
        if constexpr (!At::IS_CODED) {
            // V of the next tile takes the stage of this tile's K.
            prim::cp_wait<1>();
            prim::block_sync();
            copy_v(next, next_page, k_stage);
        } else if constexpr (SEALED) {
            prim::cp_wait<1>();
            prim::warp_sync();
            const unsigned char *codes =
                ring_smem + At::CODES + N_WARPS * At::K_RUN + warp * At::V_RUN;
            if (!is_wide_run(tile))
                spread_run<D, V, true>(ring_smem + At::V_TILE, warp * RUN_SLOTS, codes, RUN_SLOTS);
            prim::block_sync();
            copy_wide(next, 0, 0);  // everyone is done with this tile's K
            copy_v(next, next_page, 0);
        } else {
            prim::cp_wait<K == BF16 ? 0 : 1>();
            prim::warp_sync();
            const unsigned char *codes =
                ring_smem + At::CODES + N_WARPS * At::K_RUN + warp * At::V_RUN;
            unsigned char *v_tile = ring_smem + At::V_TILE;
            if (kv.is_wide(run_slot(tile))) {
                spread_wide_run<D>(v_tile, warp * RUN_SLOTS, codes);
            } else {
                spread_run<D, V, true>(v_tile, warp * RUN_SLOTS, codes, n_valid(tile));
            }
            prim::warp_sync();
            if constexpr (K != BF16) {
                copy_v(next, next_page, 0);
                prim::block_sync();
            } else {  // the tile of K is free now
                prim::block_sync();
                copy_k(next, next_page, 0);
                copy_v(next, next_page, 0);
            }
        }
    };

    const float scale = args.scale * LOG2_E;

    while (tile != NO_TILE) {
        // Anew, or the offsets of all steps are kept in registers from tile to tile.
        const int mk_lane = prim::anew(lane_offset_mk<D>());
        const int nk_lane = prim::anew(lane_offset_nk<D>());
        const uint32_t v_stage = At::IS_CODED ? STAGE_BYTES<D> : next_stage<D>(k_stage);
        take_k(v_stage);

        const bool is_seen = tile_has_any(kv, tile, view->warp_any);
        const bool is_open = tile_has_all(kv, tile, view->warp_all);
        float s[N_M][N_KV][4];
        if (is_seen) {
            // S = Q K^T
#pragma unroll
            for (int i = 0; i < N_M * N_KV * 4; i++) (&s[0][0][0])[i] = 0.0f;
#pragma unroll
            for (int k = 0; k < N_K; k++) {
                if constexpr (N_GROUPS<K, D> == 2) {
                    if (k == N_K / 2) scale_first_group(s, ring_smem + At::K_PARAMS);
                }
                uint32_t a[N_M][4];
                for (int m = 0; m < N_M; m++)
                    prim::ldsm_x4(a[m], q_smem + m * 16 * ROW_BYTES + (mk_lane ^ k << 5));
#pragma unroll
                for (int n = 0; n < N_KV; n += 2) {
                    uint32_t b[4];
                    prim::ldsm_x4(b, ring_smem + k_stage + n * 8 * ROW_BYTES + (nk_lane ^ k << 5));
#pragma unroll
                    for (int m = 0; m < N_M; m++) {
                        prim::mma_bf16(s[m][n], a[m], b[0], b[1]);
                        prim::mma_bf16(s[m][n + 1], a[m], b[2], b[3]);
                    }
                }
            }

            if constexpr (K != BF16 && !SEALED)
                scale_scores<D, K>(s, ring_smem + At::K_PARAMS, q_sums_smem);

            // Scores of slots that a row does not see become -inf.
            if (!is_open) {
                const LorisSeq seq = sequence(args);
                Range seen[N_ROWS];
                for (int r = 0; r < N_ROWS; r++) {
                    const uint32_t position = position_smem[warp * WARP_Q + r * 8 + lane / 4];
                    seen[r] = seen_by(seq, meets, position, args.window);
                }
                const uint32_t first = prim::anew(tile) * BLOCK_KV + lane;
                uint32_t positions[2];  // of slots lane and lane + 32
                for (int i = 0; i < 2; i++) positions[i] = position_or_none(kv, first + i * 32);
#pragma unroll
                for (int n = 0; n < N_KV; n++)
                    for (int e = 0; e < 2; e++) {
                        uint32_t p = prim::shfl(positions[n / 4], n % 4 * 8 + (lane & 3) * 2 + e);
                        for (int r = 0; r < N_ROWS; r++)
                            if (!seen[r].has(p)) s[r / 2][n][r % 2 * 2 + e] = -INFINITY;
                    }
            }

            // Where a row grows beyond what it is measured from, what it has summed is scaled down.
            float tile_max[N_ROWS];
            bool is_raised = false;
#pragma unroll
            for (int r = 0; r < N_ROWS; r++) {
                float largest = -INFINITY;
                for (int n = 0; n < N_KV; n++)
                    largest =
                        fmaxf(largest, fmaxf(s[r / 2][n][r % 2 * 2], s[r / 2][n][r % 2 * 2 + 1]));
                tile_max[r] = largest * scale;
                is_raised |= state[r].is_raised_by(tile_max[r]);
            }
            if (prim::any(is_raised)) {
#pragma unroll
                for (int r = 0; r < N_ROWS; r++) {
                    tile_max[r] = fmaxf(tile_max[r], prim::shfl_xor(tile_max[r], 1));
                    tile_max[r] = fmaxf(tile_max[r], prim::shfl_xor(tile_max[r], 2));
                    float factor = state[r].raise(tile_max[r]);
                    for (int n = 0; n < D / 8; n++)
                        for (int e = 0; e < 2; e++) o[r / 2][n][r % 2 * 2 + e] *= factor;
                }
            }
        }

        // What V is multiplied with. Where V has yet to be spread it is made first, as scores take
        // twice the registers.
        uint32_t p[BLOCK_KV / 16][N_M][4];
        auto weigh = [&](int k) {
            for (int m = 0; m < N_M; m++)
                for (int i = 0; i < 4; i++) {
                    const int r = m * 2 + i % 2;
                    float *x = &s[m][2 * k + i / 2][i % 2 * 2];
                    float p0 = prim::exp2_fast(fmaf(x[0], scale, -state[r].row_max));
                    float p1 = prim::exp2_fast(fmaf(x[1], scale, -state[r].row_max));
                    state[r].row_sum += p0 + p1;
                    p[k][m][i] = prim::pack_bf16(p0, p1);
                }
        };
        if (At::IS_CODED && is_seen) {
#pragma unroll
            for (int k = 0; k < BLOCK_KV / 16; k++) weigh(k);
        }

        take_v();
        tile = next;
        next = next_seen(next + 1);
        next_page = run_page(next);

        // O += P V
        if (is_seen) {
#pragma unroll
            for (int k = 0; k < BLOCK_KV / 16; k++) {
                if (!At::IS_CODED) weigh(k);
#pragma unroll
                for (int n = 0; n < D / 8; n += 2) {
                    uint32_t b[4];
                    prim::ldsm_x4_t(b,
                                    ring_smem + v_stage + k * 16 * ROW_BYTES + (mk_lane ^ n << 4));
#pragma unroll
                    for (int m = 0; m < N_M; m++) {
                        prim::mma_bf16(o[m][n], p[k][m], b[0], b[1]);
                        prim::mma_bf16(o[m][n + 1], p[k][m], b[2], b[3]);
                    }
                }
            }
        }
        if constexpr (!At::IS_CODED) k_stage = next_stage<D>(v_stage);
    }
    prim::cp_wait<0>();
    prim::block_sync();
}

template <int D, uint32_t K, uint32_t V>
DEV void body(const AttentionPrefillArgs &args) {
    constexpr int ROW_BYTES = D * 2;
    const int lane = prim::lane(), warp = prim::warp();
    SoftmaxState state[N_ROWS];
    float o[N_M][D / 8][4] = {};
    // Tables with sealed pages are no stream's.
#pragma unroll 1
    for (int i = !IS_BY_CHANNEL<K> && sequence(args).sink > 0 ? 0 : 1; i < 2; i++)
        add_slots<D, K, V>(args, i == 0 ? Meets::SINKS : Meets::WINDOW, state, o);
    if constexpr (IS_BY_GROUP<V>) {
        if (args.pages.v_rotated) rotate_rows<D>(o);
    }

    // Normalise, and put the rows where Q was and their lse where their positions were.
    unsigned char *q_smem = prim::smem() + warp * WARP_Q * ROW_BYTES;
    uint32_t *lse_smem =
        reinterpret_cast<uint32_t *>(prim::smem() + Q_BYTES<D> + Smem<D, K, V>::END);
#pragma unroll
    for (int r = 0; r < N_ROWS; r++) {
        state[r].row_sum += prim::shfl_xor(state[r].row_sum, 1);
        state[r].row_sum += prim::shfl_xor(state[r].row_sum, 2);
        const float normaliser = state[r].normaliser();
        const int q_row = r * 8 + lane / 4;
        for (int n = 0; n < D / 8; n++) {
            float *x = &o[r / 2][n][r % 2 * 2];
            *reinterpret_cast<uint32_t *>(q_smem + swizzle<ROW_BYTES>(q_row, n) + (lane & 3) * 4) =
                prim::pack_bf16(x[0] * normaliser, x[1] * normaliser);
        }
        if ((lane & 3) == 0) lse_smem[warp * WARP_Q + q_row] = prim::as_bits(state[r].lse());
    }
    prim::warp_sync();

    store_rows<D>(args, q_smem, lse_smem);
}

template <int D, uint32_t K, uint32_t V>
constexpr int SMEM_BYTES = Smem<D, K, V>::BYTES;

FAMILY(attention_prefill, AttentionPrefillArgs, 128, 2, SMEM_BYTES)  // <= 255 registers
