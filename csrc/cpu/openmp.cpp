#include "cpu/openmp.h"

#include <dlfcn.h>
#include <link.h>

#include <cstring>
#include <string>

namespace peftk {

namespace {

struct Runtime {
    std::string path;
    bool from_torch = false;
};

int visit_library(dl_phdr_info* info, size_t, void* data) {
    Runtime& runtime = *static_cast<Runtime*>(data);
    const char* slash = std::strrchr(info->dlpi_name, '/');
    const char* name = slash ? slash + 1 : info->dlpi_name;
    for (const char* prefix : {"libgomp", "libomp", "libiomp5"}) {
        if (std::strncmp(name, prefix, std::strlen(prefix)) != 0) continue;
        const bool from_torch = std::strstr(info->dlpi_name, "/torch/") != nullptr;
        if (runtime.path.empty() || from_torch > runtime.from_torch) runtime = {info->dlpi_name, from_torch};
    }
    return 0;
}

OpenMpParallel find_openmp_parallel() {
    Runtime runtime;
    dl_iterate_phdr(visit_library, &runtime);
    if (runtime.path.empty()) return nullptr;
    void* library = dlopen(runtime.path.c_str(), RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<OpenMpParallel>(dlsym(library, "GOMP_parallel")) : nullptr;
}

}  // namespace

OpenMpParallel openmp_parallel() {
    static const OpenMpParallel parallel = find_openmp_parallel();
    return parallel;
}

}  // namespace peftk
