//! Structs that cross the boundary.
//!
//! Each begins with its size as its writer knows it. A host that was compiled against an older header passes
//! a shorter struct, and the fields that it does not know get their defaults; a newer host passes a longer
//! one, which is fine as long as what this library does not know is zero. Structs only ever grow at their
//! end, and the sizes that they had are kept in [`Versioned::SIZES`].

use std::ffi::{c_char, c_void};

use super::guard::call;
use super::status::{Failure, LORIS_OK};
use crate::logprobs::Logprob;

/// Seed of loris_sampling_params: a random one, which loris_receipt.seed tells. Since 0.5.
pub const LORIS_RANDOM_SEED: u64 = u64::MAX;

/// Told of what happens besides results; message is UTF-8, ends with a NUL, and lives as long as the call.
/// level: 1 error, 2 warning, 3 information. Called on the thread whose call it is about, several at a time if
/// several threads call; must not call loris with the same session.
pub type loris_log_callback =
    Option<unsafe extern "C" fn(user_data: *mut c_void, level: i32, message: *const c_char)>;
/// Told how much of something is done; not 0 cancels it. On the calling thread.
pub type loris_progress_callback =
    Option<unsafe extern "C" fn(user_data: *mut c_void, done: u64, total: u64) -> i32>;
/// Told each generated token and the text that it completes: whole characters, UTF-8, text_len bytes and a NUL,
/// which live as long as the call, and which are empty while a character or a possible stop text is incomplete. token
/// is LORIS_NO_TOKEN for text that was held back when the answer ended. Not 0 cancels. On the calling thread; calls on
/// the same session give LORIS_E_BUSY.
pub type loris_token_callback = Option<
    unsafe extern "C" fn(
        user_data: *mut c_void,
        token: u32,
        text: *const c_char,
        text_len: usize,
    ) -> i32,
>;
/// Told the logits after each token of loris_session_score: idx counts its tokens from 0, logits are n_vocab floats
/// that live as long as the call. On the calling thread.
pub type loris_logits_callback = Option<
    unsafe extern "C" fn(user_data: *mut c_void, idx: usize, logits: *const f32, n_vocab: usize),
>;

/// A token and the natural logarithm of its probability, 0 or less. Since 0.6.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct loris_logprob {
    /// Its id.
    pub token: u32,
    /// The logarithm.
    pub logprob: f32,
}

impl From<Logprob> for loris_logprob {
    fn from(Logprob { id, logprob }: Logprob) -> Self {
        Self { token: id, logprob }
    }
}

/// Told, just before loris_token_callback is told the token, how likely the model held it, and the n_top tokens that it held
/// likeliest in its place, likeliest first, which live as long as the call: before temperature, penalties, biases and masks.
/// On the calling thread. Since 0.6.
pub type loris_logprobs_callback = Option<
    unsafe extern "C" fn(
        user_data: *mut c_void,
        token: u32,
        logprob: f32,
        top: *const loris_logprob,
        n_top: usize,
    ),
>;
/// Says which tokens may come next: for each that may, sets bit token % 32 of allowed[token / 32]. All n_words are 0 before;
/// there is a bit for each token of the vocabulary (vocab_size of loris_model_info), those of loris_model_eos_tokens
/// included, which end the answer. tokens are the n_tokens of the answer so far: all since the last prompt, of calls before
/// too. Both live as long as the call. Not 0: it failed, which ends the answer. Asked once a token, before the pass
/// that computes its logits, on the calling thread; calls on the same session give LORIS_E_BUSY. Since 0.6.
pub type loris_mask_callback = Option<
    unsafe extern "C" fn(
        user_data: *mut c_void,
        tokens: *const u32,
        n_tokens: usize,
        allowed: *mut u32,
        n_words: usize,
    ) -> i32,
>;

/// Where models run.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct loris_engine_params {
    /// sizeof(loris_engine_params); set by loris_engine_params_init, as in every struct.
    pub struct_size: u32,
    /// 0.
    pub flags: u32,
    /// "auto" (CUDA where it works, else the CPU), "cpu", "cuda" or "cuda:N"; NULL: "auto".
    pub device: *const c_char,
    /// Threads of the CPU, the calling one included; 0: as many as the process may use.
    pub threads: u32,
    /// Messages up to this level are logged: 1 errors, 2 warnings, 3 information. Default 3.
    pub log_level: i32,
    /// Who is told; NULL: nobody.
    pub log: loris_log_callback,
    /// Passed to log.
    pub log_data: *mut c_void,
    /// The CUDA driver's library; NULL: "libcuda.so.1". One a process. Since 0.2.
    pub cuda_driver: *const c_char,
}

