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

// The live allocations at one moment, sorted; what a launch checks its accesses against.
class HeapView {
public:
    explicit HeapView(std::vector<Range> ranges);
    // Whether n bytes at `address` lie in one allocation.
    bool holds(uintptr_t address, size_t n_bytes) const;
    // Says where `address` lies: "4 bytes past the end of the 64 bytes at 0x..".
    std::string describe(uintptr_t address) const;

private:
    std::vector<Range> ranges_;
    mutable uint32_t recent_[64] = {};  // by bits of the address: the range last found
};

// The allocations of a context. Each lies between unmapped red zones; freed ones stay unmapped for a while,
// so that their addresses are not given out again at once.
class Heap {
public:
    ~Heap();
    // Zero where the memory limit does not allow it. New memory holds 0xff bytes.
    uintptr_t alloc(size_t n_bytes, size_t limit);
    bool free(uintptr_t address);
    bool holds(uintptr_t address, size_t n_bytes) const;
    size_t used() const { return used_; }
    size_t count() const { return live_.size(); }
    std::shared_ptr<const HeapView> view();

private:
    struct Mapping {
        void *base;
        size_t mapped_bytes, n_bytes;
    };
    std::map<uintptr_t, Mapping> live_;
    std::vector<Mapping> freed_;
    std::shared_ptr<const HeapView> view_;
    size_t used_ = 0;
};

}  // namespace twin
