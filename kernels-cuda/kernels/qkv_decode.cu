// Q, K and V of the few rows of a decode step, from the residual stream to where attention reads
// them.
//
//   wq, wk, wv [heads * d][k] bf16, taken as one list of heads: queries, keys, values
//
//   a head  +----------+  i, i + 1 ...
//           |  8 rows  |--+
//           +----------+  |  16 weight rows of a block: 8 rotation pairs (i, i + d/2), so that one
//           |  8 rows  |--+  thread finishes both elements of a pair
//           +----------+  i + d/2 ...
//
// block (g, i): i-th such slice of all heads by batch rows 16 g .. 16 g + 16. The norm rides along:
// 1 / rms scales the sums at the end. Then bias, rotation of Q and K, rounding to bf16, and the way
// to `heads.q` or to the row's slot. Where there is a q/k norm, and where pages hold codes, a head
// must be complete before it goes there: the projections go to `raw`, and qkv_finish takes them
// from there, a head in D / 8 lanes. Bytes: (n_q_heads + 2 n_kv_heads) d k 2 of weights; the rows
// (n_rows k 4) come from the L2 cache.
#include "gemv_decode.cuh"
#include "heads.cuh"

constexpr int PAIRS = gemv::N_WEIGHT_ROWS / 2;  // rotation pairs of a block

// The slice of a head that a block works on.
struct Slice {
    uint32_t n_q_heads, n_kv_heads, half;  // half: head_dim / 2
    uint32_t head;                         // counts q heads, then k heads, then v heads
    uint32_t first;                        // its elements: first .. + PAIRS, and `half` later

    DEV explicit Slice(const LorisHeads &heads)
        : n_q_heads(heads.n_q_heads), n_kv_heads(heads.pages.n_kv_heads), half(heads.head_dim / 2) {
        uint32_t slices = half / PAIRS;
        head = blockIdx.y / slices;
        first = blockIdx.y % slices * PAIRS;
    }

    DEV bool is_q() const { return head < n_q_heads; }
    DEV bool is_v() const { return head >= n_q_heads + n_kv_heads; }

    // Weights of element 0 of the head.
    DEV const uint16_t *weights(const QkvDecodeArgs &args) const {
        uint64_t n = static_cast<uint64_t>(2 * half) * args.in.k;
        if (is_q()) return args.wq + head * n;
        if (!is_v()) return args.wk + (head - n_q_heads) * n;
        return args.wv + (head - n_q_heads - n_kv_heads) * n;
    }
};

template <int N_TILES>
DEV void qkv(const QkvDecodeArgs &args) {
    const LorisHeads &heads = args.heads;
    const Slice slice(heads);
    const uint32_t d = heads.head_dim, k = args.in.k;

    const uint16_t *w[1][2];
    w[0][0] = slice.weights(args) + static_cast<uint64_t>(slice.first + prim::lane() / 4) * k;
    w[0][1] = w[0][0] + static_cast<uint64_t>(slice.half) * k;
    gemv::Product<1, N_TILES> product;
    product.run(w, gemv::NormRows<N_TILES>(args.in), k);

    // A thread finishes pair `m` of batch row `n`.
    const int m = threadIdx.x % PAIRS, n = threadIdx.x / PAIRS;
    const uint32_t row = gemv::first_row() + n;
    if (n >= 8 * N_TILES || row >= args.in.n_rows) return;
    const uint32_t i = slice.first + m;
    const float scale = product.inverse_rms(n, args.in);
    const float sum_lo = product.at(0, m, n), sum_hi = product.at(0, m + PAIRS, n);

    if (args.raw != nullptr) {
        uint64_t n_heads = slice.n_q_heads + 2 * slice.n_kv_heads;
        float *raw = args.raw + (row * n_heads + slice.head) * d;
        raw[i] = sum_lo * scale;
        raw[i + slice.half] = sum_hi * scale;
        return;
    }

    // Contractions are written out, so that both kernels round alike.
    const float *bias = heads.bias == nullptr ? nullptr : heads.bias + slice.head * d + i;
    float lo = fmaf(sum_lo, scale, bias == nullptr ? 0.0f : bias[0]);
    float hi = fmaf(sum_hi, scale, bias == nullptr ? 0.0f : bias[slice.half]);
    if (!slice.is_v()) {
        const float *angle = heads.cos_sin + (static_cast<uint64_t>(row) * slice.half + i) * 2;
        const float cos = angle[0], sin = angle[1], x = lo;
        lo = fmaf(x, cos, -(hi * sin));
        hi = fmaf(hi, cos, x * sin);
    }
    // K of kv head h is h runs of page_len slots further in the page; V follows behind all of K.
    uint32_t kv_head = slice.head - slice.n_q_heads;
    uint16_t *out = heads.q + (static_cast<uint64_t>(row) * slice.n_q_heads + slice.head) * d;
    if (!slice.is_q()) {
        const PageSlot slot = append_slot(heads, row);
        const uint64_t first = static_cast<uint64_t>(kv_head) << heads.pages.page_len_log2;
        out = reinterpret_cast<uint16_t *>(slot.page) + (first + slot.idx) * d;
    }
    out[i] = prim::to_bf16(lo);
    out[i + slice.half] = prim::to_bf16(hi);
}

// blockIdx = (row, run of heads).
template <int D>
DEV void finish(const QkvFinishArgs &args) {
    const LorisHeads &heads = args.heads;
    const uint32_t n_heads = heads.n_q_heads + 2 * heads.pages.n_kv_heads, row = blockIdx.x;
    const uint32_t warp = blockIdx.y * (blockDim.x / 32) + prim::warp();
    const uint32_t head = warp * HeadGroup<D>::HEADS + HeadGroup<D>::idx();
    const float *proj = args.raw + (static_cast<uint64_t>(row) * n_heads + head) * D;
    const bool active = head < n_heads;
    PageSlot slot = {};
    if (active && head >= heads.n_q_heads) slot = append_slot(heads, row);
    finish_head<D>(heads, proj, head, row, slot, active);
}

// At most 8 rows in all, and any number.
KERNEL(qkv_decode_r8, QkvDecodeArgs, 256, 3, gemv::SMEM_BYTES<1, 1>) {  // <= 80 registers
    qkv<1>(args);
}
KERNEL(qkv_decode_r16, QkvDecodeArgs, 256, 2, gemv::SMEM_BYTES<1, 2>) {  // <= 128 registers
    qkv<2>(args);
}

KERNEL(qkv_finish_d32, QkvFinishArgs, 128, 1, 0) { finish<32>(args); }    // <= 64 registers
KERNEL(qkv_finish_d64, QkvFinishArgs, 128, 1, 0) { finish<64>(args); }    // <= 64 registers
KERNEL(qkv_finish_d128, QkvFinishArgs, 128, 1, 0) { finish<128>(args); }  // <= 64 registers
