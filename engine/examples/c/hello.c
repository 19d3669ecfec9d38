/*
 * One prompt, one answer, streamed: what `loris run -m DIR -p TEXT` prints.
 *
 *     cc hello.c $(pkg-config --cflags --libs loris) -o hello
 *     ./hello models/SmolLM2-135M-Instruct "Why is the sky blue?"
 */
#include <loris.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Every failure has a message that says what was wrong and what to do. */
static void check(int32_t status, const char *what) {
    char message[512];
    if (status == LORIS_OK) return;
    loris_last_error(message, sizeof message);
    fprintf(stderr, "%s: status %d: %s\n", what, (int)status, message);
    exit(1);
}

static int32_t on_progress(void *user_data, uint64_t done, uint64_t total) {
    (void)user_data;
    fprintf(stderr, "prompt: %lu of %lu tokens\n", (unsigned long)done, (unsigned long)total);
    return 0; /* anything else would cancel */
}

/* Text comes as whole characters; a token that completes none brings an empty text. */
static int32_t on_token(void *user_data, uint32_t token, const char *text, size_t text_len) {
    int *ends_line = user_data;
    (void)token;
    if (text_len > 0) *ends_line = text[text_len - 1] == '\n';
    fwrite(text, 1, text_len, stdout);
    return fflush(stdout); /* nobody reads any more: cancel */
}

/* The prompt as tokens; the caller frees them. */
static uint32_t *encode(const loris_model *model, const char *text, size_t *n) {
    const char *role = "user";
    uint32_t *tokens;
    loris_model_info info = {.struct_size = sizeof info};
    check(loris_model_get_info(model, &info), "info");
    if (info.has_chat_template) {
        /* Without a buffer the call says how large one has to be. */
        check(loris_chat_tokenize(model, &role, &text, 1, LORIS_ADD_GENERATION_PROMPT, NULL, 0, n), "template");
        tokens = malloc((*n + 1) * sizeof *tokens);
        if (!tokens) abort();
        check(loris_chat_tokenize(model, &role, &text, 1, LORIS_ADD_GENERATION_PROMPT, tokens, *n, n), "template");
        return tokens;
    }
    /* The library knows how many tokens a text has at most, so one call is enough. */
    check(loris_max_tokens(model, strlen(text), n), "tokenize");
    tokens = malloc((*n + 1) * sizeof *tokens);
    if (!tokens) abort();
    check(loris_tokenize(model, text, strlen(text), LORIS_ADD_EDGES, tokens, *n, n), "tokenize");
    return tokens;
}

int main(int argc, char **argv) {
    loris_engine *engine;
    loris_model *model;
    loris_session *session;
    loris_sampling_params sampling;
    loris_generate_params params;
    uint32_t *tokens;
    size_t n_tokens;
    int ends_line = 1;
    int32_t end;

    if (argc < 3 || argc > 4) {
        fprintf(stderr, "usage: hello DIR TEXT [MAX_TOKENS]\n");
        return 2;
    }

    /* An engine is a device, a model is weights on it, a session is one sequence. */
    check(loris_engine_open(NULL, &engine), "engine");
    check(loris_model_open(engine, argv[1], NULL, &model), argv[1]);
    check(loris_session_open(model, NULL, &session), "session");

    tokens = encode(model, argv[2], &n_tokens);
    check(loris_session_prefill(session, tokens, n_tokens, on_progress, NULL), "prefill");
    free(tokens);

    /* What the model's authors advise: greedy unless they ask for sampling. */
    check(loris_sampling_params_init(&sampling, sizeof sampling), "sampling");
    check(loris_model_sampling_params(model, &sampling), "sampling");
    check(loris_session_set_sampling(session, &sampling), "sampling");

    check(loris_generate_params_init(&params, sizeof params), "generate");
    params.max_tokens = argc == 4 ? strtoull(argv[3], NULL, 10) : 512;
    params.on_token = on_token;
    params.user_data = &ends_line;
    end = loris_session_generate(session, &params);
    if (!ends_line) putchar('\n');
    switch (end) {
    case LORIS_OK: fprintf(stderr, "[%lu tokens were asked for]\n", (unsigned long)params.max_tokens); break;
    case LORIS_EOS: fprintf(stderr, "[the model ended its answer]\n"); break;
    case LORIS_CTX_FULL:
    case LORIS_KV_FULL: fprintf(stderr, "[no room for more]\n"); break;
    default: check(end, "generate");
    }

    /* Each holds what it needs of the others, so the order is free. */
    loris_engine_free(engine);
    loris_model_free(model);
    loris_session_free(session);
    return 0;
}
