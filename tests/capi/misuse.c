/* Arguments that have no meaning. See misuse.h. */
#define _POSIX_C_SOURCE 200809L
#include "misuse.h"

#include <math.h>

static uint32_t buf[N_IDS];

/* ---- NULL, and other kinds of handles ------------------------------------------------------------------------ */

static void null_pointers(void) {
    const int32_t bad = LORIS_E_INVALID_ARG;
    const char *role = "user", *content = "hi", *missing = NULL;
    loris_session *session = open_filled(model, 8), *none = NULL;
    loris_text_stream *stream, *no_stream;
    loris_generate_params params;
    loris_sampling_params sampling;
    const char *text;
    int32_t status;

    CASE(bad, loris_engine_params_init(NULL, sizeof(loris_engine_params)));
    CASE(bad, loris_model_params_init(NULL, sizeof(loris_model_params)));
    CASE(bad, loris_session_params_init(NULL, sizeof(loris_session_params)));
    CASE(bad, loris_sampling_params_init(NULL, sizeof(loris_sampling_params)));
    CASE(bad, loris_generate_params_init(NULL, sizeof(loris_generate_params)));
    CASE(bad, loris_build_info(NULL, 0, NULL));
    CASE(bad, loris_build_info(NULL, 10, &n));
    HOLDS(loris_has_feature(NULL) == 0);
    CASE(bad, loris_engine_open(NULL, NULL));
    CASE(bad, loris_model_open(NULL, dir, NULL, &(loris_model *){NULL}));
    CASE(bad, loris_model_open(engine, NULL, NULL, &(loris_model *){NULL}));
    CASE(bad, loris_model_open(engine, dir, NULL, NULL));
    CASE(bad, loris_model_get_info(NULL, &(loris_model_info){.struct_size = sizeof(loris_model_info)}));
    CASE(bad, loris_model_get_info(model, NULL));
    CASE(bad, loris_model_get_kv_info(NULL, &(loris_kv_info){.struct_size = sizeof(loris_kv_info)}));
    CASE(bad, loris_model_get_kv_info(model, NULL));
    CASE(bad, loris_model_device(NULL, (char *)buf, 16, &n));
    CASE(bad, loris_model_device(model, (char *)buf, 16, NULL));
    CASE(bad, loris_model_device(model, NULL, 16, &n));
    CASE(bad, loris_model_eos_tokens(NULL, buf, 4, &n));
    CASE(bad, loris_model_eos_tokens(model, buf, 4, NULL));
    MUST(loris_sampling_params_init(&sampling, sizeof sampling));
    CASE(bad, loris_model_sampling_params(NULL, &sampling));
    CASE(bad, loris_model_sampling_params(model, NULL));
    CASE(bad, loris_model_step(NULL, &session, 1, &status));
    CASE(bad, loris_model_step(model, NULL, 1, &status));
    CASE(bad, loris_model_step(model, &session, 1, NULL));
    CASE(LORIS_OK, loris_model_step(model, NULL, 0, NULL));
    CASE(bad, loris_tokenize(NULL, "a", 1, 0, buf, 4, &n));
    CASE(bad, loris_tokenize(model, NULL, 1, 0, buf, 4, &n));
    CASE(LORIS_OK, loris_tokenize(model, NULL, 0, 0, buf, 4, &n));
    CASE(bad, loris_tokenize(model, "a", 1, 0, NULL, 4, &n));
    CASE(bad, loris_tokenize(model, "a", 1, 0, buf, 4, NULL));
    CASE(bad, loris_max_tokens(NULL, 1, &n));
    CASE(bad, loris_max_tokens(model, 1, NULL));
    CASE(LORIS_OK, loris_max_tokens(model, 5, &n));
    HOLDS(n >= 5);
    CASE(bad, loris_detokenize(NULL, ids, 1, 0, (char *)buf, 16, &n));
    CASE(bad, loris_detokenize(model, NULL, 1, 0, (char *)buf, 16, &n));
    CASE(bad, loris_detokenize(model, ids, 1, 0, NULL, 16, &n));
    CASE(bad, loris_detokenize(model, ids, 1, 0, (char *)buf, 16, NULL));
    CASE(bad, loris_text_stream_open(NULL, 0, &no_stream));
    CASE(bad, loris_text_stream_open(model, 0, NULL));
    CASE(bad, loris_text_stream_open_after(NULL, ids, 2, 0, &no_stream));
    CASE(bad, loris_text_stream_open_after(model, NULL, 2, 0, &no_stream));
    CASE(bad, loris_text_stream_open_after(model, ids, 2, 0, NULL));
    CASE(bad, loris_text_stream_push(NULL, 5, &text, &n));
    CASE(bad, loris_text_stream_finish(NULL, &text, &n));
    CASE(bad, loris_chat_tokenize(NULL, &role, &content, 1, 0, buf, N_IDS, &n));
    CASE(bad, loris_chat_tokenize(model, NULL, &content, 1, 0, buf, N_IDS, &n));
    CASE(bad, loris_chat_tokenize(model, &role, NULL, 1, 0, buf, N_IDS, &n));
    CASE(bad, loris_chat_tokenize(model, &missing, &content, 1, 0, buf, N_IDS, &n));
    CASE(bad, loris_chat_tokenize(model, &role, &missing, 1, 0, buf, N_IDS, &n));
    CASE(bad, loris_chat_tokenize(model, &role, &content, 1, 0, buf, N_IDS, NULL));
    CASE(bad, loris_chat_tokenize_json(NULL, "{}", 2, 0, buf, N_IDS, &n));
    CASE(bad, loris_chat_tokenize_json(model, NULL, 2, 0, buf, N_IDS, &n));
    CASE(bad, loris_chat_tokenize_json(model, "{\"messages\": []}", 16, 0, buf, N_IDS, NULL));
    CASE(bad, loris_chat_render_json(NULL, "{}", 2, 0, (char *)buf, 64, &n));
    CASE(bad, loris_chat_render_json(model, "{\"messages\": []}", 16, 0, (char *)buf, 64, NULL));
    CASE(bad, loris_chat_render(NULL, &role, &content, 1, 0, (char *)buf, 64, &n));
    CASE(bad, loris_chat_render(model, &role, &missing, 1, 0, (char *)buf, 64, &n));
    CASE(bad, loris_chat_render(model, &role, &content, 1, 0, (char *)buf, 64, NULL));
    CASE(bad, loris_session_open(NULL, NULL, &none));
    CASE(bad, loris_session_open(model, NULL, NULL));
    CASE(bad, loris_session_cancel(NULL));
    CASE(bad, loris_session_uncancel(NULL));
    CASE(bad, loris_session_prefill(NULL, ids, 1, NULL, NULL));
    KEPT(session, bad, loris_session_prefill(session, NULL, 1, NULL, NULL));
    CASE(bad, loris_session_decode(NULL, 5));
    CASE(bad, loris_session_feed(NULL, ids, 1));
    KEPT(session, bad, loris_session_feed(session, NULL, 1));
    CASE(bad, loris_session_push(NULL, 5));
    CASE(bad, loris_session_clear(NULL));
    CASE(bad, loris_session_set_sampling(NULL, NULL));
    CASE(bad, loris_session_sample(NULL, buf));
    KEPT(session, bad, loris_session_sample(session, NULL));
    CASE(bad, loris_session_logits(NULL, (float *)buf, N_IDS, &n));
    CASE(bad, loris_session_logits(session, NULL, N_IDS, &n));
    CASE(bad, loris_session_logits(session, (float *)buf, N_IDS, NULL));
    CASE(bad, loris_session_score(NULL, ids, 1, ignore_logits, NULL));
    KEPT(session, bad, loris_session_score(session, NULL, 1, ignore_logits, NULL));
    KEPT(session, bad, loris_session_score(session, ids, 1, NULL, NULL));
    CASE(bad, loris_session_generate(NULL, NULL));
    CASE(bad, loris_session_fork(NULL, &none));
    KEPT(session, bad, loris_session_fork(session, NULL));
    CASE(bad, loris_session_truncate(NULL, 0));
    CASE(bad, loris_session_tokens(NULL, buf, N_IDS, &n));
    CASE(bad, loris_session_tokens(session, NULL, N_IDS, &n));
    CASE(bad, loris_session_tokens(session, buf, N_IDS, NULL));
    CASE(bad, loris_session_get_receipt(NULL, &(loris_receipt){.struct_size = sizeof(loris_receipt)}));
    CASE(bad, loris_session_get_receipt(session, NULL));
    CASE(bad, loris_session_save(NULL, (uint8_t *)buf, 4, &n));
    CASE(bad, loris_session_save(session, NULL, 4, &n));
    CASE(bad, loris_session_save(session, NULL, 0, NULL));
    CASE(bad, loris_session_save_file(NULL, "x"));
    CASE(bad, loris_session_save_file(session, NULL));
    CASE(bad, loris_session_restore(NULL, (uint8_t *)buf, 4, NULL, &none));
    CASE(bad, loris_session_restore(model, NULL, 4, NULL, &none));
    CASE(bad, loris_session_restore(model, (uint8_t *)buf, 4, NULL, NULL));
    CASE(bad, loris_session_restore_file(NULL, "x", NULL, &none));
    CASE(bad, loris_session_restore_file(model, NULL, NULL, &none));
    CASE(bad, loris_session_restore_file(model, "x", NULL, NULL));
    HOLDS(none == NULL);

    MUST(loris_generate_params_init(&params, sizeof params));
    params.n_stop = 1;
    KEPT(session, bad, loris_session_generate(session, &params)); /* stop is NULL */
    params.stop = &missing;
    KEPT(session, bad, loris_session_generate(session, &params)); /* stop[0] is NULL */

    MUST(loris_text_stream_open(model, 0, &stream));
    CASE(bad, loris_text_stream_push(stream, ids[0], NULL, &n));
    CASE(bad, loris_text_stream_push(stream, ids[0], &text, NULL));
    CASE(bad, loris_text_stream_finish(stream, NULL, &n));
    CASE(LORIS_OK, loris_text_stream_finish(stream, &text, &n));

    loris_engine_free(NULL);
    loris_model_free(NULL);
    loris_session_free(NULL);
    loris_text_stream_free(NULL);
    HOLDS(pages_used(model) > 0); /* whatever was freed, it was not this */
    loris_text_stream_free(stream);
    loris_session_free(session);
}

