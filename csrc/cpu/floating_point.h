// The processor's floating-point mode for exact work: rounding to nearest, subnormals kept.
//
// torch.set_flush_denormal and other libraries change a thread's mode and leave it changed, and a new thread inherits
// its creator's mode. DefaultFloatingPoint sets the default mode for a scope, and restores the previous one at its end.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace peftk {

class DefaultFloatingPoint {
public:
    DefaultFloatingPoint() : found_(read()) { write(kDefault); }
    ~DefaultFloatingPoint() { write(found_); }
    DefaultFloatingPoint(const DefaultFloatingPoint&) = delete;
    DefaultFloatingPoint& operator=(const DefaultFloatingPoint&) = delete;

private:
#if defined(__x86_64__)
    static constexpr unsigned kDefault = 0x1f80;  // MXCSR: all exceptions masked, nearest, no FTZ, no DAZ
    static unsigned read() { return _mm_getcsr(); }
    static void write(unsigned mode) { _mm_setcsr(mode); }
    unsigned found_;
#elif defined(__aarch64__)
    static constexpr uint64_t kDefault = 0;  // FPCR: nearest, no FZ
    static uint64_t read() {
        uint64_t mode;
        asm volatile("mrs %0, fpcr" : "=r"(mode));
        return mode;
    }
    static void write(uint64_t mode) { asm volatile("msr fpcr, %0" : : "r"(mode) : "memory"); }
    uint64_t found_;
#else
    static constexpr int kDefault = 0;  // no such mode, or none that is known to be changed
    static int read() { return 0; }
    static void write(int) {}
    int found_;
#endif
};

}  // namespace peftk
