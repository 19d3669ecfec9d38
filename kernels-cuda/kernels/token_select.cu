// The n_keep best of n scores, as two ascending lists of indices: those kept and those dropped.
//
// One block. The score of the last one kept is found digit by digit from the top, each with a
// histogram in shared memory; scores equal to it are kept by lower index. Then tiles of TILE scores
// are written out in order: a warp holds ROWS rows of 32 neighbours, so that stores of neighbours
// meet in the same line.
//
//   tile   | warp 0                    | warp 1                    | ..
//            row 0: lane 0 .. lane 31    row 0: lane 0 .. lane 31
//            row 1: ..                   row 1: ..
//
// The first n_head and the last n_tail take part with a key above every score. Bytes moved: 4
// passes over the scores (from L2 after the first), 4 n_keep and 4 (n - n_keep) written.
#include "prim.cuh"
#include "select.cuh"

constexpr int N_THREADS = 1024;
constexpr int N_WARPS = N_THREADS / 32;
constexpr int N_BITS = 11;  // of a digit
constexpr int N_BINS = 1 << N_BITS;
constexpr int N_COPIES = 4;  // of the histogram, by lane: equal digits in a warp collide less
constexpr int ROWS = 8;
constexpr uint32_t TILE = N_THREADS * ROWS;
static_assert(TILE < 1 << 16, "two counts of a tile share a word");

struct Smem {
    uint32_t counts[N_COPIES][N_BINS];
    ReachScratch<N_WARPS, uint32_t> reach;
    uint32_t warps[2][N_WARPS];
};

// Unsigned, in the order of the scores, -0 and +0 equal; head and tail above infinity.
DEV uint32_t key_at(const TokenSelectArgs &args, uint32_t i) {
    const bool always = i < args.n_head || i >= args.n - args.n_tail;
    return always ? UINT32_MAX : float_key(args.scores[i] + 0.0f);  // -0 + 0 is +0
}

// The key of the last one kept, and how many with that key are kept.
struct Threshold {
    uint32_t key;
    uint32_t n_equal;
};

DEV Threshold find_threshold(const TokenSelectArgs &args, Smem &s) {
    if (args.n_keep == 0) return {UINT32_MAX, 0};
    uint32_t *counts = s.counts[prim::lane() % N_COPIES];
    uint32_t high = 0, rest = args.n_keep;  // the digits found, and how many are kept below them
    for (int shift = 2 * N_BITS; shift >= 0; shift -= N_BITS) {
        for (int i = threadIdx.x; i < N_COPIES * N_BINS; i += N_THREADS) s.counts[0][i] = 0;
        prim::block_sync();

        // Count the digit of keys that agree so far.
        for (uint32_t first = threadIdx.x; first < args.n; first += TILE) {
            uint32_t keys[ROWS];
            for (int j = 0; j < ROWS; j++) {
                const uint32_t i = first + j * N_THREADS;
                keys[j] = i < args.n ? key_at(args, i) : 0;
            }
            for (int j = 0; j < ROWS; j++) {
                const uint32_t digits = keys[j] >> shift;
                const bool agrees = digits >> N_BITS == high && first + j * N_THREADS < args.n;
                if (agrees) prim::atomic_add(&counts[digits % N_BINS], 1u);
            }
        }
        prim::block_sync();

        // The digit of the last one kept.
        uint32_t bins[2] = {0, 0};
        for (int copy = 0; copy < N_COPIES; copy++) {
            bins[0] += s.counts[copy][N_BINS - 1 - 2 * threadIdx.x];
            bins[1] += s.counts[copy][N_BINS - 2 - 2 * threadIdx.x];
        }
        const auto found = reach<N_WARPS>(bins, [&](uint32_t) { return rest; }, s.reach);
        high = high << N_BITS | found.bin;
        rest = found.rest;
    }
    return {high, rest};
}

DEV void body(const TokenSelectArgs &args) {
    Smem &s = *prim::smem<Smem>();
    const Threshold threshold = find_threshold(args, s);

    const uint32_t lanes_below = (1u << prim::lane()) - 1;
    uint32_t n_above = 0, n_equal = 0;  // in the tiles before
    for (uint32_t tile = 0, first = 0; first < args.n; tile++, first += TILE) {
        // Which are above the threshold, which equal to it: one bit each.
        const uint32_t mine = first + prim::warp() * (32 * ROWS) + prim::lane();
        uint32_t above[ROWS], equal[ROWS];
        uint32_t counts = 0;  // above in the low half, equal in the high half
        for (int j = 0; j < ROWS; j++) {
            const uint32_t i = mine + j * 32;
            const uint32_t key = i < args.n ? key_at(args, i) : 0;
            above[j] = prim::ballot(i < args.n && key > threshold.key);
            equal[j] = prim::ballot(i < args.n && key == threshold.key);
            counts += popcount(above[j]) + (popcount(equal[j]) << 16);
        }

        // How many of each come before this warp.
        uint32_t total;
        const uint32_t before = warps_before<N_WARPS>(counts, s.warps[tile % 2], total);
        uint32_t warp_above = n_above + (before & 0xffff), warp_equal = n_equal + (before >> 16);
        n_above += total & 0xffff;
        n_equal += total >> 16;

        // What is kept goes behind what was kept before it, the others behind the others.
        for (int j = 0; j < ROWS; j++) {
            const uint32_t i = mine + j * 32;
            const uint32_t rank = warp_equal + popcount(equal[j] & lanes_below);  // among equals
            const uint32_t n_ties = rank < threshold.n_equal ? rank : threshold.n_equal;
            const uint32_t n_kept = warp_above + popcount(above[j] & lanes_below) + n_ties;
            const uint32_t candidates = above[j] | (rank < threshold.n_equal ? equal[j] : 0);
            const bool is_kept = candidates >> prim::lane() & 1;
            if (i < args.n && is_kept) args.keep[n_kept] = i;
            if (i < args.n && !is_kept && args.drop != nullptr) args.drop[i - n_kept] = i;
            warp_above += popcount(above[j]);
            warp_equal += popcount(equal[j]);
        }
    }
}

KERNEL(token_select, TokenSelectArgs, N_THREADS, 1, sizeof(Smem)) {  // <= 64 registers
    body(args);
}
