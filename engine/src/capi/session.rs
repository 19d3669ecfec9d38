//! Sessions: prompts, tokens, answers, state.

use std::ffi::{c_char, c_void};
use std::io::{self, Write};
use std::ops::ControlFlow;
use std::path::Path;

use super::guard::call;
use super::handle::{Inner, SharedSession, free, get, loris_model, loris_session, make};
use super::model::as_usize;
use super::out::{c_text, copy, give, optional, owned, slice, write};
use super::params::{
    LORIS_RANDOM_SEED, Versioned, check_flags, fill_sized, loris_generate_params,
    loris_logits_callback, loris_logprob, loris_progress_callback, loris_receipt,
    loris_sampling_params, loris_session_params, read,
};
use super::status::{
    Failure, LORIS_BUFFER_TOO_SMALL, LORIS_CTX_FULL, LORIS_DEAD_END, LORIS_E_FORMAT,
    LORIS_E_NUMERIC, LORIS_E_STATE, LORIS_E_UNSUPPORTED, LORIS_EOS, LORIS_OK, LORIS_STOP,
};
use crate::compute::Lazy;
use crate::engine::Model;
use crate::error::Error;
use crate::generate::{Finish, GenerateOptions, Token, generate, generate_masked};
use crate::keep::Evict;
use crate::logprobs::LogSoftmax;
use crate::memory;
use crate::recipe::{SessionOptions, StreamOptions};
use crate::sampler::SamplerParams;
use crate::session::Session;

/// No token.
pub const LORIS_NO_TOKEN: u32 = u32::MAX;
/// Flag of loris_session_params: loris_session_restore takes what a library before ABI 0.5 saved, which does not say with
/// which config and tokenizer it was made; if it was not this model's, the session answers nonsense. Since 0.5.
pub const LORIS_TRUST_OLD_STATE: u32 = 1;
/// Flag of loris_generate_params: go on after a token that ends an answer.
pub const LORIS_IGNORE_EOS: u32 = 1;
/// Flag of loris_generate_params: the stop text that ended the answer is part of it. Since 0.6.
pub const LORIS_KEEP_STOP: u32 = 2;

/// Opens an empty session; takes pages only as tokens come. params may be NULL for the defaults. On LORIS_OK
/// *session is a handle for loris_session_free, else it is NULL. Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn loris_session_open(
    model: *const loris_model,
    params: *const loris_session_params,
    session: *mut *mut loris_session,
) -> i32 {
    // SAFETY: the caller keeps to the header.
    call(|| unsafe {
        write("session", session, std::ptr::null_mut())?;
        let model = get(model)?;
        let options = options(model, &read(params)?)?;
        let opened = handle(model, model.session(&options)?)?;
        write("session", session, opened)?;
        Ok(LORIS_OK)
    })
}

/// Frees a session and its pages; NULL is fine, and so is freeing it after its model. Any thread, when no call on it
/// runs, loris_session_cancel included.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn loris_session_free(session: *mut loris_session) {
    // SAFETY: passed on.
    unsafe { free(session) }
}

/// # Safety
/// The struct's texts are NULL or end with a NUL.
unsafe fn options(model: &Model, params: &loris_session_params) -> Result<SessionOptions, Failure> {
    check_flags("loris_session_params.flags", params.flags, LORIS_TRUST_OLD_STATE)?;
    let trust_old_state = params.flags & LORIS_TRUST_OLD_STATE != 0;
    if !params.sparse.is_null() {
        let why = String::from("sparse: this version has no such option; leave it NULL");
        return Err(Failure::new(LORIS_E_UNSUPPORTED, why));
    }
    let ctx_len = match params.ctx_len {
        0 => None,
        n => Some(as_usize("ctx_len", n)?),
    };
    // SAFETY: the caller's promise.
    let lazy = unsafe { optional("lazy", params.lazy) }?
        .map(|spec| Lazy::parse(spec, model.plan().n_layers))
        .transpose()?;
    let stream = match (params.sink, params.window) {
        (0, 0) => None,
        (sink, window) => Some(StreamOptions {
            sink: as_usize("sink", sink)?,
            window: as_usize("window", window)?,
        }),
    };
    // SAFETY: the caller's promise.
    let evict = unsafe { optional("evict", params.evict) }?.map(Evict::parse).transpose()?;
    Ok(SessionOptions { ctx_len, lazy, stream, evict, trust_old_state })
}

