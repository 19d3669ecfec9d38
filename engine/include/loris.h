/*
 * loris: language models inside your process.
 *
 * An engine is a device, a model is weights and a pool of KV pages on it, a session is one sequence:
 *
 *     loris_engine *engine;
 *     loris_model *model;
 *     loris_session *session;
 *     loris_engine_open(NULL, &engine);
 *     loris_model_open(engine, "models/SmolLM2-135M-Instruct", NULL, &model);
 *     loris_session_open(model, NULL, &session);
 *     loris_session_prefill(session, tokens, n_tokens, NULL, NULL);
 *     loris_session_generate(session, &params);
 *
 * Statuses. Every call that can fail returns an int32_t: LORIS_OK, a positive status for what is no mistake (no room,
 * cancelled, an answer's end), or a negative one for an error. After a failure loris_last_error has a message for
 * the calling thread: what was wrong, where, and what to do. LORIS_EOS, LORIS_STOP, LORIS_PENDING, LORIS_IDLE and
 * LORIS_BUFFER_TOO_SMALL are results and leave no message.
 * Unless a function says otherwise, a session is after any status but LORIS_OK what it was before the call. After
 * LORIS_E_PANIC it is poisoned: every call but loris_session_free, _cancel and _uncancel gives LORIS_E_POISONED;
 * its model and other sessions go on.
 *
 * Handles. What a call gives out as a handle is freed by the function of its name, once. Handles count their references: a
 * model keeps its engine, a session its model, whatever is freed first. Freeing NULL does nothing.
 *
 * Threads. Engines and models may be used by any threads at once. A session and a text stream belong to one call at a
 * time, on any thread; a second call is told LORIS_E_BUSY. loris_session_cancel is for any thread.
 * Calls that compute take turns on the device, pass by pass, in the order in which they come: a token that one thread
 * decodes waits for at most one chunk of each prompt that other threads compute, and in loris_model_step for one chunk in all.
 *
 * Structs begin with struct_size and are set by their loris_*_params_init, then changed. They only grow at their end,
 * so a program keeps running with a newer library. Fields named flags and reserved are 0 where nothing else is said.
 *
 * Memory. Texts and arrays that a caller passes are read during the call only. The library writes into the caller's
 * buffers; pointers that it gives out are good until the time that is said. If it cannot get memory for what
 * grows with the input, that is LORIS_E_OOM_HOST or LORIS_E_OOM_DEVICE. Room for what cannot fail half-way is asked for
 * first, with 2 MiB to spare, and let go: a call may be refused while a little memory is left. At most 48 MiB and 192 bytes for
 * each byte of the messages are asked for to render a chat, 512 bytes for each byte of a text to tokenise it: of
 * 16 KiB of it where it can be cut at spaces and lines without a change to its tokens.
 *
 * The library prints nothing, ends no process, installs no handlers and needs no initialisation. Callbacks must return:
 * no longjmp and no C++ exception may pass through it. Processes that use it must not fork and go on in the child.
 */


#ifndef LORIS_H
#define LORIS_H

#include <stddef.h>
#include <stdint.h>

// Done.
#define LORIS_OK 0

// loris_session_cancel, or a callback, stopped the call.
#define LORIS_CANCELLED 1

// The session's context length would be exceeded. Truncate the session, or open one with a longer context.
#define LORIS_CTX_FULL 2

// The model's page pool is full. Free or truncate a session, or open the model with more kv_tokens.
#define LORIS_KV_FULL 3

// The model ended its answer.
#define LORIS_EOS 4

// A stop text was reached.
#define LORIS_STOP 5

// Tokens are still queued: step again.
#define LORIS_PENDING 6

// Nothing was queued.
#define LORIS_IDLE 7

// The caller's buffer is too small; the length that is needed was written, the buffer was not.
#define LORIS_BUFFER_TOO_SMALL 8

// No token may come next: a mask allows none. Since 0.6.
#define LORIS_DEAD_END 9

// An argument or option has no meaning: NULL, out of range, not UTF-8, another kind of handle.
#define LORIS_E_INVALID_ARG -1

// The state of the session does not allow the call now.
#define LORIS_E_STATE -2

// Another call on the same session runs, in another thread or around this callback.
#define LORIS_E_BUSY -3

// An earlier call on the session panicked. The session can only be freed.
#define LORIS_E_POISONED -4

// Reading or writing a file failed.
#define LORIS_E_IO -5

// A file, or a saved session, is not what it should be.
#define LORIS_E_FORMAT -6

// This version, or the device, does not do what was asked for; the message names it.
#define LORIS_E_UNSUPPORTED -7

// Host memory could not be had.
#define LORIS_E_OOM_HOST -8

// Device memory could not be had.
#define LORIS_E_OOM_DEVICE -9

// The device that was asked for is absent.
#define LORIS_E_NO_DEVICE -10

// The device failed.
#define LORIS_E_DEVICE -11

// The model produced a value that is not a number.
#define LORIS_E_NUMERIC -12

// A defect of the library: a panic was caught. The sessions of the call are poisoned.
#define LORIS_E_PANIC -13

// A callback said that it failed. Since 0.6.
#define LORIS_E_CALLBACK -14

// Seed of loris_sampling_params: a random one, which loris_receipt.seed tells. Since 0.5.
#define LORIS_RANDOM_SEED UINT64_MAX

