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
// A row's bits do not depend on what else is in its tile: tiles begin at slot 0, and a tile that a
// row does not see leaves it as it is. Each K and V element is read ceil(n_rows * group_size /
// BLOCK_Q) times at most (causal: half of that), mostly from L2.
#include "kv_tile.cuh"
#include "softmax_state.cuh"

constexpr int BLOCK_Q = 128, BLOCK_KV = 64;
constexpr int N_WARPS = 4, WARP_Q = BLOCK_Q / N_WARPS;
constexpr int N_STAGES = 3;
constexpr int N_M = WARP_Q / 16;    // m16 tiles of a warp
constexpr int N_ROWS = 2 * N_M;     // rows that a lane has a part of
constexpr int N_KV = BLOCK_KV / 8;  // n8 tiles of S

static_assert(BLOCK_KV == N_WARPS * RUN_SLOTS, "each warp copies one run of a tile");
static_assert(WARP_Q == 32, "a lane stands for one row of its warp in the set-up");

// Positions lo <= p < hi; lo <= hi.
struct Range {
    uint32_t lo, hi;
    DEV bool has(uint32_t p) const { return p - lo < hi - lo; }
};

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
// Q, the ring, the end of what each row sees, and the views: mirrored by `ops/attention.rs`.
template <int D>
constexpr int SMEM_BYTES =
    Q_BYTES<D> + N_STAGES * STAGE_BYTES<D> + BLOCK_Q * 4 + N_WARPS * sizeof(View);
static_assert(2 * (SMEM_BYTES<128> + 1024) <= 164 * 1024, "two blocks an SM on sm_80");

// The stage behind one in the ring, as byte offsets: the smaller of x and x - size, which wraps
// below zero.
template <int D>
DEV uint32_t next_stage(uint32_t stage) {
    return min(stage + STAGE_BYTES<D>, stage + STAGE_BYTES<D> - N_STAGES * STAGE_BYTES<D>);
}

// A row at position `hi - 1` sees the positions of its window up to its own.
DEV Range seen_by(uint32_t hi, uint32_t window) { return {hi > window ? hi - window : 0, hi}; }

DEV uint32_t warp_min(uint32_t v) {
    for (int mask = 16; mask > 0; mask >>= 1) v = min(v, prim::shfl_xor(v, mask));
    return v;
}
DEV uint32_t warp_max(uint32_t v) {
    for (int mask = 16; mask > 0; mask >>= 1) v = max(v, prim::shfl_xor(v, mask));
    return v;
}

// Position of a slot; none that a row could see where the slot is not in use.
DEV uint32_t position_or_none(const PagedKv &kv, uint32_t slot) {
    return slot < kv.kv_len ? kv.position(slot) : UINT32_MAX;
}

// (warp) Whether some slot, and whether every slot, of a tile has its position in a range.
DEV bool tile_has_any(const PagedKv &kv, uint32_t tile, Range range) {
    uint32_t slot = tile * BLOCK_KV + prim::lane();
    return prim::any(range.has(position_or_none(kv, slot)) |
                     range.has(position_or_none(kv, slot + 32)));
}
DEV bool tile_has_all(const PagedKv &kv, uint32_t tile, Range range) {
    uint32_t slot = tile * BLOCK_KV + prim::lane();
    return prim::all(range.has(position_or_none(kv, slot)) &
                     range.has(position_or_none(kv, slot + 32)));
}

// (warp) What the warp looks at, from what each row sees. Where slots are positions, the tiles are
// those from the first that is seen to the last.
DEV void set_view(const PagedKv &kv, uint32_t window, const uint32_t *hi_smem, View *view) {
    uint32_t hi = hi_smem[threadIdx.x], hi_min = hi, hi_max = hi;
    for (int w = 0; w < N_WARPS; w++) {
        hi_min = min(hi_min, hi_smem[w * WARP_Q + prim::lane()]);
        hi_max = max(hi_max, hi_smem[w * WARP_Q + prim::lane()]);
    }
    const Range block_any = {seen_by(warp_min(hi_min), window).lo, warp_max(hi_max)};
    const Range warp_any = {seen_by(warp_min(hi), window).lo, warp_max(hi)};
    const Range last_row = seen_by(warp_any.hi, window);
    const Range warp_all = {last_row.lo, max(last_row.lo, warp_min(hi))};
    const bool is_dense = kv.slot_positions == nullptr;
    const uint32_t slot_end = is_dense ? min(block_any.hi, kv.kv_len) : kv.kv_len;
    const uint32_t tile_end = window == 0 ? 0 : (slot_end + BLOCK_KV - 1) / BLOCK_KV;
    const uint32_t tile_start = is_dense ? block_any.lo / BLOCK_KV : 0;
    if (prim::lane() == 0) *view = {block_any, warp_any, warp_all, tile_start, tile_end};
    prim::warp_sync();
}

