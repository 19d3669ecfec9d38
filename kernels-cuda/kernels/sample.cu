// A token for each row of logits, with the meaning of the engine's sampler: temperature, top-k,
// top-p, min-p, one draw; temperature 0 takes the first of the largest.
//
// One block a row, and no sorting. Elements have a total order, likeliest first: an integer made of
// the scaled logit and the id (`order_of`). Each cut, and the draw itself, asks for the element at
// which a sum along that order reaches a target: of counts for top-k, of weights for top-p and for
// the draw. It is found digit by digit from the top, with a histogram of 2^11 bins in shared memory
// for each of the five digits. What a cut leaves is a bound: elements whose order is at least that
// of the last one taken.
//
// Weights exp(logit - top) are fixed-point integers, so sums are exact and the same in any order;
// each is within 2^-32 of its value, or 2^-46 of the top's. Bytes moved: 4 vocab_size, from L2
// after the first of 6 to 16 passes.
#include "prim.cuh"
#include "select.cuh"

constexpr int N_THREADS = 1024;
constexpr int N_WARPS = N_THREADS / 32;
constexpr int N_BITS = 11;  // of a digit; five digits are 32 bits of logit and 23 of id
constexpr int N_DIGITS = 5;
constexpr int N_BINS = 1 << N_BITS;
constexpr int N_AHEAD = 8;  // logits that a thread loads at once
constexpr int ID_BITS = N_DIGITS * N_BITS - 32;
constexpr uint32_t LAST_ID = (1u << ID_BITS) - 1;
constexpr int WEIGHT_BITS = 45;  // the likeliest weighs 2^45: sums of 2^19 - 1 weights fit 64 bits
constexpr int N_STEPS = 256;     // of the table of powers, an octave

struct Smem {
    uint32_t lo[N_BINS], hi[N_BINS];  // a histogram of 64-bit sums as two words
    uint64_t power[N_STEPS];          // 2^(62 - i / N_STEPS)
    uint64_t best[N_WARPS];
    ReachScratch<N_WARPS, uint64_t> reach;
    float min_below_top;
};

// Larger is likelier; of equal logits the lower id.
DEV uint64_t order_of(float logit, uint32_t id) {
    return static_cast<uint64_t>(float_key(logit)) << ID_BITS | (LAST_ID - id);
}

// Calls f(id, logit) for the ids that this thread looks at: all of the row, or those that may be
// drawn.
template <class F>
DEV void each_logit(const SampleArgs &args, const uint32_t *masked, F f) {
    const float *logits = args.logits + static_cast<uint64_t>(blockIdx.x) * args.vocab_size;
    for (uint32_t first = threadIdx.x; first < args.vocab_size; first += N_THREADS * N_AHEAD) {
        float ahead[N_AHEAD];
        for (int j = 0; j < N_AHEAD; j++) {
            const uint32_t id = first + j * N_THREADS;
            ahead[j] = id < args.vocab_size ? logits[id] : 0.0f;
        }
        for (int j = 0; j < N_AHEAD; j++) {
            const uint32_t id = first + j * N_THREADS;
            if (id >= args.vocab_size) break;
            if (masked == nullptr || !(masked[id / 32] >> id % 32 & 1)) f(id, ahead[j]);
        }
    }
}

// The order of the likeliest; UINT64_MAX where a logit is not finite, 0 where no id may be drawn.
DEV uint64_t find_best(const SampleArgs &args, Smem &s) {
    uint64_t best = 0;
    each_logit(args, nullptr, [&](uint32_t id, float logit) {
        const bool is_masked = args.masked != nullptr && (args.masked[id / 32] >> id % 32 & 1);
        const bool is_finite = fabsf(logit) < INFINITY;
        const uint64_t order = is_masked ? 0 : order_of(logit + 0.0f, id);  // -0 + 0 is +0
        const uint64_t mine = is_finite ? order : UINT64_MAX;
        best = mine > best ? mine : best;
    });
    for (int mask = 16; mask > 0; mask /= 2) {
        const uint64_t other = prim::shfl_xor(best, mask);
        best = other > best ? other : best;
    }
    if (prim::lane() == 0) s.best[prim::warp()] = best;
    prim::block_sync();
    for (int w = 0; w < N_WARPS; w++) best = s.best[w] > best ? s.best[w] : best;
    return best;
}

// What the walks share: set up once the top is known.
struct Row {
    float temperature;
    float top;  // the largest logit, scaled

    DEV float below_top(float scaled) const { return fminf(scaled - top, 0.0f); }  // inf - inf: 0
};

DEV void set_up(const LorisSampling &sampling, Smem &s) {
    if (threadIdx.x < N_STEPS) {
        const double power = exp2(static_cast<double>(threadIdx.x) / -N_STEPS);
        s.power[threadIdx.x] = static_cast<uint64_t>(power * 4611686018427387904.0);
    }
    if (threadIdx.x == 0) {
        // exp(x) >= min_p where x is at least this, rounded up.
        const double exact = log(static_cast<double>(sampling.min_p));
        float bound = static_cast<float>(exact);
        if (bound < exact) bound = prim::as_float(prim::as_bits(bound) - 1);
        s.min_below_top = bound;
    }
    prim::block_sync();
}

