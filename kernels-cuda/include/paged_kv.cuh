// From a slot of a sequence to an address, and what a query row sees.
#pragma once

#include "prim.cuh"

// The cache of one sequence in one layer.
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

    DEV uint32_t page(uint32_t slot) const {
        return page_table[(slot >> page_len_log2) * table_stride + layer];
    }

    // Element offset of a slot inside its page; side 0 is K, 1 is V.
    DEV uint32_t offset(uint32_t side, uint32_t kv_head, uint32_t slot, uint32_t head_dim) const {
        uint32_t in_page = slot & ((1u << page_len_log2) - 1);
        return (((side * n_kv_heads + kv_head) << page_len_log2) + in_page) * head_dim;
    }

    // The head_dim bf16 values of a slot.
    DEV uint16_t *at(uint32_t side, uint32_t kv_head, uint32_t slot, uint32_t head_dim) const {
        unsigned char *page_base = const_cast<unsigned char *>(base) + page(slot) * page_bytes;
        return reinterpret_cast<uint16_t *>(page_base) + offset(side, kv_head, slot, head_dim);
    }

    DEV uint32_t position(uint32_t slot) const {
        return slot_positions == nullptr ? slot : slot_positions[slot];
    }

    // A row sees a slot in use whose position is at most its own and inside the window.
    DEV bool sees(uint32_t row_position, uint32_t slot, uint32_t window) const {
        if (slot >= kv_len) return false;
        uint32_t p = position(slot);
        return p <= row_position && row_position - p < window;
    }
};
