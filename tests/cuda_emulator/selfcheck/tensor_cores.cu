// ldmatrix and mma.sync, against loops written from the PTX manual ("Matrix Fragments for mma.m16n8k16 with floating
// point type", "Warp-level matrix load instruction: ldmatrix"), for every lane.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "selfcheck.h"

namespace selfcheck {
namespace {

constexpr int kM = 16, kN = 8, kK = 16;

// A [M, K] and B [N, K], both with rows of 16 values: B's columns are rows in memory.
struct Shared {
    alignas(16) uint16_t A[kM][kK];
    alignas(16) uint16_t B[2 * kN][kK];
};

// Small whole numbers, whose products and sums are exact in every format.
inline int a_value(int m, int k) { return (3 * m + 5 * k) % 11 - 5; }
inline int b_value(int n, int k) { return (7 * n + 2 * k) % 13 - 6; }

uint16_t encode(int value, bool bfloat16) {
    return uint16_t(bfloat16 ? __bfloat16_as_short(__float2bfloat16_rn(float(value)))
                             : __half_as_short(__float2half_rn(float(value))));
}

using Fragments = void (*)(const Shared& shared, uint32_t (&a)[4], uint32_t (&b)[2], bool broken);

// The layout of the manual, element by element: groupID = lane >> 2, threadID_in_group = lane % 4, and
//   a_i: row = groupID for 0 <= i < 2 or 4 <= i < 6, else groupID + 8; column = threadID_in_group * 2 + (i & 1), + 8
//        for i >= 4
//   b_i: row = threadID_in_group * 2 + (i & 1), + 8 for i >= 2; column = groupID
//   c_i: row = groupID for i < 2, else groupID + 8; column = threadID_in_group * 2 + (i & 1)
__device__ void by_the_manual(const Shared& shared, uint32_t (&a)[4], uint32_t (&b)[2], bool broken) {
    const int group = int(threadIdx.x) >> 2, thread = int(threadIdx.x) % 4;
    uint16_t a_elements[8], b_elements[4];
    for (int i = 0; i < 8; ++i) {
        const int row = (i >= 0 && i < 2) || (i >= 4 && i < 6) ? group : group + 8;
        const int column = thread * 2 + (i & 1) + (i >= 4 ? 8 : 0);
        a_elements[broken ? i ^ 2 : i] = shared.A[row][column];
    }
    for (int i = 0; i < 4; ++i) b_elements[i] = shared.B[group][thread * 2 + (i & 1) + (i >= 2 ? 8 : 0)];
    memcpy(a, a_elements, sizeof a);
    memcpy(b, b_elements, sizeof b);
}

// The same by ldmatrix: A's matrices are (rows 0 - 7, k 0 - 7), (rows 8 - 15, k 0 - 7), (rows 0 - 7, k 8 - 15) and
// (rows 8 - 15, k 8 - 15).
__device__ void by_ldmatrix(const Shared& shared, uint32_t (&a)[4], uint32_t (&b)[2], bool broken) {
    const int lane = int(threadIdx.x), matrix = lane / 8, row = lane % 8;
    peftk::cuda::load_matrices(a, &shared.A[row + matrix % 2 * 8][broken ? matrix % 2 * 8 : matrix / 2 * 8]);
    uint32_t both[4];
    peftk::cuda::load_matrices(both, &shared.B[row + matrix / 2 * 8][matrix % 2 * 8]);
    b[0] = both[0], b[1] = both[1];
}

template <Fragments kFragments, bool kBFloat16>
__global__ void product(float* out, bool broken) {
    auto& shared = peftk::cuda::shared_memory<Shared>();
    const int lane = int(threadIdx.x), group = lane >> 2, thread = lane % 4;
    for (int i = lane; i < kM * kK; i += 32) {
        shared.A[i / kK][i % kK] = encode(a_value(i / kK, i % kK), kBFloat16);
        shared.B[i / kK][i % kK] = encode(b_value(i / kK, i % kK), kBFloat16);
    }
    __syncwarp();
    uint32_t a[4], b[2];
    kFragments(shared, a, b, broken);
    float sum[4];
    for (int i = 0; i < 4; ++i) sum[i] = float(100 * lane + i);
    if (kBFloat16) {
        peftk::cuda::multiply_bf16(sum, a, b);
    } else {
        peftk::cuda::multiply_f16(sum, a, b);
    }
    for (int i = 0; i < 4; ++i)
        out[(i < 2 ? group : group + 8) * kN + thread * 2 + (i & 1)] = sum[i] - float(100 * lane + i);
}

template <class Kernel>
bool product_is_right(Kernel kernel, bool broken) {
    auto out = numbers<float>(kM * kN, -1, 0);
    launch(kernel, 1, 32, sizeof(Shared), out.get(), broken);
    for (int m = 0; m < kM; ++m) {
        for (int n = 0; n < kN; ++n) {
            int sum = 0;
            for (int k = 0; k < kK; ++k) sum += a_value(m, k) * b_value(n, k);
            if (out[m * kN + n] != float(sum)) return false;
        }
    }
    return true;
}

SELFCHECK(wrong_fragment) {
    return product_is_right(product<by_the_manual, true>, broken) &&
           product_is_right(product<by_the_manual, false>, broken);
}
SELFCHECK(wrong_matrix_row) {
    return product_is_right(product<by_ldmatrix, true>, broken) &&
           product_is_right(product<by_ldmatrix, false>, broken);
}

// Every row of every matrix, from rows in any order.
__global__ void load(uint32_t* out, bool broken) {
    struct Rows {
        alignas(16) uint16_t rows[32][8];
    };
    auto& shared = peftk::cuda::shared_memory<Rows>();
    const int lane = int(threadIdx.x);
    for (int i = 0; i < 8; ++i) shared.rows[lane][i] = uint16_t(8 * lane + i);
    __syncwarp();
    uint32_t to[4];
    peftk::cuda::load_matrices(to, reinterpret_cast<char*>(shared.rows[5 * lane % 32]) + (broken ? 2 : 0));
    for (int i = 0; i < 4; ++i) out[4 * lane + i] = to[i];
}
SELFCHECK(misaligned_matrix_row) {
    auto out = numbers<uint32_t>(32 * 4, 0, 0);
    launch(load, 1, 32, 512, out.get(), broken);
    for (int lane = 0; lane < 32; ++lane) {
        for (int i = 0; i < 4; ++i) {
            const int row = 5 * (8 * i + lane / 4) % 32;  // that lane 8 i + lane / 4 points to
            const int low = 8 * row + lane % 4 * 2;
            if (out[4 * lane + i] != uint32_t(low | (low + 1) << 16)) return false;
        }
    }
    return true;
}

// Rows 16 bytes apart fill the banks; at 128 bytes apart, all eight rows of a matrix are in the same banks.
__global__ void stride(int bytes) {
    struct Rows {
        alignas(128) char bytes[32 * 128];
    };
    auto& shared = peftk::cuda::shared_memory<Rows>();
    shared.bytes[threadIdx.x * 128] = 0;
    __syncwarp();
    uint32_t to[4];
    peftk::cuda::load_matrices(to, shared.bytes + int(threadIdx.x) * bytes);
}
SELFCHECK(bank_conflicts) {
    const int strides[] = {16, 48, 80, 128, 32, 64}, conflicts[] = {0, 0, 0, 28, 4, 12};
    for (int i = 0; i < 6; ++i) {
        cuda_on_host::statistics = {};
        launch(stride, 1, 32, 32 * 128, strides[i]);
        if (cuda_on_host::statistics.bank_conflicts != uint64_t(conflicts[i])) return false;
    }
    return true;
}

// A sum is truncated, not rounded: 1 + 2^-24 + 2^-24 loses both terms, and 1 - 2^-26 becomes the next smaller
// value that is kept.
__global__ void cut(float* out, float small) {
    const uint16_t one = encode(1, true);
    const auto value = uint16_t(__bfloat16_as_short(__float2bfloat16_rn(small)));
    uint32_t a[4] = {}, b[2] = {};
    const int group = int(threadIdx.x) >> 2, thread = int(threadIdx.x) % 4;
    if (group == 0 && thread < 2) a[0] = uint32_t(value);  // k = 0 and k = 2 of row 0
    if (group == 0 && thread < 2) b[0] = one;              // of column 0
    float sum[4] = {1, 1, 1, 1};
    peftk::cuda::multiply_bf16(sum, a, b);
    if (threadIdx.x == 0) *out = sum[0];
}
SELFCHECK(tensor_cores_cut) {
    auto out = numbers<float>(1, 0, 0);
    const float small[] = {0x1p-24f, 0x1p-25f, 0x1p-23f, -0x1p-25f, -0x1p-24f};
    // The extra bit keeps both of two 2^-24; two 2^-25 are below it, so they are lost.
    const float expected[] = {1.0f + 0x1p-23f, 1.0f, 1.0f + 0x1p-22f, 1.0f, 1.0f - 0x1p-23f};
    for (int i = 0; i < 5; ++i) {
        launch(cut, 1, 32, 0, out.get(), small[i]);
        if (out[0] != expected[i]) return false;
    }
    return true;
}

}  // namespace
}  // namespace selfcheck