// Version of this interface: major << 16 | minor. A host runs with a library of the same major and of the same or a
// higher minor version.
#define LORIS_ABI_VERSION 6

// Flag of loris_model_params: keep what prompts of sessions that prune have computed before the first prune point, as
// long as their pages are held and the room of aux_tokens is not needed, for prompts that begin alike. Since 0.3.
#define LORIS_KEEP_PREFIXES 1

// Flag of loris_tokenize: the text of a special token is that token. Without it, it is ordinary text, as text from
// users should be.
#define LORIS_PARSE_SPECIAL 1

// Flag of loris_tokenize: where the tokenizer says so, add the token that starts a sequence. For whole prompts
// that no chat template was applied to.
#define LORIS_ADD_EDGES 2

// Flag of loris_detokenize and loris_text_stream_open: special tokens are shown; without it they are silent.
#define LORIS_SHOW_SPECIAL 1

// Flag of loris_chat_tokenize and loris_chat_render: end where the model's answer begins.
#define LORIS_ADD_GENERATION_PROMPT 1

// Of loris_token_flags: the token's text is silent unless it is asked for. Since 0.6.
#define LORIS_TOKEN_SPECIAL 1

// Of loris_token_flags: it ends an answer. Since 0.6.
#define LORIS_TOKEN_EOS 2

// Of loris_token_flags: the tokenizer does not have it, so it is never chosen. Since 0.6.
#define LORIS_TOKEN_UNUSED 4

// No token.
#define LORIS_NO_TOKEN UINT32_MAX

// Flag of loris_session_params: loris_session_restore takes what a library before ABI 0.5 saved, which does not say with
// which config and tokenizer it was made; if it was not this model's, the session answers nonsense. Since 0.5.
#define LORIS_TRUST_OLD_STATE 1

// Flag of loris_generate_params: go on after a token that ends an answer.
#define LORIS_IGNORE_EOS 1

// Flag of loris_generate_params: the stop text that ended the answer is part of it. Since 0.6.
#define LORIS_KEEP_STOP 2

// A device and its threads. Immutable; any thread may use it.
typedef struct loris_engine loris_engine;

// Weights on a device and a pool of KV pages. Immutable but for the pool; any thread may use it.
typedef struct loris_model loris_model;

// One sequence: tokens, KV pages, logits, a sampler. One thread at a time.
typedef struct loris_session loris_session;

// Turns tokens into text as they come. One thread at a time.
typedef struct loris_text_stream loris_text_stream;

// Told of what happens besides results; message is UTF-8, ends with a NUL, and lives as long as the call.
// level: 1 error, 2 warning, 3 information. Called on the thread whose call it is about, several at a time if
// several threads call; must not call loris with the same session.
typedef void (*loris_log_callback)(void *user_data, int32_t level, const char *message);

// Where models run.
typedef struct loris_engine_params {
    // sizeof(loris_engine_params); set by loris_engine_params_init, as in every struct.
    uint32_t struct_size;
    // 0.
    uint32_t flags;
    // "auto" (CUDA where it works, else the CPU), "cpu", "cuda" or "cuda:N"; NULL: "auto".
    const char *device;
    // Threads of the CPU, the calling one included; 0: as many as the process may use.
    uint32_t threads;
    // Messages up to this level are logged: 1 errors, 2 warnings, 3 information. Default 3.
    int32_t log_level;
    // Who is told; NULL: nobody.
    loris_log_callback log;
    // Passed to log.
    void *log_data;
    // The CUDA driver's library; NULL: "libcuda.so.1". One a process. Since 0.2.
    const char *cuda_driver;
} loris_engine_params;

// Told how much of something is done; not 0 cancels it. On the calling thread.
typedef int32_t (*loris_progress_callback)(void *user_data, uint64_t done, uint64_t total);

// How a model is opened.
typedef struct loris_model_params {
    // sizeof(loris_model_params).
    uint32_t struct_size;
    // LORIS_KEEP_PREFIXES or 0.
    uint32_t flags;
    // "mmap": weights are used where the file is mapped. Whoever cuts the file short while it is in use ends the process
    // (SIGBUS; no handler is installed); a change is noticed when the next prompt begins, which is then LORIS_E_IO. New
    // weights belong in a new file that is renamed over the old one, which then stays as it is for those who map it.
    // "read": weights are copied, and what happens to the file does not matter. NULL: "mmap".
    const char *load;
    // Number format of the KV cache, or one for keys and one for values, as in "int8:int4"; loris_build_info lists the
    // formats, as "kv-int8". NULL: "bf16".
    const char *kv;
    // Tokens that the page pool holds, all sessions together; 0: one session of the model's context, at most 131072, or
    // one stream.
    uint64_t kv_tokens;
    // Tokens a KV page holds: a power of two from 16 to 256. Default 64.
    uint32_t page_len;
    // Prompt tokens that go through the layers together: 1 to 65536. Default 512.
    uint32_t chunk;
    // Sessions that decode in one pass: 1 to 4096. Default 16.
    uint32_t batch;
    // 0.
    uint32_t reserved;
    // Told the bytes of weights that are in place, of all; NULL: nobody.
    loris_progress_callback progress;
    // Passed to progress.
    void *progress_data;
    // Tokens that sessions which prune may hold, all together: room for hidden states that wait. 0: none, and
    // loris_session_params.lazy is refused. Since 0.3.
    uint64_t aux_tokens;
} loris_model_params;

