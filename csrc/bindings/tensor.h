// torch tensors read from C++ without torch's headers: DLPack's C exchange API, which torch offers from 2.10 on as
// torch.Tensor.__dlpack_c_exchange_api__. Its layout is fixed within a major version (https://dmlc.github.io/dlpack).
#pragma once

#include <Python.h>

#include <cstdint>

#include "common/dtype.h"

namespace peftk {

struct DLTensor {
    void* data;
    int32_t device_type, device_id;
    int32_t ndim;
    uint8_t code, bits;
    uint16_t lanes;
    int64_t *shape, *strides;
    uint64_t byte_offset;
};

// What we need of the exchange API; the fields before are other ways to exchange.
struct DLPackExchangeAPI {
    uint32_t major, minor;
    void* previous;
    void *allocate, *to_managed, *from_managed;
    int (*to_view)(void* object, DLTensor* out);  // borrows; 0, or -1 with a Python exception
    void* current_stream;
};

// The types whose objects are plain tensors: torch.Tensor and Parameter, without subclasses, which may mean anything.
struct TensorTypes {
    PyTypeObject *tensor = nullptr, *parameter = nullptr;
    const DLPackExchangeAPI* api = nullptr;
};

static inline TensorTypes& tensor_types() {
    static TensorTypes types;
    return types;
}

// Remembers torch.Tensor and torch.nn.Parameter. Without an exchange API that we know, nothing will be plain.
static inline void use_tensor_types(PyObject* tensor, PyObject* parameter) {
    TensorTypes& types = tensor_types();
    types.tensor = reinterpret_cast<PyTypeObject*>(tensor),
    types.parameter = reinterpret_cast<PyTypeObject*>(parameter);
    PyObject* capsule = PyObject_GetAttrString(tensor, "__dlpack_c_exchange_api__");
    if (capsule) {
        auto* api = static_cast<DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
        if (api && api->major == 1) types.api = api;
        Py_DECREF(capsule);
    }
    PyErr_Clear();
}

// A tensor on the CPU; valid as long as the object is.
struct View {
    char* data;
    int64_t ndim;
    const int64_t *shape, *strides;

    int type;  // dl_type of its dtype

    int64_t size(int64_t dim) const { return shape[dim]; }
    int64_t stride(int64_t dim) const { return shape[dim] == 1 ? 1 : strides[dim]; }
};

constexpr int dl_type(int code, int bits) { return code << 8 | bits; }
constexpr int kInt32Type = dl_type(0, 32), kInt64Type = dl_type(0, 64);

// false, without an exception, for whatever is no plain tensor on the CPU.
static inline bool view_of(PyObject* object, View* view) {
    const TensorTypes& types = tensor_types();
    if (!types.api || (Py_TYPE(object) != types.tensor && Py_TYPE(object) != types.parameter)) return false;
    DLTensor tensor;
    if (types.api->to_view(object, &tensor) != 0) {
        PyErr_Clear();  // a wrapper without storage (functorch), a sparse tensor: who is asked next says what is wrong
        return false;
    }
    constexpr int kCpu = 1;
    if (tensor.device_type != kCpu || tensor.lanes != 1) return false;
    *view = {static_cast<char*>(tensor.data) + tensor.byte_offset, tensor.ndim, tensor.shape, tensor.strides,
             dl_type(tensor.code, tensor.bits)};
    return true;
}

// The code of a dtype that the kernels serve, or -1.
static inline int float_dtype(const View& view) {
    constexpr int kFloat = 2, kBrain = 4;
    return view.type == dl_type(kFloat, 32)   ? kFloat32
           : view.type == dl_type(kBrain, 16) ? kBFloat16
           : view.type == dl_type(kFloat, 16) ? kFloat16
                                              : -1;
}

}  // namespace peftk
