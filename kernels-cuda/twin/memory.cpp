// The driver's entry points for memory: allocation, copies and fills, each checked against its
// bounds.
#include <stdlib.h>
#include <string.h>

#include "driver.hpp"

using namespace twin;

namespace {

void *pointer(uintptr_t address) { return reinterpret_cast<void *>(address); }

bool is_pinned(const Context &context, const void *at, size_t n_bytes) {
    auto address = reinterpret_cast<uintptr_t>(at);
    auto after = context.pinned.upper_bound(address);
    if (after == context.pinned.begin()) return false;
    auto &[begin, size] = *--after;
    return address + n_bytes <= begin + size;
}

// Copies and fills: `at` is device memory, and must still be when the stream comes to it.
struct Span {
    uintptr_t at;
    size_t n_bytes;
};

int enqueue_checked(Context &context, Stream &stream, std::vector<Span> spans,
                    std::function<void()> body) {
    auto live = [](Context &c, const Span &span) { return c.heap.holds(span.at, span.n_bytes); };
    for (const Span &span : spans) {
        if (!live(context, span)) return INVALID_VALUE;
    }
    return context.enqueue(stream, [=](Context &c) {
        for (const Span &span : spans) {
            if (!live(c, span))
                return c.fail(ILLEGAL_ADDRESS, "a copy or fill reached memory that has been freed");
        }
        body();
    });
}

// Asynchronous: in the given stream, later.
int later(const void *handle, std::vector<Span> spans, const void *host,
          std::function<void()> body) {
    return call_in_context([&](Context &context) -> int {
        Stream *stream = find_stream(context, handle);
        if (stream == nullptr) return INVALID_HANDLE;
        // The host's pages may be gone when a graph runs.
        if (stream->capture != nullptr && host != nullptr &&
            !is_pinned(context, host, spans[0].n_bytes)) {
            stream->capture->invalid = true;
            return CAPTURE_UNSUPPORTED;
        }
        return enqueue_checked(context, *stream, std::move(spans), std::move(body));
    });
}

// Synchronous: in the null stream, and complete on return.
int at_once(std::vector<Span> spans, std::function<void()> body) {
    return call_in_context([&](Context &context) -> int {
        if (int code = context.refuse_in_capture()) return code;
        int code = enqueue_checked(context, context.null_stream, std::move(spans), std::move(body));
        if (code != SUCCESS) return code;
        context.drain(context.null_stream);
        return context.failed;
    });
}

std::function<void()> moves(uintptr_t to, uintptr_t from, size_t n_bytes) {
    return [=] { memmove(pointer(to), pointer(from), n_bytes); };
}

template <class T>
std::function<void()> fills(uintptr_t to, T value, size_t n) {
    return
        [=] { std::fill(static_cast<T *>(pointer(to)), static_cast<T *>(pointer(to)) + n, value); };
}

uintptr_t host_address(const void *p) { return reinterpret_cast<uintptr_t>(p); }

}  // namespace

ENTRY int cuMemAlloc_v2(uintptr_t *out, size_t n_bytes) {
    return call_in_context([&](Context &context) -> int {
        if (int code = context.refuse_in_capture()) return code;
        if (n_bytes == 0) return INVALID_VALUE;
        *out = context.heap.alloc(n_bytes, context.memory_bytes);
        return *out == 0 ? OUT_OF_MEMORY : SUCCESS;
    });
}

// Frees even where the context has failed, so that leaks can be counted, and returns the failure.
ENTRY int cuMemFree_v2(uintptr_t address) {
    return call([&]() -> int {
        Context *context = current_context();
        if (context == nullptr) return INVALID_CONTEXT;
        if (address == 0) return SUCCESS;
        std::lock_guard<std::recursive_mutex> lock(context->mutex);
        if (int code = context->refuse_in_capture()) return code;
        context->drain_all();
        if (!context->heap.free(address)) return INVALID_VALUE;
        return context->failed;
    });
}

ENTRY int cuMemAllocHost_v2(void **out, size_t n_bytes) {
    return call_in_context([&](Context &context) -> int {
        if (int code = context.refuse_in_capture()) return code;
        if (n_bytes == 0) return INVALID_VALUE;
        *out = aligned_alloc(4096, (n_bytes + 4095) / 4096 * 4096);
        if (*out == nullptr) return OUT_OF_MEMORY;
        context.pinned[host_address(*out)] = n_bytes;
        return SUCCESS;
    });
}
ENTRY int cuMemHostAlloc(void **out, size_t n_bytes, unsigned) {
    return cuMemAllocHost_v2(out, n_bytes);
}

ENTRY int cuMemFreeHost(void *p) {
    return call([&]() -> int {
        Context *context = current_context();
        if (context == nullptr) return INVALID_CONTEXT;
        std::lock_guard<std::recursive_mutex> lock(context->mutex);
        if (int code = context->refuse_in_capture()) return code;
        context->drain_all();
        if (context->pinned.erase(host_address(p)) == 0) return INVALID_VALUE;
        free(p);
        return context->failed;
    });
}

ENTRY int cuMemGetInfo_v2(size_t *unused, size_t *total) {
    return call_in_context([&](Context &context) {
        *total = context.memory_bytes;
        *unused = context.memory_bytes - context.heap.used();
        return SUCCESS;
    });
}

ENTRY int cuMemcpyHtoD_v2(uintptr_t to, const void *from, size_t n) {
    return at_once({{to, n}}, moves(to, host_address(from), n));
}
ENTRY int cuMemcpyDtoH_v2(void *to, uintptr_t from, size_t n) {
    return at_once({{from, n}}, moves(host_address(to), from, n));
}
ENTRY int cuMemcpyDtoD_v2(uintptr_t to, uintptr_t from, size_t n) {
    return at_once({{to, n}, {from, n}}, moves(to, from, n));
}
ENTRY int cuMemcpyHtoDAsync_v2(uintptr_t to, const void *from, size_t n, void *stream) {
    return later(stream, {{to, n}}, from, moves(to, host_address(from), n));
}
ENTRY int cuMemcpyDtoHAsync_v2(void *to, uintptr_t from, size_t n, void *stream) {
    return later(stream, {{from, n}}, to, moves(host_address(to), from, n));
}
ENTRY int cuMemcpyDtoDAsync_v2(uintptr_t to, uintptr_t from, size_t n, void *stream) {
    return later(stream, {{to, n}, {from, n}}, nullptr, moves(to, from, n));
}

ENTRY int cuMemsetD8_v2(uintptr_t to, unsigned char value, size_t n) {
    return at_once({{to, n}}, fills(to, value, n));
}
ENTRY int cuMemsetD16_v2(uintptr_t to, unsigned short value, size_t n) {
    return at_once({{to, 2 * n}}, fills(to, value, n));
}
ENTRY int cuMemsetD32_v2(uintptr_t to, unsigned value, size_t n) {
    return at_once({{to, 4 * n}}, fills(to, value, n));
}
ENTRY int cuMemsetD8Async(uintptr_t to, unsigned char value, size_t n, void *stream) {
    return later(stream, {{to, n}}, nullptr, fills(to, value, n));
}
ENTRY int cuMemsetD16Async(uintptr_t to, unsigned short value, size_t n, void *stream) {
    return later(stream, {{to, 2 * n}}, nullptr, fills(to, value, n));
}
ENTRY int cuMemsetD32Async(uintptr_t to, unsigned value, size_t n, void *stream) {
    return later(stream, {{to, 4 * n}}, nullptr, fills(to, value, n));
}
