// Shared by the parity tests: random numbers, the storage types, matrices in fenced memory, the error bound. A kernel's
// expected result is computed in double by plain loops, without code from csrc.
#pragma once

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <string>
#include <utility>
#include <vector>

#include "common/dtype.h"
#include "cpu/levels.h"

namespace peftk::parity {

// splitmix64, so that the cases are the same on every machine.
class Random {
public:
    explicit Random(uint64_t seed) : state_(seed) {}
    uint64_t word() {
        uint64_t z = (state_ += 0x9E3779B97F4A7C15);
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
        return z ^ (z >> 31);
    }
    int64_t between(int64_t first, int64_t last) { return first + int64_t(word() % uint64_t(last - first + 1)); }
    bool chance(double p) { return double(word() >> 11) * 0x1p-53 < p; }
    double value() { return double(int64_t(word() >> 40) - (1 << 23)) * 0x1p-22; }  // in [-2, 2)
    int64_t choice(std::initializer_list<int64_t> values) { return values.begin()[between(0, values.size() - 1)]; }
    int dtype() { return int(between(0, 2)); }

private:
    uint64_t state_;
};

// ---- the storage types --------------------------------------------------------------------------------------------

inline int64_t bytes_of(int dtype) { return dtype == kFloat32 ? 4 : 2; }

// Rounds to the nearest value of the type, ties to even. The value must be within the type's range.
inline void encode(double value, int dtype, char* to) {
    const int digits = dtype == kBFloat16 ? 8 : 11, least = dtype == kBFloat16 ? -126 : -14;
    if (dtype != kFloat32) {
        const int exponent = value == 0 ? least : std::max(std::ilogb(value), least);
        value = std::ldexp(std::nearbyint(std::ldexp(value, digits - 1 - exponent)), exponent - digits + 1);
    }
    const float narrow = float(value);
    uint32_t bits;
    memcpy(&bits, &narrow, 4);
    if (dtype == kFloat32) {
        memcpy(to, &bits, 4);
        return;
    }
    const bool subnormal = std::fabs(value) < 0x1p-14;
    const uint32_t magnitude =
        subnormal ? uint32_t(std::fabs(value) * 0x1p24) : ((bits & 0x7fffffff) - (112u << 23)) >> 13;
    const uint16_t half = uint16_t(dtype == kBFloat16 ? bits >> 16 : (bits >> 16 & 0x8000) | magnitude);
    memcpy(to, &half, 2);
}

inline double decode(int dtype, const char* from) {
    uint32_t bits = 0;
    memcpy(&bits, from, bytes_of(dtype));
    if (dtype == kFloat16) {
        const int exponent = int(bits >> 10 & 31), mantissa = int(bits & 1023);
        const double sign = bits >> 15 ? -1 : 1;
        if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
        return sign * std::ldexp(exponent ? 1024 + mantissa : mantissa, (exponent ? exponent : 1) - 25);
    }
    if (dtype == kBFloat16) bits <<= 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

// ---- memory -------------------------------------------------------------------------------------------------------

constexpr unsigned char kSentinel = 0xA5;

// Bytes between two protected pages, directly next to one of them: a read or write beyond that end stops the program.
// The space at the other end is filled with kSentinel.
class Fenced {
public:
    Fenced() = default;
    Fenced(int64_t bytes, bool at_end) : bytes_(bytes) {
        const int64_t page = sysconf(_SC_PAGESIZE);
        room_ = (bytes + page - 1) / page * page;
        mapped_ = room_ + 2 * page;
        void* memory = mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED) abort();
        base_ = static_cast<char*>(memory);
        begin_ = base_ + page;
        if (room_ > 0 && mprotect(begin_, room_, PROT_READ | PROT_WRITE)) abort();
        data_ = begin_ + (at_end ? room_ - bytes : 0);
        wipe();
    }
    Fenced(Fenced&& other) noexcept { *this = std::move(other); }
    Fenced& operator=(Fenced&& other) noexcept {
        std::swap(base_, other.base_), std::swap(begin_, other.begin_), std::swap(data_, other.data_);
        std::swap(bytes_, other.bytes_), std::swap(room_, other.room_), std::swap(mapped_, other.mapped_);
        return *this;
    }
    ~Fenced() {
        if (base_) munmap(base_, mapped_);
    }

    char* data() const { return data_; }
    void wipe() { memset(begin_, kSentinel, room_); }
    std::vector<char> all() const { return std::vector<char>(begin_, begin_ + room_); }
    int64_t offset(const char* address) const { return address - begin_; }  // of an address, in all()

private:
    char *base_ = nullptr, *begin_ = nullptr, *data_ = nullptr;
    int64_t bytes_ = 0, room_ = 0, mapped_ = 0;
};

// A strided matrix in fenced memory, and its values in double. Without rows or columns its data is an address that must
// not be read.
struct Matrix {
    int dtype = 0;
    int64_t rows = 0, columns = 0, row = 0, column = 0;  // row, column: strides in elements
    Fenced memory;
    std::vector<double> values;  // [rows, columns], after random() or read()