// How a session is opened.
typedef struct loris_session_params {
    // sizeof(loris_session_params).
    uint32_t struct_size;
    // LORIS_TRUST_OLD_STATE or 0.
    uint32_t flags;
    // Tokens the session may hold; 0: what the model was trained for.
    uint64_t ctx_len;
    // Token pruning: "gentle", "paper", "hard", or layers and the shares that go on, "8:0.7,16:0.5"; behind it
    // options, ",window=4", as the command line has them. NULL: every token is computed. A model opened with
    // aux_tokens is needed. A session that prunes gives no logits to loris_session_score. Since 0.3.
    const char *lazy;
    // Which tokens leave each layer's cache for good: a policy and what it keeps, "snapkv:1024" tokens or "snapkv:25%" of each
    // prompt, as the command line has it. Without lazy and window; such a session gives
    // no logits to loris_session_score. Since 0.4. NULL: none.
    const char *evict;
    // Which pages attention reads. NULL: all. This version has nothing else and gives LORIS_E_UNSUPPORTED.
    const char *sparse;
    // Streaming: tokens at the start that every token sees, 4 as a rule. With window 0 it has to be 0.
    uint64_t sink;
    // Streaming: tokens that a token sees besides, itself the last; there is no end to such a session, its memory is
    // constant, and ctx_len has to be 0. Without lazy. 0: no streaming.
    uint64_t window;
} loris_session_params;

// How the next token is chosen. What loris_sampling_params_init makes is greedy;
// loris_model_sampling_params makes what the model's authors advise.
typedef struct loris_sampling_params {
    // sizeof(loris_sampling_params).
    uint32_t struct_size;
    // 0.
    uint32_t flags;
    // Divides the logits, 0 to 100; 0 takes the likeliest token.
    float temperature;
    // Only the likeliest tokens that reach this probability together; 1: all.
    float top_p;
    // Only tokens at least this many times as likely as the likeliest; 0: all.
    float min_p;
    // Divides the logits of tokens that occurred in prompt or answer; 1: off.
    float repetition_penalty;
    // Only this many likeliest tokens; 0: all.
    uint32_t top_k;
    // 0.
    uint32_t reserved;
    // Start of the random sequence: the same seed gives the same tokens. LORIS_RANDOM_SEED, the default since 0.5 (before, it
    // was 0): a random one, which loris_receipt.seed tells.
    uint64_t seed;
    // Only tokens whose surprise is nearest to the expected one, until they reach this probability together; 1: all. Since
    // 0.6, as all that follows.
    float typical_p;
    // Taken off the logits of tokens that occurred in the answer; 0: off.
    float presence_penalty;
    // The same for each time that they occurred; 0: off.
    float frequency_penalty;
    // 0.
    uint32_t reserved_2;
    // Tokens whose logits something is added to; NULL if n_bias is 0.
    const uint32_t *bias_ids;
    // What is added to the logit of each.
    const float *bias;
    // How many.
    size_t n_bias;
} loris_sampling_params;

// Told each generated token and the text that it completes: whole characters, UTF-8, text_len bytes and a NUL,
// which live as long as the call, and which are empty while a character or a possible stop text is incomplete. token
// is LORIS_NO_TOKEN for text that was held back when the answer ended. Not 0 cancels. On the calling thread; calls on
// the same session give LORIS_E_BUSY.
typedef int32_t (*loris_token_callback)(void *user_data,
                                        uint32_t token,
                                        const char *text,
                                        size_t text_len);

// A token and the natural logarithm of its probability, 0 or less. Since 0.6.
typedef struct loris_logprob {
    // Its id.
    uint32_t token;
    // The logarithm.
    float logprob;
} loris_logprob;

// Told, just before loris_token_callback is told the token, how likely the model held it, and the n_top tokens that it held
// likeliest in its place, likeliest first, which live as long as the call: before temperature, penalties, biases and masks.
// On the calling thread. Since 0.6.
typedef void (*loris_logprobs_callback)(void *user_data,
                                        uint32_t token,
                                        float logprob,
                                        const struct loris_logprob *top,
                                        size_t n_top);

// Says which tokens may come next: for each that may, sets bit token % 32 of allowed[token / 32]. All n_words are 0 before;
// there is a bit for each token of the vocabulary (vocab_size of loris_model_info), those of loris_model_eos_tokens
// included, which end the answer. tokens are the n_tokens of the answer so far: all since the last prompt, of calls before
// too. Both live as long as the call. Not 0: it failed, which ends the answer. Asked once a token, before the pass
// that computes its logits, on the calling thread; calls on the same session give LORIS_E_BUSY. Since 0.6.
typedef int32_t (*loris_mask_callback)(void *user_data,
                                       const uint32_t *tokens,
                                       size_t n_tokens,
                                       uint32_t *allowed,
                                       size_t n_words);

