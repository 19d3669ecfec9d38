// The primitives of `include/prim.cuh` on a CPU: the same names and signatures by their documented
// semantics.
//
// A kernel compiled against this file becomes a plain function that runs once for each thread of a
// block, each on a fiber of its own. What one thread can do alone is inline here; whatever involves
// other threads, shared memory or checks is a call into the core (`core.hpp`). Collectives carry
// their call site, so that lanes that meet at different ones are reported.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

namespace twin {

// Where a collective is called from.
struct Site {
    const char *file;
    int line;
    static constexpr Site here(const char *file = __builtin_FILE(), int line = __builtin_LINE()) {
        return {file, line};
    }
};

struct Index {
    uint32_t x, y, z;
};

// A kernel of this library; registers itself, so that the driver finds it by its name.
struct Kernel {
    Kernel(const char *name, size_t args_bytes, uint32_t n_threads,
           void (*entry)(const void *args));

    const char *name;
    size_t args_bytes;
    uint32_t n_threads;
    void (*entry)(const void *args);
};

// The thread that runs: fixed for a fiber, which is what `const` promises the compiler.
[[gnu::const]] Index thread_idx();
[[gnu::const]] Index block_idx();
[[gnu::const]] Index block_dim();
[[gnu::const]] Index grid_dim();
[[gnu::const]] unsigned char *shared_memory();

// (warp) Collectives.
uint64_t shfl(const char *what, Site site, uint64_t bits, int src_lane);
uint32_t ballot(Site site, bool predicate);
void warp_sync(Site site);
void ldsm_x4(Site site, uint32_t *r, const void *smem_row, bool transposed);
void mma_bf16(Site site, float *d, const uint32_t *a, uint32_t b0, uint32_t b1);
void mma_f16(Site site, float *d, const uint32_t *a, uint32_t b0, uint32_t b1);
void mma_s8(Site site, int32_t *d, const uint32_t *a, uint32_t b0, uint32_t b1);

void block_sync(Site site);
void named_sync(Site site, int id, int n_threads);

void cp_async16(void *smem, const void *gmem, bool valid);
void cp_commit();
void cp_wait(uint32_t n_pending);

// Checks of accesses that the compiler's instrumentation does not see, and of memcpy and its kin.
void check_read(const void *at, size_t n_bytes, size_t align);
void check_write(void *at, size_t n_bytes, size_t align);
uint32_t atomic_add(uint32_t *at, uint32_t value);
uint64_t atomic_add(uint64_t *at, uint64_t value);
uint32_t atomic_max(uint32_t *at, uint32_t value);
void *copy(void *to, const void *from, size_t n_bytes);
void *fill(void *to, int byte, size_t n_bytes);

uint32_t smem_addr(const void *p);
[[noreturn]] void trap();

// The bits of a value of up to 8 bytes, and back.
template <class T>
inline uint64_t to_bits(T value) {
    static_assert(sizeof(T) <= 8, "registers of a lane are exchanged, not objects");
    uint64_t bits = 0;
    __builtin_memcpy(&bits, &value, sizeof(T));
    return bits;
}
template <class T>
inline T from_bits(uint64_t bits) {
    T value;
    __builtin_memcpy(&value, &bits, sizeof(T));
    return value;
}

}  // namespace twin

#define threadIdx twin::thread_idx()
#define blockIdx twin::block_idx()
#define blockDim twin::block_dim()
#define gridDim twin::grid_dim()

#define memcpy(to, from, n) twin::copy(to, from, n)
#define memmove(to, from, n) twin::copy(to, from, n)
#define memset(to, byte, n) twin::fill(to, byte, n)

// Always inlined, as on the device: helpers of equal names in different files stay apart.
#define DEV inline __attribute__((always_inline))

