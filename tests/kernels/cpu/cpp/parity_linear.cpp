// lora_linear and its backward at every SIMD level that runs here, against plain loops in double: random cases of every
// form, mixture of dtypes and ragged size, on fenced memory, with one thread and with three. Both must write the same
// bits, and nothing else.
#include "common/activation.h"
#include "cpu/lora_linear.h"
#include "parity.h"

namespace peftk::parity {

// ---- a case -------------------------------------------------------------------------------------------------------

// A or B as matrices with some ranks each: all of them, or a page of 16. A's matrices are [ranks, K], B's [N, ranks].
struct Factor {
    std::vector<Matrix> parts;
    int64_t ranks_each = 1;

    const Matrix& part(int64_t r) const { return parts[r / ranks_each]; }
    int64_t within(int64_t r) const { return r % ranks_each; }
};

struct Adapter {
    bool taken = true;
    int64_t rank = 0;
    int activation = kIdentity;
    float scaling = 1;
    Factor A, B;
    Matrix rank_bias, output_bias;  // empty: none

    double a(int64_t r, int64_t k) const { return A.part(r)(A.within(r), k); }
    double b(int64_t n, int64_t r) const { return B.part(r)(n, B.within(r)); }
};

struct Case {
    int64_t M, N, K, max_rank = 0;
    Matrix x, weight, bias, dy;
    Matrix base_y, base_dx;  // not empty: the base layer's output, to which the adapters are added
    bool wants_dx = true, batch_invariant = false;
    std::vector<Adapter> adapters;
    std::vector<int32_t> ids;  // empty: null
    int adapter_dtype;
    double dropout = 0;
    uint64_t dropout_seed = 0;

