// Q, K, V of many rows, each head finished (heads.cuh): bias, q/k norm, rotation, Q to its rows, K
// and V to their pages.
//
//   a        bf16 [n_rows][k]
//   wq       bf16 [n_q_heads * D][k]
//   wk, wv   bf16 [n_kv_heads * D][k]
//
// One block computes 128 rows of BLOCK_N columns, BLOCK_N / D whole heads, of one of the three
// matrices (gemm_prefill.cuh). The tiles of q come first, then those of k and of v. The products
// pass through the shared memory of the mainloop, as f32, so that D / 8 lanes hold a head of a row:
//
//   [128 rows][BLOCK_N + 8 floats]   the eight spread the rows of a fragment over the banks
#include "gemm_prefill.cuh"
#include "heads.cuh"

template <int D, int BLOCK_N>
DEV void body(const QkvPrefillArgs &args) {
    using Gemm = PrefillGemm<BLOCK_N, 1>;
    constexpr uint32_t STRIDE = BLOCK_N + 8, TILE_HEADS = BLOCK_N / D;
    static_assert(Gemm::BLOCK_M * STRIDE * 4 <= Gemm::SMEM_BYTES,
                  "the products fit where the stages were");

    // Which heads of which matrix.
    const LorisHeads &heads = args.heads;
    uint32_t n_rows = heads.batch.n_rows, n_kv_heads = heads.pages.n_kv_heads;
    uint32_t n_q_tiles = ceil_div(heads.n_q_heads, TILE_HEADS),
             n_kv_tiles = ceil_div(n_kv_heads, TILE_HEADS);
    TileIdx tile(blockIdx.x, ceil_div(n_rows, Gemm::BLOCK_M), n_q_tiles + 2 * n_kv_tiles);
    const uint16_t *weight = args.wq;
    uint32_t n_heads = heads.n_q_heads, first_head = 0, tile_n = tile.n;
    if (tile_n >= n_q_tiles) {
        bool is_v = tile_n >= n_q_tiles + n_kv_tiles;
        weight = is_v ? args.wv : args.wk;
        n_heads = n_kv_heads;
        first_head = heads.n_q_heads + (is_v ? n_kv_heads : 0);
        tile_n -= n_q_tiles + (is_v ? n_kv_tiles : 0);
    }
    uint32_t m_start = tile.m * Gemm::BLOCK_M, n_start = tile_n * BLOCK_N;

    Gemm gemm;
    const uint16_t *w[1] = {weight + static_cast<uint64_t>(n_start) * args.k};
    gemm.run(args.a + static_cast<uint64_t>(m_start) * args.k, n_rows - m_start, w,
             n_heads * D - n_start, args.k);

    // Products to shared memory.
    float *product = prim::smem<float>();
    frag::Coord at = frag::c_m16n8(prim::lane(), 0);
    float *to = product + (gemm.warp_row() + at.row) * STRIDE + gemm.warp_col() + at.col;
#pragma unroll
    for (int i = 0; i < 4; i++) {
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const float (&acc)[4] = gemm.acc[i][j];
            *reinterpret_cast<float2 *>(to + i * 16 * STRIDE + j * 8) = {acc[0], acc[1]};
            *reinterpret_cast<float2 *>(to + (i * 16 + 8) * STRIDE + j * 8) = {acc[2], acc[3]};
        }
    }
    prim::block_sync();

    // A warp finishes all heads of its rows. Lane l looks up the slot of row l, once.
    constexpr uint32_t WARP_ROWS = Gemm::BLOCK_M / Gemm::N_WARPS, GROUPS = HeadGroup<D>::HEADS;
    constexpr uint32_t N_ROUNDS = WARP_ROWS * TILE_HEADS / GROUPS,
                       BATCH = N_ROUNDS < 4 ? N_ROUNDS : 4;
    static_assert(WARP_ROWS <= 32 && N_ROUNDS % BATCH == 0, "a lane for each row, whole batches");
    uint32_t warp_row = prim::warp() * WARP_ROWS, lane = prim::lane();
    PageSlot slot = {};
    if (first_head > 0 && lane < WARP_ROWS && m_start + warp_row + lane < n_rows) {
        slot = append_slot(heads, m_start + warp_row + lane);
    }
    // Rounds of a head a group; the angles of a batch of rounds are under way together.
    for (uint32_t start = 0; start < N_ROUNDS; start += BATCH) {
        Rotation<D> rotation[BATCH] = {};
#pragma unroll
        for (uint32_t i = 0; i < BATCH; i++) {
            uint32_t row =
                m_start + warp_row + ((start + i) * GROUPS + HeadGroup<D>::idx()) / TILE_HEADS;
            if (row < n_rows) rotation[i].load(heads.cos_sin + static_cast<uint64_t>(row) * D);
        }
#pragma unroll
        for (uint32_t i = 0; i < BATCH; i++) {
            uint32_t idx = (start + i) * GROUPS + HeadGroup<D>::idx();
            uint32_t in_warp = idx / TILE_HEADS, in_tile = idx % TILE_HEADS;
            uint32_t row = m_start + warp_row + in_warp, head = tile_n * TILE_HEADS + in_tile;
            const uint64_t page = prim::shfl(reinterpret_cast<uint64_t>(slot.page), in_warp);
            const PageSlot row_slot = {reinterpret_cast<unsigned char *>(page),
                                       prim::shfl(slot.idx, in_warp)};
            finish_head<D>(heads, product + (warp_row + in_warp) * STRIDE + in_tile * D,
                           first_head + head, row, row_slot, row < n_rows && head < n_heads,
                           rotation[i]);
        }
    }
}

KERNEL(qkv_prefill_d32_n128, QkvPrefillArgs, 128, 2,
       PrefillGemm<128, 1>::SMEM_BYTES) {  // <= 255 registers
    body<32, 128>(args);
}
KERNEL(qkv_prefill_d64_n128, QkvPrefillArgs, 128, 2,
       PrefillGemm<128, 1>::SMEM_BYTES) {  // <= 255 registers
    body<64, 128>(args);
}
KERNEL(qkv_prefill_d128_n128, QkvPrefillArgs, 128, 2,
       PrefillGemm<128, 1>::SMEM_BYTES) {  // <= 255 registers
    body<128, 128>(args);
}
KERNEL(qkv_prefill_d32_n256, QkvPrefillArgs, 256, 1,
       PrefillGemm<256, 1>::SMEM_BYTES) {  // <= 255 registers
    body<32, 256>(args);
}
KERNEL(qkv_prefill_d64_n256, QkvPrefillArgs, 256, 1,
       PrefillGemm<256, 1>::SMEM_BYTES) {  // <= 255 registers
    body<64, 256>(args);
}
KERNEL(qkv_prefill_d128_n256, QkvPrefillArgs, 256, 1,
       PrefillGemm<256, 1>::SMEM_BYTES) {  // <= 255 registers
    body<128, 256>(args);
}