// When an answer ends, and who is told.
typedef struct loris_generate_params {
    // sizeof(loris_generate_params).
    uint32_t struct_size;
    // LORIS_IGNORE_EOS, LORIS_KEEP_STOP.
    uint32_t flags;
    // Tokens at most. Default 256.
    uint64_t max_tokens;
    // Texts that end the answer and are not part of it, each UTF-8 with a NUL; NULL if n_stop is 0. They may hold the texts
    // of special tokens, which are not shown otherwise.
    const char *const *stop;
    // How many.
    size_t n_stop;
    // Told each token; NULL: nobody.
    loris_token_callback on_token;
    // Passed to on_token, on_logprobs and mask.
    void *user_data;
    // Tokens at least: before, no token that would end the answer is chosen, and no stop text looked for. Default 0. Since
    // 0.6, as all that follows.
    uint64_t min_tokens;
    // Tokens that end the answer as an end-of-sequence token does, but with LORIS_STOP; NULL if n_stop_ids is 0.
    const uint32_t *stop_ids;
    // How many.
    size_t n_stop_ids;
    // Told how likely each token was; NULL: nobody. With it logits come from the device for each token.
    loris_logprobs_callback on_logprobs;
    // How many of the likeliest tokens on_logprobs is told; more than there are: all.
    uint64_t n_top;
    // Asked for each token which ones may come; NULL: all.
    loris_mask_callback mask;
} loris_generate_params;

// Facts of a model. struct_size is set before the call, as in every struct that is filled.
typedef struct loris_model_info {
    // sizeof(loris_model_info).
    uint32_t struct_size;
    // Layers.
    uint32_t n_layers;
    // Query heads of a layer.
    uint32_t n_q_heads;
    // Key and value heads of a layer.
    uint32_t n_kv_heads;
    // Width of a head.
    uint32_t head_dim;
    // Width of a row between layers.
    uint32_t hidden_dim;
    // Width of the MLP.
    uint32_t ffn_dim;
    // Tokens of the vocabulary, and logits of a row.
    uint32_t vocab_size;
    // Tokens that the model was trained to see at once.
    uint64_t ctx_len;
    // Bytes of weights as stored.
    uint64_t weight_bytes;
    // 1 if the folder has a tokenizer.
    uint32_t has_tokenizer;
    // 1 if the folder has a chat template.
    uint32_t has_chat_template;
} loris_model_info;

// How full a model's page pool is.
typedef struct loris_kv_info {
    // sizeof(loris_kv_info).
    uint32_t struct_size;
    // Tokens that a page holds, of one layer.
    uint32_t page_len;
    // Pages in the pool.
    uint64_t n_pages;
    // Pages that some session holds; one that several share counts once.
    uint64_t n_used;
    // The most that ever were in use.
    uint64_t n_peak;
    // Bytes of a page.
    uint64_t page_bytes;
    // Bytes that a token takes in all layers.
    uint64_t bytes_per_token;
} loris_kv_info;

// Told the logits after each token of loris_session_score: idx counts its tokens from 0, logits are n_vocab floats
// that live as long as the call. On the calling thread.
typedef void (*loris_logits_callback)(void *user_data,
                                      size_t idx,
                                      const float *logits,
                                      size_t n_vocab);

// What a session holds and has cost so far.
typedef struct loris_receipt {
    // sizeof(loris_receipt).
    uint32_t struct_size;
    // 0.
    uint32_t reserved;
    // Tokens in the cache.
    uint64_t n_tokens;
    // Tokens the session may hold.
    uint64_t ctx_len;
    // Bytes of its KV pages; pages shared with other sessions are counted in full.
    uint64_t kv_bytes;
    // Prompt tokens that were computed.
    uint64_t n_prefilled;
    // Prompt tokens whose pages came from another session's identical prefix.
    uint64_t n_shared;
    // Generated tokens that were computed.
    uint64_t n_decoded;
    // Passes that the device replayed from a recording.
    uint64_t n_replayed;
    // Generated tokens that the device drew.
    uint64_t n_drawn;
    // (token, layer) pairs that were computed.
    uint64_t token_layers;
    // Tokens that wait at prune points. Since 0.3, as all that follows.
    uint64_t n_waiting;
    // Bytes of the pages of their hidden states.
    uint64_t aux_bytes;
    // Times that a token which waited was taken up again.
    uint64_t n_revived;
    // The smallest share of the attention of a prompt's last rows that went to tokens which went on from a prune
    // point; 1 if nothing was pruned.
    double mass_kept;
    // Tokens that were evicted, of each layer. Since 0.4.
    uint64_t n_evicted;
    // The seed of its random sequence, which was given, drawn or followed from that of the session it is a fork of: given to
    // another session, that draws the same. Since 0.5, as all that follows.
    uint64_t seed;
    // The least length, besides 0, that loris_session_truncate can cut the session back to; 0: any.
    uint64_t least_tokens;
} loris_receipt;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

// Sets every field to its default. struct_size is sizeof(loris_engine_params). Any thread.
int32_t loris_engine_params_init(struct loris_engine_params *params, size_t struct_size);

// Sets every field to its default. struct_size is sizeof(loris_model_params). Any thread.
int32_t loris_model_params_init(struct loris_model_params *params, size_t struct_size);

// Sets every field to its default. struct_size is sizeof(loris_session_params). Any thread.
int32_t loris_session_params_init(struct loris_session_params *params, size_t struct_size);

// Sets every field to its default, which is greedy. struct_size is sizeof(loris_sampling_params). Any thread.
int32_t loris_sampling_params_init(struct loris_sampling_params *params,
                                   size_t struct_size);

// Sets every field to its default. struct_size is sizeof(loris_generate_params). Any thread.
int32_t loris_generate_params_init(struct loris_generate_params *params, size_t struct_size);

// Copies the message of this thread's last failure, with a NUL, into a buffer of cap bytes (cut at a
// character if it is too small; buf may be NULL if cap is 0). Returns the message's length in bytes without the NUL.
//
// The message stays until the thread's next failure: success does not clear it. Any thread.
size_t loris_last_error(char *buf,
                        size_t cap);