/// A session's handle, greedy to begin with.
fn handle(model: &Model, session: Session) -> Result<*mut loris_session, Failure> {
    let sampler = model.sampler(SamplerParams::default())?;
    Ok(make(SharedSession::new(session, sampler)))
}

/// Runs `body` with the session that a handle stands for.
///
/// # Safety
/// `session` is NULL or a handle that is not freed during the call.
unsafe fn with(
    session: *const loris_session,
    body: impl FnOnce(&mut Inner) -> Result<i32, Failure>,
) -> i32 {
    call(|| {
        // SAFETY: passed on.
        let session = unsafe { get(session) }?;
        body(&mut *session.enter()?)
    })
}

/// Stops the call that runs on the session, which returns LORIS_CANCELLED within a fraction of a layer's time and
/// leaves the session as that status promises; if none runs, the next one. Returns at once. Any thread, also from a
/// callback; not from a signal handler.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn loris_session_cancel(session: *const loris_session) -> i32 {
    // SAFETY: the caller keeps to the header.
    call(|| unsafe {
        get(session)?.canceller.cancel();
        Ok(LORIS_OK)
    })
}

/// Withdraws a loris_session_cancel that came when no call ran, so that the next one is not stopped. Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn loris_session_uncancel(session: *const loris_session) -> i32 {
    // SAFETY: the caller keeps to the header.
    call(|| unsafe {
        get(session)?.canceller.withdraw();
        Ok(LORIS_OK)
    })
}

/// Runs n tokens of a prompt, or of the next turn, through the model; afterwards the logits of the last are ready.
/// progress (may be NULL) is told tokens done and in all after each chunk, and may stop the call until the last.
///
/// Anything but LORIS_OK - LORIS_CANCELLED, LORIS_CTX_FULL, LORIS_KV_FULL, an error - leaves the session as it was
/// before the call. LORIS_E_IO: a mapped weight file was written to since the model was opened; open it again. One
/// thread at a time.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn loris_session_prefill(
    session: *mut loris_session,
    tokens: *const u32,
    n: usize,
    progress: loris_progress_callback,
    user_data: *mut c_void,
) -> i32 {
    // SAFETY: the caller keeps to the header.
    unsafe {
        with(session, |inner| {
            let tokens = slice("tokens", tokens, n)?;
            if tokens.is_empty() {
                return Err(Failure::invalid("tokens: there are none"));
            }
            inner.session.prefill_with(tokens, &mut |done, total| match progress {
                Some(f) if f(user_data, done as u64, total as u64) != 0 => ControlFlow::Break(()),
                _ => ControlFlow::Continue(()),
            })?;
            if let Some(f) = progress {
                f(user_data, n as u64, n as u64); // there is nothing left to cancel
            }
            Ok(LORIS_OK)
        })
    }
}

/// Adds one generated token; afterwards its logits are ready. Anything but LORIS_OK leaves the session as it was
/// before the call. One thread at a time.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn loris_session_decode(session: *mut loris_session, token: u32) -> i32 {
    // SAFETY: the caller keeps to the header.
    unsafe {
        with(session, |inner| {
            inner.session.decode(token)?;
            Ok(LORIS_OK)
        })
    }
}

/// Queues n tokens of a prompt for loris_model_step. LORIS_E_STATE if earlier tokens are still queued,
/// LORIS_CTX_FULL if they do not fit, LORIS_E_IO as in loris_session_prefill; then nothing is queued. One thread at a
/// time.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn loris_session_feed(
    session: *mut loris_session,
    tokens: *const u32,
    n: usize,
) -> i32 {
    // SAFETY: the caller keeps to the header.
    unsafe {
        with(session, |inner| {
            if n == 0 {
                return Err(Failure::invalid("tokens: there are none"));
            }
            inner.session.feed(slice("tokens", tokens, n)?)?;
            Ok(LORIS_OK)
        })
    }
}

/// Queues one generated token for loris_model_step; as loris_session_feed. One thread at a time.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn loris_session_push(session: *mut loris_session, token: u32) -> i32 {
    // SAFETY: the caller keeps to the header.
    unsafe {
        with(session, |inner| {
            inner.session.push(token)?;
            Ok(LORIS_OK)
        })
    }
}

