/* Calls at the wrong time, from the wrong place, and too many. See misuse.h. */
#define _POSIX_C_SOURCE 200809L
#include "misuse.h"

#include <dlfcn.h>
#include <pthread.h>

static uint32_t buf[N_IDS];

/* ---- Threads and callbacks ----------------------------------------------------------------------------------- */

/* Everything that one call at a time may do, while another call runs. */
static void meddle(loris_session *session) {
    const int32_t busy = LORIS_E_BUSY;
    loris_session *none = NULL;
    int32_t status;
    loris_receipt receipt;
    receipt.struct_size = sizeof receipt;
    CASE(busy, loris_session_prefill(session, ids, 1, NULL, NULL));
    CASE(busy, loris_session_decode(session, 5));
    CASE(busy, loris_session_feed(session, ids, 1));
    CASE(busy, loris_session_push(session, 5));
    CASE(busy, loris_session_clear(session));
    CASE(busy, loris_session_set_sampling(session, NULL));
    CASE(busy, loris_session_sample(session, buf));
    CASE(busy, loris_session_sample_masked(session, buf, 4, buf));
    CASE(busy, loris_session_logprobs(session, NULL, 0, NULL, NULL, 0));
    CASE(busy, loris_session_logits(session, NULL, 0, &n));
    CASE(busy, loris_session_score(session, ids, 1, ignore_logits, NULL));
    CASE(busy, loris_session_generate(session, NULL));
    CASE(busy, loris_session_fork(session, &none));
    HOLDS(none == NULL);
    CASE(busy, loris_session_truncate(session, 0));
    CASE(busy, loris_session_tokens(session, NULL, 0, &n));
    CASE(busy, loris_session_get_receipt(session, &receipt));
    CASE(busy, loris_session_save(session, NULL, 0, &n));
    CASE(busy, loris_session_save_file(session, "/nowhere"));
    mark();
    status = LORIS_OK;
    HOLDS(loris_model_step(model, &session, 1, &status) == LORIS_OK && status == busy);
    CASE(LORIS_OK, loris_session_cancel(session));
    CASE(LORIS_OK, loris_session_uncancel(session));
}

static void *meddle_elsewhere(void *session) {
    HOLDS(loris_last_error_status() == LORIS_OK && loris_last_error(message, sizeof message) == 0);
    meddle(session);
    return NULL;
}

typedef struct {
    loris_session *session;
    int n_calls;
    int cancels; /* the call that it is made in */
} meddler;

static void meddle_from(meddler *m) {
    pthread_t thread;
    if (m->n_calls++ == 0) {
        meddle(m->session);
        loris_session_clear(m->session);
        if (pthread_create(&thread, NULL, meddle_elsewhere, m->session) != 0) abort();
        pthread_join(thread, NULL);
        /* What this thread did last is still its own: the other one's failures are not seen here. */
        HOLDS(loris_last_error_status() == LORIS_E_BUSY);
    }
    if (m->cancels) loris_session_cancel(m->session);
}

static int32_t meddle_on_token(void *data, uint32_t token, const char *text, size_t text_len) {
    (void)token, (void)text, (void)text_len;
    meddle_from(data);
    return 0;
}

static int32_t meddle_on_progress(void *data, uint64_t done, uint64_t total) {
    (void)done, (void)total;
    meddle_from(data);
    return 0;
}

static void meddle_on_logits(void *data, size_t idx, const float *logits, size_t n_vocab) {
    (void)idx, (void)logits, (void)n_vocab;
    meddle_from(data);
}

/* A callback may use everything but its own session. */
static int32_t use_another(void *data, uint32_t token, const char *text, size_t text_len) {
    loris_session *another = open_filled(model, 20);
    (void)data, (void)token, (void)text, (void)text_len;
    CASE(LORIS_OK, loris_session_decode(another, 7));
    loris_session_free(another);
    return 0;
}