// Returns the status of this thread's last failure, LORIS_OK if there was none. Any thread.
int32_t loris_last_error_status(void);

// Returns the library's LORIS_ABI_VERSION. Any thread.
uint32_t loris_abi_version(void);

// Returns the library's version, such as "0.1.0": a text that lives as long as the library. Any thread.
const char *loris_version(void);

// Describes the build as JSON: version, abi, target, cuda_images, features, and commit if the packager named it. buf,
// cap and n as in loris_detokenize. Any thread.
int32_t loris_build_info(char *buf,
                         size_t cap,
                         size_t *n);

// Returns 1 if this build has the feature, else 0 (an unknown name included): "cpu", "cuda", "batch", "fork",
// "prefix-sharing", "save", "lazy", "window", "evict", "mask", "logprobs", "keep-prefixes" (the flag LORIS_KEEP_PREFIXES), and for each KV
// format and each eviction policy "kv-" or "evict-" before its name, as in "kv-int4-channel" and "evict-snapkv".
// loris_build_info lists them all. Any thread.
int32_t loris_has_feature(const char *name);

// Lists the CUDA devices of this machine as JSON: [{"index", "name", "compute", "memory", "why_not"}], where why_not
// is null for a device that can be used. LORIS_E_NO_DEVICE, with the reason in the message, if there is no
// driver. buf, cap and n as in loris_detokenize. Any thread.
int32_t loris_cuda_devices(char *buf,
                           size_t cap,
                           size_t *n);

// Opens an engine: looks for the device, takes no memory of note. params may be NULL for the defaults. On
// LORIS_OK *engine is a handle for loris_engine_free, else it is NULL. Any thread.
int32_t loris_engine_open(const struct loris_engine_params *params,
                          struct loris_engine **engine);

// Frees an engine; NULL is fine. Its models live on until they are freed themselves. Any thread.
void loris_engine_free(struct loris_engine *engine);

// Opens the Hugging Face model folder dir (a path in UTF-8): config.json, safetensors, and where they exist the
// tokenizer and the chat template. params may be NULL for the defaults. On LORIS_OK *model is a handle for
// loris_model_free, else it is NULL.
//
// LORIS_CANCELLED if params->progress said so; LORIS_E_IO, LORIS_E_FORMAT, LORIS_E_UNSUPPORTED name the file and
// what is wrong with it. Any thread.
int32_t loris_model_open(const struct loris_engine *engine,
                         const char *dir,
                         const struct loris_model_params *params,
                         struct loris_model **model);

// Frees a model; NULL is fine. Its sessions live on, and its memory with them, until they are freed. Any thread.
void loris_model_free(struct loris_model *model);

// Fills *info with facts of the model. Any thread.
int32_t loris_model_get_info(const struct loris_model *model, struct loris_model_info *info);

// Fills *info with the state of the model's page pool. Any thread.
int32_t loris_model_get_kv_info(const struct loris_model *model, struct loris_kv_info *info);

// Copies the name of the device that the model runs on, such as "cpu" or "cuda:0". buf, cap and n as in
// loris_detokenize. Any thread.
int32_t loris_model_device(const struct loris_model *model,
                           char *buf,
                           size_t cap,
                           size_t *n);

// Copies the ids of the tokens that end an answer. buf has room for cap ids; *n is set to how many there are, also
// when buf is NULL and cap 0. LORIS_BUFFER_TOO_SMALL if cap is less than that. Any thread.
int32_t loris_model_eos_tokens(const struct loris_model *model,
                               uint32_t *buf,
                               size_t cap,
                               size_t *n);

// Sets *params to what the model's authors advise (generation_config.json): greedy unless they ask for sampling. Any
// thread.
int32_t loris_model_sampling_params(const struct loris_model *model,
                                    struct loris_sampling_params *params);

// Advances n sessions of the model that have tokens queued (loris_session_feed, loris_session_push): one token where
// a generated one is queued, the next rows where a prompt is. One pass runs many sessions, which costs far
// less than one pass each.
//
// Prompts share the rows of one chunk (chunk of loris_model_params): each gets what it has left or an equal share, and what
// short ones leave goes to the long ones; one that gets none comes first in the next step. So a long prompt keeps nobody
// waiting: whatever prompts come, a session whose next token is queued as soon as it is known gets it within one
// step, which is a decode pass for each batch of tokens and prefill passes of one chunk's rows in all. (Sessions that
// prune take a pass for each run of layers.) What prompts of one step have in common at their beginning is computed once; those
// that wait for it are LORIS_PENDING, and so is one for which the pool may have no room beside those that have begun.
//
// statuses[i] becomes that of sessions[i]: LORIS_OK (all queued tokens are in the cache, logits are ready),
// LORIS_PENDING (step again), LORIS_IDLE (nothing was queued), or what went wrong; then that session is as it
// was and keeps what was queued, and the others go on. The call itself gives LORIS_OK if every status was written; the message of
// loris_last_error is that of the first session that failed.
//
// A session that another call uses, or that is in the list twice, gets LORIS_E_BUSY. Any thread, several at a time
// with different sessions.
int32_t loris_model_step(const struct loris_model *model,
                         struct loris_session *const *sessions,
                         size_t n,
                         int32_t *statuses);

