// Runs csrc/cuda/lora_linear.cu in random schedules against sums in fp64, for the race detector and for mutants.
//
// lora_linear_races CASES: 0 if all are right. Rows 1 … 16; x, W and adapters in fp16, or x and W in bf16 with adapters
// in fp32.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "common/activation.h"
#include "cuda/lora_linear.h"

namespace {

using namespace peftk;

std::mt19937 random_bits;

int draw(int from, int to) { return std::uniform_int_distribution<int>(from, to)(random_bits); }
bool chance(double p) { return std::uniform_real_distribution<double>(0, 1)(random_bits) < p; }

// Values of a storage type in a heap block of exactly their size, which starts `shift` values after a multiple of 16
// bytes.
struct Tensor {
    Dtype dtype;
    int64_t count;
    int shift;
    char* block;

    Tensor(Dtype dtype, int64_t count, double scale, int shift = 0) : dtype(dtype), count(count), shift(shift) {
        void* memory;
        if (posix_memalign(&memory, 16, (shift + count) * size_of(dtype))) abort();
        block = static_cast<char*>(memory);
        std::normal_distribution<float> normal;
        for (int64_t i = 0; i < count; ++i) set(i, float(scale) * normal(random_bits));
    }
    ~Tensor() { free(block); }
    Tensor(const Tensor&) = delete;

