// Reads torch tensors without torch's headers, through DLPack's C exchange API, which torch has from 2.10 on as
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

// The fields of the exchange API up to the last one used here.
struct DLPackExchangeAPI {
    uint32_t major, minor;
    void* previous;
    void *allocate, *to_managed, *from_managed;
    int (*to_view)(void* object, DLTensor* out);  // a borrowed view; returns 0, or -1 with a Python exception
    void* current_stream;
};

// Functions that torch exports, for what a view does not contain. A tensor is passed as the address of its TensorImpl*.
// Three belong to the stable C interface (torch/csrc/inductor/aoti_torch/c/shim.h; 0 is success), the last is
// at::native::is_neg.
struct StorageAPI {
    int32_t (*bytes)(void** tensor, int64_t* out);
    int32_t (*offset)(void** tensor, int64_t* out);  // in elements
    int32_t (*device_type)(void** tensor, int32_t* out);
    bool (*is_neg)(void** tensor);
};

// The types of plain tensors: torch.Tensor and Parameter. Subclasses are excluded, since they may redefine anything.
struct TensorTypes {
    PyTypeObject *tensor = nullptr, *parameter = nullptr;
    const DLPackExchangeAPI* api = nullptr;
    StorageAPI storage{};
    size_t impl = 0;  // index of the word of a tensor's object that holds its TensorImpl*
};

static inline TensorTypes& tensor_types() {
    static TensorTypes types;
    return types;
}

// Index of the word of `tensor` that equals its TensorImpl* as torch reports it (`_cdata`), or 0.
static inline size_t impl_word(PyObject* tensor) {
    PyObject* address = PyObject_GetAttrString(tensor, "_cdata");
    void* impl = address ? PyLong_AsVoidPtr(address) : nullptr;
    Py_XDECREF(address);
    const size_t words = size_t(Py_TYPE(tensor)->tp_basicsize) / sizeof(void*);
    for (size_t word = sizeof(PyObject) / sizeof(void*); impl && word < words; word++) {
        if (reinterpret_cast<void**>(tensor)[word] == impl) return word;
    }
    return 0;
}

// Remembers the types of a tensor and of a Parameter. If torch's layout is unexpected, no tensor counts as plain.
static inline void register_tensor_types(PyObject* tensor, PyObject* parameter, const StorageAPI& storage) {
    TensorTypes& types = tensor_types();
    types.tensor = Py_TYPE(tensor), types.parameter = Py_TYPE(parameter);
    types.storage = storage, types.impl = impl_word(tensor);
    PyObject* capsule = PyObject_GetAttrString(tensor, "__dlpack_c_exchange_api__");
    if (capsule) {
        auto* api = static_cast<DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
        if (api && api->major == 1 && types.impl && types.impl == impl_word(parameter)) types.api = api;
        Py_DECREF(capsule);
    }
    PyErr_Clear();
}

// Whether the elements are in memory as the view says. They are not if the storage is too small
// (untyped_storage().resize_ frees it under a tensor, as FSDP and offloading do), or if they must be negated when read
// (the imaginary part of a conjugate).
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

// The view of a plain tensor or Parameter on any device; false for any other object. Leaves no Python exception.
static inline bool plain_view(PyObject* object, DLTensor* view) {
    const TensorTypes& types = tensor_types();
    if (!types.api || (Py_TYPE(object) != types.tensor && Py_TYPE(object) != types.parameter)) return false;
    // A view of a meta tensor is an exception of torch's, which takes a millisecond to describe itself.
    constexpr int32_t kMeta = 14;  // c10::DeviceType::Meta
    int32_t device_type;
    void** impl = reinterpret_cast<void**>(object) + types.impl;
    if (types.storage.device_type(impl, &device_type) != 0 || device_type == kMeta) return false;
    if (types.api->to_view(object, view) != 0) {
        PyErr_Clear();  // a wrapper without storage (functorch) or a sparse tensor: the ordinary way reports it
        return false;
    }
    return true;
}

// A tensor on the CPU; valid while its object is.
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

// Reads a plain dense tensor on the CPU; false, without a Python exception, for anything else. A tensor that torch has
// just created needs no check of its storage.
static inline bool read_view(PyObject* object, View* view, bool just_created = false) {
    DLTensor tensor;
    if (!plain_view(object, &tensor) || (!just_created && !is_stored(object, tensor))) return false;
    constexpr int kCpu = 1;
    if (tensor.device_type != kCpu || tensor.lanes != 1) return false;
    *view = {static_cast<char*>(tensor.data) + tensor.byte_offset, tensor.ndim, tensor.shape, tensor.strides,
             dl_type(tensor.code, tensor.bits)};
    return true;
}

// The code of a dtype that the kernels support, or -1.
static inline int float_dtype(const View& view) {
    constexpr int kFloat = 2, kBrain = 4;
    return view.type == dl_type(kFloat, 32)   ? kFloat32
           : view.type == dl_type(kBrain, 16) ? kBFloat16
           : view.type == dl_type(kFloat, 16) ? kFloat16
                                              : -1;
}

}  // namespace peftk
