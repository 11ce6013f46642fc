// Functions with keyword arguments. pybind11 takes a microsecond for ten keywords, since it searches for every name.
// These functions find a keyword at once if the caller keeps the signature's order. A missing or unknown argument, or
// one of the wrong type, raises a TypeError that names it.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <array>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "bindings/class.h"
#include "bindings/errors.h"

namespace peftk {

// ---- one argument -------------------------------------------------------------------------------------------------

// Reads a T from a Python object: read() returns false if it cannot, and expected() says what it accepts. This one
// reads an object of a class made by define_class.
template <class T, class = void>
struct Argument {
    static_assert(kHasClass<T>);
    const T* value = nullptr;

    bool read(PyObject* object) { return (value = value_of<T>(object)) != nullptr; }
    static std::string expected() {
        return pybind11::str(pybind11::handle(reinterpret_cast<PyObject*>(class_of<T>())).attr("__name__"));
    }
    operator const T&() const { return *value; }
};

// An int that fits into T. Objects that merely convert to int are refused: a tensor with one element is no address.
template <class T>
struct Argument<T, std::enable_if_t<std::is_integral_v<T>>> {
    T value{};

    bool read(PyObject* object) {
        if (!PyLong_Check(object)) return false;
        using Wide = std::conditional_t<std::is_signed_v<T>, long long, unsigned long long>;
        Wide wide;
        if constexpr (std::is_signed_v<T>) {
            wide = PyLong_AsLongLong(object);
        } else {
            wide = PyLong_AsUnsignedLongLong(object);
        }
        if (wide == Wide(-1) && PyErr_Occurred()) return PyErr_Clear(), false;
        value = T(wide);
        return Wide(value) == wide;
    }
    static std::string expected() {
        if (std::is_same_v<T, bool>) return "bool";
        return std::string("int of ") + std::to_string(8 * sizeof(T)) + (std::is_signed_v<T> ? " bits" : " bits, ≥ 0");
    }
    operator T() const { return value; }
};

template <class T>
struct Argument<T, std::enable_if_t<std::is_floating_point_v<T>>> {
    T value{};

    bool read(PyObject* object) {
        if (!PyFloat_Check(object) && !PyLong_Check(object)) return false;
        const double wide = PyFloat_AsDouble(object);
        if (wide == -1.0 && PyErr_Occurred()) return PyErr_Clear(), false;
        value = T(wide);
        return true;
    }
    static std::string expected() { return "float"; }
    operator T() const { return value; }
};

// Calls read_element for every element of a list or tuple. Returns their number, or -1 if one of them fails or the
// object is neither.
template <class ReadElement>
Py_ssize_t read_all(PyObject* object, ReadElement read_element) {
    if (!PyList_Check(object) && !PyTuple_Check(object)) return -1;
    const Py_ssize_t count = PySequence_Fast_GET_SIZE(object);
    for (Py_ssize_t i = 0; i < count; i++) {
        if (!read_element(i, PySequence_Fast_GET_ITEM(object, i))) return -1;
    }
    return count;
}

template <class T>
struct Argument<std::vector<T>> {
    std::vector<T> values;

    bool read(PyObject* object) {
        return read_all(object, [&](Py_ssize_t, PyObject* element) {
                   Argument<T> argument;
                   return argument.read(element) && (values.push_back(argument), true);
               }) >= 0;
    }
    static std::string expected() { return "list of " + Argument<T>::expected(); }
    operator const std::vector<T>&() { return values; }
};

template <class T, size_t kCount>
struct Argument<std::array<T, kCount>> {
    std::array<T, kCount> values;

    bool read(PyObject* object) {
        return read_all(object, [&](Py_ssize_t i, PyObject* element) {
                   Argument<T> argument;
                   return i < Py_ssize_t(kCount) && argument.read(element) && (values[size_t(i)] = argument, true);
               }) == Py_ssize_t(kCount);
    }
    static std::string expected() { return "tuple of " + std::to_string(kCount) + " × " + Argument<T>::expected(); }
    operator const std::array<T, kCount>&() { return values; }
};

// An object of a class made by define_class, or None.
template <class T>
struct Argument<const T*> {
    Argument<T> argument;
    bool has_value = false;

    bool read(PyObject* object) { return has_value = object != Py_None, !has_value || argument.read(object); }
    static std::string expected() { return Argument<T>::expected() + " or None"; }
    operator const T*() { return has_value ? &static_cast<const T&>(argument) : nullptr; }
};

// ---- a signature --------------------------------------------------------------------------------------------------

// A signature as in Python, such as "(linear, adapters, *, ids=0, y, y_stride)". Defaults are zeros or None. Arguments
// after the asterisk are keyword-only.
struct Signature {
    struct Name {
        PyObject* text;  // interned
        bool optional;
    };

    std::string function;
    std::vector<Name> names;
    size_t positional;

    Signature(std::string name, const std::string& text) : function(std::move(name)), positional(size_t(-1)) {
        for (size_t from = 1; from + 1 < text.size();) {
            const size_t to = std::min(text.find(", ", from), text.size() - 1);
            const std::string name = text.substr(from, to - from);
            from = to + 2;
            if (name == "*") {
                positional = names.size();
                continue;
            }
            PyObject* interned = PyUnicode_InternFromString(name.substr(0, name.find('=')).c_str());
            if (!interned) throw pybind11::error_already_set();
            names.push_back({interned, name.find('=') != std::string::npos});
        }
        positional = std::min(positional, names.size());
    }

