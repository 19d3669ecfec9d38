/* Saved sessions that were damaged, and what outlives what. See misuse.h. */
#define _POSIX_C_SOURCE 200809L
#include "misuse.h"

#include <sys/stat.h>

/* ---- Saved sessions ------------------------------------------------------------------------------------------ */

/* How many damaged copies of a saved session are not refused as such. */
static int n_accepted(const uint8_t *bytes, size_t len) {
    uint8_t *copy = malloc(len);
    size_t at;
    int n_wrong = 0;
    if (!copy) abort();
    memcpy(copy, bytes, len);
    for (at = 0; at < len; at += at < 256 ? 1 : 97) {
        loris_session *session = NULL;
        int32_t status;
        copy[at] ^= (uint8_t)(1u << at % 8);
        status = loris_session_restore(model, copy, len, NULL, &session);
        if (status != LORIS_E_FORMAT || session) {
            printf("a flipped bit in byte %lu gave status %d\n", (unsigned long)at, (int)status);
            n_wrong++;
        }
        loris_session_free(session);
        copy[at] = bytes[at];
    }
    for (at = 0; at < len; at += at < 256 ? 1 : 61) {
        loris_session *session = NULL;
        n_wrong += loris_session_restore(model, bytes, at, NULL, &session) != LORIS_E_FORMAT || session;
        loris_session_free(session);
    }
    free(copy);
    return n_wrong;
}

/* A blob of before version 4, which does not say of which config it is. */
static void old_versions(const uint8_t *bytes, size_t len) {
    uint8_t *old = malloc(len);
    loris_session *restored = NULL;
    loris_session_params params;
    if (!old) abort();
    memcpy(old, bytes, len);
    old[8] = 3;
    MUST(loris_session_params_init(&params, sizeof params));
    CASE(LORIS_E_FORMAT, loris_session_restore(model, old, len, &params, &restored));
    SAYS("LORIS_TRUST_OLD_STATE");
    params.flags = LORIS_TRUST_OLD_STATE;
    CASE(LORIS_E_FORMAT, loris_session_restore(model, old, len, &params, &restored));
    SAYS("shareable"); /* where that number was is now the config, so it was read as an old one */
    CASE(LORIS_OK, loris_session_restore(model, bytes, len, &params, &restored));
    loris_session_free(restored);
    free(old);
}

static void saved(void) {
    char path[4096], part[4200];
    uint8_t *bytes;
    size_t len;
    uint64_t n_used;
    loris_session *session = open_filled(model, 40), *restored = NULL;
    loris_model *other = open_model(other_dir, 256), *bare = open_model(bare_dir, 256), *f32;
    loris_session_params shorter;
    loris_model_params params;
    FILE *file;

    MUST(loris_session_save(session, NULL, 0, &len));
    bytes = malloc(len + 1);
    if (!bytes) abort();
    KEPT(session, LORIS_OK, loris_session_save(session, bytes, len, &n));
    n_used = pages_used(model);
    HOLDS(n_accepted(bytes, len) == 0);
    HOLDS(pages_used(model) == n_used);
    bytes[len] = 0;
    CASE(LORIS_E_FORMAT, loris_session_restore(model, bytes, len + 1, NULL, &restored)); /* one byte too many */
    loris_session_free(restored);
    CASE(LORIS_E_FORMAT, loris_session_restore(model, NULL, 0, NULL, &restored));
    CASE(LORIS_E_FORMAT, loris_session_restore(other, bytes, len, NULL, &restored));
    MUST(loris_model_params_init(&params, sizeof params));
    params.kv = "f32";
    params.kv_tokens = 256;
    MUST(loris_model_open(engine, dir, &params, &f32));
    CASE(LORIS_E_FORMAT, loris_session_restore(f32, bytes, len, NULL, &restored));
    SAYS("KV format");
    MUST(loris_session_params_init(&shorter, sizeof shorter));
    shorter.ctx_len = 39;
    CASE(LORIS_E_FORMAT, loris_session_restore(model, bytes, len, &shorter, &restored));
    shorter.flags = 2;
    CASE(LORIS_E_INVALID_ARG, loris_session_restore(model, bytes, len, &shorter, &restored));
    HOLDS(restored == NULL);
    old_versions(bytes, len);
    CASE(LORIS_OK, loris_session_restore(bare, bytes, len, NULL, &restored)); /* the same weights, another folder */
    loris_session_free(restored);
    CASE(LORIS_OK, loris_session_restore(model, (uint8_t *)memmove(bytes + 1, bytes, len), len, NULL, &restored));
    loris_session_free(restored);

    /* Files. */
    CASE(LORIS_E_IO, loris_session_save_file(session, "/nowhere/at/all"));
    CASE(LORIS_E_IO, loris_session_save_file(session, "/proc/loris"));
    CASE(LORIS_E_IO, loris_session_save_file(session, folder));
    SAYS("is a folder");
    CASE(LORIS_E_IO, loris_session_save_file(session, ""));
    snprintf(path, sizeof path, "%s/pipe", folder);
    if (mkfifo(path, 0600) != 0) abort();
    CASE(LORIS_E_IO, loris_session_save_file(session, path));
    SAYS("a pipe");
    CASE(LORIS_E_IO, loris_session_save_file(session, "/dev/full/x"));
    CASE(LORIS_E_IO, loris_session_restore_file(model, folder, NULL, &restored));
    CASE(LORIS_E_IO, loris_session_restore_file(model, "/nowhere", NULL, &restored));
    CASE(LORIS_E_FORMAT, loris_session_restore_file(model, "/dev/null", NULL, &restored));
    snprintf(path, sizeof path, "%s/session", folder);
    snprintf(part, sizeof part, "%s.part", path);
    KEPT(session, LORIS_OK, loris_session_save_file(session, path));
    HOLDS(fopen(part, "rb") == NULL);
    CASE(LORIS_OK, loris_session_restore_file(model, path, NULL, &restored));
    take(session, &before);
    take(restored, &after);
    HOLDS(before.n_tokens == after.n_tokens && memcmp(before.tokens, after.tokens, sizeof before.tokens) == 0);
    HOLDS(memcmp(before.logits, after.logits, sizeof before.logits) == 0);
    loris_session_free(restored);
    file = fopen(path, "ab");
    if (!file || fputc(0, file) == EOF || fclose(file) != 0) abort();
    CASE(LORIS_E_FORMAT, loris_session_restore_file(model, path, NULL, &restored));
    loris_session_free(restored);

    loris_session_free(session);
    loris_model_free(other);
    loris_model_free(bare);
    loris_model_free(f32);
    free(bytes);
}