/// How a model is opened.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct loris_model_params {
    /// sizeof(loris_model_params).
    pub struct_size: u32,
    /// LORIS_KEEP_PREFIXES or 0.
    pub flags: u32,
    /// "mmap": weights are used where the file is mapped. Whoever cuts the file short while it is in use ends the process
    /// (SIGBUS; no handler is installed); a change is noticed when the next prompt begins, which is then LORIS_E_IO. New
    /// weights belong in a new file that is renamed over the old one, which then stays as it is for those who map it.
    /// "read": weights are copied, and what happens to the file does not matter. NULL: "mmap".
    pub load: *const c_char,
    /// Number format of the KV cache, or one for keys and one for values, as in "int8:int4"; loris_build_info lists the
    /// formats, as "kv-int8". NULL: "bf16".
    pub kv: *const c_char,
    /// Tokens that the page pool holds, all sessions together; 0: one session of the model's context, at most 131072, or
    /// one stream.
    pub kv_tokens: u64,
    /// Tokens a KV page holds: a power of two from 16 to 256. Default 64.
    pub page_len: u32,
    /// Prompt tokens that go through the layers together: 1 to 65536. Default 512.
    pub chunk: u32,
    /// Sessions that decode in one pass: 1 to 4096. Default 16.
    pub batch: u32,
    /// 0.
    pub reserved: u32,
    /// Told the bytes of weights that are in place, of all; NULL: nobody.
    pub progress: loris_progress_callback,
    /// Passed to progress.
    pub progress_data: *mut c_void,
    /// Tokens that sessions which prune may hold, all together: room for hidden states that wait. 0: none, and
    /// loris_session_params.lazy is refused. Since 0.3.
    pub aux_tokens: u64,
}

/// How a session is opened.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct loris_session_params {
    /// sizeof(loris_session_params).
    pub struct_size: u32,
    /// LORIS_TRUST_OLD_STATE or 0.
    pub flags: u32,
    /// Tokens the session may hold; 0: what the model was trained for.
    pub ctx_len: u64,
    /// Token pruning: "gentle", "paper", "hard", or layers and the shares that go on, "8:0.7,16:0.5"; behind it
    /// options, ",window=4", as the command line has them. NULL: every token is computed. A model opened with
    /// aux_tokens is needed. A session that prunes gives no logits to loris_session_score. Since 0.3.
    pub lazy: *const c_char,
    /// Which tokens leave each layer's cache for good: a policy and what it keeps, "snapkv:1024" tokens or "snapkv:25%" of each
    /// prompt, as the command line has it. Without lazy and window; such a session gives
    /// no logits to loris_session_score. Since 0.4. NULL: none.
    pub evict: *const c_char,
    /// Which pages attention reads. NULL: all. This version has nothing else and gives LORIS_E_UNSUPPORTED.
    pub sparse: *const c_char,
    /// Streaming: tokens at the start that every token sees, 4 as a rule. With window 0 it has to be 0.
    pub sink: u64,
    /// Streaming: tokens that a token sees besides, itself the last; there is no end to such a session, its memory is
    /// constant, and ctx_len has to be 0. Without lazy. 0: no streaming.
    pub window: u64,
}