// The row that this thread looks up and stores for its warp. Rows behind the last one repeat it and
// are not stored.
struct PackedRow {
    uint32_t row, row_head;  // of the batch; index into [n_rows][n_q_heads]
    bool is_real;

    DEV explicit PackedRow(const AttentionPrefillArgs &args) {
        const LorisQTile tile = args.tiles[blockIdx.x];
        const LorisSeq seq = args.batch.seqs[tile.seq_idx];
        const uint32_t group_size = args.n_q_heads / args.pages.n_kv_heads;
        const uint32_t last = seq.n_rows * group_size - 1, packed = tile.packed_start + threadIdx.x;
        is_real = packed <= last;
        row = min(packed, last) / group_size;
        const uint32_t head = min(packed, last) - row * group_size;
        row += seq.row_start;
        row_head = row * args.n_q_heads + blockIdx.y * group_size + head;
    }
};

// (warp) Starts copying the warp's 32 rows of Q, and notes behind which position each sees nothing.
template <int D>
DEV void load_rows(const AttentionPrefillArgs &args, unsigned char *q_smem, uint32_t *hi_smem) {
    constexpr int CHUNKS = D / 8, ROWS = 32 / CHUNKS;  // of a row; rows at once
    const PackedRow packed(args);
    hi_smem[threadIdx.x] = args.batch.positions[packed.row] + 1;
    const int row = prim::lane() / CHUNKS, chunk = prim::lane() % CHUNKS;
#pragma unroll
    for (int i = 0; i < WARP_Q; i += ROWS) {
        const int r = i + row;
        const uint16_t *from = args.q + static_cast<uint64_t>(prim::shfl(packed.row_head, r)) * D;
        prim::cp_async16(q_smem + swizzle<D * 2>(r, chunk), from + chunk * 8);
    }
}

// (warp) Stores the warp's rows, 16 bytes at a time, from where Q was, and their lse.
template <int D>
DEV void store_rows(const AttentionPrefillArgs &args, const unsigned char *q_smem,
                    const uint32_t *hi_smem) {
    constexpr int CHUNKS = D / 8, ROWS = 32 / CHUNKS;
    const PackedRow packed(args);
    const int row = prim::lane() / CHUNKS, chunk = prim::lane() % CHUNKS;
#pragma unroll
    for (int i = 0; i < WARP_Q; i += ROWS) {
        const int r = i + row;
        uint16_t *to = args.out + static_cast<uint64_t>(prim::shfl(packed.row_head, r)) * D;
        if (prim::shfl(packed.is_real, r))
            prim::st16(to + chunk * 8, prim::ld16(q_smem + swizzle<D * 2>(r, chunk)));
    }
    if (args.lse != nullptr && packed.is_real)
        args.lse[packed.row_head] = prim::as_float(hi_smem[threadIdx.x]);
}

