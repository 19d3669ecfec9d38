// Random bf16 weights from a counter: element i is a hash of seed + i, uniform in -scale .. scale.
//
// The hash is SplitMix64 (Steele, Lea, Flood 2014). Its top 24 bits become a float without
// rounding, the product with `scale` and the step to bf16 round once each, so every device and
// `ops::fill_random::value` give the same bits. A thread writes 8 elements (16 bytes).
#include "prim.cuh"

constexpr int N_THREADS = 256;

DEV float value(uint64_t counter, float scale) {
    uint64_t z = counter * 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    z ^= z >> 31;
    const int32_t centred = static_cast<int32_t>(z >> 40) - (1 << 23);  // -2^23 .. 2^23 - 1
    return static_cast<float>(centred) * (1.0f / (1 << 23)) * scale;
}

DEV void body(const FillRandomArgs &args) {
    const uint64_t first = 8 * (static_cast<uint64_t>(blockIdx.x) * N_THREADS + threadIdx.x);
    if (first + 8 <= args.n) {
        uint32_t pairs[4];
        for (int i = 0; i < 4; i++) {
            const uint64_t counter = args.seed + first + 2 * i;
            pairs[i] = prim::pack_bf16(value(counter, args.scale), value(counter + 1, args.scale));
        }
        prim::st16(args.out + first, uint4{pairs[0], pairs[1], pairs[2], pairs[3]});
        return;
    }
    for (uint64_t i = first; i < args.n; i++) {
        args.out[i] = prim::to_bf16(value(args.seed + i, args.scale));
    }
}

KERNEL(fill_random, FillRandomArgs, N_THREADS, 1, 0) { body(args); }  // <= 40 registers