/// How the next token is chosen. What loris_sampling_params_init makes is greedy;
/// loris_model_sampling_params makes what the model's authors advise.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct loris_sampling_params {
    /// sizeof(loris_sampling_params).
    pub struct_size: u32,
    /// 0.
    pub flags: u32,
    /// Divides the logits, 0 to 100; 0 takes the likeliest token.
    pub temperature: f32,
    /// Only the likeliest tokens that reach this probability together; 1: all.
    pub top_p: f32,
    /// Only tokens at least this many times as likely as the likeliest; 0: all.
    pub min_p: f32,
    /// Divides the logits of tokens that occurred in prompt or answer; 1: off.
    pub repetition_penalty: f32,
    /// Only this many likeliest tokens; 0: all.
    pub top_k: u32,
    /// 0.
    pub reserved: u32,
    /// Start of the random sequence: the same seed gives the same tokens. LORIS_RANDOM_SEED, the default since 0.5 (before, it
    /// was 0): a random one, which loris_receipt.seed tells.
    pub seed: u64,
    /// Only tokens whose surprise is nearest to the expected one, until they reach this probability together; 1: all. Since
    /// 0.6, as all that follows.
    pub typical_p: f32,
    /// Taken off the logits of tokens that occurred in the answer; 0: off.
    pub presence_penalty: f32,
    /// The same for each time that they occurred; 0: off.
    pub frequency_penalty: f32,
    /// 0.
    pub reserved_2: u32,
    /// Tokens whose logits something is added to; NULL if n_bias is 0.
    pub bias_ids: *const u32,
    /// What is added to the logit of each.
    pub bias: *const f32,
    /// How many.
    pub n_bias: usize,
}

/// When an answer ends, and who is told.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct loris_generate_params {
    /// sizeof(loris_generate_params).
    pub struct_size: u32,
    /// LORIS_IGNORE_EOS, LORIS_KEEP_STOP.
    pub flags: u32,
    /// Tokens at most. Default 256.
    pub max_tokens: u64,
    /// Texts that end the answer and are not part of it, each UTF-8 with a NUL; NULL if n_stop is 0. They may hold the texts
    /// of special tokens, which are not shown otherwise.
    pub stop: *const *const c_char,
    /// How many.
    pub n_stop: usize,
    /// Told each token; NULL: nobody.
    pub on_token: loris_token_callback,
    /// Passed to on_token, on_logprobs and mask.
    pub user_data: *mut c_void,
    /// Tokens at least: before, no token that would end the answer is chosen, and no stop text looked for. Default 0. Since
    /// 0.6, as all that follows.
    pub min_tokens: u64,
    /// Tokens that end the answer as an end-of-sequence token does, but with LORIS_STOP; NULL if n_stop_ids is 0.
    pub stop_ids: *const u32,
    /// How many.
    pub n_stop_ids: usize,
    /// Told how likely each token was; NULL: nobody. With it logits come from the device for each token.
    pub on_logprobs: loris_logprobs_callback,
    /// How many of the likeliest tokens on_logprobs is told; more than there are: all.
    pub n_top: u64,
    /// Asked for each token which ones may come; NULL: all.
    pub mask: loris_mask_callback,
}

/// Facts of a model. struct_size is set before the call, as in every struct that is filled.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct loris_model_info {
    /// sizeof(loris_model_info).
    pub struct_size: u32,
    /// Layers.
    pub n_layers: u32,
    /// Query heads of a layer.
    pub n_q_heads: u32,
    /// Key and value heads of a layer.
    pub n_kv_heads: u32,
    /// Width of a head.
    pub head_dim: u32,
    /// Width of a row between layers.
    pub hidden_dim: u32,
    /// Width of the MLP.
    pub ffn_dim: u32,
    /// Tokens of the vocabulary, and logits of a row.
    pub vocab_size: u32,
    /// Tokens that the model was trained to see at once.
    pub ctx_len: u64,
    /// Bytes of weights as stored.
    pub weight_bytes: u64,
    /// 1 if the folder has a tokenizer.
    pub has_tokenizer: u32,
    /// 1 if the folder has a chat template.
    pub has_chat_template: u32,
}

/// How full a model's page pool is.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct loris_kv_info {
    /// sizeof(loris_kv_info).
    pub struct_size: u32,
    /// Tokens that a page holds, of one layer.
    pub page_len: u32,
    /// Pages in the pool.
    pub n_pages: u64,
    /// Pages that some session holds; one that several share counts once.
    pub n_used: u64,
    /// The most that ever were in use.
    pub n_peak: u64,
    /// Bytes of a page.
    pub page_bytes: u64,
    /// Bytes that a token takes in all layers.
    pub bytes_per_token: u64,
}

