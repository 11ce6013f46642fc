// Python classes whose objects hold one C++ value. Creating such an object is faster than with pybind11, which takes a
// quarter of a microsecond, since it registers every object.
#pragma once

#include <pybind11/pybind11.h>

#include <new>
#include <string>
#include <utility>

namespace peftk {

template <class T>
struct Object {
    PyObject_HEAD T value;
};

// Whether T has such a class.
template <class T>
constexpr bool kHasClass = false;

// T's class, null until it is defined. `static`: each module has its own.
template <class T>
static inline PyTypeObject*& class_of() {
    static PyTypeObject* type = nullptr;
    return type;
}

template <class T>
static inline pybind11::object object_of(T value) {
    Object<T>* object = PyObject_New(Object<T>, class_of<T>());
    if (!object) throw pybind11::error_already_set();
    new (&object->value) T(std::move(value));
    return pybind11::reinterpret_steal<pybind11::object>(reinterpret_cast<PyObject*>(object));
}

// The value of an object whose class is exactly T's, else null.
template <class T>
static inline const T* value_of(PyObject* object) {
    return Py_TYPE(object) == class_of<T>() ? &reinterpret_cast<Object<T>*>(object)->value : nullptr;
}

template <class T>
static void delete_object(PyObject* object) {
    PyTypeObject* type = Py_TYPE(object);
    reinterpret_cast<Object<T>*>(object)->value.~T();
    PyObject_Free(object);
    Py_DECREF(type);
}

// Adds T's class to a module. Static methods (`define`) create its objects.
template <class T>
static inline pybind11::object define_class(pybind11::module_& module, const char* name, const char* doc) {
    static_assert(kHasClass<T>);
    PyType_Slot slots[] = {
        {Py_tp_dealloc, reinterpret_cast<void*>(&delete_object<T>)}, {Py_tp_doc, const_cast<char*>(doc)}, {0, nullptr}};
    // Never freed, since Python keeps the pointer.
    const auto* full_name = new std::string(std::string(pybind11::str(module.attr("__name__"))) + "." + name);
    PyType_Spec spec{full_name->c_str(), int(sizeof(Object<T>)), 0,
                     Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, slots};
    PyObject* type = PyType_FromSpec(&spec);
    if (!type) throw pybind11::error_already_set();
    class_of<T>() = reinterpret_cast<PyTypeObject*>(type);
    auto class_object = pybind11::reinterpret_borrow<pybind11::object>(type);  // class_of keeps the other reference
    module.attr(name) = class_object;
    return class_object;
}

}  // namespace peftk