    // Assigns a call's arguments to their places in `out`. Places of arguments that were not passed stay null.
    void assign(PyObject* const* in, size_t count, PyObject* keywords, PyObject** out) const {
        if (count > positional) {
            PyErr_Format(PyExc_TypeError, "%s() takes %zu positional arguments, got %zu", function.c_str(), positional,
                         count);
            throw pybind11::error_already_set();
        }
        for (size_t i = 0; i < count; i++) out[i] = in[i];
        const size_t keyword_count = keywords ? size_t(PyTuple_GET_SIZE(keywords)) : 0;
        size_t place = count;
        for (size_t k = 0; k < keyword_count; k++) {
            PyObject* keyword = PyTuple_GET_ITEM(keywords, Py_ssize_t(k));
            while (place < names.size() && names[place].optional && names[place].text != keyword) place++;
            if (place == names.size() || names[place].text != keyword) place = index_of(keyword);
            if (out[place]) fail("got argument %R twice", keyword);
            out[place++] = in[count + k];
        }
        for (size_t i = 0; i < names.size(); i++) {
            if (!out[i] && !names[i].optional) fail("missing argument %R", names[i].text);
        }
    }

    size_t index_of(PyObject* keyword) const {
        for (size_t i = 0; i < names.size(); i++) {
            if (names[i].text == keyword || PyUnicode_Compare(names[i].text, keyword) == 0) return i;
        }
        fail("unknown argument %R", keyword);
    }

    [[noreturn]] void fail(const char* what, PyObject* name) const {
        PyErr_Format(PyExc_TypeError, (std::string("%s() ") + what).c_str(), function.c_str(), name);
        throw pybind11::error_already_set();
    }

    // Shows the value of an int, which may be too large, and the type of anything else.
    [[noreturn]] void fail_type(size_t i, const std::string& expected, PyObject* got) const {
        const pybind11::handle shown = PyLong_Check(got) ? got : reinterpret_cast<PyObject*>(Py_TYPE(got));
        PyErr_Format(PyExc_TypeError, "%s() argument %R: expected %s, got %R", function.c_str(), names[i].text,
                     expected.c_str(), shown.ptr());
        throw pybind11::error_already_set();
    }
};

// ---- a function ---------------------------------------------------------------------------------------------------

template <class Body, class Return, class... In>
struct NamedFunction {
    Body body;
    Signature signature;
    std::string doc;
    PyMethodDef method;

    static PyObject* call(PyObject* self, PyObject* const* in, Py_ssize_t count, PyObject* keywords) {
        const auto* function = static_cast<const NamedFunction*>(PyCapsule_GetPointer(self, nullptr));
        return with_python_errors(
            [&] { return function->run(in, size_t(count), keywords, std::index_sequence_for<In...>()); });
    }

    template <size_t... I>
    PyObject* run(PyObject* const* in, size_t count, PyObject* keywords, std::index_sequence<I...>) const {
        PyObject* objects[sizeof...(In)] = {};
        signature.assign(in, count, keywords, objects);
        std::tuple<Argument<std::remove_cv_t<std::remove_reference_t<In>>>...> arguments;
        (read(I, objects[I], std::get<I>(arguments)), ...);
        if constexpr (std::is_void_v<Return>) {
            body(static_cast<In>(std::get<I>(arguments))...);
            return pybind11::none().release().ptr();
        } else if constexpr (kHasClass<Return>) {
            return object_of<Return>(body(static_cast<In>(std::get<I>(arguments))...)).release().ptr();
        } else {
            pybind11::object result =
                pybind11::detail::object_or_cast(body(static_cast<In>(std::get<I>(arguments))...));
            return result.release().ptr();
        }
    }

    template <class Arg>
    void read(size_t i, PyObject* object, Arg& argument) const {
        if (object && !argument.read(object)) signature.fail_type(i, Arg::expected(), object);
    }
};

template <class Body, class Class, class Return, class... In>
void define(pybind11::handle scope, const char* name, const std::string& signature, const char* doc, Body body,
            Return (Class::*)(In...) const) {
    using Function = NamedFunction<Body, Return, In...>;
    const bool in_class = PyType_Check(scope.ptr());
    const pybind11::str module = scope.attr(in_class ? "__module__" : "__name__");
    const std::string owner = in_class ? std::string(pybind11::str(scope.attr("__name__"))) + "." : "";
    // Never freed: it lives as long as the module.
    auto* function = new Function{std::move(body), {owner + name, signature}, name + signature + "\n--\n\n" + doc, {}};
    if (function->signature.names.size() != sizeof...(In)) throw std::logic_error(owner + name + signature);
    const auto call = reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&Function::call));
    function->method = {name, call, METH_FASTCALL | METH_KEYWORDS, function->doc.c_str()};
    const pybind11::capsule self(static_cast<const void*>(function));
    PyObject* object = PyCFunction_NewEx(&function->method, self.ptr(), module.ptr());
    if (!object) throw pybind11::error_already_set();
    scope.attr(name) = pybind11::reinterpret_steal<pybind11::object>(object);
}

// Adds a function to a module, or a static method to a class.
template <class Body>
void define(pybind11::handle scope, const char* name, const char* signature, const char* doc, Body body) {
    define(scope, name, signature, doc, std::move(body), &Body::operator());
}

}  // namespace peftk
