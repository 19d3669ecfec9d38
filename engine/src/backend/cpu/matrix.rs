//! Weight matrices of the CPU backend: the mapped bytes, read in place.
//!
//! A matrix is never converted as a whole. Kernels take its rows by pointer and convert as they load:
//! bf16 by a shift, f16 by an instruction, f32 not at all. All loads are unaligned.

use loris_loader::{Dtype, TensorView};

use super::simd::{Simd, bf16_value, f16_value};
use crate::backend::check_weight;
use crate::error::Error;
use crate::store::Coding;

/// How the elements of a matrix or of a page are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    Bf16,
    F16,
    F32,
}

impl Format {
    /// Of a page whose numbers are not coded.
    #[inline(always)]
    pub(super) fn of(coding: Coding) -> Option<Self> {
        match coding {
            Coding::BF16 => Some(Self::Bf16),
            Coding::F32 => Some(Self::F32),
            _ => None,
        }
    }

    /// Bytes of an element.
    pub(super) fn bytes(self) -> usize {
        match self {
            Self::Bf16 | Self::F16 => 2,
            Self::F32 => 4,
        }
    }

    /// The element at `p` as f32.
    ///
    /// # Safety
    /// `p` points to an element of this format.
    #[inline(always)]
    pub(super) unsafe fn read(self, p: *const u8) -> f32 {
        // SAFETY: the caller's.
        unsafe {
            match self {
                Self::Bf16 => bf16_value(p.cast::<u16>().read_unaligned()),
                Self::F16 => f16_value(p.cast::<u16>().read_unaligned()),
                Self::F32 => p.cast::<f32>().read_unaligned(),
            }
        }
    }

    /// `LANES` elements at `p` as f32.
    ///
    /// # Safety
    /// As [`Simd`], with `LANES` elements of this format behind `p`.
    #[inline(always)]
    pub(super) unsafe fn load<S: Simd>(self, p: *const u8) -> S::V {
        // SAFETY: the caller's.
        unsafe {
            match self {
                Self::Bf16 => S::load_bf16(p.cast()),
                Self::F16 => S::load_f16(p.cast()),
                Self::F32 => S::load(p.cast()),
            }
        }
    }

    /// `n` elements at `from` to f32 at `to`.
    ///
    /// # Safety
    /// As [`Simd`], with `n` elements behind both pointers.
    #[inline(always)]
    pub(super) unsafe fn convert<S: Simd>(self, from: *const u8, to: *mut f32, n: usize) {
        let mut i = 0;
        // SAFETY: i stays below n.
        unsafe {
            while i + S::LANES <= n {
                S::store(to.add(i), self.load::<S>(from.add(i * self.bytes())));
                i += S::LANES;
            }
            while i < n {
                *to.add(i) = self.read(from.add(i * self.bytes()));
                i += 1;
            }
        }
    }
}

/// A weight matrix `[n][k]`, in the checkpoint's own bytes.
#[derive(Debug)]
pub struct CpuMatrix {
    tensor: TensorView,
    pub(super) n: usize,
    pub(super) k: usize,
    pub(super) format: Format,
}

/// A weight vector, f32.
#[derive(Debug)]
pub struct CpuVector(pub(super) Vec<f32>);

fn format_of(tensor: &TensorView, rank: usize) -> Result<Format, Error> {
    check_weight(tensor, rank)?;
    Ok(match tensor.dtype {
        Dtype::BF16 => Format::Bf16,
        Dtype::F16 => Format::F16,
        _ => Format::F32,
    })
}

impl CpuMatrix {
    pub(super) fn new(tensor: &TensorView) -> Result<Self, Error> {
        let format = format_of(tensor, 2)?;
        Ok(Self { n: tensor.shape[0], k: tensor.shape[1], format, tensor: tensor.clone() })
    }

    /// Copies row `n` to f32.
    pub(super) fn read_row(&self, n: usize, out: &mut [f32]) {
        let bytes = &self.tensor.bytes[n * self.row_bytes()..][..self.row_bytes()];
        for (x, e) in out.iter_mut().zip(bytes.chunks_exact(self.format.bytes())) {
            // SAFETY: each chunk is one element.
            *x = unsafe { self.format.read(e.as_ptr()) };
        }
    }

    /// The first byte; row `n` starts `n * row_bytes()` further on.
    #[inline]
    pub(super) fn as_ptr(&self) -> *const u8 {
        self.tensor.bytes.as_ptr()
    }

    /// Bytes of a row.
    #[inline]
    pub(super) fn row_bytes(&self) -> usize {
        self.k * self.format.bytes()
    }
}

impl CpuVector {
    pub(super) fn new(parts: &[TensorView]) -> Result<Self, Error> {
        let mut values = Vec::new();
        for part in parts {
            let format = format_of(part, 1)?;
            let elements = part.bytes.chunks_exact(format.bytes());
            // SAFETY: each chunk is one element.
            values.extend(elements.map(|e| unsafe { format.read(e.as_ptr()) }));
        }
        Ok(Self(values))
    }
}