// Encodes text_len bytes of UTF-8. flags: LORIS_PARSE_SPECIAL, LORIS_ADD_EDGES.
//
// buf has room for cap ids; *n is set to how many there are, also when buf is NULL and cap 0.
// LORIS_BUFFER_TOO_SMALL if cap is less than that; loris_max_tokens gives a cap that is enough. Any thread.
int32_t loris_tokenize(const struct loris_model *model,
                       const char *text,
                       size_t text_len,
                       uint32_t flags,
                       uint32_t *buf,
                       size_t cap,
                       size_t *n);

// Sets *n to a number of tokens that no text of text_len bytes has more than, with LORIS_ADD_EDGES or without: as many as
// bytes with most tokenizers, more where one normalises a character to several. Any thread. Since 0.6.
int32_t loris_max_tokens(const struct loris_model *model,
                         size_t text_len,
                         size_t *n);

// Copies the bytes that a token adds to a text: often not whole characters, and with most tokenizers a space in front; of a special
// one its own text. None for an id that stands for no token. LORIS_E_INVALID_ARG where the tokenizer makes text of several
// tokens together (WordPiece). buf has room for cap bytes; *n is set to how many there are, also when buf is NULL and cap
// 0. LORIS_BUFFER_TOO_SMALL if cap is less than that. Any thread. Since 0.6.
int32_t loris_token_bytes(const struct loris_model *model,
                          uint32_t token,
                          uint8_t *buf,
                          size_t cap,
                          size_t *n);

// Sets *flags to what a token is: LORIS_TOKEN_SPECIAL, LORIS_TOKEN_EOS, LORIS_TOKEN_UNUSED. Any thread. Since 0.6.
int32_t loris_token_flags(const struct loris_model *model,
                          uint32_t token,
                          uint32_t *flags);

// Decodes n_tokens ids at once; bytes that are no UTF-8 become U+FFFD. flags: LORIS_SHOW_SPECIAL.
//
// buf has room for cap bytes, the NUL at the end counted; *n is set to the bytes of the text without the NUL, also
// when buf is NULL and cap 0. LORIS_BUFFER_TOO_SMALL if cap is not more than that. Any thread.
int32_t loris_detokenize(const struct loris_model *model,
                         const uint32_t *tokens,
                         size_t n_tokens,
                         uint32_t flags,
                         char *buf,
                         size_t cap,
                         size_t *n);

// Opens a stream that turns ids into text as they come. flags: LORIS_SHOW_SPECIAL. On LORIS_OK *stream is a
// handle for loris_text_stream_free, else it is NULL. Any thread.
int32_t loris_text_stream_open(const struct loris_model *model,
                               uint32_t flags,
                               struct loris_text_stream **stream);

// As loris_text_stream_open, for ids that come behind the n_tokens ids of tokens, whose text was shown: where an answer
// goes on. Since 0.6.
int32_t loris_text_stream_open_after(const struct loris_model *model,
                                     const uint32_t *tokens,
                                     size_t n_tokens,
                                     uint32_t flags,
                                     struct loris_text_stream **stream);

// Takes the next id. *text becomes the text that is now complete: *text_len bytes of whole UTF-8 characters and a NUL,
// often a word, sometimes empty. It lives until the next call on the stream. All texts joined are what
// loris_detokenize makes of all ids at once. After an error the stream is as it was. One thread at a time.
int32_t loris_text_stream_push(struct loris_text_stream *stream,
                               uint32_t token,
                               const char **text,
                               size_t *text_len);

// Ends the stream: *text becomes what was held back, as in loris_text_stream_push. The stream can then only be
// freed. One thread at a time.
int32_t loris_text_stream_finish(struct loris_text_stream *stream,
                                 const char **text,
                                 size_t *text_len);

// Frees a stream; NULL is fine. Any thread, when no call on it runs.
void loris_text_stream_free(struct loris_text_stream *stream);

// Makes the prompt of a conversation with the model's chat template: n_messages roles ("system", "user",
// "assistant") and contents, each UTF-8 with a NUL. Special tokens of the template are parsed, those that a content happens to
// spell stay text. flags: LORIS_ADD_GENERATION_PROMPT. buf, cap and n as in loris_tokenize. Any thread.
int32_t loris_chat_tokenize(const struct loris_model *model,
                            const char *const *roles,
                            const char *const *contents,
                            size_t n_messages,
                            uint32_t flags,
                            uint32_t *buf,
                            size_t cap,
                            size_t *n);

// As loris_chat_tokenize, but gives the prompt as text, for people to read: a special token that a content spells
// cannot be told from the template's own. buf, cap and n as in loris_detokenize. Any thread.
int32_t loris_chat_render(const struct loris_model *model,
                          const char *const *roles,
                          const char *const *contents,
                          size_t n_messages,
                          uint32_t flags,
                          char *buf,
                          size_t cap,
                          size_t *n);

// As loris_chat_tokenize, of a chat with all that templates know: request_len bytes of JSON, an object with "messages"
// (objects with "role", "content" - a string or a list of parts - and what else the template reads, such as "tool_calls"), and if
// wanted "tools" and "documents" (lists of objects), "variables" (an object: what the template asks for by name, such as
// enable_thinking), "continue_final_message" (true: the prompt ends where the last message does, for the model to go
// on with), "add_generation_prompt" (true unless the last message goes on) and "chat_template" (the name of one of the
// folder's templates, or a template of one's own). LORIS_E_INVALID_ARG names what is wrong with it. flags: 0. buf, cap and
// n as in loris_tokenize. Any thread. Since 0.6.
int32_t loris_chat_tokenize_json(const struct loris_model *model,
                                 const char *request,
                                 size_t request_len,
                                 uint32_t flags,
                                 uint32_t *buf,
                                 size_t cap,
                                 size_t *n);

