// Launches, streams, events, capture and graphs.
//
// Nothing asynchronous happens when it is asked for: it waits in its stream until a call needs its
// result. So a host that reads a result, or reuses a buffer, before it has synchronised sees that
// it did.
#include <string.h>

#include <chrono>

#include "driver.hpp"

using namespace twin;

namespace {

double now_milliseconds() {
    using namespace std::chrono;
    return duration<double, std::milli>(steady_clock::now().time_since_epoch()).count();
}

// Finds the stream, then does `body(context, stream)`.
template <class Body>
int call_on_stream(const void *handle, Body body) {
    return call_in_context([&](Context &context) -> int {
        Stream *stream = find_stream(context, handle);
        return stream == nullptr ? INVALID_HANDLE : body(context, *stream);
    });
}

template <class Body>
int call_on_event(const void *handle, Body body) {
    return call_in_context([&](Context &context) -> int {
        Event *event = find<Event>(handle);
        if (event == nullptr || event->context != &context) return INVALID_HANDLE;
        return event->captured ? CAPTURED_EVENT : body(context, *event);
    });
}

// A synchronising call on a stream that captures breaks the capture.
int refuse_if_captures(Stream &stream) {
    if (stream.capture == nullptr) return SUCCESS;
    stream.capture->invalid = true;
    return CAPTURE_UNSUPPORTED;
}

void run_launch(Context &context, const Launch &launch) {
    auto view = context.heap.view();
    auto fault = host_block().run(launch, *view, controls().seed);
    if (fault == nullptr) return;
    context.fail(fault->kind == FaultKind::Address ? ILLEGAL_ADDRESS : LAUNCH_FAILED, fault->text);
}

int launch_kernel(const void *function, Index grid, Index block, uint32_t smem_bytes,
                  const void *stream, void **params, void **extra) {
    return call_on_stream(stream, [&](Context &context, Stream &stream) -> int {
        Function *f = find<Function>(function);
        if (f == nullptr) return INVALID_HANDLE;
        const Kernel &kernel = *f->kernel;
        if (block.x != kernel.n_threads || block.y != 1 || block.z != 1) return INVALID_VALUE;
        if (grid.x == 0 || grid.y == 0 || grid.z == 0) return INVALID_VALUE;
        if (grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535) return INVALID_VALUE;
        if (smem_bytes > f->max_dynamic_smem || smem_bytes > controls().max_smem)
            return INVALID_VALUE;
        // Arguments come as a list of pointers, or as a buffer: {1, buffer, 2, &size, 0}.
        const void *args = params != nullptr ? params[0] : nullptr;
        if (params == nullptr && extra != nullptr) {
            size_t size = 0;
            for (void **e = extra; *e != nullptr; e += 2) {
                if (*e == reinterpret_cast<void *>(1)) args = e[1];
                if (*e == reinterpret_cast<void *>(2)) size = *static_cast<size_t *>(e[1]);
            }
            if (size != kernel.args_bytes) return INVALID_VALUE;
        }
        if (args == nullptr) return INVALID_VALUE;
        const char *bytes = static_cast<const char *>(args);
        auto launch = std::make_shared<Launch>(
            Launch{&kernel, grid, smem_bytes, std::vector<char>(bytes, bytes + kernel.args_bytes)});
        return context.enqueue(stream, [launch](Context &c) { run_launch(c, *launch); });
    });
}

}  // namespace

ENTRY int cuLaunchKernel(void *f, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                         unsigned block_x, unsigned block_y, unsigned block_z, unsigned smem_bytes,
                         void *stream, void **params, void **extra) {
    return launch_kernel(f, {grid_x, grid_y, grid_z}, {block_x, block_y, block_z}, smem_bytes,
                         stream, params, extra);
}

struct LaunchConfig {  // CUlaunchConfig
    Index grid, block;
    unsigned smem_bytes;
    void *stream;
    void *attributes;
    unsigned n_attributes;
};

ENTRY int cuLaunchKernelEx(const LaunchConfig *config, void *f, void **params, void **extra) {
    if (config->n_attributes != 0) return call([] { return NOT_SUPPORTED; });
    return launch_kernel(f, config->grid, config->block, config->smem_bytes, config->stream, params,
                         extra);
}

