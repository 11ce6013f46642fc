// Reads the tensors of a layer's call, for direct calls on a CPU and on a GPU. Functions return false for what no
// direct call takes, without a Python exception.
#pragma once

#include <Python.h>

#include <cstdlib>
#include <limits>

#include "bindings/tensor.h"
#include "common/adapters.h"

namespace peftk {

// x [..., K] as rows [M, K] with a single stride.
struct RowsView {
    char* data;
    int64_t M, K, stride;
    int dtype;
};

static inline bool read_rows(const View& x, RowsView* rows) {
    if (x.ndim < 1 || x.stride(x.ndim - 1) != 1) return false;
    int64_t M = 1, row = -1;
    for (int64_t dim = x.ndim - 2; dim >= 0; dim--) {
        if (x.size(dim) == 1) continue;
        if (row < 0) row = x.strides[dim];
        if (x.strides[dim] != M * row) return false;
        M *= x.size(dim);
    }
    const int64_t K = x.size(x.ndim - 1);
    *rows = {x.data, M, K, row < 0 ? K : row, float_dtype(x)};
    return M > 0 && K > 0 && rows->dtype >= 0;
}

// A contiguous bias [size] of a floating dtype on the device, or None: its address is 0.
struct BiasView {
    char* data = nullptr;
    int dtype = kFloat32;
};

static inline bool read_bias(PyObject* object, int64_t size, int device, BiasView* bias) {
    View view;
    *bias = {};
    if (object == Py_None) return true;
    if (!read_view(object, &view) || view.ndim != 1 || view.size(0) != size || view.stride(0) != 1) return false;
    *bias = {view.data, float_dtype(view)};
    return bias->dtype >= 0 && view.device == device;
}

// An adapter: A [R, K] with contiguous rows, B [N, R], biases [R] and [N] or None; or all four None, which leaves
// `adapters` as it is.
static inline bool read_adapter(PyObject* A_object, PyObject* B_object, float scaling, int activation,
                                PyObject* bias_A_object, PyObject* bias_B_object, int64_t N, int64_t K, int device,
                                Adapters* adapters) {
    View A, B;
    BiasView bias_A, bias_B;
    if (A_object == Py_None && B_object == Py_None) return bias_A_object == Py_None && bias_B_object == Py_None;
    if (!read_view(A_object, &A) || !read_view(B_object, &B) || A.ndim != 2 || B.ndim != 2) return false;
    if (A.device != device || B.device != device) return false;
    const int64_t R = A.size(0);
    const int dtype = float_dtype(A);
    if (R < 1 || R > std::numeric_limits<int>::max() || A.size(1) != K || A.stride(1) != 1) return false;
    if (B.size(0) != N || B.size(1) != R || dtype < 0 || float_dtype(B) != dtype) return false;
    if (!read_bias(bias_A_object, R, device, &bias_A) || !read_bias(bias_B_object, N, device, &bias_B)) return false;
    if ((bias_A.data && bias_A.dtype != dtype) || (bias_B.data && bias_B.dtype != dtype)) return false;
    const auto address = [](const void* data) { return reinterpret_cast<int64_t>(data); };
    *adapters = adapters_of_one({address(A.data), R == 1 ? K : A.strides[0], address(B.data), B.strides[0],
                                 B.strides[1], address(bias_A.data), address(bias_B.data), int(R), activation, scaling},
                                Dtype(dtype));
    return true;
}

// like.new_empty(shape), and its address; takes `shape`, which may be null. nullptr without a Python exception: the
// result is no plain tensor, because a mode of torch (such as FakeTensorMode) created something else.
static inline PyObject* new_empty(PyObject* like, PyObject* shape, void** address) {
    static PyObject* const name = PyUnicode_InternFromString("new_empty");
    View view;
    if (!shape) return nullptr;
    PyObject* const args[] = {like, shape};
    PyObject* result = PyObject_VectorcallMethod(name, args, 2, nullptr);
    Py_DECREF(shape);
    if (result && !read_view(result, &view, true)) Py_CLEAR(result);
    if (result) *address = view.data;
    return result;
}

// x.new_empty([*x.shape[:-1], N]), as above.
static inline PyObject* new_output(PyObject* x_object, const View& x, int64_t N, void** address) {
    PyObject* shape = PyTuple_New(x.ndim);
    for (int64_t dim = 0; shape && dim < x.ndim; dim++) {
        PyTuple_SET_ITEM(shape, dim, PyLong_FromLongLong(dim + 1 < x.ndim ? x.size(dim) : N));
    }
    return new_empty(x_object, shape, address);
}

static inline bool backend_is_forced() {
    const char* name = std::getenv("PEFTK_BACKEND");
    return name && *name;
}

// (a torch.Tensor, an nn.Parameter, and the addresses of StorageAPI's four functions) → None
template <int kDeviceType>
static PyObject* plain_tensors(PyObject*, PyObject* const* in, Py_ssize_t count) {
    if (count != 6) return PyErr_Format(PyExc_TypeError, "expected 6 arguments, got %zd", count);
    void* addresses[4];
    for (int i = 0; i < 4; i++) addresses[i] = PyLong_AsVoidPtr(in[2 + i]);
    if (PyErr_Occurred()) return nullptr;
    StorageAPI storage;
    storage.bytes = reinterpret_cast<decltype(storage.bytes)>(addresses[0]);
    storage.offset = reinterpret_cast<decltype(storage.offset)>(addresses[1]);
    storage.device_type = reinterpret_cast<decltype(storage.device_type)>(addresses[2]);
    storage.is_neg = reinterpret_cast<decltype(storage.is_neg)>(addresses[3]);
    register_tensor_types(in[0], in[1], storage, kDeviceType);
    Py_RETURN_NONE;
}

// A function of Python's fast calling convention, for a PyMethodDef.
static inline PyCFunction fast_method(PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)) {
    return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

}  // namespace peftk
