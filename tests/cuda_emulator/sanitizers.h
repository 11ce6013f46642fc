// Tells the sanitizers which thread runs on which stack and, for races, what happens before what. The executor is
// compiled without sanitizers; CUDA_ON_HOST_ASAN or CUDA_ON_HOST_TSAN says which one the kernels are compiled with.
#pragma once

#include <dlfcn.h>
#include <link.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "types.h"

#if defined(CUDA_ON_HOST_ASAN)
#include <sanitizer/common_interface_defs.h>
#elif defined(CUDA_ON_HOST_TSAN)
#include <sanitizer/tsan_interface.h>
extern "C" void __tsan_acquire(void* tag);
extern "C" void __tsan_release(void* tag);
extern "C" void AnnotateIgnoreWritesBegin(const char* file, int line);
extern "C" void AnnotateIgnoreWritesEnd(const char* file, int line);
#endif

namespace cuda_on_host {

// A thread that sanitizers distinguish: a CUDA thread, or the host thread that launched.
struct Watched {
    const void* stack = nullptr;  // its lowest address
    size_t stack_size = 0;
    void* fake_stack = nullptr;  // the address sanitizer's, while the thread does not run
    void* fiber = nullptr;       // the thread sanitizer's
};

// `from` is about to switch to `to`. A thread that ends does not come back.
inline void leave(Watched& from, const Watched& to, bool ends) {
#if defined(CUDA_ON_HOST_ASAN)
    __sanitizer_start_switch_fiber(ends ? nullptr : &from.fake_stack, to.stack, to.stack_size);
#elif defined(CUDA_ON_HOST_TSAN)
    __tsan_switch_to_fiber(to.fiber, __tsan_switch_to_fiber_no_sync);
#endif
    (void)from, (void)to, (void)ends;
}

// `to` runs now. If `from` is the host thread, its stack's address is stored in it.
inline void arrive(Watched& to, Watched* from) {
#if defined(CUDA_ON_HOST_ASAN)
    const void* stack = nullptr;
    size_t size = 0;
    __sanitizer_finish_switch_fiber(to.fake_stack, &stack, &size);
    if (from) from->stack = stack, from->stack_size = size;
#endif
    (void)to, (void)from;
}

// ---- Happens-before: what a thread did before release(tag) happens before what a thread does after acquire(tag).

// Memory that the executor allocates and frees inside is no access of the running thread.
struct Unwatched {
#if defined(CUDA_ON_HOST_TSAN)
    Unwatched() { AnnotateIgnoreWritesBegin(__FILE__, __LINE__); }
    ~Unwatched() { AnnotateIgnoreWritesEnd(__FILE__, __LINE__); }
#else
    Unwatched() {}
#endif
};

// A new tag, used only by the race detector, whose heap forgets it after free_tag.
inline void* new_tag() {
    const Unwatched unwatched;
#if defined(CUDA_ON_HOST_TSAN)
    return malloc(8);
#else
    return nullptr;
#endif
}
inline void free_tag(void* tag) {
    const Unwatched unwatched;
    free(tag);
}

inline void release(void* tag) {
#if defined(CUDA_ON_HOST_TSAN)
    __tsan_release(tag);
#endif
    (void)tag;
}

inline void acquire(void* tag) {
#if defined(CUDA_ON_HOST_TSAN)
    __tsan_acquire(tag);
#endif
    (void)tag;
}

// Acquires on behalf of `thread`, while `running` runs. A waiting thread acquires at the moment when it may continue:
// later it would also acquire what faster threads have released since.
inline void acquire_for(const Watched& thread, void* tag, const Watched& running) {
#if defined(CUDA_ON_HOST_TSAN)
    __tsan_switch_to_fiber(thread.fiber, __tsan_switch_to_fiber_no_sync);
    __tsan_acquire(tag);
    __tsan_switch_to_fiber(running.fiber, __tsan_switch_to_fiber_no_sync);
#endif
    (void)tag, (void)thread, (void)running;
}

inline void begin_thread(Watched& thread, uint3 block, uint3 index) {
#if defined(CUDA_ON_HOST_TSAN)
    char name[96];
    snprintf(name, sizeof name, "block (%u, %u, %u), thread (%u, %u, %u)", block.x, block.y, block.z, index.x, index.y,
             index.z);
    thread.fiber = __tsan_create_fiber(0);
    __tsan_set_fiber_name(thread.fiber, name);
#endif
    (void)thread, (void)block, (void)index;
}

// From here to end_thread, accesses of the host thread count as those of `thread`.
inline void pretend(const Watched& thread) {
#if defined(CUDA_ON_HOST_TSAN)
    __tsan_switch_to_fiber(thread.fiber, __tsan_switch_to_fiber_no_sync);
#endif
    (void)thread;
}

inline void end_thread(Watched& thread) {
#if defined(CUDA_ON_HOST_TSAN)
    __tsan_destroy_fiber(thread.fiber);
#endif
    (void)thread;
}

inline void name_host_thread(Watched& thread) {
#if defined(CUDA_ON_HOST_TSAN)
    thread.fiber = __tsan_get_current_fiber();
#endif
    (void)thread;
}

// Calls `callback` after a report of a sanitizer that ends the process. Each sanitizer's library has its own list.
inline void after_reports(void (*callback)()) {
    const auto tell = [](dl_phdr_info* library, size_t, void* callback) {
        const char* file = strrchr(library->dlpi_name, '/');
        if (!file || (!strstr(file, "libasan") && !strstr(file, "libubsan") && !strstr(file, "libtsan"))) return 0;
        void* handle = dlopen(library->dlpi_name, RTLD_LAZY | RTLD_NOLOAD);
        void* set = handle ? dlsym(handle, "__sanitizer_set_death_callback") : nullptr;
        if (set) reinterpret_cast<void (*)(void (*)())>(set)(reinterpret_cast<void (*)()>(callback));
        return 0;
    };
    dl_iterate_phdr(tell, reinterpret_cast<void*>(callback));
}

}  // namespace cuda_on_host
