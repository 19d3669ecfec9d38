// The objects behind the driver's handles, and what every entry point begins with.
#pragma once

#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "core.hpp"

namespace twin {

enum Code : int {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NOT_INITIALIZED = 3,
    INVALID_DEVICE = 101,
    INVALID_IMAGE = 200,
    INVALID_CONTEXT = 201,
    INVALID_HANDLE = 400,
    NOT_FOUND = 500,
    NOT_READY = 600,
    ILLEGAL_ADDRESS = 700,
    LAUNCH_FAILED = 719,
    NOT_SUPPORTED = 801,
    CAPTURE_UNSUPPORTED = 900,
    CAPTURE_INVALIDATED = 901,
    CAPTURE_UNMATCHED = 903,
    CAPTURE_IMPLICIT = 906,
    CAPTURED_EVENT = 907,
    CAPTURE_WRONG_THREAD = 908,
};

// What a host thread has set for itself, so that tests that run side by side do not meet.
struct Controls {
    uint64_t seed;
    size_t memory_bytes = size_t{2} << 30;  // of contexts created from here on
    uint32_t max_smem = 227 * 1024;
    uint64_t n_calls = 0;
    int64_t fail_in = -1;  // calls until one fails
    int fail_code = 0;

    Controls();
};
Controls &controls();

struct Context;
struct Stream;

// Anything with a handle. Its kind tells a stream's handle from an event's, its owner whose leak it
// is.
struct Object {
    virtual ~Object() = default;
    virtual const char *kind() const = 0;
    Context *context = nullptr;
    std::thread::id owner = std::this_thread::get_id();
};

// Work of a stream: done when a synchronising call needs it, never before.
using Work = std::function<void(Context &)>;
struct Op {
    uint64_t sequence;
    Work work;
};

struct Graph : Object {
    std::vector<Work> nodes;
    const char *kind() const override { return "graph"; }
};

struct GraphExec : Object {
    std::vector<Work> nodes;
    const char *kind() const override { return "graph instance"; }
};

enum class CaptureMode { Global, ThreadLocal, Relaxed };

struct Capture {
    std::unique_ptr<Graph> graph = std::make_unique<Graph>();
    CaptureMode mode;
    std::thread::id thread = std::this_thread::get_id();
    bool invalid = false;
};

struct Stream : Object {
    bool blocking = true;  // ordered with the null stream
    unsigned flags = 0;
    int priority = 0;
    std::deque<Op> queue;
    std::unique_ptr<Capture> capture;
    const char *kind() const override { return "stream"; }
};

// One cuEventRecord: where it stands, and when it was reached.
struct Record {
    Stream *stream;
    uint64_t sequence;
    bool done = false;
    double milliseconds = 0;
};

struct Event : Object {
    bool timed = true;
    bool captured = false;
    std::shared_ptr<Record> record;
    const char *kind() const override { return "event"; }
};

struct Function : Object {
    const Kernel *kernel;
    uint32_t max_dynamic_smem = 48 * 1024;
    const char *kind() const override { return "function"; }
};

struct Module : Object {
    std::map<std::string, Function *> functions;
    const char *kind() const override { return "module"; }
};

struct Context : Object {
    std::recursive_mutex mutex;
    bool primary = false;
    int n_uses = 1;
    Heap heap;
    size_t memory_bytes = controls().memory_bytes;
    std::map<uintptr_t, size_t> pinned;
    Stream null_stream;
    std::set<Stream *> streams;
    uint64_t sequence = 0;
    Code failed = SUCCESS;  // sticky
    std::string failure;

    const char *kind() const override { return "context"; }

    // Puts work at the end of a stream, or into the graph that it captures.
    int enqueue(Stream &stream, Work work);
    // Does the work of a stream up to an operation, and all that this waits for.
    void drain(Stream &stream, uint64_t until = UINT64_MAX);
    void drain_all();
    void fail(Code code, std::string text);
    // Refuses a call that would break a capture under way, and the capture with it.
    int refuse_in_capture();
};

// Live objects. A handle is an address; one that is not here, or of another kind, is refused.
void add_object(Object *object);
bool remove_object(Object *object);
Object *find_object(const void *handle);

template <class T>
T *find(const void *handle) {
    return dynamic_cast<T *>(find_object(handle));
}

Context *current_context();
void delete_context(Context &context);
Stream *find_stream(Context &context, const void *handle);

// Counts a call; the code that it must fail with where a failure is injected here.
int begin_call();

// An entry point that needs no context.
template <class Body>
int call(Body body) {
    int code = begin_call();
    return code != SUCCESS ? code : body();
}

// An entry point that needs the current context in order.
template <class Body>
int call_in_context(Body body) {
    int code = begin_call();
    if (code != SUCCESS) return code;
    Context *context = current_context();
    if (context == nullptr) return INVALID_CONTEXT;
    std::lock_guard<std::recursive_mutex> lock(context->mutex);
    if (context->failed != SUCCESS) return context->failed;
    return body(*context);
}

}  // namespace twin

#define ENTRY extern "C" __attribute__((visibility("default")))
