// Merges in place at every SIMD level that runs here, from W to one set of adapters, on to another and back, on fenced
// memory, with one thread and with three. Every W' has the bits that docs/merge.md specifies, and the last W those of
// the first. Also a merge that is refused.
#include <new>
#include <stdexcept>

#include "common/merge.h"
#include "cpu/merge.h"
#include "parity.h"

namespace peftk::parity {

struct Case {
    int64_t N, K, R;
    float scaling;
    Matrix weight, A, B;  // B: [N, R]
};

Case random_case(uint64_t seed) {
    Random random(seed);
    Case c;
    c.N = random.choice({1, 2, 5, 24, 25, 63, 100, random.between(1, 150)});
    c.K = random.choice({1, 3, 8, 17, 63, 64, 65, 128, 130, 200, random.between(1, 300)});
    c.R = random.choice({1, 2, 3, 8, 15, 16, 17, 33, 64, random.between(1, 80)});
    if (seed % 4 == 1) c.N = random.between(200, 300), c.K = random.between(200, 300), c.R = 40;  // for several threads
    const int dtype = int(seed % 3), adapter_dtype = random.chance(0.6) ? dtype : random.dtype();
    c.scaling = float(random.choice({1, 2, 8, -6})) / 4;
    c.weight = row_major(random, dtype, c.N, c.K, random.chance(0.4));
    c.A = row_major(random, adapter_dtype, c.R, c.K, false);
    c.B = row_major(random, adapter_dtype, c.N, c.R, false);
    c.weight.fill(random, 1);
    c.A.fill(random, random.chance(0.3) ? 64 : 0.2);  // 64: W is far from the difference, and some of it raw
    c.B.fill(random, 0.2);
    return c;
}

// round(fl(W + d)) as the bits of W's dtype: the t of each adapter the chain of fma over its ascending ranks.
std::vector<char> reference(const Case& c, const std::vector<int64_t>& ends) {
    const int64_t size = bytes_of(c.weight.dtype);
    std::vector<char> bits(c.N * c.K * size);
    for (int64_t n = 0; n < c.N; n++) {
        for (int64_t k = 0; k < c.K; k++) {
            float d = 0;
            int64_t r = 0;
            for (size_t a = 0; a < ends.size(); a++) {
                float t = 0;
                for (; r < ends[a]; r++) t = std::fma(float(c.B(n, r)), float(c.A(r, k)), t);
                d = a ? d + c.scaling * t : c.scaling * t;
            }
            encode(float(c.weight(n, k)) + d, c.weight.dtype, bits.data() + (n * c.K + k) * size);
        }
    }
    return bits;
}

std::vector<char> elements(const Matrix& matrix) {
    const int64_t size = bytes_of(matrix.dtype);
    std::vector<char> bits(matrix.rows * matrix.columns * size);
    for (int64_t i = 0; i < matrix.rows; i++)
        memcpy(bits.data() + i * matrix.columns * size, matrix.at(i, 0), matrix.columns * size);
    return bits;
}

void run_case(uint64_t seed, const std::vector<Level>& levels) {
    const Case c = random_case(seed);
    const std::vector<int64_t> one = {c.R}, two = {(c.R + 1) / 2, c.R};
    const std::vector<float> scaling(2, c.scaling);
    const std::vector<char> base = elements(c.weight), first = reference(c, one), second = reference(c, two);
    const int64_t row_bytes = c.K * bytes_of(c.weight.dtype);
    Random random(~seed);
    Matrix weight = row_major(random, c.weight.dtype, c.N, c.K, true);
    Matrix infinite =
        row_major(random, c.B.dtype, c.N, c.R, false);  // in the last row, so that all other rows must be undone
    memcpy(infinite.data(), c.B.data(), c.N * c.R * bytes_of(c.B.dtype));
    const uint32_t bits = c.B.dtype == kFloat32 ? 0x7f800000 : c.B.dtype == kBFloat16 ? 0x7f80 : 0x7c00;
    memcpy(infinite.at(c.N - 1, 0), &bits, bytes_of(c.B.dtype));
    const int64_t code_bytes = c.N * ((c.K + 1) / 2);
    Fenced code(code_bytes, random.chance(0.7)), other_code(code_bytes, random.chance(0.7));
    const auto side = [&](const std::vector<int64_t>& ends, Fenced& its_code) {
        const MergeFactors factors{c.A.data(),           c.B.data(), ends.data(),     scaling.data(),
                                   int64_t(ends.size()), c.R,        Dtype(c.A.dtype)};
        MergeSide to{};
        to.factors = factors, to.halves = reinterpret_cast<uint8_t*>(its_code.data());
        return to;
    };
    // the result of a merge, as the next one needs it
    MergeResult result;
    std::vector<char> raws;
    const auto left = [&](MergeSide of) {
        const int64_t size = bytes_of(c.weight.dtype);
        raws.resize(result.raws.size() * size);
        for (size_t i = 0; i < result.raws.size(); i++) memcpy(&raws[i * size], &result.raws[i].bits, size);
        of.far = result.far.data(), of.far_count = int64_t(result.far.size());
        of.raws = raws.data(), of.raw_count = int64_t(result.raws.size());
        return of;
    };
    const auto keep = [&](const MergeResult& its_result) { result = its_result; };
    const auto refused = [&](const MergeResult& its_result) {
        if (its_result.finite) report(at_work, "infinity was not refused");
    };
    MergePass pass{};
    pass.weight = weight.data(), pass.stride = weight.row, pass.N = c.N, pass.K = c.K;
    pass.dtype = Dtype(c.weight.dtype);
    for (const Level level : levels) {
        use_level(level_name(level));
        for (const int threads : {1, 3}) {
            const std::string where = "seed " + std::to_string(seed) + " (" + std::to_string(c.N) + " x " +
                                      std::to_string(c.K) + ", rank " + std::to_string(c.R) + ") " + level_name(level) +
                                      ", " + std::to_string(threads) + " threads";
            snprintf(at_work, sizeof at_work, "%s", where.c_str());
            weight.memory.wipe(), code.wipe(), other_code.wipe();
            for (int64_t n = 0; n < c.N; n++) memcpy(weight.at(n, 0), c.weight.at(n, 0), row_bytes);

            pass.from = {}, pass.to = side(one, code);
            remerge(pass, threads, keep);
            if (!result.finite || elements(weight) != first) report(where, "W' has other bits");

            pass.from = left(pass.to), pass.to = side(two, other_code);
            remerge(pass, threads, keep);
            if (!result.finite || elements(weight) != second) report(where, "the second W' has other bits");

            pass.from = left(pass.to), pass.to = side(one, code), pass.to.factors.lora_B = infinite.data();
            remerge(pass, threads, refused);
            if (elements(weight) != second) report(where, "a refused merge left other bits");

            pass.to = {};
            const auto no_memory = [](const MergeResult&) { throw std::bad_alloc(); };
            try {
                remerge(pass, threads, no_memory);
                report(where, "an exception was lost");
            } catch (const std::bad_alloc&) {
                if (elements(weight) != second) report(where, "an unmerge that failed at its end left other bits");
            }
            const int64_t far_count = pass.from.far_count++;
            try {
                remerge(pass, threads, keep);
                report(where, "a far code too many was not refused");
            } catch (const std::invalid_argument&) {
                if (elements(weight) != second) report(where, "a receipt that was refused left other bits");
            }
            pass.from.far_count = far_count;
            remerge(pass, threads, keep);
            if (elements(weight) != base) report(where, "unmerge gives other bits");

            pass.from = {}, pass.to = side(one, code);
            try {
                remerge(pass, threads, no_memory);
                report(where, "an exception was lost");
            } catch (const std::bad_alloc&) {
                if (elements(weight) != base) report(where, "a merge that failed at its end left other bits");
            }
            if (!weight.gaps_untouched()) report(where, "bytes around a matrix were written");
        }
    }
}

}  // namespace peftk::parity

int main(int argc, char** argv) { return peftk::parity::run(argc, argv, peftk::parity::run_case); }