static void other_kinds(void) {
    const int32_t bad = LORIS_E_INVALID_ARG;
    loris_session *session = open_filled(model, 8), *none;
    loris_text_stream *stream;
    loris_model *no_model;
    int32_t status;
    MUST(loris_text_stream_open(model, 0, &stream));
    CASE(bad, loris_model_open((loris_engine *)model, dir, NULL, &no_model));
    SAYS("engine");
    CASE(bad, loris_session_open((loris_model *)engine, NULL, &none));
    SAYS("model");
    CASE(bad, loris_session_decode((loris_session *)model, 5));
    SAYS("session");
    CASE(bad, loris_session_cancel((loris_session *)stream));
    CASE(bad, loris_text_stream_push((loris_text_stream *)session, 5, &(const char *){NULL}, &n));
    CASE(bad, loris_model_step((loris_model *)session, &session, 1, &status));
    none = (loris_session *)stream;
    HOLDS(loris_model_step(model, &none, 1, &status) == LORIS_OK && status == bad);
    CASE(bad, loris_session_decode((loris_session *)odd(session), 5));

    /* Freed by the function of another kind: nothing happens, and each is still what it was. */
    loris_engine_free((loris_engine *)session);
    loris_model_free((loris_model *)stream);
    loris_session_free((loris_session *)engine);
    loris_text_stream_free((loris_text_stream *)model);
    KEPT(session, LORIS_OK, loris_text_stream_push(stream, ids[0], &(const char *){NULL}, &n));
    loris_text_stream_free(stream);
    loris_session_free(session);
}

