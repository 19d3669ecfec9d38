#include "core.hpp"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#include <algorithm>
#include <map>
#include <numeric>

namespace twin {

__thread Thread *self = nullptr;

// Kernels by name. A function's static, because kernels register before this file's statics exist.
static std::map<std::string, const Kernel *> &kernels() {
    static std::map<std::string, const Kernel *> all;
    return all;
}

Kernel::Kernel(const char *name, size_t args_bytes, uint32_t n_threads, void (*entry)(const void *))
    : name(name), args_bytes(args_bytes), n_threads(n_threads), entry(entry) {
    if (!kernels().emplace(name, this).second) {
        fprintf(stderr, "two kernels are called %s\n", name);
        abort();
    }
}

const Kernel *find_kernel(const char *name) {
    auto found = kernels().find(name);
    return found == kernels().end() ? nullptr : found->second;
}

// On the heap: what is thread-local itself must fit where dlopen can place it.
Block &host_block() {
    static thread_local std::unique_ptr<Block> block(new Block);
    return *block;
}

Index thread_idx() { return {self->id, 0, 0}; }
Index block_idx() { return self->block->index; }
Index block_dim() { return {self->block->launch->kernel->n_threads, 1, 1}; }
Index grid_dim() { return self->block->launch->grid; }
unsigned char *shared_memory() { return self->block->smem; }

void fail(FaultKind kind, const char *format, ...) {
    char what[1024], text[1400];
    va_list list;
    va_start(list, format);
    vsnprintf(what, sizeof what, format, list);
    va_end(list);
    Block &block = *self->block;
    snprintf(text, sizeof text, "kernel %s, block (%u, %u, %u), thread %u: %s",
             block.launch->kernel->name, block.index.x, block.index.y, block.index.z, self->id,
             what);
    block.fault.reset(new Fault{kind, text});
    Thread *thread = self;
    self = nullptr;
    fiber_switch(thread->fiber, block.host);
    __builtin_unreachable();
}

void trap() { fail(FaultKind::Launch, "trap"); }

// A small generator for orders: the same seed gives the same run.
static uint64_t next_random(uint64_t &state) {
    uint64_t z = state += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

// 0 .. n in an order that `random` chooses; natural where the seed is 0.
static void fill_order(int *order, int n, uint64_t seed, uint64_t &random) {
    std::iota(order, order + n, 0);
    if (seed == 0) return;
    for (int i = n - 1; i > 0; i--) std::swap(order[i], order[next_random(random) % (i + 1)]);
}

Block::Block() : threads(new Thread[MAX_THREADS]) {
    void *p = mmap(nullptr, MAX_SMEM, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) abort();
    smem = static_cast<unsigned char *>(p);
}

Block::~Block() { munmap(smem, MAX_SMEM); }

std::unique_ptr<Fault> Block::run(const Launch &what, const HeapView &view, uint64_t seed) {
    launch = &what;
    heap = &view;
    n_warps = static_cast<int>(what.kernel->n_threads / WARP);
    stacks.reserve(what.kernel->n_threads);
    const uint64_t n_blocks = uint64_t{what.grid.x} * what.grid.y * what.grid.z;
    // A step without a common divisor with the number of blocks visits each block once.
    uint64_t step = 1, at = 0;
    random = seed;
    if (seed != 0) {
        do step = next_random(random) % n_blocks + 1;
        while (std::gcd(step, n_blocks) != 1);
        at = next_random(random) % n_blocks;
    }
    for (uint64_t i = 0; i < n_blocks && fault == nullptr; i++, at = (at + step) % n_blocks) {
        uint64_t row = at / what.grid.x;
        index = {uint32_t(at % what.grid.x), uint32_t(row % what.grid.y),
                 uint32_t(row / what.grid.y)};
        number = static_cast<uint32_t>(at % 0xfffff);
        run_block(seed);
    }
    return std::move(fault);
}

// A thread's life.
void fiber_main() {
    Block &block = *self->block;
    block.launch->kernel->entry(block.launch->args.data());
    block.finish();
    __builtin_unreachable();
}

void Block::run_block(uint64_t seed) {
    has_met_others = false;
    memset(smem, 0xff, launch->smem_bytes);
    shadow.begin(launch->smem_bytes, n_warps);
    for (Barrier &barrier : barriers) barrier = {};
    fill_order(warp_order, n_warps, seed, random);
    for (int w = 0; w < n_warps; w++) {
        Warp &warp = warps[w];
        warp.id = w;
        warp.ready = ~0u;
        warp.arrived = warp.finished = 0;
        warp.barrier = -1;
        fill_order(warp.order, WARP, seed, random);
        for (int i = 0; i < WARP; i++) warp.rank[warp.order[i]] = i;
    }
    for (uint32_t t = 0; t < launch->kernel->n_threads; t++) {
        Thread &thread = threads[t];
        thread.block = this;
        thread.warp = &warps[t / WARP];
        thread.id = t;
        thread.stack = stacks.at(t);
        thread.copies.clear();
        thread.open_group = 0;
        fiber_init(thread.fiber, thread.stack, Stacks::usable(t), fiber_main);
    }
    Warp &first = warps[warp_order[0]];
    self = &threads[first.id * WARP + first.order[0]];
    fiber_switch(host, self->fiber);
}

// Switches to the next thread that can run: of the same warp if there is one, else of the next
// warp.
void Block::next() {
    Thread *from = self;
    Warp *warp = from->warp;
    for (int i = 0; warp->ready == 0; i++) {
        if (i == n_warps) deadlock();
        warp = &warps[warp_order[i]];
    }
    self = &threads[warp->id * WARP + warp->order[__builtin_ctz(warp->ready)]];
    if (self != from) fiber_switch(from->fiber, self->fiber);
}

void Block::wait() {
    self->warp->ready &= ~(1u << self->warp->rank[self->lane()]);
    next();
}

bool Block::arrive(Rendezvous at, void *operands) {
    Thread &thread = *self;
    Warp &warp = *thread.warp;
    if (warp.finished != 0)
        fail(FaultKind::Launch,
             "divergent collective: waits in %s (%s:%d), but lane %d has finished", at.what,
             at.site.file, at.site.line, __builtin_ctz(warp.finished));
    if (warp.arrived == 0) warp.at = at;
    if (!(warp.at == at))
        fail(FaultKind::Launch,
             "divergent collective: is at %s (%s:%d) while lane %d waits in %s (%s:%d)", at.what,
             at.site.file, at.site.line, __builtin_ctz(warp.arrived), warp.at.what,
             warp.at.site.file, warp.at.site.line);
    warp.operands[thread.lane()] = operands;
    warp.arrived |= 1u << thread.lane();
    return warp.arrived == ~0u;
}

void Block::release(Warp &warp) {
    warp.arrived = 0;
    warp.ready = ~0u;
}

void Block::shuffle() {
    if (random == 0 || next_random(random) % 8 != 0) return;
    Thread *from = self;
    Warp &warp = warps[next_random(random) % static_cast<uint64_t>(n_warps)];
    if (warp.ready == 0 || &warp == from->warp) return;
    self = &threads[warp.id * WARP + warp.order[__builtin_ctz(warp.ready)]];
    fiber_switch(from->fiber, self->fiber);
}

bool Block::complete(Barrier &barrier, int n_expected) {
    if (barrier.warps == 0 || __builtin_popcount(barrier.warps) != n_expected) return false;
    shadow.barrier(barrier.warps);
    for (uint32_t rest = barrier.warps; rest != 0; rest &= rest - 1) {
        Warp &warp = warps[__builtin_ctz(rest)];
        warp.barrier = -1;
        release(warp);
    }
    barrier = {};
    return true;
}

// `n_threads` 0 stands for all threads that have not finished.
static int n_expected(const Block &block, int n_threads) {
    if (n_threads > 0) return n_threads / WARP;
    return static_cast<int>(std::count_if(block.warps, block.warps + block.n_warps,
                                          [](const Warp &warp) { return warp.finished == 0; }));
}

void Block::sync(Thread &thread, int id, int n_threads) {
    Warp &warp = *thread.warp;
    Barrier &barrier = barriers[id];
    if (barrier.warps != 0 && barrier.n_threads != n_threads)
        fail(FaultKind::Launch, "barrier %d: waits for %d threads, but warp %d waits there for %d",
             id, n_threads, __builtin_ctz(barrier.warps), barrier.n_threads);
    barrier.warps |= 1u << warp.id;
    barrier.n_threads = n_threads;
    warp.barrier = id;
    warp.ready = 0;
    if (!complete(barrier, n_expected(*this, n_threads))) next();
}

void Block::finish() {
    Thread &thread = *self;
    Warp &warp = *thread.warp;
    if (warp.arrived != 0)
        fail(FaultKind::Launch,
             "divergent collective: has finished while lane %d waits in %s (%s:%d)",
             __builtin_ctz(warp.arrived), warp.at.what, warp.at.site.file, warp.at.site.line);
    warp.finished |= 1u << thread.lane();
    warp.ready &= ~(1u << warp.rank[thread.lane()]);
    int n_alive = n_expected(*this, 0);
    if (warp.finished == ~0u) {
        if (n_alive == 0) {
            self = nullptr;
            fiber_switch(thread.fiber, host);
        }
        complete(barriers[0], n_alive);
    }
    next();
    __builtin_unreachable();
}

// No thread can run and some have not finished: says where each warp is.
void Block::deadlock() {
    std::string text = "deadlock:";
    for (int w = 0; w < n_warps; w++) {
        char part[256];
        const Warp &warp = warps[w];
        if (warp.finished == ~0u) {
            snprintf(part, sizeof part, " warp %d has finished;", w);
        } else {
            snprintf(part, sizeof part, " warp %d waits in %s (%s:%d);", w, warp.at.what,
                     warp.at.site.file, warp.at.site.line);
        }
        text += part;
    }
    fail(FaultKind::Launch, "%s", text.c_str());
}

}  // namespace twin
