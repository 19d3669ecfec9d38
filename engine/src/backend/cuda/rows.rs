//! Rows of activations, and how they move.

use loris_kernels::ops::row_copy::{self, Element};
use loris_kernels::{Device, Rows};

use crate::error::Error;

/// Activations on the device.
#[derive(Debug)]
pub struct CudaRows(pub(super) Data);

#[derive(Debug)]
pub(super) enum Data {
    F32(Rows<f32>),
    Bf16(Rows<u16>),
}

impl CudaRows {
    pub(super) fn f32(&self) -> Result<&Rows<f32>, Error> {
        match &self.0 {
            Data::F32(rows) => Ok(rows),
            Data::Bf16(_) => Err(missing("f32 rows")),
        }
    }

    pub(super) fn f32_mut(&mut self) -> Result<&mut Rows<f32>, Error> {
        match &mut self.0 {
            Data::F32(rows) => Ok(rows),
            Data::Bf16(_) => Err(missing("f32 rows")),
        }
    }

    pub(super) fn bf16(&self) -> Result<&Rows<u16>, Error> {
        match &self.0 {
            Data::Bf16(rows) => Ok(rows),
            Data::F32(_) => Err(missing("bf16 rows")),
        }
    }

    pub(super) fn bf16_mut(&mut self) -> Result<&mut Rows<u16>, Error> {
        match &mut self.0 {
            Data::Bf16(rows) => Ok(rows),
            Data::F32(_) => Err(missing("bf16 rows")),
        }
    }

    /// `self[pair.1] = from[pair.0]`, rounded to nearest even where the elements become narrower.
    pub(super) fn copy_from(
        &mut self,
        d: &Device,
        from: &Self,
        pairs: &[(u32, u32)],
    ) -> Result<(), Error> {
        match (&from.0, &mut self.0) {
            (Data::F32(from), Data::F32(to)) => row_copy::row_copy(d, from, to, pairs)?,
            (Data::F32(from), Data::Bf16(to)) => row_copy::row_copy(d, from, to, pairs)?,
            (Data::Bf16(from), Data::F32(to)) => row_copy::row_copy(d, from, to, pairs)?,
            (Data::Bf16(from), Data::Bf16(to)) => row_copy::row_copy(d, from, to, pairs)?,
        }
        Ok(())
    }
}

/// Rows on their way to the front.
#[derive(Debug, Default)]
pub(super) struct Gathered {
    f32: Option<Rows<f32>>,
    bf16: Option<Rows<u16>>,
}

impl Gathered {
    pub(super) fn gather(
        &mut self,
        d: &Device,
        rows: &mut CudaRows,
        keep: &[usize],
    ) -> Result<(), Error> {
        match &mut rows.0 {
            Data::F32(rows) => gather(d, rows, keep, &mut self.f32),
            Data::Bf16(rows) => gather(d, rows, keep, &mut self.bf16),
        }
    }
}

/// Moves rows to the front by way of other rows: a kernel that read and wrote the same ones would race.
#[allow(clippy::cast_possible_truncation)] // rows are bounded by the plan
fn gather<T: Element>(
    d: &Device,
    rows: &mut Rows<T>,
    keep: &[usize],
    scratch: &mut Option<Rows<T>>,
) -> Result<(), Error> {
    let n = keep.len();
    let fits = |other: &Rows<T>| other.width == rows.width && other.n_rows >= n;
    if !scratch.as_ref().is_some_and(fits) {
        *scratch = None;
        *scratch = Some(Rows::new(d, n, rows.width, "gathered rows")?);
    }
    let scratch = scratch.as_mut().ok_or_else(|| missing("gathered rows"))?;
    let out: Vec<(u32, u32)> = keep.iter().map(|&row| row as u32).zip(0..).collect();
    let back: Vec<(u32, u32)> = (0..n as u32).map(|row| (row, row)).collect();
    row_copy::row_copy(d, rows, scratch, &out)?;
    Ok(row_copy::row_copy(d, scratch, rows, &back)?)
}

/// What `begin` and `rows` make room for.
pub(super) fn missing(what: &str) -> Error {
    Error::State { call: "layer op", reason: format!("{what}: begin was not called") }
}