// exp(x) 2^45 for x <= 0: a power of two from the table, and a short series for the part of a step
// that is left.
DEV uint64_t weight_of(float x, const Smem &s) {
    constexpr double steps = N_STEPS * 1.4426950408889634;  // of exp(-1)
    constexpr float steps_hi = static_cast<float>(steps),
                    steps_lo = static_cast<float>(steps - steps_hi);
    x = fmaxf(x, -32.0f);  // weighs nothing
    const float step = rintf(x * steps_hi);
    const float part = fmaf(x, steps_lo, fmaf(x, steps_hi, -step));  // of a step, |part| <= 0.501
    const float y = part * static_cast<float>(1 / steps);
    const float expm1 = y * (1.0f + y * (0.5f + y * (1.0f / 6)));

    const uint32_t n = static_cast<uint32_t>(-step);
    const uint64_t power = s.power[n % N_STEPS];
    const int64_t scaled =
        static_cast<int64_t>(power >> 32) * static_cast<int32_t>(expm1 * 0x1p40f);
    const int shift = 62 - WEIGHT_BITS + n / N_STEPS;
    return (power + (scaled >> 8) + (1ull << (shift - 1))) >> shift;
}

// The order of the element at which the sum of `measure(scaled, id)`, over the ids that may be
// drawn and are not below `bound`, reaches target(sum of all). Elements that measure 0 do not take
// part.
template <class Measure, class Target>
DEV uint64_t walk(const SampleArgs &args, const Row &row, uint64_t bound, Smem &s, Measure measure,
                  Target target) {
    uint64_t high = 0, rest = 0;  // the digits found, and what is left of the target
    for (int digit = 0; digit < N_DIGITS; digit++) {
        const int shift = (N_DIGITS - 1 - digit) * N_BITS;
        for (int i = threadIdx.x; i < N_BINS; i += N_THREADS) s.lo[i] = s.hi[i] = 0;
        prim::block_sync();

        // Sum the digit of elements that agree so far.
        each_logit(args, args.masked, [&](uint32_t id, float logit) {
            const float scaled = logit / row.temperature;
            const uint64_t order = order_of(scaled, id), digits = order >> shift;
            if (order < bound || digits >> N_BITS != high) return;
            const uint64_t value = measure(scaled);
            const uint32_t lo = static_cast<uint32_t>(value), bin = digits % N_BINS;
            const uint32_t old = lo == 0 ? 0 : prim::atomic_add(&s.lo[bin], lo);
            const uint32_t hi = static_cast<uint32_t>(value >> 32) + (old + lo < old);  // the carry
            if (hi > 0) prim::atomic_add(&s.hi[bin], hi);
        });
        prim::block_sync();

        // The digit at which the sum reaches the target.
        uint64_t bins[N_BINS / N_THREADS];
        for (int i = 0; i < N_BINS / N_THREADS; i++) {
            const int bin = N_BINS - 1 - (threadIdx.x * (N_BINS / N_THREADS) + i);
            bins[i] = static_cast<uint64_t>(s.hi[bin]) << 32 | s.lo[bin];
        }
        const auto goal = [&](uint64_t total) { return digit == 0 ? target(total) : rest; };
        const auto found = reach<N_WARPS>(bins, goal, s.reach);
        high = high << N_BITS | found.bin;
        rest = found.rest;
    }
    return high;
}

// A share of a sum, from 1 to the sum.
DEV uint64_t share(double rounded, uint64_t total) {
    const uint64_t x = static_cast<uint64_t>(rounded);
    return x < 1 ? 1 : x < total ? x : total;
}

DEV uint32_t draw(const SampleArgs &args, const LorisSampling &sampling, float best, Smem &s) {
    set_up(sampling, s);
    const Row row = {sampling.temperature, best / sampling.temperature};
    uint64_t bound = 0;

    // Top-k: the bound is the k-th element.
    if (sampling.top_k > 0 && sampling.top_k < args.vocab_size) {
        bound = walk(
            args, row, bound, s, [](float) { return uint64_t(1); },
            [&](uint64_t total) { return sampling.top_k < total ? sampling.top_k : total; });
    }
    // Top-p: the bound is the element whose weight completes the share.
    if (sampling.top_p < 1.0f) {
        const double top_p = sampling.top_p;
        bound = walk(
            args, row, bound, s, [&](float scaled) { return weight_of(row.below_top(scaled), s); },
            [&](uint64_t total) { return share(ceil(top_p * total), total); });
    }
    // Min-p and the draw: the first element whose sum exceeds the drawn share.
    const auto kept_weight = [&](float scaled) {
        const float x = row.below_top(scaled);
        return x >= s.min_below_top ? weight_of(x, s) : 0;
    };
    const uint64_t drawn = walk(args, row, bound, s, kept_weight, [&](uint64_t total) {
        return share(floor(sampling.uniform * total) + 1.0, total);
    });
    return LAST_ID - (drawn & LAST_ID);
}

DEV void body(const SampleArgs &args) {
    Smem &s = *prim::smem<Smem>();
    const LorisSampling sampling = args.sampling[blockIdx.x];
    const uint64_t best = find_best(args, s);
    uint32_t token = UINT32_MAX;
    if (best != 0 && best != UINT64_MAX) {
        token = LAST_ID - (best & LAST_ID);
        if (sampling.temperature > 0.0f) {
            token = draw(args, sampling, key_float(static_cast<uint32_t>(best >> ID_BITS)), s);
        }
    }
    if (threadIdx.x == 0) args.tokens[blockIdx.x] = token;
}

KERNEL(sample, SampleArgs, N_THREADS, 1, sizeof(Smem)) { body(args); }  // <= 64 registers
