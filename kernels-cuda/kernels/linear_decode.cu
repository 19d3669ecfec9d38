// y = a W^T for the few rows of a decode step: added to the residual stream, or stored as f32
// (logits).
//
//   w [n][k] bf16      block (g, i): weight rows 16 i .. 16 i + 16 by batch rows 16 g .. 16 g + 16
//   +--------------+
//   |  16 x k      |   x (rows)^T [k][<= 16]  =  16 x 16 values, of which each thread finishes one
//   +--------------+
//
// Blocks of different groups and the same weights run side by side, so that the weights of more
// than 16 rows still come from memory once. The last block of an n that is no multiple of 16 (a
// vocabulary) reads the last weight row again and stores nothing of it.
// Bytes: n k 2 of weights; the rows (n_rows k, 2 or 4 bytes each) come from the L2 cache.
#include "gemv_decode.cuh"

template <int N_TILES, class Rows>
DEV gemv::Product<1, N_TILES> multiply(const LinearDecodeArgs &args) {
    const uint16_t *w[1][2];
    for (int i = 0; i < 2; i++)
        w[0][i] = args.w + static_cast<uint64_t>(gemv::weight_row(i, args.n)) * args.in.k;
    gemv::Product<1, N_TILES> product;
    product.run(w, Rows(args.in), args.in.k);
    return product;
}

template <int N_TILES>
DEV void add(const LinearDecodeArgs &args) {
    // The old value is asked for first, so that nothing waits for it at the end.
    const gemv::Value<N_TILES> v(args.in.n_rows, args.n);
    float *y = args.y + static_cast<uint64_t>(v.row) * args.n + v.column;
    const float before = v.exists ? *y : 0.0f;

    const auto product = multiply<N_TILES, gemv::PlainRows<N_TILES>>(args);
    if (v.exists) *y = before + product.at(0, v.m, v.n);
}

template <int N_TILES>
DEV void store(const LinearDecodeArgs &args) {
    const auto product = multiply<N_TILES, gemv::NormRows<N_TILES>>(args);
    const gemv::Value<N_TILES> v(args.in.n_rows, args.n);
    if (!v.exists) return;
    const float scale = product.inverse_rms(v.n, args.in);
    args.y[static_cast<uint64_t>(v.row) * args.n + v.column] = product.at(0, v.m, v.n) * scale;
}

// At most 8 rows in all, and any number.
KERNEL(linear_decode_add_r8, LinearDecodeArgs, 256, 3, gemv::SMEM_BYTES<1, 1>) {  // <= 80 registers
    add<1>(args);
}
KERNEL(linear_decode_add_r16, LinearDecodeArgs, 256, 2,
       gemv::SMEM_BYTES<1, 2>) {  // <= 128 registers
    add<2>(args);
}
KERNEL(linear_decode_store_r8, LinearDecodeArgs, 256, 3,
       gemv::SMEM_BYTES<1, 1>) {  // <= 80 registers
    store<1>(args);
}
KERNEL(linear_decode_store_r16, LinearDecodeArgs, 256, 2,
       gemv::SMEM_BYTES<1, 2>) {  // <= 128 registers
    store<2>(args);
}