    Matrix() = default;
    Matrix(Random& random, int type, int64_t M, int64_t N, int64_t row_stride, int64_t column_stride)
        : dtype(type), rows(M), columns(N), row(row_stride), column(column_stride), values(M * N) {
        const int64_t last = M > 0 && N > 0 ? (M - 1) * row + (N - 1) * column + 1 : 0;
        memory = Fenced(last * bytes_of(dtype), random.chance(0.7));
    }

    char* at(int64_t i, int64_t j) const { return memory.data() + (i * row + j * column) * bytes_of(dtype); }
    void* data() const { return memory.data(); }
    double operator()(int64_t i, int64_t j) const { return values[i * columns + j]; }

    void fill(Random& random, double scale) {
        for (int64_t i = 0; i < rows; i++) {
            for (int64_t j = 0; j < columns; j++) encode(random.value() * scale, dtype, at(i, j));
        }
        read();
    }
    void read() {
        for (int64_t i = 0; i < rows; i++) {
            for (int64_t j = 0; j < columns; j++) values[i * columns + j] = decode(dtype, at(i, j));
        }
    }
    void copy(const Matrix& from) {
        for (int64_t i = 0; i < rows; i++) {
            for (int64_t j = 0; j < columns; j++) encode(from(i, j), dtype, at(i, j));
        }
    }
    // Whether all memory outside the elements still has kSentinel.
    bool gaps_untouched() const {
        std::vector<char> all = memory.all();
        for (int64_t i = 0; i < rows; i++) {
            for (int64_t j = 0; j < columns; j++) {
                memset(all.data() + memory.offset(at(i, j)), kSentinel, bytes_of(dtype));
            }
        }
        for (char byte : all) {
            if (static_cast<unsigned char>(byte) != kSentinel) return false;
        }
        return true;
    }
};

// Rows of contiguous elements, with a gap after each or without.
inline Matrix row_major(Random& random, int dtype, int64_t M, int64_t N, bool gaps) {
    return Matrix(random, dtype, M, N, N + (gaps ? random.between(1, 9) : 0), 1);
}

// Columns of contiguous elements.
inline Matrix column_major(Random& random, int dtype, int64_t M, int64_t N, bool gaps) {
    return Matrix(random, dtype, M, N, 1, M + (gaps ? random.between(1, 9) : 0));
}

// ---- expected results ---------------------------------------------------------------------------------------------

// A result in double, and the sum of the absolute values of all terms of each element.
struct Expected {
    std::vector<double> values, magnitudes;

