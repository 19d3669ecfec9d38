/*
 * Many sequences at once, in both ways that there are: one thread that steps many sessions in one pass, and many
 * threads with sessions of their own. The tokens are the same as one session alone gives, which is checked.
 *
 *     cc batch.c $(pkg-config --cflags --libs loris) -pthread -o batch
 *     ./batch models/SmolLM2-135M-Instruct
 */
#define _POSIX_C_SOURCE 200809L
#include <loris.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { N_SESSIONS = 8, N_THREADS = 4, N_TOKENS = 24, MAX_PROMPT = 64 };

static const char *const TEXTS[N_SESSIONS] = {
    "The sky is",         "Once upon a time", "Bread is made of", "A good name for a cat is",
    "The capital of Peru", "In the year 1815", "Rust is",          "Two and two are",
};

typedef struct {
    uint32_t tokens[N_TOKENS];
    size_t n;
} output;

static const loris_model *model; /* any thread may use it */
static uint32_t prompts[N_SESSIONS][MAX_PROMPT];
static size_t prompt_lens[N_SESSIONS];

static void check(int32_t status, const char *what) {
    char message[512];
    if (status == LORIS_OK) return;
    loris_last_error(message, sizeof message);
    fprintf(stderr, "%s: status %d: %s\n", what, (int)status, message);
    exit(1);
}

static int32_t on_token(void *user_data, uint32_t token, const char *text, size_t text_len) {
    output *out = user_data;
    (void)text;
    (void)text_len;
    if (token != LORIS_NO_TOKEN) out->tokens[out->n++] = token;
    return 0;
}

/* One session from start to end. */
static void run_alone(int i, output *out) {
    loris_session *session;
    loris_generate_params params;
    int32_t end;
    out->n = 0;
    check(loris_generate_params_init(&params, sizeof params), "generate");
    params.flags = LORIS_IGNORE_EOS;
    params.max_tokens = N_TOKENS;
    params.on_token = on_token;
    params.user_data = out;
    check(loris_session_open(model, NULL, &session), "session");
    check(loris_session_prefill(session, prompts[i], prompt_lens[i], NULL, NULL), "prefill");
    end = loris_session_generate(session, &params);
    check(end, "generate");
    loris_session_free(session);
}

/* All sessions, a pass for all of them at a time: the weights are read once a pass and not once a session. */
static void run_stepped(output *outs) {
    loris_session *sessions[N_SESSIONS];
    int32_t statuses[N_SESSIONS];
    int i, n_left = N_SESSIONS;
    for (i = 0; i < N_SESSIONS; i++) {
        outs[i].n = 0;
        check(loris_session_open(model, NULL, &sessions[i]), "session");
        check(loris_session_feed(sessions[i], prompts[i], prompt_lens[i]), "feed");
    }
    while (n_left > 0) {
        check(loris_model_step(model, sessions, N_SESSIONS, statuses), "step");
        for (i = 0; i < N_SESSIONS; i++) {
            uint32_t token;
            if (statuses[i] == LORIS_PENDING || statuses[i] == LORIS_IDLE) continue; /* more to do; all done */
            check(statuses[i], "a session of the step");
            check(loris_session_sample(sessions[i], &token), "sample");
            outs[i].tokens[outs[i].n++] = token;
            if (outs[i].n == N_TOKENS) n_left--;
            else check(loris_session_push(sessions[i], token), "push");
        }
    }
    for (i = 0; i < N_SESSIONS; i++) loris_session_free(sessions[i]);
}

typedef struct {
    pthread_t thread;
    int first; /* its sessions are first, first + N_THREADS, ... */
    output *outs;
} worker;

static void *run_worker(void *data) {
    worker *w = data;
    int i;
    for (i = w->first; i < N_SESSIONS; i += N_THREADS) run_alone(i, &w->outs[i]);
    return NULL;
}

static void run_threaded(output *outs) {
    worker workers[N_THREADS];
    int t;
    for (t = 0; t < N_THREADS; t++) {
        workers[t].first = t;
        workers[t].outs = outs;
        if (pthread_create(&workers[t].thread, NULL, run_worker, &workers[t]) != 0) abort();
    }
    for (t = 0; t < N_THREADS; t++) pthread_join(workers[t].thread, NULL);
}

static void compare(const char *way, const output *outs, const output *alone) {
    int i;
    for (i = 0; i < N_SESSIONS; i++) {
        if (outs[i].n == alone[i].n && memcmp(outs[i].tokens, alone[i].tokens, sizeof alone[i].tokens) == 0) continue;
        fprintf(stderr, "%s: session %d differs from the same session alone\n", way, i);
        exit(1);
    }
    printf("%s: %d sessions of %d tokens, as alone\n", way, N_SESSIONS, N_TOKENS);
}

int main(int argc, char **argv) {
    static output alone[N_SESSIONS], outs[N_SESSIONS];
    loris_engine *engine;
    loris_model *opened;
    loris_model_params params;
    int i;

    if (argc != 2) {
        fprintf(stderr, "usage: batch DIR\n");
        return 2;
    }
    check(loris_engine_open(NULL, &engine), "engine");
    check(loris_model_params_init(&params, sizeof params), "model");
    /* Room for all of them, whole pages each, and passes that take all of them. */
    params.kv_tokens = N_SESSIONS * (uint64_t)(MAX_PROMPT + N_TOKENS + params.page_len);
    params.batch = N_SESSIONS;
    check(loris_model_open(engine, argv[1], &params, &opened), argv[1]);
    model = opened;

    for (i = 0; i < N_SESSIONS; i++) {
        check(loris_tokenize(model, TEXTS[i], strlen(TEXTS[i]), LORIS_ADD_EDGES, prompts[i], MAX_PROMPT,
                             &prompt_lens[i]), "tokenize");
    }
    for (i = 0; i < N_SESSIONS; i++) run_alone(i, &alone[i]);
    run_stepped(outs);
    compare("one thread, stepped", outs, alone);
    run_threaded(outs);
    compare("four threads", outs, alone);

    loris_model_free(opened);
    loris_engine_free(engine);
    return 0;
}
