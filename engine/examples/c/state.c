/*
 * A session that outlives its process: it is saved after the first part of an answer and goes on in another.
 *
 *     cc state.c $(pkg-config --cflags --libs loris) -o state
 *     ./state save   models/SmolLM2-135M-Instruct story.state "Once upon a time"
 *     ./state resume models/SmolLM2-135M-Instruct story.state
 *
 * What both print together is what `./state whole DIR TEXT` prints, which never stops in between. `./state memory
 * DIR TEXT` does the same as save and resume with a buffer in place of the file.
 */
#include <loris.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { N_FIRST = 8, N_REST = 12 };

static void check(int32_t status, const char *what) {
    char message[512];
    if (status == LORIS_OK) return;
    loris_last_error(message, sizeof message);
    fprintf(stderr, "%s: status %d: %s\n", what, (int)status, message);
    exit(1);
}

static int32_t on_token(void *user_data, uint32_t token, const char *text, size_t text_len) {
    (void)user_data;
    (void)token;
    fwrite(text, 1, text_len, stdout);
    return fflush(stdout);
}

/* Prints up to n tokens. Afterwards the session holds all of them, ready for more. */
static void answer(loris_session *session, uint64_t n) {
    int32_t end;
    loris_generate_params params;
    check(loris_generate_params_init(&params, sizeof params), "generate");
    params.max_tokens = n;
    params.on_token = on_token;
    end = loris_session_generate(session, &params);
    if (end == LORIS_EOS || end == LORIS_CTX_FULL || end == LORIS_KV_FULL) return;
    check(end, "generate");
}

static loris_session *open_with_prompt(const loris_model *model, const char *text) {
    loris_session *session;
    size_t n;
    uint32_t *tokens = malloc((strlen(text) + 1) * sizeof *tokens);
    if (!tokens) abort();
    check(loris_tokenize(model, text, strlen(text), LORIS_ADD_EDGES, tokens, strlen(text) + 1, &n), "tokenize");
    check(loris_session_open(model, NULL, &session), "session");
    check(loris_session_prefill(session, tokens, n, NULL, NULL), "prefill");
    free(tokens);
    return session;
}

/* The session as it comes back from a buffer; the old one is gone in between. */
static loris_session *through_memory(const loris_model *model, loris_session *session) {
    size_t n;
    uint8_t *bytes;
    check(loris_session_save(session, NULL, 0, &n), "save");
    bytes = malloc(n);
    if (!bytes) abort();
    check(loris_session_save(session, bytes, n, &n), "save");
    loris_session_free(session);
    check(loris_session_restore(model, bytes, n, NULL, &session), "restore");
    free(bytes);
    return session;
}

int main(int argc, char **argv) {
    const char *command = argc > 1 ? argv[1] : "";
    loris_engine *engine;
    loris_model *model;
    loris_session *session = NULL;

    check(loris_engine_open(NULL, &engine), "engine");
    if (argc < 4) {
        fprintf(stderr, "usage: state save DIR FILE TEXT | resume DIR FILE | whole DIR TEXT | memory DIR TEXT\n");
        loris_engine_free(engine);
        return 2;
    }
    check(loris_model_open(engine, argv[2], NULL, &model), argv[2]);

    if (strcmp(command, "save") == 0 && argc == 5) {
        session = open_with_prompt(model, argv[4]);
        answer(session, N_FIRST);
        check(loris_session_save_file(session, argv[3]), argv[3]);
    } else if (strcmp(command, "resume") == 0) {
        check(loris_session_restore_file(model, argv[3], NULL, &session), argv[3]);
        answer(session, N_REST);
    } else if (strcmp(command, "whole") == 0) {
        session = open_with_prompt(model, argv[3]);
        answer(session, N_FIRST + N_REST);
    } else if (strcmp(command, "memory") == 0) {
        session = open_with_prompt(model, argv[3]);
        answer(session, N_FIRST);
        session = through_memory(model, session);
        answer(session, N_REST);
    }

    loris_session_free(session);
    loris_model_free(model);
    loris_engine_free(engine);
    return session ? 0 : 2;
}
