// Radix selection: keys that sort as floats do, prefix sums, and the bin of a histogram at which a
// running sum reaches a target. Everything counts in integers, so results do not depend on the
// order of additions.
#pragma once

#include "prim.cuh"

// Unsigned keys in the order of the floats, -0 below +0; NaN does not occur.
DEV uint32_t float_key(float x) {
    const uint32_t bits = prim::as_bits(x);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}
DEV float key_float(uint32_t key) { return prim::as_float(key >> 31 ? key & 0x7fffffffu : ~key); }

// Set bits of a word.
DEV uint32_t popcount(uint32_t x) {
    x -= (x >> 1) & 0x55555555u;
    x = (x & 0x33333333u) + ((x >> 2) & 0x33333333u);
    x = (x + (x >> 4)) & 0x0f0f0f0fu;
    return (x * 0x01010101u) >> 24;
}

// (warp) The sum over the lanes up to this one.
template <class T>
DEV T warp_scan(T v) {
    for (int delta = 1; delta < 32; delta *= 2) {
        const T below = prim::shfl_up(v, delta);
        if (prim::lane() >= delta) v += below;
    }
    return v;
}

// One value a warp: the sum over the warps below this one, and over all. `scratch` holds N_WARPS
// values and is free again after the next barrier.
template <int N_WARPS, class T>
DEV T warps_before(T v, T *scratch, T &total) {
    static_assert(N_WARPS <= 32, "one lane for each warp");
    if (prim::lane() == 0) scratch[prim::warp()] = v;
    prim::block_sync();
    const T sums = warp_scan(prim::lane() < N_WARPS ? scratch[prim::lane()] : T(0));
    total = prim::shfl(sums, N_WARPS - 1);
    const T before = prim::shfl(sums, prim::warp() == 0 ? 0 : prim::warp() - 1);
    return prim::warp() == 0 ? T(0) : before;
}

// Where a walk down the bins of a histogram ended.
template <class T>
struct Reached {
    uint32_t bin;
    T rest;  // the target less the bins above
};

template <int N_WARPS, class T>
struct ReachScratch {
    T warps[N_WARPS];
    Reached<T> result;
};

// The bin at which the sum from the highest bin down reaches `target(sum of all)`, which is from 1
// to that sum. Thread t holds the N bins that begin t * N below the highest. Free to be called
// again after a barrier.
template <int N_WARPS, int N, class T, class Target>
DEV Reached<T> reach(const T (&bins)[N], Target target, ReachScratch<N_WARPS, T> &scratch) {
    T sum = 0, total;
    for (int i = 0; i < N; i++) sum += bins[i];
    const T upto = warp_scan(sum);
    T above = warps_before<N_WARPS>(prim::shfl(upto, 31), scratch.warps, total) + upto - sum;
    const T goal = target(total);
    for (int i = 0; i < N; i++) {
        if (above < goal && goal <= above + bins[i]) {  // true of one bin in the block
            scratch.result = {N_WARPS * 32 * N - 1 - (threadIdx.x * N + i), goal - above};
        }
        above += bins[i];
    }
    prim::block_sync();
    return scratch.result;
}