/// What a session holds and has cost so far.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct loris_receipt {
    /// sizeof(loris_receipt).
    pub struct_size: u32,
    /// 0.
    pub reserved: u32,
    /// Tokens in the cache.
    pub n_tokens: u64,
    /// Tokens the session may hold.
    pub ctx_len: u64,
    /// Bytes of its KV pages; pages shared with other sessions are counted in full.
    pub kv_bytes: u64,
    /// Prompt tokens that were computed.
    pub n_prefilled: u64,
    /// Prompt tokens whose pages came from another session's identical prefix.
    pub n_shared: u64,
    /// Generated tokens that were computed.
    pub n_decoded: u64,
    /// Passes that the device replayed from a recording.
    pub n_replayed: u64,
    /// Generated tokens that the device drew.
    pub n_drawn: u64,
    /// (token, layer) pairs that were computed.
    pub token_layers: u64,
    /// Tokens that wait at prune points. Since 0.3, as all that follows.
    pub n_waiting: u64,
    /// Bytes of the pages of their hidden states.
    pub aux_bytes: u64,
    /// Times that a token which waited was taken up again.
    pub n_revived: u64,
    /// The smallest share of the attention of a prompt's last rows that went to tokens which went on from a prune
    /// point; 1 if nothing was pruned.
    pub mass_kept: f64,
    /// Tokens that were evicted, of each layer. Since 0.4.
    pub n_evicted: u64,
    /// The seed of its random sequence, which was given, drawn or followed from that of the session it is a fork of: given to
    /// another session, that draws the same. Since 0.5, as all that follows.
    pub seed: u64,
    /// The least length, besides 0, that loris_session_truncate can cut the session back to; 0: any.
    pub least_tokens: u64,
}

/// A struct that knows the sizes it has had.
pub(super) trait Versioned: Copy {
    const NAME: &'static str;
    /// Every published size, first to last.
    const SIZES: &'static [usize];
    /// Every field at its default, the size included.
    fn defaults() -> Self;
}

macro_rules! sized {
    ($name:ident, $sizes:expr, $($field:ident: $value:expr),*) => {
        impl Versioned for $name {
            const NAME: &'static str = stringify!($name);
            const SIZES: &'static [usize] = &$sizes;

            fn defaults() -> Self {
                // SAFETY: numbers and nullable pointers, for which zero is a value.
                let zero: Self = unsafe { std::mem::zeroed() };
                #[allow(clippy::cast_possible_truncation)] // a few dozen bytes
                let struct_size = size_of::<Self>() as u32;
                Self { struct_size, $($field: $value,)* ..zero }
            }
        }

        const _: () = {
            let sizes: &[usize] = &$sizes;
            assert!(sizes[sizes.len() - 1] == size_of::<$name>(), "add the new size");
        };
    };
}

sized!(loris_engine_params, [40, 48], log_level: 3);
sized!(loris_model_params, [64, 72], page_len: 64, chunk: 512, batch: 16);
sized!(loris_session_params, [16, 56], ctx_len: 0);
sized!(loris_sampling_params, [40, 80], top_p: 1.0, repetition_penalty: 1.0, seed: LORIS_RANDOM_SEED, typical_p: 1.0);
sized!(loris_generate_params, [48, 96], max_tokens: 256);
sized!(loris_model_info, [56], n_layers: 0);
sized!(loris_kv_info, [48], page_len: 0);
sized!(loris_receipt, [80, 112, 120, 136], reserved: 0);

/// No struct will ever be longer: a larger size is a mistake.
const LONGEST: usize = 4096;

/// The size that a host wrote, if it is one that a version of the header has or may have.
fn check_size<P: Versioned>(size: usize) -> Result<usize, Failure> {
    let is_known = P::SIZES.contains(&size);
    if is_known || (size > size_of::<P>() && size <= LONGEST && size.is_multiple_of(8)) {
        return Ok(size);
    }
    let (name, now) = (P::NAME, size_of::<P>());
    Err(Failure::invalid(format!(
        "{name}.struct_size: {size} is the size of no version, this one's is {now}; call {name}_init, or set it to sizeof({name})"
    )))
}