/* ---- Structs ------------------------------------------------------------------------------------------------- */

static int32_t open_engine(void *params) {
    loris_engine *opened;
    int32_t status = loris_engine_open(params, &opened);
    loris_engine_free(opened);
    return status;
}

static int32_t open_session_with(void *params) {
    loris_session *opened;
    int32_t status = loris_session_open(model, params, &opened);
    loris_session_free(opened);
    return status;
}

static int32_t open_model_with(void *params) {
    loris_model *opened;
    int32_t status = loris_model_open(engine, dir, params, &opened);
    loris_model_free(opened);
    return status;
}

static void struct_sizes(void) {
    const int32_t bad = LORIS_E_INVALID_ARG;
    union {
        loris_engine_params engine;
        loris_session_params session;
        loris_receipt receipt;
        unsigned char bytes[8192];
    } p;
    loris_session *session = open_filled(model, 8);
    memset(&p, 0, sizeof p);
    CASE(bad, open_engine(&p)); /* 0 */
    SAYS("struct_size");
    p.engine.struct_size = 4;
    CASE(bad, open_engine(&p));
    p.engine.struct_size = sizeof p.engine + 3;
    CASE(bad, open_engine(&p));
    p.engine.struct_size = sizeof p;
    CASE(bad, open_engine(&p));
    p.engine.struct_size = UINT32_MAX;
    CASE(bad, open_engine(&p));
    CASE(bad, loris_engine_params_init(&p.engine, 0));
    CASE(bad, loris_engine_params_init(&p.engine, 4));
    CASE(bad, loris_engine_params_init(&p.engine, sizeof p.engine - 1));
    CASE(bad, loris_engine_params_init(&p.engine, SIZE_MAX));
    CASE(bad, loris_engine_params_init((loris_engine_params *)odd(&p), sizeof p.engine));
    CASE(bad, open_engine(odd(&p)));

    /* A host of the first version: what it does not know gets its default, and its memory after that is its own. */
    memset(&p, 0xab, sizeof p);
    CASE(LORIS_OK, loris_engine_params_init(&p.engine, 40));
    HOLDS(p.engine.struct_size == 40 && p.bytes[40] == 0xab);
    CASE(LORIS_OK, open_engine(&p));
    memset(&p, 0xab, sizeof p);
    CASE(LORIS_OK, loris_session_params_init(&p.session, 16));
    HOLDS(p.session.struct_size == 16 && p.bytes[16] == 0xab);
    CASE(LORIS_OK, open_session_with(&p));

    /* A host of a later version: fine as long as it leaves alone what this library does not know. */
    CASE(LORIS_OK, loris_session_params_init(&p.session, 256));
    HOLDS(p.bytes[255] == 0 && p.bytes[256] == 0xab);
    CASE(LORIS_OK, open_session_with(&p));
    p.bytes[200] = 1;
    CASE(LORIS_E_UNSUPPORTED, open_session_with(&p));
    SAYS("does not know");
    p.bytes[200] = 0;
    p.bytes[sizeof p.session] = 1;
    CASE(LORIS_E_UNSUPPORTED, open_session_with(&p));

    /* Structs that are filled. */
    memset(&p, 0xab, sizeof p);
    p.receipt.struct_size = 0;
    CASE(bad, loris_session_get_receipt(session, &p.receipt));
    p.receipt.struct_size = sizeof p.receipt + 8;
    CASE(LORIS_OK, loris_session_get_receipt(session, &p.receipt));
    HOLDS(p.receipt.n_tokens == 8 && p.bytes[sizeof p.receipt] == 0 && p.bytes[sizeof p.receipt + 8] == 0xab);
    CASE(bad, loris_model_get_info(model, &(loris_model_info){.struct_size = 12}));
    CASE(bad, loris_model_get_kv_info(model, &(loris_kv_info){.struct_size = 12}));
    CASE(bad, loris_model_sampling_params(model, &(loris_sampling_params){.struct_size = 12}));
    loris_session_free(session);
}

