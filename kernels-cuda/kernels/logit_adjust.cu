// A row of logits with biases and penalties: out = logits, changed at a few ids. The logits stay
// what the model made them: who reads them later wants those.
//
// A thread copies logits of its ids, and a block then applies the changes whose ids are among
// those that it copied. Each change is one id's, so no two threads write the same place. Bytes
// moved: 8 vocab_size, and 16 a change for each block, from L2 after the first.
#include "prim.cuh"

constexpr int N_THREADS = 256;
constexpr int N_AHEAD = 8;  // logits that a thread loads at once
constexpr uint32_t RUN = N_THREADS * N_AHEAD;

DEV void body(const LogitAdjustArgs &args) {
    const uint32_t first = blockIdx.x * RUN;
    const uint32_t n = args.vocab_size - first < RUN ? args.vocab_size - first : RUN;
    float ahead[N_AHEAD];
    for (int j = 0; j < N_AHEAD; j++) {
        const uint32_t i = threadIdx.x + j * N_THREADS;
        ahead[j] = i < n ? args.logits[first + i] : 0.0f;
    }
    for (int j = 0; j < N_AHEAD; j++) {
        const uint32_t i = threadIdx.x + j * N_THREADS;
        if (i < n) args.out[first + i] = ahead[j];
    }
    prim::block_sync();

    for (uint32_t c = threadIdx.x; c < args.n_changes; c += N_THREADS) {
        const LorisLogitChange change = args.changes[c];
        if (change.id - first >= n) continue;  // below it wraps around
        float logit = args.logits[change.id] + change.bias;
        logit = logit > 0.0f ? logit / change.factor : logit * change.factor;
        args.out[change.id] = logit - change.minus;
    }
}

KERNEL(logit_adjust, LogitAdjustArgs, N_THREADS, 1, 0) { body(args); }  // <= 40 registers