static void threads_and_callbacks(void) {
    loris_session *session = open_session(model);
    loris_generate_params params;
    meddler m = {session, 0, 0};
    MUST(loris_generate_params_init(&params, sizeof params));
    params.flags = LORIS_IGNORE_EOS;
    params.max_tokens = 4;
    params.on_token = meddle_on_token;
    params.user_data = &m;
    HOLDS(loris_session_prefill(session, ids, 3 * CHUNK, meddle_on_progress, &m) == LORIS_OK && m.n_calls > 0);
    m.n_calls = 0;
    HOLDS(loris_session_generate(session, &params) == LORIS_OK);
    HOLDS(m.n_calls >= 4);
    m.n_calls = 0;
    HOLDS(loris_session_score(session, ids, 3, meddle_on_logits, &m) == LORIS_OK && m.n_calls == 3);

    /* Cancelled from its own callback. */
    m.cancels = 1;
    m.n_calls = 1;
    MUST(loris_session_prefill(session, ids, 3, NULL, NULL));
    CASE(LORIS_CANCELLED, loris_session_generate(session, &params));
    HOLDS(m.n_calls == 2); /* one token was shown */
    loris_session_free(session);

    session = open_filled(model, 8);
    params.on_token = use_another;
    CASE(LORIS_OK, loris_session_generate(session, &params));
    loris_session_free(session);
}

static int32_t cancel_in_progress(void *data, uint64_t done, uint64_t total) {
    (void)done, (void)total;
    return loris_session_cancel(data) != LORIS_OK;
}

static void cancelling(void) {
    loris_session *session = open_filled(model, 8);
    loris_generate_params params;
    int32_t status;
    int n_calls = 0;
    MUST(loris_generate_params_init(&params, sizeof params));
    params.flags = LORIS_IGNORE_EOS;
    params.max_tokens = 1;

    /* Before: the next call that computes is stopped, and no other. */
#define CANCELLED(call) (MUST(loris_session_cancel(session)), call)
    KEPT(session, LORIS_CANCELLED, CANCELLED(loris_session_prefill(session, ids, 8, NULL, NULL)));
    KEPT(session, LORIS_CANCELLED, CANCELLED(loris_session_decode(session, 5)));
    KEPT(session, LORIS_CANCELLED, CANCELLED(loris_session_score(session, ids, 8, ignore_logits, NULL)));
    KEPT(session, LORIS_CANCELLED, CANCELLED(loris_session_generate(session, &params)));
    MUST(loris_session_uncancel(session));
    params.max_tokens = 4;
    HOLDS(CANCELLED(loris_session_generate(session, &params)) == LORIS_CANCELLED);
    KEPT(session, LORIS_OK, CANCELLED(loris_session_tokens(session, buf, N_IDS, &n)));
    KEPT(session, LORIS_OK, (loris_session_uncancel(session), loris_session_sample(session, buf)));
    CASE(LORIS_OK, loris_session_decode(session, 5)); /* each cancel stopped one call */
    CASE(LORIS_OK, (loris_session_cancel(session), loris_session_cancel(session), loris_session_uncancel(session),
                    loris_session_decode(session, 5)));
    CASE(LORIS_OK, loris_session_uncancel(session));

    /* During, by the callback's answer and by loris_session_cancel; what was computed of the prompt is dropped. */
#define PREFILL(progress, data) loris_session_prefill(session, ids + 8, 4 * CHUNK, progress, data)
    KEPT(session, LORIS_CANCELLED, PREFILL(cancel_in_progress, session));
    KEPT(session, LORIS_CANCELLED, PREFILL(stop_at_once, NULL));
    CASE(LORIS_OK, PREFILL(count_calls, &n_calls));
    HOLDS(n_calls == 4); /* after each chunk */

    /* Steps. */
    MUST(loris_session_feed(session, ids, 8));
    KEPT(session, LORIS_CANCELLED, CANCELLED(loris_model_step(model, &session, 1, &status)) == LORIS_OK ? status : -99);
    CASE(LORIS_OK, loris_model_step(model, &session, 1, &status)); /* what was queued is still there */
    HOLDS(status == LORIS_OK);
    loris_session_free(session);
}