template <int D>
DEV void body(const AttentionPrefillArgs &args) {
    constexpr int ROW_BYTES = D * 2, N_K = D / 16;
    const int lane = prim::lane(), warp = prim::warp();

    // What the block works on.
    const LorisSeq seq = args.batch.seqs[args.tiles[blockIdx.x].seq_idx];
    const PagedKv kv(args.pages, args.batch, seq, args.layer);
    const uint32_t kv_head = blockIdx.y;

    unsigned char *q_smem = prim::smem() + warp * WARP_Q * ROW_BYTES;  // of this warp
    unsigned char *ring_smem = prim::smem() + Q_BYTES<D>;
    uint32_t *hi_smem = reinterpret_cast<uint32_t *>(ring_smem + N_STAGES * STAGE_BYTES<D>);

    load_rows<D>(args, q_smem, hi_smem);
    prim::block_sync();

    View *view = reinterpret_cast<View *>(hi_smem + BLOCK_Q) + warp;
    set_view(kv, args.window, hi_smem, view);
    auto next_seen = [&](uint32_t tile) {
        for (; tile < view->tile_end; tile++)
            if (tile_has_any(kv, tile, view->block_any)) return tile;
        return NO_TILE;
    };

    // Each warp copies its run of the tile, K and V, and looks up the page of the next one well
    // before.
    auto run_slot = [&](uint32_t tile) { return tile * BLOCK_KV + warp * RUN_SLOTS; };
    auto run_page = [&](uint32_t tile) {
        return tile != NO_TILE && run_slot(tile) < kv.kv_len ? kv.page(run_slot(tile)) : 0;
    };
    auto run_gmem = [&](uint32_t page, uint32_t tile) {
        return reinterpret_cast<const uint16_t *>(kv.base + page * kv.page_bytes) +
               kv.offset(0, kv_head, run_slot(tile), D);
    };
    auto copy = [&](uint32_t tile, uint32_t stage, const uint16_t *from) {
        if (tile != NO_TILE)
            copy_run<D>(ring_smem + stage, warp * RUN_SLOTS, from,
                        static_cast<int>(kv.kv_len - run_slot(tile)));
        prim::cp_commit();
    };

    // Two half tiles ahead.
    uint32_t tile = next_seen(view->tile_start);
    const uint32_t k_to_v = (kv.n_kv_heads << kv.page_len_log2) * D;
    uint32_t k_stage = 0, next_page = run_page(tile);
    copy(tile, 0, run_gmem(next_page, tile));
    copy(tile, STAGE_BYTES<D>, run_gmem(next_page, tile) + k_to_v);
    uint32_t next = next_seen(tile + 1);
    next_page = run_page(next);

    const float scale = args.scale * LOG2_E;
    const int mk_lane = lane_offset_mk<D>(), nk_lane = lane_offset_nk<D>();
    SoftmaxState state[N_ROWS];
    float o[N_M][D / 8][4] = {};

    while (tile != NO_TILE) {
        // K of this tile has come; K of the next one takes the stage of the V that everyone is done
        // with.
        prim::cp_wait<1>();
        prim::block_sync();
        const uint32_t v_stage = next_stage<D>(k_stage);
        copy(next, next_stage<D>(v_stage), run_gmem(next_page, next));

        const bool is_seen = tile_has_any(kv, tile, view->warp_any);
        float s[N_M][N_KV][4];
        if (is_seen) {
            // S = Q K^T
#pragma unroll
            for (int i = 0; i < N_M * N_KV * 4; i++) (&s[0][0][0])[i] = 0.0f;
#pragma unroll
            for (int k = 0; k < N_K; k++) {
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

            // Scores of slots that a row does not see become -inf.
            if (!tile_has_all(kv, tile, view->warp_all)) {
                Range seen[N_ROWS];
                for (int r = 0; r < N_ROWS; r++)
                    seen[r] = seen_by(hi_smem[warp * WARP_Q + r * 8 + lane / 4], args.window);
                uint32_t positions[2];  // of slots lane and lane + 32
                for (int i = 0; i < 2; i++)
                    positions[i] = position_or_none(kv, tile * BLOCK_KV + i * 32 + lane);
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

        // V of this tile has come; V of the next one takes the stage of this tile's K.
        prim::cp_wait<1>();
        prim::block_sync();
        copy(next, k_stage, run_gmem(next_page, next) + k_to_v);
        tile = next;
        next = next_seen(next + 1);
        next_page = run_page(next);

        // O += P V
        if (is_seen) {
#pragma unroll
            for (int k = 0; k < BLOCK_KV / 16; k++) {
                uint32_t a[N_M][4];
#pragma unroll
                for (int m = 0; m < N_M; m++)
                    for (int i = 0; i < 4; i++) {
                        const int r = m * 2 + i % 2;
                        float *x = &s[m][2 * k + i / 2][i % 2 * 2];
                        float p0 = prim::exp2_fast(fmaf(x[0], scale, -state[r].row_max));
                        float p1 = prim::exp2_fast(fmaf(x[1], scale, -state[r].row_max));
                        state[r].row_sum += p0 + p1;
                        a[m][i] = prim::pack_bf16(p0, p1);
                    }
#pragma unroll
                for (int n = 0; n < D / 8; n += 2) {
                    uint32_t b[4];
                    prim::ldsm_x4_t(b,
                                    ring_smem + v_stage + k * 16 * ROW_BYTES + (mk_lane ^ n << 4));
#pragma unroll
                    for (int m = 0; m < N_M; m++) {
                        prim::mma_bf16(o[m][n], a[m], b[0], b[1]);
                        prim::mma_bf16(o[m][n + 1], a[m], b[2], b[3]);
                    }
                }
            }
        }
        k_stage = next_stage<D>(v_stage);
    }
    prim::cp_wait<0>();

    // Normalise, and put the rows where Q was and their lse in place of what they saw.
    prim::block_sync();
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
        if ((lane & 3) == 0) hi_smem[warp * WARP_Q + q_row] = prim::as_bits(state[r].lse());
    }
    prim::warp_sync();

    store_rows<D>(args, q_smem, hi_smem);
}

KERNEL(attention_prefill_d32, AttentionPrefillArgs, 128, 2) { body<32>(args); }  // <= 255 registers
KERNEL(attention_prefill_d64, AttentionPrefillArgs, 128, 2) { body<64>(args); }  // <= 255 registers
KERNEL(attention_prefill_d128, AttentionPrefillArgs, 128, 2) {
    body<128>(args);
}  // <= 255 registers
