// The main loop of decode: weights stream from memory once, past up to 16 rows.
//
// A block multiplies 16 weight rows (of one matrix, or of two that share the input) by a group of 8
// or 16 rows of the batch. Its warps split k between them:
//
//     k: | warp 0: DEPTH chunks of 32 | warp 1 | ... | warp 7 | warp 0 | ...
//
// In a chunk, lane 4 g + t loads the 16 bytes at k = 8 t of weight rows g and g + 8, and of batch
// rows g and g + 8: 64 contiguous bytes a row. mma.m16n8k16 wants other k in a lane, but a product
// does not mind how k is ordered as long as both sides agree: the first four values of each 16
// bytes are the fragments of one mma, the last four those of a second, and nothing is moved between
// lanes.
//
// The loads of the next chunks are issued as soon as a chunk is used, and the batch rows are
// fetched while they are under way, so that every thread has LOADS of them in flight: 32 KB a
// block. The warps' sums are added through shared memory, in order. So the bits of a row depend on
// its own values alone: neither on other rows nor on whether 8 or 16 are served.
#pragma once

#include "frag.h"
#include "prim.cuh"

namespace gemv {

constexpr int N_WARPS = 8;
constexpr int N_THREADS = 32 * N_WARPS;
constexpr int N_WEIGHT_ROWS = 16;  // that a block takes of each matrix
constexpr int CHUNK = 32;          // k of one load of a warp: 16 bytes a lane
constexpr int LOADS = 8;           // weight loads that a thread keeps in flight
constexpr int COLUMN = 20;         // room of a batch row's 16 sums: without bank conflicts

static_assert(N_THREADS >= N_WEIGHT_ROWS * LORIS_DECODE_ROWS, "a thread finishes one value");

// Shared memory: sums [warp][matrix][batch row][COLUMN], then sums of squares [warp][batch row].
template <int N_MATS, int N_TILES>
constexpr int SMEM_BYTES = N_WARPS * 8 * N_TILES * (N_MATS * COLUMN + 1) * 4;

// The first of the batch rows that a block serves.
DEV uint32_t first_row() { return blockIdx.x * LORIS_DECODE_ROWS; }

// Row of the batch whose values a lane holds in tile `tile`. Beyond the last it is the last again:
// it costs no memory traffic, and what comes of it is not stored.
DEV uint32_t lane_row(const LorisDecodeInput &in, int tile) {
    uint32_t row = first_row() + 8 * tile + prim::lane() / 4;
    return row < in.n_rows ? row : in.n_rows - 1;
}

// The weight row of a lane's fragment half `i`: 0 or 1. Beyond the last it is the last again,
// likewise.
DEV uint32_t weight_row(int i, uint32_t n) {
    uint32_t row = blockIdx.y * N_WEIGHT_ROWS + prim::lane() / 4 + 8 * i;
    return row < n ? row : n - 1;
}

// 16 bytes, or zeros beyond the end of k.
DEV uint4 ld16_or_zero(const void *gmem, bool valid) {
    return valid ? prim::ld16(gmem) : uint4{0, 0, 0, 0};
}

// Rows as they are.
template <int N_TILES>
struct PlainRows {
    const uint16_t *a[N_TILES];  // [k]

    DEV explicit PlainRows(const LorisDecodeInput &in) {
        for (int tile = 0; tile < N_TILES; tile++)
            a[tile] = in.a + static_cast<uint64_t>(lane_row(in, tile)) * in.k;
    }

    DEV void advance(int n) {
        for (int tile = 0; tile < N_TILES; tile++) a[tile] += n;
    }

    // Eight values of each row, as the B fragments of two mma.
    DEV void load(int at, bool valid, uint32_t (&b)[N_TILES][4]) {
        for (int tile = 0; tile < N_TILES; tile++) {
            uint4 v = ld16_or_zero(a[tile] + at, valid);
            b[tile][0] = v.x, b[tile][1] = v.y, b[tile][2] = v.z, b[tile][3] = v.w;
        }
    }

    DEV void finish(float *) {}
};

// Rows that are normalised on the way: x times the norm's weight goes into the product, and 1 /
// rms(x), which is known only at the end, scales its result.
template <int N_TILES>
struct NormRows {
    const float *x[N_TILES];  // [k]
    const float *norm;        // [k]
    float sum[N_TILES] = {};  // of squares

    DEV explicit NormRows(const LorisDecodeInput &in) : norm(in.norm) {
        for (int tile = 0; tile < N_TILES; tile++) {
            uint32_t row = lane_row(in, tile);
            if (in.row_idx != nullptr) row = in.row_idx[row];
            x[tile] = in.x + static_cast<uint64_t>(row) * in.k;
        }
    }

    DEV void advance(int n) {
        norm += n;
        for (int tile = 0; tile < N_TILES; tile++) x[tile] += n;
    }

    DEV void load(int at, bool valid, uint32_t (&b)[N_TILES][4]) {
        for (int half = 0; half < 2; half++) {
            uint4 g = ld16_or_zero(norm + at + 4 * half, valid);
            for (int tile = 0; tile < N_TILES; tile++) {
                uint4 v = ld16_or_zero(x[tile] + at + 4 * half, valid);
                b[tile][2 * half] = pair(v.x, v.y, g.x, g.y, sum[tile]);
                b[tile][2 * half + 1] = pair(v.z, v.w, g.z, g.w, sum[tile]);
            }
        }
    }

    DEV static uint32_t pair(uint32_t x0, uint32_t x1, uint32_t g0, uint32_t g1, float &sum) {
        float lo = prim::as_float(x0), hi = prim::as_float(x1);
        sum = fmaf(hi, hi, fmaf(lo, lo, sum));
        return prim::pack_bf16(lo * prim::as_float(g0), hi * prim::as_float(g1));
    }

