/*
 * A program of the first version of the interface, complete and small: old_program MODEL
 *
 * It is compiled with the header of that time and with today's, and has to print the same with today's library. So it
 * uses nothing that came later, and fills every struct that there was.
 */
#include <loris.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void check(int32_t status, const char *what) {
    char message[512];
    if (status == LORIS_OK) return;
    loris_last_error(message, sizeof message);
    fprintf(stderr, "%s: status %d: %s\n", what, (int)status, message);
    exit(1);
}

static void on_log(void *user_data, int32_t level, const char *message) {
    (void)message;
    *(int *)user_data += level > 0;
}

static int32_t on_progress(void *user_data, uint64_t done, uint64_t total) {
    *(int *)user_data += done > total;
    return 0;
}

static int32_t on_token(void *user_data, uint32_t token, const char *text, size_t text_len) {
    (void)user_data;
    printf("%lu ", (unsigned long)token);
    fwrite(text, 1, text_len, stdout);
    printf("\n");
    return 0;
}

int main(int argc, char **argv) {
    const char *text = "an old program", *stop = "never";
    loris_engine_params engine_params;
    loris_model_params model_params;
    loris_session_params session_params;
    loris_sampling_params sampling;
    loris_generate_params params;
    loris_model_info info;
    loris_kv_info kv;
    loris_receipt receipt;
    loris_engine *engine;
    loris_model *model;
    loris_session *session, *fork;
    uint32_t tokens[64];
    uint8_t *bytes;
    size_t n;
    int n_messages = 0, n_odd = 0;

    if (argc != 2) return 2;
    if (loris_abi_version() >> 16 != LORIS_ABI_VERSION >> 16 || loris_abi_version() < LORIS_ABI_VERSION) return 1;
    check(loris_engine_params_init(&engine_params, sizeof engine_params), "engine");
    engine_params.device = "cpu";
    engine_params.threads = 2;
    engine_params.log = on_log;
    engine_params.log_data = &n_messages;
    check(loris_engine_open(&engine_params, &engine), "engine");
    check(loris_model_params_init(&model_params, sizeof model_params), "model");
    model_params.load = "read";
    model_params.kv = "f32";
    model_params.kv_tokens = 512;
    model_params.page_len = 32;
    model_params.progress = on_progress;
    model_params.progress_data = &n_odd;
    check(loris_model_open(engine, argv[1], &model_params, &model), argv[1]);
    info.struct_size = sizeof info;
    check(loris_model_get_info(model, &info), "info");
    printf("%u layers, %u tokens, %u, %u\n", info.n_layers, info.vocab_size, info.has_tokenizer,
           info.has_chat_template);

    check(loris_session_params_init(&session_params, sizeof session_params), "session");
    session_params.ctx_len = 100;
    check(loris_session_open(model, &session_params, &session), "session");
    check(loris_tokenize(model, text, strlen(text), LORIS_ADD_EDGES, tokens, 64, &n), "tokenize");
    check(loris_session_prefill(session, tokens, n, on_progress, &n_odd), "prefill");
    check(loris_sampling_params_init(&sampling, sizeof sampling), "sampling");
    sampling.temperature = 0.8F;
    sampling.top_p = 0.95F;
    sampling.seed = 7;
    check(loris_session_set_sampling(session, &sampling), "sampling");
    check(loris_session_fork(session, &fork), "fork");
    check(loris_generate_params_init(&params, sizeof params), "generate");
    params.flags = LORIS_IGNORE_EOS;
    params.max_tokens = 12;
    params.stop = &stop;
    params.n_stop = 1;
    params.on_token = on_token;
    check(loris_session_generate(session, &params), "generate");
    check(loris_session_generate(fork, &params), "generate");

    receipt.struct_size = sizeof receipt;
    check(loris_session_get_receipt(session, &receipt), "receipt");
    printf("%lu of %lu tokens, %lu bytes, %lu and %lu computed\n", (unsigned long)receipt.n_tokens,
           (unsigned long)receipt.ctx_len, (unsigned long)receipt.kv_bytes, (unsigned long)receipt.n_prefilled,
           (unsigned long)receipt.n_decoded);
    kv.struct_size = sizeof kv;
    check(loris_model_get_kv_info(model, &kv), "pool");
    printf("%lu of %lu pages of %u tokens\n", (unsigned long)kv.n_used, (unsigned long)kv.n_pages, kv.page_len);
    check(loris_session_save(session, NULL, 0, &n), "save");
    bytes = malloc(n);
    if (!bytes) abort();
    check(loris_session_save(session, bytes, n, &n), "save");
    loris_session_free(session);
    check(loris_session_restore(model, bytes, n, &session_params, &session), "restore");
    printf("%lu bytes saved; %d messages, %d odd\n", (unsigned long)n, n_messages, n_odd);
    free(bytes);

    loris_engine_free(engine);
    loris_model_free(model);
    loris_session_free(session);
    loris_session_free(fork);
    return 0;
}