/* ---- Engines, models, orders of freeing ---------------------------------------------------------------------- */

static void count_messages(void *data, int32_t level, const char *text) {
    if (level >= 1 && level <= 3 && text[0]) ++*(int *)data;
}

static void engines(void) {
    loris_engine *one, *two;
    loris_model *a, *b, *none;
    loris_session *in_a, *in_b, *fork, *list[2];
    loris_engine_params params;
    loris_text_stream *stream;
    const char *text;
    int32_t statuses[2];
    int n_messages = 0;

    MUST(loris_engine_params_init(&params, sizeof params));
    params.device = "cpu";
    params.threads = 1;
    params.log = count_messages;
    params.log_data = &n_messages;
    MUST(loris_engine_open(&params, &one));
    params.threads = 2;
    params.log_level = 2;
    MUST(loris_engine_open(&params, &two));
    CASE(LORIS_E_IO, loris_model_open(one, "/nowhere", NULL, &none));
    MUST(loris_model_open(one, dir, NULL, &a));
    MUST(loris_model_open(two, dir, NULL, &b));
    HOLDS(n_messages == 1); /* the first engine's, of the model */
    in_a = open_filled(a, 20);
    in_b = open_filled(b, 20);
    take(in_a, &before);
    take(in_b, &after);
    HOLDS(memcmp(before.logits, after.logits, sizeof before.logits) == 0);
    MUST(loris_session_push(in_a, 5));
    MUST(loris_session_push(in_b, 5));
    list[0] = in_a, list[1] = in_b;
    HOLDS(loris_model_step(a, list, 2, statuses) == LORIS_OK);
    HOLDS(statuses[0] == LORIS_OK && statuses[1] == LORIS_E_STATE);

    /* Whatever is freed first, the rest works. */
    loris_engine_free(one);
    MUST(loris_session_fork(in_a, &fork));
    MUST(loris_text_stream_open(a, 0, &stream));
    loris_session_free(in_a);
    loris_model_free(a);
    CASE(LORIS_OK, loris_session_decode(fork, 5));
    CASE(LORIS_OK, loris_text_stream_push(stream, ids[0], &text, &n));
    HOLDS(n == 1);
    loris_session_free(fork);
    CASE(LORIS_OK, loris_text_stream_finish(stream, &text, &n));
    loris_text_stream_free(stream);
    loris_model_free(b);
    loris_engine_free(two);
    MUST(loris_session_clear(in_b));
    CASE(LORIS_OK, loris_session_decode(in_b, 5));
    loris_session_free(in_b);

    params.device = "cuda";
    params.cuda_driver = "/nowhere/libcuda.so";
    CASE(LORIS_E_NO_DEVICE, loris_engine_open(&params, &one));
    SAYS("/nowhere/libcuda.so");
    HOLDS(one == NULL);
    params.device = "auto";
    CASE(LORIS_OK, loris_engine_open(&params, &one));
    loris_engine_free(one);
}

