// The shortest way from a layer to the kernel of a decode step: reads and checks tensors here, gets memory from torch
// and launches, without gradients, dropout or copies. Returns None for any other call, errors included: the ordinary
// way then computes it, or says what is wrong with it. The caller has made sure that this kernel is to run.
#pragma once

#include <Python.h>

#include <cstdlib>
#include <cstring>
#include <limits>
#include <stdexcept>

#include "bindings/adapters.h"
#include "bindings/cuda_status.h"
#include "bindings/errors.h"
#include "bindings/layer_tensors.h"
#include "cuda/lora_linear.h"

namespace peftk::cuda {

#ifdef PEFTK_CUDA_ON_HOST
constexpr int kTensorDevice = kCpuDevice;
#else
constexpr int kTensorDevice = kCudaDevice;
#endif

// Reads x [..., K], W [N, K] and bias [N].
static inline bool read_linear(const View& x, PyObject* weight_object, PyObject* bias_object, LoraLinearArgs* args) {
    View weight;
    RowsView rows;
    BiasView bias;
    if (!read_rows(x, &rows) || rows.M > kMostRows || rows.dtype == kFloat32) return false;
    if (!read_view(weight_object, &weight) || weight.ndim != 2 || weight.size(1) != rows.K) return false;
    if (weight.device != x.device || float_dtype(weight) != rows.dtype || weight.stride(1) != 1) return false;
    constexpr int64_t most = std::numeric_limits<int32_t>::max();
    if (weight.size(0) < 1 || weight.size(0) > most || rows.K > most || rows.K % 8) return false;
    args->M = int32_t(rows.M), args->N = int32_t(weight.size(0)), args->K = int32_t(rows.K);
    args->x = rows.data, args->x_stride = rows.stride, args->dtype = Dtype(rows.dtype);
    args->weight = weight.data, args->weight_stride = weight.size(0) == 1 ? rows.K : weight.strides[0];
    if (!starts_on_16(args->x, args->x_stride) || !starts_on_16(args->weight, args->weight_stride)) return false;
    if (!read_bias(bias_object, args->N, x.device, &bias)) return false;
    args->bias = bias.data, args->bias_dtype = Dtype(bias.dtype);
    return true;
}

// What a direct call needs besides the layer's tensors, in the order in which Python passes it.
struct Surroundings {
    PyObject* chosen;    // (M, N, K, dtype, about) → whether this kernel is to run such a call
    PyObject* counters;  // int32, zero, of this stream; or None
    int processors;
    cudaStream_t stream;
};

static inline Surroundings surroundings(PyObject* const* in) {
    return {in[0], in[1], int(PyLong_AsLong(in[2])), static_cast<cudaStream_t>(PyLong_AsVoidPtr(in[3]))};
}

// about: (many, the adapters' dtype or -1, the largest rank, number of adapters, slices); taken, may be null.
static inline bool is_chosen(const Surroundings& around, const LoraLinearArgs& args, PyObject* about) {
    if (!about) throw pybind11::error_already_set();
    PyObject* answer = PyObject_CallFunction(around.chosen, "iiiiN", args.M, args.N, args.K, int(args.dtype), about);
    if (!answer) throw pybind11::error_already_set();
    Py_DECREF(answer);
    return answer == Py_True;
}

// Launches a call that passed all checks. Returns y, or None without enough counters or if y is no plain tensor.
static inline PyObject* launch(PyObject* x_object, const View& x, LoraLinearArgs& args, const Surroundings& around) {
    const int z_pages = args.adapters.z_pages;
    const LoraLinearPlan plan = plan_lora_linear(args.M, args.N, args.K, z_pages, around.processors);
    View counters;
    if (!read_view(around.counters, &counters) || counters.type != kInt32Type || counters.ndim != 1 ||
        counters.size(0) < plan.counters || counters.device != x.device) {
        Py_RETURN_NONE;
    }
    args.counters = reinterpret_cast<int32_t*>(counters.data);
    const int64_t z = int64_t(args.M) * z_pages * kPage, floats = z + plan.partials;
    PyObject *y = new_output(x_object, x, args.N, &args.y), *scratch = nullptr;
    if (y && floats) {  // x's elements have half a float's size; torch reuses the memory in stream order
        void* address = nullptr;
        scratch = new_empty(x_object, Py_BuildValue("(L)", static_cast<long long>(2 * floats)), &address);
        if (!scratch) Py_CLEAR(y);
        args.z = static_cast<float*>(address), args.partials = args.z + z;
    }
    if (!y) {
        if (PyErr_Occurred()) return nullptr;
        Py_RETURN_NONE;
    }
    const Status status = lora_linear(args, plan, x.device, around.stream);
    Py_XDECREF(scratch);
    if (!status.ok()) Py_DECREF(y);
    check(status, "lora_linear");
    return y;
}

// Whether the kernel takes adapters of this dtype.
static inline bool fits(const Adapters& adapters, const LoraLinearArgs& args) {
    return adapters.dtype == args.dtype || adapters.dtype == kFloat32;
}

// (x, weight, bias, lora_A, lora_B, scaling, activation, bias_A, bias_B, chosen, counters, processors, stream) → y or
// None
static PyObject* direct_lora_linear(PyObject*, PyObject* const* in, Py_ssize_t count) {
    if (count != 13) return PyErr_Format(PyExc_TypeError, "expected 13 arguments, got %zd", count);
    return with_python_errors([&]() -> PyObject* {
        View x;
        LoraLinearArgs args{};
        const double scaling = PyFloat_AsDouble(in[5]);
        const int activation = int(PyLong_AsLong(in[6]));
        const Surroundings around = surroundings(in + 9);
        if (PyErr_Occurred()) return nullptr;
        if (backend_is_forced() || !read_view(in[0], &x) || !read_linear(x, in[1], in[2], &args)) Py_RETURN_NONE;
        Adapters& adapters = args.adapters;
        adapters.dtype = args.dtype;
        if (!read_adapter(in[3], in[4], float(scaling), activation, in[7], in[8], args.N, args.K, x.device,
                          &adapters) ||
            !fits(adapters, args)) {
            Py_RETURN_NONE;
        }
        const int dtype = adapters.count ? int(adapters.dtype) : -1;
        if (!is_chosen(around, args, Py_BuildValue("(Oiiii)", Py_False, dtype, adapters.one.rank, adapters.count, 1)))
            Py_RETURN_NONE;
        return launch(in[0], x, args, around);
    });
}

// Reads ids, int32 and contiguous, one per row of x.
static inline bool read_ids(const View& x, PyObject* ids_object, LoraLinearArgs* args) {
    View ids;
    if (!read_view(ids_object, &ids) || ids.type != kInt32Type || ids.device != x.device) return false;
    if (ids.ndim != x.ndim - 1) return false;
    int64_t rows = 1;
    for (int64_t dim = ids.ndim - 1; dim >= 0; dim--) {
        if (ids.size(dim) != x.size(dim) || (ids.size(dim) != 1 && ids.strides[dim] != rows)) return false;
        rows *= ids.size(dim);
    }
    args->ids = reinterpret_cast<const int32_t*>(ids.data);
    return true;
}

static inline bool ids_are_checked() {  // as in peftk/adapters/checks.py
    const char* value = std::getenv("PEFTK_CHECK");
    return value && std::strcmp(value, "1") == 0;
}

// (x, weight, bias, ids, adapters, about, chosen, counters, processors, stream) → y or None
static PyObject* direct_multi_lora_linear(PyObject*, PyObject* const* in, Py_ssize_t count) {
    if (count != 10) return PyErr_Format(PyExc_TypeError, "expected 10 arguments, got %zd", count);
    return with_python_errors([&]() -> PyObject* {
        View x;
        LoraLinearArgs args{};
        const Adapters* adapters = value_of<Adapters>(in[4]);
        const Surroundings around = surroundings(in + 6);
        if (PyErr_Occurred()) return nullptr;
        if (backend_is_forced() || ids_are_checked() || !adapters || !read_view(in[0], &x) ||
            !read_linear(x, in[1], in[2], &args) || !read_ids(x, in[3], &args) || !fits(*adapters, args)) {
            Py_RETURN_NONE;
        }
        Py_INCREF(in[5]);
        if (!is_chosen(around, args, in[5])) Py_RETURN_NONE;
        args.adapters = *adapters;
        return launch(in[0], x, args, around);
    });
}

inline void define_direct_calls(pybind11::module_& module) {
    static PyMethodDef methods[] = {
        {"plain_tensors", fast_method(plain_tensors<kTensorDevice>), METH_FASTCALL,
         "plain_tensors(tensor, parameter, storage_bytes, storage_offset, device_type, is_neg, /)\n--\n\n"},
        {"direct_lora_linear", fast_method(direct_lora_linear), METH_FASTCALL,
         "direct_lora_linear(x, weight, bias, lora_A, lora_B, scaling, activation, bias_A, bias_B, chosen, counters, "
         "processors, stream, /)\n--\n\n"},
        {"direct_multi_lora_linear", fast_method(direct_multi_lora_linear), METH_FASTCALL,
         "direct_multi_lora_linear(x, weight, bias, ids, adapters, about, chosen, counters, processors, stream, "
         "/)\n--\n\n"},
        {nullptr, nullptr, 0, nullptr},
    };
    if (PyModule_AddFunctions(module.ptr(), methods) != 0)
        throw std::runtime_error("peftk._cuda: could not add the direct calls");
}

}  // namespace peftk::cuda
