// Sixteen slots of a page in shared memory: how they get there and how ldmatrix finds them.
//
// page_len is a multiple of 16, so 16 slots from a multiple of 16 are one contiguous run of one
// page: one page lookup, and one warp copies them with 16-byte chunks next to each other.
#pragma once

#include "paged_kv.cuh"
#include "swizzle.cuh"

constexpr int RUN_SLOTS = 16;

// (warp) Starts copying 16 rows of D bf16 values to rows row0.. of a swizzled tile; row0 is a
// multiple of 16. Rows from n_valid on are not in use: they are not read and become zeros.
template <int D>
DEV void copy_run(unsigned char *tile_smem, int row0, const uint16_t *run_gmem, int n_valid) {
    constexpr int ROW_BYTES = D * 2, CHUNKS = D / 8, ROWS = 32 / CHUNKS;  // of a row; rows at once
    const int row = prim::lane() / CHUNKS, chunk = prim::lane() % CHUNKS;
    const uint64_t from = reinterpret_cast<uint64_t>(run_gmem) + row * ROW_BYTES + chunk * 16;
    const int to = swizzle<ROW_BYTES>(row, chunk);
#pragma unroll
    for (int i = 0; i < RUN_SLOTS; i += ROWS) {  // rows i + row: their bits do not overlap
        unsigned char *to_smem = tile_smem + row0 * ROW_BYTES + i * ROW_BYTES +
                                 (to ^ swizzle<ROW_BYTES>(i, 0) % ROW_BYTES);
        const void *from_gmem = reinterpret_cast<const void *>(from + i * ROW_BYTES);
        prim::cp_async16_or_zero(to_smem, from_gmem, row + i < n_valid);
    }
}

// Where a lane's row for ldsm_x4 begins in a swizzled 16 x 16 block: of an A operand [m][k], or,
// transposed, of a B operand [k][n] (V: slots are k). r[0..1] are then the B registers of columns
// 0..7, r[2..3] of 8..15. The block 16 rows further on is 16 * D * 2 bytes further; 16 columns
// further is `offset ^ 32`.
template <int D>
DEV int lane_offset_mk() {
    return swizzle<D * 2>(prim::lane() & 15, prim::lane() >> 4);
}

// The same for a B operand that lies as [n][k] (K: slots are n), not transposed.
template <int D>
DEV int lane_offset_nk() {
    return swizzle<D * 2>((prim::lane() & 7) | (prim::lane() & 16) >> 1, (prim::lane() >> 3) & 1);
}
