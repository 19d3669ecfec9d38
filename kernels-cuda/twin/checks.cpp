// Every load and store of a kernel comes by here: the compiler instruments kernels as for its
// thread sanitizer
// (-fsanitize=thread), and these are the sanitizer's entry points. Its run-time library is not
// linked.
#include <link.h>
#include <string.h>

#include <algorithm>

#include "core.hpp"

namespace twin {

// The constants of this library, which kernels may read.
static Range find_image() {
    Range image = {};
    dl_iterate_phdr(
        [](dl_phdr_info *info, size_t, void *out) {
            auto here = reinterpret_cast<uintptr_t>(&find_image);
            Range range = {UINTPTR_MAX, 0};
            for (int i = 0; i < info->dlpi_phnum; i++) {
                if (info->dlpi_phdr[i].p_type != PT_LOAD) continue;
                uintptr_t begin = info->dlpi_addr + info->dlpi_phdr[i].p_vaddr;
                range.begin = std::min(range.begin, begin);
                range.end = std::max(range.end, begin + info->dlpi_phdr[i].p_memsz);
            }
            if (here < range.begin || here >= range.end) return 0;
            *static_cast<Range *>(out) = range;
            return 1;
        },
        &image);
    return image;
}
static const Range IMAGE = find_image();

static const char *verb(Access kind) { return kind == Access::Read ? "reads" : "writes"; }

// Blocks of a launch run in any order, so that none may touch what another writes, but for atomics;
// a block that has used one may know by it that others are done.
static void check_blocks(Block &block, const HeapView::Entry &entry, size_t offset, size_t n_bytes,
                         Access kind) {
    if (kind == Access::Atomic) block.has_met_others = true;
    if (kind == Access::Atomic || block.has_met_others) return;
    int64_t other = entry.writers->other(block.heap->launch, block.number, offset, n_bytes);
    if (other >= 0)
        fail(FaultKind::Launch,
             "race: %s %zu bytes at byte %zu of an allocation, which block number %lld wrote",
             verb(kind), n_bytes, offset, static_cast<long long>(other));
    if (kind == Access::Write)
        entry.writers->record(block.heap->launch, block.number, offset, n_bytes);
}

static inline void check(const void *at, size_t n_bytes, size_t align, Access kind) {
    Thread *thread = self;
    if (thread == nullptr || n_bytes == 0) return;
    auto address = reinterpret_cast<uintptr_t>(at);
    if (address - reinterpret_cast<uintptr_t>(thread->stack) < Stacks::BYTES) return;
    Block &block = *thread->block;
    const bool misaligned = address % align != 0;
    const uintptr_t offset = address - reinterpret_cast<uintptr_t>(block.smem);
    if (offset < MAX_SMEM) {
        if (offset + n_bytes > block.launch->smem_bytes)
            fail(FaultKind::Address,
                 "out of bounds: %s %zu bytes at byte %zu of %u bytes of shared memory", verb(kind),
                 n_bytes, size_t{offset}, block.launch->smem_bytes);
        if (misaligned)
            fail(FaultKind::Address, "misaligned: %s %zu bytes at byte %zu of shared memory",
                 verb(kind), n_bytes, size_t{offset});
        block.shadow.access(kind, thread->id, static_cast<uint32_t>(offset),
                            static_cast<uint32_t>(n_bytes));
        return;
    }
    if (const HeapView::Entry *entry = block.heap->find(address, n_bytes)) {
        if (misaligned)
            fail(FaultKind::Address, "misaligned: %s %zu bytes at %p", verb(kind), n_bytes, at);
        check_blocks(block, *entry, address - entry->begin, n_bytes, kind);
        return;
    }
    auto in = [&](uintptr_t begin, size_t size) {
        return address >= begin && address - begin + n_bytes <= size;
    };
    const auto &args = block.launch->args;
    if (kind == Access::Read && in(reinterpret_cast<uintptr_t>(args.data()), args.size())) return;
    if (kind == Access::Read && in(IMAGE.begin, IMAGE.end - IMAGE.begin)) return;
    fail(FaultKind::Address, "out of bounds: %s %zu bytes at %p, %s", verb(kind), n_bytes, at,
         block.heap->describe(address).c_str());
}

void check_read(const void *at, size_t n_bytes, size_t align) {
    check(at, n_bytes, align, Access::Read);
}
void check_write(void *at, size_t n_bytes, size_t align) {
    check(at, n_bytes, align, Access::Write);
}

void *copy(void *to, const void *from, size_t n_bytes) {
    check(from, n_bytes, 1, Access::Read);
    check(to, n_bytes, 1, Access::Write);
    return memmove(to, from, n_bytes);
}

void *fill(void *to, int byte, size_t n_bytes) {
    check(to, n_bytes, 1, Access::Write);
    return memset(to, byte, n_bytes);
}

template <class T, class Op>
static T atomic(T *at, Op op) {
    check(at, sizeof(T), sizeof(T), Access::Atomic);
    T before = *at;
    *at = op(before);
    return before;
}
uint32_t atomic_add(uint32_t *at, uint32_t value) {
    return atomic(at, [=](uint32_t x) { return x + value; });
}
uint64_t atomic_add(uint64_t *at, uint64_t value) {
    return atomic(at, [=](uint64_t x) { return x + value; });
}
uint32_t atomic_max(uint32_t *at, uint32_t value) {
    return atomic(at, [=](uint32_t x) { return std::max(x, value); });
}

uint32_t smem_addr(const void *p) {
    auto offset = static_cast<size_t>(static_cast<const unsigned char *>(p) - self->block->smem);
    if (offset >= MAX_SMEM) fail(FaultKind::Address, "%p is not in shared memory", p);
    return static_cast<uint32_t>(offset);
}

// Asynchronous copies: the source is read, and the destination written, as late as the wait allows.
void cp_async16(void *smem, const void *gmem, bool valid) {
    Thread &thread = *self;
    Block &block = *thread.block;
    const uint32_t offset = smem_addr(smem);
    if (offset + 16 > block.launch->smem_bytes)
        fail(FaultKind::Address, "out of bounds: copies to byte %u of %u bytes of shared memory",
             offset, block.launch->smem_bytes);
    if (offset % 16 != 0)
        fail(FaultKind::Address, "misaligned: copies to byte %u of shared memory", offset);
    const auto source = reinterpret_cast<uintptr_t>(gmem);
    if (source % 16 != 0) fail(FaultKind::Address, "misaligned: copies 16 bytes from %p", gmem);
    const HeapView::Entry *entry = valid ? block.heap->find(source, 16) : nullptr;
    if (valid && entry == nullptr)
        fail(FaultKind::Address, "out of bounds: copies 16 bytes from %p, %s", gmem,
             block.heap->describe(source).c_str());
    if (valid) check_blocks(block, *entry, source - entry->begin, 16, Access::Read);
    block.shadow.copy_issued(thread.id, offset);
    thread.copies.push_back({offset, valid ? gmem : nullptr, thread.open_group});
}

void cp_commit() { self->open_group++; }

void cp_wait(uint32_t n_pending) {
    Thread &thread = *self;
    size_t n_landed = 0;
    for (const Copy &copy : thread.copies) {
        if (copy.group + n_pending >= thread.open_group) break;
        thread.block->shadow.copy_landed(thread.id, copy.smem_offset);
        void *to = thread.block->smem + copy.smem_offset;
        if (copy.gmem != nullptr) {
            memcpy(to, copy.gmem, 16);
        } else {
            memset(to, 0, 16);
        }
        n_landed++;
    }
    thread.copies.erase(thread.copies.begin(), thread.copies.begin() + static_cast<long>(n_landed));
}

}  // namespace twin