ENTRY int cuStreamCreateWithPriority(void **out, unsigned flags, int priority) {
    return call_in_context([&](Context &context) -> int {
        if (flags > 1) return INVALID_VALUE;
        auto *stream = new Stream;
        stream->context = &context;
        stream->flags = flags;
        stream->priority = priority;
        stream->blocking = flags == 0;
        context.streams.insert(stream);
        add_object(stream);
        *out = stream;
        return SUCCESS;
    });
}

ENTRY int cuStreamCreate(void **out, unsigned flags) {
    return cuStreamCreateWithPriority(out, flags, 0);
}

// Works on a failed context too, as all destruction does: what is destroyed is gone, and the error
// returns.
ENTRY int cuStreamDestroy_v2(void *handle) {
    return call([&]() -> int {
        Stream *stream = find<Stream>(handle);
        if (stream == nullptr) return INVALID_HANDLE;
        Context &context = *stream->context;
        std::lock_guard<std::recursive_mutex> lock(context.mutex);
        context.drain(*stream);
        context.streams.erase(stream);
        remove_object(stream);
        delete stream;
        return context.failed;
    });
}

ENTRY int cuStreamGetFlags(void *handle, unsigned *out) {
    return call_on_stream(handle,
                          [&](Context &, Stream &stream) { return *out = stream.flags, SUCCESS; });
}

ENTRY int cuStreamGetPriority(void *handle, int *out) {
    return call_on_stream(
        handle, [&](Context &, Stream &stream) { return *out = stream.priority, SUCCESS; });
}

ENTRY int cuStreamSynchronize(void *handle) {
    return call_on_stream(handle, [](Context &context, Stream &stream) -> int {
        if (int code = refuse_if_captures(stream)) return code;
        if (&stream == &context.null_stream) {
            if (int code = context.refuse_in_capture()) return code;
            for (Stream *other : context.streams) {
                if (other->blocking) context.drain(*other);
            }
        }
        context.drain(stream);
        return context.failed;
    });
}

// Asking moves the work on: the first answer is "not ready", the next one is not.
ENTRY int cuStreamQuery(void *handle) {
    return call_on_stream(handle, [](Context &context, Stream &stream) -> int {
        if (int code = refuse_if_captures(stream)) return code;
        if (stream.queue.empty()) return SUCCESS;
        context.drain(stream);
        return context.failed != SUCCESS ? context.failed : NOT_READY;
    });
}

ENTRY int cuStreamWaitEvent(void *handle, void *event, unsigned) {
    return call_on_stream(handle, [&](Context &context, Stream &stream) -> int {
        Event *e = find<Event>(event);
        if (e == nullptr || e->context != &context) return INVALID_HANDLE;
        if (e->captured) return stream.capture != nullptr ? SUCCESS : CAPTURED_EVENT;
        auto record = e->record;
        if (record == nullptr || record->done) return SUCCESS;
        return context.enqueue(stream, [record](Context &c) {
            if (!record->done) c.drain(*record->stream, record->sequence);
        });
    });
}

ENTRY int cuEventCreate(void **out, unsigned flags) {
    return call_in_context([&](Context &context) -> int {
        auto *event = new Event;
        event->context = &context;
        event->timed = (flags & 2) == 0;
        add_object(event);
        *out = event;
        return SUCCESS;
    });
}

ENTRY int cuEventDestroy_v2(void *handle) {
    return call([&]() -> int {
        Event *event = find<Event>(handle);
        if (event == nullptr) return INVALID_HANDLE;
        Context &context = *event->context;
        remove_object(event);
        delete event;
        return context.failed;
    });
}

ENTRY int cuEventRecord(void *handle, void *on) {
    return call_on_stream(on, [&](Context &context, Stream &stream) -> int {
        Event *event = find<Event>(handle);
        if (event == nullptr || event->context != &context) return INVALID_HANDLE;
        event->captured = stream.capture != nullptr;
        auto record = std::make_shared<Record>(Record{&stream, context.sequence + 1});
        int code = context.enqueue(stream, [record](Context &) {
            record->done = true;
            record->milliseconds = now_milliseconds();
        });
        if (code == SUCCESS && !event->captured) event->record = record;
        return code;
    });
}