    explicit Expected(int64_t count = 0) : values(count), magnitudes(count) {}
    void add(int64_t i, double term) { add(i, term, std::fabs(term)); }
    void add(int64_t i, double value, double magnitude) {
        values[i] += value;
        magnitudes[i] += magnitude;
    }
};

inline int wrong = 0;                  // results of this program
inline char at_work[200] = "no case";  // printed if the program crashes

inline void report(const std::string& where, const char* what) {
    if (wrong++ < 20) fprintf(stderr, "%s: %s\n", where.c_str(), what);
}

// Checks every element against the bound of docs/numerics.md.
inline void check(const std::string& where, const char* name, const Matrix& actual, const Expected& expected,
                  int64_t terms) {
    constexpr double units[] = {0x1p-24, 0x1p-8, 0x1p-11}, tinies[] = {0x1p-149, 0x1p-133, 0x1p-24};
    const double c = 2 * std::sqrt(double(terms)) * 0x1p-24;
    double worst = 0;
    int64_t place = 0;
    for (int64_t i = 0; i < int64_t(actual.values.size()); i++) {
        const double value = expected.values[i], accumulated = c * expected.magnitudes[i];
        const double allowed =
            units[actual.dtype] * (std::fabs(value) + accumulated) + accumulated + tinies[actual.dtype];
        const double ratio = std::fabs(actual.values[i] - value) / allowed;
        if (ratio <= worst) continue;
        worst = std::isnan(ratio) ? INFINITY : ratio;
        place = i;
    }
    if (worst <= 1) return;
    char message[200];
    snprintf(message, sizeof message, "%s[%lld, %lld]: got %.9g, expected %.9g, error %.2f times the bound", name,
             static_cast<long long>(place / actual.columns), static_cast<long long>(place % actual.columns),
             actual.values[place], expected.values[place], worst);
    report(where, message);
}

// From 65,536 elements on, also the Frobenius norm, for results with many different terms.
inline void check_norm(const std::string& where, const char* name, const Matrix& actual, const Expected& expected) {
    constexpr double norms[] = {1e-6, 1.7e-3, 2.1e-4};
    if (actual.values.size() < 65536) return;
    double errors = 0, squares = 0;
    for (size_t i = 0; i < actual.values.size(); i++) {
        const double error = actual.values[i] - expected.values[i];
        errors += error * error;
        squares += expected.values[i] * expected.values[i];
    }
    const double norm = std::sqrt(errors / squares);
    if (norm <= norms[actual.dtype]) return;
    char message[100];
    snprintf(message, sizeof message, "%s: relative norm of the error %.2g", name, norm);
    report(where, message);
}

// ---- main ---------------------------------------------------------------------------------------------------------

// A protected page was accessed, or worse.
inline void explain_crash(int signal) {
    const auto say = [](const char* text) { return write(STDERR_FILENO, text, strlen(text)); };
    if (say("\ncrashed in ") < 0 || say(at_work) < 0 || say("\n") < 0) abort();
    raise(signal);  // the handler has been removed, so this ends the program
}

// PROGRAM FIRST COUNT [LEVEL ...]: runs the cases with seeds FIRST … FIRST + COUNT - 1 at these levels, by default at
// all that run here. Prints their number, so that the caller can check it.
inline int run(int argc, char** argv, void (*run_case)(uint64_t seed, const std::vector<Level>& levels)) {
#ifndef __SANITIZE_ADDRESS__
    struct sigaction action{};
    action.sa_handler = explain_crash;
    action.sa_flags = int(SA_RESETHAND | SA_NODEFER);
    sigaction(SIGSEGV, &action, nullptr);
#endif
    const int first = argc > 1 ? atoi(argv[1]) : 0, count = argc > 2 ? atoi(argv[2]) : 100;
    std::vector<Level> levels;
    std::string names;
    for (int i = 0; i < kLevels; i++) {
        const Level level = Level(i);
        bool wanted = argc <= 3;
        for (int j = 3; j < argc; j++) wanted = wanted || !strcmp(argv[j], level_name(level));
        if (!wanted || !level_runs_here(level)) continue;
        levels.push_back(level);
        names += std::string(" ") + level_name(level);
    }
    for (int seed = first; seed < first + count; seed++) run_case(uint64_t(seed), levels);
    printf("%d cases at levels%s: %d wrong\n", count, names.c_str(), wrong);
    return wrong || levels.empty() ? 1 : 0;
}

}  // namespace peftk::parity
