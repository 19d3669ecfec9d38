/*
 * What can go wrong while everybody means well, and what a host does about it. Each failure below is made on purpose.
 *
 *     cc errors.c $(pkg-config --cflags --libs loris) -o errors
 *     ./errors models/SmolLM2-135M-Instruct
 */
#include <loris.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int n_surprises;

/* Prints a failure with its message, which is meant for whoever reads the host's log. */
static void met(const char *what, int32_t expected, int32_t status) {
    char message[400] = "(a result, not a failure: no message)";
    if (status != LORIS_BUFFER_TOO_SMALL) loris_last_error(message, sizeof message);
    printf("%s\n    status %d: %s\n", what, (int)status, message);
    if (status == expected) return;
    printf("    EXPECTED status %d\n", (int)expected);
    n_surprises++;
}

static void check(int32_t status, const char *what) {
    char message[400];
    if (status == LORIS_OK) return;
    loris_last_error(message, sizeof message);
    fprintf(stderr, "%s: status %d: %s\n", what, (int)status, message);
    exit(1);
}

static int32_t stop_loading(void *user_data, uint64_t done, uint64_t total) {
    (void)user_data;
    (void)done;
    (void)total;
    return 1;
}

static int32_t stop_answer(void *user_data, uint32_t token, const char *text, size_t text_len) {
    (void)token;
    (void)text;
    (void)text_len;
    return --*(int *)user_data == 0;
}

/* Opening an engine and a model: nothing exists afterwards, so a host tells its user and may try something else. */
static void opening(const char *dir) {
    loris_engine *engine = NULL;
    loris_model *model = NULL;
    loris_engine_params engine_params;
    loris_model_params params;

    /* A device that is absent. Ask for "auto" (or nothing) if the CPU will do. */
    check(loris_engine_params_init(&engine_params, sizeof engine_params), "params");
    engine_params.device = "cuda:4095";
    met("a device that is not there", LORIS_E_NO_DEVICE, loris_engine_open(&engine_params, &engine));

    /* A name that means nothing: a mistake in the host, or in a setting that it passes on. */
    engine_params.device = "quantum";
    met("a device that nobody has", LORIS_E_INVALID_ARG, loris_engine_open(&engine_params, &engine));

    /* A struct that was not initialised: its size is of no version. */
    memset(&engine_params, 0, sizeof engine_params);
    met("a struct without its size", LORIS_E_INVALID_ARG, loris_engine_open(&engine_params, &engine));

    check(loris_engine_open(NULL, &engine), "engine");
    met("a folder that is not there", LORIS_E_IO, loris_model_open(engine, "/nowhere/model", NULL, &model));

    /* The user closed the window while weights came in. */
    check(loris_model_params_init(&params, sizeof params), "params");
    params.progress = stop_loading;
    met("loading was stopped", LORIS_CANCELLED, loris_model_open(engine, dir, &params, &model));

    /* The message names the option and its range. */
    check(loris_model_params_init(&params, sizeof params), "params");
    params.page_len = 17;
    met("an option out of range", LORIS_E_INVALID_ARG, loris_model_open(engine, dir, &params, &model));

    /* Ask before relying on what an older library may lack. */
    printf("feature \"telepathy\": %d, feature \"fork\": %d\n", (int)loris_has_feature("telepathy"),
           (int)loris_has_feature("fork"));
    loris_engine_free(engine);
}

/* Text: mistakes of users and of folders. */
static void texts(const loris_model *model) {
    const char *role = "user", *text = "hi";
    uint32_t tokens[64];
    size_t n;
    loris_model_info info = {.struct_size = sizeof info};
    int32_t status;

    /* Text from elsewhere is checked; convert it, or tell who sent it. */
    met("text that is not UTF-8", LORIS_E_INVALID_ARG, loris_tokenize(model, "caf\xe9", 4, 0, tokens, 64, &n));

    /* *n says how large a buffer has to be: take one of that size and call again. */
    status = loris_tokenize(model, "hello there", 11, 0, tokens, 1, &n);
    met("a buffer that is too small", LORIS_BUFFER_TOO_SMALL, status);
    printf("    %lu tokens are needed\n", (unsigned long)n);

    /* A base model has no template: write the prompt yourself, as the model's authors say. */
    check(loris_model_get_info(model, &info), "info");
    status = loris_chat_tokenize(model, &role, &text, 1, LORIS_ADD_GENERATION_PROMPT, tokens, 64, &n);
    if (!info.has_chat_template) met("no chat template", LORIS_E_UNSUPPORTED, status);

    /* Not an id of this model: tokens of another one? */
    tokens[0] = info.vocab_size;
    met("a token out of range", LORIS_E_INVALID_ARG, loris_detokenize(model, tokens, 1, 0, NULL, 0, &n));
}

