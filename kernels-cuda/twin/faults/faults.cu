// Kernels with a planted fault each, and the same kernels without it: `broken` says which. The
// tests of the twin show that it finds the one and passes the other. None of them is built for a
// device.
#include "prim.cuh"

// 128 threads; `n` is what a test makes of it.
struct FaultArgs {
    const uint32_t *in;  // [n]
    uint32_t *out;       // [128] or more
    uint32_t n;
    uint32_t broken;
};

// Shared memory as words: every kernel here is launched with 2 KiB or more.
DEV uint32_t *tile() { return prim::smem<uint32_t>(); }

// Reads a background copy that has landed, or not.
KERNEL(twin_fault_cp_wait, FaultArgs, 128, 1, 0) {  // <= 32 registers
    prim::cp_async16(tile() + 4 * threadIdx.x, args.in + 4 * threadIdx.x);
    prim::cp_commit();
    if (args.broken) {
        prim::cp_wait<1>();
    } else {
        prim::cp_wait<0>();
    }
    args.out[threadIdx.x] = tile()[4 * threadIdx.x];
}

// Reads a background copy of another warp behind a barrier, or without one.
KERNEL(twin_fault_cp_sync, FaultArgs, 128, 1, 0) {  // <= 32 registers
    tile()[4 * threadIdx.x] = 0;
    prim::block_sync();
    prim::cp_async16(tile() + 4 * threadIdx.x, args.in + 4 * threadIdx.x);
    prim::cp_commit();
    prim::cp_wait<0>();
    if (!args.broken) prim::block_sync();
    args.out[threadIdx.x] = tile()[4 * (threadIdx.x ^ 32)];
}

// Read after write, between warps.
KERNEL(twin_fault_raw, FaultArgs, 128, 1, 0) {  // <= 32 registers
    tile()[threadIdx.x] = 0;
    prim::block_sync();
    tile()[threadIdx.x] = args.in[threadIdx.x];
    if (!args.broken) prim::block_sync();
    args.out[threadIdx.x] = tile()[threadIdx.x ^ 64];
}

// Read after write, inside a warp.
KERNEL(twin_fault_raw_warp, FaultArgs, 128, 1, 0) {  // <= 32 registers
    tile()[threadIdx.x] = 0;
    prim::warp_sync();
    tile()[threadIdx.x] = args.in[threadIdx.x];
    if (!args.broken) prim::warp_sync();
    args.out[threadIdx.x] = tile()[threadIdx.x ^ 1];
}

// Write after read: the next tile over the one that others still read.
KERNEL(twin_fault_war, FaultArgs, 128, 1, 0) {  // <= 32 registers
    tile()[threadIdx.x] = args.in[threadIdx.x];
    prim::block_sync();
    uint32_t sum = 0;
    for (int i = 0; i < 128; i++) sum += tile()[i];
    if (!args.broken) prim::block_sync();
    tile()[threadIdx.x] = sum;
    args.out[threadIdx.x] = tile()[threadIdx.x];
}

// Two threads write the same place.
KERNEL(twin_fault_waw, FaultArgs, 128, 1, 0) {  // <= 32 registers
    tile()[args.broken ? threadIdx.x / 2 : threadIdx.x] = args.in[threadIdx.x];
    prim::block_sync();
    args.out[threadIdx.x] = tile()[threadIdx.x / 2];
}

// Warps 0 and 1 meet at a barrier of their own, which does not order warps 2 and 3.
KERNEL(twin_fault_named_race, FaultArgs, 128, 1, 0) {  // <= 32 registers
    tile()[threadIdx.x] = 0;
    prim::block_sync();
    tile()[threadIdx.x] = args.in[threadIdx.x];
    uint32_t other = prim::warp() < 2 ? 32 : 0;
    if (prim::warp() < 2) prim::named_sync(1, 64);
    args.out[threadIdx.x] = tile()[threadIdx.x ^ (args.broken ? 64 : other)];
}

// Two warps wait at one barrier for different numbers of threads.
KERNEL(twin_fault_named_counts, FaultArgs, 128, 1, 0) {  // <= 32 registers
    if (prim::warp() < 2) prim::named_sync(3, args.broken && prim::warp() == 1 ? 96 : 64);
    args.out[threadIdx.x] = args.in[threadIdx.x];
}

// A barrier of more warps than come to it.
KERNEL(twin_fault_deadlock, FaultArgs, 128, 1, 0) {  // <= 32 registers
    if (prim::warp() < 2) prim::named_sync(3, args.broken ? 96 : 64);
    args.out[threadIdx.x] = args.in[threadIdx.x];
}