static void queues(void) {
    loris_session *a = open_filled(model, 8), *b = open_filled(model, 10), *foreign, *none = NULL;
    loris_session *list[4];
    static uint8_t saved_bytes[1 << 16];
    loris_model *other = open_model(other_dir, 256);
    int32_t statuses[4];
    foreign = open_filled(other, 8);

    MUST(loris_session_feed(a, ids, 2 * CHUNK));
    KEPT(a, LORIS_E_STATE, loris_session_feed(a, ids, 1));
    KEPT(a, LORIS_E_STATE, loris_session_push(a, 5));
    KEPT(a, LORIS_E_STATE, loris_session_prefill(a, ids, 1, NULL, NULL));
    KEPT(a, LORIS_E_STATE, loris_session_decode(a, 5));
    KEPT(a, LORIS_E_STATE, loris_session_score(a, ids, 1, ignore_logits, NULL));
    KEPT(a, LORIS_E_STATE, loris_session_fork(a, &none));
    HOLDS(none == NULL);
    KEPT(a, LORIS_E_STATE, loris_session_save(a, (uint8_t *)saved_bytes, sizeof saved_bytes, &n));
    KEPT(a, LORIS_E_STATE, loris_session_save(a, NULL, 0, &n));
    KEPT(a, LORIS_E_STATE, loris_session_save_file(a, "never-written"));

    /* A token and a prompt that takes all rows of the pass for prompts: the token's session is done all the same. */
    MUST(loris_session_push(b, 5));
    list[0] = a, list[1] = b;
    CASE(LORIS_OK, loris_model_step(model, list, 2, statuses));
    HOLDS(statuses[0] == LORIS_PENDING);
    HOLDS(statuses[1] == LORIS_OK);
    MUST(loris_session_clear(a));
    MUST(loris_session_feed(a, ids, 2 * CHUNK));

    /* One list with everything that can be wrong with it. Each gets its own status, and the good ones go on. */
    MUST(loris_session_push(b, 5));
    MUST(loris_session_push(foreign, 5));
    list[0] = b, list[1] = NULL, list[2] = b, list[3] = foreign;
    HOLDS(loris_model_step(model, list, 4, statuses) == LORIS_OK);
    HOLDS(statuses[0] == LORIS_OK && statuses[1] == LORIS_E_INVALID_ARG);
    HOLDS(statuses[2] == LORIS_E_BUSY && statuses[3] == LORIS_E_STATE);
    HOLDS(loris_last_error_status() == LORIS_E_INVALID_ARG); /* of the first that failed */
    CASE(LORIS_OK, loris_model_step(model, &b, 1, statuses));
    HOLDS(statuses[0] == LORIS_IDLE);
    CASE(LORIS_OK, loris_model_step(model, &a, 1, statuses));
    HOLDS(statuses[0] == LORIS_PENDING);
    KEPT(a, LORIS_E_STATE, loris_session_feed(a, ids, 1));
    CASE(LORIS_OK, loris_session_clear(a));
    CASE(LORIS_OK, loris_session_fork(a, &none));
    loris_session_free(none);
    loris_session_free(a);
    loris_session_free(b);
    loris_session_free(foreign);
    loris_model_free(other);
}

typedef struct {
    uint32_t tokens[64];
    size_t n, most;
} shown;

static int32_t show(void *data, uint32_t token, const char *text, size_t text_len) {
    shown *s = data;
    (void)text, (void)text_len;
    if (token != LORIS_NO_TOKEN) s->tokens[s->n++] = token;
    return s->n >= s->most;
}

/* The session holds its first n_prompt ids and what was shown, and nothing else; how much is what a first answer was. */
static int holds(loris_session *session, size_t n_prompt, const shown *s, const shown *whole) {
    uint32_t held[N_IDS];
    size_t n_held;
    MUST(loris_session_tokens(session, held, N_IDS, &n_held));
    return n_held == n_prompt + s->n && memcmp(held, ids, n_prompt * sizeof *held) == 0 &&
           memcmp(held + n_prompt, s->tokens, s->n * sizeof *held) == 0 &&
           memcmp(s->tokens, whole->tokens, s->n * sizeof *held) == 0;
}

