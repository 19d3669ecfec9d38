/* Which element of a matrix a lane holds in which register: the maps of the PTX manual, as
 * functions.
 *
 * Kernels use them in epilogues, the twin executes mma and ldmatrix through them, and a test
 * compares them with the instructions where there is a GPU. Sources: PTX ISA, "Matrix Fragments for
 * mma.m16n8k16 with floating point type", "... mma.m16n8k32" (integers), and "ldmatrix".
 *
 * A fragment register is 32 bits: two 16-bit or four 8-bit elements. `elem` counts elements of the
 * fragment in register order, low bits first.
 */
#pragma once

#if defined(__CUDACC__)
#define FRAG_FN __host__ __device__ constexpr
#else
#define FRAG_FN constexpr
#endif

namespace frag {

struct Coord {
    int row, col;
};

/* A of m16n8k16, 16-bit elements: 8 a lane (4 registers). Rows are m, columns k. */
FRAG_FN Coord a_m16k16(int lane, int elem) {
    return {lane / 4 + 8 * ((elem / 2) % 2), 2 * (lane % 4) + elem % 2 + 8 * (elem / 4)};
}

/* B of m16n8k16, 16-bit elements: 4 a lane (2 registers). Rows are k, columns n. */
FRAG_FN Coord b_k16n8(int lane, int elem) {
    return {2 * (lane % 4) + elem % 2 + 8 * (elem / 2), lane / 4};
}

/* C and D of every m16n8 shape, 32-bit elements: 4 a lane. Rows are m, columns n. */
FRAG_FN Coord c_m16n8(int lane, int elem) {
    return {lane / 4 + 8 * (elem / 2), 2 * (lane % 4) + elem % 2};
}

/* A of m16n8k32, 8-bit elements: 16 a lane (4 registers). */
FRAG_FN Coord a_m16k32(int lane, int elem) {
    return {lane / 4 + 8 * ((elem / 4) % 2), 4 * (lane % 4) + elem % 4 + 16 * (elem / 8)};
}

/* B of m16n8k32, 8-bit elements: 8 a lane (2 registers). */
FRAG_FN Coord b_k32n8(int lane, int elem) {
    return {4 * (lane % 4) + elem % 4 + 16 * (elem / 4), lane / 4};
}

/* ldmatrix: the two 16-bit elements of an 8x8 matrix that a lane gets. */
FRAG_FN Coord ldmatrix(int lane, int elem) { return {lane / 4, 2 * (lane % 4) + elem}; }

/* ldmatrix.trans: as above from the transposed matrix. */
FRAG_FN Coord ldmatrix_trans(int lane, int elem) { return {2 * (lane % 4) + elem, lane / 4}; }

}  // namespace frag