static int32_t set_sampling(loris_session *session, float temperature, float top_p, float min_p, float penalty) {
    loris_sampling_params params;
    loris_sampling_params_init(&params, sizeof params);
    params.temperature = temperature;
    params.top_p = top_p;
    params.min_p = min_p;
    params.repetition_penalty = penalty;
    return loris_session_set_sampling(session, &params);
}

static void fields(void) {
    const int32_t bad = LORIS_E_INVALID_ARG;
    loris_engine_params e;
    loris_model_params m;
    loris_session_params s;
    loris_sampling_params p;
    loris_generate_params g;
    loris_session *session = open_filled(model, 8);
#define ENGINE(field, value) (loris_engine_params_init(&e, sizeof e), e.field = value, open_engine(&e))
#define MODEL(field, value) (loris_model_params_init(&m, sizeof m), m.field = value, open_model_with(&m))
#define SESSION(field, value) (loris_session_params_init(&s, sizeof s), s.field = value, open_session_with(&s))
#define SAMPLING(field, value)                                                                                         \
    (loris_sampling_params_init(&p, sizeof p), p.field = value, loris_session_set_sampling(session, &p))
#define GENERATE(field, value)                                                                                         \
    (loris_generate_params_init(&g, sizeof g), g.field = value, loris_session_generate(session, &g))
    CASE(bad, ENGINE(flags, 1));
    SAYS("flags");
    CASE(bad, ENGINE(device, "quantum"));
    SAYS("quantum");
    CASE(bad, ENGINE(device, ""));
    CASE(bad, ENGINE(device, "cuda:-1"));
    CASE(bad, ENGINE(device, "cuda:99999999999"));
    CASE(bad, ENGINE(device, "\xff"));
    CASE(bad, ENGINE(threads, 100000));
    CASE(bad, ENGINE(log_level, 0));
    CASE(bad, ENGINE(log_level, 4));
    CASE(bad, MODEL(flags, 0x80000000));
    CASE(bad, MODEL(reserved, 1));
    CASE(bad, MODEL(load, "teleport"));
    CASE(bad, MODEL(load, "\xc3"));
    CASE(bad, MODEL(kv, "int3"));
    CASE(bad, MODEL(kv_tokens, (uint64_t)1 << 60));
    CASE(bad, MODEL(kv_tokens, UINT64_MAX));
    CASE(LORIS_E_OOM_HOST, MODEL(kv_tokens, (uint64_t)1 << 32)); /* terabytes */
    CASE(bad, MODEL(page_len, 0));
    CASE(bad, MODEL(page_len, 17));
    CASE(bad, MODEL(page_len, 512));
    CASE(bad, MODEL(page_len, UINT32_MAX));
    CASE(bad, MODEL(chunk, 0));
    CASE(bad, MODEL(chunk, 65537));
    CASE(bad, MODEL(batch, 0));
    CASE(bad, MODEL(batch, 4097));
    CASE(LORIS_CANCELLED, MODEL(progress, stop_at_once));
    CASE(bad, SESSION(flags, 2));
    CASE(bad, SESSION(ctx_len, (uint64_t)1 << 40));
    CASE(bad, SESSION(ctx_len, UINT64_MAX));
    CASE(bad, MODEL(aux_tokens, UINT64_MAX));
    SAYS("aux");
    CASE(bad, SESSION(lazy, "balanced"));
    SAYS("lazy");
    CASE(bad, SESSION(lazy, ""));
    CASE(bad, SESSION(lazy, "\xff"));
    CASE(bad, SESSION(lazy, "1:2"));
    CASE(bad, SESSION(lazy, "1:0.5")); /* the model was opened without aux_tokens */
    SAYS("aux");
    CASE(bad, SESSION(evict, "lru:1"));
    SAYS("evict");
    CASE(LORIS_E_UNSUPPORTED, SESSION(sparse, "top"));
    SAYS("sparse");
    CASE(bad, SESSION(sink, 4)); /* without a window */
    SAYS("window");
    CASE(bad, SESSION(sink, UINT64_MAX));
    SAYS("sink");
    CASE(bad, SESSION(window, UINT64_MAX));
    SAYS("window");
    KEPT(session, bad, SAMPLING(flags, 1));
    KEPT(session, bad, SAMPLING(reserved, 1));
    KEPT(session, bad, set_sampling(session, NAN, 1, 0, 1));
    KEPT(session, bad, set_sampling(session, -1, 1, 0, 1));
    KEPT(session, bad, set_sampling(session, 101, 1, 0, 1));
    KEPT(session, bad, set_sampling(session, INFINITY, 1, 0, 1));
    KEPT(session, bad, set_sampling(session, 1, 0, 0, 1));
    KEPT(session, bad, set_sampling(session, 1, NAN, 0, 1));
    KEPT(session, bad, set_sampling(session, 1, 1.5F, 0, 1));
    KEPT(session, bad, set_sampling(session, 1, 1, -0.5F, 1));
    KEPT(session, bad, set_sampling(session, 1, 1, NAN, 1));
    KEPT(session, bad, set_sampling(session, 1, 1, 0, 0));
    KEPT(session, bad, set_sampling(session, 1, 1, 0, NAN));
    KEPT(session, bad, SAMPLING(typical_p, 0));
    KEPT(session, bad, SAMPLING(typical_p, NAN));
    KEPT(session, bad, SAMPLING(presence_penalty, INFINITY));
    KEPT(session, bad, SAMPLING(frequency_penalty, -101));
    KEPT(session, bad, SAMPLING(n_bias, 1)); /* of NULL */
    KEPT(session, bad, SAMPLING(n_bias, SIZE_MAX));
    CASE(LORIS_OK, SAMPLING(top_k, UINT32_MAX));
    MUST(loris_session_set_sampling(session, NULL));
    KEPT(session, bad, GENERATE(flags, 4));
    KEPT(session, bad, GENERATE(min_tokens, 1000)); /* more than max_tokens */
    KEPT(session, bad, GENERATE(n_stop_ids, SIZE_MAX));
    KEPT(session, bad, GENERATE(n_stop_ids, 1)); /* of NULL */
    KEPT(session, bad, GENERATE(n_stop, SIZE_MAX));
    KEPT(session, LORIS_OK, GENERATE(max_tokens, 0));
    loris_session_free(session);
}

