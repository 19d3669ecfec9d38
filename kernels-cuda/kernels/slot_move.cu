// Moves the slots that stay to the front of their layer: slot i becomes what slot keep[i] held, the
// codes and params of K and V of every kv head as they are.
//
// blockIdx = (side and kv head, layer). A block walks the list some slots at a time: it loads
// all of these, meets at a barrier, and stores it. keep rises, so keep[i] >= i, and no slot is
// written that is still to be read: by a thread of the same step, as that has loaded all it moves
// before the barrier; by a later step, as that reads at or behind its own first slot and what is
// written lies in front of that. A step's stores wait at the barrier for the loads of those before
// it too. Blocks share no byte. Bytes moved: those of a slot, twice, for each that moves.
#include "kv/page.cuh"

constexpr int N_THREADS = 256;
constexpr int N_AHEAD = 4;

// What a thread moves of a slot and head: 16 bytes of its codes, and with the first of them the
// params.
struct Piece {
    uint4 codes;
    uint16_t params[4];

    DEV void load(const SlotHead &from, uint32_t unit, uint32_t n_param_bytes) {
        codes = prim::ld16(from.codes + unit * 16);
        for (uint32_t i = 0; i < 4; i++)
            if (unit == 0 && 2 * i < n_param_bytes)
                params[i] = reinterpret_cast<const uint16_t *>(from.params)[i];
    }
    DEV void store(const SlotHead &to, uint32_t unit, uint32_t n_param_bytes) const {
        prim::st16(to.codes + unit * 16, codes);
        for (uint32_t i = 0; i < 4; i++)
            if (unit == 0 && 2 * i < n_param_bytes)
                reinterpret_cast<uint16_t *>(to.params)[i] = params[i];
    }
};

template <int D>
DEV void body(const SlotMoveArgs &args) {
    const LorisPages &pages = args.pages;
    const uint32_t side = blockIdx.x / pages.n_kv_heads, kv_head = blockIdx.x % pages.n_kv_heads;
    const uint32_t layer = blockIdx.y;
    const uint32_t *keep = args.keep + static_cast<uint64_t>(layer) * args.n_keep;
    const CodeBytes bytes = code_bytes<D>(side == 0 ? pages.k_coding : pages.v_coding);
    const uint32_t n_units = bytes.codes / 16;  // a power of two
    const uint32_t unit = threadIdx.x % n_units, n_abreast = N_THREADS / n_units;
    auto head = [&](uint32_t slot) {
        return slot_head<D>(pages, page_slot(pages, args.table, layer, slot), side, kv_head);
    };

    const uint32_t n_fixed = is_coded(pages) ? WIDE_SLOTS : 0;  // not coded as the others are
    for (uint32_t step = n_fixed; step < args.n_keep; step += N_AHEAD * n_abreast) {
        const uint32_t first = step + threadIdx.x / n_units;
        auto moves = [&](uint32_t to) { return to < args.n_keep && keep[to] != to; };
        Piece pieces[N_AHEAD];
        for (uint32_t i = 0; i < N_AHEAD; i++) {
            const uint32_t to = first + i * n_abreast;
            PRIM_ASSERT(to >= args.n_keep || keep[to] >= to);
            if (moves(to)) pieces[i].load(head(keep[to]), unit, bytes.params);
        }
        prim::block_sync();
        for (uint32_t i = 0; i < N_AHEAD; i++) {
            const uint32_t to = first + i * n_abreast;
            if (moves(to)) pieces[i].store(head(to), unit, bytes.params);
        }
    }
}

KERNEL(slot_move_d32, SlotMoveArgs, N_THREADS, 1, 0) { body<32>(args); }    // <= 64 registers
KERNEL(slot_move_d64, SlotMoveArgs, N_THREADS, 1, 0) { body<64>(args); }    // <= 64 registers
KERNEL(slot_move_d128, SlotMoveArgs, N_THREADS, 1, 0) { body<128>(args); }  // <= 64 registers
