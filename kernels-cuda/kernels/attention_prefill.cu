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
// Where pages hold codes, each warp copies the codes of its strips to a place of its own, K and V
// half a tile ahead, and spreads them into a tile of bf16 before everyone multiplies by it:
//
//   codes of K   codes of V   [warp][strip]          in place of the ring
//   tile of K    tile of V    [BLOCK_KV][D] bf16     V is finished; K is codes,
//   params of K               [BLOCK_KV]             whose scale and zero go into the scores in f32
//
// Where pages are sealed K is finished too, from codes and the params of channels that come with
// them; bf16 strips of the first page and the tail go to their place in a tile at once, as soon as
// everyone is done with what was there.
#include "kv/coding.cuh"
#include "rotation.cuh"
#include "softmax_state.cuh"

constexpr int BLOCK_Q = 128, BLOCK_KV = 64;
constexpr int N_WARPS = 4, WARP_Q = BLOCK_Q / N_WARPS;
constexpr int N_STAGES = 3;
constexpr int N_M = WARP_Q / 16;    // m16 tiles of a warp
constexpr int N_ROWS = 2 * N_M;     // rows that a lane has a part of
constexpr int N_KV = BLOCK_KV / 8;  // n8 tiles of S

static_assert(BLOCK_KV == N_WARPS * STRIP_SLOTS, "each warp copies one strip of a tile");
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