using twin::Access;
using twin::check;

extern "C" {

// A wide access that the compiler would split into words is checked for its alignment by type,
// where the code says so (-fsanitize=alignment): what the other sanitizer's entry point is told.
struct TypeMismatch {
    struct {
        const char *file;
        uint32_t line, column;
    } site;
    const void *type;
    unsigned char log_align, kind;
};

void __ubsan_handle_type_mismatch_v1(TypeMismatch *what, uintptr_t address) {
    if (twin::self == nullptr) return;
    twin::fail(twin::FaultKind::Address, "misaligned: %#zx is no multiple of %d (%s:%u)",
               size_t{address}, 1 << what->log_align, what->site.file, what->site.line);
}

#define TWIN_SIZED(n)                                                                 \
    void __tsan_read##n(void *p) { check(p, n, n, Access::Read); }                    \
    void __tsan_write##n(void *p) { check(p, n, n, Access::Write); }                  \
    void __tsan_unaligned_read##n(void *p) { check(p, n, 1, Access::Read); }          \
    void __tsan_unaligned_write##n(void *p) { check(p, n, 1, Access::Write); }        \
    void __tsan_volatile_read##n(void *p) { check(p, n, n, Access::Read); }           \
    void __tsan_volatile_write##n(void *p) { check(p, n, n, Access::Write); }         \
    void __tsan_unaligned_volatile_read##n(void *p) { check(p, n, 1, Access::Read); } \
    void __tsan_unaligned_volatile_write##n(void *p) { check(p, n, 1, Access::Write); }
TWIN_SIZED(1)
TWIN_SIZED(2)
TWIN_SIZED(4)
TWIN_SIZED(8)
TWIN_SIZED(16)
#undef TWIN_SIZED

void __tsan_read_range(void *p, size_t n) { check(p, n, 1, Access::Read); }
void __tsan_write_range(void *p, size_t n) { check(p, n, 1, Access::Write); }
void *__tsan_memcpy(void *to, const void *from, size_t n) { return twin::copy(to, from, n); }
void *__tsan_memmove(void *to, const void *from, size_t n) { return twin::copy(to, from, n); }
void *__tsan_memset(void *to, int byte, size_t n) { return twin::fill(to, byte, n); }
void __tsan_vptr_read(void **p) { check(p, sizeof *p, sizeof *p, Access::Read); }
void __tsan_vptr_update(void **p, void *) { check(p, sizeof *p, sizeof *p, Access::Write); }
void __tsan_func_entry(void *) {}
void __tsan_func_exit(void) {}
void __tsan_init(void) {}
void __tsan_atomic_signal_fence(int) {}

}  // extern "C"
