/*
 * A conversation, one line of stdin a turn. Ctrl-C stops an answer; at the prompt it leaves, as Ctrl-D does.
 *
 *     cc chat.c $(pkg-config --cflags --libs loris) -pthread -o chat
 *     ./chat models/SmolLM2-135M-Instruct
 *
 * Each turn puts the whole conversation through the model's template and computes only what the session does not
 * hold yet: a template may rewrite history as it likes, and a turn costs no more than what it adds.
 */
#define _POSIX_C_SOURCE 200809L
#include <loris.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const char *explain(void) {
    static char message[512];
    loris_last_error(message, sizeof message);
    return message;
}

static void check(int32_t status, const char *what) {
    if (status == LORIS_OK) return;
    fprintf(stderr, "%s: status %d: %s\n", what, (int)status, explain());
    exit(1);
}

static void *grow(void *old, size_t size) {
    void *new = realloc(old, size);
    if (!new) {
        fprintf(stderr, "out of memory\n");
        exit(1);
    }
    return new;
}

/* ---- Ctrl-C -------------------------------------------------------------------------------------------------- */

/* A signal handler must not call loris. So SIGINT is blocked everywhere and one thread waits for it. */
static struct {
    pthread_mutex_t lock;
    loris_session *answering; /* what Ctrl-C stops; NULL: nothing */
    int leaving;
} interrupt = {PTHREAD_MUTEX_INITIALIZER, NULL, 0};

static void *wait_for_interrupts(void *signals) {
    for (;;) {
        int signal, leaving;
        sigwait(signals, &signal);
        pthread_mutex_lock(&interrupt.lock);
        leaving = interrupt.leaving;
        if (!leaving && !interrupt.answering) _exit(130); /* at the prompt */
        if (interrupt.answering) loris_session_cancel(interrupt.answering);
        pthread_mutex_unlock(&interrupt.lock);
        if (leaving) return NULL;
    }
}

static void set_answering(loris_session *session) {
    pthread_mutex_lock(&interrupt.lock);
    interrupt.answering = session;
    pthread_mutex_unlock(&interrupt.lock);
}

/* ---- The conversation ---------------------------------------------------------------------------------------- */

typedef struct {
    const char **roles;
    char **contents;
    size_t n;
} conversation;

typedef struct {
    char *text; /* ends with a NUL */
    size_t len;
} answer;

static void add(conversation *c, const char *role, char *content) {
    c->roles = grow(c->roles, (c->n + 1) * sizeof *c->roles);
    c->contents = grow(c->contents, (c->n + 1) * sizeof *c->contents);
    c->roles[c->n] = role;
    c->contents[c->n++] = content;
}

static int32_t on_token(void *user_data, uint32_t token, const char *text, size_t text_len) {
    answer *a = user_data;
    (void)token;
    a->text = grow(a->text, a->len + text_len + 1);
    memcpy(a->text + a->len, text, text_len + 1);
    a->len += text_len;
    fwrite(text, 1, text_len, stdout);
    return fflush(stdout);
}

/* Cuts the session to what it shares with a prompt; returns how many tokens that is. */
static size_t keep_common(loris_session *session, const uint32_t *prompt, size_t n_prompt) {
    size_t n_held, common = 0;
    uint32_t *held;
    check(loris_session_tokens(session, NULL, 0, &n_held), "tokens");
    held = grow(NULL, (n_held + 1) * sizeof *held);
    check(loris_session_tokens(session, held, n_held, &n_held), "tokens");
    while (common < n_held && common < n_prompt && held[common] == prompt[common]) common++;
    if (common == n_prompt) common--; /* the logits of the last token are wanted */
    free(held);
    check(loris_session_truncate(session, common), "truncate");
    return common;
}

