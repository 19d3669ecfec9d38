/*
 * Many sessions, many threads, everything at random: soak MODEL SECONDS N_SESSIONS N_THREADS SEED
 *
 * A fixed set of jobs - a prompt, how to choose tokens, how many - is answered first, one session at a time. Then each
 * thread drives sessions of its own through those jobs by random calls: prompts whole or in pieces, answers by
 * generate, decode and step, forks, saved sessions, truncations; one more thread cancels whatever it meets, and the
 * pool is too small for all of them. Every answer has to be the one of the session alone, and so do the logits after
 * it, bit for bit. In the end no page may be in use.
 *
 * What is asserted does not depend on time or on the order of threads; what happens does.
 */
#define _POSIX_C_SOURCE 200809L
#include <loris.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { N_JOBS = 48, N_PREFIXES = 5, MAX_PROMPT = 176, MAX_OUT = 40, MAX_STEPPED = 12, N_VOCAB = 128 };

typedef struct {
    uint32_t prompt[MAX_PROMPT];
    size_t n_prompt;
    loris_sampling_params sampling;
    size_t n_out;
    /* What a session alone makes of it. */
    uint32_t out[MAX_OUT];
    uint64_t logits;
} job;

/* Where a session is with its job. */
typedef enum {
    EMPTY, /* there is no session */
    START, /* it holds a part of the prompt, maybe none */
    READY, /* it holds the prompt and all of out, and has logits */
    LAST   /* as READY, without the last token of out */
} phase;

typedef struct {
    pthread_mutex_t lock; /* of the handle, which the canceller may look at; calls run without it */
    loris_session *session;
    phase phase;
    const job *job;
    uint32_t out[MAX_OUT];
    size_t n_out;
} slot;

typedef struct {
    unsigned long calls, outputs, cancelled, full, truncated, switched;
    unsigned long forked, saved, saved_files, steps, stepped, scored;
} counts;

typedef struct {
    pthread_t thread;
    slot *slots;
    int n_slots;
    uint64_t random;
    counts counts;
    char path[64];
} worker;

static loris_model *model;
static job jobs[N_JOBS];
static slot *all_slots;
static int n_all_slots;
static double deadline;

