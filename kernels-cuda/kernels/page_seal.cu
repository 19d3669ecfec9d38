// Pages are sealed: what the bf16 pages of a tail hold becomes one page of codes.
//
//   seals [n_seals][n_from + 1]   pages of tail_len slots, in their order, and the page that they
//   become
//
// Numbers with a scale and a zero in common are a series: a channel of K in all slots, or a group
// of V in one slot (KIVI, Liu et al. 2024, section 3). A block is (seal, kv head, side):
//
//   1  a thread fits a series: of some ranges the one that loses least in the sum of squares
//   2  a thread packs four bytes: codes of four neighbours, and of those 16, 32 .. further
//
// The arithmetic is that of `engine/src/backend/cpu/kv/` in its order, term by term and
// rounded after each: the same numbers become the same bytes on every device. A page is coded once
// in page_len tokens, so nothing here is in a hurry: each pass over the numbers, one for the extent
// and one for each range, reads them from the cache. Bytes: n_from pages of bf16 in, a page of
// codes out.
#include "kv/coding.cuh"

constexpr int N_THREADS = 128;

// What codes stand for: `from` + code / `inverse`, as it is stored.
struct Steps {
    float from, inverse;
};

// The bf16 numbers of a head.
template <int D>
struct Source {
    const LorisPages &pages;
    const uint32_t *seal;
    uint32_t side, kv_head;

    DEV const uint16_t *row(uint32_t slot) const {
        const uint32_t len = 1u << pages.tail_len_log2;
        const uint64_t page = seal[slot >> pages.tail_len_log2];
        const HeadPlace place =
            head_place<D>(BF16, BF16, pages.n_kv_heads, len, side, kv_head, slot & (len - 1));
        const unsigned char *base = static_cast<const unsigned char *>(pages.base);
        return reinterpret_cast<const uint16_t *>(base + page * pages.page_bytes + place.codes);
    }
};

// Fits a series of `n` numbers. With four codes, numbers far out are better cut off than all others
// told apart more coarsely; of ranges that lose alike the widest is taken.
template <int BITS, class Number>
DEV Steps fit(Number number, uint32_t n, uint16_t &scale_bits, uint16_t &zero_bits) {
    constexpr int N_SHARES = BITS == 2 ? 4 : 1;
    constexpr float MOST = (1 << BITS) - 1;
    const float shares[4] = {1.0f, 0.9f, 0.8f, 0.7f};  // of the whole range, about its middle
    float least = INFINITY, largest = -INFINITY, poison = 0.0f;
    for (uint32_t i = 0; i < n; i++) {
        const float x = number(i);
        least = fminf(least, x), largest = fmaxf(largest, x), poison += prim::mul_rn(x, 0.0f);
    }
    float best = INFINITY, low = 0.0f, high = NAN;
#pragma unroll
    for (int s = 0; s < N_SHARES; s++) {
        const float half = prim::mul_rn(largest - least, 0.5f * shares[s]);
        const float from = prim::mul_rn(largest + least, 0.5f) - half;
        const float scale = prim::mul_rn(2.0f, half) / MOST;
        const float inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
        float losses = 0.0f;
        for (uint32_t i = 0; i < n; i++) {
            const float x = number(i);
            const float nearest = rintf(prim::mul_rn(x - from, inverse));
            const float code = fminf(fmaxf(nearest, 0.0f), MOST);
            const float loss = x - (from + prim::mul_rn(scale, code));
            losses += prim::mul_rn(loss, loss);
        }
        if (losses < best) best = losses, low = from, high = from + prim::mul_rn(scale, MOST);
    }
    scale_bits = prim::to_f16((high + poison - low) / MOST);
    zero_bits = prim::to_f16(low);
    const float stored = prim::f16_to_float(scale_bits);
    return {prim::f16_to_float(zero_bits), stored > 0.0f ? 1.0f / stored : 0.0f};
}