/* Each end of an answer. Whatever it is, the next call goes on from there. */
static void ends(void) {
    enum { N_PROMPT = 8, N_WHOLE = 12 };
    const int32_t expected[] = {LORIS_OK, LORIS_STOP, LORIS_CTX_FULL, LORIS_CANCELLED};
    shown whole = {{0}, 0, 64};
    loris_session *session = open_filled(model, N_PROMPT);
    loris_generate_params params;
    loris_session_params session_params;
    char text[16];
    const char *stop = text;
    size_t i, at = 0;
    MUST(loris_generate_params_init(&params, sizeof params));
    params.flags = LORIS_IGNORE_EOS;
    params.max_tokens = N_WHOLE;
    params.on_token = show;
    params.user_data = &whole;
    CASE(LORIS_OK, loris_session_generate(session, &params));
    HOLDS(whole.n == N_WHOLE && holds(session, N_PROMPT, &whole, &whole));
    loris_session_free(session);
    for (n = 0; n == 0 && at < N_WHOLE; at++) MUST(loris_detokenize(model, whole.tokens + at, 1, 0, text, sizeof text, &n));
    HOLDS(n > 0);
    for (i = 0; i < sizeof expected / sizeof *expected; i++) {
        shown part = {{0}, 0, expected[i] == LORIS_CANCELLED ? 3 : 64};
        MUST(loris_session_params_init(&session_params, sizeof session_params));
        if (expected[i] == LORIS_CTX_FULL) session_params.ctx_len = N_PROMPT + 4;
        MUST(loris_session_open(model, &session_params, &session));
        MUST(loris_session_prefill(session, ids, N_PROMPT, NULL, NULL));
        params.max_tokens = expected[i] == LORIS_OK ? 5 : 64;
        params.stop = &stop;
        params.n_stop = expected[i] == LORIS_STOP;
        params.user_data = &part;
        CASE(expected[i], loris_session_generate(session, &params));
        HOLDS(part.n > 0 && part.n <= 5 + at && holds(session, N_PROMPT, &part, &whole));
        if (expected[i] != LORIS_CTX_FULL) {
            part.most = 64;
            params.n_stop = 0;
            params.max_tokens = N_WHOLE - part.n;
            if (part.n < N_WHOLE) CASE(LORIS_OK, loris_session_generate(session, &params));
            HOLDS(part.n == N_WHOLE && holds(session, N_PROMPT, &part, &whole));
        }
        loris_session_free(session);
    }
}

static void full_pools(void) {
    loris_model *small = open_model(dir, 64);
    loris_session *a = open_filled(small, 33), *b = open_session(small), *list[2];
    loris_generate_params params;
    shown part = {{0}, 0, 64};
    int32_t statuses[2];
    uint32_t others[64];
    size_t i;
    for (i = 0; i < 64; i++) others[i] = 6 + (uint32_t)(i % 90);
    others[0] = 90;

    /* a holds 3 of 4 columns. Another prompt of two does not fit, one that shares a's pages and one more does not. */
    KEPT(b, LORIS_KV_FULL, loris_session_prefill(b, others, 32, NULL, NULL));
    KEPT(b, LORIS_KV_FULL, loris_session_prefill(b, ids, 64, NULL, NULL));
    KEPT(b, LORIS_KV_FULL, loris_session_score(b, others, 32, ignore_logits, NULL));
    MUST(loris_session_feed(b, ids, 64));
    list[0] = b;
    take(b, &before);
    while (loris_model_step(small, list, 1, statuses) == LORIS_OK && statuses[0] == LORIS_PENDING) take(b, &before);
    HOLDS(statuses[0] == LORIS_KV_FULL);
    take(b, &after);
    HOLDS(memcmp(&before, &after, sizeof before) == 0); /* shared pages were given back */
    MUST(loris_session_truncate(b, 0));

    /* Generating until there is no more room, and on after there is. */
    MUST(loris_session_prefill(b, others, 8, NULL, NULL));
    MUST(loris_generate_params_init(&params, sizeof params));
    params.flags = LORIS_IGNORE_EOS;
    params.on_token = show;
    params.user_data = &part;
    CASE(LORIS_KV_FULL, loris_session_generate(a, &params));
    HOLDS(part.n == 15 && holds(a, 33, &part, &part));
    KEPT(a, LORIS_KV_FULL, loris_session_decode(a, 5));
    loris_session_free(b);
    CASE(LORIS_OK, loris_session_decode(a, 5));
    loris_session_free(a);
    HOLDS(pages_used(small) == 0);
    loris_model_free(small);
}

