// Pages and tables: from a slot of a sequence to an address, and what a query row sees.
//
// formats.h (the build makes it) has the codings of a side, BF16 .., and the bytes of a head in
// each: CODE_BYTES and PARAM_BYTES of a slot, CHANNEL_BYTES that the slots of a page have in
// common.
#pragma once

#include "formats.h"
#include "prim.cuh"

// Where a bf16 slot of a table with sealed pages is.
struct WidePlace {
    uint64_t page;      // its id
    uint32_t len, idx;  // slots of the page, and which of them
};

// Positions lo <= p < hi; lo <= hi.
struct Range {
    uint32_t lo, hi;
    DEV bool has(uint32_t p) const { return p - lo < hi - lo; }
};

// What the query of a row meets: slots by their positions, or, turned (rotation.cuh), the sinks of
// a stream as if they stood right in front of its window.
enum class Meets { SINKS, WINDOW };

// The positions that a row sees of those that it meets. A row of a stream sees everything up to its
// position until there are sink + window of them.
DEV Range seen_by(const LorisSeq &seq, Meets meets, uint32_t position, uint32_t window) {
    const bool is_full = seq.window != 0 && position >= seq.sink + seq.window;
    if (meets == Meets::SINKS) return {0, is_full ? seq.sink : 0};
    if (is_full) window = min(window, seq.window);
    return {position >= window ? position + 1 - window : 0, position + 1};
}

// Splits of decode attention behind the first of which all slots were given back. (Those begin in
// the first split, as a page is no longer than that.) No block works on them, so that the work does
// not grow with what a stream has left behind.
DEV uint32_t n_skipped_splits(const LorisSeq &seq) {
    return max(seq.n_gone / LORIS_SPLIT_LEN, 1u) - 1;
}

// The cache of one sequence in one layer, as attention walks over it: slots are counted from SKEW,
// which is 0 where all pages hold bf16 and CODED_SKEW where they hold codes (formats.h). Numbers
// below SKEW are slots that nobody sees. Slots that were given back count, so that tiles and splits
// do not depend on when they went; nobody sees them.
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
    uint32_t table_stride, layer, page_len_log2, n_kv_heads, n_gone, kv_len;
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
          n_gone(seq.n_gone),
          kv_len(seq.n_gone + seq.kv_start + seq.n_rows),
          n_sealed(seq.n_sealed),
          tail_len_log2(pages.tail_len_log2) {}

    // Behind the last slot in use.
    DEV uint32_t end() const { return kv_len + SKEW; }

    // Counted so that pages begin at multiples of their length.
    DEV uint32_t in_pages(uint32_t slot) const {
        return SKEW == 0 ? slot : slot - (SKEW + WIDE_SLOTS) + (1u << page_len_log2);
    }

    // The first slot of the tail, a multiple of 16.
    DEV uint32_t tail_start() const { return SKEW + WIDE_SLOTS + (n_sealed << page_len_log2); }

    // The page of a slot that is not in a tail. There it is some page of the table, and of slots
    // that were given back the first, so that there is an address.
    DEV uint32_t page(uint32_t slot) const {
        const uint32_t idx = in_pages(slot) >> page_len_log2, n = n_gone >> page_len_log2;
        return page_table[(max(idx, n) - n) * table_stride + layer];
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
        const bool is_first = slot < SKEW + WIDE_SLOTS;
        const uint32_t in_tail = slot - tail_start();
        const uint32_t len = is_first ? WIDE_SLOTS : 1u << tail_len_log2;
        const uint32_t page_idx = is_first ? 0 : 1 + n_sealed + (in_tail >> tail_len_log2);
        return {page_table[page_idx * table_stride + layer], len,
                is_first ? slot - SKEW : in_tail & (len - 1)};
    }

    DEV uint32_t position(uint32_t slot) const {
        return slot_positions == nullptr ? slot - SKEW : slot_positions[slot - SKEW];
    }

    DEV bool is_used(uint32_t slot) const { return slot - SKEW < kv_len; }

    // How many of the slots from `slot` on, the first of 16 in one page, can be read: none that
    // were given back.
    DEV int n_readable(uint32_t slot) const {
        return in_pages(slot) - (1u << page_len_log2) < n_gone ? 0 : end() - slot;
    }

    // Whether a row that sees some positions sees a slot.
    DEV bool is_seen(uint32_t slot, Range seen) const {
        return is_used(slot) && seen.has(position(slot));
    }
};

// Bytes of a head in a coding that is known at run time.
struct CodeBytes {
    uint32_t codes, params, channels;