/// Drops tokens that are queued and not computed; what is in the cache stays. One thread at a time.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn loris_session_clear(session: *mut loris_session) -> i32 {
    // SAFETY: the caller keeps to the header.
    unsafe {
        with(session, |inner| {
            inner.session.clear_pending();
            Ok(LORIS_OK)
        })
    }
}

/// Sets how the session's next tokens are chosen, and starts its random sequence anew: the n-th token that is chosen by
/// chance takes the n-th number of the seed's sequence. params may be NULL for greedy, which is how a session starts. After
/// an error the old choice stays. One thread at a time.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn loris_session_set_sampling(
    session: *mut loris_session,
    params: *const loris_sampling_params,
) -> i32 {
    // SAFETY: the caller keeps to the header.
    unsafe {
        with(session, |inner| {
            let params = read(params)?;
            check_flags("loris_sampling_params.flags", params.flags, 0)?;
            check_flags("loris_sampling_params.reserved", params.reserved, 0)?;
            let ids = slice("bias_ids", params.bias_ids, params.n_bias)?;
            let biases = slice("bias", params.bias, params.n_bias)?;
            let mut logit_bias = memory::empty(ids.len(), "logit biases")?;
            logit_bias.extend(ids.iter().copied().zip(biases.iter().copied()));
            let params = SamplerParams {
                temperature: params.temperature,
                top_k: params.top_k as usize,
                top_p: params.top_p,
                min_p: params.min_p,
                typical_p: params.typical_p,
                repetition_penalty: params.repetition_penalty,
                presence_penalty: params.presence_penalty,
                frequency_penalty: params.frequency_penalty,
                logit_bias,
                seed: (params.seed != LORIS_RANDOM_SEED).then_some(params.seed),
            };
            inner.sampler = inner.session.model().sampler(params)?;
            Ok(LORIS_OK)
        })
    }
}

/// Chooses the next token from the session's logits; the session does not hold it until loris_session_decode or
/// loris_session_push. LORIS_E_STATE if no logits are ready. Logits that an answer left on the device are read first, as
/// in loris_session_logits. One thread at a time.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn loris_session_sample(session: *mut loris_session, token: *mut u32) -> i32 {
    // SAFETY: the caller keeps to the header.
    unsafe {
        with(session, |inner| {
            write("token", token, LORIS_NO_TOKEN)?;
            inner.session.recall_logits()?;
            let logits = inner.session.logits().ok_or_else(no_logits)?;
            write("token", token, inner.sampler.sample(logits, inner.session.history()))?;
            Ok(LORIS_OK)
        })
    }
}

/// As loris_session_sample, of the tokens whose bits are set in allowed: bit token % 32 of allowed[token / 32], n_words in all,
/// one for every 32 tokens of the vocabulary. LORIS_DEAD_END if there is none that may be chosen. One thread at a time. Since
/// 0.6.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn loris_session_sample_masked(
    session: *mut loris_session,
    allowed: *const u32,
    n_words: usize,
    token: *mut u32,
) -> i32 {
    // SAFETY: the caller keeps to the header.
    unsafe {
        with(session, |inner| {
            write("token", token, LORIS_NO_TOKEN)?;
            inner.session.recall_logits()?;
            let logits = inner.session.logits().ok_or_else(no_logits)?;
            let allowed = slice("allowed", allowed, n_words)?;
            let history = inner.session.history();
            let sampled = inner.sampler.sample_masked(logits, history, allowed)?;
            write("token", token, sampled.ok_or_else(dead_end)?)?;
            Ok(LORIS_OK)
        })
    }
}

fn dead_end() -> Failure {
    let why = "the mask allows no token that may be chosen; end the answer, or let it allow one";
    Failure::new(LORIS_DEAD_END, why)
}

