// Copies whole KV pages: page to = page from, for all pairs in one launch.
//
// blockIdx = (pair, run of the page); a block copies RUN bytes, each thread 4 x 16 with all loads
// ahead of the stores. A page is not both source and target of one launch. Bytes moved: 2
// page_bytes for each pair.
#include "prim.cuh"

constexpr int N_THREADS = 256;
constexpr int N_AHEAD = 4;
constexpr uint32_t RUN = N_THREADS * N_AHEAD * 16;

DEV void body(const PageCopyArgs &args) {
    unsigned char *base = static_cast<unsigned char *>(args.pages.base);
    const uint64_t page_bytes = args.pages.page_bytes;
    const unsigned char *from = base + args.pairs[2 * blockIdx.x] * page_bytes;
    unsigned char *to = base + args.pairs[2 * blockIdx.x + 1] * page_bytes;
    const uint64_t first = static_cast<uint64_t>(blockIdx.y) * RUN + threadIdx.x * 16;

    uint4 ahead[N_AHEAD];
    for (int i = 0; i < N_AHEAD; i++) {
        const uint64_t at = first + i * N_THREADS * 16;
        if (at < page_bytes) ahead[i] = prim::ld16(from + at);
    }
    for (int i = 0; i < N_AHEAD; i++) {
        const uint64_t at = first + i * N_THREADS * 16;
        if (at < page_bytes) prim::st16(to + at, ahead[i]);
    }
}

KERNEL(page_copy, PageCopyArgs, N_THREADS, 1, 0) { body(args); }  // <= 40 registers
