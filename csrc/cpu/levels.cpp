#include "cpu/levels.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace peftk {

namespace {

const char* const kNames[kLevels] = {"portable", "avx2", "avx512", "avx512_bf16", "neon"};

std::atomic<int> current_level{-1};

std::string names_that_run_here() {
    std::string names;
    for (int level = 0; level < kLevels; level++) {
        if (level_runs_here(Level(level))) names += (names.empty() ? "" : ", ") + std::string(kNames[level]);
    }
    return names;
}

Level usable_level(const char* name, const char* source) {
    const Level level = level_by_name(name);
    if (level == kLevels || !level_runs_here(level)) {
        throw std::invalid_argument(std::string(source) +
                                    ": expected a SIMD level that this build and machine support (" +
                                    names_that_run_here() + "), got '" + name + "'");
    }
    return level;
}

Level best_level() {
    for (Level level : {kAvx512Bf16, kAvx512, kAvx2, kNeon}) {
        if (level_runs_here(level)) return level;
    }
    return kPortable;
}

}  // namespace

const char* level_name(Level level) { return kNames[level]; }

Level level_by_name(const char* name) {
    int level = 0;
    while (level < kLevels && strcmp(kNames[level], name) != 0) level++;
    return Level(level);
}

// __builtin_cpu_supports checks XCR0 too, so it is false for registers that the operating system does not save.
#if defined(__x86_64__)
[[maybe_unused]] static bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
[[maybe_unused]] static bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
[[maybe_unused]] static bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif

bool level_runs_here(Level level) {
    switch (level) {
        PEFTK_IF_PORTABLE(case kPortable : return true;)
        PEFTK_IF_AVX2(case kAvx2 : return has_avx2();)
        PEFTK_IF_AVX512(case kAvx512 : return has_avx512();)
        PEFTK_IF_AVX512_BF16(case kAvx512Bf16 : return has_avx512_bf16();)
        PEFTK_IF_NEON(case kNeon : return true;)
        default: return false;
    }
}

Level level_in_use() {
    int level = current_level.load(std::memory_order_relaxed);
    if (level < 0) {
        const char* forced = getenv("PEFTK_SIMD");
        level = forced && *forced ? usable_level(forced, "PEFTK_SIMD") : best_level();
        current_level.store(level, std::memory_order_relaxed);
    }
    return Level(level);
}

void use_level(const char* name) { current_level.store(usable_level(name, "simd_level"), std::memory_order_relaxed); }

}  // namespace peftk