// A collective for half of a warp.
KERNEL(twin_fault_divergent, FaultArgs, 128, 1, 0) {  // <= 32 registers
    uint32_t value = args.in[threadIdx.x];
    if (!args.broken || prim::lane() < 16) {
        value = prim::shfl_xor(value, 1);
    } else {
        prim::warp_sync();
    }
    args.out[threadIdx.x] = value;
}

// A lane that leaves before its warp's collective.
KERNEL(twin_fault_early_exit, FaultArgs, 128, 1, 0) {  // <= 32 registers
    if (args.broken && threadIdx.x == 37) return;
    args.out[threadIdx.x] = prim::ballot(args.in[threadIdx.x] != 0);
}

// Shared memory that nobody has written.
KERNEL(twin_fault_unwritten, FaultArgs, 128, 1, 0) {  // <= 32 registers
    if (!args.broken || threadIdx.x != 5) tile()[threadIdx.x] = args.in[threadIdx.x];
    prim::block_sync();
    args.out[threadIdx.x] = tile()[threadIdx.x ^ 1];
}

// The same through ldmatrix.
KERNEL(twin_fault_unwritten_ldsm, FaultArgs, 128, 1, 0) {  // <= 32 registers
    prim::st16(tile() + 4 * threadIdx.x, make_uint4(1, 2, 3, 4));
    prim::warp_sync();
    uint32_t r[4];
    prim::ldsm_x4(r, tile() + 4 * threadIdx.x + (args.broken ? 512 : 0));
    args.out[threadIdx.x] = r[0];
}

// Past the end of shared memory, of the input, of the output.
KERNEL(twin_fault_bounds_smem, FaultArgs, 128, 1, 0) {  // <= 32 registers
    tile()[threadIdx.x + (args.broken ? 1024 - 127 : 0)] = 0;
}
KERNEL(twin_fault_bounds_read, FaultArgs, 128, 1, 0) {  // <= 32 registers
    args.out[threadIdx.x] = args.in[args.n - 128 + threadIdx.x + args.broken];
}
KERNEL(twin_fault_bounds_write, FaultArgs, 128, 1, 0) {  // <= 32 registers
    args.out[threadIdx.x - args.broken] = args.in[threadIdx.x];
}
KERNEL(twin_fault_bounds_copy, FaultArgs, 128, 1, 0) {  // <= 32 registers
    uint32_t at = args.n - 512 + 4 * (threadIdx.x + args.broken);
    prim::cp_async16(tile() + 4 * threadIdx.x, args.in + at);
    prim::cp_commit();
    prim::cp_wait<0>();
    args.out[threadIdx.x] = tile()[4 * threadIdx.x];
}
KERNEL(twin_fault_bounds_memcpy, FaultArgs, 128, 1, 0) {  // <= 32 registers
    if (threadIdx.x == 0) memcpy(args.out, args.in, 4 * (args.n + args.broken));
}

// Sixteen bytes at an address that is not a multiple of 16.
KERNEL(twin_fault_misaligned, FaultArgs, 128, 1, 0) {  // <= 32 registers
    args.out[threadIdx.x] = prim::ld16(args.in + (args.broken ? 1 : 4)).x;
}
KERNEL(twin_fault_misaligned_plain, FaultArgs, 128, 1, 0) {  // <= 32 registers
    *reinterpret_cast<uint4 *>(args.out + 4 * threadIdx.x + args.broken) = make_uint4(1, 2, 3, 4);
}

// A variable of the library: kernels have none.
KERNEL(twin_fault_static, FaultArgs, 128, 1, 0) {  // <= 32 registers
    static uint32_t TABLE[4] = {1, 2, 3, 4};
    uint32_t &entry = TABLE[args.in[threadIdx.x] % 4];
    if (args.broken) entry = 5;
    args.out[threadIdx.x] = entry;
}

// Two blocks write the same place; one reads what another writes.
KERNEL(twin_fault_blocks_waw, FaultArgs, 128, 1, 0) {  // <= 32 registers
    args.out[args.broken ? threadIdx.x : blockIdx.x * 128 + threadIdx.x] = args.in[threadIdx.x];
}
KERNEL(twin_fault_blocks_raw, FaultArgs, 128, 1, 0) {  // <= 32 registers
    uint32_t own = blockIdx.x * 128 + threadIdx.x;
    args.out[own] = args.broken ? args.out[own ^ 128] : args.out[own];
}

KERNEL(twin_fault_trap, FaultArgs, 128, 1, 0) {  // <= 32 registers
    PRIM_ASSERT(!args.broken || threadIdx.x != 77);
    args.out[threadIdx.x] = args.in[threadIdx.x];
}