// Where things are behind Q: the ring, or tiles and codes; then params of K and sums of Q's groups.
template <int D, class K, class V>
struct Smem {
    static constexpr bool IS_CODED = SKEW<K, V> != 0;
    // Keys of bf16 go to their tile at once.
    static constexpr int K_STRIP = K::IS_CODED ? K::BYTES : 0, V_STRIP = V::BYTES;
    static constexpr int V_TILE = STAGE_BYTES<D>;
    static constexpr int CODES = IS_CODED ? 2 * STAGE_BYTES<D> : N_STAGES * STAGE_BYTES<D>;
    static constexpr int K_PARAMS = CODES + (IS_CODED ? N_WARPS * (K_STRIP + V_STRIP) : 0);
    static constexpr int Q_SUMS = K_PARAMS + BLOCK_KV * K::KEPT_BYTES;
    static constexpr int END = Q_SUMS + BLOCK_Q * K::ROW_SUM_BYTES;
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
template <int D, class K, class V>
DEV void add_slots(const AttentionPrefillArgs &args, Meets meets, SoftmaxState (&state)[N_ROWS],
                   float (&o)[N_M][D / 8][4]) {
    using At = Smem<D, K, V>;
    constexpr int ROW_BYTES = D * 2, N_K = D / 16;
    constexpr bool SEALED = K::BY_CHANNEL;
    const int lane = prim::lane(), warp = prim::warp();

    // What the block works on.
    const PagedKv<SKEW<K, V>, SEALED> kv(args.pages, args.batch, sequence(args), args.layer);
    const uint32_t kv_head = blockIdx.y;

    unsigned char *q_smem = prim::smem() + warp * WARP_Q * ROW_BYTES;  // of this warp
    unsigned char *ring_smem = prim::smem() + Q_BYTES<D>;
    uint32_t *position_smem = reinterpret_cast<uint32_t *>(ring_smem + At::END);
    unsigned char *q_sums_smem = ring_smem + At::Q_SUMS;

    load_rows<D>(args, q_smem, position_smem);
    if (K::HAS_ZERO || meets == Meets::SINKS) {
        prim::cp_commit();
        prim::cp_wait<0>();
        prim::warp_sync();
    }
    if (meets == Meets::SINKS) {
        turn_rows<D>(args, q_smem);
        prim::warp_sync();
    }
    if constexpr (K::HAS_ZERO) K::sum_rows(q_smem, q_sums_smem);
    prim::block_sync();

    View *view = reinterpret_cast<View *>(position_smem + BLOCK_Q) + warp;
    set_view(kv, args, meets, position_smem, view);
    auto next_seen = [&](uint32_t tile) {
        for (; tile < view->tile_end; tile++)
            if (tile_has_any(kv, tile, view->block_any)) return tile;
        return NO_TILE;
    };

    // Each warp copies its strip of the tile, K and V, and looks up the page of the next one well
    // before.
    auto strip_slot = [&](uint32_t tile) { return tile * BLOCK_KV + warp * STRIP_SLOTS; };
    auto strip_page = [&](uint32_t tile) {
        return tile != NO_TILE && strip_slot(tile) < kv.end() ? kv.page(strip_slot(tile)) : 0;
    };
    auto n_valid = [&](uint32_t tile) { return kv.n_readable(strip_slot(tile)); };
    auto is_wide_strip = [&](uint32_t tile) { return kv.is_wide(strip_slot(tile)); };
    auto copy_k = [&](uint32_t tile, uint32_t page, uint32_t stage) {
        if (tile != NO_TILE && !(SEALED && is_wide_strip(tile))) {
            const CodedStrip strip = coded_strip<D, K, V>(kv, page, kv_head, strip_slot(tile));
            const unsigned char *from = strip.page + strip.k.codes;
            unsigned char *codes = ring_smem + At::CODES + warp * At::K_STRIP;
            if constexpr (!K::IS_CODED) {
                const int row = strip.is_wide ? WIDE_ROW : 0;
                copy_swizzled<ROW_BYTES>(ring_smem + stage, warp * STRIP_SLOTS,
                                         from - row * ROW_BYTES, n_valid(tile), row);
            } else if (strip.is_wide) {
                copy_rows<WIDE_SLOTS, ROW_BYTES>(codes, from, n_valid(tile) - WIDE_ROW);
            } else {
                K::copy_flat(codes, strip.page, strip.k, n_valid(tile));
            }
        }
        prim::cp_commit();
    };
    auto copy_v = [&](uint32_t tile, uint32_t page, uint32_t stage) {
        if (tile != NO_TILE && !(SEALED && is_wide_strip(tile))) {
            const CodedStrip strip = coded_strip<D, K, V>(kv, page, kv_head, strip_slot(tile));
            const unsigned char *from = strip.page + strip.v.codes;
            unsigned char *codes =
                ring_smem + At::CODES + N_WARPS * At::K_STRIP + warp * At::V_STRIP;
            if constexpr (!V::IS_CODED) {
                copy_swizzled<ROW_BYTES>(ring_smem + stage, warp * STRIP_SLOTS, from,
                                         n_valid(tile));
            } else if (strip.is_wide) {
                copy_rows<WIDE_SLOTS, ROW_BYTES>(codes, from, n_valid(tile) - WIDE_ROW);
            } else {
                V::copy_flat(codes, strip.page, strip.v, n_valid(tile));
            }
        }
        prim::cp_commit();
    };

    // Where pages are sealed: the bf16 strip of a tile, K or V, to where it is multiplied with.
    auto copy_wide = [&](uint32_t tile, uint32_t side, uint32_t to) {
        if (tile != NO_TILE && is_wide_strip(tile))
            WideRows<D, true>::copy(ring_smem + to, warp * STRIP_SLOTS, kv, strip_slot(tile),
                                    kv_head, side);
        prim::cp_commit();
    };

    // Two half tiles ahead.
    uint32_t tile = next_seen(view->tile_start);
    uint32_t k_stage = 0, next_page = strip_page(tile);
    if constexpr (SEALED) copy_wide(tile, 0, 0);
    copy_k(tile, next_page, 0);
    copy_v(tile, next_page, STAGE_BYTES<D>);
    uint32_t next = next_seen(tile + 1);
    next_page = strip_page(next);

    // Makes K of this tile ready, and that of the next one come.
    auto take_k = [&](uint32_t v_stage) {
        prim::cp_wait<1>();
        if constexpr (!At::IS_CODED) {
            // K of the next tile takes the stage of the V that everyone is done with.
            prim::block_sync();
            copy_k(next, next_page, next_stage<D>(v_stage));
        } else if constexpr (SEALED) {
            prim::warp_sync();
            const unsigned char *codes = ring_smem + At::CODES + warp * At::K_STRIP;
            if (!is_wide_strip(tile))
                spread<K, D, true>(ring_smem, warp * STRIP_SLOTS, codes, STRIP_SLOTS);
            prim::block_sync();
            copy_wide(tile, 1, At::V_TILE);  // everyone is done with the last tile's V
            copy_k(next, next_page, 0);
        } else {
            if constexpr (K::IS_CODED) {
                prim::warp_sync();
                const unsigned char *codes = ring_smem + At::CODES + warp * At::K_STRIP;
                const bool is_wide = kv.is_wide(strip_slot(tile));
                if (is_wide) {
                    WideRows<D, false>::spread(ring_smem, warp * STRIP_SLOTS, codes);
                } else {
                    spread<K, D, false>(ring_smem, warp * STRIP_SLOTS, codes, n_valid(tile));
                }
                K::template keep<BLOCK_KV>(ring_smem + At::K_PARAMS, warp * STRIP_SLOTS, codes,
                                           is_wide);
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
                ring_smem + At::CODES + N_WARPS * At::K_STRIP + warp * At::V_STRIP;
            if (!is_wide_strip(tile))
                spread<V, D, true>(ring_smem + At::V_TILE, warp * STRIP_SLOTS, codes, STRIP_SLOTS);
            prim::block_sync();
            copy_wide(next, 0, 0);  // everyone is done with this tile's K
            copy_v(next, next_page, 0);
        } else {
            prim::cp_wait<K::IS_CODED ? 1 : 0>();
            prim::warp_sync();
            const unsigned char *codes =
                ring_smem + At::CODES + N_WARPS * At::K_STRIP + warp * At::V_STRIP;
            unsigned char *v_tile = ring_smem + At::V_TILE;
            if (kv.is_wide(strip_slot(tile))) {
                WideRows<D, false>::spread(v_tile, warp * STRIP_SLOTS, codes);
            } else {
                spread<V, D, true>(v_tile, warp * STRIP_SLOTS, codes, n_valid(tile));
            }
            prim::warp_sync();
            if constexpr (K::IS_CODED) {
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
                if constexpr (K::GROUPS == 2) {
                    if (k == N_K / 2) K::scale_first_group(s, ring_smem + At::K_PARAMS);
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

            if constexpr (K::HAS_PARAMS) K::scale_scores(s, ring_smem + At::K_PARAMS, q_sums_smem);

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
        next_page = strip_page(next);

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

template <int D, class K, class V>
DEV void body(const AttentionPrefillArgs &args) {
    constexpr int ROW_BYTES = D * 2;
    const int lane = prim::lane(), warp = prim::warp();
    SoftmaxState state[N_ROWS];
    float o[N_M][D / 8][4] = {};
    // Tables with sealed pages are no stream's.
#pragma unroll 1
    for (int i = !K::BY_CHANNEL && sequence(args).sink > 0 ? 0 : 1; i < 2; i++)
        add_slots<D, K, V>(args, i == 0 ? Meets::SINKS : Meets::WINDOW, state, o);
    if constexpr (V::HAS_ZERO) {
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

template <int D, class K, class V>
constexpr int SMEM_BYTES = Smem<D, K, V>::BYTES;

FAMILY(attention_prefill, AttentionPrefillArgs, 128, 2, SMEM_BYTES)  // <= 255 registers
