// Shared memory without bank conflicts: 16-byte chunks of a row are permuted by the row.
#pragma once

#include "prim.cuh"

// Byte offset of 16-byte chunk `chunk` of row `row` in a tile of rows of ROW_BYTES (a power of two
// from 16). Eight rows that ldmatrix reads at one chunk then lie in eight different 16-byte bank
// groups.
template <int ROW_BYTES>
DEV int swizzle(int row, int chunk) {
    static_assert(ROW_BYTES >= 16 && (ROW_BYTES & (ROW_BYTES - 1)) == 0, "a power of two from 16");
    if (ROW_BYTES >= 128) return row * ROW_BYTES + ((chunk ^ (row & 7)) << 4);
    if (ROW_BYTES == 64)  // two rows share 128 bytes
        return row * ROW_BYTES + ((chunk ^ ((row >> 1) & 3)) << 4);
    if (ROW_BYTES == 32) return row * ROW_BYTES + ((chunk ^ ((row >> 2) & 1)) << 4);  // four
    return row * ROW_BYTES;  // eight, of one chunk each
}
