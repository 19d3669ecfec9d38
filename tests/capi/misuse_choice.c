/* Masks and logarithms of probabilities: what they are, and what hosts do wrong with them. See misuse.h. */
#define _POSIX_C_SOURCE 200809L
#include "misuse.h"

#include <math.h>

enum { VOCAB = 128, N_WORDS = 4 };

static uint32_t buf[N_IDS];

static void allow(uint32_t *allowed, uint32_t token) {
    allowed[token / 32] |= 1u << token % 32;
}

/* ---- Tokens -------------------------------------------------------------------------------------------------- */

static void tokens(const loris_model *bare) {
    uint8_t bytes[64];
    uint32_t token, flags, n_eos = 0, n_special = 0, n_unused = 0;
    loris_model_info info = {.struct_size = sizeof info};
    MUST(loris_model_get_info(model, &info));
    HOLDS(info.vocab_size == VOCAB);
    for (token = 0; token < VOCAB; token++) {
        MUST(loris_token_flags(model, token, &flags));
        MUST(loris_token_bytes(model, token, bytes, sizeof bytes, &n));
        n_eos += (flags & LORIS_TOKEN_EOS) != 0;
        n_special += (flags & LORIS_TOKEN_SPECIAL) != 0;
        n_unused += (flags & LORIS_TOKEN_UNUSED) != 0;
        HOLDS((n == 0) == ((flags & LORIS_TOKEN_UNUSED) != 0));
        HOLDS((flags & ~7u) == 0);
    }
    HOLDS(n_eos == 1 && n_special == 5 && n_unused == VOCAB - 101);
    MUST(loris_tokenize(model, "q", 1, 0, buf, N_IDS, &n));
    CASE(LORIS_OK, loris_token_bytes(model, buf[0], bytes, 1, &n));
    HOLDS(n == 1 && bytes[0] == 'q');
    CASE(LORIS_OK, loris_token_bytes(model, 0, NULL, 0, &n));
    HOLDS(n == 5); /* <unk> */
    CASE(LORIS_BUFFER_TOO_SMALL, loris_token_bytes(model, 0, bytes, 4, &n));
    CASE(LORIS_E_INVALID_ARG, loris_token_bytes(model, VOCAB, bytes, 64, &n));
    CASE(LORIS_E_INVALID_ARG, loris_token_bytes(model, 5, NULL, 64, &n));
    CASE(LORIS_E_INVALID_ARG, loris_token_bytes(model, 5, bytes, 64, NULL));
    CASE(LORIS_E_INVALID_ARG, loris_token_bytes(NULL, 5, bytes, 64, &n));
    CASE(LORIS_E_INVALID_ARG, loris_token_flags(model, VOCAB, &flags));
    CASE(LORIS_E_INVALID_ARG, loris_token_flags(model, 5, NULL));
    CASE(LORIS_E_INVALID_ARG, loris_token_flags(NULL, 5, &flags));
    CASE(LORIS_E_UNSUPPORTED, loris_token_bytes(bare, 5, bytes, 64, &n));
    CASE(LORIS_E_UNSUPPORTED, loris_token_flags(bare, 5, &flags));
}

/* ---- Logarithms of probabilities ----------------------------------------------------------------------------- */

static float rows[64][VOCAB];

static void keep_logits(void *data, size_t idx, const float *logits, size_t n_vocab) {
    float logprob;
    loris_logprob top[2];
    (void)data;
    memcpy(rows[idx], logits, n_vocab * sizeof *logits);
    /* The library may be called about them here. */
    MUST(loris_logprobs(logits, n_vocab, &ids[0], 1, &logprob, top, 2));
    HOLDS(logprob <= top[0].logprob && top[0].logprob >= top[1].logprob);
}

