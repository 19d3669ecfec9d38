// The mainloop of the matrix products of prefill: a tile of A W^T.
//
//   A       bf16 [n_rows][k]
//   W       bf16 [n][k]
//   block   128 x BLOCK_N (128 or 256) of the product; 2 x BLOCK_N / 64 warps
//   warp    64 x 64, in 4 x 8 fragments of m16n8k16: 128 accumulators a thread
//   stage   64 of k: 128 + BLOCK_N rows of 128 bytes, swizzled; of three, two are being filled
//
// A stage is four steps of 16 of k. While the tensor cores work on one, the fragments of the next
// are read from shared memory and a quarter of the stage after the next is requested. There is one
// barrier a stage. What lies outside of A, W or k is filled with zeros. An element is the sum over
// ascending k whatever the tile and its place: its bits depend on its row and column alone.
//
// Bytes: a block brings (128 + BLOCK_N) * 128 bytes from L2 for 128 * BLOCK_N * 128 FLOP. The tiles
// that share columns of W are neighbours in the grid: up to 2048 rows read W from memory once.
#pragma once

#include "frag.h"
#include "prim.cuh"
#include "swizzle.cuh"

// Which tile of a product a block computes: groups of 16 rows of tiles, each walked column by
// column, so that the blocks that run together share rows of A and of W.
struct TileIdx {
    uint32_t m, n;

    DEV TileIdx(uint32_t idx, uint32_t n_m_tiles, uint32_t n_n_tiles) {
        constexpr uint32_t GROUP = 16;
        uint32_t first_m = idx / (GROUP * n_n_tiles) * GROUP;
        uint32_t group = n_m_tiles - first_m < GROUP ? n_m_tiles - first_m : GROUP;
        uint32_t in_group = idx - first_m * n_n_tiles;
        m = first_m + in_group % group;
        n = in_group / group;
    }
};

DEV uint32_t ceil_div(uint32_t a, uint32_t b) { return (a + b - 1) / b; }

// One tile. With two matrices (N_W = 2) its columns are 32 of the first and 32 of the second in
// turn, BLOCK_N / 2 of each: a warp holds the same 32 columns of both.
template <int BLOCK_N, int N_W>
struct PrefillGemm {
    static constexpr int BLOCK_M = 128, BLOCK_K = 64, N_STAGES = 3;
    static constexpr int N_WARPS = 2 * BLOCK_N / 64, N_THREADS = 32 * N_WARPS;
    static constexpr int N_COLS = BLOCK_N / N_W;  // of each matrix
    static constexpr int ROW_BYTES = BLOCK_K * 2, CHUNKS = ROW_BYTES / 16;
    static constexpr int STAGE_BYTES = (BLOCK_M + BLOCK_N) * ROW_BYTES;
    static constexpr int SMEM_BYTES = N_STAGES * STAGE_BYTES;
    static constexpr int N_KK = BLOCK_K / 16;
    // A thread copies chunk t % 8 of rows t / 8, t / 8 + COPY_ROWS, ... of both tiles.
    static constexpr int COPY_ROWS = N_THREADS / CHUNKS;
    static constexpr int N_A = BLOCK_M / COPY_ROWS, N_B = BLOCK_N / COPY_ROWS;
    static_assert(N_A % N_KK == 0 && N_B % N_KK == 0, "every step of 16 requests as much");
    static_assert(COPY_ROWS <= 32 && COPY_ROWS % 8 == 0,
                  "a copy stays in one matrix, at one swizzle");

    float acc[4][8][4] = {};  // [m fragment][n fragment][element]

    // The rows that a thread copies from.
    struct Source {
        const uint16_t *a, *w[N_W];  // this thread's chunk of its first row, at k = 0
        uint32_t n_a, n_w;           // rows of A and of each W from there on
        uint32_t k, chunk_k;         // length of the rows; where in a stage the chunk begins
    };

    // Row (tile) and first column (tile) of this warp.
    DEV static uint32_t warp_row() { return prim::warp() % 2 * 64; }
    DEV static uint32_t warp_col() { return prim::warp() / 2 * 64; }

