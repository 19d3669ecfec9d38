// Sums and maxima over a warp and a block, in a fixed order.
#pragma once

#include "prim.cuh"

// (warp) Every lane gets the sum.
DEV float warp_sum(float v) {
    for (int mask = 16; mask > 0; mask >>= 1) v += prim::shfl_xor(v, mask);
    return v;
}

// (warp) Every lane gets the maximum.
DEV float warp_max(float v) {
    for (int mask = 16; mask > 0; mask >>= 1) v = fmaxf(v, prim::shfl_xor(v, mask));
    return v;
}

// All threads of a block of N_WARPS warps get the sum. `scratch` holds N_WARPS floats and is free
// again after the next barrier.
template <int N_WARPS>
DEV float block_sum(float v, float *scratch) {
    v = warp_sum(v);
    if (prim::lane() == 0) scratch[prim::warp()] = v;
    prim::block_sync();
    float sum = 0.0f;
    for (int w = 0; w < N_WARPS; w++) sum += scratch[w];
    return sum;
}
