// Sixteen slots of a page in shared memory: how they get there and how ldmatrix finds them.
//
// page_len is a multiple of 16, so 16 slots from a multiple of 16 are one contiguous run of one
// page: one page lookup, and one warp copies them with 16-byte chunks next to each other.
#pragma once

#include "kv_format.cuh"
#include "swizzle.cuh"

constexpr int RUN_SLOTS = 16;

// The first slots of a coded sequence are the last of a run.
constexpr int WIDE_ROW = RUN_SLOTS - LORIS_KV_WIDE;
static_assert(WIDE_ROW == LORIS_KV_SKEW, "runs of coded pages begin at multiples of 16");

// Bytes of a run in a page, and so in shared memory: codes, then params, those of channels too. The
// bf16 rows of a first page are no more.
template <uint32_t FORMAT, int D>
constexpr int RUN_PARAM_BYTES = RUN_SLOTS * PARAM_BYTES<FORMAT, D> + CHANNEL_BYTES<FORMAT, D>;
template <uint32_t FORMAT, int D>
constexpr int RUN_BYTES = RUN_SLOTS * CODE_BYTES<FORMAT, D> + RUN_PARAM_BYTES<FORMAT, D>;
static_assert(LORIS_KV_WIDE * 32 * 2 <= RUN_BYTES<INT4, 32>, "they are not");

// (warp) Starts copying 16 rows of ROW_BYTES to rows row0.. of a swizzled tile; row0 is a multiple
// of 16. Rows before `first_valid` and from n_valid on are not in use: they are not read and become
// zeros.
template <int ROW_BYTES>
DEV void copy_run(unsigned char *tile_smem, int row0, const void *run_gmem, int n_valid,
                  int first_valid = 0) {
    constexpr int CHUNKS = ROW_BYTES / 16, ROWS = 32 / CHUNKS;  // of a row; rows at once
    const int row = prim::lane() / CHUNKS, chunk = prim::lane() % CHUNKS;
    if (ROWS > RUN_SLOTS && row >= RUN_SLOTS) return;
    const uint64_t from = reinterpret_cast<uint64_t>(run_gmem) + row * ROW_BYTES + chunk * 16;
    const int to = swizzle<ROW_BYTES>(row, chunk);
#pragma unroll
    for (int i = 0; i < RUN_SLOTS; i += ROWS) {  // rows i + row: their bits do not overlap
        unsigned char *to_smem = tile_smem + row0 * ROW_BYTES + i * ROW_BYTES +
                                 (to ^ swizzle<ROW_BYTES>(i, 0) % ROW_BYTES);
        const void *from_gmem = reinterpret_cast<const void *>(from + i * ROW_BYTES);
        prim::cp_async16_or_zero(to_smem, from_gmem, row + i < n_valid && row + i >= first_valid);
    }
}

// (warp) Starts copying rows of ROW_BYTES as they lie, zeros from n_valid on.
template <int N_ROWS, int ROW_BYTES>
DEV void copy_rows(unsigned char *to_smem, const unsigned char *from_gmem, int n_valid) {
    for (int at = prim::lane() * 16; at < N_ROWS * ROW_BYTES; at += 32 * 16)
        prim::cp_async16_or_zero(to_smem + at, from_gmem + at, at < n_valid * ROW_BYTES);
}

// (warp) Starts copying the params of a run, those of slots that are not in use too.
template <uint32_t FORMAT, int D>
DEV void copy_params(unsigned char *to_smem, const unsigned char *from_gmem) {
    const int at = prim::lane() * 16;
    static_assert(RUN_PARAM_BYTES<FORMAT, D> <= 32 * 16, "16 bytes a lane");
    if (at < RUN_PARAM_BYTES<FORMAT, D>) prim::cp_async16(to_smem + at, from_gmem + at);
}

// (warp) Starts copying 16 bf16 rows of a table with sealed pages to rows row0.. of a swizzled
// tile: a tail's pages may be shorter than 16 slots, so each row is looked up, by a lane. Rows that
// are not in use become zeros.
template <int D, class Kv>
DEV void copy_wide_run(unsigned char *tile_smem, int row0, const Kv &kv, uint32_t first_slot,
                       uint32_t kv_head, uint32_t side) {
    constexpr int CHUNKS = D / 8, ROWS = 32 / CHUNKS;  // of a row; rows at once
    const uint32_t slot = first_slot + prim::lane() % RUN_SLOTS;
    const bool is_used = kv.is_used(slot);
    const unsigned char *row_gmem = is_used ? wide_row<D>(kv, slot, kv_head, side) : kv.base;
    const int row = prim::lane() / CHUNKS, chunk = prim::lane() % CHUNKS;
#pragma unroll
    for (int i = 0; i < RUN_SLOTS; i += ROWS) {
        const uint64_t from = prim::shfl(reinterpret_cast<uint64_t>(row_gmem), i + row);
        prim::cp_async16_or_zero(tile_smem + swizzle<D * 2>(row0 + i + row, chunk),
                                 reinterpret_cast<const void *>(from + chunk * 16),
                                 prim::shfl(static_cast<int>(is_used), i + row) != 0);
    }
}

// Where a run of coded pages begins: codes and params of keys and of values. Runs of bf16 of a
// table with sealed pages are none: copy_wide_run.
struct CodedRun {
    const unsigned char *page;
    HeadPlace k, v;
    bool is_wide;  // the bf16 slots of a first page: row WIDE_ROW.. of the run
};

template <int D, uint32_t K, uint32_t V, class Kv>
DEV CodedRun coded_run(const Kv &kv, uint32_t page, uint32_t kv_head, uint32_t first_slot) {
    const bool is_wide = !IS_BY_CHANNEL<K> && kv.is_wide(first_slot);
    const uint32_t len = is_wide ? LORIS_KV_WIDE : 1u << kv.page_len_log2;
    const uint32_t slot = is_wide ? 0 : kv.in_page(first_slot);
    const uint32_t k = is_wide ? BF16 : K, v = is_wide ? BF16 : V;
    return {kv.base + page * kv.page_bytes,
            head_place<D>(k, k, kv.n_kv_heads, len, 0, kv_head, slot),
            head_place<D>(k, v, kv.n_kv_heads, len, 1, kv_head, slot), is_wide};
}

// Where a lane's row for ldsm_x4 begins in a swizzled 16 x 16 block: of an A operand [m][k], or,
// transposed, of a B operand [k][n] (V: slots are k). r[0..1] are then the B registers of columns
// 0..7, r[2..3] of 8..15. The block 16 rows further on is 16 rows further; 16 columns further is
// `offset ^ 32`. Rows of less than 32 bytes have no second columns: their first ones are repeated.
template <int ROW_BYTES>
DEV int row_offset_mk() {
    return swizzle<ROW_BYTES>(prim::lane() & 15, ROW_BYTES < 32 ? 0 : prim::lane() >> 4);
}
template <int D>
DEV int lane_offset_mk() {
    return row_offset_mk<D * 2>();
}

// The same for a B operand that lies as [n][k] (K: slots are n), not transposed.
template <int ROW_BYTES>
DEV int row_offset_nk() {
    return swizzle<ROW_BYTES>((prim::lane() & 7) | (prim::lane() & 16) >> 1,
                              ROW_BYTES < 32 ? 0 : (prim::lane() >> 3) & 1);
}
template <int D>
DEV int lane_offset_nk() {
    return row_offset_nk<D * 2>();
}
