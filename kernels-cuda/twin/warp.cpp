// Collectives: every lane leaves its operands, the last one to arrive computes for all 32.
#include <string.h>

#include "../include/frag.h"
#include "core.hpp"

namespace twin {

// Meets the warp with operands on this lane's stack; `compute(lanes)` runs once.
template <class Operands, class Compute>
static void collective(const char *what, Site site, Operands &operands, Compute compute) {
    Block &block = *self->block;
    if (!block.arrive({what, site}, &operands)) return block.wait();
    compute(reinterpret_cast<Operands **>(self->warp->operands));
    block.release(*self->warp);
    block.shuffle();
}

uint64_t shfl(const char *what, Site site, uint64_t bits, int src_lane) {
    struct {
        uint64_t bits, result;
        int src_lane;
    } own = {bits, 0, src_lane};
    collective(what, site, own, [](auto **lanes) {
        for (int l = 0; l < WARP; l++) lanes[l]->result = lanes[lanes[l]->src_lane]->bits;
    });
    return own.result;
}

uint32_t ballot(Site site, bool predicate) {
    uint32_t own = predicate;
    collective("ballot", site, own, [](uint32_t **lanes) {
        uint32_t votes = 0;
        for (int l = 0; l < WARP; l++) votes |= *lanes[l] << l;
        for (int l = 0; l < WARP; l++) *lanes[l] = votes;
    });
    return own;
}

void warp_sync(Site site) {
    int none = 0;
    collective("warp_sync", site, none,
               [](int **) { self->block->shadow.warp_ordered(self->warp->id); });
}

// Barriers are taken by whole warps: the lanes gather first.
static void barrier(const char *what, Site site, int id, int n_threads) {
    int none = 0;
    Block &block = *self->block;
    if (block.arrive({what, site}, &none)) {
        block.sync(*self, id, n_threads);
    } else {
        block.wait();
    }
}

void block_sync(Site site) { barrier("block_sync", site, 0, 0); }

void named_sync(Site site, int id, int n_threads) {
    if (id < 1 || id >= N_BARRIERS || n_threads < WARP || n_threads % WARP != 0)
        fail(FaultKind::Launch,
             "named_sync(%d, %d) (%s:%d): the barrier is 1 to 15, threads are whole warps", id,
             n_threads, site.file, site.line);
    barrier("named_sync", site, id, n_threads);
}

// The maps of frag.h as tables: where in a row-major matrix of COLS columns each element of a lane
// lies.
template <int N_ELEMS, int COLS, frag::Coord (*coord)(int, int)>
struct Map {
    uint16_t at[WARP][N_ELEMS];
    constexpr Map() : at() {
        for (int l = 0; l < WARP; l++) {
            for (int e = 0; e < N_ELEMS; e++) {
                frag::Coord c = coord(l, e);
                at[l][e] = static_cast<uint16_t>(c.row * COLS + c.col);
            }
        }
    }
};
static constexpr Map<2, 8, frag::ldmatrix> LDMATRIX;
static constexpr Map<2, 8, frag::ldmatrix_trans> LDMATRIX_TRANS;
static constexpr Map<8, 16, frag::a_m16k16> A16;
static constexpr Map<4, 8, frag::b_k16n8> B16;
static constexpr Map<16, 32, frag::a_m16k32> A8;
static constexpr Map<8, 8, frag::b_k32n8> B8;
static constexpr Map<4, 8, frag::c_m16n8> C;

void ldsm_x4(Site site, uint32_t *r, const void *smem_row, bool transposed) {
    // Lane 8 i + j has given the address of row j of matrix i, and reads that row for the others.
    check_read(smem_row, 16, 16);
    smem_addr(smem_row);
    struct {
        uint32_t *r;
        const void *row;
        bool transposed;
    } own = {r, smem_row, transposed};
    collective(transposed ? "ldsm_x4_t" : "ldsm_x4", site, own, [](auto **lanes) {
        const auto &map = lanes[0]->transposed ? LDMATRIX_TRANS.at : LDMATRIX.at;
        for (int i = 0; i < 4; i++) {
            uint16_t matrix[64];
            for (int j = 0; j < 8; j++) memcpy(matrix + 8 * j, lanes[8 * i + j]->row, 16);
            for (int l = 0; l < WARP; l++)
                lanes[l]->r[i] = matrix[map[l][0]] | uint32_t{matrix[map[l][1]]} << 16;
        }
        // All lanes have read: what they write from here on comes after.
        self->block->shadow.warp_ordered(self->warp->id);
    });
}

template <class Acc>
struct MmaOperands {
    Acc *d;
    const uint32_t *a;
    uint32_t b[2];
};

static_assert(sizeof(Map<4, 8, frag::c_m16n8>) == WARP * 4 * 2, "tables are dense");

// d += a b on whole matrices: 16 x K and K x 8. `element` decodes element e of a fragment's
// registers.
template <int K, class Acc, class MapA, class MapB, class Element>
static void multiply(MmaOperands<Acc> **lanes, const MapA &map_a, const MapB &map_b,
                     Element element) {
    Acc a[16 * K], b[K * 8], d[16 * 8];
    for (int l = 0; l < WARP; l++) {
        const MmaOperands<Acc> &own = *lanes[l];
        for (int e = 0; e < K / 2; e++) a[map_a.at[l][e]] = element(own.a, e);
        for (int e = 0; e < K / 4; e++) b[map_b.at[l][e]] = element(own.b, e);
        for (int e = 0; e < 4; e++) d[C.at[l][e]] = own.d[e];
    }
    for (int m = 0; m < 16; m++) {
        Acc sum[8];
        for (int n = 0; n < 8; n++) sum[n] = d[m * 8 + n];
        for (int k = 0; k < K; k++) {
            for (int n = 0; n < 8; n++) sum[n] += a[m * K + k] * b[k * 8 + n];
        }
        for (int n = 0; n < 8; n++) d[m * 8 + n] = sum[n];
    }
    for (int l = 0; l < WARP; l++) {
        for (int e = 0; e < 4; e++) lanes[l]->d[e] = d[C.at[l][e]];
    }
}

void mma_bf16(Site site, float *d, const uint32_t *a, uint32_t b0, uint32_t b1) {
    MmaOperands<float> own = {d, a, {b0, b1}};
    collective("mma_bf16", site, own, [](auto **lanes) {
        multiply<16>(lanes, A16, B16, [](const uint32_t *r, int e) {
            return from_bits<float>(e % 2 == 0 ? r[e / 2] << 16 : r[e / 2] & 0xffff0000u);
        });
    });
}

static float half_to_float(uint32_t bits) {
    uint32_t sign = (bits & 0x8000) << 16, exponent = bits >> 10 & 31, fraction = bits & 0x3ff;
    if (exponent == 0) return from_bits<float>(sign | to_bits(float(fraction) * 0x1p-24f));
    return from_bits<float>(sign | (exponent == 31 ? 255 : exponent + 112) << 23 | fraction << 13);
}

void mma_f16(Site site, float *d, const uint32_t *a, uint32_t b0, uint32_t b1) {
    MmaOperands<float> own = {d, a, {b0, b1}};
    collective("mma_f16", site, own, [](auto **lanes) {
        multiply<16>(lanes, A16, B16, [](const uint32_t *r, int e) {
            return half_to_float(r[e / 2] >> 16 * (e % 2) & 0xffff);
        });
    });
}

void mma_s8(Site site, int32_t *d, const uint32_t *a, uint32_t b0, uint32_t b1) {
    MmaOperands<int32_t> own = {d, a, {b0, b1}};
    collective("mma_s8", site, own, [](auto **lanes) {
        multiply<32>(lanes, A8, B8, [](const uint32_t *r, int e) {
            return static_cast<int32_t>(static_cast<int8_t>(r[e / 4] >> 8 * (e % 4)));
        });
    });
}

}  // namespace twin
