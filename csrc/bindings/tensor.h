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

// What torch exports that a view does not tell, each with a tensor as the address of its TensorImpl*: two functions of
// the stable C interface (torch/csrc/inductor/aoti_torch/c/shim.h; 0 is success), and at::native::is_neg.
struct StorageAPI {
    int32_t (*bytes)(void** tensor, int64_t* out);
    int32_t (*offset)(void** tensor, int64_t* out);  // in elements
    bool (*is_neg)(void** tensor);
};

// The types whose objects are plain tensors: torch.Tensor and Parameter, without subclasses, which may mean anything.
struct TensorTypes {
    PyTypeObject *tensor = nullptr, *parameter = nullptr;
    const DLPackExchangeAPI* api = nullptr;
    StorageAPI storage{};
    size_t impl = 0;  // at which word a tensor's object has its TensorImpl*
};

static inline TensorTypes& tensor_types() {
    static TensorTypes types;
    return types;
}

// The word at which `tensor` has what torch says its TensorImpl* is (`_cdata`), or 0.
static inline size_t word_of_impl(PyObject* tensor) {
    PyObject* address = PyObject_GetAttrString(tensor, "_cdata");
    void* impl = address ? PyLong_AsVoidPtr(address) : nullptr;
    Py_XDECREF(address);
    const size_t words = size_t(Py_TYPE(tensor)->tp_basicsize) / sizeof(void*);
    for (size_t word = sizeof(PyObject) / sizeof(void*); impl && word < words; word++) {
        if (reinterpret_cast<void**>(tensor)[word] == impl) return word;
    }
    return 0;
}

// Remembers the types of a tensor and of a Parameter. Where torch is not as we know it, nothing will be plain.
static inline void use_tensor_types(PyObject* tensor, PyObject* parameter, const StorageAPI& storage) {
    TensorTypes& types = tensor_types();
    types.tensor = Py_TYPE(tensor), types.parameter = Py_TYPE(parameter);
    types.storage = storage, types.impl = word_of_impl(tensor);
    PyObject* capsule = PyObject_GetAttrString(tensor, "__dlpack_c_exchange_api__");
    if (capsule) {
        auto* api = static_cast<DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
        if (api && api->major == 1 && types.impl && types.impl == word_of_impl(parameter)) types.api = api;
        Py_DECREF(capsule);
    }
    PyErr_Clear();
}

// Whether the elements are where a view says: in memory that reaches as far (untyped_storage().resize_ frees it behind
// a tensor's back, as FSDP and offloading do), and not to be negated on the way (the imaginary part of a conjugate).
static inline bool is_stored(PyObject* object, const DLTensor& view) {
    const TensorTypes& types = tensor_types();
    const StorageAPI& storage = types.storage;
    void** impl = reinterpret_cast<void**>(object) + types.impl;
    int64_t bytes, offset, reach = 1;
    if (storage.bytes(impl, &bytes) != 0 || storage.offset(impl, &offset) != 0 || storage.is_neg(impl)) return false;
    for (int32_t dim = 0; dim < view.ndim; dim++) {
        if (view.shape[dim] == 0) return true;
        reach += (view.shape[dim] - 1) * view.strides[dim];
    }
    return view.data && (offset + reach) * (view.bits / 8) <= bytes;
}

// What an object says of its elements, where it is exactly a tensor or a Parameter, on any device. No exception.
static inline bool plain_view(PyObject* object, DLTensor* view) {
    const TensorTypes& types = tensor_types();
    if (!types.api || (Py_TYPE(object) != types.tensor && Py_TYPE(object) != types.parameter)) return false;
    if (types.api->to_view(object, view) != 0) {
        PyErr_Clear();  // a wrapper without storage (functorch), a sparse tensor: who is asked next says what is wrong
        return false;
    }
    return true;
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

// false, without an exception, for whatever is no plain dense tensor on the CPU. One that torch has just made is
// stored.
static inline bool view_of(PyObject* object, View* view, bool just_made = false) {
    DLTensor tensor;
    if (!plain_view(object, &tensor) || (!just_made && !is_stored(object, tensor))) return false;
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
