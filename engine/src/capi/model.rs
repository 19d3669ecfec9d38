//! Models: opening, facts, and one step of many sessions.

use std::ffi::c_char;
use std::ops::ControlFlow;
use std::path::Path;

use super::guard::{call, remember};
use super::handle::{free, get, loris_engine, loris_model, loris_session, make};
use super::out::{c_text, copy, copy_text, optional, slice, write};
use super::params::{
    Versioned, check_flags, fill_sized, loris_kv_info, loris_model_info, loris_model_params,
    loris_sampling_params, read,
};
use super::status::{Failure, LORIS_E_INVALID_ARG, LORIS_IDLE, LORIS_OK, LORIS_PENDING};
use crate::engine::LoadProgress;
use crate::error::Error;
use crate::memory;
use crate::plan::ModelOptions;
use crate::sampler::SamplerParams;
use crate::step::Progress;
use crate::store::KvFormats;
use loris_loader::LoadMode;

/// Of the lists of a step, for each of its sessions: handles, results, who is served.
const STEP_BYTES_OF_SESSION: usize = 1 << 10;

/// Flag of loris_model_params: keep what prompts of sessions that prune have computed before the first prune point, as
/// long as their pages are held and the room of aux_tokens is not needed, for prompts that begin alike. Since 0.3.
pub const LORIS_KEEP_PREFIXES: u32 = 1;

/// The flags of loris_model_params, and the feature that each stands for.
pub(super) const MODEL_FLAGS: [(u32, &str); 1] = [(LORIS_KEEP_PREFIXES, "keep-prefixes")];

/// Opens the Hugging Face model folder dir (a path in UTF-8): config.json, safetensors, and where they exist the
/// tokenizer and the chat template. params may be NULL for the defaults. On LORIS_OK *model is a handle for
/// loris_model_free, else it is NULL.
///
/// LORIS_CANCELLED if params->progress said so; LORIS_E_IO, LORIS_E_FORMAT, LORIS_E_UNSUPPORTED name the file and
/// what is wrong with it. Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn loris_model_open(
    engine: *const loris_engine,
    dir: *const c_char,
    params: *const loris_model_params,
    model: *mut *mut loris_model,
) -> i32 {
    // SAFETY: the caller keeps to the header.
    call(|| unsafe {
        write("model", model, std::ptr::null_mut())?;
        let engine = get(engine)?.clone(); // a callback may free the handle
        let dir = Path::new(c_text("dir", dir)?);
        let params = read(params)?;
        let options = options(&params)?;
        let mut progress = |LoadProgress { done, total }| match params.progress {
            Some(f) if f(params.progress_data, done, total) != 0 => ControlFlow::Break(()),
            _ => ControlFlow::Continue(()),
        };
        let opened = engine.open_with(dir, &options, &mut progress)?;
        write("model", model, make(opened))?;
        Ok(LORIS_OK)
    })
}

/// Frees a model; NULL is fine. Its sessions live on, and its memory with them, until they are freed. Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn loris_model_free(model: *mut loris_model) {
    // SAFETY: passed on.
    unsafe { free(model) }
}

/// # Safety
/// The struct's texts are NULL or end with a NUL.
unsafe fn options(params: &loris_model_params) -> Result<ModelOptions, Failure> {
    let known = MODEL_FLAGS.iter().fold(0, |all, (flag, _)| all | flag);
    check_flags("loris_model_params.flags", params.flags, known)?;
    check_flags("loris_model_params.reserved", params.reserved, 0)?;
    let mut options = ModelOptions {
        page_len: params.page_len as usize,
        chunk: params.chunk as usize,
        batch: params.batch as usize,
        aux_tokens: as_usize("aux_tokens", params.aux_tokens)?,
        keep_prefixes: params.flags & LORIS_KEEP_PREFIXES != 0,
        ..ModelOptions::default()
    };
    // SAFETY: the caller's promise.
    if let Some(load) = unsafe { optional("load", params.load) }? {
        options.load = match load {
            "mmap" => LoadMode::Mmap,
            "read" => LoadMode::Read,
            other => {
                return Err(Failure::invalid(format!("load: {other}, expected mmap or read")));
            }
        };
    }
    // SAFETY: the caller's promise.
    if let Some(kv) = unsafe { optional("kv", params.kv) }? {
        options.kv = kv.parse::<KvFormats>().map_err(Error::from)?;
    }
    if params.kv_tokens > 0 {
        options.kv_tokens = Some(as_usize("kv_tokens", params.kv_tokens)?);
    }
    Ok(options)
}

/// A 64-bit count as the machine counts.
pub(super) fn as_usize(name: &str, value: u64) -> Result<usize, Failure> {
    usize::try_from(value).map_err(|_| {
        Failure::invalid(format!("{name}: {value} is more than this machine can count"))
    })
}

/// Fills *info with facts of the model. Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn loris_model_get_info(
    model: *const loris_model,
    info: *mut loris_model_info,
) -> i32 {
    // SAFETY: the caller keeps to the header.
    call(|| unsafe {
        let model = get(model)?;
        let (config, plan) = (model.config(), model.plan());
        #[allow(clippy::cast_possible_truncation)] // range-checked when the config was read
        let small = |n: usize| n as u32;
        let facts = loris_model_info {
            n_layers: small(config.n_layers),
            n_q_heads: small(config.n_q_heads),
            n_kv_heads: small(config.n_kv_heads),
            head_dim: small(config.head_dim),
            hidden_dim: small(config.hidden_dim),
            ffn_dim: small(config.ffn_dim),
            vocab_size: small(config.vocab_size),
            ctx_len: config.ctx_len as u64,
            weight_bytes: plan.weight_bytes,
            has_tokenizer: u32::from(model.tokenizer().is_some()),
            has_chat_template: u32::from(model.chat_template().is_some()),
            ..Versioned::defaults()
        };
        fill_sized(info, facts)
    })
}

