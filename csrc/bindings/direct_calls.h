// The shortest way from a layer to the kernel: reads and checks tensors here and runs the kernel, without gradients,
// dropout or copies. Returns None for any other call, errors included: the ordinary way through peftk/functional.py
// then computes it, or says what is wrong with it.
#pragma once

#include <Python.h>

#include <cstdlib>
#include <cstring>
#include <limits>
#include <stdexcept>

#include "bindings/errors.h"
#include "bindings/gil.h"
#include "bindings/tensor.h"
#include "common/adapters.h"
#include "cpu/lora_linear.h"
#include "cpu/scratch.h"

namespace peftk {

// Reads x [..., K] whose rows have a single stride. This and the following functions return false for anything else.
static inline bool read_rows(const View& x, LinearArgs* args) {
    if (x.ndim < 1 || x.stride(x.ndim - 1) != 1) return false;
    int64_t M = 1, row = -1;
    for (int64_t dim = x.ndim - 2; dim >= 0; dim--) {
        if (x.size(dim) == 1) continue;
        if (row < 0) row = x.strides[dim];
        if (x.strides[dim] != M * row) return false;
        M *= x.size(dim);
    }
    args->M = M, args->K = x.size(x.ndim - 1);
    args->x = x.data, args->x_stride = row < 0 ? args->K : row, args->x_dtype = float_dtype(x);
    return M > 0 && args->K > 0 && args->x_dtype >= 0;
}

// Reads x as above, W [N, K] contiguous along either side, and bias [N], for M·N·K up to `limit`. Without W (the
// identity: a series adapter) there is no bias, and x must be copied to y before the kernel runs.
static inline bool read_linear(const View& x, PyObject* weight_object, PyObject* bias_object, double limit,
                               LinearArgs* args) {
    View weight, bias;
    if (!read_rows(x, args)) return false;
    if (weight_object == Py_None) {
        args->N = args->K, args->over_base = true, args->weight_dtype = -1;
        return bias_object == Py_None;
    }
    if (!read_view(weight_object, &weight) || weight.ndim != 2 || weight.size(1) != args->K) return false;
    args->N = weight.size(0);
    const double work = work_of(*args, true);
    if (work == 0 || work > limit) return false;
    args->weight = weight.data, args->weight_dtype = float_dtype(weight);
    args->weight_n = weight.stride(0), args->weight_k = weight.stride(1);
    if (args->weight_dtype < 0 || (args->weight_n != 1 && args->weight_k != 1)) return false;
    if (bias_object == Py_None) return true;
    if (!read_view(bias_object, &bias)) return false;
    args->bias = bias.data, args->bias_dtype = float_dtype(bias);
    return bias.ndim == 1 && bias.size(0) == args->N && bias.stride(0) == 1 && args->bias_dtype >= 0;
}

// Reads the address of a bias [size] of this dtype, or 0 for None.
static inline bool read_adapter_bias(PyObject* object, int64_t size, int dtype, int64_t* address) {
    View bias;
    *address = 0;
    if (object == Py_None) return true;
    if (!read_view(object, &bias) || bias.ndim != 1 || bias.size(0) != size || bias.stride(0) != 1) return false;
    *address = reinterpret_cast<int64_t>(bias.data);
    return float_dtype(bias) == dtype;
}

// Reads an adapter: A [R, K] with contiguous rows, B [N, R], biases [R] and [N] or None; or all four None.
static inline bool read_adapter(PyObject* A_object, PyObject* B_object, float scaling, int activation,
                                PyObject* bias_A_object, PyObject* bias_B_object, const LinearArgs& linear,
                                Adapters* adapters) {
    View A, B;
    int64_t bias_A, bias_B;
    if (A_object == Py_None && B_object == Py_None) return bias_A_object == Py_None && bias_B_object == Py_None;
    if (!read_view(A_object, &A) || !read_view(B_object, &B) || A.ndim != 2 || B.ndim != 2) return false;
    const int64_t R = A.size(0), N = linear.N, K = linear.K;
    const int dtype = float_dtype(A);
    if (R < 1 || R > std::numeric_limits<int>::max() || A.size(1) != K || A.stride(1) != 1) return false;
    if (B.size(0) != N || B.size(1) != R || dtype < 0 || float_dtype(B) != dtype) return false;
    if (!read_adapter_bias(bias_A_object, R, dtype, &bias_A) || !read_adapter_bias(bias_B_object, N, dtype, &bias_B))
        return false;
    const auto address = [](const View& view) { return reinterpret_cast<int64_t>(view.data); };
    *adapters = adapters_of_one({address(A), R == 1 ? K : A.strides[0], address(B), B.strides[0], B.strides[1], bias_A,
                                 bias_B, int(R), activation, scaling},
                                Dtype(dtype));
    return true;
}

// Reads ids, int32 or int64, one per row of x or, if x has three or more dimensions, one per sequence.
static inline bool read_ids(const View& x, PyObject* ids_object, int64_t M, const int32_t** out) {
    View ids;
    if (!read_view(ids_object, &ids)) return false;
    if (ids.type != kInt32Type && ids.type != kInt64Type) return false;
    const bool each_row = ids.ndim == x.ndim - 1, each_sequence = ids.ndim == 1 && x.ndim > 2;
    if (!each_row && !each_sequence) return false;
    int64_t count = 1;
    for (int64_t dim = ids.ndim - 1; dim >= 0; dim--) {
        if (ids.size(dim) != x.size(dim) || (ids.size(dim) != 1 && ids.strides[dim] != count)) return false;
        count *= ids.size(dim);
    }
    int32_t* rows = static_cast<int32_t*>(scratch(kIdsSlot, size_t(M) * sizeof(int32_t)));
    const int64_t repeats = M / count;
    for (int64_t m = 0; m < M; m++) {
        const int64_t i = m / repeats;
        int64_t id = ids.type == kInt32Type ? reinterpret_cast<const int32_t*>(ids.data)[i]
                                            : reinterpret_cast<const int64_t*>(ids.data)[i];
        constexpr int64_t most = std::numeric_limits<int32_t>::max();
        rows[m] = int32_t(id < -2 ? -2 : id > most ? most : id);  // an id outside every bank stays outside
    }
    *out = rows;
    return true;
}

// x.new_empty([*x.shape[:-1], N]), and its address. nullptr without a Python exception: the result is no plain tensor,
// because a mode of torch (such as FakeTensorMode) created something else.
static inline PyObject* new_output(PyObject* x_object, const View& x, int64_t N, void** address) {
    static PyObject* const name = PyUnicode_InternFromString("new_empty");
    View y;
    PyObject* shape = PyTuple_New(x.ndim);
    if (!shape) return nullptr;
    for (int64_t dim = 0; dim < x.ndim; dim++) {
        PyTuple_SET_ITEM(shape, dim, PyLong_FromLongLong(dim + 1 < x.ndim ? x.size(dim) : N));
    }
    PyObject* const args[] = {x_object, shape};
    PyObject* result = PyObject_VectorcallMethod(name, args, 2, nullptr);
    Py_DECREF(shape);
    if (result && !read_view(result, &y, true)) Py_CLEAR(result);
    if (result) *address = y.data;
    return result;
}

// Copies x to y, to which a series adapter adds its part.
static inline void copy_rows(const LinearArgs& args) {
    const size_t item = size_t(size_of(args.x_dtype)), row = size_t(args.K) * item;
    const char* x = static_cast<const char*>(args.x);
    char* y = static_cast<char*>(args.y);
    for (int64_t m = 0; m < args.M; m++) std::memcpy(y + size_t(m) * row, x + m * args.x_stride * int64_t(item), row);
}

// Runs the kernel for a call that passed all checks. Returns y, or None if y is no plain tensor.
static inline PyObject* run_kernel(PyObject* x_object, const View& x, LinearArgs& args) {
    PyObject* y = new_output(x_object, x, args.N, &args.y);
    if (!y) {
        if (PyErr_Occurred()) return nullptr;
        Py_RETURN_NONE;
    }
    args.y_stride = args.N;
    try {
        const Level level = level_in_use();
        without_gil(work_of(args, !args.over_base), [&] {
            if (args.over_base) copy_rows(args);
            const Order order = order_by_adapter(args.ids, args.M, args.adapters);
            PEFTK_CALL(level, lora_linear, (args, order));
        });
    } catch (...) {
        Py_DECREF(y);
        throw;
    }
    return y;
}

static inline bool backend_is_forced() {
    const char* name = std::getenv("PEFTK_BACKEND");
    return name && *name;
}

// (x, weight, bias, lora_A, lora_B, scaling, activation, bias_A, bias_B, limit, threads) → y or None
static PyObject* direct_lora_linear(PyObject*, PyObject* const* in, Py_ssize_t count) {
    if (count != 11) return PyErr_Format(PyExc_TypeError, "expected 11 arguments, got %zd", count);
    return with_python_errors([&]() -> PyObject* {
        View x;
        LinearArgs args{};
        const double scaling = PyFloat_AsDouble(in[5]), limit = PyFloat_AsDouble(in[9]);
        const int activation = int(PyLong_AsLong(in[6]));
        args.threads = int(PyLong_AsLong(in[10]));
        if (PyErr_Occurred()) return nullptr;
        if (backend_is_forced() || !read_view(in[0], &x) || !read_linear(x, in[1], in[2], limit, &args) ||
            !read_adapter(in[3], in[4], float(scaling), activation, in[7], in[8], args, &args.adapters)) {
            Py_RETURN_NONE;
        }
        return run_kernel(in[0], x, args);
    });
}

// (x, weight, bias, ids, limit, threads, pages, rows, scaling, biases, count, dtype) → y or None
static PyObject* direct_multi_lora_linear(PyObject*, PyObject* const* in, Py_ssize_t count) {
    if (count != 12) return PyErr_Format(PyExc_TypeError, "expected 12 arguments, got %zd", count);
    return with_python_errors([&]() -> PyObject* {
        View x;
        LinearArgs args{};
        const double limit = PyFloat_AsDouble(in[4]);
        args.threads = int(PyLong_AsLong(in[5]));
        Adapters& adapters = args.adapters;
        adapters.pages = static_cast<const int64_t*>(PyLong_AsVoidPtr(in[6]));
        adapters.rows = static_cast<const int32_t*>(PyLong_AsVoidPtr(in[7]));
        adapters.scaling = static_cast<const float*>(PyLong_AsVoidPtr(in[8]));
        adapters.biases = static_cast<const int64_t*>(PyLong_AsVoidPtr(in[9]));
        adapters.count = int(PyLong_AsLong(in[10])), adapters.dtype = Dtype(PyLong_AsLong(in[11]));
        if (PyErr_Occurred()) return nullptr;
        if (backend_is_forced() || !read_view(in[0], &x) || !read_linear(x, in[1], in[2], limit, &args) ||
            !read_ids(x, in[3], args.M, &args.ids)) {
            Py_RETURN_NONE;
        }
        return run_kernel(in[0], x, args);
    });
}

// (a torch.Tensor, an nn.Parameter, and the addresses of StorageAPI's four functions) → None
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
    register_tensor_types(in[0], in[1], storage);
    Py_RETURN_NONE;
}

