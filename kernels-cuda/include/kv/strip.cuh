// Strips: sixteen slots of a page, in shared memory. How they get there and how ldmatrix finds
// them.
//
// page_len is a multiple of 16, so 16 slots from a multiple of 16 lie one behind the other in one
// page: one page lookup, and one warp copies them with 16-byte chunks next to each other.
#pragma once

#include "codes.cuh"
#include "page.cuh"
#include "swizzle.cuh"

// The first slots of a coded sequence are the last of a strip.
constexpr int WIDE_ROW = STRIP_SLOTS - WIDE_SLOTS;
static_assert(WIDE_ROW == CODED_SKEW, "strips of coded pages begin at multiples of their length");
static_assert(STRIP_SLOTS == 16, "as matrix instructions take them");

// (warp) Starts copying 16 rows of ROW_BYTES to rows row0.. of a swizzled tile; row0 is a multiple
// of 16. Rows before `first_valid` and from n_valid on are not in use: they are not read and become
// zeros.
template <int ROW_BYTES>
DEV void copy_swizzled(unsigned char *tile_smem, int row0, const void *strip_gmem, int n_valid,
                       int first_valid = 0) {
    constexpr int CHUNKS = ROW_BYTES / 16, ROWS = 32 / CHUNKS;  // of a row; rows at once
    const int row = prim::lane() / CHUNKS, chunk = prim::lane() % CHUNKS;
    if (ROWS > STRIP_SLOTS && row >= STRIP_SLOTS) return;
    const uint64_t from = reinterpret_cast<uint64_t>(strip_gmem) + row * ROW_BYTES + chunk * 16;
    const int to = swizzle<ROW_BYTES>(row, chunk);
#pragma unroll
    for (int i = 0; i < STRIP_SLOTS; i += ROWS) {  // rows i + row: their bits do not overlap
        unsigned char *to_smem = tile_smem + row0 * ROW_BYTES + i * ROW_BYTES +
                                 (to ^ swizzle<ROW_BYTES>(i, 0) % ROW_BYTES);
        const void *from_gmem = reinterpret_cast<const void *>(from + i * ROW_BYTES);
        prim::cp_async16_or_zero(to_smem, from_gmem, row + i < n_valid && row + i >= first_valid);
    }
}

// (warp) Starts copying rows of ROW_BYTES as they lie, zeros from n_valid on.
template <int N_ROWS, int ROW_BYTES>
DEV void copy_rows(unsigned char *to_smem, const unsigned char *from_gmem, int n_valid) {
    for (int at = prim::lane() * 16; at < N_ROWS * ROW_BYTES; at += 32 * 16)
        prim::cp_async16_or_zero(to_smem + at, from_gmem + at, at < n_valid * ROW_BYTES);
}

// Where a lane's row for ldsm_x4 begins in a swizzled 16 x 16 block: of an A operand [m][k], or,
// transposed, of a B operand [k][n] (V: slots are k). r[0..1] are then the B registers of columns
// 0..7, r[2..3] of 8..15. The block 16 rows further on is 16 rows further; 16 columns further is
// `offset ^ 32`. Rows of less than 32 bytes have no second columns: their first ones are repeated.
template <int ROW_BYTES>
DEV int row_offset_mk() {
    return swizzle<ROW_BYTES>(prim::lane() & 15, ROW_BYTES < 32 ? 0 : prim::lane() >> 4);
}
template <int D>
DEV int lane_offset_mk() {
    return row_offset_mk<D * 2>();
}

// The same for a B operand that lies as [n][k] (K: slots are n), not transposed.
template <int ROW_BYTES>
DEV int row_offset_nk() {
    return swizzle<ROW_BYTES>((prim::lane() & 7) | (prim::lane() & 16) >> 1,
                              ROW_BYTES < 32 ? 0 : (prim::lane() >> 3) & 1);
}
template <int D>
DEV int lane_offset_nk() {
    return row_offset_nk<D * 2>();
}

// What all codings have: a family is a struct that is made of this one. Decode attention multiplies
// with the codes of a strip (`scores`, `add`), prefill spreads strips over a tile of bf16
// (`numbers`) and, where keys have params, multiplies its scores with what it kept of them (`keep`,
// `scale_scores`).
template <int D, uint32_t CODING>
struct Coding {
    static constexpr uint32_t ID = CODING;
    static constexpr bool IS_CODED = CODING != BF16;
    static constexpr int CODE_BYTES = ::CODE_BYTES<CODING, D>,
                         PARAM_BYTES = ::PARAM_BYTES<CODING, D>,
                         CHANNEL_BYTES = ::CHANNEL_BYTES<CODING, D>;
    // Each slot has params, or each channel of a page. Then pages are sealed: a table has pages of
    // bf16 behind them (page.cuh).
    static constexpr bool HAS_PARAMS = PARAM_BYTES > 0, BY_CHANNEL = CHANNEL_BYTES > 0;
    // Params of a slot are a scale and a zero for each of its groups; else there is one group.
    static constexpr bool HAS_ZERO = false;
    static constexpr int GROUPS = 1;

    // Bytes of a strip in a page, and so in shared memory: codes, then params, those of channels
    // too.
    static constexpr int PARAMS = STRIP_SLOTS * CODE_BYTES;
    static constexpr int ALL_PARAM_BYTES = STRIP_SLOTS * PARAM_BYTES + CHANNEL_BYTES;
    static constexpr int BYTES = PARAMS + ALL_PARAM_BYTES;

