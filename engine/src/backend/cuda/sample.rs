//! Tokens drawn where the logits are: four bytes come back instead of a row of the vocabulary.

use std::sync::Arc;

use loris_kernels::abi::{LorisLogitChange, LorisSampling};
use loris_kernels::ops::{logit_adjust, sample};
use loris_kernels::{Buffer, Device, Rows};

use crate::backend::{Draw, LogitChange};
use crate::error::Error;
use crate::memory;

/// What draws need on the device. It stays there, so that a greedy token uploads nothing.
#[derive(Debug, Default)]
pub(super) struct Chooser {
    on_device: Option<OnDevice>,
    masked: Option<(Arc<[u32]>, Buffer<u32>)>,
    adjusted: Option<Adjusted>,
}

/// Where biases and penalties are applied.
#[derive(Debug)]
struct Adjusted {
    changes: Buffer<LorisLogitChange>,
    /// `[1][vocab_size]`.
    logits: Rows<f32>,
}

#[derive(Debug)]
struct OnDevice {
    known: LorisSampling,
    sampling: Buffer<LorisSampling>,
    token: Buffer<u32>,
}

impl Chooser {
    /// A token; `None` where a logit is not finite or every id is masked.
    pub(super) fn choose(
        &mut self,
        device: &Device,
        logits: &Rows<f32>,
        row: usize,
        draw: &Draw,
    ) -> Result<Option<u32>, Error> {
        if logits.width > sample::MAX_VOCAB_SIZE {
            return Ok(None);
        }
        let is_known = |known: &(Arc<[u32]>, _)| draw.masked.as_ref() == Some(&known.0);
        if let Some(masked) = &draw.masked
            && !self.masked.as_ref().is_some_and(is_known)
        {
            // One that changes from token to token keeps its place.
            let mut bits = match self.masked.take() {
                Some((known, bits)) if known.len() == masked.len() => bits,
                _ => Buffer::new(device, masked.len(), "masked ids")?,
            };
            bits.upload(device, 0, masked)?;
            self.masked = Some((masked.clone(), bits));
        }
        let masked = self.masked.as_ref().filter(|_| draw.masked.is_some()).map(|(_, bits)| bits);

        let wanted = LorisSampling {
            temperature: draw.temperature,
            top_k: draw.top_k,
            top_p: draw.top_p,
            min_p: draw.min_p,
            uniform: draw.uniform,
        };
        let on_device = match &mut self.on_device {
            Some(on_device) => on_device,
            none => none.insert(OnDevice {
                known: wanted,
                sampling: Buffer::from_slice(device, &[wanted], "sampling parameters")?,
                token: Buffer::new(device, 1, "a token")?,
            }),
        };
        if on_device.known != wanted {
            on_device.sampling.upload(device, 0, &[wanted])?;
            on_device.known = wanted;
        }
        let OnDevice { sampling, token, .. } = on_device;
        let (logits, row) = match draw.changes.as_slice() {
            [] => (logits, row),
            changes => (adjust(&mut self.adjusted, device, logits, row, changes)?, 0),
        };
        sample::sample_from(device, logits, row, sampling, masked, 1, token)?;
        let mut id = [0];
        token.download(device, 0, &mut id)?;
        Ok((id[0] != u32::MAX).then_some(id[0]))
    }
}

/// The row with its changes.
fn adjust<'a>(
    adjusted: &'a mut Option<Adjusted>,
    device: &Device,
    logits: &Rows<f32>,
    row: usize,
    changes: &[LogitChange],
) -> Result<&'a Rows<f32>, Error> {
    let n = changes.len();
    let mut sent = memory::empty(n, "changes of logits")?;
    sent.extend(changes.iter().map(|&LogitChange { id, bias, factor, minus }| LorisLogitChange {
        id,
        bias,
        factor,
        minus,
    }));
    let room = match adjusted.take() {
        Some(room) if room.changes.len() >= n => room,
        _ => Adjusted {
            changes: Buffer::new(device, n.next_power_of_two().max(256), "changes of logits")?,
            logits: Rows::new(device, 1, logits.width, "logits")?,
        },
    };
    let Adjusted { changes, logits: out } = adjusted.insert(room);
    changes.upload(device, 0, &sent)?;
    logit_adjust::logit_adjust(device, logits, row, changes, n, out)?;
    Ok(out)
}