/// Gives, of the logits after the session's last token, the logarithms of the probabilities of n_tokens ids - logprobs has room
/// for as many - and the n_top likeliest tokens, likeliest first; of equal ones the lower id comes first. n_top is at most the
/// size of the vocabulary. They are those of the model: before temperature, penalties, biases and masks. Logits
/// are read and LORIS_E_STATE given as in loris_session_logits, and nothing is copied. One thread at a time. Since 0.6.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn loris_session_logprobs(
    session: *mut loris_session,
    tokens: *const u32,
    n_tokens: usize,
    logprobs: *mut f32,
    top: *mut loris_logprob,
    n_top: usize,
) -> i32 {
    // SAFETY: the caller keeps to the header.
    unsafe {
        with(session, |inner| {
            inner.session.recall_logits()?;
            let logits = inner.session.logits().ok_or_else(no_logits)?;
            give_logprobs(logits, slice("tokens", tokens, n_tokens)?, logprobs, top, n_top)
        })
    }
}

/// As loris_session_logprobs, of n_vocab logits that loris_session_score or loris_session_logits gave: for the tokens of a
/// prompt. LORIS_E_NUMERIC if one of the logits is not finite. Any thread. Since 0.6.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn loris_logprobs(
    logits: *const f32,
    n_vocab: usize,
    tokens: *const u32,
    n_tokens: usize,
    logprobs: *mut f32,
    top: *mut loris_logprob,
    n_top: usize,
) -> i32 {
    // SAFETY: the caller keeps to the header.
    call(|| unsafe {
        let logits = slice("logits", logits, n_vocab)?;
        if let Some(at) = logits.iter().position(|logit| !logit.is_finite()) {
            let what = format!("logits: the one at {at} is not finite");
            return Err(Failure::new(LORIS_E_NUMERIC, what));
        }
        give_logprobs(logits, slice("tokens", tokens, n_tokens)?, logprobs, top, n_top)
    })
}

/// # Safety
/// `logprobs` is NULL or has room for as many as `tokens`, `top` is NULL or has room for `n_top`.
unsafe fn give_logprobs(
    logits: &[f32],
    tokens: &[u32],
    logprobs: *mut f32,
    top: *mut loris_logprob,
    n_top: usize,
) -> Result<i32, Failure> {
    let vocab_size = logits.len();
    if let Some(&id) = tokens.iter().find(|&&id| id as usize >= vocab_size) {
        return Err(Error::TokenOutOfRange { id, vocab_size }.into());
    }
    if n_top > vocab_size {
        let why = format!("n_top: {n_top} is more than the {vocab_size} tokens of the vocabulary");
        return Err(Failure::invalid(why));
    }
    let all = LogSoftmax::new(logits);
    let of_tokens = tokens.iter().map(|&id| all.of(id));
    let likeliest = all.top(n_top)?.into_iter();
    let likeliest = likeliest.map(loris_logprob::from);
    // SAFETY: passed on.
    unsafe {
        give("logprobs", logprobs, of_tokens)?;
        give("top", top, likeliest)?;
    }
    Ok(LORIS_OK)
}

fn no_logits() -> Failure {
    Failure::new(LORIS_E_STATE, "the session has no logits; prefill or decode first")
}

/// Copies the logits after the session's last token. buf has room for cap floats; *n is set to the size of the
/// vocabulary, also when buf is NULL and cap 0. LORIS_BUFFER_TOO_SMALL if cap is less than that. LORIS_E_STATE if none are
/// ready: before the first token and after a truncation. An answer may have left them on the device: they are read, or
/// computed once more, first, and where that fails (LORIS_E_DEVICE, or LORIS_KV_FULL: it takes a page a layer) that is
/// the status. One thread at a time.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn loris_session_logits(
    session: *mut loris_session,
    buf: *mut f32,
    cap: usize,
    n: *mut usize,
) -> i32 {
    // SAFETY: the caller keeps to the header.
    unsafe {
        with(session, |inner| {
            inner.session.recall_logits()?;
            copy(inner.session.logits().ok_or_else(no_logits)?, buf, cap, n)
        })
    }
}

/// Runs n tokens as loris_session_prefill does and shows on_logits the logits after each: for perplexity and the
/// like. Anything but LORIS_OK, LORIS_E_IO as in loris_session_prefill among it, leaves the session as it was before the
/// call. One thread at a time.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn loris_session_score(
    session: *mut loris_session,
    tokens: *const u32,
    n: usize,
    on_logits: loris_logits_callback,
    user_data: *mut c_void,
) -> i32 {
    // SAFETY: the caller keeps to the header.
    unsafe {
        with(session, |inner| {
            let tokens = slice("tokens", tokens, n)?;
            let on_logits = on_logits.ok_or_else(|| Failure::invalid("on_logits: is NULL"))?;
            inner.session.logits_of(tokens, &mut |idx, logits| {
                on_logits(user_data, idx, logits.as_ptr(), logits.len());
            })?;
            Ok(LORIS_OK)
        })
    }
}

