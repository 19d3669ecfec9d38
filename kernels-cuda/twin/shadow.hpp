// What is known about each byte of shared memory: whether it was written, by whom, and who has read
// it.
//
// Two accesses of different threads conflict if one writes and no barrier lies between. Barriers
// are seen by vector clocks at the granularity of warps: clock[w][v] is the last tick of warp v
// whose accesses lie before what warp w does now; its own accesses carry the tick clock[w][w] + 1.
// A barrier gives all its warps the largest clocks among them. Lanes of one warp are ordered by
// warp_sync and barriers alone.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <vector>

namespace twin {

enum class Access { Read, Write, Atomic };

class SharedShadow {
   public:
    // A new block: nothing is written, nothing is known.
    void begin(uint32_t n_bytes, int n_warps);

    // Checks and records an access of n bytes at `offset`, all inside the block's memory.
    void access(Access kind, uint32_t thread, uint32_t offset, uint32_t n_bytes);

    // A background copy of 16 bytes: begins, and lands.
    void copy_issued(uint32_t thread, uint32_t offset);
    void copy_landed(uint32_t thread, uint32_t offset);

    // Orders what the lanes of a warp did before what they do next.
    void warp_ordered(int warp) { tick(warp); }
    // The same for the warps of a barrier.
    void barrier(uint32_t warps);

   private:
    // thread << 22 | atomic << 21 | tick. Ticks only grow, from block to block too: a cell with an
    // old tick is of an earlier block, which makes a new block free of charge.
    using Cell = uint32_t;
    static constexpr uint32_t TICKS = (1u << 21) - 1, ATOMIC = 1u << 21;

    uint32_t n_bytes_ = 0;
    int n_warps_ = 0;
    uint32_t base_ = 0;  // the last tick of earlier blocks
    uint32_t clock_[32][32];
    std::vector<Cell> written_;      // [byte] last write
    std::vector<Cell> read_[32];     // [warp][byte] last read by the warp
    std::vector<uint16_t> pending_;  // [chunk of 16] 1 + thread whose copy is under way

    void tick(int warp);
    bool ordered(Cell before, uint32_t thread) const {
        uint32_t by = before >> 22;
        return by == thread || (before & TICKS) <= clock_[thread / 32][by / 32];
    }
    [[noreturn]] void race(Access kind, uint32_t offset, Cell other, bool other_wrote);
};

}  // namespace twin