    // The product of a's rows (n_rows of them, at most 128 used) and w's rows (n_w, at most N_COLS
    // used). Shared memory is free for other use afterwards.
    DEV void run(const uint16_t *a, uint32_t n_rows, const uint16_t *const (&w)[N_W], uint32_t n_w,
                 uint32_t k) {
        unsigned char *smem = prim::smem();
        uint32_t row = threadIdx.x / CHUNKS, chunk = threadIdx.x % CHUNKS;
        uint64_t first = static_cast<uint64_t>(row) * k + chunk * 8;
        Source from = {a + first, {}, n_rows > row ? n_rows - row : 0, n_w > row ? n_w - row : 0, k,
                       chunk * 8};
        for (int i = 0; i < N_W; i++) from.w[i] = w[i] + first;
        unsigned char *copy_to = smem + swizzle<ROW_BYTES>(row, chunk);

        // The four matrices of an ldmatrix: of A (rows 0-7, 8-15) at k 0-7, then at k 8-15; of W
        // (k 0-7, 8-15) of columns 0-7, then of columns 8-15.
        int lane = prim::lane();
        uint32_t a_at = swizzle<ROW_BYTES>(warp_row() + lane % 16, lane / 16);
        uint32_t w_at = BLOCK_M * ROW_BYTES +
                        swizzle<ROW_BYTES>(warp_col() + lane % 8 + lane / 16 * 8, lane / 8 % 2);

        // Fill all stages but one, and read the first fragments.
        for (int stage = 0; stage < N_STAGES - 1; stage++) {
#pragma unroll
            for (int kk = 0; kk < N_KK; kk++)
                copy(copy_to + stage * STAGE_BYTES, from, stage * BLOCK_K, kk);
            prim::cp_commit();
        }
        prim::cp_wait<N_STAGES - 2>();
        prim::block_sync();
        uint32_t a_frag[2][4][4], w_frag[2][4][4];
        load(a_frag[0], w_frag[0], smem, a_at, w_at, 0);

        // Copies past the end of k bring zeros that nobody uses, so that the loop has no cases.
        uint32_t read = 0, write = (N_STAGES - 1) * STAGE_BYTES;
        for (uint32_t k_start = 0; k_start < k; k_start += BLOCK_K) {
#pragma unroll
            for (int kk = 0; kk < N_KK; kk++) {
                copy(copy_to + write, from, k_start + (N_STAGES - 1) * BLOCK_K, kk);
                if (kk == N_KK - 1) {
                    // The next stage has landed, and all have read this one: it is filled next.
                    prim::cp_commit();
                    prim::cp_wait<N_STAGES - 2>();
                    prim::block_sync();
                    write = read;
                    read = read == (N_STAGES - 1) * STAGE_BYTES ? 0 : read + STAGE_BYTES;
                }
                int now = kk % 2, next = (kk + 1) % 2;
                load(a_frag[next], w_frag[next], smem + read, a_at, w_at, (kk + 1) % N_KK);
                multiply(a_frag[now], w_frag[now]);
            }
        }
        prim::cp_wait<0>();
        prim::block_sync();
    }

    // Requests quarter kk of a stage, whose first k is k_start.
    DEV static void copy(unsigned char *to, const Source &from, uint32_t k_start, int kk) {
        bool in_k = k_start + from.chunk_k < from.k;
#pragma unroll
        for (int n = 0; n < N_A / N_KK; n++) {
            uint32_t row = (kk * (N_A / N_KK) + n) * COPY_ROWS;
            prim::cp_async16_or_zero(to + row * ROW_BYTES,
                                     from.a + (static_cast<uint64_t>(row) * from.k + k_start),
                                     in_k && row < from.n_a);
        }
#pragma unroll
        for (int n = 0; n < N_B / N_KK; n++) {
            uint32_t row = (kk * (N_B / N_KK) + n) * COPY_ROWS;
            uint32_t w_row = row / (32 * N_W) * 32 + row % 32;
            prim::cp_async16_or_zero(
                to + (BLOCK_M + row) * ROW_BYTES,
                from.w[row / 32 % N_W] + (static_cast<uint64_t>(w_row) * from.k + k_start),
                in_k && w_row < from.n_w);
        }
    }

    // Reads the fragments of 16 of k. Chunk 2 kk + i is where chunk i is, but for the bits of 2 kk:
    // the swizzle is an exclusive or.
    DEV static void load(uint32_t (&a)[4][4], uint32_t (&w)[4][4], const unsigned char *stage,
                         uint32_t a_at, uint32_t w_at, int kk) {
#pragma unroll
        for (int i = 0; i < 4; i++)
            prim::ldsm_x4(a[i], stage + (a_at ^ (kk * 32)) + i * 16 * ROW_BYTES);
#pragma unroll
        for (int j = 0; j < 4; j++)
            prim::ldsm_x4(w[j], stage + (w_at ^ (kk * 32)) + j * 16 * ROW_BYTES);
    }

    DEV void multiply(const uint32_t (&a)[4][4], const uint32_t (&w)[4][4]) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
#pragma unroll
            for (int j = 0; j < 8; j++)
                prim::mma_bf16(acc[i][j], a[i], w[j / 2][j % 2 * 2], w[j / 2][j % 2 * 2 + 1]);
        }
    }
};