    int adapter_of(int64_t m) const { return ids.empty() ? (adapters.empty() ? -1 : 0) : ids[m]; }
    int64_t rank_of(int64_t m) const { return adapter_of(m) < 0 ? 0 : adapters[adapter_of(m)].rank; }
};

Factor random_factor(Random& random, int dtype, bool is_B, int64_t ranks, int64_t length, bool paged) {
    Factor factor;
    factor.ranks_each = paged ? 16 : ranks;
    const int64_t kind = random.between(0, 4);
    for (int64_t first = 0; first < ranks; first += factor.ranks_each) {
        const int64_t count = std::min(factor.ranks_each, ranks - first);
        const bool gaps = random.chance(0.3);
        Matrix part;
        if (!is_B) {
            part = row_major(random, dtype, count, length, gaps);
        } else if (paged ? kind < 4 : kind < 2) {
            part = column_major(random, dtype, length, count, gaps);
        } else if (kind == 4) {
            part = Matrix(random, dtype, length, count, 2 * count + 1, 2);
        } else {
            part = row_major(random, dtype, length, count, gaps);
        }
        part.fill(random, 1 / std::sqrt(double(is_B ? ranks : length)));
        factor.parts.push_back(std::move(part));
    }
    return factor;
}

Matrix random_vector(Random& random, int dtype, int64_t length) {
    Matrix vector = row_major(random, dtype, 1, length, false);
    vector.fill(random, 1);
    return vector;
}

Adapter random_adapter(Random& random, const Case& its, bool may_be_missing) {
    Adapter adapter;
    const double kind = random.chance(may_be_missing ? 0.1 : 0) ? 0 : random.chance(0.1) ? 1 : 2;
    adapter.taken = kind > 0;
    if (!adapter.taken) return adapter;
    if (random.chance(kind == 1 ? 1 : 0.4)) adapter.output_bias = random_vector(random, its.adapter_dtype, its.N);
    if (kind == 1) return adapter;
    adapter.rank = random.choice({1, 2, 3, 4, 5, 8, 15, 16, 17, 31, 32, 33, 48, random.between(1, 100)});
    if (its.K > 2000) adapter.rank = random.between(1, 5);
    adapter.activation = random.chance(0.5) ? int(random.between(0, 4)) : int(kIdentity);
    adapter.scaling = float(random.choice({2, 4, 8, -6})) / 4;
    const bool paged = random.chance(0.4);
    adapter.A = random_factor(random, its.adapter_dtype, false, adapter.rank, its.K, paged);
    adapter.B = random_factor(random, its.adapter_dtype, true, adapter.rank, its.N, paged);
    if (random.chance(0.4)) adapter.rank_bias = random_vector(random, its.adapter_dtype, adapter.rank);
    return adapter;
}

// Seeds alternate between the forms, and between many rows, long sums and work for several threads.
Case random_case(uint64_t seed) {
    Random random(seed);
    Case c;
    const bool columns = seed % 3 == 2, few = seed % 3 == 0 || (columns && random.chance(0.4));
    const bool many_rows = seed % 12 == 7, long_sums = seed % 12 == 3, threads = seed % 4 == 1;
    c.M =
        few ? random.choice({1, 1, 2, 3, 4, 5, 7, 8, 9, 12, 13, 16}) : random.choice({17, 31, 33, 48, 63, 65, 97, 100});
    c.N = random.choice({1, 2, 3, 7, 15, 16, 17, 24, 31, 33, 63, 64, 65, 96, 104, 127, 129, random.between(1, 200)});
    c.K = random.choice({1, 2, 3, 8, 15, 16, 17, 31, 33, 63, 64, 65, 128, 255, 257, 300, 513, random.between(1, 400)});
    if (seed % 24 == 18) c.M = 0;
    if (many_rows) c.M = random.between(520, 800), c.N = random.between(1, 70), c.K = random.between(1, 60);
    if (long_sums) c.M = random.choice({1, 3, 9}), c.N = random.between(1, 9), c.K = random.choice({2053, 8209, 16421});
    if (threads) c.N = random.between(200, 300), c.K = few ? 1500 : random.between(200, 400);
    if (threads && few) c.M = random.between(6, 16), c.K = random.between(700, 900);

    const int x_dtype = int(seed / 3 % 3);
    const int weight_dtype = random.chance(0.7) ? x_dtype : random.dtype();
    c.adapter_dtype = random.chance(0.6) ? weight_dtype : random.dtype();
    c.x = row_major(random, x_dtype, c.M, c.K, random.chance(0.4));
    c.dy = row_major(random, random.chance(0.9) ? x_dtype : random.dtype(), c.M, c.N, random.chance(0.4));
    c.weight = columns ? column_major(random, weight_dtype, c.N, c.K, random.chance(0.4))
                       : row_major(random, weight_dtype, c.N, c.K, random.chance(0.4));
    c.x.fill(random, 1);
    c.dy.fill(random, 1);
    c.weight.fill(random, 1 / std::sqrt(double(c.K)));
    if (random.chance(0.5)) c.bias = random_vector(random, random.chance(0.7) ? weight_dtype : random.dtype(), c.N);

    const bool many = random.chance(0.6);
    const int64_t count = many ? random.choice({0, 1, 2, 5, 20}) : random.chance(0.85);
    for (int64_t a = 0; a < count; a++) c.adapters.push_back(random_adapter(random, c, many));
    std::vector<int32_t> taken{-1};
    for (int64_t a = 0; a < count; a++) {
        if (c.adapters[a].taken) taken.push_back(int32_t(a));
        c.max_rank = std::max(c.max_rank, c.adapters[a].rank);
    }
    if (many) {
        const int64_t run = random.choice({1, 1, 5, 1000});  // consecutive rows with the same adapter
        for (int64_t m = 0; m < c.M; m++) {
            c.ids.push_back(m % run ? c.ids.back() : taken[random.between(0, taken.size() - 1)]);
        }
    }
    c.batch_invariant = random.chance(0.4);
    if (random.chance(0.3)) c.dropout = random.chance(0.5) ? 0.5 : 0.1, c.dropout_seed = random.word();
    if (random.chance(0.2)) {
        c.base_y = row_major(random, x_dtype, c.M, c.N, false), c.base_y.fill(random, 1);
        c.base_dx = row_major(random, x_dtype, c.M, c.K, false), c.base_dx.fill(random, 1);
    }
    c.wants_dx = random.chance(0.85);
    return c;
}

std::string describe(uint64_t seed, const Case& c) {
    const char* names[] = {"fp32", "bf16", "fp16"};
    return "seed " + std::to_string(seed) + " (M " + std::to_string(c.M) + ", N " + std::to_string(c.N) + ", K " +
           std::to_string(c.K) + ", " + names[c.x.dtype] + " x, " + names[c.weight.dtype] + " weight along " +
           (c.weight.column == 1 ? "K, " : "N, ") + std::to_string(c.adapters.size()) + " " + names[c.adapter_dtype] +
           " adapters up to rank " + std::to_string(c.max_rank) + (c.ids.empty() ? "" : " by ids") +
           (c.dropout > 0 ? ", dropout" : "") + (c.base_y.columns ? ", over a base" : "") +
           (c.wants_dx ? ")" : ", no dX)");
}

// ---- the expected results -----------------------------------------------------------------------------------------

double activate(int code, double z) {
    switch (code) {
        case kRelu: return z > 0 ? z : 0;
        case kGelu: return 0.5 * z * std::erfc(-z * std::sqrt(0.5));
        case kGeluTanh: return 0.5 * z * (1 + std::tanh(std::sqrt(2 / M_PI) * (z + 0.044715 * z * z * z)));
        case kSilu: return z / (1 + std::exp(-z));
        default: return z;
    }
}

double derivative(int code, double z) {
    switch (code) {
        case kRelu: return z > 0;
        case kGelu: return 0.5 * std::erfc(-z * std::sqrt(0.5)) + z * std::exp(-z * z / 2) / std::sqrt(2 * M_PI);
        case kGeluTanh: {
            const double c = std::sqrt(2 / M_PI), t = std::tanh(c * (z + 0.044715 * z * z * z));
            return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * c * (1 + 3 * 0.044715 * z * z);
        }
        case kSilu: {
            const double s = 1 / (1 + std::exp(-z));
            return s * (1 + z * (1 - s));
        }
        default: return 1;
    }
}

// Word `element` of Philox4x32-10's stream.
uint32_t philox(uint64_t element, uint64_t seed) {
    uint32_t c[4] = {uint32_t(element / 4), uint32_t(element / 4 >> 32), 0, 0};
    uint32_t key[2] = {uint32_t(seed), uint32_t(seed >> 32)};
    for (int round = 0; round < 10; round++) {
        const uint64_t p = uint64_t(c[0]) * 0xD2511F53, q = uint64_t(c[2]) * 0xCD9E8D57;
        const uint32_t next[4] = {uint32_t(q >> 32) ^ c[1] ^ key[0], uint32_t(q), uint32_t(p >> 32) ^ c[3] ^ key[1],
                                  uint32_t(p)};
        memcpy(c, next, sizeof c);
        key[0] += 0x9E3779B9, key[1] += 0xBB67AE85;
    }
    return c[element % 4];
}

struct Gradients {
    Expected A, B, rank_bias, output_bias;
};

struct Results {
    Expected y, z, dx;  // z: [M, max_rank]
    std::vector<Gradients> gradients;
};

Results reference(const Case& c) {
    const int64_t M = c.M, N = c.N, K = c.K, R = c.max_rank;
    Results out{Expected(M * N), Expected(M * R), Expected(M * K), {}};
    for (const Adapter& adapter : c.adapters) {
        const int64_t rank = adapter.rank;
        out.gradients.push_back({Expected(rank * K), Expected(N * rank), Expected(rank), Expected(N)});
    }
    for (int64_t m = 0; m < M; m++) {
        const bool over_base = c.base_y.columns > 0;
        for (int64_t n = 0; n < N && over_base; n++) out.y.add(m * N + n, c.base_y(m, n));
        for (int64_t k = 0; k < K && over_base; k++) out.dx.add(m * K + k, c.base_dx(m, k));
        for (int64_t n = 0; n < N && !over_base; n++) {
            for (int64_t k = 0; k < K; k++) {
                out.y.add(m * N + n, c.x(m, k) * c.weight(n, k));
                out.dx.add(m * K + k, c.dy(m, n) * c.weight(n, k));
            }
            if (c.bias.columns) out.y.add(m * N + n, c.bias(0, n));
        }
        if (c.adapter_of(m) < 0) continue;
        const Adapter& adapter = c.adapters[c.adapter_of(m)];
        Gradients& gradients = out.gradients[c.adapter_of(m)];
        const double s = adapter.scaling, size = std::fabs(s);
        std::vector<double> keep(K, 1.0);
        for (int64_t k = 0; k < K && c.dropout > 0; k++) {
            keep[k] = philox(m * K + k, c.dropout_seed) < uint32_t(c.dropout * 0x1p32) ? 0 : 1 / (1 - c.dropout);
        }
        for (int64_t n = 0; n < N; n++) {
            if (adapter.output_bias.columns) out.y.add(m * N + n, adapter.output_bias(0, n));
            gradients.output_bias.add(n, c.dy(m, n));
        }
        for (int64_t r = 0; r < adapter.rank; r++) {
            for (int64_t k = 0; k < K; k++) out.z.add(m * R + r, c.x(m, k) * keep[k] * adapter.a(r, k));
            if (adapter.rank_bias.columns) out.z.add(m * R + r, adapter.rank_bias(0, r));
            const double z = out.z.values[m * R + r], z_magnitude = out.z.magnitudes[m * R + r];
            const double v = activate(adapter.activation, z);
            // The kernels' u and v are rounded; their error is bounded by the sums of their terms.
            Expected u(1);
            for (int64_t n = 0; n < N; n++) {
                const double term = s * v * adapter.b(n, r);
                // If the base layer's terms are not in the sum, v's error is bounded by the terms of v.
                const double size_of_v = over_base ? std::max(std::fabs(v), z_magnitude) : std::fabs(v);
                out.y.add(m * N + n, term, std::fabs(s * adapter.b(n, r)) * size_of_v);
                u.add(0, c.dy(m, n) * adapter.b(n, r));
                gradients.B.add(n * adapter.rank + r, s * c.dy(m, n) * v,
                                size * std::fabs(c.dy(m, n)) * 1.13 * z_magnitude);
            }
            u.values[0] *= derivative(adapter.activation, z);
            u.magnitudes[0] *= adapter.activation == kIdentity ? 1 : 1.13 + z_magnitude;
            gradients.rank_bias.add(r, s * u.values[0], size * u.magnitudes[0]);
            for (int64_t k = 0; k < K; k++) {
                const double x = c.x(m, k) * keep[k], a = adapter.a(r, k) * keep[k];
                gradients.A.add(r * K + k, s * u.values[0] * x, size * u.magnitudes[0] * std::fabs(x));
                out.dx.add(m * K + k, s * u.values[0] * a, size * u.magnitudes[0] * std::fabs(a));
            }
        }
    }
    return out;
}

// ---- the kernels' results -----------------------------------------------------------------------------------------

// The adapters as the kernels read them (peftk/adapters/table.py).
struct Table {
    std::vector<int64_t> pages, biases;
    std::vector<int32_t> rows;
    std::vector<float> scaling;

