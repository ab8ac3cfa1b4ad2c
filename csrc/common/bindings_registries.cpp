// What runtime/native_request.py asks of a model's modules before each token: hundreds of small dicts, each
// of which Python's loop would fetch from memory after the other.
#include <pybind11/pybind11.h>

#include "common/errors.h"

namespace py = pybind11;

namespace {

constexpr const char* kOp = "are_as_noted";

PyObject* dict_at(const py::list& dicts, Py_ssize_t i) {
    PyObject* dict = PyList_GET_ITEM(dicts.ptr(), i);
    if (!PyDict_Check(dict)) throw py::type_error("a list of dicts wanted");
    return dict;
}

bool are_empty(const py::list& dicts) {
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(dicts.ptr()); ++i)
        if (PyDict_Size(dict_at(dicts, i)) != 0) return false;
    return true;
}

// Whether dicts[i] has values[i], the same object, by the name names[i]; what is missing is None.
bool are_as_noted(const py::list& dicts, const py::list& names, const py::list& values) {
    const Py_ssize_t count = PyList_GET_SIZE(dicts.ptr());
    moe::check(PyList_GET_SIZE(names.ptr()) == count && PyList_GET_SIZE(values.ptr()) == count, kOp,
               "lists of one length wanted");
    for (Py_ssize_t i = 0; i < count; ++i) {
        PyObject* found =
            PyDict_GetItemWithError(dict_at(dicts, i), PyList_GET_ITEM(names.ptr(), i));  // borrowed
        if (!found && PyErr_Occurred()) throw py::error_already_set();
        if ((found ? found : Py_None) != PyList_GET_ITEM(values.ptr(), i)) return false;
    }
    return true;
}

}  // namespace

void register_registries(py::module_& m) {
    m.def("are_empty", &are_empty, py::arg("dicts"), "Whether none of the dicts holds anything.");
    m.def("are_as_noted", &are_as_noted, py::arg("dicts"), py::arg("names"), py::arg("values"),
          "Whether each dict has this very value by that name; None also where it has none.");
}