/* ---- Texts, paths, tokens, buffers --------------------------------------------------------------------------- */

static int is_utf8_prefix(const char *part, const char *whole, size_t room) {
    size_t len = strlen(part);
    if (len >= room || strncmp(part, whole, len) != 0) return 0;
    /* It ends before a byte that starts a character, and it is as long as the room allows. */
    return (whole[len] & 0xc0) != 0x80 && (whole[len] == 0 || room - 1 - len < 4);
}

static void texts(void) {
    const int32_t bad = LORIS_E_INVALID_ARG;
    const char *user = "user", *odd_text = "\xff", *hi = "hi";
    loris_model *bare = open_model(bare_dir, 256), *none;
    loris_session *session = open_filled(model, 8), *no_session;
    loris_text_stream *stream;
    const char *text, *stop = "\xff";
    char whole[1024], part[1024];
    loris_generate_params params;
    size_t cap, all, wrong = 0;
    int32_t status;

    CASE(bad, loris_tokenize(model, "caf\xe9", 4, 0, buf, N_IDS, &n));
    CASE(bad, loris_tokenize(model, "a\xed\xa0\x80", 4, 0, buf, N_IDS, &n)); /* half of a surrogate pair */
    CASE(bad, loris_tokenize(model, "a", SIZE_MAX, 0, buf, N_IDS, &n));
    CASE(bad, loris_tokenize(model, "a", 1, 4, buf, N_IDS, &n));
    CASE(LORIS_OK, loris_tokenize(model, "a\0b", 3, 0, buf, N_IDS, &n)); /* a NUL is a character like others */
    CASE(bad, loris_detokenize(model, ids, 1, 2, (char *)buf, 64, &n));
    CASE(bad, loris_chat_tokenize(model, &user, &odd_text, 1, 0, buf, N_IDS, &n));
    CASE(bad, loris_chat_tokenize(model, &odd_text, &hi, 1, 0, buf, N_IDS, &n));
    CASE(bad, loris_chat_tokenize(model, &user, &hi, 1, 2, buf, N_IDS, &n));
    CASE(bad, loris_chat_tokenize(model, &user, &hi, SIZE_MAX, 0, buf, N_IDS, &n));
    CASE(bad, loris_chat_render(model, &user, &hi, 1, 2, (char *)buf, 64, &n));
    {
        const char *request = "{\"messages\": [{\"role\": \"user\", \"content\": \"hi\"}]}", *odd = "{\"what\": 1}";
        size_t as_json, as_lists;
        CASE(bad, loris_chat_tokenize_json(model, request, strlen(request) - 1, 0, buf, N_IDS, &n));
        CASE(bad, loris_chat_tokenize_json(model, request, strlen(request), 1, buf, N_IDS, &n));
        CASE(bad, loris_chat_tokenize_json(model, odd, strlen(odd), 0, buf, N_IDS, &n));
        SAYS("what");
        CASE(bad, loris_chat_render_json(model, odd, strlen(odd), 0, (char *)buf, 64, &n));
        CASE(LORIS_OK, loris_chat_tokenize_json(model, request, strlen(request), 0, NULL, 0, &as_json));
        CASE(LORIS_OK, loris_chat_tokenize(model, &user, &hi, 1, LORIS_ADD_GENERATION_PROMPT, NULL, 0, &as_lists));
        HOLDS(as_json == as_lists);
        CASE(LORIS_OK, loris_chat_render_json(model, request, strlen(request), 0, NULL, 0, &as_json));
        CASE(LORIS_OK, loris_chat_render(model, &user, &hi, 1, LORIS_ADD_GENERATION_PROMPT, NULL, 0, &as_lists));
        HOLDS(as_json == as_lists);
        CASE(LORIS_E_UNSUPPORTED, loris_chat_tokenize_json(bare, request, strlen(request), 0, buf, N_IDS, &n));
        CASE(LORIS_E_UNSUPPORTED, loris_chat_render_json(bare, request, strlen(request), 0, (char *)buf, 64, &n));
    }
    CASE(bad, loris_model_open(engine, "\xff", NULL, &none));
    HOLDS(none == NULL);
    CASE(LORIS_E_IO, loris_model_open(engine, "", NULL, &none));
    CASE(bad, loris_session_save_file(session, "\xff"));
    CASE(bad, loris_session_restore_file(model, "\xff", NULL, &no_session));
    HOLDS(loris_has_feature("\xff") == 0);
    MUST(loris_generate_params_init(&params, sizeof params));
    params.stop = &stop;
    params.n_stop = 1;
    KEPT(session, bad, loris_session_generate(session, &params));

    /* A folder without a tokenizer or a template. */
    CASE(LORIS_E_UNSUPPORTED, loris_tokenize(bare, "a", 1, 0, buf, N_IDS, &n));
    CASE(LORIS_E_UNSUPPORTED, loris_max_tokens(bare, 1, &n));
    CASE(LORIS_E_UNSUPPORTED, loris_detokenize(bare, ids, 1, 0, (char *)buf, 64, &n));
    CASE(LORIS_E_UNSUPPORTED, loris_text_stream_open(bare, 0, &stream));
    HOLDS(stream == NULL);
    CASE(LORIS_E_UNSUPPORTED, loris_chat_tokenize(bare, &user, &hi, 1, 0, buf, N_IDS, &n));
    CASE(LORIS_E_UNSUPPORTED, loris_chat_render(bare, &user, &hi, 1, 0, (char *)buf, 64, &n));

    /* Streams. */
    CASE(bad, loris_text_stream_open(model, 4, &stream));
    CASE(bad, loris_text_stream_open_after(model, ids, 2, 4, &stream));
    CASE(bad, loris_text_stream_open_after(model, (uint32_t[]){1u << 30}, 1, 0, &stream));
    HOLDS(stream == NULL);
    CASE(LORIS_OK, loris_text_stream_open_after(model, NULL, 0, 0, &stream));
    loris_text_stream_free(stream);
    CASE(LORIS_OK, loris_text_stream_open_after(model, ids, 2, 0, &stream));
    CASE(LORIS_OK, loris_text_stream_push(stream, ids[2], &text, &n));
    loris_text_stream_free(stream);
    MUST(loris_text_stream_open(model, 0, &stream));
    CASE(bad, loris_text_stream_push(stream, 1u << 30, &text, &n));
    CASE(LORIS_OK, loris_text_stream_push(stream, ids[0], &text, &n));
    CASE(LORIS_OK, loris_text_stream_finish(stream, &text, &n));
    CASE(LORIS_E_STATE, loris_text_stream_finish(stream, &text, &n));
    CASE(LORIS_E_STATE, loris_text_stream_push(stream, ids[0], &text, &n));
    loris_text_stream_free(stream);

    /* A message that is cut is cut between characters. */
    status = loris_model_open(engine, "/nowhere/\xc3\xa4\xe2\x82\xac\xf0\x9f\x8e\x89\xc3\xa4\xe2\x82\xac", NULL, &none);
    HOLDS(status == LORIS_E_IO);
    all = loris_last_error(whole, sizeof whole);
    HOLDS(all == strlen(whole) && strstr(whole, "\xf0\x9f\x8e\x89") != NULL);
    HOLDS(loris_last_error(NULL, 0) == all && loris_last_error(NULL, 100) == all && loris_last_error(part, 0) == all);
    for (cap = 1; cap < all + 3; cap++) {
        memset(part, 'x', sizeof part);
        wrong += loris_last_error(part, cap) != all || !is_utf8_prefix(part, whole, cap) || part[cap] != 'x';
    }
    HOLDS(wrong == 0);
    loris_model_free(bare);
    loris_session_free(session);
}

