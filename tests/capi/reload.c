/*
 * Opening and freeing again and again takes no more memory than a few times: reload models|library LIBRARY MODEL
 *
 * models: 200 times a model, a session, an answer, and all freed. library: the same with the library itself, which
 * is loaded and unloaded each time. The resident size after 20 rounds, when allocators and caches have settled, is
 * held against that after 200.
 *
 * The slack of models is 2 MiB, 11 KiB a round: what could be left of one - a model's weights, its tokenizer, a pool,
 * a thread's stack - is far more, while heaps differ by some hundred KiB from run to run. It does for
 * library too: once loaded the library stays in the process (it is linked with -z nodelete), so that what it makes once
 * a process is not made again.
 */
#define _POSIX_C_SOURCE 200809L
#include <dirent.h>
#include <dlfcn.h>
#include <loris.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { N_ROUNDS = 200, N_WARM = 20, SLACK_KIB = 2048 };

/* The library as a program finds it that was not linked with it. */
#define FUNCTIONS(each)                                                                                                \
    each(loris_engine_params_init) each(loris_engine_open) each(loris_engine_free) each(loris_model_params_init)      \
    each(loris_model_open) each(loris_model_free) each(loris_session_open) each(loris_session_free)                   \
    each(loris_session_prefill) each(loris_session_generate) each(loris_session_fork) each(loris_tokenize)            \
    each(loris_last_error) each(loris_chat_tokenize) each(loris_text_stream_open) each(loris_text_stream_free)

/* ISO C has no cast from an object to a function, so the bytes are copied. */
#define DECLARE(name) static __typeof__(&(name)) p_##name;
#define FIND(name)                                                                                                     \
    symbol = dlsym(library, #name);                                                                                    \
    if (!symbol) fail(#name);                                                                                          \
    memcpy(&p_##name, &symbol, sizeof symbol);
FUNCTIONS(DECLARE)

static const char *library_path, *dir;

static void fail(const char *what) {
    char message[512] = "";
    if (p_loris_last_error) p_loris_last_error(message, sizeof message);
    printf("%s: %s\n", what, message);
    exit(1);
}

static void must(int32_t status, const char *what) {
    if (status != LORIS_OK) fail(what);
}
#define MUST(call) must(call, #call)

static void *load(void) {
    void *symbol, *library = dlopen(library_path, RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        printf("%s\n", dlerror());
        exit(1);
    }
    FUNCTIONS(FIND)
    return library;
}

static void round_of_models(void) {
    const char *role = "user", *content = "hello";
    loris_engine *engine;
    loris_model *model, *none;
    loris_session *session, *fork;
    loris_text_stream *stream;
    loris_engine_params engine_params;
    loris_model_params model_params;
    loris_generate_params params;
    uint32_t tokens[256];
    size_t n;
    MUST(p_loris_engine_params_init(&engine_params, sizeof engine_params));
    engine_params.device = "cpu";
    engine_params.threads = 3;
    MUST(p_loris_engine_open(&engine_params, &engine));
    MUST(p_loris_model_params_init(&model_params, sizeof model_params));
    model_params.kv_tokens = 512;
    MUST(p_loris_model_open(engine, dir, &model_params, &model));
    MUST(p_loris_chat_tokenize(model, &role, &content, 1, LORIS_ADD_GENERATION_PROMPT, tokens, 256, &n));
    MUST(p_loris_session_open(model, NULL, &session));
    MUST(p_loris_session_prefill(session, tokens, n, NULL, NULL));
    memset(&params, 0, sizeof params);
    params.struct_size = sizeof params;
    params.flags = LORIS_IGNORE_EOS;
    params.max_tokens = 4;
    MUST(p_loris_session_generate(session, &params));
    MUST(p_loris_session_fork(session, &fork));
    MUST(p_loris_text_stream_open(model, 0, &stream));
    if (p_loris_model_open(engine, "/nowhere", NULL, &none) != LORIS_E_IO) fail("a folder that is not there");
    p_loris_session_free(session);
    p_loris_session_free(fork);
    p_loris_text_stream_free(stream);
    p_loris_model_free(model);
    p_loris_engine_free(engine);
}

static void *round_on_a_thread(void *unused) {
    round_of_models();
    return unused;
}

static long resident_kib(void) {
    long size, resident;
    FILE *file = fopen("/proc/self/statm", "r");
    if (!file || fscanf(file, "%ld %ld", &size, &resident) != 2) exit(1);
    fclose(file);
    return resident * (sysconf(_SC_PAGESIZE) / 1024);
}

static int n_threads(void) {
    int n = 0;
    DIR *tasks = opendir("/proc/self/task");
    if (!tasks) exit(1);
    while (readdir(tasks)) n++;
    closedir(tasks);
    return n - 2; /* . and .. */
}

static int is_mapped(void) {
    char line[4096];
    int found = 0;
    FILE *maps = fopen("/proc/self/maps", "r");
    if (!maps) exit(1);
    while (fgets(line, sizeof line, maps)) found |= strstr(line, "libloris") != NULL;
    fclose(maps);
    return found;
}

/* A round on a thread that ends: until then, what it keeps for that thread keeps a library loaded. */
static void round_on_a_thread_of_its_own(void) {
    pthread_t thread;
    if (pthread_create(&thread, NULL, round_on_a_thread, NULL) != 0) exit(1);
    pthread_join(thread, NULL);
}

int main(int argc, char **argv) {
    void *library = NULL;
    long warm = 0, last;
    int i, threads, reloads, n_unloaded = 0;
    if (argc != 4) {
        fprintf(stderr, "usage: reload models|library LIBRARY MODEL\n");
        return 2;
    }
    library_path = argv[2];
    dir = argv[3];
    reloads = strcmp(argv[1], "library") == 0;
    if (!reloads) library = load();
    for (i = 0; i < N_ROUNDS; i++) {
        if (reloads) {
            library = load();
            round_on_a_thread_of_its_own();
            dlclose(library);
            n_unloaded += !is_mapped();
        } else if (i % 2 == 0) {
            round_on_a_thread_of_its_own();
        } else {
            round_of_models();
        }
        if (i + 1 == N_WARM) warm = resident_kib();
    }
    last = resident_kib();
    threads = n_threads();
    printf("%s: resident %ld KiB after %d rounds, %ld KiB after %d; %d thread(s); unloaded %d times\n", argv[1], warm,
           N_WARM, last, N_ROUNDS, threads, n_unloaded);
    return last > warm + SLACK_KIB || threads != 1;
}
