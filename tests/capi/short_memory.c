/*
 * A session's life with as much address space as is given: short_memory MODEL FILE LIMIT
 *
 * LIMIT is in bytes; 0: no limit. Prints one line: each step with its status, until one is refused for want of memory that
 * the next ones build on; with no limit also the peak of the address space in KiB at the start, after loading and at the end.
 * A status that is neither LORIS_OK nor LORIS_E_OOM_HOST is a failure.
 */
#define _POSIX_C_SOURCE 200809L
#include <loris.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

enum { N_BYTES = 2000, N_LONG = 768 << 10, N_FORKS = 400 };

static char text[N_BYTES + 1], long_text[N_LONG];
static uint32_t ids[N_BYTES + 1];
/* What is printed is kept here: neither stdio nor this program asks for memory in between. */
static char line[1024];

static void say(const char *what, long number) {
    size_t at = strlen(line);
    snprintf(line + at, sizeof line - at, "%s%s %ld", at ? ", " : "", what, number);
}

static void leave(int code) {
    size_t n = strlen(line);
    line[n] = '\n';
    if (write(1, line, n + 1) != (ssize_t)n + 1) code = 1;
    _exit(code);
}

/* True if the step was done. */
static int done(const char *what, int32_t status) {
    char message[512];
    say(what, status);
    if (status == LORIS_OK) return 1;
    loris_last_error(message, sizeof message);
    if (status != LORIS_E_OOM_HOST) {
        if (write(2, message, strlen(message)) < 0) _exit(2);
        leave(1);
    }
    return 0;
}

static long peak(void) {
    static char status[8192];
    FILE *file = fopen("/proc/self/status", "r");
    size_t n = file ? fread(status, 1, sizeof status - 1, file) : 0;
    const char *found = strstr(status, "VmPeak:");
    if (file) fclose(file);
    status[n] = 0;
    return found ? atol(found + 7) : 0;
}

static loris_engine *engine;
static loris_model *model;

static int load(const char *dir) {
    loris_engine_params engine_params;
    loris_model_params params;
    loris_engine_params_init(&engine_params, sizeof engine_params);
    engine_params.device = "cpu";
    engine_params.threads = 3;
    if (!done("engine", loris_engine_open(&engine_params, &engine))) return 0;
    loris_model_params_init(&params, sizeof params);
    params.kv_tokens = 3 * N_BYTES;
    params.aux_tokens = N_BYTES;
    return done("load", loris_model_open(engine, dir, &params, &model));
}

/* Opens a session as said and takes it through everything. */
static void live(const char *kind, const char *lazy, const char *evict, size_t n, const char *file) {
    loris_session_params params;
    loris_session *session, *restored, *forks[N_FORKS];
    uint8_t *saved;
    size_t n_saved = 0, n_forks = 0;
    int32_t status = LORIS_OK;
    say(kind, (long)n);
    loris_session_params_init(&params, sizeof params);
    params.lazy = lazy;
    params.evict = evict;
    if (!done("session", loris_session_open(model, &params, &session))) return;
    if (done("prefill", loris_session_prefill(session, ids, n, NULL, NULL))) {
        /* So many that there is little left for what follows. */
        while (n_forks < N_FORKS && !status)
            if (!(status = loris_session_fork(session, &forks[n_forks]))) n_forks++;
        done("fork", status);
        say("forks", (long)n_forks);
        if (n_forks && done("decode", loris_session_decode(forks[0], 9))) {
            loris_generate_params generate;
            loris_generate_params_init(&generate, sizeof generate);
            generate.max_tokens = 4;
            generate.flags = LORIS_IGNORE_EOS;
            done("generate", loris_session_generate(forks[0], &generate));
        }
        done("size", loris_session_save(session, NULL, 0, &n_saved));
        saved = malloc(n_saved);
        if (saved && done("save", loris_session_save(session, saved, n_saved, &n_saved))) {
            if (done("restore", loris_session_restore(model, saved, n_saved, NULL, &restored)))
                loris_session_free(restored);
        }
        free(saved);
        while (n_forks) loris_session_free(forks[--n_forks]);
        loris_session_truncate(session, 0);
        if (done("refill", loris_session_prefill(session, ids, 700, NULL, NULL)) &&
            done("file", loris_session_save_file(session, file)) &&
            done("unfile", loris_session_restore_file(model, file, NULL, &restored)))
            loris_session_free(restored);
    }
    loris_session_free(session);
}

int main(int argc, char **argv) {
    const char *roles[] = {"user"}, *contents[] = {text};
    size_t i, n = 0, n_text = 0;
    struct rlimit limit;
    if (argc != 4) return 2;
    for (i = 0; i < N_BYTES; i++) text[i] = i % 61 == 60 ? '\n' : i % 7 == 6 ? ' ' : (char)('a' + i * i % 23);
    limit.rlim_cur = limit.rlim_max = (rlim_t)strtoull(argv[3], NULL, 10);
    if (limit.rlim_cur && setrlimit(RLIMIT_AS, &limit)) return 2;
    if (!limit.rlim_cur) say("start", peak());
    if (!load(argv[1])) leave(0);
    if (!limit.rlim_cur) say("loaded", peak());
    for (i = 0; i < N_LONG; i++) long_text[i] = text[i % N_BYTES];
    done("tokenize", loris_tokenize(model, long_text, N_LONG, 0, NULL, 0, &n_text));
    if (!done("ids", loris_tokenize(model, text, N_BYTES, 0, ids, N_BYTES + 1, &n)))
        for (n = 0; n < N_BYTES; n++) ids[n] = 5 + n % 90;
    live("dense", NULL, NULL, n, argv[2]);
    live("lazy", "1:0.5,min-len=0", NULL, n / 4, argv[2]);
    live("evict", NULL, "h2o:512", n / 4, argv[2]);
    text[200] = 0;
    done("chat", loris_chat_tokenize(model, roles, contents, 1, 0, ids, N_BYTES + 1, &n));
    done("render", loris_chat_render(model, roles, contents, 1, 0, NULL, 0, &n_text));
    if (!limit.rlim_cur) say("peak", peak());
    leave(0);
    return 0;
}