static void tokens(void) {
    const int32_t bad = LORIS_E_INVALID_ARG;
    uint32_t wrong[3] = {5, 128, 5};
    loris_session *session = open_filled(model, 8), *empty = open_session(model);
    KEPT(session, bad, loris_session_prefill(session, wrong, 3, NULL, NULL));
    SAYS("128");
    KEPT(session, bad, loris_session_decode(session, 128));
    KEPT(session, bad, loris_session_decode(session, LORIS_NO_TOKEN));
    KEPT(session, bad, loris_session_feed(session, wrong, 3));
    KEPT(session, bad, loris_session_push(session, UINT32_MAX));
    KEPT(session, bad, loris_session_score(session, wrong, 3, ignore_logits, NULL));
    KEPT(session, bad, loris_session_prefill(session, odd(ids), 3, NULL, NULL));
    SAYS("aligned");
    KEPT(session, bad, loris_session_feed(session, odd(ids), 3));
    KEPT(session, bad, loris_session_prefill(session, ids, SIZE_MAX, NULL, NULL));
    KEPT(session, bad, loris_session_prefill(session, ids, SIZE_MAX / 4, NULL, NULL));
    KEPT(session, bad, loris_session_score(session, ids, SIZE_MAX, ignore_logits, NULL));
    CASE(bad, loris_model_step(model, &session, SIZE_MAX, &(int32_t){0}));
    CASE(bad, loris_session_logits(session, (float *)odd(buf), N_IDS - 1, &n));
    CASE(bad, loris_session_tokens(session, odd(buf), N_IDS - 1, &n));
    CASE(bad, loris_session_tokens(session, buf, N_IDS, (size_t *)(void *)odd(buf)));
    CASE(bad, loris_session_tokens(session, buf, SIZE_MAX, &n));
    KEPT(session, bad, loris_session_prefill(session, ids, 0, NULL, NULL));
    KEPT(session, bad, loris_session_feed(session, NULL, 0));
    KEPT(session, LORIS_CTX_FULL, loris_session_prefill(session, ids, 249, NULL, NULL));
    SAYS("257");
    KEPT(session, LORIS_CTX_FULL, loris_session_feed(session, ids, 249));
    KEPT(session, LORIS_CTX_FULL, loris_session_score(session, ids, 249, ignore_logits, NULL));

    /* A session without tokens. */
    KEPT(empty, LORIS_E_STATE, loris_session_push(empty, 5));
    KEPT(empty, LORIS_E_STATE, loris_session_decode(empty, 5));
    KEPT(empty, LORIS_E_STATE, loris_session_sample(empty, buf));
    HOLDS(buf[0] == LORIS_NO_TOKEN);
    CASE(LORIS_E_STATE, loris_session_logits(empty, NULL, 0, &n));
    KEPT(empty, LORIS_E_STATE, loris_session_generate(empty, NULL));
    KEPT(empty, LORIS_OK, loris_session_truncate(empty, UINT64_MAX));
    KEPT(empty, LORIS_OK, loris_session_clear(empty));
    MUST(loris_session_truncate(session, 4));
    KEPT(session, LORIS_E_STATE, loris_session_sample(session, buf));
    KEPT(session, LORIS_E_STATE, loris_session_generate(session, NULL));
    loris_session_free(session);
    loris_session_free(empty);
}

