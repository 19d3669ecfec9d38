// The instructions that kernels use beyond plain C++: the only place with inline PTX, lane
// intrinsics and barriers. Each wrapper is one instruction and one sentence. `twin/prim_host.hpp`
// implements the same names on a CPU by the documented semantics; kernels include this file and see
// whichever is being built.
//
// Functions marked (warp) are called by all 32 lanes of a warp together.
#pragma once

#include <stdint.h>

#include "abi.h"

#if defined(LORIS_TWIN)
#include "../twin/prim_host.hpp"
#else

// Defines a kernel: its plain name for the driver, its one argument, its block size, the blocks an
// SM should hold, and the bytes of its shared memory, which the build takes out of the image (what
// depends on the launch comes on top). The comment behind the row, `// <= N registers`, is checked
// by the build.
#define KERNEL(name, Args, n_threads, min_blocks, ...)                  \
    extern "C" __device__ const uint32_t name##_smem = __VA_ARGS__;     \
    extern "C" __global__ void __launch_bounds__(n_threads, min_blocks) \
        name(const __grid_constant__ Args args)

#define DEV __device__ __forceinline__

namespace prim {

// Identity.
DEV int lane() { return threadIdx.x & 31; }
DEV int warp() { return threadIdx.x >> 5; }

// The block's dynamic shared memory, 128-byte aligned.
extern __shared__ __align__(128) unsigned char dynamic_smem[];
template <class T = unsigned char>
DEV T *smem() {
    return reinterpret_cast<T *>(dynamic_smem);
}

// (warp) Value of another lane (shfl.sync).
template <class T>
DEV T shfl(T value, int src_lane) {
    return __shfl_sync(0xffffffffu, value, src_lane);
}
template <class T>
DEV T shfl_xor(T value, int mask) {
    return __shfl_xor_sync(0xffffffffu, value, mask);
}
// (warp) Value of the lane `delta` below; lanes below delta keep their own.
template <class T>
DEV T shfl_up(T value, int delta) {
    return __shfl_up_sync(0xffffffffu, value, delta);
}
// (warp) One bit a lane (vote.sync).
DEV uint32_t ballot(bool predicate) { return __ballot_sync(0xffffffffu, predicate); }
DEV bool any(bool predicate) { return __any_sync(0xffffffffu, predicate); }
DEV bool all(bool predicate) { return __all_sync(0xffffffffu, predicate); }
// (warp) Orders the memory accesses of a warp (bar.warp.sync).
DEV void warp_sync() { __syncwarp(); }

// All threads of the block (bar.sync 0).
DEV void block_sync() { __syncthreads(); }
// Some warps of the block: barrier `id` of 1..15, `n_threads` a multiple of 32 (bar.sync id, n).
DEV void named_sync(int id, int n_threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(n_threads) : "memory");
}
// Orders this thread's writes to global memory before what it writes next (fence.acq_rel.gpu).
DEV void fence_gmem() { __threadfence(); }

DEV uint32_t atomic_add(uint32_t *at, uint32_t value) { return atomicAdd(at, value); }
DEV uint64_t atomic_add(uint64_t *at, uint64_t value) {
    return atomicAdd(reinterpret_cast<unsigned long long *>(at), value);
}
DEV uint32_t atomic_max(uint32_t *at, uint32_t value) { return atomicMax(at, value); }

// 16 bytes of global memory (ld.global.v4); the address is 16-byte aligned.
DEV uint4 ld16(const void *gmem) { return *static_cast<const uint4 *>(gmem); }
// 16 bytes that are read once: past L1, evicted first (ld.global.nc.L1::no_allocate).
DEV uint4 ld16_stream(const void *gmem) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(gmem));
    return v;
}
DEV void st16(void *gmem, uint4 v) { *static_cast<uint4 *>(gmem) = v; }

