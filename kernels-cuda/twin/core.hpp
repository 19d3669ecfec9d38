// What runs a launch: threads, warps and barriers of one block at a time, in the launching host
// thread.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "fiber.hpp"
#include "heap.hpp"
#include "prim_host.hpp"
#include "shadow.hpp"

// The core's own copies are not a kernel's.
#undef memcpy
#undef memmove
#undef memset
#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim

namespace twin {

constexpr int WARP = 32;
constexpr int MAX_THREADS = 1024;
constexpr int N_BARRIERS = 16;
constexpr size_t MAX_SMEM =
    256 * 1024;  // address space of shared memory; a launch uses the start of it

enum class FaultKind { Address, Launch };  // CUDA_ERROR_ILLEGAL_ADDRESS, CUDA_ERROR_LAUNCH_FAILED

struct Fault {
    FaultKind kind;
    std::string text;
};

struct Launch {
    const Kernel *kernel;
    Index grid;
    uint32_t smem_bytes;
    std::vector<char> args;
};

struct Block;
struct Warp;

// An asynchronous copy that has been issued and has not landed.
struct Copy {
    uint32_t smem_offset;
    const void *gmem;  // null: zeros
    uint32_t group;
};

struct Thread {
    Fiber fiber;
    Block *block;
    Warp *warp;
    uint32_t id;
    char *stack;
    std::vector<Copy> copies;
    uint32_t open_group;

    int lane() const { return static_cast<int>(id % WARP); }
};

// The collective at which lanes of a warp gather.
struct Rendezvous {
    const char *what;
    Site site;

    bool operator==(const Rendezvous &other) const {
        return what == other.what && site.line == other.site.line && site.file == other.site.file;
    }
};

struct Warp {
    int id;
    int order[WARP], rank[WARP];  // lanes in the order they run, and back
    uint32_t ready;               // by rank: lanes that can run
    uint32_t arrived, finished;   // by lane
    Rendezvous at;                // where those that arrived are
    void *operands[WARP];
    int barrier;  // that the warp waits at, or -1
};

struct Barrier {
    uint32_t warps;  // that have arrived
    int n_threads;   // that the first said it takes
};

// Everything a host thread needs to run blocks, kept from launch to launch.
struct Block {
    const Launch *launch = nullptr;
    const HeapView *heap = nullptr;
    Index index = {};
    uint32_t number = 0;  // of the block in its grid, as far as it fits the shadow of global memory
    bool has_met_others = false;    // by an atomic on global memory
    unsigned char *smem = nullptr;  // MAX_SMEM bytes
    SharedShadow shadow;
    Stacks stacks;
    std::unique_ptr<Thread[]> threads;
    Warp warps[WARP];
    int n_warps = 0;
    int warp_order[WARP];
    Barrier barriers[N_BARRIERS];
    Fiber host;
    uint64_t random = 0;
    std::unique_ptr<Fault> fault;

    Block();
    ~Block();
    Block(const Block &) = delete;

    // Runs all blocks of the grid in an order that `seed` permutes; the first fault ends the
    // launch.
    std::unique_ptr<Fault> run(const Launch &launch, const HeapView &heap, uint64_t seed);

    // The rest is called on fibers. Lets others run until this thread is ready again.
    void wait();
    // A lane meets its warp at a collective; true in the lane that completes it, which then calls
    // `release`.
    bool arrive(Rendezvous at, void *operands);
    void release(Warp &warp);
    // Now and then, lets another warp run: where a seed is set, warps meet in many ways.
    void shuffle();
    // The whole warp stands at a barrier, and its last lane calls this: goes on when the barrier is
    // complete.
    void sync(Thread &thread, int barrier, int n_threads);

   private:
    friend void fiber_main();
    void run_block(uint64_t seed);
    void next();
    void finish();
    bool complete(Barrier &barrier, int n_expected);
    [[noreturn]] void deadlock();
};

// The thread that runs on this host thread; null outside of kernels.
extern __thread Thread *self __attribute__((tls_model("initial-exec")));

// Ends the launch: "kernel, block, thread: text".
[[noreturn]] void fail(FaultKind kind, const char *format, ...)
    __attribute__((format(printf, 2, 3)));

const Kernel *find_kernel(const char *name);

// The block that this host thread runs launches with.
Block &host_block();

}  // namespace twin
