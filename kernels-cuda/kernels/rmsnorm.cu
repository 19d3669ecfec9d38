// out[r] = bf16(x[r] / sqrt(mean(x[r]^2) + eps) * weight): x f32 [n_rows][hidden_dim], out bf16 of
// the same shape.
//
// One block a row. Thread t takes columns 8 t .. 8 t + 7 of every 2048, sums their squares in
// order, and the block sums over the threads. Up to 8192 columns stay in registers: x is read once
// (4 bytes an element, 2 written); what is longer is read again, from cache.
#include "reduce.cuh"

constexpr int N_THREADS = 256;
constexpr int STEP = 8 * N_THREADS;  // columns that the block takes at a time
constexpr int N_HELD = 4;            // steps whose columns a thread keeps

// Eight consecutive floats.
struct Float8 {
    float v[8];

    DEV void load(const float *from) {
        uint4 lo = prim::ld16(from), hi = prim::ld16(from + 4);
        v[0] = prim::as_float(lo.x), v[1] = prim::as_float(lo.y);
        v[2] = prim::as_float(lo.z), v[3] = prim::as_float(lo.w);
        v[4] = prim::as_float(hi.x), v[5] = prim::as_float(hi.y);
        v[6] = prim::as_float(hi.z), v[7] = prim::as_float(hi.w);
    }

    DEV float add_squares(float sum) const {
#pragma unroll
        for (int i = 0; i < 8; i++) sum += v[i] * v[i];
        return sum;
    }
};

// Eight normalised columns, from `col` on.
DEV void store(const RmsnormArgs &args, uint16_t *out, uint32_t col, const Float8 &x,
               float inv_rms) {
    Float8 w;
    w.load(args.weight + col);
    uint32_t pairs[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        pairs[i] = prim::pack_bf16(x.v[2 * i] * inv_rms * w.v[2 * i],
                                   x.v[2 * i + 1] * inv_rms * w.v[2 * i + 1]);
    }
    prim::st16(out + col, uint4{pairs[0], pairs[1], pairs[2], pairs[3]});
}

DEV void body(const RmsnormArgs &args) {
    uint64_t start = static_cast<uint64_t>(blockIdx.x) * args.hidden_dim;
    const float *x = args.x + start;
    uint16_t *out = args.out + start;
    uint32_t col = threadIdx.x * 8;

    // Sum of squares: columns in ascending order.
    Float8 held[N_HELD];
#pragma unroll
    for (int i = 0; i < N_HELD; i++) {
        if (col + i * STEP < args.hidden_dim) held[i].load(x + col + i * STEP);
    }
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < N_HELD; i++) {
        if (col + i * STEP < args.hidden_dim) sum = held[i].add_squares(sum);
    }
#pragma unroll 1
    for (uint32_t c = col + N_HELD * STEP; c < args.hidden_dim; c += STEP) {
        Float8 more;
        more.load(x + c);
        sum = more.add_squares(sum);
    }
    sum = block_sum<N_THREADS / 32>(sum, prim::smem<float>());
    float inv_rms = 1.0f / sqrtf(sum / args.hidden_dim + args.eps);

    // Scaled.
#pragma unroll
    for (int i = 0; i < N_HELD; i++) {
        if (col + i * STEP < args.hidden_dim) store(args, out, col + i * STEP, held[i], inv_rms);
    }
#pragma unroll 1
    for (uint32_t c = col + N_HELD * STEP; c < args.hidden_dim; c += STEP) {
        Float8 more;
        more.load(x + c);
        store(args, out, c, more, inv_rms);
    }
}

KERNEL(rmsnorm, RmsnormArgs, N_THREADS, 2, N_THREADS / 32 * 4) { body(args); }  // <= 64 registers
