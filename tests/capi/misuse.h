/*
 * What hosts do wrong, a line each: PROGRAM MODEL OTHER BARE DYNAMIC FOLDER
 *
 * MODEL has a tokenizer and a chat template, OTHER has other weights, BARE has neither tokenizer nor template,
 * DYNAMIC stretches its positions (so that a context may have any length), FOLDER is for files. Lines that do not
 * hold are printed; the exit code is 1 if there are any.
 *
 * This header is what the programs misuse*.c share, main included; each has its cases.
 */
#ifndef MISUSE_H
#define MISUSE_H
#include <loris.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void run_cases(void);

static int n_cases, n_failed;

/* ---- Judging ------------------------------------------------------------------------------------------------- */

static char message[1024];

/* Leaves a message of its own for the thread, so that a call that leaves none is found out. */
static inline void mark(void) {
    loris_has_feature(NULL);
}

static inline const char *last_message(void) {
    loris_last_error(message, sizeof message);
    return message;
}

static inline void count(int line, const char *what, const char *wrong) {
    n_cases++;
    if (!wrong) return;
    n_failed++;
    printf("FAILED, line %d: %s: %s\n", line, what, wrong);
}

/* Cancelled, no room, a dead end and errors leave a message; other statuses are results and leave none. */
static inline const char *wrong_status(int32_t expected, int32_t got) {
    static char wrong[1600];
    int fails = got < 0 || (got >= LORIS_CANCELLED && got <= LORIS_KV_FULL) || got == LORIS_DEAD_END;
    int is_marked = strcmp(last_message(), "name: is NULL") == 0;
    if (got != expected) {
        snprintf(wrong, sizeof wrong, "status %d, expected %d (%s)", (int)got, (int)expected, message);
        return wrong;
    }
    if (fails && (is_marked || loris_last_error_status() != got || !message[0])) return "left no message";
    if (!fails && !is_marked) return "is a result and left a message";
    return NULL;
}

#define CASE(expected, call) (mark(), count(__LINE__, #call, wrong_status(expected, call)))
#define HOLDS(condition) count(__LINE__, #condition, (condition) ? NULL : "does not hold")
#define SAYS(word) count(__LINE__, "the message", strstr(last_message(), word) ? NULL : message)

static inline void must(int line, int32_t status) {
    if (status == LORIS_OK) return;
    printf("line %d: status %d: %s\n", line, (int)status, last_message());
    exit(1);
}
#define MUST(call) must(__LINE__, call)

/* What a session is. */
typedef struct {
    loris_receipt receipt;
    uint32_t tokens[512];
    size_t n_tokens;
    int32_t has_logits;
    float logits[256];
} snapshot;

static inline void take(loris_session *session, snapshot *s) {
    size_t n;
    memset(s, 0, sizeof *s);
    s->receipt.struct_size = sizeof s->receipt;
    MUST(loris_session_get_receipt(session, &s->receipt));
    MUST(loris_session_tokens(session, s->tokens, 512, &s->n_tokens));
    s->has_logits = loris_session_logits(session, s->logits, 256, &n);
}

static snapshot before, after;

static inline const char *wrong_or_changed(loris_session *session, const char *wrong) {
    take(session, &after);
    if (wrong) return wrong;
    return memcmp(&before, &after, sizeof before) != 0 ? "the session or its receipt changed" : NULL;
}

/* A call that does not do what it was asked to, and leaves the session as it was. */
#define KEPT(session, expected, call)                                                                                  \
    (take(session, &before), mark(),                                                                                   \
     count(__LINE__, #call, wrong_or_changed(session, wrong_status(expected, call))))

/* ---- What the cases are about -------------------------------------------------------------------------------- */

enum { N_IDS = 256, PAGE_LEN = 16, CHUNK = 16 };

static const char *dir, *other_dir, *bare_dir, *dynamic_dir, *folder;
static loris_engine *engine;
static loris_model *model;
static uint32_t ids[N_IDS];
static size_t n;

static inline loris_model *open_model(const char *from, uint64_t kv_tokens) {
    loris_model *opened;
    loris_model_params params;
    MUST(loris_model_params_init(&params, sizeof params));
    params.kv_tokens = kv_tokens;
    params.page_len = PAGE_LEN;
    params.chunk = CHUNK;
    params.batch = 4;
    MUST(loris_model_open(engine, from, &params, &opened));
    return opened;
}

static inline loris_session *open_session(const loris_model *on) {
    loris_session *session;
    MUST(loris_session_open(on, NULL, &session));
    return session;
}

/* With n_tokens of a prompt in it. */
static inline loris_session *open_filled(const loris_model *on, size_t n_tokens) {
    loris_session *session = open_session(on);
    MUST(loris_session_prefill(session, ids, n_tokens, NULL, NULL));
    return session;
}

static inline uint64_t pages_used(const loris_model *of) {
    loris_kv_info info;
    info.struct_size = sizeof info;
    MUST(loris_model_get_kv_info(of, &info));
    return info.n_used;
}

static inline uint32_t *odd(void *pointer) {
    return (uint32_t *)((char *)pointer + 1);
}

static inline void ignore_logits(void *data, size_t idx, const float *logits, size_t n_vocab) {
    (void)data, (void)idx, (void)logits, (void)n_vocab;
}

static inline int32_t stop_at_once(void *data, uint64_t done, uint64_t total) {
    (void)data, (void)done, (void)total;
    return 1;
}

static inline int32_t count_calls(void *data, uint64_t done, uint64_t total) {
    (void)done, (void)total;
    return ++*(int *)data < 0;
}

int main(int argc, char **argv) {
    loris_engine_params params;
    size_t i;
    if (argc != 6) {
        fprintf(stderr, "usage: %s MODEL OTHER BARE DYNAMIC FOLDER\n", argv[0]);
        return 2;
    }
    dir = argv[1], other_dir = argv[2], bare_dir = argv[3], dynamic_dir = argv[4], folder = argv[5];
    for (i = 0; i < N_IDS; i++) ids[i] = 5 + (uint32_t)(i * 7 % 90);
    MUST(loris_engine_params_init(&params, sizeof params));
    params.device = "cpu";
    params.threads = 2;
    MUST(loris_engine_open(&params, &engine));
    model = open_model(dir, 1024);

    run_cases();

    HOLDS(pages_used(model) == 0);
    loris_model_free(model);
    loris_engine_free(engine);
    printf("%d lines, %d failed\n", n_cases, n_failed);
    return n_failed > 0;
}

#endif