/* The buffer is written if it is large enough, and not touched else; the length is always told. */
#define ROOMS(call, unit, needed, nul)                                                                                 \
    do {                                                                                                               \
        size_t cap = 0, told;                                                                                          \
        unsigned char *out = (unsigned char *)big;                                                                     \
        memset(big, 0xab, sizeof big);                                                                                 \
        n = SIZE_MAX;                                                                                                  \
        CASE(LORIS_OK, call(NULL, cap));                                                                               \
        told = n;                                                                                                      \
        HOLDS(told == (size_t)(needed) && told > 1);                                                                   \
        cap = told + (nul) - 1;                                                                                        \
        CASE(LORIS_BUFFER_TOO_SMALL, call((void *)big, cap));                                                          \
        HOLDS(n == told && out[0] == 0xab && out[told * (unit)-1] == 0xab);                                            \
        cap = told + (nul);                                                                                            \
        CASE(LORIS_OK, call((void *)big, cap));                                                                        \
        HOLDS(n == told && out[(told + (nul)) * (unit)] == 0xab);                                                      \
        cap = told + (nul) + 1;                                                                                        \
        CASE(LORIS_OK, call((void *)big, cap));                                                                        \
        HOLDS(n == told && out[(told + (nul)) * (unit)] == 0xab);                                                      \
    } while (0)

