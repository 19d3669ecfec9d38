/*
 * How a process ends, and what the library never does to it: exit COMMAND MODEL
 *
 * leave: returns from main while sessions are open, workers wait and another thread is in the middle of an answer.
 * quiet: calls that fail, in all ways, write nothing to stdout or stderr.
 * memory: with little address space, what does not fit is an error, and what fits works afterwards.
 */
#define _POSIX_C_SOURCE 200809L
#include <dlfcn.h>
#include <loris.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

enum { N_SESSIONS = 4, N_IDS = 256 };

static loris_engine *engine;
static loris_model *model;
static loris_session *sessions[N_SESSIONS];
static uint32_t ids[N_IDS];

static void must(int32_t status, const char *what) {
    char message[512];
    if (status == LORIS_OK) return;
    loris_last_error(message, sizeof message);
    fprintf(stderr, "%s: status %d: %s\n", what, (int)status, message);
    _exit(1);
}
#define MUST(call) must(call, #call)

static void open_model(const char *dir) {
    loris_engine_params engine_params;
    loris_model_params params;
    MUST(loris_engine_params_init(&engine_params, sizeof engine_params));
    engine_params.device = "cpu";
    engine_params.threads = 3;
    MUST(loris_engine_open(&engine_params, &engine));
    MUST(loris_model_params_init(&params, sizeof params));
    params.kv_tokens = 4096;
    MUST(loris_model_open(engine, dir, &params, &model));
}

static void open_sessions(void) {
    int i;
    for (i = 0; i < N_SESSIONS; i++) {
        MUST(loris_session_open(model, NULL, &sessions[i]));
        MUST(loris_session_prefill(sessions[i], ids, 64, NULL, NULL));
    }
}

/* ---- leave --------------------------------------------------------------------------------------------------- */

static int running[2]; /* a pipe: the answer has begun */

static int32_t on_token(void *user_data, uint32_t token, const char *text, size_t text_len) {
    int *n_tokens = user_data;
    (void)token, (void)text, (void)text_len;
    if (++*n_tokens == 3 && write(running[1], "", 1) != 1) return 1;
    return 0;
}

/* Answers for ever. */
static void *answer(void *session) {
    int n_tokens = 0;
    loris_generate_params params;
    MUST(loris_generate_params_init(&params, sizeof params));
    params.flags = LORIS_IGNORE_EOS;
    params.max_tokens = 100;
    params.on_token = on_token;
    params.user_data = &n_tokens;
    for (;;) {
        loris_session_generate(session, &params);
        MUST(loris_session_truncate(session, 1));
        MUST(loris_session_prefill(session, ids, 8, NULL, NULL));
    }
    return NULL;
}

static int leave(const char *dir) {
    pthread_t thread;
    char byte;
    open_model(dir);
    open_sessions();
    if (pipe(running) != 0 || pthread_create(&thread, NULL, answer, sessions[0]) != 0) return 1;
    return read(running[0], &byte, 1) == 1 ? 0 : 1;
}

/* ---- quiet --------------------------------------------------------------------------------------------------- */

static int32_t stop_loading(void *user_data, uint64_t done, uint64_t total) {
    (void)user_data, (void)done, (void)total;
    return 1;
}

static int n_wrong;

static void fails(int32_t expected, int32_t status) {
    n_wrong += status != expected;
}