// (tensor or None, ...) → whether all tensors are plain and dense, and on one device
static PyObject* dense(PyObject*, PyObject* const* in, Py_ssize_t count) {
    DLTensor view, first;
    bool any = false;
    for (Py_ssize_t i = 0; i < count; i++) {
        if (in[i] == Py_None) continue;
        if (!plain_view(in[i], &view) || !is_stored(in[i], view)) Py_RETURN_FALSE;
        if (!any) first = view, any = true;
        if (view.device_type != first.device_type || view.device_id != first.device_id) Py_RETURN_FALSE;
    }
    Py_RETURN_TRUE;
}

static inline void bind_direct_calls(PyObject* module) {
    const auto method = [](auto function) {
        return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
    };
    static PyMethodDef methods[] = {
        {"plain_tensors", method(plain_tensors), METH_FASTCALL,
         "plain_tensors(tensor, parameter, storage_bytes, storage_offset, device_type, is_neg, /)\n--\n\n"},
        {"dense", method(dense), METH_FASTCALL, "dense(*tensors)\n--\n\n"},
        {"direct_lora_linear", method(direct_lora_linear), METH_FASTCALL,
         "direct_lora_linear(x, weight, bias, lora_A, lora_B, scaling, activation, bias_A, bias_B, limit, threads, /)"
         "\n--\n\n"},
        {"direct_multi_lora_linear", method(direct_multi_lora_linear), METH_FASTCALL,
         "direct_multi_lora_linear(x, weight, bias, ids, limit, threads, pages, rows, scaling, biases, count, dtype, /)"
         "\n--\n\n"},
        {nullptr, nullptr, 0, nullptr},
    };
    if (PyModule_AddFunctions(module, methods) != 0)
        throw std::runtime_error("peftk._cpu: could not add the direct calls");
}

}  // namespace peftk