    explicit Table(const Case& c) {
        const auto address = [](const void* p) { return int64_t(reinterpret_cast<uintptr_t>(p)); };
        for (const Adapter& adapter : c.adapters) {
            rows.insert(rows.end(), {int32_t(pages.size() / 5), int32_t(adapter.rank), int32_t(adapter.activation),
                                     int32_t(adapter.taken)});
            for (int64_t r = 0; r < adapter.rank; r += 16) {
                const Matrix &A = adapter.A.part(r), &B = adapter.B.part(r);
                pages.insert(pages.end(), {address(A.at(adapter.A.within(r), 0)), A.row,
                                           address(B.at(0, adapter.B.within(r))), B.row, B.column});
            }
            scaling.push_back(adapter.scaling);
            biases.push_back(adapter.rank_bias.columns ? address(adapter.rank_bias.data()) : 0);
            biases.push_back(adapter.output_bias.columns ? address(adapter.output_bias.data()) : 0);
        }
    }
};

struct Outputs {
    Matrix y, z, dx;
    std::vector<Matrix> gradients;  // of every adapter: dA, dB, da, dβ; empty: not wanted

    Outputs(Random& random, const Case& c) {
        y = row_major(random, c.x.dtype, c.M, c.N, random.chance(0.4));
        z = row_major(random, kFloat32, c.M, c.max_rank, true);
        if (c.wants_dx) dx = row_major(random, c.x.dtype, c.M, c.K, random.chance(0.4));
        for (const Adapter& adapter : c.adapters) {
            const int64_t rank = adapter.rank, shapes[4][2] = {{rank, c.K}, {c.N, rank}, {1, rank}, {1, c.N}};
            const bool wanted[] = {rank > 0, rank > 0, adapter.rank_bias.columns > 0, adapter.output_bias.columns > 0};
            for (int i = 0; i < 4; i++) {
                gradients.push_back(wanted[i] ? row_major(random, c.adapter_dtype, shapes[i][0], shapes[i][1], false)
                                              : Matrix());
            }
        }
    }

