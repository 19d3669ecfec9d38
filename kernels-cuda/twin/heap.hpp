// Device memory: host memory that nothing may touch beyond its exact bounds.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <map>
#include <memory>
#include <string>
#include <vector>

namespace twin {

struct Range {
    uintptr_t begin, end;
};

// Which block of the launch that runs has written each byte of an allocation.
class Writers {
   public:
    explicit Writers(size_t n_bytes) : n_bytes_(n_bytes) {}
    ~Writers() { clear(); }
    Writers(const Writers &) = delete;

    // Another block that has written one of n bytes in this launch, or -1.
    int64_t other(uint32_t launch, uint32_t block, size_t offset, size_t n) const;
    void record(uint32_t launch, uint32_t block, size_t offset, size_t n);
    void clear();

   private:
    static constexpr uint32_t BLOCK_BITS = 20;  // of a cell: launch, 1 + block

    size_t n_bytes_;
    uint32_t *cells_ = nullptr;  // [n_bytes], once anything was written
    uint32_t last_launch_ = 0;
    friend class Heap;
};

// The live allocations at one moment, sorted; what a launch checks its accesses against.
class HeapView {
   public:
    struct Entry : Range {
        Writers *writers;
    };
    HeapView(std::vector<Entry> entries, std::vector<Range> freed)
        : entries_(std::move(entries)), freed_(std::move(freed)) {}

    uint32_t launch = 0;  // number of the launch that uses it
    // The allocation that n bytes at `address` lie in, or null.
    const Entry *find(uintptr_t address, size_t n_bytes) const;
    // Says where `address` lies: "4 bytes past the end of the 64 bytes at 0x..".
    std::string describe(uintptr_t address) const;

   private:
    std::vector<Entry> entries_;
    std::vector<Range> freed_;
    mutable uint32_t recent_[64] = {};  // by bits of the address: the entry last found
};

// The allocations of a context. Each lies between unmapped red zones; freed ones stay unmapped for
// a while, so that their addresses are not given out again at once.
class Heap {
   public:
    ~Heap();
    // Zero where the memory limit does not allow it. New memory holds 0xff bytes.
    uintptr_t alloc(size_t n_bytes, size_t limit);
    bool free(uintptr_t address);
    bool holds(uintptr_t address, size_t n_bytes) const;
    size_t used() const { return used_; }
    size_t count() const { return live_.size(); }
    // What the next launch sees.
    std::shared_ptr<const HeapView> view();

   private:
    struct Mapping {
        void *base;
        size_t mapped_bytes, n_bytes;
        std::unique_ptr<Writers> writers;
    };
    static constexpr uint32_t N_LAUNCHES = 1u << (32 - Writers::BLOCK_BITS);
    std::map<uintptr_t, Mapping> live_;
    std::vector<Mapping> freed_;
    std::shared_ptr<HeapView> view_;
    uint32_t launch_ = 0;
    size_t used_ = 0;
};

}  // namespace twin