/* Answers the conversation so far. Returns what ended the answer, or what kept it from being given. */
static int32_t turn(const loris_model *model, loris_session *session, const conversation *c,
                    const loris_generate_params *params) {
    const char *const *contents = (const char *const *)c->contents;
    uint32_t flags = LORIS_ADD_GENERATION_PROMPT, *prompt;
    size_t n, kept;
    int32_t status = loris_chat_tokenize(model, c->roles, contents, c->n, flags, NULL, 0, &n);
    if (status != LORIS_OK) return status;
    prompt = grow(NULL, (n + 1) * sizeof *prompt);
    check(loris_chat_tokenize(model, c->roles, contents, c->n, flags, prompt, n, &n), "template");
    kept = keep_common(session, prompt, n);

    /* A Ctrl-C that came after the last answer's end was meant for that one. */
    check(loris_session_uncancel(session), "uncancel");
    set_answering(session);
    status = loris_session_prefill(session, prompt + kept, n - kept, NULL, NULL);
    if (status == LORIS_OK) status = loris_session_generate(session, params);
    set_answering(NULL);
    free(prompt);
    return status;
}

int main(int argc, char **argv) {
    loris_engine *engine;
    loris_model *model;
    loris_session *session;
    loris_model_info info = {.struct_size = sizeof info};
    loris_sampling_params sampling;
    loris_generate_params params;
    conversation c = {NULL, NULL, 0};
    char *line = NULL;
    size_t capacity = 0;
    ssize_t length;
    sigset_t signals;
    pthread_t waiter;

    if (argc < 2 || argc > 3) {
        fprintf(stderr, "usage: chat DIR [MAX_TOKENS]\n");
        return 2;
    }

    /* Before loris makes threads: they inherit the mask. */
    sigemptyset(&signals);
    sigaddset(&signals, SIGINT);
    pthread_sigmask(SIG_BLOCK, &signals, NULL);
    pthread_create(&waiter, NULL, wait_for_interrupts, &signals);

    check(loris_engine_open(NULL, &engine), "engine");
    check(loris_model_open(engine, argv[1], NULL, &model), argv[1]);
    check(loris_session_open(model, NULL, &session), "session");
    check(loris_model_get_info(model, &info), "info");
    if (!info.has_chat_template) {
        fprintf(stderr, "%s: has no chat template\n", argv[1]);
        return 1;
    }
    check(loris_sampling_params_init(&sampling, sizeof sampling), "sampling");
    check(loris_model_sampling_params(model, &sampling), "sampling");
    check(loris_session_set_sampling(session, &sampling), "sampling");
    check(loris_generate_params_init(&params, sizeof params), "generate");
    params.max_tokens = argc == 3 ? strtoull(argv[2], NULL, 10) : 512;
    params.on_token = on_token;

    while ((length = getline(&line, &capacity, stdin)) >= 0) {
        answer a = {NULL, 0};
        int32_t status;
        if (length > 0 && line[length - 1] == '\n') line[length - 1] = '\0';
        if (line[0] == '\0') continue;
        add(&c, "user", strcpy(grow(NULL, strlen(line) + 1), line));
        params.user_data = &a;
        status = turn(model, session, &c, &params);
        if (status < 0 || !a.text) {
            /* Nothing was shown: the conversation goes on without this message. */
            fprintf(stderr, "[no answer: status %d: %s]\n", (int)status, explain());
            free(c.contents[--c.n]);
            free(a.text);
            continue;
        }
        if (a.len == 0 || a.text[a.len - 1] != '\n') putchar('\n');
        if (status == LORIS_CANCELLED) fprintf(stderr, "[stopped]\n");
        if (status == LORIS_CTX_FULL || status == LORIS_KV_FULL) fprintf(stderr, "[no room for more]\n");
        add(&c, "assistant", a.text);
    }

    /* The waiter must be gone before the session is. */
    pthread_mutex_lock(&interrupt.lock);
    interrupt.leaving = 1;
    pthread_mutex_unlock(&interrupt.lock);
    pthread_kill(waiter, SIGINT);
    pthread_join(waiter, NULL);

    loris_session_free(session);
    loris_model_free(model);
    loris_engine_free(engine);
    while (c.n > 0) free(c.contents[--c.n]);
    free(c.contents);
    free(c.roles);
    free(line);
    return 0;
}