    // The outputs before a call.
    void prepare(const Case& c) {
        each([](const char*, Matrix& matrix) { matrix.memory.wipe(); });
        if (c.base_y.columns) y.copy(c.base_y);
        if (c.base_y.columns && c.wants_dx) dx.copy(c.base_dx);
    }

    template <class Visit>
    void each(Visit visit) {
        visit("y", y), visit("z", z);
        if (dx.columns) visit("dX", dx);
        const char* names[] = {"dA", "dB", "da", "dβ"};
        for (size_t i = 0; i < gradients.size(); i++) {
            if (gradients[i].columns) visit(names[i % 4], gradients[i]);
        }
    }
};

void call(const Case& c, Level level, int threads, Outputs& outputs) {
    const Table table(c);
    LinearArgs args{};
    args.M = c.M, args.N = c.N, args.K = c.K;
    args.x = c.x.data(), args.x_stride = c.x.row, args.x_dtype = c.x.dtype;
    args.over_base = c.base_y.columns > 0;
    args.weight = c.weight.data(), args.weight_dtype = c.weight.dtype;
    args.weight_n = c.weight.row, args.weight_k = c.weight.column;
    args.bias = c.bias.columns ? c.bias.data() : nullptr, args.bias_dtype = c.bias.dtype;
    args.y = outputs.y.data(), args.y_stride = outputs.y.row;
    args.z = c.max_rank ? static_cast<float*>(outputs.z.data()) : nullptr, args.z_stride = outputs.z.row;
    args.adapters.pages = table.pages.data(), args.adapters.rows = table.rows.data();
    args.adapters.scaling = table.scaling.data(), args.adapters.biases = table.biases.data();
    args.adapters.count = int32_t(c.adapters.size()), args.adapters.dtype = Dtype(c.adapter_dtype);
    args.ids = c.ids.empty() ? nullptr : c.ids.data();
    args.dropout.on = c.dropout > 0;
    args.dropout.threshold = uint32_t(c.dropout * 0x1p32);
    args.dropout.scale = float(1 / (1 - c.dropout));
    args.dropout.seed = c.dropout_seed;
    args.batch_invariant = c.batch_invariant;
    args.threads = threads;
    const Order order = order_by_adapter(args.ids, args.M, args.adapters);
    PEFTK_CALL(level, lora_linear, (args, order));

    std::vector<int64_t> grads;
    for (const Matrix& matrix : outputs.gradients) {
        grads.push_back(matrix.columns ? int64_t(reinterpret_cast<uintptr_t>(matrix.data())) : 0);
    }
    LinearBackwardArgs backward{};
    backward.forward = args;
    backward.dy = c.dy.data(), backward.dy_stride = c.dy.row, backward.dy_dtype = c.dy.dtype;
    backward.dx = c.wants_dx ? outputs.dx.data() : nullptr, backward.dx_stride = outputs.dx.row;
    backward.grads = grads.data();
    PEFTK_CALL(level, lora_linear_backward, (backward, order));
}

// z is written only for the ranks of a row's adapter. Replaces the others, which must be kSentinel, before the check.
void hide_missing_ranks(const std::string& where, const Case& c, Matrix& z) {
    const char untouched[4] = {char(kSentinel), char(kSentinel), char(kSentinel), char(kSentinel)};
    for (int64_t m = 0; m < c.M; m++) {
        for (int64_t r = c.rank_of(m); r < c.max_rank; r++) {
            if (memcmp(z.at(m, r), untouched, 4)) return report(where, "z: written for ranks that a row doesn't have");
            z.values[m * c.max_rank + r] = 0;
        }
    }
}

void check_all(const std::string& where, const Case& c, const Results& expected, Outputs& outputs) {
    outputs.each([&](const char* name, Matrix& matrix) {
        matrix.read();
        if (!matrix.gaps_untouched()) report(where + ", " + name, "bytes around the matrix were written");
    });
    hide_missing_ranks(where, c, outputs.z);
    const int64_t forward = c.K + c.max_rank, backward = c.M + c.N + c.K + c.max_rank;
    check(where, "y", outputs.y, expected.y, forward);
    check(where, "z", outputs.z, expected.z, c.K);
    if (c.wants_dx) check(where, "dX", outputs.dx, expected.dx, backward);
    check_norm(where, "y", outputs.y, expected.y);
    if (c.wants_dx) check_norm(where, "dX", outputs.dx, expected.dx);
    for (size_t a = 0; a < c.adapters.size(); a++) {
        const Gradients& g = expected.gradients[a];
        const Expected* parts[] = {&g.A, &g.B, &g.rank_bias, &g.output_bias};
        const char* names[] = {"dA", "dB", "da", "dβ"};
        for (int i = 0; i < 4; i++) {
            const Matrix& matrix = outputs.gradients[4 * a + i];
            if (matrix.columns) check(where + ", adapter " + std::to_string(a), names[i], matrix, *parts[i], backward);
        }
    }
}

void run_case(uint64_t seed, const std::vector<Level>& levels) {
    const Case c = random_case(seed);
    const Results expected = reference(c);
    Random random(~seed);
    Outputs outputs(random, c);
    for (const Level level : levels) {
        const std::string where = describe(seed, c) + " " + level_name(level);
        snprintf(at_work, sizeof at_work, "%s", where.c_str());
        std::vector<std::vector<char>> of_one_thread;
        for (const int threads : {1, 3}) {
            outputs.prepare(c);
            call(c, level, threads, outputs);
            std::vector<std::vector<char>> bytes;
            outputs.each([&](const char*, Matrix& matrix) { bytes.push_back(matrix.memory.all()); });
            if (threads == 1) {
                check_all(where, c, expected, outputs);
                of_one_thread = std::move(bytes);
            } else if (bytes != of_one_thread) {
                report(where, "three threads give other bits than one");
            }
        }
    }
}

}  // namespace peftk::parity

int main(int argc, char** argv) { return peftk::parity::run(argc, argv, peftk::parity::run_case); }
