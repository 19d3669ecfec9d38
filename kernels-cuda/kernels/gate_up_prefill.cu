// h = bf16(silu(a Wg^T) * (a Wu^T)) for many rows.
//
//   a        bf16 [n_rows][k]
//   Wg, Wu   bf16 [n][k]
//   h        bf16 [n_rows][n]
//
// One block computes 128 rows of the same BLOCK_N / 2 columns of both products (gemm_prefill.cuh):
// fragments j and j + 4 of a warp are gate and up of the same elements of h, so that they meet in
// registers and neither product is ever stored.
#include "gemm_prefill.cuh"

constexpr float LOG2_E = 1.44269504f;

// x / (1 + exp(-x)); exp(-x) is infinite for very negative x, and the quotient -0.
DEV float silu(float x) { return x / (1.0f + prim::exp2_fast(-LOG2_E * x)); }

template <int BLOCK_N>
DEV void body(const GateUpPrefillArgs &args) {
    using Gemm = PrefillGemm<BLOCK_N, 2>;
    TileIdx tile(blockIdx.x, ceil_div(args.n_rows, Gemm::BLOCK_M), ceil_div(args.n, Gemm::N_COLS));
    uint32_t m_start = tile.m * Gemm::BLOCK_M, n_start = tile.n * Gemm::N_COLS;

    Gemm gemm;
    uint64_t first_w = static_cast<uint64_t>(n_start) * args.k;
    const uint16_t *w[2] = {args.gate + first_w, args.up + first_w};
    gemm.run(args.a + static_cast<uint64_t>(m_start) * args.k, args.n_rows - m_start, w,
             args.n - n_start, args.k);

    // n is a multiple of 8: a fragment is inside or outside.
    frag::Coord at = frag::c_m16n8(prim::lane(), 0);
    uint32_t row = m_start + gemm.warp_row() + at.row, col = n_start + gemm.warp_col() / 2 + at.col;
#pragma unroll
    for (int i = 0; i < 4; i++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            uint32_t r = row + i * 16 + half * 8;
            uint16_t *h = args.h + static_cast<uint64_t>(r) * args.n + col;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const float (&gate)[4] = gemm.acc[i][j], (&up)[4] = gemm.acc[i][j + 4];
                float x = silu(gate[2 * half]) * up[2 * half];
                float y = silu(gate[2 * half + 1]) * up[2 * half + 1];
                if (r < args.n_rows && col + j * 8 < args.n) {
                    *reinterpret_cast<uint32_t *>(h + j * 8) = prim::pack_bf16(x, y);
                }
            }
        }
    }
}

KERNEL(gate_up_prefill_n128, GateUpPrefillArgs, 128, 2,
       PrefillGemm<128, 2>::SMEM_BYTES) {  // <= 255 registers
    body<128>(args);
}
KERNEL(gate_up_prefill_n256, GateUpPrefillArgs, 256, 1,
       PrefillGemm<256, 2>::SMEM_BYTES) {  // <= 255 registers
    body<256>(args);
}
