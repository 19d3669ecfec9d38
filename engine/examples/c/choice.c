/*
 * An answer that can only be a number of at most four digits, and how sure the model was of each token: a mask of one's own,
 * and logarithms of probabilities.
 *
 *     cc choice.c $(pkg-config --cflags --libs loris) -lm -o choice
 *     ./choice models/SmolLM2-135M-Instruct "How many legs has a spider?"
 */
#include <loris.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_DIGITS = 4, N_TOP = 3 };

static void check(int32_t status, const char *what) {
    char message[1024];
    if (status == LORIS_OK) return;
    loris_last_error(message, sizeof message);
    fprintf(stderr, "%s: %s\n", what, message);
    exit(1);
}

/* What the mask needs to know of each token, asked for once. */
typedef struct {
    const loris_model *model;
    uint32_t vocab_size;
    signed char *n_digits; /* how many digits a token is; -1: it is something else */
    unsigned char *ends;   /* it ends the answer */
} vocabulary;

static vocabulary learn(const loris_model *model) {
    vocabulary v;
    loris_model_info info;
    uint32_t id, flags;
    info.struct_size = sizeof info;
    check(loris_model_get_info(model, &info), "info");
    v.model = model;
    v.vocab_size = info.vocab_size;
    v.n_digits = malloc(info.vocab_size);
    v.ends = malloc(info.vocab_size);
    if (!v.n_digits || !v.ends) exit(1);
    for (id = 0; id < info.vocab_size; id++) {
        uint8_t bytes[MAX_DIGITS];
        size_t n, i;
        int32_t status = loris_token_bytes(model, id, bytes, sizeof bytes, &n);
        check(loris_token_flags(model, id, &flags), "flags");
        v.ends[id] = (flags & LORIS_TOKEN_EOS) != 0;
        v.n_digits[id] = -1;
        if (status == LORIS_BUFFER_TOO_SMALL || n == 0 || flags != 0) continue; /* longer than a number may be, or no text */
        check(status, "bytes");
        for (i = 0; i < n && bytes[i] >= '0' && bytes[i] <= '9'; i++) {}
        if (i == n) v.n_digits[id] = (signed char)n;
    }
    return v;
}

/* Sets the bits of tokens that may come next. */
static int32_t digits_only(void *data, const uint32_t *answer, size_t n_answer, uint32_t *allowed, size_t n_words) {
    const vocabulary *v = data;
    uint32_t id;
    size_t i;
    int n_digits = 0;
    (void)n_words; /* one for every 32 tokens */
    for (i = 0; i < n_answer; i++) n_digits += v->n_digits[answer[i]];
    for (id = 0; id < v->vocab_size; id++) {
        int more = v->n_digits[id];
        if ((more > 0 && n_digits + more <= MAX_DIGITS) || (v->ends[id] && n_digits > 0))
            allowed[id / 32] |= (uint32_t)1 << id % 32;
    }
    return 0;
}

static void print_token(const loris_model *model, uint32_t token) {
    char text[64];
    size_t n;
    if (loris_detokenize(model, &token, 1, LORIS_SHOW_SPECIAL, text, sizeof text, &n) == LORIS_OK)
        printf("%s", strcmp(text, "\n") == 0 ? "\\n" : text);
    else
        printf("#%u", (unsigned)token);
}

/* What the model itself would have liked best, before the mask. */
static void tell(void *data, uint32_t token, float logprob, const loris_logprob *top, size_t n_top) {
    const vocabulary *v = data;
    size_t i;
    print_token(v->model, token);
    printf(": %.1f %%, likeliest", 100 * exp(logprob));
    for (i = 0; i < n_top; i++) {
        printf(i ? ", '" : " '");
        print_token(v->model, top[i].token);
        printf("' %.1f %%", 100 * exp(top[i].logprob));
    }
    printf("\n");
}

int main(int argc, char **argv) {
    loris_engine *engine;
    loris_model *model;
    loris_session *session;
    loris_generate_params params;
    vocabulary v;
    uint32_t tokens[1024];
    size_t n;
    const char *role = "user", *text;
    int32_t status;

    if (argc != 3) {
        fprintf(stderr, "usage: choice DIR TEXT\n");
        return 2;
    }
    text = argv[2];
    check(loris_engine_open(NULL, &engine), "engine");
    check(loris_model_open(engine, argv[1], NULL, &model), argv[1]);
    check(loris_session_open(model, NULL, &session), "session");
    check(loris_chat_tokenize(model, &role, &text, 1, LORIS_ADD_GENERATION_PROMPT, tokens, 1024, &n), "prompt");
    check(loris_session_prefill(session, tokens, n, NULL, NULL), "prefill");

    v = learn(model);
    check(loris_generate_params_init(&params, sizeof params), "params");
    params.mask = digits_only;
    params.on_logprobs = tell;
    params.n_top = N_TOP;
    params.user_data = &v;
    status = loris_session_generate(session, &params);
    if (status != LORIS_EOS) check(status, "answer"); /* LORIS_EOS: the number is complete */

    free(v.n_digits);
    free(v.ends);
    loris_session_free(session);
    loris_model_free(model);
    loris_engine_free(engine);
    return 0;
}
