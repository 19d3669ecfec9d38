// Rows by index: to[pair.to] = from[pair.from] for every pair, for the hidden states that wait at
// prune points and those that go on. From f32 to bf16 they are rounded to nearest even; the other
// ways are exact.
//
// blockIdx = (pair, run of the row); a block copies RUN columns, each thread 2 x 8 with all loads
// ahead of the stores. Bytes moved: width elements of each side for each pair.
#include "prim.cuh"

constexpr int N_THREADS = 128;
constexpr int N_AHEAD = 2;
constexpr uint32_t STEP = N_THREADS * 8;
constexpr uint32_t RUN = N_AHEAD * STEP;

// Eight consecutive elements: as they are, or as the other type.
template <class T>
struct Eight;

template <>
struct Eight<float> {
    uint4 lo, hi;

    DEV void load(const float *from) { lo = prim::ld16(from), hi = prim::ld16(from + 4); }
    DEV void store(float *to) const { prim::st16(to, lo), prim::st16(to + 4, hi); }
    DEV void store(uint16_t *to) const {
        prim::st16(to,
                   uint4{pack(lo.x, lo.y), pack(lo.z, lo.w), pack(hi.x, hi.y), pack(hi.z, hi.w)});
    }
    static DEV uint32_t pack(uint32_t a, uint32_t b) {
        return prim::pack_bf16(prim::as_float(a), prim::as_float(b));
    }
};

template <>
struct Eight<uint16_t> {
    uint4 v;

    DEV void load(const uint16_t *from) { v = prim::ld16(from); }
    DEV void store(uint16_t *to) const { prim::st16(to, v); }
    // A bf16 is the high half of the float.
    DEV void store(float *to) const {
        prim::st16(to, uint4{v.x << 16, v.x & 0xffff0000u, v.y << 16, v.y & 0xffff0000u});
        prim::st16(to + 4, uint4{v.z << 16, v.z & 0xffff0000u, v.w << 16, v.w & 0xffff0000u});
    }
};

template <class From, class To>
DEV void body(const RowCopyArgs &args) {
    const LorisRowPair pair = args.pairs[blockIdx.x];
    const From *from =
        static_cast<const From *>(args.from) + static_cast<uint64_t>(pair.from) * args.width;
    To *to = static_cast<To *>(args.to) + static_cast<uint64_t>(pair.to) * args.width;
    const uint32_t first = blockIdx.y * RUN + threadIdx.x * 8;

    Eight<From> ahead[N_AHEAD];
    for (int i = 0; i < N_AHEAD; i++)
        if (first + i * STEP < args.width) ahead[i].load(from + first + i * STEP);
    for (int i = 0; i < N_AHEAD; i++)
        if (first + i * STEP < args.width) ahead[i].store(to + first + i * STEP);
}

KERNEL(row_copy_f32, RowCopyArgs, N_THREADS, 1, 0) { body<float, float>(args); }  // <= 40 registers
KERNEL(row_copy_f32_bf16, RowCopyArgs, N_THREADS, 1, 0) {
    body<float, uint16_t>(args);
}  // <= 40 registers
KERNEL(row_copy_bf16_f32, RowCopyArgs, N_THREADS, 1, 0) {
    body<uint16_t, float>(args);
}  // <= 40 registers
KERNEL(row_copy_bf16, RowCopyArgs, N_THREADS, 1, 0) {
    body<uint16_t, uint16_t>(args);
}  // <= 40 registers
