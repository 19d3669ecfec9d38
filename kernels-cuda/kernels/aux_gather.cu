// Rows by index: to[i] = from[idx[i]], for the hidden states that wait in the aux cache and those
// that go on.
//
// blockIdx = (row, run of the row); a block copies RUN bytes, each thread 4 x 16 with all loads
// ahead of the stores. Bytes moved: 2 row_bytes for each row.
#include "prim.cuh"

constexpr int N_THREADS = 128;
constexpr int N_AHEAD = 4;
constexpr uint32_t RUN = N_THREADS * N_AHEAD * 16;

DEV void body(const AuxGatherArgs &args) {
    const uint64_t row_bytes = args.row_bytes;
    const unsigned char *from =
        static_cast<const unsigned char *>(args.from) + args.idx[blockIdx.x] * row_bytes;
    unsigned char *to = static_cast<unsigned char *>(args.to) + blockIdx.x * row_bytes;
    const uint64_t first = static_cast<uint64_t>(blockIdx.y) * RUN + threadIdx.x * 16;

    uint4 ahead[N_AHEAD];
    for (int i = 0; i < N_AHEAD; i++) {
        const uint64_t at = first + i * N_THREADS * 16;
        if (at < row_bytes) ahead[i] = prim::ld16(from + at);
    }
    for (int i = 0; i < N_AHEAD; i++) {
        const uint64_t at = first + i * N_THREADS * 16;
        if (at < row_bytes) prim::st16(to + at, ahead[i]);
    }
}

KERNEL(aux_gather, AuxGatherArgs, N_THREADS, 1) { body(args); }  // <= 40 registers
