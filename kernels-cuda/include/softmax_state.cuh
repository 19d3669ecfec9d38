// The running softmax of one query row, in base 2.
//
// With x = score * scale * log2(e), attention is sum(2^x v) / sum(2^x). Both sums are kept divided
// by 2^row_max, so that nothing overflows: any row_max near the largest x gives the same quotient.
// So row_max is raised only where a tile exceeds it by more than SLACK: what is summed stays below
// 2^SLACK per slot, and most tiles rescale nothing. Whether a row is raised depends on that row
// alone.
//
// Masked scores are x = -inf. A row that has seen nothing has row_max = NOTHING, far below any
// score but finite, and row_sum = 0. So a tile that is masked throughout changes no bit: its
// maximum -inf never raises, and 2^(-inf - row_max) = 0 is added. (Were row_max -inf, -inf - -inf
// would be NaN.)
#pragma once

#include "prim.cuh"

constexpr float LOG2_E = 1.44269504f;
constexpr float LN_2 = 0.693147181f;

struct SoftmaxState {
    static constexpr float NOTHING = -1e30f, SLACK = 8.0f;

    float row_max = NOTHING;  // what x is measured from: within SLACK of the largest
    float row_sum = 0.0f;

    DEV bool is_raised_by(float tile_max) const { return tile_max > row_max + SLACK; }

    // Takes notice of a tile with the largest x `tile_max`; returns the factor for the sums so far.
    DEV float raise(float tile_max) {
        if (!is_raised_by(tile_max)) return 1.0f;
        float factor = weight_in(tile_max);
        row_max = tile_max;
        row_sum *= factor;
        return factor;
    }

    // What the sums of this part are multiplied by in a whole that is measured from `whole_max`; 0
    // where the part is nothing and the whole is not.
    DEV float weight_in(float whole_max) const { return prim::exp2_fast(row_max - whole_max); }

    // The natural logarithm of the sum of e^score; -inf for nothing.
    DEV float lse() const { return row_sum > 0.0f ? row_max * LN_2 + logf(row_sum) : -INFINITY; }

    // What the sum of 2^(x - row_max) v is multiplied by at the end: a row that saw nothing becomes
    // zero.
    DEV float normaliser() const { return row_sum > 0.0f ? 1.0f / row_sum : 0.0f; }
};