#define KERNEL(name, Args, n_threads, min_blocks, ...)                                             \
    static_assert((n_threads) % 32 == 0 && (n_threads) <= 1024 && (min_blocks) > 0,                \
                  "whole warps");                                                                  \
    extern "C" {                                                                                   \
    extern const uint32_t name##_smem;                                                             \
    const uint32_t name##_smem = __VA_ARGS__;                                                      \
    }                                                                                              \
    static void name(const Args args);                                                             \
    static const twin::Kernel name##_kernel(#name, sizeof(Args), n_threads, [](const void *args) { \
        name(*static_cast<const Args *>(args));                                                    \
    });                                                                                            \
    static void name(const Args args)

// CUDA's vectors, with CUDA's alignment.
struct alignas(8) int2 {
    int x, y;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) int4 {
    int x, y, z, w;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
inline int2 make_int2(int x, int y) { return {x, y}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// CUDA's min and max: also of a signed and an unsigned number, which are then unsigned.
#define TWIN_MIN_MAX(T, A, B)                                                                 \
    inline T min(A a, B b) {                                                                  \
        return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(a) : static_cast<T>(b); \
    }                                                                                         \
    inline T max(A a, B b) {                                                                  \
        return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(b) : static_cast<T>(a); \
    }
TWIN_MIN_MAX(int, int, int)
TWIN_MIN_MAX(unsigned, unsigned, unsigned)
TWIN_MIN_MAX(unsigned, int, unsigned)
TWIN_MIN_MAX(unsigned, unsigned, int)
TWIN_MIN_MAX(long, long, long)
TWIN_MIN_MAX(unsigned long, unsigned long, unsigned long)
TWIN_MIN_MAX(long long, long long, long long)
TWIN_MIN_MAX(unsigned long long, unsigned long long, unsigned long long)
#undef TWIN_MIN_MAX
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }

namespace prim {

using twin::Site;

DEV int lane() { return threadIdx.x & 31; }
DEV int warp() { return threadIdx.x >> 5; }

template <class T = unsigned char>
DEV T *smem() {
    return reinterpret_cast<T *>(twin::shared_memory());
}

template <class T>
DEV T shfl(T value, int src_lane, Site site = Site::here()) {
    return twin::from_bits<T>(twin::shfl("shfl", site, twin::to_bits(value), src_lane & 31));
}
template <class T>
DEV T shfl_xor(T value, int mask, Site site = Site::here()) {
    int src_lane = (lane() ^ mask) & 31;
    return twin::from_bits<T>(twin::shfl("shfl_xor", site, twin::to_bits(value), src_lane));
}
template <class T>
DEV T shfl_up(T value, int delta, Site site = Site::here()) {
    int src_lane = lane() < delta ? lane() : lane() - delta;
    return twin::from_bits<T>(twin::shfl("shfl_up", site, twin::to_bits(value), src_lane));
}
DEV uint32_t ballot(bool predicate, Site site = Site::here()) {
    return twin::ballot(site, predicate);
}
DEV bool any(bool predicate, Site site = Site::here()) {
    return twin::ballot(site, predicate) != 0;
}
DEV bool all(bool predicate, Site site = Site::here()) {
    return twin::ballot(site, predicate) == 0xffffffffu;
}
DEV void warp_sync(Site site = Site::here()) { twin::warp_sync(site); }

DEV void block_sync(Site site = Site::here()) { twin::block_sync(site); }
DEV void named_sync(int id, int n_threads, Site site = Site::here()) {
    twin::named_sync(site, id, n_threads);
}
DEV void fence_gmem() { __atomic_signal_fence(__ATOMIC_SEQ_CST); }

DEV uint32_t atomic_add(uint32_t *at, uint32_t value) { return twin::atomic_add(at, value); }
DEV uint64_t atomic_add(uint64_t *at, uint64_t value) { return twin::atomic_add(at, value); }
DEV uint32_t atomic_max(uint32_t *at, uint32_t value) { return twin::atomic_max(at, value); }

DEV uint4 ld16(const void *at) {
    twin::check_read(at, 16, 16);
    uint4 v;
    __builtin_memcpy(&v, at, 16);
    return v;
}
DEV uint4 ld16_stream(const void *gmem) { return ld16(gmem); }
DEV void st16(void *at, uint4 v) {
    twin::check_write(at, 16, 16);
    __builtin_memcpy(at, &v, 16);
}

DEV uint32_t smem_addr(const void *p) { return twin::smem_addr(p); }

DEV void cp_async16(void *smem, const void *gmem) { twin::cp_async16(smem, gmem, true); }
DEV void cp_async16_or_zero(void *smem, const void *gmem, bool valid) {
    twin::cp_async16(smem, gmem, valid);
}
DEV void cp_commit() { twin::cp_commit(); }
template <int n_pending>
DEV void cp_wait() {
    twin::cp_wait(n_pending);
}

DEV void ldsm_x4(uint32_t (&r)[4], const void *smem_row, Site site = Site::here()) {
    twin::ldsm_x4(site, r, smem_row, false);
}
DEV void ldsm_x4_t(uint32_t (&r)[4], const void *smem_row, Site site = Site::here()) {
    twin::ldsm_x4(site, r, smem_row, true);
}

DEV void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                  Site site = Site::here()) {
    twin::mma_bf16(site, d, a, b0, b1);
}
DEV void mma_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                 Site site = Site::here()) {
    twin::mma_f16(site, d, a, b0, b1);
}
DEV void mma_s8(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                Site site = Site::here()) {
    twin::mma_s8(site, d, a, b0, b1);
}

