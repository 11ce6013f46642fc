// Turns C++ exceptions into Python exceptions, for functions that pybind11 does not wrap.
#pragma once

#include <pybind11/pybind11.h>

#include <new>
#include <stdexcept>

namespace peftk {

template <class Body>
static inline PyObject* with_python_errors(Body body) {
    try {
        return body();
    } catch (pybind11::error_already_set& error) {
        error.restore();
    } catch (const pybind11::builtin_exception& error) {
        error.set_error();
    } catch (const std::bad_alloc&) {
        PyErr_NoMemory();
    } catch (const std::invalid_argument& error) {
        PyErr_SetString(PyExc_ValueError, error.what());
    } catch (const std::exception& error) {
        PyErr_SetString(PyExc_RuntimeError, error.what());
    }
    return nullptr;
}

}  // namespace peftk