// As loris_chat_render, of a request as in loris_chat_tokenize_json. flags: 0. buf, cap and n as in loris_detokenize. Any
// thread. Since 0.6.
int32_t loris_chat_render_json(const struct loris_model *model,
                               const char *request,
                               size_t request_len,
                               uint32_t flags,
                               char *buf,
                               size_t cap,
                               size_t *n);

// Opens an empty session; takes pages only as tokens come. params may be NULL for the defaults. On LORIS_OK
// *session is a handle for loris_session_free, else it is NULL. Any thread.
int32_t loris_session_open(const struct loris_model *model,
                           const struct loris_session_params *params,
                           struct loris_session **session);

// Frees a session and its pages; NULL is fine, and so is freeing it after its model. Any thread, when no call on it
// runs, loris_session_cancel included.
void loris_session_free(struct loris_session *session);

// Stops the call that runs on the session, which returns LORIS_CANCELLED within a fraction of a layer's time and
// leaves the session as that status promises; if none runs, the next one. Returns at once. Any thread, also from a
// callback; not from a signal handler.
int32_t loris_session_cancel(const struct loris_session *session);

// Withdraws a loris_session_cancel that came when no call ran, so that the next one is not stopped. Any thread.
int32_t loris_session_uncancel(const struct loris_session *session);

// Runs n tokens of a prompt, or of the next turn, through the model; afterwards the logits of the last are ready.
// progress (may be NULL) is told tokens done and in all after each chunk, and may stop the call until the last.
//
// Anything but LORIS_OK - LORIS_CANCELLED, LORIS_CTX_FULL, LORIS_KV_FULL, an error - leaves the session as it was
// before the call. LORIS_E_IO: a mapped weight file was written to since the model was opened; open it again. One
// thread at a time.
int32_t loris_session_prefill(struct loris_session *session,
                              const uint32_t *tokens,
                              size_t n,
                              loris_progress_callback progress,
                              void *user_data);

// Adds one generated token; afterwards its logits are ready. Anything but LORIS_OK leaves the session as it was
// before the call. One thread at a time.
int32_t loris_session_decode(struct loris_session *session,
                             uint32_t token);

// Queues n tokens of a prompt for loris_model_step. LORIS_E_STATE if earlier tokens are still queued,
// LORIS_CTX_FULL if they do not fit, LORIS_E_IO as in loris_session_prefill; then nothing is queued. One thread at a
// time.
int32_t loris_session_feed(struct loris_session *session,
                           const uint32_t *tokens,
                           size_t n);

// Queues one generated token for loris_model_step; as loris_session_feed. One thread at a time.
int32_t loris_session_push(struct loris_session *session, uint32_t token);

// Drops tokens that are queued and not computed; what is in the cache stays. One thread at a time.
int32_t loris_session_clear(struct loris_session *session);

// Sets how the session's next tokens are chosen, and starts its random sequence anew: the n-th token that is chosen by
// chance takes the n-th number of the seed's sequence. params may be NULL for greedy, which is how a session starts. After
// an error the old choice stays. One thread at a time.
int32_t loris_session_set_sampling(struct loris_session *session,
                                   const struct loris_sampling_params *params);

// Chooses the next token from the session's logits; the session does not hold it until loris_session_decode or
// loris_session_push. LORIS_E_STATE if no logits are ready. Logits that an answer left on the device are read first, as
// in loris_session_logits. One thread at a time.
int32_t loris_session_sample(struct loris_session *session,
                             uint32_t *token);

// As loris_session_sample, of the tokens whose bits are set in allowed: bit token % 32 of allowed[token / 32], n_words in all,
// one for every 32 tokens of the vocabulary. LORIS_DEAD_END if there is none that may be chosen. One thread at a time. Since
// 0.6.
int32_t loris_session_sample_masked(struct loris_session *session,
                                    const uint32_t *allowed,
                                    size_t n_words,
                                    uint32_t *token);

// Gives, of the logits after the session's last token, the logarithms of the probabilities of n_tokens ids - logprobs has room
// for as many - and the n_top likeliest tokens, likeliest first; of equal ones the lower id comes first. n_top is at most the
// size of the vocabulary. They are those of the model: before temperature, penalties, biases and masks. Logits
// are read and LORIS_E_STATE given as in loris_session_logits, and nothing is copied. One thread at a time. Since 0.6.
int32_t loris_session_logprobs(struct loris_session *session,
                               const uint32_t *tokens,
                               size_t n_tokens,
                               float *logprobs,
                               struct loris_logprob *top,
                               size_t n_top);

// As loris_session_logprobs, of n_vocab logits that loris_session_score or loris_session_logits gave: for the tokens of a
// prompt. LORIS_E_NUMERIC if one of the logits is not finite. Any thread. Since 0.6.
int32_t loris_logprobs(const float *logits,
                       size_t n_vocab,
                       const uint32_t *tokens,
                       size_t n_tokens,
                       float *logprobs,
                       struct loris_logprob *top,
                       size_t n_top);

