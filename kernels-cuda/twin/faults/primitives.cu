// Each primitive once, on data that a test fills and compares.
#include "prim.cuh"

// One warp and one tensor-core instruction on fragments that the host lays out: d = c + a b.
struct MmaArgs {
    const uint32_t *a;  // [32 lanes][4]
    const uint32_t *b;  // [32][2]
    const uint32_t *c;  // [32][4]
    uint32_t *d;        // [32][4]
};

template <class Acc, class Multiply>
DEV void mma_body(const MmaArgs &args, Multiply multiply) {
    int l = prim::lane();
    uint32_t a[4];
    Acc d[4];
    for (int i = 0; i < 4; i++) a[i] = args.a[4 * l + i];
    for (int i = 0; i < 4; i++) d[i] = twin::from_bits<Acc>(args.c[4 * l + i]);
    multiply(d, a, args.b[2 * l], args.b[2 * l + 1]);
    for (int i = 0; i < 4; i++) args.d[4 * l + i] = static_cast<uint32_t>(twin::to_bits(d[i]));
}

KERNEL(twin_mma_bf16, MmaArgs, 32, 1, 0) {  // <= 32 registers
    mma_body<float>(args, [](auto &...x) { prim::mma_bf16(x...); });
}
KERNEL(twin_mma_f16, MmaArgs, 32, 1, 0) {  // <= 32 registers
    mma_body<float>(args, [](auto &...x) { prim::mma_f16(x...); });
}
KERNEL(twin_mma_s8, MmaArgs, 32, 1, 0) {  // <= 32 registers
    mma_body<int32_t>(args, [](auto &...x) { prim::mma_s8(x...); });
}

struct PrimArgs {
    const uint32_t *in;  // [128] or more
    uint32_t *out;
};

// out[lane][4 + 4]: what ldmatrix gives of 32 rows of 16 bytes, plain and transposed.
KERNEL(twin_ldsm, PrimArgs, 32, 1, 0) {  // <= 32 registers
    int l = prim::lane();
    uint32_t *row = prim::smem<uint32_t>() + 4 * l, plain[4], transposed[4];
    prim::st16(row, prim::ld16(args.in + 4 * l));
    prim::warp_sync();
    prim::ldsm_x4(plain, row);
    prim::ldsm_x4_t(transposed, row);
    for (int i = 0; i < 4; i++) args.out[8 * l + i] = plain[i];
    for (int i = 0; i < 4; i++) args.out[8 * l + 4 + i] = transposed[i];
}

// out[thread][8]: lane exchange and votes.
KERNEL(twin_lanes, PrimArgs, 64, 1, 0) {  // <= 32 registers
    uint32_t t = threadIdx.x, x = args.in[t], *out = args.out + 8 * t;
    out[0] = prim::shfl(x, 5);
    out[1] = prim::shfl_xor(x, 3);
    out[2] = prim::shfl_up(x, 4);
    out[3] = prim::ballot(x % 2 == 1);
    out[4] = prim::any(x == 40);
    out[5] = prim::all(x < 32);
    out[6] = static_cast<uint32_t>(prim::shfl(uint64_t{x} << 32, 7) >> 32);
    out[7] = static_cast<uint32_t>(prim::shfl_xor(static_cast<float>(x), 1));
}

// Warps in a chain, each handing on through a named barrier of two warps: out[0] = sum of in.
KERNEL(twin_chain, PrimArgs, 128, 1, 0) {  // <= 32 registers
    uint32_t *sum = prim::smem<uint32_t>(), w = static_cast<uint32_t>(prim::warp());
    uint32_t x = args.in[threadIdx.x];
    for (int mask = 16; mask > 0; mask /= 2) x += prim::shfl_xor(x, mask);
    if (w > 0) prim::named_sync(static_cast<int>(w), 64);
    if (prim::lane() == 0) *sum = w == 0 ? x : *sum + x;
    if (w < 3) prim::named_sync(static_cast<int>(w) + 1, 64);
    prim::block_sync();
    if (threadIdx.x == 5) args.out[0] = *sum;
}

// out[0] += threads, out[1] = max of in, out[2] and out[3] as u64 += in, out[4 ..] = histogram of
// in % 4.
KERNEL(twin_atomics, PrimArgs, 128, 1, 0) {  // <= 32 registers
    uint32_t *counts = prim::smem<uint32_t>(), x = args.in[threadIdx.x];
    if (threadIdx.x < 4) counts[threadIdx.x] = 0;
    prim::block_sync();
    prim::atomic_add(counts + x % 4, 1);
    prim::atomic_add(args.out, 1);
    prim::atomic_max(args.out + 1, x);
    prim::atomic_add(reinterpret_cast<uint64_t *>(args.out + 2), uint64_t{x} << 20);
    prim::block_sync();
    if (threadIdx.x < 4) prim::atomic_add(args.out + 4 + threadIdx.x, counts[threadIdx.x]);
}

// Three stages of background copies, two in flight: out[i] = in[i] + 1 of four tiles of 512; odd
// chunks are zeroed.
KERNEL(twin_pipeline, PrimArgs, 128, 1, 0) {  // <= 32 registers
    uint32_t *stages = prim::smem<uint32_t>(), t = threadIdx.x;
    auto load = [&](uint32_t tile) {
        if (tile < 4)
            prim::cp_async16_or_zero(stages + tile % 3 * 512 + 4 * t,
                                     t % 2 == 0 ? args.in + tile * 512 + 4 * t : nullptr,
                                     t % 2 == 0);
        prim::cp_commit();
    };
    load(0);
    load(1);
    for (uint32_t tile = 0; tile < 4; tile++) {
        prim::cp_wait<1>();
        prim::block_sync();
        load(tile + 2);
        for (uint32_t i = 0; i < 4; i++) {
            uint32_t at = i * 128 + t;
            args.out[tile * 512 + at] = stages[tile % 3 * 512 + at] + 1;
        }
    }
}

// out[i] = blockIdx of a 3-d grid, coordinates as digits.
KERNEL(twin_grid, PrimArgs, 32, 1, 0) {  // <= 32 registers
    uint32_t block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    if (threadIdx.x == 0) args.out[block] = 100 * blockIdx.z + 10 * blockIdx.y + blockIdx.x;
}

struct MathArgs {
    const float *in;  // [32]
    uint32_t *out;    // [32][3]
};

// exp2_fast, rsqrt_fast and pack_bf16 of in.
KERNEL(twin_math, MathArgs, 32, 1, 0) {  // <= 32 registers
    float x = args.in[threadIdx.x];
    uint32_t *out = args.out + 3 * threadIdx.x;
    out[0] = prim::as_bits(prim::exp2_fast(x));
    out[1] = prim::as_bits(prim::rsqrt_fast(x));
    out[2] = prim::pack_bf16(x, -x);
}

// Adds `value` to out[0 .. n]: work whose order shows.
struct StepArgs {
    uint32_t *out;
    uint32_t multiply, add;
};
KERNEL(twin_step, StepArgs, 32, 1, 0) {  // <= 32 registers
    args.out[threadIdx.x] = args.out[threadIdx.x] * args.multiply + args.add;
}