/* ---- Small things -------------------------------------------------------------------------------------------- */

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static uint64_t next_random(uint64_t *state) {
    uint64_t x = *state += 0x9e3779b97f4a7c15u;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

static size_t below(uint64_t *state, size_t n) {
    return (size_t)(next_random(state) % n);
}

static void fail(int line, const char *what, int32_t status) {
    char message[512];
    loris_last_error(message, sizeof message);
    fprintf(stderr, "line %d: %s: status %d: %s\n", line, what, (int)status, message);
    exit(1);
}

static void must(int line, const char *what, int32_t status) {
    if (status != LORIS_OK) fail(line, what, status);
}
#define MUST(call) must(__LINE__, #call, call)

static uint64_t logits_hash(loris_session *session) {
    uint32_t logits[N_VOCAB];
    uint64_t hash = 14695981039346656037u;
    size_t n, i;
    MUST(loris_session_logits(session, (float *)(void *)logits, N_VOCAB, &n));
    for (i = 0; i < n; i++) hash = (hash ^ logits[i]) * 1099511628211u;
    return hash;
}

static size_t held(loris_session *session) {
    size_t n;
    MUST(loris_session_tokens(session, NULL, 0, &n));
    return n;
}

/* ---- Jobs ---------------------------------------------------------------------------------------------------- */

static void make_job(job *j, uint32_t prefixes[N_PREFIXES][MAX_PROMPT / 2], uint64_t *random) {
    size_t prefix = below(random, N_PREFIXES + 1), i;
    j->n_prompt = 1 + below(random, MAX_PROMPT);
    for (i = 0; i < j->n_prompt; i++) {
        int is_shared = prefix < N_PREFIXES && i < 20 + prefix * 16 && i < MAX_PROMPT / 2;
        j->prompt[i] = is_shared ? prefixes[prefix][i] : (uint32_t)(5 + below(random, 90));
    }
    j->n_out = 1 + below(random, MAX_OUT);
    MUST(loris_sampling_params_init(&j->sampling, sizeof j->sampling));
    if (below(random, 2)) {
        j->sampling.temperature = 0.9F;
        j->sampling.repetition_penalty = below(random, 2) ? 1.1F : 1.0F;
        j->sampling.top_k = 40;
        j->sampling.seed = next_random(random);
    }
}

static int32_t collect_alone(void *data, uint32_t token, const char *text, size_t text_len) {
    job *j = data;
    (void)text, (void)text_len;
    if (token != LORIS_NO_TOKEN) j->out[j->n_out++] = token;
    return 0;
}

/* The answer of a session that nothing disturbs. */
static void answer_alone(job *j) {
    loris_session *session;
    loris_generate_params params;
    MUST(loris_generate_params_init(&params, sizeof params));
    params.flags = LORIS_IGNORE_EOS;
    params.max_tokens = j->n_out;
    params.on_token = collect_alone;
    params.user_data = j;
    j->n_out = 0;
    MUST(loris_session_open(model, NULL, &session));
    MUST(loris_session_set_sampling(session, &j->sampling));
    MUST(loris_session_prefill(session, j->prompt, j->n_prompt, NULL, NULL));
    MUST(loris_session_generate(session, &params));
    j->logits = logits_hash(session);
    loris_session_free(session);
}

/* ---- What a thread does with a session ----------------------------------------------------------------------- */

/* Puts another handle in a slot; the canceller sees the old one or the new one, and none that was freed. */
static void replace(slot *s, loris_session *session) {
    loris_session *old;
    pthread_mutex_lock(&s->lock);
    old = s->session;
    s->session = session;
    pthread_mutex_unlock(&s->lock);
    loris_session_free(old);
}

static void restart(slot *s) {
    s->n_out = 0;
    s->phase = START;
    MUST(loris_session_set_sampling(s->session, &s->job->sampling));
}

/* Takes note of how a call ended; true if it did all that it was asked to. Anything unforeseen ends the test. */
static int went_well(int line, worker *w, slot *s, int32_t status) {
    slot *other = &w->slots[below(&w->random, (size_t)w->n_slots)];
    w->counts.calls++;
    switch (status) {
    case LORIS_OK: return 1;
    case LORIS_CANCELLED: w->counts.cancelled++; return 0;
    case LORIS_KV_FULL:
        /* Room is made at the expense of whoever it may be, this one included. */
        w->counts.full++;
        if (other->phase == EMPTY || (other == s && below(&w->random, 2))) return 0;
        if (below(&w->random, 2)) {
            replace(other, NULL);
            other->phase = EMPTY;
        } else {
            MUST(loris_session_truncate(other->session, 0));
            restart(other);
        }
        return 0;
    default: fail(line, "unforeseen", status); return 0;
    }
}
#define WENT_WELL(call) went_well(__LINE__, w, s, call)

static void open_slot(worker *w, slot *s) {
    loris_session *session;
    MUST(loris_session_open(model, NULL, &session));
    s->job = &jobs[below(&w->random, N_JOBS)];
    replace(s, session);
    restart(s);
}

static void ignore_logits(void *data, size_t idx, const float *logits, size_t n_vocab) {
    (void)data, (void)idx, (void)logits, (void)n_vocab;
}

/* A part of the prompt, or the rest of it. */
static void prompt(worker *w, slot *s) {
    size_t start = held(s->session), left = s->job->n_prompt - start;
    size_t n = below(&w->random, 4) ? left : 1 + below(&w->random, left);
    const uint32_t *tokens = s->job->prompt + start;
    int32_t status;
    if (below(&w->random, 8)) {
        status = loris_session_prefill(s->session, tokens, n, NULL, NULL);
    } else {
        status = loris_session_score(s->session, tokens, n, ignore_logits, NULL);
        w->counts.scored++;
    }
    if (status != LORIS_OK && held(s->session) != start) fail(__LINE__, "a failed prompt left tokens", status);
    if (WENT_WELL(status) && n == left) s->phase = READY;
}

typedef struct {
    slot *slot;
    uint64_t *random;
} collector;

static int32_t collect(void *data, uint32_t token, const char *text, size_t text_len) {
    collector *c = data;
    (void)text, (void)text_len;
    if (token != LORIS_NO_TOKEN) c->slot->out[c->slot->n_out++] = token;
    return below(c->random, 24) == 0; /* cancels now and then */
}

static void generate(worker *w, slot *s) {
    collector c = {s, &w->random};
    loris_generate_params params;
    MUST(loris_generate_params_init(&params, sizeof params));
    params.flags = LORIS_IGNORE_EOS;
    params.max_tokens = 1 + below(&w->random, s->job->n_out - s->n_out);
    params.on_token = collect;
    params.user_data = &c;
    /* Whatever its end: what was shown is held, and the next token is to be chosen. */
    (void)WENT_WELL(loris_session_generate(s->session, &params));
}

static void sample_and_decode(worker *w, slot *s) {
    MUST(loris_session_sample(s->session, &s->out[s->n_out++]));
    s->phase = LAST;
    if (WENT_WELL(loris_session_decode(s->session, s->out[s->n_out - 1]))) s->phase = READY;
}

/* A fork draws numbers of its own, so only one that takes the likeliest tokens gives the same answer. */
static void fork_into(worker *w, slot *s) {
    slot *to = &w->slots[below(&w->random, (size_t)w->n_slots)];
    loris_session *fork;
    if (to == s || s->job->sampling.temperature > 0) return;
    MUST(loris_session_fork(s->session, &fork));
    replace(to, fork);
    to->phase = s->phase;
    to->job = s->job;
    to->n_out = s->n_out;
    memcpy(to->out, s->out, sizeof s->out);
    w->counts.forked++;
}

/* Through a buffer or a file and back; how tokens are chosen is not saved, so only greedy ones can go on. */
static void save_and_restore(worker *w, slot *s) {
    loris_session *restored;
    uint8_t *bytes = NULL;
    size_t n;
    int32_t status;
    if (s->job->sampling.temperature > 0) return;
    if (below(&w->random, 4) == 0) {
        MUST(loris_session_save_file(s->session, w->path));
        status = loris_session_restore_file(model, w->path, NULL, &restored);
        w->counts.saved_files++;
    } else {
        MUST(loris_session_save(s->session, NULL, 0, &n));
        bytes = malloc(n);
        if (!bytes) abort();
        MUST(loris_session_save(s->session, bytes, n, &n));
        if (below(&w->random, 2)) MUST(loris_session_truncate(s->session, 0)); /* its pages may be the only ones */
        status = loris_session_restore(model, bytes, n, NULL, &restored);
        w->counts.saved++;
    }
    free(bytes);
    if (status == LORIS_OK) {
        replace(s, restored);
    } else {
        if (status != LORIS_KV_FULL) fail(__LINE__, "restore", status);
        if (held(s->session) == 0) restart(s);
        w->counts.full++;
    }
}

/* Back to somewhere in the prompt, and from there through it again, or through another one that begins likewise. What
 * is kept was written by prompts: the cache of decoded tokens may differ in its last bits. */
static void truncate(worker *w, slot *s) {
    const job *next = below(&w->random, 2) ? s->job : &jobs[below(&w->random, N_JOBS)];
    size_t n_held = held(s->session), n = 0;
    while (n < n_held && n + 1 < next->n_prompt && n < s->job->n_prompt && next->prompt[n] == s->job->prompt[n]) n++;
    if (n > 0 && below(&w->random, 2)) n = below(&w->random, n);
    MUST(loris_session_truncate(s->session, n));
    w->counts.truncated++;
    w->counts.switched += next != s->job && n > 0;
    s->job = next;
    restart(s);
}

static void check_answer(worker *w, slot *s) {
    const job *j = s->job;
    if (memcmp(s->out, j->out, j->n_out * sizeof *j->out) != 0 || logits_hash(s->session) != j->logits) {
        size_t i = 0;
        while (i < j->n_out && s->out[i] == j->out[i]) i++;
        fprintf(stderr, "job %d differs from the session alone: token %lu of %lu\n", (int)(j - jobs), (unsigned long)i,
                (unsigned long)j->n_out);
        exit(1);
    }
    w->counts.outputs++;
    if (below(&w->random, 2)) {
        truncate(w, s);
    } else {
        replace(s, NULL);
        s->phase = EMPTY;
    }
}

static void act(worker *w, slot *s) {
    size_t die = below(&w->random, 20);
    switch (s->phase) {
    case EMPTY: open_slot(w, s); break;
    case LAST:
        if (WENT_WELL(loris_session_decode(s->session, s->out[s->n_out - 1]))) s->phase = READY;
        break;
    case START:
        if (die < 2 && held(s->session) > 0) truncate(w, s);
        else prompt(w, s);
        break;
    case READY:
        if (s->n_out == s->job->n_out) check_answer(w, s);
        else if (die < 12) generate(w, s);
        else if (die < 16) sample_and_decode(w, s);
        else if (die < 17) fork_into(w, s);
        else if (die < 19) save_and_restore(w, s);
        else truncate(w, s);
        break;
    }
}

/* ---- Steps --------------------------------------------------------------------------------------------------- */

/* Queues what comes next of some sessions, a prompt or a token, and steps all of them a few times. */
static void step(worker *w) {
    slot *chosen[MAX_STEPPED];
    loris_session *sessions[MAX_STEPPED];
    int32_t statuses[MAX_STEPPED];
    int n = 0, i, round;
    for (i = 0; i < w->n_slots && n < MAX_STEPPED; i++) {
        slot *s = &w->slots[i];
        if (s->phase == EMPTY || below(&w->random, 2)) continue;
        if (s->phase == START) {
            size_t start = held(s->session);
            MUST(loris_session_feed(s->session, s->job->prompt + start, s->job->n_prompt - start));
        } else {
            if (s->phase == READY && s->n_out == s->job->n_out) continue;
            if (s->phase == READY) MUST(loris_session_sample(s->session, &s->out[s->n_out++]));
            s->phase = LAST;
            MUST(loris_session_push(s->session, s->out[s->n_out - 1]));
        }
        sessions[n] = s->session;
        chosen[n++] = s;
    }
    for (round = 0; round < 3; round++) {
        MUST(loris_model_step(model, sessions, (size_t)n, statuses));
        w->counts.steps++;
        for (i = 0; i < n; i++) {
            switch (statuses[i]) {
            case LORIS_OK: chosen[i]->phase = READY; w->counts.stepped++; break;
            case LORIS_PENDING:
            case LORIS_IDLE: break;
            case LORIS_CANCELLED: w->counts.cancelled++; break;
            case LORIS_KV_FULL: w->counts.full++; break;
            default: fail(__LINE__, "a session of a step", statuses[i]);
            }
        }
    }
    for (i = 0; i < n; i++) MUST(loris_session_clear(sessions[i]));
    /* Room for the next, if somebody lacked it. */
    for (i = 0; i < n; i++) {
        if (statuses[i] == LORIS_KV_FULL) (void)went_well(__LINE__, w, chosen[i], LORIS_KV_FULL);
    }
}

/* ---- Threads ------------------------------------------------------------------------------------------------- */

static void *work(void *data) {
    worker *w = data;
    int i;
    while (now() < deadline || w->counts.outputs == 0) {
        if (below(&w->random, 8) == 0) step(w);
        else act(w, &w->slots[below(&w->random, (size_t)w->n_slots)]);
    }
    for (i = 0; i < w->n_slots; i++) {
        replace(&w->slots[i], NULL);
        w->slots[i].phase = EMPTY;
    }
    return NULL;
}

static pthread_mutex_t canceller_lock = PTHREAD_MUTEX_INITIALIZER;
static int is_cancelling = 1;

static void *cancel(void *data) {
    uint64_t *random = data;
    unsigned long n = 0;
    for (;;) {
        struct timespec pause = {0, (long)below(random, 8000000)};
        slot *s = &all_slots[below(random, (size_t)n_all_slots)];
        int goes_on;
        pthread_mutex_lock(&s->lock);
        if (s->session) {
            MUST(loris_session_cancel(s->session));
            n++;
        }
        pthread_mutex_unlock(&s->lock);
        nanosleep(&pause, NULL);
        pthread_mutex_lock(&canceller_lock);
        goes_on = is_cancelling;
        pthread_mutex_unlock(&canceller_lock);
        if (!goes_on) {
            *random = n;
            return NULL;
        }
    }
}

static void run(worker *workers, int n_threads, uint64_t seed) {
    pthread_t canceller;
    uint64_t random = seed ^ 0xcafe;
    int t;
    if (pthread_create(&canceller, NULL, cancel, &random) != 0) abort();
    for (t = 0; t < n_threads; t++) {
        if (pthread_create(&workers[t].thread, NULL, work, &workers[t]) != 0) abort();
    }
    for (t = 0; t < n_threads; t++) pthread_join(workers[t].thread, NULL);
    pthread_mutex_lock(&canceller_lock);
    is_cancelling = 0;
    pthread_mutex_unlock(&canceller_lock);
    pthread_join(canceller, NULL);
    printf("cancels sent %lu\n", (unsigned long)random);
}

static void print(const worker *workers, int n_threads) {
    static const char *const NAMES[] = {"calls",  "outputs compared", "cancels met", "pool full", "truncations",
                                        "switched to another prompt", "forks", "saved", "saved to a file", "steps",
                                        "stepped", "scored"};
    size_t i;
    int t;
    for (i = 0; i < sizeof NAMES / sizeof *NAMES; i++) {
        unsigned long sum = 0;
        for (t = 0; t < n_threads; t++) sum += ((const unsigned long *)&workers[t].counts)[i];
        printf("%s %lu\n", NAMES[i], sum);
    }
}

int main(int argc, char **argv) {
    static uint32_t prefixes[N_PREFIXES][MAX_PROMPT / 2];
    loris_engine *engine;
    loris_engine_params engine_params;
    loris_model_params params;
    loris_kv_info info = {.struct_size = sizeof info};
    worker *workers;
    uint64_t random;
    int n_threads, i, t;

    if (argc != 6) {
        fprintf(stderr, "usage: soak MODEL SECONDS N_SESSIONS N_THREADS SEED\n");
        return 2;
    }
    n_all_slots = atoi(argv[3]);
    n_threads = atoi(argv[4]);
    random = strtoull(argv[5], NULL, 10);
    if (n_threads < 1 || n_all_slots < 2 * n_threads) return 2;

    MUST(loris_engine_params_init(&engine_params, sizeof engine_params));
    engine_params.device = "cpu";
    engine_params.threads = 2;
    MUST(loris_engine_open(&engine_params, &engine));
    MUST(loris_model_params_init(&params, sizeof params));
    params.page_len = 16;
    params.chunk = 48;
    params.batch = 8;
    /* A session needs up to 216: not half of them fit, and always one. */
    params.kv_tokens = 256 + 64 * (uint64_t)n_all_slots;
    MUST(loris_model_open(engine, argv[1], &params, &model));
    loris_engine_free(engine);

    for (i = 0; i < N_PREFIXES; i++) {
        for (t = 0; t < MAX_PROMPT / 2; t++) prefixes[i][t] = (uint32_t)(5 + below(&random, 90));
    }
    for (i = 0; i < N_JOBS; i++) {
        make_job(&jobs[i], prefixes, &random);
        answer_alone(&jobs[i]);
    }

    all_slots = calloc((size_t)n_all_slots, sizeof *all_slots);
    workers = calloc((size_t)n_threads, sizeof *workers);
    if (!all_slots || !workers) abort();
    for (i = 0; i < n_all_slots; i++) pthread_mutex_init(&all_slots[i].lock, NULL);
    for (t = 0; t < n_threads; t++) {
        worker *w = &workers[t];
        int first = n_all_slots * t / n_threads;
        w->slots = &all_slots[first];
        w->n_slots = n_all_slots * (t + 1) / n_threads - first;
        w->random = next_random(&random);
        snprintf(w->path, sizeof w->path, "session-%d", t);
    }
    deadline = now() + atof(argv[2]);
    run(workers, n_threads, random);

    print(workers, n_threads);
    MUST(loris_model_get_kv_info(model, &info));
    printf("pages %lu of %lu at most, %lu now\n", (unsigned long)info.n_peak, (unsigned long)info.n_pages,
           (unsigned long)info.n_used);
    for (t = 0; t < n_threads; t++) remove(workers[t].path);
    for (i = 0; i < n_all_slots; i++) pthread_mutex_destroy(&all_slots[i].lock);
    free(all_slots);
    free(workers);
    loris_model_free(model);
    return info.n_used != 0;
}