static void logprobs(void) {
    loris_session *session = open_session(model), *empty = open_session(model);
    loris_logprob top[VOCAB + 1];
    float logits[VOCAB], of[VOCAB];
    double sum = 0;
    uint32_t all[VOCAB], i;
    for (i = 0; i < VOCAB; i++) all[i] = i;
    MUST(loris_session_score(session, ids, 20, keep_logits, NULL));
    MUST(loris_session_logits(session, logits, VOCAB, &n));
    CASE(LORIS_OK, loris_session_logprobs(session, all, VOCAB, of, top, VOCAB));
    for (i = 0; i < VOCAB; i++) sum += exp(of[i]);
    HOLDS(fabs(sum - 1) < 1e-5);
    for (i = 1; i < VOCAB; i++) {
        HOLDS(fabs((of[i] - of[0]) - (logits[i] - logits[0])) < 1e-4);
        HOLDS(top[i - 1].logprob > top[i].logprob
              || (top[i - 1].logprob == top[i].logprob && top[i - 1].token < top[i].token));
        HOLDS(of[top[i].token] == top[i].logprob);
    }
    CASE(LORIS_OK, loris_logprobs(rows[19], VOCAB, all, VOCAB, logits, NULL, 0));
    HOLDS(memcmp(logits, of, sizeof of) == 0);
    CASE(LORIS_OK, loris_session_logprobs(session, NULL, 0, NULL, NULL, 0));
    CASE(LORIS_OK, loris_session_logprobs(session, all, 1, of, NULL, 0));
    CASE(LORIS_OK, loris_session_logprobs(session, NULL, 0, NULL, top, 1));
    KEPT(session, LORIS_E_INVALID_ARG, loris_session_logprobs(session, NULL, 1, of, NULL, 0));
    KEPT(session, LORIS_E_INVALID_ARG, loris_session_logprobs(session, all, 1, NULL, NULL, 0));
    KEPT(session, LORIS_E_INVALID_ARG, loris_session_logprobs(session, all, 1, of, NULL, 1));
    KEPT(session, LORIS_E_INVALID_ARG, loris_session_logprobs(session, NULL, 0, NULL, top, VOCAB + 1));
    SAYS("n_top");
    all[3] = VOCAB;
    KEPT(session, LORIS_E_INVALID_ARG, loris_session_logprobs(session, all, 4, of, NULL, 0));
    SAYS("128");
    CASE(LORIS_E_INVALID_ARG, loris_session_logprobs(NULL, NULL, 0, NULL, NULL, 0));
    CASE(LORIS_E_STATE, loris_session_logprobs(empty, all, 1, of, NULL, 0));
    CASE(LORIS_E_INVALID_ARG, loris_logprobs(NULL, 5, all, 1, of, NULL, 0));
    CASE(LORIS_E_INVALID_ARG, loris_logprobs(logits, 0, all, 1, of, NULL, 0));
    CASE(LORIS_OK, loris_logprobs(logits, 0, NULL, 0, NULL, NULL, 0));
    logits[7] = NAN;
    CASE(LORIS_E_NUMERIC, loris_logprobs(logits, VOCAB, all, 1, of, NULL, 0));
    loris_session_free(session);
    loris_session_free(empty);
}

/* ---- Masks --------------------------------------------------------------------------------------------------- */

/* What a mask is to do, and what it and those beside it were told. */
typedef struct {
    loris_session *session;
    int32_t fails_at, dead_at; /* tokens of the answer; -1: never */
    int n_asked, n_tokens, n_told;
    uint32_t last;
    float lowest;
} choice;

static int32_t mask(void *data, const uint32_t *answer, size_t n_answer, uint32_t *allowed, size_t n_words) {
    choice *c = data;
    size_t i;
    c->n_asked++;
    HOLDS(n_words == N_WORDS);
    for (i = 0; i < n_words; i++) HOLDS(allowed[i] == 0);
    if (n_answer > 0) HOLDS(answer[n_answer - 1] % 3 == (n_answer - 1) % 3);
    if (c->session) {
        CASE(LORIS_E_BUSY, loris_session_decode(c->session, 5));
        CASE(LORIS_E_BUSY, loris_session_logprobs(c->session, NULL, 0, NULL, NULL, 0));
        CASE(LORIS_E_BUSY, loris_session_sample_masked(c->session, allowed, n_words, buf));
    }
    if ((int32_t)n_answer == c->fails_at) return 7;
    if ((int32_t)n_answer == c->dead_at) return 0;
    for (i = 0; i < 101; i++) /* those that the tokenizer has */
        if (i % 3 == n_answer % 3) allow(allowed, (uint32_t)i);
    return 0;
}

static void on_logprobs(void *data, uint32_t token, float logprob, const loris_logprob *top, size_t n_top) {
    choice *c = data;
    size_t i;
    c->n_told++;
    c->last = token;
    HOLDS(n_top == 3 && top[0].logprob >= top[1].logprob && top[1].logprob >= top[2].logprob);
    HOLDS(logprob <= top[0].logprob && logprob < 0);
    for (i = 0; i < n_top; i++)
        if (top[i].token == token) HOLDS(top[i].logprob == logprob);
    if (logprob < c->lowest) c->lowest = logprob;
}

static int32_t on_token(void *data, uint32_t token, const char *text, size_t text_len) {
    choice *c = data;
    (void)text, (void)text_len;
    if (token == LORIS_NO_TOKEN) return 0;
    HOLDS(c->n_told == 0 || token == c->last);
    c->n_tokens++;
    return 0;
}

