// Contexts, the work of their streams, the registry of handles, and the switches that tests use.
#include <stdlib.h>
#include <string.h>

#include "driver.hpp"

namespace twin {

Controls::Controls() {
    const char *text = getenv("LORIS_TWIN_SEED");
    seed = text == nullptr ? 0 : strtoull(text, nullptr, 0);
}

Controls &controls() {
    static thread_local Controls own;
    return own;
}

static std::mutex registry_mutex;
static std::set<const Object *> &registry() {
    static std::set<const Object *> all;
    return all;
}

void add_object(Object *object) {
    std::lock_guard<std::mutex> lock(registry_mutex);
    registry().insert(object);
}

bool remove_object(Object *object) {
    std::lock_guard<std::mutex> lock(registry_mutex);
    return registry().erase(object) != 0;
}

Object *find_object(const void *handle) {
    std::lock_guard<std::mutex> lock(registry_mutex);
    auto found = registry().find(static_cast<const Object *>(handle));
    return found == registry().end() ? nullptr : const_cast<Object *>(*found);
}

int begin_call() {
    Controls &own = controls();
    own.n_calls++;
    if (own.fail_in < 0 || own.fail_in-- > 0) return SUCCESS;
    return own.fail_code;
}

Stream *find_stream(Context &context, const void *handle) {
    if (reinterpret_cast<uintptr_t>(handle) <= 2) return &context.null_stream;
    Stream *stream = find<Stream>(handle);
    return stream != nullptr && stream->context == &context ? stream : nullptr;
}

int Context::enqueue(Stream &stream, Work work) {
    if (stream.capture != nullptr) {
        if (stream.capture->invalid) return CAPTURE_INVALIDATED;
        stream.capture->graph->nodes.push_back(std::move(work));
        return SUCCESS;
    }
    // The null stream would wait for a stream that does not run.
    if (&stream == &null_stream) {
        for (Stream *other : streams) {
            if (other->blocking && other->capture != nullptr) {
                other->capture->invalid = true;
                return CAPTURE_IMPLICIT;
            }
        }
    }
    stream.queue.push_back({++sequence, std::move(work)});
    return SUCCESS;
}

void Context::drain(Stream &stream, uint64_t until) {
    while (!stream.queue.empty() && stream.queue.front().sequence <= until) {
        const uint64_t before = stream.queue.front().sequence - 1;
        // The null stream and the blocking ones wait for each other's earlier work.
        if (&stream == &null_stream) {
            for (Stream *other : streams) {
                if (other->blocking) drain(*other, before);
            }
        } else if (stream.blocking) {
            drain(null_stream, before);
        }
        if (stream.queue.empty()) return;  // a fault has cleared it
        Op op = std::move(stream.queue.front());
        stream.queue.pop_front();
        op.work(*this);
    }
}

void Context::drain_all() {
    std::vector<Stream *> all(streams.begin(), streams.end());
    if (controls().seed % 2 == 1) all.insert(all.begin(), &null_stream);
    for (Stream *stream : all) drain(*stream);
    drain(null_stream);
}

void Context::fail(Code code, std::string text) {
    if (failed != SUCCESS) return;
    failed = code;
    failure = std::move(text);
    null_stream.queue.clear();
    for (Stream *stream : streams) stream->queue.clear();
}

int Context::refuse_in_capture() {
    int code = SUCCESS;
    for (Stream *stream : streams) {
        Capture *capture = stream->capture.get();
        if (capture == nullptr || capture->mode == CaptureMode::Relaxed) continue;
        if (capture->mode == CaptureMode::ThreadLocal &&
            capture->thread != std::this_thread::get_id())
            continue;
        capture->invalid = true;
        code = CAPTURE_UNSUPPORTED;
    }
    return code;
}

}  // namespace twin

using namespace twin;

// What tests switch. All of it belongs to the calling host thread.

// The order of blocks, warps and lanes; 0 is the natural one.
ENTRY void loris_twin_set_seed(uint64_t seed) { controls().seed = seed; }

// Memory of the devices that this thread's next contexts see.
ENTRY void loris_twin_set_memory(size_t n_bytes) { controls().memory_bytes = n_bytes; }

// Shared memory that a block can opt in to.
ENTRY void loris_twin_set_max_smem(uint32_t n_bytes) { controls().max_smem = n_bytes; }

// Driver calls of this thread so far; error names and texts are not counted.
ENTRY uint64_t loris_twin_calls() { return controls().n_calls; }

// The n-th call from now (0: the next) does nothing and returns `code`; a negative n takes it back.
ENTRY void loris_twin_fail_call(int64_t n, int code) {
    controls().fail_in = n;
    controls().fail_code = code;
}

// The text of the current context's first fault, or an empty one.
ENTRY const char *loris_twin_last_fault() {
    Context *context = current_context();
    return context == nullptr ? "" : context->failure.c_str();
}

// Live objects that this thread has created, allocations among them; `text`, if not null, names
// their kinds.
ENTRY size_t loris_twin_leaks(const char **text) {
    static thread_local std::string kinds;
    std::map<std::string, size_t> counts;
    {
        std::lock_guard<std::mutex> lock(registry_mutex);
        for (const Object *object : registry()) {
            if (object->owner != std::this_thread::get_id()) continue;
            if (strcmp(object->kind(), "function") == 0) continue;  // part of its module
            counts[object->kind()]++;
            if (auto *context = dynamic_cast<const Context *>(object)) {
                if (context->heap.count() > 0) counts["device allocation"] += context->heap.count();
                if (!context->pinned.empty()) counts["host allocation"] += context->pinned.size();
            }
        }
    }
    kinds.clear();
    size_t n = 0;
    for (auto &[kind, count] : counts) {
        kinds += (kinds.empty() ? "" : ", ") + std::to_string(count) + " " + kind;
        n += count;
    }
    if (text != nullptr) *text = kinds.c_str();
    return n;
}
