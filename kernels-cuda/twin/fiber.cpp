#include "fiber.hpp"

#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>

namespace twin {

#if defined(TWIN_UCONTEXT)

void fiber_switch(Fiber &from, Fiber &to) { swapcontext(&from.context, &to.context); }

void fiber_init(Fiber &fiber, char *stack, size_t n_bytes, void (*entry)()) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stack;
    fiber.context.uc_stack.ss_size = n_bytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, entry, 0);
}

#else

// Saves the registers that a callee must keep, stores the stack pointer through the first argument,
// takes the second as the new one and restores from there.
extern "C" void twin_switch(void **save, void *load);

#if defined(__x86_64__)

asm(R"(
    .text
    .hidden twin_switch
    .globl twin_switch
    .type twin_switch, @function
twin_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size twin_switch, . - twin_switch
)");

// Six registers, then the return address: at `entry` the stack is 8 bytes off 16, as behind a call.
constexpr size_t FRAME_WORDS = 8, ENTRY_WORD = 6;

#elif defined(__aarch64__)

asm(R"(
    .text
    .hidden twin_switch
    .globl twin_switch
    .type twin_switch, %function
twin_switch:
    sub sp, sp, #160
    stp x19, x20, [sp, #0]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
    .size twin_switch, . - twin_switch
)");

constexpr size_t FRAME_WORDS = 20, ENTRY_WORD = 11;

#endif

void fiber_switch(Fiber &from, Fiber &to) { twin_switch(&from.stack_pointer, to.stack_pointer); }

void fiber_init(Fiber &fiber, char *stack, size_t n_bytes, void (*entry)()) {
    auto top = reinterpret_cast<uintptr_t>(stack + n_bytes) & ~uintptr_t{15};
    auto *frame = reinterpret_cast<uintptr_t *>(top) - FRAME_WORDS;
    for (size_t i = 0; i < FRAME_WORDS; i++) frame[i] = 0;
    frame[ENTRY_WORD] = reinterpret_cast<uintptr_t>(entry);
    fiber.stack_pointer = frame;
}

#endif

Stacks::~Stacks() {
    if (base_ != nullptr) munmap(base_, n_ * (BYTES + GUARD));
}

void Stacks::reserve(size_t n) {
    if (n <= n_) return;
    this->~Stacks();
    void *p = mmap(nullptr, n * (BYTES + GUARD), PROT_NONE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) abort();
    base_ = static_cast<char *>(p);
    n_ = n;
    for (size_t i = 0; i < n; i++) mprotect(at(i), BYTES, PROT_READ | PROT_WRITE);
}

}  // namespace twin
