// Numbers of 16 bits: pages that are not coded, and the first page and the tail of those that are.
#pragma once

#include "strip.cuh"

template <int D>
struct Wide : Coding<D, BF16> {
    static constexpr int BITS = 16;

    // (warp) S = Q K^T of a strip.
    DEV static void scores(float (&s)[2][4], const uint32_t (&q)[D / 16][4], const float (&)[1][2],
                           const unsigned char *k_smem) {
#pragma unroll
        for (int k = 0; k < D / 16; k++) {
            uint32_t b[4];
            prim::ldsm_x4(b, k_smem + (lane_offset_nk<D>() ^ k << 5));
            prim::mma_bf16(s[0], q[k], b[0], b[1]);
            prim::mma_bf16(s[1], q[k], b[2], b[3]);
        }
    }

    // (warp) O += P V of a strip.
    DEV static void add(float (&o)[D / 8][4], float (&)[1][2], const float (&p)[2][4], uint32_t,
                        const unsigned char *v_smem) {
        uint32_t a[4];
        for (int i = 0; i < 4; i++)
            a[i] = prim::pack_bf16(p[i / 2][i % 2 * 2], p[i / 2][i % 2 * 2 + 1]);
#pragma unroll
        for (int n = 0; n < D / 8; n += 2) {
            uint32_t b[4];
            prim::ldsm_x4_t(b, v_smem + (lane_offset_mk<D>() ^ n << 4));
            prim::mma_bf16(o[n], a, b[0], b[1]);
            prim::mma_bf16(o[n + 1], a, b[2], b[3]);
        }
    }
};

// A bf16 row of a table with sealed pages: in its first page or in its tail.
template <int D, class Kv>
DEV const unsigned char *wide_row(const Kv &kv, uint32_t slot, uint32_t kv_head, uint32_t side) {
    const WidePlace at = kv.wide_place(slot);
    return kv.base + at.page * kv.page_bytes +
           head_place<D>(BF16, BF16, kv.n_kv_heads, at.len, side, kv_head, at.idx).codes;
}

// The bf16 rows of a strip of coded pages: the slots of a first page, which are the strip's last,
// as they lie; where pages are sealed all 16, swizzled.
template <int D, bool SEALED>
struct WideRows {
    static constexpr int FIRST_ROW = SEALED ? 0 : WIDE_ROW;
    DEV static int offset(int row, int byte) {
        return SEALED ? swizzle<D * 2>(row, byte / 16) + byte % 16 : row * D * 2 + byte;
    }

    // (warp) Starts copying those of a table with sealed pages to rows row0.. of a swizzled tile: a
    // tail's pages may be shorter than 16 slots, so each row is looked up, by a lane. Rows that are
    // not in use become zeros.
    template <class Kv>
    DEV static void copy(unsigned char *tile_smem, int row0, const Kv &kv, uint32_t first_slot,
                         uint32_t kv_head, uint32_t side) {
        constexpr int CHUNKS = D / 8, ROWS = 32 / CHUNKS;  // of a row; rows at once
        const uint32_t slot = first_slot + prim::lane() % STRIP_SLOTS;
        const bool is_used = kv.is_used(slot);
        const unsigned char *row_gmem = is_used ? wide_row<D>(kv, slot, kv_head, side) : kv.base;
        const int row = prim::lane() / CHUNKS, chunk = prim::lane() % CHUNKS;
#pragma unroll
        for (int i = 0; i < STRIP_SLOTS; i += ROWS) {
            const uint64_t from = prim::shfl(reinterpret_cast<uint64_t>(row_gmem), i + row);
            prim::cp_async16_or_zero(tile_smem + swizzle<D * 2>(row0 + i + row, chunk),
                                     reinterpret_cast<const void *>(from + chunk * 16),
                                     prim::shfl(static_cast<int>(is_used), i + row) != 0);
        }
    }

    // (warp) S = Q K^T; IS_CODED: Q is in the order of dimensions of codes.
    template <bool IS_CODED>
    DEV static void scores(float (&s)[2][4], const uint32_t (&q)[D / 16][4],
                           const unsigned char *k_smem) {
        const int t = prim::lane() & 3;
#pragma unroll
        for (int k = 0; k < D / 16; k++) {
#pragma unroll
            for (int n = FIRST_ROW / 8; n < 2; n++) {
                const int row = n * 8 + prim::lane() / 4 - FIRST_ROW;
                uint32_t b[2] = {};
                if (row >= 0) {
                    if constexpr (!IS_CODED) {
                        const unsigned char *dims = k_smem + offset(row, k * 32);
                        b[0] = *reinterpret_cast<const uint32_t *>(dims + t * 4);
                        b[1] = *reinterpret_cast<const uint32_t *>(dims + t * 4 + 16);
                    } else {
                        const int at = offset(row, k * 32 + t * 8);
                        const uint2 four = *reinterpret_cast<const uint2 *>(k_smem + at);
                        b[0] = low_halves(four.x, four.y);
                        b[1] = high_halves(four.x, four.y);
                    }
                }
                prim::mma_bf16(s[n], q[k], b[0], b[1]);
            }
        }
    }

    // (warp) O += P V, in the order of dimensions of codes.
    DEV static void add(float (&o)[D / 8][4], const float (&p)[2][4], const unsigned char *v_smem) {
        uint32_t a[4];
        for (int i = 0; i < 4; i++)
            a[i] = prim::pack_bf16(p[i / 2][i % 2 * 2], p[i / 2][i % 2 * 2 + 1]);
#pragma unroll
        for (int n = 0; n < D / 8; n += 2) {
            uint32_t even[2] = {}, odd[2] = {};  // of slots 0.. and 8..
#pragma unroll
            for (int h = FIRST_ROW / 8; h < 2; h++) {
                const int row = h * 8 + (prim::lane() & 3) * 2 - FIRST_ROW;
                uint32_t w[2] = {};
                for (int i = 0; i < 2 && row >= 0; i++) {
                    const int at = offset(row + i, n * 16 + prim::lane() / 4 * 4);
                    w[i] = *reinterpret_cast<const uint32_t *>(v_smem + at);
                }
                even[h] = low_halves(w[0], w[1]);
                odd[h] = high_halves(w[0], w[1]);
            }
            prim::mma_bf16(o[n], a, even[0], even[1]);
            prim::mma_bf16(o[n + 1], a, odd[0], odd[1]);
        }
    }

    // (warp) Spreads those of a first page over 16 rows of a tile, with zeros in front.
    DEV static void spread(unsigned char *tile_smem, int row0, const unsigned char *rows_smem) {
        constexpr int CHUNKS = D / 8;
        for (int i = prim::lane(); i < STRIP_SLOTS * CHUNKS; i += 32) {
            const int row = i / CHUNKS;
            uint4 x = {};
            if (row >= WIDE_ROW) x = prim::ld16(rows_smem + (i - WIDE_ROW * CHUNKS) * 16);
            prim::st16(tile_smem + swizzle<D * 2>(row0 + row, i % CHUNKS), x);
        }
    }
};
