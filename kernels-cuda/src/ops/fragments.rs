//! Launcher of `fragments`: what the matrix instructions do with operands that `frag.h` places.

use crate::abi::FragmentsArgs;
use crate::{Buffer, Device, Error, Launch};

/// Results of [`fragments`].
#[derive(Clone, Debug, PartialEq)]
pub struct Products {
    /// `a b` of bf16, `[16][8]`.
    pub bf16: Vec<f32>,
    /// `a b` of f16, `[16][8]`.
    pub f16: Vec<f32>,
    /// `a8 b8`, `[16][8]`.
    pub s8: Vec<i32>,
    /// Elements that ldmatrix puts elsewhere than `frag.h` says.
    pub n_wrong: u32,
}

/// Multiplies `a` `[16][16]` and `b` `[16][8]`, as bf16 and as f16, and `a8` `[16][32]` and `b8` `[32][8]`.
pub fn fragments(
    device: &Device,
    a: &[u16; 256],
    b: &[u16; 128],
    a8: &[i8; 512],
    b8: &[i8; 256],
) -> Result<Products, Error> {
    let a = Buffer::from_slice(device, a, "a")?;
    let b = Buffer::from_slice(device, b, "b")?;
    let a8 = Buffer::from_slice(device, a8, "a8")?;
    let b8 = Buffer::from_slice(device, b8, "b8")?;
    let bf16 = Buffer::<f32>::new(device, 128, "products")?;
    let f16 = Buffer::<f32>::new(device, 128, "products")?;
    let s8 = Buffer::<i32>::new(device, 128, "products")?;
    let n_wrong = Buffer::from_slice(device, &[0_u32], "a count")?;
    let args = FragmentsArgs {
        a: a.ptr() as *const u16,
        b: b.ptr() as *const u16,
        a8: a8.ptr() as *const i8,
        b8: b8.ptr() as *const i8,
        bf16: bf16.ptr() as *mut f32,
        f16: f16.ptr() as *mut f32,
        s8: s8.ptr() as *mut i32,
        n_wrong: n_wrong.ptr() as *mut u32,
    };
    let launch = Launch { kernel: "fragments", grid: [1; 3], block: 32, extra_smem: 0 };
    // SAFETY: the arrays have the shapes that the arguments name.
    unsafe { device.launch(&launch, &args) }?;
    Ok(Products {
        bf16: bf16.to_vec(device)?,
        f16: f16.to_vec(device)?,
        s8: s8.to_vec(device)?,
        n_wrong: n_wrong.to_vec(device)?[0],
    })
}