static int32_t free_model(void *data, uint32_t token, const char *text, size_t text_len) {
    loris_model **freed = data;
    (void)token, (void)text, (void)text_len;
    loris_model_free(*freed);
    *freed = NULL;
    return 0;
}

static int32_t free_engine(void *data, uint64_t done, uint64_t total) {
    loris_engine **freed = data;
    (void)done, (void)total;
    loris_engine_free(*freed);
    *freed = NULL;
    return 0;
}

/* A handle that is freed by a callback of a call that needs what it stands for. */
static void freed_by_callbacks(void) {
    loris_model *own = open_model(dir, 256);
    loris_session *session = open_filled(own, 8);
    loris_generate_params params;
    loris_engine *other;
    loris_model_params model_params;
    MUST(loris_generate_params_init(&params, sizeof params));
    params.flags = LORIS_IGNORE_EOS;
    params.max_tokens = 4;
    params.on_token = free_model;
    params.user_data = &own;
    CASE(LORIS_OK, loris_session_generate(session, &params));
    HOLDS(own == NULL);
    loris_session_free(session);
    MUST(loris_engine_open(NULL, &other));
    MUST(loris_model_params_init(&model_params, sizeof model_params));
    model_params.progress = free_engine;
    model_params.progress_data = &other;
    CASE(LORIS_OK, loris_model_open(other, dir, &model_params, &own));
    loris_model_free(own);
}

/* A context of any length is no promise of memory, and bytes that claim to fill it are not believed. */
static void long_contexts(void) {
    enum { N_TOKENS_AT = 40 };
    loris_model *model_dynamic = open_model(dynamic_dir, 256);
    loris_session_params params;
    loris_session *session = NULL;
    uint8_t *bytes;
    size_t len;
    MUST(loris_session_params_init(&params, sizeof params));
    params.ctx_len = UINT64_MAX;
    CASE(LORIS_OK, loris_session_open(model_dynamic, &params, &session));
    if (!session) return;
    MUST(loris_session_prefill(session, ids, 20, NULL, NULL));
    KEPT(session, LORIS_KV_FULL, loris_session_prefill(session, ids, 256, NULL, NULL));
    MUST(loris_session_save(session, NULL, 0, &len));
    bytes = malloc(len);
    if (!bytes) abort();
    MUST(loris_session_save(session, bytes, len, &len));
    loris_session_free(session);
    CASE(LORIS_OK, loris_session_restore(model_dynamic, bytes, len, &params, &session));
    loris_session_free(session);
    /* The number of tokens, a little more than memory holds and far more. */
    memset(bytes + N_TOKENS_AT, 0x0f, 5);
    CASE(LORIS_KV_FULL, loris_session_restore(model_dynamic, bytes, len, &params, &session));
    memset(bytes + N_TOKENS_AT, 0xff, 7);
    CASE(LORIS_KV_FULL, loris_session_restore(model_dynamic, bytes, len, &params, &session));
    HOLDS(session == NULL);
    free(bytes);
    loris_model_free(model_dynamic);
}

/* The last one, because nothing can be prefilled on the model afterwards. */
static void changed_weights(void) {
    char path[4096];
    loris_session *session = open_filled(model, 20), *copied;
    loris_model_params params;
    loris_model *read_model;
    FILE *file;
    MUST(loris_model_params_init(&params, sizeof params));
    params.load = "read";
    params.kv_tokens = 256;
    MUST(loris_model_open(engine, dir, &params, &read_model));
    copied = open_filled(read_model, 20);

    snprintf(path, sizeof path, "%s/model.safetensors", dir);
    file = fopen(path, "ab");
    if (!file || fputc(0, file) == EOF || fclose(file) != 0) abort();
    KEPT(session, LORIS_E_IO, loris_session_prefill(session, ids, 20, NULL, NULL));
    SAYS("changed while in use");
    KEPT(session, LORIS_E_IO, loris_session_feed(session, ids, 20));
    KEPT(session, LORIS_E_IO, loris_session_score(session, ids, 20, ignore_logits, NULL));
    CASE(LORIS_OK, loris_session_decode(session, ids[20]));
    CASE(LORIS_OK, loris_session_prefill(copied, ids, 20, NULL, NULL));
    loris_session_free(session);
    loris_session_free(copied);
    loris_model_free(read_model);
}

static void run_cases(void) {
    saved();
    engines();
    freed_by_callbacks();
    long_contexts();
    changed_weights();
}
