// From a slot of a sequence to an address, and what a query row sees.
#pragma once

#include "prim.cuh"

// Where a bf16 slot of a table with sealed pages is.
struct WidePlace {
    uint64_t page;      // its id
    uint32_t len, idx;  // slots of the page, and which of them
};

// The cache of one sequence in one layer, as attention walks over it: slots are counted from SKEW,
// which is 0 where all pages hold bf16 and LORIS_KV_SKEW where they hold codes (abi.h). Numbers
// below SKEW are slots that nobody sees.
//
//   bf16   page 0: 0 .. page_len            page 1: page_len .. 2 page_len
//   coded  page 0: 12 .. 16, bf16           page 1: 16 .. 16 + page_len
//
// Where pages are SEALED those behind n_sealed such pages are the tail: bf16, of fewer slots each.
template <uint32_t SKEW, bool SEALED = false>
struct PagedKv {
    const uint32_t *page_table;      // [page_idx][n_layers]
    const uint32_t *slot_positions;  // [kv_len], or NULL where slot i holds position i
    const unsigned char *base;
    uint64_t page_bytes;
    uint32_t table_stride, layer, page_len_log2, n_kv_heads, kv_len;
    uint32_t n_sealed, tail_len_log2;  // where pages are SEALED

    DEV PagedKv(const LorisPages &pages, const LorisBatch &batch, const LorisSeq &seq,
                uint32_t layer)
        : page_table(batch.page_tables + seq.page_table_start),
          slot_positions(seq.positions_start == LORIS_DENSE
                             ? nullptr
                             : batch.slot_positions + seq.positions_start),
          base(static_cast<const unsigned char *>(pages.base)),
          page_bytes(pages.page_bytes),
          table_stride(batch.n_layers),
          layer(layer),
          page_len_log2(pages.page_len_log2),
          n_kv_heads(pages.n_kv_heads),
          kv_len(seq.kv_start + seq.n_rows),
          n_sealed(seq.n_sealed),
          tail_len_log2(pages.tail_len_log2) {}

    // Behind the last slot in use.
    DEV uint32_t end() const { return kv_len + SKEW; }

    // Counted so that pages begin at multiples of their length.
    DEV uint32_t in_pages(uint32_t slot) const {
        return SKEW == 0 ? slot : slot - (SKEW + LORIS_KV_WIDE) + (1u << page_len_log2);
    }

    // The first slot of the tail, a multiple of 16.
    DEV uint32_t tail_start() const { return SKEW + LORIS_KV_WIDE + (n_sealed << page_len_log2); }

    // The page of a slot that is not in a tail (there: some page of the table).
    DEV uint32_t page(uint32_t slot) const {
        return page_table[(in_pages(slot) >> page_len_log2) * table_stride + layer];
    }

    // The slot's index in its page, the first page of coded ones excepted.
    DEV uint32_t in_page(uint32_t slot) const {
        return in_pages(slot) & ((1u << page_len_log2) - 1);
    }

    // Whether the 16 slots from `slot`, a multiple of 16, end with the bf16 slots of a first page,
    // or are a tail's.
    DEV bool is_wide(uint32_t slot) const {
        return SKEW != 0 && (slot == 0 || (SEALED && slot >= tail_start()));
    }

    // Where a slot in use of the first page or of the tail is.
    DEV WidePlace wide_place(uint32_t slot) const {
        const bool is_first = slot < SKEW + LORIS_KV_WIDE;
        const uint32_t in_tail = slot - tail_start();
        const uint32_t len = is_first ? LORIS_KV_WIDE : 1u << tail_len_log2;
        const uint32_t page_idx = is_first ? 0 : 1 + n_sealed + (in_tail >> tail_len_log2);
        return {page_table[page_idx * table_stride + layer], len,
                is_first ? slot - SKEW : in_tail & (len - 1)};
    }

    DEV uint32_t position(uint32_t slot) const {
        return slot_positions == nullptr ? slot - SKEW : slot_positions[slot - SKEW];
    }

    DEV bool is_used(uint32_t slot) const { return slot - SKEW < kv_len; }

    // A row sees a slot in use whose position is at most its own and inside the window.
    DEV bool sees(uint32_t row_position, uint32_t slot, uint32_t window) const {
        if (!is_used(slot)) return false;
        uint32_t p = position(slot);
        return p <= row_position && row_position - p < window;
    }
};
