// Rows of the embedding table as f32: x[r] = table[tokens[r]].
//
// A thread turns 8 elements (16 bytes) of one row; threads run over [n_rows][hidden_dim / 8]
// without gaps, so that narrow rows fill blocks too. Bytes moved: 6 for each element (2 read, 4
// written).
#include "prim.cuh"

constexpr int N_THREADS = 256;

DEV void body(const EmbedArgs &args) {
    const uint32_t row_chunks = args.hidden_dim / 8;
    const uint32_t chunk =
        blockIdx.x * N_THREADS + threadIdx.x;  // the launcher checks that it fits
    const uint32_t row = chunk / row_chunks, col = 8 * (chunk % row_chunks);
    if (row >= args.n_rows) return;

    const uint64_t token = args.tokens[row];
    const uint4 bf16x8 = prim::ld16(args.table + token * args.hidden_dim + col);
    const uint32_t pairs[4] = {bf16x8.x, bf16x8.y, bf16x8.z, bf16x8.w};

    float *x = args.x + static_cast<uint64_t>(row) * args.hidden_dim + col;
    for (int i = 0; i < 2; i++) {  // bf16 to f32 is a shift: the bits are stored as they are
        const uint32_t a = pairs[2 * i], b = pairs[2 * i + 1];
        prim::st16(x + 4 * i, uint4{a << 16, a & 0xffff0000u, b << 16, b & 0xffff0000u});
    }
}

KERNEL(embed, EmbedArgs, N_THREADS, 1, 0) { body(args); }  // <= 32 registers