static void buffers(void) {
    static uint64_t big[1 << 16];
    const char *user = "user", *hi = "hi";
    loris_session *session = open_filled(model, 24);
    size_t n_info, n_saved;
    MUST(loris_build_info(NULL, 0, &n_info));
    MUST(loris_session_save(session, NULL, 0, &n_saved));
#define TOKENIZE(b, c) loris_tokenize(model, "hello", 5, 0, b, c, &n)
#define DETOKENIZE(b, c) loris_detokenize(model, ids, 7, 0, b, c, &n)
#define CHAT(b, c) loris_chat_tokenize(model, &user, &hi, 1, LORIS_ADD_GENERATION_PROMPT, b, c, &n)
#define RENDER(b, c) loris_chat_render(model, &user, &hi, 1, LORIS_ADD_GENERATION_PROMPT, b, c, &n)
#define TOKENS(b, c) loris_session_tokens(session, b, c, &n)
#define LOGITS(b, c) loris_session_logits(session, b, c, &n)
#define SAVE(b, c) loris_session_save(session, b, c, &n)
#define INFO(b, c) loris_build_info(b, c, &n)
#define DEVICE(b, c) loris_model_device(model, b, c, &n)
    ROOMS(TOKENIZE, 4, 5, 0);
    ROOMS(DETOKENIZE, 1, 7, 1);
    ROOMS(CHAT, 4, n, 0);
    ROOMS(RENDER, 1, n, 1);
    ROOMS(TOKENS, 4, 24, 0);
    ROOMS(LOGITS, 4, 128, 0);
    ROOMS(SAVE, 1, n_saved, 0);
    ROOMS(INFO, 1, n_info, 1);
    ROOMS(DEVICE, 1, 3, 1);
    CASE(LORIS_BUFFER_TOO_SMALL, loris_model_eos_tokens(model, buf, 0, &n));
    CASE(LORIS_OK, loris_model_eos_tokens(model, buf, 1, &n));
    loris_session_free(session);
}

static loris_receipt receipt_of(loris_session *session) {
    loris_receipt receipt;
    receipt.struct_size = sizeof receipt;
    MUST(loris_session_get_receipt(session, &receipt));
    return receipt;
}

/* A session that draws tokens; the same from any that is given the same seed. */
static loris_session *open_drawing(const loris_sampling_params *params, uint32_t drawn[16]) {
    loris_session *session = open_filled(model, 8);
    int i;
    MUST(loris_session_set_sampling(session, params));
    for (i = 0; i < 16; i++) MUST(loris_session_sample(session, drawn + i));
    return session;
}

static void seeds(void) {
    loris_sampling_params params;
    loris_session *a, *b, *fork, *other;
    uint32_t of_a[16], of_b[16];
    uint64_t seed;
    MUST(loris_sampling_params_init(&params, sizeof params));
    HOLDS(params.seed == LORIS_RANDOM_SEED);
    MUST(loris_model_sampling_params(model, &params));
    HOLDS(params.seed == LORIS_RANDOM_SEED);
    params.temperature = 50;
    a = open_drawing(&params, of_a);
    b = open_drawing(&params, of_b);
    seed = receipt_of(a).seed;
    HOLDS(seed < (uint64_t)1 << 53 && seed != receipt_of(b).seed);
    HOLDS(memcmp(of_a, of_b, sizeof of_a) != 0);
    loris_session_free(b);
    params.seed = seed;
    b = open_drawing(&params, of_b);
    HOLDS(receipt_of(b).seed == seed && memcmp(of_a, of_b, sizeof of_a) == 0);
    MUST(loris_session_fork(b, &fork));
    MUST(loris_session_fork(b, &other));
    HOLDS(receipt_of(b).seed == seed);
    HOLDS(receipt_of(fork).seed != seed && receipt_of(other).seed != receipt_of(fork).seed);
    seed = receipt_of(fork).seed;
    loris_session_free(fork);
    MUST(loris_session_set_sampling(b, &params)); /* the count of forks begins anew */
    MUST(loris_session_fork(b, &fork));
    HOLDS(receipt_of(fork).seed == seed);
    loris_session_free(b);
    params.seed = 0;
    b = open_drawing(&params, of_b);
    HOLDS(receipt_of(b).seed == 0);
    loris_session_free(a);
    a = open_drawing(&params, of_a);
    HOLDS(memcmp(of_a, of_b, sizeof of_a) == 0);
    loris_session_free(a);
    loris_session_free(b);
    loris_session_free(fork);
    loris_session_free(other);
}

/* Back to where what was seen is gone. */
static void truncated(void) {
    const char *policies[] = {NULL, "tova:32"};
    int i;
    for (i = 0; i < 2; i++) {
        loris_session_params params;
        loris_session *session;
        uint64_t least;
        MUST(loris_session_params_init(&params, sizeof params));
        params.evict = policies[i];
        if (!policies[i]) params.sink = 4, params.window = 32;
        MUST(loris_session_open(model, &params, &session));
        HOLDS(receipt_of(session).least_tokens == 0);
        MUST(loris_session_prefill(session, ids, 100, NULL, NULL));
        MUST(loris_session_decode(session, 5));
        least = receipt_of(session).least_tokens;
        HOLDS(least > 80 && least < 101);
        KEPT(session, LORIS_E_STATE, loris_session_truncate(session, least - 1));
        SAYS("least");
        KEPT(session, LORIS_E_STATE, loris_session_truncate(session, 1));
        KEPT(session, LORIS_OK, loris_session_truncate(session, 101));
        CASE(LORIS_OK, loris_session_truncate(session, least));
        HOLDS(receipt_of(session).n_tokens == least);
        CASE(LORIS_OK, loris_session_truncate(session, 0));
        HOLDS(receipt_of(session).n_tokens == 0 && receipt_of(session).kv_bytes == 0);
        loris_session_free(session);
    }
}

static void run_cases(void) {
    null_pointers();
    other_kinds();
    struct_sizes();
    fields();
    texts();
    tokens();
    buffers();
    seeds();
    truncated();
}
