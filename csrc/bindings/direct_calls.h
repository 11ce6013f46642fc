// The shortest way from a layer to the kernel: reads and checks tensors here and runs the kernel, without gradients,
// dropout or copies. Returns None for any other call, errors included: the ordinary way through peftk/functional.py
// then computes it, or says what is wrong with it.
#pragma once

#include <Python.h>

#include <cstring>
#include <limits>
#include <stdexcept>

#include "bindings/errors.h"
#include "bindings/gil.h"
#include "bindings/layer_tensors.h"
#include "cpu/lora_linear.h"
#include "cpu/scratch.h"

namespace peftk {

// Reads x [..., K] as rows, W [N, K] contiguous along either side, and bias [N], for M·N·K up to `limit`. Without W
// (the identity: a series adapter) there is no bias, and x must be copied to y before the kernel runs.
static inline bool read_linear(const View& x, PyObject* weight_object, PyObject* bias_object, double limit,
                               LinearArgs* args) {
    View weight;
    RowsView rows;
    BiasView bias;
    if (!read_rows(x, &rows)) return false;
    args->M = rows.M, args->K = rows.K;
    args->x = rows.data, args->x_stride = rows.stride, args->x_dtype = rows.dtype;
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
    if (!read_bias(bias_object, args->N, x.device, &bias)) return false;
    args->bias = bias.data, args->bias_dtype = bias.dtype;
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

// (x, weight, bias, lora_A, lora_B, scaling, activation, bias_A, bias_B, limit, threads,
// batch_invariant) → y or None
static PyObject* direct_lora_linear(PyObject*, PyObject* const* in, Py_ssize_t count) {
    if (count != 12) return PyErr_Format(PyExc_TypeError, "expected 12 arguments, got %zd", count);
    return with_python_errors([&]() -> PyObject* {
        View x;
        LinearArgs args{};
        const double scaling = PyFloat_AsDouble(in[5]), limit = PyFloat_AsDouble(in[9]);
        const int activation = int(PyLong_AsLong(in[6]));
        args.threads = int(PyLong_AsLong(in[10])), args.batch_invariant = in[11] == Py_True;
        if (PyErr_Occurred()) return nullptr;
        if (backend_is_forced() || !read_view(in[0], &x) || !read_linear(x, in[1], in[2], limit, &args) ||
            !read_adapter(in[3], in[4], float(scaling), activation, in[7], in[8], args.N, args.K, x.device,
                          &args.adapters)) {
            Py_RETURN_NONE;
        }
        return run_kernel(in[0], x, args);
    });
}

// (x, weight, bias, ids, limit, threads, batch_invariant, pages, rows, scaling, biases, count, dtype) → y or None
static PyObject* direct_multi_lora_linear(PyObject*, PyObject* const* in, Py_ssize_t count) {
    if (count != 13) return PyErr_Format(PyExc_TypeError, "expected 13 arguments, got %zd", count);
    return with_python_errors([&]() -> PyObject* {
        View x;
        LinearArgs args{};
        const double limit = PyFloat_AsDouble(in[4]);
        args.threads = int(PyLong_AsLong(in[5])), args.batch_invariant = in[6] == Py_True;
        Adapters& adapters = args.adapters;
        adapters.pages = static_cast<const int64_t*>(PyLong_AsVoidPtr(in[7]));
        adapters.rows = static_cast<const int32_t*>(PyLong_AsVoidPtr(in[8]));
        adapters.scaling = static_cast<const float*>(PyLong_AsVoidPtr(in[9]));
        adapters.biases = static_cast<const int64_t*>(PyLong_AsVoidPtr(in[10]));
        adapters.count = int(PyLong_AsLong(in[11])), adapters.dtype = Dtype(PyLong_AsLong(in[12]));
        if (PyErr_Occurred()) return nullptr;
        if (backend_is_forced() || !read_view(in[0], &x) || !read_linear(x, in[1], in[2], limit, &args) ||
            !read_ids(x, in[3], args.M, &args.ids)) {
            Py_RETURN_NONE;
        }
        return run_kernel(in[0], x, args);
    });
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
    static PyMethodDef methods[] = {
        {"plain_tensors", fast_method(plain_tensors<kCpuDevice>), METH_FASTCALL,
         "plain_tensors(tensor, parameter, storage_bytes, storage_offset, device_type, is_neg, /)\n--\n\n"},
        {"dense", fast_method(dense), METH_FASTCALL, "dense(*tensors)\n--\n\n"},
        {"direct_lora_linear", fast_method(direct_lora_linear), METH_FASTCALL,
         "direct_lora_linear(x, weight, bias, lora_A, lora_B, scaling, activation, bias_A, bias_B, limit, threads, "
         "batch_invariant, /)"
         "\n--\n\n"},
        {"direct_multi_lora_linear", fast_method(direct_multi_lora_linear), METH_FASTCALL,
         "direct_multi_lora_linear(x, weight, bias, ids, limit, threads, batch_invariant, pages, rows, scaling, "
         "biases, count, dtype, /)"
         "\n--\n\n"},
        {nullptr, nullptr, 0, nullptr},
    };
    if (PyModule_AddFunctions(module, methods) != 0)
        throw std::runtime_error("peftk._cpu: could not add the direct calls");
}

}  // namespace peftk
