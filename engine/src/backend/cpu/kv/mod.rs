//! Heads of keys and values as pages hold them.
//!
//! A way of coding is a [`Family`](family::Family), a file each, and [`with_family`] the only place that chooses one. Coding is plain
//! arithmetic in a fixed order, the same on every device: where the numbers are equal the codes are.

mod byte;
mod channel;
mod family;
mod fit;
mod group;
mod numbers;
mod packed;
mod pages;
mod rotate;
mod row;
mod seal;
mod wide;

pub(super) use self::family::Row;
pub(super) use self::numbers::{CHUNK, Numbers, Walk, decoded};
pub use self::pages::CpuPages;
pub(super) use self::pages::{Place, Writer, places};
pub(super) use self::rotate::rotate;
pub(super) use self::seal::{SealPages, n_seal_tasks};

/// `$body` with `$family` as the [`Family`] of a coding.
macro_rules! with_family {
    ($coding:expr, $family:ident => $body:expr) => {{
        use $crate::backend::cpu::kv::{
            byte::Byte, channel::Channel, group::Group, numbers, wide::Wide,
        };
        macro_rules! arm {
            ($one:ty) => {{
                type $family = $one;
                $body
            }};
        }
        match $coding {
            Coding::F32 => arm!(Wide<numbers::F32>),
            Coding::BF16 => arm!(Wide<numbers::Bf16>),
            Coding::FP8 => arm!(Byte<numbers::E4m3>),
            Coding::INT8 => arm!(Byte<numbers::Int8>),
            Coding::INT4 => arm!(Group<4>),
            Coding::INT2 => arm!(Group<2>),
            Coding::INT4_CHANNEL => arm!(Channel<4>),
            Coding::INT2_CHANNEL => arm!(Channel<2>),
            other => unreachable!("{other} is in no table"),
        }
    }};
}
use with_family;
