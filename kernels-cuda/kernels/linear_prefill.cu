// x += a W^T for many rows.
//
//   a   bf16 [n_rows][k]
//   W   bf16 [n][k]
//   x   f32 [n_rows][n], the residual stream
//
// One block computes 128 x BLOCK_N of the product (gemm_prefill.cuh) and adds it to x: a quad of
// lanes reads and writes 32 bytes of a row at a time. Both variants give the same bits: wide blocks
// bring fewer bytes from L2, narrow ones fill the device with fewer rows.
#include "gemm_prefill.cuh"

template <int BLOCK_N>
DEV void body(const LinearPrefillArgs &args) {
    using Gemm = PrefillGemm<BLOCK_N, 1>;
    TileIdx tile(blockIdx.x, ceil_div(args.n_rows, Gemm::BLOCK_M), ceil_div(args.n, BLOCK_N));
    uint32_t m_start = tile.m * Gemm::BLOCK_M, n_start = tile.n * BLOCK_N;

    Gemm gemm;
    const uint16_t *w[1] = {args.w + static_cast<uint64_t>(n_start) * args.k};
    gemm.run(args.a + static_cast<uint64_t>(m_start) * args.k, args.n_rows - m_start, w,
             args.n - n_start, args.k);

    // Sixteen pairs of x are under way at a time. n is a multiple of 8: a fragment is inside or
    // outside.
    frag::Coord at = frag::c_m16n8(prim::lane(), 0);
    uint32_t row = m_start + gemm.warp_row() + at.row, col = n_start + gemm.warp_col() + at.col;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float2 old[2][8] = {};
#pragma unroll
        for (int half = 0; half < 2; half++) {
            uint32_t r = row + i * 16 + half * 8;
            float *x = args.x + static_cast<uint64_t>(r) * args.n + col;
#pragma unroll
            for (int j = 0; j < 8; j++) {
                if (r < args.n_rows && col + j * 8 < args.n)
                    old[half][j] = *reinterpret_cast<float2 *>(x + j * 8);
            }
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            uint32_t r = row + i * 16 + half * 8;
            float *x = args.x + static_cast<uint64_t>(r) * args.n + col;
#pragma unroll
            for (int j = 0; j < 8; j++) {
                float2 sum = {old[half][j].x + gemm.acc[i][j][2 * half],
                              old[half][j].y + gemm.acc[i][j][2 * half + 1]};
                if (r < args.n_rows && col + j * 8 < args.n)
                    *reinterpret_cast<float2 *>(x + j * 8) = sum;
            }
        }
    }
}

KERNEL(linear_prefill_n128, LinearPrefillArgs, 128, 2,
       PrefillGemm<128, 1>::SMEM_BYTES) {  // <= 255 registers
    body<128>(args);
}
KERNEL(linear_prefill_n256, LinearPrefillArgs, 256, 1,
       PrefillGemm<256, 1>::SMEM_BYTES) {  // <= 255 registers
    body<256>(args);
}
