// merge and unmerge at every SIMD level that runs here: W' and the W that comes back, bit by bit, as docs/merge.md
// says, on fenced memory, with one thread and with three.
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

// round(fl(W + fl(s·t))), t the chain of fma over ascending ranks, as the bits of W's dtype.
std::vector<char> reference(const Case& c) {
    const int64_t size = bytes_of(c.weight.dtype);
    std::vector<char> bits(c.N * c.K * size);
    for (int64_t n = 0; n < c.N; n++) {
        for (int64_t k = 0; k < c.K; k++) {
            float t = 0;
            for (int64_t r = 0; r < c.R; r++) t = std::fma(float(c.B(n, r)), float(c.A(r, k)), t);
            const float d = c.scaling * t, sum = float(c.weight(n, k)) + d;
            char* to = bits.data() + (n * c.K + k) * size;
            encode(sum, c.weight.dtype, to);
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
    const std::vector<char> expected = reference(c), base = elements(c.weight);
    const int64_t size = bytes_of(c.weight.dtype);
    Random random(~seed);
    Matrix merged = row_major(random, c.weight.dtype, c.N, c.K, true);
    Matrix back = row_major(random, c.weight.dtype, c.N, c.K, random.chance(0.5));
    Fenced code(c.N * c.K, random.chance(0.7));
    MergeArgs args{};
    args.lora_A = c.A.data(), args.lora_B = c.B.data(), args.code = reinterpret_cast<int8_t*>(code.data());
    args.N = c.N, args.K = c.K, args.R = c.R, args.scaling = c.scaling;
    args.weight_dtype = Dtype(c.weight.dtype), args.adapter_dtype = Dtype(c.A.dtype);
    for (const Level level : levels) {
        use_level(level_name(level));
        for (const int threads : {1, 3}) {
            const std::string where = "seed " + std::to_string(seed) + " (" + std::to_string(c.N) + " x " +
                                      std::to_string(c.K) + ", rank " + std::to_string(c.R) + ") " + level_name(level) +
                                      ", " + std::to_string(threads) + " threads";
            snprintf(at_work, sizeof at_work, "%s", where.c_str());
            merged.memory.wipe(), back.memory.wipe(), code.wipe();
            args.weight = c.weight.data(), args.weight_stride = c.weight.row;
            args.out = merged.data(), args.out_stride = merged.row;
            merge(args, threads);
            if (elements(merged) != expected) report(where, "W' has other bits");
            args.weight = merged.data(), args.weight_stride = merged.row;
            args.out = back.data(), args.out_stride = back.row;
            unmerge(args, threads);
            const std::vector<char> came_back = elements(back);
            for (int64_t i = 0; i < c.N * c.K; i++) {
                const bool raw = uint8_t(code.data()[i]) == merge_code::kRaw;  // its bits are the caller's to keep
                if (!raw && memcmp(&came_back[i * size], &base[i * size], size)) {
                    report(where, "unmerge gives other bits");
                    break;
                }
            }
            if (!merged.gaps_untouched() || !back.gaps_untouched()) report(where, "bytes around a matrix were written");
        }
    }
}

}  // namespace peftk::parity

int main(int argc, char** argv) { return peftk::parity::run(argc, argv, peftk::parity::run_case); }