/* Sessions: after each failure the session is what it was, so a host does something about it and goes on. */
static void sessions(const loris_model *model) {
    loris_session *session, *other;
    loris_session_params params;
    loris_generate_params answer;
    loris_sampling_params sampling;
    int n_left = 3;
    size_t n;
    uint32_t token, tokens[48];
    for (n = 0; n < 48; n++) tokens[n] = 5 + (uint32_t)n;

    check(loris_session_params_init(&params, sizeof params), "params");
    params.ctx_len = 48;
    check(loris_session_open(model, &params, &session), "session");

    /* Calls in the wrong order are told so. */
    met("an answer before a prompt", LORIS_E_STATE, loris_session_generate(session, NULL));
    check(loris_session_feed(session, tokens, 8), "feed");
    met("a fork while tokens are queued", LORIS_E_STATE, loris_session_fork(session, &other));
    check(loris_session_clear(session), "clear");

    /* Nothing was computed when the user pressed stop: put the question again, or drop it. */
    check(loris_session_cancel(session), "cancel");
    met("a prompt was cancelled", LORIS_CANCELLED, loris_session_prefill(session, tokens, 40, NULL, NULL));
    check(loris_session_prefill(session, tokens, 40, NULL, NULL), "prefill");

    /* A setting that has no meaning: the old one stays. */
    check(loris_sampling_params_init(&sampling, sizeof sampling), "sampling");
    sampling.temperature = -1;
    met("a negative temperature", LORIS_E_INVALID_ARG, loris_session_set_sampling(session, &sampling));

    /* The answer so far is good, and the session holds all of it. */
    check(loris_generate_params_init(&answer, sizeof answer), "generate");
    answer.flags = LORIS_IGNORE_EOS;
    answer.on_token = stop_answer;
    answer.user_data = &n_left;
    met("an answer was cancelled", LORIS_CANCELLED, loris_session_generate(session, &answer));

    /* No more context: start anew with a summary, drop old turns (truncate), or say so. */
    met("the context is full", LORIS_CTX_FULL, loris_session_prefill(session, tokens, 48, NULL, NULL));
    check(loris_session_truncate(session, 0), "truncate");
    check(loris_session_prefill(session, tokens, 40, NULL, NULL), "prefill");

    /* The pool has room for 64 tokens, one page, and this session has it: wait, or free or truncate a session. */
    check(loris_session_open(model, NULL, &other), "session");
    for (n = 0; n < 48; n++) tokens[n]++;
    met("the pool is full", LORIS_KV_FULL, loris_session_prefill(other, tokens, 40, NULL, NULL));
    check(loris_session_truncate(session, 0), "truncate");
    check(loris_session_prefill(other, tokens, 40, NULL, NULL), "prefill");
    check(loris_session_sample(other, &token), "sample");

    /* A session of its own for each thread, or a lock around each. A second call at once would be told
     * LORIS_E_BUSY; and after LORIS_E_PANIC, a defect of loris, LORIS_E_POISONED: free that session, report the
     * message, and go on with the others. */
    loris_session_free(session);
    loris_session_free(other);
}

/* Saved sessions: bytes from a disk are not trusted. A host throws them away and runs the prompt again. */
static void saved(const loris_model *model) {
    static const uint8_t JUNK[64] = "this was never a session";
    loris_session *session;
    uint32_t token = 5;
    met("junk instead of a session", LORIS_E_FORMAT, loris_session_restore(model, JUNK, sizeof JUNK, NULL, &session));
    met("a file that is not there", LORIS_E_IO, loris_session_restore_file(model, "/nowhere/session", NULL, &session));
    check(loris_session_open(model, NULL, &session), "session");
    check(loris_session_prefill(session, &token, 1, NULL, NULL), "prefill");
    met("a place that is not there", LORIS_E_IO, loris_session_save_file(session, "/nowhere/session"));
    loris_session_free(session);
}

int main(int argc, char **argv) {
    loris_engine *engine;
    loris_model *model;
    loris_model_params params;

    if (argc != 2) {
        fprintf(stderr, "usage: errors DIR\n");
        return 2;
    }
    opening(argv[1]);

    check(loris_engine_open(NULL, &engine), "engine");
    check(loris_model_params_init(&params, sizeof params), "params");
    params.kv_tokens = 64; /* one page, soon full */
    check(loris_model_open(engine, argv[1], &params, &model), argv[1]);
    loris_engine_free(engine);
    texts(model);
    sessions(model);
    saved(model);
    loris_model_free(model);
    return n_surprises > 0;
}