// Copies the logits after the session's last token. buf has room for cap floats; *n is set to the size of the
// vocabulary, also when buf is NULL and cap 0. LORIS_BUFFER_TOO_SMALL if cap is less than that. LORIS_E_STATE if none are
// ready: before the first token and after a truncation. An answer may have left them on the device: they are read, or
// computed once more, first, and where that fails (LORIS_E_DEVICE, or LORIS_KV_FULL: it takes a page a layer) that is
// the status. One thread at a time.
int32_t loris_session_logits(struct loris_session *session,
                             float *buf,
                             size_t cap,
                             size_t *n);

// Runs n tokens as loris_session_prefill does and shows on_logits the logits after each: for perplexity and the
// like. Anything but LORIS_OK, LORIS_E_IO as in loris_session_prefill among it, leaves the session as it was before the
// call. One thread at a time.
int32_t loris_session_score(struct loris_session *session,
                            const uint32_t *tokens,
                            size_t n,
                            loris_logits_callback on_logits,
                            void *user_data);

// Generates an answer from the session's logits, token by token. params may be NULL for the defaults.
//
// LORIS_OK: max_tokens were generated. LORIS_EOS: the model ended the answer. LORIS_STOP: a stop text or a stop token was reached.
// LORIS_DEAD_END: the mask of params allows no token that may be chosen. LORIS_E_CALLBACK: it said that it failed.
// LORIS_CTX_FULL, LORIS_KV_FULL: there is no room for more. LORIS_CANCELLED: on_token or loris_session_cancel stopped
// it. LORIS_E_STATE if no logits are ready.
//
// A token is shown once the session holds it. So after each of these, and after an error, the session holds the tokens
// that were shown and no other: call this again to go on, or loris_session_prefill with the next turn's tokens. (Versions
// before 0.5 held all but the last after most of these; a program that decodes the last one itself has it twice
// now.) A token that ends an answer is neither shown nor held. Where a call goes on with an answer, so does its text: a
// character whose bytes are in the tokens of both is shown by the second. One thread at a time.
int32_t loris_session_generate(struct loris_session *session,
                               const struct loris_generate_params *params);

// Opens a second session with the same tokens, logits and sampling parameters. Its random sequence is its own: the seed
// is the upper 53 bits of XXH3 (64 bits) over the first session's seed and the number of forks that came before since that was
// set, 8 bytes each, little-endian. (Before 0.5 a fork drew what the first session drew.) Pages are shared until one of
// the two writes to them. On LORIS_OK *fork is a handle for loris_session_free, else it is NULL. LORIS_E_STATE if tokens
// are queued. One thread at a time.
int32_t loris_session_fork(struct loris_session *session,
                           struct loris_session **fork);

// Forgets the tokens from len on; pages that only they needed are free at once. Queued tokens are dropped. The logits
// are gone unless nothing was forgotten. LORIS_E_STATE if what tokens from len on would see is gone, of a session that
// streams or evicts: loris_receipt.least_tokens and the message say how many can be kept, and nothing has changed. A len of 0
// always clears. (Before 0.5 such a session was cleared.) One thread at a time.
int32_t loris_session_truncate(struct loris_session *session,
                               uint64_t len);

// Copies the tokens in the session's cache. buf, cap and n as in loris_tokenize. One thread at a time.
int32_t loris_session_tokens(struct loris_session *session,
                             uint32_t *buf,
                             size_t cap,
                             size_t *n);

// Fills *receipt with what the session holds and has cost so far. One thread at a time.
int32_t loris_session_get_receipt(struct loris_session *session, struct loris_receipt *receipt);

// Writes the session - tokens, KV, logits, not the choice of tokens - into buf, which has room for cap bytes; *n is
// set to how many there are, also when buf is NULL and cap 0. LORIS_BUFFER_TOO_SMALL if cap is less than that.
// LORIS_E_STATE if tokens are queued. Logits that an answer left on the device are read first, as in
// loris_session_logits. The session does not change. One thread at a time.
int32_t loris_session_save(struct loris_session *session,
                           uint8_t *buf,
                           size_t cap,
                           size_t *n);

// As loris_session_save, into the file path (UTF-8). It is written beside its place under a name of its own, readable by
// its owner alone, synced, and moved there: after an error or a crash, and whoever else writes to path, the old file
// or a whole new one is there. A symbolic link stays and the file that it leads to is replaced. LORIS_E_IO, with the
// reason in the message, if that cannot be done, and for what is no regular file. One thread at a time.
int32_t loris_session_save_file(struct loris_session *session,
                                const char *path);

// Opens a session from the n bytes that loris_session_save wrote, in this process or another, for the same weights,
// config, KV format, and tokenizer if both models have one.
// The bytes are not trusted: LORIS_E_FORMAT names what is wrong with them, LORIS_KV_FULL says that there is no room
// for as many tokens, and no other session is given any of their KV. What a library before ABI 0.5 saved is
// LORIS_E_FORMAT without LORIS_TRUST_OLD_STATE. params may be NULL for the defaults. On
// LORIS_OK *session is a handle for loris_session_free, else it is NULL. Any thread.
int32_t loris_session_restore(const struct loris_model *model,
                              const uint8_t *bytes,
                              size_t n,
                              const struct loris_session_params *params,
                              struct loris_session **session);

// As loris_session_restore, from the file path (UTF-8). Any thread.
int32_t loris_session_restore_file(const struct loris_model *model,
                                   const char *path,
                                   const struct loris_session_params *params,
                                   struct loris_session **session);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* LORIS_H */