static loris_generate_params choosing(choice *c) {
    loris_generate_params params;
    MUST(loris_generate_params_init(&params, sizeof params));
    HOLDS(params.mask == NULL && params.on_logprobs == NULL && params.n_top == 0);
    params.flags = LORIS_IGNORE_EOS;
    params.max_tokens = 9;
    params.on_token = on_token;
    params.mask = mask;
    params.user_data = c;
    return params;
}

static void masks(void) {
    choice c = {.fails_at = -1, .dead_at = -1};
    loris_generate_params params = choosing(&c);
    loris_session *session = open_filled(model, 20), *other;
    uint32_t whole[64], got[64], allowed[N_WORDS] = {0}, token;
    size_t n_whole, i;
    int32_t stop_at;

    c.session = session;
    MUST(loris_session_generate(session, &params)); /* the busy ones leave messages */
    HOLDS(c.n_asked == 9 && c.n_tokens == 9 && c.n_told == 0);
    MUST(loris_session_tokens(session, whole, 64, &n_whole));
    HOLDS(n_whole == 29);
    for (i = 20; i < 29; i++) HOLDS(whole[i] % 3 == (i - 20) % 3);
    loris_session_free(session);

    /* The same answer where each token is told of, and where the host chooses step by step. */
    session = open_filled(model, 20);
    memset(&c, 0, sizeof c);
    c.fails_at = c.dead_at = -1;
    params.on_logprobs = on_logprobs;
    params.n_top = 3;
    CASE(LORIS_OK, loris_session_generate(session, &params));
    HOLDS(c.n_told == 9 && c.lowest < 0);
    MUST(loris_session_tokens(session, got, 64, &n));
    HOLDS(n == n_whole && memcmp(got, whole, n * sizeof *got) == 0);
    params.n_top = VOCAB + 5; /* as many as there are */
    params.on_logprobs = NULL;
    other = open_filled(model, 20);
    for (i = 0; i < 9; i++) {
        memset(allowed, 0, sizeof allowed);
        for (token = (uint32_t)i % 3; token < VOCAB; token += 3) allow(allowed, token);
        CASE(LORIS_OK, loris_session_sample_masked(other, allowed, N_WORDS, &token));
        HOLDS(token == whole[20 + i]);
        MUST(loris_session_decode(other, token));
    }
    memset(allowed, 0, sizeof allowed);
    KEPT(other, LORIS_DEAD_END, loris_session_sample_masked(other, allowed, N_WORDS, &token));
    HOLDS(token == LORIS_NO_TOKEN);
    allow(allowed, 110); /* the tokenizer does not have it */
    KEPT(other, LORIS_DEAD_END, loris_session_sample_masked(other, allowed, N_WORDS, &token));
    KEPT(other, LORIS_E_INVALID_ARG, loris_session_sample_masked(other, allowed, N_WORDS - 1, &token));
    KEPT(other, LORIS_E_INVALID_ARG, loris_session_sample_masked(other, NULL, N_WORDS, &token));
    KEPT(other, LORIS_E_INVALID_ARG, loris_session_sample_masked(other, allowed, N_WORDS, NULL));
    CASE(LORIS_E_INVALID_ARG, loris_session_sample_masked(NULL, allowed, N_WORDS, &token));
    loris_session_free(other);
    other = open_session(model);
    KEPT(other, LORIS_E_STATE, loris_session_sample_masked(other, allowed, N_WORDS, &token));
    loris_session_free(other);
    loris_session_free(session);

    /* It fails, or allows nothing: the session holds what was shown, and goes on as if nothing had been. */
    for (stop_at = 0; stop_at < 9; stop_at++) {
        session = open_filled(model, 20);
        memset(&c, 0, sizeof c);
        c.fails_at = stop_at % 2 ? stop_at : -1;
        c.dead_at = stop_at % 2 ? -1 : stop_at;
        params.max_tokens = 9;
        if (stop_at == 0) KEPT(session, LORIS_DEAD_END, loris_session_generate(session, &params));
        else CASE(stop_at % 2 ? LORIS_E_CALLBACK : LORIS_DEAD_END, loris_session_generate(session, &params));
        if (stop_at % 2) SAYS("7");
        HOLDS(c.n_tokens == stop_at);
        c.fails_at = c.dead_at = -1;
        params.max_tokens = 9 - (uint64_t)stop_at;
        CASE(LORIS_OK, loris_session_generate(session, &params));
        MUST(loris_session_tokens(session, got, 64, &n));
        HOLDS(n == n_whole && memcmp(got, whole, n * sizeof *got) == 0);
        loris_session_free(session);
    }
}

static void run_cases(void) {
    loris_model *bare = open_model(bare_dir, 64);
    tokens(bare);
    loris_model_free(bare);
    logprobs();
    masks();
}
