/*
 * A long prompt whose tokens are pruned layer by layer: what `loris run -m DIR -f FILE --lazy SCHEDULE` prints, and
 * on stderr what was computed of it.
 *
 *     cc lazy.c $(pkg-config --cflags --libs loris) -o lazy
 *     ./lazy models/SmolLM2-135M-Instruct book.txt gentle
 */
#include <loris.h>
#include <stdio.h>
#include <stdlib.h>

static void check(int32_t status, const char *what) {
    char message[512];
    if (status == LORIS_OK) return;
    loris_last_error(message, sizeof message);
    fprintf(stderr, "%s: status %d: %s\n", what, (int)status, message);
    exit(1);
}

static int32_t on_token(void *user_data, uint32_t token, const char *text, size_t text_len) {
    (void)user_data, (void)token;
    fwrite(text, 1, text_len, stdout);
    return fflush(stdout);
}

/* The file's text, less one newline at its end. */
static char *read_text(const char *path) {
    FILE *file = fopen(path, "rb");
    char *text = NULL;
    size_t n = 0, n_read;
    if (!file) return perror(path), exit(1), NULL;
    do {
        text = realloc(text, n + 65537);
        if (!text) abort();
        n_read = fread(text + n, 1, 65536, file);
        n += n_read;
    } while (n_read > 0);
    fclose(file);
    if (n > 0 && text[n - 1] == '\n') n--;
    text[n] = 0;
    return text;
}

int main(int argc, char **argv) {
    loris_engine *engine;
    loris_model *model;
    loris_session *session;
    loris_model_params model_params;
    loris_session_params session_params;
    loris_generate_params params;
    loris_model_info info = {.struct_size = sizeof info};
    loris_receipt receipt = {.struct_size = sizeof receipt};
    const char *role = "user", *text;
    uint32_t *tokens;
    size_t n;
    int32_t end;

    if (argc < 4 || argc > 5) {
        fprintf(stderr, "usage: lazy DIR FILE SCHEDULE [MAX_TOKENS]\n");
        return 2;
    }
    check(loris_engine_open(NULL, &engine), "engine");

    /* Sessions that prune need room for what waits: as many tokens as they hold together. */
    check(loris_model_params_init(&model_params, sizeof model_params), "model");
    model_params.aux_tokens = 8192;
    check(loris_model_open(engine, argv[1], &model_params, &model), argv[1]);
    check(loris_session_params_init(&session_params, sizeof session_params), "session");
    session_params.lazy = argv[3];
    check(loris_session_open(model, &session_params, &session), "session");

    text = read_text(argv[2]);
    check(loris_chat_tokenize(model, &role, &text, 1, LORIS_ADD_GENERATION_PROMPT, NULL, 0, &n), "template");
    tokens = malloc((n + 1) * sizeof *tokens);
    if (!tokens) abort();
    check(loris_chat_tokenize(model, &role, &text, 1, LORIS_ADD_GENERATION_PROMPT, tokens, n, &n), "template");
    check(loris_session_prefill(session, tokens, n, NULL, NULL), "prefill");
    free(tokens);
    free((void *)text);

    check(loris_generate_params_init(&params, sizeof params), "generate");
    params.max_tokens = argc == 5 ? strtoull(argv[4], NULL, 10) : 512;
    params.on_token = on_token;
    end = loris_session_generate(session, &params);
    putchar('\n');
    if (end < 0) check(end, "generate");

    check(loris_model_get_info(model, &info), "info");
    check(loris_session_get_receipt(session, &receipt), "receipt");
    fprintf(stderr, "[%.0f %% of %lu tokens x %u layers computed, %lu wait, %lu taken up again; %lu + %lu bytes]\n",
            100.0 * (double)receipt.token_layers / ((double)receipt.n_tokens * info.n_layers),
            (unsigned long)receipt.n_tokens, (unsigned)info.n_layers, (unsigned long)receipt.n_waiting,
            (unsigned long)receipt.n_revived, (unsigned long)receipt.kv_bytes, (unsigned long)receipt.aux_bytes);

    loris_session_free(session);
    loris_model_free(model);
    loris_engine_free(engine);
    return 0;
}