// Shared memory as the 32-bit address that instructions take.
DEV uint32_t smem_addr(const void *p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// 16 bytes from global to shared memory in the background, past L1 (cp.async.cg). Visible to this
// thread after cp_wait, to others after a barrier behind it.
DEV void cp_async16(void *smem, const void *gmem) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(smem_addr(smem)), "l"(gmem)
                 : "memory");
}
// The same, or 16 zero bytes where `valid` is false: the address is not read then.
DEV void cp_async16_or_zero(void *smem, const void *gmem, bool valid) {
    int n_bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(smem_addr(smem)), "l"(gmem),
                 "r"(n_bytes)
                 : "memory");
}
// Closes a group of copies (cp.async.commit_group); an empty group is complete at once.
DEV void cp_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `n_pending` of this thread's groups are under way (cp.async.wait_group).
template <int n_pending>
DEV void cp_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(n_pending) : "memory");
}

// (warp) Four 8x8 matrices of 16-bit elements: lane l gives the address of row l % 8 of matrix l /
// 8, each 16 bytes and so aligned; r[i] is matrix i as `frag::ldmatrix` says (ldmatrix.x4).
DEV void ldsm_x4(uint32_t (&r)[4], const void *smem_row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(smem_addr(smem_row))
                 : "memory");
}
// (warp) The same, each matrix transposed (ldmatrix.x4.trans).
DEV void ldsm_x4_t(uint32_t (&r)[4], const void *smem_row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(smem_addr(smem_row))
                 : "memory");
}

// (warp) d += a b, bf16 in, f32 out (mma.m16n8k16). Fragments as in `frag.h`.
DEV void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// (warp) d += a b, f16 in, f32 out (mma.m16n8k16).
DEV void mma_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// (warp) d += a b, signed bytes in, i32 out (mma.m16n8k32).
DEV void mma_s8(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// 2^x to about 2 units in the last place, subnormals to zero; 2^-inf = 0 (ex2.approx.ftz).
DEV float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// 1 / sqrt(x) to about 2 units in the last place (rsqrt.approx).
DEV float rsqrt_fast(float x) {
    float y;
    asm("rsqrt.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// Two floats rounded to bf16, nearest even; `lo` in the low half (cvt.rn.bf16x2).
DEV uint32_t pack_bf16(float lo, float hi) {
    uint32_t r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
    return r;
}
// a b + c of two pairs of bf16, each rounded once; subnormals are kept (fma.rn.bf16x2).
DEV uint32_t fma_bf16x2(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}
// A float rounded to f16, nearest even, and back (cvt.rn.f16.f32, cvt.f32.f16).
DEV uint16_t to_f16(float x) {
    uint16_t h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(x));
    return h;
}
DEV float f16_to_float(uint16_t bits) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
}
// A product that is rounded, whatever it is added to (mul.rn).
DEV float mul_rn(float a, float b) { return __fmul_rn(a, b); }
// Four of the eight bytes of hi:lo, one for each digit of `selector` from the right (prmt).
DEV uint32_t byte_perm(uint32_t lo, uint32_t hi, uint32_t selector) {
    return __byte_perm(lo, hi, selector);
}
// The number itself: what is made of it is made anew, not kept in registers from before (nothing).
DEV uint32_t anew(uint32_t x) {
    asm volatile("" : "+r"(x));
    return x;
}
DEV float as_float(uint32_t bits) { return __uint_as_float(bits); }
DEV uint32_t as_bits(float x) { return __float_as_uint(x); }

// Ends the launch with an error (trap).
DEV void trap() { asm volatile("trap;"); }

}  // namespace prim

#endif

// Checked where kernels are built for the twin or with -DLORIS_DEBUG; nothing elsewhere.
#if defined(LORIS_TWIN) || defined(LORIS_DEBUG)
#define PRIM_ASSERT(condition)          \
    do {                                \
        if (!(condition)) prim::trap(); \
    } while (0)
#else
#define PRIM_ASSERT(condition) ((void)0)
#endif

namespace prim {

// The two bf16 of a 32-bit word as floats: exact.
DEV float bf16_lo(uint32_t pair) { return as_float(pair << 16); }
DEV float bf16_hi(uint32_t pair) { return as_float(pair & 0xffff0000u); }
DEV float bf16_to_float(uint16_t bits) { return as_float(static_cast<uint32_t>(bits) << 16); }
// One float rounded to bf16, nearest even.
DEV uint16_t to_bf16(float x) { return static_cast<uint16_t>(pack_bf16(x, 0.0f)); }

}  // namespace prim
