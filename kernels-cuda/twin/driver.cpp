// The driver's entry points for devices, contexts, modules and errors: `libloris_twin.so` stands
// where `libcuda.so.1` does. Everything above it is the real thing; kernels run on the CPU, as
// strictly as the documented semantics allow.
//
// To build it, from the directory of this package:
//   the core     g++ -std=c++17 -O3 -g1 -fPIC -fvisibility=hidden -Wall -Wextra -c twin/X.cpp
//   the kernels  g++ -std=c++17 -O2 -g1 -fPIC -fvisibility=hidden -x c++ -DLORIS_TWIN -I include
//                -I <where build.rs has written formats.h>
//                -fsanitize=thread,alignment -fno-tree-vectorize -fno-strict-aliasing
//                -ffp-contract=off -Wno-unknown-pragmas -c kernels/X.cu      (and twin/faults/X.cu)
//   the library  g++ -shared -Wl,-z,defs -o libloris_twin.so *.o
// The sanitizers' run-time libraries are not linked: `checks.cpp` implements their entry points.
// With clang++, -fsanitize=thread,alignment takes -mllvm -tsan-instrument-func-entry-exit=0 beside
// it.
#include "driver.hpp"

#include <stdio.h>
#include <string.h>

using namespace twin;

namespace {

bool initialised = false;

// The contexts that are current in this host thread, the last on top.
thread_local std::vector<Context *> current;
// Each host thread has a primary context of its own: tests side by side then share no fate.
thread_local Context *primary = nullptr;

Context *create_context() {
    auto *context = new Context;
    context->context = context;
    context->null_stream.context = context;
    add_object(context);
    return context;
}

constexpr const char *NAME = "loris twin";

// CUdevice_attribute values of an A100, with the shared memory that the test allows.
int device_attribute(int attribute) {
    const int max_smem = static_cast<int>(controls().max_smem);
    switch (attribute) {
        case 1:
            return MAX_THREADS;  // MAX_THREADS_PER_BLOCK
        case 2:
            return 1024;  // MAX_BLOCK_DIM_X
        case 3:
            return 1024;  // MAX_BLOCK_DIM_Y
        case 4:
            return 64;  // MAX_BLOCK_DIM_Z
        case 5:
            return 0x7fffffff;  // MAX_GRID_DIM_X
        case 6:
            return 65535;  // MAX_GRID_DIM_Y
        case 7:
            return 65535;  // MAX_GRID_DIM_Z
        case 8:
            return 48 * 1024;  // MAX_SHARED_MEMORY_PER_BLOCK
        case 9:
            return 64 * 1024;  // TOTAL_CONSTANT_MEMORY
        case 10:
            return WARP;  // WARP_SIZE
        case 11:
            return 0x7fffffff;  // MAX_PITCH
        case 12:
            return 65536;  // MAX_REGISTERS_PER_BLOCK
        case 13:
            return 1410000;  // CLOCK_RATE, kHz
        case 14:
            return 512;  // TEXTURE_ALIGNMENT
        case 16:
            return 108;  // MULTIPROCESSOR_COUNT
        case 19:
            return 1;  // CAN_MAP_HOST_MEMORY
        case 31:
            return 1;  // CONCURRENT_KERNELS
        case 32:
            return 1;  // ECC_ENABLED
        case 36:
            return 1215000;  // MEMORY_CLOCK_RATE, kHz
        case 37:
            return 5120;  // GLOBAL_MEMORY_BUS_WIDTH, bits
        case 38:
            return 40 << 20;  // L2_CACHE_SIZE
        case 39:
            return 2048;  // MAX_THREADS_PER_MULTIPROCESSOR
        case 40:
            return 3;  // ASYNC_ENGINE_COUNT
        case 41:
            return 1;  // UNIFIED_ADDRESSING
        case 75:
            return 8;  // COMPUTE_CAPABILITY_MAJOR
        case 76:
            return 0;  // COMPUTE_CAPABILITY_MINOR
        case 78:
            return 1;  // STREAM_PRIORITIES_SUPPORTED
        case 81:
            return max_smem + 1024;  // MAX_SHARED_MEMORY_PER_MULTIPROCESSOR
        case 82:
            return 65536;  // MAX_REGISTERS_PER_MULTIPROCESSOR
        case 97:
            return max_smem;  // MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
        case 106:
            return 32;  // MAX_BLOCKS_PER_MULTIPROCESSOR
        case 111:
            return 1024;  // RESERVED_SHARED_MEMORY_PER_BLOCK
        default:
            return 0;
    }
}

const struct {
    int code;
    const char *name, *text;
} ERRORS[] = {
    {SUCCESS, "CUDA_SUCCESS", "no error"},
    {INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {NOT_INITIALIZED, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {INVALID_IMAGE, "CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"},
    {INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {NOT_FOUND, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {NOT_READY, "CUDA_ERROR_NOT_READY", "device not ready"},
    {ILLEGAL_ADDRESS, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {LAUNCH_FAILED, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
    {NOT_SUPPORTED, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
    {CAPTURE_UNSUPPORTED, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED",
     "operation not permitted when stream is capturing"},
    {CAPTURE_INVALIDATED, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED",
     "operation failed due to a previous error during capture"},
    {CAPTURE_UNMATCHED, "CUDA_ERROR_STREAM_CAPTURE_UNMATCHED",
     "the capture was not initiated in this stream"},
    {CAPTURE_IMPLICIT, "CUDA_ERROR_STREAM_CAPTURE_IMPLICIT",
     "operation would make the legacy stream depend on a capturing blocking stream"},
    {CAPTURED_EVENT, "CUDA_ERROR_CAPTURED_EVENT",
     "operation not permitted on an event last recorded in a capturing stream"},
    {CAPTURE_WRONG_THREAD, "CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD",
     "attempt to terminate a thread-local capture sequence from another thread"},
};

}  // namespace

namespace twin {

// One that another thread has destroyed is none.
Context *current_context() { return current.empty() ? nullptr : find<Context>(current.back()); }

void delete_context(Context &context) {
    context.drain_all();
    for (Stream *stream : context.streams) {
        remove_object(stream);
        delete stream;
    }
    for (auto &[address, n_bytes] : context.pinned) free(reinterpret_cast<void *>(address));
    if (primary == &context) primary = nullptr;
    remove_object(&context);
    delete &context;
}

}  // namespace twin

ENTRY int cuGetErrorName(int code, const char **out) {
    *out = nullptr;
    for (auto &error : ERRORS) {
        if (error.code == code) *out = error.name;
    }
    return *out == nullptr ? INVALID_VALUE : SUCCESS;
}

// While the current context has failed, the text of its code is the fault that was found.
ENTRY int cuGetErrorString(int code, const char **out) {
    // Callers may keep the pointer: texts are never freed.
    static std::mutex mutex;
    static std::set<std::string> kept;
    Context *context = current_context();
    if (context != nullptr && context->failed == code && code != SUCCESS) {
        std::lock_guard<std::mutex> lock(mutex);
        *out = kept.insert(context->failure).first->c_str();
        return SUCCESS;
    }
    *out = nullptr;
    for (auto &error : ERRORS) {
        if (error.code == code) *out = error.text;
    }
    return *out == nullptr ? INVALID_VALUE : SUCCESS;
}

ENTRY int cuInit(unsigned flags) {
    return call([&]() -> int {
        if (flags != 0) return INVALID_VALUE;
        initialised = true;
        return SUCCESS;
    });
}

ENTRY int cuDriverGetVersion(int *out) {
    return call([&] { return *out = 13000, SUCCESS; });
}

// Does `body` if the driver has been initialised and the device is the only one.
template <class Body>
static int call_on_device(int device, Body body) {
    return call([&]() -> int {
        if (!initialised) return NOT_INITIALIZED;
        if (device != 0) return INVALID_DEVICE;
        return body();
    });
}

ENTRY int cuDeviceGetCount(int *out) {
    return call_on_device(0, [&] { return *out = 1, SUCCESS; });
}

ENTRY int cuDeviceGet(int *out, int ordinal) {
    return call_on_device(ordinal, [&] { return *out = ordinal, SUCCESS; });
}

ENTRY int cuDeviceGetName(char *out, int n_bytes, int device) {
    return call_on_device(device, [&] {
        snprintf(out, static_cast<size_t>(n_bytes), "%s", NAME);
        return SUCCESS;
    });
}

ENTRY int cuDeviceGetUuid(unsigned char *out, int device) {
    return call_on_device(device, [&] {
        memset(out, 0, 16);
        memcpy(out, NAME, strlen(NAME));
        return SUCCESS;
    });
}
ENTRY int cuDeviceGetUuid_v2(unsigned char *out, int device) {
    return cuDeviceGetUuid(out, device);
}

ENTRY int cuDeviceGetAttribute(int *out, int attribute, int device) {
    return call_on_device(device, [&] { return *out = device_attribute(attribute), SUCCESS; });
}

ENTRY int cuDeviceTotalMem_v2(size_t *out, int device) {
    return call_on_device(device, [&] { return *out = controls().memory_bytes, SUCCESS; });
}

ENTRY int cuDevicePrimaryCtxRetain(void **out, int device) {
    return call_on_device(device, [&] {
        if (primary != nullptr) {
            primary->n_uses++;
        } else {
            primary = create_context();
            primary->primary = true;
        }
        *out = primary;
        return SUCCESS;
    });
}

// A context may be released by another thread than it was retained in: then it is the current one
// there.
ENTRY int cuDevicePrimaryCtxRelease_v2(int device) {
    return call_on_device(device, [&]() -> int {
        Context *context = current_context();
        if (context == nullptr || !context->primary) context = primary;
        if (context == nullptr) return INVALID_CONTEXT;
        if (--context->n_uses == 0) delete_context(*context);
        return SUCCESS;
    });
}

ENTRY int cuDevicePrimaryCtxSetFlags_v2(int device, unsigned) {
    return call_on_device(device, [] { return SUCCESS; });
}

ENTRY int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
    return call_on_device(device,
                          [&] { return *flags = 0, *active = primary != nullptr, SUCCESS; });
}

ENTRY int cuDevicePrimaryCtxReset_v2(int device) {
    return call_on_device(device, [&] {
        if (primary != nullptr) delete_context(*primary);
        return SUCCESS;
    });
}

ENTRY int cuCtxCreate_v2(void **out, unsigned, int device) {
    return call_on_device(device, [&] {
        Context *context = create_context();
        current.push_back(context);
        *out = context;
        return SUCCESS;
    });
}

ENTRY int cuCtxDestroy_v2(void *handle) {
    return call([&]() -> int {
        Context *context = find<Context>(handle);
        if (context == nullptr || context->primary) return INVALID_CONTEXT;
        if (current_context() == context) current.pop_back();
        delete_context(*context);
        return SUCCESS;
    });
}

ENTRY int cuCtxSetCurrent(void *handle) {
    return call([&]() -> int {
        Context *context = find<Context>(handle);
        if (handle != nullptr && context == nullptr) return INVALID_CONTEXT;
        if (!current.empty()) current.pop_back();
        if (context != nullptr) current.push_back(context);
        return SUCCESS;
    });
}

ENTRY int cuCtxGetCurrent(void **out) {
    return call([&] { return *out = current_context(), SUCCESS; });
}

ENTRY int cuCtxPushCurrent_v2(void *handle) {
    return call([&]() -> int {
        Context *context = find<Context>(handle);
        if (context == nullptr) return INVALID_CONTEXT;
        current.push_back(context);
        return SUCCESS;
    });
}

ENTRY int cuCtxPopCurrent_v2(void **out) {
    return call([&]() -> int {
        if (current.empty()) return INVALID_CONTEXT;
        if (out != nullptr) *out = current.back();
        current.pop_back();
        return SUCCESS;
    });
}

ENTRY int cuCtxGetDevice(int *out) {
    return call_in_context([&](Context &) { return *out = 0, SUCCESS; });
}

ENTRY int cuCtxGetApiVersion(void *, unsigned *out) {
    return call([&] { return *out = 3020, SUCCESS; });
}

ENTRY int cuCtxGetStreamPriorityRange(int *least, int *greatest) {
    return call_in_context([&](Context &) { return *least = 0, *greatest = -5, SUCCESS; });
}

ENTRY int cuCtxSynchronize() {
    return call_in_context([](Context &context) -> int {
        if (int code = context.refuse_in_capture()) return code;
        context.drain_all();
        return context.failed;
    });
}

// Images are not run: they only have to look like a cubin, PTX, or the mark of a build without
// nvcc.
static bool is_image(const char *image) {
    if (memcmp(image,
               "\x7f"
               "ELF",
               4) == 0)
        return true;
    for (const char *text : {"//", ".version", "loris twin image"}) {
        if (strncmp(image, text, strlen(text)) == 0) return true;
    }
    return false;
}

ENTRY int cuModuleLoadData(void **out, const void *image) {
    return call_in_context([&](Context &context) -> int {
        if (int code = context.refuse_in_capture()) return code;
        if (image == nullptr) return INVALID_VALUE;
        if (!is_image(static_cast<const char *>(image))) return INVALID_IMAGE;
        auto *module = new Module;
        module->context = &context;
        add_object(module);
        *out = module;
        return SUCCESS;
    });
}

ENTRY int cuModuleLoadDataEx(void **out, const void *image, unsigned, int *, void **) {
    return cuModuleLoadData(out, image);
}

ENTRY int cuModuleUnload(void *handle) {
    return call([&]() -> int {
        Module *module = find<Module>(handle);
        if (module == nullptr) return INVALID_HANDLE;
        Context &context = *module->context;
        std::lock_guard<std::recursive_mutex> lock(context.mutex);
        context.drain_all();
        for (auto &[name, function] : module->functions) {
            remove_object(function);
            delete function;
        }
        remove_object(module);
        delete module;
        return context.failed;
    });
}

ENTRY int cuModuleGetFunction(void **out, void *handle, const char *name) {
    return call_in_context([&](Context &context) -> int {
        Module *module = find<Module>(handle);
        if (module == nullptr) return INVALID_HANDLE;
        const Kernel *kernel = find_kernel(name);
        if (kernel == nullptr) return NOT_FOUND;
        Function *&function = module->functions[name];
        if (function == nullptr) {
            function = new Function;
            function->context = &context;
            function->kernel = kernel;
            add_object(function);
        }
        *out = function;
        return SUCCESS;
    });
}

ENTRY int cuFuncGetAttribute(int *out, int attribute, void *handle) {
    return call_in_context([&](Context &) -> int {
        Function *function = find<Function>(handle);
        if (function == nullptr) return INVALID_HANDLE;
        switch (attribute) {
            case 0:
                *out = static_cast<int>(function->kernel->n_threads);
                break;  // MAX_THREADS_PER_BLOCK
            case 4:
                *out = 64;
                break;  // NUM_REGS
            case 5:
            case 6:
                *out = 80;
                break;  // PTX, BINARY_VERSION
            case 8:
                *out = static_cast<int>(function->max_dynamic_smem);
                break;  // MAX_DYNAMIC_SHARED
            case 9:
                *out = -1;
                break;  // SHARED_MEMORY_CARVEOUT
            default:
                *out = 0;  // static and local memory
        }
        return SUCCESS;
    });
}

ENTRY int cuFuncSetAttribute(void *handle, int attribute, int value) {
    return call_in_context([&](Context &) -> int {
        Function *function = find<Function>(handle);
        if (function == nullptr) return INVALID_HANDLE;
        if (attribute == 9) return SUCCESS;  // PREFERRED_SHARED_MEMORY_CARVEOUT: a hint
        if (attribute != 8 || value < 0 || static_cast<uint32_t>(value) > controls().max_smem)
            return INVALID_VALUE;
        function->max_dynamic_smem = static_cast<uint32_t>(value);
        return SUCCESS;
    });
}

ENTRY int cuOccupancyMaxActiveBlocksPerMultiprocessor(int *out, void *handle, int n_threads,
                                                      size_t smem) {
    return call_in_context([&](Context &) -> int {
        if (find<Function>(handle) == nullptr) return INVALID_HANDLE;
        if (n_threads <= 0) return INVALID_VALUE;
        *out = static_cast<int>(
            std::min<size_t>(2048 / n_threads, (controls().max_smem + 1024) / (smem + 1024)));
        return SUCCESS;
    });
}