    // What prefill keeps of keys while scores are made: bytes a slot, and bytes of sums of a row of
    // Q.
    static constexpr int KEPT_BYTES = PARAM_BYTES, ROW_SUM_BYTES = 0;

    // (warp) Starts copying a strip, its rows swizzled or as they lie. Rows from n_valid on are not
    // read and become zeros; their params are copied.
    DEV static void copy(unsigned char *strip_smem, const unsigned char *page_gmem, HeadPlace at,
                         int n_valid) {
        copy_swizzled<CODE_BYTES>(strip_smem, 0, page_gmem + at.codes, n_valid);
        copy_params(strip_smem + PARAMS, page_gmem + at.params);
    }
    DEV static void copy_flat(unsigned char *strip_smem, const unsigned char *page_gmem,
                              HeadPlace at, int n_valid) {
        copy_rows<STRIP_SLOTS, CODE_BYTES>(strip_smem, page_gmem + at.codes, n_valid);
        copy_params(strip_smem + PARAMS, page_gmem + at.params);
    }
    DEV static void copy_params(unsigned char *to_smem, const unsigned char *from_gmem) {
        const int at = prim::lane() * 16;
        static_assert(ALL_PARAM_BYTES <= 32 * 16, "16 bytes a lane");
        if (at < ALL_PARAM_BYTES) prim::cp_async16(to_smem + at, from_gmem + at);
    }

    // (warp) Q as fragments: in the order of dimensions of the fragments of K.
    DEV static void load_q(uint32_t (&q)[D / 16][4], const unsigned char *q_smem) {
        const int lane = prim::lane();
#pragma unroll
        for (int k = 0; k < D / 16; k++) {
            if constexpr (!IS_CODED) {
                prim::ldsm_x4(q[k], q_smem + (lane_offset_mk<D>() ^ k << 5));
            } else {
                for (int r = 0; r < 2; r++) {  // rows lane / 4 and 8 further
                    const int at = swizzle<D * 2>(lane / 4 + r * 8, 2 * k + (lane & 3) / 2);
                    const uint2 dims =
                        *reinterpret_cast<const uint2 *>(q_smem + at + (lane & 1) * 8);
                    q[k][r] = low_halves(dims.x, dims.y);
                    q[k][r + 2] = high_halves(dims.x, dims.y);
                }
            }
        }
    }
};

// (warp) O += P V with the codes of a strip: `a` is P, times the scales, for each group of V, and
// `pair` makes bf16 of two codes.
template <class V, int D, class Pair>
DEV void add_codes(float (&o)[D / 8][4], const uint32_t (&a)[V::GROUPS][4],
                   const unsigned char *v_smem, Pair pair) {
    constexpr int ROW_BYTES = V::CODE_BYTES, N_CHUNKS = ROW_BYTES / 16;
#pragma unroll
    for (int c = 0; c < N_CHUNKS; c += 2) {
        uint32_t codes[4];  // [chunk c, c + 1][slots 0.., 8..]
        prim::ldsm_x4_t(codes, v_smem + (row_offset_mk<ROW_BYTES>() ^ c << 4));
#pragma unroll
        for (int i = 0; i < (N_CHUNKS == 1 ? 1 : 2); i++) {
            const uint32_t w0 = codes[2 * i], w1 = codes[2 * i + 1];
            constexpr int N_TILES = 16 / V::BITS;  // of 16 bytes
#pragma unroll
            for (int j = 0; j < N_TILES; j++) {
                const int n = (c + i) * N_TILES + j, shift = j % 2 * 8 + j / 2 * V::BITS;
                prim::mma_bf16(o[n], a[n * 8 / (D / V::GROUPS)], pair(w0 >> shift),
                               pair(w1 >> shift));
            }
        }
    }
}

// (warp) Spreads a strip over 16 rows of a tile of bf16: codes or, AS_VALUES, what they stand for.
// Rows from n_valid on become zeros.
template <class C, int D, bool AS_VALUES>
DEV void spread(unsigned char *tile_smem, int row0, const unsigned char *strip_smem, int n_valid) {
    constexpr int CHUNKS = C::CODE_BYTES / 16;  // of a row
    const unsigned char *params = strip_smem + C::PARAMS;
#pragma unroll
    for (int i = 0; i < STRIP_SLOTS * CHUNKS; i += 32) {
        const int row = (i + prim::lane()) / CHUNKS, c = (i + prim::lane()) % CHUNKS;
        if (row >= STRIP_SLOTS) break;
        const uint4 codes = prim::ld16(strip_smem + (i + prim::lane()) * 16);
        Params of = {};
        if constexpr (AS_VALUES && C::HAS_PARAMS)
            of = C::params_of(params, row, c * C::GROUPS / CHUNKS);
        auto store = [&](int chunk, uint32_t w0, uint32_t w1) {
            uint4 x = {};
            if (row < n_valid) x = C::template numbers<AS_VALUES>(w0, w1, of, params, chunk * 8);
            prim::st16(tile_smem + swizzle<D * 2>(row0 + row, chunk), x);
        };
        constexpr int BITS = C::BITS, N_PARTS = 8 / BITS;
#pragma unroll
        for (int part = 0; part < N_PARTS; part++) {  // from the low bits of all bytes on
            const int chunk = 2 * (N_PARTS * c + part), shift = BITS * part;
            store(chunk, codes.x >> shift, codes.y >> shift);
            store(chunk + 1, codes.z >> shift, codes.w >> shift);
        }
    }
}
