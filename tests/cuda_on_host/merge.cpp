// Runs csrc/cuda/merge.cu on the host: cases from stdin, results to stdout, as tests/test_merge_on_host.py packs them.
// Every buffer is a heap block of exactly its size, so that the address sanitizer sees one element too far.
#include "cuda/merge.cu"

namespace {

struct Header {
    int64_t unmerge, N, K, R, adapters, weight_stride, weight_dtype, adapter_dtype, seed;
    int64_t shift;  // elements by which W, out and code start after a 16-byte boundary
};

// `bytes` from stdin, `shift` bytes after an aligned start.
struct Buffer {
    std::vector<char> block;
    size_t shift;
    Buffer(size_t bytes, size_t shift) : block(shift + bytes), shift(shift) {}
    char* data() { return block.data() + shift; }
    size_t size() const { return block.size() - shift; }
    void read() {
        if (fread(data(), 1, size(), stdin) != size()) cuda_on_host::fail("the case ends too soon");
    }
    void write() { fwrite(data(), 1, size(), stdout); }
};

void run(const Header& h) {
    using namespace peftk;
    const int64_t weight_size = size_of(Dtype(h.weight_dtype)), adapter_size = size_of(Dtype(h.adapter_dtype));
    const int64_t weight_elements = (h.N - 1) * h.weight_stride + h.K;
    Buffer weight(weight_elements * weight_size, h.shift * weight_size), out(weight.size(), weight.shift);
    Buffer lora_A(h.R * h.K * adapter_size, 0), lora_B(h.N * h.R * adapter_size, 0), code(h.N * h.K, h.shift);
    Buffer ends(h.adapters * sizeof(int64_t), 0), scaling(h.adapters * sizeof(float), 0);
    for (Buffer* buffer : {&weight, &lora_A, &lora_B, &code, &ends, &scaling}) buffer->read();

    cuda_on_host::order.seed(unsigned(h.seed));
    const cuda::MergeArgs args{weight.data(),
                               h.weight_stride,
                               out.data(),
                               h.weight_stride,
                               {lora_A.data(), lora_B.data(), reinterpret_cast<int64_t*>(ends.data()),
                                reinterpret_cast<float*>(scaling.data()), h.adapters, h.R, Dtype(h.adapter_dtype)},
                               reinterpret_cast<int8_t*>(code.data()),
                               h.N,
                               h.K,
                               Dtype(h.weight_dtype)};
    if ((h.unmerge ? cuda::unmerge : cuda::merge)(args, nullptr) != cudaSuccess) cuda_on_host::fail("launch failed");
    out.write();
    code.write();
}

}  // namespace

int main() {
    Header header;
    while (fread(&header, sizeof header, 1, stdin) == 1) run(header);
}
