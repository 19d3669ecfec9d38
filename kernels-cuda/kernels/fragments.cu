// frag.h against the instructions: one warp multiplies small matrices whose elements it puts where
// the maps say, and looks up what ldmatrix gave it. No part of a model: whoever runs the tests on a
// GPU proves the maps there.
#include "frag.h"
#include "prim.cuh"

// The registers of one operand: element e of the fragment is `matrix[at(lane, e)]`.
template <int N_REGS, int N_COLS, class T, class Map>
DEV void gather(uint32_t (&regs)[N_REGS], const T *matrix, Map at) {
    constexpr int PER_REG = 4 / sizeof(T);
    constexpr uint32_t MASK = sizeof(T) == 1 ? 0xff : 0xffff;
#pragma unroll
    for (int e = 0; e < N_REGS * PER_REG; e++) {
        frag::Coord c = at(prim::lane(), e);
        uint32_t bits = static_cast<uint32_t>(matrix[c.row * N_COLS + c.col]) & MASK;
        uint32_t &reg = regs[e / PER_REG];
        reg = (e % PER_REG == 0 ? 0 : reg) | bits << (e % PER_REG * 8 * sizeof(T));
    }
}

template <class T>
DEV void scatter(T *matrix, const T (&d)[4]) {
#pragma unroll
    for (int e = 0; e < 4; e++) {
        frag::Coord c = frag::c_m16n8(prim::lane(), e);
        matrix[c.row * 8 + c.col] = d[e];
    }
}

// Elements of the four matrices in `tile` that are not where `at` says.
template <class Map>
DEV uint32_t n_misplaced(const uint32_t (&regs)[4], const uint16_t *tile, Map at) {
    uint32_t n = 0;
#pragma unroll
    for (int matrix = 0; matrix < 4; matrix++)
        for (int e = 0; e < 2; e++) {
            frag::Coord c = at(prim::lane(), e);
            n += (regs[matrix] >> 16 * e & 0xffff) != tile[(8 * matrix + c.row) * 8 + c.col];
        }
    return n;
}

DEV void body(const FragmentsArgs &args) {
    // Products.
    uint32_t a[4], b[2];
    gather<4, 16>(a, args.a, frag::a_m16k16);
    gather<2, 8>(b, args.b, frag::b_k16n8);
    float bf16[4] = {}, f16[4] = {};
    prim::mma_bf16(bf16, a, b[0], b[1]);
    prim::mma_f16(f16, a, b[0], b[1]);
    scatter(args.bf16, bf16);
    scatter(args.f16, f16);
    gather<4, 32>(a, args.a8, frag::a_m16k32);
    gather<2, 8>(b, args.b8, frag::b_k32n8);
    int32_t s8[4] = {};
    prim::mma_s8(s8, a, b[0], b[1]);
    scatter(args.s8, s8);

    // Four matrices of eight rows, every element another number.
    uint16_t *tile = prim::smem<uint16_t>();
    for (int i = 0; i < 8; i++) tile[prim::lane() * 8 + i] = prim::lane() * 8 + i;
    prim::warp_sync();
    uint32_t rows[4], columns[4];
    prim::ldsm_x4(rows, tile + prim::lane() * 8);
    prim::ldsm_x4_t(columns, tile + prim::lane() * 8);
    uint32_t n_wrong = n_misplaced(rows, tile, frag::ldmatrix);
    n_wrong += n_misplaced(columns, tile, frag::ldmatrix_trans);
    prim::atomic_add(args.n_wrong, n_wrong);
}

KERNEL(fragments, FragmentsArgs, 32, 1, 512) { body(args); }  // <= 64 registers