/* ---- Panics -------------------------------------------------------------------------------------------------- */

static void poison(void) {
    const int32_t poisoned = LORIS_E_POISONED;
    int32_t (*debug_panic)(loris_session *) = NULL;
    void *self = dlopen(NULL, RTLD_NOW), *symbol = dlsym(self, "loris_debug_panic");
    uint64_t n_before = pages_used(model);
    loris_session *session = open_filled(model, 40), *well = open_filled(model, 8), *none = NULL, *list[2];
    int32_t statuses[2];
    memcpy(&debug_panic, &symbol, sizeof symbol); /* ISO C has no cast for it */
    if (!debug_panic) {
        printf("left out: the library has no loris_debug_panic\n");
    } else {
        CASE(LORIS_E_PANIC, debug_panic(session));
        SAYS("report");
        CASE(poisoned, debug_panic(session));
        CASE(poisoned, loris_session_prefill(session, ids, 1, NULL, NULL));
        CASE(poisoned, loris_session_decode(session, 5));
        CASE(poisoned, loris_session_feed(session, ids, 1));
        CASE(poisoned, loris_session_push(session, 5));
        CASE(poisoned, loris_session_clear(session));
        CASE(poisoned, loris_session_set_sampling(session, NULL));
        CASE(poisoned, loris_session_sample(session, buf));
        CASE(poisoned, loris_session_sample_masked(session, buf, 4, buf));
        CASE(poisoned, loris_session_logprobs(session, NULL, 0, NULL, NULL, 0));
        CASE(poisoned, loris_session_logits(session, NULL, 0, &n));
        CASE(poisoned, loris_session_score(session, ids, 1, ignore_logits, NULL));
        CASE(poisoned, loris_session_generate(session, NULL));
        CASE(poisoned, loris_session_fork(session, &none));
        CASE(poisoned, loris_session_truncate(session, 0));
        CASE(poisoned, loris_session_tokens(session, NULL, 0, &n));
        CASE(poisoned, loris_session_get_receipt(session, &(loris_receipt){.struct_size = sizeof(loris_receipt)}));
        CASE(poisoned, loris_session_save(session, NULL, 0, &n));
        CASE(poisoned, loris_session_save_file(session, "/nowhere"));
        CASE(LORIS_OK, loris_session_cancel(session));
        CASE(LORIS_OK, loris_session_uncancel(session));
        HOLDS(none == NULL);

        /* The model and its other sessions go on. */
        MUST(loris_session_push(well, 5));
        list[0] = session, list[1] = well;
        HOLDS(loris_model_step(model, list, 2, statuses) == LORIS_OK);
        HOLDS(statuses[0] == poisoned && statuses[1] == LORIS_OK);
        CASE(LORIS_OK, loris_session_decode(well, 6));
        CASE(LORIS_OK, loris_session_fork(well, &none));
    }
    loris_session_free(none);
    loris_session_free(session);
    loris_session_free(well);
    HOLDS(pages_used(model) == n_before);
    dlclose(self);
}

static void run_cases(void) {
    threads_and_callbacks();
    cancelling();
    queues();
    ends();
    full_pools();
    poison();
}