// Side 0 is K, with series of channels, side 1 is V, with a series for each slot and group.
template <int D, int BITS>
DEV void body(const PageSealArgs &args) {
    using K = Channel<D, BITS>;
    using V = Group<D, BITS>;
    constexpr uint32_t GROUPS = V::GROUPS, GROUP = D / GROUPS;
    const LorisPages &pages = args.pages;
    const uint32_t page_len = 1u << pages.page_len_log2;
    const uint32_t n_from = 1u << (pages.page_len_log2 - pages.tail_len_log2);
    const uint32_t *seal = args.seals + blockIdx.x * (n_from + 1);
    const uint32_t kv_head = blockIdx.y, side = blockIdx.z;
    const Source<D> source = {pages, seal, side, kv_head};

    const HeadPlace place = head_place<D>(K::ID, side == 0 ? K::ID : V::ID, pages.n_kv_heads,
                                          page_len, side, kv_head, 0);
    unsigned char *page =
        static_cast<unsigned char *>(pages.base) + seal[n_from] * pages.page_bytes;
    uint16_t *params = reinterpret_cast<uint16_t *>(page + place.params);
    Steps *steps_smem = prim::smem<Steps>();  // [series]: as many as the launch has room for

    // Scale and zero of each series.
    const uint32_t n_series = side == 0 ? D : page_len * GROUPS;
    for (uint32_t series = threadIdx.x; series < n_series; series += N_THREADS) {
        uint16_t scale, zero;
        if (side == 0) {
            auto number = [&](uint32_t slot) {
                return prim::bf16_to_float(source.row(slot)[series]);
            };
            steps_smem[series] = fit<BITS>(number, page_len, scale, zero);
            params[series] = scale, params[D + series] = zero;
        } else {
            const uint16_t *group = source.row(series / GROUPS) + series % GROUPS * GROUP;
            auto number = [&](uint32_t i) { return prim::bf16_to_float(group[i]); };
            steps_smem[series] = fit<BITS>(number, GROUP, scale, zero);
            params[2 * series] = scale, params[2 * series + 1] = zero;
        }
    }
    prim::block_sync();

    // Codes: 16 bytes have a number in each of their parts, from the low bits up.
    constexpr uint32_t N_PARTS = 8 / BITS, N_WORDS = D / N_PARTS / 4;
    for (uint32_t i = threadIdx.x; i < page_len * N_WORDS; i += N_THREADS) {
        const uint32_t slot = i / N_WORDS, byte = i % N_WORDS * 4;
        const uint16_t *row = source.row(slot);
        uint32_t word = 0;
        for (uint32_t part = 0; part < N_PARTS; part++)
            for (uint32_t j = 0; j < 4; j++) {
                const uint32_t dim = (byte / 16 * N_PARTS + part) * 16 + byte % 16 + j;
                const Steps steps = steps_smem[side == 0 ? dim : slot * GROUPS + dim / GROUP];
                const float x = prim::bf16_to_float(row[dim]);
                const float nearest = rintf(prim::mul_rn(x - steps.from, steps.inverse));
                const float code = fminf(fmaxf(nearest, 0.0f), (1 << BITS) - 1);
                word |= static_cast<uint32_t>(code) << (j * 8 + part * BITS);
            }
        *reinterpret_cast<uint32_t *>(page + place.codes + i * 4) = word;
    }
}

KERNEL(page_seal_d32_int4, PageSealArgs, N_THREADS, 1, 0) {  // <= 96 registers
    body<32, 4>(args);
}
KERNEL(page_seal_d64_int4, PageSealArgs, N_THREADS, 1, 0) {  // <= 64 registers
    body<64, 4>(args);
}
KERNEL(page_seal_d128_int4, PageSealArgs, N_THREADS, 1, 0) {  // <= 64 registers
    body<128, 4>(args);
}
KERNEL(page_seal_d64_int2, PageSealArgs, N_THREADS, 1, 0) {  // <= 64 registers
    body<64, 2>(args);
}
KERNEL(page_seal_d128_int2, PageSealArgs, N_THREADS, 1, 0) {  // <= 64 registers
    body<128, 2>(args);
}