/// Generates an answer from the session's logits, token by token. params may be NULL for the defaults.
///
/// LORIS_OK: max_tokens were generated. LORIS_EOS: the model ended the answer. LORIS_STOP: a stop text or a stop token was reached.
/// LORIS_DEAD_END: the mask of params allows no token that may be chosen. LORIS_E_CALLBACK: it said that it failed.
/// LORIS_CTX_FULL, LORIS_KV_FULL: there is no room for more. LORIS_CANCELLED: on_token or loris_session_cancel stopped
/// it. LORIS_E_STATE if no logits are ready.
///
/// A token is shown once the session holds it. So after each of these, and after an error, the session holds the tokens
/// that were shown and no other: call this again to go on, or loris_session_prefill with the next turn's tokens. (Versions
/// before 0.5 held all but the last after most of these; a program that decodes the last one itself has it twice
/// now.) A token that ends an answer is neither shown nor held. Where a call goes on with an answer, so does its text: a
/// character whose bytes are in the tokens of both is shown by the second. One thread at a time.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn loris_session_generate(
    session: *mut loris_session,
    params: *const loris_generate_params,
) -> i32 {
    // SAFETY: the caller keeps to the header.
    unsafe {
        with(session, |inner| {
            let params = read(params)?;
            let flags = LORIS_IGNORE_EOS | LORIS_KEEP_STOP;
            check_flags("loris_generate_params.flags", params.flags, flags)?;
            let ids = slice("stop_ids", params.stop_ids, params.n_stop_ids)?;
            let mut stop_ids = memory::empty(ids.len(), "stop tokens")?;
            stop_ids.extend_from_slice(ids);
            let texts = slice("stop", params.stop, params.n_stop)?;
            let mut stop = memory::empty(texts.len(), "stop texts")?;
            for &text in texts {
                stop.push(owned(c_text("stop", text)?)?);
            }
            let options = GenerateOptions {
                max_tokens: as_usize("max_tokens", params.max_tokens)?,
                min_tokens: as_usize("min_tokens", params.min_tokens)?,
                stop,
                keep_stop: params.flags & LORIS_KEEP_STOP != 0,
                stop_ids,
                ignore_eos: params.flags & LORIS_IGNORE_EOS != 0,
                logprobs: match params.on_logprobs {
                    Some(_) => Some(as_usize("n_top", params.n_top)?),
                    None => None,
                },
            };
            let n_top =
                options.logprobs.unwrap_or(0).min(inner.session.model().config().vocab_size);
            let mut top = memory::empty(n_top, "the likeliest tokens")?;
            let mut text = Vec::new();
            let mut on_token = |token: Token<'_>| {
                if let (Some(f), Some(of_token)) = (params.on_logprobs, token.logprobs) {
                    top.clear();
                    top.extend(of_token.top.iter().map(|&next| loris_logprob::from(next)));
                    f(params.user_data, token.id, of_token.logprob, top.as_ptr(), top.len());
                }
                let Some(f) = params.on_token else { return ControlFlow::Continue(()) };
                text.clear();
                text.extend_from_slice(token.text.as_bytes());
                text.push(0);
                let id = if token.is_rest { LORIS_NO_TOKEN } else { token.id };
                match f(params.user_data, id, text.as_ptr().cast(), token.text.len()) {
                    0 => ControlFlow::Continue(()),
                    _ => ControlFlow::Break(()),
                }
            };
            let Inner { session, sampler } = inner;
            let finish = match params.mask {
                Some(f) => {
                    let mut mask = |answer: &[u32], allowed: &mut [u32]| {
                        let (words, n_words) = (allowed.as_mut_ptr(), allowed.len());
                        match f(params.user_data, answer.as_ptr(), answer.len(), words, n_words) {
                            0 => Ok(()),
                            code => Err(format!("the callback gave {code}")),
                        }
                    };
                    generate_masked(session, sampler, &options, &mut mask, &mut on_token)?
                }
                None => generate(session, sampler, &options, &mut on_token)?,
            };
            Ok(match finish {
                Finish::Length => LORIS_OK,
                Finish::Eos => LORIS_EOS,
                Finish::Stop => LORIS_STOP,
                Finish::CtxFull => {
                    let len = session.ctx_len();
                    let why = format!("context is full: the session was opened for {len} tokens");
                    return Err(Failure::new(LORIS_CTX_FULL, why));
                }
                Finish::DeadEnd => return Err(dead_end()),
                Finish::Cancelled => return Err(Error::Cancelled.into()),
            })
        })
    }
}

