// Shared memory without bank conflicts: 16-byte chunks of a row are permuted by the row.
#pragma once

#include "prim.cuh"

// Byte offset of 16-byte chunk `chunk` of row `row` in a tile of rows of ROW_BYTES (a power of two
// from 64). Eight rows that ldmatrix reads at one chunk then lie in eight different 16-byte bank
// groups.
template <int ROW_BYTES>
DEV int swizzle(int row, int chunk) {
    static_assert(ROW_BYTES >= 64 && (ROW_BYTES & (ROW_BYTES - 1)) == 0, "a power of two from 64");
    if (ROW_BYTES >= 128) return row * ROW_BYTES + ((chunk ^ (row & 7)) << 4);
    return row * ROW_BYTES + ((chunk ^ ((row >> 1) & 3)) << 4);  // two rows share 128 bytes
}