    // Of a head in a page.
    DEV uint32_t run(uint32_t len) const { return len * (codes + params) + channels; }
};
template <uint32_t CODING, int D>
DEV CodeBytes code_bytes_of() {
    return {CODE_BYTES<CODING, D>, PARAM_BYTES<CODING, D>, CHANNEL_BYTES<CODING, D>};
}
template <int D>
DEV CodeBytes code_bytes(uint32_t coding) {
    if (coding == BF16) return code_bytes_of<BF16, D>();
    if (coding == INT4) return code_bytes_of<INT4, D>();
    if (coding == INT2) return code_bytes_of<INT2, D>();
    if (coding == INT4_CHANNEL) return code_bytes_of<INT4_CHANNEL, D>();
    if (coding == INT2_CHANNEL) return code_bytes_of<INT2_CHANNEL, D>();
    return code_bytes_of<INT8, D>();
}

// First byte in a page of the codes of a head's slot, and of its params.
struct HeadPlace {
    uint32_t codes, params;
};
// In a page of `len` slots with keys in `k_coding`; side 0 is K, 1 is V, in `coding`.
template <int D>
DEV HeadPlace head_place(uint32_t k_coding, uint32_t coding, uint32_t n_kv_heads, uint32_t len,
                         uint32_t side, uint32_t kv_head, uint32_t slot) {
    const CodeBytes k = code_bytes<D>(k_coding), own = code_bytes<D>(coding);
    const uint32_t before = side * n_kv_heads * k.run(len);
    const uint32_t run = before + kv_head * own.run(len);
    return {run + slot * own.codes, run + len * own.codes + slot * own.params};
}

DEV bool is_coded(const LorisPages &pages) {
    return pages.k_coding != BF16 || pages.v_coding != BF16;
}

DEV bool is_sealed(const LorisPages &pages) {
    return pages.k_coding == INT4_CHANNEL || pages.k_coding == INT2_CHANNEL;
}

// A slot of a table: where it is.
struct PageSlot {
    unsigned char *page;
    uint32_t idx;  // in the page; and FIRST or TAIL in one of bf16 where others are coded
    static constexpr uint32_t FIRST = 1u << 31, TAIL = 1u << 30;

    DEV bool is_wide() const { return (idx & (FIRST | TAIL)) != 0; }
    // Slots of the page.
    DEV uint32_t len(const LorisPages &pages) const {
        if ((idx & FIRST) != 0) return WIDE_SLOTS;
        return 1u << ((idx & TAIL) != 0 ? pages.tail_len_log2 : pages.page_len_log2);
    }
    DEV uint32_t in_page() const { return idx & ~(FIRST | TAIL); }
};
// Of a table with sealed pages: a slot behind those.
DEV PageSlot page_slot(const LorisPages &pages, const LorisTable &table, uint32_t layer,
                       uint32_t slot, uint32_t n_sealed = 0) {
    const uint32_t page_len = 1u << pages.page_len_log2;
    uint32_t idx = slot & (page_len - 1), page_idx = slot >> pages.page_len_log2;
    if (is_coded(pages)) {
        const bool is_first = slot < WIDE_SLOTS;
        idx = is_first ? slot | PageSlot::FIRST : (slot - WIDE_SLOTS) & (page_len - 1);
        page_idx = (slot + page_len - WIDE_SLOTS) >> pages.page_len_log2;
        if (is_sealed(pages) && !is_first) {
            slot -= WIDE_SLOTS + (n_sealed << pages.page_len_log2);
            idx = (slot & ((1u << pages.tail_len_log2) - 1)) | PageSlot::TAIL;
            page_idx = 1 + n_sealed + (slot >> pages.tail_len_log2);
        }
    }
    const uint64_t page = table.pages[page_idx * table.n_layers + layer];
    return {static_cast<unsigned char *>(pages.base) + page * pages.page_bytes, idx};
}

// A head of a slot: its coding, and where its codes and params are. Side 0 is K, 1 is V.
struct SlotHead {
    uint32_t coding;
    unsigned char *codes, *params;
};
template <int D>
DEV SlotHead slot_head(const LorisPages &pages, const PageSlot &slot, uint32_t side,
                       uint32_t kv_head) {
    const bool is_wide = slot.is_wide();
    const uint32_t k_coding = is_wide ? BF16 : pages.k_coding;
    const uint32_t coding = is_wide ? BF16 : side == 0 ? pages.k_coding : pages.v_coding;
    const HeadPlace place = head_place<D>(k_coding, coding, pages.n_kv_heads, slot.len(pages), side,
                                          kv_head, slot.in_page());
    return {coding, slot.page + place.codes, slot.page + place.params};
}