    // Stores this warp's sums of squares: the four lanes of a row have a quarter each.
    DEV void finish(float *sums) {
        for (int tile = 0; tile < N_TILES; tile++) {
            float s = sum[tile];
            s += prim::shfl_xor(s, 1);
            s += prim::shfl_xor(s, 2);
            if (prim::lane() % 4 == 0) sums[8 * tile + prim::lane() / 4] = s;
        }
    }
};

// The products of a block: N_MATS x 16 weight rows by 8 N_TILES batch rows.
template <int N_MATS, int N_TILES>
struct Product {
    static constexpr int DEPTH = LOADS / (2 * N_MATS);  // chunks in flight
    static constexpr int STEP = N_WARPS * DEPTH * CHUNK;
    static constexpr int N_ROWS = 8 * N_TILES;
    static_assert(DEPTH >= 1, "a chunk is at least in flight");

    float *sums = prim::smem<float>();                           // [warp][matrix][row][COLUMN]
    float *squares = sums + N_WARPS * N_MATS * N_ROWS * COLUMN;  // [warp][row]

    // Multiplies; `w[mat][i]` is the lane's weight row lane / 4 + 8 i of a matrix, [k].
    template <class Rows>
    DEV void run(const uint16_t *(&w)[N_MATS][2], Rows rows, uint32_t k) {
        const int warp = prim::warp(), lane = prim::lane();
        const int first = warp * DEPTH * CHUNK + 8 * (lane % 4);  // k of the lane's first load
        advance(w, first);
        rows.advance(first);
        int left_warp = static_cast<int>(k) - warp * DEPTH * CHUNK;  // of k, from here on
        int left = static_cast<int>(k) - first;

        float acc[N_MATS][N_TILES][4] = {};
        uint4 ring[DEPTH][N_MATS][2];
        if (left_warp > 0) {
#pragma unroll
            for (int i = 0; i < DEPTH; i++) fetch(ring[i], w, i * CHUNK, left);
        }
        for (; left_warp > 0; left_warp -= STEP, left -= STEP) {
            advance(w, STEP);
            const bool more = left_warp > STEP;
#pragma unroll
            for (int i = 0; i < DEPTH; i++) {
                uint32_t b[N_TILES][4];
                rows.load(i * CHUNK, i * CHUNK < left, b);
                multiply(acc, ring[i], b);
                if (more) fetch(ring[i], w, i * CHUNK, left - STEP);
            }
            rows.advance(STEP);
        }

        for (int mat = 0; mat < N_MATS; mat++)
            for (int tile = 0; tile < N_TILES; tile++)
                for (int e = 0; e < 4; e++) {
                    frag::Coord at = frag::c_m16n8(lane, e);
                    int row = (warp * N_MATS + mat) * N_ROWS + 8 * tile + at.col;
                    sums[row * COLUMN + at.row] = acc[mat][tile][e];
                }
        rows.finish(squares + warp * N_ROWS);
        prim::block_sync();
    }

    // Weight row m of a matrix times batch row n.
    DEV float at(int mat, int m, int n) const {
        float sum = 0.0f;
        for (int warp = 0; warp < N_WARPS; warp++)
            sum += sums[((warp * N_MATS + mat) * N_ROWS + n) * COLUMN + m];
        return sum;
    }

    // 1 / rms of batch row n, after NormRows.
    DEV float inverse_rms(int n, const LorisDecodeInput &in) const {
        float sum = 0.0f;
        for (int warp = 0; warp < N_WARPS; warp++) sum += squares[warp * N_ROWS + n];
        return prim::rsqrt_fast(sum / in.k + in.eps);
    }

   private:
    DEV static void advance(const uint16_t *(&w)[N_MATS][2], int n) {
        for (int mat = 0; mat < N_MATS; mat++)
            for (int i = 0; i < 2; i++) w[mat][i] += n;
    }

    // Weights of one chunk. Beyond the end of k they are the row's last ones, which meet zeros.
    DEV static void fetch(uint4 (&chunk)[N_MATS][2], const uint16_t *const (&w)[N_MATS][2], int at,
                          int left) {
        if (at > left - 8) at = left - 8;
        for (int mat = 0; mat < N_MATS; mat++)
            for (int i = 0; i < 2; i++) chunk[mat][i] = prim::ld16_stream(w[mat][i] + at);
    }

    DEV static void multiply(float (&acc)[N_MATS][N_TILES][4], const uint4 (&chunk)[N_MATS][2],
                             const uint32_t (&b)[N_TILES][4]) {
        for (int mat = 0; mat < N_MATS; mat++) {
            const uint4 &lo = chunk[mat][0], &hi = chunk[mat][1];
            for (int tile = 0; tile < N_TILES; tile++) {
                prim::mma_bf16(acc[mat][tile], {lo.x, hi.x, lo.y, hi.y}, b[tile][0], b[tile][1]);
                prim::mma_bf16(acc[mat][tile], {lo.z, hi.z, lo.w, hi.w}, b[tile][2], b[tile][3]);
            }
        }
    }
};

// The value that a thread finishes: weight row `m` of the block's 16, batch row `n` of its group.
template <int N_TILES>
struct Value {
    int m = threadIdx.x % N_WEIGHT_ROWS, n = threadIdx.x / N_WEIGHT_ROWS;
    uint32_t row = first_row() + n;                    // of the batch
    uint32_t column = blockIdx.y * N_WEIGHT_ROWS + m;  // of the output
    bool exists;

    DEV Value(uint32_t n_rows, uint32_t n_columns)
        : exists(n < 8 * N_TILES && row < n_rows && column < n_columns) {}
};

}  // namespace gemv
