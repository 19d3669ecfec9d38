//! Q, K and V of decode, from the residual stream to q and the pages.

use loris_kernels::Buffer;
use loris_kernels::ops::qkv_decode;

use crate::common::qkv::{BIAS, BIAS_AND_QK_NORM, LAYER, PLAIN, QK_NORM, QkvCase, QkvModel, case};
use crate::common::{self, Random, from_bf16s};
use crate::*;

const QKV_CASES: [QkvCase; 7] = [
    case(32, [1, 1], 8, 16, PLAIN, &[(0, 1)]),
    case(64, [3, 1], 96, 16, BIAS, &[(15, 1), (16, 1), (17, 1)]),
    case(128, [2, 1], 1096, 64, PLAIN, &[(63, 2), (0, 1), (64, 1), (5, 4)]),
    case(32, [4, 2], 32, 32, BIAS, &[(31, 9), (1, 8)]),
    case(32, [5, 1], 96, 16, BIAS_AND_QK_NORM, &[(16, 1), (0, 1)]),
    case(64, [2, 2], 32, 16, QK_NORM, &[(15, 2), (3, 7)]),
    case(128, [2, 1], 96, 16, QK_NORM, &[(7, 1)]),
];

#[test]
fn heads_go_where_attention_reads_them() {
    let device = common::device();
    for (i, case) in QKV_CASES.into_iter().enumerate() {
        let (n_rows, width, k) = (case.n_rows(), case.width(), case.hidden_dim);
        let mut random = Random::new(i as u64);
        let model = QkvModel::new(case, &mut random);
        let (norm, x) = (norm_weights(&mut random, k), random.f32(n_rows * k, 2.0));
        let run = |part: std::ops::Range<usize>| {
            let norm = Buffer::from_slice(&device, &norm, "norm").unwrap();
            let raw = vec![f32::NAN; part.len() * width];
            let mut raw = rows(&device, &raw, width);
            let x = rows(&device, &x[part.start * k..part.end * k], k);
            model.run(&device, part, |weights, batch, q, pages| {
                qkv_decode::qkv_decode(
                    &device, weights, &norm, &x, batch, LAYER, &mut raw, q, pages,
                )
                .unwrap();
            })
        };
        let got = run(0..n_rows);
        let want = model.reference(&normed(&x, &norm, true));
        compare(&format!("qkv case {i}"), &from_bf16s(&got), &want, width, NORMED, BF16);

        // Each row alone has the same bits.
        for row in [0, n_rows / 2, n_rows - 1] {
            let alone = run(row..row + 1);
            assert_eq!(alone, got[row * width..][..width], "qkv case {i}, row {row} alone");
        }
    }
}