/// Opens a second session with the same tokens, logits and sampling parameters. Its random sequence is its own: the seed
/// is the upper 53 bits of XXH3 (64 bits) over the first session's seed and the number of forks that came before since that was
/// set, 8 bytes each, little-endian. (Before 0.5 a fork drew what the first session drew.) Pages are shared until one of
/// the two writes to them. On LORIS_OK *fork is a handle for loris_session_free, else it is NULL. LORIS_E_STATE if tokens
/// are queued. One thread at a time.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn loris_session_fork(
    session: *mut loris_session,
    fork: *mut *mut loris_session,
) -> i32 {
    // SAFETY: the caller keeps to the header.
    unsafe {
        with(session, |inner| {
            write("fork", fork, std::ptr::null_mut())?;
            let copy = SharedSession::new(inner.session.fork()?, inner.sampler.fork()?);
            write("fork", fork, make(copy))?;
            Ok(LORIS_OK)
        })
    }
}

/// Forgets the tokens from len on; pages that only they needed are free at once. Queued tokens are dropped. The logits
/// are gone unless nothing was forgotten. LORIS_E_STATE if what tokens from len on would see is gone, of a session that
/// streams or evicts: loris_receipt.least_tokens and the message say how many can be kept, and nothing has changed. A len of 0
/// always clears. (Before 0.5 such a session was cleared.) One thread at a time.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn loris_session_truncate(session: *mut loris_session, len: u64) -> i32 {
    // SAFETY: the caller keeps to the header.
    unsafe {
        with(session, |inner| {
            inner.session.truncate(usize::try_from(len).unwrap_or(usize::MAX))?;
            Ok(LORIS_OK)
        })
    }
}

/// Copies the tokens in the session's cache. buf, cap and n as in loris_tokenize. One thread at a time.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn loris_session_tokens(
    session: *mut loris_session,
    buf: *mut u32,
    cap: usize,
    n: *mut usize,
) -> i32 {
    // SAFETY: passed on.
    unsafe { with(session, |inner| copy(inner.session.tokens(), buf, cap, n)) }
}

/// Fills *receipt with what the session holds and has cost so far. One thread at a time.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn loris_session_get_receipt(
    session: *mut loris_session,
    receipt: *mut loris_receipt,
) -> i32 {
    // SAFETY: the caller keeps to the header.
    unsafe {
        with(session, |inner| {
            let facts = inner.session.receipt();
            let filled = loris_receipt {
                n_tokens: inner.session.len() as u64,
                ctx_len: inner.session.ctx_len() as u64,
                kv_bytes: facts.kv_bytes as u64,
                n_prefilled: facts.n_prefilled as u64,
                n_shared: facts.n_shared as u64,
                n_decoded: facts.n_decoded as u64,
                n_replayed: facts.n_replayed as u64,
                n_drawn: facts.n_drawn as u64,
                token_layers: facts.token_layers as u64,
                n_waiting: facts.n_waiting as u64,
                aux_bytes: facts.aux_bytes as u64,
                n_revived: facts.n_revived as u64,
                mass_kept: facts.mass_kept,
                n_evicted: facts.n_evicted as u64,
                seed: inner.sampler.seed(),
                least_tokens: inner.session.least_len() as u64,
                ..Versioned::defaults()
            };
            fill_sized(receipt, filled)
        })
    }
}