static void fail_in_all_ways(const char *dir) {
    loris_engine *no_engine;
    loris_model *no_model;
    loris_session *none;
    loris_engine_params engine_params;
    loris_model_params params;
    loris_session_params session_params;
    loris_sampling_params sampling;
    uint32_t wrong = UINT32_MAX - 1, buf[4];
    size_t n;
    int32_t status, (*debug_panic)(loris_session *) = NULL;
    void *symbol = dlsym(dlopen(NULL, RTLD_NOW), "loris_debug_panic");
    MUST(loris_engine_params_init(&engine_params, sizeof engine_params));
    MUST(loris_model_params_init(&params, sizeof params));
    MUST(loris_session_params_init(&session_params, sizeof session_params));
    MUST(loris_sampling_params_init(&sampling, sizeof sampling));

    fails(LORIS_E_INVALID_ARG, loris_engine_open(NULL, NULL));
    engine_params.cuda_driver = "/nowhere/libcuda.so";
    engine_params.device = "cuda";
    fails(LORIS_E_NO_DEVICE, loris_engine_open(&engine_params, &no_engine));
    engine_params.device = "cpu";
    engine_params.flags = 8;
    fails(LORIS_E_INVALID_ARG, loris_engine_open(&engine_params, &no_engine));
    fails(LORIS_E_IO, loris_model_open(engine, "/nowhere", NULL, &no_model));
    fails(LORIS_E_INVALID_ARG, loris_model_open(engine, "\xff", NULL, &no_model));
    fails(LORIS_E_INVALID_ARG, loris_model_open((loris_engine *)model, dir, NULL, &no_model));
    params.progress = stop_loading;
    fails(LORIS_CANCELLED, loris_model_open(engine, dir, &params, &no_model));
    params.kv_tokens = (uint64_t)1 << 60;
    fails(LORIS_E_INVALID_ARG, loris_model_open(engine, dir, &params, &no_model));
    session_params.lazy = "balanced";
    fails(LORIS_E_INVALID_ARG, loris_session_open(model, &session_params, &none));
    sampling.temperature = -1;
    fails(LORIS_E_INVALID_ARG, loris_session_set_sampling(sessions[0], &sampling));
    fails(LORIS_E_INVALID_ARG, loris_tokenize(model, "\xff", 1, 0, buf, 4, &n));
    fails(LORIS_BUFFER_TOO_SMALL, loris_tokenize(model, "hello", 5, 0, buf, 4, &n));
    fails(LORIS_E_INVALID_ARG, loris_session_decode(sessions[0], wrong));
    fails(LORIS_CTX_FULL, loris_session_prefill(sessions[0], ids, N_IDS, NULL, NULL));
    MUST(loris_session_cancel(sessions[0]));
    fails(LORIS_CANCELLED, loris_session_prefill(sessions[0], ids, 8, NULL, NULL));
    MUST(loris_session_feed(sessions[0], ids, 8));
    fails(LORIS_E_STATE, loris_session_fork(sessions[0], &none));
    fails(LORIS_OK, loris_model_step(model, &none, 1, &status));
    fails(LORIS_E_INVALID_ARG, status);
    fails(LORIS_E_FORMAT, loris_session_restore(model, (const uint8_t *)"junk", 4, NULL, &none));
    fails(LORIS_E_IO, loris_session_restore_file(model, "/nowhere", NULL, &none));
    fails(LORIS_E_IO, loris_session_save_file(sessions[1], "/nowhere/session"));
    if (!symbol) return;
    memcpy(&debug_panic, &symbol, sizeof symbol); /* ISO C has no cast for it */
    fails(LORIS_E_PANIC, debug_panic(sessions[2]));
    fails(LORIS_E_POISONED, loris_session_decode(sessions[2], ids[0]));
}

static int quiet(const char *dir) {
    char said[4096];
    int out = dup(1), err = dup(2), both[2], i;
    ssize_t n;
    if (pipe(both) != 0 || dup2(both[1], 1) < 0 || dup2(both[1], 2) < 0) return 1;
    open_model(dir);
    open_sessions();
    fail_in_all_ways(dir);
    for (i = 0; i < N_SESSIONS; i++) loris_session_free(sessions[i]);
    loris_model_free(model);
    loris_engine_free(engine);
    if (dup2(out, 1) < 0 || dup2(err, 2) < 0) return 1;
    close(both[1]);
    n = read(both[0], said, sizeof said - 1);
    if (n == 0 && n_wrong == 0) return 0;
    said[n > 0 ? n : 0] = '\0';
    printf("%d unexpected statuses; the library said: %s\n", n_wrong, said);
    return 1;
}

/* ---- memory -------------------------------------------------------------------------------------------------- */

static int memory(const char *dir) {
    struct rlimit limit = {(rlim_t)1 << 30, (rlim_t)1 << 30};
    loris_model *large;
    loris_model_params params;
    char text[512];
    if (setrlimit(RLIMIT_AS, &limit) != 0) return 1;
    open_model(dir);
    MUST(loris_model_params_init(&params, sizeof params));
    params.kv_tokens = (uint64_t)1 << 24; /* 8 GiB */
    fails(LORIS_E_OOM_HOST, loris_model_open(engine, dir, &params, &large));
    loris_last_error(text, sizeof text);
    n_wrong += strstr(text, "pool") == NULL || large != NULL;
    params.kv_tokens = 1024;
    params.chunk = 65536;
    params.batch = 4096;
    fails(LORIS_OK, loris_model_open(engine, dir, &params, &large));
    loris_model_free(large);
    open_sessions();
    if (n_wrong > 0) printf("%d unexpected; the last message is: %s\n", n_wrong, text);
    return n_wrong > 0;
}

int main(int argc, char **argv) {
    uint32_t i;
    if (argc != 3) {
        fprintf(stderr, "usage: exit leave|quiet|memory MODEL\n");
        return 2;
    }
    for (i = 0; i < N_IDS; i++) ids[i] = 5 + i % 90;
    if (strcmp(argv[1], "quiet") == 0) return quiet(argv[2]);
    if (strcmp(argv[1], "memory") == 0) return memory(argv[2]);
    return leave(argv[2]);
}
