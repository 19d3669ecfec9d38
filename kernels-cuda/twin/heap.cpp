#include "heap.hpp"

#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#include <algorithm>

namespace twin {

constexpr size_t PAGE = 4096;
constexpr size_t RED_ZONE = 1 << 20;
constexpr size_t N_QUARANTINE = 1024;

int64_t Writers::other(uint32_t launch, uint32_t block, size_t offset, size_t n) const {
    if (last_launch_ != launch) return -1;
    const uint32_t own = launch << BLOCK_BITS | (block + 1);
    for (size_t i = offset; i < offset + n; i++) {
        if (cells_[i] != own && cells_[i] >> BLOCK_BITS == launch)
            return (cells_[i] & ((1u << BLOCK_BITS) - 1)) - 1;
    }
    return -1;
}

void Writers::record(uint32_t launch, uint32_t block, size_t offset, size_t n) {
    if (cells_ == nullptr) {
        void *p = mmap(nullptr, n_bytes_ * sizeof *cells_, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (p == MAP_FAILED) return;
        cells_ = static_cast<uint32_t *>(p);
    }
    last_launch_ = launch;
    std::fill(cells_ + offset, cells_ + offset + n, launch << BLOCK_BITS | (block + 1));
}

void Writers::clear() {
    if (cells_ != nullptr) munmap(cells_, n_bytes_ * sizeof *cells_);
    cells_ = nullptr;
    last_launch_ = 0;
}

const HeapView::Entry *HeapView::find(uintptr_t address, size_t n_bytes) const {
    uint32_t &recent = recent_[address >> 12 & 63];
    auto in = [&](const Range &r) { return address >= r.begin && address + n_bytes <= r.end; };
    if (recent < entries_.size() && in(entries_[recent])) return &entries_[recent];
    auto after = std::upper_bound(entries_.begin(), entries_.end(), address,
                                  [](uintptr_t a, const Range &r) { return a < r.begin; });
    if (after == entries_.begin() || !in(*--after)) return nullptr;
    recent = static_cast<uint32_t>(after - entries_.begin());
    return &*after;
}

std::string HeapView::describe(uintptr_t address) const {
    char text[160];
    for (const Range &r : freed_) {
        if (address < r.begin || address >= r.end) continue;
        snprintf(text, sizeof text, "%zu bytes into %zu bytes that have been freed",
                 address - r.begin, r.end - r.begin);
        return text;
    }
    const Range *nearest = nullptr;
    size_t least = SIZE_MAX;
    for (const Range &r : entries_) {
        size_t distance = address < r.begin ? r.begin - address
                          : address < r.end ? 0
                                            : address - r.end + 1;
        if (distance < least) least = distance, nearest = &r;
    }
    if (nearest == nullptr) return "nothing is allocated";
    const bool below = address < nearest->begin, past = address >= nearest->end;
    snprintf(text, sizeof text, "%zu bytes %s the %zu bytes at %#zx",
             below ? least : address - (past ? nearest->end : nearest->begin),
             below  ? "before"
             : past ? "past the end of"
                    : "into",
             nearest->end - nearest->begin, nearest->begin);
    return text;
}

Heap::~Heap() {
    for (auto &[address, m] : live_) munmap(m.base, m.mapped_bytes);
    for (auto &m : freed_) munmap(m.base, m.mapped_bytes);
}

uintptr_t Heap::alloc(size_t n_bytes, size_t limit) {
    if (n_bytes > limit || used_ > limit - n_bytes) return 0;
    size_t data_bytes = (n_bytes + PAGE - 1) / PAGE * PAGE;
    size_t mapped_bytes = data_bytes + 2 * RED_ZONE;
    void *base =
        mmap(nullptr, mapped_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED) return 0;
    char *data = static_cast<char *>(base) + RED_ZONE;
    if (mprotect(data, data_bytes, PROT_READ | PROT_WRITE) != 0) {
        munmap(base, mapped_bytes);
        return 0;
    }
    memset(data, 0xff, n_bytes);
    auto address = reinterpret_cast<uintptr_t>(data);
    live_[address] = {base, mapped_bytes, n_bytes, std::make_unique<Writers>(n_bytes)};
    used_ += n_bytes;
    view_.reset();
    return address;
}

bool Heap::free(uintptr_t address) {
    auto found = live_.find(address);
    if (found == live_.end()) return false;
    Mapping m = std::move(found->second);
    m.writers.reset();
    live_.erase(found);
    view_.reset();
    used_ -= m.n_bytes;
    mmap(m.base, m.mapped_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED,
         -1, 0);
    freed_.push_back(std::move(m));
    if (freed_.size() > N_QUARANTINE) {
        munmap(freed_.front().base, freed_.front().mapped_bytes);
        freed_.erase(freed_.begin());
    }
    return true;
}

bool Heap::holds(uintptr_t address, size_t n_bytes) const {
    auto after = live_.upper_bound(address);
    if (after == live_.begin()) return false;
    auto &[begin, m] = *--after;
    return address - begin <= m.n_bytes && n_bytes <= m.n_bytes - (address - begin);
}

std::shared_ptr<const HeapView> Heap::view() {
    if (view_ == nullptr) {
        std::vector<HeapView::Entry> entries;
        for (auto &[address, m] : live_)
            entries.push_back({{address, address + m.n_bytes}, m.writers.get()});
        std::vector<Range> freed;
        for (auto &m : freed_) {
            uintptr_t begin = reinterpret_cast<uintptr_t>(m.base) + RED_ZONE;
            freed.push_back({begin, begin + m.n_bytes});
        }
        view_ = std::make_shared<HeapView>(std::move(entries), std::move(freed));
    }
    // Numbers begin again before cells would take an old launch for this one.
    if (++launch_ == N_LAUNCHES) {
        for (auto &[address, m] : live_) m.writers->clear();
        launch_ = 1;
    }
    view_->launch = launch_;
    return view_;
}

}  // namespace twin
