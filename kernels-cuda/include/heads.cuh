// What happens to one head of one row between its projection and attention: bias, q/k norm,
// rotation to its position, the other rotation where the cache has one (rotation.cuh), rounding to
// bf16 or coding, and the way to `heads.q` (Q) or to its slot of a page (K and V).
#pragma once

#include "kv/coding.cuh"
#include "rotation.cuh"

// The slot that a row is appended to.
DEV PageSlot append_slot(const LorisHeads &heads, uint32_t row) {
    const LorisBatch &batch = heads.batch;
    const LorisSeq seq = batch.seqs[batch.row_seq[row]];
    const LorisTable table = {batch.page_tables + seq.page_table_start, batch.n_layers};
    const uint32_t slot = seq.kv_start + (row - seq.row_start);
    return page_slot(heads.pages, table, heads.layer, slot, seq.n_sealed);
}

// (warp) Finishes a head: `proj` are its D raw projections in shared or global memory, 16-byte
// aligned, `head` counts q heads, then k heads, then v heads. `slot` is append_slot of the row, not
// read for a q head. The arguments are the same in all lanes of a HeadGroup; groups that are not
// `active` only keep the warp together. `rotation` is the row's, not read for a v head.
template <int D>
DEV void finish_head(const LorisHeads &heads, const float *proj, uint32_t head, uint32_t row,
                     const PageSlot &slot, bool active, const Rotation<D> &rotation) {
    constexpr int LANES = HeadGroup<D>::LANES;
    uint32_t n_kv_heads = heads.pages.n_kv_heads, n_q_heads = heads.n_q_heads;
    bool is_q = head < n_q_heads, is_v = head >= n_q_heads + n_kv_heads;
    uint32_t first = 4 * (prim::lane() % LANES);  // of this lane's elements, and D/2 later

    float lo[4] = {}, hi[4] = {};
    if (active) {
        load4(lo, proj + first);
        load4(hi, proj + first + D / 2);
        if (heads.bias != nullptr) {
            float bias_lo[4], bias_hi[4];
            load4(bias_lo, heads.bias + head * D + first);
            load4(bias_hi, heads.bias + head * D + first + D / 2);
            for (int i = 0; i < 4; i++) lo[i] += bias_lo[i], hi[i] += bias_hi[i];
        }
    }

    if (heads.q_norm != nullptr) {
        float sum = 0.0f;
        for (int i = 0; i < 4; i++) sum += lo[i] * lo[i] + hi[i] * hi[i];
        for (int mask = LANES / 2; mask > 0; mask >>= 1) sum += prim::shfl_xor(sum, mask);
        if (!is_v) {
            const float *norm = is_q ? heads.q_norm : heads.k_norm;
            float inv_rms = 1.0f / sqrtf(sum * (1.0f / D) + heads.eps);
            float norm_lo[4], norm_hi[4];
            load4(norm_lo, norm + first);
            load4(norm_hi, norm + first + D / 2);
            for (int i = 0; i < 4; i++)
                lo[i] *= inv_rms * norm_lo[i], hi[i] *= inv_rms * norm_hi[i];
        }
    }
    if (!is_v) rotation.turn(lo, hi);
    const LorisPages &pages = heads.pages;
    if (pages.k_rotated || pages.v_rotated) {
        float rotated_lo[4], rotated_hi[4];
        for (int i = 0; i < 4; i++) rotated_lo[i] = lo[i], rotated_hi[i] = hi[i];
        rotate<D>(rotated_lo, rotated_hi);
        const bool is_rotated = is_v ? pages.v_rotated : pages.k_rotated;
        for (int i = 0; i < 4; i++) {
            lo[i] = is_rotated ? rotated_lo[i] : lo[i];
            hi[i] = is_rotated ? rotated_hi[i] : hi[i];
        }
    }

    // Where it goes.
    uint16_t *out = heads.q + (static_cast<uint64_t>(row) * n_q_heads + head) * D;
    bool is_bf16 = true;
    if (is_coded(pages)) {
        const uint32_t kv_head = head - n_q_heads - (is_v ? n_kv_heads : 0);
        const SlotHead to = slot_head<D>(pages, slot, is_v, kv_head);
        is_bf16 = is_q || to.coding == BF16;
        if (!is_sealed(pages))  // nothing is coded when it is appended
            encode<D>(to.coding, lo, hi, to.codes, to.params, active && !is_bf16);
        if (!is_q) out = reinterpret_cast<uint16_t *>(to.codes);
    } else if (!is_q) {
        // K of kv head h is h runs of page_len slots further in the page; V is behind all of K.
        const uint64_t run = static_cast<uint64_t>(head - n_q_heads) << pages.page_len_log2;
        out = reinterpret_cast<uint16_t *>(slot.page) + (run + slot.idx) * D;
    }
    if (!active || !is_bf16) return;
    *reinterpret_cast<uint2 *>(out + first) =
        make_uint2(prim::pack_bf16(lo[0], lo[1]), prim::pack_bf16(lo[2], lo[3]));
    *reinterpret_cast<uint2 *>(out + first + D / 2) =
        make_uint2(prim::pack_bf16(hi[0], hi[1]), prim::pack_bf16(hi[2], hi[3]));
}

// (warp) The same with the rotation loaded on the way.
template <int D>
DEV void finish_head(const LorisHeads &heads, const float *proj, uint32_t head, uint32_t row,
                     const PageSlot &slot, bool active) {
    Rotation<D> rotation = {};
    if (active) rotation.load(heads.cos_sin + static_cast<uint64_t>(row) * D);
    finish_head<D>(heads, proj, head, row, slot, active, rotation);
}