/// Fills *info with the state of the model's page pool. Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn loris_model_get_kv_info(
    model: *const loris_model,
    info: *mut loris_kv_info,
) -> i32 {
    // SAFETY: the caller keeps to the header.
    call(|| unsafe {
        let model = get(model)?;
        let (usage, plan) = (model.pool_usage(), model.plan());
        let state = loris_kv_info {
        #[allow(clippy::cast_possible_truncation)] // at most 256
        page_len: plan.layout.page_len as u32,
        n_pages: usage.n_pages as u64,
        n_used: usage.n_used as u64,
        n_peak: usage.n_peak as u64,
        page_bytes: usage.page_bytes as u64,
        bytes_per_token: plan.kv_bytes_per_token as u64,
        ..Versioned::defaults()
    };
        fill_sized(info, state)
    })
}

/// Copies the name of the device that the model runs on, such as "cpu" or "cuda:0". buf, cap and n as in
/// loris_detokenize. Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn loris_model_device(
    model: *const loris_model,
    buf: *mut c_char,
    cap: usize,
    n: *mut usize,
) -> i32 {
    // SAFETY: passed on.
    call(|| unsafe { copy_text(&get(model)?.placement().device, buf, cap, n) })
}

/// Copies the ids of the tokens that end an answer. buf has room for cap ids; *n is set to how many there are, also
/// when buf is NULL and cap 0. LORIS_BUFFER_TOO_SMALL if cap is less than that. Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn loris_model_eos_tokens(
    model: *const loris_model,
    buf: *mut u32,
    cap: usize,
    n: *mut usize,
) -> i32 {
    // SAFETY: passed on.
    call(|| unsafe { copy(&get(model)?.config().eos_ids, buf, cap, n) })
}

/// Sets *params to what the model's authors advise (generation_config.json): greedy unless they ask for sampling. Any
/// thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn loris_model_sampling_params(
    model: *const loris_model,
    params: *mut loris_sampling_params,
) -> i32 {
    // SAFETY: the caller keeps to the header.
    call(|| unsafe {
        let model = get(model)?;
        let advised = SamplerParams::advised(&model.config().generation);
        let advised = loris_sampling_params {
            temperature: advised.temperature,
            top_p: advised.top_p,
            min_p: advised.min_p,
            repetition_penalty: advised.repetition_penalty,
            top_k: u32::try_from(advised.top_k).unwrap_or(0), // more than any vocabulary: all
            ..Versioned::defaults()
        };
        fill_sized(params, advised)
    })
}

/// Advances n sessions of the model that have tokens queued (loris_session_feed, loris_session_push): one token where
/// a generated one is queued, the next rows where a prompt is. One pass runs many sessions, which costs far
/// less than one pass each.
///
/// Prompts share the rows of one chunk (chunk of loris_model_params): each gets what it has left or an equal share, and what
/// short ones leave goes to the long ones; one that gets none comes first in the next step. So a long prompt keeps nobody
/// waiting: whatever prompts come, a session whose next token is queued as soon as it is known gets it within one
/// step, which is a decode pass for each batch of tokens and prefill passes of one chunk's rows in all. (Sessions that
/// prune take a pass for each run of layers.) What prompts of one step have in common at their beginning is computed once; those
/// that wait for it are LORIS_PENDING, and so is one for which the pool may have no room beside those that have begun.
///
/// statuses[i] becomes that of sessions[i]: LORIS_OK (all queued tokens are in the cache, logits are ready),
/// LORIS_PENDING (step again), LORIS_IDLE (nothing was queued), or what went wrong; then that session is as it
/// was and keeps what was queued, and the others go on. The call itself gives LORIS_OK if every status was written; the message of
/// loris_last_error is that of the first session that failed.
///
/// A session that another call uses, or that is in the list twice, gets LORIS_E_BUSY. Any thread, several at a time
/// with different sessions.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn loris_model_step(
    model: *const loris_model,
    sessions: *const *mut loris_session,
    n: usize,
    statuses: *mut i32,
) -> i32 {
    // SAFETY: the caller keeps to the header.
    call(|| unsafe {
        let model = get(model)?;
        let handles = slice("sessions", sessions, n)?;
        if n > 0 && (statuses.is_null() || !statuses.is_aligned()) {
            return Err(Failure::invalid("statuses: is NULL or not aligned"));
        }
        let bytes = n.saturating_mul(STEP_BYTES_OF_SESSION);
        memory::room_for(bytes, "the sessions of a step")?;
        let mut entered: Vec<_> = handles
            .iter()
            .map(|&handle| get(handle.cast_const()).and_then(|session| session.enter()))
            .collect();
        let mut ready: Vec<_> =
            entered.iter_mut().flatten().map(|inner| &mut inner.session).collect();
        let mut results = model.step(&mut ready).into_iter();
        let mut first = None;
        for (i, entered) in entered.into_iter().enumerate() {
            let result = entered.and_then(|_| match results.next() {
                Some(result) => Ok(result?),
                None => Err(Failure::new(LORIS_E_INVALID_ARG, "no result")),
            });
            let status = match result {
                Ok(Progress::Ready) => LORIS_OK,
                Ok(Progress::Pending { .. }) => LORIS_PENDING,
                Ok(Progress::Idle) => LORIS_IDLE,
                Err(failure) => {
                    let status = failure.status;
                    first.get_or_insert(failure);
                    status
                }
            };
            statuses.add(i).write(status);
        }
        first.map(remember);
        Ok(LORIS_OK)
    })
}
