//! What the ops run on: instruction sets of the CPU and the CUDA kernels, and how exactly each computes.

use loris::backend::cpu::{CpuBackend, CpuOptions, Isa};
use loris::backend::cuda::{CudaBackend, CudaOptions};
use loris::backend::{Backend, Phase, RowUse};
use loris::store::{AttentionShape, HEAD_DIMS, PageLayout};
use loris_loader::Dtype;

use super::{Case, F32};

/// A backend under test.
pub(crate) struct Target<B> {
    pub(crate) name: String,
    pub(crate) make: Box<dyn Fn(usize) -> B>,
    pub(crate) numbers: Numbers,
    /// Whether it does what a case asks for; if not it says so.
    pub(crate) runs: fn(&Case) -> bool,
    /// It is slow: short sequences have to do.
    pub(crate) is_slow: bool,
}

/// What a target computes with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Numbers {
    /// f32 throughout.
    F32,
    /// Products of prefill with bf16 weights or pages are taken in bf16.
    Bf16Prefill,
    /// Weights are bf16 whatever the checkpoint holds, and so are the operands of products.
    Bf16,
}

/// How far results may be off: `op` of the largest magnitude in a row, `rounding` of each element.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bounds {
    pub(super) embed: f64,
    pub(super) linear: f64,
    /// A product with rows that are normalised on the way.
    pub(super) normed: f64,
    pub(super) attention: f64,
    pub(super) head: f64,
    pub(super) rounding: f64,
}

impl Numbers {
    pub(super) fn bounds(self, phase: Phase, case: &Case) -> Bounds {
        const EXACT: f64 = 1e-5;
        const COARSE: f64 = 1e-2;
        let either = |is_coarse| if is_coarse { COARSE } else { EXACT };
        let bf16 = phase == Phase::Prefill && self == Self::Bf16Prefill;
        let linear = either(bf16 && case.dtype == Dtype::BF16);
        let attention = either(bf16 && case.kv != F32);
        match self {
            Self::Bf16 => Bounds {
                embed: if case.dtype == Dtype::BF16 { 0.0 } else { 1.0 / 256.0 },
                linear: either(case.dtype != Dtype::BF16),
                normed: COARSE,
                attention: COARSE,
                head: COARSE,
                rounding: 1.0 / 256.0,
            },
            _ => {
                Bounds { embed: 0.0, linear, normed: linear, attention, head: EXACT, rounding: 0.0 }
            }
        }
    }
}

pub(crate) fn cpus() -> Vec<Target<CpuBackend>> {
    let target = |isa: Isa| Target {
        name: format!("cpu {isa}"),
        make: Box::new(move |threads| {
            CpuBackend::new(CpuOptions { threads, isa: Some(isa) }).unwrap()
        }),
        numbers: match isa.pairs() {
            true => Numbers::Bf16Prefill,
            false => Numbers::F32,
        },
        runs: |_| true,
        is_slow: false,
    };
    Isa::available().into_iter().map(target).collect()
}

/// Formats that there are CUDA kernels for.
const CUDA_KV: [&str; 9] =
    ["bf16", "fp8", "int8", "int4", "int4-plain", "int8:int4", "bf16:int4", "int4-channel", "int2"];

/// The twin, or with `LORIS_TEST_DRIVER=cuda` the real driver.
pub(crate) fn cudas() -> Vec<Target<CudaBackend>> {
    let is_real = std::env::var("LORIS_TEST_DRIVER").is_ok_and(|name| name == "cuda");
    let driver = (!is_real).then(|| loris_kernels::TWIN.into());
    let options = CudaOptions { driver, ..CudaOptions::default() };
    vec![Target {
        name: if is_real { "cuda".into() } else { "twin".into() },
        make: Box::new(move |_| CudaBackend::new(&options).unwrap()),
        numbers: Numbers::Bf16,
        runs: |case| {
            HEAD_DIMS.contains(&case.shape.head_dim)
                && case.shape.group_size() <= 16
                && case.page_len.is_power_of_two()
                && CUDA_KV.contains(&case.kv.to_string().as_str())
                && case.hidden % 8 == 0
                && case.ffn % 8 == 0
        },
        is_slow: !is_real,
    }]
}

/// Fails unless the target says that it cannot do the case.
pub(crate) fn assert_refused<B: Backend>(target: &Target<B>, case: &Case) {
    let mut backend = (target.make)(1);
    let AttentionShape { n_kv_heads, head_dim, .. } = case.shape;
    let layout = PageLayout::new(n_kv_heads, case.page_len, head_dim, case.kv);
    let errors = [
        backend.pages(layout, 1).err(),
        backend.rows(1, case.hidden, RowUse::Residual).err(),
        backend.rows(1, case.ffn, RowUse::Operand).err(),
    ];
    let found: Vec<_> = errors.into_iter().flatten().collect();
    let are_named = found.iter().all(|e| matches!(e, loris::Error::Unsupported { .. }));
    assert!(!found.is_empty() && are_named, "{}: {found:?} for {case:?}", target.name);
}
