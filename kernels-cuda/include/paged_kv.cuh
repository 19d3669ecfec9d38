// From a slot of a sequence to an address, and what a query row sees.
#pragma once

#include "prim.cuh"

// The cache of one sequence in one layer, as attention walks over it: slots are counted from SKEW,
// which is 0 where all pages hold bf16 and LORIS_KV_SKEW where they hold codes (abi.h). Numbers
// below SKEW are slots that nobody sees.
//
//   bf16   page 0: 0 .. page_len            page 1: page_len .. 2 page_len
//   coded  page 0: 12 .. 16, bf16           page 1: 16 .. 16 + page_len
template <uint32_t SKEW>
struct PagedKv {
    const uint32_t *page_table;      // [page_idx][n_layers]
    const uint32_t *slot_positions;  // [kv_len], or NULL where slot i holds position i
    const unsigned char *base;
    uint64_t page_bytes;
    uint32_t table_stride, layer, page_len_log2, n_kv_heads, kv_len;

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
          kv_len(seq.kv_start + seq.n_rows) {}

    // Behind the last slot in use.
    DEV uint32_t end() const { return kv_len + SKEW; }

    // Counted so that pages begin at multiples of their length.
    DEV uint32_t in_pages(uint32_t slot) const {
        return SKEW == 0 ? slot : slot - (SKEW + LORIS_KV_WIDE) + (1u << page_len_log2);
    }

    DEV uint32_t page(uint32_t slot) const {
        return page_table[(in_pages(slot) >> page_len_log2) * table_stride + layer];
    }

    // The slot's index in its page, the first page of coded ones excepted.
    DEV uint32_t in_page(uint32_t slot) const {
        return in_pages(slot) & ((1u << page_len_log2) - 1);
    }

    // Whether the 16 slots from `slot`, a multiple of 16, end with the bf16 slots of a first page.
    DEV bool is_wide(uint32_t slot) const { return SKEW != 0 && slot == 0; }

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