/// What a host's struct says; NULL: the defaults.
///
/// # Safety
/// `ptr` is NULL or points to a struct whose first word is its size.
pub(super) unsafe fn read<P: Versioned>(ptr: *const P) -> Result<P, Failure> {
    let mut params = P::defaults();
    if ptr.is_null() {
        return Ok(params);
    }
    if !ptr.is_aligned() {
        return Err(Failure::invalid(format!("{}: is not aligned", P::NAME)));
    }
    // SAFETY: it is that long, says the caller.
    let size = check_size::<P>(unsafe { ptr.cast::<u32>().read() } as usize)?;
    let known = size.min(size_of::<P>());
    // SAFETY: the host's struct has `size` bytes and ours at least `known`; the fields are plain data.
    unsafe {
        std::ptr::copy_nonoverlapping(ptr.cast::<u8>(), (&raw mut params).cast::<u8>(), known);
    }
    // SAFETY: as above.
    let rest = unsafe { std::slice::from_raw_parts(ptr.cast::<u8>().add(known), size - known) };
    match rest.iter().all(|&byte| byte == 0) {
        true => Ok(params),
        false => Err(Failure::new(
            super::LORIS_E_UNSUPPORTED,
            format!("{}: sets a field that this version does not know; use a newer one", P::NAME),
        )),
    }
}

/// Fills a host's struct, as far as it is long.
///
/// # Safety
/// `ptr` is NULL or points to `size` writable bytes.
unsafe fn fill<P: Versioned>(ptr: *mut P, size: usize, value: P) -> Result<i32, Failure> {
    if ptr.is_null() || !ptr.is_aligned() {
        return Err(Failure::invalid(format!("{}: is NULL or not aligned", P::NAME)));
    }
    let size = check_size::<P>(size)?;
    let known = size.min(size_of::<P>());
    #[allow(clippy::cast_possible_truncation)] // at most LONGEST
    let size_word = size as u32;
    // SAFETY: `size` bytes are writable, and the first word is the size.
    unsafe {
        std::ptr::write_bytes(ptr.cast::<u8>(), 0, size);
        std::ptr::copy_nonoverlapping((&raw const value).cast::<u8>(), ptr.cast::<u8>(), known);
        ptr.cast::<u32>().write(size_word);
    }
    Ok(LORIS_OK)
}

/// [`fill`] for a struct whose size the host has set.
///
/// # Safety
/// `ptr` is NULL or points to a writable struct whose first word is its size.
pub(super) unsafe fn fill_sized<P: Versioned>(ptr: *mut P, value: P) -> Result<i32, Failure> {
    let size = match ptr.is_null() || !ptr.is_aligned() {
        true => 0,
        // SAFETY: it is that long, says the caller.
        false => unsafe { ptr.cast::<u32>().read() as usize },
    };
    // SAFETY: passed on.
    unsafe { fill(ptr, size, value) }
}

/// Fails unless only the bits of `known` are set.
pub(super) fn check_flags(name: &str, flags: u32, known: u32) -> Result<(), Failure> {
    match flags & !known {
        0 => Ok(()),
        unknown => Err(Failure::invalid(format!("{name}: {unknown:#x} is not a known flag"))),
    }
}

/// Sets every field to its default. struct_size is sizeof(loris_engine_params). Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn loris_engine_params_init(
    params: *mut loris_engine_params,
    struct_size: usize,
) -> i32 {
    // SAFETY: passed on.
    call(|| unsafe { fill(params, struct_size, Versioned::defaults()) })
}

/// Sets every field to its default. struct_size is sizeof(loris_model_params). Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn loris_model_params_init(
    params: *mut loris_model_params,
    struct_size: usize,
) -> i32 {
    // SAFETY: passed on.
    call(|| unsafe { fill(params, struct_size, Versioned::defaults()) })
}

/// Sets every field to its default. struct_size is sizeof(loris_session_params). Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn loris_session_params_init(
    params: *mut loris_session_params,
    struct_size: usize,
) -> i32 {
    // SAFETY: passed on.
    call(|| unsafe { fill(params, struct_size, Versioned::defaults()) })
}

/// Sets every field to its default, which is greedy. struct_size is sizeof(loris_sampling_params). Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn loris_sampling_params_init(
    params: *mut loris_sampling_params,
    struct_size: usize,
) -> i32 {
    // SAFETY: passed on.
    call(|| unsafe { fill(params, struct_size, Versioned::defaults()) })
}

/// Sets every field to its default. struct_size is sizeof(loris_generate_params). Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn loris_generate_params_init(
    params: *mut loris_generate_params,
    struct_size: usize,
) -> i32 {
    // SAFETY: passed on.
    call(|| unsafe { fill(params, struct_size, Versioned::defaults()) })
}