DEV uint32_t anew(uint32_t x) { return x; }
DEV float as_float(uint32_t bits) { return twin::from_bits<float>(bits); }
DEV uint32_t as_bits(float x) { return static_cast<uint32_t>(twin::to_bits(x)); }

DEV float exp2_fast(float x) {
    float y = exp2f(x);
    return y < 0x1p-126f ? 0.0f : y;
}
DEV float rsqrt_fast(float x) { return 1.0f / sqrtf(x); }
DEV uint32_t pack_bf16(float lo, float hi) {
    auto round = [](float x) -> uint32_t {
        uint32_t bits = as_bits(x);
        return x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    };
    return round(lo) | round(hi) << 16;
}

DEV uint32_t fma_bf16x2(uint32_t a, uint32_t b, uint32_t c) {
    auto lo = [](uint32_t pair) { return as_float(pair << 16); };
    auto hi = [](uint32_t pair) { return as_float(pair & 0xffff0000u); };
    return pack_bf16(fmaf(lo(a), lo(b), lo(c)), fmaf(hi(a), hi(b), hi(c)));
}
DEV uint16_t to_f16(float x) {
    const uint32_t sign = as_bits(x) >> 16 & 0x8000, bits = as_bits(x) & 0x7fffffff;
    uint32_t magnitude = (bits + 0xfff + (bits >> 13 & 1) - (112u << 23)) >> 13;
    if (bits < 0x38800000) magnitude = static_cast<uint32_t>(rintf(as_float(bits) * 0x1p24f));
    if (bits >= 0x477ff000) magnitude = 0x7c00;
    return static_cast<uint16_t>(bits > 0x7f800000 ? 0x7fff : sign | magnitude);
}
DEV float f16_to_float(uint16_t bits) {
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16;
    const uint32_t scaled = as_bits(as_float((bits & 0x7fffu) << 13) * 0x1p112f);
    return as_float(sign | scaled | ((bits & 0x7c00) == 0x7c00 ? 0x7f800000u : 0));
}
DEV float mul_rn(float a, float b) { return a * b; }
DEV uint32_t byte_perm(uint32_t lo, uint32_t hi, uint32_t selector) {
    const uint64_t bytes = static_cast<uint64_t>(hi) << 32 | lo;
    uint32_t out = 0;
    for (int i = 0; i < 4; i++) {
        out |= (static_cast<uint32_t>(bytes >> (selector >> 4 * i & 7) * 8) & 0xff) << 8 * i;
    }
    return out;
}

DEV void trap() { twin::trap(); }

}  // namespace prim
