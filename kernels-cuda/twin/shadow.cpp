#include "shadow.hpp"

#include <algorithm>

#include "core.hpp"

namespace twin {

void SharedShadow::begin(uint32_t n_bytes, int n_warps) {
    for (int w = 0; w < n_warps_; w++) base_ = std::max(base_, clock_[w][w] + 1);
    bool wrap = base_ > TICKS / 2;
    if (wrap) base_ = 0;
    auto size = [&](auto &cells, size_t n) {
        if (wrap) std::fill(cells.begin(), cells.end(), 0);
        if (cells.size() < n) cells.resize(n);
    };
    size(written_, n_bytes);
    for (int w = 0; w < 32; w++) size(read_[w], w < n_warps ? n_bytes : 0);
    pending_.assign(n_bytes / 16 + 1, 0);
    for (auto &row : clock_) std::fill(std::begin(row), std::end(row), base_);
    n_bytes_ = n_bytes;
    n_warps_ = n_warps;
}

void SharedShadow::tick(int warp) {
    if (++clock_[warp][warp] >= TICKS - 1)
        fail(FaultKind::Launch, "too many barriers for the twin");
}

void SharedShadow::barrier(uint32_t warps) {
    uint32_t joined[32] = {};
    for (uint32_t rest = warps; rest != 0; rest &= rest - 1) {
        int w = __builtin_ctz(rest);
        tick(w);
        for (int v = 0; v < n_warps_; v++) joined[v] = std::max(joined[v], clock_[w][v]);
    }
    for (uint32_t rest = warps; rest != 0; rest &= rest - 1)
        std::copy(joined, joined + n_warps_, clock_[__builtin_ctz(rest)]);
}

void SharedShadow::access(Access kind, uint32_t thread, uint32_t offset, uint32_t n_bytes) {
    const uint32_t end = offset + n_bytes;
    for (uint32_t chunk = offset / 16; chunk <= (end - 1) / 16; chunk++) {
        if (pending_[chunk] != 0)
            fail(
                FaultKind::Launch,
                "%s shared byte %u into which a copy of thread %u is under way: cp_wait is missing",
                kind == Access::Read ? "reads" : "writes", chunk * 16, pending_[chunk] - 1u);
    }
    const uint32_t atomic = kind == Access::Atomic ? ATOMIC : 0;
    const Cell cell = thread << 22 | atomic | (clock_[thread / 32][thread / 32] + 1);
    // Most accesses meet runs of equal cells: each is judged once.
    Cell judged = ~0u;
    for (uint32_t i = offset; i < end; i++) {
        Cell w = written_[i];
        if (w == judged) continue;
        bool unwritten = (w & TICKS) <= base_;
        if (unwritten && kind != Access::Write)
            fail(FaultKind::Address, "reads shared byte %u, which nobody has written", i);
        if (!unwritten && !ordered(w, thread) && !(w & atomic)) race(kind, i, w, true);
        judged = w;
    }
    if (kind == Access::Read) {
        std::fill(&read_[thread / 32][offset], &read_[thread / 32][offset] + n_bytes, cell);
        return;
    }
    for (int v = 0; v < n_warps_; v++) {
        const Cell *reads = read_[v].data();
        for (uint32_t i = offset; i < end; i++) {
            if (reads[i] == judged) continue;
            if (!ordered(reads[i], thread) && !(reads[i] & atomic)) race(kind, i, reads[i], false);
            judged = reads[i];
        }
    }
    std::fill(&written_[offset], &written_[offset] + n_bytes, cell);
}

void SharedShadow::copy_issued(uint32_t thread, uint32_t offset) {
    access(Access::Write, thread, offset, 16);
    pending_[offset / 16] = static_cast<uint16_t>(thread + 1);
}

void SharedShadow::copy_landed(uint32_t thread, uint32_t offset) {
    pending_[offset / 16] = 0;
    access(Access::Write, thread, offset, 16);
}

void SharedShadow::race(Access kind, uint32_t offset, Cell other, bool other_wrote) {
    fail(FaultKind::Launch, "race: %s shared byte %u, which thread %u %s with no barrier between",
         kind == Access::Read ? "reads" : "writes", offset, other >> 22,
         other_wrote ? "wrote" : "read");
}

}  // namespace twin
