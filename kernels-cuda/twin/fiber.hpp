// Fibers: stacks of their own inside one host thread, switched by hand.
#pragma once

#include <stddef.h>

#if !defined(__x86_64__) && !defined(__aarch64__)
#include <ucontext.h>
#define TWIN_UCONTEXT
#endif

namespace twin {

struct Fiber {
#if defined(TWIN_UCONTEXT)
    ucontext_t context;
#else
    void *stack_pointer = nullptr;
#endif
};

// Leaves `from` where it is and goes on in `to`.
void fiber_switch(Fiber &from, Fiber &to);
// Makes `fiber` begin in `entry`, which never returns, at the end of a stack.
void fiber_init(Fiber &fiber, char *stack, size_t n_bytes, void (*entry)());

// Stacks for the threads of a block, kept from launch to launch. Each has a page below that faults.
class Stacks {
   public:
    static constexpr size_t BYTES = 128 * 1024;

    ~Stacks();
    // At least `n` stacks.
    void reserve(size_t n);
    // The usable part of stack `i`. Tops are spread over cache sets: fibers run the same code at
    // the same depth, and stacks at equal offsets would evict each other.
    char *at(size_t i) const { return base_ + i * (BYTES + GUARD) + GUARD; }
    static size_t usable(size_t i) { return BYTES - i * 7 % 64 * 64; }

   private:
    static constexpr size_t GUARD = 4096 * 4;
    char *base_ = nullptr;
    size_t n_ = 0;
};

}  // namespace twin
