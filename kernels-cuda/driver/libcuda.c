/* The CUDA driver, found at run time.
 *
 * cust refers to the driver's functions as to any C function. They are here: each looks its
 * namesake up in the driver's library at the first call and passes the arguments on. So a binary
 * needs no driver to start, and which library is the driver is a question of a path.
 *
 * cust_raw's result type is a Rust enum of the codes that CUDA 11.4 knew; any other value there
 * would be undefined behaviour. Such codes are passed on as 999 (unknown error);
 * `loris_driver_code` gives the true one. Nothing here aborts: without a driver every function
 * returns 100 (no device), a function that the driver lacks returns 500 (not found).
 *
 * All symbols are hidden: they neither leave a library that loris is linked into nor meet a real
 * libcuda.
 */
#include <dlfcn.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

enum { NO_DEVICE = 100, NOT_FOUND = 500, UNKNOWN = 999 };

static const char default_path[] = "libcuda.so.1";
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char driver_path[4096]; /* of the library in `driver`; under `lock` */
static void *_Atomic driver;   /* set once, never closed: a driver does not survive that */
static _Thread_local unsigned last_code;

/* Loads the driver at `path` (NULL: the system's) if none is loaded. Returns 0, 1 where it cannot
 * be loaded or 2 where another one is; then `message` says what the loader said, or the path of the
 * other. */
int loris_driver_open(const char *path, char *message, size_t size) {
    int status = 0;
    if (path == NULL) path = default_path;
    pthread_mutex_lock(&lock);
    if (atomic_load(&driver) != NULL) {
        status = strcmp(path, driver_path) == 0 ? 0 : 2;
        if (status != 0) snprintf(message, size, "%s", driver_path);
    } else if (strlen(path) >= sizeof driver_path) {
        status = 1;
        snprintf(message, size, "the path is too long");
    } else {
        void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
        if (library == NULL) {
            const char *why = dlerror();
            status = 1;
            snprintf(message, size, "%s", why != NULL ? why : "cannot be loaded");
        } else if (dlsym(library, "cuInit") == NULL) {
            dlclose(library);
            status = 1;
            snprintf(message, size, "it has no cuInit");
        } else {
            strcpy(driver_path, path);
            atomic_store(&driver, library);
        }
    }
    pthread_mutex_unlock(&lock);
    return status;
}

/* A symbol of the loaded driver, or NULL. */
void *loris_driver_symbol(const char *name) {
    void *library = atomic_load(&driver);
    return library == NULL ? NULL : dlsym(library, name);
}

/* The code of this thread's last call, as the driver returned it. */
unsigned loris_driver_code(void) { return last_code; }

/* The address behind one trampoline, or NULL with `last_code` saying why. */
static void *resolve(const char *name, void *_Atomic *address) {
    void *known = atomic_load_explicit(address, memory_order_acquire);
    if (known != NULL) return known;
    char message[256];
    if (atomic_load(&driver) == NULL && loris_driver_open(NULL, message, sizeof message) != 0) {
        last_code = NO_DEVICE;
        return NULL;
    }
    known = loris_driver_symbol(name);
    if (known == NULL) last_code = NOT_FOUND;
    atomic_store_explicit(address, known, memory_order_release);
    return known;
}

static unsigned known_code(unsigned code);

#define FORWARD(name, parameters, arguments)                                               \
    unsigned name parameters;                                                              \
    unsigned name parameters {                                                             \
        static void *_Atomic address;                                                      \
        unsigned(*function) parameters = (unsigned(*) parameters)resolve(#name, &address); \
        if (function == NULL) return last_code;                                            \
        unsigned code = function arguments;                                                \
        last_code = code;                                                                  \
        return known_code(code);                                                           \
    }

#include "trampolines.h"

static unsigned known_code(unsigned code) {
    switch (code) {
#define CODE(known) case known:
        KNOWN_CODES(CODE)
        return code;
        default:
            return UNKNOWN;
    }
}