    char* data() { return block + shift * size_of(dtype); }
    int64_t address() { return reinterpret_cast<int64_t>(data()); }
    void set(int64_t i, float value) {
        if (dtype == kFloat32) from_float(value, reinterpret_cast<float*>(data()) + i);
        if (dtype == kBFloat16) from_float(value, reinterpret_cast<bf16*>(data()) + i);
        if (dtype == kFloat16) from_float(value, reinterpret_cast<f16*>(data()) + i);
    }
    double at(int64_t i) {
        if (dtype == kFloat32) return reinterpret_cast<float*>(data())[i];
        if (dtype == kBFloat16) return to_float(reinterpret_cast<bf16*>(data())[i]);
        return to_float(reinterpret_cast<f16*>(data())[i]);
    }
};

using Held = std::unique_ptr<Tensor>;
Held make(Dtype dtype, int64_t count, double scale, int shift = 0) {
    return std::make_unique<Tensor>(dtype, count, scale, shift);
}

struct LoraAdapter {
    int rank, activation;
    float scaling;
    int64_t stride_A, stride_n, stride_r;
    bool infinite;  // its own results may be anything; those of others must be right
    Held A, B, bias_A, bias_B;
};

LoraAdapter draw_adapter(Dtype dtype, int N, int K) {
    const int ranks[] = {0, 1, 2, 5, 15, 16, 17, 33, 66};
    LoraAdapter a = {};
    a.rank = ranks[draw(0, 8)];
    a.activation = draw(0, 4);
    a.scaling = chance(0.5) ? 1.5f : -0.5f;
    if (a.rank) {
        a.stride_A = K + (chance(0.2) ? 3 : 0);
        a.A = make(dtype, (a.rank - 1) * a.stride_A + K, 1 / std::sqrt(K), draw(0, 2) % 2);
        const int layout = draw(0, 2);  // along the ranks, along N, neither; rows of even length or not
        a.stride_n = layout == 1 ? 1 : layout == 0 ? a.rank + draw(0, 1) : 2 * a.rank + 1;
        a.stride_r = layout == 1 ? N + draw(0, 1) : layout == 0 ? 1 : 2;
        a.B = make(dtype, (N - 1) * a.stride_n + (a.rank - 1) * a.stride_r + 1, 1 / std::sqrt(a.rank), draw(0, 2) % 2);
        a.infinite = chance(0.1);
        if (a.infinite) a.A->set(draw(0, K - 1), INFINITY);
        if (chance(0.5)) a.bias_A = make(dtype, a.rank, 1);
    }
    if (!a.rank || chance(0.5)) a.bias_B = make(dtype, N, 1);
    return a;
}

// Runs one random call, and prints what differs by more than the bound of docs/numerics.md.
bool right(uint64_t seed) {
    random_bits.seed(unsigned(seed));
    const Dtype dtype = chance(0.5) ? kFloat16 : kBFloat16, adapter_dtype = dtype == kFloat16 ? kFloat16 : kFloat32;
    const int widths[] = {8, 64, 72, 264, 520, 1032, 1032}, heights[] = {1, 7, 64, 66, 130};
    const int M = draw(1, 16), K = widths[draw(0, 6)], N = heights[draw(0, 4)];
    const int count = draw(0, 5), slices = N >= 64 && count ? draw(1, 2) : 1;
    const int columns[] = {0, slices == 2 ? N / 3 : N, N};
    const Held x = make(dtype, M * K, 1), weight = make(dtype, N * K, 1 / std::sqrt(K));
    const Held bias = chance(0.5) ? make(chance(0.5) ? dtype : kFloat32, N, 1) : nullptr;

    // The table, in the layout of peftk/adapters/table.py.
    std::vector<LoraAdapter> adapters;
    std::vector<int64_t> pages, biases;
    std::vector<int32_t> rows, ends = {0, 0};
    std::vector<float> scaling;
    for (int s = 0; s < slices; ++s) {
        int most = 0;
        for (int i = 0; i < count; ++i) {
            adapters.push_back(draw_adapter(adapter_dtype, columns[s + 1] - columns[s], K));
            LoraAdapter& a = adapters.back();
            most = std::max(most, a.rank);
            rows.insert(rows.end(), {int32_t(pages.size() / 5), a.rank, a.activation, 1});
            scaling.push_back(a.scaling);
            biases.insert(biases.end(), {a.bias_A ? a.bias_A->address() : 0, a.bias_B ? a.bias_B->address() : 0});
            for (int r = 0; r < a.rank; r += 16) {
                const int64_t size = size_of(adapter_dtype);
                pages.insert(pages.end(), {a.A->address() + r * a.stride_A * size, a.stride_A,
                                           a.B->address() + r * a.stride_r * size, a.stride_n, a.stride_r});
            }
        }
        ends.insert(ends.end(), {columns[s + 1], ends.back() + (most + 15) / 16});
    }
    std::vector<int32_t> ids(M);
    for (int32_t& id : ids) id = draw(-1, count);

    const int z_pages = ends.back(), processors[] = {1, 4, 64};
    const auto plan = cuda::plan_lora_linear(M, N, K, z_pages, processors[draw(0, 2)]);
    const Held y = make(dtype, M * N, 1), z = make(kFloat32, M * z_pages * 16, NAN),
               parts = make(kFloat32, plan.partials, 1);
    std::vector<int32_t> counters(plan.counters, 0);
    const cuda::LoraLinearArgs args{x->data(),
                                    K,
                                    weight->data(),
                                    K,
                                    bias ? bias->data() : nullptr,
                                    y->data(),
                                    reinterpret_cast<float*>(z->data()),
                                    ids.data(),
                                    {pages.data(),
                                     rows.data(),
                                     scaling.data(),
                                     biases.data(),
                                     slices == 2 ? ends.data() : nullptr,
                                     slices,
                                     count,
                                     z_pages,
                                     adapter_dtype,
                                     {}},
                                    M,
                                    N,
                                    K,
                                    dtype,
                                    bias ? bias->dtype : dtype,
                                    true,
                                    reinterpret_cast<float*>(parts->data()),
                                    counters.data()};
    cuda_on_host::cuda_on_host_seed(seed);
    if (!cuda::lora_linear(args, plan, 0, nullptr).ok()) return printf("case %d: not launched\n", int(seed)), false;
    for (const int counter : counters)
        if (counter) return printf("case %d: a counter is left\n", int(seed)), false;

    const double unit = dtype == kFloat16 ? 0x1p-11 : 0x1p-8;
    for (int m = 0; m < M; ++m) {
        const int id = ids[m] < count ? ids[m] : -1;
        for (int n = 0; n < N; ++n) {
            double sum = bias ? bias->at(n) : 0, size = std::fabs(sum);
            for (int k = 0; k < K; ++k) {
                const double product = x->at(m * K + k) * weight->at(n * K + k);
                sum += product, size += std::fabs(product);
            }
            const int s = n < columns[1] ? 0 : 1;
            int terms = K;
            if (id >= 0) {
                LoraAdapter& a = adapters[s * count + id];
                if (a.infinite) continue;
                const int64_t at = n - columns[s];
                if (a.bias_B) sum += a.bias_B->at(at), size += std::fabs(a.bias_B->at(at));
                terms += a.rank;
                for (int r = 0; r < a.rank; ++r) {
                    double wanted = a.bias_A ? a.bias_A->at(r) : 0, allowed = std::fabs(wanted);
                    for (int k = 0; k < K; ++k) {
                        const double product = x->at(m * K + k) * a.A->at(r * a.stride_A + k);
                        wanted += product, allowed += std::fabs(product);
                    }
                    const double got = z->at((m * z_pages + ends[2 * s + 1]) * 16 + r);
                    if (!(std::fabs(got - wanted) <= 0x1p-24 * (std::fabs(wanted) + 2 * std::sqrt(K) * allowed)))
                        return printf("case %d: z[%d, %d] is %g, not %g\n", int(seed), m, r, got, wanted), false;
                    const double product = a.scaling * double(activate(a.activation, float(wanted))) *
                                           a.B->at(at * a.stride_n + r * a.stride_r);
                    sum += product, size += std::fabs(product);
                }
            }
            const double got = y->at(m * N + n);
            if (!(std::fabs(got - sum) <= unit * std::fabs(sum) + 2 * std::sqrt(terms) * 0x1p-24 * size))
                return printf("case %d: y[%d, %d] is %g, not %g\n", int(seed), m, n, got, sum), false;
        }
    }
    return true;
}

}  // namespace

int main(int, char** arguments) {
    for (int seed = 0; seed < atoi(arguments[1]); ++seed)
        if (!right(uint64_t(seed))) return 1;
}
