// h = silu(norm(x) Wg^T) * (norm(x) Wu^T) for the few rows of a decode step, rounded to bf16.
//
//   gate [n][k] bf16   block (g, i): rows 16 i .. 16 i + 16 of both matrices by batch rows
//   up   [n][k] bf16   16 g .. 16 g + 16; each thread finishes one value of h
//
// The norm rides along: 1 / rms scales both sums at the end.
// Bytes: 2 n k 2 of weights; the rows (n_rows k 4) come from the L2 cache.
#include "gemv_decode.cuh"

constexpr float LOG2_E = 1.4426950408889634f;

// x / (1 + e^-x)
DEV float silu(float x) { return x / (1.0f + prim::exp2_fast(-x * LOG2_E)); }

template <int N_TILES>
DEV void gate_up(const GateUpDecodeArgs &args) {
    const uint16_t *w[2][2];
    for (int i = 0; i < 2; i++) {
        uint64_t row = gemv::weight_row(i, args.n);
        w[0][i] = args.gate + row * args.in.k;
        w[1][i] = args.up + row * args.in.k;
    }
    gemv::Product<2, N_TILES> product;
    product.run(w, gemv::NormRows<N_TILES>(args.in), args.in.k);

    const gemv::Value<N_TILES> v(args.in.n_rows, args.n);
    if (!v.exists) return;
    const float scale = product.inverse_rms(v.n, args.in);
    const float gate = product.at(0, v.m, v.n) * scale;
    const float up = product.at(1, v.m, v.n) * scale;
    args.h[static_cast<uint64_t>(v.row) * args.n + v.column] = prim::to_bf16(silu(gate) * up);
}

// At most 8 rows in all, and any number.
KERNEL(gate_up_decode_r8, GateUpDecodeArgs, 256, 3, gemv::SMEM_BYTES<2, 1>) {  // <= 80 registers
    gate_up<1>(args);
}
KERNEL(gate_up_decode_r16, GateUpDecodeArgs, 256, 2, gemv::SMEM_BYTES<2, 2>) {  // <= 128 registers
    gate_up<2>(args);
}