/// Writes the session - tokens, KV, logits, not the choice of tokens - into buf, which has room for cap bytes; *n is
/// set to how many there are, also when buf is NULL and cap 0. LORIS_BUFFER_TOO_SMALL if cap is less than that.
/// LORIS_E_STATE if tokens are queued. Logits that an answer left on the device are read first, as in
/// loris_session_logits. The session does not change. One thread at a time.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn loris_session_save(
    session: *mut loris_session,
    buf: *mut u8,
    cap: usize,
    n: *mut usize,
) -> i32 {
    // SAFETY: the caller keeps to the header.
    unsafe {
        with(session, |inner| {
            inner.session.recall_logits()?;
            let n_bytes = inner.session.saved_bytes()?;
            write("n", n, n_bytes)?;
            if buf.is_null() && cap == 0 {
                return Ok(LORIS_OK);
            }
            if buf.is_null() {
                return Err(Failure::invalid("buf: is NULL"));
            }
            if cap < n_bytes {
                return Ok(LORIS_BUFFER_TOO_SMALL);
            }
            inner.session.save(&mut Buffer { at: buf, left: cap })?;
            Ok(LORIS_OK)
        })
    }
}

/// A caller's buffer, which may hold anything until it is written.
struct Buffer {
    at: *mut u8,
    left: usize,
}

impl Write for Buffer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = bytes.len().min(self.left);
        // SAFETY: the caller of `loris_session_save` promised `left` bytes from `at` on.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.at, n);
            self.at = self.at.add(n);
        }
        self.left -= n;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// As loris_session_save, into the file path (UTF-8). It is written beside its place under a name of its own, readable by
/// its owner alone, synced, and moved there: after an error or a crash, and whoever else writes to path, the old file
/// or a whole new one is there. A symbolic link stays and the file that it leads to is replaced. LORIS_E_IO, with the
/// reason in the message, if that cannot be done, and for what is no regular file. One thread at a time.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn loris_session_save_file(
    session: *mut loris_session,
    path: *const c_char,
) -> i32 {
    // SAFETY: the caller keeps to the header.
    unsafe {
        with(session, |inner| {
            inner.session.recall_logits()?;
            inner.session.save_file(Path::new(c_text("path", path)?))?;
            Ok(LORIS_OK)
        })
    }
}

/// Opens a session from the n bytes that loris_session_save wrote, in this process or another, for the same weights,
/// config, KV format, and tokenizer if both models have one.
/// The bytes are not trusted: LORIS_E_FORMAT names what is wrong with them, LORIS_KV_FULL says that there is no room
/// for as many tokens, and no other session is given any of their KV. What a library before ABI 0.5 saved is
/// LORIS_E_FORMAT without LORIS_TRUST_OLD_STATE. params may be NULL for the defaults. On
/// LORIS_OK *session is a handle for loris_session_free, else it is NULL. Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn loris_session_restore(
    model: *const loris_model,
    bytes: *const u8,
    n: usize,
    params: *const loris_session_params,
    session: *mut *mut loris_session,
) -> i32 {
    // SAFETY: the caller keeps to the header.
    call(|| unsafe {
        write("session", session, std::ptr::null_mut())?;
        let model = get(model)?;
        let mut bytes = slice("bytes", bytes, n)?;
        let options = options(model, &read(params)?)?;
        let restored = model.restore(&mut bytes, &options)?;
        if !bytes.is_empty() {
            let what = format!("saved session: {} bytes too many", bytes.len());
            return Err(Failure::new(LORIS_E_FORMAT, what));
        }
        let restored = handle(model, restored)?;
        write("session", session, restored)?;
        Ok(LORIS_OK)
    })
}

/// As loris_session_restore, from the file path (UTF-8). Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn loris_session_restore_file(
    model: *const loris_model,
    path: *const c_char,
    params: *const loris_session_params,
    session: *mut *mut loris_session,
) -> i32 {
    // SAFETY: the caller keeps to the header.
    call(|| unsafe {
        write("session", session, std::ptr::null_mut())?;
        let model = get(model)?;
        let path = Path::new(c_text("path", path)?);
        let options = options(model, &read(params)?)?;
        let restored = handle(model, model.restore_file(path, &options)?)?;
        write("session", session, restored)?;
        Ok(LORIS_OK)
    })
}

/// Panics inside a call on the session, for tests of what follows. Only libraries with debug assertions have it.
#[cfg(debug_assertions)]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn loris_debug_panic(session: *mut loris_session) -> i32 {
    #[allow(clippy::panic)] // its purpose
    // SAFETY: the caller keeps to the header.
    unsafe {
        with(session, |_| panic!("loris_debug_panic was called"))
    }
}