ENTRY int cuEventSynchronize(void *handle) {
    return call_on_event(handle, [](Context &context, Event &event) -> int {
        if (int code = context.refuse_in_capture()) return code;
        if (event.record != nullptr && !event.record->done)
            context.drain(*event.record->stream, event.record->sequence);
        return context.failed;
    });
}

ENTRY int cuEventQuery(void *handle) {
    return call_on_event(handle, [](Context &context, Event &event) -> int {
        if (int code = context.refuse_in_capture()) return code;
        if (event.record == nullptr || event.record->done) return SUCCESS;
        context.drain(*event.record->stream, event.record->sequence);
        return context.failed != SUCCESS ? context.failed : NOT_READY;
    });
}

ENTRY int cuEventElapsedTime(float *out, void *from, void *to) {
    return call_on_event(from, [&](Context &, Event &first) -> int {
        Event *last = find<Event>(to);
        if (last == nullptr || !first.timed || !last->timed) return INVALID_HANDLE;
        if (first.record == nullptr || last->record == nullptr) return INVALID_HANDLE;
        if (!first.record->done || !last->record->done) return NOT_READY;
        *out = static_cast<float>(last->record->milliseconds - first.record->milliseconds);
        return SUCCESS;
    });
}

ENTRY int cuStreamBeginCapture_v2(void *handle, int mode) {
    return call_on_stream(handle, [&](Context &context, Stream &stream) -> int {
        if (&stream == &context.null_stream) return CAPTURE_UNSUPPORTED;
        if (mode < 0 || mode > 2) return INVALID_VALUE;
        if (stream.capture != nullptr) return CAPTURE_UNSUPPORTED;
        stream.capture = std::make_unique<Capture>();
        stream.capture->mode = static_cast<CaptureMode>(mode);
        return SUCCESS;
    });
}

ENTRY int cuStreamIsCapturing(void *handle, int *status) {
    return call_on_stream(handle, [&](Context &, Stream &stream) -> int {
        *status = stream.capture == nullptr ? 0 : stream.capture->invalid ? 2 : 1;
        return SUCCESS;
    });
}

ENTRY int cuStreamEndCapture(void *handle, void **out) {
    return call_on_stream(handle, [&](Context &context, Stream &stream) -> int {
        *out = nullptr;
        if (stream.capture == nullptr) return CAPTURE_UNMATCHED;
        auto capture = std::move(stream.capture);
        if (capture->mode != CaptureMode::Relaxed &&
            capture->thread != std::this_thread::get_id()) {
            stream.capture = std::move(capture);
            return CAPTURE_WRONG_THREAD;
        }
        if (capture->invalid) return CAPTURE_INVALIDATED;
        capture->graph->context = &context;
        add_object(capture->graph.get());
        *out = capture->graph.release();
        return SUCCESS;
    });
}

ENTRY int cuGraphInstantiateWithFlags(void **out, void *handle, unsigned long long) {
    return call_in_context([&](Context &context) -> int {
        Graph *graph = find<Graph>(handle);
        if (graph == nullptr) return INVALID_VALUE;
        auto *exec = new GraphExec;
        exec->context = &context;
        exec->nodes = graph->nodes;
        add_object(exec);
        *out = exec;
        return SUCCESS;
    });
}

ENTRY int cuGraphInstantiate_v2(void **out, void *handle, void **, char *, size_t) {
    return cuGraphInstantiateWithFlags(out, handle, 0);
}

ENTRY int cuGraphLaunch(void *handle, void *on) {
    return call_on_stream(on, [&](Context &context, Stream &stream) -> int {
        GraphExec *exec = find<GraphExec>(handle);
        if (exec == nullptr) return INVALID_VALUE;
        return context.enqueue(stream, [nodes = exec->nodes](Context &c) {
            for (const Work &node : nodes) {
                if (c.failed == SUCCESS) node(c);
            }
        });
    });
}

template <class T>
static int destroy(void *handle) {
    return call([&]() -> int {
        T *object = find<T>(handle);
        if (object == nullptr) return INVALID_VALUE;
        remove_object(object);
        delete object;
        return SUCCESS;
    });
}
ENTRY int cuGraphDestroy(void *handle) { return destroy<Graph>(handle); }
ENTRY int cuGraphExecDestroy(void *handle) { return destroy<GraphExec>(handle); }
