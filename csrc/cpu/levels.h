// The SIMD levels of this build and the one in use. Kernels live in namespace peftk::<level>.
#pragma once

namespace peftk {

enum Level : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3, kNeon = 4, kLevels = 5 };

const char* level_name(Level level);
Level level_by_name(const char* name);  // kLevels if there is no such level
bool level_runs_here(Level level);      // whether it is built, and this processor and operating system can run it

// The best level, or the one that PEFTK_SIMD or use_level names. Throws std::invalid_argument for a name that is
// unknown or cannot run here.
Level level_in_use();
void use_level(const char* name);

}  // namespace peftk

#ifdef PEFTK_LEVELS_PORTABLE
#define PEFTK_IF_PORTABLE(x) x
#else
#define PEFTK_IF_PORTABLE(x)
#endif
#ifdef PEFTK_LEVELS_AVX2
#define PEFTK_IF_AVX2(x) x
#else
#define PEFTK_IF_AVX2(x)
#endif
#ifdef PEFTK_LEVELS_AVX512
#define PEFTK_IF_AVX512(x) x
#else
#define PEFTK_IF_AVX512(x)
#endif
#ifdef PEFTK_LEVELS_AVX512_BF16
#define PEFTK_IF_AVX512_BF16(x) x
#else
#define PEFTK_IF_AVX512_BF16(x)
#endif
#ifdef PEFTK_LEVELS_NEON
#define PEFTK_IF_NEON(x) x
#else
#define PEFTK_IF_NEON(x)
#endif

// Declares a kernel of every level: PEFTK_DECLARE(void, lora_linear, (const LinearArgs&))
#define PEFTK_DECLARE_IN(level, type, name, args) \
    namespace level {                             \
    type name args;                               \
    }
#define PEFTK_DECLARE(type, name, args)                                   \
    PEFTK_IF_PORTABLE(PEFTK_DECLARE_IN(portable, type, name, args))       \
    PEFTK_IF_AVX2(PEFTK_DECLARE_IN(avx2, type, name, args))               \
    PEFTK_IF_AVX512(PEFTK_DECLARE_IN(avx512, type, name, args))           \
    PEFTK_IF_AVX512_BF16(PEFTK_DECLARE_IN(avx512_bf16, type, name, args)) \
    PEFTK_IF_NEON(PEFTK_DECLARE_IN(neon, type, name, args))

// Inside namespace peftk: calls the level's `name` with the arguments, as in PEFTK_CALL(level_in_use(), lora_linear,
// (args));
#define PEFTK_CALL(level, name, args)                                           \
    switch (level) {                                                            \
        PEFTK_IF_PORTABLE(case kPortable : portable::name args; break;)         \
        PEFTK_IF_AVX2(case kAvx2 : avx2::name args; break;)                     \
        PEFTK_IF_AVX512(case kAvx512 : avx512::name args; break;)               \
        PEFTK_IF_AVX512_BF16(case kAvx512Bf16 : avx512_bf16::name args; break;) \
        PEFTK_IF_NEON(case kNeon : neon::name args; break;)                     \
        default: break;                                                         \
    }
