#include "cpu/openmp.h"

#include <dlfcn.h>
#include <link.h>

#include <cstring>
#include <string>

namespace peftk {

namespace {

struct Found {
    std::string path;
    bool torchs = false;
};

int look_at(dl_phdr_info* info, size_t, void* data) {
    Found& found = *static_cast<Found*>(data);
    const char* slash = std::strrchr(info->dlpi_name, '/');
    const char* name = slash ? slash + 1 : info->dlpi_name;
    for (const char* runtime : {"libgomp", "libomp", "libiomp5"}) {
        if (std::strncmp(name, runtime, std::strlen(runtime)) != 0) continue;
        const bool torchs = std::strstr(info->dlpi_name, "/torch/") != nullptr;
        if (found.path.empty() || torchs > found.torchs) found = {info->dlpi_name, torchs};
    }
    return 0;
}

OpenMpParallel find() {
    Found found;
    dl_iterate_phdr(look_at, &found);
    if (found.path.empty()) return nullptr;
    void* library = dlopen(found.path.c_str(), RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<OpenMpParallel>(dlsym(library, "GOMP_parallel")) : nullptr;
}

}  // namespace

OpenMpParallel openmp_parallel() {
    static const OpenMpParallel parallel = find();
    return parallel;
}

}  // namespace peftk
